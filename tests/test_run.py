"""A run: its folder, its checkpoints, its log; what stops one, and that it goes on as if nothing had been."""
import ast
import json
import math
import os
import shutil
import signal
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

import finetune
import sample
import train
from config import SettingError, UserError
from lib.run import RESUME, find_checkpoint, locked
from tests.helpers import (ROOT, TOY, checkpoint, log_of, one_line, posix, run_here, same, script, slow,
                           start, together, tune)

LEFT = {"best.pt", "ckpt.pt", "ckpt.prev.pt", "log.jsonl", "run.lock", "settings.json"}  # and loss.png


def run(home, name, *args) -> str:
    return run_here(train, f"--out_dir=out/{name}", *args, cwd=home)


def resume(home, name, *args) -> str:
    return run(home, name, "--init_from=resume", *args)


def is_same_run(home, one, other, but=("elapsed",), file="ckpt.pt") -> bool:
    """Bit for bit: weights, optimizer, random states, and where they are, but for the time."""
    a, b = (checkpoint(home, name, file) for name in (one, other))
    for found in (a, b):
        found["state"] = {key: value for key, value in found["state"].items() if key not in but}
    return all(same(a[key], b[key]) for key in ("model", "optimizer", "rng", "model_args", "state"))


def rows_of(home, name) -> list[dict]:
    """The log without its times."""
    times = ("elapsed", "dt", "tokens_per_s")
    return [{key: value for key, value in row.items() if key not in times} for row in log_of(home, name)]


def test_a_run_does_max_iters_updates_and_leaves_what_it_promised(home):
    folder, state = home / "out/whole", checkpoint(home, "whole")
    rows = log_of(home, "whole")
    steps, evaluations = ([row for row in rows if key in row] for key in ("loss", "val_loss"))
    assert [row["iter"] for row in steps] == list(range(1, 9)) and steps[-1]["tokens"] == 8 * 2 * 2 * 32
    assert set(steps[0]) == {"iter", "tokens", "loss", "lr", "grad_norm", "dt", "elapsed", "tokens_per_s",
                             "mfu"}
    assert [row["iter"] for row in evaluations] == [4, 8] and evaluations[1]["val_loss"] < 5.7
    assert set(evaluations[0]) == {"iter", "elapsed", "train_loss", "val_loss", "val_bpb", "val_accuracy",
                                   "mean_loss"}
    mean = np.mean([row["loss"] for row in steps[:4]])
    assert evaluations[0]["mean_loss"] == pytest.approx(mean, rel=1e-5) != evaluations[0]["train_loss"]
    assert json.loads((folder / "settings.json").read_text())["n_layer"] == 2
    assert set(state) == {"version", "model", "model_args", "optimizer", "scaler", "rng", "state", "settings",
                          "defaults", "tokenizer", "compiled"}
    assert state["state"]["step"] == 8 and state["state"]["seen"] == 8 * 4
    assert checkpoint(home, "whole", "ckpt.prev.pt")["state"]["step"] == 4
    assert set(state["optimizer"]) == set(state["model"]) - {"head.weight"}  # by name; tied to the embedding
    printed = (home / "printed.txt").read_text(encoding="utf-8")
    assert all(words in printed for words in ("left", "bits per byte", "A sample", "cpu, float32, 1 threads"))
    assert all((folder / name).exists() for name in LEFT)


def test_resuming_equals_never_stopping(home):
    run(home, "cut", *TOY, "--max_iters=5", "--lr_decay_iters=8")
    said = resume(home, "cut", "--max_iters=8")
    assert "max_iters 5 -> 8" in said and said.count(" -> ") == 1
    # one evaluation more was made on the way, at step 5: what it found may be the best
    assert is_same_run(home, "whole", "cut", ("elapsed", "best", "since_best", "losses"))
    rows = log_of(home, "cut")
    assert [row["iter"] for row in rows if "loss" in row] == list(range(1, 9))
    assert rows[-1]["elapsed"] > max(row["elapsed"] for row in rows if row["iter"] <= 5)


def by_two(home):
    for name, *more in (("both", "--dropout=0"), ("whole2",), ("cut2", "--max_iters=5", "--lr_decay_iters=8"),
                        ("cut2", "--init_from=resume", "--max_iters=8")):
        run(home, name, *TOY[:-1], *more)
    with pytest.raises(SettingError, match="gradient_accumulation_steps=3"):
        run(home, "none", *TOY, "--gradient_accumulation_steps=3")


