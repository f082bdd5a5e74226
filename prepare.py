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
import bz2
import codecs
import csv
import functools
import glob
import gzip
import hashlib
import http.client
import io
import itertools
import json
import lzma
import os
import re
import shutil
import struct
import sysconfig
import time
import unicodedata
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from config import SettingError, UserError, run
from tokenizer import Tokenizer, encode_stream, make_tokenizer, read_texts, sample

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
BLOCK = 2**22  # bytes read at a time
MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9  # odd numbers whose multiples mix the bits of a hash
K, NONE = 64, 2**32 - 1  # values in the sketch of a document; fills it up where it has fewer

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
BUILT_IN = {  # dataset -> its source and tokenizer
    "python": ("python", "bpe"),
    "shakespeare": (SHAKESPEARE, "bpe"),
    "shakespeare_char": (SHAKESPEARE, "bytes"),
}
SHA256 = {SHAKESPEARE: "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}
UNPACK = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


# -----------------------------------------------------------------------------
# Collect

class NotText(UserError):
    """A file with nothing to read in it: an error where it was named, passed over where its folder was."""


def documents(source: str, encoding: str = "utf-8", errors: str = "strict", text_key: str = "text",
              found: dict | None = None, downloads: str = "data/downloads") -> Iterator[tuple[str, str]]:
    """(name, text) of each document. An empty name goes on with the document before: a large file in blocks.

    found: counts what is passed over, as in note(). Raises UserError, with a name, for what cannot be read.
    """
    read = functools.partial(file_documents, encoding=encoding, errors=errors, text_key=text_key)
    for one in [source] if Path(source).exists() else source.split(","):
        one = BUILT_IN.get(one.strip(), [one.strip()])[0]
        if one.startswith(("https://", "http://")):
            one = download(one, Path(downloads))
        if one == "python":
            yield from standard_library()
        elif one.startswith("hf:"):
            yield from hub_documents(one, text_key)
        elif Path(one).is_dir():
            yield from folder_documents(Path(one), read, {} if found is None else found)
        else:
            names = [one] if Path(one).exists() else sorted(glob.glob(one, recursive=True))
            if not any(map(os.path.isfile, names)):
                raise UserError(f"{one}: no such file or folder")
            for name in filter(os.path.isfile, names):
                yield from read(Path(name), name)


def folder_documents(root: Path, read: Callable, found: dict) -> Iterator[tuple[str, str]]:
    """Of all files below; hidden, empty and binary ones are passed over and counted: it may hold pictures."""
    used = 0
    for where, folders, names in os.walk(root):
        for hidden in [name for name in folders + names if name.startswith(".")]:
            note(found, "hidden", hidden)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            file = Path(where, name)
            try:
                yield from read(file, file.relative_to(root).as_posix())
                used += 1
            except NotText as error:
                note(found, "empty_or_binary", str(error))
    if not used:
        raise UserError(f"{root}: no text in this folder (hidden, empty and binary files do not count)")


def file_documents(file: Path, title: str, encoding: str, errors: str,
                   text_key: str) -> Iterator[tuple[str, str]]:
    """By the suffix: each line of a .jsonl, each row of a .csv or .tsv; else the file is a document."""
    kind = Path(file.stem if file.suffix.lower() in UNPACK else file.name).suffix.lower()
    text = blocks(file, encoding, errors)
    if kind in (".jsonl", ".csv", ".tsv"):
        for n, row in rows_of(file, kind, text, text_key):
            yield f"{title}:{n}", field(row, text_key, f"{file}:{n}")
    else:
        for block in text:
            yield title, block
            title = ""


def rows_of(file: Path, kind: str, text: Iterator[str], text_key: str) -> Iterator[tuple[int, dict]]:
    """(line, row). A table's columns have the names in its first row, or numbers where text_key is one."""
    lines, n = (line for block in text for line in io.StringIO(block, newline="\n")), 0  # cut at \n alone
    try:
        if kind == ".jsonl":
            for n, line in enumerate(lines, 1):
                if not line.isspace():
                    yield n, json.loads(line)
        else:
            csv.field_size_limit(2**31 - 1)
            tabs = dict(delimiter="\t", quoting=csv.QUOTE_NONE)  # there a quotation mark is nothing but that
            reader = csv.reader(lines, **(tabs if kind == ".tsv" else {}))
            header = None if text_key.isdigit() else next(reader, [])
            for row in filter(None, reader):
                n = reader.line_num
                yield n, dict(zip(header or map(str, range(len(row))), row))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file}:{n}: damaged {kind[1:]} ({error})") from None


