"""
How fast is it on this machine, and where does the time go? Nothing of it is kept.

    python -m tools.bench                                a training step: 6 layers, 384 wide, random tokens
    python -m tools.bench config/small.py --batch_size=8     of any recipe, with any setting of train.py
    python -m tools.bench table                          GPT-2 on this GPU, as a table to paste into a report
    python -m tools.bench write --out_dir=out/small      writing: the prompt at once, then token after token
    python -m tools.bench write --n_layer=24 --quantize=int8     by random weights, with the fields of Config

Each figure has beside it what the machine can do at best: training is as fast as matrices are multiplied,
writing as fast as memory is read.
"""
from __future__ import annotations

import collections
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Literal, Optional

# before torch: Ctrl-C is silent from here on
from config import SettingError, at_least, launch, model_asked, needs_console, values_of

import numpy as np
import torch
from torch import nn

import sample
import train
from lib.run import STARTED, Machine, peak_memory, stored_settings
from lib.tokenizer import make_tokenizer
from model import Config, Transformer

# -----------------------------------------------------------------------------
# Settings of `write`; those of a training step are train.py's. Both take the fields of Config too.
out_dir: str = ""  # a run's folder, a Hugging Face folder or id; empty: random weights
init_from: str = "resume"  # the model in out_dir; else its folder or id, as --out_dir takes too
prompt_tokens: at_least(1) = 128  # read at once; fewer if the context is short
max_new_tokens: at_least(2) = 64  # written after them, one at a time; at most half of the context
batch_size: at_least(1) = 8  # texts at once, beside one alone
quantize: Optional[Literal["int8"]] = None  # int8: measure the weights in a byte each too, on a CPU
compare: bool = False  # measure transformers' generate too, with the Hugging Face model in out_dir
compile: bool = False  # the step from token to token
device: str = "auto"  # auto: cuda, else mps, else cpu
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: what is fast there
# -----------------------------------------------------------------------------

# The training step that is timed if no words say which.
RECIPE = ["--dataset=random", "--n_layer=6", "--n_head=6", "--n_embd=384", "--block_size=256",
          "--batch_size=8", "--gradient_accumulation_steps=1", "--compile=False"]
# The rows of `table`: what fits on this GPU, and how fast; without one, a rehearsal.
ROWS = {
    "cuda": [*(f"config/gpt2.py --dataset=random --batch_size={n} --gradient_accumulation_steps={128 // n}"
               for n in (8, 16, 32, 64)),
             "config/shakespeare_char_gpu.py --dataset=random",
             *(f"write --dtype=bfloat16 --batch_size=1 --compile={compile}" for compile in (False, True))],
    "cpu": ["--batch_size=1", "--batch_size=8", "write --n_layer=6 --n_head=6 --n_embd=384 --batch_size=1"],
}
STEPS = 10  # training steps that are timed
ROUNDS = 3  # times that writing is timed: the fastest counts


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was asked to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def fastest(work: Callable, device: torch.device, times: int = 8) -> float:
    """Seconds that a call takes at best: what else goes on in a machine only adds to it."""
    found = []
    for _ in range(times):
        start = now(device)
        work()
        found.append(now(device) - start)
    return min(found)


def product_rate(machine: Machine) -> float:
    """FLOP/s of a product of large matrices, in the precision of training."""
    n = 2048 if machine.device.type == "cpu" else 4096
    a = torch.randn(n, n, device=machine.device)
    with machine.amp():
        return 2 * n**3 / fastest(lambda: a @ a, machine.device)


def reading_rate(device: torch.device) -> float:
    """Bytes/s that a large matrix is read with, to multiply it with a vector; by rows or by columns."""
    n = 8192 if device.type == "cpu" else 16384  # far more than the caches hold
    matrix, vector = torch.ones(n, n, device=device), torch.ones(n, device=device)
    rows = fastest(lambda: matrix @ vector, device)
    columns = fastest(lambda: matrix.T @ vector, device)
    return 4 * n * n / min(rows, columns)


# -----------------------------------------------------------------------------
# A training step

class Stopwatch(Machine):
    """train_step asks its machine for a precision before each forward pass, and for a sum after the last
    backward pass: here is where a step is taken apart."""

    def start(self) -> None:
        self.seconds = dict.fromkeys(("data", "forward", "backward", "update"), 0.0)
        self.last = now(self.device)

    def lap(self, part: str) -> None:
        """What has passed since the lap before was spent on this part."""
        before, self.last = self.last, now(self.device)
        self.seconds[part] += self.last - before

    @contextlib.contextmanager
    def amp(self):
        self.lap("backward")  # of the micro-batch before
        with super().amp():
            yield
        self.lap("forward")

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.lap("backward")
        return super().sum(tensor)


