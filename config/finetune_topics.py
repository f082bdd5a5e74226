"""Which of several topics is a text on? From scratch, on tens of thousands: minutes on two CPU cores."""
from config.finetune_sentiment import *

out_dir = "out/topics"
vocab_size = 12000  # Chinese: pairs of bytes become characters first, then frequent words
cut_rate = 0.2
