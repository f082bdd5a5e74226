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
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from config import (SettingError, UserError, above, at_least, check_used, checked, defaults_of, launch,
                    needs_console, settings_of, values_of)

import numpy as np

from lib.clean import Progress, Scrub, collect, make_rules, near_groups
from lib.text import BLOCK, BUILT_IN, UNPACK, documents, local_files, locked, note, source_parts
from lib.tokenizer import (Characters, Tokenizer, encode_stream, examples_of, make_tokenizer, read_texts,
                           sample, with_prefix)

# -----------------------------------------------------------------------------
# Settings
dataset: str = ""  # name of the folder under data/, or a built-in: python, shakespeare, shakespeare_char
source: str = ""  # file, folder, glob, URL, hf:NAME or built-in; several with commas; empty: the built-in's
encoding: str = ""  # of the text files; empty: UTF-8, or UTF-16 or GBK if it is that, each its own
errors: Literal["strict", "replace", "ignore"] = "strict"  # what to do with bytes that are not in it
text_key: str = "text"  # of a .jsonl or an hf: data set, A.B within A; of a .csv or .tsv the name or number
split_on: str | None = ""  # what divides a text file, "\n\n" for blank lines; empty: lines of <|endoftext|>
skip_bad_rows: bool = False  # pass over rows that cannot be read, and count them

# clean: the text stays as it is unless asked for
nfc: bool = False  # one way to write an accented letter (Unicode NFC)
line_ends: bool = False  # \n for \r\n and \r
control_chars: bool = False  # take out control characters, but for line ends, tabs and form feeds
html: bool = False  # take out HTML tags, comments and scripts; resolve entities
repeated_lines: bool = False  # of a line that comes several times in a row, keep one
scrub_pii: bool = False  # [EMAIL], [PHONE], [IP] and [KEY] for what looks like one
phones: Literal["patterns", "library"] = "patterns"  # what knows telephone numbers; library: phonenumbers
min_chars: at_least(0) = 1  # drop shorter documents
min_text: at_least(0.0, at_most=1.0) = 0.0  # drop those with less letters, digits and white space
near_duplicates: at_least(0.0, at_most=1.0) = 0.0  # drop those that share so much with another; try 0.6

tokenizer: str = ""  # bytes, bpe (of the text), gpt2, a .tiktoken file, a Hugging Face folder; empty: bpe
vocab_size: at_least(258) = 4096  # tokens, specials included
lossy: bool = False  # go on if the tokenizer has no ids for more than 1% of the characters
prefix: bool = False  # before each document, what the tokenizer's model reads before a text (as Llama's BOS)
sample_mb: at_least(1) = 100  # text that it is trained on, at most, evenly from all of the training text
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
OURS = ("train.bin", "val.bin", "test.bin", "meta.json", "report.png")  # all that a data set has
CONTINUED = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that go on with a character
NAME = re.compile(r"\w(?:[\w.+-]*\w)?")  # of a data set
# Settings that older data sets lack, and what they were made with.
NEW = {"phones": "patterns", "split_on": "", "skip_bad_rows": False, "prefix": False}
OTHER = ("dataset", "threads", "overwrite", "report", "show", "seed", "lossy")  # the result is the same
ONLY = [  # a setting, and what it is of use with; see check_used
    ("vocab_size", "tokenizer", ("bpe",)),
    ("sample_mb", "tokenizer", ("bpe",)),
    ("phones", "scrub_pii", (True,)),
    ("seed", "show", ()),
]


# -----------------------------------------------------------------------------
# Make a data set