def new_model(given: dict) -> Transformer:
    try:
        return Transformer(Config(**given))
    except ValueError as error:  # it names the field
        raise SettingError(str(error)) from None


def random_data(config: Config) -> train.Data:
    """Tokens drawn at random: what they say makes a step no faster."""
    ids = np.random.default_rng(0).integers(config.vocab_size, size=2**20 + config.block_size)
    return train.Data("random", ids, ids, make_tokenizer("bytes", [], 0), many=True, sums={},
                      token_bytes=None)


def bench_training(given: dict, s: SimpleNamespace) -> None:
    """given: the model's settings; s: all of train.py's, but that dataset=random needs no data."""
    machine = Stopwatch(s.device, s.dtype, s.seed, s.deterministic, s.backend)
    machine.start()
    origin = s.out_dir if s.init_from == "resume" else s.init_from
    start = train.open_model(SimpleNamespace(init_from=origin, resumed=False), given, s.chars)
    if s.dataset == "random":
        model = start[0] or new_model(given)
        data = random_data(model.config)
    else:
        model, data = train.fit(*start, given, s.dataset, machine, origin)
    T = model.config.block_size
    machine.choose(s.matmul, model.config.n_embd, {})
    mask, counted = None, None
    if not model.config.causal:
        mask = partial(train.masked_tokens, rate=s.mask_rate, token=data.tokenizer.mask,
                       vocab_size=data.tokenizer.vocab_size)
        counted = train.count_masked(T, s.mask_rate)
    windows = train.Windows(data.train, T, s.seed, mask)
    if s.remat:
        train.recompute_blocks(model)
    teacher = train.load_teacher(s.teacher, model.config, data.tokenizer.to_dict()) if s.teacher else None
    objective = train.Objective(model, counted, s.label_smoothing, teacher, s.teacher_share,
                                s.teacher_temperature)
    train.introduce(model, data, machine, s.compile)
    objective, _ = train.ready(objective, machine, s.compile, windows.get(0, s.batch_size))
    optimizers = train.make_optimizers(model, s.optimizer, s.learning_rate, s.muon_lr, s.weight_decay,
                                       (s.beta1, s.beta2), s.momentum, s.embd_lr)

    step_windows = s.batch_size * s.gradient_accumulation_steps
    share = step_windows // machine.world
    for step in range(-2, STEPS):  # two to warm up
        if step == 0:
            machine.start()
        first = max(0, step) * step_windows + machine.rank * share
        x, y = (machine.to(t) for t in windows.get(first, share))  # (N, T) each; the loop reads ahead
        micro_batches = list(zip(x.split(s.batch_size), y.split(s.batch_size), strict=True))
        machine.lap("data")
        train.train_step(objective, micro_batches, (y != -1).sum(), model, optimizers, machine, s.grad_clip)
        machine.lap("update")
        if step == -2:
            until_first = time.time() - STARTED
            machine.say(f"measuring {STEPS} steps; the first one ended after {until_first:.1f} s")
    if machine.main:
        print("\n" + training_table(dict(machine.seconds), step_windows * T, model, machine, until_first))


def training_table(seconds: dict, tokens: int, model: Transformer, machine: Machine, started: float) -> str:
    """seconds: of STEPS steps, by part; tokens: of a step, in all processes; started: seconds that the first
    step came after."""
    total = sum(seconds.values())
    speed = tokens * STEPS / total
    flops, best = speed * model.flops_per_token() / machine.world, product_rate(machine)
    memory = peak_memory()
    if machine.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(machine.device)
    each = " each" if machine.world > 1 else ""
    lines = []
    for name, part in {**seconds, "step": total}.items():
        lines.append(f"{name:10}{1000 * part / STEPS:10.1f} ms {part / total:7.1%}")
    return "\n".join([*lines,
                      f"speed     {speed:10,.0f} tokens/s, {flops / 1e9:,.0f} GFLOP/s{each}: "
                      f"{flops / best:.0%} of {best / 1e9:,.0f}, a large matrix product's",
                      f"start     {started:10.1f} s from the command to the end of the first step",
                      f"memory    {memory / 1e9:10.2f} GB at most"])


# -----------------------------------------------------------------------------
# Writing

def model_to_write(given: dict, machine: Machine) -> Transformer:
    """The one in out_dir, or a new one with these fields. Raises SettingError."""
    if out_dir:
        if given:
            raise SettingError(f"{', '.join(given)}: the model in {out_dir} has its own: leave this out")
        model, _ = sample.load(out_dir, machine.device, machine.dtype)
        model = getattr(model, "body", model)  # of a fine-tuned one
    else:
        model = new_model(given).to(machine.device, machine.dtype)
    if model.head is None or not model.config.causal:
        raise SettingError(f"{out_dir or 'causal=False'}: only a causal model with a head can write")
    return model.eval()