@posix
def test_two_processes_are_one_run(home):
    together(2, by_two, home)
    run(home, "alone", *TOY[:-1], "--dropout=0")
    for a, b in zip(rows_of(home, "alone"), rows_of(home, "both"), strict=True):
        assert a.pop("mfu", None) is b.pop("mfu", None) and a == pytest.approx(b, rel=2e-4)
    for name, weight in checkpoint(home, "alone")["model"].items():
        torch.testing.assert_close(weight, checkpoint(home, "both")["model"][name], atol=1e-4, rtol=1e-3)
    assert is_same_run(home, "whole2", "cut2", ("elapsed", "best", "since_best", "losses"))
    first, second = checkpoint(home, "cut2")["rng"]["cpu"]
    assert not torch.equal(first, second)  # dropout differs


@slow
@posix
def test_torchrun_is_how_they_are_started(home):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = script(*torchrun, str(ROOT / "train.py"), *TOY, "--out_dir=out/torchrun", cwd=home)
    assert done.returncode == 0 and "2 processes" in done.stdout, done.stderr
    assert done.stdout.count("iter 8/8") == 1


# -----------------------------------------------------------------------------
# Ends

def until(condition, process, timeout=100):
    """Wait for it, as long as the process is there."""
    end = time.time() + timeout
    while not condition():
        assert time.time() < end and process.poll() is None, "it has ended before"
        time.sleep(0.001)


def steps_logged(home, name) -> int:
    log = home / "out" / name / "log.jsonl"
    rows = log.read_text().splitlines()[-1:] if log.exists() else []
    return json.loads(rows[0])["iter"] if rows and rows[0].endswith("}") else 0


def steps(home, name, after) -> bool:
    return steps_logged(home, name) >= after


def evaluates(home, name, after) -> bool:
    step = steps_logged(home, name)
    return step >= after and step % 4 == 0  # or has just done so


def saves(home, name, after) -> bool:
    is_saving = any((home / "out" / name).glob("*.tmp"))
    return steps(home, name, after) and is_saving or steps(home, name, after + 5)


def between_the_renames(folder):
    """What is on the disk then. It is too short a moment to be hit."""
    shutil.copy(folder / "ckpt.pt", folder / "ckpt.pt.tmp")
    os.replace(folder / "ckpt.pt", folder / "ckpt.prev.pt")


@posix
@pytest.mark.parametrize("world, kills", [(1, 2), pytest.param(1, 7, marks=slow),
                                          pytest.param(2, 7, marks=slow)])
def test_killed_anywhere_a_run_ends_as_if_never_killed(home, world, kills):
    long = [*TOY, "--batch_size=4", "--max_iters=40", "--sample_tokens=5"]  # ends in the third epoch
    whole, name = f"never{world}{kills}", f"killed{world}{kills}"
    together(world, run, home, whole, *long)
    folder, rng = home / "out" / name, np.random.default_rng(kills)
    for kill in range(kills):
        more = ["--init_from=resume"] if folder.exists() else long
        ranks = start("train.py", f"--out_dir=out/{name}", *more, cwd=home, world=world)
        moment = partial((saves, evaluates, steps)[kill % 3], home, name, 5 * kill + 2)
        until(moment, ranks[0])
        time.sleep(rng.uniform(0, 0.02) * (kill % 3))
        for rank in rng.permutation(world):
            ranks[rank].kill()
            time.sleep(rng.uniform(0, 0.02))
        assert [rank.wait() for rank in ranks][0] == -signal.SIGKILL, ranks[0].stdout.read()
        if kill == 1 and (folder / "ckpt.pt").exists():
            between_the_renames(folder)
    together(world, resume, home, name)
    assert is_same_run(home, whole, name) and is_same_run(home, whole, name, file="best.pt")
    assert rows_of(home, whole) == rows_of(home, name)  # each line once, with the same numbers
    assert not list(folder.glob("*.tmp"))


