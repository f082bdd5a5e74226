"""
Text to ids and back: the tokenizers that are trained here, tiktoken's, and those of Hugging Face models.

    tokenizer = make_tokenizer("bpe", texts, vocab_size=4096)
    ids = tokenizer.encode("def main():")
    tokenizer.decode(ids)

One adapter, so that no script branches on the kind. It is stored as plain values (`to_dict`) in meta.json and
in every checkpoint.
"""
import base64
import codecs
import functools
import itertools
import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from config import SettingError, UserError
from lib.bpe import BYTES, PIECES, train_bpe
from lib.hub import OWNERS

EOT, MASK = "<|endoftext|>", "<|mask|>"  # ends a document; stands for a token to be guessed

LONG_GAP, SOME_OF_IT = re.compile(r"\s{50000}"), re.compile(r"\s{49}")

# Between a letter and one of these all patterns cut: a long text gives the same tokens in pieces.
MARKS = " \n,.，。、"
SAFE = re.compile(rf"[^\W\d_](?=[{MARKS}])")

# Texts that have told tokenizers apart: what is made, read or exported must give the ids of its source.
HARD = (
    "", " ", "  ", "a", " a", "a ", "  a  b   c ", "\n", "\n\n\n", "a\nb", "a \n b", "a\r\n\r\nb", "\ta\t\tb",
    "a\u00a0b", "a\u3000b\u2028c", "a\x00b\x7fc", "it's we'll I'D 'S 'Twas don’t", "HTTPServer camelCase A_B",
    "1 12 123 1234 12345 1,234.56", "x1y22z333", "١٢٣٤ ½²", "...!!??--- ( a ) [b]", "a.b,c;d",
    "/usr/bin\n//x\r\n", "# def f(x):\n        return x\n", "caf\u00e9 cafe\u0301 Å\u212b", "ﬁne Ａ１",
    "Straße İstanbul ǅ", "привет, мир", "αβγ ᾳ", "你好，世界。", "今天2024年abc",
    "日本語のテキスト", "한국어 문장", "हिन्दी में", "ไทย์", "שלום مَرحبا", "🙂❤️👩‍👧",
    "\ufffd\ufeff\u200b", "<|endoftext|> <s> [MASK] ##a ▁b", "a" * 200)


