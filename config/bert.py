"""Masked pretraining, BERT's task with the modern model, on Python's own library: minutes on two cores.

python sample.py --out_dir=out/bert --start="import <|mask|>" fills gaps; fine-tuning can start from it.
"""
from config.small import *

out_dir = "out/bert"
causal = False  # a position sees both sides, so it learns to fill gaps instead of continuing a text
mask_rate = 0.3  # twice BERT's: each step teaches more, and enough is left to see (Wettig et al. 2022)
max_iters = 2000  # a step has a third of the targets that small.py's has
sample_tokens = 40
