"""
Use a checkpoint: continue a text, fill its gaps, judge it, or hand the model on.

    python sample.py                                              the newest run under out/
    python sample.py --out_dir=out/small --start="def main("      a prompt of your own
    python sample.py --start=FILE:prompt.txt --num_samples=3 --temperature=0.5
    python sample.py --out_dir=out/bert --start="import <|mask|>" a masked model: what may stand in the gap
    python sample.py --out_dir=out/sentiment --start="a fine film"  what finetune.py made: label, tags, answer
    python sample.py --out_dir=out/sentiment --start=FILE:in.csv > out.csv
    python sample.py --out_dir=openai-community/gpt2              a Hugging Face folder, or an id on its hub
    python sample.py --out_dir=out/small --export=small_hf        to a folder that transformers loads

From Python, `load` is all it takes:

    from sample import load
    model, tokenizer = load("out/small")
"""
import io
import itertools
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, Optional, Union

import torch

import finetune
from config import SettingError, UserError, launch
from lib import tasks
from lib.run import load_checkpoint, load_model, model_of
from lib.tokenizer import HubTokenizer, Tokenizer
from model import Transformer
from train import pick_device, pick_dtype

# -----------------------------------------------------------------------------
# Settings
out_dir: str = "out"  # a run's folder, or a folder of runs: the newest of them; a Hugging Face folder or id
export: str = ""  # instead: write model and tokenizer to this folder, as Hugging Face's libraries read them
start: str = "\n"  # the prompt, special tokens by their names; FILE:path reads it; two texts: two lines
num_samples: int = 1  # texts to write
max_new_tokens: int = 300  # length of each, at most
temperature: float = 0.8  # 0: always the likeliest token; 1: as the model has it; above: wilder
top_k: Optional[int] = 200  # choose among so many of the likeliest tokens only; None: all
top_p: Optional[float] = None  # choose among the likeliest that together have this probability; None: all
min_p: Optional[float] = None  # choose among those at least so likely, against the likeliest; None: all
repetition_penalty: float = 1.0  # above 1: what was said becomes less likely
stop: Union[str, list] = ""  # end before this text, or the first of several: --stop="['#', 'def ']"
stream: bool = True  # print a text as it comes; False: all samples at once, faster for many
seed: int = 1337  # the same seed, the same text
device: str = "auto"  # auto: cuda, else mps, else cpu
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: what is fast there
compile: bool = False  # the step from token to token: half a minute once, then fast; for much text on a GPU
quantize: Optional[Literal["int8"]] = None  # int8: weights in a byte each, 2 to 3 times as fast on a CPU
# -----------------------------------------------------------------------------


def load(folder: str | Path, device: str | torch.device = "cpu",
         dtype: torch.dtype = torch.float32) -> tuple[Transformer, Tokenizer | HubTokenizer]:
    """A model, ready to use, and its tokenizer.

    folder: where train.py saved (the best model of the run, else its latest; data/ is not needed), a folder
    of such folders (the newest), a Hugging Face folder, or an id on its hub. Of a fine-tuned one, the body.
    Raises UserError where there is none of these, or it cannot be used.
    """
    return build(folder, read_run(folder), device, dtype)


def read_run(folder: str | Path) -> Optional[dict]:
    """The checkpoint of a run, or of the newest run in the folder; None where there is none of ours."""
    folder = newest_run(Path(folder))
    names = ("best.pt", "ckpt.pt", "ckpt.prev.pt", "lora.pt")
    return load_checkpoint(folder, names) if any((folder / name).exists() for name in names) else None


def build(folder: str | Path, checkpoint: Optional[dict], device: str | torch.device,
          dtype: torch.dtype) -> tuple[Transformer, Tokenizer | HubTokenizer]:
    """The model of a run's checkpoint, or where that is None, of a Hugging Face folder or id."""
    if checkpoint is None:
        model, tokenizer = load_model(folder, dtype)
    else:
        model, tokenizer = model_of(checkpoint), Tokenizer.from_dict(checkpoint["tokenizer"])
    return model.to(device, dtype).eval(), tokenizer


def newest_run(folder: Path) -> Path:
    runs = {file.parent: file.stat().st_mtime for file in (*folder.glob("*.pt"), *folder.glob("*/*.pt"))}
    return folder if folder in runs or not runs else max(runs, key=runs.get)


