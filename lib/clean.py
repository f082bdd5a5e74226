"""
What is done to a text before it is learned from: rules, personal data, copies.

Nothing here knows of tokens: it serves for any text.
"""
from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import struct
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from lib.personal import REACH_OF_KEY, Scrub
from lib.text import BLOCK, note, with_last

MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9  # odd numbers whose multiples mix the bits of a hash
K, NONE = 64, 2**32 - 1  # values in the sketch of a document; fills it up if it has fewer


# -----------------------------------------------------------------------------
# Clean: a rule is a function (text, stop) -> (the text up to `stop` as it should be, the rest, places
# changed). A place that begins before `stop` is changed whole. A document may come in blocks, and what may go
# on in the next block is held back: as many characters as one place may have.

REACH = {"html": 2**20, "scrub_pii": REACH_OF_KEY}  # longer ones are left as they are; 0 of other rules


def cleaned(blocks: Iterable[str], rules: dict[str, Callable], title: str, found: dict,
            times: Counter) -> Iterator[str]:
    """A document's text by these rules. times: counts the places. found: gets the first as an example."""
    for name in rules:
        blocks = by_rule(blocks, name, rules, title, found, times)
    return blocks


def by_rule(blocks: Iterable[str], name: str, rules: dict[str, Callable], title: str, found: dict,
            times: Counter) -> Iterator[str]:
    rest = ""
    for block, is_last in with_last(blocks):
        text = rest + block
        stop = len(text) if is_last else safe_end(text, len(text) - REACH.get(name, 0))
        done, rest, n = rules[name](text, stop)
        if n:
            times[name] += n
            if name not in found:
                at = len(os.path.commonprefix((text, done)))
                shown = done if name == "scrub_pii" else text
                if "scrub_pii" in rules and name != "scrub_pii":
                    shown = ""  # meta.json is no place for what is yet to be scrubbed
                note(found, name, f"{title}: {shown[max(at - 30, 0):at + 30]!r}", documents=0)
        yield done
    yield rest


def safe_end(text: str, end: int) -> int:
    """Where to cut, at most at `end`: behind a line, else before a space; anywhere, if that is far away."""
    end = max(end, 0)
    found = text.rfind("\n", 0, end) + 1 or max(text.rfind(" ", 0, end), 0)
    return found or (end if end >= BLOCK else 0)


def substitute(pattern: re.Pattern, replacement: str, text: str, stop: int) -> tuple[str, str, int]:
    done, n = pattern.subn(replacement, text[:stop])
    return done, text[stop:], n


def compose(text: str, stop: int) -> tuple[str, str, int]:
    """One way to write an accented letter."""
    before = text[:stop]
    done = before if before.isascii() else unicodedata.normalize("NFC", before)
    return done, text[stop:], int(done != before)


REPEATED = re.compile(r"(?m)^(.+)$(?:\n\1$)+")


def once(text: str, stop: int) -> tuple[str, str, int]:
    """Of a line that comes several times in a row, the first. The last may come again: it is held back."""
    done, n = REPEATED.subn(r"\1", text[:stop])
    if stop < len(text) or text.endswith("\n"):
        last = done.rfind("\n", 0, len(done) - 1) + 1
        if len(done) - last < BLOCK:
            return done[:last], done[last:] + text[stop:], n
    return done, text[stop:], n


# HTML

MARKUP = re.compile(  # what begins something that goes on to its own end, or a tag, or a declaration
    r"<(?:(!--)|(!\[CDATA\[)|(\?)(?=[a-z=])|(script|style)(?![\w-])|/?([a-z][^\s/<>]*)"
    r"[^<>=]*(?:(?:=(?!\s*[\"'])|=\s*(?:\"[^\"]*\"|'[^']*'))[^<>=]*)*>"  # with values in quotes
    r"|[!?][a-z][^<>]*>)", re.IGNORECASE)
ENDS = {"!--": re.compile("-->"), "![cdata[": re.compile("]]>"), "?": re.compile(r"\?>"),
        "script": re.compile(r"</script[^<>]*>", re.IGNORECASE),
        "style": re.compile(r"</style[^<>]*>", re.IGNORECASE)}
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
LINES = frozenset("""
    address article aside blockquote body br caption center dd details dialog div dl dt fieldset figcaption
    figure footer form h1 h2 h3 h4 h5 h6 head header hr html legend li main nav ol option p pre section
    summary table tbody tfoot thead title tr ul""".split())  # tags that begin a line, and end one


