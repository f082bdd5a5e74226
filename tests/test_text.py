"""From any file to texts: labelled rows and documents."""
import bz2
import csv
import functools
import gzip
import hashlib
import http.server
import io
import json
import lzma
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest

from config import UserError
from lib import text as text_file
from lib.rows import (CLASS_NAMES, as_csv, open_conll, open_rows, python_packages, read_paragraphs,
                      split_rows)
from lib.tasks import TASKS
from lib.text import documents, local_files, locked, records
from tests.helpers import CHINESE, MIXED, PAGES, ROOT, says, write_rows

COLUMNS = {"text": "", "pair": "", "label": "", "group": "", "header": None}


def rows_of(path, labelled=True, lists=(), optional=(), **columns):
    names = CLASS_NAMES._replace(nested={role: (list,) for role in lists}, optional=optional)
    return list(open_rows(str(path), {**COLUMNS, **columns}, names, labelled)[1])


def read_conll(path, labelled=True):
    return open_conll(str(path), {}, labelled)[1]


def read_squad(path):
    return TASKS["qa"].read(str(path), {**COLUMNS, "label": "answers"})


def texts_of(path, **settings):
    return [text for _, text in documents(str(path), **settings)]


def test_a_list_of_texts_is_a_document_each(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["one\ntext", "two"]), encoding="utf-8")
    assert [text for _, text in documents(str(path))] == ["one\ntext", "two"]
    found = {}
    whole, = [text for _, text in documents(str(tmp_path), found=found)]  # of a folder, it may be code
    assert whole.startswith("[") and "json_as_text" in found


def write_pages(folder, suffix: str):
    """PAGES in one file of this kind, each with what is special in it at its end. Returns both."""
    kind, _, packed = suffix.partition(".")
    end = '"' if kind == "tsv" else "\r\n\u2028"
    out = io.StringIO()
    if "json" in kind:
        objects = [json.dumps({"mood": i, "body": page + end}) for i, page in enumerate(PAGES)]
        out.write("\n".join(objects) if kind == "jsonl" else f"[{', '.join(objects)}]")
    else:
        rows = [["mood", "body"], *([i, page + end] for i, page in enumerate(PAGES))]
        if kind == "csv":
            csv.writer(out).writerows(rows)
        else:
            out.writelines("\t".join(map(str, row)) + "\n" for row in rows)
    data = out.getvalue().encode()
    path = folder / f"pages.{suffix}"
    path.write_bytes({"gz": gzip, "bz2": bz2, "xz": lzma}[packed].compress(data) if packed else data)
    return path, [page + end for page in PAGES]


@pytest.mark.parametrize("block", [5, 2**22])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "jsonl.gz", "csv.bz2", "tsv.xz"])
def test_one_reader_of_records_has_two_doors(tmp_path, monkeypatch, suffix, block):
    monkeypatch.setattr(text_file, "BLOCK", block)
    path, expected = write_pages(tmp_path, suffix)
    assert texts_of(path, text_key="body") == expected
    rows = rows_of(path, text="body", label="mood")
    assert [(row.text, row.label) for row in rows] == [(text, str(i)) for i, text in enumerate(expected)]
    if "json" not in suffix:  # by number the header is a document like the others
        assert texts_of(path, text_key="1") == ["body", *expected]


GOOD = "text,label\n" + "".join(f"a{i},x\nb{i},y\n" for i in range(30))
answers = functools.partial(rows_of, optional=("label", "pair"))


