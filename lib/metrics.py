"""
How good is it: metrics in numpy, a baseline, the report. How sure we are of it is in lib/intervals.py.

    scores = compute(CLASS_METRICS, y, probs)     name -> value, for true classes and their probabilities

A metric is a line in one of the tables, and equals what scikit-learn, scipy or the task's official script
computes; nan if it is not defined on these rows (ROC-AUC of a single class). It is a function of arrays with
an entry a row.
"""
import math
import re
import string
import unicodedata
from array import array
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from lib import pictures
from lib.run import write_json, write_text


def compute(table: dict[str, Callable], *arrays) -> dict[str, float]:
    return {name: float(metric(*arrays)) for name, metric in table.items()}


class ByRow:
    """A metric that is a mean over the rows. each: what it is of each row, (N,) or (N, ...)."""

    def __init__(self, each: Callable):
        self.each = each

    def __call__(self, *arrays):
        return self.each(*arrays).mean()


class ByClass:
    """A metric of how many rows are called each class and are it, are it, and are called it.

    of: a function of these three: (K,) each, or (K, R) of R sets of rows.
    """

    def __init__(self, of: Callable):
        self.of = of

    def __call__(self, y, probs):
        called, n = probs.argmax(1), probs.shape[1]
        if y.ndim == 1:
            return self.of(*(np.bincount(one, minlength=n) for one in (y[called == y], y, called)))
        y, called = y > 0.5, probs > 0.5
        return self.of((y & called).sum(0), y.sum(0), called.sum(0))


# -----------------------------------------------------------------------------
# Classes. y: (N,) class numbers, or (N, K) of 0 and 1 if a row has several labels; probs: (N, K).

def nats(p):
    """The log loss, if p are the probabilities of what is true."""
    return -np.log(np.clip(p, 1e-300, 1))


def f1(right, sizes):
    """sizes: how many there are, plus how many were called."""
    return 2 * right / np.maximum(sizes, 1)


def f1_macro(right, true, called):
    """Mean over the classes that occur, in truth or in prediction."""
    sizes = true + called
    return f1(right, sizes).sum(0) / (sizes > 0).sum(0)


def matthews(right, true, called):
    """Correlation of truth and prediction (Gorodkin 2004 for many classes); 0 if one of them is constant."""
    n, true = true.sum(0), true.astype(float)
    spread = (n * n - (true * true).sum(0)) * (n * n - (1.0 * called * called).sum(0))
    return (right.sum(0) * n - (true * called).sum(0)) / np.sqrt(np.where(spread > 0, spread, math.inf))


def one_vs_rest(y, probs) -> dict:
    """k -> (truth, score) of each class that occurs, against the rest; of two, of the second alone."""
    n = probs.shape[1]
    if y.ndim == 1 and n == 2:
        return {1: (y == 1, probs[:, 1])}
    truth = y > 0.5 if y.ndim == 2 else y[:, None] == np.arange(n)  # (N, K)
    return {k: (truth[:, k], probs[:, k]) for k in np.flatnonzero(truth.any(0))}


def curve(truth, score) -> dict:
    """What is right if all from a score on are called positive, from none to all, and the areas below."""
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # of each run of equal scores
    hits = np.cumsum(truth[order])[last]
    precision = hits / (last + 1)
    true = np.append(0, hits)
    false = np.append(0, last + 1 - hits)
    pairs = int(true[-1]) * int(false[-1])
    twice = (np.diff(false) * (true[1:] + true[:-1])).sum()  # of these, positive above negative; ties: once
    added = (np.diff(true) * precision).sum()  # at each threshold, by the recall that it adds
    return {"false_positive_rate": false / max(1, false[-1]),
            "true_positive_rate": true / max(1, true[-1]),  # which is the recall
            "precision": np.append(1.0, precision),
            "roc_auc": twice / 2 / pairs if pairs else math.nan,
            "average_precision": added / true[-1] if true[-1] else math.nan}


def over_classes(area: str, y, probs):
    """Mean over the classes of which it is defined."""
    areas = [curve(*one)[area] for one in one_vs_rest(y, probs).values()]
    defined = [value for value in areas if not math.isnan(value)]
    return np.mean(defined) if defined else math.nan


