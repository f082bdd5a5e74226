"""nanoGPT's benchmark: tiny Shakespeare, byte by byte. The modern recipe, sized for two CPU cores.

Its split is 90/10, without a test set: python prepare.py --dataset=shakespeare_char --test_fraction=0
(and --source=input.txt for a copy that you have).
"""
from config.small import *

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"
n_gram, n_gram_rows = 5, 8192  # a vector for each 2 to 5 bytes in a row: no family elsewhere has that
weight_decay = 0.1  # without it, the vectors of rare n-grams memorize the text
learning_rate, embd_lr = 3e-3, 0.03  # every byte is seen often
max_iters = 1000
eval_interval, eval_iters, log_interval = 500, 0, 25
