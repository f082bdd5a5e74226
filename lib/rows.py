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
import itertools
import json
import math
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from config import SettingError, UserError
from lib.text import (blocks, column_names, encoding_of, is_formula, kind_of, lines, listed, records, refuse,
                      standard_library)


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
    of: dict[str, Sequence[str]]  # role -> names of its column
    readings: Sequence[Sequence[str]] = ()  # (text, pair, label) that are taken together; "": any
    refused: dict[str, str] = {}  # name of what is not learned from -> what to do
    nested: dict[str, tuple] = {}  # role -> types, beside texts and numbers, that its cells may have
    optional: tuple[str, ...] = ()  # roles that may be missing: the pair in some rows, the label in all

    def all(self) -> set[str]:
        return {*itertools.chain(*self.of.values(), *self.readings), *IDS} - {""}


def together(readings: str) -> list[list[str]]:
    """text+pair+label, each of which may be empty."""
    return [reading.split("+") for reading in readings.split()]


ROLES = ("text", "pair", "label", "group", "split", "start")
IDS = "id idx index guid uid qid 编号 序号".split()
TWO_TEXTS = together("""
    sentence1+sentence2 question1+question2 premise+hypothesis context+hypothesis text+text_pair
    text_a+text_b text1+text2 sentence_a+sentence_b sentence_1+sentence_2 query1+query2 s1+s2
    #1_string+#2_string question+sentence question+passage+answer question+passage query+passage
    query+document question+context claim+evidence tweet+target+stance text+target+stance text+topic+stance
    text+aspect+polarity text+aspect+sentiment sentence+aspect+polarity sentence+aspect+sentiment""")
ONE_TEXT = """
    text sentence review review_text reviewtext content review_body body comment_text sentimenttext tweet
    originaltweet message phrase utterance utt question question_text headline description
    short_description text_a document article abstract full_text essay excerpt title query claim summary
    sms abst v2 文本 内容 评论 评论内容 微博中文内容 句子 正文 评价 評論 內容 标题""".split()
CLASSES = """
    label labels gold_label sentiment airline_sentiment polarity stance emotion class category intent topic
    topics target coarse_label label_coarse class_index is_duplicate is_sarcastic quality entailment_label
    entailment_judgment stars star rating score review_score overall label_text tags _label_ v1 标签 標籤 类别
    情感 情感倾向 分类 情绪 星级 评分 打分 得分 分数 标注 评级 评价""".split()
RATINGS = {*"stars star rating review_score overall 星级 评分 打分 得分 评级".split()}
NUMBERS = """
    score similarity_score relatedness_score similarity label rating stars overall points target
    domain1_score value 评分 星级 打分 得分 分数""".split()
SEVERAL = ("conversations of several turns, and answers to choose from, are not learned from yet: "
           "--text_column=NAME --label_column=NAME, if a row has one text and its answer")
CHOICES = dict.fromkeys("choice1 choices options endings ending0 sol1 candidates".split(), SEVERAL)
TURNS = dict.fromkeys(
    "messages conversations conversation history parent_id chosen chat instances".split(), SEVERAL)
MARKED = {"annotations": "Label Studio's whole export, it seems: choose JSON-MIN or CSV there"}
WORD_ROWS = {"word": "a word in each row: write a word and its tag a line, and an empty line between "
                     "sentences, as CoNLL"}
CLASS_NAMES = Names({"text": ONE_TEXT, "label": CLASSES}, TWO_TEXTS, CHOICES | MARKED, {"label": (list,)})
NUMBER_NAMES = Names({"text": ONE_TEXT, "label": NUMBERS + CLASSES}, TWO_TEXTS, CHOICES | MARKED)
TAG_NAMES = Names(
    {"text": "tokens words text sentence word content 文本 句子".split(),
     "label": "ner_tags tags labels label ner entities ents spans tag pos_tags upos 标签 实体".split()},
    together("tokens++ner_tags tokens++tags text++spans"), WORD_ROWS | MARKED,
    nested={"text": (list,), "label": (list, dict)})
ANSWER_NAMES = Names(
    {"text": "question query question_text query_text 问题".split(),
     "pair": "context context_text passage paragraph document article text 上下文 段落 文章 原文".split(),
     "label": "answers answer answer_text label 答案".split(), "split": ["title"],
     "start": "answer_start answer_starts start".split()},
    refused=CHOICES, nested={"label": (list, dict), "start": (list,)})
