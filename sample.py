"""
Use a checkpoint: continue a text, fill its gaps, classify it, or hand the model on.

    python sample.py                                              the newest run under out/
    python sample.py --out_dir=out/small --start="def main("      a prompt of your own
    python sample.py --start=FILE:prompt.txt --num_samples=3 --temperature=0.5
    python sample.py --out_dir=out/bert --start="import <|mask|>" a masked model: what may stand in the gap
    python sample.py --out_dir=out/sentiment --start="a fine film"  what finetune.py made: label, tags, answer
    python sample.py --out_dir=out/sentiment --start=FILE:in.csv > out.csv
    python sample.py --out_dir=openai-community/gpt2              a Hugging Face folder, or an id on its hub
    python sample.py --out_dir=sentence-transformers/all-MiniLM-L6-v2 --start=FILE:a.txt  its lines compared
    python sample.py --out_dir=out/small --export=small_hf        to a folder that transformers loads

From Python, `load` is all it takes:

    from sample import load
    model, tokenizer = load("out/small")
"""
from __future__ import annotations

import copy
import io
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, Optional, Union

# before torch: Ctrl-C is silent from here on
from config import SettingError, UserError, at_least, check_used, launch, model_asked, needs_console

import numpy as np
import torch

from finetune import Tuned, predict, tuned_of, unit, vectors, warn, with_head
from lib.pretrained import HeadError, read_as_trained, save, together
from lib.rows import as_csv, described, text_blocks
from lib.run import (USE, Machine, find_checkpoint, load_whole, model_of, newest_run, refuse_chars,
                     tokenizer_of)
from lib.tasks import TABLES
from lib.text import kind_of
from lib.tokenizer import Tokenizer
from model import Sampling, Transformer

# -----------------------------------------------------------------------------
# Settings. How the next token is chosen: the fields of Sampling in model.py, such as --top_p=0.9.
out_dir: str = "out"  # a run's folder, or a folder of runs: the newest of them; a Hugging Face folder or id
init_from: str = "resume"  # the model in out_dir; else its folder or id, as --out_dir takes too
chars: str = ""  # of a nanoGPT checkpoint with few tokens: the text whose characters they are
export: str = ""  # write model and tokenizer to this folder instead, as Hugging Face's libraries read them
start: str = "\n"  # the prompt, special tokens by name; FILE:path reads it from a file; two texts: two lines
text_column: Union[str, int] = ""  # of a table by FILE:, its name or number; empty: as in training
pair_column: Union[str, int] = ""  # of the second text; empty: as in training
label_column: Union[str, int] = ""  # to be compared with; empty: as in training
encoding: str = ""  # of that file; empty: UTF-8, or UTF-16 or GBK if it is that
skip_bad_rows: bool = False  # pass over its rows that cannot be read, and count them
num_samples: at_least(1) = 1  # texts to write
max_new_tokens: at_least(1) = 300  # length of each, at most
stop: Union[str, list] = ""  # end before this text (\n: a line break), or one of several: "['#', 'def ']"
stream: bool = True  # print each text as it is written; False: all texts at once, faster for many
seed: at_least(0, below=2**63) = 1337  # the same seed, the same text
device: str = "auto"  # auto: cuda, else mps, else cpu
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: what is fast there
compile: bool = False  # torch.compile the step for one token: half a minute once, then fast; on a GPU
quantize: Optional[Literal["int8"]] = None  # int8: one byte per weight, faster on a CPU
# -----------------------------------------------------------------------------


@dataclass
class Choice(Sampling):
    """What this script's defaults are."""
    temperature: at_least(0.0) = 0.8  # 0: always the likeliest token; 1: as the model has it; above: wilder
    top_k: Optional[at_least(1)] = 200  # choose among so many of the likeliest tokens only; None: all


WRITES, FILLS, ANSWERS = "a model that writes", "a masked model", "a fine-tuned model's answers"
ROWS = "a file of rows"  # which it answers one by one
A_FILE = "FILE:..."  # as a start
OF_WRITING = ("num_samples", "max_new_tokens", "stop", "stream", "seed", "compile",
              *(field.name for field in fields(Choice)))
