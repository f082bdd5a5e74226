"""A run: its folder, its checkpoints, its log; what stops one, and that it goes on as if nothing had been."""
import ast
import itertools
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
from lib.run import REPORTS, RESUME, find_checkpoint, locked
from tests.helpers import (ROOT, TOY, checkpoint, full_disk, log_of, posix, run_here, same, script, slow,
                           start, together)

LEFT = {"best.pt", "ckpt.pt", "ckpt.prev.pt", "log.jsonl", "run.lock", "settings.json"}  # and loss.png


def run(home, name, *args) -> str:
    return run_here(train, f"--out_dir=out/{name}", *args, cwd=home)


def resume(home, name, *args) -> str:
    return run(home, name, "--init_from=resume", *args)


def is_same_run(home, one, other, but=("elapsed",), file="ckpt.pt") -> bool:
    """Bit for bit: weights, optimizer, random states, and where they are, but for the time."""
    a, b = (checkpoint(home / "out" / name, file) for name in (one, other))
    for found in (a, b):
        found["state"] = {key: value for key, value in found["state"].items() if key not in but}
    return all(same(a[key], b[key]) for key in ("model", "optimizer", "rng", "model_args", "state"))


def rows_of(home, name) -> list[dict]:
    """The log without its times."""
    times = ("elapsed", "dt", "tokens_per_s")
    return [{key: value for key, value in row.items() if key not in times}
            for row in log_of(home / "out" / name)]


def test_a_run_does_max_iters_updates_and_leaves_what_it_promised(home):
    state, rows = checkpoint(home / "out/whole"), log_of(home / "out/whole")
    steps, evaluations = ([row for row in rows if key in row] for key in ("loss", "val_loss"))
    assert [row["iter"] for row in steps] == list(range(1, 9)) and steps[-1]["tokens"] == 8 * 2 * 2 * 32
    assert set(steps[0]) == set("iter tokens loss lr grad_norm dt elapsed tokens_per_s mfu".split())
    assert [row["iter"] for row in evaluations] == [4, 8] and evaluations[1]["val_loss"] < 5.7
    names = "iter elapsed train_loss val_loss val_bpb val_accuracy mean_loss"
    assert set(evaluations[0]) == set(names.split())
    mean = np.mean([row["loss"] for row in steps[:4]])
    assert evaluations[0]["mean_loss"] == pytest.approx(mean, rel=1e-5) != evaluations[0]["train_loss"]
    assert json.loads((home / "out/whole/settings.json").read_text())["n_layer"] == 2
    entries = "version model model_args optimizer scaler rng state settings defaults tokenizer compiled"
    assert set(state) == set(entries.split())
    assert state["state"]["step"] == 8 and state["state"]["seen"] == 8 * 4
    assert checkpoint(home / "out/whole", "ckpt.prev.pt")["state"]["step"] == 4
    assert set(state["optimizer"]) == set(state["model"]) - {"head.weight"}  # by name; tied to the embedding
    printed = (home / "printed.txt").read_text(encoding="utf-8")
    assert all(words in printed for words in ("left", "bits per byte", "A sample", "cpu, float32, 1 threads"))


def as_version_1(folder):
    """The same checkpoints as they were written before."""
    for path in folder.glob("*.pt"):
        saved = torch.load(path, weights_only=True)
        state, settings = saved.pop("state"), saved["settings"]
        del saved["defaults"]
        data = {"elapsed": state["elapsed"]}
        if "head" in saved:
            data |= saved.pop("data")
            data |= {"best": state["best"], "waited": state["since_best"], "iter_num": state["step"]}
            settings["teacher_weight"] = settings.pop("teacher_share")
            settings |= {"linear": 0, "patience": 0, "lora_rank": 0, "folds": 0}
        else:
            data |= {"windows": state["seen"], "since_best": state["since_best"], "running": state["losses"],
                     "compiled": saved.pop("compiled")}
            settings["profile"] = False
        lowest = state["best"].get("val_loss", state["best"].get("loss", math.inf))
        saved |= {"version": 1, "iter_num": state["step"], "best_val_loss": lowest, "data": data}
        torch.save(saved, path)


