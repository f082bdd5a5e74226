"""
Pretrain a Transformer: one loop, from a prepared text to a checkpoint.

    python train.py config/small.py                                    a small model of Python code, on a CPU
    python train.py config/small.py --dataset=novel                    your own text, once it is prepared
    python train.py config/small.py --init_from=resume                 go on where it was stopped
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py   the same on 8 GPUs of one machine

Without a config file the settings are nanoGPT's: GPT-2 124M, AdamW, cosine schedule.
"""
import time
STARTED = time.time()  # before the imports, which take seconds: `elapsed` counts what the user waits

import contextlib
import ctypes
import json
import math
import os
import signal
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import prepare
from config import SettingError, UserError, run
from model import Config, Transformer
from optim import load_optimizer_state, lr_factor, make_optimizers, optimizer_state
from tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# Settings. The model's are the fields of Config in model.py: --n_layer=6 works as well.
out_dir: str = "out"  # where checkpoints and logs go
overwrite: bool = False  # start from scratch although out_dir holds a checkpoint
init_from: str = "scratch"  # scratch; resume: go on in out_dir; another run's folder: its weights
eval_interval: int = 2000  # steps from one evaluation to the next
eval_iters: int = 200  # windows of block_size tokens in an evaluation, evenly spaced; 0: all
eval_only: bool = False  # evaluate once and leave
log_interval: int = 1  # steps from one log line to the next
always_save_checkpoint: bool = True  # at each evaluation; False: only where validation is the best so far
wandb_log: bool = False  # log to Weights & Biases too
wandb_project: str = "owt"  # its project
wandb_run_name: str = "gpt2"  # its name for this run
# data
dataset: str = "python"  # a folder under data/; built-in ones are made when missing
batch_size: int = 12  # windows in a micro-batch
gradient_accumulation_steps: int = 5 * 8  # micro-batches in a step, over all processes
# optimizer
optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, AdamW for the rest
learning_rate: float = 6e-4  # highest, of AdamW
muon_lr: float = 0.02  # highest, of Muon
max_iters: int = 600000  # steps, that is updates of the weights
weight_decay: float = 0.1  # of matrices, decoupled: each step takes away lr * weight_decay
beta1: float = 0.9  # AdamW's memory of the gradient
beta2: float = 0.95  # and of its square
grad_clip: float = 1.0  # gradients with a larger norm are scaled down to it; 0: never
# learning rate
decay_lr: bool = True  # False: constant after the warmup
schedule: Literal["cosine", "linear", "wsd"] = "cosine"  # its fall; wsd: constant, then linear
warmup_iters: int = 2000  # steps of linear rise
lr_decay_iters: Optional[int] = None  # step where min_lr is reached; None: max_iters
min_lr: float = 6e-5  # lowest, of AdamW; Muon's falls by the same factor
decay_fraction: float = 0.6  # share of the steps that wsd decays over
# system
device: str = "auto"  # auto: cuda, else mps, else cpu; or one of those, or cuda:1
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: what is fast
compile: bool = True  # torch.compile: half a minute at the start, faster steps (falls back where it fails)
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
    of its own.
    """

    def __init__(self, data: np.ndarray, block_size: int, seed: int):
        self.data, self.block_size, self.seed = data, block_size, seed
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
        """Inputs and targets, each (count, block_size): the targets are the inputs one token later."""
        return gather(self.data, self.locate(first, count), self.block_size)


def gather(data: np.ndarray, starts: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.from_numpy(data[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


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
    splits = {split: prepare.read_split(folder, split, meta) for split in ("train", "val")}
    for split, data in splits.items():
        if len(data) <= block_size:
            raise SettingError(f"block_size={block_size}: {folder}/{split}.bin has only {len(data)} tokens, "
                               "and a window takes one more than block_size: lower it, or prepare more text")
    return splits, meta, Tokenizer.from_dict(meta["tokenizer"])


# -----------------------------------------------------------------------------
# Objective

class NextToken(nn.Module):
    """What is minimised: (B, T) inputs and targets -> the loss in nats, summed over targets that are not -1.

    A sum, so that micro-batches and processes add up, and are divided once, by all the tokens that count.
    """

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, idx, targets):
        x, targets = self.model.hidden(idx).flatten(0, 1), targets.flatten()  # (B * T, C), (B * T,)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            size = max(64, IN_CACHE // self.model.config.vocab_size)  # tokens in a chunk
            return InCache.apply(self.head_loss, size, x, targets, *self.model.head.parameters())
        return self.head_loss(x, targets)

    def head_loss(self, x, targets):
        return F.cross_entropy(self.model.logits(x), targets, ignore_index=-1, reduction="sum")


IN_CACHE = 2**19  # logits: 2 MB, about a core's own cache


class InCache(torch.autograd.Function):
    """A loss over many tokens, with its gradient, a chunk of tokens at a time.

    The logits are by far the largest tensor of a small model; written to memory and read again by each of a
    dozen operations, forth and back, they took half of a step. Compiled code is fused, and needs none of
    this.
    """

    @staticmethod
    def forward(ctx, loss_of, size, x, targets, *params):
        total, ctx.needed = x.new_zeros(()), any(ctx.needs_input_grad)
        grads = [torch.empty_like(x), *(torch.zeros_like(p) for p in params)] if ctx.needed else []
        for i in range(0, len(x), size):
            with torch.set_grad_enabled(ctx.needed):
                part = x[i:i + size].detach().requires_grad_(ctx.needed)
                loss = loss_of(part, targets[i:i + size])
            if ctx.needed:
                g, *g_params = torch.autograd.grad(loss, (part, *params))
                grads[0][i:i + size] = g
                torch._foreach_add_(grads[1:], g_params)
            total += loss.detach()
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx, g):
        return None, None, ctx.saved_tensors[0] * g, None, *(grad * g for grad in ctx.saved_tensors[1:])


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
                loss = objective(x[i:i + batch_size], y[i:i + batch_size]) / counted
            total += loss.detach()
            loss = loss * world  # against DDP's average: a sum is wanted
            (scaler.scale(loss) if scaler else loss).backward()
    if world > 1:
        dist.all_reduce(total)
    return total


@torch.no_grad()
def evaluate(objective, data, block_size, eval_iters, batch_size, token_bytes, device,
             amp=contextlib.nullcontext()) -> tuple[float, float]:
    """Mean loss in nats a token, and bits a byte of the text that the tokens stand for.

    On `eval_iters` evenly spaced windows that do not overlap (0: all there are), the same ones whatever the
    batch size and the number of processes, which share the work. token_bytes: (V,) length of each token's
    text.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    available = (len(data) - 1) // block_size
    count = min(eval_iters or available, available)
    starts = np.linspace(0, available - 1, count).astype(np.int64) * block_size
    mine = starts[rank::world]
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    objective.eval()
    for i in range(0, len(mine), batch_size):
        x, y = gather(data, mine[i:i + batch_size], block_size)
        sums += torch.tensor([0.0, y.numel(), token_bytes[y].sum()], dtype=torch.float64)
        missing = batch_size - len(x)  # a last batch of its own size would be compiled anew
        x, y = F.pad(x, (0, 0, 0, missing)), F.pad(y, (0, 0, 0, missing), value=-1)
        with amp:
            sums[0] += objective(x.to(device), y.to(device)).item()
    objective.train()
    if world > 1:
        sums = sums.to(device if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(sums)
    nats, tokens, n_bytes = sums.tolist()
    return nats / tokens, nats / math.log(2) / max(1, n_bytes)


# -----------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write, then rename: there is a whole file at every moment. The last ckpt.pt stays, as ckpt.prev.pt.

    Raises UserError where it cannot be written; what was there before is unharmed.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        if path.name == "ckpt.pt" and path.exists():
            os.replace(path, path.with_name("ckpt.prev.pt"))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        raise UserError(f"{path}: cannot be written ({error}): the ones before it are unharmed") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(folder: str | Path, names=("best.pt", "ckpt.pt", "ckpt.prev.pt")) -> dict:
    """The first sound checkpoint of these names, on the CPU. A damaged one is passed over, and named.

    Raises UserError where there is none. Nothing in the file is run: tensors and plain values only.
    """
    damaged = []
    for path in (Path(folder) / name for name in names):
        if not path.is_file():
            continue
        try:
            with zipfile.ZipFile(path) as f:  # a .pt is a zip, whose checksums torch.load ignores
                if f.testzip() is not None:
                    raise zipfile.BadZipFile("checksum")
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can fail in any way
            damaged.append(f"{path} is damaged ({type(error).__name__})")
            print(f"warning: {damaged[-1]}", file=sys.stderr)
    raise UserError("; ".join(damaged) or f"{folder}: no checkpoint here, none of {', '.join(names)}: "
                    "train one first, python train.py config/small.py")


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

def main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """Raises SettingError where the machine has no such device."""
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise SettingError(f"device={device}: wanted auto, cuda, mps or cpu") from None
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
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
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
            faster(x, y).backward()
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


class Stop:
    """SIGINT or SIGTERM asks once to stop after the step under way, the second time to stop now."""

    def __init__(self):
        self.signal = 0
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, self.ask)

    def ask(self, number, frame):
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    def agreed(self) -> int:
        """The signal that any process got, for all of them."""
        if dist.is_initialized():
            got = torch.tensor(self.signal, device="cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(got, op=dist.ReduceOp.MAX)
            self.signal = int(got)
        return self.signal


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


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
    # Where we run: torchrun starts one process a GPU (or a few on a CPU), and tells each its rank.
    rank, local_rank, world = (int(os.environ.get(key, default))
                               for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    for name in ("batch_size", "gradient_accumulation_steps", "max_iters", "eval_interval", "log_interval"):
        if globals()[name] < 1:
            raise SettingError(f"{name}={globals()[name]}: must be at least 1")
    for name in ("eval_iters", "warmup_iters", "lr_decay_iters", "grad_clip", "weight_decay", "min_lr",
                 "seed"):
        if (globals()[name] or 0) < 0:
            raise SettingError(f"{name}={globals()[name]}: must be at least 0")
    for name, value in (("learning_rate", learning_rate), ("muon_lr", muon_lr)):
        if not 0 < value < math.inf:
            raise SettingError(f"{name}={value}: must be above 0")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise SettingError(f"{name}={value}: must be at least 0 and below 1")
    if not 0 < decay_fraction <= 1:
        raise SettingError(f"decay_fraction={decay_fraction}: must be above 0 and at most 1")
    if gradient_accumulation_steps % world:
        raise SettingError(f"gradient_accumulation_steps={gradient_accumulation_steps}: counts over all "
                           f"processes, so it must be a multiple of their number, {world}")
    if not model_args.get("causal", True):
        raise SettingError("causal=False: this loop trains next-token models")
    run_device = pick_device(device, local_rank)
    run_dtype = pick_dtype(dtype, run_device)
    if world > 1:
        own = "nccl" if run_device.type == "cuda" else "gloo"
        dist.init_process_group(own if backend == "auto" else backend)
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
    folder, checkpoint = Path(out_dir), None
    if init_from == "scratch":
        if (folder / "ckpt.pt").exists() and not overwrite and not eval_only:
            raise SettingError(f"{folder}/ckpt.pt: a run is here already: --init_from=resume goes on with "
                               "it, --overwrite starts anew, --out_dir=FOLDER writes elsewhere")
    elif init_from == "resume":
        checkpoint = load_checkpoint(folder, ("ckpt.pt", "ckpt.prev.pt"))
    else:
        checkpoint = load_checkpoint(init_from)
    known = checkpoint["model_args"] if checkpoint else {}
    for name, value in model_args.items() if known else ():
        if value != known[name] and name != "dropout":
            raise SettingError(f"{name}={value}: the checkpoint's model has {name}={known[name]}: leave it "
                               "out, or start from scratch")
    try:
        config = Config(**{**known, **model_args})
    except ValueError as error:  # it names the field
        raise SettingError(str(error)) from None
    splits, meta, tokenizer = open_data(dataset, model_args.get("vocab_size"), config.block_size)
    if checkpoint and checkpoint["tokenizer"] != meta["tokenizer"]:
        raise SettingError(f"dataset={dataset}: its tokenizer is not the one that the checkpoint was trained "
                           "with: prepare the text with the same one, or start from scratch")
    if "vocab_size" not in {**known, **model_args}:
        config.vocab_size = meta["vocab_size"]

    # The model, its objective, the optimizers.
    model = Transformer(config)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    model.to(run_device)
    optimizers = make_optimizers(model, optimizer, learning_rate, muon_lr, weight_decay, (beta1, beta2))
    torch.manual_seed(seed + rank)  # dropout differs between processes
    windows = Windows(splits["train"], config.block_size, seed)
    objective = NextToken(model)
    if compile:
        objective = compiled(objective, *(to_device(t, run_device) for t in windows.get(0, batch_size)), amp)
    is_compiled = not isinstance(objective, NextToken)
    if world > 1:
        objective = DistributedDataParallel(objective, broadcast_buffers=False)  # they are constants

    # Where we are. Weights were taken above; here is what a run under way has besides.
    iter_num, windows_seen, best_val_loss, elapsed_before = 0, 0, math.inf, 0.0
    if init_from == "resume":
        load_optimizer_state(optimizers, model, checkpoint["optimizer"])
        if scaler and checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        if len(checkpoint["rng"]["cpu"]) == world:
            torch.set_rng_state(checkpoint["rng"]["cpu"][rank])
            if run_device.type == "cuda":
                torch.cuda.set_rng_state(checkpoint["rng"]["cuda"][rank], run_device)
        iter_num, windows_seen = checkpoint["iter_num"], checkpoint["data"]["windows"]
        best_val_loss, elapsed_before = checkpoint["best_val_loss"], checkpoint["data"]["elapsed"]
    checkpoint = None  # free its memory

    token_bytes = np.zeros(config.vocab_size, dtype=np.int64)
    token_bytes[:len(tokenizer.token_bytes)] = [len(token) for token in tokenizer.token_bytes]

    def validate():
        return evaluate(objective, splits["val"], config.block_size, eval_iters, batch_size, token_bytes,
                        run_device, amp)

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
        val_loss, val_bpb = validate()
        if master:
            print(f"iter {iter_num}: val loss {val_loss:.4f}, {val_bpb:.4f} bits per byte")
        return
    settings = {name: globals()[name] for name in sys.modules[__name__].__annotations__} | asdict(config)
    log_file = folder / "log.jsonl"
    if master:
        print(f"training  {max_iters:,} steps of {step_tokens:,} tokens, "
              f"{max_iters * step_windows / windows.n:.1f} epochs, into {folder}\n", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "settings.json", json.dumps(settings, indent=1))
        kept = []
        if init_from == "resume" and log_file.exists():  # rows behind the checkpoint are about to come again
            rows = log_file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [row for row in rows if row.endswith("\n") and json.loads(row)["iter"] <= iter_num]
        write_text(log_file, "".join(kept))
    wandb = start_wandb(wandb_project, wandb_run_name, settings) if wandb_log and master else None

    def log(row):
        with open(log_file, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
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
                "data": {"windows": windows_seen, "elapsed": elapsed()}, "iter_num": iter_num,
                "best_val_loss": best_val_loss, "settings": settings, "tokenizer": meta["tokenizer"]})

    stop = Stop()
    reader = ThreadPoolExecutor(1)  # reads the next step's windows while this one computes
    share = step_windows // world  # of a step's windows, this process's
    upcoming = reader.submit(windows.get, windows_seen + rank * share, share)
    peak = peak_flops(run_device)
    started = logged = time.time()
    started_iter = logged_iter = iter_num
    losses = []  # since the last evaluation

    while iter_num < max_iters and not stop.agreed():
        # the step's learning rate, and its tokens
        factor = lr_factor(iter_num, schedule if decay_lr else "constant", warmup_iters,
                           lr_decay_iters or max_iters, min_lr / learning_rate, decay_fraction)
        for group in (group for one in optimizers for group in one.param_groups):
            group["lr"] = group["highest_lr"] * factor
        x, y = (to_device(t, run_device) for t in upcoming.result())  # (N, T) each
        windows_seen += step_windows
        upcoming = reader.submit(windows.get, windows_seen + rank * share, share)

        # forward, backward, update
        loss = accumulate(objective, x, y, batch_size, amp, scaler)
        for one in optimizers if scaler else ():
            scaler.unscale_(one)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        for one in optimizers:
            scaler.step(one) if scaler else one.step()
            one.zero_grad(set_to_none=True)
        if scaler:
            scaler.update()
        losses.append(loss)
        iter_num += 1
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
            if not math.isfinite(row["loss"]):
                raise UserError(f"iter {iter_num}: the loss is {row['loss']} (lr {row['lr']:.2e}, norm "
                                f"{row['grad_norm']:.3g}): lower learning_rate; the checkpoints are older")

        # evaluate and save
        if iter_num % eval_interval == 0 or last:
            val_loss, val_bpb = validate()
            best = val_loss < best_val_loss
            best_val_loss = val_loss if best else best_val_loss  # NaN is never the best
            if master:
                train_loss = torch.stack(losses).mean().item()
                log({"iter": iter_num, "elapsed": elapsed(), "train_loss": train_loss, "val_loss": val_loss,
                     "val_bpb": val_bpb})
                print(f"iter {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, {val_bpb:.4f} "
                      f"bits per byte, after {clock(elapsed())}{', best so far' * best}", flush=True)
            if best or last or always_save_checkpoint:
                save("ckpt.pt", resumable=True)
            if best:
                save("best.pt", resumable=False)
            losses = []
            logged, logged_iter = time.time(), iter_num  # an evaluation's time is not the steps'

    # Leave everything in order.
    reader.shutdown(cancel_futures=True)
    interrupted = stop.signal and iter_num < max_iters
    if interrupted:
        save("ckpt.pt", resumable=True)
    if master:
        plot(log_file, folder / "loss.png")
    if master and interrupted:
        print(f"stopped after {iter_num} steps, saved: --init_from=resume goes on", flush=True)
    elif master:
        prompt = tokenizer.eot if meta["splits"]["train"]["documents"] > 1 else tokenizer.encode("\n")[0]
        idx = torch.tensor([[prompt]], device=run_device)
        print(f"\nA sample, after {clock(elapsed())}:\n")
        print(tokenizer.decode(model.generate(idx, 200, temperature=0.8, top_k=200)[0, 1:].tolist()))
        print(f"\nMore of it: python sample.py --out_dir={folder.as_posix()} --start=\"...\"")
    if world > 1:
        dist.destroy_process_group()
    if interrupted:
        sys.exit(128 + stop.signal)


def start_wandb(project: str, name: str, settings: dict):
    try:
        import wandb
    except ImportError:
        print("warning: wandb_log=True, but wandb is not installed: pip install wandb; log.jsonl has it all",
              file=sys.stderr)
        return None
    wandb.init(project=project, name=name, config=settings)
    return wandb


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    run(main, globals(), Config)
