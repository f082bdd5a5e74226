"""
Text to tokens: collect documents, clean and split them, train or load a tokenizer, write data/<dataset>/.

    python prepare.py                                         the Python standard library of this machine
    python prepare.py --dataset=shakespeare_char              tiny Shakespeare by bytes (downloaded, 1 MB)
    python prepare.py --source=novel.txt                      your own: a text file...
    python prepare.py --source=notes/ --vocab_size=2048       ...a folder of them...
    python prepare.py --source="books/*.txt" --tokenizer=gpt2 ...or a glob
    python prepare.py --source=web.jsonl.gz,hf:NAME --nfc --near_duplicates=0.7    large, messy, from two places
    python prepare.py --source=notes/ --report --show=3       what is in it, and three of its documents

A data set is train.bin, val.bin and test.bin (raw token ids, uint16 or uint32, little-endian) and meta.json.

Two passes, in bounded memory whatever the size of the text: the first writes the cleaned documents one behind
the other into a temporary file and keeps a few numbers of each (the spool and its index); all that needs a
view of the whole (duplicates, splits, the tokenizer) is decided on these; the second pass turns them to tokens.
"""
import bz2
import codecs
import csv
import glob
import gzip
import hashlib
import http.client
import io
import json
import lzma
import os
import re
import shutil
import sys
import sysconfig
import time
import unicodedata
import urllib.parse
import urllib.request
import zlib
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from config import SettingError, UserError, run
from tokenizer import Tokenizer, make_tokenizer

# -----------------------------------------------------------------------------
# Settings
dataset: str = ""  # name of the folder under data/, or a built-in: python, shakespeare, shakespeare_char
source: str = ""  # file, folder, glob, URL, hf:NAME or built-in, or several with commas; empty: the built-in's
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
near_duplicates: float = 0.0  # drop documents that share this much with another, 0.7 is a start; 0: keep them

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
UNIT = 2**19  # characters tokenized at a time, by one thread
K = 64  # values in the sketch of a document

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
    """A file with nothing to read in it: an error where it was named, passed over where a folder was."""


def documents(source: str, encoding: str = "utf-8", errors: str = "strict", text_key: str = "text",
              found: dict | None = None, downloads: str = "data/downloads") -> Iterator[tuple[str, str]]:
    """(name, text) of each document. An empty name goes on with the document before: a large file in blocks.

    found: counts what was passed over (see note). Raises UserError, with its name, for what cannot be read.
    """
    found = {} if found is None else found
    several = not Path(source).exists() and "," in source
    for one in [part.strip() for part in source.split(",") if part.strip()] if several else [source]:
        one = BUILT_IN[one][0] if one in BUILT_IN else one
        if one == "python":
            yield from standard_library()
            continue
        if one.startswith("hf:"):
            yield from hub_documents(one, text_key)
            continue
        if one.startswith(("https://", "http://")):
            one = str(download(one, Path(downloads)))
        if Path(one).is_dir():
            yield from folder_documents(Path(one), encoding, errors, text_key, found)
            continue
        names = [one] if Path(one).is_file() else sorted(filter(os.path.isfile, glob.glob(one, recursive=True)))
        if not names:
            raise UserError(f"{one}: no such file or folder")
        for name in names:
            yield from file_documents(Path(name), name, encoding, errors, text_key)


def folder_documents(root: Path, encoding: str, errors: str, text_key: str,
                     found: dict) -> Iterator[tuple[str, str]]:
    """Of all files below; hidden, empty and binary ones are passed over, and counted: it may hold pictures."""
    seen = used = 0
    for where, folders, names in os.walk(root):
        for hidden in [name for name in folders + names if name.startswith(".")]:
            note(found, "hidden files", 1, hidden)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            file = Path(where, name)
            title = file.relative_to(root).as_posix()
            seen += 1
            try:
                yield from file_documents(file, title, encoding, errors, text_key)
                used += 1
            except NotText as error:
                note(found, "empty or binary files", 1, str(error))
    if not used:
        raise UserError(f"{root}: no text in this folder ({seen} files, all empty or binary)")