EARLIER = ("elapsed", "best", "since_best", "losses")  # one evaluation more, at the step it stopped at


@pytest.mark.parametrize("version", [1, 2])
def test_resuming_equals_never_stopping(home, version):
    name = f"version{version}"
    run(home, name, *TOY, "--max_iters=5", "--lr_decay_iters=8")
    if version == 1:
        as_version_1(home / "out" / name)
        run(home, "from_first", *TOY, f"--init_from=out/{name}", "--max_iters=1")
    said = resume(home, name, "--max_iters=8")
    assert "max_iters 5 -> 8" in said and said.count(" -> ") == 1
    assert is_same_run(home, "whole", name, EARLIER)
    rows = log_of(home / "out" / name)
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
    assert is_same_run(home, "whole2", "cut2", EARLIER)
    first, second = checkpoint(home / "out/cut2")["rng"]["cpu"]
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
        assert time.time() < end and process.is_alive(), "it has ended before"
        time.sleep(0.001)


def ended(processes) -> list[int]:
    """Their exit statuses."""
    for process in processes:
        process.join(20)
    return [process.exitcode for process in processes]


def steps_logged(home, name) -> int:
    log = home / "out" / name / "log.jsonl"
    rows = log.read_text().splitlines()[-1:] if log.exists() else []
    return json.loads(rows[0])["iter"] if rows and rows[0].endswith("}") else 0


def steps(home, name, after) -> bool:
    return steps_logged(home, name) >= after


def between_the_renames(folder):
    """What is on the disk then. It is too short a moment to be hit."""
    shutil.copy(folder / "ckpt.pt", folder / "ckpt.pt.tmp")
    os.replace(folder / "ckpt.pt", folder / "ckpt.prev.pt")


@posix
@pytest.mark.parametrize("world, kills", [(1, 3), pytest.param(1, 7, marks=slow),
                                          pytest.param(2, 7, marks=slow)])
def test_killed_anywhere_a_run_ends_as_if_never_killed(home, world, kills):
    long = [*TOY, "--batch_size=4", "--max_iters=40", "--sample_tokens=5"]  # ends in the third epoch
    whole, name = f"never{world}{kills}", f"killed{world}{kills}"
    together(world, run, home, whole, *long)
    folder, rng = home / "out" / name, np.random.default_rng(kills)
    for kill in range(kills):
        more = ["--init_from=resume"] if folder.exists() else long
        ranks = start(world, run, home, name, *more).processes
        until(partial(steps, home, name, 5 * kill + 2), ranks[0])
        time.sleep(rng.uniform(0, 0.05))  # in a step, an evaluation, or while it saves
        for rank in rng.permutation(world):
            ranks[rank].kill()
            time.sleep(rng.uniform(0, 0.02))
        assert ended(ranks)[0] == -signal.SIGKILL
        if kill == 1 and (folder / "ckpt.pt").exists():
            between_the_renames(folder)
    together(world, resume, home, name)
    assert is_same_run(home, whole, name) and is_same_run(home, whole, name, file="best.pt")
    assert rows_of(home, whole) == rows_of(home, name)  # each line once, with the same numbers
    assert not list(folder.glob("*.tmp"))


def stopped_and_gone_on_with(home, world):
    """One process, the last, gets a signal in its third step."""
    rank, steps_taken, take = int(os.environ.get("RANK", 0)), itertools.count(1), train.train_step

    def step(*args):
        if next(steps_taken) == 3 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train, "train_step", step)
        run(home, f"stopped{world}", *TOY)
    assert stopped.value.code == 143
    assert rank or "stopped after 3 steps, saved: --init_from=resume" in stopped.value.said
    resume(home, f"stopped{world}")
    run(home, f"straight{world}", *TOY)


@posix
@pytest.mark.parametrize("world", [1, 2])
def test_a_signal_to_one_process_stops_all_and_the_run_goes_on(home, world):
    together(world, stopped_and_gone_on_with, home, world)
    assert is_same_run(home, f"stopped{world}", f"straight{world}")


