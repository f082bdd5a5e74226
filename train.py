"""
Pretrain a Transformer: one loop, from a prepared text to a checkpoint.

    python train.py config/small.py                                    a small model of Python code, on a CPU
    python train.py config/small.py --dataset=novel                    your own text, once it is prepared
    python train.py config/small.py --init_from=resume                 go on where it was stopped
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py   the same on 8 GPUs of one machine
    python train.py config/bert.py                                     masked tokens instead of next ones
    python train.py config/small.py --teacher=out/large --out_dir=out/student   learn from a larger model too

Without a config file the settings are nanoGPT's: GPT-2 124M, AdamW, cosine schedule.
"""
import time

STARTED = time.time()  # before the imports, which take seconds: `elapsed` counts what the user waits

import contextlib
import ctypes
import json
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

import prepare
from config import SettingError, UserError, launch
from lib.optim import (
    BadSteps,
    Pruning,
    load_optimizer_state,
    lr_factor,
    make_optimizers,
    optimizer_state,
    update,
)
from lib.run import (
    cannot_write,
    find_checkpoint,
    load_model,
    main_process,
    model_of,
    save_checkpoint,
    write_text,
)
from lib.tokenizer import Tokenizer
from model import Config, Transformer

# -----------------------------------------------------------------------------
# Settings. The model's are the fields of Config in model.py: --n_layer=6 works as well.
out_dir: str = "out"  # where checkpoints and logs go
overwrite: bool = False  # start from scratch although out_dir holds a checkpoint
init_from: str = "scratch"  # scratch; resume: go on in out_dir; or weights: a run's folder, a Hugging Face id
eval_interval: int = 2000  # steps from one evaluation to the next
eval_iters: int = 200  # windows of block_size tokens in an evaluation, evenly spaced; 0: all
eval_only: bool = False  # evaluate once and leave
sample_tokens: int = 0  # of text that the model writes at each evaluation, to look at
log_interval: int = 1  # steps from one log line to the next
always_save_checkpoint: bool = True  # at each evaluation; False: only where validation is the best so far
wandb_log: bool = False  # log to Weights & Biases too
wandb_project: str = "owt"  # its project
wandb_run_name: str = "gpt2"  # its name for this run
# data
dataset: str = "python"  # a folder under data/; built-in ones are made when missing
batch_size: int = 12  # windows in a micro-batch
gradient_accumulation_steps: int = 5 * 8  # micro-batches in a step, over all processes
# objective: the next token, or where the model is not causal the masked ones
mask_rate: float = 0.3  # share of a window's tokens to guess, for causal=False (Wettig et al. 2022)
label_smoothing: float = 0.0  # share of each target that is spread over all tokens
teacher: str = ""  # a run's folder, a Hugging Face folder or id: its predictions are targets too; empty: none
teacher_share: float = 0.5  # of the teacher in the loss
teacher_temperature: float = 2.0  # both models' scores are divided by this: above 1, the unlikely counts more
# optimizer
optimizer: Literal["adamw", "muon", "lars", "sgd"] = "adamw"  # muon: for the blocks' matrices only
learning_rate: float = 6e-4  # highest, of all but Muon
muon_lr: float = 0.02  # highest, of Muon
embd_lr: Optional[float] = None  # highest, of the token embedding; None: as learning_rate
max_iters: int = 600000  # steps, that is updates of the weights
weight_decay: float = 0.1  # of matrices, decoupled: each step takes away lr * weight_decay
beta1: float = 0.9  # AdamW's memory of the gradient
beta2: float = 0.95  # and of its square
momentum: float = 0.9  # of lars and sgd
grad_clip: float = 1.0  # gradients with a larger norm are scaled down to it; 0: never
sparsity: float = 0.0  # share of the blocks' weights that are 0 in the end, the smallest ones
# learning rate
decay_lr: bool = True  # False: constant after the warmup
schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # its fall; wsd: constant, then linear
warmup_iters: int = 2000  # steps of linear rise
lr_decay_iters: Optional[int] = None  # step where min_lr is reached; None: max_iters
min_lr: float = 6e-5  # lowest, of AdamW; Muon's falls by the same factor
decay_fraction: float = 0.6  # share of the steps that wsd decays over
# when to stop before max_iters
patience: Optional[int] = None  # evaluations without a new best; None: never
max_minutes: Optional[float] = None  # of this process; the run is saved and can be resumed; None: no limit
max_bad_steps: int = 20  # in a row, whose loss or gradient is not finite; each leaves the weights as they are
# system
device: str = "auto"  # auto: cuda, else mps, else cpu; or one of those, or cuda:1
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: what is fast
compile: bool = True  # torch.compile: half a minute at the start, faster steps (falls back where it fails)
remat: bool = False  # compute the blocks' activations again in the backward pass: less memory, a third slower
profile: bool = False  # time the parts of some steps, print a table and leave: see config/bench.py
backend: str = "auto"  # of torch.distributed; auto: nccl on GPUs, gloo on CPUs
seed: int = 1337  # of weights, data order and dropout
deterministic: bool = False  # the same bits again on a GPU too, at some cost in speed
# -----------------------------------------------------------------------------


# -----------------------------------------------------------------------------
# Data

