"""
Labelled files to rows, for finetune.py and for whoever uses what it made.

    asked = {"text": "", "pair": "", "label": "", "header": None}     "": by its usual names
    columns, rows = open_rows("reviews.csv", asked, CLASS_NAMES)      an iterator
    print(described(columns))                                         text: review, label: stars; not used: id

Which column is what is decided once, from the training file: `columns` is kept, and given for later files.
Nothing here knows tokens, or tasks. How a file becomes text, and text becomes records, is in lib/text.py.
"""
from __future__ import annotations

import ast
import codecs
import csv
import heapq
import io
import itertools
import json
import math
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from config import SettingError, UserError
from lib.text import (blocks, column_names, encoding_of, is_formula, kind_of, lines, parse_json, records,
                      refuse, standard_library)


@dataclass(slots=True)
class Row:
    where: str  # file:line, for messages
    text: str  # the text; the question of an answer
    pair: str | None = None  # the second text; the context of an answer
    label: Any = None  # a string, or a list; of a question [(answer, where it begins), ...]; None: none
    group: str = ""
    id: str = ""
    words: list[str] | None = None  # if each has a tag
    unit: str = ""  # rows of one unit, such as a user or an article, stay together in splits
    start: Any = None  # where an answer begins, if a column of its own says so


# -----------------------------------------------------------------------------
# Names of columns, in lower case, with _ for spaces and dashes; those that come first are taken first

class Names(NamedTuple):
    texts: tuple[str, ...]  # of the text
    labels: tuple[str, ...] = ()
    readings: tuple[tuple[str, ...], ...] = ()  # (text, pair, label) that are taken together; "": any
    pairs: tuple[str, ...] = ()  # of the second text, whatever the first is called
    starts: tuple[str, ...] = ()  # of where an answer begins
    splits: tuple[str, ...] = ()  # of what stays together

    def all(self) -> set[str]:
        together = itertools.chain(*self.readings)
        return {*self.texts, *self.labels, *self.pairs, *self.starts, *self.splits, *together, *IDS} - {""}


def words_of(names: str) -> tuple[str, ...]:
    return tuple(names.split())


def together(readings: str) -> tuple[tuple[str, ...], ...]:
    """text+pair+label, each of which may be empty."""
    return tuple(tuple(reading.split("+")) for reading in readings.split())


IDS = words_of("id idx index guid uid qid")
TWO_TEXTS = together("""
    sentence1+sentence2 question1+question2 premise+hypothesis text+text_pair text_a+text_b text1+text2
    sentence_a+sentence_b sentence_1+sentence_2 query1+query2 s1+s2 #1_string+#2_string question+sentence
    question+passage+answer question+passage query+passage query+document question+context claim+evidence""")
ONE_TEXT = words_of("""
    text sentence review review_text reviewtext content review_body body comment_text sentimenttext tweet
    message phrase utterance question headline description short_description text_a document article abstract
    title query claim summary sms v2 文本 内容 评论 评论内容 微博中文内容 句子 标题""")
CLASSES = words_of("""
    label labels gold_label class category target sentiment airline_sentiment polarity emotion intent topic
    coarse_label label_coarse class_index is_duplicate is_sarcastic quality entailment_label
    entailment_judgment stance stars rating score overall tags _label_ v1 标签 类别 情感 情感倾向 分类""")
NUMBERS = words_of("""
    score similarity_score relatedness_score similarity label rating stars overall target value 评分""")
CLASS_NAMES = Names(ONE_TEXT, CLASSES, TWO_TEXTS)
NUMBER_NAMES = Names(ONE_TEXT, NUMBERS + CLASSES, TWO_TEXTS)
TAG_NAMES = Names(words_of("tokens words text sentence word"),
                  words_of("ner_tags tags labels label ner entities spans pos_tags upos"),
                  together("tokens++ner_tags tokens++tags text++spans"))
ANSWER_NAMES = Names(words_of("question query"), words_of("answers answer answer_text label"),
                     pairs=words_of("context passage paragraph document article text"),
                     starts=words_of("answer_start answer_starts start"), splits=("title",))
LM_NAMES = Names(words_of("text content body document story article sentence review"), (), together("""
    instruction+input+output instruction+context+response instruction+input+response instruction++output
    instruction++response instruction++answer trans_instruction+trans_input+trans_output prompt++completion
    prompt++response prompt++output prompt++answer question+context+answer question+context+response
    question++answer question++response query++response
    query++answer input++output input++target ask++answer source++target article++highlights dialogue++summary
    document++summary 问题++回答"""))
