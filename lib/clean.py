"""
What is done to a text before it is learned from: rules, personal data, copies.

Nothing here knows of tokens: it serves for any text.
"""
from __future__ import annotations

import hashlib
import itertools
import re
import struct
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lib.text import note

MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9  # odd numbers whose multiples mix the bits of a hash
K, NONE = 64, 2**32 - 1  # values in the sketch of a document; fills it up if it has fewer


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


def clean(text: str, rules: list[str], title: str, found: dict) -> tuple[str, dict[str, int]]:
    """The text by these rules, and how often each was applied. found: keeps the first place as an example."""
    touched = {}
    for rule in rules:
        before, times = text, 0
        if rule == "nfc":
            text = text if text.isascii() else unicodedata.normalize("NFC", text)
            times = int(text != before)
        else:
            for pattern, replacement in RULES[rule]:
                text, n = pattern.subn(replacement, text)
                times += n
        if times:
            touched[rule] = times
            if rule not in found:
                at = next((i for i, (a, b) in enumerate(zip(before, text)) if a != b), 0)
                if "scrub_pii" in rules:  # meta.json is no place for what is to be scrubbed
                    before = text if rule == "scrub_pii" else ""
                note(found, rule, f"{title}: {before[max(at - 30, 0):at + 30]!r}", documents=0)
    return text, touched


# -----------------------------------------------------------------------------
# The spool and its index

# Of each document: where it is (in bytes), its characters, and a hash of it that stands for it; and its
# sketch, if near copies are looked for.
INDEX = [("start", "<i8"), ("size", "<i8"), ("chars", "<i8"), ("hash", ">u8")]


def collect(docs: Iterator[tuple[str, str]], spool: Path, rules: list[str], min_chars: int, min_text: float,
            sketches: bool, found: dict) -> np.ndarray:
    """The first pass: clean the documents, write them one behind the other, and return the index.

    found: counts, as in note().
    """
    tick, rows, n_read = Progress("reading"), bytearray(), 0

    def which(block):  # document it belongs to
        nonlocal n_read
        n_read += block[0] != ""
        return n_read

    with open(spool, "wb") as f:
        for _, parts in itertools.groupby(docs, which):
            start, chars, plain, times = f.tell(), 0, 0, Counter()
            sha, low = hashlib.sha256(), np.zeros(0, "<u4")
            title = head = ""
            for name, text in parts:
                title = title or name
                text, touched = clean(text, rules, title, found)
                times.update(touched)
                head = head or text[:60]
                data = text.encode("utf-8", "replace")
                f.write(data)
                sha.update(data)
                chars += len(text)
                if min_text:
                    plain += len(text) - len(re.findall(r"[^\w\s]", text))
                if sketches:
                    low = sketch(text, low)
                tick(len(data))
            note(found, "read", title)
            for rule, n in times.items():
                note(found, rule, "", n)
            if chars < min_chars:  # it stays in the spool, but not in the index
                note(found, "too_short", f"{title}: {head!r}")
            elif plain < min_text * chars:
                note(found, "mostly_not_text", f"{title}: {head!r}")
            else:
                rows += struct.pack("<qqq", start, f.tell() - start, chars) + sha.digest()[:8]
                if sketches:
                    rows += np.append(low, np.full(K - len(low), NONE, "<u4")).tobytes()
    return np.frombuffer(rows, INDEX + [("sketch", "<u4", (K,))] * sketches)


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
    parts = 1 + n * K // 2**24  # of the bands, by their hash, one after the other: some 400 MB at a time
    for part in range(parts):
        pairs = candidates(sketches, band, part, parts)
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
