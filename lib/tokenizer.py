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

EOT, MASK = "<|endoftext|>", "<|mask|>"  # ends a document; stands for a token to be guessed
BYTES = [bytes([i]) for i in range(256)]  # the first tokens of ours

# What a token may span at most: a word with the space or sign before it, up to three digits, a run of signs
# with the space before it, white space but for its last character, which goes with the word behind it. So an
# indented line of code is: line break and indent, word, word.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """Text to ids and back: a tiktoken.Encoding that can be stored, in meta.json and in every checkpoint.

    `ranks` are the tokens' bytes in the order of their ids; specials follow. No text is out of vocabulary.
    """

    def __init__(self, kind: str, pattern: str, ranks: list[bytes], specials: dict[str, int]):
        self.kind, self.pattern, self.ranks, self.specials = kind, pattern, ranks, specials
        self.encoding = tiktoken.Encoding(kind, pat_str=pattern, special_tokens=specials,
                                          mergeable_ranks={token: i for i, token in enumerate(ranks)})
        self.vocab_size = max(len(ranks), *(i + 1 for i in specials.values()))
        self.eot, self.mask = specials[EOT], specials[MASK]
        self.pad = self.eot
        # the text that each id stands for: a special token stands for none, but is decoded to its name
        self.token_bytes = ranks + [b""] * (self.vocab_size - len(ranks))
        self.decoded = self.token_bytes.copy()
        for token, i in specials.items():
            self.decoded[i] = token.encode()

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """specials=True reads <|endoftext|> in the text as the special token, not as its characters."""
        if specials:
            return self.encoding.encode(text, allowed_special="all")
        if len(self.ranks) == 256:  # bytes are their own ids
            return list(text.encode("utf-8", "replace"))
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Texts to arrays of ids, on all cores (tiktoken releases Python's lock)."""
        if len(self.ranks) == 256:
            return [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8) for text in texts]
        ids = self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
        return [np.array(one, dtype=np.uint32) for one in ids]

    def encode_documents(self, texts: list[str], ends: list[bool]) -> np.ndarray:
        """The ids of all texts in one array, <|endoftext|> behind those that end a document.

        In one call, for speed: Python's lock is released for as long as it takes.
        """
        if len(self.ranks) > 256 and not any(EOT in text for text in texts):
            text = "".join(text + EOT if end else text for text, end in zip(texts, ends))
            return self.encoding.encode_to_numpy(text, allowed_special={EOT}, disallowed_special=())
        return with_ends(self.encode_batch(texts), ends, self.eot)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids of no token (a padded vocabulary has some) decode to nothing, stray bytes to U+FFFD."""
        return "".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of one id after the other; of a character that several share, with the last of them."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield decoder.decode(self.decoded[i] if i < self.vocab_size else b"")
        yield decoder.decode(b"", final=True)

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

    def to_dict(self) -> dict:
        ranks = " ".join(base64.b64encode(token).decode() for token in self.ranks)
        return {"kind": self.kind, "pattern": self.pattern, "ranks": ranks, "specials": self.specials}

    @staticmethod
    def from_dict(stored: dict) -> "Tokenizer | HubTokenizer":
        if "json" in stored:
            return HubTokenizer(stored["json"], stored["roles"])
        ranks = [base64.b64decode(token) for token in stored["ranks"].split(" ")]
        return Tokenizer(stored["kind"], stored["pattern"], ranks, dict(stored["specials"]))

    @staticmethod
    def from_pretrained(path: str | Path) -> "HubTokenizer":
        """The tokenizer.json of a Hugging Face folder or id on the hub. Raises UserError without one."""
        folder, stored = Path(path), {}
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            file = folder / name if folder.is_dir() else hub_file(str(path), name)
            if file.is_file():
                stored[name] = file.read_text(encoding="utf-8")
        if "tokenizer.json" not in stored:
            raise UserError(f"{path}: has no tokenizer.json")
        roles = {}  # eos_token and so on -> the token
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            for role, token in json.loads(stored.get(name, "{}")).items():
                token = token.get("content") if isinstance(token, dict) else token
                if role.endswith("_token") and isinstance(token, str):
                    roles[role] = token
        return HubTokenizer(stored["tokenizer.json"], roles)

    def save_pretrained(self, folder: str | Path, context: int) -> None:
        """tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads."""
        symbol = byte_symbols()
        name = {token: "".join(symbol[byte] for byte in token) for token in self.ranks}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                      "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [{"id": i, "content": token, **flags, "special": True} for token, i in self.specials.items()]
        vocab = {name[token]: i for i, token in enumerate(self.ranks)}
        merges = [[name[a], name[b]] for a, b in merges_of(self.ranks)]
        roles = {"eos_token": EOT, "bos_token": EOT, "pad_token": EOT, "mask_token": MASK}
        write_hf_tokenizer(folder, context, roles, {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}})


def merges_of(ranks: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The two tokens that each one was merged from, as an encoder would: by what is older than the token."""
    rank_of = {token: i for i, token in enumerate(ranks)}
    for token, rank in rank_of.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [rank_of.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = joined.index(min(joined))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


class HubTokenizer:
    """What a Hugging Face model brings along, its tokenizer.json, with Tokenizer's methods.

    roles: which of its tokens is the "eos_token", "mask_token" and so on. Raises UserError if it cannot be
    used.
    """
    kind = "huggingface"

    def __init__(self, json_text: str, roles: dict[str, str]):
        try:
            import tokenizers
        except ImportError:
            raise UserError("a Hugging Face tokenizer needs a package: pip install tokenizers") from None
        try:
            self.fast = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the library has no kind of its own
            raise UserError(f"tokenizer.json: cannot be read: {error}") from None
        self.json, self.roles = json_text, roles
        self.fast.no_padding()
        self.fast.no_truncation()
        self.vocab_size = max(self.fast.get_vocab(with_added_tokens=True).values()) + 1
        self.specials = {token.content: i for i, token in self.fast.get_added_tokens_decoder().items()
                         if token.special}
        special = {role: self.fast.token_to_id(token) for role, token in roles.items()}
        self.eot = special.get("eos_token", special.get("sep_token"))
        if self.eot is None:
            raise UserError("tokenizer_config.json: names neither an eos_token nor a sep_token")
        self.mask, self.pad = special.get("mask_token"), special.get("pad_token", self.eot)
        # where its own specials go around one text and around two: None stands for the text
        self.templates = []
        for probe in (("a",), ("a", "a")):
            found = self.fast.encode(*probe)
            self.templates.append([
                (i if sequence is None else None, segment, sequence)
                for i, segment, sequence in zip(found.ids, found.type_ids, found.sequence_ids)])

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """What each id decodes to, on its own."""
        byte = {symbol: i for i, symbol in byte_symbols().items()}
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self.json).get("decoder"))
        found, special = [], set(self.specials.values())
        for i in range(self.vocab_size):
            token = self.fast.id_to_token(i) or ""
            if i in special:
                token = ""
            elif byte_level and all(c in byte for c in token):
                found.append(bytes(byte[c] for c in token))
                continue
            found.append(token.replace("\u2581", " ").removeprefix("##").encode())
        return found

    def encode(self, text: str, specials: bool = False) -> list[int]:
        self.fast.encode_special_tokens = not specials
        return self.fast.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        self.fast.encode_special_tokens = True
        return [np.array(one.ids, dtype=np.uint32)
                for one in self.fast.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_documents(self, texts: list[str], ends: list[bool]) -> np.ndarray:
        return with_ends(self.encode_batch(texts), ends, self.eot)

    def decode(self, ids: Iterable[int]) -> str:
        return self.fast.decode([i for i in ids if i < self.vocab_size], skip_special_tokens=False)

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        from tokenizers.decoders import DecodeStream
        stream = DecodeStream(skip_special_tokens=False)
        for i in ids:
            if i < self.vocab_size:
                yield stream.step(self.fast, i) or ""

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
        return {"kind": self.kind, "json": self.json, "roles": self.roles}

    def save_pretrained(self, folder: str | Path, context: int) -> None:
        write_hf_tokenizer(folder, context, self.roles, json.loads(self.json))


def with_ends(arrays: list[np.ndarray], ends: list[bool], eot: int) -> np.ndarray:
    return np.concatenate([part for ids, end in zip(arrays, ends)
                           for part in (ids.astype(np.uint32), np.full(int(end), eot, np.uint32))])


def write_hf_tokenizer(folder: str | Path, context: int, roles: dict, tokenizer: dict) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context,
              "clean_up_tokenization_spaces": False, **roles}
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (Path(folder) / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def byte_symbols() -> dict[int, str]:
    """The character by which Hugging Face's byte-level files write each byte (GPT-2's): a visible one."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def hub_file(name: str, file: str) -> Path:
    """A file of a model on the hub, in its cache; one that does not exist there is not a file here either.

    Raises UserError without the package.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(f"{name}: no such folder here; if it is a model on Hugging Face's hub: "
                        "pip install huggingface_hub") from None
    try:
        return Path(hf_hub_download(name, file))
    except Exception:  # of many kinds: no such file, no network, no permission
        return Path(file) / "missing"


def make_tokenizer(name: str, texts: Iterable[str], vocab_size: int) -> "Tokenizer | HubTokenizer":
    """By the name in the settings; `texts` are read only for bpe. Raises UserError if it cannot be had."""
    if name == "bytes":
        return with_specials(name, PIECES, BYTES)
    if name == "bpe":
        return with_specials(name, PIECES, train_bpe(texts, vocab_size - 2))
    if name.endswith(".tiktoken") and not Path(name).is_dir():
        ranks = read_ranks(Path(name))
        gpt2 = len(ranks) == 50256  # the file has the ranks alone, and this one's pattern is known
        return with_specials(Path(name).stem, gpt2_pattern() if gpt2 else PIECES, ranks)
    if Path(name).is_dir() or "/" in name:
        return Tokenizer.from_pretrained(name)
    try:
        known = tiktoken.get_encoding("r50k_base" if name == "gpt2" else name)
    except ValueError:
        raise SettingError(f"--tokenizer={name}: wanted bytes, bpe, gpt2, a .tiktoken file, a Hugging "
                           f"Face folder, or one of {', '.join(tiktoken.list_encoding_names())}") from None
    except Exception as error:  # whatever the network does; tiktoken passes on what its HTTP client raises
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"--tokenizer={name}: tiktoken cannot download it ({reason}): set TIKTOKEN_CACHE_DIR "
                        "to a folder that has it, or use --tokenizer=bpe") from None
    ranks = sorted(known._mergeable_ranks, key=known._mergeable_ranks.get)
    return Tokenizer(name, known._pat_str, ranks, {**known._special_tokens, MASK: known.n_vocab})


