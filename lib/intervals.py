"""
How sure are we: 95% intervals of metrics, and groups of rows compared.

    with_intervals(task, arrays)      metric -> its value, and metric_ci95 -> [low, high]
    by_group(task, arrays, groups)    the same for each group, and the largest gaps

A share of the rows has Wilson's interval. All else has a bootstrap's: the metrics of a thousand sets of rows
that are drawn with replacement. A draw is how often each row is in it, so what a metric needs (sorted scores,
who is right) is found once, and weighed: `DRAWN` has the metrics of many draws at a time.

task: has metrics, shares, scores(*arrays), drawn(*arrays); arrays have an entry a row.
"""
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import NormalDist

import numpy as np

from lib import metrics
from lib.metrics import ByRow, one_vs_rest

Z = NormalDist().inv_cdf(0.975)
LEAST = 10  # rows, of which a bootstrap says something
DRAWS, FEWEST = 1000, 100
CELLS = 4_000_000  # of weights at a time


# -----------------------------------------------------------------------------
# Shares of the rows

def wilson(share: float, n: int) -> list[float]:
    """The score interval (Wilson 1927): not of width 0 where all are right."""
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def newcombe(high: float, n_high: int, low: float, n_low: int) -> list[float]:
    """Of the difference of two shares, from their Wilson intervals (Newcombe 1998, method 10)."""
    (high_from, high_to), (low_from, low_to) = wilson(high, n_high), wilson(low, n_low)
    return [high - low - math.hypot(high - high_from, low_to - low),
            high - low + math.hypot(high_to - high, low - low_from)]


# -----------------------------------------------------------------------------
# Metrics of many draws. weights: (N, R), how often each row is in each draw -> (R,)

def sums(keys: np.ndarray, weights: np.ndarray, n: int) -> np.ndarray:
    """The weights of the rows with each key from 0 to n - 1: (n, R)."""
    found = np.zeros((n, weights.shape[1]))
    order = np.argsort(keys.astype(np.int16) if n < 2**15 else keys, kind="stable")
    there, first = np.unique(keys[order], return_index=True)
    if len(there):
        found[there] = np.add.reduceat(weights[order], first, axis=0)
    return found


def weighed_mean(each, weights):
    return each @ weights / weights.sum(0)


def from_confusion(weights, y, probs) -> dict:
    called, k = probs.argmax(1), probs.shape[1]
    right = np.flatnonzero(called == y)
    hits = sums(y[right], weights[right], k)  # (K, R), as the next two
    there, said = sums(y, weights, k), sums(called, weights, k)
    sizes, n = there + said, weights.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = (2 * hits / np.maximum(sizes, 1)).sum(0) / (sizes > 0).sum(0)
        spread = (n * n - (there ** 2).sum(0)) * (n * n - (said ** 2).sum(0))
        matthews = (hits.sum(0) * n - (there * said).sum(0)) / np.sqrt(spread)
    return {"f1_macro": f1, "matthews": np.where(spread > 0, matthews, 0.0)}


class Areas:
    """Below the curves of each class. Its rows are sorted once, down to its last positive."""

    def __init__(self, y, probs):
        self.classes = []
        for truth, score in one_vs_rest(y, probs).values():
            order = np.argsort(-score, kind="stable").astype(np.int32)
            positive = np.flatnonzero(truth[order])
            starts = np.append(0, np.flatnonzero(np.diff(score[order])) + 1)  # of each run of equal scores
            run, first_positive = np.unique(np.searchsorted(starts, positive, side="right") - 1,
                                            return_index=True)  # the G runs with a positive
            first, end = starts[run], np.append(starts, len(order))[run + 1]
            if len(run):
                self.classes.append((order, positive, first_positive, first, end))

    def __call__(self, weights) -> dict:
        total = {name: np.zeros(weights.shape[1]) for name in metrics.AREAS}
        defined = {name: np.zeros(weights.shape[1]) for name in metrics.AREAS}
        for one in self.classes:
            for name, area in zip(total, self.of_class(weights, *one), strict=True):
                total[name] += np.nan_to_num(area)
                defined[name] += ~np.isnan(area)
        with np.errstate(invalid="ignore"):
            return {name: total[name] / defined[name] for name in total}

    def of_class(self, weights, order, positive, first_positive, first, end):
        """ROC, average precision: (R,) each."""
        add = np.add.reduceat
        upto = add(weights[order[:end[-1]]], np.append(0, end[:-1])).cumsum(0)  # (G, R), as the next three
        here = add(weights[order[positive]], first_positive)
        hits = here.cumsum(0)
        at = here  # all that is at these scores, which is more if there are ties with negatives
        if (end - first).sum() > len(positive):
            tied = np.concatenate([order[i:j] for i, j in zip(first, end)])
            at = add(weights[tied], np.append(0, np.cumsum(end - first)[:-1]))
        n_true = hits[-1]
        n_false = weights.sum(0) - n_true
        # a positive is above the negatives that come later, and above half of those at its score
        won = here * (n_false - (upto - hits) + (at - here) / 2)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (won.sum(0, dtype=float) / (n_true * n_false.astype(float)),
                    (here * hits / np.maximum(upto, 1)).sum(0, dtype=float) / n_true)