BEFORE = Names(  # what checkpoints were made with that keep no resolved columns
    words_of("text sentence sentence1 review content question instruction prompt tokens"),
    words_of("label labels tags target class score output response completion"),
    pairs=words_of("text_pair sentence2 input"))
# where an instruction has no one answer
TURNS = words_of("messages conversations conversation history parent_id chosen instances")
ROLES = ("text", "pair", "label", "group", "split", "start")


def plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def choose(path: str, names: list[str], columns: dict, usual: Names) -> dict[str, str | None]:
    """The column of each role: the one that was asked for, else by its usual names."""
    of_plain = {}
    for name in names:
        of_plain.setdefault(plain(name), []).append(name)
    found = {role: find_column(path, role, names, columns[role]) for role in ROLES
             if columns.get(role, "") not in ("", None)}
    learned = {}  # a group may be the label too
    for role, name in found.items():
        if role not in ("group", "split") and learned.setdefault(name, role) != role:
            raise UserError(f"{path}: the column {name} is asked for as the {learned[name]} and as the {role}: "
                            f"it is one of them; there are {', '.join(names)}")
    free = {name: which for name, which in of_plain.items() if learned.keys().isdisjoint(which)}
    asked = {role: plain(name) for role, name in found.items()}
    wanted = {}
    for reading in usual.readings:
        roles = {role: name for role, name in zip(ROLES, reading) if name}
        if all(asked[role] == name if role in asked else name in free for role, name in roles.items()):
            wanted = roles
            break
    known_of = {"text": usual.texts, "pair": usual.pairs, "label": usual.labels, "split": usual.splits,
                "start": usual.starts}
    for role, known in known_of.items():
        taken = set(wanted.values())
        usual_ones = [name for name in known if name in free and name not in taken]
        if role not in asked and role not in wanted and usual_ones:
            wanted[role] = usual_ones[0]
    for role, name in wanted.items():
        if role in found:
            continue
        if len(of_plain[name]) > 1:
            each = ", or ".join(f"--{role}_column={names.index(one)}" for one in of_plain[name])
            raise UserError(f"{path}: several columns for the {role}, {', '.join(of_plain[name])}: {each}")
        found[role] = of_plain[name][0]
    return {role: found.get(role) for role in ROLES}


def find_column(path: str, role: str, names: list[str], asked: str | int) -> str:
    """The column of this name, else of this number."""
    if str(asked) in names:
        return str(asked)
    alike = [name for name in names if plain(name) == plain(str(asked))]
    if len(alike) == 1:
        return alike[0]
    if str(asked).isdigit() and int(asked) < len(names):
        return names[int(asked)]
    raise UserError(f"{path}: has no column {asked!r} for the {role}: it has {', '.join(names)}: "
                    f"--{role}_column=NAME or its number")


def described(columns: dict) -> str:
    """One line: what each column is taken for, and which are not used."""
    used = [(role, columns[role]) for role in ROLES if columns.get(role) is not None]
    if columns.get("header") is False:
        said = "no header: " + ", ".join(f"{role} is column {name}" for role, name in used)
    else:
        said = ", ".join(f"{role}: {name}" for role, name in used)
    return said + (f"; not used: {', '.join(columns['unused'])}" if columns.get("unused") else "")


# -----------------------------------------------------------------------------
# A table's header

PEEK = 1000  # records that are looked at before the first is a row


def has_header(first: list[dict], known: Collection[str]) -> bool | None:
    """Is the first row of a table its header? Yes if it has a known name; None: who knows."""
    cells = list(first[0].values())
    if cells == [str(i) for i in range(len(cells))] and len(cells) > 1:
        return True  # as pandas numbers them
    for key, cell in first[0].items():
        # a name does not occur among the values, unless files with headers were joined
        again = any(record[key] == cell for record in first[1:] if record != first[0])
        if plain(cell or "") in known and not again:
            return True
    return None


def is_value(first: list[dict], key: str | None) -> bool:
    """Is this cell of the first row a value like those below: one of them, or a number among numbers?"""
    cells = [record.get(key) or "" for record in first]
    return cells[0] in cells[1:] or all(to_number(cell) != math.inf for cell in cells)


