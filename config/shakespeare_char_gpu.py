"""nanoGPT's benchmark at the size of its GPU recipe: 10.7 million parameters, context 256."""
from config.shakespeare_char import *

out_dir = "out/shakespeare_char_gpu"
n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
n_gram, weight_decay, embd_lr = 1, 0.0, 0.1
batch_size = 64
dropout = 0.2  # the model is large for a text of 1 MB
max_iters = 2000
eval_interval = 250
compile = True