def field(row: dict, key: str, where: str) -> str:
    if not isinstance(row, dict) or key not in row or not isinstance(row[key], str | None):
        raise UserError(f"{where}: no text under {key!r} in {str(row)[:120]}: give --text_key=NAME, or the "
                        "column's number, from 0, where a table has no header")
    return row[key] or ""


def blocks(file: Path, encoding: str, errors: str) -> Iterator[str]:
    """A file's text, unpacked, some MB at a time, cut at line ends. Raises UserError, with the place."""
    name = codecs.lookup(encoding).name
    decoder = codecs.getincrementaldecoder("utf-8-sig" if name == "utf-8" else name)(errors)
    offset, rest, data = 0, "", None
    try:
        with UNPACK.get(file.suffix.lower(), open)(file, "rb") as f:
            while data != b"":
                data = f.read(BLOCK)
                if offset == 0 and not data:
                    raise NotText(f"{file}: the file is empty")
                if offset == 0 and b"\0" in data and not name.startswith(("utf-16", "utf-32")):
                    raise NotText(f"{file}: a binary file (byte 0 at offset {data.index(0)}), not text")
                text = rest + decoder.decode(data, final=not data)
                offset += len(data)
                end = text.rfind("\n") + 1 if data and len(text) < 16 * BLOCK else len(text)
                if end:
                    yield text[:end]
                rest = text[end:]
    except UnicodeDecodeError as error:
        at = offset - (len(error.object) - len(data)) + error.start  # the object: what was left, and data
        raise UserError(f"{file}: not {encoding} (byte 0x{error.object[error.start]:02x} at offset {at}): "
                        "--encoding=latin-1, or what it is in, or --errors=replace") from None
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def standard_library() -> Iterator[tuple[str, str]]:
    """The Python that runs this, without tests and what pip installed: a corpus that needs no download."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [file for file in root.rglob("*.py") if not skip.intersection(file.relative_to(root).parts)]
    if not files:
        raise UserError(f"{root}: this Python carries no source of its library: give --source=FILE or FOLDER")
    for file in sorted(files, key=lambda file: file.relative_to(root).as_posix()):
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text:
            yield file.relative_to(root).as_posix(), text


def hub_documents(source: str, text_key: str) -> Iterator[tuple[str, str]]:
    """The train split of hf:NAME or hf:NAME#CONFIG, on the hub or a local folder (of parquet, say)."""
    name, _, subset = source.removeprefix("hf:").partition("#")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: needs a package: pip install datasets") from None
    try:
        for n, row in enumerate(datasets.load_dataset(name, subset or None, split="train", streaming=True)):
            yield f"{name}:{n}", field(row, text_key, f"{source}: row {n}")
    except UserError:
        raise
    except Exception as error:  # of many kinds: no such data set, no network, a damaged file
        raise UserError(f"{source}: cannot be read: {type(error).__name__}: {str(error)[:300]!r}") from None


def download(url: str, folder: Path) -> str:
    """Fetch once into `folder`; url may end in #sha256=... Raises UserError: no network, another file."""
    url, _, fragment = url.partition("#")
    wanted, sha = fragment.removeprefix("sha256=").lower() or SHA256.get(url), hashlib.sha256()
    suffix = "".join(Path(urllib.parse.urlparse(url).path).suffixes[-2:]) or ".txt"
    target = folder / (hashlib.sha256(url.encode()).hexdigest()[:16] + suffix)
    if target.is_file():
        return str(target)
    print(f"downloading {url}")
    folder.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as f:
            while data := response.read(2**20):
                f.write(data)
                sha.update(data)
            length = int(response.headers.get("Content-Length") or f.tell())
            if f.tell() != length:
                raise OSError(f"broke off after {f.tell():,} of {length:,} bytes")
        if wanted and sha.hexdigest() != wanted:
            raise UserError(f"{url}: another file than expected came (sha256 {sha.hexdigest()[:16]}...)")
        os.replace(part, target)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: cannot be downloaded ({error}): fetch it and give --source=FILE") from None
    finally:
        part.unlink(missing_ok=True)
    return str(target)


# -----------------------------------------------------------------------------
# Clean