def file_documents(file: Path, title: str, encoding: str, errors: str,
                   text_key: str) -> Iterator[tuple[str, str]]:
    """By the file's suffix: each line of a .jsonl, each row of a .csv or .tsv, else the file is the document."""
    packed = file.suffix.lower() in UNPACK
    kind = Path(file.stem if packed else file.name).suffix.lower()
    text = blocks(file, encoding, errors)
    if kind in (".jsonl", ".ndjson"):
        for n, line in enumerate(lines(text), 1):
            if not line.isspace():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{file}:{n}: not JSON ({error})") from None
                yield f"{title}:{n}", field(row, text_key, f"{file}:{n}")
    elif kind in (".csv", ".tsv"):
        yield from table_documents(file, title, lines(text), kind == ".tsv", text_key)
    else:
        for block in text:
            yield title, block
            title = ""


def table_documents(file: Path, title: str, rows: Iterator[str], tabs: bool,
                    text_key: str) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(2**31 - 1)
    # in a .tsv a quotation mark is one
    reader = csv.reader(rows, **(dict(delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else {}))
    try:
        if text_key.isdigit():  # by number: the first row is text too
            column = int(text_key)
        else:
            header = next(reader)
            if text_key not in header:
                raise UserError(f"{file}: no column {text_key!r} (it has: {', '.join(header)[:200]}): give "
                                "--text_key=NAME, or its NUMBER, from 0, where there is no header")
            column = header.index(text_key)
        for row in reader:
            if row and column >= len(row):
                raise UserError(f"{file}:{reader.line_num}: {len(row)} columns, and --text_key={text_key} "
                                f"is number {column}, from 0")
            if row:
                yield f"{title}:{reader.line_num}", row[column]
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: {error}") from None


def field(row: dict, key: str, where: str) -> str:
    if not isinstance(row, dict) or key not in row:
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where}: no key {key!r} (it has: {keys[:200]}): give --text_key=NAME")
    if not isinstance(row[key], str | None):
        raise UserError(f"{where}: {key!r} is no text but {type(row[key]).__name__}: give --text_key=NAME")
    return row[key] or ""


def lines(text: Iterator[str]) -> Iterator[str]:
    for block in text:
        yield from io.StringIO(block, newline="\n")  # str.splitlines cuts at form feeds and others too


def blocks(file: Path, encoding: str, errors: str) -> Iterator[str]:
    """A file's text, unpacked, some MB at a time, cut at line ends. Raises UserError, with the place."""
    utf8 = codecs.lookup(encoding).name == "utf-8"
    decoder = codecs.getincrementaldecoder("utf-8-sig" if utf8 else encoding)(errors)
    offset, rest = 0, ""
    try:
        with UNPACK.get(file.suffix.lower(), open)(file, "rb") as f:
            while data := f.read(BLOCK):
                wide = encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32"))
                if offset == 0 and b"\0" in data and not wide:
                    raise NotText(f"{file}: a binary file (byte 0 at offset {data.index(0)}), where text is wanted")
                text = rest + decoder.decode(data)
                offset += len(data)
                end = text.rfind("\n") + 1 or (len(text) if len(text) > 16 * BLOCK else 0)
                rest = text[end:]
                if end:
                    yield text[:end]
            if offset == 0:
                raise NotText(f"{file}: the file is empty")
            data = b""
            rest += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at = offset - (len(error.object) - len(data)) + error.start  # the object is what was left, and data
        raise UserError(f"{file}: not {encoding} (byte 0x{error.object[error.start]:02x} at offset {at}): give "
                        "the right --encoding=..., latin-1 for instance, or --errors=replace") from None
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}): "
                        "is it whole?") from None
    if rest:
        yield rest


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


def hub_documents(source: str, text_key: str) -> Iterator[tuple[str, str]]:
    """The train split of hf:NAME or hf:NAME#CONFIG, on the hub or a local folder (of parquet, for instance)."""
    name, _, subset = source.removeprefix("hf:").partition("#")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: needs a package: pip install datasets") from None
    try:
        rows = iter(datasets.load_dataset(name, subset or None, split="train", streaming=True))
        for n in range(sys.maxsize):
            row = next(rows, None)
            if row is None:
                return
            yield f"{name}:{n}", field(row, text_key, f"{source}: row {n}")
    except UserError:
        raise
    except Exception as error:  # of many kinds: no such data set, no network, a damaged file
        raise UserError(f"{source}: cannot be read: {type(error).__name__}: {str(error)[:300]!r}") from None