@pytest.mark.parametrize("name, content, read, said", [
    ("a.csv", GOOD, functools.partial(rows_of, label="mood"), ["a.csv", "'mood'", "text, label"]),
    ("a.csv", "text,other\na,b\n", rows_of, ["a.csv", "label", "--label_column"]),
    ("a.csv", GOOD + "lonely\n", rows_of, ["a.csv:62", "'label'"]),
    ("a.csv", GOOD + "a text, with a comma,x\n", rows_of, ["a.csv:62", "3 cells", "quotes"]),
    ("a.tsv", "text\tlabel\na\tb\tc\n", rows_of, ["a.tsv:2", "3 cells", "'\\t'"]),
    ("a.csv", GOOD + '"open,x\n', rows_of, ["a.csv:62", "',' between them", "quotation mark"]),
    ("a.json", "[]", rows_of, ["a.json", "no examples"]),
    ("a.conll", "\n# a\n", read_conll, ["a.conll", "no examples"]),
    ("a.csv", b"text,label\na,x\n\xff,y\n", rows_of, ["a.csv:3", "UTF-8", "0xff", "--encoding=cp1252"]),
    ("a.csv", "label,body\n1,x\n", texts_of, ["a.csv:1", "'text'", "--text_key"]),
    ("missing.csv", None, rows_of, ["missing.csv", "cannot be read"]),
    ("missing.txt", None, texts_of, ["missing.txt", "no such file"]),
    ("", None, rows_of, ["a folder, where a file is wanted; it has none"]),
    ("a.jsonl", '{"text": "a", "label": "x"}\n\n{"text": \n', rows_of, ["a.jsonl:3", "JSON"]),
    ("a.jsonl", '{"text": "x"}\n{"tekst": "y"}\n', texts_of, ["a.jsonl:2", "'text'", "--text_key"]),
    ("a.json", '[{"text": "x"}, {"text": 5}]', texts_of,
     ["a.json:2", "a int, no text, under 'text'", "--skip_bad_rows"]),
    ("a.jsonl", '{"data": {"body": "x"}}\n', texts_of, ["a.jsonl:1: no text under 'text'", "NAME.NAME"]),
    ("a.jsonl", '{"body": "' + "x" * 200 + '", "end": "y"}\n', texts_of,
     ["a.jsonl:1: no text under", "end: 'y'"]),
    ("a.json", "[1, 2]", rows_of, ["a.json:1", "object"]),
    ("a.json", '"text"', rows_of, ["a.json", "list of objects"]),
    ("a.json", '{"train": [{"text": "a"}], "test": [{"text": "b"}]}', rows_of, ["lists, train, test"]),
    ("clinc.json", '{"val": [["a", "x"]], "train": [["b", "y"], ["c", "z"]]}', rows_of, ["lists, val"]),
    ("a.parquet", b"PAR1\x15\x04", rows_of, ["a.parquet: a Parquet file", ".csv", ".jsonl"]),
    ("a.json", "[" * 100_000, rows_of, ["a.json:1", "recursion"]),
    ("a.json", '[{"text": ["a"], "label": "x"}]', rows_of, ["a.json:1", "'text' is no text"]),
    ("a.json", '[{"text": "a", "label": ["x"]}]', rows_of, ["a.json:1", "'label' is no text"]),
    ("a.json", '{"data": [{"paragraphs": [{"context": "?"}]}]}', read_squad, ["a.json: article 1", "qas"]),
    ("a.json", '[{"context": null, "qas": [{"id": 7, "question": "?", "answers": []}]}]', read_squad,
     ["article 1, question 7", "'context' is missing"]),
    ("a.conll", "a\tO\nb\t\n", read_conll, ["a.conll:2: not a word and its tag", "'b '"]),
    ("a.conll", "a\tO\n\tO\n", read_conll, ["a.conll:2: not a word and its tag", "' O'"]),
    ("a.txt", b"", texts_of, ["a.txt", "empty"]),
    ("a.dat", b"\x7fELF\0\0\1", texts_of, ["a.dat", "binary"]),
    ("a.txt", "café".encode("latin-1"), texts_of, ["a.txt:1", "offset 3", "0xe9", "--encoding", "--errors"]),
    ("a.txt.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xcbH", texts_of, ["a.txt.gz", "end-of-stream"]),
    ("a.csv.gz", b"this is no gzip", rows_of, ["a.csv.gz", "gzip"]),
    ("", None, texts_of, ["no text in this folder"]),
])
def test_bad_files_are_one_line(tmp_path, name, content, read, said):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read(str(tmp_path / name))
    says(error, *said)


@pytest.mark.parametrize("name, begin, end", [("a.jsonl", "", ""), ("a.json", "[", "]")])
def test_a_text_may_be_within_a_record(tmp_path, name, begin, end):
    (tmp_path / name).write_text(begin + '{"a": {"b": {"c": "deep"}}, "a.b": "plain"}' + end)
    assert texts_of(tmp_path / name, text_key="a.b.c") == ["deep"]
    assert texts_of(tmp_path / name, text_key="a.b") == ["plain"]  # a name with a point comes first
    with pytest.raises(UserError, match="no text under 'd'; it has b: "):
        texts_of(tmp_path / name, text_key="a.d")



