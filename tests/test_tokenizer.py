"""Text to ids and back: no character is lost, whatever the kind of tokenizer."""
import base64
import functools
import itertools
import json
import os
import random
from collections import Counter

import numpy as np
import pytest
import regex

from config import UserError
from lib import bpe
from lib import tokenizer as tokenizer_file
from lib.hub_tokenizer import byte_symbols
from lib.bpe import BYTES, PIECES, train_bpe
from lib.tokenizer import EOT, HARD, MASK, Tokenizer, make_tokenizer, same_tokenizer
from tests.helpers import MIXED, ROOT

sentencepiece, tokenizers = pytest.importorskip("sentencepiece"), pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
LONG = 6000 if os.environ.get("SLOW") else 2000  # characters that are tried where trying takes long
UNSEEN = "\0 unseen: żółć 漢字 🚀\r\n\t "


def naive_bpe(text: str, n_tokens: int) -> list[bytes]:
    """The definition, slowly: count all pairs again for each merge."""
    words = [[bytes([byte]) for byte in piece.encode()] for piece in regex.findall(PIECES, text)]
    ranks = [bytes([i]) for i in range(256)]
    while len(ranks) < n_tokens:
        counts = {}
        for pair in itertools.chain.from_iterable(map(itertools.pairwise, words)):
            counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], *map(ranks.index, pair)), default=None)
        if best is None or counts[best] < 2:
            break
        ranks.append(best[0] + best[1])
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [ranks[-1]]
                i += 1
    return ranks


def test_bpe_equals_its_definition():
    text = (ROOT / "model.py").read_text(encoding="utf-8")[:LONG] + MIXED + "aaaaaaa abababab " * 5
    assert train_bpe([text], 400) == naive_bpe(text, 400)
    assert train_bpe(["abab"], 400) == naive_bpe("abab", 400) and len(train_bpe([], 400)) == 256
    some = np.random.default_rng(0).choice([*range(128), *b" \n\ta1." * 20], 10_000)  # any ASCII
    text = bytes(some.tolist()).decode()
    assert bpe.count_pieces([text]) == Counter(regex.findall(PIECES, text))


# -----------------------------------------------------------------------------
# Other people's tokenizers

SOURCE = (ROOT / "model.py").read_text(encoding="utf-8")[:20000] + MIXED


@functools.cache
def some_ranks() -> list[bytes]:
    """A small rank table of the text above."""
    return train_bpe([SOURCE], 500)


def openai(name: str, ranks: dict[bytes, int]):
    """tiktoken's own encoding with its published pattern and special tokens, on a small rank table."""
    import tiktoken
    known = tokenizer_file.published(name)
    known = {key: known[key] for key in ("name", "pat_str", "special_tokens")}
    return tiktoken.Encoding(**known, mergeable_ranks=ranks)


