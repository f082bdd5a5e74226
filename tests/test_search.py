"""The search for settings."""
import contextlib
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

import config
import model
import train
from config import SettingError
from tests.helpers import QUICK, ROOT, TOY, one_line, posix, script, slow
from tools import search

STUB = '''
"""A script of which the best settings are known: x = 1e-3, n = 4, kind = a."""
from __future__ import annotations
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional
from config import UserError, above, at_least, launch
out_dir: str = "out"  # where to
x: above(0.0) = 0.1  # by factors
n: at_least(1) = 3  # whole
kind: Literal["a", "b"] = "a"  # one of two
wait: float = 0.0  # seconds a step
folds: int = 0  # trainings, each in a folder of its own

@dataclass
class Fields:
    top_k: Optional[int] = None  # unused

def main(fields):
    if n == 5:
        raise UserError("n=5: it fails, as promised")
    loss = (math.log10(x) + 3) ** 2 + 0.1 * (n - 4) ** 2 + (kind == "b")
    for k in range(1, 1 + folds) if folds else [0]:
        folder = Path(out_dir) / (f"fold{k}" if k else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ckpt.pt").write_text("large")
        with open(folder / "log.jsonl", "w", encoding="utf-8") as f:
            for i in range(1, 5):
                row = {"iter": i, "val_loss": loss + 1 / i + k, "val_accuracy": -loss, "val_speed": n,
                       "val_odd": math.nan}
                print(json.dumps({"iter": i, "loss": -9.0, "accuracy": 9.0}), file=f)  # of a training batch
                print(json.dumps(row), file=f, flush=True)
                time.sleep(wait if loss > 1 else 0)
    test = {"accuracy": n / 10, "loss": -9.0}
    (Path(out_dir) / "metrics.json").write_text(json.dumps(test))

if __name__ == "__main__":
    launch(main, globals(), Fields)
'''


@pytest.fixture
def stub(tmp_path, monkeypatch, capsys):
    """python -m tools.search stub.py ..., without waiting for a process of its own."""
    (tmp_path / "stub.py").write_text(STUB, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delitem(sys.modules, "tools.search")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["search.py", "stub.py", *words])
        status = 0
        try:
            runpy.run_module("tools.search", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=said.out, stderr=said.err)
    return run


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_text(path) -> str:
    return path.read_text(encoding="utf-8")


def search_rows(folder) -> list[dict]:
    return read_rows(folder / "out/search/search.jsonl")[1:]  # the first says which search it is


def test_a_search_is_a_table_with_a_winner(stub, tmp_path):
    words = ("base.py", "x=1e-5,1e-3", "n=4..6", "kind=a,b", "--method=grid")
    (tmp_path / "base.py").write_text("top_k = 7\nkind = 'b'\n")
    assert stub(*words, "--trials=3").returncode == 0
    assert len(search_rows(tmp_path)) == 3
    # goes on, to the end of the grid, in a process of its own
    done = script("tools/search.py", "stub.py", *words, "--trials=50", cwd=tmp_path)
    assert done.returncode == 0 and "going on after 3" in done.stdout and "every combination" in done.stdout
    rows = search_rows(tmp_path)
    points = [tuple(row["settings"].values()) for row in rows]
    assert sorted(points) == [(x, n, kind) for x in (1e-5, 1e-3) for n in (4, 5, 6) for kind in "ab"]
    for row in rows:  # a crash is a row, and ends nothing
        x, n, kind = row["settings"].values()
        assert type(n) is int and (row["state"] == "failed") == (n == 5)
        assert "as promised" in row["note"] if n == 5 else row["curve"][-1] == [4, row["value"]]
    shown = [line.split() for line in done.stdout.splitlines() if re.match(r" +\d+ ", line)]
    assert len(shown) == 12 and shown[0][1:5] == ["0.2500", "0.001", "4", "a"] and shown[-1][1] == "failed"
    # the winner runs as it is, with what the others shared, and is the only one whose checkpoint is kept
    assert [path.parent.name for path in tmp_path.glob("out/search/*/ckpt.pt")] == [shown[0][0]]
    assert script(sys.executable, "stub.py", "out/search/best.py", cwd=tmp_path).returncode == 0
    assert read_rows(tmp_path / "out/search/best/log.jsonl")[-1]["val_loss"] == 0.25
    assert "top_k = 7" in (tmp_path / "out/search/best.py").read_text(encoding="utf-8")
    if find_spec("matplotlib"):
        assert (tmp_path / "out/search/search.png").read_bytes()[1:4] == b"PNG"
    one_line(stub(*words[:-2], "--method=grid"), 2, "search.jsonl", "another search", "--out_dir")