@pytest.mark.parametrize("name, content, expected", [
    ("a.tsv", 'he said "no\t1\nyes\t0\n', [('he said "no', "1"), ("yes", "0")]),  # no header, a lone quote
    ("a.txt", "text\tlabel\na, b\tx\n", [("a, b", "x")]),
    ("a.csv", '\ufeff Text ,LABEL\r\n"a\r\nb",x\r\n', [("a\r\nb", "x")]),
    ("a.csv", "a,1\rb,2\r", [("a", "1"), ("b", "2")]),
    ("a.csv", "text,label\na, x \n,\n\nb,y,,\n", [("a", "x"), ("b", "y")]),
    ("a.csv", "\ufefftext;label\r\n\"a; b\";x\r\nc;y\r\n", [("a; b", "x"), ("c", "y")]),  # Excel's
    ("a.tsv", 'text\tlabel\n"a \\"b\\""\t"x"\n"\\"c\\" d"\t"y"\n', [('a "b"', "x"), ('"c" d', "y")]),  # R's
    ("a.csv", 'text,label\n"a \\"b\\", c",x\n', [('a "b", c', "x")]),
    ("a.csv", 'text,label\n"C:\\",x\n"a ""b\\""",y\n', [("C:\\", "x"), ('a "b\\"', "y")]),
    ("a.json", '{"text": ["a", "b"], "label": ["x", "y"]}', [("a", "x"), ("b", "y")]),  # of columns
    ("a.json", '{"text": {"0": "a", "1": "b"}, "label": {"0": "x", "1": "y"}}', [("a", "x"), ("b", "y")]),
    ("a.json", '{"0": {"text": "a", "label": "x"}, "1": {"text": "b", "label": "y"}}',
     [("a", "x"), ("b", "y")]),
    ("a.json", '[["a", {"label": "x"}], ["b", {"label": "y"}]]', [("a", "x"), ("b", "y")]),  # spaCy's
    ("a.jsonl", '{"text": 5, "label": 0.5}\r\n\n{"text": "carriage\\rreturn", "label": ["x", null]}\n',
     [("5", "0.5"), ("carriage\rreturn", ["x", None])]),
])
def test_odd_files_are_read_as_they_are_meant(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert [(row.text, row.label) for row in rows_of(tmp_path / name, lists=("label",))] == expected


def test_odd_texts_come_back_as_they_were(tmp_path, capsys):
    texts = ["", "nul\0here", 'quote " and, comma', "x" * 10_000_000, "\u4e2d\u6587", "two\nlines", "last"]
    rows = rows_of(write_rows(tmp_path / "a.csv", ("text", "label"), texts, "abcdefg"))
    assert [row.text for row in rows] == [text.replace("\0", "\ufffd") for text in texts]
    assert rows[6].where.endswith(":9")  # two\nlines took two
    assert "a.csv:3: a NUL byte" in capsys.readouterr().err


def test_half_a_character_is_replaced_and_told(tmp_path, capsys):
    expected = {"half \ud83d": "half ?", "whole \ud83d\ude00": "whole \U0001f600",
                r"\ud83d spelt": r"\ud83d spelt", "carriage\rreturn": "carriage\rreturn", "": ""}
    path, texts = tmp_path / "a.jsonl", list(expected.values())
    path.write_text("\n".join(json.dumps({"text": text, "label": "x"}) for text in expected))
    assert [row.text for row in rows_of(path)] == texts == texts_of(path)
    said = capsys.readouterr().err
    assert said.count("half a character") == said.count("a.jsonl:1:") == 2  # once for each reading
    written = as_csv([text, i] for i, text in enumerate(texts))
    assert "\r\n" not in written
    assert [row[0] for row in csv.reader(written.splitlines(keepends=True))] == texts


def test_rows_to_be_answered_need_no_label_and_are_all_kept(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\na,x\n"",\nb\n', encoding="utf-8")
    rows = rows_of(tmp_path / "a.csv", labelled=False)
    assert [(row.text, row.label) for row in rows] == [("a", "x"), ("", ""), ("b", None)]
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text_pair": "b"}\n{"text": "c", "id": 7}')
    rows = rows_of(tmp_path / "a.jsonl", optional=("label", "pair"))
    assert [(row.text, row.pair, row.label, row.id) for row in rows] == [("a", "b", None, "1"),
                                                                         ("c", None, None, "7")]


def test_sentences_questions_and_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\ufeffa O\nb B\n\n\n\ufeffc O\n \nd O", encoding="utf-8")  # joined of two files
    rows = read_conll(path)
    assert [(row.words, row.label, row.id) for row in rows] == [
        (["a", "b"], ["O", "B"], "1"), (["c"], ["O"], "2"), (["d"], ["O"], "3")]
    assert rows[1].where == f"{path}:5" and read_conll(path, labelled=False)[0].label == ["O", "B"]
    assert [row.text for row in read_paragraphs(path)] == ["a O\nb B", "\ufeffc O\n \nd O"]
    golds = [{"text": "b", "answer_start": 7}, {"text": "z"}, {"text": ""}]
    path = tmp_path / "a.json"
    paragraph = {"context": "abc abc b", "qas": [{"id": 1, "question": "?", "answers": golds}]}
    path.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}), encoding="utf-8")
    row, = read_squad(path)
    assert (row.text, row.pair, row.unit) == ("?", "abc abc b", "article 0")
    assert row.label == [("b", 8), ("z", -1)]
    settled = {"text": "question", "pair": "context", "label": "answers", "header": True, "unused": []}
    row, = TASKS["qa"].read(str(path), settled)  # columns of a run of before, which did not name the split
    assert row.unit == "article 0"


