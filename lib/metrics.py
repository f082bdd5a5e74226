"""
How good is it, and how sure are we: metrics in numpy, intervals, groups, a baseline, the report.

    scores = compute(CLASS_METRICS, y, probs)     name -> value, for true classes and their probabilities
    with_intervals(scores_of, arrays)             the same, each with its 95% interval
    by_group(scores_of, arrays, groups)           for each group, and the largest gaps

A metric is a line in one of the tables, and equals what scikit-learn, scipy or the task's official script
computes; nan if it is not defined on these rows (ROC-AUC of a single class). Scores are a function of arrays
with a row for each example: intervals and groups, which take some of the rows, need to know no task.
"""
import contextlib
import logging
import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from lib.run import write_json, write_text


def compute(table: dict[str, Callable], *arrays) -> dict[str, float]:
    return {name: float(metric(*arrays)) for name, metric in table.items()}


# -----------------------------------------------------------------------------
# Classes. y: (N,) class numbers, or (N, K) of 0 and 1 if a row has several labels; probs: (N, K).

def nats(y, probs):
    right = probs[np.arange(len(y)), y]
    return -np.log(np.clip(right, 1e-300, 1)).mean()


def binary_nats(y, probs):
    right = np.where(y > 0.5, probs, 1 - probs)
    return -np.log(np.clip(right, 1e-300, 1)).mean()


def confusion(y, probs) -> np.ndarray:
    """How often class i was called j: (K, K)."""
    n = probs.shape[1]
    return np.bincount(y * n + probs.argmax(1), minlength=n * n).reshape(n, n)


def f1_macro(y, probs):
    """Mean over the classes that occur, in truth or in prediction."""
    table = confusion(y, probs)
    sizes = table.sum(0) + table.sum(1)
    occurs = sizes > 0
    return (2 * np.diag(table)[occurs] / sizes[occurs]).mean()


def matthews(y, probs):
    """Correlation of truth and prediction (Gorodkin 2004 for many classes); 0 if one of them is constant."""
    table = confusion(y, probs).astype(float)
    n, true, called = table.sum(), table.sum(1), table.sum(0)
    spread = (n * n - true @ true) * (n * n - called @ called)
    if not spread:
        return 0.0
    return (np.trace(table) * n - true @ called) / math.sqrt(spread)


def label_hits(y, probs):
    """Of each label: how often it was right, and how often in truth plus how often called."""
    y, called = y > 0.5, probs > 0.5
    return (y & called).sum(0), y.sum(0) + called.sum(0)


def label_f1_macro(y, probs):
    hits, sizes = label_hits(y, probs)
    return (2 * hits / np.maximum(sizes, 1)).mean()


def label_f1_micro(y, probs):
    hits, sizes = label_hits(y, probs)
    return 2 * hits.sum() / max(1, sizes.sum())


def one_vs_rest(y, probs) -> list[tuple[np.ndarray, np.ndarray]]:
    """(truth, score) of each class against the rest; of two classes, of the second alone."""
    if y.ndim == 2:
        return list(zip(y.T > 0.5, probs.T))
    classes = range(1, 2) if probs.shape[1] == 2 else range(probs.shape[1])
    return [(y == k, probs[:, k]) for k in classes]


def positives(truth, score) -> tuple[np.ndarray, np.ndarray]:
    """True and false positives if all from a score on are called positive: from none down to all."""
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # of each run of equal scores
    true = np.cumsum(truth[order])[last]
    return np.append(0, true), np.append(0, last + 1 - true)


def roc_area(truth, score):
    """How likely a positive scores above a negative, ties counting half."""
    true, false = positives(truth, score)
    pairs = int(true[-1]) * int(false[-1])
    if not pairs:
        return math.nan
    twice = np.diff(false) * (true[1:] + true[:-1])
    return twice.sum() / 2 / pairs


