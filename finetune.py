"""
Fine-tune: a task's head on a body, trained on labelled examples and tested on others.

    python finetune.py config/finetune_python.py                        no data needed: what code is this?
    python finetune.py config/finetune_sentiment.py --data=reviews.csv  yours, with columns text and label
    python finetune.py --init_from=google-bert/bert-base-uncased --data=reviews.csv   a pretrained body
    python finetune.py --init_from=out/small --task=lm --data=instructions.json       a run of train.py
    python finetune.py config/finetune_qa.py --data=squad.json          answers are spans of the text
    python sample.py --out_dir=out/sentiment --start="a fine film"      use it afterwards

--data is .csv, .tsv, .jsonl, .json (each also as .gz, .bz2 or .xz), CoNLL for tags, SQuAD's JSON for answers.
Without --data_val and --data_test a tenth each is held out, stratified by label. How the best epoch
does on the test set is in metrics.json and predictions.csv, beside simple baselines. torchrun works as
it does for train.py.
"""
from __future__ import annotations

import bisect
import contextlib
import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional, Union

# before torch: Ctrl-C is silent from here on
from config import (SettingError, UserError, above, at_least, check_used, defaults_of, launch, place_of,
                    recipe, values_of)

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lib.hub import is_published
from lib.optim import Pruning
from lib.report import Tested, beside_validation, summary_of_folds, table, write_results
from lib.rows import IN_WORDS, WORDS, Row, text_key
from lib.run import (BadSteps, Machine, Pace, Run, State, find_checkpoint, in_words,
                     load_body, load_whole, main_process, merged, model_of, refuse_to_replace, step_line,
                     stored_settings, sum_of, to_device, tokenizer_of, write_json)
from lib.splits import BUILT_IN, Splits, known_columns, read_splits
from lib.tasks import TASKS, Example, Task, Vectors
from lib.tokenizer import Tokenizer, make_tokenizer
from model import Attention, Config, Transformer, block_matrices
from train import (BLOCKS_ONLY, OPTIMIZERS, SCHEDULES, lr_factor, make_optimizers, ready, set_lr, settle,
                   train_step)

# -----------------------------------------------------------------------------
# Settings. A model from scratch takes the fields of Config in model.py too, a pretrained one only dropout.
out_dir: str = "out/finetuned"  # where checkpoints, metrics.json and predictions.csv go
overwrite: bool = False  # start over even if out_dir holds a run, which is removed
init_from: str = "scratch"  # scratch; resume; auto; a run's folder; a Hugging Face folder, or a hub's id
chars: str = ""  # of a nanoGPT checkpoint with few tokens: the text whose characters they are
task: Literal[tuple(TASKS)] = "classify"  # what to learn
# data
data: str = ""  # labelled examples to train on; or a built-in set: python_packages
data_val: str = ""  # to choose the best epoch by; empty: a tenth of data
data_test: str = ""  # to be tested on, once; empty: a tenth of data
text_column: Union[str, int] = ""  # name or number of the column; empty: by its usual names, which is printed
pair_column: Union[str, int] = ""  # of a second text, if there is one
label_column: Union[str, int] = ""  # empty: by its usual names, which is printed; of 0 and 1 several: A,B
group_column: Union[str, int] = ""  # metrics for each value of this column too: is it fair?
split_column: Union[str, int] = ""  # rows of one value of it, a user, say, stay on one side of splits
header: Optional[bool] = None  # does a table's first row name its columns? None: it is found out
encoding: str = ""  # of the files; empty: UTF-8, or UTF-16 or GBK if they are that
skip_bad_rows: bool = False  # pass over rows that cannot be read, and count them
words: Optional[Literal[tuple(WORDS)]] = None  # of a text to be tagged; None: as the training words are
multi_label: bool = False  # a row has any number of labels, with | between them
folds: Optional[at_least(3)] = None  # cross-validation: this many trainings, each tested on another part
# model
tokenizer: str = "bpe"  # from scratch: bpe of the training texts (with vocab_size), bytes, gpt2...
max_length: Optional[at_least(8)] = None  # tokens of an input; longer ones are cut, or read in windows
max_answer: Optional[at_least(1)] = None  # tokens of an answer; None: of the longest to train on
pool: Literal[("auto", *POOLS)] = "auto"  # the tokens whose vectors stand for the text
pair: Literal["together", "apart"] = "together"  # two texts: read as one, or each by itself and compared
freeze: bool = False  # train the head alone
lora_rank: Optional[at_least(1)] = None  # train additions of this rank, not the matrices; None: no LoRA
lora_alpha: above(0.0) = 16.0  # the additions are scaled by alpha / rank
# training
epochs: at_least(1) = 3  # times each example is seen
batch_size: at_least(1) = 32  # examples in a micro-batch
batch_size_end: Optional[at_least(1)] = None  # the batch doubles at regular intervals, up to this
gradient_accumulation_steps: at_least(1) = 1  # micro-batches in a step, over all processes
optimizer: Literal[tuple(OPTIMIZERS)] = "adamw"  # muon: for the blocks' matrices, from scratch
learning_rate: above(0.0) = 5e-5  # peak, of all but Muon
muon_lr: above(0.0) = 0.02  # peak, of Muon
embd_lr: Optional[above(0.0)] = None  # peak, of the token embedding; None: as learning_rate
schedule: Literal[tuple(SCHEDULES)] = "linear"  # shape of its decay
warmup: at_least(0.0, below=1.0) = 0.1  # share of the steps in which it rises
min_lr: at_least(0.0) = 0.0  # lowest
weight_decay: at_least(0.0) = 0.01  # of matrices, decoupled
beta1: at_least(0.0, below=1.0) = 0.9  # decay of AdamW's mean of the gradient
beta2: at_least(0.0, below=1.0) = 0.98  # decay of its mean of the squared gradient
grad_clip: at_least(0.0) = 1.0  # gradients with a larger norm are scaled down to it; 0: never
l1: at_least(0.0) = 0.0  # times the sum of the trained weights' absolute values is added to the loss
l2: at_least(0.0) = 0.0  # times the sum of their squares
sparsity: at_least(0.0, below=1.0) = 0.0  # share of the blocks' weights, the smallest, zeroed halfway through
label_smoothing: at_least(0.0, below=1.0) = 0.0  # share of each target that is spread over all classes
class_weight: Literal["none", "balanced"] = "none"  # balanced: rare classes count as much as frequent ones
token_dropout: at_least(0.0, below=1.0) = 0.0  # share of the tokens masked in training; for small data
teacher: str = ""  # a fine-tuned classifier, or a Hugging Face one: its probabilities are learned too
teacher_share: at_least(0.0, at_most=1.0) = 0.5  # weight of the teacher in the loss
teacher_temperature: above(0.0) = 2.0  # above 1: more is learned from what the teacher finds unlikely
# when to stop, evaluate and log
patience: Optional[at_least(1)] = None  # stop after this many evaluations without a new best; None: never
max_minutes: Optional[above(0.0)] = None  # stop this process then; the run is saved and can be resumed
max_bad_steps: at_least(1) = 20  # this many in a row with a loss or gradient that is not finite end the run
eval_interval: Optional[at_least(1)] = None  # steps between evaluations; None: after each epoch
log_interval: Optional[at_least(1)] = None  # steps from one log line to the next; None: 20 lines or more
# system
device: str = "auto"  # auto: cuda, else mps, else cpu
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: what is fast
matmul: Literal["auto", "float32", "bfloat16"] = "auto"  # of a CPU's training steps; auto: what is fast
seed: at_least(0, below=2**63) = 1337  # of weights, splits, order and dropout
# -----------------------------------------------------------------------------


