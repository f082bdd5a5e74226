"""
Look inside a checkpoint: on what a prediction rests, where each head looks, what each layer would have said.

    python explain.py                                              the newest run under out/
    python explain.py --out_dir=out/small --start="import os, sys" a text of your own
    python explain.py --start="x = [1, 2" --target="]"             why this token, or why not
    python explain.py --out_dir=out/bert --start="import <|mask|>" a masked model: what it puts into the gap

The answer is one page, explain.html in the run's folder, that any browser reads, without network; and a short
form of it in the terminal.
"""
import base64
import contextlib
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from checkpoint import write_text
from config import SettingError, UserError, run
from finetune import Row, Task, Tuned, task_of
from model import Transformer
from sample import build, newest_run, read_prompt, read_run
from tokenizer import HubTokenizer, Tokenizer
from train import pick_device

# -----------------------------------------------------------------------------
# Settings
out_dir: str = "out"  # a run's folder, or a folder of runs: the newest of them; a Hugging Face folder or id
start: str = "the cat sat on the mat, and the dog sat on the"  # the text; FILE:path reads it from a file
pair: str = ""  # the second text of a classifier of two, the context of a question
target: str = ""  # what to explain: a token behind the text or in its gap, or a class; empty: the likeliest
samples: int = 1000  # masked copies of the text that LIME is fitted to
seed: int = 1337  # of their masks
device: str = "auto"  # auto: cuda, else mps, else cpu
# -----------------------------------------------------------------------------

BATCH = 32  # copies of the text that go through the model together
LONGEST = 128  # tokens looked at; of a longer text, the last ones
Score = Callable[[torch.Tensor], torch.Tensor]  # (B, T) token ids -> (B,): the number to be explained