def guess_columns(path: str, first: list[dict], columns: dict, usual: Names, labelled: bool) -> dict:
    """Of a table without a header: as asked for; else by what is in them, if there can be no doubt."""
    numbers = list(first[0])
    found = {role: find_column(path, role, numbers, columns[role]) for role in ROLES
             if columns.get(role, "") not in ("", None)}
    if not found and labelled and len(numbers) > 1 and usual.readings == TWO_TEXTS:
        texts = [number for number in numbers if are_texts(first, number)]
        labels = [number for number in numbers if number not in texts and are_labels(first, number)]
        if len(texts) == len(labels) == 1:
            found = {"text": texts[0], "label": labels[0]}
        elif len(numbers) > 2:
            labels.sort(key=lambda key: len({record[key] for record in first}))  # numbers of rows are many
            one, two, label = [*texts, "NUMBER"][0], [*texts[1:], "NUMBER"][0], [*labels, "NUMBER"][0]
            longest = max([*texts, one], key=lambda key: sum(len(record[key] or "") for record in first))
            raise UserError(
                f"{path}:1: no header, and which of its {len(numbers)} columns are text and label? It reads "
                f"{shown(first[0].values())}: --text_column={longest} --label_column={label}, or of two "
                f"texts --text_column={one} --pair_column={two} --label_column={label}")
    free = [number for number in numbers if number not in found.values()]
    for role in ("text", "label"):
        if role not in found and free:
            found[role] = free.pop(0)
    return {role: found.get(role) for role in ROLES}


def shown(cells: Iterable) -> str:
    return ", ".join(str(cell)[:20] for cell in cells)


def are_texts(first: list[dict], key: str) -> bool:
    cells = [record.get(key) or "" for record in first]
    letters = sum(any(c.isalpha() for c in cell) for cell in cells)
    return 2 * letters > len(cells) and 2 * len(set(cells)) > len(cells)


def are_labels(first: list[dict], key: str) -> bool:
    cells = [record.get(key) or "" for record in first]
    few = 1 < len(set(cells)) <= max(2, len(cells) / 2)
    return few or all(to_number(cell) != math.inf for cell in cells)


def to_number(label: str) -> float:
    """Infinity if it is none."""
    return float(label) if NUMBER.fullmatch(label or "") else math.inf


NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


def label_key(label: str) -> float | str:
    """Equal for labels that are one: 1 and 1.0, True and true."""
    number = to_number(label)
    return number if number != math.inf else label.lower() if label.lower() in ("true", "false") else label


# -----------------------------------------------------------------------------
# A file's rows

def open_rows(path: str, columns: dict, usual: Names, labelled: bool = True,
              nested: dict[str, tuple] | None = None, optional: Collection[str] = (), encoding: str = "",
              bad: Callable[[UserError], None] | None = None) -> tuple[dict, Iterator[Row]]:
    """What each column is, and the examples in a .csv, .tsv, .json, .jsonl, or .txt with tabs or __label__.

    columns: as this returned them for the training file; or what is asked for, of each role a name, a number
    or "", and header: True, False, or None if it is to be found out. (Without: as checkpoints once had it.)
    labelled: there must be a column of labels; a row whose label is missing has None. nested: of roles whose
    cells may be a list or a dict, which they stay, these types. optional: pair may be missing in some rows,
    label in all. encoding: "" if it is to be found out. bad: as for records(). Raises UserError, with file
    and line.
    """
    usual = usual if "header" in columns else BEFORE
    text = text_blocks(path, encoding)
    block = next(text)
    text = itertools.chain([block], text)
    tagged = is_fasttext(path, block.partition("\n")[0])
    found = fasttext(lines(text, "\n")) if tagged else records(path, text, False, not labelled, bad)
    peeked = list(itertools.islice(found, PEEK))
    if not peeked:
        raise UserError(f"{path}: holds no examples")
    first = [record for _, record in peeked]
    needed = {"text", "pair", *(("label", "group") if labelled else ())}.difference(optional)
    may_lack = {"group", "split", "start", "id", *optional}
    if tagged or "json" in kind_of(path):
        names = list(dict.fromkeys(itertools.chain(*first)))
        if "unused" not in columns:
            if columns.get("header") is not None:
                raise SettingError(f"header={columns['header']}: {path} names the columns in each row: leave "
                                   "it out")
            found = without_new_names(path, found, names, usual)
        columns = of_names(path, names, columns, usual, needed)
        keys = {role: columns.get(role) for role in (*ROLES, "id")}
        may_lack.add("label")
    else:
        columns = of_table(path, first, columns, usual, labelled, needed)
        names = numbers = list(first[0])
        if columns["header"]:
            names = column_names(cell or "" for cell in first[0].values())
            found = without_header(path, itertools.chain(peeked, found), first[0])
            peeked = []
        keys = {}
        for role in (*ROLES, "id"):
            name = columns.get(role)
            keys[role] = None if name is None else numbers[names.index(name)]
        if "label" not in needed:
            may_lack.add("label")
    nested = nested or {}
    types = {keys[role]: nested[role] for role in nested}
    found = unwritten(itertools.chain(peeked, found), path, types, bad)
    nested = {**nested, **({} if labelled else {"label": (list, dict)})}
    return columns, make_rows(path, found, keys, columns, may_lack, nested, bad)


