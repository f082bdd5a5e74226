"""
Text to tokens: collect documents, clean and split them, train or load a tokenizer, write data/<dataset>/.

    python prepare.py                                         the Python standard library of this machine
    python prepare.py --dataset=shakespeare_char              tiny Shakespeare by bytes (downloaded, 1 MB)
    python prepare.py --source=novel.txt                      your own: a text file...
    python prepare.py --source=notes/ --vocab_size=2048       ...a folder of them...
    python prepare.py --source="books/*.txt" --tokenizer=gpt2 ...or a glob
    python prepare.py --source=a.jsonl.gz,hf:NAME --report    ...or several, and what is in them

A data set is train.bin, val.bin and test.bin (raw token ids, uint16 or uint32, little-endian) and meta.json.

Two passes, in little memory whatever the size: the first writes the cleaned documents one behind the other
into a temporary file, the spool, and keeps a few numbers of each, the index. What needs a view of the whole,
duplicates and splits, is decided on these. The second turns the spool into tokens.
"""
from __future__ import annotations

import codecs
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np

from config import SettingError, UserError, above, at_least, checked, launch, settings_of, values_of
from lib.clean import RULES, Progress, collect, near_copies
from lib.text import BLOCK, BUILT_IN, UNPACK, documents, locked, note
from lib.tokenizer import Tokenizer, encode_stream, make_tokenizer, read_texts, sample

# -----------------------------------------------------------------------------
# Settings
dataset: str = ""  # name of the folder under data/, or a built-in: python, shakespeare, shakespeare_char
source: str = ""  # file, folder, glob, URL, hf:NAME or built-in; several with commas; empty: the built-in's
encoding: str = "utf-8"  # of the text files
errors: Literal["strict", "replace", "ignore"] = "strict"  # what to do with bytes that are not in it
text_key: str = "text"  # of a .jsonl or an hf: data set; of a .csv or .tsv the column, by name or number

# clean: the text stays as it is unless asked for
nfc: bool = False  # one way to write an accented letter (Unicode NFC)
line_ends: bool = False  # \n for \r\n and \r
control_chars: bool = False  # take out control characters, but for line ends, tabs and form feeds
html: bool = False  # take out HTML tags
repeated_lines: bool = False  # of a line that comes several times in a row, keep one
scrub_pii: bool = False  # [EMAIL], [PHONE], [IP] and [KEY] for what looks like one
min_chars: at_least(0) = 1  # drop shorter documents
min_text: at_least(0.0, at_most=1.0) = 0.0  # drop those with less letters, digits and white space
near_duplicates: at_least(0.0, at_most=1.0) = 0.0  # drop those that share so much with another; try 0.6

tokenizer: str = ""  # bytes, bpe (of the text), gpt2, a .tiktoken file, a Hugging Face folder; empty: bpe
vocab_size: at_least(258) = 4096  # tokens of a bpe, specials included
sample_mb: at_least(1) = 100  # text that a bpe is trained on, at most, evenly from all of the training text
val_fraction: above(0.0, below=1.0) = 0.1  # share of the text for validation
test_fraction: at_least(0.0, below=1.0) = 0.1  # share kept for the very end
threads: at_least(0) = 0  # that tokenize; 0: one a core
overwrite: bool = False  # replace a data set that was made with other settings
report: bool = False  # print (and draw, with matplotlib) what is in the data set
show: at_least(0) = 0  # print so many of its documents
seed: at_least(0) = 0  # that picks those
# -----------------------------------------------------------------------------

FORMAT = 1  # of meta.json and the .bin files
SPLITS = ("train", "val", "test")


# -----------------------------------------------------------------------------
# Make a data set

def prepare(dataset: str = "", *, root: str | Path = "data", **settings) -> Path:
    """Make <root>/<dataset>/, whole or not at all, and return it. Does nothing if it is there already.

    settings: any of the above; the others are as they stand there. Raises TypeError for a name that is none,
    UserError for text that cannot be used, SettingError if the data set is there with other settings.
    """
    s = complete(dataset, settings)
    folder = Path(root) / s.dataset
    new = folder.with_name(f".{folder.name}.preparing")
    old = folder.with_name(f".{folder.name}.replaced")
    with locked(folder):
        settle(folder, new, old)  # after one that was killed
        if folder.exists() and not s.overwrite:
            if (folder / "meta.json").is_file() and read_meta(folder)["settings"] == of_the_data(s):
                print(f"{folder} is there already, made with the same settings")
                return folder
            raise SettingError(f"{folder}: is there already, made with other settings: --overwrite replaces "
                               "it, --dataset=NAME makes another")
        try:
            new.mkdir(parents=True)
            done = build(new, s, Path(root) / "downloads")
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
        except OSError as error:  # the disk is full, for one
            what = f"{error.filename or folder}: {error.strerror or error}"
            raise UserError(f"{what}: nothing changed") from None
        finally:
            settle(folder, new, old)
    print(f"{folder}: {done}")
    return folder


