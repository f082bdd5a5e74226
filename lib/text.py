"""
Documents from anywhere, cleaned, and which of them are nearly the same.

    for name, text in documents("notes/,web.jsonl.gz"):
        ...

Nothing here knows of tokens: it serves for any text.
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
import struct
import sysconfig
import time
import unicodedata
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from config import UserError

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
# Nearly the same

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