def prepare(dataset: str = "", *, root: str | Path = "data", **settings) -> Path:
    """Make <root>/<dataset>/, whole or not at all, and return it. Does nothing if it is there already.

    settings: any of the above; the others are as they stand there. Raises TypeError for a name that is none,
    UserError for text that cannot be used, SettingError if the data set is there with other settings.
    """
    s = complete(dataset, settings)
    folder = Path(root) / s.dataset
    if folder.is_symlink():  # to another disk, say
        folder = Path(os.path.realpath(folder))
        if folder.is_symlink():
            raise SettingError(f"--dataset={s.dataset}: {folder} is a link to itself: remove it")
    paths = [path for part in source_parts(s.source) for path in local_files(part)]
    for parent in {path.parent for path in paths}:
        if parent.resolve().is_relative_to(folder.resolve()):
            raise SettingError(f"--source={s.source}: {parent} lies in {folder}, which is for the data set: "
                               "move it, or give another --dataset=NAME")
    files = fingerprint(paths)
    new = folder.with_name(f".{folder.name}.preparing")
    old = folder.with_name(f".{folder.name}.replaced")
    with locked(folder):
        try:
            settle(folder, new, old)  # after one that was killed
            if is_there(folder, s, files):
                print(f"{folder} is there already, made with the same settings")
                return folder
            try:
                new.mkdir(parents=True)
                done = build(new, s, files, Path(root) / "downloads")
                if folder.exists():
                    os.replace(folder, old)
                os.replace(new, folder)
            finally:
                settle(folder, new, old)
        except OSError as error:  # the disk is full, for one
            what = f"{error.filename or folder}: {error.strerror or error}"
            raise UserError(f"{what}: nothing changed") from None
    print(f"{folder}: {done}")
    return folder


def fingerprint(paths: list[Path]) -> dict:
    """What tells whether a source has changed: number, bytes, and a hash of names, sizes and times."""
    sha, n, size = hashlib.sha256(), 0, 0
    for path in paths:
        with contextlib.suppress(OSError):
            status = path.stat()
            sha.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "replace"))
            n += 1
            size += status.st_size
    return {"files": n, "bytes": size, "sha256": sha.hexdigest()}


