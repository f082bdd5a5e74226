"""
Fine-tune: a task's head on a body, trained on labelled examples and judged on others.

    python finetune.py config/finetune_python.py                        no data needed: what code is this?
    python finetune.py config/finetune_sentiment.py --data=reviews.csv  yours, with columns text and label
    python finetune.py --init_from=google-bert/bert-base-uncased --data=reviews.csv   a pretrained body
    python finetune.py --init_from=out/small --task=lm --data=instructions.json       a run of train.py
    python finetune.py config/finetune_qa.py --data=squad.json          answers are spans of the text
    python sample.py --out_dir=out/sentiment --start="a fine film"      use it afterwards

--data is .csv, .tsv, .jsonl, .json, CoNLL for tags, SQuAD's JSON for answers. Without --data_val and
--data_test a tenth each is held out, stratified by label. What the best epoch says about the test set is in
metrics.json and predictions.csv, beside what simple baselines say.
"""
import time

STARTED = time.time()  # before the imports, which take seconds

import contextlib
import hashlib
import json
import math
import os
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional, Union

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from config import SettingError, UserError, launch
from lib import metrics as scoring
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
    load_checkpoint,
    load_model,
    model_of,
    save_checkpoint,
    write_text,
)
from lib.tasks import TASKS, Classify, Example, Row, Task, as_csv, deal, read_rows
from lib.tokenizer import Tokenizer, make_tokenizer
from model import Config, Transformer
from train import Stop, clock, give_back_memory, keep_memory, pick_device, pick_dtype, plot, random_states

