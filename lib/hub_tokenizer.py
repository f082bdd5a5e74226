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
from lib.hub import folder_of, read_json
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
        except Exception as error:  # the library has no kind of its own
            raise UserError(f"tokenizer.json: cannot be read: {error}") from None
        self.json, self.roles, self.config = json_text, roles, config or {}
        self.fast.no_padding()
        self.fast.no_truncation()
        if getattr(self.fast.model, "dropout", None):  # for training: a text would have other ids each time
            self.fast.model.dropout = None
        vocab = self.fast.get_vocab(with_added_tokens=True)
        if len(set(vocab.values())) < len(vocab):
            raise UserError("tokenizer.json: two tokens have the same id")
        self.vocab_size = max(vocab.values()) + 1
        have = {token.content for token in self.fast.get_added_tokens_decoder().values()}
        special = {role: vocab[token] for role, token in roles.items() if token in vocab}
        self.fast.add_special_tokens(sorted({roles[role] for role in special} - have))
        added = self.fast.get_added_tokens_decoder().items()
        self.specials = {token.content: i for i, token in added if token.special}
        self.eot = special.get("eos_token", special.get("sep_token"))
        if self.eot is None:
            raise UserError("tokenizer_config.json: names neither an eos_token nor a sep_token")
        self.mask, self.pad = special.get("mask_token"), special.get("pad_token", self.eot)
        self.ends = {self.eot, *ends}
        self.read_decoder(json.loads(json_text), vocab)
        self.check()
        self.read_template()

    def read_decoder(self, stored: dict, vocab: dict[str, int]) -> None:
        """How a token's name becomes its text."""
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

    def check(self) -> None:
        """Raises UserError if a hard text is decoded otherwise than by the library."""
        for text in HARD:
            ids = self.encode(text)
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
        found = [self.own_bytes(i) for i in range(self.vocab_size)]
        for i, token in self.fast.get_added_tokens_decoder().items():
            found[i] = b"" if token.special else token.content.encode()
        if self.unknown is not None:
            found[self.unknown] = b""
        return found

    def own_bytes(self, i: int) -> bytes:
        token = self.fast.id_to_token(i)
        if self.spaced and token is not None:
            return token.removeprefix(self.continuing).encode()
        return self.said(i)

    def byte_lengths(self, ids: np.ndarray, size: int | None) -> np.ndarray | None:
        """What it puts before a text, a space for one, is taken off at the end of the text before that."""
        lengths = super().byte_lengths(ids, size)
        own = self.encode(self.probe)
        lengths[self.eot] = len(self.probe.encode()) - lengths[own].sum()
        found = 0 if len(ids) and ids[-1] == self.eot else lengths[self.eot]
        for i in range(0, len(ids), UNIT):
            found += lengths[ids[i:i + UNIT]].sum()
        return lengths if found == size else None

    def encode(self, text: str, specials: bool = False) -> list[int]:
        self.fast.encode_special_tokens = not specials
        return self.fast.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        self.fast.encode_special_tokens = True
        found = self.fast.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in found]

    def encode_documents(self, texts: list[str], ends: list[bool], lost: Counter | None = None) -> np.ndarray:
        if lost is None or self.byte and not self.missing:
            return with_ends(self.encode_batch(texts), ends, self.eot)
        self.fast.encode_special_tokens = True
        found = self.fast.encode_batch(texts, add_special_tokens=False)  # slower, with offsets
        for text, one in zip(texts, found):
            lost.update(self.lost(text, one))
        return with_ends([np.array(one.ids, np.uint32) for one in found], ends, self.eot)

    def lost(self, text: str, found) -> Counter:
        """How often each character comes that ends in no id, or in the unknown one alone.

        White space does not count, nor what the tokenizer's own normalizer takes out. found: what the
        library made of the text.
        """
        if self.by_sign:
            signs = {c: set(c.encode("utf-8", "replace")) for c in set(text)}
            return Counter({c: text.count(c) for c, its in signs.items() if its & self.missing})
        spans = np.array(found.offsets, dtype=np.int64).reshape(-1, 2)
        unknown = -1 if self.unknown is None else self.unknown
        spans = spans[np.array(found.ids, dtype=np.int64) != unknown]
        begun, ended = (np.bincount(edge, minlength=len(text) + 1) for edge in spans.T)
        left = Counter(text[i] for i in np.flatnonzero((begun - ended).cumsum()[:-1] <= 0))
        return Counter({c: n for c, n in left.items() if self.normalized(c).strip(" \u2581")})

    def normalized(self, text: str) -> str:
        normalizer = self.fast.normalizer
        return normalizer.normalize_str(text) if normalizer else text

    def changes(self) -> list[str]:
        """What its normalizer changes and its words leave out, by examples: 'A' -> 'a'."""
        pairs = [(text, self.normalized(text).strip("\u2581 ")) for text in ("A", "é", "e\u0301", "ﬁ")]
        for text in ("a  b", "a\nb", "a\tb", " a"):
            text = text.replace("a", self.probe).replace("b", self.probe)
            pairs.append((text, self.decode(self.encode(text))))
        return [f"{text!r} -> {got!r}" for text, got in pairs if text != got]

    @functools.cached_property
    def safe(self) -> re.Pattern | None:
        """Where a long text may be cut: no token goes across, as tried on hard texts; None: nowhere."""
        names = "" if self.by_sign else "\0".join(self.fast.get_vocab()).replace("\u2581", " ")
        across = set(re.findall(r"(?<=[^\W\d_])[^\w\0]", names))
        marks = "".join(mark for mark in MARKS if mark not in across and self.cuts_before(mark))
        return re.compile(rf"[^\W\d_](?=[{marks}])") if marks else None

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
        as_bert = "cls_token" in self.roles and any(segment for _, segment, _ in self.templates[1])
        if as_bert and "tokenizer_class" not in config:  # a class knows what it feeds
            config = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"], **config}
        write(folder, context, self.roles, config, json.loads(self.json))