def test_parts_are_alike_in_labels_and_keep_equal_keys_together():
    keys = [i // 2 for i in range(400)]
    part = split_rows(keys, ["rare" if i < 40 else "often" for i in range(400)], 10, 0)
    assert np.bincount(part).tolist() == [40] * 10
    assert np.bincount(part[:40], minlength=10).tolist() == [4] * 10
    assert (part[::2] == part[1::2]).all()
    assert (split_rows(keys, None, 10, 0) != split_rows(keys, None, 10, 1)).any()


def test_the_library_of_python_is_there_without_a_download():
    files = dict(text_file.standard_library())
    assert len(files) > 300 and sum(map(len, files.values())) > 5_000_000
    assert not any("site-packages" in name or "/test/" in f"/{name}" for name in files)
    splits = python_packages()
    names = [Counter(row.where.partition(":")[0] for row in rows) for rows in splits]
    assert len(set().union(*names)) == sum(map(len, names))  # a file is in one split
    assert max(names[1].values()) <= 20 >= max(names[2].values())
    assert 0.7 < len(splits[1]) / len(splits[2]) < 1.4
    for rows in splits:
        assert {row.label for row in rows} >= {"asyncio", "email", "xml"}
        assert all(row.text and len(row.text) <= 400 and row.where.startswith(row.label) for row in rows)


def test_several_sources_and_the_files_of_a_folder(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    files = {"a/b/2.txt": PAGES[2], "a/1.txt": PAGES[1], "a/3.json": PAGES[3], "a/4.json": '[{"a": 1}]',
             "a/.hidden": "secret", "a/picture.png": "\x89PNG\0\0", "5.md": PAGES[5], "6.md": PAGES[6],
             "a/8.json": json.dumps({"text": PAGES[8] * 9, "authors": [{"text": "no document"}]})}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with gzip.open(tmp_path / "7.txt.gz", "wt", encoding="utf-8-sig") as f:  # a byte order mark is no text
        f.write(PAGES[7])
    found = {}
    texts = texts_of(f"{tmp_path}/a, {tmp_path}/*.md,{tmp_path}/7.txt.gz", found=found)
    assert texts == [PAGES[1], PAGES[3], '[{"a": 1}]', PAGES[8] * 9, PAGES[2], PAGES[5], PAGES[6], PAGES[7]]
    assert {what: entry["documents"] for what, entry in found.items()} == {
        "hidden": 1, "empty_or_binary": 1, "json_as_text": 2}


def test_a_large_file_is_read_in_blocks_as_if_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "BLOCK", 64)
    text = MIXED * 5 + "y" * 3000 + "\n" + CHINESE * 20
    path = tmp_path / "a.txt"
    for encoding in ("utf-8", "utf-16", "gb18030"):
        path.write_text(text, encoding=encoding, newline="")
        parts = list(documents(str(path), encoding))
        assert "".join(part for _, part in parts) == text
        assert len(parts) > 20 and not any(name for name, _ in parts[1:])
    path.write_bytes(b"fine \xc3\xa9\n" * 50 + b"abc\xff")
    with pytest.raises(UserError, match="txt:51.*0xff at offset 403.*but for some bytes: --errors=replace"):
        texts_of(path)
    assert texts_of(path, errors="replace")[-1].endswith("abc\ufffd")


def test_a_folder_may_hold_texts_of_several_encodings(tmp_path):
    for name, encoding in (("a", "utf-8"), ("b", "gb18030"), ("c", "utf-16"), ("d", "utf-8-sig")):
        (tmp_path / f"{name}.txt").write_text(CHINESE * 20 + name, encoding=encoding)
    (tmp_path / "e.bin").write_bytes(b"a\0" * 2000)  # numbers, not UTF-16 without its mark
    found = {}
    texts = [text for _, text in documents(str(tmp_path), "", found=found)]
    assert texts == [CHINESE * 20 + name for name in "abcd"]
    assert found["recognised"]["documents"] == 2 and "b.txt: read as GBK" in found["recognised"]["example"]
    assert found["empty_or_binary"]["documents"] == 1


@pytest.mark.parametrize("content, advice", [
    (CHINESE.encode(), "not GB18030 .*: UTF-8: --encoding=utf-8, or --encoding= for each"),
    (CHINESE.encode("gb18030") + b"\xb1", "not GB18030 .*: it ends within a character: --errors=replace"),
])
def test_what_is_not_gbk_is_not_called_utf_8_but_for_some_bytes(tmp_path, content, advice):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=advice):
        list(documents(str(tmp_path / "a.txt"), "gb18030"))


