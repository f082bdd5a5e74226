"""
Any file to texts: documents for prepare.py, and what lib/rows.py makes labelled rows of.

    for name, text in documents("notes/,web.jsonl.gz"):
        ...

Both read CSV, TSV, JSON lines and JSON by records(). Nothing here knows tokens, or tasks.
"""
from __future__ import annotations

import bz2
import codecs
import contextlib
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
import math
import os
import re
import sys
import sysconfig
import time
import urllib.parse
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from config import SettingError, UserError

BLOCK = 2**22  # bytes read at a time
UNPACK = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
BUILT_IN = {  # dataset -> its source and tokenizer
    "python": ("builtin:python", "bpe"),
    "shakespeare": (SHAKESPEARE, "bpe"),
    "shakespeare_char": (SHAKESPEARE, "bytes"),
}
SHA256 = {SHAKESPEARE: "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}


# -----------------------------------------------------------------------------
# A file to text

class NotText(UserError):
    """A file with nothing to read in it: an error if it was named, passed over if its folder was."""
    why = "empty_or_binary"


class OtherEncoding(NotText):
    why = "other_encodings"


def kind_of(path: str | Path) -> str:
    """The suffix that tells the format: ".csv" of a.csv and of a.csv.gz."""
    path = Path(path)
    name = path.stem if path.suffix.lower() in UNPACK else path.name
    suffix = Path(name).suffix.lower()
    return ".jsonl" if suffix in (".ndjson", ".jsonlines") else suffix


def read_text(path: str | Path) -> str:
    """All of a labelled file."""
    return "".join(blocks(path, encoding_of(path), labelled=True))


NO_TEXT = {b"PK\3\4": "a zip or Excel file", b"\xd0\xcf\x11\xe0": "an Excel file", b"PAR1": "a Parquet file",
           b"%PDF-": "a PDF", b"{\\rtf": "an RTF file", b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture",
           b"GIF8": "a picture", b"\x1f\x8b": "a gzip file", b"BZh": "a bzip2 file",
           b"\xfd7zXZ": "an xz file", b"\x28\xb5\x2f\xfd": "a zstd file", b"7z\xbc\xaf": "a 7z file"}
UTF_16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
UTF_32 = codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE


def encoding_of(path: str | Path, found: dict | None = None) -> str:
    """UTF-8, or UTF-16, UTF-32 or GBK if that is what it begins with, which is said, or counted in found."""
    data, name = b"", ""
    with contextlib.suppress(*UNREADABLE):  # blocks() will tell
        with UNPACK.get(Path(path).suffix.lower(), open)(path, "rb") as f:
            data = f.read(BLOCK)
    if data.startswith(UTF_32):  # two of their bytes are the mark of UTF-16, too
        name = "utf-32"
    elif data.startswith(UTF_16):
        name = "utf-16"
    elif found is None and data[1:2000:2].count(0) > 0.3 * len(data[:2000]):  # else it may be a binary file
        name = "utf-16-le"
    elif not decodes(data, "utf-8") and is_gbk(data):
        name = "gb18030"
    if name:
        said = f"{path}: read as {'GBK' if name == 'gb18030' else name[:6].upper()}"
        if found is None:
            print(said, file=sys.stderr)
        else:
            note(found, "recognised", said)
    return name or "utf-8"


def decodes(data: bytes, encoding: str) -> str:
    """The text, which may end within a character; empty if it is none in this encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeDecodeError:
        return ""


def is_gbk(data: bytes) -> bool:
    """Chinese in GBK: what is not ASCII comes in pairs, common characters and commas among them."""
    wide = [c for c in decodes(data, "gb18030") if c > "\x7f"]
    pairs = sum(min(c.encode("gb18030")) > 0xa0 for c in wide)
    common = sum(c in "的一是不了在有我他这中大来上个，。！、" for c in wide)
    return wide and pairs > 0.9 * len(wide) and (common > 0.02 * len(wide) or len(wide) < 50)


def encoding_advice(data: bytes, encoding: str, replaces: bool) -> str:
    """For a text file not in this encoding. A Western one reads anything, and makes a mess of most."""
    beyond = sum(byte > 127 for byte in data)
    if encoding != "utf-8" and decodes(data, "utf-8"):
        return "UTF-8: --encoding=utf-8" + (", or --encoding= for each file in its own" if replaces else "")
    if encoding == "gb18030" and is_gbk(data):
        return "it ends within a character: " + ("--errors=replace" if replaces else "mend that")
    if sum(c > "\x7f" for c in data.decode("utf-8", "ignore")) > beyond / 4:
        return "UTF-8 but for some bytes: " + ("--errors=replace" if replaces else "mend them")
    guess = "what it is in (shift_jis, big5, euc_kr, cp1251...)"
    if is_gbk(data) and any(c.encode("gbk") in data for c in "的一是不了在有"):
        guess = "gb18030, for it looks like Chinese"
    elif beyond < len(data) / 4 or len(data) < 8:
        guess = "cp1252 or latin-1, or what it is in"
    return f"--encoding={guess}" + (", or --errors=replace" if replaces else "")


def blocks(path: str | Path, encoding: str = "utf-8", errors: str = "strict",
           labelled: bool = False) -> Iterator[str]:
    """A file's text, unpacked, some MB at a time, cut at line ends. Raises UserError, with the place.

    labelled: a NUL byte is replaced, with a warning; otherwise it tells a binary file, which is refused.
    """
    name = codecs.lookup(encoding).name
    decoder = codecs.getincrementaldecoder("utf-8-sig" if name == "utf-8" else name)(errors)
    offset, line = 0, 1  # where `data` ends, where `text` begins
    rest, data = "", None
    try:
        with UNPACK.get(Path(path).suffix.lower(), open)(path, "rb") as f:
            while data != b"":
                data = f.read(BLOCK)
                if offset == 0:
                    check_beginning(path, data, name, labelled)
                offset += len(data)
                text = decoder.decode(data, final=not data)
                if labelled and "\0" in text:
                    at = line + text[:text.index("\0")].count("\n")
                    print(f"warning: {path}:{at}: a NUL byte, read as \ufffd", file=sys.stderr)
                    text = text.replace("\0", "\ufffd")
                line += text.count("\n")
                text = rest + text
                end = text.rfind("\n") + 1
                if not end and len(text) >= BLOCK:  # no line end for long: at a space, or anywhere
                    end = text.rfind(" ") + 1 or len(text)
                if not data:
                    end = len(text)
                if end:
                    yield text[:end]
                rest = text[end:]
    except UnicodeDecodeError as error:
        line += error.object[:error.start].count(b"\n")
        at = offset - len(error.object) + error.start  # the object: what was left before, and data
        remedy = encoding_advice(rest.encode(name, "replace") + error.object, name, replaces=not labelled)
        kind = OtherEncoding if offset <= BLOCK else UserError  # nothing was yielded yet
        raise kind(f"{path}:{line}: not {encoding.upper()} (byte 0x{error.object[error.start]:02x} at offset "
                   f"{at}): {remedy}") from None
    except UNREADABLE as error:
        if os.path.isdir(path):
            raise UserError(f"{path}: a folder, where a file is wanted; it has "
                            f"{', '.join(sorted(os.listdir(path))[:5]) or 'none'}") from None
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


UNREADABLE = EOFError, zlib.error, lzma.LZMAError, OSError


def check_beginning(path: str | Path, data: bytes, encoding: str, labelled: bool) -> None:
    if not data:
        raise NotText(f"{path}: the file is empty")
    for kind in [kind for begin, kind in NO_TEXT.items() if data.startswith(begin)]:
        raise NotText(f"{path}: {kind}, not text: unpack it, or save it as .csv, .jsonl or .txt")
    if encoding.startswith(("utf-16", "utf-32")):  # every other byte may be 0
        return
    if data.startswith(UTF_16):
        bits = 32 if data.startswith(codecs.BOM_UTF32_LE) else 16  # it begins as UTF-16 does
        raise OtherEncoding(f"{path}: UTF-{bits}, not {encoding.upper()}: --encoding=utf-{bits}")
    if b"\0" in data and not labelled:
        raise NotText(f"{path}: a binary file (byte 0 at offset {data.index(0)}), not text")


def lines(text: Iterable[str], newline: str) -> Iterator[str]:
    """Whole lines with their ends. newline: "\\n" ends one, or, if empty, \\r and \\r\\n too."""
    rest = ""
    for block in text:
        rest += block
        if rest.endswith("\n"):
            yield from io.StringIO(rest, newline)
            rest = ""
    yield from io.StringIO(rest, newline)


# -----------------------------------------------------------------------------
# Text to records

RECORDS = (".csv", ".tsv", ".jsonl", ".json")


def records(path: str | Path, text: Iterable[str], names: Collection[str] | bool, empty: bool = True,
            bad: Callable[[UserError], None] | None = None) -> Iterator[tuple[int, dict]]:
    """(line, {column: cell}) of each row of a table, or (line, object) of JSON; of a list, its number.

    text: the file's, in blocks. names: True if a table's first row is its header, False if it has none, or
    names: it is one if it has one of these, in lower case. Without a header columns are called "0", "1" and
    so on. A cell that is missing is None. empty: keep rows of empty cells. Only a list in JSON is
    held in memory. A row that cannot be read raises UserError, with file and line; bad: it is called with the
    error, and the row passed over.
    """
    kind = kind_of(path)
    if "json" not in kind:
        yield from table(path, text, kind, names, empty, bad)
        return
    for line, value in json_values(path, text, kind, bad):
        if isinstance(value, list) and len(value) > 1:
            if isinstance(value[0], str) and isinstance(value[1], dict):  # spaCy's
                value = {"text": value[0], **value[1]}
            else:
                value = {str(i): cell for i, cell in enumerate(value)}
        elif isinstance(value, str):
            value = {"text": value}
        if isinstance(value, dict):
            yield line, value
        else:
            refuse(f"{path}:{line}: wanted an object with a text, got {str(value)[:40]!r}", bad)


def refuse(message: str, bad: Callable[[UserError], None] | None) -> None:
    """Raise the error, or hand it to whom it may concern."""
    error = UserError(message)
    if bad is None:
        raise error
    bad(error)


class Lines:
    """Lines that can be given back: those of a row that turned out to be none."""

    def __init__(self, found: Iterable[str]):
        self.rest, self.back, self.taken, self.line = iter(found), deque(), [], 1  # line: of the row's first

    def __iter__(self):
        return self

    def __next__(self) -> str:
        line = self.back.popleft() if self.back else next(self.rest)
        self.taken.append(line)
        return line

    def next_row(self, behind: int = 0) -> None:
        """It begins behind the lines that were taken, or behind so many of them."""
        if behind:
            self.back.extendleft(reversed(self.taken[behind:]))
        self.line += behind or len(self.taken)
        self.taken = []


def table(path: str | Path, text: Iterable[str], kind: str, names: Collection[str] | bool, empty: bool,
          bad: Callable[[UserError], None] | None) -> Iterator[tuple[int, dict]]:
    """CSV, or TSV, where quotes are plain characters unless a column is quoted throughout, as R and pandas
    may write it. What ends a cell, and whether \\" is a quote in one, is seen from the first lines."""
    text = lines(text, "")
    first = list(itertools.islice(text, FIRST))
    dialect = {"delimiter": delimiter_of(first, kind), "strict": True}
    if dialect["delimiter"] == "\t" and not is_quoted(first):
        dialect["quoting"] = csv.QUOTE_NONE
    elif ESCAPED.search("".join(first)):
        dialect.update(escapechar="\\", doublequote=False)
    header, source = None, Lines(itertools.chain(first, text))
    if first and SEP.fullmatch(first[0]):
        next(source)
    for line, cells in cells_of(path, source, dialect, bad):
        if header is None:
            named = names if isinstance(names, bool) else any(one.strip().lower() in names for one in cells)
            header = column_names(cells) if named else [str(i) for i in range(len(cells))]
            if named:
                continue
        if not (any(cells) or empty):
            continue
        if any(cells[len(header):]):
            refuse(f"{path}:{line}: {len(cells)} cells, but the columns are {listed(header)}: a text with "
                   f"{dialect['delimiter']!r} in it wants quotes around it, or --skip_bad_rows=True", bad)
            continue
        if any(cell.startswith("'") for cell in cells):
            cells = [cell[1:] if cell.startswith("'") and is_formula(cell) else cell for cell in cells]
        pairs = zip(header, cells) if len(cells) >= len(header) else itertools.zip_longest(header, cells)
        yield line, dict(pairs)


FORMULA = re.compile(r"'*[=+\-@\t]")


def is_formula(cell: str) -> bool:
    """Would a spreadsheet run it, or has it been kept from that by an apostrophe? Numbers are none."""
    if not FORMULA.match(cell):
        return False
    try:
        return not math.isfinite(float(cell))
    except ValueError:
        return True


FIRST = 50  # lines that tell what ends a cell
csv.field_size_limit(2**31 - 1)
SEP = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # Excel's first line


def delimiter_of(first: list[str], kind: str) -> str:
    """What ends a cell. A .csv has commas unless another character divides all its first lines alike."""
    said = SEP.fullmatch(first[0]) if first else None
    if said:
        return said[1]
    if kind == ".tsv" or (kind != ".csv" and first and "\t" in first[0]):
        return "\t"
    for delimiter in ",;\t|":
        rows = list(csv.reader(first, delimiter=delimiter))
        if len(first) == FIRST:
            del rows[-1]  # it may be half a row
        widths = {len(cells) for cells in rows if cells}
        if len(widths) == 1 and widths.pop() > 1:
            return delimiter
    return ","


def is_quoted(first: list[str]) -> bool:
    """Has a column of tabs' table quotes around every cell below its header?"""
    rows = [line.rstrip("\r\n").split("\t") for line in first[1:] if line.strip()]
    in_quotes = [all(QUOTED.fullmatch(cell) for cell in column) for column in zip(*rows)]
    return len(rows) > 1 and any(in_quotes)


QUOTED = re.compile(r'"(\\"|""|[^"])*"')
ESCAPED = re.compile(r'\\"[^\t,;|"\r\n]')


def column_names(cells: list[str]) -> list[str]:
    """A header's. One that is there twice gets its number, as does one without a name."""
    found, seen = [], set()
    for i, cell in enumerate(cells):
        name = cell.strip() or f"column {i}"
        found.append(f"{name}.{i}" if name in seen else name)
        seen.add(found[-1])
    return found


def listed(names: Sequence[str]) -> str:
    """The first, where there are many, and their beginnings: for one line."""
    first = [name if len(name) <= 60 else f"{name[:60]}..." for name in names[:40]]
    return ", ".join(first) + (f" and {len(names) - 40:,} more" if len(names) > 40 else "")


def cells_of(path: str | Path, source: Lines, dialect: dict,
             bad: Callable[[UserError], None] | None) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row. One with a quote that is not closed, or too late, is a bad one."""
    reader, width = csv.reader(source, **dialect), None
    source.next_row()
    while True:
        try:
            cells = next(reader)
            width = width or len(cells)
            fault = len(source.taken) > 6 and swallowed(source.taken, dialect["delimiter"], width)
        except StopIteration:
            return
        except csv.Error as error:
            fault = str(error)
        if fault:
            refuse(f"{path}:{source.line}: not a row of cells with {dialect['delimiter']!r} between them "
                   f"({fault}): a quotation mark within quotes is written twice; or "
                   "--skip_bad_rows=True", bad)
            source.next_row(behind=1)
            reader = csv.reader(source, **dialect)
            continue
        if cells:
            yield source.line, cells
        source.next_row()


def swallowed(taken: list[str], delimiter: str, width: int) -> str:
    """Why these lines are no row: those between its first and its last are rows themselves."""
    within = [len(cells) for cells in csv.reader(taken[1:-1], delimiter=delimiter) if cells]
    if width > 1 and len(within) >= 5 and set(within) == {width}:
        return f"a quote that opens here closes {len(taken) - 1} lines below, with {len(within)} rows between"
    return ""


def json_values(path: str | Path, text: Iterable[str], kind: str,
                bad: Callable[[UserError], None] | None) -> Iterator[tuple[int, Any]]:
    """(line, value) of JSON lines, which a .json may hold too; else of its list: (number, value)."""
    text = lines(text, "\n")
    first = list(itertools.islice(text, 3))  # an object on one line, and an empty one, is no JSON lines
    filled = [line for line in first if line.strip()]
    start = filled[0].lstrip() if filled else ""
    text = itertools.chain(first, text)
    if start.startswith("[") or (kind == ".json" and not (len(filled) > 1 and is_object(start))):
        for _, found in parse_json(path, [(1, "".join(text))]):
            yield from enumerate(rows_in(path, found), 1)
    else:
        yield from parse_json(path, enumerate(text, 1), bad)


def rows_in(path: str | Path, found: Any) -> list:
    """Of JSON's one value: a list, which may stand in an object; or an object of columns, or of rows."""
    if isinstance(found, list):
        return found
    if not isinstance(found, dict):
        raise UserError(f"{path}: wanted a list of objects with texts, got {str(found)[:40]!r}")
    lists = [value for value in found.values() if isinstance(value, list)]
    tables = [value for value in lists if all(isinstance(row, dict) for row in value)]
    letters = sum(len(value) for value in found.values() if isinstance(value, str))
    if len(tables) == 1 and letters < 100 * len(tables[0]):  # {"version": ..., "data": [...]}, and no article
        return tables[0]
    dicts = [list(value.values()) for value in found.values() if isinstance(value, dict)]
    columns = lists or dicts  # pandas numbers the cells
    if len(columns) == len(found) and not tables and len(set(map(len, columns))) == 1:
        by_row = not lists and all(map(str.isdigit, found))
        return list(found.values()) if by_row else [dict(zip(found, row)) for row in zip(*columns)]
    if len(lists) == len(found) > 1:
        raise UserError(f"{path}: several lists, {', '.join(found)}: save each as a file of its own")
    return [found]


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def parse_json(path: str | Path, texts: Iterable[tuple[int, str]],
               bad: Callable[[UserError], None] | None = None) -> Iterator[tuple[int, Any]]:
    """(line, value) of each (line, text) that is not empty.

    JSON can spell half a character (a lone surrogate), which no file can hold: a question mark instead.
    """
    warned = False
    for line, text in texts:
        text = text.strip()
        if not text:
            continue
        try:
            value = json.loads(text)
            if "\\ud" in text or "\\uD" in text:
                again = json.dumps(value, ensure_ascii=False)
                whole = again.encode("utf-8", "replace").decode("utf-8")
                if whole != again and not warned:
                    print(f"warning: {path}:{line}: half a character (\\ud83d alone, or the like) is read "
                          "as ?", file=sys.stderr)
                    warned = True
                value = json.loads(whole)
        except (ValueError, RecursionError) as error:
            line += getattr(error, "lineno", 1) - 1
            refuse(f"{path}:{line}: not JSON ({getattr(error, 'msg', error)})", bad)
            continue
        yield line, value


# -----------------------------------------------------------------------------
# Documents

def documents(source: str, encoding: str = "", errors: str = "strict", text_key: str = "text",
              split_on: str | None = "", skip_bad_rows: bool = False, found: dict | None = None,
              downloads: str | Path = "data/downloads") -> Iterator[tuple[str, str]]:
    """(name, text) of each document. An empty name goes on with the document before: a large file in blocks.

    encoding: "": UTF-8, or UTF-16 or GBK, as each file is. split_on: what is between the documents of a text
    file; "": lines of <|endoftext|>. found: counts what is passed over, as in note(). Raises UserError, with
    a name, for what cannot be read.
    """
    found = {} if found is None else found
    read = functools.partial(file_documents, encoding=encoding, errors=errors, text_key=text_key,
                             split_on=split_on, skip_bad_rows=skip_bad_rows, found=found)
    for part in source_parts(source):
        if part.startswith(("https://", "http://")):
            part = download(part, Path(downloads))
        if part == PYTHON:
            yield from standard_library()
        elif part.startswith("hf:"):
            yield from hub_documents(part, text_key, found)
        else:
            yield from local_documents(part, read, found)


PYTHON = "builtin:python"  # the library of the Python that runs this


def source_parts(source: str) -> list[str]:
    """The sources that commas divide, without the names of built-ins. Raises SettingError."""
    parts = [source] if os.path.exists(source) and source not in BUILT_IN else source.split(",")
    found = []
    for part in map(str.strip, parts):
        name = part.removeprefix("builtin:")
        if not part:
            raise SettingError(f"--source={source}: nothing before or behind a comma")
        if name in BUILT_IN:
            if name == part and os.path.exists(part):
                raise SettingError(f"--source={source}: {part} is a built-in, and is here too: say "
                                   f"builtin:{part} or .{os.sep}{part}")
            part = BUILT_IN[name][0]
        found.append(part)
    return found


def local_files(part: str, found: dict | None = None) -> list[Path]:
    """The plain files of a source here: of a folder all below, as in walk(). None of one elsewhere."""
    if part.startswith("hf:") and os.path.isdir(hub_name(part)[0]):
        part = hub_name(part)[0]
    if os.path.isdir(part):
        return list(walk(Path(part), {} if found is None else found))
    names = [part] if os.path.exists(part) else sorted(glob.glob(part, recursive=True))
    return [Path(name) for name in names if os.path.isfile(name)]


def walk(root: Path, found: dict) -> Iterator[Path]:
    """The plain files below a folder, in order. What is passed over is counted: hidden files and folders,
    links to folders (which may go in circles), pipes and the like, and data sets of prepare.py."""
    def unreadable(error: OSError) -> None:
        note(found, "unreadable", f"{error.filename}: {error.strerror}")

    for where, folders, names in os.walk(root, onerror=unreadable):
        if "meta.json" in names and "train.bin" in names:
            note(found, "data_sets", where)
            folders.clear()
            continue
        for name in folders + sorted(names):
            path = os.path.join(where, name)
            if name.startswith("."):
                note(found, "hidden", path)
            elif name in folders:
                if os.path.islink(path):
                    note(found, "links", path)
            elif os.path.isfile(path):
                yield Path(path)
            else:  # a link to nothing, or to itself
                note(found, "special" if os.path.exists(path) else "links", path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def local_documents(part: str, read: Callable, found: dict) -> Iterator[tuple[str, str]]:
    """Of a file or folder. Empty and binary files of a folder are passed over: it may hold pictures."""
    files, in_folder, used = local_files(part, found), os.path.isdir(part), 0
    if not files and not in_folder:
        what = "no plain file: save it as one" if os.path.exists(part) else "no such file or folder"
        raise UserError(f"{part}: {what}")
    for file in files:
        title = file.relative_to(part).as_posix() if in_folder else str(file)
        try:
            yield from read(file, title, named=not in_folder)
            used += 1
        except NotText as error:
            if not in_folder:
                raise
            note(found, error.why, str(error))
    if not used:
        raise UserError(f"{part}: no text in this folder ({', '.join(found) or 'nothing in it'})")


def note(found: dict, what: str, example: str, times: int = 0, documents: int = 1) -> None:
    """found[what] counts documents and times, and keeps the first example."""
    entry = found.setdefault(what, {"documents": 0, "times": 0, "example": example[:200]})
    entry["documents"] += documents
    entry["times"] += times


def file_documents(file: Path, title: str, encoding: str, errors: str, text_key: str, split_on: str | None,
                   skip_bad_rows: bool, found: dict, named: bool = False) -> Iterator[tuple[str, str]]:
    """Each record, of .csv, .tsv, .jsonl and of a .json that has texts; else the file, or its parts.

    named: a .json without such texts is refused. In a folder it is a text itself, as code is.
    """
    kind, text = kind_of(file), blocks(file, encoding or encoding_of(file, found), errors)
    if kind not in (".csv", ".tsv", ".jsonl"):
        first = next(text, "")
        if kind == ".json" and first.lstrip().startswith("["):
            first += "".join(text)
        if HTML.match(first):
            note(found, "with_tags", str(file))
        text, texts = itertools.chain([first], text), has_texts(first, text_key)
        texts |= named and text_key == "text" and re.match(r'\s*\[\s*"', first) is not None
        if kind == ".json" and not texts:
            if named and text_key:
                raise UserError(f"{file}: no objects with a text under {text_key!r}: it begins "
                                f"{first[:60]!r}: give --text_key=NAME, or --text_key= for plain text")
            kind = ""
            note(found, "json_as_text", str(file))
        elif kind != ".json" and texts:
            note(found, "records_as_text", str(file))
    if kind not in RECORDS or not text_key:
        yield from parts_of(text, title, split_on, found, named)
        return

    def bad(error: UserError) -> None:
        note(found, "bad_rows", str(error))

    names = () if text_key.isdigit() else (text_key.lower(),)
    for line, record in records(file, text, names, bad=bad if skip_bad_rows else None):
        if text_key.isdigit() and "no_header" not in found:
            note(found, "no_header", f"{file}: {record.get(text_key)!r}", documents=0)
        in_table = names and "json" not in kind
        if in_table and all((cell or "").strip() == name for name, cell in record.items()):
            note(found, "headers_again", f"{file}:{line}")  # where files were joined
            continue
        try:
            yield f"{title}:{line}", text_of(record, text_key, f"{file}:{line}", "json" in kind)
        except UserError as error:
            passes = ", or --skip_bad_rows=True, which passes over such rows" if text_key in record else ""
            refuse(f"{error}{passes}", bad if skip_bad_rows else None)


def has_texts(begin: str, text_key: str) -> bool:
    """Does this JSON begin with an object that has one, alone, on a line of its own or in a list?"""
    # the list may be in an object, behind words and numbers: {"version": "1", "data": [{
    within = r'\s*{\s*(?:"[^"]*"\s*:\s*(?:"[^"]*"|[\w.-]+)\s*,\s*)*"[^"]*"\s*:\s*\[\s*(?={)'
    for pattern in (r"\s*(?:\[\s*)?(?={)", within):
        start = re.match(pattern, begin)
        try:
            first, _ = json.JSONDecoder().raw_decode(begin, start.end() if start else 0)
        except (ValueError, RecursionError):
            continue
        if isinstance(first, dict) and {text_key, text_key.partition(".")[0]} & first.keys():
            return True
    return False


HTML = re.compile(r"\s*<(!doctype html|html)\b", re.IGNORECASE)
EOT_LINES = re.compile(r"(?:\A|(?<=\n))[ \t]*<\|endoftext\|>[ \t]*(?:\r?\n|\Z)")


def separator(split_on: str) -> re.Pattern:
    """With the white space around it, but for the indent of the line behind: code wants it. A match of the
    group `none` is white space without one, which is not to be searched again from each of its places."""
    between = split_on
    for escape, character in ((r"\n", "\n"), (r"\r", "\r"), (r"\t", "\t"), (r"\f", "\f")):
        between = between.replace(escape, character)
    breaks = between.count("\n")
    if breaks > 1 and not between.strip():  # so many line ends, or more
        return re.compile(rf"\r?\n(?:[ \t]*\r?\n){{{breaks - 1},}}")
    itself = re.escape(between).replace("\\\n", r"\r?\n")
    behind = r"(?:[ \t]*\r?\n)*" if between.endswith("\n") else r"(?:(?:[ \t]*\r?\n)+|[ \t]*)"
    return re.compile(rf"\s*{itself}{behind}|(?P<none>\s+)")


def parts_of(text: Iterable[str], title: str, split_on: str | None, found: dict,
             named: bool) -> Iterator[tuple[str, str]]:
    """The documents of a text file. What may divide it, and was not asked for, is counted."""
    reach, pattern = 64, EOT_LINES
    if split_on:
        reach += 2 * len(split_on)
        pattern = separator(split_on)
    rest, name, n, blank_lines, within = "", title, 1, 0, 0
    last = "\n"  # character before `rest`
    for block, is_last in with_last(text):
        block, at = rest + block, 0
        end = len(block) if is_last else max(len(block.rstrip()) - reach, 0)  # what divides may go on there
        if not is_last and not end and len(block) > 4 * BLOCK:
            end = len(block)
        divided = split_on or (split_on is not None and "<|endoftext|>" in block)  # seen at once
        for place in pattern.finditer(block) if divided else ():
            if place.start() >= end:
                break
            within_line = place.start() == 0 and pattern is EOT_LINES and last != "\n"
            if within_line or place.lastgroup == "none":
                continue
            if place.start() > at:
                yield name, block[at:place.start()]
                name = ""
            if not name:
                n += 1
                name = f"{title}#{n}"
            at = place.end()
        end = max(at, end)
        if end > at:
            piece = block[at:end]
            blank_lines += piece.count("\n\n") + piece.count("\n\r\n")
            within += piece.count("<|endoftext|>")
            yield name, piece
            name = ""
        last = block[end - 1:end] or last
        rest = block[end:]
    if n > 1:
        note(found, "divided", title, documents=n - bool(name))
    elif split_on:
        note(found, "undivided", title)
    if named and n == 1 and blank_lines > 20 and split_on is not None:
        note(found, "blank_lines", title, documents=blank_lines)
    if within and split_on is not None:
        note(found, "ends_within", title, documents=within)


def with_last(blocks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each, and whether it is the last."""
    for block, behind in itertools.pairwise(itertools.chain(blocks, [None])):
        yield block, behind is None


def text_of(record: dict, key: str, where: str, may_be_null: bool) -> str:
    text = record.get(key)
    if text is None and may_be_null and key in record:
        return ""
    if text is None and "." in key:  # within a record of the record
        name, _, rest = key.partition(".")
        if isinstance(record.get(name), dict):
            return text_of(record[name], rest, where, may_be_null)
    if not isinstance(text, str):
        what = "no text" if text is None else f"a {type(text).__name__}, no text,"
        begin = ", ".join(f"{name}: {str(value)[:20]!r}" for name, value in record.items())
        remedy = "--text_key=NAME, or the column's number, from 0, if a table has no header"
        if may_be_null:  # a JSON record, where all is named
            remedy = "--text_key=NAME, or NAME.NAME within a record"
        raise UserError(f"{where}: {what} under {key!r}; it has {begin[:400]}: give {remedy}")
    return text


def standard_library() -> Iterator[tuple[str, str]]:
    """The Python that runs this, less tests, copies and what pip installed: a corpus without a download."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = [file.relative_to(root) for file in root.rglob("*.py")]
    names = [name for name in names if skip.isdisjoint(name.parts)]
    if not names:
        raise UserError(f"{root}: this Python carries no source of its library: give --source=FILE or FOLDER")
    seen = {""}  # an empty one counts for nothing
    for name in sorted(names, key=Path.as_posix):
        with contextlib.suppress(UnicodeDecodeError, OSError):
            text = (root / name).read_text(encoding="utf-8")
            if text not in seen:
                seen.add(text)
                yield name.as_posix(), text


def hub_name(source: str) -> tuple[str, str | None]:
    """hf:NAME#CONFIG -> NAME and CONFIG."""
    name, _, subset = source.removeprefix("hf:").partition("#")
    return name, subset or None


def hub_documents(source: str, text_key: str, found: dict) -> Iterator[tuple[str, str]]:
    """The train split of hf:NAME or hf:NAME#CONFIG, on the hub or a local folder (of parquet, say)."""
    name, subset = hub_name(source)
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: needs a package: pip install datasets") from None
    try:
        splits = datasets.load_dataset(name, subset, streaming=True)
        if "train" not in splits:
            raise UserError(f"{source}: has no split train, but {', '.join(splits)}: save the one that you "
                            "want as .jsonl")
        for split in splits:
            if split != "train":
                note(found, "other_splits", f"{name}: {split}")
        for n, row in enumerate(splits["train"]):
            yield f"{name}:{n}", text_of(row, text_key, f"{source}: row {n}", may_be_null=True)
    except UserError:
        raise
    except Exception as error:  # of many kinds: no such data set, no network, a damaged file
        raise UserError(f"{source}: cannot be read: {type(error).__name__}: {str(error)[:300]!r}") from None


def download(url: str, folder: Path) -> str:
    """Fetch once into `folder`; url may end in #sha256=... Raises UserError: no network, another file."""
    url, _, fragment = url.partition("#")
    wanted = fragment.removeprefix("sha256=").lower() or SHA256.get(url)
    suffix = "".join(Path(urllib.parse.urlparse(url).path).suffixes[-2:]) or ".txt"
    target = folder / (hashlib.sha256(url.encode()).hexdigest()[:16] + suffix)
    part, sha = target.with_name(f"{target.name}.part"), hashlib.sha256()
    with locked(target):
        if target.is_file():
            return str(target)
        print(f"downloading {url}")
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
            raise UserError(f"{url}: cannot be downloaded ({error}): fetch it, then "
                            "python prepare.py --source=FILE --dataset=NAME") from None
        finally:
            part.unlink(missing_ok=True)
    return str(target)


# -----------------------------------------------------------------------------
# One process at a time

@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else makes `path` meanwhile: another process that does is waited for.

    The system takes the lock from a process that dies. If there can be no lock, that is said, and we go on.
    """
    lock, file = path.with_name(f".{path.name}.lock"), None
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = wait_for(lock)
    except OSError as error:
        print(f"{lock}: no lock here ({error.strerror}): let no other process make {path.name} meanwhile")
    try:
        yield
    finally:
        if file and os.name == "nt":  # a file that is open is not removed there
            file.close()
        if file:
            with contextlib.suppress(OSError):
                lock.unlink()
            file.close()


def wait_for(lock: Path):
    """The lock file, open and ours."""
    said = False
    while True:
        file = open(lock, "ab")
        try:
            try_lock(file)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                return file
        except (BlockingIOError, PermissionError):  # POSIX, Windows: another process has it
            if not said:
                print(f"{lock}: another process is at work here: waiting for it", flush=True)
            said = True
            time.sleep(0.1)
        except FileNotFoundError:  # the one before has just finished and taken its lock file away
            pass
        file.close()


def try_lock(file) -> None:
    """Raises OSError if another process has it."""
    try:
        import fcntl
    except ImportError:
        import msvcrt
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