# -----------------------------------------------------------------------------
# Settings. A model from scratch takes the fields of Config in model.py too, a pretrained one only dropout.
out_dir: str = "out/finetuned"  # where checkpoints, metrics.json and predictions.csv go
overwrite: bool = False  # start anew although out_dir holds a checkpoint
init_from: str = "scratch"  # scratch; resume; a run's folder; a Hugging Face folder, or an id on its hub
task: Literal["classify", "regress", "tag", "qa", "lm"] = "classify"  # what to learn
# data
data: str = ""  # labelled examples to train on
data_val: str = ""  # to choose the best epoch by; empty: a tenth of data
data_test: str = ""  # to be judged on, once; empty: a tenth of data
text_column: Union[str, int] = ""  # name or number of the column; empty: by its usual names, else the first
pair_column: Union[str, int] = ""  # of a second text, if there is one
label_column: Union[str, int] = ""  # empty: by its usual names, else the second
group_column: Union[str, int] = ""  # metrics are also given for each value of this column: is it fair?
multi_label: bool = False  # a row has any number of labels, with | between them
folds: int = 0  # cross-validation: train so many times, each time tested on another part of data
# model
tokenizer: str = "bpe"  # from scratch: bpe of the training texts (with vocab_size), bytes, gpt2...
max_length: int = 0  # tokens of an input; longer ones are cut, or read in windows (tag, qa); 0: block_size
pool: Literal["auto", "first", "last", "mean"] = "auto"  # a text's vector: of which tokens
pair: Literal["together", "apart"] = "together"  # two texts: read as one, or each for itself and compared
linear: int = 0  # mix in what a linear model of runs of up to so many tokens says; 4: for small data; 0: not
freeze: bool = False  # train the head alone
lora_rank: int = 0  # train low-rank additions to the matrices instead of the matrices; 0: not
lora_alpha: float = 16.0  # their size: they count alpha / rank times
# training
epochs: int = 3  # times that each example is seen
batch_size: int = 32  # examples in a step
batch_size_end: int = 0  # the batch doubles, at even distances, up to this; 0: it stays
optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, where they start from nothing
learning_rate: float = 5e-5  # highest, of all but Muon
muon_lr: float = 0.02  # highest, of Muon
embd_lr: Optional[float] = None  # highest, of the token embedding; None: as learning_rate
schedule: Literal["linear", "cosine", "constant"] = "linear"  # its fall
warmup: float = 0.1  # share of the steps that it rises in
min_lr: float = 0.0  # lowest
weight_decay: float = 0.01  # of matrices, decoupled
beta1: float = 0.9  # AdamW's memory of the gradient
beta2: float = 0.98  # and of its square
grad_clip: float = 1.0  # gradients with a larger norm are scaled down to it; 0: never
l1: float = 0.0  # times the sum of the trained weights' sizes is added to the loss
l2: float = 0.0  # times the sum of their squares
sparsity: float = 0.0  # share of the blocks' weights that are 0 in the end, the smallest ones
label_smoothing: float = 0.0  # share of the truth that is given to all classes alike
class_weight: Literal["none", "balanced"] = "none"  # balanced: rare classes count as much as frequent ones
token_dropout: float = 0.0  # share of the tokens hidden while training; 0.1 and up for small data
cut_rate: float = 0.0  # share of the places in a text where it is cut, anew each time, before tokens are made
patience: int = 0  # stop after so many evaluations without a better one; 0: never
eval_interval: int = 0  # steps from one evaluation to the next; 0: at the end of each epoch
log_interval: int = 50  # steps from one log line to the next
teacher: str = ""  # folder of a fine-tuned classifier, whose probabilities are learned too (distillation)
teacher_weight: float = 0.5  # share of the loss that is the teacher's
teacher_temperature: float = 2.0  # above 1: more is learned from what the teacher finds unlikely
# system
device: str = "auto"  # auto: cuda, else mps, else cpu
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: what is fast
seed: int = 1337  # of weights, splits, order and dropout
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
    for block in body.blocks:
        for layer in (block.attn, block.mlp):
            for name, child in list(layer.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(layer, name, LoRA(child, rank, alpha))


@torch.no_grad()
def merged(body: Transformer) -> dict[str, torch.Tensor]:
    """The body's weights, low-rank additions added: what a body without them has."""
    state = {name: weight for name, weight in body.state_dict().items() if ".lora_" not in name}
    for name, layer in body.named_modules():
        if isinstance(layer, LoRA):
            state[f"{name}.weight"] = layer.weight + layer.scale * layer.lora_b @ layer.lora_a
    return state


class Tuned(nn.Module):
    """(B, T) ids -> (B, n_out) of texts, or (B, T, n_out) of tokens: a body and a linear head.

    Padding is on the right and changes nothing. pool: which tokens' vectors stand for the text; apart: the
    batch's second half are the second texts of its first.
    """

    def __init__(self, body: Transformer, n_out: Optional[int], pool: Optional[str], apart: bool):
        super().__init__()
        self.body, self.pool, self.apart = body, pool, apart
        self.dropout = nn.Dropout(body.config.dropout)
        width = body.config.n_embd
        self.head = nn.Linear(2 * width if apart else width, n_out) if n_out else None
        if n_out:
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
            if apart and n_out == 1:  # to begin with, the cosine of the two, at about the label's scale
                nn.init.constant_(self.head.weight[:, :width], 4.0)
                nn.init.constant_(self.head.bias, -2.0)

    def forward(self, idx, pad_mask, segments=None, places=None):
        """places: (B, T), True at the tokens whose outputs are wanted: (n, n_out)."""
        real = torch.ones_like(idx, dtype=torch.bool) if pad_mask is None else pad_mask
        x = self.body.hidden(idx, pad_mask, segments)  # (B, T, C)
        if places is not None:
            x = x[places]  # (n, C)
        elif self.pool == "first":
            x = x[:, 0]  # (B, C)
        elif self.pool == "last":
            x = x[torch.arange(len(x), device=x.device), real.sum(1) - 1]
        elif self.pool == "mean":
            x = (x * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
        if self.apart:
            a, b = F.normalize(x, dim=-1).chunk(2)
            x = torch.cat((a * b, (a - b).abs()), dim=-1)  # (B, 2 C)
        if self.head is None:
            return self.body.logits(x)
        out = self.head(self.dropout(x)).float()
        if self.pool is None and places is None:  # answers are not in the padding
            out = out.masked_fill(~real.unsqueeze(-1), -1e9)
        return out


def says_mean(folder: str) -> bool:
    """Is it a sentence encoder that says it is to be pooled so? (A file of sentence-transformers.)"""
    file = Path(folder) / "1_Pooling" / "config.json"
    return file.is_file() and json.loads(file.read_text("utf-8")).get("pooling_mode_mean_tokens", False)


def load_task(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Tuned, Task]:
    """A fine-tuned model, ready to use, and its task. Raises UserError where the folder has none.

    A folder that holds lora.pt alone will do where the body that it was trained on can still be read.
    """
    return task_of(load_checkpoint(folder, ("best.pt", "lora.pt")), device)


def task_of(checkpoint: dict, device: str | torch.device = "cpu") -> tuple[Tuned, Task]:
    head = checkpoint.get("head")
    if not head:
        raise UserError("this checkpoint is not fine-tuned: finetune.py --init_from=ITS_FOLDER --data=FILE")
    if "rank" in checkpoint:  # low-rank additions alone
        body, tokenizer = load_model(checkpoint["init_from"], dropout=0.0)
        prepare_body(body, head["task"])
        add_lora(body, checkpoint["rank"], checkpoint["alpha"])
        body.load_state_dict({**body.state_dict(), **checkpoint["model"]})
    else:
        body, tokenizer = model_of(checkpoint, dropout=0.0), Tokenizer.from_dict(checkpoint["tokenizer"])
    task = TASKS[head["task"]](head, tokenizer)
    model = Tuned(body, task.n_out, head["pool"], head["apart"])
    if task.n_out:
        model.head.load_state_dict(head["weights"])
    return model.to(device).eval(), task


def prepare_body(body: Transformer, task: str) -> None:
    """The head for tokens stays only where the task is to write."""
    if task != "lm":
        body.head, body.config = None, replace(body.config, head="none")
    elif body.head is None or not body.config.causal:
        raise UserError("--task=lm: needs a causal body with a head for tokens")


# -----------------------------------------------------------------------------
# Batches

def batches(lengths: np.ndarray, size_at, seed: int, epoch: int, epochs: int) -> list[np.ndarray]:
    """The examples' numbers, each once, in batches of similar length; a function of seed and epoch alone.

    size_at: the batch size when a share of the training is done.
    """
    rng = np.random.default_rng((seed, epoch))
    order, found, i = rng.permutation(len(lengths)), [], 0
    while i < len(order):
        size = size_at((epoch + i / len(order)) / epochs)
        near = order[i:i + 50 * size]  # sorted by length within, and the batches shuffled again
        near = near[np.argsort(lengths[near], kind="stable")]
        cut = [near[j:j + size] for j in range(0, len(near), size)]
        found += [cut[j] for j in rng.permutation(len(cut))]
        i += 50 * size
    return found


def growing(first: int, last: int):
    """The batch size at each share of the training: doubled, at even distances, from first to last."""
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(min(2 * sizes[-1], last))
    return lambda share: sizes[min(int(share * len(sizes)), len(sizes) - 1)]


def collate(examples: list[Example], task: Task, device) -> dict:
    """What Tuned takes, and target. Padding on the right, only where lengths differ."""
    parts = [example.parts[k] for k in range(len(examples[0].parts)) for example in examples]
    T = max(len(ids) for ids, _ in parts)
    idx = np.full((len(parts), T), task.tokenizer.pad, dtype=np.int64)
    segments, real = np.zeros_like(idx), np.zeros(idx.shape, dtype=bool)
    for i, (ids, kinds) in enumerate(parts):
        idx[i, :len(ids)], segments[i, :len(ids)], real[i, :len(ids)] = ids, kinds, True
    batch = {"idx": idx, "segments": segments, "pad_mask": None if real.all() else real}
    if task.by_token:
        batch["places"] = np.zeros(idx.shape, dtype=bool)
        for i, example in enumerate(examples):
            batch["places"][i, example.places] = True
        batch["target"] = np.concatenate([example.target for example in examples])
    else:
        batch["target"] = np.array([example.target for example in examples])
    return {name: None if a is None else torch.from_numpy(a).to(device) for name, a in batch.items()}


@torch.no_grad()
def predict(model: Tuned, task: Task, rows: list[Row], batch_size: int = 64, amp=contextlib.nullcontext(),
            examples: Optional[list[Example]] = None, choose: bool = False) -> list:
    """The task's answer for each row, in the order of the rows. examples: the rows', where they are made.

    choose: the share of a linear model beside the Transformer, by these rows.
    """
    examples = task.examples(rows) if examples is None else examples
    lengths = np.array([length_of(example) for example in examples])
    order, outputs = np.argsort(lengths, kind="stable"), [None] * len(examples)
    device, training = next(model.parameters()).device, model.training
    model.eval()
    for i in range(0, len(order), batch_size):
        chosen = order[i:i + batch_size]
        batch = collate([examples[j] for j in chosen], task, device)
        target = batch.pop("target")
        with amp:
            out = model(**batch)
        out = (task.summary(out, target) if model.head is None else out).float().cpu().numpy()
        if task.by_token:
            out = np.split(out, np.cumsum([len(examples[j].places) for j in chosen])[:-1])
        for j, one in zip(chosen, out):
            outputs[j] = one
    model.train(training)
    if choose:
        task.choose_share(rows, examples, outputs)
    return task.answers(rows, examples, outputs)


def length_of(example: Example) -> int:
    return max(len(ids) for ids, _ in example.parts)


# -----------------------------------------------------------------------------
# Training

def fine_tune(folder: Path, train: list[Row], val: list[Row], test: list[Row], resume: bool,
              model_args: dict, s: SimpleNamespace) -> dict:
    """Train on one split, judge the best epoch on the test rows, and write all of it to the folder.

    s: the settings. Returns what metrics.json holds.
    """
    run_device = pick_device(s.device)
    run_dtype = pick_dtype(s.dtype, run_device)
    full = run_dtype == torch.float32
    amp = contextlib.nullcontext() if full else torch.autocast(run_device.type, run_dtype)
    scaler = torch.amp.GradScaler(run_device.type) if run_dtype == torch.float16 else None
    torch.manual_seed(s.seed)

    # The body, its tokenizer, the head: of the run under way, or new.
    if resume:
        source, checkpoint = find_checkpoint(folder, ("ckpt.pt", "ckpt.prev.pt"))
        same_run(folder, checkpoint["settings"], model_args, s)
        init_from, head = checkpoint["settings"]["init_from"], dict(checkpoint["head"])
        head_weights = head.pop("weights")
        tokenizer = Tokenizer.from_dict(checkpoint["tokenizer"])
        body = Transformer(Config(**checkpoint["model_args"]))
        prepare_body(body, head["task"])
    else:
        init_from = s.init_from
        if init_from == "scratch":
            body, tokenizer = new_body(train, model_args, s)
        else:
            body, tokenizer = load_model(init_from, dropout=model_args.get("dropout", 0.1))
        prepare_body(body, s.task)
        head = new_head(body, tokenizer, train, s)
    task = TASKS[head["task"]](head, tokenizer)
    if s.cut_rate and not isinstance(tokenizer, Tokenizer):
        raise SettingError(f"cut_rate={s.cut_rate}: not with the tokenizer of {init_from}: --cut_rate=0")
    if s.linear and not resume:
        print(f"linear    of runs of up to {s.linear} tokens: fitting", end="", flush=True)
        begun = time.time()
        task.add_linear(train, s.linear)
        print(f" took {time.time() - begun:.0f} s, {len(task.linear.idf):,} of them")
    model = Tuned(body, task.n_out, head["pool"], head["apart"])
    if s.lora_rank:
        add_lora(body, s.lora_rank, s.lora_alpha)
    if s.freeze:
        body.requires_grad_(False)
    if resume:
        body.load_state_dict(checkpoint["model"])
        if model.head is not None:
            model.head.load_state_dict(head_weights)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise SettingError("freeze=True: --task=lm has no head of its own to train: use --lora_rank")

    # Examples, and when each comes. The test rows' too: a wrong label there is to be found now, and not after
    # the training.
    examples, val_examples, test_examples = (task.examples(rows) for rows in (train, val, test))
    examples = [example for example in examples if task.teaches(example, train[example.row])]
    if not examples:
        raise UserError(f"{train[0].where}: nothing to learn in the training data: no answer is in its "
                        f"context, or no prompt leaves room for a response in {head['max_length']} tokens")
    model.to(run_device)
    soft = teacher_probs(s.teacher, task, train, run_device) if s.teacher else None
    weight = class_weights(task, train, run_device) if s.class_weight == "balanced" else None
    lengths = np.array([length_of(example) for example in examples])
    size_at = growing(s.batch_size, s.batch_size_end)
    epochs = [batches(lengths, size_at, s.seed, epoch, s.epochs) for epoch in range(s.epochs)]
    plan = [batch for epoch in epochs for batch in epoch]  # the whole training
    epoch_ends = np.cumsum([len(epoch) for epoch in epochs])
    optimizers = make_optimizers(model, s.optimizer, s.learning_rate, s.muon_lr, s.weight_decay,
                                 (s.beta1, s.beta2), embd_lr=s.embd_lr)
    pruning = Pruning(body, s.sparsity, len(plan))

    # Where we are.
    where = {"data": fingerprint(train + val), "steps": len(plan),
             "iter_num": 0, "best": {}, "waited": 0, "elapsed": 0.0}
    if resume:
        for name in ("data", "steps"):
            if checkpoint["data"][name] != where[name]:
                raise UserError(f"{folder}: was begun with other {name}: give the same data, seed and "
                                "settings, or --overwrite")
        where = checkpoint["data"]
        load_optimizer_state(optimizers, model, checkpoint["optimizer"])
        if scaler and checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["rng"]["cpu"][0])
        if run_device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"][0], run_device)
    iter_num, best, waited, elapsed_before = list(where.values())[2:]

    # Say what will happen.
    n_trained, n_all = sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters())
    print(f"model     {n_all:,} parameters, {n_trained:,} of them trained ({n_trained / n_all:.2%})")
    print(f"machine   {run_device}, {str(run_dtype).removeprefix('torch.')}")
    print(f"data      {len(train):,} to train on, {len(val):,} to validate, {len(test):,} to test; "
          f"{lengths.mean():.0f} tokens each, {lengths.max()} at most")
    if s.task in ("classify", "tag"):
        print(f"labels    {', '.join(task.labels[:20])}" + ", ..." * (len(task.labels) > 20))
    seen = {(row.text, row.pair) for row in train}
    for count, what in (
            (task.cut, f"are longer than {head['max_length']} tokens: {task.long}"),
            (task.cut_questions, f"are questions longer than {head['max_length'] // 3} tokens: cut there"),
            (sum(not row.text.strip() for row in train + val + test), "are empty"),
            (sum((row.text, row.pair) in seen for row in test), "of the test are in the training data too")):
        if count:
            print(f"          {count:,} texts {what}")
    print(f"training  {s.epochs} epochs, {len(plan):,} steps, into {folder}\n", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"out_dir={s.out_dir}: cannot be made ({error.strerror})") from None
    if resume and source.name == "ckpt.prev.pt" and (folder / "ckpt.pt").exists():
        os.replace(folder / "ckpt.pt", folder / "ckpt.damaged.pt")  # it must not replace the good one
    settings = {**vars(s), "init_from": init_from, **asdict(body.config)}
    write_text(folder / "settings.json", json.dumps(settings, indent=1))
    log_file, kept = folder / "log.jsonl", []
    if resume and log_file.exists():  # rows behind the checkpoint are about to come again
        rows = log_file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["iter"] <= iter_num]
    write_text(log_file, "".join(kept))

    def elapsed():
        return elapsed_before + time.time() - STARTED

    def log(row):
        try:
            with open(log_file, "a", encoding="utf-8") as f:
                f.write(json.dumps({"iter": iter_num, "elapsed": elapsed(), **row}) + "\n")
        except OSError as error:
            raise cannot_write(log_file, error) from None

    def save(name):
        """ckpt.pt: all that a resume needs; best.pt: a model like any other; lora.pt: what was added."""
        weights = dict(model.head.state_dict()) if model.head else {}
        state, extra = merged(body), {"optimizer": {}, "scaler": {}, "rng": {}, "data": {}}
        if name == "ckpt.pt":
            state, extra = body.state_dict(), {
                "optimizer": optimizer_state(optimizers, model),
                "scaler": scaler.state_dict() if scaler else {}, "rng": random_states(run_device),
                "data": {**where, "iter_num": iter_num, "best": best, "waited": waited, "elapsed": elapsed()}}
        elif name == "lora.pt":
            state = {key: value for key, value in body.state_dict().items() if ".lora_" in key}
            extra = {"rank": s.lora_rank, "alpha": s.lora_alpha, "init_from": init_from}
        save_checkpoint(folder / name, {
            "version": 1, "model": state, "model_args": asdict(body.config), **extra, "iter_num": iter_num,
            "best_val_loss": best.get("loss", math.inf), "settings": settings,
            "tokenizer": tokenizer.to_dict(), "head": {**head, "weights": weights}})

    def validate():
        """Evaluate, and save: is it the best so far?"""
        nonlocal best, waited
        answers = predict(model, task, val, 2 * s.batch_size, amp, val_examples, choose="linear" in head)
        scores = {name: float(value) for name, value in task.scores(*task.arrays(val, answers)).items()}
        if "linear" in head:
            scores["transformer_share"] = head["share"]
        goal = scores[task.metric] * (-1 if task.metric == "loss" else 1)
        goal = [-math.inf if math.isnan(goal) else goal, -scores.get("loss", 0.0)]  # or the lower loss
        better = pruning.is_done(iter_num) and (not best or goal > best["goal"])
        waited = 0 if better else waited + pruning.is_done(iter_num)
        if better:
            epoch = int(np.searchsorted(epoch_ends, iter_num)) + (iter_num > 0)
            best = {**scores, "goal": goal, "epoch": epoch, "iter": iter_num}
            for name in ["best.pt"] + ["lora.pt"] * bool(s.lora_rank):
                save(name)
        save("ckpt.pt")
        log({f"val_{name}": value for name, value in scores.items()})
        print(f"iter {iter_num}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
              + ", best so far" * better, flush=True)

    stop, bad_steps = Stop(), BadSteps(10, s.log_interval)
    started = logged = time.time()
    started_iter, losses, warmup_iters = iter_num, [], int(s.warmup * len(plan))
    model.train()
    while iter_num < len(plan) and not stop.signal and not (s.patience and waited >= s.patience):
        factor = lr_factor(iter_num, s.schedule, warmup_iters, len(plan), s.min_lr / s.learning_rate)
        for group in (group for one in optimizers for group in one.param_groups):
            group["lr"] = group["highest_lr"] * factor
        chosen = [examples[i] for i in plan[iter_num]]
        if s.cut_rate:
            encode = partial(tokenizer.encode_cut, rate=s.cut_rate,
                             rng=np.random.default_rng((s.seed, iter_num)))
            parts = task.sequences([train[example.row] for example in chosen],
                                   lambda texts: [encode(text) for text in texts])
            chosen = [example._replace(parts=new) for example, new in zip(chosen, parts)]
        batch = collate(chosen, task, run_device)
        target = batch.pop("target")
        if s.token_dropout:
            hidden = torch.rand(batch["idx"].shape, device=run_device) < s.token_dropout
            nothing = tokenizer.pad if tokenizer.mask is None else tokenizer.mask
            batch["idx"] = batch["idx"].masked_fill(hidden, nothing)

        # forward, backward, update
        with amp:
            out = model(**batch)
            loss = task.loss(out, target, weight, s.label_smoothing)
            if soft is not None:
                taught = distil(out, soft[[example.row for example in chosen]], s.teacher_temperature)
                loss = (1 - s.teacher_weight) * loss + s.teacher_weight * taught
        losses.append(loss.detach())
        if s.l1 or s.l2:
            loss = loss + sum(s.l1 * p.abs().sum() + s.l2 * p.square().sum() for p in trained)
        (scaler.scale(loss) if scaler else loss).backward()
        grad_norm = update(model, optimizers, losses[-1], s.grad_clip, scaler)
        give_back_memory()
        iter_num += 1
        pruning.after(iter_num)
        bad_steps.add(iter_num, s.learning_rate * factor, losses[-1], grad_norm)
        last = iter_num == len(plan)

        # say how it goes
        if iter_num % s.log_interval == 0 or last:
            now = time.time()
            dt, logged = (now - logged) / len(losses), now
            left = (len(plan) - iter_num) * (now - started) / (iter_num - started_iter)
            row = {"loss": torch.stack(losses).mean().item(), "lr": s.learning_rate * factor,
                   "grad_norm": grad_norm.item(), "batch_size": len(chosen), "dt": dt}
            log(row)
            losses = []
            print(f"iter {iter_num:{len(str(len(plan)))}}/{len(plan)}  loss {row['loss']:7.4f}  "
                  f"lr {row['lr']:.2e}  norm {row['grad_norm']:6.2f}  {dt * 1e3:6.0f} ms a step  "
                  f"{clock(left)} left", flush=True)

        if iter_num % s.eval_interval == 0 or last if s.eval_interval else iter_num in epoch_ends:
            validate()

    if stop.signal and iter_num < len(plan):
        save("ckpt.pt")
        print(f"stopped after {iter_num} steps, saved: --init_from=resume goes on", flush=True)
        sys.exit(128 + stop.signal)
    return judge(folder, train, test, test_examples, best, s, run_device, amp)


