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
from lib.hub import folder_of, read_json, say
from lib.tokenizer import EOT, HARD, MARKS, MASK, UNIT, Tokenizer, of_gpt2, same_ids, with_ends


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
        self.json, self.roles, self.config, self.lost = json_text, roles, config or {}, Counter()
        try:
            self.fast = need_tokenizers().Tokenizer.from_str(json_text)
        except Exception as error:  # the library has no kind of its own
            raise UserError(f"tokenizer.json: cannot be read: {error}") from None
        self.fast.no_padding()
        self.fast.no_truncation()
        if getattr(self.fast.model, "dropout", None):  # for training: a text would have other ids each time
            self.fast.model.dropout = None
        vocab = self.fast.get_vocab(with_added_tokens=True)
        if len(set(vocab.values())) < len(vocab):
            raise UserError("tokenizer.json: two tokens have the same id")
        self.vocab_size = max(vocab.values()) + 1
        special = {role: vocab[token] for role, token in roles.items() if token in vocab}
        have = {token.content for token in self.fast.get_added_tokens_decoder().values()}
        self.fast.add_special_tokens(sorted({roles[role] for role in special} - have))
        added = self.fast.get_added_tokens_decoder().items()
        self.specials = {token.content: i for i, token in added if token.special}
        self.eot = special.get("eos_token", special.get("sep_token"))
        if self.eot is None:
            raise UserError("tokenizer_config.json: names neither an eos_token nor a sep_token")
        self.mask, self.pad = special.get("mask_token"), special.get("pad_token", self.eot)
        self.ends = {self.eot, *ends}
        self.said = functools.cache(self.decoded_token)
        self.read_decoder(json.loads(json_text), vocab)
        self.check()
        self.read_template()

    def read_decoder(self, stored: dict, vocab: dict[str, int]) -> None:
        """How a token's name becomes its text, and whether any text is lost."""
        decoder, model = stored.get("decoder") or {}, stored["model"]
        steps = {step["type"] for step in [decoder, *decoder.get("decoders", ())] if step}
        self.by_sign = "ByteLevel" in steps  # each byte has a sign; else some tokens are one byte
        self.byte = {}  # name of a byte, or sign for it -> the byte
        if self.by_sign:
            self.byte = {sign: i for i, sign in byte_symbols().items()}
        elif "ByteFallback" in steps:
            self.byte = {f"<0x{i:02X}>": i for i in range(256)}
        self.missing = {i for name, i in self.byte.items() if name not in vocab}  # bytes without a token
        falls_back = self.by_sign or model.get("byte_fallback")
        self.lossless = bool(falls_back and self.byte) and not self.missing
        self.spaced = not decoder or "WordPiece" in steps  # by the decoder
        self.continuing = decoder.get("prefix", "") if "WordPiece" in steps else ""
        unknown = model.get("unk_token")
        self.unknown = vocab.get(unknown) if unknown is not None else model.get("unk_id")
        self.removes = '"Removed"' in self.json  # cuts that are no part of any token

    def check(self) -> None:
        """Raises UserError if a hard text is decoded otherwise than by the library."""
        for text in HARD:
            ids = self.read(text).ids
            theirs = self.fast.decode(ids, skip_special_tokens=False)
            if theirs != self.decode(ids) and "\ufffd" not in theirs:
                raise UserError(f"tokenizer.json: its decoder is of a kind that is not known here: {text!r} "
                                f"comes back as {self.decode(ids)!r}, for {theirs!r}")

    def read_template(self) -> None:
        """Where its own specials go around one text and around two: None stands for the text."""
        tokens = (self.said(i).decode("utf-8", "ignore").strip() for i in range(self.vocab_size))
        for self.probe in itertools.chain("a的", tokens):
            if self.probe and self.decode(self.read(self.probe).ids).strip() == self.probe:
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

    # Ids to text

    def decoded_token(self, i: int, first: bool = False) -> bytes:
        token = self.fast.id_to_token(i) if i >= 0 else None
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
        found = [self.said(i) for i in range(self.vocab_size)]
        if self.spaced:
            for token, i in self.fast.get_vocab().items():
                found[i] = token.removeprefix(self.continuing).encode()
        for i, token in self.fast.get_added_tokens_decoder().items():
            found[i] = b"" if token.special else token.content.encode()
        if self.unknown is not None:
            found[self.unknown] = b""
        return found

    def byte_lengths(self, ids: np.ndarray, size: int | None) -> np.ndarray | None:
        """What it puts before a text, a space for one, is taken off at the end of the text before that."""
        lengths = super().byte_lengths(ids, size)
        lengths[self.eot] = len(self.probe.encode()) - lengths[self.read(self.probe).ids].sum()
        found = 0 if len(ids) and ids[-1] == self.eot else lengths[self.eot]
        for i in range(0, len(ids), UNIT):
            found += lengths[ids[i:i + UNIT]].sum()
        return lengths if found == size else None

    # Text to ids

    def read(self, text: str, specials: bool = False):
        """What the library makes of a text: ids, and where in it each is."""
        self.fast.encode_special_tokens = not specials
        return self.fast.encode(whole(text), add_special_tokens=False)

    def counted(self, text: str, specials: bool = False):
        """The same, and what is lost of it is counted."""
        found = self.read(text, specials)
        self.lost.update(self.lost_of(text, found))
        return found

    def encode(self, text: str, specials: bool = False) -> list[int]:
        return self.counted(text, specials).ids

    def encode_batch(self, texts: list[str], lost: Counter | None = None) -> list[np.ndarray]:
        self.fast.encode_special_tokens = True
        encode = self.fast.encode_batch_fast if self.lossless else self.fast.encode_batch  # with places
        found = encode(list(map(whole, texts)), add_special_tokens=False)
        lost = self.lost if lost is None else lost
        for text, one in zip(texts, found):
            lost.update(self.lost_of(text, one))
        return [np.array(one.ids, np.uint32) for one in found]

    def encode_documents(self, texts: list[str], ends: list[bool], lost: Counter | None = None) -> np.ndarray:
        return with_ends(self.encode_batch(texts, lost), ends, self.eot)

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self.counted(text)
        return found.ids, found.offsets

    def lost_of(self, text: str, found) -> dict[str, int]:
        """How often each character comes that ends in no id, or in the unknown one alone.

        White space does not count, nor what the tokenizer's own normalizer takes out.
        """
        if self.lossless or not (self.unknown in found.ids or self.unknown is None or self.removes):
            return {}
        if self.by_sign:
            return {c: text.count(c) for c in set(text)
                    if self.missing.intersection(c.encode("utf-8", "replace"))}
        spans = np.array(found.offsets, dtype=np.int64).reshape(-1, 2)
        spans = spans[[i != self.unknown for i in found.ids]]
        begun, ended = (np.bincount(edge, minlength=len(text) + 1) for edge in spans.T)
        left = Counter(text[i] for i in np.flatnonzero((begun - ended).cumsum()[:-1] <= 0))
        return {c: n for c, n in left.items() if self.normalized(c).strip(" \u2581")}

    def normalized(self, text: str) -> str:
        return self.fast.normalizer.normalize_str(text) if self.fast.normalizer else text

    def changes(self) -> list[str]:
        """What its normalizer changes and its words leave out, by examples: 'A' -> 'a'."""
        pairs = [(text, self.normalized(text).strip("\u2581 ")) for text in ("A", "é", "e\u0301", "ﬁ")]
        for text in ("a  b", "a\nb", "a\tb", " a"):
            text = text.replace("a", self.probe).replace("b", self.probe)
            pairs.append((text, self.decode(self.read(text).ids)))
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
                if self.read(a).ids + self.read(b).ids != self.read(a + b).ids:
                    return False
        return True

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

    def save_pretrained(self, folder: str | Path, context: int, of_two: bool = True) -> None:
        """of_two: the model has vectors for the tokens of a first and of a second text."""
        config = self.config
        as_bert = "cls_token" in self.roles and any(segment for _, segment, _ in self.templates[1])
        if as_bert and not of_two:  # whatever its class feeds: GPT2Model would add vectors of tokens
            config = {**config, "model_input_names": ["input_ids", "attention_mask"]}
        elif as_bert and "tokenizer_class" not in config:  # a class knows what it feeds
            config = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"], **config}
        write(folder, context, self.roles, config, json.loads(self.json))


