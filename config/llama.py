"""Llama 3's architecture at the size of small.py, on the same data.

python sample.py --out_dir=out/llama --export=folder writes it as transformers' LlamaForCausalLM.
"""
from config.small import *

out_dir = "out/llama"
n_kv_head = 2  # two heads of queries share one of keys and values: the cache is half the size
n_inner = 344  # SwiGLU has three matrices, so two thirds of the usual 4 * n_embd each
act = "swiglu"  # (Shazeer 2020)
norm_weight, norm_eps, norm_embd = True, 1e-5, False
qk_norm, softcap = None, None
rope_theta = 500000.0
learning_rate, embd_lr = 3e-3, None  # no norm behind the embedding