ONLY = [  # a setting, and what it is of use with; see check_used
    *((name, "", (WRITES,)) for name in OF_WRITING),
    *((name, "temperature", ()) for name in ("top_k", "top_p", "min_p")),  # at 0 there is no choice
    *((name, "", (WRITES, FILLS, ANSWERS, ROWS)) for name in ("start", "quantize")),
    *((name, "", (ROWS,)) for name in ("text_column", "pair_column", "label_column", "skip_bad_rows")),
    ("encoding", "start", (A_FILE,)),
]


def load(folder: str | Path, device: str | torch.device = "cpu",
         dtype: torch.dtype = torch.float32, chars: str = "") -> tuple[Transformer | Tuned, Tokenizer]:
    """A model, ready to use, and its tokenizer.

    folder: where train.py or finetune.py saved (the best model of the run, else its latest; data/ is not
    needed), a folder of such folders (the newest), a Hugging Face folder, an id on its hub, or nanoGPT's
    ckpt.pt, with `chars` for one of few tokens: the text whose characters they are. A fine-tuned model has
    .body, .task and predict(texts). dtype: of the weights; a fine-tuned model's stay float32.
    Raises UserError if the folder holds none of these, or it cannot be used.
    """
    asked, folder, names = Path(folder), newest_run(Path(folder)), (*USE, "lora.pt")
    if folder != asked:
        warn(f"{folder}: the newest run in {asked}")
    if not folder.is_file() and not any((folder / name).exists() for name in names):
        model, tokenizer, head = load_whole(folder, dtype, chars=chars)
        if head and dtype != torch.float32:
            model, tokenizer, head = load_whole(folder)
        if head:
            model = with_head(model, tokenizer, head, head.pop("weights"))
        return model.to(device).eval(), tokenizer
    checkpoint = find_checkpoint(folder, names)[1]
    if "head" in checkpoint:
        refuse_chars(chars)
        model = tuned_of(checkpoint)
        return model.to(device), model.task.tokenizer
    model = model_of(checkpoint).to(device, dtype)
    return model.eval(), tokenizer_of(checkpoint, chars)


def read_prompt(start: str, encoding: str = "") -> str:
    """`start` itself, or the content of the file that FILE:path names, read as training reads one."""
    if not start.startswith("FILE:"):
        return start
    try:
        text = "".join(text_blocks(start.removeprefix("FILE:"), encoding))
    except SettingError:
        raise  # it names the encoding
    except UserError as error:
        raise UserError(f"--start=FILE:{error}") from None
    return text.replace("\r\n", "\n")


# -----------------------------------------------------------------------------
# Write, and fill gaps

def as_text(ids: Iterable[int], tokenizer: Tokenizer, stops: Iterable[str] = (),
            prompt: str = "") -> Iterator[str]:
    """Token ids to text, piece by piece: never half a character, and never part of a stop string.

    Ends before the stop string that is whole first, however the text is cut into tokens, and which may begin
    in the prompt; and at a token that ends a text. prompt: what the ids go on from.
    """
    stops = [stop for stop in stops if stop]
    held = max(map(len, stops), default=1) - 1  # characters at the end, with which a stop string may begin
    text = prompt[max(0, len(prompt) - held):]  # the last characters, of which so many are out
    out = len(text)
    ids = itertools.takewhile(lambda i: i not in tokenizer.ends, ids)
    for piece in tokenizer.pieces(ids, begun=prompt != ""):
        old, text = len(text), text + piece
        begins = [text.find(stop, max(0, old - len(stop) + 1)) for stop in stops]
        found = [(at + len(stop), at) for at, stop in zip(begins, stops) if at >= 0]
        if found:
            yield text[out:min(found)[1]]
            return
        end = max(out, len(text) - held)
        yield text[out:end]
        first = max(0, len(text) - held)
        text, out = text[first:], end - first
    yield text[out:]


