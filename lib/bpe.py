"""
Byte pair encoding: the tokens of a new tokenizer, learned from texts.
"""
import heapq
import re
import zlib
from collections import Counter
from collections.abc import Iterable

import numpy as np

BYTES = [bytes([i]) for i in range(256)]  # the first tokens of ours

# What a token may span at most: a word (letters and their marks) with the space or sign before it, up to
# three digits, a run of signs with the space before it, white space but for its last character, which goes
# with the word behind it. So an indented line of code is: line break and indent, word, word.
PIECES = r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
# The same for ASCII alone, at which Python's re is twice as fast as regex.
ASCII_PIECES = PIECES.replace(r"\p{L}", "a-zA-Z").replace(r"\p{M}", "").replace(r"\p{N}", r"\d")


def train_bpe(texts: Iterable[str], n_tokens: int) -> list[bytes]:
    """Byte pair encoding (Sennrich et al. 2016): the bytes of n_tokens tokens, in the order of their making.

    From the 256 bytes on, the most frequent pair of neighbours is merged into a new token, until there are
    n_tokens or no pair comes twice. Ties go to the pair whose tokens are older: the result depends on the
    text alone.
    """
    pairs = Pairs(count_pieces(texts), max(n_tokens, 256))
    tokens = list(BYTES)
    while len(tokens) < n_tokens:
        pair = pairs.most_frequent()
        if pair is None:
            break
        pairs.merge(*pair, new=len(tokens))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return tokens


CLAUSES = 2**21  # characters of distinct clauses that a tokenizer is trained on, about
LOOK = 2**17  # new pieces after which to look how many there are


def count_pieces(texts: Iterable[str]) -> Counter:
    """How often each piece of text comes.

    Chinese, Japanese, Thai write no spaces, so that a clause is one piece and seldom comes twice: tens of
    bytes of memory for each byte of text. Once there are many, one in 2, 4, 8... is taken, by its checksum,
    and counts as so many.
    """
    import regex  # comes with tiktoken; Python's own re has no \p{L}
    find_any, find_ascii = regex.compile(PIECES).findall, re.compile(ASCII_PIECES, re.ASCII).findall
    pieces, share, look = Counter(), 1, LOOK

    def taken(piece: str) -> bool:
        return not is_clause(piece) or zlib.crc32(piece.encode("utf-8", "replace")) % share == 0

    for text in texts:
        find = find_ascii if text.isascii() else find_any
        pieces.update(find(text) if share == 1 else filter(taken, find(text)))
        while len(pieces) > look:
            if sum(len(piece) for piece in pieces if is_clause(piece)) <= CLAUSES:
                look = len(pieces) + LOOK
            else:
                share *= 2
                pieces = Counter({piece: n for piece, n in pieces.items() if taken(piece)})
    if share > 1:
        print(f"of clauses without spaces, as in Chinese, one in {share} trains the tokenizer, and counts "
              f"{share} times")
        for piece in filter(is_clause, pieces):
            pieces[piece] *= share
    cut_long(pieces)
    return pieces


LONGEST = 2**12  # characters of a piece that is learned from whole


def cut_long(pieces: Counter) -> None:
    """Cut what has no end (letters without a space), and of a lot of it keep the first."""
    room = CLAUSES
    for piece in [piece for piece in pieces if len(piece) > LONGEST]:
        times = pieces.pop(piece)
        for i in range(0, min(len(piece), room), LONGEST):
            pieces[piece[i:i + LONGEST]] += times
        room -= min(len(piece), room)
    if not room:
        print(f"of words of over {LONGEST:,} characters, the tokenizer learns from the first {CLAUSES:,}")


def is_clause(piece: str) -> bool:
    """Is it of several letters of a script without spaces? Thai is the first of them in Unicode."""
    return len(piece) > 3 and piece[-1] >= "\u0e00"


