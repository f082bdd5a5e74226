"""Is a sentence good or bad? From scratch, on your own file: half a minute on a CPU core.

From a few thousand texts a Transformer does not beat a bag of words (RESULTS.md): --init_from=ENCODER does.
"""
out_dir = "out/sentiment"
task = "classify"

# a tiny encoder: what is larger learns so little data by heart
tokenizer, vocab_size = "bpe", 8192
n_layer, n_head, n_embd, block_size = 1, 2, 64, 128
causal, pos, norm, act, norm_embd, init = False, "rope", "rms", "relu2", True, "zero_out"
pool = "mean"

dropout, token_dropout = 0.3, 0.5  # half of the tokens are masked, others each time, so none decides alone

epochs, batch_size, patience = 5, 64, 4
optimizer, muon_lr, learning_rate, embd_lr, weight_decay = "muon", 0.005, 5e-4, 1e-2, 0.1
label_smoothing = 0.1