def write(model: Transformer, tokenizer: Tokenizer, prompt: str, how: Sampling,
          num_samples: int, max_new_tokens: int, stops: list[str], stream: bool, seed: int,
          compile: bool) -> None:
    """Print num_samples continuations of the prompt, one after the other as they come, or all at once."""
    ids = tokenizer.prompt(prompt)
    tokenizer.tell(warn)
    block_size = model.config.block_size
    if len(ids) > block_size:
        warn(f"the model reads {block_size} tokens: the last {block_size // 2} of the prompt's {len(ids)}")
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    rows = 1 if stream else num_samples  # texts in a batch
    for _ in range(num_samples // rows):
        idx = torch.tensor([ids] * rows, device=device)
        tokens = model.stream(idx, max_new_tokens, generator=generator, compile=compile, **asdict(how))
        written = [(token.item() for token in tokens)]
        if not stream:
            written = torch.stack(list(tokens), dim=1).tolist()
        for row in written:
            print(prompt, end="", flush=True)
            for piece in as_text(row, tokenizer, stops, prompt):
                print(piece, end="", flush=True)
            print("\n---------------")


@torch.no_grad()
def fill(model: Transformer, tokenizer: Tokenizer, text: str,
         best: int = 5) -> list[list[tuple[str, float]]]:
    """For each mask token in a text, the likeliest tokens there with their probabilities, by a masked model.

    Raises UserError if the text has no mask token, or is longer than the model's context.
    """
    if model.head is None:
        raise UserError("this model is an encoder without a head for tokens: finetune.py gives it another")
    if tokenizer.mask is None:
        raise UserError("the model's tokenizer has no mask token")
    ids, segments = tokenizer.wrap(tokenizer.encode(text, specials=True))
    tokenizer.tell(warn)
    if tokenizer.mask not in ids:
        raise UserError(f"a masked model fills gaps: write {tokenizer.decode([tokenizer.mask])} where one is")
    if len(ids) > model.config.block_size:
        raise UserError(f"{len(ids)} tokens: the model reads {model.config.block_size} at most")
    device = model.wte.weight.device
    idx, segments = torch.tensor([ids], device=device), torch.tensor([segments], device=device)  # (1, T)
    x = model.hidden(idx, segments=segments)[idx == tokenizer.mask]  # (masks, C)
    probs = model.logits(x).softmax(-1)[:, :tokenizer.vocab_size]
    found = []
    for values, tokens in zip(*probs.topk(best), strict=True):  # (best,) each
        words = [tokenizer.decode([token]) for token in tokens.tolist()]
        found.append(list(zip(words, values.tolist(), strict=True)))
    return found


# -----------------------------------------------------------------------------
# A fine-tuned model's answers

def answer(model: Tuned, text: str, machine: Machine) -> None:
    """Print what it says about a text, or about two: the first line, and all lines after it."""
    row = model.task.row("--start", text)
    print(model.task.shown(row, predict(model, [row], machine=machine)[0]))


def compare(model: Transformer, tokenizer: Tokenizer, texts: list[str]) -> None:
    """Print each text's cosine with the first, by a sentence encoder; of one text alone, its vector."""
    found = vectors(model, tokenizer, texts)
    if len(texts) == 1:
        print(*(f"{x:.6f}" for x in found[0]))
        return
    units = unit(found)
    for text, cosine in zip(texts, units @ units[0]):
        print(f"{cosine:7.4f}  {text}")


CHUNK = 1024  # rows of a table that are read, answered and printed before the next


def answer_file(model: Tuned, path: str, machine: Machine) -> None:
    """Print the file's rows as predictions.csv has them; on stderr, how long it took and how right it was."""
    task, bad = model.task, []
    asked = {"text": text_column, "pair": pair_column, "label": label_column}
    asked = {role: name for role, name in asked.items() if name != ""}
    columns = {**task.head["columns"], **asked, "asked": list(asked)}
    remembered = "unused" in columns  # a checkpoint of before, or of others, keeps none
    columns, rows = task.to_answer(path, columns, encoding, bad.append if skip_bad_rows else None)
    if not remembered:
        print(f"columns  {described(columns)}", file=sys.stderr)
    count = seconds = unknown = 0
    scored = []  # of each chunk, what the metrics take
    while chunk := list(itertools.islice(rows, CHUNK)):
        began = time.perf_counter()
        known = [task.knows_label(row) for row in chunk]
        for row, knows in zip(chunk, known):
            unknown += row.label not in (None, "") and not knows
        readable = [row if knows else replace(row, label=None) for row, knows in zip(chunk, known)]
        answers = predict(model, readable, machine=machine, examples=task.examples(readable))
        if any(known):
            scored.append(task.arrays(*(list(itertools.compress(some, known)) for some in (chunk, answers))))
        header, lines = task.table(chunk, answers)
        if task.of_texts and columns.get("id"):
            header, lines = ["id", *header], [[row.id, *line] for row, line in zip(chunk, lines)]
        print(as_csv(lines if count else [header, *lines]), end="", flush=True)
        count += len(chunk)
        seconds += time.perf_counter() - began
    if not count:
        raise UserError(f"{path}: holds no examples")
    task.tell(warn)
    if bad:
        warn(f"{path}: {len(bad):,} rows left out that cannot be read, {bad[0]}")
    weights = io.BytesIO()
    torch.save(model.state_dict(), weights)
    each = 1000 * seconds / count
    told = f"{count:,} rows, {each:.2f} ms each, by {weights.tell() / 1e6:.2f} MB of weights"
    if scored:
        arrays = [np.concatenate(parts) for parts in zip(*scored)]
        told += f": {task.metric} {float(task.scores(*arrays)[task.metric]):.4f}"
        if len(arrays[0]) < count:
            told += f", of the {len(arrays[0]):,} rows with a label that training knew"
    if unknown:
        told += f"; {unknown:,} have labels that training did not know"
    print(told, file=sys.stderr)


# -----------------------------------------------------------------------------
# Smaller, and elsewhere

class Int8Linear(torch.nn.Module):
    """A linear layer by weights of one byte each, and inputs too, which are scaled row by row.

    torch scales all rows of a batch alike: what a row gives would depend on its neighbours, and what a token
    gives on whether those before it are read again or cached. So each row is brought to between -1 and 1
    first, and a row that spans just that goes along: 10% more time for one token of GPT-2.
    """

    def __init__(self, layer: torch.nn.Linear, quantize: Callable):
        super().__init__()
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight, self.bias = layer.weight, layer.bias
        self.quantized = quantize(torch.nn.Sequential(plain))[0]
        span = torch.zeros(1, layer.in_features)
        span[0, 0], span[0, -1] = -1, 1
        self.register_buffer("span", span, persistent=False)

    def forward(self, x):  # (..., in_features) -> (..., out_features)
        rows = x.reshape(-1, x.size(-1))
        scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30)
        out = self.quantized(torch.cat((rows / scale, self.span)))[:-1] * scale
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], -1)


