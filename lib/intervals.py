"""
How sure are we: 95% intervals of metrics, and groups of rows compared.

    with_intervals(task, arrays)      metric -> its value, and metric_ci95 -> [low, high]
    by_group(task, arrays, groups)    the same for each group, and the largest gaps

A share of the rows has Wilson's interval. All else has a bootstrap's: the metrics of a thousand sets of rows
that are drawn with replacement. A draw is how often each row is in it, so what a metric needs (sorted scores,
who is right) is found once, and weighed by many draws at a time. Of two classes a row costs about 80 ns a
draw.

task: has metrics, shares, scores(*arrays), drawn(*arrays); arrays have an entry a row.
"""
import math
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist

import numpy as np

from lib import metrics

Z = NormalDist().inv_cdf(0.975)
LEAST = 10  # rows, of which a bootstrap says something
DRAWS, FEWEST = 1000, 100
CELLS = 1_000_000  # of weights at a time


# -----------------------------------------------------------------------------
# Shares of the rows

def wilson(share: float, n: int) -> list[float]:
    """The score interval (Wilson 1927): not of width 0 where all are right."""
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return [middle - half if share > 0 else 0.0, middle + half if share < 1 else 1.0]  # else 5e-20


def newcombe(high: float, n_high: int, low: float, n_low: int) -> list[float]:
    """Of the difference of two shares, from their Wilson intervals (Newcombe 1998, method 10)."""
    (high_from, high_to), (low_from, low_to) = wilson(high, n_high), wilson(low, n_low)
    return [high - low - math.hypot(high - high_from, low_to - low),
            high - low + math.hypot(high_to - high, low - low_from)]


# -----------------------------------------------------------------------------
# Metrics of many draws. Each function here finds what does not change from draw to draw, and returns a
# function of weights, (R, N): how often each row is in each draw.

def sums(keys: np.ndarray, weights: np.ndarray, n: int) -> np.ndarray:
    """The weights of the rows with each key from 0 to n - 1: (n, R)."""
    cells = keys + n * np.arange(len(weights))[:, None]  # (R, N)
    return np.bincount(cells.ravel(), weights.ravel(), n * len(weights)).reshape(-1, n).T


def class_counts(y, probs) -> Callable:
    """-> what metrics.ByClass takes: (K, R) each."""
    if y.ndim == 2:
        y, called = y > 0.5, probs > 0.5
        masks = [one.astype(np.float32) for one in (y & called, y, called)]
        return lambda weights: [(weights @ one).T for one in masks]
    called, k = probs.argmax(1), probs.shape[1]
    right = np.flatnonzero(called == y)
    return lambda weights: [sums(y[right], weights.take(right, 1), k), sums(y, weights, k),
                            sums(called, weights, k)]


def areas(y, probs) -> Callable:
    """-> ROC-AUC and average precision, (R,) each: means over the classes of which they are defined."""
    classes = []
    for truth, score in metrics.one_vs_rest(y, probs).values():
        order = np.argsort(-score, kind="stable")
        starts = np.append(0, np.flatnonzero(np.diff(score[order])) + 1)
        positive = np.flatnonzero(truth[order])
        if not len(positive):
            continue
        # of the G runs of equal scores with a positive: its last positive, its first row, the row after it
        run, count = np.unique(np.searchsorted(starts, positive, side="right") - 1, return_counts=True)
        hit, first, end = np.cumsum(count) - 1, starts[run], np.append(starts, len(order))[run + 1]
        rows, parts = order[:end[-1]], np.unique(np.concatenate(([0], first, end)))
        if 8 * len(parts) < len(rows):  # of a rare class: rows between those of its runs are added up first
            first, end = np.searchsorted(parts, first), np.searchsorted(parts, end)
        else:
            parts = None
        classes.append((rows, parts, order[positive], hit, first, end))

    def of(weights):
        values = np.array([areas_of_class(weights, *one) for one in classes]).reshape(-1, 2, len(weights))
        with np.errstate(invalid="ignore"):
            means = np.nan_to_num(values).sum(0) / (~np.isnan(values)).sum(0)
        return dict(zip(metrics.AREAS, means, strict=True))
    return of