def of_the_hub(folder, model: dict, normalizer=None, pre_tokenizer=None, decoder=None, post_processor=None,
               special=("<s>", "</s>", "<unk>"), **roles):
    """A folder with a tokenizer.json. Returns it as `tokenizers` reads it."""
    content = {"version": "1.0", "truncation": None, "padding": None, "normalizer": normalizer,
               "pre_tokenizer": pre_tokenizer, "post_processor": post_processor, "decoder": decoder,
               "model": model, "added_tokens": []}
    fast = tokenizers.Tokenizer.from_str(json.dumps(content))
    fast.add_special_tokens(list(special))
    folder.mkdir(exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": special[1], **roles}))
    return fast


def letters(*more: str) -> list[str]:
    return sorted({c for c in SOURCE + "".join(HARD) if not c.isspace()} - {"\u2581"}) + list(more)


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LLAMA_DECODER = {"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
    {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
LLAMA_NORMALIZER = {"type": "Sequence", "normalizers": [
    {"type": "Prepend", "prepend": "\u2581"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}


def bytes_vocab(extra: list[str] = ()) -> dict:
    """A BPE of bytes, as signs, and three merges."""
    signs = [*byte_symbols().values()]
    merges = [["a", "b"], ["\u0120", "a"], ["1", "2"]]
    tokens = signs + ["".join(pair) for pair in merges] + list(extra)
    return {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}


def llama() -> dict:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += ["\u2581", *letters()[:120], "th", "\u2581th"]
    return {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "unk_token": "<unk>",
            "merges": [["t", "h"], ["\u2581", "th"]], "byte_fallback": True, "fuse_unk": True}


def bert(pieces: list[str], lowercase: bool) -> dict:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *(f"##{piece}" for piece in pieces)]
    return {"model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100, "vocab": {token: i for i, token in enumerate(tokens)}},
            "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                           "strip_accents": None, "lowercase": lowercase},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "special": ("[CLS]", "[SEP]", "[UNK]", "[PAD]", "[MASK]"),
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}


def unigram(pieces: list[str]) -> dict:
    tokens = ["<s>", "</s>", "<unk>", "\u2581", "\u2581th", *pieces]
    scores = [[token, -1.0 - 0.01 * i] for i, token in enumerate(tokens)]
    return {"type": "Unigram", "unk_id": 2, "vocab": scores}


HUB = {
    "bert": lambda: bert(letters(), True),
    "bert-cased": lambda: bert(letters(), False),
    "llama": lambda: {"model": llama(), "normalizer": LLAMA_NORMALIZER, "decoder": LLAMA_DECODER},
    "llama-metaspace": lambda: {"model": llama(), "pre_tokenizer": {**METASPACE, "prepend_scheme": "first"},
                                "decoder": LLAMA_DECODER},
    "qwen": lambda: {"model": bytes_vocab(), "normalizer": {"type": "NFC"}, "decoder": BYTE_LEVEL,
                     "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                         {"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}},
    "gpt2-prefix": lambda: {"model": bytes_vocab(), "decoder": BYTE_LEVEL,
                            "pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}},
    "unigram": lambda: {"model": unigram(letters()), "pre_tokenizer": METASPACE, "decoder": METASPACE},
    "unigram-nfkc": lambda: {"model": unigram(letters()), "pre_tokenizer": METASPACE, "decoder": METASPACE,
                             "normalizer": {"type": "Sequence", "normalizers": [
                                 {"type": "NFKC"}, {"type": "StripAccents"}, {"type": "Lowercase"}]}},
    "wordlevel": lambda: {"model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": {
        token: i for i, token in enumerate(["<unk>", "a", "b", "x", "\u4f60", "return"])}},
        "pre_tokenizer": {"type": "Whitespace"}},
    "holes": lambda: {"model": {**bytes_vocab(), "vocab": {
        token: 3 * i for token, i in bytes_vocab(["<s>", "</s>", "<unk>"])["vocab"].items()}},
        "pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL},
}


@pytest.mark.parametrize("name", HUB)
def test_a_foreign_tokenizer_gives_its_own_ids_and_text(name, tmp_path):
    """40 hard strings: read, stored, written again, token by token."""
    fast = of_the_hub(tmp_path / "in", **HUB[name]())
    tokenizer = Tokenizer.from_pretrained(tmp_path / "in")
    stored = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    a = tokenizer.to_dict()
    b = {**a, "json": json.dumps(json.loads(a["json"]), sort_keys=True), "ends": [], "config": {"more": 1}}
    assert same_tokenizer(a, b) and not same_tokenizer(a, {**b, "roles": {}})
    assert not same_tokenizer(a, {**b, "json": b["json"].replace("null", "[]", 1)})
    (tmp_path / "out").mkdir()
    tokenizer.save_pretrained(tmp_path / "out", 64)
    fast.encode_special_tokens = True
    for one in (tokenizer, stored, Tokenizer.from_pretrained(tmp_path / "out")):
        for text in HARD:
            ids = fast.encode(text, add_special_tokens=False).ids
            assert one.encode(text) == ids and all(i < one.vocab_size for i in ids)
            pieces, theirs = [*one.pieces(ids)], fast.decode(ids, skip_special_tokens=False)
            assert "".join(pieces) == one.decode(ids) == theirs
        for name in ("vocab_size", "eot", "ends", "specials", "prefix"):
            assert getattr(one, name) == getattr(tokenizer, name)
        assert [ids.tolist() for ids in one.encode_batch(HARD)] == [one.encode(text) for text in HARD]
        assert same_when_cut(one)


def test_gpt2_is_taken_where_only_nanogpt_s_download_of_it_is(monkeypatch):
    known = openai("r50k_base", {token: i for i, token in enumerate(some_ranks())})

    def get(name):
        if name != "gpt2":
            raise OSError("no network")
        return known
    monkeypatch.setattr("tiktoken.get_encoding", get)
    assert make_tokenizer("gpt2", [], 0).encode("import os") == known.encode("import os")
    with pytest.raises(UserError, match="no network.*: set TIKTOKEN_CACHE_DIR"):
        make_tokenizer("o200k_base", [], 0)


def same_when_cut(tokenizer) -> bool:
    """Whether a text that is cut where the tokenizer says so has the same ids."""
    text = " ".join(random.Random(0).sample(HARD, len(HARD))) + SOURCE[:3000]
    places = [place.end() for place in tokenizer.safe.finditer(text)] if tokenizer.safe else []
    parts = [tokenizer.encode(text[a:b]) for a, b in itertools.pairwise([0, *places, len(text)])]
    return sum(parts, []) == tokenizer.encode(text)


HOLES = {"r50k_base": None, "p50k_base": 50256, "cl100k_base": None, "o200k_base": None}


@pytest.mark.parametrize("name", HOLES)
def test_openai_tokenizers_keep_ids_and_patterns(name, tmp_path, monkeypatch, capsys):
    """By name, as a file of ranks, stored, exported: a hole among the ids, and ends far behind them."""
    ids = [i if i < 400 else i + 49_900 for i in range(500)]  # the last are far away
    ranks = dict(zip(some_ranks(), ids))
    ranks = {token: i + (HOLES[name] is not None and i >= HOLES[name]) for token, i in ranks.items()}
    known = openai(name, ranks)
    monkeypatch.setattr("tiktoken.get_encoding", {name: known}.get)
    lines = [base64.b64encode(token) + b" %d\n" % i for token, i in ranks.items()]
    (tmp_path / f"{name}.tiktoken").write_bytes(b"".join(lines))
    ours = make_tokenizer(name, [], 0)
    made = [ours, make_tokenizer(str(tmp_path / f"{name}.tiktoken"), [], 0),
            Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))]
    assert "500 tokens, which is not what" in capsys.readouterr().out
    ours.save_pretrained(tmp_path, 64)
    made.append(Tokenizer.from_pretrained(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*HARD, SOURCE[:LONG]):
        ids = known.encode_ordinary(text)
        for one in made:
            assert one.encode(text) == ids and one.decode(ids) == text
            assert b"".join(one.token_bytes[i] for i in ids).decode() == text
        if EOT not in text:
            assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
    for one in made:
        assert one.eot == known.eot_token == theirs.eos_token_id
        assert one.encode(f"a{EOT}", specials=True)[-1] == known.eot_token
        assert one.mask == ours.mask == one.vocab_size - 1 and ours.mask >= known.n_vocab


LANGUAGES = ("the quick brown Fox, 12 (it's) ", "ein schöner Tag für Äpfel ", "привет мир ё ",
             "你好，世界。中文 ", "日本語です ", "한국어 ", "हिन्दी में ", "שלום ", "🙂👩‍👧 ",
             "é\u0301 \u212b ﬁ ½ ", "\n\n  x\ty\r\n", "\u2581 ")
RIGHT = {"llama": LANGUAGES[:-1], "llama-metaspace": LANGUAGES[:-1], "gpt2-prefix": LANGUAGES,
         "qwen": LANGUAGES[:9], "holes": LANGUAGES, "bert-cased": (), "unigram": ("thequick",)}


@pytest.mark.parametrize("name", HUB)
def test_the_bytes_of_ids_are_those_of_the_text_or_are_not_given(name, tmp_path):
    """Random texts in several languages, as documents of a data set; RIGHT: where they must be given."""
    of_the_hub(tmp_path / "in", **HUB[name]())
    tokenizer, draw = Tokenizer.from_pretrained(tmp_path / "in"), random.Random(1)
    for round in range(30):
        alphabet = draw.choice(LANGUAGES) if round % 2 else "".join(draw.sample(LANGUAGES, 3))
        texts = ["x" + "".join(draw.choices(alphabet, k=draw.randrange(1, 60))) for _ in range(4)]
        ids = tokenizer.encode_documents(texts, [True] * 4)
        size = sum(len(text.encode()) for text in texts)
        lengths = tokenizer.byte_lengths(ids, size)
        if lengths is None:
            assert not {*alphabet} <= {*"".join(RIGHT.get(name, ()))}, alphabet
        else:
            assert lengths[ids].sum() == size
            if name in ("bert", "bert-cased", "wordlevel"):
                assert not any(c.isspace() for text in texts for c in text)
    if name.startswith("llama"):  # a Chinese character in three bytes is three bytes, not eighteen
        ids = tokenizer.encode_documents(["\u9f98\u9750"], [True])
        assert len(ids) > 6 and tokenizer.byte_lengths(ids, 6)[ids[-7:-1]].tolist() == [1] * 6


def test_lost_characters_are_counted(tmp_path):
    """Those that end in no id, or in the unknown one alone; not what the normalizer takes out, nor spaces."""
    latin = [chr(i) for i in range(33, 127)]
    cases = {
        "bert": (bert(latin, True), "Caf\u00e9 \x07 abc 中文 x中y", {"中": 2, "文": 1}),
        "no unknown token": ({"model": {"type": "BPE", "merges": [],
                                        "vocab": {c: i for i, c in enumerate(latin)}}},
                             "ab 中文 中", {"中": 2, "文": 1}),
        "unigram": ({"model": unigram(latin), "pre_tokenizer": METASPACE, "decoder": METASPACE},
                    "ab 中文 ，c", {"中": 1, "文": 1, "，": 1}),
        "some bytes": ({"model": {"type": "BPE", "merges": [], "vocab": {
            sign: i for i, sign in byte_symbols().items() if i < 200}},
            "pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL}, "ab é中 中", {"中": 2}),
        "all bytes": ({"model": bytes_vocab(), "pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL},
                      "é中", {}),
        "byte fallback": (HUB["llama"](), "é龘", {}),
        "bytes that the model does not fall back to": (
            {**HUB["llama"](), "model": {**llama(), "byte_fallback": False}}, "x龘", {"龘": 1}),
    }
    for name, (made, text, expected) in cases.items():
        of_the_hub(tmp_path / name, **made)
        tokenizer, lost = Tokenizer.from_pretrained(tmp_path / name), Counter()
        tokenizer.encode_documents([text, "a"], [True, True], lost)
        assert lost == expected and not tokenizer.lost, name
        for use in ("encode", "offsets", "prompt", "encode_batch"):
            said = []
            getattr(tokenizer, use)([text] if "batch" in use else text)
            tokenizer.tell(said.append)
            tokenizer.tell(said.append)
            told = f"the tokenizer has no ids for some characters: {tokenizer_file.examples_of(lost)}"
            assert said == [told] * bool(expected)
    assert make_tokenizer("bytes", [], 300).changes() == []
    changes = Tokenizer.from_pretrained(tmp_path / "bert").changes()
    assert {"'A' -> 'a'", "'é' -> 'e'", "'a\\na' -> 'a a'", "'a  a' -> 'a a'"} <= {*changes}


def test_a_stream_drops_nothing_and_never_fails(tmp_path):
    """Bytes that are no character, half of one at the end, ids that no token has; the first token's space."""
    of_the_hub(tmp_path / "in", **HUB["llama"]())
    tokenizer = Tokenizer.from_pretrained(tmp_path / "in")
    byte = [tokenizer.fast.token_to_id(f"<0x{i:02X}>") for i in range(256)]
    whole = [byte[i] for i in "龘".encode()]
    for ids, text in (([*whole, byte[0xE9]], "龘\ufffd"), ([byte[0xE9], *whole], "\ufffd龘"),
                      ([byte[0xFF]], "\ufffd"), ([10**6, *whole, -5], "龘")):
        assert "".join(tokenizer.pieces(ids)) == tokenizer.decode(ids) == text
    th = tokenizer.fast.token_to_id("\u2581th")
    assert tokenizer.decode([th]) == "th" and "".join(tokenizer.pieces([th], begun=True)) == " th"


def test_a_long_gap_is_no_panic():
    tokenizer = tokenizer_file.with_specials("bpe", PIECES, some_ranks())
    for text in ("a" + "\n" * 1_000_000 + "b", "x" + " " * 60_000 + "y"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_documents([text, "a"], [True, True]).tolist() == [
            *ids, tokenizer.eot, *tokenizer.encode("a"), tokenizer.eot]


@pytest.mark.parametrize("tokens, files, expected", [
    (["<|endoftext|>"], {}, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}),
    (["<s>", "</s>", "<unk>", "<pad>", "<mask>"], {}, {"eos_token": "</s>", "mask_token": "<mask>"}),
    (["<s>", "</s>", "<unk>"], {}, {"eos_token": "</s>", "bos_token": "<s>"}),
    (["<bos>", "<end>"], {"config.json": {"eos_token_id": 1, "bos_token_id": 0}},
     {"eos_token": "<end>", "bos_token": "<bos>"}),
    (["<bos>", "<end>"], {"config.json": {"eos_token_id": 0},
                          "generation_config.json": {"eos_token_id": [1, 0]}}, {"eos_token": "<end>"}),
    (["<s>", "</s>", "<end>"], {"special_tokens_map.json": {"eos_token": "</s>"},
                                "tokenizer_config.json": {"eos_token": {"content": "<end>"}}},
     {"eos_token": "<end>"}),
    (["<s>", "</s>", "<end>"], {"special_tokens_map.json": {"eos_token": {"content": "<end>"}}},
     {"eos_token": "<end>"}),
    (["[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]"], {"config.json": {"eos_token_id": 9}},
     {"sep_token": "[SEP]"}),
])
def test_roles_that_no_file_names_are_found_in_a_stated_order(tokens, files, expected, tmp_path):
    """tokenizer_config.json, special_tokens_map.json, the vocabulary's family, ids of the two other files."""
    vocab = {token: i for i, token in enumerate([*tokens, *bytes_vocab()["vocab"]])}
    of_the_hub(tmp_path, {**bytes_vocab(), "vocab": vocab}, pre_tokenizer=BYTE_LEVEL, decoder=BYTE_LEVEL,
               special=(tokens[0], tokens[-1]))
    (tmp_path / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert {role: tokenizer.roles[role] for role in expected} == expected
    assert tokenizer.eot == vocab[expected.get("eos_token", expected.get("sep_token"))]
    ids = [content.get("eos_token_id", []) for content in files.values()]
    ids = itertools.chain.from_iterable(np.atleast_1d(one).tolist() for one in ids)
    assert tokenizer.ends == {tokenizer.eot, *ids}
    assert Tokenizer.from_dict(tokenizer.to_dict()).ends == tokenizer.ends


@pytest.mark.parametrize("name, config, model", [
    ("BertTokenizer", {"do_lower_case": True}, {}), ("BertTokenizer", {"do_lower_case": False}, {}),
    ("GPT2Tokenizer", {}, {}), ("RobertaTokenizer", {}, {}),
    ("GPT2Tokenizer", {"tokenizer_class": "GPT2TokenizerFast", "add_bos_token": True}, {}),
    ("Qwen2Tokenizer", {"tokenizer_class": "Qwen2Tokenizer"}, {"model_type": "llama"}),
    ("Qwen2Tokenizer", {}, {"model_type": "qwen3"}),
    ("GPT2Tokenizer", {}, {"tokenizer_class": "GPT2Tokenizer"}),
    ("MPNetTokenizer", {"tokenizer_class": "MPNetTokenizer", "do_lower_case": True}, {}),
])
def test_older_vocabularies_give_transformers_ids(name, config, model, tmp_path, capsys):
    """vocab.txt, or vocab.json and merges.txt, without a tokenizer.json; and what an export feeds a model."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"]
    if name == "BertTokenizer":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    elif name in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        special = [EOT]
    if name in ("BertTokenizer", "MPNetTokenizer"):
        made = [*special, *letters(), *(f"##{c}" for c in letters())]
        (tmp_path / "vocab.txt").write_text("\n".join(made) + "\n", encoding="utf-8")
    else:
        made = {token: i for i, token in enumerate([*special, *bytes_vocab()["vocab"]])}
        (tmp_path / "vocab.json").write_text(json.dumps(made), encoding="utf-8")
        (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n\u0120 a\n1 2\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = getattr(transformers, name).from_pretrained(tmp_path, **config)
    (tmp_path / "config.json").write_text(json.dumps(model))
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ("names no tokenizer_class" in capsys.readouterr().err) == (not model and len(config) < 2)
    (tmp_path / "out").mkdir()
    ours.save_pretrained(tmp_path / "out", 64)
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in HARD:
        if "[MASK]" not in text:
            assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        ids = ours.wrap(ours.encode(text, specials=True))[0]
        assert theirs(text)["input_ids"] == ids == back(text)["input_ids"]
    pair = ours.wrap(ours.encode("a b"), ours.encode("c"))
    for one in (theirs, back):
        assert one("a b", "c")["input_ids"] == pair[0]
        assert one("a b", "c").get("token_type_ids", pair[1]) == pair[1]
    assert ("token_type_ids" in back("a")) == (name == "BertTokenizer")


@pytest.mark.parametrize("files, words", [
    ({}, "names no tokenizer_class"),
    ({"tokenizer_config.json": {"tokenizer_class": "OddTokenizer"}}, "OddTokenizer is known neither"),
    ({"config.json": {"tokenizer_class": "GPT2Model"}}, "GPT2Model is known neither"),
    ({"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}},
     "it has no file of a PreTrainedTokenizer"),
    ({"config.json": {"model_type": "odd"}, "vocab.txt": ["a"]}, "model_type=odd is not known here"),
    ({"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}}, "it has no file of a BertTokenizer"),
])
def test_a_tokenizer_of_another_class_is_refused_by_name(files, words, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        Tokenizer.from_pretrained(tmp_path)


SENTENCEPIECE = {  # class and file; how its model is trained; ids around a text; by how much all are moved
    "llama": ("LlamaTokenizer", "tokenizer.model", {"model_type": "bpe", "byte_fallback": True,
              "normalization_rule_name": "identity", "remove_extra_whitespaces": False}, ([1], []), 0),
    "xlm-roberta": ("XLMRobertaTokenizer", "sentencepiece.bpe.model", {}, ([0], [2]), 1),
    "t5": ("T5Tokenizer", "spiece.model",
           {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}, ([], [1]), 0),
}


@pytest.mark.parametrize("kind", SENTENCEPIECE)
@pytest.mark.parametrize("by_class", [True, False])
def test_sentencepiece_files_give_sentencepiece_ids(kind, by_class, tmp_path):
    name, file, how, (before, behind), shift = SENTENCEPIECE[kind]
    lines = iter([line for line in SOURCE.split("\n") if line.strip()])
    with open(tmp_path / file, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=f, vocab_size=500,
                                                 character_coverage=0.99, minloglevel=2, **how)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / file))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    if by_class:
        config = {"tokenizer_class": name, "eos_token": "</s>", "unk_token": "<unk>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.from_pretrained(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD:
        if kind == "llama":
            assert ours.encode(text, specials=True) == auto(text, add_special_tokens=False)["input_ids"]
        if kind == "llama" and text[:1] in ("", " "):  # to transformers a space at the start is enough
            continue
        if "<s>" not in text:  # a piece of its vocabulary to Unigram, as in the published tokenizer.json
            ids = [i + shift for i in theirs.encode(text)]  # <unk> is 0 there, 3 here
            ids = [{1: 3}.get(i, i) if shift else i for i in ids]
            assert ours.encode(text) == ids
            assert ours.wrap(ids)[0] == before + ids + behind


@pytest.mark.parametrize("file", ["llama", "llama-metaspace"])
@pytest.mark.parametrize("config", [
    {}, {"legacy": True}, {"legacy": False, "add_bos_token": True}, {"add_prefix_space": False},
    {"tokenizer_class": "PreTrainedTokenizerFast", "legacy": True}, {"model_type": "mistral"}], ids=str)
def test_where_llama_puts_spaces_is_told_by_its_class(file, config, tmp_path, capsys):
    """Files of before and of after transformers 5, from which the ids are."""
    config = {"tokenizer_class": "LlamaTokenizer", "model_type": "llama", "bos_token": "<s>", **config}
    (tmp_path / "config.json").parent.mkdir(exist_ok=True)
    of_the_hub(tmp_path, **HUB[file](), **config)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": config.pop("model_type")}))
    ours, theirs = Tokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*HARD, "<s> a</s>b"):
        assert ours.wrap(ours.encode(text, specials=True))[0] == theirs(text)["input_ids"]
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
    by_class = type(theirs).__name__ == "LlamaTokenizer"
    assert ("pre_tokenizer: by tokenizer_config" in capsys.readouterr().err) == by_class


def test_tokens_that_only_other_files_add_are_added(tmp_path):
    """By tokenizer_config.json or added_tokens.json to a tokenizer.json that lacks them, at their ids."""
    of_the_hub(tmp_path, **HUB["qwen"]())
    n = Tokenizer.from_pretrained(tmp_path).vocab_size
    call = {"content": "<call>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    more = {n + 1: {**call, "content": "<end>", "special": True}, n + 2: {**call, "special": False},
            n: {**call, "content": "<first>", "special": True}}
    config = {"eos_token": "<end>", "added_tokens_decoder": more}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<end>": n, "<old>": n + 1}))
    ours = Tokenizer.from_pretrained(tmp_path)
    assert (ours.eot, ours.vocab_size, ours.specials["<first>"]) == (n + 1, n + 3, n)
    assert ours.encode("<call>") == [n + 2] and n + 1 not in ours.encode("<end>")
    assert ours.encode("<first><end>", specials=True) == [n, n + 1]
    assert ours.token_bytes[n + 2] == b"<call>" and Tokenizer.from_dict(ours.to_dict()).eot == n + 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    assert Tokenizer.from_pretrained(tmp_path).encode("<old><end>", specials=True) == [n + 1, n]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<end>": n + 1}))
    with pytest.raises(UserError, match=f"add '<end>' as id {n + 1}, but {n} is the next"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("config", [
    {"do_lower_case": False}, {"tokenizer_class": "BertTokenizer", "strip_accents": None},
    {"tokenizer_class": "BertTokenizerFast", "do_lower_case": False},
    {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False},
    {"tokenizer_class": "DistilBertTokenizer"}], ids=str)
def test_of_two_files_that_differ_the_class_decides(lowercase, config, tmp_path, capsys):
    """Ids, and what an export of it feeds a model, are those of transformers."""
    of_the_hub(tmp_path, **bert(letters(), lowercase))
    config = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": None, **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    ours, theirs = Tokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    normalizer = json.loads(theirs.backend_tokenizer.to_str())["normalizer"]
    assert ("not as tokenizer.json says" in capsys.readouterr().err) == (normalizer["lowercase"] != lowercase)
    (tmp_path / "out").mkdir()
    ours.save_pretrained(tmp_path / "out", 64)
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in HARD:
        assert ours.encode(text, specials=True) == theirs(text, add_special_tokens=False)["input_ids"]
        if "tokenizer_class" in config:
            assert dict(back(text)) == dict(theirs(text))
    assert back.pad_token == theirs.pad_token


def test_many_clauses_train_by_a_part_of_them(monkeypatch, capsys):
    """And the tokens are nearly those of all; what has spaces is counted whole."""
    draw = random.Random(0)
    words = ["".join(draw.choices("天地玄黄宇宙洪荒日月盈昃辰宿列张", k=2)) for _ in range(30)]
    text = "，".join("".join(draw.choices(words, k=5)) for _ in range(LONG)) + SOURCE[:LONG]
    whole = train_bpe([text[:9000], text[9000:]], 330)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(bpe, "CLAUSES", 5 * LONG)
    monkeypatch.setattr(bpe, "LOOK", 1000)
    part = train_bpe([text[:9000], text[9000:]], 330)
    assert "one in" in capsys.readouterr().out
    assert len(set(part) & set(whole)) > 310
    assert train_bpe([SOURCE[:1000]] * 2, 280) == naive_bpe(SOURCE[:1000] * 2, 280)


END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "ours": PIECES,
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{END}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{END}|"
             r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_long_text_in_pieces_gives_the_same_tokens(tmp_path, monkeypatch, pattern):
    """So does a stream of documents, whatever the threads."""
    text = (MIXED + "It's, we'll 1234, x2\n\n  He said...\n/ (no) über,all ½ ") * 20
    ranks = make_tokenizer("bpe", [text], 500).ranks
    tokenizer = Tokenizer("bpe", PATTERNS[pattern], ranks, {EOT: len(ranks), MASK: len(ranks) + 1})
    data, n = 2 * text.encode(), len(text.encode())
    (tmp_path / "spool").write_bytes(data)
    spans, expected = np.array([[0, n], [7, n - 60], [n, 2 * n]]), []
    for start, end in spans:
        expected += [*tokenizer.encode(data[start:end].decode("utf-8", "ignore")), tokenizer.eot]
    for unit, threads in ((40, 1), (100, 2), (10**6, 3)):
        monkeypatch.setattr(tokenizer_file, "UNIT", unit)
        pieces = list(tokenizer_file.read_texts(tmp_path / "spool", spans, tokenizer, lambda n: None))
        assert unit == 10**6 or len(pieces) > 20
        ids = np.concatenate(list(tokenizer_file.encode_stream(tokenizer, pieces, threads)))
        assert ids.tolist() == expected


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_text_comes_back_and_ours_go_to_transformers_and_back(kind, tmp_path):
    source = (ROOT / "model.py").read_text(encoding="utf-8")[:4 * LONG]
    ours = make_tokenizer(kind, [source, MIXED], 600)
    ours.save_pretrained(tmp_path, context=10**6)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    back = Tokenizer.from_pretrained(tmp_path)
    some = [ours, back, *(Tokenizer.from_dict(json.loads(json.dumps(one.to_dict()))) for one in (ours, back))]
    assert (theirs.eos_token_id, theirs.mask_token_id) == (ours.eot, ours.mask) == (back.eot, back.mask)
    assert ours.vocab_size == len(ours.ranks) + 2 and ours.encode(f"a{EOT}", specials=True)[-1] == ours.eot
    for text in (MIXED, source, UNSEEN, f"a{EOT}", "", "x" * 100_000):
        plain, ids = ours.encode(text), ours.encode(text, specials=True)
        assert all(i < len(ours.ranks) for i in plain)  # text never makes a special token
        assert b"".join(ours.token_bytes[i] for i in plain).decode() == text
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
        for one in some:
            assert one.encode(text) == plain and one.encode(text, specials=True) == ids
            assert "".join(one.pieces(ids)) == one.decode(ids) == text
            assert one.offsets(text) == ours.offsets(text)
            assert [row.tolist() for row in one.encode_batch([text, ""])] == [plain, []]
            assert [bytes(token) for token in one.token_bytes] == ours.token_bytes
    assert ours.decode([ours.vocab_size + 5]) == ""  # a padded vocabulary's ids


def test_half_a_character_is_read_as_a_question_mark(tmp_path):
    """A terminal gives one for each byte that is none of its encoding's."""
    of_the_hub(tmp_path, **HUB["llama"]())
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    for use in ("encode", "prompt", "offsets"):
        assert getattr(tokenizer, use)("the\udce9 day") == getattr(tokenizer, use)("the? day")
    assert tokenizer.encode_batch(["the\udce9 day"])[0].tolist() == tokenizer.encode("the? day")


def test_a_text_is_wrapped_as_its_model_reads_it(tmp_path):
    fast = of_the_hub(tmp_path, **bert(["a", "b"], True), post_processor={
        "type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]})
    fast.enable_padding(length=16)
    fast.enable_truncation(4)  # what a file says of lengths is no concern of ours
    fast.save(str(tmp_path / "tokenizer.json"))
    named_by_none = {}  # but the vocabulary is BERT's
    named = {"sep_token": "[SEP]", "pad_token": {"content": "[PAD]"}, "mask_token": "[MASK]"}
    for roles in (named_by_none, named):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
        tokenizer = Tokenizer.from_pretrained(tmp_path)
        assert (tokenizer.eot, tokenizer.pad, tokenizer.mask, tokenizer.vocab_size) == (3, 0, 4, 9)
    assert tokenizer.encode("a b ab a b a") == [5, 6, 5, 8, 5, 6, 5]
    assert tokenizer.wrap([5, 6]) == ([2, 5, 6, 3], [0] * 4)
    assert tokenizer.wrap([5, 6], [7]) == ([2, 5, 6, 3, 7, 3], [0, 0, 0, 0, 1, 1])
    assert tokenizer.encode("[MASK]") != [4] == tokenizer.encode("[MASK]", specials=True)
    assert tokenizer.token_bytes[8] == b"b" and tokenizer.token_bytes[3] == b""
    ours = make_tokenizer("bytes", [], 258)
    assert ours.wrap([1, 2], [3]) == ([1, 2, 256, 3, 256], [0, 0, 0, 1, 1])


def small_bpe(folder, tokens: list[str], merges: list[list[str]], **parts):
    """A tokenizer of these tokens."""
    vocab = {name: i for i, name in enumerate(["<s>", "</s>", "<unk>", *tokens])}
    of_the_hub(folder, {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>",
                        "dropout": parts.pop("dropout", None)}, **parts)
    return make_tokenizer(str(folder), [], 0)


def test_no_text_is_cut_where_a_token_goes_across(tmp_path):
    spaces = {"pattern": {"String": " "}, "content": "\u2581"}  # as Gemma's: no word ends a piece
    safe = small_bpe(tmp_path, [*"abs.,", "\u2581", "s.", "s.\u2581"], [["s", "."], ["s.", "\u2581"]],
                     normalizer={"type": "Replace", **spaces},
                     decoder={"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}).safe
    assert not safe.search("abs. a") and safe.search("abs, a") and safe.search("abs a")


def test_what_a_tokenizer_drops_at_random_in_training_stays(tmp_path):
    ours = small_bpe(tmp_path, ["a", "b", "ab", "abab"], [["a", "b"], ["ab", "ab"]], dropout=0.5,
                     decoder={"type": "Fuse"})
    assert {tuple(ours.encode("abab" * 3)) for _ in range(9)} == {(6, 6, 6)}


@pytest.mark.parametrize("name, words", [
    ("nonsense", "--tokenizer=nonsense: wanted bytes, bpe, gpt2"), ("folder", "has no tokenizer.json"),
    ("missing.tiktoken", "not a file of BPE ranks"), ("bad.tiktoken", "not a file of BPE ranks"),
    ("damaged.tiktoken", "not a file of BPE ranks")])
def test_a_tokenizer_that_cannot_be_had_is_named(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.tiktoken").write_text("eA== one\n")
    ranks = "".join(f"{base64.b64encode(byte).decode()} {byte[0]}\n" for byte in BYTES)
    (tmp_path / "damaged.tiktoken").write_text(ranks + "%% 256\n")
    with pytest.raises(UserError, match=words):
        make_tokenizer(name, [], 300)