def to_int8(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose Linear layers keep each weight in one byte, with a scale for each row, for a CPU.

    Writing one token at a time, a model is as fast as its weights are read. Embeddings and norms stay.
    Raises UserError if this torch cannot do it, or the model is on a GPU.
    """
    if next(model.parameters()).device.type != "cpu":
        raise UserError("--quantize=int8: for a CPU: add --device=cpu")
    try:
        from torch.ao import quantization
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that this will move to another package
            how = {torch.nn.Linear: quantization.per_channel_dynamic_qconfig}
            quantize = partial(quantization.quantize_dynamic, qconfig_spec=how, dtype=torch.qint8)
            smaller = copy.deepcopy(model.float())
            for module in list(smaller.modules()):
                for name, layer in list(module.named_children()):
                    if type(layer).forward is torch.nn.Linear.forward:
                        setattr(module, name, Int8Linear(layer, quantize))
            return smaller
    except (ImportError, AttributeError, RuntimeError) as error:
        raise UserError(f"--quantize=int8: not with this torch ({str(error).splitlines()[0][:120]}): "
                        "leave it out") from None


def write_pretrained(model: Transformer | Tuned, tokenizer: Tokenizer, folder: str) -> None:
    """Model and tokenizer for transformers' from_pretrained. Raises UserError if it has no such model."""
    body, head = getattr(model, "body", model), None
    if body is not model and not model.task.writes:
        head = {**model.task.head, "weights": model.head.state_dict()}
    elif body is not model and model.task.head["instruct"]:
        print("(what training put around a prompt, ### Instruction: and so on, is no part of an export)",
              file=sys.stderr)
    if head and not tokenizer.specials:
        raise UserError(f"--export={folder}: no class of transformers reads texts of characters for a task")
    eot, offset = tokenizer.eot if tokenizer.ends else None, body.config.pos_offset
    ids = {"eos_token_id": eot, "bos_token_id": eot,
           "pad_token_id": offset - 1 if offset else tokenizer.pad} | body.published.get("ids", {})
    if head and ids["pad_token_id"] is None:
        ids["pad_token_id"] = tokenizer.pad
    if head and head["pool"] == "last" and ids["pad_token_id"] == eot and tokenizer.mask is not None:
        ids["pad_token_id"] = tokenizer.mask  # else an end at the end would be taken for padding
    try:
        with together(Path(folder)) as new:
            save_with_head(body, new, ids, head)
            length = head["max_length"] if head else body.config.block_size
            tokenizer.save_pretrained(new, length, of_two=body.config.n_segment > 1)
            if head:
                read_as_trained(new, head, tokenizer, ids["pad_token_id"])
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"--export={folder}: {error}") from None


