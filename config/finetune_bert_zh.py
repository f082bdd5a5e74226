"""Chinese texts by a pretrained Chinese BERT, on your own file. Not run here with its published weights.

The rates are the BERT paper's (Devlin et al. 2019, appendix A.3: batches of 16 or 32, 5e-5, 3e-5 or 2e-5,
2 to 4 epochs, dropout 0.1), the middle ones: `python -m tools.search finetune.py` tries the others.
"""
out_dir = "out/bert_zh"
init_from = "hfl/chinese-roberta-wwm-ext"  # a BERT in spite of its name; bert-base-chinese goes as well
task = "classify"
max_length = 256  # tokens, nearly one a character; it could read 512

epochs, batch_size = 3, 32
optimizer, learning_rate, schedule, warmup = "adamw", 3e-5, "linear", 0.1
beta2, weight_decay, dropout = 0.999, 0.01, 0.1
