"""Labelled files: what is read, by which columns, and what is refused."""
import gzip
import json

import pytest

from config import UserError
from lib.text import blocks, records
from tests.helpers import says

# -----------------------------------------------------------------------------
# Records

MANY = "".join(f"{i},text {i}\n" for i in range(200))


def read(path, names=("text",), bad=None):
    return list(records(path, blocks(path, labelled=True), names, bad=bad))


@pytest.mark.parametrize("name, content, line, words", [
    ("a.csv", "id,text\n7,Hello, world\n" + MANY, 2, ["3 cells", "id, text", "quotes", "--skip_bad_rows"]),
    ("a.csv", "id,text\n1,a\n2,\"stray\n" + MANY, 3, ["quot"]),  # to the end of the file
    ("a.csv", "id,text\n1,a\n2,\"stray\n" + MANY + '3,said "hi"\n', 3, ["quot"]),  # another closes it
    ("a.csv", "id,text\n1,a\n2,\"stray\n" + MANY + '3,a 24"\n', 3, ["200 rows between"]),  # legally so
    ("a.tsv", "id\ttext\n1\ta\tb\n", 2, ["3 cells", "tab"]),
    ("a.jsonl", '{"text": "a"}\n{"text": \n{"text": "b"}\n', 2, ["not JSON"]),
    ("a.jsonl", '{"text": "a"}\n["text"]\n{"text": "b"}\n', 2, ["wanted an object"]),
])
def test_a_row_that_is_none_is_refused_or_counted(tmp_path, name, content, line, words):
    path, errors = tmp_path / name, []
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read(path)
    says(error, f"{name}:{line}: ", *words)
    found = read(path, bad=errors.append)
    assert str(errors[0]) == str(error.value)
    if name == "a.csv":  # all other rows are there, each by itself
        kept = [record["text"] for _, record in found]
        assert set(kept) >= {f"text {i}" for i in range(200)} and not any("\n" in text for text in kept)


OBJECTS = [{"text": f"t{i}", "url": "u"} for i in range(3)]
JSON_LINES = "\n".join(map(json.dumps, OBJECTS))


@pytest.mark.parametrize("name, content", [
    ("a.json", json.dumps(OBJECTS)), ("a.json", json.dumps(OBJECTS, indent=1)), ("a.json", JSON_LINES),
    ("a.json.gz", JSON_LINES), ("a.jsonl", JSON_LINES), ("a.jsonl", json.dumps(OBJECTS)),
    ("a.json", json.dumps({"version": 1, "data": OBJECTS}) + "\n"), ("a.csv", "text;url\nt0;u\nt1;u\nt2;u\n"),
    ("a.csv", "sep=;\ntext;url\nt0;u\nt1;u\nt2;u\n"), ("a.csv", '"sep=|"\r\ntext|url\r\nt0|u\r\nt1|u\r\nt2|u\r\n'),
    ("a.csv", "text\turl\nt0\tu\nt1\tu\nt2\tu\n"), ("a.csv", "text,url\nt0,u\nt1,u\nt2,u"),
])
def test_records_are_found_however_they_are_kept(tmp_path, name, content):
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [record for _, record in read(tmp_path / name)] == OBJECTS


def test_texts_with_lines_and_other_delimiters_stay_whole(tmp_path):
    (tmp_path / "a.csv").write_text('text\n"a; b\nc, d\n\ne"\nno; yes\nplain\n', encoding="utf-8")
    assert [(line, record["text"]) for line, record in read(tmp_path / "a.csv")] == [
        (2, "a; b\nc, d\n\ne"), (6, "no; yes"), (7, "plain")]
    (tmp_path / "b.csv").write_text(",text,text\n0,a,b\n", encoding="utf-8")
    assert read(tmp_path / "b.csv") == [(2, {"column 0": "0", "text": "a", "text.2": "b"})]