def need_tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise UserError("a Hugging Face tokenizer needs a package: pip install tokenizers") from None
    return tokenizers


# -----------------------------------------------------------------------------
# The files of a Hugging Face folder

FACTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json",
         "generation_config.json")

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

# What is built here from older files: a class of transformers, its family, file, pattern and normalizer
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+")
BUILT = {
    "BertTokenizer": ("BERT", "vocab.txt", None, None),
    "DistilBertTokenizer": ("BERT", "vocab.txt", None, None),
    "ElectraTokenizer": ("BERT", "vocab.txt", None, None),
    "GPT2Tokenizer": ("GPT-2", "merges.txt", None, None),
    "Qwen2Tokenizer": ("GPT-2", "merges.txt", QWEN, {"type": "NFC"}),
    "RobertaTokenizer": ("RoBERTa", "merges.txt", None, None)}

# The class of a model whose files do not name it
CLASS_OF = {
    "bert": "BertTokenizer", "distilbert": "BertTokenizer", "electra": "BertTokenizer",
    "roberta": "RobertaTokenizer", "xlm-roberta": "XLMRobertaTokenizer", "t5": "T5Tokenizer",
    "gpt2": "GPT2Tokenizer", "llama": "LlamaTokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}


def read_hub_tokenizer(path: str | Path) -> HubTokenizer:
    """Of a folder or an id on the hub: tokenizer.json, or what older folders have. Raises UserError.

    The roles of special tokens are read from tokenizer_config.json, else special_tokens_map.json; if neither
    names an end, they are those of the family that the vocabulary is of, else the ids in
    generation_config.json, config.json.
    """
    try:
        folder = folder_of(path, weights=False)
        facts = {name: read_json(folder / name) for name in FACTS}
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None
    config = facts["tokenizer_config.json"]
    if config.get("kind") == "chars":  # an export of ours
        return Tokenizer.from_dict(config)
    named = {**named_in(facts["special_tokens_map.json"]), **named_in(config)}
    roles = {role: token for role, token in named.items() if token}
    try:
        file = folder / "tokenizer.json"
        if file.is_file():
            text = as_configured(path, file.read_text(encoding="utf-8"), {**facts["config.json"], **config})
        else:
            text = built(path, folder, facts, roles)
        text, vocab = with_added(path, text, facts)
    except UserError:
        raise
    except Exception as error:  # the library has no kind of its own
        raise UserError(f"{path}: tokenizer cannot be read: {error}") from None
    id_files = facts["generation_config.json"], facts["config.json"]
    if not {"eos_token", "sep_token"} & set(roles):
        family = next((one for one in FAMILIES if vocab.keys() >= set(FAMILIES[one].values())), None)
        if family:
            print(f"{path}: its files name no special tokens: those of {family}")
        roles = {**(FAMILIES[family] if family else named_by_ids(id_files, vocab)), **roles}
    known = set(vocab.values())
    ends = [i for file in id_files for i in ids_of(file, "eos") if i in known]
    ends += [vocab[token] for token in TURN_ENDS if token in vocab]
    kept = {name: value for name, value in config.items()  # with the roles that are none
            if name != "added_tokens_decoder" and (name not in named or value is None)}
    template = folder / "chat_template.jinja"
    if template.is_file():
        kept["chat_template"] = template.read_text(encoding="utf-8")
    return HubTokenizer(text, roles, ends, kept)


def named_in(facts: dict) -> dict[str, str | None]:
    """eos_token and so on: the token, or None."""
    found = {}
    for role, token in facts.items():
        token = token.get("content") if isinstance(token, dict) else token
        if role.endswith("_token") and (token is None or isinstance(token, str)):
            found[role] = token
    return found


def named_by_ids(files: Iterable[dict], vocab: dict[str, int]) -> dict[str, str]:
    """By eos_token_id and so on, in the first file that has it."""
    token_of, found = {i: token for token, i in vocab.items()}, {}
    for facts in files:
        for role in ("bos", "eos", "pad"):
            for i in ids_of(facts, role)[:1]:
                if i in token_of:
                    found.setdefault(f"{role}_token", token_of[i])
    return found


def ids_of(facts: dict, role: str) -> list[int]:
    found = facts.get(f"{role}_token_id")
    return [i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int)]