def read_prompt(start: str) -> str:
    """`start`, or what the file that it names holds."""
    if not start.startswith("FILE:"):
        return start
    path = start.removeprefix("FILE:")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--start={start}: cannot be read: {error}") from None


def as_text(ids: Iterable[int], tokenizer: Tokenizer | HubTokenizer,
            stops: Iterable[str] = ()) -> Iterator[str]:
    """Token ids to text, piece by piece: never half a character, and nothing of a stop string.

    Ends before the first stop string, and at <|endoftext|>.
    """
    stops = [stop for stop in stops if stop]
    held = ""  # may be the beginning of a stop string
    for piece in tokenizer.pieces(itertools.takewhile(lambda i: i != tokenizer.eot, ids)):
        held += piece
        found = [held.index(stop) for stop in stops if stop in held]
        if found:
            yield held[:min(found)]
            return
        keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[:len(held) - keep]
        held = held[len(held) - keep:]
    yield held


@torch.no_grad()
def fill(model: Transformer, tokenizer: Tokenizer | HubTokenizer, text: str,
         best: int = 5) -> list[list[tuple[str, float]]]:
    """For each mask token in a text, the likeliest tokens there with their probabilities, by a masked model.

    Raises UserError where the text has no mask token, or is longer than the model's context.
    """
    if model.head is None:
        raise UserError("this model is an encoder without a head for tokens: finetune.py gives it another")
    ids, segments = tokenizer.wrap(tokenizer.encode(text, specials=True))
    name = next((name for name, i in tokenizer.specials.items() if i == tokenizer.mask), None)
    if tokenizer.mask not in ids:
        raise UserError(f"a masked model fills gaps: write {name} where one is" if name else
                        "the model's tokenizer has no mask token")
    if len(ids) > model.config.block_size:
        raise UserError(f"{len(ids)} tokens: the model reads {model.config.block_size} at most")
    idx, segments = (torch.tensor([row], device=model.wte.weight.device) for row in (ids, segments))  # (1, T)
    x = model.hidden(idx, segments=segments)[idx == tokenizer.mask]  # (masks, C)
    probs, tokens = model.logits(x).softmax(-1)[:, :tokenizer.vocab_size].topk(best)  # (masks, best) each
    return [[(tokenizer.decode([token]), prob) for token, prob in zip(*row)]
            for row in zip(tokens.tolist(), probs.tolist())]


