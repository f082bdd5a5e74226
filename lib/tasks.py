"""
What there is to learn from labelled rows: rows to examples, and what a model's outputs mean.

    columns, rows = Classify.open("reviews.csv", {"text": "", "label": "", "header": None})
    task = Classify({**Classify.learn(rows, settings), ...}, tokenizer)
    examples = task.examples(rows)

A task is a class here and a line in TASKS. It says for itself how its files are read, what is minimised, what
is told of a prediction; it knows neither the model nor the loop, which are in finetune.py.
"""
import itertools
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from config import SettingError, UserError
from lib import intervals, metrics
from lib.rows import (ANSWER_NAMES, CLASS_NAMES, CONLL_U, LM_NAMES, NUMBER_NAMES, TAG_NAMES, Names, Row,
                      each_with_answers, is_fasttext, kind_of_words, label_key, of_names, open_conll,
                      open_rows, read_lines, read_paragraphs, split_rows, tags_of_spans, tell, text_key,
                      texts_in_cells, to_amount, to_number, word_pattern)
from lib.text import encoding_of, kind_of


TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".conll", ".conllu", ".bio", ".iob", ".ft")


class Example(NamedTuple):
    """Arrays of int32 and smaller: there may be a million of them."""
    row: int  # which row it is, or is a window of
    parts: list  # (ids, segments) of each sequence; if there are several, each is read for itself
    target: Any  # a number or an array
    places: np.ndarray | None = None  # the tokens that count: (n,) positions
    spans: Any = None  # what these stand for: of tags, which word; of answers, (begin, end) in the context


def sequence(ids: list[int], segments: list[int]) -> tuple[np.ndarray, np.ndarray | None]:
    """What a model reads at once, as an Example keeps it: (T,) both; segments None if all are 0."""
    return np.array(ids, np.int32), np.array(segments, np.uint8) if any(segments) else None


