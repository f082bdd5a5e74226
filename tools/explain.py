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
import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from config import SettingError, UserError, at_least, launch, needs_console
from finetune import Tuned, collate, predict, warn
from lib.run import newest_run, pick_device, write_text
from lib.tokenizer import Tokenizer
from model import Transformer
from sample import load, read_prompt

# -----------------------------------------------------------------------------
# Settings
out_dir: str = "out"  # a run's folder, or a folder of runs: the newest of them; a Hugging Face folder or id
start: str = "the cat sat on the mat, and the dog sat on the"  # the text; FILE:path reads it from a file
pair: str = ""  # the second text of a classifier of two, the context of a question
target: str = ""  # what to explain: a token behind the text or in its gap, or a class; empty: the likeliest
samples: at_least(1) = 1000  # masked copies of the text that LIME is fitted to
seed: at_least(0, below=2**63) = 1337  # of their masks
device: str = "auto"  # auto: cuda, else mps, else cpu
# -----------------------------------------------------------------------------

BATCH = 32  # copies of the text that go through the model together
LONGEST = 128  # tokens looked at; of a longer text, the last ones


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
    most = min(LONGEST, model.config.block_size)
    if model.config.causal:
        if len(ids) > most:
            print(f"(the last {most} of the text's {len(ids)} tokens)")
        ids = ids[-most:]
        at, neutral = -1, tokenizer.eot
    else:
        ids, _ = tokenizer.wrap(ids)
        if tokenizer.mask not in ids or len(ids) > most:
            raise UserError("--start: a masked model fills a gap: write its mask token there, <|mask|> or "
                            f"[MASK] for instance, in {most} tokens at most (here are {len(ids)})")
        at, neutral = ids.index(tokenizer.mask), tokenizer.mask
    idx = torch.tensor([ids], device=model.wte.weight.device)

    def logits(ids):  # (B, T) -> (B, V)
        return model.logits(model.hidden(ids)[:, at])

    probs = logits(idx)[0].softmax(-1)
    k, *more = tokenizer.encode(target, specials=True) or [probs[:tokenizer.vocab_size].argmax().item()]
    name = shown(tokenizer, k)
    if more:
        raise SettingError(f"--target={target}: one token is wanted; these are {1 + len(more)}, of which the "
                           f"first is {name!r}")
    return Case(idx, lambda ids: logits(ids)[:, k], name, f"probability {probs[k].item():.1%}", neutral)


@torch.no_grad()
def of_a_task(tuned: Tuned, text: str, pair: str, target: str) -> Case:
    """The sum of those of a fine-tuned model's outputs that the task says explain its answer, or a class."""
    task, tokenizer = tuned.task, tuned.task.tokenizer
    paired = task.head["paired"]
    if paired not in (None, bool(pair or (paired and "\n" in text))):
        raise SettingError(f"--pair={pair}: the model reads {'two texts' if paired else 'one text'}")
    row = task.row("--start", text, pair or None)
    device, found = tuned.head.weight.device, []
    examples = task.examples([row])
    for example in examples:  # several are windows of a long context
        batch = collate([example], task, device)
        del batch["target"]
        out = tuned(**batch)[0].cpu().numpy()
        answer, part, places = task.explained(row, example, out, target)
        idx, segments = batch["idx"][part:part + 1], batch["segments"][part:part + 1]  # (1, T) each
        score = partial(sum_of_outputs, tuned, places, segments)
        found.append((score(idx).item(), answer, idx, score))
    _, answer, idx, score = max(found, key=lambda one: one[0])
    task.tell(warn)
    header, (cells,) = task.table([row], predict(tuned, [row], examples=examples))
    told = ("prediction", "score", f"prob_{answer}")
    facts = ", ".join(f"{name} {cell}" for name, cell in zip(header, cells) if name in told)
    neutral = tokenizer.pad if tokenizer.mask is None else tokenizer.mask
    return Case(idx, score, answer.strip(), facts, neutral)


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