class Tokenizer:
    """Text to ids and back: a tiktoken.Encoding that can be stored, in meta.json and in every checkpoint.

    `ranks` are the tokens' bytes in the order of their ids, b"" for an id of none; specials have others. No
    text is out of vocabulary.
    """
    safe = SAFE  # where a long text may be cut: it gives the same ids
    heavy = False  # does it take much memory for a text?
    spaced = False  # does decode put spaces between words, unasked?
    prefix = []  # ids that its model reads before every text
    lost = Counter()  # characters that no id stands for, in what was encoded since the last tell(): none

    def __init__(self, kind: str, pattern: str, ranks: list[bytes], specials: dict[str, int]):
        self.kind, self.pattern, self.ranks, self.specials = kind, pattern, ranks, specials
        rank_of = {token: i for i, token in enumerate(ranks) if token}
        self.encoding = tiktoken.Encoding(kind, pat_str=pattern, special_tokens=specials,
                                          mergeable_ranks=rank_of)
        self.vocab_size = max(len(ranks), *(i + 1 for i in specials.values()))
        self.eot, self.mask = specials[EOT], specials.get(MASK)
        self.pad, self.ends = self.eot, {self.eot}
        # the text that each id stands for: a special token stands for none, but is decoded to its name
        self.token_bytes = ranks + [b""] * (self.vocab_size - len(ranks))
        self.decoded = self.token_bytes.copy()
        for token, i in specials.items():
            self.decoded[i] = token.encode()

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """specials=True reads <|endoftext|> in the text as the special token, not as its characters."""
        if len(self.ranks) == 256 and not specials:  # bytes are their own ids
            return list(text.encode("utf-8", "replace"))
        encode = self.encoding.encode_ordinary
        if specials:
            encode = functools.partial(self.encoding.encode, allowed_special="all")
        ids, start = [], 0
        for end in (*long_gaps(text), len(text)):
            ids += encode(text[start:end])
            start = end
        return ids

    def encode_batch(self, texts: list[str], lost: Counter | None = None) -> list[np.ndarray]:
        """Texts to arrays of ids, on all cores if there is enough to do (tiktoken releases Python's lock).
        lost: as for encode_documents; None: what the next tell() tells."""
        def encoded(group: list[str]) -> list[np.ndarray]:
            return [np.array(self.encode(text), dtype=np.uint32) for text in group]

        groups = [[text for text, _ in unit] for unit in units(((text, True) for text in texts), UNIT)]
        if len(groups) == 1:
            return encoded(groups[0])
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return [ids for group in pool.map(encoded, groups) for ids in group]

    def encode_documents(self, texts: list[str], ends: list[bool], lost: Counter | None = None) -> np.ndarray:
        """The ids of all texts in one array, <|endoftext|> behind those that end a document.

        In one call, for speed: Python's lock is released for as long as it takes. lost: gains how often each
        character came that no id stands for; here none does.
        """
        text = "".join(text + EOT if end else text for text, end in zip(texts, ends))
        if len(self.ranks) > 256 and text.count(EOT) == sum(ends) and not long_gaps(text):
            return self.encoding.encode_to_numpy(text, allowed_special={EOT}, disallowed_special=())
        return with_ends([np.array(self.encode(text), np.uint32) for text in texts], ends, self.eot)

    def tell(self, say: Callable) -> None:
        """Say what was lost since the last time."""
        if self.lost:
            say(f"the tokenizer has no ids for some characters: {examples_of(self.lost)}")
            self.lost.clear()

    def changes(self) -> list[str]:
        """What encode and decode do not give back, in words: nothing."""
        return []

    def prompt(self, text: str) -> list[int]:
        """A text that is to go on: specials by name, and before it, once, what its model reads before all."""
        ids = self.encode(text, specials=True)
        if ids[:len(self.prefix)] != self.prefix:
            ids = self.prefix + ids
        return ids or [self.eot]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids of no token (a padded vocabulary has some) decode to nothing, stray bytes to U+FFFD."""
        return "".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int], begun: bool = False) -> Iterator[str]:
        """The text of one id after the other; of a character that several share, with the last of them.

        begun: there are tokens before these, so that the first keeps its space.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for n, i in enumerate(ids):
            yield decoder.decode(self.said(i, first=n == 0 and not begun))
        yield decoder.decode(b"", final=True)

    def said(self, i: int, first: bool = False) -> bytes:
        """What an id decodes to, behind others or as the first one."""
        return self.decoded[i] if 0 <= i < self.vocab_size else b""

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and where each begins and ends in the text, in characters; a shared character is in both."""
        ids = self.encode(text)
        sizes = np.array([len(c.encode("utf-8", "replace")) for c in text], dtype=np.int64)
        char = np.append(np.repeat(np.arange(len(text)), sizes), len(text))  # of each byte
        lengths = np.array([len(self.token_bytes[i]) for i in ids], dtype=np.int64)
        ends = lengths.cumsum()
        return ids, list(zip(char[ends - lengths].tolist(), (char[ends - 1] + 1).tolist()))

    def wrap(self, a: list[int], b: list[int] | None = None) -> tuple[list[int], list[int]]:
        """One text or two as a model reads them, <|endoftext|> behind each: ids, and whose each is."""
        ids, segments = a + [self.eot], [0] * (len(a) + 1)
        return (ids, segments) if b is None else (ids + b + [self.eot], segments + [1] * (len(b) + 1))

    def byte_lengths(self, ids: np.ndarray, size: int | None) -> np.ndarray | None:
        """(vocab_size,): the bytes of text that each id stands for. None if those of `ids`, a split of a data
        set, are not `size`, its text's."""
        return np.array([len(token) for token in self.token_bytes])

    def to_dict(self) -> dict:
        ranks = " ".join(base64.b64encode(token).decode() for token in self.ranks)
        return {"kind": self.kind, "pattern": self.pattern, "ranks": ranks, "specials": self.specials}

    @staticmethod
    def from_dict(stored: dict) -> "Tokenizer":
        if "json" in stored:
            from lib.hub_tokenizer import HubTokenizer
            return HubTokenizer(stored["json"], stored["roles"], stored.get("ends", ()), stored.get("config"))
        if stored["kind"] == "chars":
            return Characters(stored["chars"])
        ranks = [base64.b64decode(token) for token in stored["ranks"].split(" ")]
        return Tokenizer(stored["kind"], stored["pattern"], ranks, dict(stored["specials"]))

    @staticmethod
    def from_pretrained(path: str | Path) -> "Tokenizer":
        """That of a Hugging Face folder or id on the hub. Raises UserError without one."""
        from lib.hub_tokenizer import read_hub_tokenizer
        return read_hub_tokenizer(path)

    def save_pretrained(self, folder: str | Path, context: int, of_two: bool = True) -> None:
        """tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads."""
        from lib.hub_tokenizer import export
        export(self, folder, context)