class Pairs:
    """The pairs of neighbouring tokens in a text, how often they come, and where.

    Each distinct piece of text is kept once, with its count. All lie in one long array, linked to their
    neighbours, and each pair knows its places, so that a merge touches these only, and all of them at once in
    numpy.
    """

    def __init__(self, pieces: Counter, n_tokens: int):
        words = [word.encode("utf-8", "replace") for word in pieces]
        lengths = np.array([len(word) for word in words], dtype=np.int64)
        n = int(lengths.sum())
        size = np.int32 if n < 2**31 else np.int64
        self.token = np.frombuffer(b"".join(words), dtype=np.uint8).astype(np.int32)  # at each place
        self.weight = np.repeat(np.array(list(pieces.values())), lengths)  # how often its piece comes
        self.after = np.arange(1, n + 1, dtype=size)  # the place of the next token in the piece; -1: none
        self.before = np.arange(-1, n - 1, dtype=size)
        ends = lengths.cumsum()
        self.after[ends - 1] = self.before[ends - lengths] = -1
        self.n_tokens = n_tokens  # a pair is one number, left * n_tokens + right
        self.count, self.places, self.heap = {}, {}, []
        self.add(np.flatnonzero(self.after >= 0))

    def at(self, places: np.ndarray) -> np.ndarray:
        """The pairs that begin at these places."""
        return self.token[places].astype(np.int64) * self.n_tokens + self.token[self.after[places]]

    def add(self, places: np.ndarray) -> None:
        """Count the pairs that begin at these places, new ones all."""
        if not len(places):
            return
        pairs = self.at(places)
        order = np.argsort(pairs, kind="stable")
        places, pairs = places[order].astype(self.after.dtype), pairs[order]
        starts = np.flatnonzero(np.diff(pairs, prepend=-1))
        totals = np.add.reduceat(self.weight[places], starts).tolist()
        for pair, total, where in zip(pairs[starts].tolist(), totals, np.split(places, starts[1:])):
            self.count[pair], self.places[pair] = total, where
            heapq.heappush(self.heap, (-total, pair))

    def most_frequent(self) -> tuple[int, int] | None:
        """The pair to merge next, taken out of the heap; None if none comes twice."""
        while self.heap:
            negative, pair = heapq.heappop(self.heap)
            if -negative == self.count[pair]:
                return divmod(pair, self.n_tokens) if -negative >= 2 else None
            heapq.heappush(self.heap, (-self.count[pair], pair))  # it has lost places since it was pushed
        return None

    def merge(self, left: int, right: int, new: int) -> None:
        """Make one token, `new`, of each left that a right follows."""
        pair = left * self.n_tokens + right
        at = self.places.pop(pair)
        at = at[(self.token[at] == left) & (self.after[at] >= 0)]  # some have merged with other neighbours
        at = at[self.token[self.after[at]] == right]
        if left == right:  # of aaaa, every other place
            first = np.append(True, self.after[at[:-1]] != at[1:])
            nth = np.arange(len(at)) - np.maximum.accumulate(np.where(first, np.arange(len(at)), 0))
            at = at[nth % 2 == 0]

        # the pairs that end: the one before each place, and the one behind
        second = self.after[at]
        gone = np.concatenate((self.before[at], second[self.after[second] >= 0]))
        gone = np.unique(gone[gone >= 0])  # between two merged neighbours it is the same pair
        pairs, which = np.unique(self.at(gone), return_inverse=True)
        for ended, lost in zip(pairs.tolist(), np.bincount(which, self.weight[gone]).tolist()):
            self.count[ended] -= int(lost)
        self.count[pair] = 0

        # the new token takes the first place, and the second is skipped from now on
        follower = self.after[second]
        self.token[at], self.token[second] = new, -1
        self.after[at] = follower
        self.before[follower[follower >= 0]] = at[follower >= 0]
        begins = np.concatenate((self.before[at], at[follower >= 0]))
        self.add(np.unique(begins[begins >= 0]))
