"""
Text to tokens: collect documents, split them, train or load a tokenizer, write data/<dataset>/.

    python prepare.py                                         the Python standard library of this machine
    python prepare.py --dataset=shakespeare_char              tiny Shakespeare by bytes (downloaded, 1 MB)
    python prepare.py --source=novel.txt                      your own: a text file...
    python prepare.py --source=notes/ --vocab_size=2048       ...a folder of them...
    python prepare.py --source="books/*.txt" --tokenizer=gpt2 ...or a glob

A data set is train.bin, val.bin and test.bin (raw token ids, uint16 or uint32, little-endian) and meta.json.
"""
import codecs
import glob
import hashlib
import json
import os
import shutil
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from config import SettingError, UserError, run
from tokenizer import Tokenizer, make_tokenizer

# -----------------------------------------------------------------------------
# Settings
dataset: str = ""  # name of the folder under data/, or a built-in: python, shakespeare, shakespeare_char
source: str = ""  # a text file, a folder or a glob of them; empty: the built-in's own
tokenizer: str = ""  # bytes, bpe (of the text), gpt2, a .tiktoken file, a Hugging Face folder; empty: bpe
vocab_size: int = 4096  # tokens of a bpe, specials included
val_fraction: float = 0.1  # share of the text for validation
test_fraction: float = 0.1  # share kept for the very end
encoding: str = "utf-8"  # of the text files
overwrite: bool = False  # replace a data set that was made with other settings
# -----------------------------------------------------------------------------

FORMAT = 1  # of meta.json and the .bin files
SPLITS = ("train", "val", "test")

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
BUILT_IN = {  # dataset -> its source and tokenizer
    "python": ("python", "bpe"),
    "shakespeare": (SHAKESPEARE, "bpe"),
    "shakespeare_char": (SHAKESPEARE, "bytes"),
}
SHA256 = {SHAKESPEARE: "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}


# -----------------------------------------------------------------------------
# Collect

def documents(source: str, encoding: str = "utf-8") -> Iterator[tuple[str, str]]:
    """(name, text) of each document; a file is one. Raises UserError, with its name, for what is not text."""
    if source == "python":
        yield from standard_library()
        return
    path = Path(source)
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file()
                 and not any(part.startswith(".") for part in p.relative_to(path).parts)]
        found = 0
        for file in files:
            data = file.read_bytes()
            if data and not is_binary(data, encoding):  # a folder may hold pictures too
                found += 1
                yield file.relative_to(path).as_posix(), decode(data, str(file), encoding)
        if not found:
            raise UserError(f"{source}: no text in this folder ({len(files)} files, all empty or binary)")
        return
    files = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(source, recursive=True))]
    if not any(file.is_file() for file in files):
        raise UserError(f"{source}: no such file or folder")
    for file in filter(Path.is_file, files):
        data = file.read_bytes()
        if not data:
            raise UserError(f"{file}: the file is empty")
        if is_binary(data, encoding):
            raise UserError(f"{file}: a binary file (byte 0 at offset {data.index(0)}), where text is wanted")
        yield str(file), decode(data, str(file), encoding)


def is_binary(data: bytes, encoding: str) -> bool:
    return b"\0" in data and not codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


def decode(data: bytes, name: str, encoding: str) -> str:
    try:
        return data.removeprefix(codecs.BOM_UTF8 if encoding == "utf-8" else b"").decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not {encoding} (byte 0x{data[error.start]:02x} at offset {error.start}): "
                        "give the right --encoding=..., latin-1 for instance") from None


