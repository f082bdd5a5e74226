"""Chinese sentiment, or topics of news: the English recipe with a larger vocabulary."""
from config.finetune_sentiment import *

out_dir = "out/sentiment_zh"
vocab_size = 12000  # pairs of bytes become characters first, then frequent words
dropout, token_dropout, epochs = 0.3, 0.3, 8  # for tens of thousands of texts