LM_NAMES = Names(
    {"text": "text content body document story article sentence review".split()}, together("""
    instruction+input+output instruction+context+response instruction+input+response instruction++output
    instruction++response instruction++answer trans_instruction+trans_input+trans_output prompt++completion
    prompt++response prompt++output prompt++answer prompt++canonical_solution
    system_prompt+question+response question+context+answer question+context+response problem++solution
    question++answer question++response query++response query++answer input++output input++target
    inputs++targets ask++answer source++target text++code article++highlights text++summary
    article++summary dialogue++summary document++summary 指令+输入+输出 指令++输出 指令++回答
    问题++回答 问题++答案 提问++回答 问++答 输入++输出"""),
    TURNS | CHOICES, optional=("pair", "label"))
BEFORE = {  # what checkpoints were made with that keep no resolved columns
    "text": "text sentence sentence1 review content question instruction prompt tokens".split(),
    "pair": "text_pair sentence2 input".split(),
    "label": "label labels tags target class score output response completion".split()}


def plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def is_id(name: str) -> bool:
    return plain(name) in IDS or re.search("_id$|[a-z]I[dD]$|编号$", name) is not None


def find_column(path: str, role: str, names: list[str], asked: str | int) -> str:
    """The column of this name, else of this number; of a label several, with commas between them."""
    alike = defaultdict(list)
    for name in names:
        alike[plain(name)].append(name)

    def the_one(asked: str) -> str | None:
        its = alike.get(plain(asked), [])
        if asked in its or len(its) == 1:
            return asked if asked in its else its[0]
        return names[int(asked)] if asked.isdigit() and int(asked) < len(names) else None

    each = [str(asked)]
    if role == "label" and the_one(each[0]) is None:
        each = each[0].split(",")
    found = list(map(the_one, each))
    if None in found:
        raise UserError(f"{path}: has no column {each[found.index(None)]!r} for the {role}: it has "
                        f"{listed(names)}: --{role}_column=NAME or its number")
    return ",".join(found)


def columns_in(name: str, names: Collection[str]) -> list[str]:
    """Those that a role stands for: one, but of a label it may be several."""
    return [name] if name in names else name.split(",")


def asked_for(path: str, names: list[str], columns: dict) -> dict[str, str]:
    return {role: find_column(path, role, names, columns[role]) for role in ROLES
            if columns.get(role, "") not in ("", None)}


def choose(path: str, names: list[str], columns: dict, usual: Names) -> dict[str, str | None]:
    """The column of each role: the one that was asked for, else by its usual names."""
    found, learned = asked_for(path, names, columns), {}
    for role, name in found.items():
        for one in columns_in(name, names) if role not in ("group", "split") else ():  # which may be any
            if learned.setdefault(one, role) != role:
                raise UserError(f"{path}: the column {one} is asked for as the {learned[one]} and as the "
                                f"{role}: it is one of them; there are {listed(names)}")
    free = set(map(plain, names)).difference(map(plain, learned))
    asked = {role: plain(name) for role, name in found.items()}
    wanted = {}
    for reading in usual.readings:
        roles = {role: name for role, name in zip(ROLES, reading) if name}
        if all(asked[role] == name if role in asked else name in free for role, name in roles.items()):
            wanted = roles
            break
    for role, known in usual.of.items():
        left = [name for name in known if name in free.difference(wanted.values())]
        if left and role not in asked:
            wanted.setdefault(role, left[0])
    for role, name in wanted.items():
        alike = [one for one in names if plain(one) == name]
        if role not in found and len(alike) > 1:
            each = ", or ".join(f"--{role}_column={names.index(one)}" for one in alike)
            raise UserError(f"{path}: several columns for the {role}, {', '.join(alike)}: {each}")
        found.setdefault(role, alike[0])
    return {role: found.get(role) for role in ROLES}


def described(columns: dict) -> str:
    """One line: what each column is taken for, and which are not used."""
    is_column = " is column " if columns.get("header") is False else ": "
    used = [f"{role}{is_column}{columns[role]}" for role in ROLES if columns.get(role) is not None]
    said = ("no header: " if columns.get("header") is False else "") + ", ".join(used)
    return said + (f"; not used: {listed(columns['unused'])}" if columns.get("unused") else "")