def without_new_names(path: str, found: Iterable[tuple[int, dict]], names: list[str],
                      usual: Names) -> Iterator[tuple[int, dict]]:
    """The records of JSON. Raises UserError if a column that would have been used comes too late to be."""
    seen, known = set(names), usual.all().difference(IDS)
    for line, record in found:
        if not record.keys() <= seen:
            late = [name for name in record if name not in seen and plain(name) in known]
            if late:
                raise UserError(f"{path}:{line}: has {late[0]!r}, which the first {PEEK:,} rows have not: "
                                "name all columns, --text_column=... --label_column=..., and --pair_column="
                                f"{late[0]} if it is of use")
            seen |= record.keys()
        yield line, record


def without_header(path: str, found: Iterable[tuple[int, dict]], header: dict) -> Iterator[tuple[int, dict]]:
    """The rows below it. Where files were joined, it comes again."""
    times = -1
    for line, record in found:
        if record == header:
            times += 1
        else:
            yield line, record
    if times:
        tell(f"{path}: passed over: {times:,} more lines that are its header")


def of_names(path: str, names: list[str], columns: dict, usual: Names, needed: Collection[str],
             remedy: str = "") -> dict:
    """The columns of a file that has these. needed: the roles without which there are no rows."""
    if "unused" in columns:  # as the training file has them, but for those that are asked for now
        found = {}
        for role in ROLES:
            name = columns.get(role)
            there = name is not None and any(plain(one) == plain(str(name)) for one in names)
            must = name is not None and role in {*needed, *columns.get("asked", ())}
            found[role] = find_column(path, role, names, name) if there or must else None
        return {**found, "id": id_among(names, found), "header": True, "unused": columns["unused"]}
    turns = [name for name in names if plain(name) in TURNS]
    if usual is LM_NAMES and turns and not columns.get("text"):
        raise UserError(f"{path}: {turns[0]!r}: conversations of several turns, and answers to choose from, "
                        "are not learned from yet: --text_column=NAME --label_column=NAME, if a row has an "
                        f"instruction and its answer, among {', '.join(names)}")
    if usual is TAG_NAMES and "word" in map(plain, names):
        raise UserError(f"{path}: a word in each row ({', '.join(names)}): write a word and its tag a line, "
                        "and an empty line between sentences, as CoNLL")
    found = choose(path, names, columns, usual)
    for role in ("text", "pair", "label") if usual is ANSWER_NAMES else ("text", "label"):
        if role in needed and found[role] is None:
            raise UserError(f"{path}: no column for the {role} among {', '.join(names)}: name it with "
                            f"--{role}_column=...{remedy}")
    unused = [name for name in names if name not in found.values()]
    return {**found, "id": id_among(names, found), "header": True, "unused": unused}


def id_among(names: list[str], found: dict) -> str | None:
    return next((name for name in names if plain(name) in IDS and name not in found.values()), None)


def of_table(path: str, first: list[dict], columns: dict, usual: Names, labelled: bool,
             needed: Collection[str]) -> dict:
    """The same of a table, which may have no header."""
    names, legacy = column_names(cell or "" for cell in first[0].values()), "header" not in columns
    asked = [str(columns.get(role) or "") for role in ROLES]
    by_name = [name for name in asked if name and not name.isdigit()]
    header, settled = columns.get("header"), "unused" in columns
    if header is None or settled:
        found = has_header(first, usual.all() | {plain(name) for name in by_name})
        if settled and header is False and found:
            raise UserError(f"{path}:1: {', '.join(names)}: a header, it seems, and the training file had "
                            "none: take it out")
        header = found if header is None else header
    if header or (by_name and not legacy):
        remedy = "" if header == columns.get("header") else ", or --header=False if its first row is none"
        return of_names(path, names, columns, usual, needed, remedy)
    if settled:
        return of_names(path, list(first[0]), columns, usual, needed) | {"header": False}
    found = guess_columns(path, first, columns, usual, labelled)
    if header is None and not legacy and labelled and not is_value(first, found["label"]):
        known = [(role, found[role]) for role in ROLES[:3] if found[role]]
        by_name = " ".join(f"--{role}_column={names[int(number)]}" for role, number in known)
        by_number = " ".join(f"--{role}_column={number}" for role, number in known)
        raise UserError(f"{path}:1: is {', '.join(names)} a header? --header=True {by_name}; or "
                        f"--header=False {by_number}")
    for role in ("text", "label"):
        if role in needed and found[role] is None:
            raise UserError(f"{path}: no column for the {role}: it has one, {shown(first[0].values())}")
    unused = [number for number in first[0] if number not in found.values()]
    return {**found, "id": None, "header": False, "unused": unused}