def tenths(confidence) -> np.ndarray:
    return np.minimum((np.nan_to_num(confidence) * 10).astype(int), 9)


def calibration_bins(confidence, right) -> list[tuple]:
    """(mean confidence, share right, rows) of each tenth of the confidences that has rows."""
    which, found = tenths(confidence), []
    for tenth in np.unique(which):
        mine = which == tenth
        means = float(confidence[mine].mean()), float(right[mine].mean())
        found.append((*means, int(mine.sum())))
    return found


def calibration_error(y, probs):
    """Expected calibration error (Naeini et al. 2015) of the predicted classes."""
    bins = calibration_bins(probs.max(1), probs.argmax(1) == y)
    error = sum(n * abs(confidence - right) for confidence, right, n in bins) / len(y)
    return round(error, 12)  # a sum of many shares is not the share to its last digits


AREAS = {area: partial(over_classes, area) for area in ("roc_auc", "average_precision")}
CLASS_METRICS = {
    "loss": ByRow(lambda y, probs: nats(probs[np.arange(len(y)), y])),
    "accuracy": ByRow(lambda y, probs: probs.argmax(1) == y),
    "f1_macro": ByClass(f1_macro),
    "matthews": ByClass(matthews),
    **AREAS,
    "calibration_error": calibration_error,
}
LABEL_METRICS = {  # several labels a row
    "loss": ByRow(lambda y, probs: nats(np.where(y > 0.5, probs, 1 - probs))),
    "accuracy": ByRow(lambda y, probs: ((y > 0.5) == (probs > 0.5)).all(1)),  # rows with all labels right
    "f1_macro": ByClass(lambda right, true, called: f1(right, true + called).mean(0)),
    "f1_micro": ByClass(lambda right, true, called: f1(right.sum(0), (true + called).sum(0))),
    **AREAS,
}


# -----------------------------------------------------------------------------
# Numbers. y, p: (N,)