def is_there(folder: Path, s: SimpleNamespace, files: dict) -> bool:
    """Is this data set there? Raises SettingError if it may not be made there."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not is_data_set(folder):
        raise SettingError(f"{folder}: is there, is no data set of prepare.py, and stays: --dataset=NAME "
                           "makes one beside it")
    if s.overwrite:
        return False
    meta = read_meta(folder)
    then = {**NEW, **meta["settings"]}
    if then["encoding"] == "utf-8":  # once the default
        then["encoding"] = s.encoding
    changed = [name for name, value in of_the_data(s).items() if then.get(name) != value]
    if changed:
        raise SettingError(f"{folder}: is there already, made with other settings ({', '.join(changed)}): "
                           "--overwrite replaces it, --dataset=NAME makes another")
    before = meta.get("files") or {"files": 0}  # older ones do not say
    if before["files"] and not files["files"]:
        print(f"{s.source}: not here, so not compared with what {folder} was made of")
    elif before["files"] and before != files:
        raise SettingError(f"{folder}: its source has changed since (names, sizes or times of its files): "
                           "--overwrite makes it again")
    return True


def is_data_set(folder: Path) -> bool:
    """Is it one of ours, whole or damaged?"""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except OSError:
        return False
    except (ValueError, RecursionError):
        return (folder / "train.bin").is_file()
    return isinstance(meta, dict) and {"format", "splits"} <= set(meta)


def settle(folder: Path, new: Path, old: Path) -> None:
    """Whatever became of a prepare: the data set is the new one or the old one, and nothing else is left.
    What the old one's folder has that is not ours moves into the new one's."""
    if old.exists() and not folder.exists():  # between the two renames
        print(f"{folder}: put back as it was before a prepare that was killed")
        os.replace(old, folder)
    if old.exists():
        for path in old.iterdir():
            if path.name not in OURS:
                os.replace(path, folder / path.name)
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def complete(dataset: str, given: dict) -> SimpleNamespace:
    """All settings of a data set. Raises TypeError, SettingError."""
    known, script = settings_of(globals()), {**globals(), "DEFAULTS": defaults_of(globals())}
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"prepare() has no setting {name!r}")
        script[name] = checked(value, known[name].kind, f"--{name}")
    source = script["source"]
    name = script["dataset"] = dataset or (default_name(source) if source else "python")
    if not NAME.fullmatch(name) or name == "downloads" or len(name.encode()) > 200:
        raise SettingError(f"--dataset={name}: wanted the name of a folder under data/: letters, digits, - "
                           "and _, and not downloads, which is taken")
    if not source and name not in BUILT_IN:
        raise SettingError(f"--dataset={name}: not a built-in ({', '.join(BUILT_IN)}): give its --source=")
    own_source, own_tokenizer = BUILT_IN.get(name, ("", "bpe"))
    script["source"] = source or own_source
    script["tokenizer"] = script["tokenizer"] or own_tokenizer
    for line in check_used(script):
        print(line)
    s = SimpleNamespace(**values_of(script))
    if s.val_fraction + s.test_fraction >= 1:
        raise SettingError(f"--test_fraction={s.test_fraction}: must be below 1 with val_fraction")
    if s.phones == "library" and importlib.util.find_spec("phonenumbers") is None:
        raise SettingError("--phones=library: needs a package: pip install phonenumbers")
    if s.prefix and s.tokenizer == "bpe":
        raise SettingError("--prefix=True: for a tokenizer with a template, not for a bpe")
    try:
        codecs.lookup(s.encoding or "utf-8")
    except LookupError:
        raise SettingError(f"--encoding={s.encoding}: Python knows no such encoding") from None
    return s


def of_the_data(s: SimpleNamespace) -> dict:
    """The settings that the result depends on."""
    found = {name: value for name, value in vars(s).items() if name not in OTHER}
    return {**found, "source": s.source.removeprefix("builtin:")}


def default_name(source: str) -> str:
    """novel of books/novel.txt.gz."""
    path = Path(source.split(",")[0].partition("#")[0].removeprefix("hf:"))
    stem = Path(path.stem).stem if path.suffix in UNPACK else path.stem
    return re.sub(r"[^\w-]", "_", stem)[:60] or "text"


def build(folder: Path, s: SimpleNamespace, files: dict, downloads: Path) -> str:
    """Both passes, into an empty folder: the .bin files and meta.json. Returns a summary."""
    began = time.monotonic()
    spool, found = folder / "spool.tmp", {}
    # a tokenizer that cannot be had is said before the first byte is read
    codec = None if s.tokenizer == "bpe" else open_tokenizer(s)
    index = read(spool, s, downloads, found)
    spans = split(spool, index, s.val_fraction, s.test_fraction)
    size = {name: int((rows[:, 1] - rows[:, 0]).sum()) for name, rows in spans.items()}
    print_shares(size, spool, index, s)
    codec = codec or train_tokenizer(s, spool, spans["train"], size["train"])
    longest = int(index["size"].max())
    if not codec.safe and longest > 2**24:
        print("the tokenizer reads a document at once, with 170 times its size in memory; the longest has "
              f"{longest / 1e6:.0f} MB")
    tick = Progress("tokenizing", sum(size.values()))
    splits, lost = {}, Counter()
    for name, rows in spans.items():
        texts = read_texts(spool, rows, codec, tick)
        if len(index) == 1:  # no ends inside
            texts = ((text, False) for text, _ in texts)
        ids = encode_stream(codec, texts, s.threads or os.cpu_count() or 1, lost)
        if s.prefix:
            ids = with_prefix(ids, codec)
        its = write_split(folder / f"{name}.bin", ids, codec.vocab_size)
        if its["tokens"] < 32 and (name != "test" or s.test_fraction):
            raise UserError(f"{s.source}: only {its['tokens']} tokens for {name}.bin, too few to be of use: "
                            "give more text, or larger fractions")
        splits[name] = {**its, "bytes": size[name], "documents": len(rows)}
        print(f"{name:>6} {len(rows):8,} documents {size[name]:14,} bytes {its['tokens']:14,} tokens")
    say_lost(lost, int(index["chars"].sum()), s)
    spool.unlink()
    meta = {"format": FORMAT, "dtype": bin_dtype(codec.vocab_size).name, "vocab_size": codec.vocab_size,
            "splits": splits, "settings": of_the_data(s), "files": files, "report": found,
            "tokenizer": codec.to_dict()}
    with open(folder / "meta.json", "w", encoding="utf-8") as f:
        f.write(json.dumps(meta, indent=1))
        f.flush()
        os.fsync(f.fileno())
    n_tokens = sum(its["tokens"] for its in splits.values())
    took = time.monotonic() - began
    return f"{tick.total / n_tokens:.2f} bytes a token, in {took:.1f} s ({tick.total / 1e6 / took:.1f} MB/s)"


# -----------------------------------------------------------------------------
# First pass: read, clean, drop copies

def read(spool: Path, s: SimpleNamespace, downloads: Path, found: dict) -> np.ndarray:
    """The documents to keep, into the spool. Returns their index. found: counts, as in note()."""
    print(f"reading {s.source}")
    docs = documents(s.source, s.encoding, s.errors, s.text_key, s.split_on, s.skip_bad_rows, found,
                     downloads)
    rules = make_rules(s)
    index = collect(docs, spool, rules, s.min_chars, s.min_text, s.near_duplicates > 0, found)
    index = copies(index, spool, s, found)
    if s.html:
        found.pop("with_tags", None)
    if s.scrub_pii and "bad_rows" in found:  # its example is of a row as it came
        bad = found["bad_rows"]["example"]
        found["bad_rows"]["example"], _, _ = Scrub(s.phones)(bad, len(bad))
    print_notes(found)
    if s.scrub_pii:
        print_replaced(rules["scrub_pii"])
    if not len(index):
        raise UserError(f"{s.source}: no document is left ({', '.join(found) or 'there is none in it'})")
    return index


NOTES = {  # of the report, in words
    "read": "documents read",
    "hidden": "passed over: hidden",
    "links": "passed over: links to folders, or to nothing",
    "special": "passed over: pipes and the like",
    "data_sets": "passed over: data sets made by prepare.py",
    "unreadable": "passed over: folders that may not be read",
    "empty_or_binary": "passed over: empty, or not text",
    "other_encodings": "passed over: in another encoding (--encoding=NAME, if all are in that)",
    "recognised": "files not in UTF-8 (--encoding=NAME, if that is wrong)",
    "bad_rows": "rows passed over",
    "with_tags": "files of HTML (--html takes its tags out)",
    "json_as_text": ".json files read as plain text",
    "records_as_text": "files of JSON records read as plain text, braces and all: name them .jsonl",
    "other_splits": "other splits of the data set, not read",
    "headers_again": "rows passed over: the header again",
    "no_header": "headers, for a column by its number; the first row",
    "undivided": "files without --split_on in them, a document each",
    "divided": "documents, divided by --split_on or lines of <|endoftext|> (--split_on=None: not divided)",
    "blank_lines": 'blank lines in one document (--split_on="\\n\\n" makes each part one)',
    "ends_within": 'times <|endoftext|> in a line, read as plain text (--split_on="<|endoftext|>" divides)',
    "too_short": "dropped: below --min_chars",
    "mostly_not_text": "dropped: below --min_text",
    "copies_kept": "copies of a document before, kept, in its split (--near_duplicates=1 drops them)",
    "duplicates": "dropped: copies of a document before",
    "near_duplicates": "dropped: near copies of a document before",
    "copies_in_train": "of the kept are in train, but a copy that was dropped would, alone, be held out",
}


def print_notes(found: dict) -> None:
    """What was read, passed over, dropped and replaced: a line each, with the first as an example."""
    for what, entry in found.items():
        times = f" in {entry['times']:,} places" if entry["times"] else ""
        print(f"{entry['documents']:8,} {NOTES.get(what, what)}{times}: {visible(entry['example'])}")


def print_replaced(scrub: Scrub) -> None:
    """What was taken for personal data: counts, and a few of each, which are not stored."""
    for kind, examples in scrub.examples.items():
        shown = visible(", ".join(examples))
        print(f"{scrub.counts[kind]:8,} [{kind}] put in place of the like of {shown}")


def visible(text: str) -> str:
    """Fit for a terminal: control characters, which it might obey, as their escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def copies(index: np.ndarray, spool: Path, s: SimpleNamespace, found: dict) -> np.ndarray:
    """The index less the copies, if near ones are looked for: the first of each group stays.

    Otherwise all stay, and those that are exact will be in one split, since it follows from the text.
    """
    documents = np.arange(len(index))
    _, first, same = np.unique(index["hash"], return_index=True, return_inverse=True)
    group = first[same]
    exact = group != documents
    if s.near_duplicates:
        group = near_groups(index["sketch"], s.near_duplicates)
    later = group != documents
    total, sizes = index["size"].sum(), np.bincount(group, index["size"], len(index))
    for i in np.flatnonzero((sizes > 0.01 * total) & (sizes > index["size"])):
        print(f"copies of {beginning(spool, index[i])}: {np.count_nonzero(group == i):,} documents, "
              f"{sizes[i] / total:.1%} of the text")
    for what, which in (("duplicates", later & exact), ("near_duplicates", later & ~exact)):
        if which.any():
            what = what if s.near_duplicates else "copies_kept"
            note(found, what, beginning(spool, index[which][0]), documents=int(which.sum()))
    if not s.near_duplicates:
        return index
    held_out = splits_of(index["hash"], s.val_fraction, s.test_fraction) > 0
    moved = np.unique(group[held_out & later & ~held_out[group]])
    if len(moved):
        note(found, "copies_in_train", beginning(spool, index[moved[0]]), documents=len(moved))
    return index[~later]