def is_fasttext(path: str, first: str) -> bool:
    """By its first line, whatever its name: fastText's own files are called .train and .valid."""
    if kind_of(path) == ".txt":
        return "__label__" in first
    return re.match(r"__label__[^\s,;|]+\s", first) is not None


def fasttext(text: Iterable[str]) -> Iterator[tuple[int, dict]]:
    """Lines with a word __label__NAME, or several."""
    for line, one in enumerate(text, 1):
        words = one.split()
        labels = [word.removeprefix("__label__") for word in words if word.startswith("__label__")]
        if words:
            text = " ".join(word for word in words if not word.startswith("__label__"))
            yield line, {"text": text, "__label__": labels[0] if len(labels) == 1 else labels}


MISSING = {"nan", "null", "<na>"}


def make_rows(path: str, found: Iterable[tuple[int, dict]], keys: dict, columns: dict,
              may_lack: Collection[str], nested: dict[str, tuple],
              bad: Callable[[UserError], None] | None) -> Iterator[Row]:
    """keys: of each role, what its cells stand under in the records. may_lack: roles that are not needed."""
    undecided = {"-"} if columns.get("pair") else set()  # annotators did not agree
    if plain(columns["text"]) == "premise":
        undecided.add("-1")
    used = [(role, key) for role, key in keys.items() if key is not None]
    for line, record in found:
        where, cells = f"{path}:{line}", dict.fromkeys(keys)
        for role, key in used:
            cell, fault = record.get(key), ""
            if isinstance(cell, str):
                pass
            elif isinstance(cell, (list, dict)):
                if not isinstance(cell, nested.get(role, ())):
                    fault = f"is no text: {str(cell)[:60]}"
                elif isinstance(cell, list):
                    cell = [one if isinstance(one, (list, dict)) else as_text(one) for one in cell]
            else:
                cell = as_text(cell)
                if cell is None and role not in may_lack:
                    fault = f"is missing: the row reads {str(record)[:60]}"
            if fault:
                refuse(f"{where}: {columns[role]!r} {fault}", bad)
                break
            cells[role] = cell
        else:
            label = cells["label"]
            if isinstance(label, str):
                label = sys.intern(label.strip())  # the same few, a million times
                label = None if label.lower() in MISSING or label in undecided else label
            yield Row(where, cells["text"], cells["pair"], label, cells["group"] or "",
                      cells["id"] or str(line), unit=cells["split"] or "", start=cells["start"])


def as_text(cell: Any) -> str | None:
    if isinstance(cell, bool):
        return "true" if cell else "false"
    return None if cell is None or cell != cell else str(cell)  # NaN is none


# as numpy prints an array, which Python would read as something else
ARRAY = re.compile(r"""{.*:\s*array\(|\[\s*(-?[\d.]+|'[^']*'|"[^"]*")\s+[-\d.'"]""", re.DOTALL)


def unwritten(found: Iterable[tuple[int, dict]], path: str, types: dict[str, tuple],
              bad: Callable[[UserError], None] | None) -> Iterator[tuple[int, dict]]:
    """The records, with the lists and dicts that JSON or Python wrote into cells. types: of each column."""
    for line, record in found:
        for key, wanted in types.items():
            cell = record.get(key)
            if not isinstance(cell, str) or cell[:1] not in ("[", "{"):
                continue
            if ARRAY.match(cell):
                refuse(f"{path}:{line}: {' '.join(cell.split())[:40]}: an array as numpy prints it: write the "
                       "rows as JSON lines", bad)
                break
            value = parsed(cell)
            record[key] = value if isinstance(value, wanted) else cell
        else:
            yield line, record