def time_writing(model: Transformer, prompt: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds until the first token after the prompt, (B, T), and for each of the others."""
    firsts, others = [], []
    for _ in range(1 + ROUNDS):  # the first warms up
        start = now(prompt.device)
        tokens = model.stream(prompt, new, temperature=0, compile=compile)
        next(tokens)
        first = now(prompt.device)
        collections.deque(tokens, maxlen=0)  # to the end
        firsts.append(first - start)
        others.append((now(prompt.device) - first) / (new - 1))
    return min(firsts[1:]), min(others[1:])


def time_transformers(prompt: torch.Tensor, new: int, machine: Machine) -> tuple[float, float]:
    """The same of transformers' generate, with the model in out_dir."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
        disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(out_dir, dtype=machine.dtype).to(machine.device).eval()
    except (ImportError, OSError, ValueError) as error:
        raise SettingError("compare=True: needs transformers, and a Hugging Face model in out_dir: "
                           f"{str(error).splitlines()[0]}") from None

    def write(n):
        model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)

    write(new)  # to warm up
    first, whole = (fastest(partial(write, n), machine.device, ROUNDS) for n in (1, new))
    return first, (whole - first) / (new - 1)


def bench_writing(given: dict) -> None:
    global out_dir
    out_dir = model_asked(globals())
    machine = Machine(device, dtype)
    model = model_to_write(given, machine)
    context = model.config.block_size
    # what one token needs: the weights of all matrix products, the head's too; no look-ups
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    new = max(2, min(max_new_tokens, context // 2))
    length = max(1, min(prompt_tokens, context - new))
    rate = reading_rate(machine.device)
    weight = model.wte.weight
    kept_in, size = str(weight.dtype).removeprefix("torch."), weight.element_size()  # bytes of one
    print(f"model     {model.num_params():,} parameters: {size * weights / 1e6:,.0f} MB are read for a token")
    print(f"machine   {machine}; it reads {rate / 1e9:,.1f} GB/s, multiplying a large matrix with a vector\n")
    print(f"{'':13} texts  {length:4} tokens at once    then {new:3} one by one    a step   share of reading")

    def tell(name, size, count, first, step):
        print(f"{name:13} {count:5} {count * length / first:11,.0f} tokens/s {count / step:10,.1f} tokens/s "
              f"{1000 * step:6.1f} ms {size * weights / step / rate:18.0%}", flush=True)

    for count in sorted({1, batch_size}):
        prompt = torch.randint(model.config.vocab_size, (count, length), device=machine.device)
        tell(kept_in, size, count, *time_writing(model, prompt, new))
        if quantize:
            tell(quantize, 1, count, *time_writing(sample.to_int8(model), prompt, new))
        if compare:
            tell("transformers", size, count, *time_transformers(prompt, new, machine))


# -----------------------------------------------------------------------------
# All of it, to paste into a report

def bench_table() -> None:
    """Each row is a process of its own: what one takes in memory, or fails at, is no other's."""
    machine = Machine("auto", "auto")
    print(f"{machine}; PyTorch {torch.__version__}, Python {sys.version.split()[0]}, {sys.platform}\n")
    print("| `python -m tools.bench ...` | speed | memory | first step |\n|---|---|---|---|")
    for words in ROWS.get(machine.device.type, ROWS["cpu"]):
        done = subprocess.run([sys.executable, "-m", "tools.bench", *words.split()], capture_output=True,
                              encoding="utf-8", errors="replace")
        found = dict.fromkeys(("speed", "memory", "start"), "")
        for line in done.stdout.splitlines():
            name, _, value = line.partition(" ")
            if name in found:
                found[name] = value.strip().removesuffix(" at most").split(" from the")[0]
            elif "tokens/s" in line:  # of writing: the row of one text
                found["speed"] = line.split("tokens/s")[1].strip() + " tokens/s"
        if done.returncode:
            found["speed"] = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        print(f"| `{words}` | {' | '.join(found.values())} |", flush=True)


# -----------------------------------------------------------------------------

def main() -> None:
    needs_console()
    words = sys.argv[1:]
    if words[:1] == ["growth"]:
        from tools import growth
        del sys.argv[1]
        launch(growth.main, vars(growth))
        return
    if words[:1] == ["table"]:
        del sys.argv[1]
        launch(bench_table, {"__annotations__": {}, "__doc__": __doc__, "__file__": __file__})  # no settings
        return
    if words[:1] == ["write"]:
        del sys.argv[1]
        launch(bench_writing, globals(), Config)
        return
    if all(word.startswith("-") and not word.startswith("--init_from") for word in words):
        sys.argv[1:1] = RECIPE
    script = {**vars(train), "__doc__": __doc__, "__spec__": __spec__}
    launch(lambda given: bench_training(given, SimpleNamespace(**values_of(script))), script, Config,
           stored_settings)


if __name__ == "__main__":
    main()