# -----------------------------------------------------------------------------
# The model: a body, and a head on it

class LoRA(nn.Linear):
    """A frozen linear layer and a trained addition of low rank (Hu et al. 2021): W + alpha / rank * B A."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.scale = layer.weight, layer.bias, alpha / rank
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features) / math.sqrt(self.in_features))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank))  # at first nothing is added

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


def add_lora(body: Transformer, rank: int, alpha: float) -> None:
    """To every matrix of the blocks; all else is frozen."""
    body.requires_grad_(False)
    matrices = set(block_matrices(body))
    for module in list(body.modules()):
        for name, child in list(module.named_children()):
            if child in matrices:
                setattr(module, name, LoRA(child, rank, alpha))


class ByteDropout(nn.Dropout):
    """Dropout that draws a byte for each number, so by shares of 1/256, on a CPU.

    torch's draws a float each, on one thread: a fifth of the time of a small model's step.
    """

    def forward(self, x):
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        dropped = min(255, max(1, round(256 * self.p)))  # of the 256 bytes
        drawn = torch.randint(-2**63, 2**63 - 1, (x.numel() // 8 + 1,)).view(torch.uint8)
        kept = drawn[:x.numel()].view(x.shape) >= dropped
        return x * (kept * (256 / (256 - dropped))).to(x.dtype)


def cheapen_dropout(body: Transformer) -> None:
    """By bytes, and none of attention's weights, where it costs the fast kernel for nothing (RESULTS.md)."""
    for module in body.modules():
        if type(module) is nn.Dropout:
            module.__class__ = ByteDropout
        elif isinstance(module, Attention):
            module.dropout = 0.0


POOLS = {  # name -> of vectors (B, T, C) and which of them are real (B, T), those of the texts, (B, C)
    "first": lambda x, real: x[:, 0],
    "last": lambda x, real: x[torch.arange(len(x), device=x.device), real.sum(1) - 1],
    "mean": lambda x, real: (x * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True),
}


class Tuned(nn.Module):
    """A body and a linear head for a task: (B, T) ids -> (B, n_out) of texts, or (B, T, n_out) of tokens.

    Padding is on the right and changes nothing. self.head is the layer, without weights if the task needs
    none; task.head what the checkpoint keeps of the task, see new_model.
    """

    def __init__(self, body: Transformer, task: Task):
        super().__init__()
        self.body, self.task = body, task
        self.pool, self.apart = task.head["pool"], task.head["apart"]
        self.dropout = ByteDropout(body.config.dropout)
        cheapen_dropout(body)
        if not task.n_out:
            self.head = nn.Identity()
            return
        width = body.config.n_embd
        self.head = nn.Linear(2 * width if self.apart else width, task.n_out, task.head.get("bias", True))
        nn.init.normal_(self.head.weight, std=0.02)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)
        if self.apart and task.n_out == 1:  # at first: the cosine of the two, at about the label's scale
            nn.init.constant_(self.head.weight[:, :width], 4.0)
            nn.init.constant_(self.head.bias, -2.0)

    def forward(self, idx, pad_mask, segments=None, places=None, parts=1):
        """places: (n,), of B * T, those tokens whose outputs are wanted: (n, n_out). parts: sequences in each
        example, as many in all; idx is (parts * B, T), the first parts first, and the outputs of an example
        go side by side."""
        real = torch.ones_like(idx, dtype=torch.bool) if pad_mask is None else pad_mask
        x = self.body.hidden(idx, pad_mask, segments)  # (B, T, C)
        if places is not None:
            x = x.flatten(0, 1)[places]  # (n, C); by a mask, a GPU would be waited for
        elif self.pool is not None:
            x = POOLS[self.pool](x, real)  # (B, C)
        if self.task.writes:
            return self.body.logits(x)
        if self.task.of_texts and self.task.n_out and self.body.pooler is not None:
            x = self.body.pooler(x)
        if self.apart:
            a, b = F.normalize(x, dim=-1).chunk(2)
            x = torch.cat((a * b, (a - b).abs()), dim=-1)  # (B / 2, 2 C)
        out = self.head(self.dropout(x)).float()
        if parts > 1 and not self.apart:
            out = out.unflatten(0, (parts, -1)).transpose(0, 1).flatten(1)  # (B / parts, parts * n_out)
        if self.pool is None and places is None:  # no answer starts or ends in padding
            out = out.masked_fill(~real.unsqueeze(-1), -1e9)
        return out

    def predict(self, texts: list, batch_size: int = 64) -> list[dict]:
        """What it says about each text, or (text, second text): a dict as a row of predictions.csv."""
        if isinstance(texts, (str, dict)) or hasattr(texts, "columns"):
            what = "one text" if isinstance(texts, str) else "a table"
            raise UserError(f"predict: wanted a list of texts, got {what}: predict([text])[0], or of a table "
                            "its column of texts")
        rows = []
        for n, one in enumerate(texts, start=1):
            pair = [one, None] if isinstance(one, str) else one
            are_two = isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)
            if not are_two or not isinstance(pair[1], (str, type(None))):
                raise UserError(f"text {n}: wanted a text, or two as (text, second text), got {one!r}")
            rows.append(self.task.row(f"text {n}", *pair))
        answers = predict(self, rows, batch_size) if rows else []
        return [self.task.said(answer) for answer in answers]