RULES = {  # in this order: what to find, what to put there
    "line_ends": [(re.compile(r"\r\n?"), "\n")],
    "control_chars": [(re.compile("[\0-\x08\x0b\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]"), "")],
    "html": [(re.compile(r"(?is)<!--.*?-->|<(script|style)\b.*?</\1\s*>"), ""),
             (re.compile(r"(?i)</?(?:p|br|div|li|ul|ol|tr|table|h[1-6]|section|article)\b[^<>]*>"), "\n"),
             (re.compile(r"</?[a-zA-Z][^<>]*>|<![a-zA-Z][^<>]*>"), "")],
    "repeated_lines": [(re.compile(r"(?m)^(.+)$(?:\n\1$)+"), r"\1")],
    "scrub_pii": [
        (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----"
                    r"|\b(?:sk-|ghp_|gho_|github_pat_|glpat-|hf_|xox[abprs]-|AKIA|AIza)[\w-]{16,}"
                    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}", re.DOTALL), "[KEY]"),
        (re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+"), "[EMAIL]"),
        (re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.]*\d)"
                    r"|(?<![\w:])(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}(?![\w:])"
                    r"|(?<![\w:])(?=[a-f:]*\d)(?:[0-9a-fA-F]{1,4}:){1,6}(?::[0-9a-fA-F]{1,4}){1,6}(?![\w:])"),
         "[IP]"),
        (re.compile(r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\)|\d{2,4})[ .-]?\d{3,4}[ .-]\d{3,4}"
                    r"(?![\w-])|(?<![\w.])\+\d{9,14}(?!\w)|(?<!\d)1[3-9]\d{9}(?!\d)"), "[PHONE]")],
}


def clean(text: str, rules: list[str], title: str, found: dict, touched: dict[str, int]) -> str:
    """Apply the rules. touched: adds how often each applied; found: keeps the first place as an example."""
    for rule in rules:
        before, times = text, 0
        if rule == "nfc":
            times = not text.isascii() and not unicodedata.is_normalized("NFC", text)
            text = unicodedata.normalize("NFC", text) if times else text
        else:
            for pattern, replacement in RULES[rule]:
                text, n = pattern.subn(replacement, text)
                times += n
        if times:
            touched[rule] = touched.get(rule, 0) + int(times)
            if rule not in found:
                # meta.json is no place for what is to be scrubbed
                shown = before if "scrub_pii" not in rules else text if rule == "scrub_pii" else ""
                at = next((i for i, (a, b) in enumerate(zip(before, text)) if a != b), 0)
                note(found, rule, f"{title}: {shown[max(at - 30, 0):at + 30]!r}", documents=0)
    return text


def note(found: dict, what: str, example: str, times: int = 0, documents: int = 1) -> None:
    """found[what] counts documents and times, and keeps the first example."""
    entry = found.setdefault(what, {"documents": 0, "times": 0, "example": example[:200]})
    entry["documents"] += documents
    entry["times"] += times


# The index of the spool: where each document is (in bytes), its characters, and a hash of it that stands for
# it; and its sketch, if near-duplicates are looked for.
INDEX = [("start", "<i8"), ("size", "<i8"), ("chars", "<i8"), ("hash", ">u8")]


def collect(docs: Iterator[tuple[str, str]], spool: Path, rules: list[str], min_chars: int, min_text: float,
            sketches: bool, found: dict) -> np.ndarray:
    """The first pass: clean the documents, write them one behind the other, and return the index.

    found: counts, as in note().
    """
    tick, position, rows, n_read = Progress("reading"), 0, bytearray(), 0

    def which(block):  # document it belongs to
        nonlocal n_read
        n_read += block[0] != ""
        return n_read

    with open(spool, "wb") as f:
        for _, parts in itertools.groupby(docs, which):
            title, head, start, chars, plain, touched = "", "", position, 0, 0, {}
            sha, low = hashlib.sha256(), np.zeros(0, "<u4")
            for name, text in parts:
                title = name or title
                text = clean(text, rules, title, found, touched)
                head = head or text[:60]
                data = text.encode("utf-8", "replace")
                f.write(data)
                sha.update(data)
                position, chars = position + len(data), chars + len(text)
                if min_text:
                    plain += len(text) - len(re.findall(r"[^\w\s]", text))
                if sketches:
                    low = sketch(data, low)
                tick(len(data))
            note(found, "read", title)
            for rule, times in touched.items():
                note(found, rule, "", times)
            if chars < min_chars or plain < min_text * chars:  # it stays in the spool, but not in the index
                note(found, "too_short" if chars < min_chars else "mostly_not_text", f"{title}: {head!r}")
                continue
            rows += struct.pack("<qqq", start, position - start, chars) + sha.digest()[:8]
            rows += np.append(low, np.full(K - len(low), NONE, "<u4")).tobytes() if sketches else b""
    return np.frombuffer(bytes(rows), INDEX + [("sketch", "<u4", (K,))] * sketches)


