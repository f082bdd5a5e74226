"""GPT-2 124M from scratch, on a GPU or several.

The text comes from you: python prepare.py --dataset=openwebtext --source=FOLDER --tokenizer=gpt2
"""
out_dir = "out/gpt2"
dataset = "openwebtext"
n_layer, n_head, n_embd, block_size = 12, 12, 768, 1024  # the model's fields, as they are by default
vocab_size = 50304  # 50,258 tokens and some that never come: a multiple of 128 suits a GPU's tiles

# 8 windows x 64 micro-batches x 1024 tokens: half a million tokens a step, on 1, 2, 4, 8... GPUs
batch_size, gradient_accumulation_steps = 8, 64
learning_rate, min_lr, warmup_iters = 6e-4, 6e-5, 700
max_iters = 19073  # 10 billion tokens
weight_decay = 0.1
eval_interval, eval_iters, log_interval = 250, 1024, 10
