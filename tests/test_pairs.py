"""
Settings of a training in pairs: what each alone learns, two together learn too, or they are refused by name.

    SLOW=all python -m pytest tests/test_pairs.py    all pairs of all tasks; otherwise a sample of them
"""
import itertools
import json
import os
import random

import numpy as np
import pytest

import finetune
import sample
from config import SettingError
from lib import report
from lib import run as run_module
from tests.helpers import QUICK, says, tune, write_rows

SETTINGS = {
    "class_weight": "balanced", "label_smoothing": 0.3, "token_dropout": 0.1, "l1": 1e-4, "l2": 1e-3,
    "freeze": True, "lora_rank": 4, "sparsity": 0.3, "teacher": None, "batch_size_end": 32, "folds": 5,
    "multi_label": True, "max_length": 24,
}
USELESS = {  # a task, and the settings that it must refuse; lm has no head of its own that freeze could leave
    "classify": (),
    "regress": ("class_weight", "label_smoothing", "teacher", "multi_label"),
    "tag": ("class_weight", "teacher", "multi_label"),
    "qa": ("class_weight", "label_smoothing", "teacher", "multi_label"),
    "lm": ("class_weight", "teacher", "multi_label", "freeze"),
}
HOW = (*QUICK, "--epochs=8", "--learning_rate=1e-2", "--init=zero_out", "--norm_embd",
       "--eval_interval=10000", "--log_interval=10000")
REFUSED = {("freeze", "lora_rank"), ("freeze", "sparsity"), ("lora_rank", "sparsity"),
           ("teacher", "multi_label")}
CASES = [(task, *pair) for task in USELESS for pair in itertools.combinations(SETTINGS, 2)]
CASES += [(task, name, name) for task in USELESS for name in SETTINGS]  # alone
if os.environ.get("SLOW") != "all":
    some = random.Random(0).sample(CASES, 20 if os.environ.get("SLOW") else 5)
    CASES = [("classify", "class_weight", "label_smoothing"), *some]


# -----------------------------------------------------------------------------
# Toys: one word tells. The rare class is one in 8: so rare that with this label_smoothing, multiplied by
# another class's weight, it would be called always.

def fillers(rng, n=3):
    return [f"w{i}" for i in rng.integers(6, size=n)]


def mixed(rng, word):
    return " ".join(rng.permutation([word, *fillers(rng)]))


def classify(rng, n):
    kinds = ["rare" if i % 8 == 0 else "often" for i in range(n)]
    return [mixed(rng, {"rare": "zz", "often": "aa"}[kind]) for kind in kinds], kinds


def regress(rng, n):
    numbers = rng.integers(5, size=n).tolist()
    return [mixed(rng, "n" * (number + 1)) for number in numbers], numbers


def tag(rng, n):
    rows = [rng.permutation([("Rome", "B-x"), *((word, "O") for word in fillers(rng))]) for _ in range(n)]
    return [" ".join(row[:, 0]) for row in rows], [" ".join(row[:, 1]) for row in rows]


def lm(rng, n):
    """What follows a letter is always the same; how many there are is not."""
    sizes = zip(rng.integers(8, size=n), rng.integers(8, 40, size=n))
    return [" ".join("abcdefgh"[(start + i) % 8] for i in range(size)) for start, size in sizes]


def qa(rng, n):
    """As SQuAD has it: the context's only word with a double letter."""
    found = []
    for i in range(n):
        answer = ("aa", "bb", "cc")[i % 3]
        context = mixed(rng, answer)
        asked = {"id": str(i), "question": "which?",
                 "answers": [{"text": answer, "answer_start": context.index(answer)}]}
        found.append({"title": f"t{i}", "paragraphs": [{"context": context, "qas": [asked]}]})
    return json.dumps({"data": found})


TOYS = {  # a task's rows, the metric that must reach 0.9, and settings
    "classify": (classify, "f1_macro", ()), "regress": (regress, "spearman", ()), "tag": (tag, "f1", ()),
    "qa": (qa, "f1", ()), "lm": (lm, "accuracy", ("--causal=True", "--tied")),
}


def toy(folder, task) -> list[str]:
    """Writes the three files. Returns the settings that name them."""
    made, files = TOYS[task][0], []
    for which, n, seed in (("", 192, 0), ("_val", 32, 1), ("_test", 64, 2)):
        rows, path = made(np.random.default_rng(seed), n), folder / f"{task}{which}"
        if task == "qa":
            path = path.with_suffix(".json")
            path.write_text(rows, encoding="utf-8")
        elif task == "lm":
            path = path.with_suffix(".txt")
            path.write_text("\n\n".join(rows), encoding="utf-8")
        else:
            path = write_rows(path.with_suffix(".csv"), ("text", "label"), *rows)
        files.append(f"--data{which}={path}")
    return files


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """task -> (the settings that name its files, the folder of a model that has learned it)."""
    folder, made = tmp_path_factory.mktemp("pairs"), {}

    def of(task):
        if task not in made:
            files = toy(folder, task)
            found = tune(folder / task, f"--task={task}", *files, *HOW, *TOYS[task][2])
            assert found[TOYS[task][1]] > 0.9, (task, found)
            made[task] = files, folder / task
        return made[task]
    return of


def scores_alone(run, rows, *_):
    """In place of the report, which takes longer than the training."""
    model = sample.load(run.folder)[0]
    answers = finetune.predict(model, rows.test)
    found = model.task.scores(*model.task.arrays(rows.test, answers))
    run_module.write_json(run.folder / "metrics.json", found)
    found |= {"baselines": {}, **{f"{name}_ci95": None for name in found}}
    return finetune.Tested(model.task, rows.test, answers, found)


@pytest.mark.parametrize("task, one, other", CASES)
def test_what_two_settings_learn_alone_they_learn_together(task, one, other, learned, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "report", scores_alone)
    monkeypatch.setattr(report, "pooled", lambda *_: [])
    monkeypatch.setattr(run_module, "plot_losses", lambda *_: None)
    files, body = learned(task)
    pair = {one, other}
    args = [f"--{name}={body if name == 'teacher' else SETTINGS[name]}" for name in sorted(pair)]
    args += files[:1] if "folds" in pair else files
    args += [f"--init_from={body}"] if pair & {"freeze", "lora_rank"} else []
    args += [f"--task={task}", *HOW, *TOYS[task][2]]
    useless = pair & set(USELESS[task])
    if useless or (one, other) in REFUSED:
        with pytest.raises(SettingError) as error:
            tune(tmp_path / "out", *args)
        assert any(name in str(error.value) for name in useless or pair)
        says(error)
    else:
        found = tune(tmp_path / "out", *args)
        assert found[TOYS[task][1]] > 0.9, found