def settle(folder: Path, new: Path, old: Path) -> None:
    """Whatever became of a prepare: the data set is the new one or the old one, and nothing else is left."""
    if old.exists() and not folder.exists():  # between the two renames
        print(f"{folder}: put back as it was before a prepare that was killed")
        os.replace(old, folder)
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def complete(dataset: str, given: dict) -> SimpleNamespace:
    """All settings of a data set. Raises TypeError, SettingError."""
    known, values = settings_of(globals()), values_of(globals())
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"prepare() has no setting {name!r}")
        values[name] = checked(value, known[name].kind, f"--{name}")
    s = SimpleNamespace(**values)
    s.dataset = dataset or (default_name(s.source) if s.source else "python")
    if not s.source and s.dataset not in BUILT_IN:
        raise SettingError(f"--dataset={s.dataset}: not a built-in ({', '.join(BUILT_IN)}): give its "
                           "--source=")
    own_source, own_tokenizer = BUILT_IN.get(s.dataset, ("", "bpe"))
    s.source = s.source or own_source
    s.tokenizer = s.tokenizer or own_tokenizer
    if s.val_fraction + s.test_fraction >= 1:
        raise SettingError(f"--test_fraction={s.test_fraction}: must be below 1 with val_fraction")
    try:
        codecs.lookup(s.encoding)
    except LookupError:
        raise SettingError(f"--encoding={s.encoding}: Python knows no such encoding") from None
    return s


def of_the_data(s: SimpleNamespace) -> dict:
    """The settings that the result depends on."""
    other = ("dataset", "threads", "overwrite", "report", "show", "seed")
    return {name: value for name, value in vars(s).items() if name not in other}


def default_name(source: str) -> str:
    """novel of books/novel.txt.gz."""
    path = Path(source.split(",")[0].partition("#")[0].removeprefix("hf:"))
    stem = Path(path.stem).stem if path.suffix in UNPACK else path.stem
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in stem) or "text"


def build(folder: Path, s: SimpleNamespace, downloads: Path) -> str:
    """Both passes, into an empty folder: the .bin files and meta.json. Returns a summary."""
    began = time.monotonic()
    spool, found = folder / "spool.tmp", {}
    index = read(spool, s, downloads, found)
    spans = split(spool, index, s.val_fraction, s.test_fraction)
    size = {name: int((rows[:, 1] - rows[:, 0]).sum()) for name, rows in spans.items()}
    codec = tokenizer_for(s, spool, spans["train"], size["train"])
    tick = Progress("tokenizing", sum(size.values()))
    splits = {}
    for name, rows in spans.items():
        texts = read_texts(spool, rows, not isinstance(codec, Tokenizer), tick)
        if len(index) == 1:  # no ends inside
            texts = ((text, False) for text, _ in texts)
        ids = encode_stream(codec, texts, s.threads or os.cpu_count() or 1)
        its = write_split(folder / f"{name}.bin", ids, codec.vocab_size)
        splits[name] = {**its, "bytes": size[name], "documents": len(rows)}
        if its["tokens"] < 32 and (name != "test" or s.test_fraction):
            raise UserError(f"{s.source}: only {its['tokens']} tokens for {name}.bin, too few to be of use: "
                            "give more text, or larger fractions")
        print(f"{name:>6} {len(rows):8,} documents {size[name]:14,} bytes {its['tokens']:14,} tokens")
    spool.unlink()
    meta = {"format": FORMAT, "dtype": bin_dtype(codec.vocab_size).name, "vocab_size": codec.vocab_size,
            "splits": splits, "settings": of_the_data(s), "report": found, "tokenizer": codec.to_dict()}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    n_tokens = sum(its["tokens"] for its in splits.values())
    took = time.monotonic() - began
    return f"{tick.total / n_tokens:.2f} bytes a token, in {took:.1f} s ({tick.total / 1e6 / took:.1f} MB/s)"


# -----------------------------------------------------------------------------
# First pass: read, clean, drop copies

