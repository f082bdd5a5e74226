"""Chinese sentiment: the English recipe, for longer texts; it reads pieces of words, or of characters."""
from config.finetune_sentiment import *

out_dir = "out/sentiment_zh"
block_size = 512
