"""The Transformer of 2017 (Vaswani et al.; torch.nn.TransformerEncoder) as a language model, for comparison.

Read it beside small.py: the same data and the same size, and every line that differs is something learned
since.
"""
from config.small import *

out_dir = "out/vanilla"
pos = "sinusoidal"  # added to the embedding once, at the bottom
norm, norm_weight, norm_eps, norm_embd = "layer", True, 1e-5, False
norm_place = "post"  # the norm sits on the residual stream itself, so a deep stack needs a long warmup
qk_norm, act, bias = None, "relu", True
tied, head_bias, softcap = False, True, None
init = "uniform"
dropout = 0.1
optimizer, learning_rate, embd_lr, min_lr = "adamw", 1e-3, None, 1e-5
schedule, warmup_iters = "cosine", 100