@contextlib.contextmanager
def watched(model: Transformer) -> Iterator[list[torch.Tensor]]:
    """A list that fills with the hidden states, (B, T, C): into the first block, and out of each."""
    states = []
    handles = [model.blocks[0].register_forward_pre_hook(lambda block, args: states.append(args[0])),
               *(one.register_forward_hook(lambda block, args, x: states.append(x)) for one in model.blocks)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


class AttentionMaps(TorchFunctionMode):
    """Inside `with`, keeps what the fused kernels never write down: each layer's weights, (B, H, T, S)."""

    def __init__(self):
        super().__init__()
        self.layers = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.layers.append(attention_weights(*args, **kwargs))
        return function(*args, **(kwargs or {}))


def attention_weights(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """softmax(q k / sqrt(D)), by the arguments of scaled_dot_product_attention."""
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)  # grouped heads share theirs
    scores = q @ k.transpose(-2, -1) * (scale or q.size(-1) ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    return scores.softmax(-1)


# On what does a score rest? Four answers, each (T,): what a token adds to it, against a neutral one there.
# x and baseline, (1, T, C), are what goes into the first block, for the text and for as many neutral tokens:
# not the embeddings, for a norm may follow, and then no gradient points along them. score_at takes such x,
# (n, T, C) -> (n,).

def gradient(score_at, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(score_at(x).sum(), x)[0]


def integrated_gradients(score_at, x: torch.Tensor, baseline: torch.Tensor) -> tuple[torch.Tensor, float]:
    """x - baseline times the gradient, on average over the way between them (Sundararajan et al. 2017).

    Also the change of the score from the one to the other, which the sum equals: the way is looked at ever
    more closely until it does, to a thousandth.
    """
    with torch.no_grad():
        change = score_at(torch.cat((baseline, x))).diff().item()
    for points in (32, 128, 512, 2048):  # more for a path with many kinks, as relu makes them
        rule = np.polynomial.legendre.leggauss(points)  # Gauss's places, from -1 to 1, and their weights
        places, weights = torch.tensor(np.stack(rule), dtype=torch.float32, device=x.device) / 2
        ways = (baseline + (part.view(-1, 1, 1) + 0.5) * (x - baseline) for part in places.split(BATCH))
        slopes = torch.cat([gradient(score_at, way) for way in ways])  # (points, T, C)
        found = ((x - baseline) * (weights.view(-1, 1, 1) * slopes).sum(0)).sum(-1)[0]
        if abs(found.sum().item() - change) <= 1e-3 * abs(change):
            break
    return found, change


def grad_cam(model: Transformer, score_at, x: torch.Tensor) -> torch.Tensor:
    """How far each token's hidden state, half way up, lies in the direction that raises the score.

    The direction is the gradient there, on average over the tokens; less than 0 is 0 (Selvaraju et al. 2017).
    """
    x = x.detach().requires_grad_()
    with watched(model) as states:
        value = score_at(x).sum()
    state = states[len(states) // 2]
    slopes = torch.autograd.grad(value, state)[0]
    return (state * slopes.mean(1, keepdim=True)).sum(-1)[0].detach().clamp(min=0)


@torch.no_grad()
def lime(score_at, x: torch.Tensor, baseline: torch.Tensor, samples: int, seed: int) -> torch.Tensor:
    """The weights of a linear model of the score, by which tokens are there (Ribeiro et al. 2016).

    Fitted to copies with few or many tokens neutral; the nearer to the whole text, the more a copy counts.
    """
    T, generator = x.size(1), torch.Generator().manual_seed(seed)
    missing = torch.randint(0, T + 1, (samples, 1), generator=generator)
    there = (torch.rand(samples, T, generator=generator).argsort(1).argsort(1) >= missing).double()  # (n, T)
    shares = there.float().to(x.device).unsqueeze(-1)  # of each token's own vector, (n, T, 1)
    mixed = (torch.lerp(baseline, x, part) for part in shares.split(BATCH))
    scores = torch.cat([score_at(part) for part in mixed]).cpu().double()
    weights = torch.exp(-(1 - there.mean(1).sqrt()) ** 2 / 0.25 ** 2)
    columns = F.pad(there, (0, 1), value=1.0)  # and a constant
    gram = columns.T @ (weights.unsqueeze(1) * columns) + 1e-6 * torch.eye(T + 1)  # a slight ridge
    return torch.linalg.solve(gram, columns.T @ (weights * scores))[:-1]


def attributions(model: Transformer, score: Score, idx: torch.Tensor, neutral: int, samples: int = 1000,
                 seed: int = 1337) -> tuple[dict[str, torch.Tensor], float]:
    """Each method's answer, (T,), for any score of a text, idx (1, T), that a gradient goes through.

    neutral: the token that stands for none. Also by how much it would change the score in all places.
    """
    def score_at(x):
        handle = model.blocks[0].register_forward_pre_hook(lambda block, args: (x, *args[1:]))
        try:
            return score(idx.expand(len(x), -1))
        finally:
            handle.remove()

    with torch.no_grad(), watched(model) as states:
        score(torch.cat((idx, torch.full_like(idx, neutral))))
    x, baseline = states[0].split(1)
    path, change = integrated_gradients(score_at, x, baseline)
    found = {"gradient x input": ((x - baseline) * gradient(score_at, x)).sum(-1)[0],
             "integrated gradients": path,
             "Grad-CAM": grad_cam(model, score_at, x),
             "LIME": lime(score_at, x, baseline, samples, seed)}
    return {method: values.cpu().double() for method, values in found.items()}, change


def rank_agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's: 1 where both put the tokens in the same order, -1 in the opposite; 0 where one has none."""
    ranks = [torch.sign(v.unsqueeze(1) - v).sum(1) for v in (a, b)]  # how many are below, less those above
    return F.cosine_similarity(*ranks, dim=0).item()


def habit(weights: torch.Tensor, ids: torch.Tensor) -> str:
    """Where most of a head's attention, (T, T), goes on this text, and how much; empty where that is unclear.
    """
    T, same = len(ids), (ids.unsqueeze(1) == ids).fill_diagonal_(False)
    previous = torch.diag(torch.ones(T - 1), -1)
    habits = {"itself": torch.eye(T), "previous token": previous, "next token": previous.T,
              "first token": torch.eye(T)[:1].expand(T, T), "same token": same,
              "after the same token": F.pad(same[:, :-1], (1, 0)).tril(-1)}  # an induction head
    seen = torch.ones(T, T) if weights.triu(1).any() else torch.ones(T, T).tril()
    even = seen / seen.sum(1, keepdim=True)
    shares = {}
    for name, places in habits.items():
        rows = ((places * seen).sum(1) > 0) & (torch.arange(T) > 1)  # the first two have little choice
        share, chance = ((one * places).sum(1)[rows].mean().item() for one in (weights, even))
        if share > max(0.3, 2 * chance):  # never where there are no such places: NaN
            shares[name] = share
    best = max(shares, key=shares.get, default=None)
    return f"{best} {shares[best]:.0%}" if best else ""


@torch.no_grad()
def states_of_guesses(model, idx, segments, mask: Optional[int]) -> torch.Tensor:
    """The hidden states in which the model guesses a token: (L + 1, T, C), into the first block, out of each.

    A causal model guesses, at each place, the next token; a masked one that token itself, masked.
    """
    places = torch.arange(idx.size(1), device=idx.device)
    if model.config.causal:
        with watched(model) as states:
            model.hidden(idx)
        return torch.cat(states)
    copies = torch.where(places.unsqueeze(1) == places, mask, idx)  # (T, T), each with a gap of its own
    found = []
    for part in places.split(BATCH):
        with watched(model) as states:
            model.hidden(copies[part], segments=segments.expand(len(part), -1))
        found.append(torch.stack(states)[:, torch.arange(len(part), device=part.device), part])
    return torch.cat(found, dim=1)


@torch.no_grad()
def guesses(model, states: torch.Tensor, actual: list[Optional[int]], name: Callable) -> list[dict]:
    """For each place: the actual token's probability, rank and surprisal in bits; the likeliest tokens; and
    the likeliest by each layer, were it the last (the logit lens, nostalgebraist 2020)."""
    found = []
    for i, token in enumerate(actual):
        probs = model.logits(model.norm_f(states[:, i])).softmax(-1)  # (L + 1, V)
        row = {key: [[name(t), p] for p, t in zip(values.tolist(), tokens.tolist())]
               for key, (values, tokens) in (("best", probs[-1].topk(6)), ("lens", probs.max(-1)))}
        if token is not None:
            p = probs[-1, token]
            row |= {"p": p.item(), "rank": int((probs[-1] > p).sum()) + 1, "bits": -p.log2().item()}
        found.append(row)
    return found


def shown(tokenizer: Tokenizer | HubTokenizer, token: int) -> str:
    """A token's text, in which line breaks and parts of characters can be seen."""
    special = next((name for name, i in tokenizer.specials.items() if i == token), None)
    if special or token >= len(tokenizer.token_bytes):
        return special or f"<{token}>"
    text = tokenizer.token_bytes[token].decode("utf-8", "backslashreplace")
    text = text.replace("\n", "\u21b5").replace("\t", "\u21e5")
    return text if text.isprintable() else ascii(text)[1:-1]


class Subject(NamedTuple):
    """What is to be explained: a score of a text by a model."""
    idx: torch.Tensor  # (1, T) token ids
    segments: torch.Tensor  # (1, T), to which of two texts each belongs
    score: Score
    what: str  # has this score
    facts: str  # more about it
    neutral: int  # the token that stands for none
    place: int  # where the page's reader looks first


def next_or_masked_token(model, tokenizer, text: str, target: str) -> Subject:
    """A language model's logit of a token behind the text, or in its gap: of target, else the likeliest."""
    ids, most = tokenizer.encode(text, specials=True), min(LONGEST, model.config.block_size)
    if model.config.causal:
        if len(ids) > most:
            print(f"(the last {most} of the text's {len(ids)} tokens)")
        ids = ids[-most:] or [tokenizer.eot]
        kinds, at, neutral = [0] * len(ids), len(ids) - 1, tokenizer.eot
    else:
        ids, kinds = tokenizer.wrap(ids)
        if tokenizer.mask not in ids or len(ids) > most:
            raise UserError("--start: a masked model fills a gap: write its mask token there, <|mask|> or "
                            f"[MASK] for instance, in {most} tokens at most (here are {len(ids)})")
        at, neutral = ids.index(tokenizer.mask), tokenizer.mask
    idx, segments = (torch.tensor([row], device=model.wte.weight.device) for row in (ids, kinds))

    def logits(ids):  # (B, T) -> (B, V)
        return model.logits(model.hidden(ids, segments=segments.expand(len(ids), -1))[:, at])

    with torch.no_grad():
        probs = logits(idx)[0].softmax(-1)
    wanted = tokenizer.encode(target, specials=True) or [probs[:tokenizer.vocab_size].argmax().item()]
    names = [shown(tokenizer, token) for token in wanted]
    if len(wanted) > 1:
        raise SettingError(f"--target={target}: one token is wanted, not {len(wanted)}: {names}")
    return Subject(idx, segments, lambda ids: logits(ids)[:, wanted[0]], names[0],
                   f"probability {probs[wanted[0]].item():.1%}", neutral, at + model.config.causal)


def task_s_answer(tuned: Tuned, task: Task, text: str, pair: str, target: str) -> Subject:
    """A fine-tuned model's score of a class or a number, or of the answer's first and last token together."""
    if task.head["task"] == "tag" or task.head["apart"]:
        raise UserError("--out_dir: a model that tags words, or reads two texts apart, is not explained")
    qa = task.head["task"] == "qa"
    row = Row("--start", text, pair or ("" if qa else None), [("", 0)] if qa else None)
    example = task.examples([row])[0]
    idx, segments = (torch.tensor([row], device=tuned.head.weight.device) for row in example.parts[0])

    def outputs(ids):  # (B, T) -> (B, K) of classes, or (B, T, 2) of an answer's ends
        return tuned(ids, None, segments.expand(len(ids), -1))

    with torch.no_grad():
        out = outputs(idx)[0]
    tokenizer = task.tokenizer
    neutral = tokenizer.pad if tokenizer.mask is None else tokenizer.mask
    if qa:
        places = torch.tensor(example.places, device=idx.device)
        first = places[out[places, 0].argmax()].item()
        last = places[places >= first][out[places[places >= first], 1].argmax()].item()
        answer = tokenizer.decode(idx[0, first:last + 1].tolist()).strip()
        return Subject(idx, segments, lambda ids: outputs(ids)[:, [first, last], [0, 1]].sum(1), answer,
                       "the answer", neutral, first)
    if target and target not in task.number:
        raise SettingError(f"--target={target}: the classes are {', '.join(task.labels)}")
    k = task.number[target] if target else out.argmax().item()
    answer = task.answers([None], [example], [out.cpu().numpy()])[0]  # probabilities, or a number
    facts = f"probability {answer[k]:.1%}" if len(out) > 1 else f"that is {answer:.3f}"
    return Subject(idx, segments, lambda ids: outputs(ids)[:, k], task.labels[k], facts, neutral, 0)


def main():
    if samples < 1:
        raise SettingError(f"--samples={samples}: must be at least 1")
    checkpoint, where, text = read_run(out_dir), pick_device(device), read_prompt(start)
    speaks = checkpoint is None or checkpoint.get("head", {"task": "lm"})["task"] == "lm"
    if speaks:
        model, tokenizer = build(out_dir, checkpoint, where, torch.float32)
        if model.head is None:
            raise UserError(f"{out_dir}: an encoder without a head for tokens predicts nothing to explain")
        subject = next_or_masked_token(model, tokenizer, text, target)
    else:
        tuned, task = task_of(checkpoint, where)
        model, tokenizer = tuned.body, task.tokenizer
        subject = task_s_answer(tuned, task, text, pair, target)
    idx, segments, score, what, facts, neutral, place = subject
    ids, causal, name = idx[0].tolist(), model.config.causal, partial(shown, tokenizer)
    methods, change = attributions(model, score, idx, neutral, samples, seed)
    total = methods["integrated gradients"].sum().item()
    with torch.no_grad(), AttentionMaps() as maps:
        value = score(idx).item()

    # What it says at each place. Before the first token, a causal model has said nothing.
    said = [{"best": [], "lens": []}] if causal and speaks else []
    actual = [*ids[1:], None] if causal else [None if i == tokenizer.mask else i for i in ids]
    if speaks:
        said += guesses(model, states_of_guesses(model, idx, segments, tokenizer.mask), actual, name)
    heads = [[{"habit": habit(head, idx[0].cpu()),
               "weights": base64.b64encode((head * 255).round().byte().numpy().tobytes()).decode()}
              for head in layer[0].float().cpu()] for layer in maps.layers]
    found = {
        "title": f"{out_dir}: {len(model.blocks)} layers, {model.config.n_head} heads",
        "summary": f"logit {value:.3f}, {facts}; were all tokens {name(neutral)}, the logit would be "
                   f"{change:.4f} less; integrated gradients add up to {total:.4f}, "
                   f"{abs(total - change) / max(abs(change), 1e-9):.2%} off",
        "tokens": [name(i) for i in ids], "token": what, "place": place, "said": said,
        "methods": {method: values.tolist() for method, values in methods.items()}, "heads": heads,
        "agreement": [[rank_agreement(a, b) for b in methods.values()] for a in methods.values()]}

    # The short form, and the page.
    wide = max(map(len, found["tokens"]))
    print(f"{found['title']}\n\n{'token':>{wide}}     bits   rank  " + "  ".join(methods))
    for i, (text, row) in enumerate(zip(found["tokens"], said or [{}] * len(ids))):
        guess = f"{row['bits']:7.2f} {row['rank']:6}" if "bits" in row else " " * 14
        print(f"{text:>{wide}}  {guess}  "
              + "  ".join(f"{values[i].item():{len(method)}.3f}" for method, values in methods.items()))
    print(f"\nexplained: {what!r}, {found['summary']}\n\nrank agreement (Spearman)")
    for method, row in zip(methods, found["agreement"]):
        print(f"{method:>22}" + "".join(f"{value:7.2f}" for value in row))
    print("\nwhat heads do on this text")
    for n, layer in enumerate(heads):
        habits = [f"head {h}: {head['habit']}" for h, head in enumerate(layer) if head["habit"]]
        print(f"layer {n:2}  {',  '.join(habits) or '-'}")
    folder = newest_run(Path(out_dir))
    file = (folder if folder.is_dir() else Path()) / "explain.html"
    data = json.dumps(found, ensure_ascii=False).replace("<", "\\u003c")  # no token ends the script
    write_text(file, PAGE.replace("DATA", data))
    print(f"\n{file}: all of it, for a browser")


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Look inside</title>
<style>
:root { color-scheme: light dark; --ink: #1d2129; --paper: #fff; --soft: #68707c; --line: #d9dde3;
        --for: 20, 120, 210; --against: 215, 95, 20 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --paper: #15181d; --soft: #98a1ae;
        --line: #343a44; --for: 70, 150, 240; --against: 230, 120, 50 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
       max-width: 56rem; padding: 0 1rem }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem }
h3 { font-size: 1rem; margin: .8rem 0 .2rem } p, figcaption { margin: 0 0 .6rem; color: var(--soft) }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 2rem }
#heads { display: grid; gap: .3rem; overflow-x: auto }
figure { margin: 3px; font-size: .75rem; cursor: pointer } figcaption { margin: 0 }
canvas { width: 100%; image-rendering: pixelated; outline: 1px solid var(--line) }
.on canvas { outline: 2px solid rgb(var(--for)) }
button { all: unset; font: 14px/1.7 ui-monospace, Consolas, monospace; white-space: pre; padding: 0 1px;
         margin: 0 1px 1px 0; border-radius: 3px; box-shadow: inset 0 0 0 1px var(--line); cursor: pointer }
button.on, button:focus-visible { box-shadow: inset 0 0 0 2px var(--ink) }
table { font-size: .85rem } td { padding-right: .7rem } td:first-child { color: var(--soft) }
code { white-space: pre }
</style>
<h1></h1><p id="title"></p>
<h2>What the prediction rests on</h2>
<p>Blue speaks for it, orange against; <span id="summary"></span>.</p>
<div class="two" id="methods"></div><h3>Rank agreement</h3><div id="agreement"></div>
<h2>Where the heads look</h2>
<p>A square's row is a token, a column one that it looks at. Click on a head, then point at a token.</p>
<div id="heads"></div><h3 id="head"></h3><div id="looks"></div>
<section id="guesses"><h2>Token by token</h2>
<p>The stronger the colour, the more bits of surprise. Point at a token: what was likely there, and what each
layer would have said, were it the last.</p>
<div id="tokens"></div><div class="two" id="said"></div></section>
<script>
const D = DATA
const T = D.tokens.length, at = id => document.getElementById(id)
const make = (tag, ...inside) => { const e = document.createElement(tag); e.append(...inside); return e }
const table = rows => make('table', ...rows.map(row => make('tr', ...row.map(cell => make('td', cell)))))
const colour = v => `rgba(var(--${v < 0 ? 'against' : 'for'}), ${Math.abs(v)})`
const percent = p => (100 * p).toFixed(1) + '%'

// the text as buttons: their shades from -1 to 1, their titles, and what to do when one is pointed at
function text(box, tokens, shades, titles, point) {
  box.replaceChildren(...tokens.flatMap((token, i) => {
    const button = make('button', token || ' ')
    button.style.background = colour(shades[i] ?? 0)
    button.title = titles[i] ?? ''
    if (point) button.onmouseenter = button.onfocus = button.onclick = () => {
      for (const other of box.children) other.classList.toggle('on', other === button)
      point(i)
    }
    return token.includes('\\u21b5') ? [make('br'), button] : [button]
  }))
  return [...box.querySelectorAll('button')]
}

document.querySelector('h1').textContent = `Why \\u201c${D.token}\\u201d?`
for (const id of ['title', 'summary']) at(id).textContent = D[id]
for (const [method, values] of Object.entries(D.methods)) {
  const most = Math.max(...values.map(Math.abs)) || 1, box = make('div')
  text(box, D.tokens, values.map(v => Math.sign(v) * Math.sqrt(.8 * Math.abs(v) / most)), values)
  at('methods').append(make('div', make('h3', method), box))
}
const names = Object.keys(D.methods)
at('agreement').append(table([['', ...names], ...D.agreement.map((row, i) =>
  [names[i], ...row.map(v => v.toFixed(2))])]))

let row = T - 1  // whose attention is shown
at('heads').style.gridTemplateColumns = `repeat(${D.heads[0].length}, minmax(5rem, 7rem))`
D.heads.forEach((layer, l) => layer.forEach((head, h) => {
  const weights = Uint8Array.from(atob(head.weights), c => c.charCodeAt(0))
  const canvas = make('canvas'), pixels = new ImageData(T, T)
  canvas.width = canvas.height = T
  weights.forEach((w, i) => pixels.data.set([45, 135, 225, 255 * Math.sqrt(w / 255)], 4 * i))
  canvas.getContext('2d').putImageData(pixels, 0, 0)
  const figure = make('figure', canvas, make('figcaption', `${l}.${h} ${head.habit}`))
  figure.onclick = () => {
    for (const other of at('heads').children) other.classList.toggle('on', other === figure)
    at('head').textContent = `Layer ${l}, head ${h}${head.habit && ': ' + head.habit}`
    const buttons = text(at('looks'), D.tokens, [], [], i => buttons.forEach((button, j) => {
      const w = weights[(row = i) * T + j] / 255
      button.style.background = colour(w)
      button.title = percent(w)
    }))
    buttons[row].onclick()
  }
  at('heads').append(figure)
}))
at('heads').firstChild.onclick()

const bits = D.said.map(s => s.bits ?? 0), most = Math.max(...bits, 8)
const titles = bits.map(b => b.toFixed(2) + ' bits')
const places = D.said.length > T ? [...D.tokens, '?'] : D.tokens
if (D.said.length === 0) at('guesses').remove()  // of a model that does not speak
else text(at('tokens'), places, bits.map(b => b / most), titles, i => {
  const s = D.said[i], facts = s.bits == null ? '' : ` (this: rank ${s.rank}, ${percent(s.p)}, ${titles[i]})`
  const guesses = table(s.best.map(([token, p]) => [make('code', token), percent(p)]))
  const lens = table(s.lens.map(([token, p], l) =>
    [l ? `block ${l - 1}` : 'embedding', make('code', token), percent(p)]))
  at('said').replaceChildren(make('div', make('h3', 'The likeliest' + facts), guesses),
                             make('div', make('h3', 'Layer by layer'), lens))
})[D.place].onclick()
</script>
</html>
"""

if __name__ == "__main__":
    run(main, globals())