def test_a_hopeless_trial_is_stopped(stub, tmp_path):
    done = stub("x=1e-3,2e-3,3e-3,1e-1", "--method=grid", "--prune_after=3", "--wait=5")
    assert done.returncode == 0, done.stderr
    rows = search_rows(tmp_path)
    assert [row["state"] for row in rows] == ["done"] * 3 + ["pruned"] and rows[3]["seconds"] < 10
    other = [[1, 2.0], [2, 1.0]]
    assert search.hopeless([[1, 3.0]], [other], min) and not search.hopeless([[1, 3.0]], [other], max)
    assert not search.hopeless([[1, 2.0]], [other], min)
    assert not search.hopeless([[1, 3.0]], [[[2, 1.0]]], min)  # the other looked later


@pytest.mark.parametrize(
    "words, status, named",
    [((), 2, ["nothing to search"]), (("y=1,2",), 2, ["y=1,2", "'y'"]), (("n=1,2.5",), 2, ["int", "2.5"]),
     (("kind=a..b",), 2, ["low..high"]), (("x=3..1",), 2, ["x=3..1"]), (("n=0..9",), 2, ["at least 1", "0"]),
     (("x=1,2", "--n=0"), 2, ["at least 1", "0"]), (("x=1,2", "--trials=0"), 2, ["--trials", "at least 1"]),
     (("x=1,2", "--trails=3"), 2, ["--trails"]),
     (("x=1,2", "x=3,4"), 2, ["x=3,4: is given twice"]), (("out_dir=a,b",), 2, ["each trial has its own"]),
     (("x=1,2", "--metric=speed"), 2, ["--metric=speed", "--goal=min"]),
     (("x=1,2", "--metric=f1_error"), 2, ["--metric=f1_error", "--goal=max"]),
     (("x=1,2", "--metric=f1", "--trials=1", "--method=random"), 1, ["no trial", "output.txt"])],
)
def test_what_a_search_refuses(stub, words, status, named):
    one_line(stub(*words), status, *named)


@pytest.mark.parametrize("asked, value, told", [
    (("--metric=loss",), 0.25, "loss -9"), (("--metric=val_accuracy",), 0.0, "accuracy 0.4"),
    (("--metric=speed", "--goal=max"), 6, ""), (("--metric=speed", "--goal=min"), 4, "")])
def test_the_validation_data_chooses_and_the_test_is_told_once(stub, tmp_path, asked, value, told):
    """Neither the loss of a training batch nor a test's accuracy, which are better, is taken for it."""
    done = stub("n=6,4", "x=1e-3", "--method=grid", *asked)
    assert done.returncode == 0, done.stderr
    assert "of the validation data" in done.stdout.splitlines()[0]
    rows = {row["settings"]["n"]: row for row in search_rows(tmp_path)}
    best = rows[6 if value == 6 else 4]
    assert best["value"] == value
    assert f"trial {best['trial']} of 2" in read_text(tmp_path / "out/search/best.py")
    assert done.stdout.count("on the test") == bool(told) and done.stdout.splitlines()[-1].endswith(told)


def test_another_goal_is_another_winner_of_the_same_trials(stub, tmp_path):
    for goal, n in (("max", 6), ("min", 4)):
        assert stub("n=6,4", "x=1e-3", "--method=grid", "--metric=speed", f"--goal={goal}").returncode == 0
        assert f"n = {n}\n" in read_text(tmp_path / "out/search/best.py")


def test_a_trial_with_folds_is_as_good_as_they_are_on_average(stub, tmp_path):
    done = stub("n=6,4", "x=1e-3", "--folds=3", "--method=grid")
    assert done.returncode == 0, done.stderr
    values = {row["settings"]["n"]: row["value"] for row in search_rows(tmp_path)}
    assert values == {4: pytest.approx(0.25 + 2), 6: pytest.approx(0.4 + 0.25 + 2)}  # of 1, 2 and 3
    assert [path.parent.parent.name for path in tmp_path.glob("out/search/*/fold1/*.pt")] == ["2"]
    assert done.stdout.splitlines()[-1].endswith("loss -9")


@pytest.mark.parametrize("content", ["", "[]\n", "{}\n[1]\n", '{}\n{"trial": 1}\n', "{}\n{\n", "\xff\n"])
def test_a_damaged_search_is_said(stub, tmp_path, content):
    (tmp_path / "out/search").mkdir(parents=True)
    (tmp_path / "out/search/search.jsonl").write_text(content, encoding="latin-1")
    one_line(stub("x=1,2"), 2, "search.jsonl", "--out_dir")


@pytest.mark.parametrize("name, value", [
    ("trial", ".."), ("settings", []), ("value", "x"), ("seconds", None)])