def of_names(path: str, names: list[str], columns: dict, usual: Names, needed: Collection[str]) -> dict:
    """What each column of a file with these is. needed: the roles without which there are no rows."""
    if "unused" in columns:  # as the training file has them, but for those that are asked for now
        found = {}
        for role in ROLES:
            name = columns.get(role)
            try:
                found[role] = None if name is None else find_column(path, role, names, name)
            except UserError as error:
                if role in {*needed, *columns.get("asked", ())}:
                    what_else = "; one without labels is for sample.py --start=FILE:"
                    raise UserError(f"{error}{what_else * (role == 'label' and role in needed)}") from None
                found[role] = None
        unused = columns["unused"]
    else:
        if columns.get("header") is not None:
            raise SettingError(f"header={columns['header']}: {path} is no table: leave it out")
        refused = [name for name in names if plain(name) in usual.refused]
        if refused and columns.get("text", "") == "":
            why = usual.refused[plain(refused[0])]
            raise UserError(f"{path}: {refused[0]!r}: {why}; it has {listed(names)}")
        found = choose(path, names, columns, usual)
        for role in ("text", "pair", "label") if "start" in usual.of else ("text", "label"):
            if role in needed and found[role] is None:
                several = ", or of several with 0 or 1 --label_column=A,B,C --multi_label=True"
                several *= role == "label" and usual is CLASS_NAMES
                raise UserError(f"{path}: no column for the {role} among {listed(names)}: name it with "
                                f"--{role}_column=...{several}")
        used = {one for name in found.values() if name for one in columns_in(name, names)}
        unused = [name for name in names if name not in used]
    ids = [name for name in names if is_id(name) and name not in found.values()]
    ids.sort(key=lambda name: plain(name) not in IDS)
    return {**found, "id": ids[0] if ids else None, "header": not names[0].isdigit(), "unused": unused}


# -----------------------------------------------------------------------------
# A table, which may have no header

def has_header(path: str, first: list[dict], columns: dict, usual: Names) -> bool:
    """Is the first row of a table its header? It is if a column is asked for by name, or has a name that is
    known and does not come again below, unless files with headers were joined."""
    known, header = usual.all(), columns.get("header")
    by_name = not all(str(columns.get(role) or 0).replace(",", "").isdigit() for role in ROLES)
    below = [record for record in first if record != first[0]]
    seems = by_name or any(plain(cell or "") in known and all(record[key] != cell for record in below)
                           for key, cell in first[0].items())
    if "unused" in columns and header is False and seems:
        if not columns.get("asked"):
            raise UserError(f"{path}:1: {shown(first[0].values())}: a header, it seems, and the training "
                            "file had none: take it out, or name its columns, --text_column=NAME and so on")
        header = None
    return seems if header is None else header


def guess_columns(path: str, first: list[dict], columns: dict, usual: Names, labelled: bool) -> dict:
    """Of a table without a header: as asked for; else by what is in them, if there can be no doubt."""
    cells_of = {number: [record.get(number) or "" for record in first] for number in first[0]}
    found, begin = asked_for(path, list(cells_of), columns), shown(first[0].values())
    if labelled and len(cells_of) == 1 and "label" not in usual.optional:
        raise UserError(f"{path}:1: one column, {begin}: write a tab between a text and its label, or "
                        "__label__NAME before it")
    if not found and labelled and len(cells_of) > 1 and usual.readings == TWO_TEXTS:
        texts = [number for number, cells in cells_of.items() if are_texts(cells)]
        labels = [number for number, cells in cells_of.items() if number not in texts and are_labels(cells)]
        if len(texts) == len(labels) == 1:
            found = {"text": texts[0], "label": labels[0]}
        elif len(cells_of) > 2:
            labels.sort(key=lambda number: len(set(cells_of[number])))  # numbers of rows are many
            one, two, *_ = *texts, "NUMBER", "NUMBER"
            label, *_ = *labels, "NUMBER"
            longest = max(texts, key=lambda number: sum(map(len, cells_of[number])), default=one)
            raise UserError(
                f"{path}:1: no header, and which of its {len(cells_of)} columns are text and label? It reads "
                f"{begin}: --text_column={longest} --label_column={label}, or of two texts "
                f"--text_column={one} --pair_column={two} --label_column={label}")
    free = [number for number in cells_of if number not in found.values()]
    for role in ("text", "label"):
        if role not in found and free:
            found[role] = free.pop(0)
    cells = cells_of.get(found.get("label"), ()) if labelled and columns.get("header") is None else ()
    if cells and cells[0] not in cells[1:] and not are_numbers(cells):  # the first is unlike those below
        known = [(role, found[role]) for role in ROLES if role in found]
        by_name = " ".join(f"--{role}_column={first[0][number]}" for role, number in known)
        by_number = " ".join(f"--{role}_column={number}" for role, number in known)
        raise UserError(f"{path}:1: is {begin} a header? --header=True {by_name}; or --header=False "
                        f"{by_number}")
    return found