def new_body(train: list[Row], model_args: dict, s: SimpleNamespace) -> tuple[Transformer, Tokenizer]:
    """From scratch: the tokenizer is made of the training texts."""
    texts = [text[:10**6] for row in train
             for text in (row.text, row.pair, row.label if s.task == "lm" else None) if text]
    space, size = " " * in_words(train), model_args.get("vocab_size", 8192)
    tokenizer = make_tokenizer(s.tokenizer, [space + text for text in texts], size)
    try:
        return Transformer(Config(**{**model_args, "vocab_size": tokenizer.vocab_size})), tokenizer
    except ValueError as error:  # it names the field
        raise SettingError(str(error)) from None


def in_words(rows: list[Row]) -> bool:
    """Are they texts with spaces? Then one in front makes a first word the same token as elsewhere."""
    return 2 * sum(" " in row.text for row in rows) > len(rows)


def new_head(body: Transformer, tokenizer, train: list[Row], s: SimpleNamespace) -> dict:
    """What a checkpoint keeps of the task, besides the weights: plain values."""
    length = s.max_length or body.config.block_size
    if not 8 <= length <= body.config.block_size:
        raise SettingError(f"max_length={length}: must be at least 8, and the model reads at most "
                           f"{body.config.block_size} tokens")
    whole = s.task in ("classify", "regress")  # texts, not tokens
    begins = tokenizer.wrap([-1])[0][0] != -1  # with a special token, as BERT's [CLS]
    pool = ("mean" if says_mean(s.init_from) else "last" if body.config.causal else
            "first" if begins else "mean")
    paired = train[0].pair is not None
    return {"task": s.task, **TASKS[s.task].learn(train, s),
            "max_length": length, "space": s.init_from == "scratch" and in_words(train),
            "pool": (pool if s.pool == "auto" else s.pool) if whole else None, "paired": paired,
            "apart": whole and paired and s.pair == "apart",
            "columns": {"text": s.text_column, "pair": s.pair_column, "label": s.label_column}}


