"""Follow instructions: a JSON list of instruction, input and output; the loss is on the output alone."""
out_dir = "out/instruct"
task = "lm"
init_from = "openai-community/gpt2"  # or a run of yours; --lora_rank=8 if memory is short

max_length = 256
epochs, batch_size, learning_rate = 3, 8, 5e-5