def below_header(path: str, found: Iterator[tuple[int, dict]],
                 names: list[str]) -> Iterator[tuple[int, dict]]:
    """The rows below a table's header, by these names. Where files were joined, it comes again."""
    (_, header), times = next(found), 0
    for line, record in found:
        if record == header:
            times += 1
        else:
            yield line, dict(zip(names, record.values()))
    if times:
        tell(f"{path}: passed over: {times:,} more lines that are its header")


def shown(cells: Iterable) -> str:
    return ", ".join(str(cell)[:20] for cell in cells)


def are_texts(cells: list[str]) -> bool:
    letters = sum(any(map(str.isalpha, cell)) for cell in cells)
    return 2 * min(letters, len(set(cells))) > len(cells)


def are_labels(cells: list[str]) -> bool:
    return 1 < len(set(cells)) <= max(2, len(cells) / 2) or are_numbers(cells)


def are_numbers(cells: list[str]) -> bool:
    return all(to_number(cell) != math.inf for cell in cells)


def to_number(label: str) -> float:
    """Infinity if it is none."""
    return float(label) if NUMBER.fullmatch(label or "") else math.inf


def to_amount(label: str) -> float:
    """A number as people write one: 4,5 and 84% and 4 stars and ★★★★ too. 1,234 may be a thousand: none."""
    label = UNIT.sub("", label)
    if STARS.fullmatch(label):
        return float(label.count("★") + label.count("⭐"))
    return to_number(label if re.search(r",.*,|,\d{3}\s*$", label) else label.replace(",", "."))


UNIT = re.compile(r"(?<=\d)\s*(%|stars?|星级?|分)\s*$", re.IGNORECASE)
STARS = re.compile("[★⭐\ufe0f]+☆*")
NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


def label_key(label: str) -> float | str:
    """Equal for labels that are one: 1 and 1.0, True and true."""
    number = to_number(label)
    if abs(number) < 2**53:  # a name of more digits would be, as a float, that of others
        return number
    return label.lower() if label.lower() in ("true", "false") else label


# -----------------------------------------------------------------------------
# A file's rows

PEEK = 1000  # records that are looked at before the first is a row


def open_rows(path: str, columns: dict, usual: Names, labelled: bool = True, encoding: str = "",
              bad: Callable[[UserError], None] | None = None) -> tuple[dict, Iterator[Row]]:
    """What each column is, and the examples in a .csv, .tsv, .json, .jsonl, or .txt with tabs or __label__.

    columns: as this returned them for the training file; or what is asked for, of each role a name, a number
    or "", and header: True, False, or None if it is to be found out. (Without: as checkpoints once had it.)
    labelled: there must be a column of labels; a row whose label is missing has None. encoding: "" if it is
    to be found out. bad: as for records(). Raises UserError, with file and line.
    """
    settled, in_table = "unused" in columns, "json" not in kind_of(path)
    text = text_blocks(path, encoding)
    block = next(text)
    text = itertools.chain([block], text)
    if is_fasttext(path, block.partition("\n")[0]):
        in_table, found = False, fasttext(lines(text, "\n"))
    else:
        found = records(path, text, False, not labelled, bad)
    if usual is ANSWER_NAMES:
        columns = {"split": "title", **columns} if settled else columns  # SQuAD's once were without
        found = each_question(path, found, labelled)
    elif "header" not in columns:
        usual = usual._replace(of=BEFORE, readings=(), refused={})
    first = list(itertools.islice(found, PEEK))
    if not first:
        raise UserError(f"{path}: holds no examples")
    found, first = itertools.chain(first, found), [record for _, record in first]
    names, header = list(dict.fromkeys(itertools.chain(*first))), False
    if in_table:
        header = has_header(path, first, columns, usual)
        if header:
            names = column_names(cell or "" for cell in first[0].values())
            found = below_header(path, found, names)
        elif not settled:
            columns = columns | guess_columns(path, first, columns, usual, labelled)
        columns = {**columns, "header": None}
    elif not settled:
        found = without_new_names(path, found, names, usual)
    needed = {"text", "pair", "label", "group"} if labelled else {"text", "pair"}
    needed = needed.difference(usual.optional)
    columns = of_names(path, names, columns, usual, needed)
    columns["header"] = columns["header"] or header
    filled = needed - {"group"} if in_table else needed - {"group", "label"}
    if not labelled:
        usual = usual._replace(nested={**usual.nested, "label": (list, dict)})
    return columns, make_rows(path, found, names, columns, usual, filled, bad)


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
            seen.update(record)  # |= would make a new set
        yield line, record


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