@posix
def test_a_second_signal_does_not_wait_for_the_step(home):
    process, = start(1, run, home, "now", *TOY, "--gradient_accumulation_steps=10000").processes
    until((home / "out/now/log.jsonl").exists, process)
    for wait in (1.5, 0.2, 1):
        time.sleep(wait)
        assert process.is_alive()  # the same one once more, passed on by torchrun, is none
        os.kill(process.pid, signal.SIGINT)
    assert ended([process]) == [130] and not (home / "out/now/ckpt.pt").exists()


def test_limits_of_time_and_patience(home):
    assert "init_from=resume" in run(home, "short", *TOY, "--max_minutes=0.001")
    assert checkpoint(home / "out/short")["state"]["step"] == 0
    said = resume(home, "short", "--learning_rate=0.5", "--muon_lr=0.5", "--max_iters=100",
                  "--eval_interval=3", "--patience=2", "--max_minutes=None")
    values = [row["val_loss"] for row in log_of(home / "out/short") if "val_loss" in row]
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
    with full_disk(60_000), pytest.raises(UserError, match="best.pt: cannot be written.*make room"):
        resume(home, "full", "--max_iters=12")
    assert min(map(len, before.values())) > 60_000
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.pt*")}


@slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_flat(home):
    args = ["--n_layer=1", "--max_iters=2200", "--gradient_accumulation_steps=1", "--eval_interval=100",
            "--sample_tokens=4", "--log_interval=100"]
    process, = start(1, run, home, "flat", *TOY, *args).processes
    resident = []
    for step in (500, 2000):
        until(partial(steps, home, "flat", step), process)
        with open(f"/proc/{process.pid}/statm") as f:
            resident.append(int(f.read().split()[1]) * 4096)
    process.kill()
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
    assert checkpoint(home / "out/damaged", "ckpt.prev.pt")["state"]["step"] == 4
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
    rows = [row for row in log_of(home / "out/remembers") if "loss" in row]
    assert rows[-1]["tokens"] == (8 * 4 + 4 * 2) * 32 and (folder / "best.pt").exists()
    before = (folder / "best.pt").read_bytes()
    assert "eval_iters 5 -> 1\n" in resume(home, "remembers", "--eval_only", "--eval_iters=1")
    said = resume(home, "remembers", "--max_iters=16", "--eval_iters=1")
    assert "eval_iters 5 -> 1, so the best so far is forgotten" in said
    assert (folder / "best.before.pt").read_bytes() == before
    assert checkpoint(home / "out/remembers", "best.pt")["state"]["best"]["iter"] == 16
    assert checkpoint(home / "out/remembers")["settings"]["eval_iters"] == 1


def test_a_run_is_replaced_only_if_asked(home):
    folder = home / "out/old"
    folder.mkdir()
    for file in ("best.pt", "ckpt.pt", "best.before.pt", "lora.pt", "anything.pt"):
        (folder / file).write_text("old")
        with pytest.raises(SettingError, match=f"out/old: a run is here already .{file}.*resume.*overwrite"):
            run(home, "old", *TOY)
        (folder / file).unlink()
    for file in {*LEFT, *REPORTS, "anything.pt", "lora.pt"} - {"run.lock"}:
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
    run(home, "eager", *TOY, "--max_iters=2")  # but who asks for it gets it
    with pytest.raises(ZeroDivisionError):
        resume(home, "eager", "--compile=True")


def test_fine_tuned_checkpoints_of_before_are_read(tuned, tmp_path):
    out = shutil.copytree(tuned / "out", tmp_path / "out")

    def edit(part, **entries):
        for path in out.glob("*.pt"):
            saved = torch.load(path, weights_only=True)
            saved[part] |= entries
            torch.save(saved, path)

    said = sample.load(out)[0].predict(["w3 fine"])
    as_version_1(out)
    assert sample.load(out)[0].predict(["w3 fine"]) == said
    edit("head", linear={"any": 1}, share=0.4)  # a mixture that is gone
    assert sample.load(out)[0].predict(["w3 fine"]) == said
    edit("settings", linear=2)
    with pytest.raises(UserError, match="linear=2: .*--overwrite"):
        run_here(finetune, f"--out_dir={out}", "--init_from=resume")