def beginning(spool: Path, document: np.ndarray) -> str:
    """In quotes."""
    with open(spool, "rb") as f:
        f.seek(document["start"])
        return repr(f.read(min(document["size"], 240)).decode("utf-8", "ignore")[:60])


# -----------------------------------------------------------------------------
# Split

def splits_of(hashes: np.ndarray, val_fraction: float, test_fraction: float) -> np.ndarray:
    """0, 1, 2 for train, val, test, by the text's hash alone: other documents may come and go, it stays."""
    x = hashes / 2.0**64
    return np.where(x < test_fraction, 2, np.where(x < test_fraction + val_fraction, 1, 0))


def split(spool: Path, index: np.ndarray, val_fraction: float, test_fraction: float) -> dict[str, np.ndarray]:
    """The (first, last + 1) byte in the spool of each document, (documents, 2) for each split.

    Each goes whole where its hash says, but into train if it and its copies have too much of the text. So
    whatever is added, nothing that was held out gets into train. If that leaves a split empty, each is cut
    into the three: its beginning is for train.
    """
    starts, ends = index["start"], index["start"] + index["size"]
    which = splits_of(index["hash"], val_fraction, test_fraction)
    _, group = np.unique(index["hash"], return_inverse=True)
    share = np.bincount(group, index["size"])[group] / index["size"].sum()
    large = share > 1.2 * np.array([1, val_fraction, test_fraction])[which]
    which[large] = 0
    present = np.bincount(which, minlength=3) > 0
    if len(index) > 1 and present[:2].all() and (present[2] or not test_fraction):
        if large.any():
            print(f"too large to be held out, so in train: {large.sum():,} documents, of up to "
                  f"{share[large].max():.1%} of the text with their copies, such as "
                  f"{beginning(spool, index[large][0])}")
        rows = np.stack((starts, ends), axis=1)
        return {name: rows[which == i] for i, name in enumerate(SPLITS)}
    if len(index) > 1:
        print(f"{len(index):,} documents are too few to be split whole: each is cut into the three, from its "
              "beginning to its end (if more are added they stay whole, most of them in train)")
    edges = [starts]
    for part in (1 - val_fraction - test_fraction, 1 - test_fraction):
        edges.append(characters_at(spool, starts + (index["size"] * part).astype(np.int64)))
    edges.append(ends)
    rows = [np.stack(pair, axis=1) for pair in zip(edges, edges[1:])]
    return {name: its[its[:, 0] < its[:, 1]] for name, its in zip(SPLITS, rows)}


