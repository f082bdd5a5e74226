"""Text to ids and back: no character is lost, whatever the kind of tokenizer."""
import itertools
import json

import numpy as np
import pytest
import regex

from config import UserError
from lib import tokenizer as tokenizer_file
from lib.tokenizer import EOT, MASK, PIECES, Tokenizer, make_tokenizer, train_bpe
from tests.helpers import MIXED, ROOT

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
    text = (ROOT / "model.py").read_text(encoding="utf-8")[:6000] + MIXED + "aaaaaaa abababab " * 5
    assert train_bpe([text], 400) == naive_bpe(text, 400)
    assert train_bpe(["abab"], 400) == naive_bpe("abab", 400) and len(train_bpe([], 400)) == 256


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_text_comes_back(kind):
    tokenizer = make_tokenizer(kind, [MIXED], 300)
    again = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    for text in (MIXED, UNSEEN, EOT, "", "x" * 100_000):
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids and again.decode(ids) == text
        assert all(i < len(tokenizer.ranks) for i in ids)  # text never makes a special token
        assert b"".join(tokenizer.token_bytes[i] for i in ids).decode() == text
    assert tokenizer.encode(f"a{EOT}", specials=True)[-1] == tokenizer.eot
    assert tokenizer.vocab_size == len(tokenizer.ranks) + 2
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""  # a padded vocabulary's ids


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
        pieces = list(tokenizer_file.read_texts(tmp_path / "spool", spans, False, lambda n: None))
        assert unit == 10**6 or len(pieces) > 20
        ids = np.concatenate(list(tokenizer_file.encode_stream(tokenizer, pieces, threads)))
        assert ids.tolist() == expected


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_ours_go_to_transformers_and_back(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = (ROOT / "model.py").read_text(encoding="utf-8")
    ours = make_tokenizer(kind, [source, MIXED], 600)
    ours.save_pretrained(tmp_path, context=10**6)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    back = Tokenizer.from_pretrained(tmp_path)
    stored = Tokenizer.from_dict(json.loads(json.dumps(back.to_dict())))
    assert (theirs.eos_token_id, theirs.mask_token_id) == (ours.eot, ours.mask) == (back.eot, back.mask)
    for text in (MIXED, source, UNSEEN, f"a{EOT}"):
        ids = ours.encode(text, specials=True)
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
        assert stored.encode(text, specials=True) == ids and back.decode(ids) == text
        assert "".join(back.pieces(ids)) == "".join(ours.pieces(ids)) == text
        ids, offsets = ours.offsets(text)
        assert back.offsets(text) == (ids, offsets)
        for one in (ours, back):
            assert [row.tolist() for row in one.encode_batch([text, ""])] == [ids, []]
    assert [bytes(one) for one in back.token_bytes] == ours.token_bytes


def test_a_text_is_wrapped_as_its_model_reads_it(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5, "b": 6, "##b": 7}
    fast = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.decoder = tokenizers.decoders.WordPiece()
    fast.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    fast.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast.enable_padding(length=16)
    fast.enable_truncation(4)  # what a file says of lengths is no concern of ours
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="sep_token"):
        Tokenizer.from_pretrained(tmp_path)
    roles = {"sep_token": "[SEP]", "pad_token": {"content": "[PAD]"}, "mask_token": "[MASK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.eot, tokenizer.pad, tokenizer.mask, tokenizer.vocab_size) == (3, 0, 4, 8)
    assert tokenizer.encode("a b ab a b a") == [5, 6, 5, 7, 5, 6, 5]
    assert tokenizer.wrap([5, 6]) == ([2, 5, 6, 3], [0] * 4)
    assert tokenizer.wrap([5, 6], [7]) == ([2, 5, 6, 3, 7, 3], [0, 0, 0, 0, 1, 1])
    assert tokenizer.encode("[MASK]") != [4] == tokenizer.encode("[MASK]", specials=True)
    assert tokenizer.token_bytes[7] == b"b" and tokenizer.token_bytes[3] == b""
    ours = make_tokenizer("bytes", [], 258)
    assert ours.wrap([1, 2], [3]) == ([1, 2, 256, 3, 256], [0, 0, 0, 1, 1])


@pytest.mark.parametrize("name, words", [
    ("nonsense", "--tokenizer=nonsense: wanted bytes, bpe, gpt2"), ("folder", "has no tokenizer.json"),
    ("missing.tiktoken", "not a file of BPE ranks"), ("bad.tiktoken", "not a file of BPE ranks")])
def test_a_tokenizer_that_cannot_be_had_is_named(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.tiktoken").write_text("eA== one\n")
    with pytest.raises(UserError, match=words):
        make_tokenizer(name, [], 300)