def to_int8(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose Linear layers keep a weight in one byte, with a scale for each row, for a CPU.

    One token at a time, a model is as fast as its weights are read; embeddings and norms stay as they are.
    Raises UserError where this torch cannot do it, or the model is on a GPU.
    """
    if next(model.parameters()).device.type != "cpu":
        raise UserError("--quantize=int8: for a CPU: add --device=cpu")
    try:
        from torch.ao import quantization
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is to move to a package of its own
            return quantization.quantize_dynamic(
                model.float(), {torch.nn.Linear: quantization.per_channel_dynamic_qconfig}, torch.qint8)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise UserError(f"--quantize=int8: not with this torch ({str(error).splitlines()[0][:120]}): "
                        "leave it out") from None


def write_pretrained(model: Transformer, tokenizer: Tokenizer | HubTokenizer, folder: str) -> None:
    """Model and tokenizer for transformers' from_pretrained. Raises UserError where it has no such model."""
    eot, offset = tokenizer.eot, model.config.pos_offset
    try:
        model.save_pretrained(folder, eos_token_id=eot, bos_token_id=eot,
                              pad_token_id=offset - 1 if offset else tokenizer.pad)
    except (ImportError, ValueError) as error:
        raise UserError(f"--export={folder}: {error}") from None
    tokenizer.save_pretrained(folder, model.config.block_size)


def judge(model: finetune.Tuned, task: tasks.Task, start: str) -> None:
    """What a fine-tuned model says about a text, or about the rows of FILE:rows.csv, which become a CSV."""
    path = start.removeprefix("FILE:")
    tables = (".csv", ".tsv", ".jsonl", ".json", ".conll")
    if start.startswith("FILE:") and Path(path).suffix.lower() in tables:
        columns = {**task.head["columns"], "label": "", "group": ""}
        rows = tasks.read_rows(path, task.head["task"], columns, labelled=False)
        judged = task.head["task"] == "classify" and all(
            isinstance(row.label, str) and row.label in task.number for row in rows)
        for row in rows if not judged else ():
            row.label = None  # what is there is not what was learned
        began = time.perf_counter()
        answers = finetune.predict(model, task, rows)
        each = (time.perf_counter() - began) / len(rows)
        header, lines = task.table(rows, answers)
        print(tasks.as_csv([header, *lines]), end="")
        weights = io.BytesIO()
        torch.save(model.state_dict(), weights)
        told = f"{len(rows):,} rows, {1000 * each:.2f} ms each, by {weights.tell() / 1e6:.2f} MB of weights"
        if judged:
            scores = task.scores(*task.arrays(rows, answers))
            told += f": {task.metric} {float(scores[task.metric]):.4f}"
        print(told, file=sys.stderr)
        return
    text, pair = read_prompt(start).strip(), None
    if task.head["paired"]:  # the second text, or what a question is about, on the lines after the first
        text, _, pair = text.partition("\n")
        if not pair:
            raise UserError("--start: two texts are wanted, with a line break between them")
    row = tasks.Row("--start", text, pair, words=text.split())
    header, lines = task.table([row], finetune.predict(model, task, [row]))
    if task.head["task"] == "tag":
        print("\n".join(f"{word}\t{tag}" for _, word, _, tag in lines))
    else:
        print("\n".join(f"{name:15} {value}" for name, value in zip(header, lines[0]) if value))


def main():
    for name, value, fine, wanted in (
            ("temperature", temperature, temperature >= 0, "at least 0"),
            ("top_k", top_k, top_k is None or top_k >= 1, "at least 1, or None"),
            ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1, or None"),
            ("min_p", min_p, min_p is None or 0 <= min_p <= 1, "from 0 to 1, or None"),
            ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0"),
            ("num_samples", num_samples, num_samples >= 1, "at least 1"),
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1")):
        if not fine:
            raise SettingError(f"--{name}={value}: must be {wanted}")
    run_device = pick_device(device)
    run_dtype, checkpoint = pick_dtype(dtype, run_device), read_run(out_dir)
    head = (checkpoint or {}).get("head") or {"task": "lm"}
    if head["task"] != "lm" and not export:
        tuned, task = finetune.task_of(checkpoint, run_device)
        judge(to_int8(tuned) if quantize else tuned, task, start)
        return
    model, tokenizer = build(out_dir, checkpoint, run_device, run_dtype)
    if export:
        write_pretrained(model, tokenizer, export)
        print(f"{export}: model and tokenizer, as transformers' from_pretrained reads them")
        return
    if quantize:
        model = to_int8(model)
    prompt = read_prompt(start)
    if head.get("instruct"):
        prompt = tasks.prompt_of(tasks.Row("", prompt.strip()))
    if not model.config.causal:
        print(prompt)
        for n, candidates in enumerate(fill(model, tokenizer, prompt), start=1):
            print(f"gap {n}:  " + "   ".join(f"{token!r} {prob:.1%}" for token, prob in candidates))
        return
    ids = tokenizer.encode(prompt, specials=True) or [tokenizer.eot]
    block_size = model.config.block_size
    if len(ids) > block_size:
        print(f"(the model reads {block_size} tokens: the last {block_size // 2} of the prompt's {len(ids)})")
    stops = [stop] if isinstance(stop, str) else stop
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
               repetition_penalty=repetition_penalty, compile=compile,
               generator=torch.Generator(run_device).manual_seed(seed))

    rows = 1 if stream else num_samples  # texts written at the same time
    for _ in range(num_samples // rows):
        tokens = model.stream(torch.tensor([ids] * rows, device=run_device), max_new_tokens, **how)
        if stream:
            texts = [as_text((token.item() for token in tokens), tokenizer, stops)]
        else:
            texts = [as_text(row, tokenizer, stops) for row in torch.stack(list(tokens), dim=1).tolist()]
        for text in texts:
            print(prompt, end="", flush=True)
            for piece in text:
                print(piece, end="", flush=True)
            print("\n---------------")


if __name__ == "__main__":
    launch(main, globals())
