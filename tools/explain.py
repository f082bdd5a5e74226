"""
Look inside a checkpoint: on what a prediction rests, where each head looks, what each layer would have said.

    python -m tools.explain                                              the newest run under out/
    python -m tools.explain --out_dir=out/small --start="import os, sys" a text of your own
    python -m tools.explain --start="x = [1, 2" --target="]"             why this token, or why not
    python -m tools.explain --out_dir=out/bert --start="import <|mask|>" a masked model: what fills the gap

The answer is one page, explain.html in the run's folder, that any browser reads, without network; and a short
form of it in the terminal.
"""
from __future__ import annotations

import base64
import codecs
import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

# before torch: Ctrl-C is silent from here on
from config import SettingError, UserError, at_least, launch, model_asked, needs_console

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from finetune import Tuned, collate, predict, warn
from lib.metrics import NUMBER_METRICS
from lib.run import has_bfloat16_units, newest_run, pick_device, strict, write_text
from lib.rows import Row
from lib.tasks import Task
from lib.tokenizer import Tokenizer
from model import Transformer
from sample import load, read_prompt

# -----------------------------------------------------------------------------
# Settings
out_dir: str = "out"  # a run's folder, or a folder of runs: the newest of them; a Hugging Face folder or id
init_from: str = "resume"  # the model in out_dir; else its folder or id, as --out_dir takes too
chars: str = ""  # of a nanoGPT checkpoint with few tokens: the text whose characters they are
start: str = "the cat sat on the mat, and the dog sat on the"  # the text; FILE:path reads it from a file
row: at_least(1) = 1  # of a table that FILE: names, with the columns of training
pair: str = ""  # the second text of a classifier of two, the context of a question
target: str = ""  # what to explain: a token behind the text or in its gap, a class, a word with a tag
samples: Optional[at_least(1)] = None  # masked copies that LIME is fitted to; None: 1000, or fewer if slow
seed: at_least(0, below=2**63) = 1337  # of their masks
device: str = "auto"  # auto: cuda, else mps, else cpu
# -----------------------------------------------------------------------------

BATCH = 32  # copies of the text that go through the model together
BUDGET = 3e11  # FLOP for LIME, and as many for integrated gradients: some seconds on two cores
MAPS = 2_600_000  # bytes of attention in the page; as text they are a third more
MOST = 512  # rows of a map of attention: of a longer text each stands for several tokens
GUESSED = 128  # tokens of a text, the last ones, whose guesses are shown; fewer by a large masked model


# -----------------------------------------------------------------------------
# Tokens that are parts of one character are shown, masked and added up as that character: a unit