def tuned_of(checkpoint: dict) -> Tuned:
    """The fine-tuned model in a checkpoint. Raises UserError if there is none, or it does not fit.

    A lora.pt will do as long as the body that it was trained on can still be read.
    """
    head = dict(checkpoint.get("head") or {})
    if not head:
        raise UserError("this checkpoint is not fine-tuned: finetune.py --init_from=ITS_FOLDER --data=FILE")
    if head.pop("linear", None):
        print("(this run mixed in a linear model, linear=..., which is gone: its Transformer alone answers)",
              file=sys.stderr)
    weights = head.pop("weights")
    if "rank" not in checkpoint:
        body, tokenizer = model_of(checkpoint, dropout=0.0), tokenizer_of(checkpoint)
        return with_head(body, tokenizer, head, weights)
    origin = checkpoint["init_from"]
    body, tokenizer = load_body(origin, dropout=0.0, chars=checkpoint["settings"].get("chars", ""))
    fit_head(body, TASKS[head["task"]])
    if "base_sum" in checkpoint and checkpoint["base_sum"] != sum_of(body):
        raise UserError(f"lora.pt: {origin} has other weights now than it was trained on: put those back, or "
                        "use best.pt, which needs no others")
    scale = checkpoint["alpha"] / checkpoint["rank"]
    body.load_state_dict(merged({**body.state_dict(), **checkpoint["model"]}, scale))
    return with_head(body, tokenizer, head, weights)


def with_head(body: Transformer, tokenizer, head: dict, weights: dict) -> Tuned:
    """head: the plain values that a checkpoint keeps of the task; weights: of the linear layer."""
    model = Tuned(body, TASKS[head["task"]](head, tokenizer))
    model.head.load_state_dict(weights)
    return model.eval()


def vectors(body: Transformer, tokenizer, texts: list[str]) -> np.ndarray:
    """The texts' vectors by a sentence encoder, (N, C), as sentence-transformers makes them."""
    encoder = body.published["encoder"]
    head = {"labels": [], "pool": encoder["pool"], "max_length": length_read(body, None), "paired": False,
            "apart": False, "lower": encoder["lower"]}
    if encoder.get("others"):
        raise UserError(f"its vectors need what is not supported: {encoder['others']}")
    if encoder["pool"] not in POOLS:
        raise UserError(f"1_Pooling/config.json: {encoder['pool']}: only cls, lasttoken and mean are known")
    model = Tuned(body, Vectors(head, tokenizer))
    rows = [model.task.row(f"text {n}", encoder["prompt"] + text) for n, text in enumerate(texts, start=1)]
    found = np.stack(predict(model, rows))
    return unit(found) if encoder["normalize"] else found


def unit(vectors: np.ndarray) -> np.ndarray:
    """Of length 1; one of length 0 stays."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


# -----------------------------------------------------------------------------
# A new model

BPE_SIZE = 8192  # tokens of a new bpe, if nothing else is asked for


def new_model(train: list[Row], given: dict, origin: str, s: SimpleNamespace) -> Tuned:
    """A new head on a new body, or on a pretrained one. given: the body's settings."""
    task = TASKS[s.task]
    if origin == "scratch":
        # a space in front, if most texts have spaces, makes the first word the same token as elsewhere
        space = 2 * sum(" " in row.text for row in train) > len(train)
        body, its_tokenizer = new_body(train, space, given, s)
    else:
        how = {"chars": s.chars, "dropout": given.get("dropout", 0.1)}
        try:
            body, its_tokenizer, its_head = load_whole(origin, whole=False, **how)
        except UserError as error:
            way_out = "" if Path(origin).exists() else "; --init_from=scratch needs none, and learns less"
            raise UserError(f"{error}{way_out}") from None
        space = its_head.get("space", False)  # as it was fine-tuned before
    fit_head(body, task)
    encoder = body.published.get("encoder", {})  # what files of sentence-transformers say
    paired = train[0].pair is not None
    if s.pair == "apart" and not paired:
        raise SettingError(f"pair=apart: {s.data} has one text a row: leave it out, or name the second one's "
                           "--pair_column")
    apart = task.of_texts and paired and s.pair == "apart"
    pool = pooling(body, its_tokenizer, origin, s) if task.of_texts else None
    # transformers has no bias in the head of a causal model's last token, so it could not be exported
    bias = not (task is TASKS["classify"] and pool == "last" and body.config.causal and not apart)
    return Tuned(body, task({
        "task": s.task, **task.learn(train, s), "max_length": length_read(body, s.max_length), "space": space,
        "pool": pool, "paired": paired, "apart": apart, "bias": bias, "lower": encoder.get("lower", False),
        "columns": s.columns}, its_tokenizer))


def new_body(train: list[Row], space: bool, given: dict, s: SimpleNamespace) -> tuple[Transformer, Tokenizer]:
    """From scratch, with a tokenizer trained on the training texts."""
    texts = [one[:10**6] for row in train for one in TASKS[s.task].texts(row)]
    texts = [" " + one if space else one for one in texts]
    its_tokenizer = make_tokenizer(s.tokenizer, texts, given.get("vocab_size", BPE_SIZE))
    try:
        return Transformer(Config(**{**given, "vocab_size": its_tokenizer.vocab_size})), its_tokenizer
    except ValueError as error:  # it names the field
        raise SettingError(str(error)) from None


def fit_head(body: Transformer, task: type[Task]) -> None:
    """The body keeps its head for tokens if the task is to write, and only then."""
    if not task.writes:
        body.head, body.pooler, body.config = None, None, replace(body.config, head="none", pooler=None)
    elif body.head is None or not body.config.causal:
        raise UserError("--task=lm: needs a causal body with a head for tokens: --init_from=a run of "
                        "train.py, or openai-community/gpt2; from scratch, --causal=True")


