"""
Labelled files to rows to train on, to validate and to test.
"""
from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from config import UserError
from lib.rows import RATINGS, Row, described, plain, python_packages, text_key, to_amount
from lib.tasks import TASKS, one_spelling, respell
from lib.text import listed


class Splits(NamedTuple):
    train: list[Row]
    val: list[Row]
    test: list[Row]


BUILT_IN = {"python_packages": python_packages}  # --data= -> rows to train on, validate and test


def read_splits(s: SimpleNamespace, say) -> dict[Path, Splits]:
    """The folder of each training -> its rows. Raises UserError.

    s.columns: what each column is, if that is known; else it is found out.
    """
    task, folder = TASKS[s.task], Path(s.out_dir)
    if s.data in BUILT_IN:
        return {folder: Splits(*BUILT_IN[s.data]())}
    rows, val, test = read_files(s, say)
    parts = s.folds or 10
    part, splits, kept = task.split(rows, parts, s.seed), {}, {}
    for k in range(s.folds or 1):
        to_val = (part == (k + 1) % parts) & (val is None)
        to_test = (part == k) & (test is None)
        if task.classes:
            needed, labels = kept_to_learn(rows, to_val, to_test)
            if (to_val & ~needed).any() == to_val.any() and (to_test & ~needed).any() == to_test.any():
                to_val, to_test = to_val & ~needed, to_test & ~needed
                kept |= dict.fromkeys(labels)
        train = pick(rows, ~(to_val | to_test))
        split = Splits(train, val or pick(rows, to_val), test or pick(rows, to_test))
        if not all(split):
            together = f"rows of one {s.columns['split']}" if s.columns.get("split") else "equal texts"
            raise UserError(f"{s.data}: {len(rows)} examples are too few to train, validate and test on "
                            f"({together} stay together, and questions on one article)")
        splits[folder / f"fold{k + 1}" if s.folds else folder] = split
        if task.classes:  # a bad label in the last fold is found now, not hours later
            learned = task(task.learn(split.train, s), None)
            for row in split.val + split.test:
                learned.target(row)
    if kept:
        say(f"labels    {listed([*kept])}: so rare that rows which would be held out are trained on")
    return splits


def kept_to_learn(rows: list[Row], to_val: np.ndarray, to_test: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Which rows have labels that no row to train on would have, (N,), with all that stay with them; and
    these labels. As few as will do, those to validate on first."""
    known = {label for row in pick(rows, ~(to_val | to_test)) for label in labels_in(row)}
    chosen, found = set(), []
    for row in pick(rows, to_val) + pick(rows, to_test):
        new = [label for label in labels_in(row) if label not in known]
        if new:
            chosen.add(row.unit or text_key(row))
            known.update(new)
            found += new
    needed = [bool(chosen) and (row.unit or text_key(row)) in chosen for row in rows]
    return np.array(needed), found


def labels_in(row: Row) -> list[str]:
    return row.label if isinstance(row.label, list) else [row.label]


def pick(rows: list[Row], chosen: np.ndarray) -> list[Row]:
    return [rows[i] for i in np.flatnonzero(chosen)]


def read_files(s: SimpleNamespace, say) -> list[list[Row] | None]:
    """The labelled rows of data, data_val and data_test; of the latter None if they are not given."""
    task, found, spelling = TASKS[s.task], [], None
    for name in ("data", "data_val", "data_test"):
        path, bad = getattr(s, name), []
        if not path:
            found.append(None)
            continue
        columns, rows = task.open(path, s.columns, True, s.encoding, bad.append if s.skip_bad_rows else None)
        if name == "data":
            s.columns = columns
            say(f"columns  {described(columns)}")
        everything = list(rows)
        texts = [row for row in everything if any(map(str.strip, task.texts(row)))]
        rows = task.with_labels(texts, s)
        for what, count in (("that cannot be read, " + str(bad[0] if bad else ""), len(bad)),
                            ("without a text", len(everything) - len(texts)),
                            ("without a label (empty, NaN or null)", len(texts) - len(rows))):
            if count:
                say(f"          {path}: {count:,} rows left out {what}")
        if not rows:
            raise UserError(f"{path}: holds no examples")
        if s.task == "classify" and name == "data" and plain(str(columns["label"])) in RATINGS:
            labels = {row.label for row in rows if isinstance(row.label, str)}
            if not s.multi_label and len(labels) > 2 and math.inf not in map(to_amount, labels):
                say("          ratings are learned as classes: --task=regress learns how far apart they are")
        if task.classes:
            spelling = spelling or one_spelling(rows, say)
            respell(rows, spelling)
        found.append(rows)
    train = {text_key(row) for row in found[0]} if found[1] or found[2] else set()
    for name, rows in zip(("data_val", "data_test"), found[1:]):
        if rows and {text_key(row) for row in rows} == train:
            raise UserError(f"{name}={getattr(s, name)}: the very texts of data={s.data}: leave it out, and "
                            "a tenth of data is held out")
    return found


def known_columns(s: SimpleNamespace, earlier: dict) -> dict:
    """What is asked for of each column; or what each is, as the run that goes on has found out."""
    asked = {"text": s.text_column, "pair": s.pair_column, "label": s.label_column, "group": s.group_column}
    if earlier and "columns" not in earlier:  # begun before columns were kept
        return asked
    same = all(earlier.get(f"{role}_column") == name for role, name in asked.items())
    if earlier and same and earlier["header"] == s.header and earlier["split_column"] == s.split_column:
        return earlier["columns"]
    return {**asked, "split": s.split_column, "header": s.header}