def test_a_trial_of_other_types_is_damaged(tmp_path, name, value):
    """Whose number is a folder, of which the checkpoints are removed if others are better."""
    row = {"trial": 1, "settings": {}, "state": "done", "value": 1.0, "note": "", "seconds": 1, "curve": []}
    for is_damaged in (False, True):
        (tmp_path / "search.jsonl").write_text(f"{{}}\n{json.dumps(row)}\n", encoding="utf-8")
        with pytest.raises(SettingError, match="damaged") if is_damaged else contextlib.nullcontext():
            search.read_rows(tmp_path / "search.jsonl", {})
        row[name] = value


def test_what_a_search_leaves_out_is_said(stub, tmp_path):
    done = stub("n=1,2,3", "x=1e-3,1e-2", "--method=grid", "--trials=4")
    assert "6 combinations, of which --trials=4 are tried at most" in done.stdout
    assert len(search_rows(tmp_path)) == 4
    done = stub("n=3,4", "--metric=odd", "--goal=min", "--trials=1", "--method=random", "--out_dir=out/odd")
    assert "val_odd was never a finite number" in done.stdout


def test_a_log_is_read_once_and_what_is_no_row_is_passed_over(tmp_path):
    log = tmp_path / "log.jsonl"
    curve = search.Curve(log, "val_loss")
    assert not curve.grown()
    log.write_bytes(b'{"iter": 1, "val_loss": 2}\n\xff\n[1]\n{"iter": 2, "val_loss": NaN}\n{"iter": 3, "val')
    assert curve.grown() and curve.points == [[1, 2]]
    offset = curve.offset
    with open(log, "ab") as f:
        f.write(b'_loss": 1.0, "val_bpb": 3}\n')
    assert curve.grown() and curve.points == [[1, 2], [3, 1.0]] and not curve.grown()
    assert curve.offset == log.stat().st_size > offset and list(curve.seen) == ["val_loss", "val_bpb"]