class Characters(Tokenizer):
    """A token a character, as in nanoGPT: its id is its place among all of them, sorted.

    No token ends a text; where one has to, between two texts for instance, it is the line break.
    """

    def __init__(self, chars: str):
        self.kind, self.chars, self.specials, self.ranks = "chars", chars, {}, []
        self.token_bytes = self.decoded = [c.encode() for c in chars]
        self.id_of = {c: i for i, c in enumerate(chars)}
        self.vocab_size = len(chars)
        self.eot = self.pad = max(0, chars.find("\n"))
        self.mask, self.ends = None, set()

    @staticmethod
    def of(text: str) -> "Characters":
        return Characters("".join(sorted(set(text))))

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Raises UserError for a character without an id."""
        unknown = set(text) - self.id_of.keys()
        if unknown:
            raise UserError(f"{min(unknown)!r}: is none of the {len(self.chars)} characters that the model "
                            "knows: leave it out")
        return [self.id_of[c] for c in text]

    def to_dict(self) -> dict:
        return {"kind": self.kind, "chars": self.chars}

    def save_pretrained(self, folder: str | Path, context: int, of_two: bool = True) -> None:
        from lib.hub_tokenizer import tokenizer_json, write
        model = {"type": "BPE", "vocab": self.id_of, "merges": []}
        write(folder, context, {}, self.to_dict(),
              tokenizer_json({}, {"model": model, "pre_tokenizer": None, "decoder": {"type": "Fuse"}}))


def examples_of(lost: Counter) -> str:
    """'中' 2 times, '文' 1 times"""
    most = sorted(lost, key=lambda c: (-lost[c], c))
    return ", ".join(f"{c!r} {lost[c]:,} times" for c in most[:3]) + ", ..." * (len(most) > 3)


def long_gaps(text: str) -> list[int]:
    """Where to cut white space at which tiktoken would panic: some hundred thousand characters of it."""
    if not SOME_OF_IT.search(text[::1000]):  # for speed
        return []
    return [gap.end() for gap in LONG_GAP.finditer(text)]


def same_ids(tokenizer: Tokenizer, encode: Callable, name: object) -> None:
    """Raises UserError if a hard text has other ids than those of its source."""
    for text in HARD:
        if tokenizer.encode(text) != list(encode(text)):
            raise UserError(f"{name}: {text!r} has other ids than in the tokenizer that it was made from")


def same_tokenizer(a: dict, b: dict) -> bool:
    """Whether two, as they are stored, give the same ids: what else their files say is no matter."""
    if a == b:
        return True
    if not ("json" in a and "json" in b):  # GPT-2's by tiktoken, and by Hugging Face
        a, b = Tokenizer.from_dict(a), Tokenizer.from_dict(b)
        pairs = itertools.zip_longest(a.token_bytes, b.token_bytes, fillvalue=b"")
        return a.eot == b.eot and all(x == y for x, y in pairs) and all(
            a.encode(text) == b.encode(text) for text in HARD)
    a, b = ({"json": "null", **stored, "ends": None, "config": None} for stored in (a, b))
    a["json"], b["json"] = json.loads(a["json"]), json.loads(b["json"])  # in any order
    return a == b


def with_ends(arrays: list[np.ndarray], ends: list[bool], eot: int) -> np.ndarray:
    """The arrays as one, with eot behind those that end a document."""
    parts = [np.append(ids, eot) if end else ids for ids, end in zip(arrays, ends)]
    return np.concatenate(parts).astype(np.uint32)


# -----------------------------------------------------------------------------
# By the name in the settings

def make_tokenizer(name: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """By the name in the settings; `texts` are read only for bpe. Raises UserError if it cannot be had."""
    if name == "bytes":
        return with_specials(name, PIECES, BYTES)
    if name == "bpe":
        return with_specials(name, PIECES, train_bpe(texts, vocab_size - 2))
    if name.endswith(".tiktoken") and not Path(name).is_dir():
        return of_ranks(Path(name))
    if Path(name).is_dir() or "/" in name or name in OWNERS and name != "gpt2":
        return Tokenizer.from_pretrained(name)
    return of_openai(name)


def of_openai(name: str) -> Tokenizer:
    """One of tiktoken's, which keeps its ranks, or downloads them."""
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise SettingError(f"--tokenizer={name}: wanted bytes, bpe, gpt2, a .tiktoken file, a Hugging Face "
                           f"folder, or one of {', '.join(names)}")
    for stored in ("r50k_base", "gpt2") if name == "gpt2" else (name,):  # the same: nanoGPT's users have gpt2
        try:
            known = tiktoken.get_encoding(stored)
            break
        except Exception as error:  # whatever the network does; tiktoken passes on what its client raises
            reason = str(error).split("\n")[0][:120]
    else:
        raise UserError(f"--tokenizer={name}: tiktoken cannot download it ({reason}): set TIKTOKEN_CACHE_DIR "
                        "to a folder that has it, or use --tokenizer=bpe")
    token_of = {i: token for token, i in known._mergeable_ranks.items()}
    tokenizer = with_specials(name, known._pat_str, in_order(token_of), known._special_tokens)
    same_ids(tokenizer, known.encode_ordinary, name)
    return tokenizer


