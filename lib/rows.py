"""
Labelled files to rows, for finetune.py and whoever uses what it made.

    rows = read_rows("reviews.csv", {"text": "", "pair": "", "label": "", "group": ""})

Nothing here knows tokens, or tasks. How a file becomes text, and text becomes records, is in lib/text.py.
"""
from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from config import UserError
from lib.text import blocks, parse_json, read_text, records, standard_library


@dataclass
class Row:
    where: str  # file:line, for messages
    text: str  # the text; the question of an answer
    pair: str | None = None  # the second text; the context of an answer
    label: Any = None  # a string, or a list; of a question [(answer, where it begins), ...]
    group: str = ""
    id: str = ""
    words: list[str] | None = None  # if each has a tag


USUAL = {  # role -> names that its column often has; a number if there is no header
    "text": ("text", "sentence", "sentence1", "review", "content", "question", "instruction", "prompt",
             "tokens", "0"),
    "pair": ("text_pair", "sentence2", "input"),
    "label": ("label", "labels", "tags", "target", "class", "score", "output", "response", "completion", "1"),
}


def read_rows(path: str, columns: dict[str, str | int], labelled: bool = True,
              lists: Collection[str] = (), optional: Collection[str] = ()) -> list[Row]:
    """The examples in a .csv, .tsv, .jsonl or .json. Raises UserError, with file and line.

    columns: of each role (text, pair, label, group) the column's name or number; "": one that is usual.
    labelled: every row must have a label. lists: the roles whose cells may be lists, which they stay.
    optional: pair may be missing in some rows, label in all of them.
    """
    names = {str(name).lower() for name in columns.values()}.union(*USUAL.values())
    names = {name for name in names if name and not name.isdigit()}
    if not labelled:
        lists = (*lists, "label")
    rows, found = [], None
    for line, record in records(path, blocks(path, labelled=True), names, empty=not labelled):
        if found is None:
            found = {role: find_column(path, role, name, list(record)) for role, name in columns.items()}
            for role in ("text", "label") if labelled and "label" not in optional else ("text",):
                if found[role] is None:
                    raise UserError(f"{path}: no column for the {role} among {', '.join(record)}: name it "
                                    f"with --{role}_column=...")
        where, cells = f"{path}:{line}", {}
        for role, name in found.items():
            cell = None if name is None else record.get(name)
            may_lack = not labelled if role == "label" else role in optional
            if cell is None and name is not None and not may_lack:
                raise UserError(f"{where}: has no {name!r}: it reads {str(record)[:60]}")
            if isinstance(cell, dict) or (isinstance(cell, list) and role not in lists):
                raise UserError(f"{where}: {name!r} is no text: {str(cell)[:60]}")
            cells[role] = cell if cell is None or isinstance(cell, list) else str(cell)
        label = cells.get("label")
        rows.append(Row(where, cells["text"], cells.get("pair"),
                        label.strip() if isinstance(label, str) else label,
                        cells.get("group") or "", str(record.get("id", line))))
    return some(path, rows)


def find_column(path: str, role: str, asked: str | int, names: list[str]) -> str | None:
    """The column that was asked for, or one that is usually called so."""
    if asked == "":
        lower = [name.lower() for name in names]
        usual = [name for name in USUAL.get(role, ()) if name in lower]
        return names[lower.index(usual[0])] if usual else None
    if str(asked) in names:
        return str(asked)
    if str(asked).isdigit() and int(asked) < len(names):
        return names[int(asked)]
    raise UserError(f"{path}: has no column {asked!r}: it has {', '.join(names)}")


def some(path: str, rows: list[Row]) -> list[Row]:
    if not rows:
        raise UserError(f"{path}: holds no examples")
    return rows


def read_paragraphs(path: str) -> list[Row]:
    """Texts with an empty line between them."""
    parts = [part.strip() for part in read_text(path).split("\n\n")]
    return some(path, [Row(path, part) for part in parts if part])