def bert_normalizer(config: dict) -> dict:
    return {"type": "BertNormalizer", "clean_text": True,
            "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
            "strip_accents": config.get("strip_accents"), "lowercase": config.get("do_lower_case", True)}


def as_configured(path: str | Path, text: str, config: dict) -> str:
    """tokenizer.json with the normalizer that BERT's class makes, which tokenizer_config.json alone tells."""
    content, kind = json.loads(text), config.get("tokenizer_class") or config.get("model_type")
    normalizer, wanted = content.get("normalizer") or {}, bert_normalizer(config)
    if "bert" not in str(kind).lower() or normalizer.get("type") != wanted["type"] or normalizer == wanted:
        return text
    differ = [f"{name}={value}" for name, value in wanted.items() if normalizer.get(name) != value]
    print(f"{path}: {', '.join(differ)}: by tokenizer_config.json, not as tokenizer.json says")
    return json.dumps({**content, "normalizer": wanted}, ensure_ascii=False)


def with_added(path: str | Path, text: str, facts: dict[str, dict]) -> tuple[str, dict[str, int]]:
    """A tokenizer.json with the tokens that only other files add to it; and its vocabulary."""
    tokenizers = need_tokenizers()
    fast = tokenizers.Tokenizer.from_str(text)
    vocab = fast.get_vocab(with_added_tokens=True)
    more = facts["tokenizer_config.json"].get("added_tokens_decoder")
    if not more:  # as of old
        more = {i: {"content": token, "special": True} for token, i in facts["added_tokens.json"].items()}
    have = {token.content for token in fast.get_added_tokens_decoder().values()}
    lacking = [i for i in sorted(more, key=int) if more[i]["content"] not in have]
    if not lacking:
        return text, vocab
    for i in lacking:
        flags = {name: value for name, value in more[i].items() if name != "__type"}
        fast.add_tokens([tokenizers.AddedToken(**flags)])
        token = flags["content"]
        if token not in vocab and fast.token_to_id(token) != int(i):
            raise UserError(f"{path}: its files add {token!r} as id {i}, but {fast.token_to_id(token)} is "
                            "the next that is free")
    return fast.to_str(), fast.get_vocab(with_added_tokens=True)


