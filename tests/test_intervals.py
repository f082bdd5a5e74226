"""Intervals: Wilson's, a bootstrap's, and those of gaps between groups."""
import itertools
import math

import numpy as np
import pytest

from lib import intervals, metrics, report
from lib.tasks import LM, Answer, Classify, Regress, Tag

HEAD = {"max_length": 64, "paired": False, "apart": False}
TWO = Classify({**HEAD, "labels": ["a", "b"]}, None)


def arrays_of(kind: str, n: int):
    """A task, and arrays of n rows in which values tie, a class is rare and another never occurs."""
    rng = np.random.default_rng(n)
    k = {"two": 2, "labels": 5}.get(kind, 7)
    probs = rng.integers(1, 5, (n, k)).astype(float)
    y = np.minimum(rng.integers(0, 9, n), 5) % k
    if kind == "numbers":
        return Regress({**HEAD, "labels": ["number"]}, None), rng.integers(4, size=n) / 2, probs[:, 0]
    if kind == "tags":
        counts = np.cumsum(rng.integers(3, size=(n, 5)), axis=1)[:, [0, 1, 2, 3, 4]]
        return Tag({**HEAD, "labels": ["O"]}, None), counts, rng.random(n)
    if kind == "texts":
        return LM({**HEAD, "labels": []}, None), np.cumsum(rng.random((n, 3)), axis=1)
    if kind == "answers":
        return Answer({**HEAD, "labels": []}, None), np.round(probs[:, 0] / 5), probs[:, 1] / 5
    task = Classify({**HEAD, "labels": [str(c) for c in range(k)], "several": kind == "labels"}, None)
    if kind == "labels":
        return task, (rng.random((n, k)) < 0.3).astype(float), (probs + 0.5) / 6
    return task, y, probs / probs.sum(1, keepdims=True)


@pytest.mark.parametrize("n", [3, 11, 60, 400])
@pytest.mark.parametrize("kind", ["two", "classes", "labels", "numbers", "tags", "texts", "answers"])
def test_a_draw_that_is_weighed_has_the_metrics_of_its_rows(kind, n):
    task, *arrays = arrays_of(kind, n)
    rows = np.random.default_rng(0).integers(n, size=(40, n))
    weights = np.stack([np.bincount(one, minlength=n) for one in rows]).astype(np.float32)
    found = task.drawn(*arrays)(weights)
    assert list(found) == list(task.metrics)
    for r, one in enumerate(rows):
        expected = task.scores(*(a[one] for a in arrays))
        ours = {name: values[r] for name, values in found.items()}
        assert ours == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True)


def test_a_metric_of_one_s_own_needs_only_its_line(monkeypatch):
    monkeypatch.setitem(metrics.CLASS_METRICS, "second", lambda y, probs: probs[:, 1].mean())
    scores = intervals.with_intervals(TWO, (np.arange(60) % 2, np.random.default_rng(0).random((60, 2))))
    low, high = scores["second_ci95"]
    assert low < scores["second"] < high


def test_shares_have_wilson_s_interval_and_few_rows_no_other():
    stats = pytest.importorskip("scipy.stats")
    for n, right in ((24, 24), (24, 0), (9, 4), (400, 317), (1, 1)):
        theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert intervals.wilson(right / n, n) == pytest.approx(list(theirs), abs=1e-12)
    assert np.round(intervals.wilson(1.0, 24), 2).tolist() == [0.86, 1.0]
    assert intervals.wilson(0.0, 24)[0] == 0.0 == intervals.wilson(0.0, 5000)[0]
    for n in (9, 10):
        y = np.arange(n) % 2
        found = intervals.with_intervals(TWO, (y, np.random.default_rng(0).random((n, 2))))
        assert np.isnan(found["loss_ci95"]).all() == (n == 9)
        assert not np.isnan(found["accuracy_ci95"]).any()
    perfect = intervals.with_intervals(TWO, (y, np.eye(2)[y]))  # every draw of it is perfect
    assert perfect["f1_macro"] == 1 and np.isnan(perfect["f1_macro_ci95"]).all()


