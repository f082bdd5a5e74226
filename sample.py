"""
Use a checkpoint: continue a text.

    python sample.py                                              the newest run under out/
    python sample.py --out_dir=out/small --start="def main("      a prompt of your own
    python sample.py --start=FILE:prompt.txt --num_samples=3 --temperature=0.5

From Python, `load` is all it takes:

    from sample import load
    model, tokenizer = load("out/small")
"""
import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Optional, Union

import torch

from config import SettingError, UserError, run
from model import Config, Transformer
from prepare import Tokenizer
from train import load_checkpoint, pick_device

# -----------------------------------------------------------------------------
# Settings
out_dir: str = "out"  # a run's folder, or a folder of runs: the newest of them
start: str = "\n"  # the prompt; FILE:path reads it from a file; special tokens are known by their names
num_samples: int = 1  # texts to write
max_new_tokens: int = 300  # length of each, at most
temperature: float = 0.8  # 0: always the likeliest token; 1: as the model has it; above: wilder
top_k: Optional[int] = 200  # choose among so many of the likeliest tokens only; None: all
top_p: Optional[float] = None  # choose among the likeliest that together have this probability; None: all
stop: Union[str, list] = ""  # end before this text, or the first of several: --stop="['#', 'def ']"
stream: bool = True  # print a text as it comes; False: all samples at once, faster for many
seed: int = 1337  # the same seed, the same text
device: str = "auto"  # auto: cuda, else mps, else cpu
# -----------------------------------------------------------------------------


def load(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Transformer, Tokenizer]:
    """The best model of a run (else its latest), ready to use, and its tokenizer. Needs no data/.

    folder: where train.py saved, or a folder of such folders: then the newest.
    Raises UserError where there is no checkpoint, or not one of ours.
    """
    checkpoint = load_checkpoint(newest_run(Path(folder)))
    try:
        model = Transformer(Config(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint["model"])
        return model.to(device).eval(), Tokenizer.from_dict(checkpoint["tokenizer"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: not a checkpoint of this version of model.py "
                        f"({type(error).__name__}: {str(error).splitlines()[0]})") from None


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


def as_text(ids: Iterable[int], tokenizer: Tokenizer, stops: Iterable[str] = ()) -> Iterator[str]:
    """Token ids to text, piece by piece: never half a character, and nothing of a stop string.

    Ends before the first stop string, and at <|endoftext|>.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps the bytes of an unfinished character
    stops = [stop for stop in stops if stop]
    held = ""  # may be the beginning of a stop string
    for i in ids:
        if i == tokenizer.eot:
            break
        held += decoder.decode(tokenizer.decode_one(i))
        found = [held.index(stop) for stop in stops if stop in held]
        if found:
            yield held[:min(found)]
            return
        keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[:len(held) - keep]
        held = held[len(held) - keep:]
    yield held + decoder.decode(b"", final=True)


def main():
    for name, value, fine, wanted in (
            ("temperature", temperature, temperature >= 0, "at least 0"),
            ("top_k", top_k, top_k is None or top_k >= 1, "at least 1, or None"),
            ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1, or None"),
            ("num_samples", num_samples, num_samples >= 1, "at least 1"),
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1")):
        if not fine:
            raise SettingError(f"--{name}={value}: must be {wanted}")
    run_device = pick_device(device)
    model, tokenizer = load(out_dir, run_device)
    prompt = read_prompt(start)
    ids = tokenizer.encode(prompt, specials=True) or [tokenizer.eot]
    block_size = model.config.block_size
    if len(ids) > block_size:
        print(f"(the model reads {block_size} tokens: the last {block_size // 2} of the prompt's {len(ids)})")
    stops = [stop] if isinstance(stop, str) else stop
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p,
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
    run(main, globals())
