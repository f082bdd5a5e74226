"""How fast is a training step here, and where does its time go? Trains nothing that is kept, prints a table.

python train.py config/bench.py                      6 layers, 384 wide, on the built-in data
python train.py config/small.py --profile            the same of any other recipe
"""
out_dir = "out/bench"
dataset = "python"
n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
batch_size, gradient_accumulation_steps = 8, 1
profile = True
compile = False  # --compile to compare