def standard_library() -> Iterator[tuple[str, str]]:
    """The Python that runs this, without tests and what pip installed: a corpus that needs no download."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    found = 0
    for file in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if not skip.intersection(file.relative_to(root).parts):
            try:
                text = file.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text:
                found += 1
                yield file.relative_to(root).as_posix(), text
    if not found:
        raise UserError(f"{root}: this Python carries no source of its library: give --source=FILE or FOLDER")


def download(url: str, folder: Path) -> Path:
    """Fetch once into `folder`. Raises UserError where there is no network or another file came."""
    target = folder / (hashlib.sha256(url.encode()).hexdigest()[:16] + ".txt")
    if not target.is_file():
        print(f"downloading {url}")
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                data = response.read()
        except OSError as error:
            raise UserError(f"{url}: cannot be downloaded ({error}): fetch it another way, "
                            "then --source=FILE") from None
        found = hashlib.sha256(data).hexdigest()
        if found != SHA256.get(url, found):
            raise UserError(f"{url}: another file than expected came (sha256 {found[:16]}...): try again")
        folder.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        part.write_bytes(data)
        os.replace(part, target)
    return target


# -----------------------------------------------------------------------------
# Split

def split_of(text: str, val_fraction: float, test_fraction: float) -> str:
    """A document's split is a function of its text alone: other documents may come and go, it stays."""
    x = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    return "test" if x < test_fraction else "val" if x < test_fraction + val_fraction else "train"


def cut(text: str, val_fraction: float, test_fraction: float) -> list[str]:
    """One text into contiguous train, val and test."""
    a = int(len(text) * (1 - val_fraction - test_fraction))
    b = int(len(text) * (1 - test_fraction))
    return [text[:a], text[a:b], text[b:]]


# -----------------------------------------------------------------------------
# Write

