"""
Where published models are, a folder here or an id on Hugging Face's hub, and what is in their files.

    folder = folder_of("openai-community/gpt2")
    settings = read_json(folder / "config.json")
    weights = open_weights(folder, WEIGHT_FILES)

Nobody vouches for these files: whatever is wrong with one is a ValueError in one line, and nothing is run.
"""
import json
import os
import re
import sys
import textwrap
import zipfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

from config import near

NAMES = {  # the hub's owners today -> their models' names from before it had owners
    "openai-community": "gpt2 gpt2-medium gpt2-large gpt2-xl openai-gpt",
    "google-bert": "bert-base-uncased bert-base-cased bert-base-chinese bert-base-multilingual-cased "
                   "bert-base-multilingual-uncased bert-base-german-cased bert-large-uncased "
                   "bert-large-cased bert-large-uncased-whole-word-masking",
    "FacebookAI": "roberta-base roberta-large roberta-large-mnli xlm-roberta-base xlm-roberta-large",
    "distilbert": "distilgpt2 distilroberta-base distilbert-base-uncased distilbert-base-cased "
                  "distilbert-base-multilingual-cased distilbert-base-uncased-finetuned-sst-2-english",
}
OWNERS = {name: owner for owner, names in NAMES.items() for name in names.split()}
ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # one, or several with an index; the first there is
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
POINTER = b"version https://git-lfs"  # what a clone without Git LFS has instead of a large file
OTHER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # settings, vocabularies, templates


def say(what: str) -> None:
    """On stderr, once: what is printed may be a table."""
    if os.environ.get("RANK", "0") == "0":
        print(f"({what})", file=sys.stderr)


def is_published(path: str | Path) -> bool:
    """Is it a folder as Hugging Face's libraries write them, or, if it is nothing here, an id on the hub?"""
    path = Path(path)
    if path.exists():
        return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()
    return path.as_posix() in OWNERS or ID.fullmatch(path.as_posix()) is not None


def full_id(name: str) -> str:
    return f"{OWNERS[name]}/{name}" if name in OWNERS else name


def folder_of(path: str | Path, weights: bool = True) -> Path:
    """The folder itself, or that of an id in the hub's cache, with its weights. Raises FileNotFoundError."""
    if Path(path).exists():
        return Path(path)
    name, parent = Path(path).as_posix(), Path(path).parent
    runs = sorted(parent.glob("*/settings.json"), key=os.path.getmtime, reverse=True)
    if runs and name not in OWNERS:
        runs = [file.parent.name for file in runs]
        others = near(Path(path).name, runs) or runs[:8]
        raise FileNotFoundError(f"{name}: no such run; {parent} has {', '.join(others)}"
                                + (" ..." if len(runs) > len(others) else ""))
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{name}: no such folder here; if it is a model on Hugging Face's hub: "
                                "pip install huggingface_hub") from None
    try:
        for files in zip(WEIGHT_FILES, ADAPTER_FILES) if weights else ((),):
            wanted = OTHER_FILES + [file.replace("model.", "model*.") for file in files]
            folder = Path(snapshot_download(full_id(name), allow_patterns=wanted))
            if any(folder.glob("*.safetensors")):
                break
    except Exception as error:  # of many kinds: no such name, no network, no permission
        if cached_as(name):
            return cached_as(name)
        reason = textwrap.shorten(str(error), 160, placeholder=" ...")
        raise FileNotFoundError(f"{name}: neither a folder here nor a model that Hugging Face's hub gives us "
                                f"({reason})") from None
    return folder


def cached_as(name: str) -> Path | None:
    """Where transformers keeps a model that it was asked for by its name from before the hub had owners."""
    from huggingface_hub import try_to_load_from_cache
    short = name.rpartition("/")[2]
    if short not in OWNERS or full_id(short) != full_id(name):
        return None
    found = [try_to_load_from_cache(short, file) for file in WEIGHT_FILES]
    return next((Path(file).parent for file in found if isinstance(file, str)), None)


def read_json(path: Path, kind: type = dict) -> dict | list:
    """A file of settings; one that is not there has none. Raises ValueError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return kind()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({str(error)[:80]})") from None
    if not isinstance(found, kind):
        raise ValueError(f"{path}: damaged (wanted a {kind.__name__}, got a {type(found).__name__})")
    return found


def base_of(folder: Path) -> tuple[Path, dict]:
    """The folder of the model that an adapter of PEFT was made for, and its settings; else itself, and {}."""
    adapter = read_json(folder / "adapter_config.json")
    if not adapter or (folder / "config.json").is_file():
        return folder, {}
    base = adapter.get("base_model_name_or_path")
    try:
        return folder_of(base if isinstance(base, str) else "?"), adapter
    except FileNotFoundError as error:
        raise FileNotFoundError(f"an adapter of {base!r}, which cannot be had: {error}") from None


def folder_of_tokenizer(path: str | Path) -> Path:
    """An adapter may leave the tokenizer to its base."""
    folder = folder_of(path)
    return folder if (folder / "tokenizer_config.json").is_file() else base_of(folder)[0]


# -----------------------------------------------------------------------------
# Weights

def open_weights(folder: Path, names: tuple[str, ...]) -> dict[str, Callable]:
    """Their weights, each with a function that reads it."""
    for name in names:
        index = folder / f"{name}.index.json"
        if not (folder / name).is_file() and not index.is_file():
            continue
        files = [name]
        if index.is_file():
            files = read_json(index).get("weight_map", {})
            files = sorted(set(files.values())) if isinstance(files, dict) else []
            if not files or any(not isinstance(file, str) or Path(file).name != file for file in files):
                raise ValueError(f"{index}: damaged, or names files outside of its folder")
        opened, weights = open_safetensors if name.endswith(".safetensors") else open_bin, {}
        for file in files:
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder}: has no {file}, which {index.name} names")
            with open(folder / file, "rb") as f:
                if f.read(len(POINTER)) == POINTER:
                    raise ValueError(f"{folder / file}: only a pointer to it: git lfs pull, or download it")
            weights |= opened(folder / file)
        return weights
    raise FileNotFoundError(f"{folder}: has no {' and no '.join(names)}")


def open_safetensors(file: Path) -> dict[str, Callable]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError("Hugging Face models need safetensors: pip install safetensors") from None
    try:
        opened = safe_open(file, framework="pt")  # reads a weight when it is asked for
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged ({error})") from None
    return {name: partial(opened.get_tensor, name) for name in opened.keys()}


def open_bin(file: Path) -> dict[str, Callable]:
    """What torch saved: tensors alone, for nothing in a file may run. Mapped into memory if it is a zip; one
    of before torch 1.6 is read whole, twice, so that one of many files is in memory at a time."""
    import torch  # slow, and prepare.py needs none

    def read():
        try:
            is_zip = zipfile.is_zipfile(file)
            if is_zip:
                with zipfile.ZipFile(file) as f:  # whose checksums torch.load ignores
                    if f.testzip() is not None:
                        raise ValueError("a checksum is wrong")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
        except Exception as error:  # a damaged file can fail in any way
            raise ValueError(f"{file}: damaged, or more than tensors ({str(error).strip()[:80]!r})") from None

    found, again = read(), lru_cache(1)(read)
    if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
        raise ValueError(f"{file}: wanted names and tensors, got others")
    if zipfile.is_zipfile(file):
        return {name: weight.detach for name, weight in found.items()}
    return {name: partial(lambda name: again()[name], name) for name in found}
