"""
How do time and memory grow with the work? Each part of the project does three sizes of it, on made data.

    python -m tools.bench growth                      all parts, in under ten minutes
    python -m tools.bench growth --part=bootstrap     one of them, or several, with commas
    python -m tools.bench growth --full               as large as the work gets, for RESULTS.md: hours

Of each part the table has the seconds and the peak memory at its largest size, and the exponents with which
both grow: 1 is in step with the work, and n log n counts as 1. They come from the differences between the
sizes, so what every size costs does not count. Seconds are the processor's, so what else the machine does
counts little. Exit status 1 if one is above 1.1, if memory grows in a part that streams, or if a part fails.

The parts, with their largest sizes, and what they may hold in memory:
"""
from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

# before torch: Ctrl-C is silent from here on
from config import SettingError, UserError, configure

import numpy as np
import torch

import finetune
import prepare
import sample
from lib import intervals, metrics, pictures, run
from lib.report import write_predictions
from lib.rows import Row
from lib.tasks import TASKS
from lib.tokenizer import make_tokenizer
from model import Config, Transformer
from tools import explain, search

# -----------------------------------------------------------------------------
# Settings
part: str = ""  # which parts, with commas; empty: all
full: bool = False  # the sizes of RESULTS.md
# -----------------------------------------------------------------------------

LIMIT = 1.1  # of the exponents
FLAT = 0.6  # of memory in a part that streams: buffers fill up, what is held grows by 1
STEP = 4  # from one size to the next
SHORT = 2.0  # seconds: what takes less is done twice
TRIES = 5  # at most, until a part is as it should be: of each size the least counts, for the rest is noise
LEAST = {"seconds": 0.1, "megabytes": 16}  # smaller differences are noise


# -----------------------------------------------------------------------------
# Made data

SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
WORDS = ["".join(three) for three in itertools.product(SYLLABLES, repeat=3)][:50_000]


def words(n: int, seed: int = 0) -> list[str]:
    """n words, few of them often and many of them seldom."""
    numbers = np.random.default_rng(seed).zipf(1.2, n) % len(WORDS)
    return [WORDS[i] for i in numbers.tolist()]