def areas_of_class(weights, rows, parts, positive, hit, first, end) -> tuple[np.ndarray, np.ndarray]:
    n = weights.take(rows, 1)
    if parts is not None:
        n = np.add.reduceat(n, parts[:-1], axis=1)
    np.cumsum(n, axis=1, out=n)
    before, upto = n.take(first - 1, 1) * (first > 0), n.take(end - 1, 1)  # each run, and with it: (R, G)
    hits = weights.take(positive, 1).cumsum(1).take(hit, 1)  # of the positives
    here = np.diff(hits, axis=1, prepend=0)
    n_true = hits[:, -1].astype(float)
    n_false = weights.sum(1) - n_true
    lost = here * ((before + upto + here) / 2 - hits)  # to negatives above, and half of those at that score
    precision = here * hits / np.maximum(upto, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - lost.sum(1, dtype=float) / (n_true * n_false), precision.sum(1, dtype=float) / n_true


def calibration_error(y, probs) -> Callable:
    confidence = probs.max(1)
    tenths, off = metrics.tenths(confidence), (confidence - (probs.argmax(1) == y)).astype(np.float32)
    return lambda weights: abs(sums(tenths, weights * off, 10)).sum(0) / weights.sum(1)


def pearson(a, b) -> Callable:
    return lambda weights: correlation(weights, a, b)


def spearman(a, b) -> Callable:
    a, b = (np.unique(one, return_inverse=True)[1] for one in (a, b))
    return lambda weights: correlation(weights, drawn_ranks(weights, a), drawn_ranks(weights, b))


def drawn_ranks(weights, which):
    """From 1 on in each draw, equal values share the mean of their ranks: (R, N). which: the rows' values."""
    counts = sums(which, weights, which.max() + 1)  # (values, R)
    return (np.cumsum(counts, axis=0) - (counts - 1) / 2)[which].T


def correlation(weights, a, b):
    """Pearson's, of a and b: (N,), or (R, N)."""
    n = weights.sum(1)
    a, b = a - a.mean(), b - b.mean()  # of numbers near 0 the sums of squares lose least
    mean_a, mean_b = ((weights * one).sum(1) / n for one in (a, b))
    squares_a, squares_b = ((weights * one * one).sum(1) for one in (a, b))
    spread_a, spread_b = squares_a - n * mean_a ** 2, squares_b - n * mean_b ** 2
    varies = (spread_a > 1e-12 * squares_a) & (spread_b > 1e-12 * squares_b)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = ((weights * a * b).sum(1) - n * mean_a * mean_b) / np.sqrt(spread_a * spread_b)
    return np.where(varies, r, math.nan)


def mean(each: np.ndarray) -> Callable:
    each = each.reshape(len(each), -1).mean(1)
    return lambda weights: weights @ each / weights.sum(1)


def of_rows(metric: Callable, *arrays) -> Callable:
    """A metric that has no way of its own: of the rows of each draw."""
    def of(weights):
        draws = [[np.repeat(array, counts, axis=0) for array in arrays] for counts in weights.astype(int)]
        return np.array([metric(*rows) for rows in draws])
    return of


WAYS = {metrics.calibration_error: calibration_error, metrics.pearson: pearson, metrics.spearman: spearman}


class Drawn:
    """What `metrics.compute` gives, of many draws at a time: name -> (R,)."""

    def __init__(self, table: dict[str, Callable], *arrays):
        self.table, self.ways, self.by_class, self.areas = table, {}, {}, None
        for name, metric in table.items():
            if isinstance(metric, metrics.ByClass):
                self.by_class[name] = metric.of
            elif metric is metrics.AREAS.get(name):
                self.areas = self.areas or areas(*arrays)
            elif isinstance(metric, metrics.ByRow):
                self.ways[name] = mean(metric.each(*arrays))
            else:
                self.ways[name] = WAYS[metric](*arrays) if metric in WAYS else of_rows(metric, *arrays)
        self.class_counts = class_counts(*arrays) if self.by_class else None

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        found = {name: way(weights) for name, way in self.ways.items()}
        if self.by_class:
            counts = self.class_counts(weights)
            found |= {name: of(*counts) for name, of in self.by_class.items()}
        if self.areas:
            found |= self.areas(weights)
        return {name: found[name] for name in self.table}


def drawn_by_sums(scores: Callable, arrays: Sequence, weights: np.ndarray) -> dict[str, np.ndarray]:
    """What Drawn gives, for scores of sums over the rows alone."""
    totals = [weights @ array for array in arrays]  # (R, ...) each
    each = [scores(*(total[r:r + 1] for total in totals)) for r in range(len(weights))]
    return {name: np.array([one[name] for one in each]) for name in each[0]}


# -----------------------------------------------------------------------------
# Bootstrap

def ticking(steps: Sequence, what: str) -> Iterator:
    """The same, and every five seconds a line that says how far it is."""
    due = time.monotonic() + 5
    for done, step in enumerate(steps):
        if time.monotonic() > due:
            print(f"({what}: {done / len(steps):.0%})", flush=True)
            due = time.monotonic() + 5
        yield step


def number_of_draws(arrays: Sequence) -> int:
    """A thousand; of more than 5 million numbers fewer, down to a hundred."""
    return int(np.clip(DRAWS * 5_000_000 // sum(a.size for a in arrays), FEWEST, DRAWS))


def bootstrap(task, arrays: Sequence, draws: int, seed: int = 0) -> dict:
    """The metrics of sets of rows, drawn with replacement (Efron 1979): name -> (draws,); nan of few rows."""
    n, rng, parts = len(arrays[0]), np.random.default_rng(seed), []
    if n < LEAST:
        return {name: np.full(draws, math.nan) for name in task.metrics}
    drawn, size = task.drawn(*arrays), max(1, min(draws, CELLS // n))
    for i in ticking(range(0, draws, size), "intervals"):
        count = min(size, draws - i)
        rows = rng.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        weights = np.bincount(rows.ravel(), minlength=count * n).reshape(count, n)
        parts.append(drawn(weights.astype(np.float32)))  # whole numbers up to 2**24
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def around(value: float, draws: np.ndarray) -> list[float]:
    """The middle 95% of the draws. They say nothing if there are none, or all of them are equal.

    A draw has some rows twice, which makes the average precision of rare classes larger than it is: draws
    that miss the value are moved, so that their mean is there.
    """
    known = draws[~np.isnan(draws)]
    if math.isnan(value) or not len(known) or np.ptp(known) == 0:
        return [math.nan, math.nan]
    low, high = np.quantile(known, (0.025, 0.975)).tolist()
    slack = 1e-6 * max(1, abs(value))  # draws are in float32
    if low - slack <= value <= high + slack:
        return [low, high]
    moved = value - float(known.mean())
    return [max(low + moved, 0.0) if known.min() >= 0 else low + moved, high + moved]


def with_intervals(task, arrays: Sequence, values: dict | None = None) -> dict:
    """metric -> value, and metric_ci95 -> [low, high], nan if nothing can be said.

    values: what `bootstrap` gives.
    """
    n = len(arrays[0])
    if values is None:
        draws = number_of_draws(arrays)
        if draws < DRAWS:
            print(f"(intervals: of {draws} draws, not {DRAWS}: {n:,} rows with many classes)", flush=True)
        values = bootstrap(task, arrays, draws)
    found = task.scores(*arrays)
    for name, value in [*found.items()]:
        if name in task.shares:
            found[f"{name}_ci95"] = wilson(value, n)
        else:
            found[f"{name}_ci95"] = around(value, values[name])
    return found


def by_group(task, arrays: Sequence, groups: Sequence[str]) -> dict:
    """Every metric for each group, and for each metric the largest gap between two groups.

    A gap's interval is of the difference between those two groups. Of many small groups two are always far
    apart by chance: it is to be read with the numbers of rows.
    """
    names, which, counts = np.unique(np.array(groups), return_inverse=True, return_counts=True)
    members = np.split(np.argsort(which, kind="stable"), np.cumsum(counts)[:-1])  # of each group, its rows
    draws, values, found = number_of_draws(arrays), {}, {}
    for seed, name in enumerate(ticking(names.tolist(), "groups")):
        mine = [a[members[seed]] for a in arrays]
        values[name] = bootstrap(task, mine, draws, seed)
        found[name] = {"rows": len(mine[0]), **with_intervals(task, mine, values[name])}
    gaps = {}
    for metric in task.metrics:
        known = {name: one[metric] for name, one in found.items() if not math.isnan(one[metric])}
        if len(known) < 2:
            continue
        low = min(known, key=known.get)
        high = max((one for one in known if one != low), key=known.get)  # another one, if all are equal too
        n_low, n_high = found[low]["rows"], found[high]["rows"]
        if metric in task.shares:
            sure = newcombe(known[high], n_high, known[low], n_low)
        else:
            sure = around(known[high] - known[low], values[high][metric] - values[low][metric])
        gaps[metric] = {"gap": known[high] - known[low], "lowest": low, "lowest_rows": n_low,
                        "highest": high, "highest_rows": n_high, "gap_ci95": sure}
    return {"groups": found, "gaps": gaps}
