"""Masked pretraining, BERT's task with the modern model, on the Python standard library: minutes on two cores.

python sample.py --out_dir=out/bert --start="import <|mask|>" then fills gaps; fine-tuning starts from out/bert.
"""
from config.small import *

out_dir = "out/bert"
causal = False  # a position sees both sides, so it learns to fill gaps rather than to go on
mask_rate = 0.3  # more than BERT's 15%: more to learn from a step, and still enough to see (Wettig et al. 2022)
max_iters = 2000  # a step has a third of the targets that small.py's has
sample_tokens = 40
