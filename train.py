"""
Pretrain a Transformer: one loop, from a prepared text to a checkpoint.

    python train.py config/small.py                                    a small model of Python code, on a CPU
    python train.py config/small.py --dataset=novel                    your own text, once it is prepared
    python train.py --init_from=resume --out_dir=out/small             go on where it was stopped
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py   the same on 8 GPUs of one machine
    python train.py config/bert.py                                     masked tokens instead of next ones
    python train.py config/small.py --teacher=out/large --out_dir=out/student   learn from a larger model too

Without a config file the settings are nanoGPT's: GPT-2 124M, AdamW, cosine schedule.
"""
from __future__ import annotations

import contextlib
import math
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Optional

# before torch: Ctrl-C is silent from here on
from config import (SettingError, UserError, above, at_least, check_used, defaults_of, launch, out_of_memory,
                    place_of, values_of)

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

import prepare
from lib.hub import full_id, is_published
from lib.optim import AdamW, Momentum, Muon, Pruning
from lib.run import (BadSteps, Machine, Pace, Run, State, beside, check_sums, clock, fitting, in_words,
                     load_body, main_process, model_of, step_line, stored_settings, sum_of)
from lib.tokenizer import Tokenizer, same_tokenizer
from model import Config, TokenEmbedding, Transformer, block_matrices, tell_compile_failed

# -----------------------------------------------------------------------------
# Settings. The model's are the fields of Config in model.py: --n_layer=6 works as well. Annotations are
# evaluated late (from __future__), so that these can name the tables that come below.
out_dir: str = "out"  # where checkpoints and logs go
overwrite: bool = False  # start over even if out_dir holds a run, which is removed
init_from: str = "scratch"  # scratch; resume: go on in out_dir; a run's folder or hub id: its weights; auto
chars: str = ""  # of a nanoGPT checkpoint with few tokens: the text whose characters they are
eval_interval: at_least(1) = 2000  # steps between evaluations
eval_iters: at_least(0) = 200  # windows of block_size tokens in an evaluation, evenly spaced; 0: all
eval_only: bool = False  # evaluate once and exit
sample_tokens: at_least(0) = 0  # tokens of sample text to print at each evaluation
log_interval: at_least(1) = 1  # steps between log lines
always_save_checkpoint: bool = True  # save at each evaluation; False: only at a new best
wandb_log: bool = False  # log to Weights & Biases too
wandb_project: str = "owt"  # project there
wandb_run_name: str = "gpt2"  # name of this run there
# data
dataset: str = "openwebtext"  # a folder under data/; built-in ones are made when missing
batch_size: at_least(1) = 12  # windows in a micro-batch
gradient_accumulation_steps: at_least(1) = 5 * 8  # micro-batches in a step, over all processes
# objective: the next token, or if the model is not causal the masked ones
mask_rate: above(0.0, at_most=1.0) = 0.3  # share of a window's tokens to guess, for causal=False
label_smoothing: at_least(0.0, below=1.0) = 0.0  # share of each target that is spread over all tokens
teacher: str = ""  # a run's folder, a Hugging Face folder or id: its predictions are targets too; empty: none
teacher_share: above(0.0, at_most=1.0) = 0.5  # weight of the teacher in the loss
teacher_temperature: above(0.0) = 2.0  # both models' logits are divided by it
# optimizer
optimizer: Literal[tuple(OPTIMIZERS)] = "adamw"  # muon: for the blocks' matrices, adamw for the rest
learning_rate: above(0.0) = 6e-4  # peak, of all but Muon
muon_lr: above(0.0) = 0.02  # peak, of Muon
embd_lr: Optional[above(0.0)] = None  # peak, of the token embedding; None: as learning_rate
max_iters: at_least(1) = 600000  # steps, that is updates of the weights
weight_decay: at_least(0.0) = 0.1  # of matrices, decoupled: each step shrinks them by lr * weight_decay
beta1: at_least(0.0, below=1.0) = 0.9  # decay of AdamW's mean of the gradient
beta2: at_least(0.0, below=1.0) = 0.95  # decay of its mean of the squared gradient
momentum: at_least(0.0, below=1.0) = 0.9  # momentum of lars and sgd
grad_clip: at_least(0.0) = 1.0  # gradients with a larger norm are scaled down to it; 0: never
sparsity: at_least(0.0, below=1.0) = 0.0  # share of the blocks' weights, the smallest, zeroed halfway through
# learning rate
decay_lr: bool = True  # False: constant, without a warmup
schedule: Literal[tuple(SCHEDULES)] = "cosine"  # shape of its decay; wsd: constant, then linear
warmup_iters: at_least(0) = 2000  # steps of linear increase at the start
lr_decay_iters: Optional[at_least(0)] = None  # step at which the decay ends; None: max_iters
min_lr: at_least(0.0) = 6e-5  # lowest, of learning_rate; the others fall by the same factor
decay_fraction: above(0.0, at_most=1.0) = 0.6  # share of the steps that wsd decays over
# when to stop before max_iters
patience: Optional[at_least(1)] = None  # stop after this many evaluations without a new best; None: never
max_minutes: Optional[above(0.0)] = None  # stop this process then; the run is saved and can be resumed
max_bad_steps: at_least(1) = 20  # this many in a row with a loss or gradient that is not finite end the run
# system
device: str = "auto"  # auto: cuda, else mps, else cpu; or one of those, or cuda:1
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: what is fast
matmul: Literal["auto", "float32", "bfloat16"] = "auto"  # of a CPU's training steps; auto: what is fast
compile: bool = True  # torch.compile: half a minute at the start, faster steps (falls back if it fails)
remat: bool = False  # compute the blocks' activations again in the backward pass: less memory, a third slower
backend: Literal["auto", "nccl", "gloo"] = "auto"  # of torch.distributed; auto: nccl on GPUs, else gloo
seed: at_least(0, below=2**63) = 1337  # of weights, data order and dropout
deterministic: bool = False  # bit-identical reruns on a GPU too, at some cost in speed
# -----------------------------------------------------------------------------