def characters_at(spool: Path, places: np.ndarray) -> np.ndarray:
    """The places in the spool from each of these on where a character begins."""
    found = places.copy()
    with open(spool, "rb") as f:
        for i, place in enumerate(places.tolist()):
            f.seek(place)
            rest = f.read(4)
            found[i] += len(rest) - len(rest.lstrip(CONTINUED))
    return found


def print_shares(size: dict[str, int], spool: Path, index: np.ndarray, s: SimpleNamespace) -> None:
    """Say why, if the splits have not what was asked for by over two points: documents go whole."""
    asked = np.array([1 - s.val_fraction - s.test_fraction, s.val_fraction, s.test_fraction])
    got = np.array([size[name] for name in SPLITS]) / sum(size.values())
    if np.abs(got - asked).max() > 0.02:
        parts = [f"{name} {a:.1%} instead of {b:.1%}" for name, a, b in zip(SPLITS, got, asked)]
        largest = index[np.argmax(index["size"])]
        share = largest["size"] / index["size"].sum()
        print(f"shares of the text: {', '.join(parts)}: each document goes whole where the hash of its text "
              f"says, and of these {len(index):,} the largest has {share:.1%}: {beginning(spool, largest)}")


# -----------------------------------------------------------------------------
# Second pass: tokens

