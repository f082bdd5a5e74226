"""Which of several topics is a text on? From scratch, on tens of thousands: minutes on two CPU cores."""
from config.finetune_sentiment import *

out_dir = "out/topics"
vocab_size = 12000  # Chinese: pairs of bytes become characters first, then frequent words
n_gram, linear_start = 1, False  # with so many texts a Transformer learns more by itself
n_head, n_embd = 4, 128
dropout, token_dropout = 0.3, 0.3
optimizer, muon_lr, embd_lr, epochs = "muon", 0.005, 1e-2, 8