def of_gpt2(size: int) -> Tokenizer:
    """GPT-2's, with our mask if a model of so many tokens has a place for it."""
    found = make_tokenizer("gpt2", [], 0).to_dict()
    specials = found["specials"].items()
    return Tokenizer.from_dict({**found, "specials": {name: i for name, i in specials if i < size}})


def with_specials(kind: str, pattern: str, ranks: list[bytes], specials: dict | None = None) -> Tokenizer:
    """specials: their ids, if not behind the ranks. The mask is ours, behind all."""
    specials = dict(specials or {EOT: len(ranks)})
    if EOT not in specials:
        raise UserError(f"--tokenizer={kind}: has no {EOT}, which ends documents here")
    taken = [token for token, i in specials.items() if i < len(ranks) and ranks[i]]
    if taken:
        raise UserError(f"--tokenizer={kind}: id {specials[taken[0]]} is of {taken[0]} and of another token")
    size = max(len(ranks), *(i + 1 for i in specials.values()))
    return Tokenizer(kind, pattern, ranks, specials if MASK in specials else {**specials, MASK: size})


SIZES = {50256: "r50k_base", 50280: "p50k_base", 100256: "cl100k_base", 199998: "o200k_base"}


def of_ranks(path: Path) -> Tokenizer:
    """A .tiktoken file has the ranks alone: pattern and specials are those of the encoding that it is named
    after, or that has so many ranks."""
    ranks, names = read_ranks(path), tiktoken.list_encoding_names()
    n = len(ranks) - ranks.count(b"")
    name = path.stem if path.stem in names else SIZES.get(n)
    if name is None:
        print(f"{path}: names no pattern: this project's own cuts the text (a file that is called "
              f"{' or '.join(names)} gets the pattern and special tokens of that)")
        return with_specials(path.stem, PIECES, ranks)
    name = "r50k_base" if name == "gpt2" else name
    known = published(name)
    if name in SIZES.values() and SIZES.get(n) != name:
        print(f"{path}: {n:,} tokens, which is not what {name} has: if it is meant to be that, it is damaged")
    return with_specials(path.stem, known["pat_str"], ranks, known["special_tokens"])