def parsed(cell: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return cell


def some(path: str, rows: list[Row]) -> list[Row]:
    if not rows:
        raise UserError(f"{path}: holds no examples")
    return rows


def tell(message: str) -> None:
    """On stderr, once, whatever the number of processes: what is printed may be a table."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


# -----------------------------------------------------------------------------
# Files of other kinds

def without_columns(path: str, columns: dict, but: Collection[str] = ()) -> None:
    """Raises SettingError if there is a column asked for in a file that has none to choose from."""
    asked = columns.get("asked", ()) if "unused" in columns else (*ROLES, "header")
    for role in asked:
        if role not in but and columns.get(role, "") not in ("", None):
            name = role if role == "header" else f"{role}_column"
            raise SettingError(f"{name}={columns[role]}: {path} has no such columns: leave it out")


def text_blocks(path: str, encoding: str) -> Iterator[str]:
    """A labelled file's text."""
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError:
        raise SettingError(f"encoding={encoding}: no encoding is called so: utf-8, gbk, latin-1...") from None
    return blocks(path, encoding or encoding_of(path), labelled=True)


def read_paragraphs(path: str, encoding: str = "") -> list[Row]:
    """Texts with an empty line between them."""
    text = "".join(line.rstrip("\r\n") + "\n" for line in lines(text_blocks(path, encoding), ""))
    return some(path, [Row(path, part.strip()) for part in text.split("\n\n") if part.strip()])


def read_lines(path: str, paired: bool | None, encoding: str = "") -> Iterator[Row]:
    """A text a line; of two, with a tab between them. paired: None, if both are welcome."""
    for n, line in enumerate(lines(text_blocks(path, encoding), ""), 1):
        text, tab, pair = line.rstrip("\r\n"), "", None
        if paired is not False and (paired or "\t" in text):
            text, tab, pair = text.partition("\t")
            if not tab:
                raise UserError(f"{path}:{n}: two texts are wanted, with a tab between them: {line[:40]!r}")
        yield Row(f"{path}:{n}", text, pair, id=str(n))


CONLL_U = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")


def open_conll(path: str, columns: dict, labelled: bool = True, encoding: str = "") -> tuple[dict, list[Row]]:
    """A word a line with its tags, tabs or spaces between them; an empty line between sentences.

    The word is in the first column and its tag in the last; of CoNLL-U, form and upos. Comments, and the
    lines that begin a document, are passed over and counted.
    """
    found = []
    for n, line in enumerate(lines(text_blocks(path, encoding), ""), 1):
        line = line.strip("\ufeff \r\n")  # within a file, if files were joined; other spaces may be a word
        cells = line.split("\t") if "\t" in line else [cell for cell in line.split(" ") if cell]
        found.append((n, [cell.strip(" ") for cell in cells]))
    sample = [cells for _, cells in found if any(cells) and cells[0][:1] != "#"]
    width = Counter(map(len, sample)).most_common(1)[0][0] if sample else 0
    is_u = width == 10 and all(cells[0][:1].isdigit() for cells in sample)
    names = list(CONLL_U) if is_u else [str(i) for i in range(width)]
    settled = "unused" in columns and columns["text"] in names  # it may have been a table, in training
    if not settled:
        without_columns(path, columns, ("text", "label"))
        columns = {} if "unused" in columns else columns
        usual = {"text": "form", "label": "upos"} if is_u else {"text": "0", "label": str(max(1, width - 1))}
        for role in usual:
            if columns.get(role, "") not in ("", None):
                usual[role] = find_column(path, role, names, columns[role])
        unused = [name for name in names if name not in usual.values()]
        columns = {**usual, "header": is_u, "unused": unused}
    for role in columns.get("asked", ()):
        columns = {**columns, role: find_column(path, role, names, columns[role])}
    at = {role: CONLL_U.index(name) if name in CONLL_U else int(name) for role, name in columns.items()
          if role in ("text", "label") and name is not None}
    tags = {cells[at["label"]] for cells in sample if len(cells) > at["label"]}
    rows, words, labels, passed = [], [], [], Counter()
    for n, cells in [*found, (len(found) + 1, [])]:
        begins_comment = bool(cells) and cells[0][:1] == "#"
        if begins_comment and (len(cells) != width or not is_tag(cells[-1], tags)):
            passed["comments"] += 1
        elif is_u and cells and not cells[0].isdigit() and any(cells):
            passed["lines of words in two (1-2) or none (1.1)"] += 1
        elif any(cells) and cells[0] != "-DOCSTART-":
            word, tag = ((cells[i : i + 1] or [""])[0] for i in (at["text"], at["label"]))
            if not word:
                raise UserError(f"{path}:{n}: a tag without a word: {' '.join(cells)[:40]!r}")
            if labelled and not tag:
                raise UserError(f"{path}:{n}: a word without a tag: {' '.join(cells)[:40]!r}: wanted "
                                f"{at['label'] + 1} columns")
            if labelled and len(cells) > width:
                raise UserError(f"{path}:{n}: {len(cells)} columns, but other lines have {width}: "
                                f"{' '.join(cells)[:40]!r}")
            words.append(word)
            labels.append(tag)
        else:
            passed["-DOCSTART- lines"] += bool(any(cells))
            if words:
                tagged = labels if all(labels) else None
                rows.append(Row(f"{path}:{n - len(words)}", " ".join(words), label=tagged,
                                id=str(len(rows) + 1), words=words))
            words, labels = [], []
    told = ", ".join(f"{count:,} {what}" for what, count in passed.items() if count)
    if told:
        tell(f"{path}: passed over: {told}")
    return columns, some(path, rows)


def is_tag(cell: str, tags: set[str]) -> bool:
    return cell in tags or re.match(r"[BIESLU]-", cell) is not None


def tags_of_spans(row: Row) -> tuple[list[str], list[str], int]:
    """Words and their BIO tags, from places in a text: [[begin, end, kind], ...], {start, end, label} as
    doccano and Prodigy have them, or CLUENER's {kind: {words: [[begin, last], ...]}}.

    And how many places are no words of the text, whole and of their own: a word has the longest.
    """
    spans, taken = [], {}
    try:
        if isinstance(row.label, dict):
            for kind, places in row.label.items():
                spans += [(begin, last + 1, kind) for found in places.values() for begin, last in found]
        else:
            for place in row.label:
                if isinstance(place, dict):
                    ends = [place.get(name, place.get(f"{name}_offset")) for name in ("start", "end")]
                    place = *ends, place["label"]
                begin, end, kind, *_ = place
                spans.append((int(begin), int(end), str(kind)))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{row.where}: not the places of tags: {str(row.label)[:60]}: wanted [begin, end, "
                        "tag] of each") from None
    split = WORDS["punctuation" if " " in row.text else "characters"]
    words, tags = [], []
    for match in re.finditer(split, row.text):
        inside = [span for span in spans if span[0] < match.end() and match.start() < span[1]]
        span = begin, _, kind = max(inside, key=lambda span: span[1] - span[0], default=(0, 0, ""))
        taken[span] = taken.get(span, "") + match.group()
        words.append(match.group())
        tags.append(f"{'B' if match.start() <= begin else 'I'}-{kind}" if kind else "O")
    lost = [span for span in spans if "".join(row.text[span[0]:span[1]].split()) != taken.get(span)]
    return words, tags, len(lost)


WORDS = {  # how a text is cut into the words that get tags
    "spaces": r"\S+",
    "characters": r"\S",
    "punctuation": r"(?:\w\.){2,}|'\w{1,2}\b|\w+(?:[.,\-/&@]\w+)*|[^\w\s]",
    "mixed": "[\u3400-\u9fff\U00020000-\U0003ffff]|[^\\s\u3400-\u9fff\U00020000-\U0003ffff]+",
}
IN_WORDS = {"spaces": "what spaces divide", "characters": "each character",
            "punctuation": "what spaces and punctuation divide",
            "mixed": "each Chinese character, else what spaces divide"}
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
                      "\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")  # Japanese, Chinese