def without_tags(text: str, stop: int) -> tuple[str, str, int]:
    """HTML as a browser would show it, more or less: a tab between cells of a table, entities resolved.

    A scanner of our own, linear in the text: the standard library's is not (a missing end is looked for again
    and again). What has no end within REACH is no tag, and stays.
    """
    parts, n, at = [], 0, 0
    next_end = {}  # of comments and so on: the first that is not behind us
    in_row = True  # of a table, behind its first cell; a block may begin there
    place = MARKUP.search(text)
    while place and place.start() < stop:
        start, end = place.span()
        *kinds, name = place.groups("")
        kind = "".join(kinds).lower()
        if kind:
            end = end_of(text, kind, start, next_end)
        if end - start > REACH["html"]:
            place = MARKUP.search(text, start + 1)
            continue
        parts.append(ENTITY.sub(character, text[at:start]))
        if kind == "![cdata[":
            inner = text[start + 9:end - 3]
            parts.append(without_tags(inner, len(inner))[0])
        elif name.lower() in LINES:
            parts.append("\n")
            in_row = False
        elif name.lower() in ("td", "th") and text[start + 1] != "/":
            parts.append("\t" * in_row)
            in_row = True
        at = end
        n += 1
        place = MARKUP.search(text, at)
    stop = max(at, stop)
    parts.append(ENTITY.sub(character, text[at:stop]))
    return "".join(parts), text[stop:], n


def character(entity: re.Match) -> str:
    return unescape(entity[0])


def end_of(text: str, kind: str, start: int, next_end: dict) -> int:
    """Where a comment or the like that begins at `start` ends; far away, if it does not."""
    begin, end = next_end.get(kind, (-1, -1))
    if begin < start + 2:
        place = ENDS[kind].search(text, start + 2)
        begin, end = next_end[kind] = place.span() if place else (2**62, 2**62)
    return end


RULES = {  # in this order
    "nfc": compose,
    "line_ends": functools.partial(substitute, re.compile(r"\r\n?"), "\n"),
    "control_chars": functools.partial(
        substitute, re.compile("[\0-\x08\x0b\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]"), ""),
    "html": without_tags,
    "repeated_lines": once,
    "scrub_pii": Scrub,
}


def make_rules(settings: SimpleNamespace) -> dict[str, Callable]:
    """Those that the settings ask for."""
    rules = {**RULES, "scrub_pii": Scrub(settings.phones)}  # a new one, since it counts
    return {name: rule for name, rule in rules.items() if vars(settings)[name]}


# -----------------------------------------------------------------------------
# The spool and its index

# Of each document: where it is (in bytes), its characters, a hash that stands for it and its copies, one of
# all but its white space, by which these are known; and its sketch, if near copies are looked for.
INDEX = [("start", "<i8"), ("size", "<i8"), ("chars", "<i8"), ("hash", ">u8"), ("ink", "<u8")]


def collect(docs: Iterator[tuple[str, str]], spool: Path, rules: dict[str, Callable], min_chars: int,
            min_text: float, sketches: bool, found: dict) -> np.ndarray:
    """The first pass: clean the documents, write them one behind the other, and return the index.

    rules: of make_rules(). found: counts, as in note().
    """
    import regex  # comes with tiktoken; to Python's own re the vowel signs of Hindi are no letters
    not_text = regex.compile(r"[^\w\s]")
    tick, rows = Progress("reading"), bytearray()
    with open(spool, "wb") as f:
        for title, blocks in by_document(docs):
            start, chars, signs, head, times = f.tell(), 0, 0, "", Counter()
            sha, ink, low = hashlib.sha256(), hashlib.blake2b(digest_size=8), np.zeros(0, "<u4")
            for text in cleaned(blocks, rules, title, found, times):
                head = head or text[:60]
                data = text.encode("utf-8", "replace")
                f.write(data)
                sha.update(data)
                ink.update(data.translate(None, b" \t\n\r\f\v"))
                chars += len(text)
                signs += len(not_text.findall(text)) if min_text else 0
                low = sketch(text, low) if sketches else low
                tick(len(data))
            note(found, "read", title)
            for rule, n in times.items():
                note(found, rule, "", n)
            if chars < min_chars:  # it stays in the spool, but not in the index
                note(found, "too_short", f"{title}: {head!r}")
            elif chars - signs < min_text * chars:
                note(found, "mostly_not_text", f"{title}: {head!r}")
            else:
                rows += struct.pack("<qqq", start, f.tell() - start, chars) + sha.digest()[:8] + ink.digest()
                if sketches:
                    rows += np.append(low, np.full(K - len(low), NONE, "<u4")).tobytes()
    index = np.frombuffer(rows, INDEX + [("sketch", "<u4", (K,))] * sketches)
    _, same = np.unique(index["ink"], return_inverse=True)
    lowest = np.full(len(index), 2**64 - 1, np.uint64)  # the hash of a group: another copy can only lower it,
    np.minimum.at(lowest, same, index["hash"].astype(np.uint64))  # and held out is what is low
    index["hash"] = lowest[same]
    return index


def by_document(docs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, Iterator[str]]]:
    """(title, its text in blocks) of each. An empty title goes on with the document before."""
    number = 0

    def which(block: tuple[str, str]) -> int:
        nonlocal number
        number += block[0] != ""
        return number

    for _, blocks in itertools.groupby(docs, which):
        title, first = next(blocks)
        yield title, itertools.chain([first], (text for _, text in blocks))


# -----------------------------------------------------------------------------
# Near copies

