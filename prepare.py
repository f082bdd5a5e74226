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
import codecs
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from config import SettingError, UserError, launch
from lib.text import BLOCK, BUILT_IN, RULES, UNPACK, Progress, collect, documents, near_ones, note
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
min_chars: int = 1  # drop shorter documents
min_text: float = 0.0  # drop documents with a smaller share of letters, digits and white space
near_duplicates: float = 0.0  # drop documents that share this much with another, 0.6 is a start; 0: keep them

tokenizer: str = ""  # bytes, bpe (of the text), gpt2, a .tiktoken file, a Hugging Face folder; empty: bpe
vocab_size: int = 4096  # tokens of a bpe, specials included
sample_mb: int = 100  # text that a bpe is trained on, at most, evenly from all of the training text
val_fraction: float = 0.1  # share of the text for validation
test_fraction: float = 0.1  # share kept for the very end
threads: int = 0  # that tokenize; 0: one a core
overwrite: bool = False  # replace a data set that was made with other settings
report: bool = False  # print (and draw, with matplotlib) what is in the data set
show: int = 0  # print so many of its documents
seed: int = 0  # that picks those
# -----------------------------------------------------------------------------

FORMAT = 1  # of meta.json and the .bin files
SPLITS = ("train", "val", "test")


# -----------------------------------------------------------------------------
# Split

def splits_of(hashes: np.ndarray, val_fraction: float, test_fraction: float) -> np.ndarray:
    """0, 1, 2 for train, val, test, by the text's hash alone: other documents may come and go, it stays."""
    x = hashes / 2.0**64
    return np.where(x < test_fraction, 2, np.where(x < test_fraction + val_fraction, 1, 0))


def cut(spool: Path, index: np.ndarray, val_fraction: float, test_fraction: float) -> list[np.ndarray]:
    """Too few documents to deal out, or one: all in a row into contiguous train, val and test, by characters.

    Returns the (first, last + 1) byte of each piece of a document, (pieces, 2) for each split.
    """
    total = int(index["chars"].sum())
    bounds = [int(total * (1 - val_fraction - test_fraction)), int(total * (1 - test_fraction))]
    pieces, done = [[], [], []], 0
    with open(spool, "rb") as f:
        for start, size in zip(index["start"].tolist(), index["size"].tolist()):
            f.seek(start)
            at, end = start, start + size
            while at < end:
                data = np.frombuffer(f.read(min(BLOCK, end - at)), np.uint8)
                begins = np.flatnonzero(data & 0xC0 != 0x80)  # all but the bytes that go on with a character
                while bounds and bounds[0] < done + len(begins):
                    place = at + int(begins[bounds.pop(0) - done])
                    pieces[1 - len(bounds)].append([start, place])
                    start = place
                at, done = at + len(data), done + len(begins)
            pieces[2 - len(bounds)].append([start, end])
    spans = [np.array(rows, np.int64).reshape(-1, 2) for rows in pieces]
    return [rows[rows[:, 0] < rows[:, 1]] for rows in spans]


# -----------------------------------------------------------------------------
# Write