def test_an_interval_has_its_value_in_it_where_drawing_rows_twice_makes_it_larger():
    rng = np.random.default_rng(0)
    several = Classify({**HEAD, "labels": [str(k) for k in range(200)], "several": True}, None)
    rare = (rng.random((1000, 200)) < 0.004).astype(float), rng.random((1000, 200))
    scores = intervals.with_intervals(several, rare)
    draws = intervals.bootstrap(several, rare, 1000)["average_precision"]
    (low, high), value = scores["average_precision_ci95"], scores["average_precision"]
    assert value < np.quantile(draws, 0.025) and 0 <= low < value < high
    assert high - low == pytest.approx(np.ptp(np.quantile(draws, (0.025, 0.975))), rel=0.1)


def test_the_bootstrap_is_as_wide_as_theory_says():
    rng = np.random.default_rng(0)
    y, probs = rng.integers(2, size=4000), rng.dirichlet((2, 2), 4000)
    loss = -np.log(probs[np.arange(4000), y])
    low, high = intervals.with_intervals(TWO, (y, probs))["loss_ci95"]
    half = 1.96 * loss.std() / math.sqrt(4000)
    assert [low, high] == pytest.approx([loss.mean() - half, loss.mean() + half], abs=0.1 * half)


def test_gaps_are_told_with_the_rows_of_both_groups():
    # Newcombe 1998, table II (a): 56/70 against 48/80, 0.20 [0.0524, 0.3339]
    assert intervals.newcombe(56 / 70, 70, 48 / 80, 80) == pytest.approx([0.0524, 0.3339], abs=5e-5)
    y = np.zeros(155, dtype=int)
    group = np.array(["a"] * 70 + ["b"] * 80 + ["c"] * 5)
    right = np.r_[np.arange(70) < 56, np.arange(80) < 48, np.arange(5) < 4]
    found = intervals.by_group(TWO, (y, np.where(right[:, None], [[0.9, 0.1]], [[0.2, 0.8]])), group)
    gap = found["gaps"]["accuracy"]
    assert (gap["lowest"], gap["lowest_rows"], gap["highest"], gap["highest_rows"]) == ("b", 80, "a", 70)
    assert gap["gap"] == pytest.approx(0.2) and gap["gap_ci95"] == pytest.approx([0.0524, 0.3339], abs=5e-5)
    assert found["groups"]["c"]["rows"] == 5 and np.isnan(found["groups"]["c"]["loss_ci95"]).all()
    gap = found["gaps"]["loss"]
    assert gap["gap_ci95"][0] < gap["gap"] < gap["gap_ci95"][1]
    gap = found["gaps"]["matthews"]  # 0 in all: two groups are named nevertheless
    assert (gap["gap"], gap["lowest"], gap["highest"]) == (0, "a", "b")


def test_a_large_table_takes_fewer_draws_and_says_so(capsys, monkeypatch):
    clock = itertools.count(0, 6)  # seconds
    monkeypatch.setattr(intervals.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(intervals, "DRAWS", 200)
    monkeypatch.setattr(intervals, "CELLS", 40_000)  # 10 draws of 4,000 rows
    rng = np.random.default_rng(0)
    intervals.with_intervals(TWO, (rng.integers(2, size=4000), rng.random((4000, 2))))
    assert "(intervals: 5%)" in capsys.readouterr().out
    assert intervals.number_of_draws([np.broadcast_to(0.0, (10**6, 1000))]) == 100 < 200


def test_rows_without_a_group_are_called_so():
    gap = {"lowest": "", "lowest_rows": 3, "highest": "x", "highest_rows": 9, "gap": 0.5,
           "gap_ci95": [0.1, 0.9]}
    said = report.table({"meaning": {}, "by_group": {"gaps": {"accuracy": gap}}})
    assert "accuracy: (no group) (3 rows) lowest, x (9) highest" in said