def calibration_error(weights, y, probs):
    confidence = probs.max(1)
    off = (confidence - (probs.argmax(1) == y))[:, None]
    return abs(sums(metrics.tenths(confidence), weights * off, 10)).sum(0) / weights.sum(0)


def from_labels(weights, y, probs) -> dict:
    y, called = y > 0.5, probs > 0.5
    hits = (y & called).T.astype(weights.dtype) @ weights  # (K, R), as the next
    sizes = y.T.astype(weights.dtype) @ weights + called.T.astype(weights.dtype) @ weights
    return {"f1_macro": metrics.f1(hits, sizes).mean(0), "f1_micro": metrics.f1(hits.sum(0), sizes.sum(0))}


def pearson(weights, a, b):
    """a, b: (N,), or (N, R)."""
    n = weights.sum(0)
    # of numbers near 0 the sums of squares lose least
    a, b = (one.reshape(len(one), -1) - one.mean() for one in (a, b))
    mean_a, mean_b = ((weights * one).sum(0) / n for one in (a, b))
    squares_a, squares_b = ((weights * one * one).sum(0) for one in (a, b))
    spread_a, spread_b = squares_a - n * mean_a ** 2, squares_b - n * mean_b ** 2
    varies = (spread_a > 1e-12 * squares_a) & (spread_b > 1e-12 * squares_b)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = ((weights * a * b).sum(0) - n * mean_a * mean_b) / np.sqrt(spread_a * spread_b)
    return np.where(varies, r, math.nan)


def drawn_ranks(weights, x):
    """From 1 on in each draw, equal values share the mean of their ranks: (N, R)."""
    values, which = np.unique(x, return_inverse=True)
    counts = sums(which, weights, len(values))  # (values, R)
    return (np.cumsum(counts, axis=0) - (counts - 1) / 2)[which]


def spearman(weights, a, b):
    return pearson(weights, drawn_ranks(weights, a), drawn_ranks(weights, b))


DRAWN = {  # metric -> the same of many draws: (R,), or a dict with others that come with it
    metrics.f1_macro: from_confusion,
    metrics.matthews: from_confusion,
    metrics.label_f1: from_labels,
    metrics.label_f1_macro: from_labels,
    metrics.calibration_error: calibration_error,
    metrics.pearson: pearson,
    metrics.spearman: spearman,
}


class Drawn:
    """What `metrics.compute` gives, of many draws at a time: name -> (R,)."""

    def __init__(self, table: dict[str, Callable], *arrays):
        self.table, self.arrays = table, arrays
        self.ways = {}  # name -> function of the weights

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        for name in self.table:
            if name in found:
                continue
            if name not in self.ways:
                self.ways[name] = self.prepared(self.table[name])
            values = self.ways[name](weights)
            found.update(values if isinstance(values, dict) else {name: values})
        return {name: found[name] for name in self.table}

    def prepared(self, metric: Callable) -> Callable:
        if isinstance(metric, ByRow):
            each = metric.each(*self.arrays)
            return partial(weighed_mean, each.reshape(len(each), -1).mean(1))
        if metric in metrics.AREAS.values():
            return Areas(*self.arrays)
        return partial(self.of_draws, metric)

    def of_draws(self, metric: Callable, weights: np.ndarray):
        if metric in DRAWN:
            return DRAWN[metric](weights, *self.arrays)
        return np.array([metric(*(a[rows] for a in self.arrays)) for rows in drawn_rows(weights)])


def drawn_rows(weights: np.ndarray) -> Iterator[np.ndarray]:
    for counts in weights.T:
        yield np.repeat(np.arange(len(counts)), counts.astype(int))