def prepare(dataset: str, source: str = "", tokenizer: str = "", vocab_size: int = 4096,
            val_fraction: float = 0.1, test_fraction: float = 0.1, encoding: str = "utf-8",
            overwrite: bool = False, root: str = "data", errors: str = "strict", text_key: str = "text",
            nfc: bool = False, line_ends: bool = False, control_chars: bool = False, html: bool = False,
            repeated_lines: bool = False, scrub_pii: bool = False, min_chars: int = 1, min_text: float = 0.0,
            near_duplicates: float = 0.0, sample_mb: int = 100, threads: int = 0) -> Path:
    """Make <root>/<dataset>/, whole or not at all, and return it. Does nothing where it stands already.

    Raises UserError for text that cannot be used, SettingError where the data set stands with other settings.
    """
    settings = {name: value for name, value in locals().items()  # all that the result depends on
                if name not in ("dataset", "overwrite", "root", "threads")}
    dataset = dataset or (default_name(source) if source else "python")
    if not source and dataset not in BUILT_IN:
        raise SettingError(f"--dataset={dataset}: not a built-in ({', '.join(BUILT_IN)}): give its --source=")
    own_source, own_tokenizer = BUILT_IN.get(dataset, ("", "bpe"))
    source, tokenizer = source or own_source, tokenizer or own_tokenizer
    settings.update(source=source, tokenizer=tokenizer)
    check(settings)

    folder = Path(root) / dataset
    clear_up(folder)
    if folder.exists() and not overwrite:
        if (folder / "meta.json").is_file() and read_meta(folder)["settings"] == settings:
            print(f"{folder} is there already, made with the same settings")
            return folder
        raise SettingError(f"{folder}: is there already, made with other settings: --overwrite replaces it, "
                           "--dataset=NAME makes another")

    partial = folder.with_name(f".{dataset}.{os.getpid()}.part")
    try:
        partial.mkdir(parents=True)
        done = build(partial, settings, Path(root) / "downloads", threads or os.cpu_count() or 1)
        old = partial.with_suffix(".old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:  # the disk is full, for one
        raise UserError(f"{error.filename or folder}: {error.strerror or error}: nothing changed") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{folder}: {done}")
    return folder


def check(s: dict) -> None:
    """Raises SettingError."""
    val, test = s["val_fraction"], s["test_fraction"]
    for name, right, rule in (
            ("val_fraction", 0 < val < 1, "must be above 0 and below 1"),
            ("test_fraction", 0 <= test and val + test < 1, "must be at least 0, below 1 with val_fraction"),
            ("vocab_size", s["tokenizer"] != "bpe" or s["vocab_size"] >= 258, "must be at least 258"),
            ("min_text", 0 <= s["min_text"] <= 1, "must be from 0 to 1"),
            ("near_duplicates", 0 <= s["near_duplicates"] <= 1, "must be from 0 to 1"),
            ("sample_mb", s["sample_mb"] >= 1, "must be at least 1")):
        if not right:
            raise SettingError(f"--{name}={s[name]}: {rule}")
    try:
        codecs.lookup(s["encoding"])
    except LookupError:
        raise SettingError(f"--encoding={s['encoding']}: Python knows no such encoding") from None


def clear_up(folder: Path) -> None:
    """What runs left that were killed while they made this data set: half of one, or the one before."""
    for left in folder.parent.glob(glob.escape(f".{folder.name}.") + "*"):
        *_, pid, what = left.name.split(".")
        if left.name != f".{folder.name}.{pid}.{what}" or not pid.isdigit() or os.name == "nt":
            continue  # in Windows there is no such question to a process
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            if what == "old" and not folder.exists():  # killed between the two renames
                os.replace(left, folder)
            shutil.rmtree(left, ignore_errors=True)
        except PermissionError:  # it runs, and is another user's
            pass


def build(partial: Path, s: dict, downloads: Path, threads: int) -> str:
    """Both passes, by the settings, into an empty folder: the .bin files and meta.json. Returns a summary."""
    began, found, spool = time.monotonic(), {}, partial / "spool.tmp"
    fractions = s["val_fraction"], s["test_fraction"]
    print(f"reading {s['source']}")
    docs = documents(s["source"], s["encoding"], s["errors"], s["text_key"], found, downloads)
    index = collect(docs, spool, [rule for rule in ("nfc", *RULES) if s[rule]], s["min_chars"], s["min_text"],
                    s["near_duplicates"] > 0, found)
    again = np.ones(len(index), bool)
    again[np.unique(index["hash"], return_index=True)[1]] = False
    index = without(index, again, "duplicates", spool, found)
    if s["near_duplicates"]:
        near = near_ones(index["sketch"], splits_of(index["hash"], *fractions), s["near_duplicates"])
        index = without(index, near, "near_duplicates", spool, found)
    if not len(index):
        raise UserError(f"{s['source']}: no document is left ({', '.join(found)})")

    # deal out the documents, or cut what is too little for that
    split = splits_of(index["hash"], *fractions)
    rows = np.stack((index["start"], index["start"] + index["size"]), axis=1)
    spans = dict(zip(SPLITS, (rows[split == i] for i in range(3))))
    wanted = [name for name, share in zip(SPLITS, (1, *fractions)) if share > 0]
    if len(index) == 1 or not all(len(spans[name]) for name in wanted):
        spans = dict(zip(SPLITS, cut(spool, index, *fractions)))
    n_bytes = {name: int((rows[:, 1] - rows[:, 0]).sum()) for name, rows in spans.items()}

    texts, bpe = [], s["tokenizer"] == "bpe"
    if bpe:  # on the training text only: what is tested on stays unseen, by the tokenizer too
        share = min(s["sample_mb"] * 1e6 / max(n_bytes["train"], 1), 1)
        megabytes = share * n_bytes["train"] / 1e6
        print(f"training a tokenizer of {s['vocab_size']:,} tokens on {megabytes:.1f} MB")
        texts = sample(read_texts(spool, spans["train"], False, lambda n: None), share)
    codec = make_tokenizer(s["tokenizer"], texts, s["vocab_size"])
    if bpe and codec.vocab_size < s["vocab_size"]:
        print(f"the text has pairs for {codec.vocab_size:,} tokens only")

    tick, splits = Progress("tokenizing", sum(n_bytes.values())), {}
    for name, rows in spans.items():
        texts = read_texts(spool, rows, not isinstance(codec, Tokenizer), tick)
        if len(index) == 1:  # no ends inside
            texts = ((text, False) for text, _ in texts)
        splits[name] = {**write_split(partial / f"{name}.bin", encode_stream(codec, texts, threads),
                                      codec.vocab_size), "bytes": n_bytes[name], "documents": len(rows)}
        if name in wanted and splits[name]["tokens"] < 32:
            raise UserError(f"{s['source']}: only {splits[name]['tokens']} tokens for {name}.bin, too few "
                            "to be of use: give more text, or larger fractions")
        print("{:>6} {documents:8,} documents {bytes:14,} bytes {tokens:14,} tokens".format(
            name, **splits[name]))
    spool.unlink()
    meta = {"format": FORMAT, "dtype": bin_dtype(codec.vocab_size).name, "vocab_size": codec.vocab_size,
            "splits": splits, "settings": s, "report": found, "tokenizer": codec.to_dict()}
    (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    n_tokens, took = sum(its["tokens"] for its in splits.values()), time.monotonic() - began
    return f"{tick.total / n_tokens:.2f} bytes a token, in {took:.1f} s ({tick.total / 1e6 / took:.1f} MB/s)"


def without(index: np.ndarray, drop: np.ndarray, what: str, spool: Path, found: dict) -> np.ndarray:
    """The index less the documents that are to be dropped, which are counted."""
    if drop.any():
        first = index[drop][0]
        with open(spool, "rb") as f:
            f.seek(first["start"])
            example = f.read(min(int(first["size"]), 240)).decode("utf-8", "ignore")[:60]
        note(found, what, repr(example), documents=int(drop.sum()))
    return index[~drop]


def write_split(path: Path, arrays: Iterator[np.ndarray], vocab_size: int) -> dict:
    """Arrays of tokens to a .bin. Raises UserError for an id that the tokenizer should not have given."""
    dtype, sha, tokens = bin_dtype(vocab_size), hashlib.sha256(), 0
    with open(path, "wb") as f:
        for ids in arrays:
            if len(ids) and int(ids.max()) >= vocab_size:
                raise UserError(f"{path.name}: token id {int(ids.max())} is out of range: the tokenizer says "
                                f"that it has {vocab_size:,}")
            data = to_bin(ids, dtype)
            f.write(data)
            sha.update(data)
            tokens += len(ids)
    return {"tokens": tokens, "sha256": sha.hexdigest()}


def bin_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def to_bin(ids: np.ndarray, dtype: np.dtype) -> bytes:
    """Raises ValueError for an id that does not fit: astype alone would wrap around without a word."""
    if len(ids) and int(ids.max()) > np.iinfo(dtype).max:
        raise ValueError(f"token id {int(ids.max())} does not fit {dtype.name}")
    return ids.astype(dtype).tobytes()


def default_name(source: str) -> str:
    name = Path(source.split(",")[0].partition("#")[0].removeprefix("hf:")).name
    stem = name.removesuffix(Path(name).suffix if Path(name).suffix in UNPACK else "")
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(stem).stem) or "text"


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
    folder = prepare(
        dataset, source, tokenizer, vocab_size, val_fraction, test_fraction, encoding, overwrite,
        errors=errors, text_key=text_key, nfc=nfc, line_ends=line_ends, control_chars=control_chars,
        html=html, repeated_lines=repeated_lines, scrub_pii=scrub_pii, min_chars=min_chars, min_text=min_text,
        near_duplicates=near_duplicates, sample_mb=sample_mb, threads=threads)
    if report:
        print_report(folder)
    if show:
        show_documents(folder, show, seed)


if __name__ == "__main__":
    launch(main, globals())