def same_run(folder: Path, then: dict, model_args: dict, s: SimpleNamespace) -> None:
    """Raises SettingError where what makes a run the one it is has changed. then: its settings."""
    names = ("task", "multi_label", "folds", "max_length", "pool", "pair", "linear", "freeze", "lora_rank",
             "lora_alpha", "sparsity", "seed")
    scratch = then["init_from"] == "scratch"  # a pretrained body takes dropout alone
    now = {name: value for name, value in model_args.items() if scratch or name == "dropout"}
    now.pop("vocab_size", None)  # a tokenizer may have turned out smaller
    for name, value in {**now, **{name: vars(s)[name] for name in names}}.items():
        if value is not None and then.get(name, value) != value:
            raise SettingError(f"{name}={value}: {folder} was begun with {name}={then[name]}: give the same, "
                               "or --overwrite")


def fingerprint(rows: list[Row]) -> str:
    content = repr([(row.text, row.pair, row.label) for row in rows])
    return hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()


def teacher_probs(folder: str, task: Task, rows: list[Row], device) -> torch.Tensor:
    """What a fine-tuned classifier says about each row, in the order of this task's labels: (N, K)."""
    if not (type(task) is Classify and task.kind == "class"):
        raise SettingError(f"teacher={folder}: can only teach --task=classify with one label a row")
    model, other = load_task(folder, device)
    if sorted(other.labels) != sorted(task.labels):
        raise SettingError(f"teacher={folder}: knows the labels {', '.join(other.labels[:10])}, the data has "
                           f"{', '.join(task.labels[:10])}")
    probs = np.stack(predict(model, other, rows))
    return torch.from_numpy(probs[:, [other.number[label] for label in task.labels]]).float().to(device)


