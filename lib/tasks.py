"""
What there is to learn: files to rows, rows to examples, and what a model's outputs mean.

    rows = read_rows("reviews.csv", "classify", {"text": "", "pair": "", "label": "", "group": ""})
    task = Classify({**Classify.learn(rows, settings), ...}, tokenizer)
    examples = task.examples(rows)

A task knows neither the model nor the loop: finetune.py has these, lib/metrics.py the metrics.
"""
import csv
import io
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
from torch.nn import functional as F

from config import UserError
from lib import metrics

# -----------------------------------------------------------------------------
# Reading: every format to rows

@dataclass
class Row:
    where: str  # file:line, for messages
    text: str  # the text; the question in qa
    pair: Optional[str] = None  # the second text; the context in qa
    label: Any = None  # a string; tag: one a word; qa: [(answer, where it begins), ...], none: no answer
    group: str = ""
    id: str = ""
    words: Optional[list[str]] = None  # tag


USUAL = {"text": ("text", "sentence", "sentence1", "review", "content", "question", "instruction", "prompt",
                  "tokens"),
         "pair": ("text_pair", "sentence2", "input"),
         "label": ("label", "labels", "tags", "target", "class", "score", "output", "response", "completion")}


# JSON's way to write half a character: one of a pair of surrogates, without the other
HALF = re.compile(r"(?i)\\ud[89ab]..(?!\\ud[c-f])|(?<!\\ud[89ab]..)\\ud[c-f]")


def read_rows(path: str, task: str, columns: dict, labelled: bool = True) -> list[Row]:
    """The examples in a file. columns: text, pair, label, group -> a name, a number or "".

    labelled=False: labels may be missing. Raises UserError, with file and line, for what cannot be read.
    """
    content, kind = read_text(path), Path(path).suffix.lower()
    if task == "qa":
        rows = read_squad(path, content)
    elif task == "lm" and kind == ".txt":  # paragraphs
        rows = [Row(path, text.strip()) for text in content.split("\n\n") if text.strip()]
    elif task == "tag" and kind not in (".jsonl", ".json", ".csv"):
        rows = read_conll(path, content, labelled)
    else:
        read = read_json if kind in (".jsonl", ".json") else read_table
        rows = list(to_rows(path, read(path, content, kind, columns, labelled), task, columns, labelled))
    if not rows:
        raise UserError(f"{path}: holds no examples")
    if kind in (".jsonl", ".json") and HALF.search(content):
        print(f"warning: {path}: half a character (\\ud83d alone, or the like) is read as ?", file=sys.stderr)
    return rows


def read_text(path: str) -> str:
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8: convert it") from None
    if "\0" in text:
        line = text[:text.index("\0")].count("\n") + 1
        print(f"warning: {path}:{line}: a NUL byte, read as \ufffd", file=sys.stderr)
    return text.replace("\0", "\ufffd")


def read_table(path: str, content: str, kind: str, columns: dict, labelled: bool):
    """CSV, or TSV, where quotes are plain characters: (line, {column: cell}) of each row.

    The first row is a header where it has a column that is asked for, or usual, by name; else columns are
    called by their numbers. Rows of empty cells teach nothing, but are answered like others.
    """
    tabs = kind == ".tsv" or kind != ".csv" and "\t" in content.partition("\n")[0]
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(content, newline=""), **(
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}))
    names = {name for usual in USUAL.values() for name in usual}
    names |= {name.lower() for name in map(str, columns.values()) if name and not name.isdigit()}
    header, line = None, 1
    try:
        for cells in reader:
            if header is None and names.intersection(cell.strip().lower() for cell in cells):
                header = [cell.strip() for cell in cells]
            elif any(cells) or cells and not labelled:
                header = header or [str(i) for i in range(len(cells))]
                if any(cells[len(header):]):
                    remedy = ("a text cannot have a tab in it" if tabs else
                              "a text with a comma in it wants quotes around it")
                    raise UserError(f"{path}:{line}: {len(cells)} cells, but the columns are "
                                    f"{', '.join(header)}: {remedy}")
                yield line, {**dict.fromkeys(header), **dict(zip(header, cells))}
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not a CSV row ({error})") from None