def kind_of_words(rows: Iterable[Row]) -> str:
    """How the words of these rows were made, one of WORDS."""
    words = list(itertools.islice(itertools.chain.from_iterable(row.words for row in rows), 100_000))
    letters = [word for word in words if any(c.isalnum() for c in word)]
    if 2 * sum(UNSPACED.search(word) is not None for word in letters) > len(letters):
        return "characters"
    glued = sum(len(word) > 1 and word[-1] in ".,;:!?" for word in letters)
    return "punctuation" if len(words) - len(letters) > glued else "spaces"


def open_questions(path: str, columns: dict, labelled: bool = True, encoding: str = "",
                   bad: Callable[[UserError], None] | None = None) -> tuple[dict, Iterable[Row]]:
    """SQuAD's JSON, or a table or JSON lines of contexts, questions and answers, as Hugging Face has them."""
    if kind_of(path) == ".json" and '"paragraphs"' in next(text_blocks(path, encoding))[:10**6]:
        without_columns(path, columns, ("group",))  # the group is the article's title
        columns = {"text": "question", "pair": "context", "label": "answers", "header": True, "unused": []}
        return columns, read_squad(path, labelled, encoding)
    nested = {"label": (list, dict), "start": (list,)}
    columns, rows = open_rows(path, columns, ANSWER_NAMES, labelled, nested, (), encoding, bad)
    return columns, each_with_answers(path, rows)


