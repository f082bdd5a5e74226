"""Chinese sentiment: the English recipe, for longer texts."""
from config.finetune_sentiment import *

out_dir = "out/sentiment_zh"
block_size = 512
n_layer, n_head, n_embd = 2, 4, 128
token_dropout = 0.3