@posix
def test_a_signal_to_one_process_stops_all_and_the_run_goes_on(home):
    endless, ranks = ["--max_iters=100000", "--eval_interval=100000"], {}
    for world in (1, 2):
        args = [*TOY, *endless, f"--out_dir=out/stopped{world}"]
        ranks[world] = start("train.py", *args, cwd=home, world=world)
    for world in (1, 2):
        until(partial(steps, home, f"stopped{world}", 3), ranks[world][0])
        ranks[world][-1].send_signal(signal.SIGTERM)
    for world in (1, 2):
        said = [rank.communicate(timeout=60)[0] for rank in ranks[world]]
        assert [rank.returncode for rank in ranks[world]] == [143] * world, said
        step = checkpoint(home, f"stopped{world}")["state"]["step"]
        assert f"stopped after {step} steps, saved: --init_from=resume" in said[0] and step >= 3
        more = [f"--max_iters={step + 3}", "--lr_decay_iters=100000"]
        together(world, resume, home, f"stopped{world}", *more)
        together(world, run, home, f"straight{world}", *TOY, *endless, *more)
        assert is_same_run(home, f"stopped{world}", f"straight{world}")


@posix
def test_a_second_signal_does_not_wait_for_the_step(home):
    process, = start("train.py", *TOY, "--out_dir=out/now", "--gradient_accumulation_steps=10000", cwd=home)
    until((home / "out/now/log.jsonl").exists, process)
    for wait in (1.5, 0.2, 1):
        time.sleep(wait)
        assert process.poll() is None  # the same one once more, passed on by torchrun, is none
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130 and not (home / "out/now/ckpt.pt").exists()


def test_limits_of_time_and_patience(home):
    assert "init_from=resume" in run(home, "short", *TOY, "--max_minutes=0.001")
    assert checkpoint(home, "short")["state"]["step"] == 0
    said = resume(home, "short", "--learning_rate=0.5", "--muon_lr=0.5", "--max_iters=100",
                  "--eval_interval=3", "--patience=2", "--max_minutes=None")
    values = [row["val_loss"] for row in log_of(home, "short") if "val_loss" in row]
    assert "no better one in 2 evaluations" in said and len(values) < 20 and min(values) == values[-3]


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(home, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "validate", lambda *_: 1 / 0)
        run(home, "early", *TOY)
    assert steps_logged(home, "early") == 4 and not list((home / "out/early").glob("*.pt"))
    resume(home, "early")
    assert is_same_run(home, "whole", "early") and rows_of(home, "whole") == rows_of(home, "early")


@posix
def test_a_full_disk_harms_nothing(home):
    folder = shutil.copytree(home / "out/whole", home / "out/full")
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    assert min(map(len, before.values())) > 61_440
    command = [sys.executable, str(ROOT / "train.py"), "--out_dir=out/full", "--init_from=resume",
               "--max_iters=12"]
    done = script("bash", "-c", 'ulimit -f 60; exec "$@"', "bash", *command, cwd=home)
    one_line(done, 1, "best.pt", "cannot be written", "make room")
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.pt*")}


@slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_flat(home):
    args = ["--n_layer=1", "--max_iters=2200", "--gradient_accumulation_steps=1", "--eval_interval=100",
            "--sample_tokens=4", "--log_interval=100"]
    process, = start("train.py", *TOY, *args, "--out_dir=out/flat", cwd=home)
    resident = []
    for step in (500, 2000):
        until(lambda step=step: steps_logged(home, "flat") >= step, process)
        with open(f"/proc/{process.pid}/statm") as f:
            resident.append(int(f.read().split()[1]) * 4096)
    process.kill()
    process.communicate()
    assert resident[1] < resident[0] + 4e6


# -----------------------------------------------------------------------------
# The folder

