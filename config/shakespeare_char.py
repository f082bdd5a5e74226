"""nanoGPT's benchmark, tiny Shakespeare byte by byte, by the modern recipe and sized for two CPU cores.

Its split is 90/10, without a test set: python prepare.py --dataset=shakespeare_char --test_fraction=0
(and --source=input.txt for a copy that you have).
"""
from config.small import *

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"
n_gram, n_gram_rows = 5, 8192  # what two to five bytes say together is looked up; no family elsewhere has it
weight_decay = 0.1  # the vectors of rare runs would learn the text by heart
learning_rate, embd_lr = 3e-3, 0.03  # a byte comes often
max_iters = 1000
eval_interval, eval_iters, log_interval = 500, 0, 25