def ranks(x: np.ndarray) -> np.ndarray:
    """From 1 on; equal values share the mean of their ranks."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def is_constant(x: np.ndarray) -> bool:
    """But for rounding: by the tolerance at which scipy.stats.pearsonr warns. It depends on the dtype."""
    mean = x.mean()
    return bool(np.linalg.norm(x - mean) <= np.finfo(x.dtype).eps ** 0.75 * abs(mean))


def pearson(a, b):
    """nan if one of them is constant."""
    if is_constant(a) or is_constant(b):
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    return a @ b / math.sqrt((a @ a) * (b @ b))


def spearman(a, b):
    """nan if one of them is constant: ranks of rounding errors say nothing."""
    return math.nan if is_constant(a) or is_constant(b) else pearson(ranks(a), ranks(b))


NUMBER_METRICS = {
    "loss": ByRow(lambda y, p: (y - p) ** 2),
    "mean_absolute_error": ByRow(lambda y, p: abs(y - p)),
    "pearson": pearson,
    "spearman": spearman,
}


# -----------------------------------------------------------------------------
# Tags, answers, texts

# Sums over sentences: entities that were called and are there, called, there; tags; nats of the true tags.
TagTotals = namedtuple("TagTotals", "found called there right words nats")
TAG_METRICS = {
    "loss": lambda n: n.nats / max(1, n.words),
    "accuracy": lambda n: n.right / max(1, n.words),
    "precision": lambda n: n.found / max(1, n.called),
    "recall": lambda n: n.found / max(1, n.there),
    "f1": lambda n: f1(n.found, n.called + n.there),
}


PREFIXES = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S", "W": "S"}
SPELLINGS = (rf"(?P<part>[{''.join(PREFIXES)}])[-_:](?P<kind>.+)",  # B-PER, b_per
             rf"(?P<kind>.+)[-_:](?P<part>[{''.join(PREFIXES)}])")  # PER-B


class TagScheme:
    """How a set of tags spells entities: B- and I-, with E- and S- (BIOES) or L- and U- (BILOU), BMES, IOE;
    behind the kind too (PER-B), and in lower case.

    B- and I- alone are read as conlleval reads them: an I- that continues nothing begins an entity. If the
    set has marks of ends, only whole entities count, as in seqeval's strict mode: a B- I- that no E- ends is
    none. Without prefixes each tag but O is an entity of one word (conlleval -r): F1 is then that of all tags
    but O, and the accuracy if there is no O.
    """

    def __init__(self, labels: Sequence[str]):
        tags = {*labels} - {"O", "o"}
        self.has_outside = tags != {*labels}
        self.part = {}  # tag -> its prefix, as one of B I E S, and its kind; no others belong to entities
        for spelling in SPELLINGS:
            for tag in tags:
                found = re.fullmatch(spelling, tag, re.DOTALL | re.IGNORECASE)
                if found:
                    self.part[tag] = PREFIXES[found["part"].upper()], found["kind"]
            if self.part:
                break
        if tags & {"B", "I"} and tags <= {*PREFIXES}:  # of a single kind
            self.part = {tag: (PREFIXES[tag], "") for tag in tags}
        self.plain = 2 * len(self.part) < len(tags)
        if self.plain:
            self.part = {tag: ("S", tag) for tag in tags}
        self.outside = sorted(tags - {*self.part})
        self.used = {part for part, _ in self.part.values()}
        self.strict = bool(self.used & {"E", "S"})
        self.begins = {"B", "S"} if self.strict and "B" in self.used else {"B", "I", "E", "S"}

    def __str__(self) -> str:
        if self.plain and not self.has_outside:
            return "each word: no tag is O, so this is the accuracy"
        if self.plain:
            return "each word whose tag is not O (the tags have no B- or I-)"
        how = "only whole ones count" if self.strict else "an I- that continues nothing begins one"
        outside = f"; as O: {', '.join(self.outside)}" if self.outside else ""
        return f"by {', '.join(f'{part}-' for part in sorted(self.used))}: {how}{outside}"

    def is_whole(self, parts: str) -> bool:
        if not self.strict:
            return True
        if len(parts) == 1 and self.used & {"S", "B"}:
            return parts == ("S" if "S" in self.used else "B")
        return "E" not in self.used or parts[-1] == "E"

    def entities(self, tags: Sequence[str]) -> set[tuple]:
        """(kind, first, end) of each."""
        found, parts, kind = set(), "", None
        for i, tag in enumerate([*tags, None]):
            part, name = self.part.get(tag, ("O", None))
            if parts and part in ("I", "E") and name == kind and parts[-1] not in ("E", "S"):
                parts += part
                continue
            if parts and self.is_whole(parts):
                found.add((kind, i - len(parts), i))
            parts, kind = (part, name) if part in self.begins else ("", None)
        return found


def tag_counts(gold, predicted, scheme: TagScheme) -> list[int]:
    """TagTotals of a sentence, but its nats."""
    there, called = scheme.entities(gold), scheme.entities(predicted)
    right = sum(map(str.__eq__, gold, predicted))
    return [len(there & called), len(called), len(there), right, len(gold)]


ANSWER_METRICS = {  # of what answer_match gives for each question, (N,) both
    "exact_match": ByRow(lambda exact, f1: exact),
    "f1": ByRow(lambda exact, f1: f1),
}

CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# what makes an answer Chinese: 々, 〇 and the numerals of merchants too
HAN = re.compile(r"[\u3005\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def squad_words(text: str) -> list[str]:
    """By SQuAD's script: lower case, no ASCII punctuation, no articles."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def squad_match(said: str, gold: str) -> tuple[float, float]:
    """Exact match, and the F1 of words that are in both, wherever they stand."""
    a, b = squad_words(said), squad_words(gold)
    common = (Counter(a) & Counter(b)).total()
    return float(a == b), f1(common, len(a) + len(b)) if a and b else float(a == b)


def cmrc_text(text: str) -> str:
    """By CMRC 2018's script: lower case, without the signs that it lists; and without other punctuation."""
    return "".join(letter for letter in text.lower().strip()
                   if letter not in "^~`+=～" and not unicodedata.category(letter).startswith("P"))