# -----------------------------------------------------------------------------
# Data

class Windows:
    """The training tokens as windows of block_size, each once per epoch.

    Which window comes when is a function of (seed, epoch) alone: not of the batch size, the number of
    processes or the random state, so all of them may change on resume. An epoch's windows start at an offset
    of its own. mask: masked_tokens with its settings, for a model that fills gaps.
    """

    def __init__(self, data: np.ndarray, block_size: int, seed: int, mask: Optional[Callable] = None):
        self.data, self.block_size = data, block_size
        self.seed, self.mask = seed, mask
        self.n = max(1, (len(data) - block_size) // block_size)  # in an epoch, whatever its offset
        self.epoch, self.starts = -1, None  # of the epoch that was asked for last

    def locate(self, first: int, count: int) -> np.ndarray:
        """Where windows number first, first + 1, ... of the whole training begin in the data: (count,)."""
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
        if self.mask:
            return self.mask(x, range(first, first + count), self.seed)
        return x, y


def gather(data: np.ndarray, starts: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows that begin at `starts`, and as targets the same one token later."""
    tokens = torch.from_numpy(data[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def masked_tokens(idx, numbers, seed, rate, token, vocab_size) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to guess (Devlin et al. 2019): (B, T) -> inputs, and targets that are -1 where there is no gap.

    As many in each window. 80% of them become `token`, 10% a random one, 10% stay. A function of the seed and
    the windows' numbers: not of the batch, nor of the random state.
    """
    x, y = idx.clone(), torch.full_like(idx, -1)
    count = count_masked(idx.size(1), rate)
    for row, number in enumerate(numbers):
        rng = np.random.default_rng((seed, number))
        places = torch.from_numpy(rng.permutation(idx.size(1))[:count])
        y[row, places] = idx[row, places]
        masked, changed, _ = places.tensor_split((int(0.8 * count + 0.5), int(0.9 * count + 0.5)))
        x[row, masked] = token
        x[row, changed] = torch.from_numpy(rng.integers(vocab_size, size=len(changed)))
    return x, y


def count_masked(block_size: int, rate: float) -> int:
    return max(1, int(rate * block_size + 0.5))


def read_ahead(windows: Windows, machine: Machine, step_windows: int, seen: int) -> Iterator[tuple]:
    """This process's share of each step's windows, read while the step before is computed.

    seen: windows that earlier steps took. Yields inputs and targets, (N, T) each, on the device.
    """
    share = step_windows // machine.world
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(windows.get, seen + machine.rank * share, share)
        while True:
            x, y = upcoming.result()
            seen += step_windows
            upcoming = thread.submit(windows.get, seen + machine.rank * share, share)
            yield machine.to(x), machine.to(y)


class Data(NamedTuple):
    name: str
    train: np.ndarray  # token ids
    val: np.ndarray
    tokenizer: Tokenizer
    many: bool  # many documents, not one text
    sums: dict[Path, str]  # the SHA-256 of each file that has one
    token_bytes: Optional[np.ndarray]  # (V,): bytes of text that each stands for; None: they do not add up

    def prompt(self) -> int:
        """The token that a sample begins with: documents begin after <|endoftext|>."""
        if self.many:
            return self.tokenizer.eot
        return (self.tokenizer.encode("\n") or [self.tokenizer.eot])[0]


def make_built_in(dataset: str, vocab_size: Optional[int], machine: Machine, origin: str) -> None:
    """Prepare a built-in data set that is not there yet: in the first process of all, and then, if no disk is
    shared, in the first of each machine; the others wait. It gets the tokenizer of the published model that
    is the origin of the weights."""
    for its_turn in (machine.main, machine.first_here):
        if its_turn and dataset in prepare.BUILT_IN and not (Path("data") / dataset).exists():
            how = {}
            if is_published(origin):
                how["tokenizer"] = full_id(origin)
            elif prepare.BUILT_IN[dataset][1] == "bpe" and vocab_size is not None:
                how["vocab_size"] = vocab_size
            prepare.prepare(dataset, **how)
        machine.barrier()


def need_data(dataset: str) -> None:
    """Raises UserError if there is no such data set, nor one that is built in."""
    folder = Path("data") / dataset
    if not folder.is_dir() and dataset not in prepare.BUILT_IN:
        how = "--source=hf:Skylion007/openwebtext --tokenizer=gpt2" if dataset == "openwebtext" else (
            "--source=FILE")
        there = sorted(file.parent.name for file in Path("data").glob("*/train.bin"))
        others = "|".join(dict.fromkeys([*prepare.BUILT_IN, *there]))
        raise UserError(f"dataset={dataset}: {folder} is not there: python prepare.py {how} "
                        f"--dataset={dataset} makes it; or take --dataset={others}")


def open_data(dataset: str, vocab_size: Optional[int], block_size: int) -> Data:
    """What prepare.py made of data/<dataset>, or nanoGPT.

    vocab_size: the model's, if it was given. Raises UserError if there is no such data set or it is damaged,
    SettingError if it does not fit.
    """
    need_data(dataset)
    folder = Path("data") / dataset
    ours = (folder / "meta.json").exists() or not (folder / "train.bin").exists()
    meta = prepare.read_meta(folder) if ours else prepare.nanogpt_meta(folder)
    if not ours and main_process():
        its = {"chars": "the characters of input.txt"}.get(meta["tokenizer"]["kind"], "GPT-2's")
        print(f"{folder}: of nanoGPT, without a tokenizer: its tokens are read as {its}")
    if vocab_size is not None:
        asked = meta["settings"].get("vocab_size")
        if meta["tokenizer"]["kind"] == "bpe" and vocab_size not in (asked, meta["vocab_size"]):
            raise SettingError(f"vocab_size={vocab_size}: {folder} was made with {asked}: leave it out, or "
                               f"make the data again, with prepare.py --vocab_size={vocab_size} --overwrite")
        if vocab_size < meta["vocab_size"]:
            raise SettingError(f"vocab_size={vocab_size}: {folder} has {meta['vocab_size']} tokens: leave it "
                               "out")
    try:
        train, val = (prepare.read_split(folder, split, meta) for split in ("train", "val"))
        tokenizer = Tokenizer.from_dict(meta["tokenizer"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/meta.json: damaged ({type(error).__name__}: {error}): make the data set "
                        "again, with --overwrite") from None
    for split, ids in (("train", train), ("val", val)):
        if len(ids) <= block_size:
            raise SettingError(f"block_size={block_size}: {folder}/{split}.bin has only {len(ids)} tokens, "
                               "and a window takes one more than block_size: lower it, or prepare more text")
    sums = {folder / f"{split}.bin": meta["splits"][split].get("sha256") for split in ("train", "val")}
    sums = {path: expected for path, expected in sums.items() if expected}
    token_bytes = tokenizer.byte_lengths(val, meta["splits"]["val"].get("bytes"))
    return Data(dataset, train, val, tokenizer, meta["splits"]["train"]["documents"] > 1, sums,
                token_bytes)


# -----------------------------------------------------------------------------
# Objective

METRICS = {  # name -> function of logits (N, V) and targets (N,) -> (N,), whose mean is val_<name>
    "accuracy": lambda logits, targets: logits.argmax(-1) == targets,
}


class Objective(nn.Module):
    """What is minimised: (B, T) inputs and targets -> sums over the targets that are not -1.

    In training: the loss, in nats, and the model's penalty, (2,). In evaluation: the loss, then the plain
    cross-entropy, and the METRICS, (1 + METRICS,). They are sums, so that micro-batches and processes add up;
    they are divided once, by the number of all targets that count.

    counted: how many targets of a sequence count, at most; None: all. Others get no logits. teacher: a
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
        if torch.compiler.is_compiling():
            sums = self.head_loss(x, *others)
        else:
            most = IN_CACHE if x.device.type == "cpu" else IN_MEMORY
            chunk = max(64, most // self.model.config.vocab_size)  # tokens
            trained = [p for p in self.model.parameters() if p.requires_grad]
            sums = InChunks.apply(self.head_loss, chunk, x, others, *trained)
        if not self.training:
            return sums
        penalty = self.model.penalty() * (targets != -1).sum()
        return torch.cat((sums, penalty.view(1)))

    def head_loss(self, x, targets, taught=None):  # (N, C), (N,), (N, teacher's C) -> (1,) or (1 + METRICS,)
        logits = self.model.logits(x)
        smoothing = self.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum", label_smoothing=smoothing)
        if not self.training:
            values = [measure(logits, targets) * (targets != -1) for measure in METRICS.values()]
            return torch.stack([loss, *(value.sum().to(loss.dtype) for value in values)])
        if taught is not None:
            ours = F.log_softmax(logits / self.temperature, -1)
            theirs = F.log_softmax(self.teacher.logits(taught) / self.temperature, -1)
            apart = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)  # (N,)
            # its gradient shrinks with the temperature squared: make up for it
            soft = self.temperature**2 * (apart * (targets != -1)).sum()
            loss = (1 - self.teacher_share) * loss + self.teacher_share * soft
        return loss.view(1)


IN_CACHE = 2**19  # logits in a chunk: 2 MB, about a core's own cache
IN_MEMORY = 2**26  # on a GPU: 0.3 GB, of which there are a few copies


class InChunks(torch.autograd.Function):
    """A loss over many tokens, with its gradient, a chunk of tokens at a time.

    The logits are by far the largest tensor of a small model; written to memory and read again by each of a
    dozen operations, forward and backward, they took half the time of a step on a CPU, and most of a GPU's
    memory. Compiled code is fused, and needs none of this. params: all that the loss may depend on; those
    that it does not get no gradient.
    """

    @staticmethod
    def forward(ctx, loss_of, size, x, others, *params):
        training = any(ctx.needs_input_grad)
        total, grad_x, grads = 0, torch.empty_like(x), [None] * len(params)
        for i in range(0, len(x), size):
            chunk = slice(i, i + size)
            with torch.set_grad_enabled(training):
                part = x[chunk].detach().requires_grad_(training)
                sums = loss_of(part, *(t[chunk] for t in others))
                loss = sums[0]
            total = total + sums.detach()
            if training:
                grad_x[chunk], *found = torch.autograd.grad(loss, (part, *params), allow_unused=True)
                for k in (k for k, grad in enumerate(found) if grad is not None):
                    if grads[k] is None:
                        grads[k] = torch.zeros_like(params[k])
                    grads[k] += found[k]
        ctx.save_for_backward(grad_x, *grads)
        return total

    @staticmethod
    def backward(ctx, g):
        grad_x, *grads = ctx.saved_tensors
        scaled = [None if grad is None else grad * g[0] for grad in grads]
        return None, None, grad_x * g[0], None, *scaled


def recompute_blocks(model: Transformer) -> None:
    """Keep only each block's input for the backward pass, which recomputes the rest."""
    for block in model.blocks:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)


def load_teacher(path: str, config: Config, tokenizer: dict) -> Transformer:
    """The model that --teacher names. Raises SettingError if it cannot teach one with this config."""
    teacher, its_tokenizer = load_body(path, dropout=0.0)
    if not same_tokenizer(its_tokenizer.to_dict(), tokenizer):
        raise SettingError(f"teacher={path}: has another tokenizer than the data set")
    if teacher.head is None:
        raise SettingError(f"teacher={path}: an encoder without a head for tokens has nothing to teach")
    for name in ("causal", "vocab_size", "block_size"):
        ours, its = getattr(config, name), getattr(teacher.config, name)
        if ours != its and not (name == "block_size" and ours < its):
            raise SettingError(f"{name}={ours}: the teacher has {its}, and cannot teach this model")
    return teacher.requires_grad_(False)


# -----------------------------------------------------------------------------
# Optimizers, and the learning rate

OPTIMIZERS = {  # name -> what makes one; groups: of parameters, each with its lr and weight_decay
    "adamw": lambda groups, betas, momentum: AdamW(groups, betas=betas, fused=True),
    "muon": lambda groups, betas, momentum: Muon(groups),
    "lars": lambda groups, betas, momentum: Momentum(groups, momentum=momentum, trust=0.001),
    "sgd": lambda groups, betas, momentum: Momentum(groups, momentum=momentum),
}
BLOCKS_ONLY = {"muon": "adamw"}  # an optimizer for the blocks' matrices only -> the one for the rest


def make_optimizers(model: nn.Module, optimizer: str, learning_rate: float, muon_lr: float,
                    weight_decay: float, betas: tuple[float, float], momentum: float = 0.9,
                    embd_lr: Optional[float] = None) -> list:
    """Each trained parameter in one group of one optimizer; matrices decay, vectors do not.

    betas: of adamw; momentum: of sgd and lars; muon_lr: of the blocks' matrices, if they have an optimizer of
    their own; embd_lr: of the tables of tokens, if they have their own. A group's "highest_lr" is its peak,
    which set_lr scales.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    in_blocks, tables = set(), set()
    if optimizer in BLOCKS_ONLY:
        in_blocks = {p for layer in block_matrices(model) for p in layer.parameters() if p.ndim == 2}
    if embd_lr is not None:
        tables = {table.weight for table in model.modules() if isinstance(table, TokenEmbedding)}

    blocks, matrices, vectors, embedding = [], [], [], []
    for p in trained:
        if p in in_blocks:
            blocks.append(p)
        elif p in tables:
            embedding.append(p)
        else:
            (matrices if p.ndim >= 2 else vectors).append(p)

    def group(params, lr, decay):
        return {"params": params, "lr": lr, "highest_lr": lr, "weight_decay": decay}

    others = [group(matrices, learning_rate, weight_decay), group(vectors, learning_rate, 0.0),
              group(embedding, embd_lr, weight_decay)]
    found = []
    for name, groups in ((BLOCKS_ONLY.get(optimizer, optimizer), others),
                         (optimizer, [group(blocks, muon_lr, weight_decay)])):
        groups = [one for one in groups if one["params"]]
        if groups:
            found.append(OPTIMIZERS[name](groups, betas, momentum))
    return found


def set_lr(optimizers: list, factor: float) -> None:
    """factor: a share of each group's peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["highest_lr"] * factor


class Moment(NamedTuple):
    """What a schedule may depend on, after the warmup."""
    step: int
    warmup: int  # steps
    end: int  # the step at which the decay ends
    floor: float  # the lowest learning rate, as a share of the highest
    fraction: float  # of all steps, those in which wsd falls

    def falling(self, left: float) -> float:
        """From the highest to the floor, as `left` goes from 1 to 0."""
        return self.floor + (1 - self.floor) * left

    def done(self, begin: float) -> float:
        """From 0 to 1, between a step and the end."""
        return 1.0 if self.step >= self.end else max(0.0, (self.step - begin) / (self.end - begin))


SCHEDULES = {  # name -> of a Moment, the learning rate as a share of the highest
    "cosine": lambda at: at.falling(0.5 * (1 + math.cos(math.pi * at.done(at.warmup)))),
    "linear": lambda at: at.falling(1 - at.done(at.warmup)),
    "wsd": lambda at: at.falling(1 - at.done(max(at.warmup, at.end * (1 - at.fraction)))),
    "constant": lambda at: 1.0,
}


def lr_factor(step: int, schedule: str, warmup: int, end: int, floor: float, fraction: float = 0.6) -> float:
    """The learning rate of a step (0 is the first) as a share of the highest; see Moment for the others.

    It rises over the `warmup` first steps; then it is as the schedule says.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[schedule](Moment(step, warmup, end, floor, fraction))


# -----------------------------------------------------------------------------
# The step

def train_step(objective, micro_batches: list[tuple], counted: torch.Tensor, model, optimizers,
               machine: Machine, grad_clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up the gradient of a step's mean loss over its micro-batches, and update the weights.

    micro_batches: this process's, each the arguments of the objective, which returns sums of the loss and of
    the penalty. counted: how many targets these have. Returns the means of both over the targets of all
    processes, (2,), and the norm of the gradient before clipping.
    """
    counted = machine.sum(counted)
    counted = counted + (counted == 0)  # no targets, nothing to learn: do not divide by 0
    total = torch.zeros(2, device=machine.device)
    with machine.training():
        for n, micro_batch in enumerate(micro_batches, start=1):
            # DDP averages gradients over the processes in the last backward pass, earlier ones stay local
            local = machine.world > 1 and n < len(micro_batches)
            with objective.no_sync() if local else contextlib.nullcontext():
                with machine.amp():
                    sums = objective(*micro_batch) / counted
                total += sums.detach()
                loss = sums.sum() * machine.world  # undoes DDP's average: a sum is wanted
                (machine.scaler.scale(loss) if machine.scaler else loss).backward()
        machine.sum(total)
        return total, update(model, optimizers, total.sum(), grad_clip, machine.scaler)


def update(model, optimizers, loss, grad_clip, scaler=None) -> torch.Tensor:
    """Clip the gradient and take a step, or none at all if the loss or the gradient is not finite.

    That is decided on the device, and not waited for: BadSteps reads it later. Clears the gradients, and
    returns their norm before clipping.
    """
    for optimizer in optimizers if scaler else ():
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    found_inf = 1 - (loss.isfinite() & norm.isfinite()).float()
    for optimizer in optimizers:
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = found_inf  # 1: no step is made; GradScaler.step would wait
            optimizer.step()
        elif not found_inf:  # an optimizer without that: wait for the device
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if scaler:
        scaler.update()
    return norm


def ready(objective: nn.Module, machine: Machine, compile: bool = False,
          example: tuple = ()) -> tuple[nn.Module, bool]:
    """The objective as it is trained: on its device, compiled, data-parallel; and whether it is compiled.

    example: arguments to try the compiled one with.
    """
    objective = objective.to(machine.device)
    plain = objective
    if compile:
        objective = compiled(objective, machine, [machine.to(t) for t in example])
    is_compiled = objective is not plain
    if machine.world > 1:
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # older torch has no other
        objective = DistributedDataParallel(objective, broadcast_buffers=False)  # buffers are constants
    return objective, is_compiled


def compiled(objective: nn.Module, machine: Machine, example: list) -> nn.Module:
    """torch.compile(objective), tried on a batch; the objective itself, with a warning, if that fails."""
    devices = [machine.device] if machine.device.type == "cuda" else []
    try:
        faster = torch.compile(objective)
        # training's random numbers stay the same
        with torch.random.fork_rng(devices), machine.training(), machine.amp():
            faster(*example).sum().backward()
        return faster
    except Exception as error:  # no C++ compiler, no Triton, a GPU too old...
        if out_of_memory(error):
            raise  # not compiled it would need even more
        tell_compile_failed(error)
        return objective
    finally:
        objective.zero_grad(set_to_none=True)


# -----------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def evaluate(objective, data: np.ndarray, eval_iters: int, batch_size: int, block_size: int, machine: Machine,
             mask: Optional[Callable] = None, token_bytes: Optional[np.ndarray] = None) -> dict[str, float]:
    """The mean loss in nats a token, the METRICS, and with token_bytes, (V,), bpb: bits per byte of the text.

    On `eval_iters` evenly spaced windows that do not overlap (0: all), the same ones, with the same masks,
    for any batch size, seed and number of processes.
    """
    available = (len(data) - 1) // block_size
    count = min(eval_iters or available, available)
    mine = np.linspace(0, available - 1, count).astype(np.int64)[machine.rank::machine.world]
    counts = torch.zeros(2, dtype=torch.float64)  # targets, and the bytes of their text
    found = [torch.zeros(1 + len(METRICS), device=machine.device)]
    objective.eval()
    for i in range(0, len(mine), batch_size):
        numbers = mine[i:i + batch_size]
        x, y = gather(data, numbers * block_size, block_size)
        if mask:
            x, y = mask(x, numbers, 0)
        n_bytes = 0 if token_bytes is None else token_bytes[y].sum()
        counts += torch.tensor([(y != -1).sum(), n_bytes])
        missing = batch_size - len(x)  # a shorter last batch would be compiled anew: fill it up
        x, y = F.pad(x, (0, 0, 0, missing)), F.pad(y, (0, 0, 0, missing), value=-1)
        with machine.amp():
            found.append(objective(machine.to(x), machine.to(y)))
    objective.train()
    sums = torch.cat((torch.stack(found).cpu().double().sum(0), counts))
    nats, *metrics, tokens, n_bytes = machine.sum(sums).tolist()
    values = {"loss": nats / tokens}
    if token_bytes is not None:
        values["bpb"] = nats / math.log(2) / max(1, n_bytes)
    for name, total in zip(METRICS, metrics, strict=True):
        values[name] = total / tokens
    return values


def validate(objective, data: Data, eval_iters: int, batch_size: int, config: Config, run: Run,
             mask: Optional[Callable]) -> dict[str, float]:
    """What `evaluate` finds on the validation text, as val_...; and train_loss: on as much training text."""
    run.wait_for_check()
    token_bytes = None if mask else data.token_bytes
    windows = eval_iters or (len(data.val) - 1) // config.block_size
    how = {"batch_size": batch_size, "block_size": config.block_size, "machine": run.machine, "mask": mask}
    found = {"train_loss": evaluate(objective, data.train, windows, **how)["loss"]}
    for name, value in evaluate(objective, data.val, windows, token_bytes=token_bytes, **how).items():
        found[f"val_{name}"] = value
    return found


def sample_text(model, data: Data, count: int, machine: Machine, mask: Optional[Callable]) -> str:
    """A look at what the model has learnt: `count` tokens that it writes. One that fills gaps guesses some of
    the first `count` validation tokens: [right] or [wrong|truth]."""
    if mask is None:
        idx = torch.tensor([[data.prompt()]], device=machine.device)
        draws = torch.Generator(machine.device).manual_seed(0)
        ids = model.generate(idx, count, temperature=0.8, top_k=200, generator=draws)[0, 1:]
        return data.tokenizer.decode(ids.tolist())
    count = min(count, model.config.block_size, len(data.val) - 1)
    x, y = mask(gather(data.val, np.zeros(1, np.int64), count)[0], [0], 0)
    model.eval()
    with torch.no_grad():
        guesses = model(machine.to(x))[0].argmax(-1)
    model.train()
    text = ""
    for seen, truth, guess in zip(x[0].tolist(), y[0].tolist(), guesses[0].tolist(), strict=True):
        words = [data.tokenizer.decode([max(0, token)]) for token in (seen, guess, truth)]
        if truth == -1:
            text += words[0]
        else:
            text += f"[{words[1]}]" if guess == truth else f"[{words[1]}|{words[2]}]"
    return text


# -----------------------------------------------------------------------------
# The run

def open_model(run: Run, given: dict, chars: str) -> tuple[Optional[Transformer], Optional[dict]]:
    """The model to resume or to start from, and its tokenizer as it is stored; from scratch, neither.

    given: the model's settings that were given. Raises SettingError if it has others, UserError if there is
    no such model.
    """
    if run.init_from == "scratch" and not run.resumed:
        return None, None
    changes = {name: given[name] for name in ("dropout",) if name in given}
    if run.resumed:
        if "head" in run.checkpoint:
            raise UserError(f"{run.source}: a run of finetune.py: --init_from={run.folder} takes its weights")
        model, tokenizer = model_of(run.checkpoint, **changes), run.checkpoint["tokenizer"]
    else:
        if "block_size" in given:
            changes["block_size"] = given["block_size"]
        model, its_tokenizer = load_body(run.init_from, chars=chars, **changes)
        tokenizer = its_tokenizer.to_dict()
    for name, value in given.items():
        has = getattr(model.config, name)
        if value != has:
            raise SettingError(f"{name}={value}: the checkpoint's model has {name}={has}: leave it out, or "
                               "start from scratch")
    return model, tokenizer


def fit(model: Optional[Transformer], tokenizer: Optional[dict], given: dict, dataset: str,
        machine: Machine, origin: str) -> tuple[Transformer, Data]:
    """The model, a new one if there is none, and the data. Raises SettingError if they do not go together."""
    try:
        config = model.config if model else Config(**given)
    except ValueError as error:  # it names the field
        raise SettingError(str(error)) from None
    if config.head == "none":
        raise SettingError("head=none: an encoder scores no tokens, so it has nothing to learn here from")
    make_built_in(dataset, given.get("vocab_size"), machine, origin)
    data = open_data(dataset, given.get("vocab_size"), config.block_size)
    some = (str(len(ids)).encode() + ids[:2**20].tobytes() for ids in (data.train, data.val))
    machine.agree(f"dataset={dataset}", b" ".join(some))
    if tokenizer and not same_tokenizer(tokenizer, data.tokenizer.to_dict()):
        raise SettingError(f"dataset={dataset}: its tokenizer is not the one that the checkpoint was trained "
                           "with: prepare the text with the same one, or start from scratch")
    if tokenizer:
        data = data._replace(tokenizer=fitting(Tokenizer.from_dict(tokenizer), config.vocab_size))
    if not model and "vocab_size" not in given:
        config.vocab_size = data.tokenizer.vocab_size
    if not config.causal and data.tokenizer.mask is None:
        raise SettingError(f"causal=False: the tokenizer of {dataset} has no token to mask others with")
    return model or Transformer(config), data


def masking(config: Config, rate: float, tokenizer: Tokenizer) -> tuple[Optional[Callable], Optional[int]]:
    """What masks windows, and how many tokens of each; None for a causal model, which guesses the next."""
    if config.causal:
        return None, None
    mask = partial(masked_tokens, rate=rate, token=tokenizer.mask, vocab_size=tokenizer.vocab_size)
    return mask, count_masked(config.block_size, rate)


ONLY = [  # a setting, and what it is of use with; see check_used
    ("mask_rate", "causal", (False,)),
    ("teacher_share", "teacher", ()),
    ("teacher_temperature", "teacher", ()),
    ("muon_lr", "optimizer", tuple(BLOCKS_ONLY)),
    ("momentum", "optimizer", ("lars", "sgd")),
    ("decay_fraction", "schedule", ("wsd",)),
    ("pos_offset", "pos", ("learned",)),
    ("rope_theta", "pos", ("rope",)),
    ("rope_scaling", "pos", ("rope",)),
]
FIXED = ("optimizer", "sparsity", "seed")  # and the model: a resumed run cannot change them
COMPARED_ON = ("dataset", "eval_iters", "mask_rate")  # with another, validation losses do not compare


def settle(s: dict, machine: Machine) -> dict[str, float]:
    """A warmup that is not shorter than the run, and a min_lr above learning_rate, become a tenth of it if
    that was given later. Returns these settings. Raises SettingError if both were given in one place.

    s: the script's globals(), those of finetune.py too.
    """
    changes = {}
    if not s.get("decay_lr", True):
        return changes  # it neither rises nor falls
    for name, other in (("warmup_iters", "max_iters"), ("min_lr", "learning_rate")):
        if name not in s or s[name] < s[other] or name == "min_lr" and s[name] == s[other]:
            continue
        if place_of(s, name) >= place_of(s, other):
            raise SettingError(f"{name}={s[name]}: must be below {other}={s[other]}: give another of the two")
        changes[name] = s[other] // 10 if name == "warmup_iters" else s[other] / 10
        machine.say(f"{name} {s[name]} -> {changes[name]:g}, a tenth of {other}")
    warmup = changes.get("warmup_iters", s.get("warmup_iters"))
    if s.get("lr_decay_iters") is not None and s["lr_decay_iters"] < warmup:
        raise SettingError(f"lr_decay_iters={s['lr_decay_iters']}: the learning rate still rises then, until "
                           f"warmup_iters={warmup}")
    return changes


def main(given: dict):
    machine = Machine(device, dtype, seed, deterministic, backend)
    globals().update(settle(globals(), machine))
    if gradient_accumulation_steps % machine.world:
        raise SettingError(f"gradient_accumulation_steps={gradient_accumulation_steps}: counts over all "
                           f"processes, so it must be a multiple of their number, {machine.world}")
    step_windows = batch_size * gradient_accumulation_steps

    # What we start from: nothing, a run to go on with, or the weights of another; and the data.
    run = Run(machine, out_dir, init_from, overwrite or eval_only, max_minutes)
    if is_published(run.init_from):
        need_data(dataset)  # before it is downloaded
    model, data = fit(*open_model(run, given, chars), given, dataset, machine, run.init_from)
    config, tokenizer = model.config, data.tokenizer
    machine.say(*check_used(globals(), given, **asdict(config)))
    settings = {**values_of(globals()), **asdict(config), "init_from": run.init_from}
    run.same(settings, FIXED, () if eval_only else COMPARED_ON)
    machine.choose(matmul, config.n_embd, run.machine_then)
    mask, counted = masking(config, mask_rate, tokenizer)
    windows = Windows(data.train, config.block_size, seed, mask)
    compiling = compile and run.compiled is not False
    introduce(model, data, machine, compiling)

    # The objective, on its device, compiled, data-parallel; the optimizers; and where we are.
    if remat:
        recompute_blocks(model)
    guide = load_teacher(teacher, config, tokenizer.to_dict()) if teacher else None
    teacher_sum = run.same_teacher(teacher, sum_of(guide) if guide else "")
    torch.manual_seed(seed + machine.rank)  # dropout differs between processes
    objective, is_compiled = ready(
        Objective(model, counted, label_smoothing, guide, teacher_share, teacher_temperature), machine,
        compiling, windows.get(0, batch_size))
    optimizers = make_optimizers(model, optimizer, learning_rate, muon_lr, weight_decay, (beta1, beta2),
                                 momentum, embd_lr)
    pruning = Pruning(model, sparsity, max_iters)
    state = run.restore(model, optimizers)
    if run.compiled and not is_compiled:
        machine.say("warning: the run was compiled before, and is not now: last bits will differ")
    if machine.main and data.sums:
        run.data_check = beside(check_sums, data.sums)  # the first steps
    if eval_only:
        metrics = validate(objective, data, eval_iters, batch_size, config, run, mask)
        machine.say(f"iter {state.step}: {in_words(metrics)}")
        return
    run.begin(settings, defaults_of(globals()), model_args=asdict(config), tokenizer=tokenizer.to_dict(),
              compiled=is_compiled, published=model.published, teacher_sum=teacher_sum)
    machine.say(f"training  {max_iters:,} steps of {step_windows * config.block_size:,} tokens, "
                f"{max_iters * step_windows / windows.n:.1f} epochs, into {run.folder}\n")
    run.start_wandb(wandb_log, wandb_project, wandb_run_name)

    enough = patience is not None and state.since_best >= patience  # it has run out
    if run.resumed and (enough or state.step >= max_iters):
        say_finished(state, enough, machine)
    batches = read_ahead(windows, machine, step_windows, state.seen)
    bad_steps = BadSteps(max_bad_steps, 1 if machine.looks_each_step() else log_interval, machine.main)
    pace, began = Pace(state, max_iters), state.step

    while state.step < max_iters and not enough and not run.stopped():
        # the step's learning rate, its windows, its update
        factor = lr_factor(state.step, schedule, warmup_iters, lr_decay_iters or max_iters,
                           min_lr / learning_rate, decay_fraction) if decay_lr else 1.0
        set_lr(optimizers, factor)
        x, y = next(batches)  # (N, T) each
        state.seen += step_windows
        micro_batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
        (loss, penalty), norm = train_step(objective, micro_batches, (y != -1).sum(), model, optimizers,
                                           machine, grad_clip)
        bad_steps.add(state.step + 1, learning_rate * factor, loss + penalty, norm)
        if machine.scaler and bad_steps.in_a_row:
            continue  # float16 overflowed: the scaler has lowered its factor, and the step does not count
        state.add_loss(loss)
        state.step += 1
        pruning.after(state)
        last = state.step == max_iters

        due = state.step % log_interval == 0 or last
        if machine.main and (due or state.step == began + 1):  # the first step is shown at once
            seconds, left = pace.measure(state)
            lr = learning_rate * factor
            row = step_row(state, loss, penalty, lr, norm, seconds, step_windows, model, run)
            if due:
                run.log(**row)
            mfu = f", mfu {row['mfu']:.0%}" if row["mfu"] else ""
            machine.say(step_line(row, max_iters, f"{row['tokens_per_s'] / 1e3:7.1f}k tok/s{mfu}", left))

        if state.step % eval_interval == 0 or last:
            metrics = validate(objective, data, eval_iters, batch_size, config, run, mask)
            if not math.isfinite(metrics["val_loss"]):
                raise UserError(f"iter {state.step}: the validation loss is {metrics['val_loss']}: lower "
                                "learning_rate; the checkpoints are from before")
            best = pruning.is_done(state) and state.is_best([-metrics["val_loss"]], metrics)
            run.log(iter=state.step, elapsed=run.elapsed(), **metrics, mean_loss=state.mean_loss())
            machine.say(f"iter {state.step}: {in_words(metrics)}, after {clock(run.elapsed())}"
                        f"{', best so far' if best else ''}")
            if best:
                run.save("best.pt", state, model)  # first: ckpt.pt says that it exists
            if best or last or always_save_checkpoint:
                run.save("ckpt.pt", state, model, optimizers)
            if last:
                say_if_little_was_learned(metrics["val_loss"], tokenizer.vocab_size, machine)
            if machine.main and sample_tokens:
                print(f"\n{sample_text(model, data, sample_tokens, machine, mask)}\n", flush=True)
            enough = patience is not None and state.since_best >= patience
            pace.restart(state)

    # Leave everything in order.
    batches.close()
    interrupted = run.stop.signal and state.step < max_iters and not enough
    if interrupted:
        run.save("ckpt.pt", state, model, optimizers)
    run.close()
    if interrupted:
        run.say_stopped(state.step)
    elif machine.main:
        if enough:
            print(f"stopped after {state.step} steps: no better one in {patience} evaluations")
        say_goodbye(run, sample_text(model, data, 200, machine, mask))
    machine.barrier()
    if interrupted:
        sys.exit(run.stop.status())


def introduce(model: Transformer, data: Data, machine: Machine, is_compiled: bool) -> None:
    config = model.config
    machine.say(f"model     {model.num_params():,} parameters: {config.n_layer} layers, {config.n_embd} "
                f"wide, context {config.block_size}, vocabulary {config.vocab_size:,}")
    machine.say(f"machine   {machine}{', compiled' if is_compiled else ''}")
    machine.say(f"data      {data.name}: {len(data.train):,} tokens to train on, {len(data.val):,} to "
                f"validate{'' if data.sums else '; without a checksum'}")
    if data.token_bytes is None and config.causal:
        machine.say("          no bits per byte: the bytes of the tokens do not add up to those of the text")


def step_row(state: State, loss, penalty, lr: float, norm, seconds: float, windows: int,
             model: Transformer, run: Run) -> dict:
    """A step, as log.jsonl has it. seconds, windows: of one step."""
    tokens_per_s = windows * model.config.block_size / seconds
    row = {"iter": state.step, "tokens": state.seen * model.config.block_size, "loss": loss.item(), "lr": lr,
           "grad_norm": norm.item(), "dt": seconds, "elapsed": run.elapsed(), "tokens_per_s": tokens_per_s,
           "mfu": run.machine.mfu(tokens_per_s * model.flops_per_token())}
    return row if not penalty else {**row, "penalty": penalty.item()}


def say_finished(state: State, enough: bool, machine: Machine) -> None:
    more = " --patience=None" if enough else ""
    machine.say(f"finished after {state.step} steps: --max_iters={2 * state.step}{more} trains on")


def say_if_little_was_learned(loss: float, vocab_size: int, machine: Machine) -> None:
    uniform = math.log(vocab_size)
    if loss > 0.97 * uniform:
        machine.say("hardly anything was learned: guessing among all tokens has a loss of "
                    f"{uniform:.4f}: try another learning_rate, or more steps")


def say_goodbye(run: Run, sample: str) -> None:
    print(f"\nA sample, after {clock(run.elapsed())}:\n\n{sample}")
    print(f"\nMore of it: python sample.py --out_dir={shlex.quote(run.folder.as_posix())} --start=\"...\"")


if __name__ == "__main__":
    launch(main, globals(), Config, stored_settings)
