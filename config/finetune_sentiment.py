"""Is a sentence good or bad? From scratch, on your own file: minutes on two CPU cores."""
out_dir = "out/sentiment"
task = "classify"

# a small encoder: with little data a larger one learns it by heart
tokenizer, vocab_size = "bpe", 8192
n_layer, n_head, n_embd, block_size = 2, 4, 128, 128
causal, pos, norm, act, norm_embd, init = False, "rope", "rms", "relu2", True, "zero_out"
pool = "mean"
dropout, token_dropout = 0.5, 0.5  # half of what it reads is hidden, so that no single word decides

epochs, batch_size, learning_rate, weight_decay = 10, 64, 5e-4, 0.1
label_smoothing, patience = 0.1, 4
