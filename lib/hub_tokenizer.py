"""
The tokenizers of Hugging Face models, with the methods of lib.tokenizer.Tokenizer: read from the files that
were published, and written as transformers reads them.

    tokenizer = Tokenizer.from_pretrained("Qwen/Qwen3-0.6B")
    tokenizer.save_pretrained("out/exported", context=1024)
"""
import functools
import importlib.util
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from config import UserError
from lib.hub import folder_of
from lib.tokenizer import EOT, HARD, MARKS, MASK, UNIT, Tokenizer, same_ids, with_ends


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


# -----------------------------------------------------------------------------
# As transformers' AutoTokenizer reads them

def export(tokenizer: Tokenizer, folder: str | Path, context: int) -> None:
    """tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads."""
    symbol = byte_symbols()
    name = {token: "".join(symbol[byte] for byte in token) for token in tokenizer.ranks if token}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    # {1,3}+ is possessive to tiktoken, but to the library that reads this a repetition of a repetition
    pattern = re.sub(r"((?:\\p\{\w+\}|\[[^]]*\]|\\?.)\{\d+,\d*\})\+", r"(?>\1)", tokenizer.pattern)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    vocab = {name[token]: i for i, token in enumerate(tokenizer.ranks) if token} | tokenizer.specials
    merges = [[name[a], name[b]] for a, b in merges_of(tokenizer.ranks)]
    roles = {"eos_token": EOT, "bos_token": EOT, "pad_token": EOT, "mask_token": MASK}
    write_hf_tokenizer(folder, context, roles, {}, {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added(tokenizer.specials),
        "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True}})
    if importlib.util.find_spec("tokenizers"):
        same_ids(read_hub_tokenizer(folder), tokenizer.encode, folder)
    else:
        print(f"{folder}: the exported tokenizer is not checked: pip install tokenizers")


def merges_of(ranks: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """All ways to make a token of two others, the older tokens first: tiktoken takes any."""
    known = set(ranks) - {b""}
    for token in ranks:
        for i in range(1, len(token)):
            if token[:i] in known and token[i:] in known:
                yield token[:i], token[i:]


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