def download(url: str, folder: Path) -> Path:
    """Fetch once into `folder`; url may end in #sha256=... Raises UserError without network, or another file."""
    url, _, fragment = url.partition("#")
    wanted = fragment.removeprefix("sha256=").lower() or SHA256.get(url)
    suffixes = "".join(Path(urllib.parse.urlparse(url).path).suffixes[-2:])
    target = folder / (hashlib.sha256(url.encode()).hexdigest()[:16] + (suffixes or ".txt"))
    if target.is_file():
        return target
    print(f"downloading {url}")
    folder.mkdir(parents=True, exist_ok=True)
    part, sha, size = target.with_name(f"{target.name}.{os.getpid()}.part"), hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as f:
            length = response.headers.get("Content-Length")
            while data := response.read(2**20):
                f.write(data)
                sha.update(data)
                size += len(data)
        if length and size != int(length):
            raise OSError(f"broke off after {size:,} of {int(length):,} bytes")
        if wanted and sha.hexdigest() != wanted:
            raise UserError(f"{url}: another file than expected came (sha256 {sha.hexdigest()[:16]}...): try again")
        os.replace(part, target)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: cannot be downloaded ({error}): fetch it another way, "
                        "then --source=FILE") from None
    finally:
        part.unlink(missing_ok=True)
    return target


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
        (re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"), "[EMAIL]"),
        (re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.]*\d)"
                    r"|(?<![\w:])(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}(?![\w:])"
                    r"|(?<![\w:])(?:[0-9a-fA-F]{1,4}:){1,6}(?::[0-9a-fA-F]{1,4}){1,6}(?![\w:])"), "[IP]"),
        (re.compile(r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\)|\d{2,4})[ .-]?\d{3,4}[ .-]\d{3,4}(?![\w-])"
                    r"|(?<![\w.])\+\d{9,14}(?!\w)|(?<!\d)1[3-9]\d{9}(?!\d)"), "[PHONE]")],
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
                shown = text if rule == "scrub_pii" else before  # meta.json is no place for what was scrubbed
                at = next((i for i, (a, b) in enumerate(zip(before, text)) if a != b), 0)
                note(found, rule, 0, f"{title}: {shown[max(at - 30, 0):at + 30]!r}", n_documents=0)
    return text


def note(found: dict, what: str, times: int, example: str, n_documents: int = 1) -> None:
    """found[what] counts documents and times, and keeps the first example."""
    entry = found.setdefault(what, {"documents": 0, "times": 0, "example": example[:200]})
    entry["documents"] += n_documents
    entry["times"] += times


class Index(NamedTuple):
    """Where each document lies in the spool, and what is decided on: one array element a document."""
    start: np.ndarray  # bytes
    size: np.ndarray  # bytes
    chars: np.ndarray
    hash: np.ndarray  # of the cleaned text, uint64
    sketch: np.ndarray  # (documents, K) uint32, or (documents, 0)


def collect(docs: Iterator[tuple[str, str]], spool: Path, rules: list[str], min_chars: int, min_text: float,
            sketches: bool, found: dict) -> Index:
    """The first pass: clean the documents and write them one behind the other. found: counts as in note()."""
    starts, sizes, lengths, hashes, rows = array("q"), array("q"), array("q"), array("Q"), bytearray()
    tick = Progress("reading")

    def finish():  # the document before is whole
        for rule, times in touched.items():
            note(found, rule, times, "")
        for rule, bad in (("too_short", chars < min_chars), ("mostly_not_text", plain < min_text * chars)):
            if bad:  # it stays in the spool, where nothing points to it
                note(found, rule, 1, f"{title}: {head!r}")
                return
        starts.append(start)
        sizes.append(size)
        lengths.append(chars)
        hashes.append(int.from_bytes(sha.digest()[:8], "big"))
        rows.extend(low.tobytes())

    title, position = None, 0
    with open(spool, "wb") as f:
        for name, text in docs:
            if name:
                if title is not None:
                    finish()
                title, head, start, size, chars, plain = name, text[:60], position, 0, 0, 0
                sha, low, touched = hashlib.sha256(), np.zeros(0, np.uint32), {}
            if rules:
                text = clean(text, rules, title, found, touched)
            data = text.encode("utf-8", "replace")
            f.write(data)
            sha.update(data)
            size, chars, position = size + len(data), chars + len(text), position + len(data)
            if min_text:
                plain += len(text) - len(re.findall(r"[^\w\s]", text))
            if sketches:
                low = sketch(data, low)
            tick(len(data))
        if title is None:
            raise UserError("the source: has no documents")
        finish()
    note(found, "documents", 0, "", n_documents=len(starts))
    return Index(*(np.frombuffer(a, dtype) for a, dtype in
                   ((starts, np.int64), (sizes, np.int64), (lengths, np.int64), (hashes, np.uint64))),
                 np.frombuffer(rows, np.uint32).reshape(len(starts), K if sketches else 0))