def each_with_answers(path: str, rows: Iterable[Row]) -> Iterator[Row]:
    unsure = 0
    for row in rows:
        given = [row.label] if isinstance(row.label, str) else row.label
        alone = row.start is None and isinstance(given, list) and all(isinstance(one, str) for one in given)
        yield with_answers(row)
        unsure += alone and any(row.pair.count(answer) > 1 for answer, _ in row.label)
    if unsure:
        tell(f"{path}: {unsure:,} answers stand in several places, and no column says in which: the first is "
             "taken, of whole words if there are any (answer_start)")


def with_answers(row: Row) -> Row:
    try:
        return place_answers(row)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{row.where}: not answers: {str(row.label)[:60]}: wanted their texts, or text and "
                        "answer_start of each") from None


def place_answers(row: Row) -> Row:
    """A row of any kind of answers -> one of [(answer, where it begins), ...]."""
    given, starts = row.label, row.start
    if isinstance(given, dict):  # {"text": [...], "answer_start": [...]}
        given, starts = given.get("text"), given.get("answer_start", starts)
    if isinstance(given, str):
        given, starts = [given] if given else [], [starts]
    if given is not None:
        given = [one if isinstance(one, dict) else {"text": str(one)} for one in given]
        for one, start in zip(given, starts if isinstance(starts, list) else ()):
            if to_number(str(start)) != math.inf:
                one.setdefault("answer_start", int(float(start)))
        answers = [place_answer(one, row.pair) for one in given]
        given = [answer for answer in answers if answer[0]]
    row.label, row.start, row.unit = given, None, row.unit or row.pair
    return row


def read_squad(path: str, labelled: bool = True, encoding: str = "") -> list[Row]:
    """SQuAD's JSON. An answer that does not stand where it is said to is looked for nearby; -1: nowhere."""
    rows, where = [], "data"
    _, found = next(parse_json(path, [(1, "".join(text_blocks(path, encoding)))]), (1, None))
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
                    answers = [] if one.get("is_impossible") else one.get("answers")
                    if answers is None and labelled:
                        raise KeyError("answers (an empty list, if there is none)")
                    row = Row(f"{path}: {one['id']}", one["question"], context, answers, title,
                              str(one["id"]), unit=title)
                    rows.append(place_answers(row))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {where}: not in SQuAD's format: {type(error).__name__} {error}: wanted "
                        "data, paragraphs, context, qas, id, question, answers, text, answer_start") from None
    return some(path, rows)


def place_answer(answer: dict, context: str) -> tuple[str, int]:
    text, said = answer["text"], answer.get("answer_start")
    begin = int(said or 0)
    if said is None or context[begin:begin + len(text)] != text:
        places = [i for i in range(len(context)) if context.startswith(text, i)]
        whole = [i for i in places if is_whole(context, i, i + len(text))]
        begin = min(whole or places, key=lambda i: abs(i - begin), default=-1)
    return text, begin


def is_whole(text: str, begin: int, end: int) -> bool:
    """Is it a word of the text, or several, and not a part of one, as "is" is of "Paris"?"""
    at_ends = [text[i - 1:i + 1] for i in (begin, end)]
    return not any(len(two) == 2 and two.isalnum() and not UNSPACED.search(two) for two in at_ends)


# -----------------------------------------------------------------------------
# Splits

def text_key(row: Row) -> tuple[str, ...]:
    """Equal for texts that differ by case and spaces, or by which of two comes first."""
    texts = [row.text] if row.pair is None else [row.text, row.pair]
    plain_texts = [" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts]
    return tuple(sorted(plain_texts))


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
    groups.sort(key=len, reverse=True)
    part, parts = [0] * len(keys), [(0, n) for n in range(k)]  # a heap of (rows so far, part)
    for group in groups:
        size, n = parts[0]
        heapq.heapreplace(parts, (size + len(group), n))
        for i in group:
            part[i] = n
    part = np.array(part, dtype=np.int64)
    if len(groups) >= k and len(groups[0]) > 2 * len(keys) / k:  # a text that is everywhere, say
        part = k - 1 - part  # the first are tested on: it is better trained on
    return part


def as_csv(rows: Iterable[Sequence]) -> str:
    """A line each. A carriage return is quoted like a line break: csv.reader takes it for one.

    What a spreadsheet would take for a formula gets an apostrophe before it, which `lib.text.table` takes off.
    """
    found = []
    for row in rows:
        line = io.StringIO(newline="")
        row = ["'" + cell if isinstance(cell, str) and is_formula(cell) else cell for cell in row]
        csv.writer(line, lineterminator="\r\n").writerow(row)  # whatever is in that is quoted in a cell
        found.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(found)


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