def make_rows(path: str, found: Iterable[tuple[int, dict]], names: list[str], columns: dict,
              usual: Names, filled: Collection[str],
              bad: Callable[[UserError], None] | None) -> Iterator[Row]:
    """filled: the roles whose cells may not be missing."""
    undecided = {"-"} if columns["pair"] else set()  # annotators did not agree
    if plain(columns["text"]) == "premise":
        undecided.add("-1")
    used = [(role, columns[role]) for role in (*ROLES, "id") if columns[role] is not None]
    several = columns_in(columns["label"] or "", names)
    for line, record in found:
        cells = dict.fromkeys((*ROLES, "id"))
        try:
            for role, name in used:
                cell = record.get(name)
                if role == "label" and len(several) > 1:
                    cell = those_with_one(record, several)
                if not isinstance(cell, str) or role in usual.nested:
                    cell = read_cell(cell, usual.nested.get(role, ()))
                if cell is None and role in filled:
                    raise ValueError(f"is missing: the row reads {str(record)[:60]}")
                cells[role] = cell
        except ValueError as error:
            refuse(f"{path}:{line}: {name!r} {error}", bad)
            continue
        group, unit = ((cells[role] or "").strip() for role in ("group", "split"))
        group, unit = ("" if one.lower() in MISSING else one for one in (group, unit))
        label = cells["label"]
        if isinstance(label, str) and "label" not in usual.optional:  # those are texts to be written
            label = sys.intern(label.strip())  # the same few, a million times
            label = None if label.lower() in MISSING or label in undecided else label
        yield Row(f"{path}:{line}", cells["text"], cells["pair"], label, group, cells["id"] or str(line),
                  unit=unit, start=cells["start"])


def those_with_one(record: dict, names: list[str]) -> list[str] | None:
    """Of several columns of 0 and 1, those with 1; None if a cell is missing."""
    cells = [label_key(as_text(record.get(name)) or "") for name in names]
    if "" in cells:
        return None
    if not set(cells) <= {0, 1, "true", "false"}:
        raise ValueError(f"has other cells than 0 and 1: {shown(cells)}")
    return [name for name, cell in zip(names, cells) if cell in (1, "true")]


def as_text(cell: Any) -> str | None:
    if isinstance(cell, bool):
        return "true" if cell else "false"
    return None if cell is None or cell != cell else str(cell)  # NaN is none


# as numpy prints an array, which Python would read as something else
ARRAY = re.compile(r"""{.*:\s*array\(|\[\s*(-?[\d.]+|'[^']*'|"[^"]*")\s+[-\d.'"]""", re.DOTALL)


def read_cell(cell: Any, types: tuple) -> str | list | dict | None:
    """A cell's text; or what is of these types, which JSON or Python may have written as a text.

    Raises ValueError, which says what it is.
    """
    if isinstance(cell, str) and types and cell.startswith(("[", "{")):
        if ARRAY.match(cell):
            raise ValueError(f"is an array as numpy prints it, {' '.join(cell.split())[:40]}: write the rows "
                             "as JSON lines")
        value = parsed(cell)
        cell = value if isinstance(value, types) else cell
    if isinstance(cell, (str, *types)):
        if isinstance(cell, list):
            cell = [one if isinstance(one, (list, dict)) else as_text(one) for one in cell]
        return cell
    if isinstance(cell, (list, dict)):
        raise ValueError(f"is no text: {str(cell)[:60]}")
    return as_text(cell)