def class_of(path: str | Path, folder: Path, facts: dict[str, dict]) -> str:
    """The class of transformers that reads a folder without a tokenizer.json."""
    for name in ("tokenizer_config.json", "config.json"):
        named = facts[name].get("tokenizer_class")
        if named:
            return str(named).removesuffix("Fast")
    kind = facts["config.json"].get("model_type")
    if kind and kind not in CLASS_OF:
        raise UserError(f"{path}: has no tokenizer.json, and which tokenizer goes with model_type={kind} is "
                        "not known here: tokenizer_class in tokenizer_config.json would say it")
    guess = CLASS_OF.get(kind)
    if guess and (guess not in BUILT or (folder / BUILT[guess][1]).is_file()):
        return guess
    if (folder / "vocab.txt").is_file():
        guess = "BertTokenizer"
    elif (folder / "merges.txt").is_file():
        guess = "RobertaTokenizer" if "<mask>" in read_json(folder / "vocab.json") else "GPT2Tokenizer"
    else:
        raise UserError(f"{path}: has no tokenizer.json, no vocab.txt and no merges.txt, and its "
                        "tokenizer_config.json names no tokenizer_class that would say what else it has")
    print(f"{path}: names no tokenizer_class: read as a {guess}")
    return guess


def built(path: str | Path, folder: Path, facts: dict[str, dict], roles: dict) -> str:
    """tokenizer.json for a folder that has only older files."""
    config, name = facts["tokenizer_config.json"], class_of(path, folder, facts)
    family, file, pattern, normalizer = BUILT.get(name, ("", "", None, None))
    more = config.get("add_bos_token") or config.get("add_eos_token")
    if not family or more or not (folder / file).is_file():
        return converted(path, folder, name, config, roles)
    roles = {**FAMILIES[family], **roles}
    lines = (folder / file).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    space = config.get("add_prefix_space", False)
    if family == "BERT":
        vocab = {token: i for i, token in enumerate(lines)}
        parts = word_pieces(vocab, roles["unk_token"], config)
        around = {"type": "BertProcessing"}
    else:
        vocab = read_json(folder / "vocab.json")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        model = {"type": "BPE", "vocab": vocab, "merges": merges}
        parts = {"model": model, "normalizer": normalizer, **by_bytes(pattern, space)}
        around = {"type": "RobertaProcessing", "trim_offsets": True, "add_prefix_space": space}
    if "cls_token" in FAMILIES[family]:
        cls, sep = roles["cls_token"], roles["sep_token"]
        parts["post_processor"] = {**around, "cls": [cls, vocab.get(cls)], "sep": [sep, vocab.get(sep)]}
    specials = {token: vocab[token] for token in roles.values() if token in vocab}
    return json.dumps(tokenizer_json(specials, parts))


def word_pieces(vocab: dict[str, int], unknown: str, config: dict) -> dict:
    """BERT's cuts and words."""
    return {
        "normalizer": bert_normalizer(config),
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab}}