def cmrc_match(said: str, gold: str) -> tuple[float, float]:
    """Exact match, and F1 by the longest run of words in both, of which a Chinese character is one."""
    said, gold = cmrc_text(said), cmrc_text(gold)
    # other words end where nltk's word_tokenize ends them, as far as signs are left
    a, b = (re.findall(r"[\u4e00-\u9fa5$<>]|[^\s\u4e00-\u9fa5$<>]+", text) for text in (said, gold))
    longest, before, places = 0, {}, defaultdict(list)
    for j, word in enumerate(b):
        places[word].append(j)
    for word in a:  # before[j]: how long a run ends at this word and at b[j]
        before = {j: before.get(j - 1, 0) + 1 for j in places[word]}
        longest = max([longest, *before.values()])
    return float(said == gold), f1(longest, len(a) + len(b))


def answer_match(said: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1, each against the best of the true answers; if there is none, "" is right.

    A Chinese answer is compared as CMRC 2018's script does it, others as SQuAD 2.0's: true answers of which
    nothing is left ("the") do not count.
    """
    known = [gold for gold in answers if HAN.search(gold) or squad_words(gold)]
    matches = [(cmrc_match if HAN.search(gold) else squad_match)(said, gold) for gold in known or [""]]
    return max(exact for exact, _ in matches), max(f1 for _, f1 in matches)


TokenTotals = namedtuple("TokenTotals", "nats right tokens")  # right: were the likeliest
TOKEN_METRICS = {
    "loss": lambda n: n.nats / max(1, n.tokens),
    "perplexity": lambda n: math.exp(min(700, n.nats / max(1, n.tokens))),
    "accuracy": lambda n: n.right / max(1, n.tokens),
}


# -----------------------------------------------------------------------------
# The baseline that a model has to beat to be worth its time

def split_words(text: str) -> list[str]:
    """The words of a text, of which a Chinese character is one, and each two neighbours."""
    import regex  # comes with tiktoken; the marks of Hindi's letters are no \w to Python's own
    letter = r"\p{L}\p{M}\p{N}_"
    words = regex.findall(rf"[{CJK}]|(?:(?![{CJK}])[{letter}])+|[^{letter}\s]", text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:])]


def words_of(row) -> list[str]:
    """Of two texts: the words of each apart, which are in both, and which in one of them alone."""
    if row.pair is None:
        return split_words(row.text)
    a, b = split_words(row.text), split_words(row.pair)
    groups = {"1": a, "2": b, "=": sorted({*a} & {*b}), "!": sorted({*a} ^ {*b})}
    return [f"{mark} {word}" for mark, words in groups.items() for word in words]


class TooLarge(Exception):
    """For a baseline. It says of what there is too much."""


WORDS_TIMES_OUTPUTS, WORDS_OF_ROWS = 10_000_000, 50_000_000  # what the baseline may take: about 1 GB each


def counted_words(rows, number: dict, grow: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each row's words as numbers, in the order in which they come, and how often; where each row begins.

    grow: new words get the next numbers; else they are left out.
    """
    numbers, counts, starts = array("i"), array("i"), array("q")
    for row in rows:
        starts.append(len(numbers))
        for word, n in Counter(words_of(row)).items():
            place = number.setdefault(word, len(number)) if grow else number.get(word)
            if place is not None:
                numbers.append(place)
                counts.append(n)
        if len(numbers) > WORDS_OF_ROWS:
            raise TooLarge(f"more than {WORDS_OF_ROWS:,} words in all rows")
    return tuple(np.array(one, dtype=np.int64) for one in (numbers, counts, starts))


def tf_idf(numbers, counts, starts, idf) -> list[torch.Tensor]:
    """As F.embedding_bag takes them: the words' numbers, where each text begins, values of length 1.

    idf: of each number, nan for words that are left out; those that are not are numbered anew.
    """
    known = ~np.isnan(idf[numbers])
    begins = np.append(0, np.cumsum(known))[starts]
    numbers, counts = numbers[known], counts[known]
    values = (1 + np.log(counts)) * idf[numbers]
    numbers = (np.cumsum(~np.isnan(idf)) - 1)[numbers]
    row = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(numbers))))
    lengths = np.sqrt(np.bincount(row, weights=values ** 2, minlength=len(begins)))
    values = torch.from_numpy(values / lengths[row]).float()
    return [torch.from_numpy(numbers), torch.from_numpy(begins), values]


