"""
How good is it, and how sure are we: metrics in numpy, intervals, baselines, groups, the report.

    scores = class_scores(y, probs)               a dict of metrics, for true classes and probabilities
    with_intervals(class_scores, (y, probs))      the same, each with its 95% interval
    by_group(class_scores, (y, probs), groups)    for each group, and the largest gaps

Each metric is what scikit-learn, scipy or the task's official script computes. A set of scores is a function
of arrays that have a row an example: so intervals and groups, which take some of the rows, know no task. A
metric that is not defined on the rows (ROC-AUC where all are of one class) is nan.
"""
import json
import logging
import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from lib.run import write_text
from lib.tokenizer import Tokenizer, make_tokenizer

# -----------------------------------------------------------------------------
# Classes

def class_scores(y: np.ndarray, probs: np.ndarray) -> dict[str, float]:
    """y: (N,) class numbers, probs: (N, K). roc_auc and average_precision: of class 1 where there are two
    classes, else the mean over classes, each against the rest."""
    table = confusion(y, probs.argmax(1), probs.shape[1])
    columns = range(1, 2) if probs.shape[1] == 2 else range(probs.shape[1])
    roc_auc, precision = mean_areas([areas(y == k, probs[:, k]) for k in columns])
    return {"loss": -np.log(np.clip(probs[np.arange(len(y)), y], 1e-300, 1)).mean(),
            "accuracy": np.trace(table) / table.sum(), "f1_macro": f1_macro(table),
            "matthews": matthews(table), "roc_auc": roc_auc, "average_precision": precision,
            "calibration_error": calibration(probs.max(1), probs.argmax(1) == y)[0]}


def label_scores(y: np.ndarray, probs: np.ndarray) -> dict[str, float]:
    """Several labels a row: y (N, K) of 0 and 1, probs (N, K). accuracy: of rows with all labels right."""
    p, y = probs > 0.5, y > 0.5
    hit, sizes = (y & p).sum(0), y.sum(0) + p.sum(0)
    nats = np.log(np.clip(np.where(y, probs, 1 - probs), 1e-300, 1))
    roc_auc, precision = mean_areas([areas(y[:, k], probs[:, k]) for k in range(y.shape[1])])
    return {"loss": -nats.mean(), "accuracy": (y == p).all(1).mean(),
            "f1_macro": (2 * hit / np.maximum(sizes, 1)).mean(),
            "f1_micro": 2 * hit.sum() / max(1, sizes.sum()),
            "roc_auc": roc_auc, "average_precision": precision}


def confusion(y: np.ndarray, p: np.ndarray, n: int) -> np.ndarray:
    """How often class i was called j: (n, n)."""
    return np.bincount(y * n + p, minlength=n * n).reshape(n, n)


def f1_macro(table: np.ndarray) -> float:
    """Mean over the classes that occur, in truth or in prediction."""
    sizes = table.sum(0) + table.sum(1)
    return float((2 * np.diag(table)[sizes > 0] / sizes[sizes > 0]).mean())


def matthews(table: np.ndarray) -> float:
    """Correlation of truth and prediction (Gorodkin 2004 for many classes); 0 where one is constant."""
    true, called, n = table.sum(1).astype(float), table.sum(0).astype(float), float(table.sum())
    spread = (n * n - true @ true) * (n * n - called @ called)
    return float((np.trace(table) * n - true @ called) / math.sqrt(spread)) if spread else 0.0


