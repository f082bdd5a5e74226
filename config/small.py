"""The modern recipe, on the Python standard library of this machine: no download, minutes on two CPU
cores."""
out_dir = "out/small"
dataset = "python"

# the model: each line is an idea that came after GPT-2, and pays
n_layer, n_head, n_embd, block_size = 4, 4, 128, 128
pos = "rope"  # positions as rotations of queries and keys (Su et al. 2021)
norm, norm_weight, norm_eps = "rms", False, 1e-6  # no mean, no gain: one number less to learn a channel
norm_embd = True  # the residual stream starts at length 1
qk_norm = "after"  # attention scores stay bounded, learning rates can be high
act = "relu2"  # the cheapest activation there is, and among the best (So et al. 2021)
tied = False  # the embedding and the head learn at their own pace
softcap = 15.0  # no logit runs away
init = "zero_out"  # blocks start as the identity, the first prediction is uniform

# the optimizer
optimizer = "muon"  # for the blocks' matrices; AdamW for the embedding and the head
muon_lr, learning_rate = 0.02, 1e-2
embd_lr = 0.3  # a norm follows the embedding: its steps may be large, and a rare token has few of them
weight_decay = 0.0
schedule, warmup_iters, min_lr, decay_fraction = "wsd", 10, 0.0, 0.6

batch_size, gradient_accumulation_steps = 16, 1
max_iters = 1000
eval_interval, eval_iters, log_interval = 500, 200, 50
compile = False  # half a minute to compile does not pay back in so short a run