def bag_of_words(train, test, n_out: int, loss: Callable) -> np.ndarray:
    """The outputs of a linear model on TF-IDF of words for the rows of test, (N, n_out): before the softmax.

    loss: a sum, of the outputs for the rows of train; so it is logistic regression, or least squares. Raises
    TooLarge.
    """
    number = {}
    words = counted_words(train, number, grow=True)
    count = np.bincount(words[0], minlength=len(number))
    often = count > (1 if (count > 1).any() else 0)
    if often.sum() * n_out > WORDS_TIMES_OUTPUTS:
        raise TooLarge(f"{often.sum():,} words times {n_out:,} outputs, more than {WORDS_TIMES_OUTPUTS:,}")
    idf = np.where(often, np.log((1 + len(train)) / (1 + count)) + 1, math.nan)
    numbers, starts, values = features = tf_idf(*words, idf)
    weight, bias = torch.zeros(int(often.sum()), n_out), torch.zeros(n_out)
    # the same by word, for the gradient: torch's own, which adds up row by row, takes five times as long
    row = torch.repeat_interleave(torch.diff(starts, append=torch.tensor([len(numbers)])))
    order = torch.argsort(numbers, stable=True)
    of_word = row[order], torch.searchsorted(numbers[order], torch.arange(len(weight))), values[order]
    # scikit-learn remembers as many steps: each is two copies of the weights
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def objective():
        out = (sum_of(weight, *features) + bias).requires_grad_()
        with torch.enable_grad():
            total = loss(out) / len(out)
        total.backward()
        weight.grad = sum_of(out.grad, *of_word) + 0.4 / len(out) * weight
        bias.grad = out.grad.sum(0)
        return total.detach() + 0.2 / len(out) * weight.square().sum()  # scikit-learn's 1 / (2 C)

    optimizer.step(objective)
    return (sum_of(weight, *tf_idf(*counted_words(test, number, grow=False), idf)) + bias).numpy()


def sum_of(vectors, numbers, starts, values):
    return F.embedding_bag(numbers, vectors, starts, mode="sum", per_sample_weights=values)


# -----------------------------------------------------------------------------
# The report, for classes

CLASSES_DRAWN, CLASSES_CONFUSED = 20, 200


def report(folder: Path, y: np.ndarray, probs: np.ndarray, labels: list[str]) -> list[str]:
    """curves.json, with scikit-learn report.txt, with matplotlib the pictures. Returns their names.

    y: (N,) class numbers, or (N, K) of 0 and 1 if a row has several labels; probs: (N, K). Curves have at
    most a thousand points, and are of the twenty most frequent classes.
    """
    table, n = None, len(labels)
    if y.ndim == 2:
        called = probs > 0.5
        bins = calibration_bins(probs.ravel(), y.ravel() > 0.5)
    else:
        called = probs.argmax(1)
        bins = calibration_bins(probs.max(1), called == y)
        if n <= CLASSES_CONFUSED:  # how often class i was called j
            table = np.bincount(y * n + called, minlength=n * n).reshape(n, n).tolist()
    classes = one_vs_rest(y, probs)
    largest = sorted(classes, key=lambda k: -classes[k][0].sum())[:CLASSES_DRAWN]
    if len(largest) < len(classes):
        print(f"(curves of the {CLASSES_DRAWN} most frequent of {len(classes)} classes)", flush=True)
    curves = {}
    for k in sorted(largest):
        truth, score = classes[k]
        curves[labels[k]] = one = curve(truth, score)
        at = pictures.thinned(len(one["precision"]))
        for name, values in one.items():
            one[name] = values[at].tolist() if np.ndim(values) else float(values)
        one["share"] = float(truth.mean())
    found = {"labels": labels, "curves": curves, "calibration": bins, "confusion": table}
    write_json(folder / "curves.json", found)
    written = ["curves.json"]
    try:
        from sklearn.metrics import classification_report
        text = classification_report(y, called, digits=4, zero_division=0, labels=range(len(labels)),
                                     target_names=labels)
        write_text(folder / "report.txt", text)
        written += ["report.txt"]
    except ImportError:
        print("(report.txt needs scikit-learn: pip install scikit-learn)")
    if pictures.can_draw():
        written += pictures.draw_classes(folder, **found)
    return written