def precision_area(truth, score):
    """Average precision: the precision at each threshold, weighted by the recall that it adds."""
    true, false = positives(truth, score)
    if not true[-1]:
        return math.nan
    precision = true[1:] / (true + false)[1:]
    return (np.diff(true) * precision).sum() / true[-1]


def over_classes(area, y, probs):
    """Mean over the classes of which it is defined."""
    values = [float(area(*one)) for one in one_vs_rest(y, probs)]
    defined = [value for value in values if not math.isnan(value)]
    return np.mean(defined) if defined else math.nan


def roc_auc(y, probs):
    return over_classes(roc_area, y, probs)


def average_precision(y, probs):
    return over_classes(precision_area, y, probs)


def calibration_bins(confidence, right, bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean confidence, share right, rows) of each bin that has rows."""
    bin_of = np.minimum((np.nan_to_num(confidence) * bins).astype(int), bins - 1)
    found = []
    for b in np.unique(bin_of):
        mine = bin_of == b
        mean, share = confidence[mine].mean(), right[mine].mean()
        found.append((float(mean), float(share), int(mine.sum())))
    return found


def calibration_error(y, probs):
    """Expected calibration error (Naeini et al. 2015) of the predicted classes."""
    bins = calibration_bins(probs.max(1), probs.argmax(1) == y)
    return sum(n * abs(confidence - right) for confidence, right, n in bins) / len(y)


CLASS_METRICS = {
    "loss": nats,
    "accuracy": lambda y, probs: (probs.argmax(1) == y).mean(),
    "f1_macro": f1_macro,
    "matthews": matthews,
    "roc_auc": roc_auc,
    "average_precision": average_precision,
    "calibration_error": calibration_error,
}
LABEL_METRICS = {  # several labels a row
    "loss": binary_nats,
    "accuracy": lambda y, probs: ((y > 0.5) == (probs > 0.5)).all(1).mean(),  # rows with all labels right
    "f1_macro": label_f1_macro,
    "f1_micro": label_f1_micro,
    "roc_auc": roc_auc,
    "average_precision": average_precision,
}


# -----------------------------------------------------------------------------
# Numbers. y, p: (N,)

def ranks(x: np.ndarray) -> np.ndarray:
    """From 1 on; equal values share the mean of their ranks."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def pearson(a, b):
    """nan if one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    spread = math.sqrt((a @ a) * (b @ b))
    return a @ b / spread if spread > 0 else math.nan


NUMBER_METRICS = {
    "loss": lambda y, p: ((y - p) ** 2).mean(),
    "mean_absolute_error": lambda y, p: abs(y - p).mean(),
    "pearson": pearson,
    "spearman": lambda y, p: pearson(ranks(y), ranks(p)),
}


# -----------------------------------------------------------------------------
# Tags, answers, texts

class TagTotals(NamedTuple):
    """Sums over sentences."""
    found: int  # entities that were called, and are there
    called: int
    there: int
    right: int  # tags
    words: int
    nats: float  # of the true tags


TAG_METRICS = {
    "loss": lambda n: n.nats / max(1, n.words),
    "accuracy": lambda n: n.right / max(1, n.words),
    "precision": lambda n: n.found / max(1, n.called),
    "recall": lambda n: n.found / max(1, n.there),
    "f1": lambda n: 2 * n.found / max(1, n.called + n.there),
}


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, first, end) of each entity. As in conlleval, an I- that continues nothing begins one."""
    found, begin, kind = set(), 0, None
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind is not None and (prefix != "I" or name != kind):
            found.add((kind, begin, i))
            kind = None
        if prefix in ("B", "I") and kind is None:
            begin, kind = i, name
    return found


def tag_counts(gold: Sequence[str], predicted: Sequence[str]) -> list[int]:
    """TagTotals of a sentence, but its nats."""
    there, called = entities(gold), entities(predicted)
    right = sum(map(str.__eq__, gold, predicted))
    return [len(there & called), len(called), len(there), right, len(gold)]


CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
SIGNS = re.compile(f"[{re.escape(string.punctuation)}\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
                   "\uff5b-\uff65]")

ANSWER_METRICS = {  # of what answer_match gives for each question, (N,) both
    "exact_match": lambda exact, f1: exact.mean(),
    "f1": lambda exact, f1: f1.mean(),
}


def answer_words(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no punctuation, no articles; a Chinese character is a word."""
    text = re.sub(r"\b(a|an|the)\b", " ", SIGNS.sub("", text.lower()))
    return re.sub(f"([{CJK}])", r" \1 ", text).split()


def answer_match(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 against the best of the true answers (SQuAD 2.0). If there is none, "" is right."""
    said = answer_words(prediction)
    exact = f1 = 0.0
    for gold in map(answer_words, answers or [""]):
        same = float(said == gold)
        common = (Counter(said) & Counter(gold)).total()
        exact = max(exact, same)
        f1 = max(f1, 2 * common / (len(said) + len(gold)) if said and gold else same)
    return exact, f1


class TokenTotals(NamedTuple):
    """Sums over texts."""
    nats: float
    right: float  # tokens that were likeliest
    tokens: float  # that count


TOKEN_METRICS = {
    "loss": lambda n: n.nats / max(1, n.tokens),
    "perplexity": lambda n: math.exp(min(700, n.nats / max(1, n.tokens))),
    "accuracy": lambda n: n.right / max(1, n.tokens),
}


# -----------------------------------------------------------------------------
# Intervals and groups

def bootstrap(scores: Callable, arrays: tuple, samples: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
    """The metrics of `samples` sets of rows, drawn with replacement (Efron 1979): name -> (samples,)."""
    rng, n = np.random.default_rng(seed), len(arrays[0])
    drawn = []
    for _ in range(samples):
        rows = rng.integers(n, size=n)
        drawn.append(scores(*(a[rows] for a in arrays)))
    return {name: np.array([one[name] for one in drawn]) for name in drawn[0]}


def interval(values: np.ndarray) -> list[float]:
    """The middle 95% of them."""
    values = values[~np.isnan(values)]
    if not len(values):
        return [math.nan, math.nan]
    return np.quantile(values, (0.025, 0.975)).tolist()


def described(values: dict[str, float], drawn: dict[str, np.ndarray]) -> dict:
    """metric -> value, and metric_ci95 -> [low, high]."""
    found = {}
    for name, value in values.items():
        found[name] = value
        found[f"{name}_ci95"] = interval(drawn[name])
    return found


def with_intervals(scores: Callable, arrays: tuple, samples: int = 1000, seed: int = 0) -> dict:
    return described(scores(*arrays), bootstrap(scores, arrays, samples, seed))


def by_group(scores: Callable, arrays: tuple, groups: Sequence[str], samples: int = 1000) -> dict:
    """Every metric for each group, and for each metric the largest gap between two groups.

    A gap's interval is of the difference between those two groups. Of many small groups two are always far
    apart by chance: it is to be read with the number of rows.
    """
    groups, drawn, found = np.array(groups), {}, {}
    for seed, name in enumerate(np.unique(groups).tolist()):
        mine = tuple(a[groups == name] for a in arrays)
        drawn[name] = bootstrap(scores, mine, samples, seed)
        found[name] = {"rows": len(mine[0]), **described(scores(*mine), drawn[name])}
    gaps = {}
    for metric in drawn[name]:
        known = {name: one[metric] for name, one in found.items() if not math.isnan(one[metric])}
        if len(known) > 1:
            low, high = min(known, key=known.get), max(known, key=known.get)
            gaps[metric] = {"gap": known[high] - known[low], "lowest": low, "highest": high,
                            "gap_ci95": interval(drawn[high][metric] - drawn[low][metric])}
    return {"groups": found, "gaps": gaps}


# -----------------------------------------------------------------------------
# The baseline that a model has to beat to be worth its time

def split_words(text: str) -> list[str]:
    """The words of a text, of which a Chinese character is one, and each two neighbours."""
    words = re.findall(rf"[{CJK}]|[^\W{CJK}]+|[^\w\s]", text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:])]