class Units:
    """Which tokens belong together: lists of their places in a text, (T,) ids, one behind the other."""

    def __init__(self, tokenizer: Tokenizer, ids: list[int]):
        self.tokenizer, self.ids, self.places = tokenizer, ids, []
        decoder, inside = codecs.getincrementaldecoder("utf-8")("replace"), False
        for i, token in enumerate(ids):
            piece = b"".join(tokenizer.token_bytes[token:token + 1])  # none of a padded vocabulary
            if not (inside and piece):
                self.places.append([])
                decoder.reset()
            self.places[-1].append(i)
            decoder.decode(piece)
            inside = bool(decoder.getstate()[0])

    def names(self) -> list[str]:
        return [shown(self.tokenizer, *(self.ids[i] for i in places)) for places in self.places]

    def members(self, most: float = math.inf) -> torch.Tensor:
        """(U, T), 1 for the tokens of each unit; of more than `most`, neighbours are taken together."""
        width = math.ceil(len(self.places) / min(most, len(self.places)))
        found = torch.zeros(math.ceil(len(self.places) / width), len(self.ids))
        for n, places in enumerate(self.places):
            found[n // width, places] = 1
        return found


# -----------------------------------------------------------------------------
# What is explained

class Case(NamedTuple):
    """A text's token ids, (1, T), and what the model makes of them."""
    idx: torch.Tensor
    score: Callable  # (B, T) ids -> (B,), what the tokens are to explain
    answer: str  # what it is the score of
    facts: str  # more about it
    neutral: int  # the token that stands for none


@torch.no_grad()
def of_a_token(model: Transformer, tokenizer, text: str, target: str) -> Case:
    """A language model's logit of a token behind the text, or in its gap: of target, else the likeliest."""
    ids = tokenizer.prompt(text) if model.config.causal else tokenizer.encode(text, specials=True)
    tokenizer.tell(warn)
    most = model.config.block_size
    if model.config.causal:
        if len(ids) > most:  # as it writes
            print(f"(the model reads {most} tokens: the last {most // 2} of the text's {len(ids)})")
            ids = ids[-(most // 2):]
        at, neutral = -1, tokenizer.eot
    else:
        ids, _ = tokenizer.wrap(ids)
        if tokenizer.mask not in ids or len(ids) > most:
            raise UserError("--start: a masked model fills a gap: write its mask token there, <|mask|> or "
                            f"[MASK] for instance, in {most} tokens at most (here are {len(ids)})")
        at, neutral = ids.index(tokenizer.mask), tokenizer.mask
        if ids.count(neutral) > 1:
            print(f"(of {ids.count(neutral)} gaps the first)")
    idx = torch.tensor([ids], device=model.wte.weight.device)

    def logits(ids):  # (B, T) -> (B, V)
        return model.logits(model.hidden(ids)[:, at])

    probs = logits(idx)[0].softmax(-1)
    k = probs[:tokenizer.vocab_size].argmax().item()
    if target:
        k = token_of(tokenizer, target, model.config.causal)
    return Case(idx, lambda ids: logits(ids)[:, k], shown(tokenizer, k),
                f", probability {probs[k].item():.1%}", neutral)


def token_of(tokenizer: Tokenizer, target: str, goes_on: bool) -> int:
    """The token that --target is. One that goes on a text stands there as it is written, and `encode` may
    put a space before it."""
    found = tokenizer.encode(target, specials=True)
    if goes_on or len(found) != 1 or tokenizer.lost:
        exact = [k for k in range(tokenizer.vocab_size) if written(tokenizer, k) == target.encode()]
        if len(exact) > 1:  # a byte and a character
            usual = tokenizer.encode("a" + target)
            exact.sort(key=lambda k: k not in usual)
        found = exact[:1] or found * (not tokenizer.lost)
        tokenizer.lost.clear()
    if len(found) != 1:
        first = f", of which the first is {shown(tokenizer, found[0])!r}" if found else ""
        raise SettingError(f"--target={target!r}: one token is wanted; these are {len(found)}{first}")
    return found[0]


def of_a_task(tuned: Tuned, text: str, pair: str, target: str) -> Case:
    paired = tuned.task.head["paired"]
    if paired not in (None, bool(pair or (paired and "\n" in text))):
        raise SettingError(f"--pair={pair}: the model reads {'two texts' if paired else 'one text'}")
    return of_a_row(tuned, tuned.task.row("--start", text, pair or None), target)


@torch.no_grad()
def of_a_row(tuned: Tuned, row: Row, target: str) -> Case:
    """The sum of those of a fine-tuned model's outputs that the task says explain its answer, or a class."""
    task, tokenizer = tuned.task, tuned.task.tokenizer
    device, found = tuned.head.weight.device, []
    examples = task.examples([row])
    said, = predict(tuned, [row], examples=examples)
    for example in examples:  # several are windows of a long context
        inputs, _ = collate([example], task, device)
        inputs.pop("places", None)  # all outputs
        out = tuned(**inputs)[0].cpu().numpy()
        answer, places = task.explained(row, said, example, out, target)
        idx, segments = inputs["idx"], inputs["segments"]  # (1, T) each
        if places:
            value = out.flatten()[places].sum()
            found.append((value, answer, idx, partial(sum_of_outputs, tuned, places, segments)))
    if not found:
        raise UserError(f"{row.where}: nothing of it is read, so nothing can be explained")
    least = found[0][1] is None  # no answer: as the window says that is least sure of it
    _, answer, idx, score = (min if least else max)(found, key=lambda one: one[0])
    task.tell(warn)
    header, lines = task.table([row], [said])
    told = ("prediction", "score", f"prob_{answer}") if len(lines) == 1 else ()  # not a line a word
    facts = "".join(f", {name} {cell}" for name, cell in zip(header, lines[0]) if name in told)
    neutral = tokenizer.pad if tokenizer.mask is None else tokenizer.mask
    return Case(idx, score, "no answer" if least else answer.strip(), facts, neutral)


def sum_of_outputs(tuned: Tuned, places: list[int], segments: torch.Tensor, idx: torch.Tensor):
    """(B, T) ids -> (B,)"""
    return tuned(idx, None, segments.expand(len(idx), -1)).flatten(1)[:, places].sum(1)


# -----------------------------------------------------------------------------
# What it rests on

def stages(model: Transformer) -> list[torch.nn.Module]:
    return [*model.blocks, model.norm_f]


@contextlib.contextmanager
def watched(model: Transformer) -> Iterator[list[torch.Tensor]]:
    """A list that fills with the hidden states, (B, T, C): into each block, and into the last norm."""
    states = []
    with contextlib.ExitStack() as hooks:
        for stage in stages(model):
            hooks.enter_context(stage.register_forward_pre_hook(lambda _, args: states.append(args[0])))
        yield states


def work(model: Transformer, T: int) -> float:
    """FLOP of one text through the model. Attention waits for memory, as long as 240 FLOP a pair."""
    return T * model.flops_per_token() / 3 + 240 * T * T * model.config.n_head * model.config.n_layer


def attributions(model: Transformer, score: Callable, idx: torch.Tensor, neutral: int,
                 samples: Optional[int] = None, seed: int = 1337,
                 units: Optional[Units] = None) -> tuple[dict[str, torch.Tensor], float, str]:
    """What each unit adds to the score of a text, idx (1, T): four methods' answers, (U,) each.

    neutral: the token that stands for none. units: None if each token is one. Also returned: how much less a
    text of neutral tokens alone would score, and what the methods cost. They ask about what goes into the
    first block, not the embeddings: a norm may follow those, and then no gradient points along them.
    """
    T = idx.size(1)
    members = torch.eye(T) if units is None else units.members()
    forward, on_cpu = work(model, T), idx.device.type == "cpu"  # of one copy; its gradient is twice as much
    budget = BUDGET if on_cpu else 50 * BUDGET
    hurried = bool(on_cpu and 3 * 4 * forward > budget and has_bfloat16_units())  # 4: the fewest points
    in_bfloat16 = torch.autocast("cpu", torch.bfloat16, enabled=hurried)
    with torch.no_grad(), watched(model) as states:
        whole, nothing = score(torch.cat((idx, torch.full_like(idx, neutral)))).tolist()
    x, baseline = states[0].split(1)  # (1, T, C) each
    way, change = x - baseline, whole - nothing

    def score_from(x, n=0):  # if x, (B, T, C), went into stage n: (B,)
        with stages(model)[n].register_forward_pre_hook(lambda _, args: (x, *args[1:])):
            return score(idx.expand(len(x), -1))

    def slope(x, n=0):  # its gradient, (B, T, C)
        x = x.detach().requires_grad_()
        with in_bfloat16:
            return torch.autograd.grad(score_from(x, n).sum(), x)[0]

    def blends(shares):  # (n, T or 1) of the text, the rest neutral: (B, T, C), batch by batch
        return (torch.lerp(baseline, x, part.unsqueeze(-1)) for part in shares.to(x).split(BATCH))

    found = {"gradient x input": (way * slope(x)).sum(-1)[0]}

    # The gradient on average over the way from neutral to the text, times the way: the sum is the change of
    # the score (Sundararajan et al. 2017). More points where it is not yet: relu makes a way of many kinks.
    for points in (4, 8, 32, 128, 512, 2048):
        places, weights = torch.tensor(np.array(np.polynomial.legendre.leggauss(points)) / 2)
        slopes = torch.cat([slope(part) for part in blends(places.unsqueeze(1) + 0.5)])  # (points, T, C)
        average = torch.einsum("n,ntc->tc", weights.to(x), slopes)
        found["integrated gradients"] = (way[0] * average).sum(-1)
        off = abs(found["integrated gradients"].sum().item() - change)
        if points >= 32 and off <= 1e-3 * abs(change) or 3 * 4 * points * forward > budget:
            break

    # How far each hidden state, half way up, points to where the score rises: the gradient there, on average
    # over the tokens. Less than 0 is 0 (Selvaraju et al. 2017).
    half = len(states) // 2
    state = states[half][:1]  # (1, T, C)
    found["Grad-CAM"] = (state * slope(state, half).mean(1, keepdim=True)).sum(-1)[0].clamp(min=0)
    found = {method: members.double() @ values.detach().cpu().double() for method, values in found.items()}

    # Of a large model fewer copies, and of a long text neighbours are masked together: each has its share.
    copies = samples or min(1000, max(16, int(budget / forward)))
    runs = members if units is None else units.members(max(1, copies // 4))  # (R, T)
    with in_bfloat16:
        fitted = lime(lambda there: torch.cat([score_from(part) for part in blends(there @ runs.double())]),
                      len(runs), copies, seed)
    found["LIME"] = members.double() @ (runs.double().T @ (fitted / runs.double().sum(1)))
    told = f"integrated gradients at {points} points, LIME by {copies:,} copies"
    if len(runs) < len(members):
        told += f", in which {math.ceil(len(members) / len(runs))} neighbours are masked together"
    if hurried:
        told += "; in bfloat16"
    return found, change, told


@torch.no_grad()
def lime(score_with: Callable, R: int, samples: int, seed: int) -> torch.Tensor:
    """The weights, (R,), of a linear model of the score by which parts are there (Ribeiro et al. 2016).

    score_with: (n, R), 1 for a part that is there and 0 for one that is neutral, -> (n,). It is fitted to
    copies with few or many of them neutral; the nearer to the whole text, the more a copy counts.
    """
    rand = partial(torch.rand, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    there = (rand(samples, R) >= rand(samples, 1)).double()  # (n, R); any number of them as often
    scores = score_with(there).cpu().double()
    nearness = torch.exp(-(1 - there.mean(1, keepdim=True).sqrt()) ** 2 / 0.25 ** 2)  # (n, 1)
    columns = F.pad(there, (0, 1), value=1.0)  # and a constant
    fit = torch.linalg.lstsq(nearness.sqrt() * columns, nearness.sqrt() * scores.unsqueeze(1))
    return fit.solution[:-1, 0]


# -----------------------------------------------------------------------------
# What the model does inside

class AttentionMaps(TorchFunctionMode):
    """Inside `with`, keeps what the fused kernels never write down: each layer's weights, (B, H, T, S).

    kept: what is kept of them.
    """

    def __init__(self, kept: Callable = lambda weights: weights):
        super().__init__()
        self.kept, self.layers = kept, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k, _ = args
            each = torch.eye(k.size(2), dtype=q.dtype, device=q.device).expand(*k.shape[:3], -1)
            self.layers.append(self.kept(function(q, k, each, **kwargs)))  # the mix of unit vectors: weights
        return function(*args, **(kwargs or {}))


def habits(weights: torch.Tensor, ids: torch.Tensor) -> list[tuple[float, str]]:
    """Where most of each head's attention, (H, T, T), goes on this text: the share of it, and in words; 0 and
    "" if that is unclear."""
    T = len(ids)
    itself, same = torch.eye(T), (ids.unsqueeze(1) == ids).float().fill_diagonal_(0)
    places = {"itself": itself, "first token": itself[:1].expand(T, T), "same token": same,
              "previous token": itself.roll(1, 0).tril(), "next token": itself.roll(-1, 0).triu(),
              "after the same token": F.pad(same[:, :-1], (1, 0)).tril(-1)}  # an induction head
    causal = not weights.triu(1).any()
    seen = torch.ones(T, T).tril() if causal else torch.ones(T, T)
    found = [(0.0, "")] * len(weights)
    for name, there in places.items():
        rows = (there * seen).any(1) & (torch.arange(T) > 1)  # the first two have little choice
        if not rows.any():
            continue
        there = there * rows.unsqueeze(1) / rows.sum()
        chance = (F.normalize(seen, p=1) * there).sum().item()
        for head, share in enumerate((weights.flatten(1) @ there.flatten()).tolist()):
            if share > max(found[head][0], 0.3, 2 * chance):
                found[head] = share, f"{name} {share:.0%}"
    return found


def written(tokenizer: Tokenizer, token: int) -> bytes:
    """Its text; of a WordPiece that goes on a word with the sign of that, ##ing."""
    if tokenizer.spaced:
        return tokenizer.decode([token]).encode()
    return b"".join(tokenizer.token_bytes[token:token + 1])  # none of a padded vocabulary


def shown(tokenizer: Tokenizer, *tokens: int) -> str:
    """The text of a token, or of several, in which line breaks and parts of characters can be seen."""
    special = {i: name.encode() for name, i in tokenizer.specials.items()}
    pieces = [special.get(i) or written(tokenizer, i) for i in tokens]
    text = b"".join(pieces).decode("utf-8", "backslashreplace")
    text = text.replace("\n", "\u21b5").replace("\t", "\u21e5")
    return text if text.isprintable() else ascii(text)[1:-1]


@torch.no_grad()
def guesses(model: Transformer, idx: torch.Tensor, units: Units, mask: Optional[int]) -> list[dict]:
    """For each unit of a text, (1, T): its probability, rank and surprisal in bits; the likeliest there; and
    the likeliest by each layer, were it the last (the logit lens, nostalgebraist 2020).

    A causal model guesses what comes next, so nothing at first, and one token more in the end; a masked one
    guesses each unit, masked. Of a unit of several tokens: bits add up, and the likeliest is its first token.
    """
    causal, found = model.config.causal, []
    name = partial(shown, units.tokenizer)
    most = GUESSED if causal else min(GUESSED, max(8, int(BUDGET / work(model, idx.size(1)))))
    first = max(0, len(units.places) - most)
    todo = list(zip(units.names(), units.places))[first:]
    if causal:
        if first == 0:
            found.append({"at": 0, "token": todo.pop(0)[0], "best": [], "lens": []})
            first = 1
        todo.append(("?", [idx.size(1)]))

    def named(probs, tokens):
        return [[name(token), p] for token, p in zip(tokens.tolist(), probs.tolist())]

    for n, (token, places) in enumerate(todo):
        at = torch.tensor(places, device=idx.device)
        if n == 0 or not causal:
            with watched(model) as states:
                model.hidden(idx if causal else idx.index_fill(1, at, mask))
        x = torch.stack([state[0, at - int(causal)] for state in states])  # (L + 1, k, C)
        probs = model.logits(model.norm_f(x)).softmax(-1)  # (L + 1, k, V)
        row = {"at": first + n, "token": token, "best": named(*probs[-1, 0].topk(6)),
               "lens": named(*probs[:, 0].max(-1))}
        if token != "?" and (causal or idx[0, places[0]] != mask):
            p = probs[-1].gather(1, idx[0, at].unsqueeze(1))  # (k, 1)
            bits = -p.log2().sum().item()
            rank = int((probs[-1] > p).sum()) + 1 if len(places) == 1 else None
            row |= {"p": 2 ** -bits, "rank": rank, "bits": bits}
        elif token != "?":
            row["token"] = "?"
        found.append(row)
    return found


# -----------------------------------------------------------------------------

def main():
    origin = model_asked(globals())
    model, tokenizer = load(origin, pick_device(device), chars=chars)
    body = getattr(model, "body", model)
    task = getattr(model, "task", None)
    speaks = not task or task.writes
    file = start.removeprefix("FILE:") if task and start.startswith("FILE:") else ""
    is_table = bool(file) and task.holds_rows(file)
    text = "" if is_table else read_prompt(start)
    if file:
        text = text.removesuffix("\n")
    if row != 1 and not is_table:
        raise SettingError(f"row={row}: only a table has rows, which --start=FILE: gives to a task")
    if pair and (is_table or not task):
        what = f"{file} has its own" if is_table else "a model without a task reads one text"
        raise SettingError(f"pair={pair}: {what}: leave it out")
    if is_table:
        one = row_of(task, file)
    if speaks and task:
        text = task.prompt(one.text, one.pair) if is_table else task.prompt(text, pair)
    if is_table and not speaks:
        case = of_a_row(model, one, target)
    elif not speaks:
        case = of_a_task(model, text, pair, target)
    elif body.head is None:
        raise UserError(f"{origin}: an encoder without a head for tokens predicts nothing to explain")
    else:
        case = of_a_token(body, tokenizer, text, target)
    found = look_inside(body, tokenizer, case, speaks)
    print_short(found)
    folder = newest_run(Path(origin))
    is_ours = folder.is_dir() and os.access(folder, os.W_OK)  # not another's, to be read alone
    page = (folder if is_ours else Path()) / "explain.html"
    template = Path(__file__).with_name("explain.html").read_text(encoding="utf-8")
    data = json.dumps(found, ensure_ascii=False).replace("<", "\\u003c")  # no token ends the script
    write_text(page, template.replace("DATA", data))
    print(f"\n{page}: all of it, for a browser")


def row_of(task: Task, file: str) -> Row:
    """The one that was asked for, which is said."""
    _, rows = task.to_answer(file, task.head["columns"])
    one = next(itertools.islice(rows, row - 1, None), None)
    if one is None:
        raise SettingError(f"row={row}: {file} has not so many")
    print(f"({one.where}: --row for another)")
    return one


def look_inside(model: Transformer, tokenizer, case: Case, speaks: bool) -> dict:
    """All that the page shows: plain values."""
    idx, units = case.idx, Units(tokenizer, case.idx[0].tolist())
    methods, change, told = attributions(model, case.score, idx, case.neutral, samples, seed, units)
    rows = units.members(MOST).to(idx.device)  # (R, T)
    with torch.no_grad(), AttentionMaps(lambda weights: merged(weights[0], rows)) as maps:
        value = case.score(idx).item()
    total = methods["integrated gradients"].sum().item()
    spearman = NUMBER_METRICS["spearman"]
    agreement = [[spearman(a.numpy(), b.numpy()) for b in methods.values()] for a in methods.values()]
    names = units.names()
    width = math.ceil(len(names) / len(rows))
    seen = ["".join(names[i:i + width]) for i in range(0, len(names), width)]
    return strict({
        "title": f"{model_asked(globals())}: {len(model.blocks)} layers, {model.config.n_head} heads",
        "summary": f"output {value:.3f}{case.facts}; {change:+.4f} against a text of "
                   f"{shown(tokenizer, case.neutral)} alone; integrated gradients add up to {total:+.4f}, "
                   f"{abs(total - change) / max(abs(change), 1e-9):.2%} off; {told}",
        "token": case.answer, "tokens": names, "seen": seen,
        "said": guesses(model, idx, units, tokenizer.mask) if speaks else [],
        "methods": {method: [float(f"{value:.6g}") for value in one] for method, one in methods.items()},
        "agreement": agreement, "heads": heads_of(maps.layers, seen)})


def merged(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A layer's attention, (H, T, T), between the tokens of each row, (R, T): (H, R, R) on the CPU."""
    return (rows / rows.sum(1, keepdim=True) @ weights.float() @ rows.T).cpu()


def heads_of(layers: list[torch.Tensor], seen: list[str]) -> list[dict]:
    """Each head of the layers, (H, R, R): its habit, and its weights as bytes in base64. If the page has no
    room for all: of those with the clearest habits, which come first."""
    ids = torch.tensor([seen.index(token) for token in seen])
    found = []
    for n, layer in enumerate(layers):
        for h, (share, habit) in enumerate(habits(layer, ids)):
            found.append({"layer": n, "head": h, "habit": habit, "share": share})
    room = max(1, MAPS // len(seen) ** 2)
    if room < len(found):
        found.sort(key=lambda head: -head["share"])
    for head in found[:room]:
        weights = layers[head["layer"]][head["head"]]
        head["weights"] = base64.b64encode((weights * 255).round().byte().numpy().tobytes()).decode()
    return found


def print_short(found: dict) -> None:
    """What of it fits a terminal."""
    tokens, methods = found["tokens"], found["methods"]
    wide = max(map(len, tokens))
    said = {row["at"]: row for row in found["said"]}
    print(f"{found['title']}\n\n{'token':>{wide}}  {'   bits   rank  ' * bool(said)}" + "  ".join(methods))
    for i, token in enumerate(tokens):
        row = said.get(i, {})
        cells = [f"{row['bits']:7.2f} {row['rank'] or '':>6}" if "bits" in row else " " * 14] if said else []
        cells += [f"{values[i]:{len(method)}.3f}" for method, values in methods.items()]
        print(f"{token:>{wide}}", *cells, sep="  ")
    print(f"\nexplained: {found['token']!r}, {found['summary']}\n\nrank agreement (Spearman)")
    for method, row in zip(methods, found["agreement"]):
        print(f"{method:>22}" + "".join(f"{math.nan if value is None else value:7.2f}" for value in row))
    heads = sorted(found["heads"], key=lambda head: (head["layer"], head["head"]))
    print("\nwhat heads do on this text")
    for n, layer in itertools.groupby(heads, key=lambda head: head["layer"]):
        said = [f"head {head['head']}: {head['habit']}" for head in layer if head["habit"]]
        print(f"layer {n:2}  {',  '.join(said) or '-'}")
    drawn = sum("weights" in head for head in heads)
    if drawn < len(heads):
        print(f"(the page shows {drawn} of the {len(heads)} heads: those with the clearest habits)")


if __name__ == "__main__":
    needs_console()
    launch(main, globals())