def prepare(dataset: str, source: str = "", tokenizer: str = "", vocab_size: int = 4096,
            val_fraction: float = 0.1, test_fraction: float = 0.1, encoding: str = "utf-8",
            overwrite: bool = False, root: str = "data") -> Path:
    """Make <root>/<dataset>/, whole or not at all, and return it. Does nothing where it stands already.

    Raises UserError for text that cannot be used, SettingError where the data set stands with other settings.
    """
    start = time.time()
    dataset = dataset or (default_name(source) if source else "python")
    if not source and dataset not in BUILT_IN:
        raise SettingError(f"--dataset={dataset}: not a built-in ({', '.join(BUILT_IN)}): give its text by "
                           f"--source=FILE, FOLDER or GLOB")
    own_source, own_tokenizer = BUILT_IN.get(dataset, ("", "bpe"))
    source, tokenizer = source or own_source, tokenizer or own_tokenizer
    if not (val_fraction > 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
        raise SettingError(f"--val_fraction={val_fraction} --test_fraction={test_fraction}: the first must "
                           "be above 0, the second at least 0, both together below 1")
    if tokenizer == "bpe" and vocab_size < 258:
        raise SettingError(f"--vocab_size={vocab_size}: must be at least 258 (256 bytes and two specials)")
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise SettingError(f"--encoding={encoding}: Python knows no such encoding") from None
    settings = dict(source=source, tokenizer=tokenizer, vocab_size=vocab_size, val_fraction=val_fraction,
                    test_fraction=test_fraction, encoding=encoding)

    folder = Path(root) / dataset
    if folder.exists() and not overwrite:
        if (folder / "meta.json").is_file() and read_meta(folder)["settings"] == settings:
            print(f"{folder} is there already, made with the same settings")
            return folder
        raise SettingError(f"{folder}: is there already, made with other settings: --overwrite replaces it, "
                           "--dataset=NAME makes another")

    file = str(download(source, Path(root) / "downloads")) if source.startswith("https:") else source
    print(f"reading {source}")
    parts = {split: [] for split in SPLITS}
    texts = [text for _, text in documents(file, encoding)]
    for text in texts:
        parts[split_of(text, val_fraction, test_fraction)].append(text)
    wanted = [split for split, share in zip(SPLITS, (1, val_fraction, test_fraction)) if share > 0]
    if len(texts) == 1 or not all(parts[split] for split in wanted):  # too few to deal out: one text, cut
        pieces = cut("\n".join(texts), val_fraction, test_fraction)
        parts = {split: [piece] for split, piece in zip(SPLITS, pieces)}
    ends = len(texts) > 1  # a lone text has no ends inside

    if tokenizer == "bpe":
        megabytes = sum(map(len, parts["train"])) / 1e6
        print(f"training a tokenizer of {vocab_size:,} tokens on {megabytes:.1f} MB")
    # on the training text only: what is tested on stays unseen, by the tokenizer too
    codec = make_tokenizer(tokenizer, parts["train"], vocab_size)
    if tokenizer == "bpe" and codec.vocab_size < vocab_size:
        print(f"the text has pairs for {codec.vocab_size:,} tokens only")

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (folder.with_name(f".{dataset}.{os.getpid()}.{what}") for what in ("part", "old"))
    partial.mkdir()
    try:
        splits = {split: write_split(partial / f"{split}.bin", parts[split], codec, ends) for split in SPLITS}
        for split in wanted:
            if splits[split]["tokens"] < 32:
                raise UserError(f"{source}: only {splits[split]['tokens']} tokens for {split}.bin, too few "
                                "to be of use: give more text, or larger fractions")
        meta = {"format": FORMAT, "dtype": bin_dtype(codec.vocab_size).name, "vocab_size": codec.vocab_size,
                "splits": splits, "settings": settings, "tokenizer": codec.to_dict()}
        (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

    n_bytes, n_tokens = (sum(splits[split][key] for split in SPLITS) for key in ("bytes", "tokens"))
    for split in SPLITS:
        s = splits[split]
        print(f"{split:>6} {s['documents']:8,} documents {s['bytes']:14,} bytes {s['tokens']:14,} tokens")
    print(f"{folder}: {n_bytes / n_tokens:.2f} bytes a token, in {time.time() - start:.1f} s")
    return folder


def write_split(path: Path, texts: list[str], codec: Tokenizer, ends: bool) -> dict:
    """The tokens of `texts` to one .bin, <|endoftext|> behind each document if `ends`."""
    dtype, sha = bin_dtype(codec.vocab_size), hashlib.sha256()
    tokens = 0
    with open(path, "wb") as f:
        for i in range(0, len(texts), 64):  # bounds the memory
            for ids in codec.encode_batch(texts[i:i + 64]):
                data = to_bin(np.append(ids, codec.eot) if ends else ids, dtype)
                f.write(data)
                sha.update(data)
                tokens += len(data) // dtype.itemsize
    n_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    return {"tokens": tokens, "bytes": n_bytes, "documents": len(texts), "sha256": sha.hexdigest()}


def bin_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def to_bin(ids: np.ndarray, dtype: np.dtype) -> bytes:
    """Raises ValueError for an id that does not fit: astype alone would wrap around without a word."""
    if len(ids) and int(ids.max()) > np.iinfo(dtype).max:
        raise ValueError(f"token id {int(ids.max())} does not fit {dtype.name}")
    return ids.astype(dtype).tobytes()


def default_name(source: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(source).stem) or "text"


# -----------------------------------------------------------------------------
# Read, for those who train

def read_meta(folder: Path) -> dict:
    """meta.json. Raises UserError where it is missing or damaged."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no data set here: make one, see python prepare.py --help") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}): make the data set again, with --overwrite") from None
    if meta.get("format") != FORMAT:
        raise UserError(f"{path}: format {meta.get('format')}, wanted {FORMAT}: make the data set again")
    return meta


def read_split(folder: Path, split: str, meta: dict) -> np.ndarray:
    """The token ids, on disk until looked at. Raises UserError where the file is not what meta.json says."""
    path = Path(folder) / f"{split}.bin"
    dtype, tokens = np.dtype(meta["dtype"]).newbyteorder("<"), meta["splits"][split]["tokens"]
    size = path.stat().st_size if path.is_file() else 0
    if size != tokens * dtype.itemsize:
        raise UserError(f"{path}: {size} bytes, not meta.json's {tokens * dtype.itemsize}: make it again")
    return np.memmap(path, dtype=dtype, mode="r") if tokens else np.zeros(0, dtype)


def main():
    prepare(dataset, source, tokenizer, vocab_size, val_fraction, test_fraction, encoding, overwrite)


if __name__ == "__main__":
    run(main, globals())