@posix
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM", "SIGHUP"])
def test_a_search_that_is_killed_leaves_no_trial_running(number, stub, tmp_path):
    command = [sys.executable, "-m", "tools.search", "stub.py", "x=1.0", "--wait=99", "--method=grid"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "out/search/1/log.jsonl"
    wait_until(lambda: log.exists() and log.stat().st_size)
    (trial,) = children(process.pid)
    process.send_signal(getattr(signal, number))
    process.wait(20)
    wait_until(lambda: not alive(trial))


def wait_until(true):
    for _ in range(300):
        if true():
            return
        time.sleep(0.1)
    raise TimeoutError


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@slow
@pytest.mark.parametrize("name, folds", [("train.py", 0), ("finetune.py", 0), ("finetune.py", 3)])
def test_both_trainings_are_searched_by_their_validation(name, folds, home, tuned):
    words = {"train.py": (*TOY, f"--dataset={home / 'data/toy'}", "learning_rate=1e-5,1e-2"),
             "finetune.py": (*QUICK, f"--data={tuned / 'data.csv'}", "--epochs=2", "learning_rate=1e-6,5e-3",
                             "--metric=accuracy", *([f"--folds={folds}"] if folds else []))}[name]
    done = script("tools/search.py", str(ROOT / name), *words, "--method=grid", cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = search_rows(home)
    for row in rows:
        key, best = ("val_loss", min) if name == "train.py" else ("val_accuracy", max)
        found = []
        for log in (home / f"out/search/{row['trial']}").rglob("log.jsonl"):
            found.append(best(one[key] for one in read_rows(log) if key in one))
        assert len(found) == max(1, folds) and row["value"] == pytest.approx(sum(found) / len(found))
    assert "trial 2 of 2" in read_text(home / "out/search/best.py")
    if name == "finetune.py":
        test = json.loads(read_text(home / "out/search/2/metrics.json"))["accuracy"]
        assert done.stdout.rstrip().endswith(f"accuracy {test:.4g}")
    shutil.rmtree(home / "out/search")


def test_settings_are_those_that_a_script_starts_with(tmp_path):
    assert {"learning_rate", "n_layer"} <= set(search.settings_of(ROOT / "train.py")[0])
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name")
    for file, reason in ((ROOT / "prepare.py", "no setting out_dir"), (broken, "this_name")):
        with pytest.raises(search.UserError, match=reason):
            search.settings_of(file)


def test_a_grid_that_is_not_soon_counted_is_said_to_be_large():
    spaces = {name: search.Space([], 0.0, 1.0) for name in "abcdefghijklm"}
    assert search.combinations(spaces, []) == "up to 1,220,703,125"
    assert search.combinations({"a": spaces["a"], "b": search.Space([1, 2])}, []) == "10"


@pytest.mark.parametrize("method", ["grid", "random", "bayes"])
def test_a_trial_has_no_setting_that_its_others_make_useless(method, tmp_path):
    if method == "bayes":
        pytest.importorskip("optuna")
    settings, only = search.settings_of(ROOT / "train.py")
    words = ["--momentum=0.5", "optimizer=adamw,muon,sgd", "muon_lr=0.01,0.02"]
    shared, spaces = search.read_words(words, settings)
    rows = []
    while point := search.propose(method, spaces, rows, min, 0, only):
        rows.append({"trial": len(rows) + 1, "settings": point, "state": "done", "value": -len(rows),
                     "note": "", "seconds": 1, "curve": [[1, 1.0]]})
    wanted = [("adamw", None), ("muon", 0.01), ("muon", 0.02), ("sgd", None)]
    assert sorted((row["settings"]["optimizer"], row["settings"].get("muon_lr")) for row in rows) == wanted
    line = next(line for line in search.table(rows, "val_loss").splitlines() if "adamw" in line)
    assert line.split()[2:4] == ["adamw", "-"]
    search.plot(rows, spaces, "val_loss", tmp_path / "search.png")
    known = {"script": "train.py", "shared": shared, "metric": "val_loss", "spaces": spaces}
    for last in range(1, len(rows) + 1):  # and each would be a best.py that the script takes
        search.keep_best(rows[:last], min, tmp_path, known, only)
        taken = dict(vars(train))
        config.configure(taken, model.Config, [str(tmp_path / "best.py")])
        config.check_used(taken, **vars(model.Config()))
        assert taken["momentum"] == (0.5 if taken["optimizer"] == "sgd" else train.momentum)


def test_bayes_needs_fewer_trials_than_random():
    """To come near the best of three settings, in at least 9 of 10 searches."""
    pytest.importorskip("optuna")
    spaces = {"lr": search.Space([], 1e-5, 1e-1, True), "dropout": search.Space([], 0.0, 0.5),
              "n_layer": search.Space([], 1, 12)}

    def needed(method, seed, at_most):
        rows = []
        while len(rows) < at_most:
            settings = search.propose(method, spaces, rows, min, seed)
            lr, dropout, n_layer = settings.values()
            loss = (math.log10(lr) + 3) ** 2 / 4 + (4 * dropout - 0.4) ** 2 + (n_layer - 8) ** 2 / 25
            rows.append({"settings": settings, "state": "done", "value": loss, "curve": []})
            if loss < 0.03:
                return len(rows)
        return at_most

    bayes = [needed("bayes", seed, 80) for seed in range(10)]
    assert sum(n < needed("random", seed, n + 1) for seed, n in enumerate(bayes)) >= 9 and max(bayes) < 80
    for method in ("bayes", "random"):  # the same rows, the same next trial: that is how a search resumes
        one, same, other = (search.propose(method, spaces, [], min, seed) for seed in (0, 0, 1))
        assert one == same != other


@pytest.mark.parametrize("method", ["bayes", "random"])
def test_a_search_that_was_stopped_goes_on_as_if_it_was_not(method, stub, tmp_path):
    """By processes, with crashes among them, it tries what `propose` says by itself, of which see above."""
    pytest.importorskip("optuna")
    words = ("x=1e-5..1e-1", "n=4..6", "kind=a,b", f"--method={method}", "--prune_after=0")
    for trials in (5, 9):
        assert stub(*words, f"--trials={trials}").returncode == 0
    rows = search_rows(tmp_path)
    spaces = {"x": search.Space([], 1e-5, 1e-1, True), "n": search.Space([], 4, 6),
              "kind": search.Space(["a", "b"])}
    assert [row["trial"] for row in rows] == list(range(1, 10)) and "failed" in {row["state"] for row in rows}
    for i, row in enumerate(rows):
        assert row["settings"] == search.propose(method, spaces, rows[:i], min, 0)


def test_a_picture_has_ticks_that_can_be_read_and_choices_in_their_order(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(matplotlib.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    spaces = {"lr": search.Space([], 1e-4, 1e-2, True), "n_layer": search.Space([1, 2, 4])}
    rows = [{"settings": {"lr": 2e-4 * n, "n_layer": n}, "value": -n} for n in (4, 1)]
    search.plot(rows, spaces, "val_loss", tmp_path / "search.png")
    rate, layers = drawn[0].axes
    assert [tick.get_text() for tick in rate.get_xticklabels()] == ["0.0001", "0.001", "0.01"]
    assert not len(rate.get_xticks(minor=True))
    assert [tick.get_text() for tick in layers.get_xticklabels()] == ["1", "2", "4"]
    assert layers.lines[0].get_xdata().tolist() == [2, 0]