def save_with_head(body: Transformer, folder: Path, ids: dict, head: Optional[dict]) -> None:
    """Without it, if transformers has none like it."""
    try:
        save(body, folder, ids, head)
    except HeadError as error:
        print(f"({error}: the head is left out, the body is exported with its pooling)", file=sys.stderr)
        # texts are read as in training, where nothing that its publisher asks for was put before them
        encoder = {"normalize": False, **body.published.get("encoder", {}), "lower": head.get("lower", False),
                   "pool": head["pool"], "max_length": head["max_length"], "prompt": "", "others": ""}
        if encoder.get("settings"):
            encoder["settings"] = {**encoder["settings"], "default_prompt_name": None}
        save(body, folder, ids, None, encoder)


def main(given: dict):
    try:
        how = Choice(**given)
    except ValueError as error:  # it names the field
        raise SettingError(str(error)) from None
    stops = [stop.replace("\\n", "\n")] if isinstance(stop, str) else stop
    if not all(isinstance(one, str) for one in stops):
        raise SettingError(f"stop={stop}: wanted texts: --stop=\"['1', 'def ']\"")
    came = A_FILE if start.startswith("FILE:") else "a text"
    if export:
        check_used(globals(), given, **{"": "--export", "start": came})
    machine = Machine(device, "float32" if export and dtype == "auto" else dtype, seed)
    origin = model_asked(globals())
    model, tokenizer = load(origin, machine.device, machine.dtype, chars)
    tuned = model if isinstance(model, Tuned) else None
    body = model.body if tuned else model
    if export:
        write_pretrained(model, tokenizer, export)
        print(f"{export}: model and tokenizer, as transformers' from_pretrained reads them")
        return
    file = start.removeprefix("FILE:") if start.startswith("FILE:") else ""
    is_table = bool(tuned and file) and tuned.task.holds_rows(file)
    answers = is_table or bool(tuned) and not tuned.task.writes
    encodes = not tuned and bool(body.published.get("encoder"))
    writes = body.config.causal and not encodes
    mode = ROWS if is_table else ANSWERS if answers else WRITES if writes else FILLS
    for line in check_used(globals(), given, **{"": mode, "temperature": how.temperature, "start": came}):
        print(line, file=sys.stderr)
    prompt = "" if is_table else read_prompt(start, encoding)
    if tuned and file:
        prompt = prompt.removesuffix("\n")  # which ends the file, and is not of the text
    if answers:
        model = to_int8(model) if quantize else model
        if is_table:
            answer_file(model, file, machine)
        else:
            answer(model, prompt, machine)
        return
    if tuned:
        body, prompt = body.to(machine.dtype), tuned.task.prompt(prompt)
    if quantize:
        body = to_int8(body)
    if encodes and kind_of(file) in TABLES:
        raise UserError(f"--start={start}: a table, whose header and commas would be compared too: its texts "
                        "alone are wanted, one a line")
    if encodes:
        compare(body, tokenizer, prompt.removesuffix("\n").split("\n"))
        return
    if body.head is None:
        lacks = body.published.get("lacks", "head for tokens")
        raise UserError(f"{origin}: has no {lacks}, so it neither writes nor fills gaps: finetune.py gives "
                        "it another head")
    if writes:
        try:
            write(body, tokenizer, prompt, how, num_samples, max_new_tokens, stops, stream, seed, compile)
        except ValueError as error:  # the prompt or the weights
            raise UserError(f"{origin}: {error}") from None
        return
    print(prompt)
    for n, candidates in enumerate(fill(body, tokenizer, prompt), start=1):
        print(f"gap {n}:  " + "   ".join(f"{token!r} {prob:.1%}" for token, prob in candidates))


if __name__ == "__main__":
    needs_console()
    launch(main, globals(), Choice)
