"""Which topic is a text about? From scratch, on tens of thousands of texts: minutes on two CPU cores."""
from config.finetune_sentiment import *

out_dir = "out/topics"
vocab_size = 12000  # Chinese: pairs of bytes become characters first, then frequent words
n_layer, n_head, n_embd = 2, 4, 128  # so many texts teach a larger model
token_dropout = 0.3
