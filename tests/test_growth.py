"""Time grows with the work: of small functions here, of whole parts in tools/growth.py."""
import json
import re
import time

import numpy as np
import pytest

from lib.hub_tokenizer import read_hub_tokenizer, tokenizer_json
from lib.rows import CLASS_NAMES, Row, open_rows, tags_of_spans, to_amount
from lib.tasks import TASKS, Example
from lib.text import documents, separator
from lib.tokenizer import make_tokenizer
from sample import as_text

BYTES = make_tokenizer("bytes", [], 0)
ASKED = {"text": "", "label": "", "header": None}


def answering(n):
    head = {"task": "qa", "labels": ["first", "last"], "max_length": n, "no_answer": False}
    return TASKS["qa"](head, BYTES)


def rows_of(content, folder, **asked):
    """Reads them, and passes over bad ones."""
    file = folder / "rows.csv"
    file.write_text(content, encoding="utf-8")
    return lambda: list(open_rows(str(file), {**ASKED, **asked}, CLASS_NAMES, bad=[].append)[1])


def columns(n, folder):
    return rows_of("text,label" + "".join(f",c{i}" for i in range(n)) + "\na,b" + ",1" * n, folder)


def labels(n, folder):
    names = ",".join(f"c{i}" for i in range(n))
    return rows_of(f"text,{names}\na" + ",1" * n, folder, label=names)


def bad_rows(n, folder):
    return rows_of("text,label\n" + '"a" b,c\n' * n + "a,b\n", folder)


def new_names(n, folder):
    rows = ({"text": "a", "label": "b", f"more {i}": 1} for i in range(n))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return lambda: list(open_rows(str(folder / "rows.jsonl"), ASKED, CLASS_NAMES)[1])


def divided(n, folder):
    (folder / "one.txt").write_text("a\n---\nb" + " \n" * n + "c", encoding="utf-8")
    return lambda: list(documents(str(folder / "one.txt"), split_on="---"))


def spans(n, folder):
    every = [[i, 50 * n - i, "ALL"] for i in range(n)] + [[50 * i, 50 * i + 4, "X"] for i in range(n)]
    row = Row("", "word " * 10 * n, label=every)
    return lambda: tags_of_spans(row)


def windows(n, folder):
    row = Row("", "what?", "word " * n, label=[("word", 0)])
    return lambda: answering(100).inputs([row])


def best_span(n, folder):
    example = Example(0, [], None, np.arange(n), np.stack((np.arange(n), np.arange(n) + 1), axis=1))
    row, out = Row("", "what?", "x" * n), np.random.default_rng(0).standard_normal((n, 2))
    return lambda: answering(n).best_span(row, example, out)


def written(n, folder):
    return lambda: list(as_text([*b"word "] * n, BYTES, ["stop"], "prompt" * n))


def numbers(n, folder):
    found = "1" * n + "x", "1" + " " * n + "x", "," * n, "0." + "1" * n + "x"
    return lambda: [to_amount(text) for text in found]


def added_tokens(n, folder):
    pytest.importorskip("tokenizers")
    vocab = {"<unk>": 0, "</s>": 1, "a": 2}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    content = {"tokenizer.json": tokenizer_json({"</s>": 1}, {"model": model, "pre_tokenizer": None}),
               "tokenizer_config.json": {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"},
               "added_tokens.json": {f"<extra_{i}>": 3 + i for i in range(n)}}
    for name, one in content.items():
        (folder / name).write_text(json.dumps(one), encoding="utf-8")
    return lambda: read_hub_tokenizer(folder)


@pytest.mark.parametrize("work, n", [
    (columns, 2000), (labels, 250), (bad_rows, 1000), (new_names, 2000), (divided, 2000), (spans, 100),
    (windows, 4000), (best_span, 250), (written, 8000), (numbers, 2000), (added_tokens, 250)])
def test_no_time_grows_faster_than_the_work(work, n, tmp_path):
    """Sixteen times the work may take 16 times as long, or 48 on a busy machine, but not 256 times."""
    took = []
    for size in (n, 16 * n):
        do = work(size, tmp_path)
        began = time.process_time()
        do()
        took.append(time.process_time() - began)
    assert took[1] < 48 * max(took[0], 0.002), took


@pytest.mark.parametrize("split_on", ["---", "\n---\n", "\t", " x", "\n", "\n\n"])
def test_separators_take_the_white_space_around_them(split_on):
    """As by the pattern alone, which searches white space without one again from each of its places."""
    plain = re.compile(separator(split_on).pattern.removesuffix(r"|(?P<none>\s+)"))
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(["---", "\n", " ", "\t", "\r\n", "x", "y"], 40))
        found = [place.span() for place in separator(split_on).finditer(text) if place.lastgroup != "none"]
        assert found == [place.span() for place in plain.finditer(text)]


def test_a_word_has_the_longest_span_that_touches_it():
    rng = np.random.default_rng(0)
    for _ in range(100):
        text = " ".join(["ab", "abc", "a"][i] for i in rng.integers(3, size=20))
        begins, sizes = rng.integers(len(text), size=8), rng.integers(1, 9, size=8)
        given = [(int(a), int(a + n), "XYZ"[n % 3]) for a, n in zip(begins, sizes)]
        _, tags, _ = tags_of_spans(Row("", text, label=given))
        for word, tag in zip(re.finditer(r"\w+", text), tags, strict=True):
            inside = [span for span in given if span[0] < word.end() and word.start() < span[1]]
            span = max(inside, key=lambda span: span[1] - span[0], default=None)
            assert tag == ("O" if not span else f"{'B' if word.start() <= span[0] else 'I'}-{span[2]}")