def parsed(cell: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return cell


def tell(message: str) -> None:
    """On stderr, once, whatever the number of processes: what is printed may be a table."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


# -----------------------------------------------------------------------------
# Files of other kinds

def text_blocks(path: str, encoding: str) -> Iterator[str]:
    """A labelled file's text."""
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError:
        raise SettingError(f"encoding={encoding}: no encoding is called so: utf-8, gbk, latin-1...") from None
    return blocks(path, encoding or encoding_of(path), labelled=True)


def texts_in_cells(path: str, encoding: str) -> bool:
    """Has a .tsv texts in its cells? A word has no spaces: it is a table then, and no CoNLL."""
    if kind_of(path) != ".tsv":
        return False
    text = blocks(path, encoding or encoding_of(path, Counter()), labelled=True)
    filled = [line.strip() for line in itertools.islice(lines(text, ""), 100) if line.strip()]
    return 2 * sum("\t" in line and " " in line for line in filled) >= len(filled)  # its header has none


def read_paragraphs(path: str, encoding: str = "") -> list[Row]:
    """Texts with an empty line between them."""
    text = "".join(line.rstrip("\r\n") + "\n" for line in lines(text_blocks(path, encoding), ""))
    return [Row(path, part.strip()) for part in text.split("\n\n") if part.strip()]


def read_lines(path: str, paired: bool | None, encoding: str = "") -> Iterator[Row]:
    """A text a line; of two, with a tab between them. paired: None, if both are welcome."""
    for n, line in enumerate(lines(text_blocks(path, encoding), ""), 1):
        text, tab, pair = line.rstrip("\r\n"), "", None
        if paired is not False and (paired or "\t" in text):
            text, tab, pair = text.partition("\t")
            if not tab:
                raise UserError(f"{path}:{n}: two texts are wanted, with a tab between them: {line[:40]!r}")
        yield Row(f"{path}:{n}", text, pair, id=str(n))


CONLL_U = "id form lemma upos xpos feats head deprel deps misc".split()


def open_conll(path: str, columns: dict, labelled: bool = True, encoding: str = "") -> tuple[dict, list[Row]]:
    """A word a line with its tags, tabs or spaces between them; an empty line between sentences.

    The word is in the first column, but for numbers of words, and its tag in the last; of CoNLL-U, form and
    upos. Comments, and the lines that begin a document, are passed over and counted.
    """
    found = []
    for line in lines(text_blocks(path, encoding), ""):
        line = line.strip("\ufeff \r\n")  # within a file, if files were joined; other spaces may be a word
        cells = line.split("\t") if "\t" in line else [cell for cell in line.split(" ") if cell]
        cells = [cell.strip(" ") for cell in cells]
        found.append(cells if any(cells) else [])
    filled = [cells for cells in found if cells and cells[0][:1] != "#" and cells[0] != "-DOCSTART-"]
    if not filled:
        raise UserError(f"{path}: holds no examples")
    width = Counter(map(len, filled)).most_common(1)[0][0]
    sample = [cells for cells in filled if len(cells) == width]
    is_u = width == 10 and all(cells[0][:1].isdigit() for cells in sample)
    counters = [i for i in range(width - 2) if counts_up([cells[i] for cells in sample])]
    names = CONLL_U if is_u else list(map(str, range(max(width, 2))))
    word = names[max(counters, default=-1) + 1]
    usual = Names({"text": ("form" if is_u else word,), "label": ("upos" if is_u else names[-1],)})
    if "unused" in columns and columns["text"] not in names:  # in training it was a table
        columns = {role: columns[role] for role in columns.get("asked", ())}
    columns = of_names(path, names, columns, usual, {"text", "label"} if labelled else {"text"})
    word, tag = (names.index(columns[role]) if columns[role] else width for role in ("text", "label"))
    known = {cells[tag] for cells in sample if tag < width}  # "#nba O" is no comment
    mark = MARK if all(MARK.match(cells[word]) for cells in sample) else re.compile("^")
    if mark is MARK:
        tell(f"{path}: the mark of the language before each word is taken off, as in {sample[0][word]}")
    rows, words, tags, passed = [], [], [], 0
    for n, cells in enumerate([*found, []], 1):
        begin, in_width = (cells or [""])[0], len(cells) == width
        tagged = width == 1 or cells and (cells[-1] in known or re.match("[BIESLU]-", cells[-1]))
        is_word = begin[:1] != "#" or in_width and tagged
        if begin == "-DOCSTART-" or not is_word or is_u and cells and not begin.isdigit():
            passed += 1
        elif cells:
            if not any(cells[word:word + 1]) or labelled and not (in_width and any(cells[tag:tag + 1])):
                raise UserError(f"{path}:{n}: not a word and its tag in columns {word} and {tag}, from 0, of "
                                f"{width}: {' '.join(cells)[:40]!r}")
            words.append(mark.sub("", cells[word]))
            tags += filter(None, cells[tag:tag + 1])
        elif words:
            label = tags if len(tags) == len(words) else None
            where = f"{path}:{n - len(words)}"
            rows.append(Row(where, " ".join(words), label=label, id=str(len(rows) + 1), words=words))
            words, tags = [], []
    if passed:
        tell(f"{path}: passed over: {passed:,} lines: comments, beginnings of documents, words in two (1-2)")
    return columns, rows


MARK = re.compile(r"^[a-z]{2,3}(-[a-z]+)?:(?=.)")  # of the language, as WikiAnn has it: en:Rome


def counts_up(cells: list[str]) -> bool:
    """Are these the numbers of words in their sentences? They begin with 0 or 1."""
    return "2" in cells and all(cell in ("0", "1") or cell == str(int(before) + 1)
                                for before, cell in itertools.pairwise(["0", *cells]))


def tags_of_spans(row: Row) -> tuple[list[str], list[str], int]:
    """Words and their BIO tags, from places in a text: [[begin, end, kind], ...], {start, end, label} as
    doccano, Prodigy and Label Studio have them, or CLUENER's {kind: {words: [[begin, last], ...]}}.

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
                    place = *ends, place["label"] if "label" in place else place["labels"][0]
                begin, end, kind, *_ = place
                spans.append((int(begin), int(end), str(kind)))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise UserError(f"{row.where}: not the places of tags: {str(row.label)[:60]}: wanted [begin, end, "
                        "tag] of each") from None
    unspaced = " " not in row.text and UNSPACED.search(row.text)
    words, tags, inside = [], [], []
    ahead = sorted(enumerate(spans), key=lambda one: one[1][0], reverse=True)  # the next is the last
    for match in word_pattern("characters" if unspaced else "punctuation").finditer(row.text):
        while ahead and ahead[-1][1][0] < match.end():
            n, span = ahead.pop()
            heapq.heappush(inside, (span[0] - span[1], n, span))  # the longest first
        while inside and inside[0][2][1] <= match.start():
            heapq.heappop(inside)
        span = inside[0][2] if inside else (0, 0, "")
        taken.setdefault(span, []).append(match.group())
        words.append(match.group())
        tags.append(f"{'B' if match.start() <= span[0] else 'I'}-{span[2]}" if span[2] else "O")
    whole = {span: "".join(its_words) for span, its_words in taken.items()}
    lost = [span for span in spans
            if span not in whole or whole[span] != "".join(row.text[span[0]:span[1]].split())]
    return words, tags, len(lost)


IN_WORD = r"\p{L}\p{N}_\p{M}\u200c\u200d"  # the vowels of Hindi and Hebrew are marks; Persian has joiners
WORDS = {  # how a text is cut into the words that get tags; see word_pattern
    "spaces": r"\S+",
    "characters": r"\S",
    "punctuation": rf"(?:[{IN_WORD}]\.){{2,}}|'[{IN_WORD}]{{1,2}}\b|"
                   rf"[{IN_WORD}]+(?:[.,\-/&@][{IN_WORD}]+)*|[^{IN_WORD}\s]\p{{M}}*",
    "mixed": "[\u3400-\u9fff\U00020000-\U0003ffff]|[^\\s\u3400-\u9fff\U00020000-\U0003ffff]+",
}
IN_WORDS = {"spaces": "what spaces divide", "characters": "each character",
            "punctuation": "what spaces and punctuation divide",
            "mixed": "each Chinese character, else what spaces divide"}
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
                      "\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")  # Japanese, Chinese


def word_pattern(kind: str):
    """Of one word, for a kind of WORDS."""
    import regex  # comes with tiktoken; Python's own knows no \p{M}
    return regex.compile(WORDS[kind])


def kind_of_words(rows: Iterable[Row]) -> str:
    """How the words of these rows were made, one of WORDS."""
    words = list(itertools.islice(itertools.chain.from_iterable(row.words for row in rows), 100_000))
    letters = [word for word in words if any(c.isalnum() for c in word)]
    single = sum(len(word) == 1 for word in letters)  # also those of Google in a Chinese text
    unspaced = sum(UNSPACED.search(word) is not None for word in letters)
    if 10 * single > 9 * len(letters) or 2 * unspaced > len(letters):
        return "characters"
    glued = sum(len(word) > 1 and word[-1] in ".,;:!?" for word in letters)
    return "punctuation" if len(words) - len(letters) > glued else "spaces"


# -----------------------------------------------------------------------------
# Questions and answers

def each_question(path: str, found: Iterable[tuple[int, dict]], labelled: bool) -> Iterator[tuple[Any, dict]]:
    """The records; of those that hold several questions on a text, as SQuAD's and MRQA's do, one for each."""
    for n, (line, record) in enumerate(found):
        if not {"paragraphs", "qas"} & record.keys():
            if record.keys() != {"header"}:  # of MRQA
                yield line, record
            continue
        where, title = f"article {n + 1}", {"title": record.get("title") or f"article {n}"}
        try:
            for paragraph in record.get("paragraphs", [record]):
                for asked in paragraph["qas"]:
                    where = f"article {n + 1}, question {asked.get('id')}"
                    answers = [] if asked.get("is_impossible") else asked.get("answers")
                    if answers is None and labelled:
                        raise KeyError("answers (an empty list, if there is none)")
                    texts = {name: paragraph[name] for name in paragraph if name != "qas"}
                    yield where, {**texts, **asked, **title, "answers": answers}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: {where}: not in SQuAD's format: {type(error).__name__} {error}: "
                            "wanted data, paragraphs, context, qas, id, question, answers, text, answer_start"
                            ) from None


def each_with_answers(path: str, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, with answers of any kind as [(answer, where it begins), ...]; -1: nowhere."""
    unsure = 0
    for row in rows:
        try:
            given = given_answers(row.label, row.start)
            row.label = given and [(text, place_of(text, start, row.pair)) for text, start in given if text]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{row.where}: not answers: {str(row.label)[:60]}: wanted their texts, or text "
                            "and answer_start of each") from None
        row.start, row.unit = None, row.unit or row.pair
        yield row
        unsure += any(start is None and row.pair.count(text) > 1 for text, start in given or () if text)
    if unsure:
        tell(f"{path}: {unsure:,} answers stand in several places, and no column says in which: the first is "
             "taken, of whole words if there are any (answer_start)")