def distil(out, taught, temperature):
    """Cross-entropy against the teacher's softened probabilities (Hinton et al. 2015), (B, K) both."""
    soft = (taught.clamp(min=1e-8).log() / temperature).softmax(-1)
    return F.cross_entropy(out / temperature, soft) * temperature ** 2


def class_weights(task: Task, rows: list[Row], device) -> torch.Tensor:
    """So that each class counts alike; of several labels, a label's presence as much as its absence."""
    if type(task) is not Classify:
        raise SettingError("class_weight=balanced: only for --task=classify")
    y = np.array([task.target(row) for row in rows])
    if task.kind == "class":
        weight = len(y) / (task.n_out * np.bincount(y, minlength=task.n_out))
    else:
        weight = (len(y) - y.sum(0)) / np.maximum(1, y.sum(0))
    return torch.tensor(weight, dtype=torch.float32, device=device)


def judge(folder: Path, train, test, examples, best, s, device, amp) -> dict:
    """The test rows, read once, by the best epoch: metrics.json, predictions.csv, the report."""
    model, task = load_task(folder, device)
    answers = predict(model, task, test, 2 * s.batch_size, amp, examples)
    arrays = task.arrays(test, answers)
    guesses = task.baselines(train, test)
    for name, share in (("transformer", 1.0), ("linear", 0.0)) if "linear" in task.head else ():
        alone = TASKS[s.task]({**task.head, "share": share}, task.tokenizer)  # what each of the two says
        guesses[name] = predict(model, alone, test, 2 * s.batch_size, amp, examples)
    others = {name: {metric: float(value) for metric, value in task.scores(*task.arrays(test, guess)).items()}
              for name, guess in guesses.items()}
    metrics = {**scoring.with_intervals(task.scores, arrays), "task": s.task, "test_rows": len(test),
               "best_epoch": best["epoch"], "baselines": others,
               "validation": {name: value for name, value in best.items() if name != "goal"}}
    if s.group_column != "":
        metrics["by_group"] = scoring.by_group(task.scores, arrays, [row.group for row in test])
    header, lines = task.table(test, answers)
    write_text(folder / "predictions.csv", as_csv([header, *lines]))
    scoring.write_json(folder / "metrics.json", metrics)
    try:
        plot(folder / "log.jsonl", folder / "loss.png")
        written = scoring.report(folder, *arrays, task.labels) if type(task) is Classify else []
    except OSError as error:
        raise cannot_write(folder, error) from None

    print(f"\nTest, {len(test):,} examples, by epoch {best['epoch']}, with 95% intervals, and baselines:\n")
    w = max(map(len, others), default=0) + 2
    print(f"  {'':20} {'this model':>24}" + "".join(f"{name:>{w}}" for name in others))
    for name in [name for name in metrics if f"{name}_ci95" in metrics]:
        low, high = metrics[f"{name}_ci95"]
        print(f"  {name:20} {metrics[name]:8.4f} [{low:6.4f}, {high:6.4f}]"
              + "".join(f"{scores[name]:{w}.4f}" for scores in others.values()))
    for name, gap in metrics.get("by_group", {}).get("gaps", {}).items():
        low, high = gap["gap_ci95"]
        print(f"  {name}: {gap['lowest']} lowest, {gap['highest']} highest, {gap['gap']:.4f} apart "
              f"[{low:.4f}, {high:.4f}]")
    print(f"\n{folder}: {', '.join(['metrics.json', 'predictions.csv', *written])}", flush=True)
    return metrics


