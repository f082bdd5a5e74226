"""
What the predictions of a test come to: metrics.json, predictions.csv, a table for the terminal; of folds too.
"""
from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, Optional

import numpy as np

from lib import intervals
from lib.rows import Row, as_csv
from lib.run import cannot_write, in_digits, replacing, write_json
from lib.tasks import Task


class Tested(NamedTuple):
    task: Task
    rows: list[Row]
    answers: list
    found: dict  # what metrics.json holds


def write_results(folder: Path, task: Task, rows: list[Row], answers: list, found: dict, s: SimpleNamespace,
                  under: str = "", more: Optional[dict] = None) -> list[str]:
    """metrics.json and predictions.csv at once; then intervals, groups and pictures, which may take long.

    found: what metrics.json holds, to which the results are added, as its entry `under` if that is given.
    more: columns of predictions.csv, a cell a row. Returns the names of the files.
    """
    results = found.setdefault(under, {}) if under else found
    arrays = task.arrays(rows, answers)
    results.update({**task.scores(*arrays), "test_rows": len(rows), "meaning": task.meaning})
    write_predictions(folder / "predictions.csv", task, rows, answers, more or {})
    write_json(folder / "metrics.json", found)
    try:
        written = task.report(folder, *arrays)
    except OSError as error:
        raise cannot_write(folder, error) from None
    results.update(intervals.with_intervals(task, arrays))
    if s.group_column != "":
        results["by_group"] = intervals.by_group(task, arrays, [row.group for row in rows])
    write_json(folder / "metrics.json", found)
    return ["metrics.json", "predictions.csv", *written]


def write_predictions(path: Path, task: Task, rows: list[Row], answers: list, more: dict[str, list]) -> None:
    """A row at a time: of many classes each is long."""
    header, _ = task.table(rows[:1], answers[:1])
    with replacing(path) as f:
        f.write(as_csv([[*header, *more]]).encode("utf-8"))
        for n, row in enumerate(intervals.ticking(rows, path.name)):
            added = [column[n] for column in more.values()]
            lines = task.table([row], [answers[n]])[1]  # of tags one a word
            f.write(as_csv([*line, *added] for line in lines).encode("utf-8"))


def table(found: dict) -> str:
    """What metrics.json holds, for the terminal: each metric with its interval, or deviation over folds."""
    baselines = found.get("baselines", {})
    width = 2 + max(len("-1.23457e+06"), *map(len, baselines)) if baselines else 0
    lines = [f"  {'':20} {'this model':>24}" + "".join(f"{name:>{width}}" for name in baselines)]
    for name in found:
        if f"{name}_ci95" in found:
            spread = interval(found[f"{name}_ci95"])
        elif f"{name}_std" in found:
            spread = f"+- {in_digits(found[f'{name}_std'])}"
        else:
            continue
        others = "".join(f"{in_digits(scores[name]):>{width}}" for scores in baselines.values())
        lines.append(f"  {name:20} {in_digits(found[name]):>8} {spread:16}{others}")
    for name, gap in found.get("by_group", {}).get("gaps", {}).items():
        lowest = f"{gap['lowest'] or '(no group)'} ({gap['lowest_rows']:,} rows) lowest"
        highest = f"{gap['highest'] or '(no group)'} ({gap['highest_rows']:,}) highest"
        apart = f"{in_digits(gap['gap'])} apart {interval(gap['gap_ci95'])}"
        lines.append(f"  {name}: {lowest}, {highest}, {apart}")
    lines += [f"  ({name}: {what})" for name, what in found.get("meaning", {}).items()]
    return "\n".join(lines)


def interval(ends: list[float]) -> str:
    """Nothing if nothing can be said."""
    return "" if math.isnan(ends[0]) else f"[{', '.join(map(in_digits, ends))}]"


def beside_validation(found: dict, metric: str) -> str:
    """How far the test is from the validation by which the best epoch was chosen."""
    said, true, (low, high) = found["validation"][metric], found[metric], found[f"{metric}_ci95"]
    where = "within" if low <= said <= high else "outside"
    where = "" if math.isnan(low) else f", {where} the test's interval"
    said, true, apart = map(in_digits, (said, true, abs(said - true)))
    return f"  {metric}: validation {said}, test {true}: apart by {apart}{where}"


def summary_of_folds(folder: Path, tested: list[Tested], s: SimpleNamespace) -> str:
    """Mean and standard deviation of each metric; and of the predictions of all folds together the same as
    of one test set: metrics.json, predictions.csv, pictures."""
    found, undefined = [one.found for one in tested], []
    summary = {"task": s.task, "folds": s.folds, "baselines": {}}
    for baseline, scores in found[0]["baselines"].items():
        each = [one["baselines"].get(baseline, {}) for one in found]
        means = {name: mean_and_std([one.get(name, math.nan) for one in each])[0] for name in scores}
        summary["baselines"][baseline] = means
    for name in [name for name in found[0] if f"{name}_ci95" in found[0]]:
        values = [one[name] for one in found]
        mean, std = mean_and_std(values)
        summary.update({name: mean, f"{name}_std": std, f"{name}_folds": values})
        without = [str(k) for k, value in enumerate(values, start=1) if math.isnan(value)]
        if without:
            undefined.append(f"  ({name} is not defined in fold {', '.join(without)}: the mean leaves it "
                             "out)")
    lines = [f"\n{s.folds} folds, mean and standard deviation, and the baselines' means:\n", table(summary),
             *undefined]
    if all(one.task.labels == tested[0].task.labels for one in tested):
        lines += pooled(folder, tested, summary, s)
    else:
        lines.append("\n(the folds have learned different labels: their predictions are not put together)")
    write_json(folder / "metrics.json", summary)
    return "\n".join(lines)


def mean_and_std(values: list[float]) -> tuple[float, float]:
    """Of those that are defined."""
    known = [value for value in values if not math.isnan(value)]
    std = float(np.std(known, ddof=1)) if len(known) > 1 else math.nan
    return float(np.mean(known)) if known else math.nan, std


def pooled(folder: Path, tested: list[Tested], summary: dict, s: SimpleNamespace) -> list[str]:
    """The test rows of all folds as one: every row is answered once, by a model that has not seen it, but
    those of labels so rare that they are always trained on."""
    rows, answers, fold = [], [], []
    for k, one in enumerate(tested, start=1):
        rows += one.rows
        answers += one.answers
        fold += [k] * len(one.rows)
    written = write_results(folder, tested[0].task, rows, answers, summary, s, "pooled", {"fold": fold})
    return [f"\nAll {len(rows):,} examples, each by the fold that tested it:\n", table(summary["pooled"]),
            f"\n{folder}: {', '.join(written)}"]