def pooling(body: Transformer, tokenizer, origin: str, s: SimpleNamespace) -> str:
    """The tokens whose vectors stand for a text, one of POOLS."""
    if s.pool != "auto":
        return s.pool
    begins = tokenizer.wrap([-1])[0][0] != -1  # with a special token, as BERT's [CLS]
    usual = "last" if body.config.causal else "first" if begins else "mean"
    pool = body.published.get("encoder", {}).get("pool", usual)
    if pool not in POOLS:
        raise SettingError(f"pool=auto: {origin} pools by {pool}, which is not supported: --pool=mean?")
    return pool


def length_read(body: Transformer, asked: Optional[int]) -> int:
    """Tokens of an input at most: as asked for, else as a sentence encoder's files say, else all it can."""
    most = body.config.block_size
    if (asked or 0) > most:
        raise SettingError(f"max_length={asked}: the model reads at most {most} tokens")
    return asked or min(most, body.published.get("encoder", {}).get("max_length") or most)


# -----------------------------------------------------------------------------
# Batches

def batches(lengths: np.ndarray, s: SimpleNamespace, epoch: int, done: Sequence = ()) -> list[np.ndarray]:
    """The examples' numbers, each once, in batches of similar length; a function of the settings alone.

    The batch size doubles at regular intervals of the whole training. done: batches that were taken before.
    """
    rng = np.random.default_rng((s.seed, epoch))
    order, found = rng.permutation(len(lengths)), []
    order = order[~np.isin(order, np.concatenate([[], *done]))]
    for begin, end, size in stretches(len(order), s, epoch):
        near = order[begin:end]
        near = near[np.argsort(lengths[near], kind="stable")]
        parts = [near[j:j + size] for j in range(0, len(near), size)]
        found += [parts[j] for j in rng.permutation(len(parts))]
    return found