def words_of(text: str, pair: str | None) -> list[str]:
    """Of two texts: the words of each apart, which are in both, and which in one of them alone."""
    if pair is None:
        return split_words(text)
    a, b = split_words(text), split_words(pair)
    groups = {"1": a, "2": b, "=": sorted({*a} & {*b}), "!": sorted({*a} ^ {*b})}
    return [f"{mark} {word}" for mark, words in groups.items() for word in words]


class BagOfWords:
    """A linear model on TF-IDF of words and pairs of words: logistic regression, or least squares.

    texts: [(text, second text or None), ...]; n_out: outputs, K.
    """

    def __init__(self, n_out: int):
        self.n_out = n_out

    @torch.enable_grad()
    def fit(self, texts, y: torch.Tensor, loss: Callable, penalty: float = 0.2) -> "BagOfWords":
        """loss: a sum, of outputs (N, K) and y. penalty: of squared weights; 1 / (2 C) of scikit-learn."""
        count = Counter(word for both in texts for word in set(words_of(*both)))
        known = sorted(word for word in count if count[word] > 1) or sorted(count) or [""]
        self.number = {word: i for i, word in enumerate(known)}
        n = 1 + len(texts)
        self.idf = {word: math.log(n / (1 + count[word])) + 1 for word in known}
        self.weight = torch.zeros(len(known), self.n_out, requires_grad=True)
        self.bias = torch.zeros(self.n_out, requires_grad=True)
        features = self.features(texts)
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=60, line_search_fn="strong_wolfe")

        def objective():
            optimizer.zero_grad()
            total = loss(self.linear(features), y) + penalty * self.weight.square().sum()
            total = total / len(y)
            total.backward()
            return total
        optimizer.step(objective)
        return self

    def features(self, texts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As F.embedding_bag takes them: the words' numbers, where each text begins, values of length 1."""
        numbers, starts, values = [], [], []
        for both in texts:
            counts = Counter(word for word in words_of(*both) if word in self.number)
            row = np.array([(1 + math.log(n)) * self.idf[word] for word, n in counts.items()])
            starts.append(len(numbers))
            numbers += [self.number[word] for word in counts]
            values += (row / (np.linalg.norm(row) or 1)).tolist()
        return torch.tensor(numbers, dtype=torch.long), torch.tensor(starts), torch.tensor(values)

    def linear(self, features) -> torch.Tensor:  # (N, K)
        numbers, starts, values = features
        sums = F.embedding_bag(numbers, self.weight, starts, mode="sum", per_sample_weights=values)
        return sums + self.bias

    @torch.no_grad()
    def outputs(self, texts) -> np.ndarray:
        """(N, K) as a model's head gives them: before the softmax or sigmoid."""
        return self.linear(self.features(texts)).numpy()


def sentences(text: str) -> list[tuple[int, int]]:
    """Where sentences begin and end, roughly."""
    found = re.finditer(r"[^.!?。！？]+[.!?。！？]?", text)
    return [one.span() for one in found if one.group().strip()]


# -----------------------------------------------------------------------------
# The report, for classes

def report(folder: Path, y: np.ndarray, probs: np.ndarray, labels: list[str]) -> list[str]:
    """curves.json, and with scikit-learn and matplotlib report.txt and the pictures. Returns their names.

    y: (N,) class numbers, or (N, K) of 0 and 1 if a row has several labels; probs: (N, K).
    """
    several = y.ndim == 2
    truth = y > 0.5 if several else y[:, None] == np.arange(len(labels))  # (N, K)
    shown = [1] if len(labels) == 2 and not several else np.flatnonzero(truth.any(0))
    curves = {labels[k]: curve(truth[:, k], probs[:, k]) for k in shown}
    if several:
        called, table = probs > 0.5, None
        bins = calibration_bins(probs.ravel(), truth.ravel())
    else:
        called, table = probs.argmax(1), confusion(y, probs)
        bins = calibration_bins(probs.max(1), called == y)
    write_json(folder / "curves.json", {"labels": labels, "curves": curves, "calibration": bins,
                                        "confusion": None if several else table.tolist()})
    try:
        import matplotlib
        from sklearn.metrics import classification_report
    except ImportError as error:
        print(f"(report.txt and pictures need {error.name}: pip install scikit-learn matplotlib)")
        return ["curves.json"]
    text = classification_report(y, called, digits=4, zero_division=0, labels=range(len(labels)),
                                 target_names=labels)
    write_text(folder / "report.txt", text)
    matplotlib.use("Agg")
    return ["curves.json", "report.txt", *draw(folder, curves, bins, table, labels)]


def curve(truth, score) -> dict:
    true, false = positives(truth, score)
    return {"false_positive_rate": (false / max(1, false[-1])).tolist(),
            "true_positive_rate": (true / max(1, true[-1])).tolist(),  # which is the recall
            "precision": [1.0, *(true[1:] / (true + false)[1:]).tolist()],
            "roc_auc": float(roc_area(truth, score)),
            "average_precision": float(precision_area(truth, score))}


def draw(folder: Path, curves: dict, bins: list, table: np.ndarray | None, labels: list[str]) -> list[str]:
    """The pictures, from the numbers in curves.json. Returns the names of the files."""
    from sklearn.calibration import CalibrationDisplay
    from sklearn.metrics import ConfusionMatrixDisplay, PrecisionRecallDisplay, RocCurveDisplay

    with picture(folder / "roc.png", "ROC, and the area below") as axes:
        for name, one in curves.items():
            x = np.array(one["false_positive_rate"])
            y = np.array(one["true_positive_rate"])
            display = RocCurveDisplay(fpr=x, tpr=y, roc_auc=one["roc_auc"])
            display.plot(ax=axes, name=in_legend(name))
    with picture(folder / "precision_recall.png", "Precision and recall, and average precision") as axes:
        for name, one in curves.items():
            x = np.array(one["true_positive_rate"])[::-1]
            y = np.array(one["precision"])[::-1]
            display = PrecisionRecallDisplay(y, x, average_precision=one["average_precision"])
            display.plot(ax=axes, name=in_legend(name))
    with picture(folder / "calibration.png", "Calibration") as axes:
        confidence, right, _ = zip(*bins)
        CalibrationDisplay(right, confidence, confidence).plot(ax=axes)
    names = ["roc.png", "precision_recall.png", "calibration.png"]
    if table is not None:
        with picture(folder / "confusion.png", "Confusion") as axes:
            ConfusionMatrixDisplay(table, display_labels=labels).plot(
                ax=axes, cmap="Blues", include_values=len(labels) <= 30, xticks_rotation="vertical")
        names.append("confusion.png")
    return names


@contextlib.contextmanager
def picture(file: Path, title: str) -> Iterator:
    """Axes to draw on; what is drawn becomes the file. Text is text: no $ begins a formula."""
    from matplotlib import pyplot as plt
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # fonts that are not there
    chinese = ["Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", "WenQuanYi Zen Hei"]
    fonts = [*chinese, *plt.rcParams["font.sans-serif"]]
    with plt.rc_context({"font.sans-serif": fonts, "text.parse_math": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label in letters that no font here has
        figure, axes = plt.subplots(figsize=(5.5, 5))
        yield axes
        axes.set_title(title)
        figure.savefig(file, dpi=110, bbox_inches="tight")
        plt.close(figure)


def in_legend(label: str) -> str:
    """matplotlib leaves out names that begin with _."""
    return f" {label}" if label.startswith("_") else label