# -----------------------------------------------------------------------------
# Deduplicate and split

def sketch(data: bytes, low: np.ndarray) -> np.ndarray:
    """The K smallest hashes of the text's shingles (any 12 bytes in a row), those in `low` among them.

    Two documents' share of common shingles is that among the K smallest of both (Broder 1997), +-0.05 or so.
    """
    n = len(data) - 11
    if n < 1:
        return low
    first, last = (np.ndarray((n,), "<u8", data, offset, (1,)) for offset in (0, 4))  # 8 bytes from each on
    shingles = first * np.uint64(MIX[0]) + last
    shingles ^= shingles >> np.uint64(29)
    hashes = (shingles * np.uint64(MIX[1]) >> np.uint64(32)).astype("<u4")
    few = np.unique(hashes[hashes < 2**32 * min(4 * K / n, 1)])
    lowest = few if len(few) >= K else np.unique(hashes)  # where much comes again and again
    return np.union1d(low, lowest)[:K] if len(low) else lowest[:K]


def near_ones(sketches: np.ndarray, split: np.ndarray, threshold: float) -> np.ndarray:
    """Which documents to drop (bool), so that no two are left that share `threshold` of their shingles.

    Of two, the one in train goes before that in val, and that before the one in test: what is tested on is
    not to be seen in training; within a split the later one. Compared are those that have three neighbours
    in common among the 32 lowest values: at a share of 0.7, 99.9% have. Takes about 1 kB a document.
    """
    n, pairs = len(sketches), np.zeros(0, np.int64)
    low = sketches[:, :32].astype(np.uint64)
    keys = low[:, :-2] * np.uint64(MIX[0]) + low[:, 1:-1] * np.uint64(MIX[1]) + low[:, 2:]
    keys = (keys * np.uint64(MIX[0]) >> np.uint64(32)).astype(np.uint32)[low[:, 2:] != NONE]
    documents = np.repeat(np.arange(n), (low[:, 2:] != NONE).sum(axis=1))
    order = np.argsort(keys, kind="stable")
    keys, documents = keys[order], documents[order]
    for back in range(1, 5):  # with a few before it, and not all: some passages are in every document
        same = np.flatnonzero(keys[back:] == keys[:-back])
        pairs = np.union1d(pairs, documents[same] * n + documents[same + back])
    rank = np.array([2, 1, 0])[split] * n + np.arange(n)  # the higher goes
    drop = np.zeros(n, bool)
    for i in range(0, len(pairs), 2**13):
        a, b = np.divmod(pairs[i:i + 2**13], n)
        both = np.sort(np.concatenate((sketches[a], sketches[b]), axis=1), axis=1)
        new = np.diff(both, axis=1, prepend=np.uint32(NONE)) != 0
        nth = np.cumsum(new & (both != NONE), axis=1)  # of the union's values
        common = (~new & (both != NONE) & (nth <= K)).sum(axis=1)
        near = (common >= threshold * np.minimum(nth[:, -1], K)) & (a != b)
        drop[np.where(rank[a] > rank[b], a, b)[near]] = True
    return drop


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


class Progress:
    """Prints, every few seconds, how far it is: MB, MB a second, and the time left where the end is known."""

    def __init__(self, what: str, total: int = 0):
        self.what, self.total, self.done, self.start, self.next = what, total, 0, time.monotonic(), 5

    def __call__(self, n_bytes: int):
        self.done += n_bytes
        seconds = time.monotonic() - self.start
        if seconds > self.next:
            self.next, rate = seconds + 5, self.done / seconds
            left = f", {max(self.total - self.done, 0) / rate:,.0f} s left" if self.total else ""
            print(f"{self.what}: {self.done / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s{left}", flush=True)


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
    run(main, globals())