def with_specials(kind: str, pattern: str, ranks: list[bytes]) -> Tokenizer:
    return Tokenizer(kind, pattern, ranks, {EOT: len(ranks), MASK: len(ranks) + 1})


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a .tiktoken file, in the order of their ranks."""
    try:
        lines = path.read_text(encoding="ascii").split("\n")
        pairs = [line.split() for line in lines if line]
        return [base64.b64decode(token) for token, _ in sorted(pairs, key=lambda pair: int(pair[1]))]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a file of BPE ranks: {error}") from None


def gpt2_pattern() -> str:
    from tiktoken_ext.openai_public import r50k_pat_str
    return r50k_pat_str


# -----------------------------------------------------------------------------
# A large text, as a stream of (text, does it end a document?)

UNIT = 2**19  # characters tokenized at a time, by one thread


# Between a letter and one of these all patterns cut: a long text gives the same tokens in pieces.
SAFE = re.compile(r"[^\W\d_](?=[ \n,.，。、])")


def read_texts(path: Path, spans: np.ndarray, whole: bool, tick: Callable) -> Iterator[tuple[str, bool]]:
    """What lies in a file at `spans`, (texts, 2), in bytes; a long one in pieces, or `whole`. tick(bytes)."""
    with open(path, "rb") as f:
        for start, end in zip(memoryview(spans[:, 0].copy()), memoryview(spans[:, 1].copy())):
            f.seek(start)
            rest, decoder = "", codecs.getincrementaldecoder("utf-8")()
            while start < end:
                data = f.read(min(8 * UNIT, end - start))
                start += len(data)
                tick(len(data))
                text = rest + decoder.decode(data)
                at = len(text)
                if start < end and whole:
                    at = 0
                elif start < end and at < 128 * UNIT:
                    at = max((place.end() for place in SAFE.finditer(text, max(at - 4096, 0))), default=0)
                if at:
                    yield text[:at], start == end
                rest = text[at:]


def encode_stream(tokenizer: "Tokenizer | HubTokenizer", texts: Iterable[tuple[str, bool]],
                  threads: int) -> Iterator[np.ndarray]:
    """Ids in the order of the text, with a few UNITs in memory."""
    waiting = deque()
    with ThreadPoolExecutor(threads) as pool:
        for unit in units(texts):
            waiting.append(pool.submit(tokenizer.encode_documents, *zip(*unit)))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def units(texts: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Short texts together, so that a thread has something to do."""
    unit, size = [], 0
    for text in texts:
        unit.append(text)
        size += len(text[0])
        if size >= UNIT:
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
    import regex  # comes with tiktoken; Python's own re has no \p{L}
    pieces = Counter()
    find = regex.compile(PIECES).findall
    for text in texts:
        pieces.update(find(text))
    pairs = Pairs(pieces, max(n_tokens, 256))
    tokens = list(BYTES)
    while len(tokens) < n_tokens:
        pair = pairs.most_frequent()
        if pair is None:
            break
        pairs.merge(*pair, new=len(tokens))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return tokens


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
        self.token = np.frombuffer(b"".join(words), dtype=np.uint8).astype(np.int64)  # at each place
        self.weight = np.repeat(np.array(list(pieces.values())), lengths)  # how often its piece comes
        self.after = np.arange(1, n + 1)  # the place of the next token in the piece; -1: none
        self.before = np.arange(-1, n - 1)
        ends = lengths.cumsum()
        self.after[ends - 1] = self.before[ends - lengths] = -1
        self.n_tokens = n_tokens  # a pair is one number, left * n_tokens + right
        self.count, self.places, self.heap = {}, {}, []
        self.add(np.flatnonzero(self.after >= 0))

    def at(self, places: np.ndarray) -> np.ndarray:
        """The pairs that begin at these places."""
        return self.token[places] * self.n_tokens + self.token[self.after[places]]

    def add(self, places: np.ndarray) -> None:
        """Count the pairs that begin at these places, new ones all."""
        if not len(places):
            return
        pairs = self.at(places)
        order = np.argsort(pairs, kind="stable")
        places, pairs = places[order], pairs[order]
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