def attributions(model: Transformer, score: Callable, idx: torch.Tensor, neutral: int, samples: int = 1000,
                 seed: int = 1337) -> tuple[dict[str, torch.Tensor], float]:
    """What each token adds to the score of a text, idx (1, T): four methods' answers, (T,) each.

    neutral: the token that stands for none. Also returned: how much less a text of these alone would score.
    The methods ask about what goes into the first block, not the embeddings: a norm may follow those, and
    then no gradient points along them.
    """
    with torch.no_grad(), watched(model) as states:
        whole, nothing = score(torch.cat((idx, torch.full_like(idx, neutral)))).tolist()
    x, baseline = states[0].split(1)  # (1, T, C) each
    way, change = x - baseline, whole - nothing

    def score_from(x, n=0):  # if x, (B, T, C), went into stage n: (B,)
        with stages(model)[n].register_forward_pre_hook(lambda _, args: (x, *args[1:])):
            return score(idx.expand(len(x), -1))

    def slope(x, n=0):  # its gradient, (B, T, C)
        x = x.detach().requires_grad_()
        return torch.autograd.grad(score_from(x, n).sum(), x)[0]

    def blends(shares):  # (n, T or 1) of the text, the rest neutral: (B, T, C), batch by batch
        return (torch.lerp(baseline, x, part.unsqueeze(-1)) for part in shares.to(x).split(BATCH))

    found = {"gradient x input": (way * slope(x)).sum(-1)[0]}

    # The gradient on average over the way from neutral to the text, times the way: the sum is the change of
    # the score (Sundararajan et al. 2017). More points where it is not yet: relu makes a way of many kinks.
    for points in (32, 128, 512, 2048):
        places, weights = torch.tensor(np.array(np.polynomial.legendre.leggauss(points)) / 2)
        slopes = torch.cat([slope(part) for part in blends(places.unsqueeze(1) + 0.5)])  # (points, T, C)
        average = torch.einsum("n,ntc->tc", weights.to(x), slopes)
        found["integrated gradients"] = (way[0] * average).sum(-1)
        if abs(found["integrated gradients"].sum().item() - change) <= 1e-3 * abs(change):
            break

    # How far each hidden state, half way up, points to where the score rises: the gradient there, on average
    # over the tokens. Less than 0 is 0 (Selvaraju et al. 2017).
    half = len(states) // 2
    state = states[half][:1]  # (1, T, C)
    found["Grad-CAM"] = (state * slope(state, half).mean(1, keepdim=True)).sum(-1)[0].clamp(min=0)

    found["LIME"] = lime(lambda there: torch.cat([score_from(part) for part in blends(there)]),
                         idx.size(1), samples, seed)
    return {method: values.detach().cpu().double() for method, values in found.items()}, change