def given_answers(label: Any, starts: Any) -> list[tuple[str, Any]] | None:
    """(text, where it is said to begin, or None) of each; None: not known."""
    if isinstance(label, dict):  # {"text": [...], "answer_start": [...]}
        label, starts = label.get("text"), label.get("answer_start", starts)
    if isinstance(label, str):
        label, starts = [label], [starts]
    if label is None:
        return None
    starts = starts[:len(label)] if isinstance(starts, list) else []
    return [(one["text"], one.get("answer_start", start)) if isinstance(one, dict) else (str(one), start)
            for one, start in itertools.zip_longest(label, starts)]


def place_of(text: str, said: Any, context: str) -> int:
    """Where an answer begins: if not where it is said to, as near to it as can be."""
    number = to_number(str(said))
    begin = 0 if number == math.inf else int(number)
    if number == math.inf or context[begin:begin + len(text)] != text:
        places = [match.start() for match in re.finditer(f"(?={re.escape(text)})", context)]
        whole = [i for i in places if is_whole(context, i, i + len(text))]
        begin = min(whole or places, key=lambda i: abs(i - begin), default=-1)
    return begin


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

    What a spreadsheet would take for a formula gets an apostrophe before it, which `lib.text.table` takes
    off.
    """
    found = []
    writer = csv.writer(SimpleNamespace(write=found.append), lineterminator="\r\n")  # is quoted in cells
    for row in rows:
        writer.writerow(["'" + cell if isinstance(cell, str) and is_formula(cell) else cell for cell in row])
    return "".join(line.removesuffix("\r\n") + "\n" for line in found)


PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "tkinter", "unittest", "xml")  # of many files


def python_packages() -> tuple[list[Row], list[Row], list[Row]]:
    """Which package of Python's library is this snippet from? Rows to train on, validate and test.

    Snippets of 400 characters, those of a file in one split: beside one that was trained on, a snippet is no
    test. For validation to tell what the test will, both have files of each package, of all sizes, and not
    more than 20 snippets of one file.
    """
    files, splits = {name: [] for name in PACKAGES}, ([], [], [])
    for name, text in standard_library():
        files.get(name.split("/")[0], []).append((len(text), name, text))
    for package, found in files.items():
        for n, (size, name, text) in enumerate(sorted(found)):
            split = (0, 1, 2, 0, 0, 0, 2, 1, 0, 0)[n % 10]
            starts = range(0, size, 600)
            if split > 0:
                starts = starts[::-(-size // 12000) or 1]
            for start in starts:
                where = f"{name}:{start}"
                splits[split].append(Row(where, text[start:start + 400], label=package, id=where))
    return splits