def open_tokenizer(s: SimpleNamespace) -> Tokenizer:
    """The one that the settings name, which is there already."""
    codec = make_tokenizer(s.tokenizer, [], s.vocab_size)
    print(f"tokenizer {s.tokenizer}: {codec.vocab_size:,} tokens")
    if codec.changes():
        print("the tokenizer does not give back all that it reads:", ", ".join(codec.changes()))
    if s.prefix and not codec.prefix:
        raise SettingError("--prefix=True: this tokenizer puts nothing before a text: leave it out")
    return codec


def train_tokenizer(s: SimpleNamespace, spool: Path, spans: np.ndarray, size: int) -> Tokenizer:
    """A bpe of the training text only: what the model is tested on stays unseen by the tokenizer too."""
    share = min(s.sample_mb * 1e6 / max(size, 1), 1)
    print(f"training a tokenizer of {s.vocab_size:,} tokens on {share * size / 1e6:.1f} MB")
    texts = sample(read_texts(spool, spans, Tokenizer, lambda n: None), share)
    codec = make_tokenizer("bpe", texts, s.vocab_size)
    if codec.vocab_size < s.vocab_size:
        print(f"the text has pairs for {codec.vocab_size:,} tokens only")
    return codec


def say_lost(lost: Counter, chars: int, s: SimpleNamespace) -> None:
    """Print what the tokenizer has no ids for. Raises UserError if it is much."""
    share = sum(lost.values()) / max(chars, 1)
    if lost:
        print(f"the tokenizer has no ids for {share:.2%} of the characters: {examples_of(lost)}")
    if share > 0.01 and not s.lossy:
        raise UserError(f"--tokenizer={s.tokenizer}: loses {share:.1%} of the characters: take another one, "
                        "or add --lossy=True")


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
        f.flush()
        os.fsync(f.fileno())  # before the folder is renamed
    return {"tokens": tokens, "sha256": sha.hexdigest()}


def bin_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


# -----------------------------------------------------------------------------
# Read, for those who train

def read_meta(folder: Path) -> dict:
    """meta.json. Raises UserError if it is missing or damaged."""
    path, again = Path(folder) / "meta.json", "make the data set again, with --overwrite"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version = meta["format"]
        whole = meta["dtype"] in ("uint16", "uint32") and meta["vocab_size"] > 0 and meta["tokenizer"]
        whole = whole and meta["settings"] and all(meta["splits"][name]["tokens"] >= 0 for name in SPLITS)
    except FileNotFoundError:
        raise UserError(f"{folder}: no data set here: make one, see python prepare.py --help") from None
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}): {again}") from None
    if version != FORMAT or not whole:
        raise UserError(f"{path}: damaged, or of another format ({version}, wanted {FORMAT}): {again}")
    return meta


def nanogpt_meta(folder: Path) -> dict:
    """What a folder of nanoGPT's would have as a meta.json; its meta.pkl, which could run code, is not read.

    With it, the tokens are the characters of input.txt, else GPT-2's. Raises UserError if they are not.
    """
    ids = {split: np.fromfile(folder / f"{split}.bin", "<u2", 2**20) for split in ("train", "val")}
    if (folder / "meta.pkl").exists():
        text = folder / "input.txt"
        chars = text.read_text(encoding="utf-8", errors="replace") if text.is_file() else ""
        codec, first = Characters.of(chars), ids["train"][:1000].tolist()
        if not chars:
            raise UserError(f"{folder}: meta.pkl is not read, since it could run code: put {text.name}, the "
                            "text whose characters its tokens are, beside it")
        if not first or codec.encode(chars[:len(first)]) != first:
            raise UserError(f"{folder}: its tokens are not the characters of {text.name} beside it, and "
                            "meta.pkl is not read, since it could run code: python prepare.py "
                            f"--source={text.as_posix()} --dataset={folder.name}_new")
    else:
        codec = make_tokenizer("gpt2", [], 0)
    most = max(int(some.max(initial=0)) for some in ids.values())
    if most >= codec.vocab_size:
        raise UserError(f"{folder}: token {most} of {codec.vocab_size}: it has neither meta.json nor GPT-2's "
                        "tokens: make it again from its text, with prepare.py")
    splits = {split: {"tokens": (folder / f"{split}.bin").stat().st_size // 2,
                      "documents": 1 + int((some == codec.eot).any() and bool(codec.ends))}
              for split, some in ids.items()}
    return {"dtype": "uint16", "vocab_size": codec.vocab_size, "splits": splits, "settings": {},
            "tokenizer": codec.to_dict()}


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