# -----------------------------------------------------------------------------
# Deduplicate

def sketch(data: bytes, low: np.ndarray) -> np.ndarray:
    """The K smallest hashes of the text's shingles (any 8 bytes in a row), those in `low` among them.

    Two documents' share of common shingles is that among the K smallest of both (Broder 1997), +-0.05 or so.
    """
    n = len(data) - 7
    if n < 1:
        return low
    shingles = np.concatenate([np.frombuffer(data, "<u8", (len(data) - k) // 8, k) for k in range(min(8, n))])
    shingles *= np.uint64(0x9E3779B97F4A7C15)  # mixes the bits, so that the smallest are any
    shingles ^= shingles >> np.uint64(29)
    shingles *= np.uint64(0xBF58476D1CE4E5B9)
    hashes = (shingles >> np.uint64(32)).astype(np.uint32)
    few = hashes[hashes < 2**32 * 4 * K // n] if n > 4 * K else hashes
    lowest = np.unique(few)
    if len(lowest) < K and len(few) < n:  # much comes again and again
        lowest = np.unique(hashes)
    return np.union1d(low, lowest)[:K] if len(low) else lowest[:K]


def near_duplicates(sketches: np.ndarray, split: np.ndarray, threshold: float) -> np.ndarray:
    """Which documents to drop (bool), so that no two are left that share `threshold` of their shingles.

    Of two, the one in train goes before that in val, and that before the one in test: what is tested on is
    not to be seen in training. Within a split the later one goes. Compared are those that have two
    neighbouring values in common among the 17 lowest: at a share of 0.7, 99.9% of the pairs have.
    """
    n, none = len(sketches), np.uint32(2**32 - 1)
    low = sketches[:, :17].astype(np.uint64)
    keys = (low[:, :-1] << np.uint64(32) | low[:, 1:]).ravel()
    documents = np.repeat(np.arange(n), low.shape[1] - 1)[keys & none != none]
    keys = keys[keys & none != none]
    order = np.argsort(keys, kind="stable")
    keys, documents = keys[order], documents[order]
    same = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    first = np.maximum.accumulate(np.where(np.append(True, keys[1:] != keys[:-1]), np.arange(len(keys)), 0))
    # each with the one before it and with the first: all pairs would be too many for what is in every document
    pairs = np.unique(np.concatenate((documents[same - 1] * n + documents[same],
                                      documents[first[same]] * n + documents[same])))
    rank = np.array([2, 1, 0])[split] * n + np.arange(n)  # the higher goes
    drop = np.zeros(n, bool)
    for i in range(0, len(pairs), 2**16):
        a, b = np.divmod(pairs[i:i + 2**16], n)
        both = np.sort(np.concatenate((sketches[a], sketches[b]), axis=1), axis=1)
        new = np.diff(both, axis=1, prepend=none) != 0
        nth = np.cumsum(new & (both != none), axis=1)  # of the union's values
        common = (~new & (both != none) & (nth <= K)).sum(axis=1)
        near = (common >= threshold * np.minimum(nth[:, -1], K)) & (a != b)
        drop[np.where(rank[a] > rank[b], a, b)[near]] = True
    return drop


# -----------------------------------------------------------------------------
# Split

def splits_of(hashes: np.ndarray, val_fraction: float, test_fraction: float) -> np.ndarray:
    """0, 1, 2 for train, val, test, by the text's hash alone: other documents may come and go, it stays."""
    x = hashes / 2**64
    return np.where(x < test_fraction, 2, np.where(x < test_fraction + val_fraction, 1, 0))


def cut(spool: Path, index: Index, val_fraction: float, test_fraction: float) -> list[np.ndarray]:
    """Too few documents to deal out, or one: all in a row into contiguous train, val and test, by characters.

    Returns the (first, last + 1) byte of each piece of a document, (pieces, 2) for each split.
    """
    after = np.cumsum(index.chars)
    total = int(after[-1])
    places = [0, int(total * (1 - val_fraction - test_fraction)), int(total * (1 - test_fraction)), total]
    pieces = []
    for low, high in zip(places, places[1:]):
        rows = []
        for i in np.flatnonzero((after > low) & (after - index.chars < high)):
            begin = int(after[i] - index.chars[i])
            rows.append([byte_at(spool, index, i, max(low - begin, 0)), byte_at(spool, index, i, high - begin)])
        pieces.append(np.array(rows, np.int64).reshape(-1, 2))
    return pieces


def byte_at(spool: Path, index: Index, i: int, char: int) -> int:
    """Where in the spool the n-th character of document i begins."""
    position, end = int(index.start[i]), int(index.start[i] + index.size[i])
    if char >= index.chars[i]:
        return end
    with open(spool, "rb") as f:
        f.seek(position)
        while True:
            data = np.frombuffer(f.read(min(BLOCK, end - position)), np.uint8)
            begins = np.flatnonzero(data & 0xC0 != 0x80)  # all but the bytes that go on with a character
            if char < len(begins):
                return position + int(begins[char])
            char, position = char - len(begins), position + len(data)


# -----------------------------------------------------------------------------
# Tokenize

# Between a letter and one of these every pattern cuts anyway: a long text in pieces gives the same tokens.
SAFE = re.compile(r"[^\W\d_](?=[ \n,.，。、])")


def chunks(spool: Path, pieces: np.ndarray, whole: bool, tick: "Progress") -> Iterator[tuple[str, bool]]:
    """(text, does it end a document?) of the pieces of a split; a long one in several, unless `whole`."""
    with open(spool, "rb") as f:
        for start, end in zip(memoryview(pieces[:, 0].copy()), memoryview(pieces[:, 1].copy())):
            f.seek(start)
            rest, decoder = "", codecs.getincrementaldecoder("utf-8")()
            while start < end:
                data = f.read(min(BLOCK, end - start))
                start += len(data)
                tick(len(data))
                text = rest + decoder.decode(data)
                at = len(text)
                if start < end:
                    found = [] if whole else list(SAFE.finditer(text, max(at - 4096, 0)))
                    at = found[-1].end() if found else at if at > 16 * BLOCK and not whole else 0
                if at:
                    yield text[:at], start == end
                rest = text[at:]


def units(texts: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Several short texts at a time: what a thread is given should be worth its while."""
    unit, size = [], 0
    for text, ends in texts:
        unit.append((text, ends))
        size += len(text)
        if size >= UNIT:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def sample(texts: Iterator[tuple[str, bool]], share: float) -> Iterator[str]:
    """About that share of a large text, evenly from all of it, in runs of UNIT characters."""
    done = 0
    for text, _ in texts:
        run = done // UNIT
        if share >= 1 or int((run + 1) * share) > int(run * share):
            yield text
        done += len(text)


class Progress:
    """Prints, every few seconds, how far it is: MB, MB a second, and the time left where the end is known."""

    def __init__(self, what: str, total: int = 0):
        self.what, self.total, self.done = what, total, 0
        self.start = self.last = time.monotonic()

    def __call__(self, n_bytes: int):
        self.done += n_bytes
        now = time.monotonic()
        if now - self.last > 5:
            self.last, rate = now, self.done / (now - self.start)
            of = f" of {self.total / 1e6:,.0f}" if self.total else ""
            left = f", {max(self.total - self.done, 0) / rate:,.0f} s left" if self.total else ""
            print(f"{self.what}: {self.done / 1e6:,.0f}{of} MB, {rate / 1e6:.1f} MB/s{left}", flush=True)


# -----------------------------------------------------------------------------
# Write

def prepare(dataset: str, source: str = "", tokenizer: str = "", vocab_size: int = 4096,
            val_fraction: float = 0.1, test_fraction: float = 0.1, encoding: str = "utf-8",
            overwrite: bool = False, root: str | Path = "data", errors: str = "strict", text_key: str = "text",
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
        raise SettingError(f"--dataset={dataset}: not a built-in ({', '.join(BUILT_IN)}): give its text by "
                           f"--source=FILE, FOLDER or GLOB")
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
        build(partial, settings, Path(root) / "downloads", threads or os.cpu_count() or 1)
        old = partial.with_suffix(".old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:  # the disk is full, for one
        raise UserError(f"{error.filename or folder}: {error.strerror or error}: nothing was changed") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def check(settings: dict) -> None:
    s = settings
    if not (s["val_fraction"] > 0 and s["test_fraction"] >= 0 and s["val_fraction"] + s["test_fraction"] < 1):
        raise SettingError(f"--val_fraction={s['val_fraction']} --test_fraction={s['test_fraction']}: the first "
                           "must be above 0, the second at least 0, both together below 1")
    if s["tokenizer"] == "bpe" and s["vocab_size"] < 258:
        raise SettingError(f"--vocab_size={s['vocab_size']}: must be at least 258 (256 bytes and two specials)")
    for name in ("min_text", "near_duplicates"):
        if not 0 <= s[name] <= 1:
            raise SettingError(f"--{name}={s[name]}: is a share, from 0 to 1")
    if s["sample_mb"] < 1:
        raise SettingError(f"--sample_mb={s['sample_mb']}: must be at least 1")
    try:
        codecs.lookup(s["encoding"])
    except LookupError:
        raise SettingError(f"--encoding={s['encoding']}: Python knows no such encoding") from None


def clear_up(folder: Path) -> None:
    """What runs left behind that were killed while they made this data set: half of one, or the one before."""
    for left in folder.parent.glob(glob.escape(f".{folder.name}.") + "*"):
        middle, _, what = left.name.removeprefix(f".{folder.name}.").partition(".")
        if what not in ("part", "old") or not middle.isdigit() or is_running(int(middle)):
            continue
        if what == "old" and not folder.exists():  # killed between the two renames
            os.replace(left, folder)
        shutil.rmtree(left, ignore_errors=True)


def is_running(pid: int) -> bool:
    if os.name == "nt":  # where signal 0 is not a question
        import ctypes
        handle = ctypes.windll.kernel32.OpenProcess(0x100000, False, pid)  # the right to wait for its end
        running = bool(handle) and ctypes.windll.kernel32.WaitForSingleObject(handle, 0) == 258  # timed out
        ctypes.windll.kernel32.CloseHandle(handle)
        return running
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def build(partial: Path, settings: dict, downloads: Path, threads: int) -> None:
    """Both passes, into an empty folder: the .bin files and meta.json."""
    s, began, found, spool = settings, time.monotonic(), {}, partial / "spool.tmp"
    print(f"reading {s['source']}")
    docs = documents(s["source"], s["encoding"], s["errors"], s["text_key"], found, downloads)
    index = collect(docs, spool, [rule for rule in ("nfc", *RULES) if s[rule]], s["min_chars"], s["min_text"],
                    s["near_duplicates"] > 0, found)
    index = deduplicate(index, spool, s, found)
    if not len(index.start):
        raise UserError(f"{s['source']}: no document is left: {json.dumps(found)[:300]}")

    # deal out the documents, or cut what is too little for that
    split = splits_of(index.hash, s["val_fraction"], s["test_fraction"])
    spans = np.stack((index.start, index.start + index.size), axis=1)
    pieces = [spans[split == i] for i in range(3)]
    wanted = [name for name, share in zip(SPLITS, (1, s["val_fraction"], s["test_fraction"])) if share > 0]
    if len(spans) == 1 or not all(len(pieces[SPLITS.index(name)]) for name in wanted):
        pieces = cut(spool, index, s["val_fraction"], s["test_fraction"])
    ends = len(spans) > 1  # a lone text has no ends inside

    if s["tokenizer"] == "bpe":
        size = int((pieces[0][:, 1] - pieces[0][:, 0]).sum())
        share = s["sample_mb"] * 1e6 / max(size, 1)
        print(f"training a tokenizer of {s['vocab_size']:,} tokens on {min(share, 1) * size / 1e6:.1f} MB")
    # on the training text only: what is tested on stays unseen, by the tokenizer too
    texts = sample(chunks(spool, pieces[0], False, lambda n: None), share) if s["tokenizer"] == "bpe" else []
    codec = make_tokenizer(s["tokenizer"], texts, s["vocab_size"])
    if s["tokenizer"] == "bpe" and codec.vocab_size < s["vocab_size"]:
        print(f"the text has pairs for {codec.vocab_size:,} tokens only")

    tick, splits = Progress("tokenizing", int(sum((p[:, 1] - p[:, 0]).sum() for p in pieces))), {}
    for name, its in zip(SPLITS, pieces):
        texts = chunks(spool, its, not isinstance(codec, Tokenizer), tick)
        splits[name] = write_split(partial / f"{name}.bin", units(texts), codec, ends, threads)
        splits[name].update(bytes=int((its[:, 1] - its[:, 0]).sum()), documents=len(its))
    for name in wanted:
        if splits[name]["tokens"] < 32:
            raise UserError(f"{s['source']}: only {splits[name]['tokens']} tokens for {name}.bin, too few "
                            "to be of use: give more text, or larger fractions")
    spool.unlink()
    meta = {"format": FORMAT, "dtype": bin_dtype(codec.vocab_size).name, "vocab_size": codec.vocab_size,
            "splits": splits, "settings": settings, "report": found, "tokenizer": codec.to_dict()}
    (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")

    for name, its in splits.items():
        print(f"{name:>6} {its['documents']:8,} documents {its['bytes']:14,} bytes {its['tokens']:14,} tokens")
    n_bytes, n_tokens, took = tick.total, sum(x["tokens"] for x in splits.values()), time.monotonic() - began
    print(f"{n_bytes / n_tokens:.2f} bytes a token, in {took:.1f} s ({n_bytes / 1e6 / took:.1f} MB/s)")


def deduplicate(index: Index, spool: Path, settings: dict, found: dict) -> Index:
    """Without the documents that are there already, word for word, or nearly so if that is asked for."""
    first = np.sort(np.unique(index.hash, return_index=True)[1])
    drop = np.ones(len(index.hash), bool)
    drop[first] = False
    for what in ("duplicates", "near_duplicates"):
        if drop.any():
            i = int(np.flatnonzero(drop)[0])
            with open(spool, "rb") as f:
                f.seek(index.start[i])
                example = f.read(min(int(index.size[i]), 240)).decode("utf-8", "ignore")[:60]
            note(found, what, int(drop.sum()), repr(example), n_documents=int(drop.sum()))
        index = Index(*(values[~drop] for values in index))
        if what == "near_duplicates" or not settings["near_duplicates"]:
            return index
        split = splits_of(index.hash, settings["val_fraction"], settings["test_fraction"])
        drop = near_duplicates(index.sketch, split, settings["near_duplicates"])


def write_split(path: Path, parts: Iterator[list[tuple[str, bool]]], codec: Tokenizer, ends: bool,
                threads: int) -> dict:
    """The tokens of a split to its .bin, <|endoftext|> behind each document if `ends`.

    Raises UserError for an id that the tokenizer should not give.
    """
    dtype, sha, tokens = bin_dtype(codec.vocab_size), hashlib.sha256(), 0

    def write(ids):
        if len(ids) and int(ids.max()) >= codec.vocab_size:
            raise UserError(f"{path.name}: token id {int(ids.max())} is out of range, the tokenizer's vocabulary "
                            f"is {codec.vocab_size:,}")
        data = to_bin(ids, dtype)
        f.write(data)
        sha.update(data)
        return len(ids)

    waiting = deque()
    with open(path, "wb") as f, ThreadPoolExecutor(threads) as pool:
        for part in parts:
            texts, is_end = [text for text, _ in part], [ends and end for _, end in part]
            waiting.append(pool.submit(codec.encode_documents, texts, is_end))
            if len(waiting) > 2 * threads:  # bounds the memory
                tokens += write(waiting.popleft().result())
        while waiting:
            tokens += write(waiting.popleft().result())
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
    codec, lengths, counts = Tokenizer.from_dict(meta["tokenizer"]), [], np.zeros(meta["vocab_size"], np.int64)
    print(f"\n{folder}")
    for split in SPLITS:
        ids, its = read_split(folder, split, meta), meta["splits"][split]
        if not its["tokens"]:
            continue
        ends = document_ends(ids, codec.eot)
        found = np.diff(ends, prepend=0)
        lengths.append(found)
        for i in range(0, len(ids), BLOCK):
            counts += np.bincount(ids[i:i + BLOCK], minlength=len(counts))
        low, mid, high = np.quantile(found, (0.1, 0.5, 0.9))
        print(f"{split:>6}: {its['documents']:,} documents, tokens each: {found.min():,} to {found.max():,}, "
              f"median {mid:,.0f}, 80% in {low:,.0f}-{high:,.0f}; {its['bytes'] / its['tokens']:.3f} bytes a token")
    order = np.argsort(-counts, kind="stable")
    print(f"tokens: {np.count_nonzero(counts):,} of {len(counts):,} are used; most frequent:")
    print("  " + "  ".join(f"{codec.decode([i])!r} {counts[i] / counts.sum():.2%}" for i in order[:20].tolist()))
    for what, entry in meta.get("report", {}).items():
        print(f"{what}: {entry['documents']:,} documents, {entry['times']:,} times; {entry['example']}")
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    longest = max(found.max() for found in lengths)
    left.hist(np.concatenate(lengths), bins=np.geomspace(1, longest + 1, 40))
    left.set(xscale="log", xlabel="tokens in a document", ylabel="documents")
    right.plot(np.arange(1, np.count_nonzero(counts) + 1), counts[order][:np.count_nonzero(counts)])
    right.set(xscale="log", yscale="log", xlabel="rank of a token", ylabel="how often it comes")
    figure.savefig(folder / "report.png", dpi=120)
    plt.close(figure)
    print(f"drawn: {folder / 'report.png'}")


def document_ends(ids: np.ndarray, eot: int) -> np.ndarray:
    """One past the last token of each document."""
    ends = np.concatenate([np.flatnonzero(ids[i:i + BLOCK] == eot) + i + 1 for i in range(0, len(ids), BLOCK)])
    return ends if len(ends) and ends[-1] == len(ids) else np.append(ends, len(ids))


def show_documents(folder: Path, n: int, seed: int) -> None:
    """Print some, decoded from train.bin, picked by the seed; of a long one the beginning."""
    meta = read_meta(folder)
    codec, ids = Tokenizer.from_dict(meta["tokenizer"]), read_split(folder, "train", meta)
    ends = document_ends(ids, codec.eot)
    starts = np.append(0, ends[:-1])
    for i in np.sort(np.random.default_rng(seed).permutation(len(ends))[:n]).tolist():
        print(f"\n--- document {i:,} of {len(ends):,} in train.bin, {ends[i] - starts[i]:,} tokens")
        shown = [t for t in ids[starts[i]:min(ends[i], starts[i] + 500)].tolist() if t != codec.eot]
        print(codec.decode(shown) + ("..." if ends[i] - starts[i] > 500 else ""))


def main():
    folder = prepare(dataset, source, tokenizer, vocab_size, val_fraction, test_fraction, encoding, overwrite,
                     errors=errors, text_key=text_key, nfc=nfc, line_ends=line_ends, control_chars=control_chars,
                     html=html, repeated_lines=repeated_lines, scrub_pii=scrub_pii, min_chars=min_chars,
                     min_text=min_text, near_duplicates=near_duplicates, sample_mb=sample_mb, threads=threads)
    if report:
        print_report(folder)
    if show:
        show_documents(folder, show, seed)


if __name__ == "__main__":
    run(main, globals())
