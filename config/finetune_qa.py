"""Answers that are spans of a text, on files in SQuAD's format: a pretrained encoder is needed."""
out_dir = "out/qa"
task = "qa"
init_from = "sentence-transformers/all-MiniLM-L6-v2"  # English; Chinese: google-bert/bert-base-chinese

max_length = 320  # longer contexts are read in windows that overlap by half
epochs, batch_size, learning_rate = 4, 12, 1e-4
patience = 2