def read_whole(folder: Path, split: str, meta: dict) -> tuple[np.ndarray, np.ndarray]:
    """The token ids, and how often each comes. Raises UserError for one that the vocabulary does not have."""
    ids, counts = read_split(folder, split, meta), np.zeros(meta["vocab_size"], np.int64)
    for i in range(0, len(ids), BLOCK):
        some = ids[i:i + BLOCK]
        if some.max() >= len(counts):
            raise UserError(f"{Path(folder) / split}.bin: damaged: token {some.max()} of {len(counts)}: make "
                            "the data set again, with --overwrite")
        counts += np.bincount(some, minlength=len(counts))
    return ids, counts


def print_report(folder: Path) -> None:
    """What is in a data set, what was dropped and why; with matplotlib as report.png in its folder too."""
    meta = read_meta(folder)
    codec, lengths, counts = Tokenizer.from_dict(meta["tokenizer"]), [], 0
    for split in SPLITS:
        (ids, some), its = read_whole(folder, split, meta), meta["splits"][split]
        counts += some
        if len(ids):
            lengths.append(np.diff(document_ends(ids, codec.eot), prepend=0))
            low, middle, high = np.quantile(lengths[-1], (0.1, 0.5, 0.9))
            print(f"{split:>6}: {its['bytes'] / its['tokens']:.3f} bytes a token; {its['documents']:,} "
                  f"documents of {low:,.0f}, {middle:,.0f}, {high:,.0f} tokens (10%, 50%, 90%)")
    order = np.argsort(-counts, kind="stable")[:np.count_nonzero(counts)]
    most = [f"{codec.decode([i])!r} {counts[i] / counts.sum():.1%}" for i in order[:20].tolist()]
    print(f"{len(order):,} of {len(counts):,} tokens are used, these the most:", *most)
    print_notes(meta["report"])
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = np.concatenate(lengths)
    left.hist(lengths, bins=np.geomspace(1, lengths.max() + 1, 40))
    left.set(xscale="log", xlabel="tokens in a document", ylabel="documents")
    right.loglog(np.arange(1, len(order) + 1), counts[order])
    right.set(xlabel="rank of a token", ylabel="how often it comes")
    figure.savefig(folder / "report.png", dpi=120)


def document_ends(ids: np.ndarray, eot: int) -> np.ndarray:
    """One past the last token of each document."""
    return np.union1d(np.flatnonzero(ids == eot) + 1, len(ids))


def show_documents(folder: Path, n: int, seed: int) -> None:
    """Print some, decoded from train.bin, picked by the seed; of a long one the beginning."""
    meta = read_meta(folder)
    codec = Tokenizer.from_dict(meta["tokenizer"])
    ids, _ = read_whole(folder, "train", meta)
    ends = document_ends(ids, codec.eot)
    for i in np.random.default_rng(seed).permutation(len(ends))[:n].tolist():
        start, end = ends[i - 1] if i else 0, ends[i]
        print(f"\n--- document {i:,} of {len(ends):,} in train.bin, {end - start:,} tokens")
        print(visible(codec.decode(t for t in ids[start:min(end, start + 500)].tolist() if t != codec.eot)))


def main():
    folder = prepare(**values_of(globals()))
    if report:
        print_report(folder)
    if show:
        needs_console()
        show_documents(folder, show, seed)


if __name__ == "__main__":
    launch(main, globals())
