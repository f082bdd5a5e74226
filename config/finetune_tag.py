"""Names in a text, word by word, on CoNLL files: a word and its BIO tag a line."""
out_dir = "out/tag"
task = "tag"
init_from = "sentence-transformers/all-MiniLM-L6-v2"

epochs, batch_size, learning_rate = 6, 16, 2e-4
patience = 3