# -----------------------------------------------------------------------------

def main(model_args: dict):
    def refuse(names, fine, wanted):
        for name in names.split():
            if not fine(globals()[name]):
                raise SettingError(f"{name}={globals()[name]}: must be {wanted}")
    refuse("epochs batch_size log_interval", lambda x: x >= 1, "at least 1")
    refuse("max_length lora_rank weight_decay grad_clip l1 l2 min_lr patience eval_interval seed "
           "batch_size_end", lambda x: x >= 0, "at least 0")
    refuse("label_smoothing sparsity token_dropout cut_rate warmup beta1 beta2", lambda x: 0 <= x < 1,
           "at least 0 and below 1")
    refuse("learning_rate muon_lr teacher_temperature lora_alpha", lambda x: 0 < x < math.inf, "above 0")
    refuse("teacher_weight", lambda x: 0 <= x <= 1, "from 0 to 1")
    refuse("folds", lambda x: x == 0 or x >= 3, "at least 3: one to test, one to validate, one to train on")
    refuse("data", bool, "a file of labelled examples: .csv, .tsv, .jsonl, .json, CoNLL")
    refuse("linear", lambda x: 0 <= x <= 5, "from 0 to 5")
    for name in ("linear", "cut_rate"):
        if globals()[name] and task not in ("classify", "regress"):
            raise SettingError(f"{name}={globals()[name]}: only for --task=classify or regress")
    if sparsity and (freeze or lora_rank):
        raise SettingError(f"sparsity={sparsity}: prunes what is trained: leave out freeze and lora_rank")
    if freeze and lora_rank:
        raise SettingError(f"freeze=True: trains the head alone: leave out --lora_rank={lora_rank}")
    if folds and (data_val or data_test):
        raise SettingError(f"folds={folds}: cuts data itself: leave out --data_val and --data_test")
    fixed = [name for name in model_args if name != "dropout" and init_from not in ("scratch", "resume")]
    if fixed:  # a recipe that says how a new body is made serves for a pretrained one too
        print(f"({', '.join(fixed)}: not used, the body from {init_from} is made already)")
    folder = Path(out_dir)
    begun = [*folder.glob("ckpt*.pt"), *folder.glob("fold*/ckpt*.pt")]
    if begun and init_from != "resume" and not overwrite:
        raise SettingError(f"{folder}: a run is here already: --init_from=resume goes on with it, "
                           "--overwrite starts anew, --out_dir=FOLDER writes elsewhere")
    torch.set_float32_matmul_precision("high")  # tf32 where a GPU has it
    keep_memory()
    s = SimpleNamespace(**{name: globals()[name] for name in sys.modules[__name__].__annotations__})
    columns = {"text": text_column, "pair": pair_column, "label": label_column, "group": group_column}
    rows = read_rows(data, task, columns)

    if folds:
        part, splits = deal(rows, task, folds, seed), {}
        for k in range(folds):
            after = (k + 1) % folds
            splits[folder / f"fold{k + 1}"] = [[row for row, p in zip(rows, part) if fits(p)] for fits in (
                lambda p: p not in (k, after), lambda p: p == after, lambda p: p == k)]
    else:
        val, test = (read_rows(path, task, columns) if path else None for path in (data_val, data_test))
        part = deal(rows, task, 10, seed)  # a tenth each for what is not given
        train = [row for row, p in zip(rows, part) if (test or p != 0) and (val or p != 1)]
        test = test or [row for row, p in zip(rows, part) if p == 0]
        val = val or [row for row, p in zip(rows, part) if p == 1]
        splits = {folder: [train, val, test]}
    for train, val, test in splits.values():  # what is wrong with the last fold is to be known now
        if not (train and val and test):
            raise UserError(f"{data}: {len(rows)} examples are too few to train, validate and test on (equal "
                            "texts stay together, and questions on one article)")
        if task in ("classify", "tag"):
            learned = TASKS[task](TASKS[task].learn(train, s), None)
            for row in val + test:
                learned.target(row)
    for file in begun if overwrite else ():
        file.unlink()  # else a later resume could go on with it

    found = []
    for place, split in splits.items():
        if folds:
            print(f"\n--- {place.name} of {folds} ---\n")
        resumed = init_from == "resume" and any(place.glob("ckpt*.pt"))
        if init_from == "resume" and not resumed:  # killed before its first checkpoint, it begins anew
            files = [one / "settings.json" for one in (place, folder / "fold1")]
            first = next((file for file in files if file.exists()), None)
            if first is None:
                raise UserError(f"{place}: no run to go on with: leave out --init_from=resume")
            then = json.loads(first.read_text(encoding="utf-8"))
            same_run(place, then, model_args, s)
            s.init_from = then["init_from"]
        found.append(fine_tune(place, *split, resumed, model_args, s))
    if not folds:
        return
    values = {name: np.array([one[name] for one in found], dtype=float)
              for name in found[0] if f"{name}_ci95" in found[0]}
    print(f"\n{folds} folds, mean and standard deviation:\n")
    for name, v in values.items():
        print(f"  {name:20} {v.mean():8.4f} +- {v.std(ddof=1):.4f}")
    scoring.write_json(folder / "metrics.json", {
        "task": task, "folds": folds, **{name: float(v.mean()) for name, v in values.items()},
        **{f"{name}_std": float(v.std(ddof=1)) for name, v in values.items()},
        **{f"{name}_folds": v.tolist() for name, v in values.items()}})


if __name__ == "__main__":
    launch(main, globals(), Config)