def test_a_damaged_checkpoint_is_found_and_the_one_before_used(home, capsys):
    folder = shutil.copytree(home / "out/whole", home / "out/damaged")
    data = (folder / "ckpt.pt").read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for damaged in (b"", *(data[:len(data) * percent // 100] for percent in (1, 50, 99)), bytes(flipped)):
        (folder / "ckpt.pt").write_bytes(damaged)
        path, found = find_checkpoint(folder, RESUME)
        assert path.name == "ckpt.prev.pt" and found["state"]["step"] == 4
        assert "ckpt.pt is damaged" in capsys.readouterr().err
    assert "ckpt.pt is damaged" in resume(home, "damaged")
    assert is_same_run(home, "whole", "damaged") and rows_of(home, "whole") == rows_of(home, "damaged")
    # the damaged one has not taken the good one's place
    assert checkpoint(home, "damaged", "ckpt.prev.pt")["state"]["step"] == 4
    assert (folder / "ckpt.damaged.pt").read_bytes() == bytes(flipped)
    for name in RESUME:
        (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match="ckpt.pt is damaged.*ckpt.prev.pt is damaged"):
        resume(home, "damaged")


def test_a_checkpoint_runs_no_code(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": Hostile()}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError):
        find_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()
    for path in (*ROOT.glob("[!t]*.py"), ROOT / "train.py", *ROOT.glob("lib/*.py"), *ROOT.glob("tools/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):  # nothing is ever unpickled
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True", path
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "pickle" not in ast.unparse(node), path


def test_a_run_remembers_its_settings(home):
    folder = shutil.copytree(home / "out/whole", home / "out/remembers")
    assert " -> " not in resume(home, "remembers")  # all of them are taken
    for given, words in (("n_layer=3", "n_layer=2"), ("optimizer=sgd", "the run has muon"),
                         ("seed=1", "the run has 1337"), ("sparsity=0.5", "the run has 0.0")):
        with pytest.raises(SettingError, match=f"{given}: .*{words}"):
            resume(home, "remembers", f"--{given}")
    said = resume(home, "remembers", "--max_iters=12", "--batch_size=1", "--dropout=0.2")
    assert "batch_size 2 -> 1\n" in said and "dropout 0.1 -> 0.2\n" in said and said.count(" -> ") == 3
    rows = [row for row in log_of(home, "remembers") if "loss" in row]
    assert rows[-1]["tokens"] == (8 * 4 + 4 * 2) * 32 and (folder / "best.pt").exists()
    before = (folder / "best.pt").read_bytes()
    assert "eval_iters 5 -> 1\n" in resume(home, "remembers", "--eval_only", "--eval_iters=1")
    said = resume(home, "remembers", "--max_iters=16", "--eval_iters=1")
    assert "eval_iters 5 -> 1, so the best so far is forgotten" in said
    assert (folder / "best.before.pt").read_bytes() == before
    assert checkpoint(home, "remembers", "best.pt")["state"]["best"]["iter"] == 16
    assert checkpoint(home, "remembers")["settings"]["eval_iters"] == 1


def test_a_run_is_replaced_only_if_asked(home):
    folder = home / "out/old"
    folder.mkdir()
    for file in ("best.pt", "ckpt.pt", "best.before.pt", "lora.pt", "anything.pt"):
        (folder / file).write_text("old")
        with pytest.raises(SettingError, match=f"out/old: a run is here already .{file}.*resume.*overwrite"):
            run(home, "old", *TOY)
        if file != "anything.pt":
            (folder / file).unlink()
    for file in ("best.pt", "lora.pt", "ckpt.prev.pt", "log.jsonl", "roc.png", "metrics.json",
                 "predictions.csv", "curves.json", "report.txt", "explain.html"):
        (folder / file).write_text("old")
    with pytest.raises(SettingError, match="block_size=5000"):
        run(home, "old", *TOY, "--overwrite", "--block_size=5000")
    run(home, "old", *TOY, "--eval_only")
    assert {path.read_text() for path in folder.iterdir()} == {"old"}  # nothing has been written, nor removed
    run(home, "old", *TOY, "--overwrite")
    assert {path.name for path in folder.iterdir()} - {"loss.png"} == LEFT
    assert is_same_run(home, "whole", "old") and rows_of(home, "whole") == rows_of(home, "old")


def test_a_folder_in_use_is_locked(home):
    (home / "out/used").mkdir()
    lock = locked(home / "out/used/run.lock")
    with pytest.raises(SettingError, match="out/used: another process is writing here"):
        run(home, "used", *TOY)
    lock.close()
    run(home, "used", *TOY, "--max_iters=1")


@pytest.mark.parametrize("error, given, words", [
    (SettingError, ["--lr_decay_iters=50", "--warmup_iters=100", "--max_iters=1000"],
     "lr_decay_iters=50.*warmup_iters=100"),
    (SettingError, ["--dtype=float16"], "dtype=float16.*float32"),
    (SettingError, ["--device=meta"], "device=meta.*cpu"),
    (SettingError, ["--out_dir=toy.txt/run"], "out_dir=toy.txt/run"),
    (SettingError, ["--grad_clip=nan"], "grad_clip: wanted float at least 0, got .nan"),
    (SettingError, ["--head=none"], "head=none"),
    (SettingError, ["--block_size=5000"], "block_size=5000.*toy"),
    (SettingError, ["--vocab_size=400"], "vocab_size=400.*300"),
    (SettingError, ["--teacher=out/whole", "--block_size=33"], "block_size=33.*32"),
    (SettingError, ["--teacher=out/whole", "--causal=False"], "causal=False.*True"),
    (SettingError, ["--init_from=out/whole", "--causal=False"], "causal=False.*causal=True"),
    (UserError, ["--init_from=resume"], "no checkpoint here.*train one first"),
    (UserError, ["--init_from=nowhere"], "nowhere: no checkpoint here"),
    (UserError, ["--dataset=missing"], "missing.*prepare.py"),
    (UserError, ["--learning_rate=1e30"], "not finite.*learning_rate|validation loss.*learning_rate"),
])
def test_what_cannot_be_is_one_line(home, error, given, words):
    shutil.rmtree(home / "out/none", ignore_errors=True)
    with pytest.raises(error, match=words) as found:
        run(home, "none", *TOY, *given)
    assert "\n" not in str(found.value) and not (home / "out/none/best.pt").exists()


def test_a_run_stays_compiled_or_not(home, monkeypatch):
    """The first one fails to compile; those that go on do not try again, or it would end with other bits."""
    monkeypatch.setattr(train, "compiled", lambda objective, *_: objective)
    run(home, "uncompiled", *TOY, "--compile=True", "--max_iters=2")
    monkeypatch.setattr(train, "compiled", lambda *_: 1 / 0)
    assert ", compiled" not in resume(home, "uncompiled", "--max_iters=8")
    run(home, "plain", *TOY, "--max_iters=2")  # but who asks for it gets it
    with pytest.raises(ZeroDivisionError):
        resume(home, "plain", "--compile=True")


def as_version_1(path):
    """The same checkpoint as it was written before."""
    saved = torch.load(path, weights_only=True)
    state = saved.pop("state")
    place = {"elapsed": state["elapsed"]}
    if "head" in saved:
        place |= {**saved.pop("data"), "best": state["best"], "waited": state["since_best"],
                  "iter_num": state["step"]}
        saved["settings"] |= {"linear": 0, "teacher_weight": saved["settings"].pop("teacher_share"),
                              "patience": 0, "lora_rank": 0, "folds": 0}
    else:
        place |= {"windows": state["seen"], "since_best": state["since_best"], "running": state["losses"],
                  "compiled": saved.pop("compiled")}
        saved["settings"]["profile"] = False
    loss = state["best"].get("val_loss", state["best"].get("loss", math.inf))
    del saved["defaults"]
    torch.save({**saved, "version": 1, "iter_num": state["step"], "best_val_loss": loss, "data": place}, path)


def test_checkpoints_of_before_are_read(home, tuned, tmp_path):
    run(home, "first", *TOY, "--max_iters=5", "--lr_decay_iters=8")
    for path in (home / "out/first").glob("*.pt"):
        as_version_1(path)
    model, tokenizer = sample.load(home / "out/first")
    assert tokenizer.vocab_size == model.config.vocab_size == 300
    run(home, "from_first", *TOY, "--init_from=out/first", "--max_iters=1")
    labelled = [f"--data={tuned / 'data.csv'}", "--epochs=1", "--device=cpu"]
    tune(tmp_path / "from_first", *labelled, f"--init_from={home / 'out/first'}")
    said = resume(home, "first", "--max_iters=8")
    assert said.count(" -> ") == 1 and is_same_run(home, "whole", "first", ("elapsed", "best", "since_best",
                                                                            "losses"))
    shutil.copytree(tuned / "out", tmp_path / "tuned")
    said = sample.load(tmp_path / "tuned")[0].predict(["w3 fine"])
    for path in (tmp_path / "tuned").glob("*.pt"):
        as_version_1(path)
    assert sample.load(tmp_path / "tuned")[0].predict(["w3 fine"]) == said
    saved = torch.load(tmp_path / "tuned/best.pt", weights_only=True)
    saved["head"] |= {"linear": {"any": 1}, "share": 0.4}  # a mixture that is gone
    torch.save(saved, tmp_path / "tuned/best.pt")
    assert sample.load(tmp_path / "tuned")[0].predict(["w3 fine"]) == said
    for path in (tmp_path / "tuned").glob("ckpt*.pt"):
        saved = torch.load(path, weights_only=True)
        saved["settings"]["linear"] = 2
        torch.save(saved, path)
    with pytest.raises(UserError, match="linear=2: .*--overwrite"):
        run_here(finetune, f"--out_dir={tmp_path / 'tuned'}", "--init_from=resume")
