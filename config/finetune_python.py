"""Which package of Python's library does this snippet come from? No download: it is on your disk."""
from config.finetune_sentiment import *

out_dir = "out/python_packages"
data = "python_packages"
n_layer, n_head, n_embd = 2, 4, 128  # thousands of snippets teach a larger model
vocab_size, dropout, token_dropout, epochs = 4096, 0.2, 0.2, 8