def read(spool: Path, s: SimpleNamespace, downloads: Path, found: dict) -> np.ndarray:
    """The documents to keep, into the spool. Returns their index. found: counts, as in note()."""
    print(f"reading {s.source}")
    docs = documents(s.source, s.encoding, s.errors, s.text_key, found, downloads)
    rules = [rule for rule in ("nfc", *RULES) if vars(s)[rule]]
    index = collect(docs, spool, rules, s.min_chars, s.min_text, s.near_duplicates > 0, found)
    copy = np.ones(len(index), bool)
    copy[np.unique(index["hash"], return_index=True)[1]] = False  # the first of each
    index = without(copy, "duplicates", index, spool, found)
    if s.near_duplicates:
        splits = splits_of(index["hash"], s.val_fraction, s.test_fraction)
        near = near_copies(index["sketch"], splits, s.near_duplicates)
        index = without(near, "near_duplicates", index, spool, found)
    if not len(index):
        raise UserError(f"{s.source}: no document is left ({', '.join(found)})")
    return index


def without(drop: np.ndarray, what: str, index: np.ndarray, spool: Path, found: dict) -> np.ndarray:
    """The index less the documents to drop, which are counted."""
    if drop.any():
        first = index[drop][0]
        with open(spool, "rb") as f:
            f.seek(first["start"])
            example = f.read(min(int(first["size"]), 240)).decode("utf-8", "ignore")[:60]
        note(found, what, repr(example), documents=int(drop.sum()))
    return index[~drop]


# -----------------------------------------------------------------------------
# Split

def splits_of(hashes: np.ndarray, val_fraction: float, test_fraction: float) -> np.ndarray:
    """0, 1, 2 for train, val, test, by the text's hash alone: other documents may come and go, it stays."""
    x = hashes / 2.0**64
    return np.where(x < test_fraction, 2, np.where(x < test_fraction + val_fraction, 1, 0))


def split(spool: Path, index: np.ndarray, val_fraction: float, test_fraction: float) -> dict[str, np.ndarray]:
    """The (first, last + 1) byte in the spool of each document, (documents, 2) for each split.

    Too few documents for that, or one, are cut in a row into train, val and test, by characters.
    """
    starts, ends = index["start"], index["start"] + index["size"]
    which = splits_of(index["hash"], val_fraction, test_fraction)
    present = np.bincount(which, minlength=3) > 0
    if len(index) > 1 and present[:2].all() and (present[2] or not test_fraction):
        rows = np.stack((starts, ends), axis=1)
        return {name: rows[which == i] for i, name in enumerate(SPLITS)}
    edges = [0]
    for share in (1 - val_fraction - test_fraction, 1 - test_fraction, 1):
        edges.append(byte_of_char(spool, index, int(index["chars"].sum() * share)))
    found = {}
    for i, name in enumerate(SPLITS):
        rows = np.stack((starts, ends), axis=1).clip(edges[i], edges[i + 1])
        found[name] = rows[rows[:, 0] < rows[:, 1]]
    return found


def byte_of_char(spool: Path, index: np.ndarray, n: int) -> int:
    """Where in the spool the n-th character of all documents begins."""
    before = np.cumsum(index["chars"]) - index["chars"]
    row = int(np.searchsorted(before, n, side="right")) - 1
    left, at = n - int(before[row]), int(index["start"][row])
    with open(spool, "rb") as f:
        f.seek(at)
        while left:
            data = np.frombuffer(f.read(BLOCK), np.uint8)
            begins = np.flatnonzero(data & 0xC0 != 0x80)  # all but bytes that go on with a character
            if left < len(begins):
                return at + int(begins[left])
            left, at = left - len(begins), at + len(data)
    return at


# -----------------------------------------------------------------------------
# Second pass: tokens

def tokenizer_for(s: SimpleNamespace, spool: Path, spans: np.ndarray, size: int):
    """The one that the settings name. A bpe is trained on the training text only: what the model is tested on
    stays unseen by the tokenizer too."""
    texts, share = [], min(s.sample_mb * 1e6 / max(size, 1), 1)
    if s.tokenizer == "bpe":
        print(f"training a tokenizer of {s.vocab_size:,} tokens on {share * size / 1e6:.1f} MB")
        texts = sample(read_texts(spool, spans, False, lambda n: None), share)
    codec = make_tokenizer(s.tokenizer, texts, s.vocab_size)
    if s.tokenizer == "bpe" and codec.vocab_size < s.vocab_size:
        print(f"the text has pairs for {codec.vocab_size:,} tokens only")
    return codec