def parse_json(path: str, text: str, line: int = 1) -> Any:
    """JSON can spell half a character (a lone surrogate) that no file can hold: a question mark instead."""
    try:
        found = json.loads(text)
        return json.loads(whole(json.dumps(found, ensure_ascii=False))) if "\\ud" in text.lower() else found
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}:{line}: not JSON ({getattr(error, 'msg', error)})") from None


def whole(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def read_json(path: str, content: str, kind: str, columns: dict, labelled: bool):
    """A list of objects, or one a line: (line, object)."""
    if kind == ".json":
        found = parse_json(path, content)
        if not isinstance(found, list):
            raise UserError(f"{path}: wanted a list of objects with text and label, got {str(found)[:40]!r}")
        records = enumerate(found, 1)
    else:
        records = ((line, parse_json(path, text, line))
                   for line, text in enumerate(content.split("\n"), 1) if text.strip())
    for line, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{path}:{line}: wanted an object with text and label, got {str(record)[:40]!r}")
        yield line, record


def to_rows(path: str, records, task: str, columns: dict, labelled: bool):
    """Records to rows, by their columns, which are those of the first."""
    found = None
    for line, record in records:
        where = f"{path}:{line}"
        if found is None:
            found = {role: find_column(path, role, asked, list(record)) for role, asked in columns.items()}
            for role in ["text"] + ["label"] * (labelled and task != "lm"):
                if found[role] is None:
                    raise UserError(f"{path}: no column for the {role} among {', '.join(record)}: name it "
                                    f"with --{role}_column=...")
        cell = {role: None if name is None else record.get(name) for role, name in found.items()}
        for role, name in found.items():
            if name is not None and cell[role] is None and (role != "label" or labelled):
                if role == "pair" and task == "lm":  # an instruction need not have an input
                    continue
                raise UserError(f"{where}: has no {name!r}: it reads {str(record)[:60]}")
        lists = {"tag": ("text", "label"), "classify": ("label",)}.get(task, ())
        for role in ("text", "pair", "label"):
            if isinstance(cell[role], dict if role in lists or not labelled else (dict, list)):
                raise UserError(f"{where}: {found[role]!r} is no text: {str(cell[role])[:60]}")
        label, pair, words = cell["label"], cell["pair"], None
        if task == "tag":
            words, label = (x.split() if isinstance(x, str) else x for x in (cell["text"], label))
            tags = words if label is None else label
            if not (isinstance(words, list) and isinstance(tags, list) and len(words) == len(tags)
                    and None not in words + tags):
                raise UserError(f"{where}: wanted a list of words, and one of as many tags: it reads "
                                f"{str(record)[:60]}")
            words, label = list(map(str, words)), None if label is None else list(map(str, label))
        yield Row(where, str(cell["text"]) if words is None else " ".join(words),
                  None if pair is None else str(pair),
                  label if label is None or isinstance(label, list) else str(label).strip(),
                  str(cell.get("group") or ""), str(record.get("id", line)), words)


def find_column(path: str, role: str, asked: Union[str, int], names: list[str]) -> Optional[str]:
    """The column that was asked for, or one that is usually called so."""
    if asked == "":
        return next((name for usual in (*USUAL.get(role, ()), {"text": "0", "label": "1"}.get(role))
                     for name in names if name.lower() == usual), None)
    if str(asked) in names:
        return str(asked)
    if str(asked).isdigit() and int(asked) < len(names):
        return names[int(asked)]
    raise UserError(f"{path}: has no column {asked!r}: it has {', '.join(names)}")


def read_conll(path: str, content: str, labelled: bool) -> list[Row]:
    """A word a line, its tag in the last column; an empty line between sentences."""
    rows, words, tags, first = [], [], [], 1
    for line, text in enumerate([*content.split("\n"), ""], 1):
        text = text.strip("\ufeff")  # where files were joined
        cells = text.split("\t") if "\t" in text else text.split()
        if any(cell.strip() for cell in cells):
            if not cells[0].strip():
                raise UserError(f"{path}:{line}: a tag without a word: {text[:40]!r}")
            if labelled and (len(cells) < 2 or not cells[-1].strip()):
                raise UserError(f"{path}:{line}: a word without a tag: {text[:40]!r}")
            first = first if words else line
            words.append(cells[0].strip())
            tags.append(cells[-1].strip())
        elif words:
            rows.append(Row(f"{path}:{first}", " ".join(words), None, tags if labelled else None,
                            id=str(len(rows) + 1), words=words))
            words, tags = [], []
    return rows


def read_squad(path: str, content: str) -> list[Row]:
    """SQuAD's JSON. An answer that does not stand where it is said to is looked for nearby."""
    found, rows, where = parse_json(path, content), [], "data"
    try:
        for a, article in enumerate(found["data"]):
            where = f"article {a + 1}"
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for one in paragraph["qas"]:
                    answers, where = [], f"article {a + 1}, question {one['id']}"
                    for name, text in (("context", context), ("question", one["question"])):
                        if not isinstance(text, str):
                            raise TypeError(f"{name} is {text!r}")
                    for answer in one.get("answers") or ():
                        text, begin = answer["text"], int(answer.get("answer_start", 0))
                        if context[begin:begin + len(text)] != text:
                            places = [i for i in range(len(context)) if context.startswith(text, i)]
                            begin = min(places, key=lambda i: abs(i - begin), default=-1)
                        if text:
                            answers.append((text, begin))
                    rows.append(Row(f"{path}: {one['id']}", one["question"], context, answers,
                                    article.get("title") or f"article {a}", str(one["id"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {where}: not in SQuAD's format: {type(error).__name__} {error}: wanted "
                        "data, paragraphs, context, qas, id, question, answers, text, answer_start") from None
    return rows


def deal(rows: list[Row], task: str, k: int, seed: int) -> np.ndarray:
    """A number from 0 to k - 1 for each row, (N,): k parts alike in size and in labels.

    Rows with the same text stay together, in qa those of an article: nothing is tested on what it was
    trained on.
    """
    units = {}
    for i, row in enumerate(rows):
        units.setdefault(row.group if task == "qa" else (row.text, row.pair), []).append(i)
    order = [list(units)[i] for i in np.random.default_rng(seed).permutation(len(units))]
    if task == "classify":
        order.sort(key=lambda unit: str(rows[units[unit][0]].label))  # stable: shuffled within a label
    part = np.zeros(len(rows), dtype=np.int64)
    for n, unit in enumerate(order):
        part[units[unit]] = n % k
    return part


# -----------------------------------------------------------------------------
# Tasks. Each says how rows become examples, what is minimised, and what the outputs mean.

class Example(NamedTuple):
    row: int  # which row it is, or is a window of
    parts: list  # (ids, segments) of each sequence: two where a pair is read apart
    target: Any  # a number or an array
    places: Optional[np.ndarray] = None  # tokens that count: (n,) positions
    spans: Any = None  # what these stand for: tag: which word; qa: (begin, end) in the context


class Task:
    """What the tasks share. head: the plain values that a checkpoint keeps of it."""
    metric = "accuracy"  # the best epoch has the highest
    by_token = False  # outputs are those of single tokens, at `places`
    long = "cut there"  # what becomes of a text that is longer than the model

    def __init__(self, head: dict, tokenizer):
        self.head, self.tokenizer, self.labels = head, tokenizer, head["labels"]
        self.number, self.n_out = {label: k for k, label in enumerate(self.labels)}, len(self.labels)
        self.cut = self.cut_questions = 0  # texts that were longer than the model

    def label_number(self, row: Row, label: str) -> int:
        if label not in self.number:
            header = " (is it a header? name its columns: --text_column=..., --label_column=...)"
            raise UserError(f"{row.where}: label {label!r} does not occur in the training data, which has "
                            f"{', '.join(self.labels[:10])}: give more rows of it, or leave it out"
                            + header * (row.where.endswith(":1") and not self.by_token))
        return self.number[label]

    def sequences(self, rows: list[Row], encode=None) -> list[list]:
        """(ids, segments) of each row, cut to max_length; two of them for pairs read apart.

        encode: texts to arrays of ids, in place of the tokenizer's way.
        """
        L, wrap, found = self.head["max_length"], self.tokenizer.wrap, []
        space = " " * self.head.get("space", False)
        most = 100 * L  # characters: a text of megabytes costs no more than what is read of it
        a, b = ([ids.tolist() for ids in (encode or self.tokenizer.encode_batch)(
            [space + (text or "")[:most] for text in texts])]
            for texts in ([row.text for row in rows], [row.pair for row in rows]))
        together = self.head["paired"] and not self.head["apart"]
        for row in rows:
            if (row.pair is not None) != self.head["paired"]:
                wanted = "two texts are" if self.head["paired"] else "one text is"
                raise UserError(f"{row.where}: {wanted} wanted, as in the training data")
        room = L - len(wrap([], [] if together else None)[0])
        for x, y in zip(a, b):
            if together:
                self.cut += len(x) + len(y) > room
                x = x[:max(room // 2, room - len(y))]  # the longer one is cut first
                found.append([wrap(x, y[:room - len(x)])])
            else:
                self.cut += max(len(x), len(y)) > room
                found.append([wrap(x[:room]), wrap(y[:room])] if self.head["apart"] else [wrap(x[:room])])
        return found

    def teaches(self, example: Example, row: Row) -> bool:
        """Is there anything to learn from it?"""
        return not self.by_token or len(example.places) > 0

    def loss(self, out, target, weight, smoothing):
        return F.cross_entropy(out, target, weight=weight, label_smoothing=smoothing)

    def baselines(self, train, test):
        """name -> answers, as `answers` gives them."""
        return {}

    def windows(self, length: int, room: int) -> list[tuple[int, int]]:
        """Where windows of at most `room` tokens begin and end, half of each in the next one too."""
        if length <= room:
            return [(0, length)]
        starts = [*range(0, length - room, max(1, room // 2)), length - room]
        return [(i, i + room) for i in starts]


def texts_of(rows: list[Row]) -> list[tuple]:
    return [(row.text, row.pair) for row in rows]


class Classify(Task):
    kind = "class"

    @staticmethod
    def learn(rows: list[Row], s) -> dict:
        """What the head keeps of the training rows."""
        labels = {label for row in rows
                  for label in (split_labels(row.label) if s.multi_label else [one_label(row)])}
        if len(labels) < 2 - s.multi_label:
            what = f"the label {labels.pop()!r}" if labels else "no label"
            raise UserError(f"{rows[0].where.rpartition(':')[0]}: all {len(rows)} examples to train on have "
                            f"{what}: there is nothing to tell apart")
        return {"labels": sorted(labels, key=lambda x: (0, float(x), x) if is_number(x) else (1, 0, x)),
                "several": s.multi_label}

    def __init__(self, head, tokenizer):
        super().__init__(head, tokenizer)
        if head.get("several"):
            self.kind, self.metric, self.scores = "labels", "f1_macro", metrics.label_scores
        self.linear = metrics.BagOfRuns.from_dict(head["linear"]) if "linear" in head else None

    def add_linear(self, rows: list[Row], longest: int) -> None:
        """A linear model beside the Transformer, whose outputs are mixed into the answers."""
        y = np.array([self.target(row) for row in rows])
        self.linear = metrics.BagOfRuns(self.kind, self.n_out, longest).fit(texts_of(rows), y)
        self.head.update(linear=self.linear.to_dict(), share=0.5)  # the Transformer's share

    def choose_share(self, rows, examples, outputs) -> None:
        """The one with which these rows' loss is lowest; they must not be what was trained on."""
        out, linear = torch.from_numpy(np.stack(outputs)), self.linear.outputs(texts_of(rows))
        target = torch.from_numpy(np.array([example.target for example in examples]))
        self.head["share"] = min((i / 20 for i in range(21)), key=lambda share: self.loss(
            share * out + (1 - share) * linear, target, None, 0.0).item())

    def mixed(self, rows, outputs) -> torch.Tensor:  # (N, n_out)
        out = torch.from_numpy(np.stack(outputs)).double()
        if self.linear is None:
            return out
        return self.head["share"] * out + (1 - self.head["share"]) * self.linear.outputs(texts_of(rows))

    def scores(self, y, probs):
        return metrics.class_scores(y, probs)

    def target(self, row: Row):
        if self.kind == "class":
            return 0 if row.label is None else self.label_number(row, one_label(row))
        target = np.zeros(self.n_out, dtype=np.float32)
        target[[self.label_number(row, label) for label in split_labels(row.label or [])]] = 1
        return target

    def examples(self, rows):
        return [Example(i, parts, self.target(row))
                for i, (row, parts) in enumerate(zip(rows, self.sequences(rows)))]

    def loss(self, out, target, weight, smoothing):
        if self.kind == "class":
            return super().loss(out, target, weight, smoothing)
        target = target * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(out, target, pos_weight=weight)

    def answers(self, rows, examples, outputs) -> list[np.ndarray]:
        """Probabilities of the classes, (K,) a row."""
        out = self.mixed(rows, outputs)
        return list((out.softmax(-1) if self.kind == "class" else out.sigmoid()).numpy())

    def arrays(self, rows, answers):
        return np.array([self.target(row) for row in rows]), np.stack(answers)

    def named(self, probs: np.ndarray) -> str:
        if self.kind == "class":
            return self.labels[int(probs.argmax())]
        return "|".join(label for label, p in zip(self.labels, probs) if p > 0.5)

    def table(self, rows, answers):
        paired = rows[0].pair is not None
        header = ["text", *["text_pair"] * paired, "label", "prediction", *(f"prob_{x}" for x in self.labels)]
        return header, [[row.text, *[row.pair] * paired, as_cell(row.label), self.named(probs),
                         *(f"{p:.6f}" for p in probs)] for row, probs in zip(rows, answers)]

    def baselines(self, train, test):
        y = np.array([self.target(row) for row in train])
        bag = metrics.BagOfWords(self.kind, self.n_out).fit(texts_of(train), y)
        share = (np.bincount(y, minlength=self.n_out) / len(y)) if self.kind == "class" else y.mean(0)
        return {"mean" if self.kind == "number" else "majority": [share] * len(test),
                "bag_of_words": list(bag.predict(texts_of(test)))}


class Regress(Classify):
    """One output, the label's distance from the training labels' mean in their standard deviations."""
    kind, metric = "number", "spearman"

    @staticmethod
    def learn(rows, s):
        y = np.array([to_number(row) for row in rows])
        if np.ptp(y) == 0:
            raise UserError(f"{rows[0].where.rpartition(':')[0]}: all {len(rows)} examples to train on have "
                            f"the label {y[0]:g}: there is nothing to tell apart")
        return {"labels": ["number"], "mean": float(y.mean()), "std": float(y.std())}

    def scores(self, y, p):
        return metrics.number_scores(y, p)

    def target(self, row):
        return np.float32((to_number(row) - self.head["mean"]) / self.head["std"])

    def loss(self, out, target, weight, smoothing):
        return F.mse_loss(out[:, 0], target)

    def answers(self, rows, examples, outputs) -> list[float]:
        return self.mixed(rows, outputs)[:, 0].tolist()

    def arrays(self, rows, answers):
        return (np.array([to_number(row) for row in rows]),
                np.array(answers, dtype=np.float64) * self.head["std"] + self.head["mean"])

    def table(self, rows, answers):
        return ["label", "prediction"], [[as_cell(row.label), f"{x:.6f}"]
                                         for row, x in zip(rows, self.arrays(rows, answers)[1])]


class Tag(Task):
    metric, scores, by_token = "f1", staticmethod(metrics.tag_scores), True
    long = "read in windows"

    @staticmethod
    def learn(rows, s):
        return {"labels": sorted({tag for row in rows for tag in row.label})}

    def target(self, row) -> np.ndarray:
        """The number of each word's tag."""
        numbers = [0 if row.label is None else self.label_number(row, row.label[w])
                   for w in range(len(row.words))]
        return np.array(numbers, dtype=np.int64)

    def examples(self, rows):
        """A word's tag is that of its first token. A long sentence is read in windows."""
        L, wrap, found = self.head["max_length"], self.tokenizer.wrap, []
        room = L - len(wrap([])[0])
        for i, row in enumerate(rows):
            of_char = np.repeat(np.arange(len(row.words)), [len(word) + 1 for word in row.words])
            ids, spans = self.tokenizer.offsets(row.text)
            tags = self.target(row)
            word = np.array([of_char[max(begin, end - 1)] for begin, end in spans], dtype=np.int64)
            first = np.diff(word, prepend=-1) > 0  # the token that begins a word, with the space before it
            windows = self.windows(len(ids), room)
            self.cut += len(windows) > 1
            for begin, end in windows:
                sequence = wrap(ids[begin:end])
                offset = wrap([-1] * (end - begin))[0].index(-1) if end > begin else 0
                at = np.flatnonzero(first[begin:end])
                words = word[begin:end][at]
                found.append(Example(i, [sequence], tags[words], at + offset, words))
        return found

    def answers(self, rows, examples, outputs):
        """A row's tags, and their log-probabilities (words, K). A word that the tokenizer drops is O."""
        sums = [np.zeros((len(row.words), self.n_out + 1)) for row in rows]
        for example, out in zip(examples, outputs):  # a word in two windows: the mean of both
            np.add.at(sums[example.row], example.spans, np.pad(out, ((0, 0), (0, 1)), constant_values=1))
        found = []
        for total in sums:
            mean = total[:, :-1] / np.maximum(1, total[:, -1:])
            mean[total[:, -1] == 0, self.number.get("O", 0)] = 1.0
            found.append(([self.labels[k] for k in mean.argmax(1)],
                          torch.from_numpy(mean).log_softmax(-1).numpy()))
        return found

    def arrays(self, rows, answers):
        counts = [metrics.tag_counts(row.label, tags) for row, (tags, _) in zip(rows, answers)]
        nats = [-sum(logp[w, self.label_number(row, tag)] for w, tag in enumerate(row.label))
                if logp is not None else math.nan for row, (_, logp) in zip(rows, answers)]
        return np.array(counts), np.array(nats)

    def table(self, rows, answers):
        return ["sentence", "text", "label", "prediction"], [
            [row.id, word, row.label[w] if row.label else "", tags[w]]
            for row, (tags, _) in zip(rows, answers) for w, word in enumerate(row.words)]

    def baselines(self, train, test):
        """The most frequent tag, and for each word the one that it has most often."""
        counts = {}
        for row in train:
            for word, tag in zip(row.words, row.label):
                for key in (word, None):
                    counts.setdefault(key, {}).setdefault(tag, 0)
                    counts[key][tag] += 1
        best = {word: max(tags, key=tags.get) for word, tags in counts.items()}
        return {"majority": [([best[None]] * len(row.words), None) for row in test],
                "most_frequent_of_word": [([best.get(word, best[None]) for word in row.words], None)
                                          for row in test]}


class Answer(Task):
    metric, scores = "f1", staticmethod(metrics.answer_scores)
    long = "read in windows"
    longest = 40  # tokens of an answer

    @staticmethod
    def learn(rows, s):
        lost = sum(begin < 0 for row in rows for _, begin in row.label)
        if lost:
            print(f"({lost} answers do not stand in their text: left out of training)")
        return {"labels": ["first", "last"], "no_answer": any(not row.label for row in rows)}

    def teaches(self, example, row):  # a window without the answer does where there may be none
        return example.target.any() or self.head["no_answer"] and all(begin >= 0 for _, begin in row.label)

    def loss(self, out, target, weight, smoothing):  # without smoothing: most places cannot be an answer
        return F.cross_entropy(out, target)  # (B, T, 2), (B, 2)

    def examples(self, rows):
        """Question and context; a long context in windows. The target is the first and last token of the
        answer, position 0 twice where the window has none."""
        L, wrap, found, known = self.head["max_length"], self.tokenizer.wrap, [], {}
        for i, row in enumerate(rows):
            question = self.tokenizer.encode(row.text)
            self.cut_questions += len(question) > L // 3
            question = question[:L // 3]
            if row.pair not in known:  # many questions to one context
                known[row.pair] = self.tokenizer.offsets(row.pair)
            ids, spans = known[row.pair]
            begins, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
            answer = next(((begin, begin + len(text)) for text, begin in row.label or () if begin >= 0), None)
            inside = np.flatnonzero((ends > answer[0]) & (begins < answer[1])) if answer else np.zeros(0, int)
            windows = self.windows(len(ids), L - len(wrap(question, [])[0]))
            self.cut += len(windows) > 1
            for begin, end in windows:
                sequence = wrap(question, ids[begin:end])
                offset = wrap(question, [-1] * (end - begin))[0].index(-1) if end > begin else 0
                target = np.zeros(2, dtype=np.int64)
                if len(inside) and begin <= inside[0] and inside[-1] < end:
                    target[:] = inside[0] - begin + offset, inside[-1] - begin + offset
                found.append(Example(i, [sequence], target, np.arange(offset, offset + end - begin),
                                     spans[begin:end]))
        return found

    def answers(self, rows, examples, outputs):
        """The best span of all windows, as the context has it, and its probability against no answer."""
        best, none = [(-math.inf, "")] * len(rows), [math.inf] * len(rows)
        for example, out in zip(examples, outputs):
            i, n = example.row, len(example.places)
            none[i] = min(none[i], float(out[0].sum()))
            if n:
                start, end = out[example.places].T
                score = np.triu(start[:, None] + end) - np.tril(np.full((n, n), 1e9), -1)
                score = np.where(np.tri(n, n, self.longest - 1, dtype=bool), score, -1e9)
                a, b = np.unravel_index(score.argmax(), score.shape)
                text = rows[i].pair[example.spans[a][0]:example.spans[b][1]].strip()
                best[i] = max(best[i], (float(score[a, b]), text))
        found = []
        for (score, text), other in zip(best, none):
            p = 1 / (1 + math.exp(min(700.0, other - score)))
            found.append(("" if self.head["no_answer"] and p < 0.5 else text, p))
        return found

    def arrays(self, rows, answers):
        return (np.array([metrics.answer_match(text, [gold for gold, _ in row.label])
                          for row, (text, _) in zip(rows, answers)]),)

    def table(self, rows, answers):
        return ["id", "question", "label", "prediction", "score"], [
            [row.id, row.text, row.label[0][0] if row.label else "", text, f"{p:.6f}"]
            for row, (text, p) in zip(rows, answers)]

    def baselines(self, train, test):
        """The first sentence; a span from anywhere, as long as answers are."""
        rng, first, spans = np.random.default_rng(0), [], []
        lengths = [len(row.label[0][0]) for row in train if row.label] or [1]
        for row in test:
            begin, end = (metrics.sentences(row.pair) or [(0, 0)])[0]
            first.append((row.pair[begin:end].strip(), 1.0))
            length = lengths[rng.integers(len(lengths))]
            begin = rng.integers(max(1, len(row.pair) - length + 1))
            spans.append((row.pair[begin:begin + length], 1.0))
        return {"first_sentence": first, "random_span": spans}


class LM(Task):
    metric, scores, by_token = "loss", staticmethod(metrics.token_scores), True

    @staticmethod
    def learn(rows, s):
        return {"labels": [], "instruct": rows[0].label is not None}

    @property
    def long(self) -> str:
        return "cut there" if self.head["instruct"] else "read in windows"

    def examples(self, rows):
        """A plain text in windows, or the prompt and its response, whose tokens alone count."""
        L, tokenizer, found = self.head["max_length"], self.tokenizer, []
        for i, row in enumerate(rows):
            start = tokenizer.encode(prompt_of(row)) if self.head["instruct"] else []
            ids = start + tokenizer.encode(row.label if self.head["instruct"] else row.text) + [tokenizer.eot]
            self.cut += len(ids) > L + 1
            step = len(ids) if self.head["instruct"] else L
            for begin in range(0, max(1, len(ids) - 1), step):
                window = ids[begin:begin + L + 1]
                places = np.arange(max(0, len(start) - 1), len(window) - 1)
                found.append(Example(i, [(window[:-1] or window, [0] * max(1, len(window) - 1))],
                                     np.array(window, dtype=np.int64)[places + 1], places))
        return found

    def summary(self, out, target):  # (n, V) -> (n, 2): of logits nothing else is kept
        nats = F.cross_entropy(out, target, reduction="none")
        return torch.stack((nats, (out.argmax(-1) == target).float()), dim=1)

    def answers(self, rows, examples, outputs):
        sums = np.zeros((len(rows), 3))
        for example, out in zip(examples, outputs):
            sums[example.row] += [*out.sum(0), len(out)]
        return list(sums)

    def arrays(self, rows, answers):
        return (np.stack(answers),)

    def table(self, rows, answers):
        return ["text", "label", "loss", "tokens"], [
            [row.text, as_cell(row.label), f"{nats / max(1, n):.6f}", int(n)]
            for row, (nats, _, n) in zip(rows, answers)]


TASKS = {"classify": Classify, "regress": Regress, "tag": Tag, "qa": Answer, "lm": LM}


def one_label(row: Row) -> str:
    if isinstance(row.label, list):
        raise UserError(f"{row.where}: a list of labels, {row.label}: that is for --multi_label")
    if not row.label:
        raise UserError(f"{row.where}: its label is empty: give it one, or leave the row out")
    return row.label


def split_labels(label) -> list[str]:
    labels = label if isinstance(label, list) else label.split("|")
    return [str(one).strip() for one in labels if one is not None and str(one).strip()]


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def to_number(row: Row) -> float:
    if row.label is None:
        return 0.0
    if not is_number(row.label):
        raise UserError(f"{row.where}: label {row.label!r}: a number is wanted (--task=classify for names)")
    return float(row.label)


def as_cell(label) -> str:
    return "" if label is None else "|".join(map(str, label)) if isinstance(label, list) else label


def as_csv(rows: list) -> str:
    """A line each. A carriage return is quoted like a line break: to csv.reader it is one."""
    lines = []
    for row in rows:
        line = io.StringIO(newline="")
        csv.writer(line, lineterminator="\r\n").writerow(row)  # what is in it is quoted in a cell
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def prompt_of(row: Row) -> str:
    """An instruction as the model is trained to read it (the layout of Stanford's Alpaca, shortened)."""
    return f"### Instruction:\n{row.text}\n\n" + (f"### Input:\n{row.pair}\n\n" if row.pair else "") + (
        "### Response:\n")