@torch.no_grad()
def lime(score_with: Callable, T: int, samples: int, seed: int) -> torch.Tensor:
    """The weights, (T,), of a linear model of the score by which tokens are there (Ribeiro et al. 2016).

    score_with: (n, T), 1 for a token that is there and 0 for one that is neutral, -> (n,). It is fitted to
    copies with few or many of them neutral; the nearer to the whole text, the more a copy counts.
    """
    rand = partial(torch.rand, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    there = (rand(samples, T) >= rand(samples, 1)).double()  # (n, T); any number of them as often
    scores = score_with(there).cpu().double()
    nearness = torch.exp(-(1 - there.mean(1, keepdim=True).sqrt()) ** 2 / 0.25 ** 2)  # (n, 1)
    columns = F.pad(there, (0, 1), value=1.0)  # and a constant
    fit = torch.linalg.lstsq(nearness.sqrt() * columns, nearness.sqrt() * scores.unsqueeze(1))
    return fit.solution[:-1, 0]


def rank_agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's: 1 where both put the tokens in the same order, -1 in the opposite; 0 if one has none."""
    ranks = [torch.sign(v.unsqueeze(1) - v).sum(1) for v in (a, b)]  # how many are below, less those above
    return F.cosine_similarity(*ranks, dim=0).item()


# -----------------------------------------------------------------------------
# What the model does inside

class AttentionMaps(TorchFunctionMode):
    """Inside `with`, keeps what the fused kernels never write down: each layer's weights, (B, H, T, S)."""

    def __init__(self):
        super().__init__()
        self.layers = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k, _ = args
            each = torch.eye(k.size(2), dtype=q.dtype, device=q.device).expand(*k.shape[:3], -1)
            self.layers.append(function(q, k, each, **kwargs))  # the mix of unit vectors is the weights
        return function(*args, **(kwargs or {}))


def habit(weights: torch.Tensor, ids: torch.Tensor) -> str:
    """Where most of a head's attention, (T, T), goes on this text, and how much; empty if unclear."""
    T = len(ids)
    itself, same = torch.eye(T), (ids.unsqueeze(1) == ids).float().fill_diagonal_(0)
    habits = {"itself": itself, "first token": itself[:1].expand(T, T), "same token": same,
              "previous token": itself.roll(1, 0).tril(), "next token": itself.roll(-1, 0).triu(),
              "after the same token": F.pad(same[:, :-1], (1, 0)).tril(-1)}  # an induction head
    seen = torch.ones(T, T) if weights.triu(1).any() else torch.ones(T, T).tril()
    even, best, most = F.normalize(seen, p=1), "", 0.3
    for name, places in habits.items():
        rows = (places * seen).any(1) & (torch.arange(T) > 1)  # the first two have little choice
        share, chance = ((one * places).sum(1)[rows].mean().item() for one in (weights, even))
        if share > max(most, 2 * chance):  # never where there are no such places: NaN
            best, most = f"{name} {share:.0%}", share
    return best


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, in which line breaks and parts of characters can be seen."""
    special = {i: name for name, i in tokenizer.specials.items()}.get(token)
    pieces = tokenizer.token_bytes[token:token + 1]  # none for the rest of a padded vocabulary
    text = special or b"".join(pieces).decode("utf-8", "backslashreplace")
    text = text.replace("\n", "\u21b5").replace("\t", "\u21e5")
    return text if text.isprintable() else ascii(text)[1:-1]


@torch.no_grad()
def guesses(model: Transformer, idx: torch.Tensor, mask: Optional[int], name: Callable) -> list[dict]:
    """For each token of a text, (1, T): its probability, rank and surprisal in bits; the likeliest there; and
    the likeliest by each layer, were it the last (the logit lens, nostalgebraist 2020).

    A causal model guesses what comes next, so nothing at first, and one token more in the end; a masked one
    guesses each token, masked.
    """
    causal, ids = model.config.causal, idx[0].tolist()
    found, truths = [], [None if token == mask else token for token in ids]
    if causal:
        found, truths = [{"token": name(ids[0]), "best": [], "lens": []}], [*ids[1:], None]

    def named(probs, tokens):
        return [[name(token), p] for token, p in zip(tokens.tolist(), probs.tolist())]

    for i, token in enumerate(truths):
        if i == 0 or not causal:
            with watched(model) as states:
                model.hidden(idx if causal else idx.index_fill(1, torch.tensor([i]).to(idx.device), mask))
        at_i = torch.stack([state[0, i] for state in states])  # (L + 1, C)
        probs = model.logits(model.norm_f(at_i)).softmax(-1)  # (L + 1, V)
        row = {"token": "?", "best": named(*probs[-1].topk(6)), "lens": named(*probs.max(-1))}
        if token is not None:
            p = probs[-1, token]
            rank = int((probs[-1] > p).sum()) + 1
            row |= {"token": name(token), "p": p.item(), "rank": rank, "bits": -p.log2().item()}
        found.append(row)
    return found


# -----------------------------------------------------------------------------

def main():
    model, tokenizer = load(out_dir, pick_device(device))
    body = getattr(model, "body", model)
    speaks = body is model or model.task.writes
    text = read_prompt(start)
    if body is not model and start.startswith("FILE:"):
        text = text.removesuffix("\n")
    if pair and body is model:
        raise SettingError(f"pair={pair}: a model without a task reads one text: leave it out")
    if speaks and body is not model:
        text = model.task.prompt(text, pair)
    if not speaks:
        case = of_a_task(model, text, pair, target)
    elif body.head is None:
        raise UserError(f"{out_dir}: an encoder without a head for tokens predicts nothing to explain")
    else:
        case = of_a_token(body, tokenizer, text, target)
    found = look_inside(body, tokenizer, case, speaks)
    print_short(found)
    folder = newest_run(Path(out_dir))
    file = (folder if folder.is_dir() else Path()) / "explain.html"
    data = json.dumps(found, ensure_ascii=False).replace("<", "\\u003c")  # no token ends the script
    write_text(file, PAGE.replace("DATA", data))
    print(f"\n{file}: all of it, for a browser")


def look_inside(model: Transformer, tokenizer, case: Case, speaks: bool) -> dict:
    """All that the page shows: plain values."""
    idx, name = case.idx, partial(shown, tokenizer)
    methods, change = attributions(model, case.score, idx, case.neutral, samples, seed)
    with torch.no_grad(), AttentionMaps() as maps:
        value = case.score(idx).item()
    total = methods["integrated gradients"].sum().item()
    agreement = [[rank_agreement(a, b) for b in methods.values()] for a in methods.values()]
    heads = []
    for layer in maps.layers:  # (1, H, T, T) each
        heads.append([])
        for head in layer[0].cpu():
            weights = base64.b64encode((head * 255).round().byte().numpy().tobytes()).decode()
            heads[-1].append({"habit": habit(head, idx[0].cpu()), "weights": weights})
    return {
        "title": f"{out_dir}: {len(model.blocks)} layers, {model.config.n_head} heads",
        "summary": f"output {value:.3f}, {case.facts}; {change:+.4f} against a text of {name(case.neutral)} "
                   f"alone; integrated gradients add up to {total:+.4f}, "
                   f"{abs(total - change) / max(abs(change), 1e-9):.2%} off",
        "token": case.answer, "tokens": [name(i) for i in idx[0].tolist()],
        "said": guesses(model, idx, tokenizer.mask, name) if speaks else [],
        "methods": {method: values.tolist() for method, values in methods.items()},
        "agreement": agreement, "heads": heads}


def print_short(found: dict) -> None:
    """What of it fits a terminal."""
    tokens, methods = found["tokens"], found["methods"]
    wide = max(map(len, tokens))
    print(f"{found['title']}\n\n{'token':>{wide}}     bits   rank  " + "  ".join(methods))
    for i, token in enumerate(tokens):
        said = found["said"][i] if found["said"] else {}
        cells = [f"{said['bits']:7.2f} {said['rank']:6}" if "bits" in said else " " * 14]
        cells += [f"{values[i]:{len(method)}.3f}" for method, values in methods.items()]
        print(f"{token:>{wide}}", *cells, sep="  ")
    print(f"\nexplained: {found['token']!r}, {found['summary']}\n\nrank agreement (Spearman)")
    for method, row in zip(methods, found["agreement"]):
        print(f"{method:>22}" + "".join(f"{value:7.2f}" for value in row))
    print("\nwhat heads do on this text")
    for n, layer in enumerate(found["heads"]):
        habits = [f"head {h}: {head['habit']}" for h, head in enumerate(layer) if head["habit"]]
        print(f"layer {n:2}  {',  '.join(habits) or '-'}")


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Look inside</title>
<style>
:root { color-scheme: light dark; --for: 45, 135, 225; --against: 225, 110, 40 }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 56rem; padding: 0 1rem }
p, figcaption, td:first-child { opacity: .7 }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 2rem }
#heads { display: grid; gap: .5rem; overflow-x: auto; padding: 2px }
figure { margin: 0; font-size: .75rem; cursor: pointer }
button { all: unset; font: 14px/1.7 ui-monospace, Consolas, monospace; white-space: pre; margin: 0 1px }
canvas, button { outline: 1px solid #8886 }
.on, button:focus-visible { outline: 2px solid }
canvas { width: 100%; image-rendering: pixelated }
td { padding-right: .7rem; white-space: pre }
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
const at = id => document.getElementById(id)
const make = (tag, ...inside) => { const e = document.createElement(tag); e.append(...inside); return e }
const table = rows => make('table', ...rows.map(row => make('tr', ...row.map(cell => make('td', cell)))))
const percent = p => (100 * p).toFixed(1) + '%'

function choose(one) {
  for (const other of one.parentNode.children) other.classList.toggle('on', other === one)
}

function text(box, tokens, point) {  // as buttons, and what happens when one is pointed at
  const buttons = tokens.map((token, i) => {
    const button = make('button', token || ' ')
    button.onmouseenter = button.onfocus = button.onclick = () => { choose(button); point?.(i) }
    return button
  })
  box.replaceChildren(...buttons.flatMap((b, i) => tokens[i].includes('\u21b5') ? [make('br'), b] : [b]))
  return buttons
}

function shade(buttons, values, titles) {  // from -1, against, to 1, for
  buttons.forEach((button, i) => {
    button.style.background = `rgba(var(--${values[i] < 0 ? 'against' : 'for'}), ${Math.abs(values[i])})`
    button.title = titles[i]
  })
}

document.querySelector('h1').textContent = `Why \u201c${D.token}\u201d?`
for (const id of ['title', 'summary']) at(id).textContent = D[id]
const names = Object.keys(D.methods)
for (const name of names) {
  const values = D.methods[name], most = Math.max(...values.map(Math.abs)) || 1, box = make('div')
  shade(text(box, D.tokens), values.map(v => Math.sign(v) * Math.sqrt(.8 * Math.abs(v) / most)), values)
  at('methods').append(make('div', make('h3', name), box))
}
at('agreement').append(table([['', ...names], ...D.agreement.map((row, i) =>
  [names[i], ...row.map(v => v.toFixed(2))])]))

const T = D.tokens.length
let row = T - 1  // whose attention is shown
at('heads').style.gridTemplateColumns = `repeat(${D.heads[0].length}, minmax(5rem, 7rem))`
D.heads.forEach((layer, l) => layer.forEach((head, h) => {
  const weights = Array.from(atob(head.weights), c => c.charCodeAt(0) / 255)
  const canvas = make('canvas'), pixels = new ImageData(T, T)
  canvas.width = canvas.height = T
  weights.forEach((w, i) => pixels.data.set([45, 135, 225, 255 * Math.sqrt(w)], 4 * i))
  canvas.getContext('2d').putImageData(pixels, 0, 0)
  const figure = make('figure', canvas, make('figcaption', `${l}.${h} ${head.habit}`))
  figure.onclick = () => {
    choose(figure)
    at('head').textContent = `Layer ${l}, head ${h}${head.habit && ': ' + head.habit}`
    const buttons = text(at('looks'), D.tokens, i => {
      const seen = weights.slice(i * T, i * T + T)
      shade(buttons, seen.map(Math.sqrt), seen.map(percent))
      row = i
    })
    buttons[row].onclick()
  }
  at('heads').append(figure)
}))
at('heads').firstChild.onclick()

const bits = D.said.map(s => s.bits ?? 0), titles = bits.map(b => b.toFixed(2) + ' bits')
const places = text(at('tokens'), D.said.map(s => s.token), i => {
  const s = D.said[i], facts = s.bits == null ? '' : ` (this: rank ${s.rank}, ${percent(s.p)}, ${titles[i]})`
  const likely = table(s.best.map(([token, p]) => [token, percent(p)]))
  const lens = table(s.lens.map(([token, p], l) => [l ? `block ${l - 1}` : 'embedding', token, percent(p)]))
  at('said').replaceChildren(make('div', make('h3', 'The likeliest' + facts), likely),
                             make('div', make('h3', 'Layer by layer'), lens))
})
shade(places, bits.map(b => b / Math.max(8, ...bits)), titles)
places[D.said.findIndex(s => s.best.length && s.bits == null)]?.onclick()  // the gap, or the end
if (!places.length) at('guesses').remove()  // of a model that does not speak
</script>
</html>
"""

if __name__ == "__main__":
    needs_console()
    launch(main, globals())