def english(n: int, seed: int = 0) -> str:
    """n characters."""
    return " ".join(words(n // 7 + 1, seed))[:n - 1] + "\n"


def chinese(n: int, seed: int = 0) -> str:
    """n characters, in clauses of some ten."""
    rng = np.random.default_rng(seed)
    points = 0x4E00 + rng.zipf(1.2, n) % 3000
    points[rng.random(n) < 0.1] = ord("\uff0c")
    return "".join(map(chr, points))


def pieces(n: int, write: Callable = english) -> Iterator[str]:
    """n characters, a part at a time."""
    for seed, begin in enumerate(range(0, n, 10**6)):
        yield write(min(10**6, n - begin), seed)


def texts(n: int) -> Iterator[str]:
    """n short texts."""
    for seed, begin in enumerate(range(0, n, 10_000)):
        found = iter(words(12 * 10_000, seed))
        for _ in range(min(10_000, n - begin)):
            yield " ".join(itertools.islice(found, 12))


def written(file: Path, parts: Iterator[str]) -> str:
    with open(file, "w", encoding="utf-8") as f:
        f.writelines(parts)
    return str(file)


# Each is of a size and an empty folder, and returns the path of what it writes there

def one_text(n: int, folder: Path) -> str:
    return written(folder / "one.txt", pieces(n))


def one_line(n: int, folder: Path) -> str:
    """A single JSON object of n characters, and some short ones."""
    text = (piece.strip() for piece in pieces(n))
    rest = '"}\n' + '{"text": "and another"}\n' * 20
    return written(folder / "one.jsonl", itertools.chain(['{"text": "'], text, [rest]))


def table(n: int, folder: Path, labels: int = 2) -> str:
    lines = (f"{text},label{i % labels}\n" for i, text in enumerate(texts(n)))
    return written(folder / "rows.csv", itertools.chain(["text,label\n"], lines))


def new_texts(n: int, folder: Path) -> str:
    return written(folder / "new.csv", itertools.chain(["text\n"], (text + "\n" for text in texts(n))))


def tagged(n: int, folder: Path) -> str:
    return written(folder / "rows.conll", (text.replace(" ", " O\n") + " B-END\n\n" for text in texts(n)))


def jsonl(rows_of: Callable) -> Callable:
    return lambda n, folder: written(folder / "rows.jsonl", (json.dumps(row) + "\n" for row in rows_of(n)))


def files(texts_of: Callable) -> Callable:
    def write(n, folder):
        for i, text in enumerate(texts_of(n)):
            written(folder / f"{i}.txt", [text])
        return str(folder)
    return write


def labelled(n):
    for i, text in enumerate(texts(n)):
        yield {"text": text, "label": f"label{i % 2}"}


def instructions(n):
    for text in texts(n):
        yield {"instruction": text[:30], "output": text}


def questions(n):
    for i, text in enumerate(texts(n)):
        answer = {"text": [text[:6]], "answer_start": [0]}
        yield {"question": f"what is {i}?", "context": text, "answers": answer}


def near_copies(n):
    """Every tenth twice, but for a word."""
    for i, text in enumerate(texts(n)):
        yield {"text": text}
        if i % 10 == 0:
            yield {"text": text + " again"}


def hostile(n):
    """What begins, and does not end, again and again."""
    for thing in ("<!--", "<a ", "<", "</", "<?", "<script>", "&", "-----BEGIN PRIVATE KEY-----", "a.", "a@",
                  "a:", "1 ", "1.", "(", "+-", "@", "eyJ", " ", "\n", "e\u0301", "a", "\u200b"):
        yield thing * (n // len(thing))


def outputs(n: int, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """True classes and probabilities, (n,) and (n, labels)."""
    rng = np.random.default_rng(0)
    y = rng.integers(labels, size=n)
    logits = rng.standard_normal((n, labels))
    logits[np.arange(n), y] += 1
    probs = np.exp(logits)
    return y, probs / probs.sum(1, keepdims=True)


COLUMNS = {"text": "text", "label": "label", "header": True, "unused": []}  # as a checkpoint keeps them


def classifier(labels: int = 2):
    head = {"task": "classify", "labels": [f"label{k}" for k in range(labels)], "several": False, "space": "",
            "paired": False, "apart": False, "pool": "mean", "max_length": 2048, "columns": COLUMNS}
    return TASKS["classify"](head, make_tokenizer("bytes", [], 0))


def tuned(**fields) -> finetune.Tuned:
    """A classifier with random weights."""
    torch.manual_seed(0)
    body = Transformer(Config(**fields, block_size=2048, vocab_size=258, causal=False, head="none"))
    return finetune.Tuned(body, classifier()).eval()


# -----------------------------------------------------------------------------
# The parts. Of a size and an empty folder each makes its data, and returns what is to be measured.

def prepares(write: Callable, tokenizer: str = "bytes", **settings) -> Callable:
    def make(n, folder):
        (folder / "source").mkdir()
        return partial(prepare.prepare, "made", source=write(n, folder / "source"), root=folder / "data",
                       tokenizer=tokenizer, **settings)
    return make


def prepares_by_hub(n, folder):
    make_tokenizer("bpe", [english(10**5)], 500).save_pretrained(folder, 128)
    return prepares(one_text, str(folder))(n, folder)


def starts(write: Callable, task: str, *more: str) -> Callable:
    """finetune.py up to its first step."""
    def make(n, folder):
        settings = [f"--data={write(n, folder)}", f"--task={task}", f"--causal={task == 'lm'}", *more,
                    f"--out_dir={folder / 'out'}", "--max_minutes=1e-9", "--device=cpu", "--n_layer=1",
                    "--n_head=1", "--n_embd=16", "--block_size=64", "--vocab_size=2000"]

        def start():
            with contextlib.suppress(SystemExit):  # its time is over
                finetune.main(configure(vars(finetune), Config, settings, None))
        return start
    return make


def learns_bpe(write: Callable) -> Callable:
    return lambda n, folder: partial(make_tokenizer, "bpe", list(pieces(n, write)), 4096)


def baselines(n, folder=None, labels=2):
    rows = [Row(f"row {i}", text, label=f"label{i % labels}") for i, text in enumerate(texts(n))]
    return partial(classifier(labels).baselines, rows, rows[:n // 10])


def bootstrap(n, folder=None, labels=4):
    return partial(intervals.with_intervals, classifier(labels), outputs(n, labels))


def groups(n, folder):
    """Groups of 20 rows."""
    names = [f"group {i % n}" for i in range(20 * n)]
    return partial(intervals.by_group, classifier(), outputs(20 * n, 2), names)


def report(n, folder):
    return partial(metrics.report, folder, *outputs(n, 20), [f"label{k}" for k in range(20)])


def predictions(n, folder):
    model, (_, probs) = classifier(n), outputs(1000, n)
    rows = [Row(f"row {i}", f"text {i}", label="label0") for i in range(1000)]
    return partial(write_predictions, folder / "predictions.csv", model, rows, list(probs), {})


def predicting(n, folder):
    model = tuned(n_layer=1, n_head=1, n_embd=16)
    return partial(sample.answer_file, model, new_texts(n, folder), run.Machine("cpu"))


def explaining(n, folder):
    """The page about a text of n words, by a classifier of 4 x 4 heads."""
    model = tuned(n_layer=4, n_head=4, n_embd=32)

    def page():
        case = explain.of_a_task(model, " ".join(words(n)), "", "")
        json.dumps(explain.look_inside(model.body, model.task.tokenizer, case, False))
    return page


def log_file(n, folder):
    lines = (json.dumps({"iter": i, "loss": 1 / i, "val_loss": 2 / i}) + "\n" for i in range(1, n))
    return Path(written(folder / "log.jsonl", lines))


def picture(n, folder):
    return partial(pictures.plot_losses, log_file(n, folder), folder / "loss.png")


def watching(n, folder):
    """tools.search looks at a trial's log a hundred times."""
    curve = search.Curve(log_file(n, folder), "val_loss")
    return lambda: [curve.grown() for _ in range(100)]


def grid(n, folder, method="grid"):
    """The next trial of a search, after n."""
    space = search.Space(list(range(n + 1))) if method == "grid" else search.Space([], 0, 2 * n)
    rows = [{"settings": {"x": i}, "state": "done", "value": float(i % 7), "curve": []} for i in range(n)]
    return partial(search.propose, method, {"x": space}, rows, min, 0)


class Part(NamedTuple):
    make: Callable  # (size, empty folder) -> what is measured
    unit: str
    quick: int  # the largest of the sizes
    full: int
    holds: str  # what is in memory; empty: it streams, and memory must not grow


PARTS = {
    "start": Part(starts(table, "classify"), "labelled rows", 128_000, 10**6, "rows and ids"),
    "start_jsonl": Part(starts(jsonl(labelled), "classify"), "rows", 64_000, 300_000, "rows and ids"),
    "start_folds": Part(starts(table, "classify", "--folds=5"), "rows", 64_000, 300_000, "rows and ids"),
    "start_labels": Part(lambda n, at: starts(partial(table, labels=n), "classify")(30 * n, at),
                         "labels of 30 rows", 3000, 10_000, "rows and ids"),
    "start_tags": Part(starts(tagged, "tag"), "sentences", 16_000, 300_000, "rows and ids"),
    "start_questions": Part(starts(jsonl(questions), "qa"), "questions", 16_000, 300_000, "rows and ids"),
    "start_instructions": Part(starts(jsonl(instructions), "lm"), "rows", 16_000, 300_000, "rows and ids"),
    "baselines": Part(baselines, "labelled rows", 16_000, 10**6, "the words of each row"),
    "baselines_labels": Part(lambda n, at: baselines(10_000, labels=n),
                             "labels in 10,000 rows", 400, 10_000, "words x labels"),
    "bootstrap": Part(bootstrap, "rows of 4 labels", 16_000, 10**6, "the rows"),
    "bootstrap_labels": Part(lambda n, at: bootstrap(10_000, labels=n),
                             "labels in 10,000 rows", 400, 10_000, "rows x labels"),
    "groups": Part(groups, "groups of 20 rows", 320, 1000, "the rows"),
    "report": Part(report, "rows of 20 labels", 128_000, 10**6, "the rows"),
    "predictions": Part(predictions, "labels in 1,000 rows", 2000, 10_000, "a row's"),
    "predict": Part(predicting, "rows without a label", 64_000, 10**6, ""),
    "explain": Part(explaining, "words", 64, 256, "one text"),
    "picture": Part(picture, "rows of the log", 160_000, 600_000, "the log"),
    "watch": Part(watching, "rows of the log", 512_000, 10**6, "one metric"),
    "grid": Part(grid, "trials", 64_000, 10**6, "the trials"),
    "bayes": Part(partial(grid, method="bayes"), "trials", 8_000, 40_000, "the trials"),
    "prepare": Part(prepares(one_text), "bytes of one text", 64 * 10**6, 10**9, ""),
    "prepare_line": Part(prepares(one_line), "bytes in a JSON line", 96 * 10**6, 3 * 10**8, "a line"),
    "prepare_rows": Part(prepares(jsonl(labelled)), "documents", 64_000, 10**6, "some numbers of each"),
    "prepare_files": Part(prepares(files(texts)), "files", 8_000, 10**5, "some numbers of each"),
    "near_copies": Part(prepares(jsonl(near_copies), near_duplicates=0.6),
                        "documents", 16_000, 10**6, "a sketch of each"),
    "clean": Part(prepares(files(hostile), html=True, scrub_pii=True, repeated_lines=True, nfc=True),
                  "hostile characters", 256_000, 10**7, "a document"),
    "hub": Part(prepares_by_hub, "bytes, by a Hugging Face tokenizer", 8 * 10**6, 10**8, ""),
    "bpe": Part(learns_bpe(english), "bytes", 16 * 10**6, 3 * 10**8, "the words"),
    "bpe_chinese": Part(learns_bpe(chinese), "Chinese characters", 2 * 10**6, 10**8, "the words"),
}
__doc__ += "".join(f"  {name:20} {one.quick:11,} (full: {one.full:13,}) {one.unit}; "
                   f"{'holds ' + one.holds if one.holds else 'streams'}\n" for name, one in PARTS.items())


# -----------------------------------------------------------------------------
# Measure

def once(name: str, n: int) -> dict:
    """The processor's seconds, the clock's, and the peak megabytes of this process so far."""
    with tempfile.TemporaryDirectory() as folder:
        work = PARTS[name].make(n, Path(folder))
        with contextlib.suppress(OSError):  # Linux can forget the peak of making the data
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before, began = os.times(), time.perf_counter()
        with open(os.devnull, "w", encoding="utf-8") as nothing:
            with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
                work()
        clock = time.perf_counter() - began
        seconds = sum(os.times()[:4]) - sum(before[:4])  # of processes that it started, too
        return {"seconds": seconds, "clock": clock, "megabytes": run.peak_memory() / 1e6}


def end_with_parent() -> None:
    """Of a process that measures, for one that is killed takes none with it."""
    def wait():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def measured(name: str, sizes: list[int]) -> list[dict]:
    """What each size takes, from the smallest on, in a process of their own."""
    with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as pool:
        pool.submit(once, name, sizes[0]).result()  # to warm up
        found = []
        for n in sizes:
            found.append(pool.submit(once, name, n).result())
            if found[-1]["seconds"] < SHORT:
                again = pool.submit(once, name, n).result()
                found[-1]["seconds"] = min(found[-1]["seconds"], again["seconds"])
        return found


def exponent(sizes: list[int], values: list[float], least: float) -> float:
    """Of three sizes: 1 if the difference between two values is as that between their n log n. If the second
    has less than the first, no such law holds, and the values themselves are taken."""
    work = [n * math.log(n) for n in sizes]
    first, second = (b - a for a, b in itertools.pairwise(values))
    if second <= least:
        return 0.0
    if first < 0:
        return math.log(values[2] / values[0]) / math.log(work[2] / work[1])
    return math.log(second / max(first, least)) / math.log((work[2] - work[1]) / (work[1] - work[0]))


def grow(name: str) -> bool:
    """Measure a part and print its row. Is it as it should be?"""
    one = PARTS[name]
    largest = one.full if full else one.quick
    sizes = [largest // STEP**2, largest // STEP, largest]
    print(f"| {name} | {largest:,} {one.unit} |", end="", flush=True)
    best = []
    for _ in range(TRIES):
        try:
            found = measured(name, sizes)
        except Exception as error:  # whatever a part may fail with
            print(f" {type(error).__name__}: {error} | | | |", flush=True)
            return False
        best = [{kind: min(a[kind], b[kind]) for kind in a} for a, b in zip(best or found, found)]
        time_by, memory_by = (exponent(sizes, [row[kind] for row in best], least)
                              for kind, least in LEAST.items())
        fine = time_by <= LIMIT and memory_by <= (LIMIT if one.holds else FLAT)
        if fine:
            break
    print(f" {best[-1]['clock']:.1f} s | {best[-1]['megabytes']:,.0f} MB | {time_by:.2f} | {memory_by:.2f} |"
          f"{'' if fine else ' <- too fast'}", flush=True)
    return fine


def main():
    names = part.split(",") if part else list(PARTS)
    for name in names:
        if name not in PARTS:
            raise SettingError(f"--part={name}: must be one of {', '.join(PARTS)}")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    print("| part | work | time | memory | time grows by | memory by |\n" + "|---" * 6 + "|", flush=True)
    bad = [name for name in names if not grow(name)]
    if bad:
        raise UserError(f"{', '.join(bad)}: grows faster than its work, or failed; alone: --part={bad[0]}")