class Task:
    """What the tasks share. One of its own needs these too:

    learn(rows, settings) -> dict       what the head keeps of the training rows: its labels, and more
    inputs(rows) -> [Example]           one for each row, or one for each window of a row; see examples
    answers(rows, examples, outputs)    an answer for each row, in a form of the task's own, from arrays
    arrays(rows, answers)               truths and answers as the metrics take them: arrays, an entry a row

    head: the plain values that a checkpoint keeps of the task.
    """
    metrics = {}  # name -> function of the arrays
    totals = None  # or of their sums over all rows: a named tuple of them
    metric = "accuracy"  # of these, the one that tells the best epoch
    unit = ("nats a target", 1.0)  # of the training loss, and the factor from an evaluation's loss to it
    shares = frozenset()  # of these, those that say of each row whether it is right
    lower_is_better = False  # by that metric
    of_texts = False  # the outputs are of whole sequences, each pooled to a vector
    by_token = False  # or of single tokens, those at `places`; if neither, of every token
    writes = False  # they are the body's own for the next token: it is causal, and keeps its head
    classes = False  # the labels are names of classes
    knows = set()  # settings that this task uses and others do not
    names = CLASS_NAMES  # that columns often have

    @classmethod
    def open(cls, path: str, columns: dict, labelled: bool = True, encoding: str = "",
             bad: Callable | None = None) -> tuple[dict, Iterable[Row]]:
        """What each column is, and the rows: see open_rows."""
        return open_rows(path, columns, cls.names, labelled, encoding, bad)

    @classmethod
    def read(cls, path: str, columns: dict, labelled: bool = True) -> list[Row]:
        return list(cls.open(path, columns, labelled)[1])

    @classmethod
    def with_labels(cls, rows: list[Row], s) -> list[Row]:
        """Those to learn from, or to be tested on: without the ones whose label is missing."""
        return [row for row in rows if row.label not in (None, "")]

    @classmethod
    def texts(cls, row: Row) -> list[str]:
        """What a new tokenizer is made from."""
        return [one for one in (row.text, row.pair, cls.writes and row.label) if one]

    @classmethod
    def split(cls, rows: list[Row], k: int, seed: int) -> np.ndarray:
        """Which of k parts each row belongs to, (N,): equal texts and units stay together, and the classes of
        texts are spread evenly."""
        labels = [row.label for row in rows] if cls.classes and cls.of_texts else None
        return split_rows([row.unit or text_key(row) for row in rows], labels, k, seed)

    def __init__(self, head: dict, tokenizer):
        self.head, self.tokenizer, self.labels = head, tokenizer, head["labels"]
        self.number = {label: k for k, label in enumerate(self.labels)}
        self.spelling = {label_key(label): label for label in self.labels}
        self.n_out = len(self.labels)  # of a sequence, or of a token
        self.paired = None if "pair" in self.names.optional else head.get("paired")  # two texts; None: or one
        self.notes = Counter()  # what became of texts -> of how many
        self.meaning = {}  # of metrics whose names do not say it all: name -> what it is of

    def row(self, where: str, text: str, pair: str | None = None) -> Row:
        """A text that stands in no file, or two: the second, if it is not given, is behind the first line."""
        if pair is None and self.paired:
            text, _, rest = text.partition("\n")
            pair = rest or None
            if not pair:
                raise UserError(f"{where}: two texts are wanted, as in the training data: the second on a "
                                "line below the first, or in a file of rows")
        return self.ready(Row(where, text, pair))

    def tell(self, say: Callable) -> None:
        """Say what became of the texts since the last time: of how many, by what was noted about them."""
        for note, count in (+self.notes).items():
            say(f"{count:,} {'text' if count == 1 else 'texts'} {note}")
        self.notes.clear()
        self.tokenizer.tell(say)

    def examples(self, rows: list[Row]) -> list[Example]:
        """The one way from texts to a model's inputs, in training and in use. What it cuts or replaces is
        noted, see tell. Raises UserError, naming the row."""
        for row in rows:
            if self.paired not in (None, row.pair is not None):
                wanted = "two texts are" if self.paired else "one text is"
                raise UserError(f"{row.where}: {wanted} wanted, as in the training data")
        found = self.inputs(rows)
        self.notes["empty"] += sum(not row.text.strip() for row in rows)
        return found

    def settle(self, examples: list[Example], s) -> str:
        """What the head keeps that only the training examples tell: said in a line, if there is anything."""
        return ""

    def target(self, row: Row):
        """What a label asks of the outputs, if windows do not change it. Raises UserError if unknown."""
        return 0

    def label_number(self, row: Row, label: str) -> int:
        if label in self.number:
            return self.number[label]
        raise UserError(f"{row.where}: label {label!r} does not occur in the training data, which has "
                        f"{', '.join(self.labels[:10])}: give more rows of it, or leave it out")

    def knows_label(self, row: Row) -> bool:
        """Has it a label that was learned? Then its answer can be scored."""
        try:
            self.target(row)
        except UserError:
            return False
        return row.label is not None

    def holds_rows(self, path: str) -> bool:
        """Has a file in use rows, as the training file had them, or a .txt in its lines? Else it is one text.
        Of a file with another name, the first line tells."""
        kind = kind_of(path)
        if self.writes or kind in (*TABLES, ".txt"):
            return kind in TABLES or not self.writes
        first = next(read_lines(path, False, encoding_of(path, Counter()))).text
        columns, cells = self.head["columns"], re.split(r"[,;\t|]", first.replace('"', ""))
        named = {columns.get(role) for role in ("text", "label")} - {None}
        return bool(columns.get("header")) and named <= set(cells) or is_fasttext(path, first)

    def to_answer(self, path: str, columns: dict, encoding: str = "",
                  bad: Callable | None = None) -> tuple[dict, Iterable[Row]]:
        """Rows of a file in use, with the columns of training; of a .txt, a text a line. See open_rows."""
        if kind_of(path) == ".txt":
            encoding = encoding or encoding_of(path)  # said once
        if kind_of(path) == ".txt" and self.is_plain(path, columns, encoding):
            asked = {role: columns[role] for role in columns.get("asked", ())}
            columns = of_names(path, ["each line"], asked, Names({"text": ("each_line",)}), ())
            rows = read_lines(path, self.paired, encoding)
        else:
            columns, rows = self.open(path, columns, False, encoding, bad)
        return columns, map(self.ready, rows)

    def is_plain(self, path: str, columns: dict, encoding: str) -> bool:
        """Has this .txt a text a line, and not the columns or tags of the training file?"""
        first = next(read_lines(path, False, encoding)).text
        tabs = first.count("\t")
        return (tabs <= 1 if self.paired is None else tabs == self.paired) and "__label__" not in first

    def ready(self, row: Row) -> Row:
        """As training had it: its label spelled so."""
        if self.classes:
            respell([row], self.spelling)
        return row

    def teaches(self, example: Example, row: Row) -> bool:
        """Is there anything to learn from it?"""
        return not self.by_token or len(example.places) > 0

    def loss(self, out, target, weight, smoothing) -> torch.Tensor:
        """The sum over all targets. Divided by `count`, both added up over batches, it is their mean."""
        return F.cross_entropy(out, target, weight, label_smoothing=smoothing, reduction="sum")

    def count(self, target, weight) -> torch.Tensor:
        """All numbers of the targets, unless a task says otherwise."""
        return torch.full((), float(target.numel()), device=target.device)

    def summary(self, out, target) -> torch.Tensor:
        """What `answers` needs of outputs that are too many to keep."""
        return out

    def scores(self, *arrays) -> dict[str, float]:
        if self.totals:
            arrays = [self.totals(*np.hstack([one.sum(0) for one in arrays]))]
        return metrics.compute(self.metrics, *arrays)

    def drawn(self, *arrays) -> Callable:
        """A function of weights, how often each row is in each of R draws, (R, N): their scores, (R,)."""
        if self.totals:
            return partial(intervals.drawn_by_sums, self.scores, arrays)
        return intervals.Drawn(self.metrics, *arrays)

    def given(self, row: Row) -> dict:
        """A row, as predictions.csv has it."""
        pair = {"text_pair": row.pair} if self.of_texts and row.pair is not None else {}
        return {"text": row.text, **pair, "label": row.label}

    def said(self, answer) -> dict:
        """A prediction, as predictions.csv has it and Tuned.predict returns it."""
        return {"prediction": answer}

    def table(self, rows: list[Row], answers: list) -> tuple[list[str], list[list[str]]]:
        """The header and the lines of predictions.csv."""
        lines = [{**self.given(row), **self.said(answer)} for row, answer in zip(rows, answers)]
        return list(lines[0]), [[as_cell(value) for value in line.values()] for line in lines]

    def shown(self, row: Row, answer, hidden: Collection[str] = ()) -> str:
        """For the terminal, without the columns `hidden`."""
        header, (cells,) = self.table([row], [answer])
        found = {name: cell for name, cell in zip(header, cells) if cell and name not in hidden}
        width = max(15, *map(len, found))
        return "\n".join(f"{name:{width}} {cell}" for name, cell in found.items())

    def explained(self, row: Row, said, example: Example, out, target: str) -> tuple[str | None, list[int]]:
        """What is said, None if there is no answer, and the sum of which outputs says it.

        said: the answer for the row; out: all outputs for the example; target: a class to explain in place
        of the likeliest.
        """
        raise UserError("--out_dir: a model of this task has no one output to explain")

    def baselines(self, train: list[Row], test: list[Row]) -> dict[str, list]:
        """name -> answers for the test rows."""
        return {}

    def report(self, folder: Path, *arrays) -> list[str]:
        """Writes what is more than metrics. Returns the names of the files."""
        return []

    def windows(self, ids: list[int], *question: list[int]) -> Iterator[tuple[slice, int, tuple]]:
        """Which of the ids, the place of the first, and the `sequence`, of each window.

        Half of each is in the next one too.
        """
        wrap = self.tokenizer.wrap
        template = wrap(*question, [-1])[0]
        first, room = template.index(-1), self.head["max_length"] - len(template) + 1
        starts = [0]
        if len(ids) > room:
            self.note_long("read in windows")
            starts = [*range(0, len(ids) - room, max(1, room // 2)), len(ids) - room]
        for i in starts:
            part = slice(i, i + room)
            yield part, first, sequence(*wrap(*question, ids[part]))

    def note_long(self, fate: str) -> None:
        self.notes[f"longer than {self.head['max_length']} tokens: {fate}"] += 1


class TextTask(Task):
    """Of a text, or of two that are read as one, or each for itself."""
    of_texts = True
    knows = {"pair_column", "pool", "pair"}

    def inputs(self, rows):
        apart, found = self.head["apart"], []
        a = self.encoded([row.text for row in rows])
        b = self.encoded([row.pair or "" for row in rows])
        for i, (one, other) in enumerate(zip(a, b)):
            other = None if rows[i].pair is None else other
            parts = [self.wrapped(one), self.wrapped(other)] if apart else [self.wrapped(one, other)]
            found.append(Example(i, parts, self.target(rows[i])))
        return found

    def encoded(self, texts: list[str]) -> list[list[int]]:
        if self.head.get("lower"):
            texts = [one.lower() for one in texts]
        space = " " if self.head.get("space") else ""
        texts = [space + self.beginning(one) if one else "" for one in texts]
        return [ids.tolist() for ids in self.tokenizer.encode_batch(texts)]

    def beginning(self, text: str) -> str:
        """All that is read of a text: megabytes cost no more. Thousands of spaces may be no token at all."""
        L = self.head["max_length"]
        most = 100 * L  # characters
        while most < len(text) and len(self.tokenizer.encode_batch([text[:most]], Counter())[0]) <= L:
            most *= 4
        return text[:most]

    def wrapped(self, a: list[int], b: list[int] | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """A text or two as a `sequence` of at most max_length; the longer one is cut first."""
        wrap, n = self.tokenizer.wrap, len(b or ())
        specials = len(wrap(a, b)[0]) - len(a) - n
        room = self.head["max_length"] - specials
        if len(a) + n > room:
            self.note_long("cut there")
        a = a[:max(room // 2, room - n)]
        return sequence(*wrap(a, b and b[:room - len(a)]))

    def explained(self, row, said, example, out, target):
        if self.head["apart"]:
            raise UserError("--out_dir: a model that reads two texts apart is not explained")
        k = self.number.get(self.spelling.get(label_key(target))) if target else int(out.argmax())
        if k is None or target and not self.classes:
            raise SettingError(f"--target={target}: must be a class, one of {', '.join(self.labels)}")
        return self.labels[k], [k]

    def targets(self, rows: list[Row]) -> np.ndarray:
        return np.array([self.target(row) for row in rows])

    def bag_of_words(self, train, test) -> dict[str, list]:
        """The answers of a linear model, trained with the task's own loss; none if it would be too large."""
        y = torch.from_numpy(self.targets(train))
        try:
            out = metrics.bag_of_words(train, test, self.n_out, lambda out: self.loss(out, y, None, 0.0))
        except metrics.TooLarge as error:
            print(f"(baseline bag_of_words is left out: {error})", flush=True)
            return {}
        return {"bag_of_words": self.answers(test, [], out)}


class Vectors(TextTask):
    """The vector of a text itself: what a sentence encoder is for. It is no task to be trained."""

    def answers(self, rows, examples, outputs):
        return outputs


class Classify(TextTask):
    """A class for each text; with multi_label any number of them, each for itself."""
    metrics = metrics.CLASS_METRICS
    shares = {"accuracy"}
    classes = True
    SHOWN = 20  # labels on the terminal, the likeliest
    knows = TextTask.knows | {"multi_label", "class_weight", "label_smoothing", "teacher"}

    @classmethod
    def with_labels(cls, rows, s):
        if not s.multi_label:
            return super().with_labels(list(map(without_list, rows)), s)
        found = [row for row in rows if row.label is not None]  # an empty one says that no label fits
        for row in found:
            row.label = labels_of(row, True)
        return found

    @staticmethod
    def learn(rows, s):
        labels = {label for row in rows for label in labels_of(row, s.multi_label)}
        if s.multi_label:
            check_several(rows, labels)
        if len(labels) < (1 if s.multi_label else 2):
            raise nothing_to_tell_apart(rows, f"the label {labels.pop()!r}" if labels else "no label")
        return {"labels": sorted(sorted(labels), key=to_number), "several": s.multi_label}  # numbers first

    def ready(self, row):
        return super().ready(row if self.several else without_list(row))

    def __init__(self, head, tokenizer):
        super().__init__(head, tokenizer)
        self.several = head.get("several", False)
        self.prob_names = [f"prob_{label}" for label in self.labels]
        if self.several:
            self.knows = self.knows - {"teacher"}  # its probabilities are one distribution
            self.metrics, self.metric = metrics.LABEL_METRICS, "f1_macro"
        if self.n_out == 2 and not self.several:
            self.meaning = {"average_precision": f"of the label {self.labels[1]}"}
        else:
            mean = "the mean of the labels that occur, each against the rest"
            self.meaning = {"roc_auc": mean, "average_precision": mean}

    def target(self, row):
        labels = [] if row.label is None else labels_of(row, self.several)
        numbers = [self.label_number(row, label) for label in labels]
        if not self.several:
            return numbers[0] if numbers else 0
        target = np.zeros(self.n_out, dtype=bool)  # a byte a label: of 50,000 rows and 4,000 labels 200 MB
        target[numbers] = True
        return target

    def loss(self, out, target, weight, smoothing):
        """A row counts by the weight of its class. (torch's own weight would multiply the smoothed share of
        each other class by that class's: a rare one gets more than the row's own, and is called always.)"""
        if self.several:
            if weight is not None:
                weight = torch.where(target > 0.5, weight, 1.0)  # (B, K)
            target = target * (1 - smoothing) + smoothing / 2
            return F.binary_cross_entropy_with_logits(out, target, weight, reduction="sum")
        if weight is None or not smoothing:
            return super().loss(out, target, weight, smoothing)
        each = F.cross_entropy(out, target, label_smoothing=smoothing, reduction="none")  # (B,)
        return (weight[target] * each).sum()

    def count(self, target, weight):
        if self.several or weight is None:
            return super().count(target, weight)
        return weight[target].sum()

    def label_counts(self, rows: list[Row]) -> np.ndarray:
        """How many rows have each label, (K,)."""
        y = self.targets(rows)
        return y.sum(0, dtype=np.float32) if self.several else np.bincount(y, minlength=len(self.labels))

    def class_weight(self, rows: list[Row]) -> torch.Tensor:
        """(K,) so that classes count alike; of several labels, a label's presence as much as its absence, if
        it is absent at all."""
        n, counts = len(rows), self.label_counts(rows)
        weight = n / (len(self.labels) * counts)
        if self.several:
            weight = np.where(counts < n, (n - counts) / counts, 1.0)
        return torch.tensor(weight, dtype=torch.float32)

    def answers(self, rows, examples, outputs):
        """Probabilities of the classes, (K,)."""
        out = torch.from_numpy(np.stack(outputs)).double()
        probs = out.sigmoid() if self.several else out.softmax(-1)
        return list(probs.numpy())

    def arrays(self, rows, answers):
        return self.targets(rows), np.stack(answers)

    def said(self, answer):
        called = self.labels[answer.argmax()]
        if self.several:
            called = [label for label, p in zip(self.labels, answer) if p > 0.5]
        probs = dict(zip(self.prob_names, answer.tolist()))
        return {"prediction": called, **probs}

    def shown(self, row, answer, hidden=()):
        unlikely = np.argsort(-answer, kind="stable")[self.SHOWN:]
        said = super().shown(row, answer, {self.prob_names[k] for k in unlikely})
        return f"{said}\n({len(unlikely):,} less likely labels)" if len(unlikely) else said

    def baselines(self, train, test):
        shares = self.label_counts(train) / len(train)
        return {"majority": [shares] * len(test), **self.bag_of_words(train, test)}

    def report(self, folder, y, probs):
        return metrics.report(folder, y, probs, self.labels)


class Regress(TextTask):
    """A number for each text: the output is its distance from the training labels' mean, in deviations."""
    metrics = metrics.NUMBER_METRICS
    metric = "spearman"
    names = NUMBER_NAMES

    @staticmethod
    def learn(rows, s):
        y = np.array([number_of(row) for row in rows])
        for row in rows:
            if row.label and to_number(row.label) == math.inf:  # 4,5 or 4 stars
                print(f"labels    {row.label} is read as {number_of(row):g}")
                break
        if np.ptp(y) == 0:
            raise nothing_to_tell_apart(rows, f"the label {y[0]:g}")
        if not 1e-150 < np.ptp(y) < 1e150:
            raise UserError(f"{file_of(rows)}: labels from {y.min():g} to {y.max():g}: their squares are no "
                            "numbers: give them in another unit")
        low, middle, high = np.quantile(y, (0.25, 0.5, 0.75))
        far = int(np.abs(y - middle).argmax())
        if abs(y[far] - middle) > 20 * (high - low) > 0:
            print(f"warning: {rows[far].where}: label {y[far]:g} is far from the others, of which half are "
                  f"from {low:g} to {high:g}: it decides what is learned")
        return {"labels": ["number"], "mean": float(y.mean()), "std": float(y.std())}

    def __init__(self, head, tokenizer):
        super().__init__(head, tokenizer)
        variance = head.get("std", 1.0) ** 2
        self.unit = ("squared error, in variances of the labels", 1 / variance)

    def target(self, row):
        return np.float32((number_of(row) - self.head["mean"]) / self.head["std"])

    def loss(self, out, target, weight, smoothing):
        return F.mse_loss(out[:, 0], target, reduction="sum")

    def answers(self, rows, examples, outputs):
        numbers = [float(out[0]) * self.head["std"] + self.head["mean"] for out in outputs]
        return [1 / (1 + math.exp(-number)) for number in numbers] if self.head.get("sigmoid") else numbers

    def arrays(self, rows, answers):
        y, p = np.array([number_of(row) for row in rows]), np.array(answers)
        out = ((p - self.head["mean"]) / self.head["std"]).astype(np.float32)
        if metrics.is_constant(out):  # one answer to all: that rows differ by a bit is no correlation
            p = np.full_like(p, p.mean())
        return y, p

    def baselines(self, train, test):
        mean = self.answers(test, [], [[self.targets(train).mean()]])
        return {"mean": mean * len(test), **self.bag_of_words(train, test)}


class Tag(Task):
    """A tag for each word, by its first token. A long sentence is read in windows."""
    metrics, totals = metrics.TAG_METRICS, metrics.TagTotals
    metric = "f1"
    by_token = classes = True
    knows = {"label_smoothing", "words"}
    names = TAG_NAMES

    @classmethod
    def open(cls, path, columns, labelled=True, encoding="", bad=None):
        if kind_of(path) not in (".jsonl", ".json", ".csv") and not texts_in_cells(path, encoding):
            return open_conll(path, columns, labelled, encoding)
        columns, rows = super().open(path, columns, labelled, encoding, bad)
        return columns, each_with_words(path, rows)

    @staticmethod
    def learn(rows, s):
        if len(rows) > 1 and all(len(row.words) == 1 for row in rows):
            raise UserError(f"{file_of(rows)}: each row is one word: write a word and its tag a line, and an "
                            "empty line between sentences, as CoNLL")
        labels = {tag for row in rows for tag in row.label}
        return {"labels": sorted(labels), "words": s.words or kind_of_words(rows)}

    def holds_rows(self, path):
        if super().holds_rows(path):
            return True
        return not self.is_plain(path, self.head["columns"], encoding_of(path, Counter()))

    def is_plain(self, path, columns, encoding):
        """A file of words has one a line, nearly all in as many columns: comments have others. Empty lines
        between sentences tell it from texts, or the tags."""
        if "unused" in columns and not (columns["text"].isdigit() or columns["text"] in CONLL_U):
            return True
        text = "\n".join(row.text for row in itertools.islice(read_lines(path, False, encoding), 100)).strip()
        cells = [line.split() for line in text.split("\n") if line.strip()]
        word = word_pattern(self.head.get("words", "spaces"))
        numbers = Counter(len(one) for one in cells if len(one) > 1 or word.fullmatch(one[0]))
        tagged = sum(one[-1] in self.number for one in cells if len(one) > 1)
        in_columns = "\n\n" in text or 2 * tagged > len(cells)
        return not in_columns or 10 * max(numbers.values(), default=0) < 8 * len(cells)

    def ready(self, row):
        if row.words is None:
            row.words = word_pattern(self.head.get("words", "spaces")).findall(row.text)
            row.text = " ".join(row.words)
        return super().ready(row)

    def __init__(self, head, tokenizer):
        super().__init__(head, tokenizer)
        self.scheme = metrics.TagScheme(self.labels)
        self.meaning = {"f1": f"of entities, {self.scheme}"}

    def target(self, row):
        """(words,) the numbers of their tags."""
        if row.label is None:
            return np.zeros(len(row.words), dtype=np.int64)
        return np.array([self.label_number(row, tag) for tag in row.label], dtype=np.int64)

    def inputs(self, rows):
        found = []
        for i, row in enumerate(rows):
            tags = self.target(row)
            of_char = np.repeat(np.arange(len(row.words)), [len(word) + 1 for word in row.words])
            ids, spans = self.tokenizer.offsets(row.text)
            word = np.array([of_char[max(begin, end - 1)] for begin, end in spans], dtype=np.int64)
            first = np.diff(word, prepend=-1) > 0  # the token that begins a word, with the space before it
            for part, offset, window in self.windows(ids):
                places = np.flatnonzero(first[part]).astype(np.int32)
                words = word[part][places]
                found.append(Example(i, [window], tags[words], places + offset, words))
        return found

    def answers(self, rows, examples, outputs):
        """(tags, their log-probabilities (words, K)). A word that the tokenizer drops is O."""
        sums = [np.zeros((len(row.words), self.n_out)) for row in rows]
        times = [np.zeros((len(row.words), 1)) for row in rows]
        for example, out in zip(examples, outputs):
            sums[example.row][example.spans] += out
            times[example.row][example.spans] += 1
        found = []
        for out, n in zip(sums, times):
            out /= np.maximum(1, n)  # a word in two windows: the mean of both
            out[n[:, 0] == 0, self.number.get("O", 0)] = 1.0
            tags = [self.labels[k] for k in out.argmax(1)]
            found.append((tags, torch.from_numpy(out).log_softmax(-1).numpy()))
        return found

    def arrays(self, rows, answers):
        counts, nats = [], []
        for row, (tags, logp) in zip(rows, answers):
            counts.append(metrics.tag_counts(row.label, tags, self.scheme))
            places = enumerate(self.target(row))
            nats.append(math.nan if logp is None else -sum(logp[place] for place in places))
        return np.array(counts), np.array(nats)

    def said(self, answer):
        return {"prediction": answer[0]}

    def table(self, rows, answers):
        lines = []
        for row, (tags, _) in zip(rows, answers):
            labels = row.label or [""] * len(tags)
            lines += [[row.id, *cells] for cells in zip(row.words, labels, tags)]
        return ["sentence", "text", "label", "prediction"], lines

    def shown(self, row, answer, hidden=()):
        return "\n".join(f"{word}\t{tag}" for word, tag in zip(row.words, answer[0]))

    def explained(self, row, said, example, out, target):
        """The tag of one word: of the target, else of the first with a tag that is not O."""
        if target and target not in row.words:
            raise SettingError(f"--target={target}: must be a word of the text: {', '.join(row.words[:20])}")
        tags, _ = said
        wanted = [target == word if target else tag != "O" for word, tag in zip(row.words, tags)]
        n = wanted.index(True) if any(wanted) else 0
        if target and sum(wanted) > 1:
            self.notes[f"that has {target!r} {sum(wanted)} times: the first is explained"] = 1
        place = example.places[example.spans == n]
        if not len(place):  # it is in another window
            return "", []
        return f"{row.words[n]}: {tags[n]}", [int(place[0]) * self.n_out + self.number[tags[n]]]

    def baselines(self, train, test):
        """The most frequent tag, and for each word the one that it has most often."""
        every, of_word = Counter(), defaultdict(Counter)
        for row in train:
            every.update(row.label)
            for word, tag in zip(row.words, row.label):
                of_word[word][tag] += 1
        usual = every.most_common(1)[0][0]
        frequent = {word: tags.most_common(1)[0][0] for word, tags in of_word.items()}
        return {"majority": [([usual] * len(row.words), None) for row in test],
                "most_frequent_of_word": [([frequent.get(word, usual) for word in row.words], None)
                                          for row in test]}


class Answer(Task):
    """An answer is a span of the context: its first and its last token. A long context is read in windows."""
    metrics = metrics.ANSWER_METRICS
    metric = "f1"
    shares = {"exact_match"}
    knows = {"max_answer", "pair_column"}
    names = ANSWER_NAMES

    @classmethod
    def open(cls, path, columns, labelled=True, encoding="", bad=None):
        columns, rows = super().open(path, columns, labelled, encoding, bad)
        return columns, each_with_answers(path, rows)  # an empty list, if there is none

    @staticmethod
    def learn(rows, s):
        lost = sum(begin < 0 for row in rows for _, begin in row.label)
        none = sum(not row.label for row in rows)
        if lost:
            print(f"({lost} answers do not stand in their text: left out of training)")
        if none:
            print(f"({none:,} of {len(rows):,} questions to train on have no answer in their text)")
        return {"labels": ["first", "last"], "no_answer": none > 0}

    def settle(self, examples, s):
        lengths = [1 + example.target[1] - example.target[0] for example in examples if example.target.any()]
        longest = int(max(lengths, default=1))
        self.head["max_answer"] = s.max_answer or longest
        return (f"answers   at most {self.head['max_answer']} tokens; the longest to train on has {longest} "
                "(--max_answer)")

    def teaches(self, example, row):  # a window without the answer does if there may be none
        known = all(begin >= 0 for _, begin in row.label)
        return example.target.any() or (known and self.head["no_answer"])

    def loss(self, out, target, weight, smoothing):  # without smoothing: most places cannot be an answer
        return F.cross_entropy(out, target, reduction="sum")  # (B, T, 2), (B, 2)

    def inputs(self, rows):
        """The target is (first, last), or position 0 twice if the answer is not in the window."""
        most = self.head["max_length"] // 3
        found, contexts = [], {}
        for i, row in enumerate(rows):
            question = self.tokenizer.encode(row.text)
            if len(question) > most:
                self.notes[f"whose question is longer than {most} tokens: cut there"] += 1
            if row.pair not in contexts:  # many questions are asked of one
                ids, spans = self.tokenizer.offsets(row.pair)
                contexts[row.pair] = ids, np.array(spans, np.int32).reshape(-1, 2)
            ids, spans = contexts[row.pair]
            begins, ends = spans.T
            known = [(begin, begin + len(answer)) for answer, begin in row.label or () if begin >= 0]
            first, last = known[0] if known else (0, 0)
            inside = (ends > first) & (begins < last)  # the tokens that the answer touches
            touched = int(inside.sum())
            is_found = False  # in a window
            for part, offset, window in self.windows(ids, question[:most]):
                places = np.arange(len(ids[part]), dtype=np.int32) + offset
                answer = places[inside[part]]
                whole = len(answer) == touched > 0
                is_found = is_found or whole
                target = answer[[0, -1]].astype(np.int64) if whole else np.zeros(2, dtype=np.int64)
                found.append(Example(i, [window], target, places, spans[part]))
            if known and not is_found:
                self.notes["whose answer no window holds: it cannot be found"] += 1
        return found

    def best_span(self, row, example, out) -> tuple[float, str, list[int]]:
        """Of a window: score, text, the positions of its first and last token."""
        n = len(example.places)
        if not n:
            return -math.inf, "", []
        first, last = out[example.places].T
        most = min(n, self.head.get("max_answer", 40))  # tokens; 40 for all, once
        last = np.pad(last, (0, most - 1), constant_values=-1e9)
        # (n, most): by where it begins, and how much longer than one token it is
        score = first[:, None] + np.lib.stride_tricks.sliding_window_view(last, most)
        a, longer = np.unravel_index(score.argmax(), score.shape)
        b = a + longer
        begin, end = example.spans[a][0], example.spans[b][1]
        while unicodedata.category(row.pair[end:end + 1] or "a")[0] == "M":  # a mark is of its letter's token
            end += 1
        return float(score[a, longer]), row.pair[begin:end].strip(), example.places[[a, b]].tolist()

    def answers(self, rows, examples, outputs):
        """(the best span of all windows, its probability against no answer)."""
        best, none, found = [(-math.inf, "")] * len(rows), [math.inf] * len(rows), []
        for example, out in zip(examples, outputs):
            i = example.row
            score, said, _ = self.best_span(rows[i], example, out)
            best[i] = max(best[i], (score, said))
            none[i] = min(none[i], float(out[0].sum()))
        for (score, said), other in zip(best, none):
            p = 1 / (1 + math.exp(min(700.0, other - score)))
            found.append(("" if self.head["no_answer"] and p < 0.5 else said, p))
        return found

    def arrays(self, rows, answers):
        matches = [metrics.answer_match(said, [gold for gold, _ in row.label])
                   for row, (said, _) in zip(rows, answers)]
        return tuple(np.array(matches).T)  # exact (N,), f1 (N,)

    def given(self, row):
        return {"id": row.id, "question": row.text, "label": row.label[0][0] if row.label else ""}

    def said(self, answer):
        return {"prediction": answer[0], "score": answer[1]}

    def explained(self, row, said, example, out, target):
        if target:
            raise SettingError(f"--target={target}: the task has no classes: leave it out")
        if self.head["no_answer"] and said[1] < 0.5:
            return None, [0, 1]  # as first and last
        _, text, ends = self.best_span(row, example, out)
        return text, [2 * place + k for k, place in enumerate(ends)]

    def baselines(self, train, test):
        """The first sentence; a span from anywhere, as long as answers are."""
        rng, first, spans = np.random.default_rng(0), [], []
        lengths = [len(row.label[0][0]) for row in train if row.label] or [1]
        for row in test:
            sentence = re.search(r"[^.!?。！？]+[.!?。！？]?", row.pair)
            first.append((sentence.group().strip() if sentence else "", 1.0))
            length = lengths[rng.integers(len(lengths))]
            begin = rng.integers(max(1, len(row.pair) - length + 1))
            spans.append((row.pair[begin:begin + length], 1.0))
        return {"first_sentence": first, "random_span": spans}


class LM(Task):
    """Every token of a text, in windows; or of the response to a prompt, whose tokens alone count."""
    metrics, totals = metrics.TOKEN_METRICS, metrics.TokenTotals
    metric, lower_is_better = "loss", True
    by_token = writes = True
    knows = {"pair_column", "label_smoothing"}
    names = LM_NAMES

    @classmethod
    def open(cls, path, columns, labelled=True, encoding="", bad=None):
        if kind_of(path) not in (".csv", ".tsv", ".json", ".jsonl"):
            names = Names({"text": ("each_paragraph",)})
            columns = of_names(path, ["each paragraph"], columns, names, {"text"})
            return columns, read_paragraphs(path, encoding)
        return super().open(path, columns, labelled, encoding, bad)

    @classmethod
    def with_labels(cls, rows, s):
        return super().with_labels(rows, s) if s.columns.get("label") is not None else rows

    @staticmethod
    def learn(rows, s):
        return {"labels": [], "instruct": rows[0].label is not None}

    def knows_label(self, row):
        return row.label is not None or not self.head["instruct"]

    def inputs(self, rows):
        L, encode, found = self.head["max_length"], self.tokenizer.encode, []
        instruct = self.head["instruct"]
        for i, row in enumerate(rows):
            if instruct and row.label is None:
                raise UserError(f"{row.where}: wanted a response to the prompt, as in the training data")
            prompt = self.tokenizer.prefix + (encode(prompt_of(row)) if instruct else [])
            ids = prompt + encode(row.label if instruct else row.text) + [self.tokenizer.eot]
            if len(ids) > L + 1:
                self.note_long("cut there" if instruct else "read in windows")
            for begin in range(0, 1 if instruct else max(1, len(ids) - 1), L):
                window = np.array(ids[begin:begin + L + 1], np.int32)
                places = np.arange(max(0, len(prompt) - 1), len(window) - 1, dtype=np.int32)
                read = window[:-1] if len(window) > 1 else window
                found.append(Example(i, [(read, None)], window[places + 1], places))
        return found

    def prompt(self, text: str, pair: str = "") -> str:
        """A text as it is to be continued: an instruction with what training put around it."""
        return prompt_of(Row("", text, pair)) if self.head["instruct"] else text

    def summary(self, out, target):
        """(n, V) -> (n, 2): nats, and whether the likeliest is right."""
        nats = F.cross_entropy(out, target, reduction="none")
        return torch.stack((nats, (out.argmax(-1) == target).float()), dim=1)

    def answers(self, rows, examples, outputs):
        """(nats, tokens guessed right, tokens that count)."""
        sums = np.zeros((len(rows), 3))
        for example, out in zip(examples, outputs):
            sums[example.row] += [*out.sum(0), len(out)]
        return list(sums)

    def arrays(self, rows, answers):
        return (np.stack(answers),)

    def given(self, row):
        pair = {"text_pair": row.pair} if self.head["columns"].get("pair") is not None else {}
        return {"text": row.text, **pair, "label": row.label}

    def said(self, answer):
        nats, _, n = answer.tolist()
        return {"loss": nats / max(1, n), "tokens": int(n)}


TASKS = {"classify": Classify, "regress": Regress, "tag": Tag, "qa": Answer, "lm": LM}


# -----------------------------------------------------------------------------
# Labels

def without_list(row: Row) -> Row:
    """A list of one label, as doccano writes it, is that label; an empty one is none."""
    if isinstance(row.label, list) and len(row.label) < 2 and all(isinstance(one, str) for one in row.label):
        row.label = "".join(row.label).strip() or None
    return row


def labels_of(row: Row, several: bool) -> list[str]:
    if several:
        labels = row.label if isinstance(row.label, list) else row.label.split("|")
        return [str(one).strip() for one in labels if one is not None and str(one).strip()]
    if isinstance(row.label, list):
        raise UserError(f"{row.where}: a list of labels, {row.label}: that is for --multi_label")
    if not row.label:
        raise UserError(f"{row.where}: its label is empty: give it one, or leave the row out")
    return [row.label]


JOINTS = r"[|,;/、，；／]"  # what people write between labels, of which | alone is read


def check_several(rows: list[Row], labels: set[str]) -> None:
    """Raises UserError if what should be several labels a row was not read as such."""
    joined = sorted(label for label in labels if len(re.split(JOINTS, label)) > 1)
    if joined and all(len(row.label) < 2 for row in rows):
        raise UserError(f"{file_of(rows)}: no row has several labels, as {joined[0]!r} may be meant to be: "
                        "write | between them, or a JSON list")
    are_flags = {label_key(label) for label in labels} <= {0.0, 1.0, "true", "false"}
    if are_flags and any(len(set(row.label)) < len(row.label) for row in rows):
        raise UserError(f"{file_of(rows)}: a 0 or 1 for each label, {rows[0].label}: write the names of "
                        "those that have a 1")


def file_of(rows: list[Row]) -> str:
    return rows[0].where.rpartition(":")[0]


def number_of(row: Row) -> float:
    number = 0.0 if row.label is None else to_amount(row.label)
    if number == math.inf:
        remedy = "with a point for decimals" if "," in row.label else "--task=classify for names"
        raise UserError(f"{row.where}: label {row.label!r}: a number is wanted ({remedy})")
    return number


def each_with_words(path: str, rows: Iterable[Row]) -> Iterator[Row]:
    lost = 0
    for row in rows:
        first = (row.label or [{}])[0] if isinstance(row.label, list) else row.label
        if isinstance(row.text, str) and isinstance(first, (list, dict)):
            row.words, row.label, n = tags_of_spans(row)
            row.text = " ".join(row.words)
            lost += n
        else:
            take_words(row)
        yield row
    if lost:
        tell(f"{path}: {lost:,} places of tags overlap a longer one, or do not begin and end with a word: a "
             "word has the longest that touches it")


def take_words(row: Row) -> None:
    """Of a list of words and one of tags."""
    words, tags = (one.split() if isinstance(one, str) else one for one in (row.text, row.label))
    tags_fit = tags is None or (None not in tags and len(tags) == len(words))
    if not tags_fit or any(isinstance(word, (list, dict, type(None))) for word in words):
        raise UserError(f"{row.where}: wanted a list of words, and one of as many tags: it reads "
                        f"{str(row.text)[:40]}, {str(row.label)[:40]}")
    row.words = [str(word) for word in words]
    row.text = " ".join(row.words)
    row.label = tags and [str(tag) for tag in tags]


def one_spelling(rows: list[Row], say: Callable) -> dict[str, str]:
    """label_key -> how that label is spelled, as it most often is: equal numbers, and True and true, are one
    class, which is said; others that differ by case, width or spaces are warned of."""
    counts = Counter()
    for row in rows:
        counts.update(row.label if isinstance(row.label, list) else [row.label])
    same, near = defaultdict(list), defaultdict(list)
    for label, _ in counts.most_common():
        same[label_key(label)].append(label)
    spelled = []
    for first, *others in same.values():
        near["".join(unicodedata.normalize("NFKC", first).casefold().split())].append(first)
        if others:
            spelled.append(f"labels    {', '.join([first, *others])}: one class, {first}")
    say_first(say, spelled)
    joined = [label for label in counts if counts.keys() & set(re.split(JOINTS, label)) - {label}]
    if joined:
        say(f"warning: label {joined[0]!r} is a class of its own: --multi_label, and | between them, if it "
            "is several")
    unknown = [label for label in counts if label.upper() in ("NA", "N/A", "#N/A")]
    if unknown:
        say(f"warning: label {unknown[0]!r} is a class of its own: leave it empty if it means that there "
            "is none")
    broken = [labels[0] for key, labels in same.items() if isinstance(key, float) and key % 1]
    if broken:
        say(f"warning: label {broken[0]!r} is a class of its own: --task=regress if labels are amounts")
    say_first(say, [f"warning: labels {', '.join(map(repr, labels))} differ by case, width or spaces alone: "
                    f"{len(labels)} classes" for labels in near.values() if len(labels) > 1])
    return {key: labels[0] for key, labels in same.items()}


def say_first(say: Callable, found: list[str]) -> None:
    """Of lines that are alike, of which ten thousand labels may have as many."""
    for line in found[:10]:
        say(line)
    if len(found) > 10:
        say(f"          and {len(found) - 10:,} more like that")


def respell(rows: Iterable[Row], spelling: dict[str, str]) -> None:
    for row in rows:
        if isinstance(row.label, list):
            row.label = [spelling.get(label_key(label), label) for label in row.label]
        elif row.label is not None:
            row.label = spelling.get(label_key(row.label), row.label)


def nothing_to_tell_apart(rows: list[Row], what: str) -> UserError:
    return UserError(f"{file_of(rows)}: all {len(rows)} examples to train on have {what}: there is nothing "
                     "to tell apart")


def prompt_of(row: Row) -> str:
    """An instruction as the model is trained to read it (the layout of Stanford's Alpaca, shortened)."""
    given = f"### Input:\n{row.pair}\n\n" if row.pair else ""
    return f"### Instruction:\n{row.text}\n\n{given}### Response:\n"


def as_cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if 0 < abs(value) < 1e-3 else f"{value:.6f}"  # labels may all be near 0
    if value is None:
        return ""
    return "|".join(map(str, value)) if isinstance(value, list) else str(value)