def write_split(path: Path, arrays: Iterator[np.ndarray], vocab_size: int) -> dict:
    """Arrays of tokens to a .bin. Raises UserError for an id that the tokenizer should not have given."""
    sha, tokens = hashlib.sha256(), 0
    with open(path, "wb") as f:
        for ids in arrays:
            if len(ids) and int(ids.max()) >= vocab_size:  # astype alone would wrap around without a word
                raise UserError(f"{path.name}: token id {int(ids.max())} is out of range: the tokenizer says "
                                f"that it has {vocab_size:,}")
            data = ids.astype(bin_dtype(vocab_size)).tobytes()
            f.write(data)
            sha.update(data)
            tokens += len(ids)
    return {"tokens": tokens, "sha256": sha.hexdigest()}


def bin_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


# -----------------------------------------------------------------------------
# Read, for those who train

def read_meta(folder: Path) -> dict:
    """meta.json. Raises UserError if it is missing or damaged."""
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
    """The token ids, on disk until looked at. Raises UserError if the file is not what meta.json says."""
    path = Path(folder) / f"{split}.bin"
    dtype, tokens = np.dtype(meta["dtype"]).newbyteorder("<"), meta["splits"][split]["tokens"]
    size = path.stat().st_size if path.is_file() else 0
    if size != tokens * dtype.itemsize:
        raise UserError(f"{path}: {size} bytes, not meta.json's {tokens * dtype.itemsize}: make it again")
    return np.memmap(path, dtype=dtype, mode="r") if tokens else np.zeros(0, dtype)


# -----------------------------------------------------------------------------
# Look

def print_report(folder: Path) -> None:
    """What is in a data set, what was dropped and why; with matplotlib as report.png in its folder too."""
    meta = read_meta(folder)
    codec, lengths = Tokenizer.from_dict(meta["tokenizer"]), []
    counts = np.zeros(meta["vocab_size"], np.int64)
    for split in SPLITS:
        ids, its = read_split(folder, split, meta), meta["splits"][split]
        if its["tokens"]:
            for i in range(0, len(ids), BLOCK):
                counts += np.bincount(ids[i:i + BLOCK], minlength=len(counts))
            lengths.append(np.diff(document_ends(ids, codec.eot), prepend=0))
            low, middle, high = np.quantile(lengths[-1], (0.1, 0.5, 0.9))
            print(f"{split:>6}: {its['bytes'] / its['tokens']:.3f} bytes a token; {its['documents']:,} "
                  f"documents of {low:,.0f}, {middle:,.0f}, {high:,.0f} tokens (10%, 50%, 90%)")
    order = np.argsort(-counts, kind="stable")[:np.count_nonzero(counts)]
    print(f"{len(order):,} of {len(counts):,} tokens are used, these the most:", *(
        f"{codec.decode([i])!r} {counts[i] / counts.sum():.1%}" for i in order[:20].tolist()))
    for what, entry in meta["report"].items():
        print(f"{what}: {entry['documents']:,} documents, {entry['times']:,} times: {entry['example']}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(np.concatenate(lengths), bins=np.geomspace(1, max(map(np.max, lengths)) + 1, 40))
    left.set(xscale="log", xlabel="tokens in a document", ylabel="documents")
    right.loglog(np.arange(1, len(order) + 1), counts[order])
    right.set(xlabel="rank of a token", ylabel="how often it comes")
    figure.savefig(folder / "report.png", dpi=120)


def document_ends(ids: np.ndarray, eot: int) -> np.ndarray:
    """One past the last token of each document."""
    ends = [np.flatnonzero(ids[i:i + BLOCK] == eot) + i + 1 for i in range(0, len(ids), BLOCK)]
    return np.union1d(np.concatenate(ends), len(ids))


def show_documents(folder: Path, n: int, seed: int) -> None:
    """Print some, decoded from train.bin, picked by the seed; of a long one the beginning."""
    meta = read_meta(folder)
    codec, ids = Tokenizer.from_dict(meta["tokenizer"]), read_split(folder, "train", meta)
    ends = document_ends(ids, codec.eot)
    for i in np.random.default_rng(seed).permutation(len(ends))[:n].tolist():
        start, end = ends[i - 1] if i else 0, ends[i]
        print(f"\n--- document {i:,} of {len(ends):,} in train.bin, {end - start:,} tokens")
        print(codec.decode(t for t in ids[start:min(end, start + 500)].tolist() if t != codec.eot))


def main():
    folder = prepare(**values_of(globals()))
    if report:
        print_report(folder)
    if show:
        show_documents(folder, show, seed)


if __name__ == "__main__":
    launch(main, globals())