def drawn_by_sums(scores: Callable, arrays: Sequence, weights: np.ndarray) -> dict[str, np.ndarray]:
    """What Drawn gives, for scores of sums over the rows alone."""
    totals = [weights.T @ array for array in arrays]  # (R, ...) each
    each = [scores(*(total[r:r + 1] for total in totals)) for r in range(weights.shape[1])]
    return {name: np.array([one[name] for one in each]) for name in each[0]}


# -----------------------------------------------------------------------------
# Bootstrap

class Ticks:
    """Every five seconds a line that says how far it is."""

    def __init__(self, total: int):
        self.total, self.done, self.next = total, 0, time.monotonic() + 5

    def add(self, draws: int) -> None:
        self.done += draws
        if time.monotonic() > self.next:
            self.next = time.monotonic() + 5
            print(f"(intervals: {self.done:,} of {self.total:,} draws)", flush=True)


def number_of_draws(arrays: Sequence) -> int:
    """A thousand; of more than 5 million numbers fewer, down to a hundred."""
    return int(np.clip(DRAWS * 5_000_000 // sum(a.size for a in arrays), FEWEST, DRAWS))


def bootstrap(task, arrays: Sequence, draws: int, seed: int = 0, ticks: Ticks | None = None) -> dict:
    """The metrics of sets of rows, drawn with replacement (Efron 1979): name -> (draws,); nan of few rows."""
    n, rng, parts, drawn = len(arrays[0]), np.random.default_rng(seed), [], task.drawn(*arrays)
    if n < LEAST:
        return {name: np.full(draws, math.nan) for name in task.metrics}
    size = max(1, min(draws, CELLS // n))
    for i in range(0, draws, size):
        count = min(size, draws - i)
        rows = rng.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        weights = np.bincount(rows.ravel(), minlength=count * n).reshape(count, n)
        weights = np.ascontiguousarray(weights.T, dtype=np.float32)  # (N, R); whole numbers up to 2**24
        parts.append(drawn(weights))
        if ticks:
            ticks.add(count)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def middle(values: np.ndarray) -> list[float]:
    """The middle 95% of the draws. They say nothing if there are none, or all of them are equal."""
    known = values[~np.isnan(values)]
    if not len(known) or np.ptp(known) == 0:
        return [math.nan, math.nan]
    return np.quantile(known, (0.025, 0.975)).tolist()


def with_intervals(task, arrays: Sequence, values: dict | None = None) -> dict:
    """metric -> value, and metric_ci95 -> [low, high], nan if nothing can be said.

    values: what `bootstrap` gives.
    """
    n, found = len(arrays[0]), {}
    if values is None:
        draws = number_of_draws(arrays)
        if draws < DRAWS:
            print(f"(intervals: of {draws} draws, not {DRAWS}: {n:,} rows with many classes)", flush=True)
        values = bootstrap(task, arrays, draws, ticks=Ticks(draws))
    for name, value in task.scores(*arrays).items():
        found[name] = value
        if name in task.shares:
            found[f"{name}_ci95"] = wilson(value, n)
        else:
            found[f"{name}_ci95"] = [math.nan] * 2 if math.isnan(value) else middle(values[name])
    return found


def by_group(task, arrays: Sequence, groups: Sequence[str]) -> dict:
    """Every metric for each group, and for each metric the largest gap between two groups.

    A gap's interval is of the difference between those two groups. Of many small groups two are always far
    apart by chance: it is to be read with the numbers of rows.
    """
    names, which, counts = np.unique(np.array(groups), return_inverse=True, return_counts=True)
    members = np.split(np.argsort(which, kind="stable"), np.cumsum(counts)[:-1])
    draws = number_of_draws(arrays)
    ticks = Ticks(draws * len(names))
    values, found = {}, {}
    for seed, (name, rows) in enumerate(zip(names.tolist(), members)):
        mine = [a[rows] for a in arrays]
        values[name] = bootstrap(task, mine, draws, seed, ticks)
        found[name] = {"rows": len(rows), **with_intervals(task, mine, values[name])}
    gaps = {}
    for metric in task.metrics:
        known = {name: one[metric] for name, one in found.items() if not math.isnan(one[metric])}
        if len(known) < 2:
            continue
        low, high = min(known, key=known.get), max(known, key=known.get)
        n_low, n_high = found[low]["rows"], found[high]["rows"]
        if metric in task.shares:
            sure = newcombe(known[high], n_high, known[low], n_low)
        else:
            sure = middle(values[high][metric] - values[low][metric])
        gaps[metric] = {"gap": known[high] - known[low], "lowest": low, "lowest_rows": n_low,
                        "highest": high, "highest_rows": n_high, "gap_ci95": sure}
    return {"groups": found, "gaps": gaps}