def tokenizer_json(specials: dict[str, int], parts: dict) -> dict:
    """A mask takes the space before it, as RoBERTa's does."""
    flags = dict.fromkeys(("single_word", "rstrip", "normalized"), False)
    added = [{"id": i, "content": token, "lstrip": token == "<mask>", "special": True, **flags}
             for token, i in sorted(specials.items(), key=lambda pair: pair[1])]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "post_processor": None, **parts}


def by_bytes(pattern: str | None, space: bool = False) -> dict:
    """How a text is cut, by GPT-2's own pattern if none is given, and how its bytes are written."""
    level = {"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": True, "use_regex": not pattern}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    cut = {"type": "Sequence", "pretokenizers": [split, level]} if pattern else level
    return {"pre_tokenizer": cut, "decoder": level}


def converted(path: str | Path, folder: Path, name: str, config: dict, roles: dict) -> str:
    """tokenizer.json of other files, such as SentencePiece's, by the class of transformers that they name.

    roles: gains those that the class knows.
    """
    llama = name == "LlamaTokenizer"
    begin = {"add_bos_token": True} if llama and "add_bos_token" not in config else {}
    try:
        import transformers
        known = getattr(transformers, name, None) if name.endswith("Tokenizer") else None
        if known is None:
            raise ValueError(f"tokenizer_class={name} is known neither here nor to transformers")
        if not any((folder / file).is_file() for file in known.vocab_files_names.values()):
            raise ValueError(f"it has no file of a {name} ({', '.join(known.vocab_files_names.values())})")
        made = known.from_pretrained(folder, **begin)
        text = made.backend_tokenizer.to_str()
    except ImportError:
        raise UserError(f"{path}: has no tokenizer.json; other files of a {name} need: pip install "
                        "transformers sentencepiece protobuf") from None
    except Exception as error:  # of many kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: has no tokenizer.json, which would be read, and none can be made: "
                        f"{reason[:200]}") from None
    print(f"{path}: has no tokenizer.json: converted by transformers' {name}")
    roles |= {role: token for role, token in made.special_tokens_map.items()
              if isinstance(token, str) and role not in roles}
    if not llama or config.get("legacy") is False or config.get("add_prefix_space") is False:
        return text
    # a space before all, even before spaces, as in SentencePiece and the files that Llama came with
    spaces = [{"type": "Prepend", "prepend": "\u2581"},
              {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    spaces = {"type": "Sequence", "normalizers": spaces}
    return json.dumps({**json.loads(text), "normalizer": spaces, "pre_tokenizer": None})


# -----------------------------------------------------------------------------
# As transformers' AutoTokenizer reads them

def export(tokenizer: Tokenizer, folder: str | Path, context: int) -> None:
    """A tokenizer of ours."""
    symbol = byte_symbols()
    name = {token: "".join(symbol[byte] for byte in token) for token in tokenizer.ranks if token}
    # {1,3}+ is possessive to tiktoken, but to the library that reads this a repetition of a repetition
    pattern = re.sub(r"((?:\\p\{\w+\}|\[[^]]*\]|\\?.)\{\d+,\d*\})\+", r"(?>\1)", tokenizer.pattern)
    vocab = {name[token]: i for i, token in enumerate(tokenizer.ranks) if token} | tokenizer.specials
    merges = [[name[a], name[b]] for a, b in merges_of(tokenizer.ranks)]
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True}
    roles = {"eos_token": EOT, "bos_token": EOT, "pad_token": EOT}
    roles |= {} if tokenizer.mask is None else {"mask_token": MASK}
    write(folder, context, roles, {},
          tokenizer_json(tokenizer.specials, {**by_bytes(pattern), "model": model}))
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


def write(folder: str | Path, context: int, roles: dict, config: dict, tokenizer: dict) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config,
              "model_max_length": context, **roles}
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (Path(folder) / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def byte_symbols() -> dict[int, str]:
    """The character by which Hugging Face's byte-level files write each byte (GPT-2's): a visible one."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(others)}
