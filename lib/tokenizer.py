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
import heapq
import importlib.util
import itertools
import json
import os
import re
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from config import SettingError, UserError
from lib.hub import OWNERS, folder_of

EOT, MASK = "<|endoftext|>", "<|mask|>"  # ends a document; stands for a token to be guessed
BYTES = [bytes([i]) for i in range(256)]  # the first tokens of ours

# What a token may span at most: a word (letters and their marks) with the space or sign before it, up to
# three digits, a run of signs with the space before it, white space but for its last character, which goes
# with the word behind it. So an indented line of code is: line break and indent, word, word.
PIECES = r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"

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
    prefix = []  # ids that its model reads before every text

    def __init__(self, kind: str, pattern: str, ranks: list[bytes], specials: dict[str, int]):
        self.kind, self.pattern, self.ranks, self.specials = kind, pattern, ranks, specials
        rank_of = {token: i for i, token in enumerate(ranks) if token}
        self.encoding = tiktoken.Encoding(kind, pat_str=pattern, special_tokens=specials,
                                          mergeable_ranks=rank_of)
        self.vocab_size = max(len(ranks), *(i + 1 for i in specials.values()))
        self.eot, self.mask = specials[EOT], specials[MASK]
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
        cuts = long_gaps(text)
        if not cuts:
            return encode(text)
        parts = [encode(text[start:end]) for start, end in zip([0, *cuts], [*cuts, len(text)])]
        return [i for part in parts for i in part]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Texts to arrays of ids, on all cores if there is enough to do (tiktoken releases Python's lock)."""
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
            return HubTokenizer(stored["json"], stored["roles"], stored.get("ends", ()), stored.get("config"))
        ranks = [base64.b64decode(token) for token in stored["ranks"].split(" ")]
        return Tokenizer(stored["kind"], stored["pattern"], ranks, dict(stored["specials"]))

    @staticmethod
    def from_pretrained(path: str | Path) -> "HubTokenizer":
        """That of a Hugging Face folder or id on the hub. Raises UserError without one."""
        return read_hub_tokenizer(path)

    def save_pretrained(self, folder: str | Path, context: int) -> None:
        """tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads."""
        symbol = byte_symbols()
        name = {token: "".join(symbol[byte] for byte in token) for token in self.ranks if token}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                      "use_regex": False}
        # {1,3}+ is possessive to tiktoken, but to the library that reads this a repetition of a repetition
        pattern = re.sub(r"((?:\\p\{\w+\}|\[[^]]*\]|\\?.)\{\d+,\d*\})\+", r"(?>\1)", self.pattern)
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        vocab = {name[token]: i for i, token in enumerate(self.ranks) if token} | self.specials
        merges = [[name[a], name[b]] for a, b in merges_of(self.ranks)]
        roles = {"eos_token": EOT, "bos_token": EOT, "pad_token": EOT, "mask_token": MASK}
        write_hf_tokenizer(folder, context, roles, {}, {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added(self.specials),
            "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True}})
        if importlib.util.find_spec("tokenizers"):
            same_ids(read_hub_tokenizer(folder), self.encode, folder)
        else:
            print(f"{folder}: the exported tokenizer is not checked: pip install tokenizers")


def long_gaps(text: str) -> list[int]:
    """Where to cut white space at which tiktoken would panic: some hundred thousand characters of it."""
    if not SOME_OF_IT.search(text[::1000]):  # for speed
        return []
    return [gap.end() for gap in LONG_GAP.finditer(text)]


def merges_of(ranks: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """All ways to make a token of two others, the older tokens first: tiktoken takes any."""
    known = set(ranks) - {b""}
    for token in ranks:
        for i in range(1, len(token)):
            if token[:i] in known and token[i:] in known:
                yield token[:i], token[i:]


def same_ids(tokenizer: Tokenizer, encode: Callable, name: object) -> None:
    """Raises UserError if a hard text has other ids than those of its source."""
    for text in HARD:
        if tokenizer.encode(text) != list(encode(text)):
            raise UserError(f"{name}: {text!r} has other ids than in the tokenizer that it was made from")


class HubTokenizer(Tokenizer):
    """What a Hugging Face model brings along, its tokenizer.json, with Tokenizer's methods.

    roles: which of its tokens is the "eos_token", "mask_token" and so on. ends: ids that end a text, beside
    that. config: what else its files say (chat_template, tokenizer_class), for an export. Raises UserError if
    it cannot be used.
    """
    kind = "huggingface"
    heavy = True  # 170 bytes a byte

    def __init__(self, json_text: str, roles: dict[str, str], ends: Iterable[int] = (),
                 config: dict | None = None):
        tokenizers = need_tokenizers()
        try:
            self.fast = tokenizers.Tokenizer.from_str(json_text)
            stored = json.loads(json_text)
        except Exception as error:  # the library has no kind of its own
            raise UserError(f"tokenizer.json: cannot be read: {error}") from None
        self.json, self.roles, self.config = json_text, roles, config or {}
        self.fast.no_padding()
        self.fast.no_truncation()
        vocab = self.fast.get_vocab(with_added_tokens=True)
        if len(set(vocab.values())) < len(vocab):
            raise UserError("tokenizer.json: two tokens have the same id")
        self.vocab_size = max(vocab.values()) + 1
        have = {token.content for token in self.fast.get_added_tokens_decoder().values()}
        self.fast.add_special_tokens(sorted({t for t in roles.values() if t in vocab and t not in have}))
        self.specials = {token.content: i for i, token in self.fast.get_added_tokens_decoder().items()
                         if token.special}
        special = {role: vocab[token] for role, token in roles.items() if token in vocab}
        self.eot = special.get("eos_token", special.get("sep_token"))
        if self.eot is None:
            raise UserError("tokenizer_config.json: names neither an eos_token nor a sep_token")
        self.mask, self.pad = special.get("mask_token"), special.get("pad_token", self.eot)
        self.ends = {self.eot, *ends}

        # how a token's name becomes its text
        decoder, model = stored.get("decoder") or {}, stored["model"]
        steps = {step["type"] for step in [decoder, *decoder.get("decoders", ())] if step}
        self.byte = {}  # name of a byte, or sign for it -> the byte
        if "ByteLevel" in steps:
            self.byte = {sign: i for i, sign in byte_symbols().items()}
        elif "ByteFallback" in steps:
            self.byte = {f"<0x{i:02X}>": i for i in range(256)}
        self.by_sign = "ByteLevel" in steps  # else a token is one byte
        self.spaced = not decoder or "WordPiece" in steps  # the decoder puts spaces between words, unasked
        self.continuing = decoder.get("prefix", "") if "WordPiece" in steps else ""
        unknown = model.get("unk_token")
        self.unknown = vocab.get(unknown) if unknown is not None else model.get("unk_id")
        self.missing = {i for name, i in self.byte.items() if name not in vocab}  # bytes without a token
        self.cache = {}
        self.check()
        self.read_template()

    def check(self) -> None:
        """Raises UserError if a hard text is decoded otherwise than by the library."""
        self.fast.encode_special_tokens = True
        for text in HARD:
            ids = self.fast.encode(text, add_special_tokens=False).ids
            theirs = self.fast.decode(ids, skip_special_tokens=False)
            if theirs != self.decode(ids) and "\ufffd" not in theirs:
                raise UserError(f"tokenizer.json: its decoder is of a kind that is not known here: {text!r} "
                                f"comes back as {self.decode(ids)!r}, for {theirs!r}")

    def read_template(self) -> None:
        """Where its own specials go around one text and around two: None stands for the text."""
        tokens = (self.said(i).decode("utf-8", "ignore").strip() for i in range(self.vocab_size))
        for self.probe in itertools.chain("a的", tokens):
            if self.probe and self.decode(self.encode(self.probe)).strip() == self.probe:
                break
        else:
            raise UserError("tokenizer.json: gives back no text that it reads")
        self.templates = []
        for texts in ((self.probe,), (self.probe, self.probe)):
            found = self.fast.encode(*texts)
            self.templates.append([
                (i if sequence is None else None, segment, sequence)
                for i, segment, sequence in zip(found.ids, found.type_ids, found.sequence_ids)])
        one = [i for i, _, _ in self.templates[0]]
        self.prefix = one[:one.index(None)]

    def said(self, i: int, first: bool = False) -> bytes:
        if (i, first) not in self.cache:
            self.cache[i, first] = self.decoded_token(self.fast.id_to_token(i) if i >= 0 else None, first)
        return self.cache[i, first]

    def decoded_token(self, token: str | None, first: bool) -> bytes:
        if token is None:
            return b""
        if self.by_sign and all(c in self.byte for c in token):
            return bytes(self.byte[c] for c in token)
        if token in self.byte:
            return bytes([self.byte[token]])
        decode = self.fast.decoder.decode if self.fast.decoder else " ".join
        return decode([token] if first else ["a", token])[not first:].encode("utf-8", "replace")

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The text that each id stands for, of those that stand for any."""
        found = [self.own_bytes(self.fast.id_to_token(i), i) for i in range(self.vocab_size)]
        for i, token in self.fast.get_added_tokens_decoder().items():
            found[i] = b"" if token.special else token.content.encode()
        if self.unknown is not None:
            found[self.unknown] = b""
        return found

    def byte_lengths(self, ids: np.ndarray, size: int | None) -> np.ndarray | None:
        """What it puts before a text, a space for one, is taken off at the end of the text before that."""
        lengths = super().byte_lengths(ids, size)
        own = self.encode(self.probe)
        lengths[self.eot] = len(self.probe.encode()) - lengths[own].sum()
        found = 0 if len(ids) and ids[-1] == self.eot else lengths[self.eot]
        for i in range(0, len(ids), UNIT):
            found += lengths[ids[i:i + UNIT]].sum()
        return lengths if found == size else None

    def own_bytes(self, token: str | None, i: int) -> bytes:
        if self.spaced and token is not None:
            return token.removeprefix(self.continuing).encode()
        return self.said(i)

    def encode(self, text: str, specials: bool = False) -> list[int]:
        self.fast.encode_special_tokens = not specials
        return self.fast.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        self.fast.encode_special_tokens = True
        return [np.array(one.ids, dtype=np.uint32)
                for one in self.fast.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_documents(self, texts: list[str], ends: list[bool], lost: Counter | None = None) -> np.ndarray:
        if lost is None or self.byte and not self.missing:
            return with_ends(self.encode_batch(texts), ends, self.eot)
        self.fast.encode_special_tokens = True
        found = self.fast.encode_batch(texts, add_special_tokens=False)
        for text, one in zip(texts, found):
            lost.update(self.lost(text, one))
        return with_ends([np.array(one.ids, np.uint32) for one in found], ends, self.eot)

    def lost(self, text: str, found=None) -> Counter:
        """How often each character comes that ends in no id, or in the unknown one alone.

        White space does not count, nor what the tokenizer's own normalizer takes out. found: what the
        library made of the text.
        """
        if self.by_sign:
            signs = {c: set(c.encode("utf-8", "replace")) for c in set(text)}
            return Counter({c: text.count(c) for c, its in signs.items() if its & self.missing})
        if found is None:
            self.fast.encode_special_tokens = True
            found = self.fast.encode(text, add_special_tokens=False)
        spans = np.array(found.offsets, dtype=np.int64).reshape(-1, 2)
        spans = spans[np.array(found.ids, dtype=np.int64) != (-1 if self.unknown is None else self.unknown)]
        begun, ended = (np.bincount(edge, minlength=len(text) + 1) for edge in spans.T)
        left = Counter(text[i] for i in np.flatnonzero((begun - ended).cumsum()[:-1] <= 0))
        return Counter({c: n for c, n in left.items() if self.normalized(c).strip(" \u2581")})

    def normalized(self, text: str) -> str:
        return text if self.fast.normalizer is None else self.fast.normalizer.normalize_str(text)

    def changes(self) -> list[str]:
        """What its normalizer changes and its words leave out, by examples: 'A' -> 'a'."""
        pairs = [(text, self.normalized(text).strip("\u2581 ")) for text in ("A", "é", "e\u0301", "ﬁ")]
        for text in ("a  b", "a\nb", "a\tb", " a"):
            text = text.replace("a", self.probe).replace("b", self.probe)
            pairs.append((text, self.decode(self.encode(text))))
        return [f"{text!r} -> {got!r}" for text, got in pairs if text != got]

    @functools.cached_property
    def safe(self) -> re.Pattern | None:
        """Where a long text may be cut, as tried on hard texts; None: nowhere."""
        marks = [mark for mark in MARKS if self.cuts_before(mark)]
        return re.compile(rf"[^\W\d_](?=[{''.join(marks)}])") if marks else None

    def cuts_before(self, mark: str) -> bool:
        for before, after in zip(HARD, HARD[7:] + HARD[:7]):
            for letter in "aéд中":
                a, b = before + letter, mark + after
                if self.encode(a) + self.encode(b) != self.encode(a + b):
                    return False
        return True

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        self.fast.encode_special_tokens = True
        found = self.fast.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def wrap(self, a: list[int], b: list[int] | None = None) -> tuple[list[int], list[int]]:
        """As the model was trained to read one text or two: [CLS] a [SEP] b [SEP] for BERT."""
        ids, segments, last = [], [], None
        for i, segment, sequence in self.templates[b is not None]:
            if i is not None:
                new = [i]
            else:
                new = [] if sequence == last else (a, b)[sequence]  # a probe may be of several tokens
            ids, segments, last = ids + new, segments + [segment] * len(new), sequence
        return ids, segments

    def to_dict(self) -> dict:
        return {"kind": self.kind, "json": self.json, "roles": self.roles, "ends": sorted(self.ends),
                "config": self.config}

    def save_pretrained(self, folder: str | Path, context: int) -> None:
        config = self.config
        if "cls_token" in self.roles and any(segment for _, segment, _ in self.templates[1]):  # as BERT's
            config = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"], **config}
        write_hf_tokenizer(folder, context, self.roles, config, json.loads(self.json))


def need_tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise UserError("a Hugging Face tokenizer needs a package: pip install tokenizers") from None
    return tokenizers


# -----------------------------------------------------------------------------
# The files of a Hugging Face folder

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
         "config.json", "generation_config.json", "chat_template.jinja", "vocab.txt", "vocab.json",
         "merges.txt")

# The special tokens of families whose files do not name them: the first row that is whole in the vocabulary
FAMILIES = {
    "BERT": {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]",
             "unk_token": "[UNK]"},
    "RoBERTa": {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>",
                "mask_token": "<mask>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "Llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT-2": {"bos_token": EOT, "eos_token": EOT, "unk_token": EOT}}

# These end what a chat model says, whatever its files name
TURN_ENDS = (EOT, "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>",
             "<|assistant_end|>")


def read_hub_tokenizer(path: str | Path) -> HubTokenizer:
    """Of a folder or an id on the hub: tokenizer.json, or what older folders have. Raises UserError.

    The roles of special tokens are read from tokenizer_config.json, else special_tokens_map.json; if neither
    names an end, they are those of the family that the vocabulary is of, else the ids in
    generation_config.json, config.json.
    """
    try:
        folder, found = folder_of(path, weights=False), {}
    except FileNotFoundError as error:
        raise UserError(str(error)) from None
    for name in FILES:
        if name.startswith(("vocab", "merges")) and "tokenizer.json" in found:
            continue
        if (folder / name).is_file():
            found[name] = (folder / name).read_text(encoding="utf-8")
    facts = {name: as_dict(found.get(name, "{}"), f"{path}/{name}") for name in FILES if "json" in name}
    config = facts["tokenizer_config.json"]
    named = {}  # eos_token and so on -> the token, or None
    for role, token in {**facts["special_tokens_map.json"], **config}.items():
        token = token.get("content") if isinstance(token, dict) else token
        if role.endswith("_token") and not isinstance(token, (bool, list, int)):
            named[role] = token
    roles = {role: token for role, token in named.items() if token is not None}
    try:
        text = found.get("tokenizer.json") or built(path, found, facts, roles)
        vocab = need_tokenizers().Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except UserError:
        raise
    except Exception as error:  # the library has no kind of its own
        raise UserError(f"{path}: tokenizer cannot be read: {error}") from None
    ends = ids_of(facts["generation_config.json"], "eos") + ids_of(facts["config.json"], "eos")
    if not {"eos_token", "sep_token"} & set(roles):
        family = next((one for one in FAMILIES if vocab.keys() >= set(FAMILIES[one].values())), None)
        if family:
            roles = {**FAMILIES[family], **roles}
            print(f"{path}: its files name no special tokens: those of {family}")
        for facts_of in (facts["generation_config.json"], facts["config.json"]):
            for role in ("bos", "eos", "pad"):
                names = [token for token, i in vocab.items() if i in ids_of(facts_of, role)[:1]]
                if names and not family:
                    roles.setdefault(f"{role}_token", names[0])
    ends = [i for i in ends if i in set(vocab.values())]
    ends += [vocab[token] for token in TURN_ENDS if token in vocab]
    kept = {name: value for name, value in config.items() if name not in {"added_tokens_decoder", *named}}
    if "chat_template.jinja" in found:
        kept["chat_template"] = found["chat_template.jinja"]
    return HubTokenizer(text, roles, ends, kept)


def as_dict(text: str, name: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name}: damaged: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{name}: holds no table of names and values")
    return found


def ids_of(facts: dict, role: str) -> list[int]:
    found = facts.get(f"{role}_token_id")
    return [i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int)]


def built(path: str | Path, found: dict[str, str], facts: dict[str, dict], roles: dict) -> str:
    """tokenizer.json for a folder that has only older files."""
    config = facts["tokenizer_config.json"]
    if "vocab.txt" in found:
        lines = found["vocab.txt"].removesuffix("\n").split("\n")
        vocab = {token: i for i, token in enumerate(lines)}
        roles = {**FAMILIES["BERT"], **roles}
        cls, sep = ([roles[role], vocab.get(roles[role])] for role in ("cls_token", "sep_token"))
        content = {
            "normalizer": {"type": "BertNormalizer", "clean_text": True,
                           "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
                           "strip_accents": config.get("strip_accents"),
                           "lowercase": config.get("do_lower_case", True)},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {"type": "BertProcessing", "sep": sep, "cls": cls},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": {"type": "WordPiece", "unk_token": roles["unk_token"], "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100, "vocab": vocab}}
    elif "vocab.json" in found and "merges.txt" in found:
        vocab = as_dict(found["vocab.json"], f"{path}/vocab.json")
        lines = found["merges.txt"].removesuffix("\n").split("\n")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        space = config.get("add_prefix_space", False)
        byte_level = {"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": True, "use_regex": True}
        content = {
            "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}}
        if vocab.keys() >= {"<s>", "</s>", "<mask>"}:
            roles = {**FAMILIES["RoBERTa"], **roles}
            cls, sep = ([roles[role], vocab.get(roles[role])] for role in ("cls_token", "sep_token"))
            content["post_processor"] = {"type": "RobertaProcessing", "sep": sep, "cls": cls,
                                         "trim_offsets": True, "add_prefix_space": space}
    else:
        return converted(path)
    more = {**facts["added_tokens.json"]}
    for i, token in config.get("added_tokens_decoder", {}).items():
        more[token["content"]] = int(i)
    more |= {token: vocab[token] for token in roles.values() if token in vocab}
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": added(more),
                       **content})


def added(specials: dict[str, int]) -> list[dict]:
    """Special tokens as tokenizer.json lists them. A mask takes the space before it, as RoBERTa's does."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    rows = [{"id": i, "content": token, **flags, "special": True} for token, i in specials.items()]
    for row in rows:
        row["lstrip"] = row["content"] == "<mask>"
    return sorted(rows, key=lambda row: row["id"])


def converted(path: str | Path) -> str:
    """tokenizer.json of a SentencePiece file, by transformers' own conversion."""
    try:
        from transformers import AutoTokenizer
        return AutoTokenizer.from_pretrained(path).backend_tokenizer.to_str()
    except ImportError:
        raise UserError(f"{path}: has no tokenizer.json, vocab.txt, or vocab.json and merges.txt; a "
                        "tokenizer.model needs: pip install transformers sentencepiece protobuf") from None
    except Exception as error:  # of many kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: has no tokenizer.json, vocab.txt, or vocab.json and merges.txt, and "
                        f"transformers cannot convert it: {reason[:200]}") from None


def same_tokenizer(a: dict, b: dict) -> bool:
    """Whether two, as they are stored, give the same ids: what else their files say is no matter."""
    other = ("ends", "config")
    return {k: v for k, v in a.items() if k not in other} == {k: v for k, v in b.items() if k not in other}


def with_ends(arrays: list[np.ndarray], ends: list[bool], eot: int) -> np.ndarray:
    return np.concatenate([part for ids, end in zip(arrays, ends)
                           for part in (ids.astype(np.uint32), np.full(int(end), eot, np.uint32))])


def write_hf_tokenizer(folder: str | Path, context: int, roles: dict, config: dict, tokenizer: dict) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config,
              "model_max_length": context, **roles}
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (Path(folder) / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def byte_symbols() -> dict[int, str]:
    """The character by which Hugging Face's byte-level files write each byte (GPT-2's): a visible one."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(others)}


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
        return read_hub_tokenizer(name)
    try:
        known = tiktoken.get_encoding("r50k_base" if name == "gpt2" else name)
    except ValueError:
        raise SettingError(f"--tokenizer={name}: wanted bytes, bpe, gpt2, a .tiktoken file, a Hugging "
                           f"Face folder, or one of {', '.join(tiktoken.list_encoding_names())}") from None
    except Exception as error:  # whatever the network does; tiktoken passes on what its HTTP client raises
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"--tokenizer={name}: tiktoken cannot download it ({reason}): set TIKTOKEN_CACHE_DIR "
                        "to a folder that has it, or use --tokenizer=bpe") from None
    ranks = [b""] * (max(known._mergeable_ranks.values()) + 1)  # p50k_base has no token 50256
    for token, i in known._mergeable_ranks.items():
        ranks[i] = token
    tokenizer = with_specials(name, known._pat_str, ranks, known._special_tokens)
    same_ids(tokenizer, known.encode_ordinary, name)
    return tokenizer


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
    ranks = read_ranks(path)
    names = tiktoken.list_encoding_names()
    name = path.stem if path.stem in names else SIZES.get(len(ranks) - ranks.count(b""))
    if name is None:
        print(f"{path}: names no pattern: this project's own cuts the text (a file that is called "
              f"{' or '.join(names)} gets the pattern and special tokens of that)")
        return with_specials(path.stem, PIECES, ranks)
    known = published("r50k_base" if name == "gpt2" else name)
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
        token_of = {int(i): base64.b64decode(token) for token, i in pairs}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a file of BPE ranks: {error}") from None
    tokens = set(token_of.values())
    if len(tokens) < len(pairs) or not tokens >= set(BYTES) or min(token_of) < 0 or max(token_of) >= 2**24:
        raise UserError(f"{path}: not a file of BPE ranks: each token must come once, with an id of its own "
                        f"from 0 to {2**24 - 1:,}, and all single bytes must be among them")
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


# -----------------------------------------------------------------------------
# Training

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
    find = regex.compile(PIECES).findall
    pieces, share, look = Counter(), 1, LOOK

    def taken(piece: str) -> bool:
        return not is_clause(piece) or zlib.crc32(piece.encode("utf-8", "replace")) % share == 0

    for text in texts:
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
