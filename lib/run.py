"""
Checkpoints: written so that a whole one is there at every moment, read so that a damaged one is found out.

    save_checkpoint(Path("out/ckpt.pt"), {"version": 1, "model": model.state_dict(), ...})
    model, tokenizer = load_model("out")

One dict of tensors and plain values: nothing in the file can run code.
"""
import contextlib
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Optional

import torch
import torch.distributed as dist

from config import UserError
from lib.tokenizer import HubTokenizer, Tokenizer
from model import Config, Transformer

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name


@contextlib.contextmanager
def replacing(path: Path, keep: Optional[Path] = None):
    """A file to write into, which takes the place of `path` once it is whole and on the disk.

    keep: where to move what was there. Raises UserError where it cannot be written, and leaves the old one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        raise cannot_write(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def cannot_write(path: Path, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0]
    return UserError(f"{path}: cannot be written ({reason}): make room, then --init_from=resume goes on with "
                     "what was saved before, which is unharmed")


def write_text(path: Path, text: str) -> None:
    with replacing(path) as f:
        f.write(text.encode("utf-8"))


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """There is a whole one at every moment: the last ckpt.pt stays, as ckpt.prev.pt. Raises UserError."""
    with replacing(path, path.with_name("ckpt.prev.pt") if path.name == "ckpt.pt" else None) as f:
        torch.save(checkpoint, f)


def find_checkpoint(folder: str | Path, names=("best.pt", "ckpt.pt", "ckpt.prev.pt")) -> tuple[Path, dict]:
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
            found = torch.load(path, map_location="cpu", weights_only=True)
            if found["version"] != 1:
                raise ValueError(f"version {found['version']}")
            return path, found
        except Exception as error:  # a damaged file can fail in any way
            damaged.append(f"{path} is damaged, or no checkpoint of ours ({type(error).__name__})")
            if main_process():
                print(f"warning: {damaged[-1]}: trying the one before", file=sys.stderr)
    raise UserError("; ".join(damaged) or f"{folder}: no checkpoint here, none of {', '.join(names)}: "
                    "train one first, python train.py config/small.py")


def load_checkpoint(folder: str | Path, names=("best.pt", "ckpt.pt", "ckpt.prev.pt")) -> dict:
    return find_checkpoint(folder, names)[1]


def model_of(checkpoint: dict, **changes) -> Transformer:
    """changes: of its settings; a shorter block_size cuts learned positions. Raises UserError."""
    try:
        model = Transformer(Config(**{**checkpoint["model_args"], **changes}))
        rows = model.config.pos_offset + model.config.block_size
        model.load_state_dict({name: weight[:rows] if name == "positions.wpe.weight" else weight
                               for name, weight in checkpoint["model"].items()})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint does not fit this version of model.py ({type(error).__name__}: "
                        f"{str(error).strip().splitlines()[-1].strip()})") from None
    return model


def load_model(path: str | Path, dtype: torch.dtype = torch.float32,
               **changes) -> tuple[Transformer, Tokenizer | HubTokenizer]:
    """A run's model, the best one, or Hugging Face's (a folder, or an id on the hub), and its tokenizer.

    dtype: of the weights. changes: dropout or block_size, where they are to differ. Raises UserError.
    """
    path, name = Path(path), Path(path).as_posix()
    try:
        if (path / "config.json").is_file() or not path.exists() and HUB_ID.fullmatch(name):
            model = Transformer.from_pretrained(name, dtype=dtype, **changes)
            return model.train(), Tokenizer.from_pretrained(name)
        checkpoint = load_checkpoint(path)
        return model_of(checkpoint, **changes).to(dtype), Tokenizer.from_dict(checkpoint["tokenizer"])
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0].removeprefix(f'{path}: ')}") from None


def main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
