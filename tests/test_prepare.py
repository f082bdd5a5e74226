"""From text to tokens."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import prepare
from config import SettingError, UserError
from lib import text as text_file
from lib import tokenizer as tokenizer_file
from lib.tokenizer import PIECES, Tokenizer, make_tokenizer, train_bpe
from tests.helpers import CHINESE, MIXED, ROOT, script, slow, words


def naive_bpe(text: str, n_tokens: int) -> list[bytes]:
    """The definition, slowly: count all pairs again for each merge."""
    import regex

    words = [[bytes([b]) for b in piece.encode()] for piece in regex.findall(PIECES, text)]
    ranks = [bytes([i]) for i in range(256)]
    while len(ranks) < n_tokens:
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], ranks.index(pair[0]), ranks.index(pair[1])))
        if counts[best] < 2:
            break
        ranks.append(best[0] + best[1])
        for i, word in enumerate(words):
            merged, j = [], 0
            while j < len(word):
                if tuple(word[j : j + 2]) == best:
                    merged.append(word[j] + word[j + 1])
                    j += 2
                else:
                    merged.append(word[j])
                    j += 1
            words[i] = merged
    return ranks


def test_bpe_equals_its_definition():
    text = (ROOT / "model.py").read_text(encoding="utf-8")[:6000] + MIXED + "aaaaaaa abababab " * 5
    assert train_bpe([text], 400) == naive_bpe(text, 400)


@pytest.mark.parametrize("corpus, n", [("ours", 1000), pytest.param("python", 4096, marks=slow)])
def test_bpe_is_as_good_as_the_tokenizers_library(corpus, n):
    tokenizers = pytest.importorskip("tokenizers")
    texts = [text for _, text in text_file.documents("python" if corpus == "python" else f"{ROOT}/*.py")]
    text, start = "".join(texts), time.time()
    ours = make_tokenizer("bpe", [text], n + 2)
    assert time.time() - start < 10 or not os.environ.get("TIMED")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
         tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    theirs.train_from_iterator(
        [text],
        tokenizers.trainers.BpeTrainer(vocab_size=n,
                                       initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                                       show_progress=False),
    )
    assert len(ours.encode(text)) == pytest.approx(len(theirs.encode(text).ids), rel=0.005)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokenizers_round_trip(kind):
    tokenizer = make_tokenizer(kind, [MIXED], 300)
    again = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    for text in (MIXED, "\0 unseen: żółć 漢字 🚀", "<|endoftext|>", "", "x" * 100_000):
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids and again.decode(ids) == text
        assert all(i < len(tokenizer.ranks) for i in ids)  # text never makes a special token
        assert sum(len(tokenizer.token_bytes[i]) for i in ids) == len(text.encode())
    assert tokenizer.encode("a<|endoftext|>", specials=True)[-1] == tokenizer.eot
    assert tokenizer.vocab_size == len(tokenizer.ranks) + 2
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""  # a padded vocabulary's ids


def bin_ids(folder, split):
    return prepare.read_split(folder, split, prepare.read_meta(folder)).astype(np.int64).tolist()


def test_one_text_is_cut_exactly(tmp_path):
    text = MIXED * 10
    (tmp_path / "my text.txt").write_text(text, encoding="utf-8", newline="")
    folder = prepare.prepare("", str(tmp_path / "my text.txt"), "bytes", root=tmp_path / "data")
    assert folder.name == "my_text"
    parts = [bytes(bin_ids(folder, split)).decode() for split in prepare.SPLITS]
    assert parts == [text[: int(len(text) * 0.8)], text[int(len(text) * 0.8) : int(len(text) * 0.9)],
                     text[int(len(text) * 0.9) :]]
    meta = prepare.read_meta(folder)
    assert [meta["splits"][split]["bytes"] for split in prepare.SPLITS] == [
        len(part.encode()) for part in parts
    ]


def test_documents_are_split_whole_and_stay_where_they_are(tmp_path):
    for i in range(60):
        (tmp_path / f"src/{i % 7}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"src/{i % 7}/{i}.md").write_text(f"# Page {i}\n" + f"word{i} " * 40, encoding="utf-8")
    (tmp_path / "src/picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "src/.hidden").write_text("secret")

    def pages(name):
        folder = prepare.prepare(name, str(tmp_path / "src"), "bpe", 300, root=tmp_path / "data")
        tokenizer = Tokenizer.from_dict(prepare.read_meta(folder)["tokenizer"])
        found = {}
        for split in prepare.SPLITS:
            ids = bin_ids(folder, split)
            assert ids[-1] == tokenizer.eot  # <|endoftext|> behind each document
            for text in "".join("\0" if i == tokenizer.eot else tokenizer.decode([i]) for i in ids).split(
                "\0"
            )[:-1]:
                found[int(text.split()[2])] = (split, text)
        return found

    before = pages("before")
    assert sorted(before) == list(range(60)) and before[7][1].endswith("word7 " * 40)
    assert {split for split, _ in before.values()} == set(prepare.SPLITS)
    for i in range(60, 66):
        (tmp_path / f"src/{i}.md").write_text(f"# Page {i}\n" + f"word{i} " * 40, encoding="utf-8")
    after = pages("after")
    assert len(after) == 66 and all(after[i] == before[i] for i in before)


def test_bin_is_little_endian_and_never_wraps():
    assert prepare.to_bin(np.array([1, 258]), prepare.bin_dtype(300)) == b"\x01\x00\x02\x01"
    assert prepare.bin_dtype(2**16).itemsize == 2 and prepare.bin_dtype(2**16 + 1).itemsize == 4
    assert prepare.to_bin(np.array([70000]), prepare.bin_dtype(70001)) == b"\x70\x11\x01\x00"
    with pytest.raises(ValueError, match="70000"):
        prepare.to_bin(np.array([70000]), np.dtype("<u2"))


@pytest.mark.parametrize(
    "name, data, words",
    [("empty.txt", b"", ["empty.txt", "empty"]),
     ("two_lines.txt", b"Two lines.\nNo more.\n", ["two_lines.txt", "tokens", "more text"]),
     ("binary.dat", b"\x7fELF\0\0\1", ["binary.dat", "binary"]),
     ("latin.txt", "café ".encode("latin-1") * 99, ["latin.txt", "offset 3", "0xe9", "--encoding"]),
     (None, None, ["nothing_here.txt", "no such file"]), ("folder/", None, ["folder", "no text"])],
)
def test_unusable_text_is_named_and_leaves_nothing(tmp_path, name, data, words):
    if name and name.endswith("/"):
        (tmp_path / name).mkdir()
    elif name:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        prepare.prepare("", str(tmp_path / (name or "nothing_here.txt")), root=tmp_path / "data")
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_another_encoding_works_where_it_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café ".encode("latin-1") * 99)
    folder = prepare.prepare("", str(tmp_path / "latin.txt"), "bytes", encoding="latin-1", root=tmp_path)
    assert bytes(bin_ids(folder, "train")).decode().startswith("café café")


def test_a_data_set_is_replaced_only_on_demand(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words to learn from. " * 200, encoding="utf-8")
    args = dict(dataset="a", source=str(tmp_path / "a.txt"), root=tmp_path / "data")
    folder = prepare.prepare(**args, vocab_size=300)
    stamp = (folder / "train.bin").stat().st_mtime_ns
    assert prepare.prepare(**args, vocab_size=300) == folder and "same settings" in capsys.readouterr().out
    with pytest.raises(SettingError, match="--overwrite"):
        prepare.prepare(**args, vocab_size=280)
    assert (folder / "train.bin").stat().st_mtime_ns == stamp
    prepare.prepare(**args, vocab_size=280, overwrite=True)
    assert prepare.read_meta(folder)["vocab_size"] <= 280
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["a"]


def test_the_built_in_corpus_needs_no_download():
    texts = list(text_file.documents("python"))
    assert len(texts) > 300 and sum(len(text) for _, text in texts) > 5_000_000
    assert not any("site-packages" in name or "/test/" in f"/{name}" for name, _ in texts)


def read_back(folder) -> dict[str, list[str]]:
    """The documents of each split, decoded from the .bin."""
    meta = prepare.read_meta(folder)
    tokenizer, found = Tokenizer.from_dict(meta["tokenizer"]), {}
    for split in prepare.SPLITS:
        ids = prepare.read_split(folder, split, meta)
        documents = np.split(ids, np.flatnonzero(ids == tokenizer.eot) + 1)
        found[split] = [tokenizer.decode(i for i in one.tolist() if i != tokenizer.eot)
                        for one in documents if len(one)]
    return found


def all_of(folder) -> list[str]:
    return sorted(text for texts in read_back(folder).values() for text in texts)


PAGES = [f"Page {i}: " + " ".join(words(30, i)) for i in range(80)]


def write_jsonl(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")


def write_pages(folder, suffix: str) -> None:
    """PAGES in one file of this kind."""
    import bz2
    import csv
    import gzip
    import io
    import lzma

    kind, _, packed = suffix.partition(".")
    out = io.StringIO()
    if kind == "jsonl":
        rows = [{"id": 1, "body": page + "\n\u2028"} for page in PAGES]
        out.write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    else:
        rows = [["label", "body"]] + [["x", page + ("\n\u2028" if kind == "csv" else '"')] for page in PAGES]
        out.write("".join("\t".join(row) + "\n" for row in rows) if kind == "tsv" else "")
        if kind == "csv":
            csv.writer(out).writerows(rows)
    data = out.getvalue().encode()
    data = {"gz": gzip, "bz2": bz2, "xz": lzma}[packed].compress(data) if packed else data
    (folder / f"pages.{suffix}").write_bytes(data)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "jsonl.gz", "csv.bz2", "tsv.xz"])
def test_each_row_is_a_document(tmp_path, suffix):
    write_pages(tmp_path, suffix)
    source = str(tmp_path / f"pages.{suffix}")
    folder = prepare.prepare("", source, "bytes", text_key="body", root=tmp_path / "data")
    end = '"' if "tsv" in suffix else "\n\u2028"
    assert folder.name == "pages" and all_of(folder) == sorted(page + end for page in PAGES)
    if "jsonl" not in suffix:  # by number, the header is a row like the others
        folder = prepare.prepare("n", source, "bytes", text_key="1", root=tmp_path / "data")
        assert all_of(folder) == sorted([page + end for page in PAGES] + ["body"])
    with pytest.raises(UserError, match=r"pages.*:[123]: .*'text'.*--text_key"):
        prepare.prepare("bad", source, "bytes", root=tmp_path / "data")


def test_several_sources_make_one_data_set(tmp_path):
    import gzip

    (tmp_path / "a").mkdir()
    for i, page in enumerate(PAGES[:20]):
        (tmp_path / f"a/{i}.txt").write_text(page, encoding="utf-8")
    for i, page in enumerate(PAGES[20:30]):
        (tmp_path / f"{i}.md").write_text(page, encoding="utf-8")
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8-sig") as f:  # a byte order mark is no text
        f.write(PAGES[30])
    source = f"{tmp_path}/a, {tmp_path}/*.md,{tmp_path}/b.txt.gz"
    assert all_of(prepare.prepare("x", source, "bytes", root=tmp_path)) == sorted(PAGES[:31])


def test_parquet_comes_by_the_datasets_library(tmp_path):
    pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "hub").mkdir()
    parquet.write_table(pyarrow.table({"text": PAGES, "n": list(range(80))}), tmp_path / "hub/pages.parquet")
    assert all_of(prepare.prepare("", f"hf:{tmp_path}/hub", "bytes", root=tmp_path / "data")) == sorted(PAGES)
    with pytest.raises(UserError, match="--text_key"):
        prepare.prepare("", f"hf:{tmp_path}/hub", text_key="n", root=tmp_path / "other")


def test_a_url_is_fetched_once_whole_and_checked(tmp_path):
    import hashlib
    import http.server

    write_pages(tmp_path, "jsonl.gz")
    data, asked = (tmp_path / "pages.jsonl.gz").read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:-9] if "broken" in self.path else data)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, root = f"http://127.0.0.1:{server.server_port}/", tmp_path / "data"
        args = dict(tokenizer="bytes", text_key="body", root=root)
        right = f"{url}pages.jsonl.gz#sha256={hashlib.sha256(data).hexdigest()}"
        with pytest.raises(UserError, match="another file"):
            prepare.prepare("a", f"{url}pages.jsonl.gz#sha256={'0' * 64}", **args)
        with pytest.raises(UserError, match="broke off"):
            prepare.prepare("a", f"{url}broken.jsonl.gz", **args)
        for name in "ab":
            assert len(all_of(prepare.prepare(name, right, **args))) == len(PAGES)
        server.shutdown()
    assert len(asked) == 3  # the last from where it was kept
    with pytest.raises(UserError, match="cannot be downloaded.*--source=FILE"):
        prepare.prepare("c", f"{url}other.txt", **args)
    assert sorted(p.name for p in root.iterdir()) == ["a", "b", "downloads"]


DIRTY = ("\r\nCafe\u0301 <b>bold</b><br>x\x07\x1b\nsame\nsame\nsame\nend: jo.e@x.org, 10.1.2.3, "
         "+1 555-123-4567 sk-aaaaaaaaaaaaaaaaaaaa")


CLEANED = {
    "nfc": ("Cafe\u0301", "Caf\u00e9"), "line_ends": ("\r\n", "\n"), "control_chars": ("\x07\x1b", ""),
    "html": ("<b>bold</b><br>", "bold\n"), "repeated_lines": ("same\nsame\nsame", "same"),
    "scrub_pii": (DIRTY[DIRTY.index("jo.e"):], "[EMAIL], [IP], [PHONE] [KEY]"),
}


@pytest.mark.parametrize("rule", [None, *CLEANED])
def test_each_rule_cleans_its_own_and_is_counted(tmp_path, rule):
    """A text is what it was, but for what was asked for."""
    texts = [f"{page}{DIRTY}" for page in PAGES]
    write_jsonl(tmp_path / "a.jsonl", texts)
    on = {rule: True} if rule else {}
    folder = prepare.prepare("", str(tmp_path / "a.jsonl"), "bytes", root=tmp_path / "data", **on)
    assert all_of(folder) == sorted(text.replace(*CLEANED[rule]) if rule else text for text in texts)
    report = prepare.read_meta(folder)["report"]
    assert report["read"]["documents"] == len(PAGES) and set(report) == {"read", *on}
    assert rule is None or report[rule]["documents"] == len(PAGES) and "a.jsonl:1" in report[rule]["example"]
    assert rule != "scrub_pii" or "x.org" not in json.dumps(report)


def test_what_looks_like_personal_data_and_what_does_not():
    def scrubbed(text):
        return text_file.clean(text, ["scrub_pii"], "", {}, {})

    for text in ("version 3.11.7, 1.2.3.4.5", "2024-05-06 12:34:56", "std::vector foo::bar", "3.14159265",
                 "12345678901234567890", "@decorator\ndef f(self)", "5-7 and 10-12", "x = a[1:2] 0:1"):
        assert scrubbed(text) == text
    for text, kind in (("+49 170 123-4567", "PHONE"), ("(030) 1234-5678", "PHONE"), ("13912345678", "PHONE"),
                       ("fe80::1:2", "IP"), ("2001:db8:0:0:0:0:0:1", "IP"), ("255.1.0.9", "IP"),
                       ("a+b@c-d.co.uk", "EMAIL"), ("ghp_" + "x1" * 18, "KEY"), ("AKIA" + "A1" * 8, "KEY")):
        assert scrubbed(f"it is {text} here") == f"it is [{kind}] here"


def test_short_and_unreadable_documents_are_dropped(tmp_path):
    texts = PAGES + ["ab", "%&$#@!^*" * 30, PAGES[3], PAGES[3]]
    write_jsonl(tmp_path / "a.jsonl", texts + [None])
    folder = prepare.prepare("", str(tmp_path / "a.jsonl"), "bytes", min_chars=3, min_text=0.5, root=tmp_path)
    report = prepare.read_meta(folder)["report"]
    assert all_of(folder) == sorted(PAGES)
    assert {what: its["documents"] for what, its in report.items()} == {
        "read": len(PAGES) + 5, "too_short": 2, "mostly_not_text": 1, "duplicates": 2}
    assert "%&$" in report["mostly_not_text"]["example"] and "Page 3" in report["duplicates"]["example"]


def in_chinese(some: list[str]) -> str:
    return "".join(chr(0x4E00 + sum(map(ord, word)) * 31 % 997) for word in some)


@pytest.mark.parametrize("text_of", [" ".join, in_chinese])
def test_near_duplicates_never_straddle_a_split(tmp_path, text_of):
    """The train copy goes, what differs more stays, and what is added moves nothing."""
    originals = [words(150, seed) for seed in range(300)]
    near = [list(one) for one in originals[:150]]
    for i, one in enumerate(near):  # three words changed, one taken out
        for at in (10 + i % 7, 60, 110):
            one[at] = f"new{i}"
        del one[130]
    other = [one[:75] + words(75, 1000 + i) for i, one in enumerate(originals[200:250])]  # half of it is new

    def make(name, some):
        source = tmp_path / f"{name}.jsonl"
        write_jsonl(source, [text_of(one) for one in some])
        folder = prepare.prepare("", str(source), "bytes", near_duplicates=0.6, root=tmp_path)
        return {text: split for split, texts in read_back(folder).items() for text in texts}, folder

    found, folder = make("a", originals + near + other)
    for one, two in zip(originals, near):
        both = [found.get(text_of(one)), found.get(text_of(two))]
        assert both.count(None) == 1
    assert sum(text_of(two) in found for two in near) > 10  # the original was in train, this one is not
    assert all(text_of(one) in found for one in originals[150:] + other)
    assert prepare.read_meta(folder)["report"]["near_duplicates"]["documents"] == 150
    more, _ = make("b", originals + near + other + [words(150, seed) for seed in range(5000, 5050)])
    assert len(more) == len(found) + 50 and all(more[text] == split for text, split in found.items())


def test_every_text_comes_back(tmp_path):
    texts = ["plain English.\n" * 40, CHINESE * 20, "🙂👩‍👩‍👧 e\u0301 \u202e\u0000 " * 30,
             "x" * 1_000_000, "千" * 999, (ROOT / "model.py").read_text("utf-8"),
             " \n\t" * 99, "<|endoftext|> is no end " * 5, "\r\n" * 9]
    write_jsonl(tmp_path / "a.jsonl", texts + PAGES)
    for kind in ("bpe", "bytes"):
        folder = prepare.prepare(kind, str(tmp_path / "a.jsonl"), kind, 400, root=tmp_path / "data")
        assert all_of(folder) == sorted(texts + PAGES)


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
    specials = {"<|endoftext|>": len(ranks), "<|mask|>": len(ranks) + 1}
    tok = Tokenizer("bpe", PATTERNS[pattern], ranks, specials)
    (tmp_path / "spool").write_bytes(2 * text.encode())
    n = len(text.encode())
    spans = np.array([[0, n], [7, n - 60], [n, 2 * n]])
    expected = [id for span in spans for id in
                tok.encode((2 * text.encode())[span[0]:span[1]].decode("utf-8", "ignore")) + [tok.eot]]
    for unit, threads in ((40, 1), (100, 2), (10**6, 3)):
        monkeypatch.setattr(tokenizer_file, "UNIT", unit)
        pieces = list(tokenizer_file.read_texts(tmp_path / "spool", spans, False, lambda n: None))
        assert unit == 10**6 or len(pieces) > 20
        assert np.concatenate(list(tokenizer_file.encode_stream(tok, pieces, threads))).tolist() == expected


def test_a_large_file_is_read_in_blocks_as_if_whole(tmp_path, monkeypatch):
    for module in (text_file, prepare):
        monkeypatch.setattr(module, "BLOCK", 64)
    text = MIXED * 5 + "y" * 3000 + "\n" + CHINESE * 20
    for name, encoding in (("a.txt", "utf-8"), ("b.txt", "utf-16"), ("c.txt", "gb18030")):
        (tmp_path / name).write_text(text, encoding=encoding, newline="")
        parts = list(text_file.documents(str(tmp_path / name), encoding))
        assert "".join(part for _, part in parts) == text
        assert len(parts) > 20 and not any(name for name, _ in parts[1:])
    folder = prepare.prepare("", str(tmp_path / "a.txt"), "bytes", root=tmp_path)
    assert ["".join(x) for x in read_back(folder).values()] == prepare_cut(text)
    (tmp_path / "bad.txt").write_bytes(b"fine \xc3\xa9\n" * 50 + b"abc\xff")
    with pytest.raises(UserError, match="0xff at offset 403.*latin-1.*--errors=replace"):
        list(text_file.documents(str(tmp_path / "bad.txt")))
    read = list(text_file.documents(str(tmp_path / "bad.txt"), errors="replace"))
    assert read[-1][1].endswith("abc\ufffd")


def prepare_cut(text: str) -> list[str]:
    a, b = int(len(text) * 0.8), int(len(text) * 0.9)
    return [text[:a], text[a:b], text[b:]]


@pytest.mark.parametrize(
    "name, data, words",
    [("a.jsonl", b'{"text": "x"}\n{"tekst": "y"}\n', ["a.jsonl:2", "'text'", "--text_key"]),
     ("a.jsonl", b'{"text": "x"}\n\n{"text": ', ["a.jsonl:3", "jsonl"]),
     ("a.jsonl", b'{"text": 5}\n', ["a.jsonl:1", "'text'"]),
     ("a.csv", b"label,body\n1,x\n", ["a.csv:2", "'text'", "--text_key"]),
     ("a.txt.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xcbH", ["a.txt.gz", "end-of-stream"]),
     ("a.txt.gz", b"this is no gzip", ["a.txt.gz", "gzip"]), ("a.txt.bz2", b"BZh9nonsense", ["a.txt.bz2"]),
     ("a.txt.xz", b"nonsense at all", ["a.txt.xz"])],
)
def test_damaged_files_are_named_and_leave_nothing(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        prepare.prepare("", str(tmp_path / name), root=tmp_path / "data")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert not list((tmp_path / "data").iterdir())


def test_large_vocabularies_are_uint32_and_ids_are_checked(tmp_path):
    import base64

    ranks = [bytes([i]) for i in range(256)] + [bytes([i, j]) for i in range(256) for j in range(256)]
    (tmp_path / "big.tiktoken").write_bytes(
        b"".join(base64.b64encode(rank) + b" %d\n" % i for i, rank in enumerate(ranks)))
    (tmp_path / "a.txt").write_text(MIXED * 20, encoding="utf-8", newline="")
    folder = prepare.prepare("", str(tmp_path / "a.txt"), str(tmp_path / "big.tiktoken"), root=tmp_path)
    meta = prepare.read_meta(folder)
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == 65794
    assert ["".join(part) for part in read_back(folder).values()] == prepare_cut(MIXED * 20)
    assert max(bin_ids(folder, "train")) > 2**15
    with pytest.raises(UserError, match="id 300 is out of range"):
        prepare.write_split(tmp_path / "x.bin", iter([np.array([1, 300])]), 300)


def test_the_same_text_gives_the_same_bytes(tmp_path):
    write_pages(tmp_path, "jsonl")
    seen = set()
    for threads in (1, 2, 2):
        folder = prepare.prepare(
            "", str(tmp_path / "pages.jsonl"), "bpe", 300, text_key="body", threads=threads,
            near_duplicates=0.5, overwrite=True, root=tmp_path / "data")
        meta = prepare.read_meta(folder)
        seen.add(json.dumps([meta["splits"], meta["tokenizer"]]))
        for split in prepare.SPLITS:
            data = (folder / f"{split}.bin").read_bytes()
            assert hashlib.sha256(data).hexdigest() == meta["splits"][split]["sha256"]
    assert len(seen) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="limits and signals are POSIX's")
@pytest.mark.parametrize("what", ["kill", "full disk"])
def test_what_breaks_off_leaves_the_old_data_set_or_none(tmp_path, what):
    (tmp_path / "a.txt").write_text("".join(f"{i} {i * i} words\n" for i in range(120_000)), encoding="utf-8")
    args = ["prepare.py", "--source=a.txt", "--tokenizer=bpe", "--vocab_size=300", "--overwrite"]
    prepare.prepare("a", str(tmp_path / "a.txt"), "bytes", root=tmp_path / "data")
    before = {p.name: p.read_bytes() for p in (tmp_path / "data/a").iterdir()}
    if what == "kill":
        for wait in ("spool.tmp", "train.bin"):
            run = subprocess.Popen([sys.executable, str(ROOT / args[0]), *args[1:]], cwd=tmp_path)
            while not (tmp_path / f"data/.a.{run.pid}.part/{wait}").exists() and run.poll() is None:
                time.sleep(0.001)
            run.kill()
            assert run.wait() == -signal.SIGKILL
            assert list(tmp_path.glob("data/.a.*.part"))
    else:
        code = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2500000, 2500000)); "
                "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
        done = subprocess.run([sys.executable, "-c", code, str(ROOT / args[0]), *args[1:]], cwd=tmp_path,
                              capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "File too large" in done.stderr
        assert not list(tmp_path.glob("data/.*"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "data/a").iterdir()} == before
    prepare.prepare("a", str(tmp_path / "a.txt"), "bytes", root=tmp_path / "data")  # there already; clears up
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["a"]


@pytest.mark.skipif(sys.platform == "win32", reason="there nobody knows whether a process is still running")
def test_killed_between_two_renames_the_old_one_comes_back(tmp_path):
    (tmp_path / "a.txt").write_text(MIXED * 9, encoding="utf-8")
    args = dict(dataset="a", source=str(tmp_path / "a.txt"), tokenizer="bytes", root=tmp_path / "data")
    folder = prepare.prepare(**args)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stamp = (folder / "train.bin").stat().st_mtime_ns
    folder.rename(folder.with_name(f".a.{gone.pid}.old"))
    (tmp_path / f"data/.a.{os.getpid()}.part").mkdir()  # of a run that goes on
    assert (prepare.prepare(**args) / "train.bin").stat().st_mtime_ns == stamp
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [f".a.{os.getpid()}.part", "a"]


def test_the_report_and_a_look_at_the_documents(tmp_path):
    write_pages(tmp_path, "jsonl.gz")
    args = ["--source=pages.jsonl.gz", "--text_key=body", "--vocab_size=300", "--report", "--show=2"]
    outputs = []
    for seed in (1, 2):
        done = script("prepare.py", *args, f"--seed={seed}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout[done.stdout.index("--- document"):])
    for words in ("bytes a token", "same settings", "read: 80 documents", "tokens are used"):
        assert words in done.stdout
    assert outputs[0] != outputs[1] and outputs[0].count("\nPage ") == 2


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for a process's largest memory")
def test_memory_is_bounded_and_throughput_is_not_bad(tmp_path):
    text = "".join(text for _, text in text_file.documents("python"))
    rng = np.random.default_rng(0)
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as f:
        for i in range(200_000):
            at = int(rng.integers(len(text) - 1000))
            f.write(json.dumps({"text": f"{i} {text[at:at + 1000]}"}) + "\n")
    code = ("import prepare; prepare.prepare('a', 'a.jsonl'); "  # getrusage would tell of the parent, too
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")
    start = time.time()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) / 1e6 < 0.8  # GB
    assert time.time() - start < 200 / 8 or not os.environ.get("TIMED")  # MB, at 8 MB/s