def test_parquet_comes_by_the_datasets_library(tmp_path):
    pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "hub").mkdir()
    parquet.write_table(pyarrow.table({"text": PAGES, "n": list(range(80))}), tmp_path / "hub/pages.parquet")
    assert texts_of(f"hf:{tmp_path}/hub") == PAGES
    watched = local_files(f"hf:{tmp_path}/hub#default")  # for changes
    assert [path.name for path in watched] == ["pages.parquet"]
    (tmp_path / "two").mkdir()
    for split in ("train", "test"):
        parquet.write_table(pyarrow.table({"text": [split]}), tmp_path / f"two/{split}-0.parquet")
    found = {}
    assert [text for _, text in documents(f"hf:{tmp_path}/two", found=found)] == ["train"]
    assert found["other_splits"]["example"].endswith("two: test")
    (tmp_path / "two/train-0.parquet").unlink()
    with pytest.raises(UserError, match="no split train, but test"):
        texts_of(f"hf:{tmp_path}/two")
    with pytest.raises(UserError, match="--text_key"):
        texts_of(f"hf:{tmp_path}/hub", text_key="n")


def test_a_url_is_fetched_once_whole_and_checked(tmp_path):
    path, expected = write_pages(tmp_path, "jsonl.gz")
    data, asked = path.read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:-9] if "broken" in self.path else data)

        def log_message(self, *args):
            pass

    read = functools.partial(texts_of, text_key="body", downloads=tmp_path / "kept")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match="another file"):
            read(f"{url}/pages.jsonl.gz#sha256={'0' * 64}")
        with pytest.raises(UserError, match="broke off"):
            read(f"{url}/broken.jsonl.gz")
        for _ in range(2):
            assert read(f"{url}/pages.jsonl.gz#sha256={hashlib.sha256(data).hexdigest()}") == expected
        server.shutdown()
    assert len(asked) == 3 and len(list((tmp_path / "kept").iterdir())) == 1
    with pytest.raises(UserError, match="cannot be downloaded.*--source=FILE"):
        read(f"{url}/other.txt")


def test_a_lock_is_waited_for_and_dies_with_its_process(tmp_path, capsys):
    holder = ("import lib.text, pathlib, sys\n"
              "with lib.text.locked(pathlib.Path(sys.argv[1])): print('held', flush=True); input()")
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "a")], cwd=ROOT,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        threading.Timer(0.5, other.kill).start()
        with locked(tmp_path / "a"):
            assert other.wait() and "another process" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    (tmp_path / ".b.lock").mkdir()  # there can be none
    with locked(tmp_path / "b"):
        assert "no lock here" in capsys.readouterr().out


def test_cells_that_a_spreadsheet_would_run_get_an_apostrophe_that_is_taken_off(tmp_path):
    cells = {"=1+1": "'=1+1", "+a": "'+a", "-x": "'-x", "@SUM(A1)": "'@SUM(A1)", "\t=1": "'\t=1",
             "-inf": "'-inf", "'=1": "''=1"}
    cells.update({cell: cell for cell in ("-5", "+1.5e3", "it's", "'tis", "a=b", "")})
    written = as_csv([("text", "label"), *((cell, "x") for cell in cells)])
    assert [row[0] for row in csv.reader(io.StringIO(written))][1:] == list(cells.values())
    (tmp_path / "a.csv").write_text(written, encoding="utf-8")
    read = [row for _, row in records(tmp_path / "a.csv", [written], True)]
    assert [row["text"] for row in read] == list(cells)
