"""Is a sentence good or bad? From scratch, on your own file: a minute on two CPU cores."""
out_dir = "out/sentiment"
task = "classify"

# pieces of words, and runs of up to three of them: what tells good from bad is mostly which of these occur
tokenizer, vocab_size = "bpe", 1024
n_gram, n_gram_rows = 3, 131072
linear_start = True  # with few texts a Transformer alone stays below the best linear model: it starts as that

# a small encoder: with little data a larger one learns it by heart
n_layer, n_head, n_embd, block_size = 2, 2, 32, 128
causal, pos, norm, act, norm_embd, init = False, "rope", "rms", "relu2", True, "zero_out"
pool = "mean"
dropout, token_dropout = 0.1, 0.3  # a third of what it reads is hidden, so that no single word decides

epochs, batch_size, learning_rate, weight_decay = 3, 64, 5e-4, 0.1
embd_lr = 1e-3
label_smoothing, patience = 0.1, 4