def curves(y: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True and false positives when all from a score on are called positive: from none down to all."""
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(y) - 1)  # of each run of equal scores
    true = np.cumsum(y[order])[last]
    return np.append(0, true), np.append(0, last + 1 - true)


def areas(y: np.ndarray, score: np.ndarray) -> tuple[float, float]:
    """ROC-AUC, the probability that a positive scores above a negative, ties counting half; and average
    precision, precision at each threshold weighted by the recall that it adds."""
    true, false = curves(y, score)
    positives, negatives = int(true[-1]), int(false[-1])
    if not positives:
        return math.nan, math.nan
    precision = float((np.diff(true) * (true / np.maximum(1, true + false))[1:]).sum() / positives)
    below = float((np.diff(false) * (true[1:] + true[:-1])).sum() / 2)
    return below / (positives * negatives) if negatives else math.nan, precision


def mean_areas(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Over the classes where they are defined."""
    found = []
    for values in zip(*pairs):
        defined = [value for value in values if not math.isnan(value)]
        found.append(float(np.mean(defined)) if defined else math.nan)
    return found[0], found[1]


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> tuple[float, list]:
    """Expected calibration error (Naeini et al. 2015), and (confidence, accuracy, rows) of each bin."""
    place = np.minimum((np.nan_to_num(confidence) * bins).astype(int), bins - 1)
    rows = [(float(confidence[place == b].mean()), float(right[place == b].mean()), int((place == b).sum()))
            for b in np.unique(place)]
    return sum(n * abs(c - r) for c, r, n in rows) / len(right), rows


# -----------------------------------------------------------------------------
# Numbers, tags, answers, texts

def number_scores(y: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """y, p: (N,). loss is the mean squared error."""
    return {"loss": ((y - p) ** 2).mean(), "mean_absolute_error": abs(y - p).mean(), "pearson": pearson(y, p),
            "spearman": pearson(ranks(y), ranks(p))}


def ranks(x: np.ndarray) -> np.ndarray:
    """From 1 on; equal values share the mean of their ranks."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """nan where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    spread = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread > 0 else math.nan


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
    """Of a sentence: entities found, called, there; tags right, all."""
    there, called = entities(gold), entities(predicted)
    return [len(there & called), len(called), len(there), sum(map(str.__eq__, gold, predicted)), len(gold)]


def tag_scores(counts: np.ndarray, loss: np.ndarray) -> dict[str, float]:
    """counts: (N, 5), tag_counts of each sentence; loss: (N,), nats, summed over its words."""
    hit, called, there, right, words = counts.sum(0)
    return {"loss": loss.sum() / max(1, words), "accuracy": right / max(1, words),
            "precision": hit / max(1, called), "recall": hit / max(1, there),
            "f1": 2 * hit / max(1, called + there)}


CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
SIGNS = re.compile(f"[{re.escape(string.punctuation)}\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
                   "\uff5b-\uff65]")


def answer_words(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no punctuation, no articles; a Chinese character is a word."""
    text = re.sub(r"\b(a|an|the)\b", " ", SIGNS.sub("", text.lower()))
    return re.sub(f"([{CJK}])", r" \1 ", text).split()


def answer_match(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 against the best of the true answers (SQuAD 2.0); none: "" is right."""
    best, p = [0.0, 0.0], answer_words(prediction)
    for gold in map(answer_words, answers or [""]):
        common = sum((Counter(p) & Counter(gold)).values())
        f1 = 2 * common / (len(p) + len(gold)) if p and gold else float(p == gold)
        best = [max(best[0], float(p == gold)), max(best[1], f1)]
    return best[0], best[1]


def answer_scores(matches: np.ndarray) -> dict[str, float]:
    """matches: (N, 2), answer_match of each question."""
    return {"exact_match": matches[:, 0].mean(), "f1": matches[:, 1].mean()}


def token_scores(sums: np.ndarray) -> dict[str, float]:
    """sums: (N, 3): nats, tokens guessed right, tokens that count, of each text."""
    nats, right, n = sums.sum(0)
    return {"loss": nats / max(1, n), "perplexity": math.exp(min(700, nats / max(1, n))),
            "accuracy": right / max(1, n)}


# -----------------------------------------------------------------------------
# Intervals and groups

def bootstrap(scores: Callable, arrays: tuple, samples: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
    """The metrics of `samples` sets of rows, drawn with replacement (Efron 1979): name -> (samples,)."""
    rng, n = np.random.default_rng(seed), len(arrays[0])
    drawn = []
    for _ in range(samples):
        rows = rng.integers(n, size=n)
        drawn.append(scores(*(a[rows] for a in arrays)))
    return {name: np.array([one[name] for one in drawn], dtype=float) for name in drawn[0]}


def interval(values: np.ndarray) -> list[float]:
    """The middle 95% of them."""
    values = values[~np.isnan(values)]
    return [float(v) for v in np.quantile(values, (0.025, 0.975))] if len(values) else [math.nan, math.nan]


def with_intervals(scores: Callable, arrays: tuple, samples: int = 1000, seed: int = 0) -> dict:
    """metric -> value, and metric_ci95 -> [low, high]."""
    drawn, found = bootstrap(scores, arrays, samples, seed), {}
    for name, value in scores(*arrays).items():
        found[name], found[f"{name}_ci95"] = float(value), interval(drawn[name])
    return found


def by_group(scores: Callable, arrays: tuple, groups: Sequence[str], samples: int = 1000) -> dict:
    """Every metric for each group, and for each metric the largest gap between two groups.

    A gap's interval is of the difference between those two groups. Of many small groups two are always far
    apart by chance: it is to be read with the number of rows.
    """
    groups, found, drawn = np.array(groups), {}, {}
    for seed, name in enumerate(sorted(set(groups.tolist()))):
        mine = tuple(a[groups == name] for a in arrays)
        drawn[name] = bootstrap(scores, mine, samples, seed)
        found[name] = {"rows": len(mine[0]), **with_intervals(scores, mine, samples, seed)}
    gaps = {}
    for metric in next(iter(drawn.values())):
        known = {name: found[name][metric] for name in found if not math.isnan(found[name][metric])}
        if len(known) > 1:
            low, high = min(known, key=known.get), max(known, key=known.get)
            gaps[metric] = {"gap": known[high] - known[low], "lowest": low, "highest": high,
                            "gap_ci95": interval(drawn[high][metric] - drawn[low][metric])}
    return {"groups": found, "gaps": gaps}


# -----------------------------------------------------------------------------
# Baselines: what a model has to beat to be worth its time

def words_of(text: str, pair: str | None) -> list[str]:
    """The words of a text (a Chinese character is one) and their neighbours in twos; of a second text apart,
    and which words are in both."""
    def split(text):
        words = re.findall(rf"[{CJK}]|[^\W{CJK}]+|[^\w\s]", text.lower())
        return words + [f"{a} {b}" for a, b in zip(words, words[1:])]
    if pair is None:
        return split(text)
    a, b = split(text), split(pair)
    return ([f"1 {word}" for word in a] + [f"2 {word}" for word in b]
            + [f"= {word}" for word in set(a) & set(b)] + [f"! {word}" for word in set(a) ^ set(b)])


def weighted_sums(features, weight, bias):  # (n_features, K), (K,) -> (N, K)
    """features: as F.embedding_bag takes them: their numbers, where each text begins, their values."""
    numbers, starts, values = features
    return F.embedding_bag(numbers, weight, starts, mode="sum", per_sample_weights=values) + bias


@torch.enable_grad()
def fit_linear(features, y, kind: str, n_features: int, n_out: int, penalty: float):
    """The best linear model of these features: weight (n_features, n_out) and bias (n_out,).

    kind: class (y: (N,) numbers; logistic regression), labels (y: (N, K) of 0 and 1) or number (y: (N,);
    least squares). penalty: of the squared weights; 1 / (2 C) of scikit-learn's C.
    """
    weight, bias = torch.zeros(n_features, n_out, requires_grad=True), torch.zeros(n_out, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        out = weighted_sums(features, weight, bias)
        loss = (F.cross_entropy(out, y, reduction="sum") if kind == "class" else
                F.binary_cross_entropy_with_logits(out, y, reduction="sum") if kind == "labels" else
                F.mse_loss(out[:, 0], y, reduction="sum"))
        loss = (loss + penalty * weight.square().sum()) / len(y)
        loss.backward()
        return loss
    optimizer.step(objective)
    return weight.detach(), bias.detach()


class BagOfWords:
    """Logistic regression (least squares for numbers) on TF-IDF of words and word pairs.

    fit on texts [(text, pair or None), ...] and targets: class numbers (N,), 0 and 1 (N, K), or numbers (N,).
    """
    words_of = staticmethod(words_of)  # what is counted

    def __init__(self, kind: str, n_out: int):
        self.kind, self.n_out = kind, n_out  # kind: class, labels or number

    def features(self, texts):
        """For weighted_sums: the words' numbers, where each text begins, values of length 1 a text."""
        numbers, starts, weights = [], [], []
        for text, pair in texts:
            starts.append(len(numbers))
            counts = [(self.vocabulary[word], n) for word, n in Counter(self.words_of(text, pair)).items()
                      if word in self.vocabulary]
            row = [(1 + math.log(n)) * self.idf[i] for i, n in counts]
            length = math.sqrt(sum(w * w for w in row)) or 1.0
            numbers += [i for i, _ in counts]
            weights += [w / length for w in row]
        return (torch.tensor(numbers, dtype=torch.long), torch.tensor(starts, dtype=torch.long),
                torch.tensor(weights))

    def fit(self, texts, targets, penalty: float = 0.2):
        """penalty: see fit_linear."""
        count = Counter(word for text, pair in texts for word in set(self.words_of(text, pair)))
        known = sorted(word for word, n in count.items() if n > 1) or sorted(count) or [0]
        self.vocabulary = {word: i for i, word in enumerate(known)}
        self.idf = [math.log((1 + len(texts)) / (1 + count[word])) + 1 for word in known]
        features = self.features(texts)
        y = torch.as_tensor(targets, dtype=torch.long if self.kind == "class" else torch.float32)
        self.weight, self.bias = fit_linear(features, y, self.kind, len(known), self.n_out, penalty)
        return self

    @torch.no_grad()
    def outputs(self, texts) -> torch.Tensor:
        """(N, K) as a model's head gives them: before the softmax or sigmoid."""
        return weighted_sums(self.features(texts), self.weight, self.bias)

    def predict(self, texts) -> np.ndarray:
        """Probabilities (N, K), or numbers (N,)."""
        out = self.outputs(texts)
        return (out.softmax(1) if self.kind == "class" else out.sigmoid() if self.kind == "labels" else
                out[:, 0]).double().numpy()


class BagOfRuns(BagOfWords):
    """The same of runs of up to `longest` tokens, at most 5, of a small vocabulary: pieces of words, words,
    phrases. Hard to beat where data are few (Wang and Manning 2012)."""

    def __init__(self, kind: str, n_out: int, longest: int):
        super().__init__(kind, n_out)
        self.longest = longest

    def fit(self, texts, targets, penalty: float = 0.05):
        every = [self.start_of(text) for both in texts for text in both if text]
        self.tokenizer = make_tokenizer("bpe", every, 1024)
        return super().fit(texts, targets, penalty)

    @staticmethod
    def start_of(text: str) -> str:
        return " " + text[:20000]  # a first word is like others; megabytes cost no more than pages

    def words_of(self, text: str, pair: str | None) -> list[int]:
        """A number for each run, negative in the second text: its tokens' ids are the digits."""
        end = self.tokenizer.eot + 1
        ids = [end, *(i + 1 for i in self.tokenizer.encode(self.start_of(text))), end]
        runs, found = ids, list(ids)
        for n in range(1, self.longest):
            runs = [run * 2048 + i for run, i in zip(runs, ids[n:])]  # below 2**63 for up to 5 tokens
            found += runs
        return found + ([-run for run in self.words_of(pair, None)] if pair else [])

    def to_dict(self) -> dict:
        return {"kind": self.kind, "n_out": self.n_out, "longest": self.longest,
                "tokenizer": self.tokenizer.to_dict(), "runs": torch.tensor(list(self.vocabulary)),
                "idf": torch.tensor(self.idf, dtype=torch.float64), "weight": self.weight, "bias": self.bias}

    @classmethod
    def from_dict(cls, stored: dict) -> "BagOfRuns":
        bag = cls(stored["kind"], stored["n_out"], stored["longest"])
        bag.tokenizer = Tokenizer.from_dict(stored["tokenizer"])
        bag.vocabulary = {run: i for i, run in enumerate(stored["runs"].tolist())}
        bag.idf, bag.weight, bag.bias = stored["idf"].tolist(), stored["weight"], stored["bias"]
        return bag


def sentences(text: str) -> list[tuple[int, int]]:
    """Where sentences begin and end, roughly."""
    found = re.finditer(r"[^.!?。！？]+[.!?。！？]?", text)
    return [one.span() for one in found if one.group().strip()]


# -----------------------------------------------------------------------------
# The report, for classes

def report(folder: Path, y: np.ndarray, probs: np.ndarray, labels: list[str]) -> list[str]:
    """curves.json, and with scikit-learn and matplotlib report.txt and the pictures. Returns their names.

    y: (N,) class numbers, or (N, K) of 0 and 1 where a row has several labels; probs: (N, K).
    """
    several = y.ndim == 2
    truth = y > 0.5 if several else y[:, None] == np.arange(len(labels))  # (N, K)
    shown = [1] if len(labels) == 2 and not several else [k for k in range(len(labels)) if truth[:, k].any()]
    numbers = {}
    for k in shown:
        (true, false), (roc_auc, precision) = (f(truth[:, k], probs[:, k]) for f in (curves, areas))
        numbers[labels[k]] = {
            "false_positive_rate": (false / max(1, false[-1])).tolist(),
            "true_positive_rate": (true / max(1, true[-1])).tolist(),  # which is the recall
            "precision": [1.0, *(true[1:] / (true + false)[1:]).tolist()],
            "roc_auc": roc_auc, "average_precision": precision}
    confidence = probs.ravel() if several else probs.max(1)
    bins = calibration(confidence, truth.ravel() if several else y == probs.argmax(1))[1]
    table = None if several else confusion(y, probs.argmax(1), len(labels))
    write_json(folder / "curves.json", {"labels": labels, "curves": numbers, "calibration": bins,
                                        "confusion": None if several else table.tolist()})
    try:
        import matplotlib
        from sklearn.metrics import classification_report
    except ImportError as error:
        print(f"(report.txt and pictures need {error.name}: pip install scikit-learn matplotlib)")
        return ["curves.json"]
    text = classification_report(y, probs > 0.5 if several else probs.argmax(1), digits=4, zero_division=0,
                                 labels=range(len(labels)), target_names=labels)
    (folder / "report.txt").write_text(text, encoding="utf-8")

    matplotlib.use("Agg")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # fonts that are not there
    from matplotlib import pyplot as plt

    def lines(axes, x, y, measure):
        for name, curve in numbers.items():
            axes.plot(curve[x], curve[y], label=f"{name} ({curve[measure]:.3f})")
        axes.legend(fontsize=8)

    def diagonal(axes):
        axes.plot([0, 1], [0, 1], color="gray", lw=1)
        axes.plot([c for c, _, _ in bins], [r for _, r, _ in bins], marker="o")

    def squares(axes):
        axes.imshow(table / np.maximum(1, table.sum(1, keepdims=True)), cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        axes.set_yticks(range(len(labels)), labels)
        for i, j in np.ndindex(table.shape) if len(labels) <= 30 else ():
            axes.text(j, i, table[i, j], ha="center", va="center", fontsize=8,
                      color="white" if table[i, j] > table[i].sum() / 2 else "black")

    pictures = {  # name -> what draws it, title, x, y
        "roc": (partial(lines, x="false_positive_rate", y="true_positive_rate", measure="roc_auc"),
                "ROC, and the area below", "false positive rate", "true positive rate"),
        "precision_recall": (
            partial(lines, x="true_positive_rate", y="precision", measure="average_precision"),
            "Precision and recall, and average precision", "recall", "precision"),
        "calibration": (diagonal, "Calibration", "confidence", "share right")}
    if table is not None:
        pictures["confusion"] = squares, "Confusion", "predicted", "true"
    chinese = ["Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", "WenQuanYi Zen Hei"]
    for name, (draw, title, x, y_name) in pictures.items():
        with plt.rc_context({"font.sans-serif": [*chinese, *plt.rcParams["font.sans-serif"]]}), \
                warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a label in letters that no font here has
            figure, axes = plt.subplots(figsize=(5.5, 5))
            axes.grid(name != "confusion", alpha=0.3)
            draw(axes)
            axes.set(title=title, xlabel=x, ylabel=y_name)
            figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
            plt.close(figure)
    return ["curves.json", "report.txt", *(f"{name}.png" for name in pictures)]


def write_json(path: Path, content) -> None:
    """Strict JSON: what is not a number is null."""
    def plain(x):
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x
    write_text(path, json.dumps(plain(content), indent=1, ensure_ascii=False))