def published(name: str) -> dict:
    """What tiktoken says of an encoding, without its ranks, which it would download."""
    from tiktoken_ext import openai_public
    load = openai_public.load_tiktoken_bpe
    openai_public.load_tiktoken_bpe = lambda *_, **__: {}
    try:
        return openai_public.ENCODING_CONSTRUCTORS[name]()
    finally:
        openai_public.load_tiktoken_bpe = load


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a .tiktoken file, by their ids; b"" where there is none."""
    try:
        lines = path.read_text(encoding="ascii").split("\n")
        pairs = [line.split() for line in lines if line]
        token_of = {int(i): base64.b64decode(token, validate=True) for token, i in pairs}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a file of BPE ranks: {error}") from None
    tokens = set(token_of.values())
    if len(tokens) < len(pairs) or not tokens >= set(BYTES) or min(token_of) < 0 or max(token_of) >= 2**24:
        raise UserError(f"{path}: not a file of BPE ranks: each token must come once, with an id of its own "
                        f"from 0 to {2**24 - 1:,}, and all single bytes must be among them")
    return in_order(token_of)


def in_order(token_of: dict[int, bytes]) -> list[bytes]:
    """Tokens by their ids, b"" for an id of none: p50k_base has no 50256."""
    return [token_of.get(i, b"") for i in range(max(token_of) + 1)]


# -----------------------------------------------------------------------------
# A large text, as a stream of (text, does it end a document?)

UNIT = 2**19  # characters tokenized at a time, by one thread


def read_texts(path: Path, spans: np.ndarray, tokenizer: Tokenizer | type[Tokenizer],
               tick: Callable) -> Iterator[tuple[str, bool]]:
    """What lies in a file at `spans`, (texts, 2), in bytes; a long one in pieces, cut where that is safe for
    the tokenizer, if it is anywhere. tick(bytes)."""
    safe, size = tokenizer.safe, UNIT // 8 if tokenizer.heavy else 8 * UNIT
    with open(path, "rb") as f:
        for start, end in zip(memoryview(spans[:, 0].copy()), memoryview(spans[:, 1].copy())):
            f.seek(start)
            rest, decoder = "", codecs.getincrementaldecoder("utf-8")()
            while start < end:
                data = f.read(min(size, end - start))
                start += len(data)
                tick(len(data))
                text = rest + decoder.decode(data)
                at = len(text)
                if start < end and not safe:
                    at = 0
                elif start < end and at < 16 * UNIT:  # no such place for long: cut anywhere
                    at = max((place.end() for place in safe.finditer(text, max(at - 4096, 0))), default=0)
                if at:
                    yield text[:at], start == end
                rest = text[at:]


def encode_stream(tokenizer: Tokenizer, texts: Iterable[tuple[str, bool]], threads: int,
                  lost: Counter | None = None) -> Iterator[np.ndarray]:
    """Ids in the order of the text, with a few UNITs in memory. lost: gains the characters without an id."""
    waiting, lost = deque(), Counter() if lost is None else lost
    with ThreadPoolExecutor(threads) as pool:
        size = UNIT // 8 if tokenizer.heavy else UNIT
        for unit in itertools.chain(units(texts, size), [None] * 2 * threads):
            if unit:
                found = Counter()
                waiting.append((pool.submit(tokenizer.encode_documents, *zip(*unit), found), found))
            if waiting and (unit is None or len(waiting) > 2 * threads):
                future, found = waiting.popleft()
                yield future.result()
                lost.update(found)


def with_prefix(arrays: Iterable[np.ndarray], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """A stream of ids with the tokenizer's prefix before each document."""
    prefix, begins = np.array(tokenizer.prefix, np.uint32), True
    for ids in arrays:
        starts = np.flatnonzero(ids == tokenizer.eot) + 1
        starts = np.append(0, starts) if begins and len(ids) else starts
        if len(ids):
            begins = len(starts) > 0 and starts[-1] == len(ids)
        starts = starts[starts < len(ids)]
        yield np.insert(ids, np.repeat(starts, len(prefix)), np.tile(prefix, len(starts)))


def units(texts: Iterable[tuple[str, bool]], most: int) -> Iterator[list[tuple[str, bool]]]:
    """Short texts together, so that a thread has something to do."""
    unit, size = [], 0
    for text in texts:
        unit.append(text)
        size += len(text[0])
        if size >= most:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def sample(texts: Iterable[tuple[str, bool]], share: float) -> Iterator[str]:
    """About that share of the texts, evenly from all of them."""
    done = taken = 0
    for text, _ in texts:
        done += len(text)
        if taken < share * done:
            taken += len(text)
            yield text