class Windows:
    """The training tokens as windows of block_size, each once an epoch.

    Which window comes when is a function of (seed, epoch) alone: not of the batch size, the number of
    processes or the random state, so all of them may change on resume. An epoch's windows start at an offset
    of its own. hide: masked_tokens, for a model that fills gaps.
    """

    def __init__(self, data: np.ndarray, block_size: int, seed: int, hide: Optional[Callable] = None):
        self.data, self.block_size, self.seed, self.hide = data, block_size, seed, hide
        self.n = max(1, (len(data) - block_size) // block_size)  # in an epoch, whatever its offset
        self.epoch, self.starts = -1, None

    def locate(self, first: int, count: int) -> np.ndarray:
        """Where the windows number first, first + 1, ... of the whole training begin in the data: (count,)"""
        found = []
        while count > 0:
            epoch, i = divmod(first, self.n)
            if epoch != self.epoch:
                rng = np.random.default_rng((self.seed, epoch))
                spare = len(self.data) - 1 - self.n * self.block_size  # tokens that an offset may skip
                offset = rng.integers(min(self.block_size, spare + 1))
                self.epoch, self.starts = epoch, offset + self.block_size * rng.permutation(self.n)
            found.append(self.starts[i:i + count])
            first, count = first + len(found[-1]), count - len(found[-1])
        return np.concatenate(found)

    def get(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, each (count, block_size)."""
        x, y = gather(self.data, self.locate(first, count), self.block_size)
        return self.hide(x, range(first, first + count), self.seed) if self.hide else (x, y)


def gather(data: np.ndarray, starts: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows that begin at `starts`, and as targets the same one token later."""
    tokens = torch.from_numpy(data[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def masked_tokens(idx, numbers, seed, rate, mask, vocab_size) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to guess (Devlin et al. 2019): (B, T) -> inputs, and targets that are -1 where there is no gap.

    The same number in each window. 80% of them become the token `mask`, 10% any token, 10% stay. A function
    of the seed and the windows' numbers: not of the batch, nor of the random state.
    """
    x, y = idx.clone(), torch.full_like(idx, -1)
    count = hidden_in(idx.size(1), rate)
    for row, number in enumerate(numbers):
        rng = np.random.default_rng((seed, number))
        places = torch.from_numpy(rng.permutation(idx.size(1))[:count])
        y[row, places] = idx[row, places]
        masked, changed = places.tensor_split((int(0.8 * count + 0.5), int(0.9 * count + 0.5)))[:2]
        x[row, masked] = mask
        x[row, changed] = torch.from_numpy(rng.integers(vocab_size, size=len(changed)))
    return x, y


def hidden_in(block_size: int, rate: float) -> int:
    return max(1, int(rate * block_size + 0.5))


def open_data(dataset: str, vocab_size: Optional[int], block_size: int) -> tuple[dict, dict, Tokenizer]:
    """The splits, meta.json and the tokenizer of data/<dataset>, which is made where it is a built-in.

    vocab_size: the model's, where it was given. Raises UserError where there is no such data set or it is too
    small, SettingError where it does not fit.
    """
    folder = Path("data") / dataset
    if dataset in prepare.BUILT_IN and not folder.exists():
        if main_process():
            bpe = vocab_size is not None and prepare.BUILT_IN[dataset][1] == "bpe"
            prepare.prepare(dataset, **({"vocab_size": vocab_size} if bpe else {}))
        if dist.is_initialized():
            dist.barrier()
    meta = prepare.read_meta(folder)
    asked = meta["settings"]["vocab_size"]
    if vocab_size is not None and meta["tokenizer"]["kind"] == "bpe" and vocab_size != asked:
        raise SettingError(f"vocab_size={vocab_size}: {folder} was made with {asked}: leave it out, or make "
                           f"the data again, with prepare.py --vocab_size={vocab_size} --overwrite")
    if vocab_size is not None and vocab_size < meta["vocab_size"]:
        raise SettingError(f"vocab_size={vocab_size}: {folder} has {meta['vocab_size']} tokens: leave it out")
    try:
        splits = {split: prepare.read_split(folder, split, meta) for split in ("train", "val")}
        tokenizer = Tokenizer.from_dict(meta["tokenizer"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/meta.json: damaged ({type(error).__name__}: {error}): make the data set "
                        "again, with --overwrite") from None
    for split, data in splits.items():
        if len(data) <= block_size:
            raise SettingError(f"block_size={block_size}: {folder}/{split}.bin has only {len(data)} tokens, "
                               "and a window takes one more than block_size: lower it, or prepare more text")
    return splits, meta, tokenizer


# -----------------------------------------------------------------------------
# Objective

class Objective(nn.Module):
    """What is minimised: (B, T) inputs and targets -> (2,) sums over the targets that are not -1, of the loss
    in nats and, in evaluation, of the right guesses.

    Sums, so that micro-batches and processes add up, and are divided once, by all the tokens that count.
    label_smoothing and the teacher are of training; in evaluation the loss is the plain cross-entropy.
    counted: how many targets of a sequence count, at most; None: all. The head sees no others. teacher: a
    model whose predictions, at a temperature, are targets too (Hinton et al. 2015).
    """

    def __init__(self, model: Transformer, counted: Optional[int] = None, label_smoothing: float = 0.0,
                 teacher: Optional[Transformer] = None, teacher_share: float = 0.5, temperature: float = 2.0):
        super().__init__()
        self.model, self.counted, self.label_smoothing = model, counted, label_smoothing
        self.teacher, self.teacher_share, self.temperature = teacher, teacher_share, temperature

    def forward(self, idx, targets):
        rows = [self.model.hidden(idx), targets]  # (B, T, C), (B, T)
        if self.teacher is not None and self.training:
            with torch.no_grad():
                rows.append(self.teacher.hidden(idx))
        rows = [t.flatten(0, 1) for t in rows]  # (B * T, C), (B * T,)
        if self.counted is not None:
            # each sequence's targets that count come first; a fixed number of them keeps all shapes fixed
            at = (targets == -1).byte().argsort(dim=1, stable=True)[:, :self.counted]  # (B, counted)
            at = at + idx.size(1) * torch.arange(len(idx), device=idx.device).unsqueeze(1)
            rows = [t.index_select(0, at.flatten()) for t in rows]  # (B * counted, C), (B * counted,)
        x, *others = rows
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            size = max(64, IN_CACHE // self.model.config.vocab_size)  # tokens in a chunk
            return InCache.apply(self.head_loss, size, x, others, *self.model.head.parameters())
        return self.head_loss(x, *others)

    def head_loss(self, x, targets, taught=None):  # (N, C), (N,), (N, teacher's C) -> (2,)
        logits = self.model.logits(x)
        smoothing = self.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum", label_smoothing=smoothing)
        if taught is not None:
            ours = F.log_softmax(logits / self.temperature, -1)
            theirs = F.log_softmax(self.teacher.logits(taught) / self.temperature, -1)
            away = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)  # (N,)
            # the gradient shrinks with the temperature squared: make up for it
            soft = self.temperature**2 * (away * (targets != -1)).sum()
            loss = (1 - self.teacher_share) * loss + self.teacher_share * soft
        right = loss.new_zeros(()) if self.training else (logits.argmax(-1) == targets).sum().to(loss.dtype)
        return torch.stack((loss, right))


def recompute_blocks(model: Transformer) -> None:
    """Keep of each block its input alone for the backward pass, which computes the rest again."""
    for block in model.blocks:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)


IN_CACHE = 2**19  # logits: 2 MB, about a core's own cache


class InCache(torch.autograd.Function):
    """A loss over many tokens, with its gradient, a chunk of tokens at a time.

    The logits are by far the largest tensor of a small model; written to memory and read again by each of a
    dozen operations, forth and back, they took half of a step. Compiled code is fused, and needs none of
    this.
    """

    @staticmethod
    def forward(ctx, loss_of, size, x, others, *params):
        total, ctx.needed = x.new_zeros(2), any(ctx.needs_input_grad)
        grads = [torch.empty_like(x), *(torch.zeros_like(p) for p in params)] if ctx.needed else []
        for i in range(0, len(x), size):
            with torch.set_grad_enabled(ctx.needed):
                part = x[i:i + size].detach().requires_grad_(ctx.needed)
                sums = loss_of(part, *(t[i:i + size] for t in others))
                if ctx.needed:
                    g, *g_params = torch.autograd.grad(sums[0], (part, *params))
                    grads[0][i:i + size] = g
                    torch._foreach_add_(grads[1:], g_params)
                total += sums.detach()
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx, g):
        return None, None, ctx.saved_tensors[0] * g[0], None, *(grad * g[0] for grad in ctx.saved_tensors[1:])


def accumulate(objective, x, y, batch_size, amp=contextlib.nullcontext(), scaler=None) -> torch.Tensor:
    """Add the gradient of the mean loss over a whole step's tokens, taken batch_size windows at a time.

    x, y: this process's share of the step, (N, T). Returns the mean loss over all processes' tokens.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    counted = (y != -1).sum()
    if world > 1:
        dist.all_reduce(counted)
    total = torch.zeros((), device=x.device)
    for i in range(0, len(x), batch_size):
        last = i + batch_size >= len(x)
        # DDP averages gradients over the processes in the last backward of a step, earlier ones stay local
        with objective.no_sync() if world > 1 and not last else contextlib.nullcontext():
            with amp:
                loss = objective(x[i:i + batch_size], y[i:i + batch_size])[0] / counted.clamp(min=1)
            total += loss.detach()
            loss = loss * world  # against DDP's average: a sum is wanted
            (scaler.scale(loss) if scaler else loss).backward()
    if world > 1:
        dist.all_reduce(total)
    return total


@torch.no_grad()
def evaluate(objective, data, block_size, eval_iters, batch_size, token_bytes, device,
             amp=contextlib.nullcontext(), hide=None) -> dict[str, float]:
    """val_loss in nats a token, and val_bpb in bits a byte of the text that the tokens stand for; or with
    `hide` (masked_tokens), val_accuracy, the share of masked tokens guessed right.

    On `eval_iters` evenly spaced windows that do not overlap (0: all), the same ones, with the same masks,
    for any batch size, seed and number of processes. token_bytes: (V,) length of each token's text.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    available = (len(data) - 1) // block_size
    count = min(eval_iters or available, available)
    mine = np.linspace(0, available - 1, count).astype(np.int64)[rank::world]  # windows by number
    counts, found = torch.zeros(2, dtype=torch.float64), [torch.zeros(2, device=device)]
    objective.eval()
    for i in range(0, len(mine), batch_size):
        numbers = mine[i:i + batch_size]
        x, y = gather(data, numbers * block_size, block_size)
        if hide:
            x, y = hide(x, numbers, 0)
        counts += torch.tensor([(y != -1).sum(), token_bytes[y].sum()])
        missing = batch_size - len(x)  # a last batch of its own size would be compiled anew
        x, y = F.pad(x, (0, 0, 0, missing)), F.pad(y, (0, 0, 0, missing), value=-1)
        with amp:
            found.append(objective(x.to(device), y.to(device)))
    objective.train()
    sums = torch.cat((torch.stack(found).cpu().double().sum(0), counts))
    if world > 1:
        sums = sums.to(device if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(sums)
    nats, right, tokens, n_bytes = sums.tolist()
    if hide:
        return {"val_loss": nats / tokens, "val_accuracy": right / tokens}
    return {"val_loss": nats / tokens, "val_bpb": nats / math.log(2) / max(1, n_bytes)}


def sample_text(model, tokenizer, data, count, prompt, device, hide=None) -> str:
    """What the model has learnt, to look at: `count` tokens that it writes; or, where it fills gaps, of the
    first tokens of `data` its guesses in brackets, the truth behind those that are wrong."""
    if hide is None:
        idx, draws = torch.tensor([[prompt]], device=device), torch.Generator(device).manual_seed(0)
        ids = model.generate(idx, count, temperature=0.8, top_k=200, generator=draws)[0, 1:]
        return tokenizer.decode(ids.tolist())
    count = min(count, model.config.block_size, len(data) - 1)
    x, y = hide(gather(data, np.zeros(1, np.int64), count)[0], [0], 0)
    model.eval()
    with torch.no_grad():
        guesses = model(x.to(device))[0].argmax(-1)
    model.train()
    text = ""
    for seen, truth, guess in zip(*(t[0].tolist() for t in (x, y, guesses)), strict=True):
        seen, right, guessed = (tokenizer.decode([max(0, token)]) for token in (seen, truth, guess))
        text += seen if truth == -1 else f"[{guessed}]" if guess == truth else f"[{guessed}|{right}]"
    return text


def load_teacher(path: str, config: Config, tokenizer: dict) -> Transformer:
    """Raises SettingError where it cannot teach this model."""
    teacher, its_tokenizer = load_model(path, dropout=0.0)
    if its_tokenizer.to_dict() != tokenizer:
        raise SettingError(f"teacher={path}: has another tokenizer than the data set")
    for name in ("causal", "vocab_size", "block_size"):
        ours, its = getattr(config, name), getattr(teacher.config, name)
        if ours != its and not (name == "block_size" and ours < its):
            raise SettingError(f"{name}={ours}: the teacher has {its}, and cannot teach this model")
    return teacher.requires_grad_(False)


def random_states(device: torch.device) -> dict[str, list]:
    """The random state of every process, as tensors: {"cpu": [...], "cuda": [...]}."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if not dist.is_initialized():
        return {kind: [state] for kind, state in states.items()}
    gathered = {}
    for kind, state in states.items():
        state = state.to(device)  # nccl moves tensors between GPUs only
        all_ranks = [torch.empty_like(state) for _ in range(dist.get_world_size())]
        dist.all_gather(all_ranks, state)
        gathered[kind] = [one.cpu() for one in all_ranks]
    return gathered


# -----------------------------------------------------------------------------
# The machine

def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """Raises SettingError where the machine has no such device."""
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"(cuda|mps|cpu)(:\d+)?", device):
        raise SettingError(f"device={device}: wanted auto, cuda, mps or cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(f"device={device}: torch finds no CUDA GPU on this machine: use --device=cpu")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise SettingError(f"device={device}: torch finds no Apple GPU on this machine: use --device=cpu")
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
        if chosen.index >= torch.cuda.device_count():
            raise SettingError(f"device={device}: there are {torch.cuda.device_count()} GPUs, from cuda:0 on")
        torch.cuda.set_device(chosen)
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return getattr(torch, dtype)


# dense bfloat16 (V100, T4: float16) FLOP/s by the makers' data sheets; the longest name that fits counts
PEAK_FLOPS = {"V100": 125e12, "T4": 65e12, "A10": 125e12, "A100": 312e12, "L4": 121e12, "L40": 181e12,
              "L40S": 362e12, "RTX 3090": 71e12, "RTX 4090": 165e12, "RTX 5090": 209e12, "H100": 989e12,
              "H100 PCIe": 756e12, "H200": 989e12, "B200": 2250e12}


def peak_flops(device: torch.device) -> Optional[float]:
    """Of this GPU, where it is known: what MFU is a share of."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [key for key in PEAK_FLOPS if key in name]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def to_device(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without waiting for the copy, where the device can."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def compiled(objective, x, y, amp):
    """torch.compile(objective), tried on a batch; the objective itself, with a warning, where that fails."""
    faster = torch.compile(objective)
    try:
        with torch.random.fork_rng(), amp:  # the trial draws no number that training would have drawn
            faster(x, y)[0].backward()
        return faster
    except Exception as error:  # no C++ compiler, no Triton, a GPU too old...
        reason = str(error).strip().split("\n")[0][:160]
        print(f"warning: torch.compile failed, going on without it ({type(error).__name__}: {reason})",
              file=sys.stderr)
        return objective
    finally:
        objective.zero_grad(set_to_none=True)


def keep_memory() -> None:
    """Have the C library keep the memory of freed tensors.

    It would give large ones back to Linux, which hands out fresh pages, zeroed one by one, for the next: a
    tenth of a small model's step on a CPU.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def give_back_memory(share: float = 1 / 3) -> None:
    """Once the process holds more than this share of the machine's memory, what is free of it goes back.

    For keep_memory where lengths vary from step to step: what is kept is then cut into pieces that the next
    step does not fit, and grows to twice the need.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        resident = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])  # pages
        if resident > share * os.sysconf("SC_PHYS_PAGES"):
            libc.malloc_trim(0)


@contextlib.contextmanager
def memory_advice(batch_size: int, gradient_accumulation_steps: int, remat: bool):
    """Out of memory becomes one line that says what to lower, and what keeps the run equal."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate|not enough memory", str(error).lower()):
            raise
        advice = [] if remat else ["--remat computes activations again instead of keeping them"]
        half = max((n for n in range(1, batch_size) if batch_size % n == 0), default=None)
        if half:
            advice.insert(0, f"--batch_size={half} --gradient_accumulation_steps="
                          f"{gradient_accumulation_steps * batch_size // half} is the same run in less")
        told = (f"batch_size={batch_size}: out of memory: "
                f"{'; '.join(advice) or 'lower block_size, or take a smaller model'}")
        if not main_process():  # it may have happened here alone, and an error of all is told by the first
            print(f"error: {told}", file=sys.stderr, flush=True)
        raise UserError(told) from None


def measure(objective, model, optimizers, windows, batch_size, step_windows, amp, scaler, grad_clip, device,
            steps: int = 10) -> str:
    """Where the time of a training step goes: real steps, with a stop after each part. Returns a table.

    The data's part is that of reading it while nothing else is done; the loop reads ahead.
    """
    def now():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    spent = dict.fromkeys(("data", "forward", "backward", "update"), 0.0)
    for step in range(-2, steps):  # two to warm up
        if step == 0:
            spent = dict.fromkeys(spent, 0.0)
        start = now()
        x, y = (to_device(t, device) for t in windows.get(max(0, step) * step_windows, step_windows))
        spent["data"] += now() - start
        for i in range(0, len(x), batch_size):
            start = now()
            with amp:
                loss = objective(x[i:i + batch_size], y[i:i + batch_size])[0] / y.numel()
            middle = now()
            (scaler.scale(loss) if scaler else loss).backward()
            spent["forward"] += middle - start
            spent["backward"] += now() - middle
        start = now()
        update(model, optimizers, loss.detach(), grad_clip, scaler)
        spent["update"] += now() - start
        if step == -2:
            first = time.time() - STARTED

    # what the machine can do: a product of large matrices, in the loop's precision
    a = torch.randn(4096 if device.type == "cuda" else 2048, 4096 if device.type == "cuda" else 2048,
                    device=device)
    rates = []
    for _ in range(8):
        start = now()
        with amp:
            a @ a
        rates.append(2 * len(a) ** 3 / (now() - start))
    total, tokens = sum(spent.values()) / steps, step_windows * model.config.block_size
    flops = tokens / total * model.flops_per_token()
    memory = (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()) / 1e9
    lines = [f"{name:10} {1000 * seconds / steps:9.1f} ms {seconds / steps / total:7.1%}"
             for name, seconds in (*spent.items(), ("step", total * steps))]
    return "\n".join([*lines, f"speed      {tokens / total:9,.0f} tokens/s, {flops / 1e9:,.0f} GFLOP/s: "
                      f"{flops / max(rates):.0%} of {max(rates) / 1e9:,.0f}, a large matrix product's",
                      f"start      {first:9.1f} s from the command to the end of the first step",
                      f"memory     {memory:9.2f} GB at most"])


def peak_memory() -> float:
    """Of this process, in bytes; nan where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


OUT_OF_TIME = 1  # in place of a signal's number


class Stop:
    """When to leave the loop: at SIGINT or SIGTERM to any process, or after max_minutes.

    The first signal asks to stop after the step under way. Another one, more than a second later, stops at
    once; not before, for torchrun passes on what the terminal has sent to all already.
    """

    def __init__(self, max_minutes: Optional[float] = None):
        self.signal, self.asked = 0, math.inf
        self.deadline = math.inf if max_minutes is None else STARTED + 60 * max_minutes
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, self.ask)

    def ask(self, number, frame):
        if time.time() > self.asked + 1:
            os._exit(128 + number)
        self.signal, self.asked = number, min(self.asked, time.time())

    def agreed(self) -> int:
        """The signal that any process got, for all of them; 0: go on."""
        if not self.signal and time.time() > self.deadline:
            self.signal = OUT_OF_TIME
        if dist.is_initialized():
            got = torch.tensor(self.signal, device="cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(got, op=dist.ReduceOp.MAX)
            self.signal = int(got)
        return self.signal


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


IN_WORDS = {"val_loss": "val loss {:.4f}", "val_bpb": "{:.4f} bits per byte",
            "val_accuracy": "{:.1%} of the masked tokens right"}


def in_words(metrics: dict[str, float]) -> str:
    return ", ".join(IN_WORDS.get(name, name + " {:.4f}").format(value) for name, value in metrics.items())


def plot(log: Path, picture: Path) -> None:
    """The losses in log.jsonl as a picture, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4))
    for key, style in (("loss", {"lw": 1, "alpha": 0.5}), ("val_loss", {"marker": "o", "ms": 4})):
        points = [(row["iter"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points), label={"loss": "training", "val_loss": "validation"}[key], **style)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=100, bbox_inches="tight")
    plt.close(figure)


# -----------------------------------------------------------------------------

def main(model_args: dict):
    # Settings that cannot be.
    def must_be(words: str, allowed: Callable, names: str):
        for name in names.split():
            if globals()[name] is not None and not allowed(globals()[name]):
                raise SettingError(f"{name}={globals()[name]}: must be {words}")
    must_be("at least 1", lambda v: v >= 1, "batch_size gradient_accumulation_steps max_iters eval_interval "
            "log_interval max_bad_steps patience")
    must_be("at least 0", lambda v: v >= 0, "eval_iters warmup_iters lr_decay_iters grad_clip weight_decay "
            "min_lr seed sample_tokens")
    must_be("above 0", lambda v: 0 < v < math.inf, "learning_rate muon_lr embd_lr "
            "teacher_temperature max_minutes")
    must_be("at least 0 and below 1", lambda v: 0 <= v < 1, "beta1 beta2 momentum label_smoothing sparsity")
    must_be("above 0 and at most 1", lambda v: 0 < v <= 1, "decay_fraction mask_rate teacher_share")
    if lr_decay_iters is not None and lr_decay_iters < warmup_iters:
        raise SettingError(f"lr_decay_iters={lr_decay_iters}: the learning rate still rises then, until "
                           f"warmup_iters={warmup_iters}")

    # Where we run: torchrun starts one process a GPU (or a few on a CPU), and tells each its rank.
    rank, local_rank, world = (int(os.environ.get(key, default))
                               for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if gradient_accumulation_steps % world:
        raise SettingError(f"gradient_accumulation_steps={gradient_accumulation_steps}: counts over all "
                           f"processes, so it must be a multiple of their number, {world}")
    run_device = pick_device(device, local_rank)
    run_dtype = pick_dtype(dtype, run_device)
    if dtype == "float16" and run_device.type == "cpu":
        raise SettingError("dtype=float16: not on a CPU: use --dtype=float32, or bfloat16")
    if world > 1:
        # gloo beside nccl: what the processes say to each other about stopping does not wait for the GPUs
        own = "cpu:gloo,cuda:nccl" if run_device.type == "cuda" else "gloo"
        dist.init_process_group(own if backend in ("auto", "nccl") else backend)
    master = rank == 0
    full = run_dtype == torch.float32
    amp = contextlib.nullcontext() if full else torch.autocast(run_device.type, run_dtype)
    scaler = torch.amp.GradScaler(run_device.type) if run_dtype == torch.float16 else None
    torch.set_float32_matmul_precision("high")  # tf32 where a GPU has it
    keep_memory()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)  # the same first weights in every process

    # What we start from: nothing, a run to go on with, or the weights of another.
    folder, source, checkpoint, model, stored = Path(out_dir), None, None, None, None
    changes = {name: value for name, value in model_args.items()
               if name == "dropout" or name == "block_size" and init_from != "resume"}
    if init_from == "scratch":
        if (folder / "ckpt.pt").exists() and not overwrite and not (eval_only or profile):
            raise SettingError(f"{folder}/ckpt.pt: a run is here already: --init_from=resume goes on with "
                               "it, --overwrite starts anew, --out_dir=FOLDER writes elsewhere")
    elif init_from == "resume":
        source, checkpoint = find_checkpoint(folder, ("ckpt.pt", "ckpt.prev.pt"))
        if "compiled" not in checkpoint["data"]:
            raise UserError(f"{source}: another program's run: --init_from={folder} takes its weights")
        if checkpoint["settings"]["optimizer"] != optimizer:
            raise SettingError(f"optimizer={optimizer}: not the run's, {checkpoint['settings']['optimizer']}")
        model, stored = model_of(checkpoint, **changes), checkpoint["tokenizer"]
    else:
        model, its_tokenizer = load_model(init_from, **changes)
        stored = its_tokenizer.to_dict()
    for name, value in model_args.items() if model else ():
        if value != getattr(model.config, name):
            raise SettingError(f"{name}={value}: the checkpoint's model has {name}="
                               f"{getattr(model.config, name)}: leave it out, or start from scratch")
    try:
        config = model.config if model else Config(**model_args)
    except ValueError as error:  # it names the field
        raise SettingError(str(error)) from None
    if config.head == "none":
        raise SettingError("head=none: an encoder scores no tokens, so it has nothing to learn here from")
    splits, meta, tokenizer = open_data(dataset, model_args.get("vocab_size"), config.block_size)
    if stored and stored != meta["tokenizer"]:
        raise SettingError(f"dataset={dataset}: its tokenizer is not the one that the checkpoint was trained "
                           "with: prepare the text with the same one, or start from scratch")
    if not model and "vocab_size" not in model_args:
        config.vocab_size = meta["vocab_size"]
    if not config.causal and tokenizer.mask is None:
        raise SettingError(f"causal=False: the tokenizer of {dataset} has no token to mask others with")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"out_dir={out_dir}: cannot be made ({error.strerror})") from None

    # The model, what it learns from, the optimizers.
    model = (model or Transformer(config)).to(run_device)
    if remat:
        recompute_blocks(model)
    optimizers = make_optimizers(model, optimizer, learning_rate, muon_lr, weight_decay, (beta1, beta2),
                                 momentum, embd_lr)
    pruning = Pruning(model, sparsity, max_iters)
    hide = None if config.causal else partial(masked_tokens, rate=mask_rate, mask=tokenizer.mask,
                                              vocab_size=tokenizer.vocab_size)
    windows = Windows(splits["train"], config.block_size, seed, hide)
    guide = load_teacher(teacher, config, meta["tokenizer"]).to(run_device) if teacher else None
    counted = None if config.causal else hidden_in(config.block_size, mask_rate)
    objective = Objective(model, counted, label_smoothing, guide, teacher_share, teacher_temperature)
    torch.manual_seed(seed + rank)  # dropout differs between processes
    if compile and (checkpoint is None or checkpoint["data"]["compiled"]):  # a resumed run stays what it was
        objective = compiled(objective, *(to_device(t, run_device) for t in windows.get(0, batch_size)), amp)
    is_compiled = not isinstance(objective, Objective)
    if checkpoint and is_compiled != checkpoint["data"]["compiled"] and master:
        print("warning: the run was compiled before, and is not now: last bits will differ", file=sys.stderr)
    if world > 1:
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # its successor is too new
        objective = DistributedDataParallel(objective, broadcast_buffers=False)  # they are constants

    # Where we are. Weights were taken above; here is what a run under way has besides.
    iter_num, windows_seen, best_val_loss, since_best, elapsed_before = 0, 0, math.inf, 0, 0.0
    running = torch.zeros(2, device=run_device)  # losses since the last evaluation: sum, number
    if checkpoint:
        load_optimizer_state(optimizers, model, checkpoint["optimizer"])
        if scaler and checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        if len(checkpoint["rng"]["cpu"]) == world:
            torch.set_rng_state(checkpoint["rng"]["cpu"][rank])
            if run_device.type == "cuda" and "cuda" in checkpoint["rng"]:
                torch.cuda.set_rng_state(checkpoint["rng"]["cuda"][rank], run_device)
        iter_num, best_val_loss = checkpoint["iter_num"], checkpoint["best_val_loss"]
        place = checkpoint["data"]
        windows_seen, since_best, elapsed_before = place["windows"], place["since_best"], place["elapsed"]
        running = place["running"].to(run_device)
    checkpoint = None  # free its memory

    token_bytes = np.zeros(config.vocab_size, dtype=np.int64)
    token_bytes[:len(tokenizer.token_bytes)] = [len(token) for token in tokenizer.token_bytes]

    def validate():
        return evaluate(objective, splits["val"], config.block_size, eval_iters, batch_size, token_bytes,
                        run_device, amp, hide)

    def sample(count):
        many = meta["splits"]["train"]["documents"] > 1
        prompt = tokenizer.eot if many else (tokenizer.encode("\n") or [tokenizer.eot])[0]
        return sample_text(model, tokenizer, splits["val"], count, prompt, run_device, hide)

    def elapsed():
        return elapsed_before + time.time() - STARTED

    # Say what will happen.
    step_windows = batch_size * gradient_accumulation_steps
    step_tokens = step_windows * config.block_size
    if master:
        print(f"model     {model.num_params():,} parameters: {config.n_layer} layers, {config.n_embd} wide, "
              f"context {config.block_size}, vocabulary {config.vocab_size:,}")
        print(f"machine   {run_device}, {str(run_dtype).removeprefix('torch.')}, {torch.get_num_threads()} "
              f"threads, {world} process{'es' * (world > 1)}{', compiled' * is_compiled}")
        print(f"data      {dataset}: {len(splits['train']):,} tokens to train on, {len(splits['val']):,} to "
              "validate")
    if eval_only:
        metrics = validate()
        if master:
            print(f"iter {iter_num}: {in_words(metrics)}")
        return
    if profile:
        table = measure(objective, model, optimizers, windows, batch_size, step_windows, amp, scaler,
                        grad_clip, run_device)
        if master:
            print(f"\n{table}")
        return
    settings = {name: globals()[name] for name in sys.modules[__name__].__annotations__} | asdict(config)
    log_file = folder / "log.jsonl"
    if master:
        print(f"training  {max_iters:,} steps of {step_tokens:,} tokens, "
              f"{max_iters * step_windows / windows.n:.1f} epochs, into {folder}\n", flush=True)
        if source and source.name == "ckpt.prev.pt" and (folder / "ckpt.pt").exists():
            os.replace(folder / "ckpt.pt", folder / "ckpt.damaged.pt")  # it must not replace the good one
        write_text(folder / "settings.json", json.dumps(settings, indent=1))
        kept = []
        if init_from == "resume" and log_file.exists():  # rows behind the checkpoint are about to come again
            rows = log_file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [row for row in rows if row.endswith("\n") and json.loads(row)["iter"] <= iter_num]
        write_text(log_file, "".join(kept))
    wandb = start_wandb(wandb_project, wandb_run_name, settings) if wandb_log and master else None

    def log(row):
        try:
            with open(log_file, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as error:
            raise cannot_write(log_file, error) from None
        if wandb:
            wandb.log(row, step=row["iter"])

    def save(name, resumable):
        """The state after iter_num steps, by all processes together; resumable: all that a resume needs."""
        extra = {"optimizer": {}, "scaler": {}, "rng": {}}
        if resumable:
            extra = {"optimizer": optimizer_state(optimizers, model), "rng": random_states(run_device),
                     "scaler": scaler.state_dict() if scaler else {}}
        if master:
            save_checkpoint(folder / name, {
                "version": 1, "model": model.state_dict(), "model_args": asdict(config), **extra,
                "data": {"windows": windows_seen, "elapsed": elapsed(), "since_best": since_best,
                         "running": running, "compiled": is_compiled},
                "iter_num": iter_num, "best_val_loss": best_val_loss, "settings": settings,
                "tokenizer": meta["tokenizer"]})

    stop = Stop(max_minutes)
    # a look at the losses costs nothing on a CPU; float16 needs one each step, for what its scaler skips
    bad_steps = BadSteps(max_bad_steps, 1 if run_device.type == "cpu" or scaler else log_interval, master)
    reader = ThreadPoolExecutor(1)  # reads the next step's windows while this one computes
    share = step_windows // world  # of a step's windows, this process's
    upcoming = reader.submit(windows.get, windows_seen + rank * share, share)
    peak = peak_flops(run_device)
    started = logged = time.time()
    started_iter = logged_iter = iter_num
    enough = False  # patience has ended

    while iter_num < max_iters and not enough and not stop.agreed():
        # the step's learning rate, and its tokens
        factor = lr_factor(iter_num, schedule if decay_lr else "constant", warmup_iters,
                           lr_decay_iters or max_iters, min_lr / learning_rate, decay_fraction)
        for group in (group for one in optimizers for group in one.param_groups):
            group["lr"] = group["highest_lr"] * factor
        x, y = (to_device(t, run_device) for t in upcoming.result())  # (N, T) each
        windows_seen += step_windows
        upcoming = reader.submit(windows.get, windows_seen + rank * share, share)

        # forward and backward, and the update, which does nothing where something is not finite
        with memory_advice(batch_size, gradient_accumulation_steps, remat):
            loss = accumulate(objective, x, y, batch_size, amp, scaler)
            grad_norm = update(model, optimizers, loss, grad_clip, scaler)
        bad_steps.add(iter_num + 1, learning_rate * factor, loss, grad_norm)
        if scaler and bad_steps.in_a_row:
            continue  # float16 was too small: the scaler has lowered its factor, and the schedule waits
        running += torch.stack((loss.nan_to_num(0, 0, 0), loss.isfinite()))
        iter_num += 1
        pruning.after(iter_num)
        last = iter_num == max_iters

        # say how it goes
        if master and (iter_num % log_interval == 0 or last):
            now = time.time()
            dt = (now - logged) / (iter_num - logged_iter)
            left = (max_iters - iter_num) * (now - started) / (iter_num - started_iter)
            logged, logged_iter = now, iter_num
            mfu = step_tokens / dt * model.flops_per_token() / (peak * world) if peak else None
            row = {"iter": iter_num, "tokens": windows_seen * config.block_size, "loss": loss.item(),
                   "lr": learning_rate * factor, "grad_norm": grad_norm.item(), "dt": dt,
                   "elapsed": elapsed(), "tokens_per_s": step_tokens / dt, "mfu": mfu}
            log(row)
            print(f"iter {iter_num:{len(str(max_iters))}}/{max_iters}  loss {row['loss']:7.4f}  "
                  f"lr {row['lr']:.2e}  norm {row['grad_norm']:6.2f}  {row['tokens_per_s'] / 1e3:7.1f}k tok/s"
                  f"{f'  mfu {mfu:.0%}' if mfu else ''}  {clock(left)} left", flush=True)

        # evaluate and save
        if iter_num % eval_interval == 0 or last:
            train_loss, metrics = (running[0] / running[1]).item(), validate()
            if not math.isfinite(metrics["val_loss"]):
                raise UserError(f"iter {iter_num}: the validation loss is {metrics['val_loss']}: lower "
                                "learning_rate; the checkpoints are from before")
            best = pruning.is_done(iter_num) and metrics["val_loss"] < best_val_loss
            best_val_loss = metrics["val_loss"] if best else best_val_loss
            since_best = 0 if best else since_best + pruning.is_done(iter_num)
            running.zero_()
            if master:
                log({"iter": iter_num, "elapsed": elapsed(), "train_loss": train_loss, **metrics})
                print(f"iter {iter_num}: train loss {train_loss:.4f}, {in_words(metrics)}, after "
                      f"{clock(elapsed())}{', best so far' * best}", flush=True)
                if sample_tokens:
                    print(f"\n{sample(sample_tokens)}\n", flush=True)
            if best:
                save("best.pt", resumable=False)  # first: a resumed run knows of it
            if best or last or always_save_checkpoint:
                save("ckpt.pt", resumable=True)
            enough = patience is not None and since_best >= patience
            logged, logged_iter = time.time(), iter_num  # an evaluation's time is not the steps'

    # Leave everything in order.
    reader.shutdown(cancel_futures=True)
    interrupted = stop.signal and iter_num < max_iters and not enough
    if interrupted:
        save("ckpt.pt", resumable=True)
    if world > 1:
        dist.barrier()  # the first to leave ends the others
    if master:
        plot(log_file, folder / "loss.png")
    if master and interrupted:
        print(f"stopped after {iter_num} steps, saved: --init_from=resume goes on", flush=True)
    elif master:
        if enough:
            print(f"stopped after {iter_num} steps: no better one in {patience} evaluations")
        print(f"\nA sample, after {clock(elapsed())}:\n\n{sample(200)}")
        print(f"\nMore of it: python sample.py --out_dir={folder.as_posix()} --start=\"...\"")
    if world > 1:
        dist.destroy_process_group()
    if interrupted:
        sys.exit(0 if stop.signal == OUT_OF_TIME else 128 + stop.signal)


def start_wandb(project: str, name: str, settings: dict):
    try:
        import wandb
    except ImportError:
        print("warning: wandb_log=True, but wandb is not installed: pip install wandb; log.jsonl has it all",
              file=sys.stderr)
        return None
    wandb.init(project=project, name=name, config=settings)
    return wandb


if __name__ == "__main__":
    launch(main, globals(), Config)