def stretches(n: int, s: SimpleNamespace, epoch: int) -> Iterator[tuple[int, int, int]]:
    """Of an epoch's n examples: where those begin and end that are sorted by length, and their batch size."""
    sizes, i = [s.batch_size], 0
    while sizes[-1] < (s.batch_size_end or 0):
        sizes.append(min(2 * sizes[-1], s.batch_size_end))
    while i < n:
        k = (epoch * n + i) * len(sizes) // (s.epochs * n)  # whose time it is
        size = s.gradient_accumulation_steps * sizes[k]
        most = -(-(k + 1) * s.epochs * n // len(sizes)) - epoch * n - i  # until the next
        end = min(n, i + min(50 * size, -(-most // size) * size))
        yield i, end, size
        i = end


class Steps(Sequence):
    """The examples of each step. An epoch's batches are made in its time: a thousand may be asked for, to be
    stopped by patience, and all of them be gigabytes.

    given: the first steps, as they are known; ends: after how many steps each epoch ends that they finish.
    """

    def __init__(self, lengths: np.ndarray, s: SimpleNamespace, given: list[np.ndarray], ends: Sequence[int]):
        self.lengths, self.s, self.given, self.ends = lengths, s, given, list(ends)
        self.done = given[ends[-1]:] if ends else given  # of the epoch under way
        self.begins, self.first = [], len(ends)  # the steps with which epochs begin to be made; the first one
        self.made = -1, []  # an epoch, and its batches
        n, end = len(lengths) - sum(map(len, self.done)), len(given)
        for epoch in range(self.first, s.epochs):
            self.begins.append(end)
            end += sum(-(-(last - first) // size) for first, last, size in stretches(n, s, epoch))
            self.ends.append(end)
            n = len(lengths)
        self.count = end

    def __len__(self):
        return self.count

    def __getitem__(self, step):
        if isinstance(step, slice):
            return [self[i] for i in range(len(self))[step]]
        if step < len(self.given):
            return self.given[step]
        if step >= len(self):
            raise IndexError(step)
        k = bisect.bisect_right(self.begins, step) - 1
        epoch = self.first + k
        if epoch != self.made[0]:
            self.made = epoch, batches(self.lengths, self.s, epoch, () if k else self.done)
        return self.made[1][step - self.begins[k]]


PLANNED_BY = ("epochs", "batch_size", "batch_size_end", "gradient_accumulation_steps")


def plan(lengths: np.ndarray, s: SimpleNamespace, earlier: Sequence[tuple] = ()) -> tuple[Steps, np.ndarray]:
    """The examples of each step of the whole training, and after how many steps each epoch ends.

    earlier: what the settings were until a step, [(step, {name: value}), ...], if a run that goes on has
    others now. Then the examples that its epoch has not seen come in the new batches.
    """
    given, ends = [], []
    for until, changed in earlier:
        then = Steps(lengths, SimpleNamespace(**{**vars(s), **changed}), given, ends)
        given = then[:until]
        ends = [end for end in then.ends if end <= len(given)]
    steps = Steps(lengths, s, given, ends)
    return steps, np.array(steps.ends)


def earlier_plans(run: Run, s: SimpleNamespace) -> list[tuple[int, dict]]:
    """For plan: the settings that a run to go on with has had, and until which step."""
    if not run.resumed:
        return []
    saved = run.checkpoint
    found = list(saved["data"].get("plans", []))
    then = {name: saved["settings"][name] for name in PLANNED_BY}
    if any(then[name] != getattr(s, name) for name in then):
        found.append((saved["state"]["step"], then))
    return found


def lengths_of(examples: list[Example]) -> np.ndarray:
    """Tokens of each one's longest part, (N,)."""
    return np.array([max(len(ids) for ids, _ in example.parts) for example in examples])


def collate(examples: list[Example], task: Task, device) -> tuple[dict, torch.Tensor]:
    """The arguments of Tuned.forward, and the targets. Padding is on the right, or pad_mask None."""
    n_parts = len(examples[0].parts)
    parts = [example.parts[k] for k in range(n_parts) for example in examples]
    T = max(len(ids) for ids, _ in parts)
    idx = np.full((len(parts), T), task.tokenizer.pad, dtype=np.int64)
    segments, real = np.zeros_like(idx), np.zeros(idx.shape, dtype=bool)
    for i, (ids, kinds) in enumerate(parts):
        idx[i, :len(ids)] = ids
        segments[i, :len(ids)] = 0 if kinds is None else kinds
        real[i, :len(ids)] = True
    inputs = {"idx": idx, "segments": segments, "pad_mask": None if real.all() else real}
    targets = [example.target for example in examples]
    if task.by_token:
        places = [i * T + example.places for i, example in enumerate(examples)]
        inputs["places"] = np.concatenate(places).astype(np.int64)
    target = np.concatenate(targets) if task.by_token else np.array(targets)
    if target.dtype == np.int32:
        target = target.astype(np.int64)  # as torch's losses want it
    for name, array in inputs.items():
        inputs[name] = None if array is None else to_device(torch.from_numpy(array), device)
    return {**inputs, "parts": n_parts}, to_device(torch.from_numpy(target), device)


def micro_batches(chosen: np.ndarray, examples: list[Example], taught: Optional[torch.Tensor], task: Task,
                  steps: int, machine: Machine) -> list[tuple]:
    """This process's share of a step's examples, as the arguments of Objective, a micro-batch each.

    chosen: the numbers of the step's examples. taught: for each row. steps: gradient_accumulation_steps.
    """
    mine = np.array_split(chosen, machine.world)[machine.rank]
    counts = float(len(mine) > 0)
    if not counts:  # more processes than examples: take part in the sum with nothing
        mine = chosen[:1]
    size, found = -(-len(chosen) // steps), []  # rounded up
    for i in range(0, len(mine), size):
        batch = [examples[j] for j in mine[i:i + size]]
        its_taught = None if taught is None else taught[[example.row for example in batch]]
        found.append((*collate(batch, task, machine.device), its_taught, counts))
    return found


def warn(what: str) -> None:
    print(f"({what})", file=sys.stderr)


@torch.no_grad()
def predict(model: Tuned, rows: list[Row], batch_size: int = 64, machine: Optional[Machine] = None,
            examples: Optional[list[Example]] = None) -> list:
    """The task's answer for each row, in the order of the rows. examples: the rows', if they exist."""
    task = model.task
    if examples is None:
        examples = task.examples(rows)
        task.tell(warn)
    order, outputs = np.argsort(lengths_of(examples), kind="stable"), [None] * len(examples)
    device, training = next(model.parameters()).device, model.training
    model.eval()
    for i in range(0, len(order), batch_size):
        chosen = order[i:i + batch_size]
        inputs, target = collate([examples[j] for j in chosen], task, device)
        with machine.amp() if machine else contextlib.nullcontext():
            out = model(**inputs)
        out = task.summary(out, target).float().cpu().numpy()
        if task.by_token:
            out = np.split(out, np.cumsum([len(examples[j].places) for j in chosen])[:-1])
        for j, one in zip(chosen, out, strict=True):
            outputs[j] = one
    model.train(training)
    return task.answers(rows, examples, outputs)


# -----------------------------------------------------------------------------
# Objective

class Objective(nn.Module):
    """A batch of `collate` -> (2,): sums over its targets of the task's loss and of the penalty.

    weight: of the classes. l1, l2: see the settings. taught: a teacher's probabilities; counts: 0.0 if the
    batch does not count.
    """

    def __init__(self, model: Tuned, weight: Optional[torch.Tensor], s: SimpleNamespace):
        super().__init__()
        self.model, self.weight, self.s = model, weight, s

    def forward(self, inputs, target, taught=None, counts=1.0):
        task, s, idx = self.model.task, self.s, inputs["idx"]
        if s.token_dropout:
            dropped = torch.rand(idx.shape, device=idx.device) < s.token_dropout
            nothing = task.tokenizer.pad if task.tokenizer.mask is None else task.tokenizer.mask
            idx = idx.masked_fill(dropped, nothing)
        out = self.model(**{**inputs, "idx": idx})
        loss = task.loss(out, target, self.weight, s.label_smoothing)
        if taught is not None:
            each = 1.0 if self.weight is None else self.weight[target]
            soft = (each * distil(out, taught, s.teacher_temperature)).sum()
            loss = (1 - s.teacher_share) * loss + s.teacher_share * soft
        penalty = self.model.body.penalty()
        if s.l1 or s.l2:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            penalty = penalty + sum(s.l1 * p.abs().sum() + s.l2 * p.square().sum() for p in trained)
        return torch.stack((loss, penalty * task.count(target, self.weight))) * counts


def distil(out, taught, temperature):
    """Cross-entropy with the teacher's softened probabilities (Hinton et al. 2015): (B, K) both -> (B,)."""
    soft = (taught.clamp(min=1e-8).log() / temperature).softmax(-1)
    return F.cross_entropy(out / temperature, soft, reduction="none") * temperature ** 2


def teacher_probs(folder: str, task: Task, rows: list[Row], machine: Machine) -> tuple[torch.Tensor, str]:
    """What a fine-tuned classifier says about each row, in the order of this task's labels: (N, K); and the
    sum of its weights."""
    if is_published(folder):
        body, tokenizer, head = load_whole(folder)
        if not head:
            raise SettingError(f"teacher={folder}: has no head for classes: wanted a classifier")
        model = with_head(body, tokenizer, head, head.pop("weights"))
    else:
        model = tuned_of(find_checkpoint(folder, ("best.pt", "lora.pt"))[1])
    other = model.task
    if "teacher" not in TASKS[other.head["task"]].knows:
        raise SettingError(f"teacher={folder}: its task is {other.head['task']}: wanted a classifier")
    if not all("teacher" in one.knows for one in (task, other)):
        raise SettingError(f"teacher={folder}: teaches one label a row: leave out --multi_label in both")
    if sorted(other.labels) != sorted(task.labels):
        raise SettingError(f"teacher={folder}: knows the labels {', '.join(other.labels[:10])}, the data has "
                           f"{', '.join(task.labels[:10])}")
    try:
        probs = np.stack(predict(model.to(machine.device), rows))
    except UserError as error:  # of one text, and the rows have two, or the other way round
        raise UserError(f"teacher={folder}: {error}") from None
    order = [other.number[label] for label in task.labels]
    return torch.from_numpy(probs[:, order]).float().to(machine.device), sum_of(model)


# -----------------------------------------------------------------------------
# The run

# a resumed run cannot change these, nor the body's settings but dropout
FIXED = ("task", "multi_label", "folds", "max_length", "pool", "pair", "freeze", "lora_rank", "lora_alpha",
         "optimizer", "sparsity", "seed", "tokenizer")


def open_model(run: Run, train: list[Row], given: dict, s: SimpleNamespace) -> Tuned:
    """The model of the run to resume, or a new one; with low-rank additions, or frozen, if asked for.

    Raises SettingError if the run has other settings than were given now.
    """
    dropout = given.get("dropout", 0.1)
    fields = given if run.init_from == "scratch" else {"dropout": dropout}
    run.same({**vars(s), **fields}, FIXED + tuple(name for name in fields if name != "dropout"))
    saved = run.checkpoint
    if not saved:
        model = new_model(train, given, run.init_from, s)
    elif "head" not in saved:
        raise UserError(f"{run.source}: a run of train.py: --init_from={run.folder} takes its weights")
    else:
        for name in ("linear", "cut_rate"):
            if saved["settings"].get(name):
                raise UserError(f"{name}={saved['settings'][name]}: the run was begun with a setting that is "
                                "gone: finish it with the version that began it, or --overwrite it")
        weights = saved["head"].pop("weights")
        body = Transformer(Config(**{**saved["model_args"], "dropout": dropout}))
        body.published = saved.get("published", {})
        model = with_head(body, tokenizer_of(saved), saved["head"], weights)
    if s.lora_rank:
        add_lora(model.body, s.lora_rank, s.lora_alpha)
    if s.freeze:
        model.body.requires_grad_(False)
    if saved:
        model.body.load_state_dict(saved["model"])
    if not any(p.requires_grad for p in model.parameters()):
        raise SettingError(f"freeze=True: --task={s.task} has no head of its own to train: use --lora_rank")
    return model.to(run.machine.device)


def fine_tune(run: Run, rows: Splits, given: dict, s: SimpleNamespace) -> Optional[Tested]:
    """Train on one split, test the best epoch, and write all of it to the run's folder.

    given: the body's settings. Only the first process tests.
    """
    machine = run.machine
    torch.manual_seed(s.seed)
    model = open_model(run, rows.train, given, s)
    task = model.task
    run.unit = task.unit

    # Examples, and when each comes. Those of the test rows too: a wrong label there is found now.
    examples, val_examples, test_examples = map(task.examples, rows)
    every = -(-len(rows.train) // len(rows.val))  # as many to train on are evaluated too
    part = [one._replace(row=one.row // every) for one in examples if one.row % every == 0]
    examples = [example for example in examples if task.teaches(example, rows.train[example.row])]
    if not examples:
        raise UserError(f"{rows.train[0].where}: nothing to learn in the training data: no answer is in its "
                        "context, or no prompt leaves room for a response in "
                        f"{task.head['max_length']} tokens")
    settled = task.settle(examples, s)
    machine.choose(s.matmul, model.body.config.n_embd, run.machine_then)
    lengths, plans = lengths_of(examples), earlier_plans(run, s)
    planned, epoch_ends = plan(lengths, s, plans)
    steps = len(planned)
    data = fingerprint(rows.train + rows.val)
    machine.agree(f"data={s.data}", data.encode())
    run.check_data({"data": data})

    # The objective, on its device, data-parallel; the optimizers; and where we are.
    taught, teacher_sum = None, ""
    if s.teacher:
        taught, teacher_sum = teacher_probs(s.teacher, task, rows.train, machine)
        run.same_teacher(s.teacher, teacher_sum)
    weight = task.class_weight(rows.train).to(machine.device) if s.class_weight == "balanced" else None
    if machine.rank:
        torch.manual_seed(s.seed + machine.rank)  # dropout differs between processes
    objective, _ = ready(Objective(model, weight, s), machine)
    optimizers = make_optimizers(model, s.optimizer, s.learning_rate, s.muon_lr, s.weight_decay,
                                 (s.beta1, s.beta2), embd_lr=s.embd_lr)
    pruning = Pruning(model.body, s.sparsity, steps)
    state = run.restore(model, optimizers)
    introduce(model, lengths, rows, run, settled)
    machine.say(f"training  {s.epochs} epochs, {steps:,} steps, into {run.folder}\n")
    run.begin(settings_kept(run, model.body.config, given, s), defaults_of(globals()),
              model_args=asdict(model.body.config), tokenizer=task.tokenizer.to_dict(),
              data={"data": data, "plans": plans}, published=model.body.published, teacher_sum=teacher_sum)
    if run.resumed and state.step >= steps:
        machine.say(f"finished after {state.step} steps: --epochs={s.epochs + 1} trains on")

    interval = s.log_interval or min(50, max(1, steps // 20))
    bad_steps = BadSteps(s.max_bad_steps, 1 if machine.looks_each_step() else interval, machine.main)
    pace, began = Pace(state, steps), state.step
    enough = False  # patience has run out
    model.train()
    while state.step < steps and not enough and not run.stopped():
        # the step's learning rate, its examples, its update
        factor = lr_factor(state.step, s.schedule, int(s.warmup * steps), steps, s.min_lr / s.learning_rate)
        set_lr(optimizers, factor)
        micros = micro_batches(planned[state.step], examples, taught, task, s.gradient_accumulation_steps,
                               machine)
        counted = sum(task.count(target, weight) * counts for _, target, _, counts in micros)
        (loss, penalty), norm = train_step(objective, micros, counted, model, optimizers, machine,
                                           s.grad_clip)
        bad_steps.add(state.step + 1, s.learning_rate * factor, loss + penalty, norm)
        if machine.scaler and bad_steps.in_a_row:
            continue  # float16 overflowed: the scaler has lowered its factor, and the step does not count
        state.add_loss(loss)
        state.step += 1
        pruning.after(state)
        last = state.step == steps

        due = state.step % interval == 0 or last
        if due or state.step == began + 1:  # the first step is shown at once
            seconds, left = pace.measure(state)
            row = {"iter": state.step, "elapsed": run.elapsed(),
                   "loss": state.mean_loss() if due else loss.item(), "lr": s.learning_rate * factor,
                   "grad_norm": norm.item(), "batch_size": len(planned[state.step - 1]), "dt": seconds}
            if penalty:
                row["penalty"] = penalty.item()
            if due:
                run.log(**row)
            machine.say(step_line(row, steps, f"{seconds * 1e3:6.0f} ms a step", left))

        if state.step % s.eval_interval == 0 or last if s.eval_interval else state.step in epoch_ends:
            scores = evaluate(model, rows.val, val_examples, 2 * s.batch_size, machine)
            on_train = {}
            if "loss" in scores:
                found = evaluate(model, rows.train[::every], part, 2 * s.batch_size, machine)
                on_train["train_loss"] = found["loss"]
            noted = {**scores, "epoch": 1 + int(np.searchsorted(epoch_ends, state.step))}
            best = pruning.is_done(state) and state.is_best(goal_of(task, scores), noted)
            logged = {**on_train, **{f"val_{name}": value for name, value in scores.items()}}
            run.log(iter=state.step, elapsed=run.elapsed(), **logged)
            said = in_words({**on_train, **scores})
            machine.say(f"iter {state.step}: {said}{', best so far' if best else ''}")
            if best:
                save_best(run, state, model, s)
            save(run, "ckpt.pt", state, model, model.body.state_dict(), optimizers)
            enough = s.patience is not None and state.since_best >= s.patience
            pace.restart(state)

    finished = enough or state.step >= steps
    if run.stopped(unless_late=finished):  # also in the last evaluation: more would come, a test or folds
        save(run, "ckpt.pt", state, model, model.body.state_dict(), optimizers)
        run.close()
        run.say_stopped(state.step)
        machine.barrier()
        sys.exit(run.stop.status())
    run.close()
    if not state.best:
        raise UserError(f"{run.folder}: its best.pt is damaged, and it is trained to the end: "
                        f"--epochs={s.epochs + 1} trains on, --overwrite starts anew")
    return report(run, rows, test_examples, state.best, s) if machine.main else None


def settings_kept(run: Run, body: Config, given: dict, s: SimpleNamespace) -> dict:
    """The run's settings as they were asked for, not what the task and the texts made of the body."""
    fields = asdict(body)
    del fields["head"]
    if run.init_from == "scratch" and s.tokenizer == "bpe":
        fields["vocab_size"] = given.get("vocab_size", BPE_SIZE)  # each fold's own may be smaller
    return {**vars(s), "init_from": run.init_from, **fields}


def evaluate(model: Tuned, rows: list[Row], examples: list[Example], batch_size: int,
             machine: Machine) -> dict[str, float]:
    """The task's metrics on labelled rows. Every process computes them; the first one's are used by all."""
    answers = predict(model, rows, batch_size, machine, examples)
    scores = model.task.scores(*model.task.arrays(rows, answers))
    return dict(zip(scores, machine.broadcast(list(scores.values())), strict=True))


def goal_of(task: Task, scores: dict[str, float]) -> list[float]:
    """By what evaluations are compared: the task's metric, and the lower loss between equals."""
    goal = scores[task.metric] * (-1 if task.lower_is_better else 1)
    return [-math.inf if math.isnan(goal) else goal, -scores.get("loss", 0.0)]


def save(run: Run, name: str, state: State, model: Tuned, weights: dict, optimizers=None, **more) -> None:
    """weights: of the body."""
    head = {**model.task.head, "weights": dict(model.head.state_dict())}
    run.save(name, state, model, optimizers, model=weights, head=head, **more)


def save_best(run: Run, state: State, model: Tuned, s: SimpleNamespace) -> None:
    """best.pt is a model like any other; lora.pt holds only what LoRA added to the body it began from."""
    weights = model.body.state_dict()
    save(run, "best.pt", state, model, merged(weights, s.lora_alpha / (s.lora_rank or 1)))
    if s.lora_rank:
        added = {name: weight for name, weight in weights.items() if ".lora_" in name}
        save(run, "lora.pt", state, model, added, rank=s.lora_rank, alpha=s.lora_alpha,
             init_from=run.init_from, base_sum=sum_of(model.body))


def fingerprint(rows: list[Row]) -> str:
    """Of repr([(text, pair, label), ...]), a row at a time: there may be a million."""
    sha = hashlib.sha256(b"[")
    for n, row in enumerate(rows):
        content = (", " if n else "") + repr((row.text, row.pair, row.label))
        sha.update(content.encode("utf-8", "replace"))
    sha.update(b"]")
    return sha.hexdigest()


def introduce(model: Tuned, lengths: np.ndarray, rows: Splits, run: Run, settled: str) -> None:
    """Say what will happen. lengths: of the training examples, which settled what `settled` says."""
    say, task = run.machine.say, model.task
    everything = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"model     {everything:,} parameters, {trained:,} of them trained ({trained / everything:.2%})")
    say(f"machine   {run.machine}")
    say(f"data      {len(rows.train):,} to train on, {len(rows.val):,} to validate, {len(rows.test):,} to "
        f"test; {lengths.mean():.0f} tokens each, {lengths.max()} at most")
    if task.classes:
        say(f"labels    {', '.join(task.labels[:20])}{', ...' if len(task.labels) > 20 else ''}")
    if "words" in task.head:
        say(f"words     of a text: {IN_WORDS[task.head['words']]} (--words)")
    if task.metric in task.meaning:  # it chooses the best epoch
        say(f"{task.metric:9} {task.meaning[task.metric]}")
    if settled:
        say(settled)
    if task.of_texts:
        say(f"pooling   {task.head['pool']}, of {task.head['max_length']} tokens at most")
    seen = {text_key(row) for row in rows.train}
    for name, others in (("to validate", rows.val), ("to test", rows.test)):
        task.notes[f"{name} in the training data too"] += sum(text_key(row) in seen for row in others)
    task.tell(lambda what: say(f"          {what}"))


def report(run: Run, rows: Splits, examples: list[Example], best: dict, s: SimpleNamespace) -> Tested:
    """The test rows, read once, by the best epoch: metrics.json, predictions.csv, and more where there is."""
    folder, test = run.folder, rows.test
    model = tuned_of(find_checkpoint(folder, ("best.pt", "lora.pt"))[1]).to(run.machine.device)
    task = model.task
    answers = predict(model, test, 2 * s.batch_size, run.machine, examples)
    found = {"task": s.task, "best_epoch": best["epoch"],
             "validation": {name: value for name, value in best.items() if name != "goal"}}
    written = write_results(folder, task, test, answers, found, s)
    found["baselines"] = {}
    for name, guesses in task.baselines(rows.train, test).items():
        found["baselines"][name] = task.scores(*task.arrays(test, guesses))
    write_json(folder / "metrics.json", found)
    print(f"\nTest, {len(test):,} examples, by epoch {best['epoch']}, with 95% intervals, and baselines:\n")
    print(table(found))
    print(beside_validation(found, task.metric))
    print(f"\n{folder}: {', '.join(written)}", flush=True)
    return Tested(task, test, answers, found)


# -----------------------------------------------------------------------------
# Settings

def stored(folder: str) -> tuple[dict, dict]:
    """The settings of a run, or of its first fold, and the script's defaults then."""
    settings, defaults = stored_settings(folder)
    return (settings, defaults) if settings else stored_settings(Path(folder) / "fold1")


def known_to_tasks() -> list[tuple]:
    """The settings that some tasks alone use, as ONLY has them."""
    names = sorted(set().union(*(task.knows for task in TASKS.values())))
    return [(name, "task", tuple(key for key, task in TASKS.items() if name in task.knows)) for name in names]


ONLY = [  # a setting, the one that decides whether it is of use, and for which of its values; (): all but off
    *known_to_tasks(),
    ("data_val", "folds", (None,)),
    ("data_test", "folds", (None,)),
    ("tokenizer", "init_from", ("scratch",)),
    ("lora_rank", "freeze", (False,)),
    ("lora_alpha", "lora_rank", ()),
    ("sparsity", "freeze", (False,)),
    ("sparsity", "lora_rank", (None,)),
    ("embd_lr", "freeze", (False,)),
    ("embd_lr", "lora_rank", (None,)),
    ("muon_lr", "optimizer", tuple(BLOCKS_ONLY)),
    ("min_lr", "schedule", tuple(name for name in SCHEDULES if name != "constant")),
    ("teacher_share", "teacher", ()),
    ("teacher_temperature", "teacher", ()),
]


def check_settings(s: SimpleNamespace, earlier: dict) -> None:
    """Raises SettingError for settings that do not go together. earlier: those of the run to go on with."""
    if not s.data:
        raise SettingError("data='': wanted a file of labelled examples: .csv, .tsv, .jsonl, .json, CoNLL")
    if s.batch_size_end is not None and s.batch_size_end <= s.batch_size:
        raise SettingError(f"batch_size_end={s.batch_size_end}: the batch grows to it, from {s.batch_size}: "
                           "more is wanted")
    if s.freeze and s.optimizer in BLOCKS_ONLY:
        raise SettingError(f"optimizer={s.optimizer}: is for the blocks' matrices, which freeze=True leaves "
                           f"as they are: --optimizer={BLOCKS_ONLY[s.optimizer]}")
    if earlier.get("folds", s.folds) != s.folds:
        raise SettingError(f"folds={s.folds}: the run has {earlier['folds']}: leave it out, or start another "
                           "with --out_dir=FOLDER")


SPLIT_BY = ("seed", "folds", "split_column", "data_val", "data_test")


def models_that_have_seen(s: SimpleNamespace) -> Iterator[str]:
    """Warnings: which models that are built on were trained on the same file, split otherwise."""
    for name in ("init_from", "teacher"):
        folder = getattr(s, name)
        its = stored(folder)[0] if folder else {}
        if s.data in BUILT_IN or "data" not in its or Path(its["data"]).resolve() != Path(s.data).resolve():
            continue
        other = [f"{key}={its.get(key)}" for key in SPLIT_BY if its.get(key) != getattr(s, key)]
        if other or s.folds:
            yield (f"warning: {name}={folder} was trained on rows of {s.data} too, and knows some that "
                   f"are tested here: scores are too good (split by {', '.join(other) or 'folds'})")


SMALL = Path(__file__).parent / "config" / "finetune_sentiment.py"


def sized_for_small_data(given: dict) -> dict:
    """The body's settings; if they have no size, all that is not given is as in the recipe for small data.

    GPT-2's size, the default of Config, and a pretrained body's rate would learn nothing from a few thousand
    rows, for hours. So what a recipe says for its pretrained body yields too, if --init_from=scratch follows.
    """
    if init_from != "scratch" or {"n_layer", "n_head", "n_embd"} & set(given):
        return given
    left_out, fields, shown, kept_from = {"out_dir", "task"}, {}, [], 1
    if any(one not in ("scratch", "resume", "auto") for one in globals().get("ORIGINS", ())):
        kept_from = place_of(globals(), "init_from")
    if TASKS[task].writes:
        left_out.add("causal")
    if not TASKS[task].of_texts:
        left_out.add("token_dropout")  # half of a text is enough for its class alone
    left_out.update(name for name, _, tasks in known_to_tasks() if task not in tasks)
    for name, value in recipe(SMALL, globals(), Config).items():
        if name in left_out or place_of(globals(), name) >= kept_from:
            continue
        if name == "block_size":
            value = max(value, max_length or 0)
        shown.append(f"{name}={value}")
        (globals() if name in __annotations__ else fields)[name] = value
    if main_process():
        print(f"(from scratch, and no size is given: as {SMALL.parent.name}/{SMALL.name} has it: "
              f"{', '.join(shown)})")
    return {**given, **fields}


def main(given: dict):
    given = sized_for_small_data(given)
    folder, resuming = Path(out_dir), init_from == "resume"
    earlier = stored(out_dir)[0] if resuming else {}
    origin = earlier.get("init_from") if resuming else init_from
    yielded = check_used(globals(), given, init_from=origin or "scratch")
    s = SimpleNamespace(**values_of(globals()))
    check_settings(s, earlier)
    if not resuming and not overwrite:
        refuse_to_replace(folder)

    # Say what was chosen; read the rows.
    machine = Machine(device, dtype, seed)
    vars(s).update(settle(globals(), machine))
    machine.say(*yielded)
    unused = [name for name, value in given.items() if name != "dropout" and value != earlier.get(name)]
    if unused and origin not in ("scratch", None):
        # a recipe that says how a new body is made serves for a pretrained one too
        machine.say(f"({', '.join(unused)}: not used, the body from {origin} is made already)")
    s.columns = known_columns(s, earlier)
    splits = read_splits(s, machine.say)
    for warning in models_that_have_seen(s):
        machine.say(warning)
    if folds:
        machine.say(f"{folds} trainings, each on {folds - 2} of {folds} parts of the data; one part chooses "
                    "the best epoch, one is tested on")

    # Train: once, or on each fold.
    found = []
    for place, rows in splits.items():
        if folds:
            machine.say(f"\n--- {place.name} of {folds} ---\n")
        run = Run(machine, place, init_from, overwrite, max_minutes, origin)
        run.removes = folder if run.removes and not found else None  # the first fold begins anew for all
        found.append(fine_tune(run, rows, given, s))
    if folds and machine.main:
        print(summary_of_folds(folder, found, s))
    machine.barrier()


if __name__ == "__main__":
    launch(main, globals(), Config, stored)
