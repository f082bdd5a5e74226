"""Is a sentence good or bad? From scratch, on your own file: minutes on two CPU cores."""
out_dir = "out/sentiment"
task = "classify"

# With few texts a Transformer alone stays below the best linear model of words and phrases. They err in
# different places: the mixture of both, by a share that the validation texts choose, is better than either.
linear = 4

# a small encoder: with little data a larger one learns it by heart
tokenizer, vocab_size = "bpe", 8192
n_layer, n_head, n_embd, block_size = 2, 4, 128, 128
causal, pos, norm, act, norm_embd, init = False, "rope", "rms", "relu2", True, "zero_out"
pool = "mean"

# no text is read twice in the same way: tokens are hidden, and words cut into other tokens
dropout, token_dropout, cut_rate = 0.3, 0.3, 0.1

epochs, batch_size, patience = 5, 64, 4
optimizer, muon_lr, learning_rate, embd_lr, weight_decay = "muon", 0.005, 5e-4, 1e-2, 0.1
label_smoothing = 0.1