def whole(text: str) -> str:
    """With a question mark for half a character, which the library refuses."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


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

# What families call their special tokens: for files that do not, the first row that the vocabulary has whole
SPECIALS = {
    "BERT": {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]",
             "unk_token": "[UNK]"},
    "RoBERTa": {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>",
                "mask_token": "<mask>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "Llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT-2": {"bos_token": EOT, "eos_token": EOT, "unk_token": EOT}}

# These end what a chat model says, whatever its files name
TURN_ENDS = (EOT, "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>",
             "<|assistant_end|>")

# What is built here from older files: a class of transformers, its family and file
BUILT = {
    "BertTokenizer": ("BERT", "vocab.txt"), "DistilBertTokenizer": ("BERT", "vocab.txt"),
    "ElectraTokenizer": ("BERT", "vocab.txt"), "GPT2Tokenizer": ("GPT-2", "merges.txt"),
    "RobertaTokenizer": ("RoBERTa", "merges.txt")}

# The class of a model whose files do not name it
CLASS_OF = {
    "bert": "BertTokenizer", "distilbert": "BertTokenizer", "electra": "BertTokenizer",
    "roberta": "RobertaTokenizer", "xlm-roberta": "XLMRobertaTokenizer", "t5": "T5Tokenizer",
    "gpt2": "GPT2Tokenizer", "llama": "LlamaTokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}


def read_hub_tokenizer(path: str | Path) -> Tokenizer:
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
    size, files = facts["config.json"].get("vocab_size"), ("tokenizer.json", "vocab.json", "merges.txt")
    if CLASS_OF.get(facts["config.json"].get("model_type")) == "GPT2Tokenizer" and size == 50257:
        if not any((folder / file).is_file() for file in files):  # what loading its weights alone leaves
            say(f"{path}: brings no tokenizer: read with GPT-2's")
            return of_gpt2(size)
    named = named_in(facts["special_tokens_map.json"]) | named_in(config)
    roles = {role: token for role, token in named.items() if token}
    try:
        if (folder / "tokenizer.json").is_file():
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
            text = as_configured(path, text, facts["config.json"] | config)
        else:
            text = built(path, folder, facts, roles)
        text, vocab = with_added(path, text, facts)
    except UserError:
        raise
    except Exception as error:  # the library has no kind of its own
        raise UserError(f"{path}: tokenizer cannot be read: {error}") from None
    token_of, by_ids = {i: token for token, i in vocab.items()}, {}
    ends = [vocab[token] for token in TURN_ENDS if token in vocab]
    for file in (facts["config.json"], facts["generation_config.json"]):  # the second counts more
        for role in ("bos_token", "eos_token", "pad_token"):
            ids = [i for i in ids_of(file, role) if i in token_of]
            by_ids |= {role: token_of[i] for i in ids[:1]}
            ends += ids if role == "eos_token" else []
    if not {"eos_token", "sep_token"} & set(roles):
        family = next((one for one in SPECIALS if vocab.keys() >= set(SPECIALS[one].values())), None)
        if family:
            say(f"{path}: its files name no special tokens: those of {family}")
        roles = SPECIALS.get(family, by_ids) | roles
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


def ids_of(facts: dict, role: str) -> list[int]:
    """An eos_token_id and so on is a number, or several."""
    found = facts.get(f"{role}_id")
    return [i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int)]


def bert_normalizer(config: dict) -> dict:
    return {"type": "BertNormalizer", "clean_text": True,
            "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
            "strip_accents": config.get("strip_accents"), "lowercase": config.get("do_lower_case", True)}


def llama_spaces(config: dict) -> dict:
    """Where LlamaTokenizer puts a space that is not in the text, since transformers 5."""
    before = config.get("add_prefix_space") in (None, True)
    scheme = "never" if not before else "always" if config.get("legacy") else "first"
    back = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]
    back += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * before
    return {"normalizer": None, "decoder": {"type": "Sequence", "decoders": back}, "pre_tokenizer": {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}}


def as_configured(path: str | Path, text: str, config: dict) -> str:
    """tokenizer.json with the parts that BERT's and Llama's classes make themselves, whatever it says.

    config: of tokenizer_config.json, and of config.json.
    """
    content, kind = json.loads(text), str(config.get("tokenizer_class") or config.get("model_type"))
    wanted = {}
    if "bert" in kind.lower() and (content.get("normalizer") or {}).get("type") == "BertNormalizer":
        wanted = {"normalizer": bert_normalizer(config)}
    elif (kind.startswith("LlamaTokenizer") and config.get("model_type", "llama") == "llama"
          and content["model"].get("byte_fallback")):
        wanted = llama_spaces(config)
    differ = [part for part in wanted if content.get(part) != wanted[part]]
    if not differ:
        return text
    say(f"{path}: {', '.join(differ)}: by tokenizer_config.json, not as tokenizer.json says")
    return json.dumps(content | wanted, ensure_ascii=False)


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
    flags = [{name: value for name, value in more[i].items() if name != "__type"} for i in lacking]
    fast.add_tokens([tokenizers.AddedToken(**one) for one in flags])  # at once: each call goes over them all
    for i in lacking:
        token = more[i]["content"]
        if token not in vocab and fast.token_to_id(token) != int(i):
            raise UserError(f"{path}: its files add {token!r} as id {i}, but {fast.token_to_id(token)} is "
                            "the next that is free")
    return fast.to_str(), fast.get_vocab(with_added_tokens=True)


def class_of(path: str | Path, folder: Path, facts: dict[str, dict]) -> str:
    """The class of transformers that reads a folder without a tokenizer.json."""
    for name in ("tokenizer_config.json", "config.json"):
        if facts[name].get("tokenizer_class"):
            return str(facts[name]["tokenizer_class"]).removesuffix("Fast")
    kind = facts["config.json"].get("model_type")
    guess = CLASS_OF.get(kind)
    if kind and not guess:
        raise UserError(f"{path}: has no tokenizer.json, and which tokenizer goes with model_type={kind} is "
                        "not known here: tokenizer_class in tokenizer_config.json would say it")
    if guess and (guess not in BUILT or (folder / BUILT[guess][1]).is_file()):
        return guess
    if (folder / "vocab.txt").is_file():
        guess = "BertTokenizer"
    elif (folder / "merges.txt").is_file():
        guess = "RobertaTokenizer" if "<mask>" in read_json(folder / "vocab.json") else "GPT2Tokenizer"
    else:
        raise UserError(f"{path}: has no tokenizer.json, no vocab.txt and no merges.txt, and its "
                        "tokenizer_config.json names no tokenizer_class that would say what else it has")
    say(f"{path}: names no tokenizer_class: read as a {guess}")
    return guess


def built(path: str | Path, folder: Path, facts: dict[str, dict], roles: dict) -> str:
    """tokenizer.json for a folder that has only older files. roles: gains those that a class knows."""
    config, name = facts["tokenizer_config.json"], class_of(path, folder, facts)
    family, file = BUILT.get(name, ("", ""))
    more = any(config.get(f"add_{what}") for what in ("bos_token", "eos_token", "prefix_space"))
    if not family or more or not (folder / file).is_file():
        return converted(path, folder, name, config, roles)
    token = SPECIALS[family] | roles
    lines = (folder / file).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if family == "BERT":
        vocab = {piece: i for i, piece in enumerate(lines)}
        around = {"type": "BertProcessing"}
        parts = {
            "normalizer": bert_normalizer(config), "pre_tokenizer": {"type": "BertPreTokenizer"},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": {"type": "WordPiece", "unk_token": token["unk_token"], "vocab": vocab,
                      "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}}
    else:
        vocab = read_json(folder / "vocab.json")
        around = {"type": "RobertaProcessing", "trim_offsets": True, "add_prefix_space": False}
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        parts = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, **by_bytes()}
    if "cls_token" in SPECIALS[family]:
        cls, sep = token["cls_token"], token["sep_token"]
        parts["post_processor"] = {**around, "cls": [cls, vocab.get(cls)], "sep": [sep, vocab.get(sep)]}
    return json.dumps(tokenizer_json({one: vocab[one] for one in token.values() if one in vocab}, parts))


def converted(path: str | Path, folder: Path, name: str, config: dict, roles: dict) -> str:
    """tokenizer.json of other files, such as SentencePiece's, by the class of transformers that they name."""
    begin = {"add_bos_token": True} if name == "LlamaTokenizer" and "add_bos_token" not in config else {}
    try:
        import transformers
        known = getattr(transformers, name, None) if name.endswith("Tokenizer") else None
        if known is None:
            raise ValueError(f"tokenizer_class={name} is known neither here nor to transformers")
        if not any((folder / file).is_file() for file in known.vocab_files_names.values()):
            raise ValueError(f"it has no file of a {name} ({', '.join(known.vocab_files_names.values())})")
        made = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **begin)
    except ImportError:
        raise UserError(f"{path}: has no tokenizer.json; other files of a {name} need: pip install "
                        "transformers sentencepiece protobuf") from None
    except Exception as error:  # of many kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: has no tokenizer.json, which would be read, and none can be made: "
                        f"{reason[:200]}") from None
    say(f"{path}: has no tokenizer.json: converted by transformers' {name}")
    for role, token in made.special_tokens_map.items():
        if isinstance(token, str):
            roles.setdefault(role, token)
    return made.backend_tokenizer.to_str()


# -----------------------------------------------------------------------------
# Out: as transformers' AutoTokenizer reads them

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
        say(f"{folder}: the exported tokenizer is not checked: pip install tokenizers")


def tokenizer_json(specials: dict[str, int], parts: dict) -> dict:
    """A mask takes the space before it, as RoBERTa's does."""
    flags = dict.fromkeys(("single_word", "rstrip", "normalized"), False)
    added = [{"id": i, "content": token, "lstrip": token == "<mask>", "special": True, **flags}
             for token, i in sorted(specials.items(), key=lambda pair: pair[1])]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "post_processor": None, **parts}


def by_bytes(pattern: str = "") -> dict:
    """How a text is cut, by GPT-2's own pattern if none is given, and how its bytes are written."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not pattern}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    cut = {"type": "Sequence", "pretokenizers": [split, level]} if pattern else level
    return {"pre_tokenizer": cut, "decoder": level}


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