def sketch(text: str, low: np.ndarray) -> np.ndarray:
    """The K smallest hashes of the text's shingles (any 12 bytes in a row), those in `low` among them.

    Two documents' share of common shingles is that among the K smallest of both (Broder 1997), +-0.05 or so.
    Capitals and white space make no difference.
    """
    data = " ".join(text.casefold().split()).encode("utf-8", "replace").ljust(12, b"\0")
    n = len(data) - 11
    first = np.ndarray((n,), "<u8", data, 0, (1,))  # the 8 bytes from each on
    last = np.ndarray((n,), "<u8", data, 4, (1,))
    shingles = first * np.uint64(MIX[0]) + last
    shingles ^= shingles >> np.uint64(29)
    hashes = (shingles * np.uint64(MIX[1]) >> np.uint64(32)).astype("<u4")
    few = np.unique(hashes[hashes < 2**32 * min(4 * K / n, 1)])
    lowest = few if len(few) >= K else np.unique(hashes)  # if much comes again and again
    return np.union1d(low, lowest)[:K] if len(low) else lowest[:K]


def near_groups(sketches: np.ndarray, threshold: float) -> np.ndarray:
    """The first document of each one's group, (N,): what shares `threshold` of its shingles is in one group.

    And what shares so much with a member of the group is too: groups are connected components.
    """
    n = len(sketches)
    group = np.arange(n)
    # To be compared, two have so many neighbours in common among their lowest values: 99.9% of those do that
    # share 0.6, 0.4, 0.2 of their shingles (MinHash by bands, for sketches of the lowest values).
    band = 3 if threshold >= 0.6 else 2 if threshold >= 0.35 else 1
    parts = 1 + n * K // 2**22  # of the bands, by their hash, one after the other: 100 to 500 MB at a time
    for part in range(parts):
        pairs = candidates(sketches, band, part, parts)
        pairs = pairs[group[pairs // n] != group[pairs % n]]  # others are known from a part before
        for i in range(0, len(pairs), 2**13):
            a, b = np.divmod(pairs[i:i + 2**13], n)
            both = np.sort(np.concatenate((sketches[a], sketches[b]), axis=1), axis=1)
            new = np.diff(both, axis=1, prepend=np.uint32(NONE)) != 0
            nth = np.cumsum(new & (both != NONE), axis=1)  # of the union's values
            common = (~new & (both != NONE) & (nth <= K)).sum(axis=1)
            near = common >= threshold * np.minimum(nth[:, -1], K)
            group = joined(group, a[near], b[near])
    return group


def candidates(sketches: np.ndarray, band: int, part: int, parts: int) -> np.ndarray:
    """Pairs of documents to compare, each as a * N + b, (pairs,) int64: those with a band in common."""
    n, width = len(sketches), K - band + 1
    keys, documents = [], []
    for i in range(0, n, 2**14):
        low = sketches[i:i + 2**14].astype(np.uint64)
        key = low[:, :width] * np.uint64(MIX[0])
        for j in range(1, band):
            key = (key ^ low[:, j:j + width]) * np.uint64(MIX[j % 2])
        key = (key >> np.uint64(32)).astype(np.uint32)
        mine = (low[:, :width] != NONE) & (key % np.uint32(parts) == part)
        keys.append(key[mine])
        documents.append(np.nonzero(mine)[0] + i)
    keys, documents = np.concatenate(keys), np.concatenate(documents)
    order = np.argsort(keys, kind="stable")
    keys, documents = keys[order], documents[order]
    # with the first of its band and a few before it, and not all: some passages are in every document
    first = np.maximum.accumulate(np.where(np.diff(keys, prepend=0) != 0, np.arange(len(keys)), 0))
    pairs = [documents[first] * n + documents]
    for back in range(1, 5):
        same = np.flatnonzero(keys[back:] == keys[:-back])
        pairs.append(documents[same] * n + documents[same + back])
    pairs = np.unique(np.concatenate(pairs))
    return pairs[pairs // n != pairs % n]


def joined(group: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The groups if a[i] and b[i] are in one, each named by its first document."""
    while (group[a] != group[b]).any():
        low, high = np.minimum(group[a], group[b]), np.maximum(group[a], group[b])
        np.minimum.at(group, high, low)
        while (group[group] != group).any():
            group = group[group]
    return group


# -----------------------------------------------------------------------------

class Progress:
    """Prints, every few seconds, how far it is: MB, MB a second, and the time left if the end is known."""

    def __init__(self, what: str, total: int = 0):
        self.what, self.total = what, total
        self.done, self.next = 0, 5
        self.start = time.monotonic()

    def __call__(self, n_bytes: int):
        self.done += n_bytes
        seconds = time.monotonic() - self.start
        if seconds > self.next:
            self.next = seconds + 5
            rate = self.done / seconds
            left = f", {max(self.total - self.done, 0) / rate:,.0f} s left" if self.total else ""
            print(f"{self.what}: {self.done / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s{left}", flush=True)