def read_conll(path: str, labelled: bool = True) -> list[Row]:
    """A word a line, its tag in the last column; an empty line between sentences."""
    rows, words, tags = [], [], []
    for line, text in enumerate([*read_text(path).split("\n"), ""], 1):
        text = text.strip("\ufeff")  # within a file, if files were joined
        cells = [cell.strip() for cell in (text.split("\t") if "\t" in text else text.split())]
        if any(cells):
            if not cells[0]:
                raise UserError(f"{path}:{line}: a tag without a word: {text[:40]!r}")
            if labelled and (len(cells) < 2 or not cells[-1]):
                raise UserError(f"{path}:{line}: a word without a tag: {text[:40]!r}")
            words.append(cells[0])
            tags.append(cells[-1])
        elif words:
            rows.append(Row(f"{path}:{line - len(words)}", " ".join(words), label=tags if labelled else None,
                            id=str(len(rows) + 1), words=words))
            words, tags = [], []
    return some(path, rows)


def read_squad(path: str) -> list[Row]:
    """SQuAD's JSON. An answer that does not stand where it is said to is looked for nearby; -1: nowhere."""
    rows, where = [], "data"
    _, found = next(parse_json(path, [(1, read_text(path))]), (1, None))
    try:
        for n, article in enumerate(found["data"]):
            where = f"article {n + 1}"
            title = article.get("title") or f"article {n}"
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for one in paragraph["qas"]:
                    where = f"article {n + 1}, question {one['id']}"
                    for name, text in (("context", context), ("question", one["question"])):
                        if not isinstance(text, str):
                            raise TypeError(f"{name} is {text!r}")
                    answers = [place_answer(answer, context) for answer in one.get("answers") or ()]
                    rows.append(Row(f"{path}: {one['id']}", one["question"], context,
                                    [answer for answer in answers if answer[0]], title, str(one["id"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {where}: not in SQuAD's format: {type(error).__name__} {error}: wanted "
                        "data, paragraphs, context, qas, id, question, answers, text, answer_start") from None
    return some(path, rows)


def place_answer(answer: dict, context: str) -> tuple[str, int]:
    text, begin = answer["text"], int(answer.get("answer_start", 0))
    if context[begin:begin + len(text)] != text:
        places = [i for i in range(len(context)) if context.startswith(text, i)]
        begin = min(places, key=lambda i: abs(i - begin), default=-1)
    return text, begin


def python_packages() -> tuple[list[Row], list[Row], list[Row]]:
    """Which package of Python's library is this snippet from? Rows to train on, validate and test.

    Snippets of 400 characters; those of one file are in one split.
    """
    packages = {"asyncio", "email", "importlib", "multiprocessing", "tkinter", "unittest", "urllib", "xml"}
    files = [(name, text) for name, text in standard_library() if name.split("/")[0] in packages]
    train, val, test = [], [], []
    for n, (name, text) in enumerate(files):
        rows = {8: val, 9: test}.get(n % 10, train)
        for start in range(0, len(text), 600):
            where = f"{name}:{start}"
            rows.append(Row(where, text[start:start + 400], label=name.split("/")[0], id=where))
    return train, val, test


def split_rows(keys: Sequence, labels: Sequence | None, k: int, seed: int) -> np.ndarray:
    """The part of each row, (N,) numbers from 0 to k - 1: k parts alike in size, and in labels if given.

    Rows with the same key stay together: nothing is tested on what it was trained on.
    """
    groups = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    groups = list(groups.values())
    order = np.random.default_rng(seed).permutation(len(groups))
    groups = [groups[i] for i in order]
    if labels is not None:
        groups.sort(key=lambda group: str(labels[group[0]]))  # stable: shuffled within a label
    part = np.zeros(len(keys), np.int64)
    for n, group in enumerate(groups):
        part[group] = n % k
    return part


def as_csv(rows: Iterable[Sequence]) -> str:
    """A line each. A carriage return is quoted like a line break: csv.reader takes it for one."""
    found = []
    for row in rows:
        line = io.StringIO(newline="")
        csv.writer(line, lineterminator="\r\n").writerow(row)  # whatever is in that is quoted in a cell
        found.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(found)
