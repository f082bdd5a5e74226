"""A run: its folder, its checkpoints, its log; what stops one, and that it goes on as if nothing had been."""
import ast
import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import finetune
import sample
import train
from config import SettingError, UserError, launch
from lib import group
from lib import run as run_file
from lib.run import (REPORTS, RESUME, Machine, Pace, Run, State, Stop, beside, check_sums, find_checkpoint,
                     model_of, stored_settings)
from model import Config, Transformer
from tests.helpers import (QUICK, ROOT, TOY, checkpoint, full_disk, log_of, posix, run_here, same, script,
                           slow, start, synthetic, tiny, together, write_rows)

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
    assert set(state) == {*entries.split(), "published", "machine", "teacher_sum"}
    assert state["state"]["step"] == 8 and state["state"]["seen"] == 8 * 4
    assert checkpoint(home / "out/whole", "ckpt.prev.pt")["state"]["step"] == 4
    assert set(state["optimizer"]) == set(state["model"]) - {"head.weight"}  # by name; tied to the embedding
    printed = (home / "printed.txt").read_text(encoding="utf-8")
    assert all(words in printed for words in ("left", "bits per byte", "A sample", "cpu, float32, 1 thread,"))


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
# Several processes

def on_two_machines(home):
    """Each with a disk of its own, and the second one comes late."""
    rank = int(os.environ["RANK"])
    os.makedirs(home / f"disk{rank}", exist_ok=True)
    os.chdir(home / f"disk{rank}")
    time.sleep(0.3 * rank)
    train.prepare.prepare = lambda dataset: os.makedirs(f"data/{dataset}")
    machine = Machine("cpu", "float32")
    train.make_built_in("python", None, machine, "scratch")
    assert os.path.exists("data/python")
    if rank == 0:
        machine.agree("dataset=python", b"the same")
        return machine.barrier()
    with pytest.raises(UserError, match="dataset=python: process 1, on .* another"):
        machine.agree("dataset=python", b"another")
    machine.barrier()


@posix
def test_each_machine_has_the_data_and_it_is_the_same(tmp_path):
    together(2, on_two_machines, tmp_path)


@pytest.fixture
def a_group(monkeypatch):
    """The store of two processes; this one can be either."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", store.port), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(group, "has_store", True)
    return store


@slow
def test_a_reason_is_printed_once_whoever_has_it(a_group, monkeypatch, capsys):
    said = [(1, "only here"), (0, "of all"), (1, "of all"), (0, "only there")]
    for rank, reason in said:
        monkeypatch.setenv("RANK", str(rank))
        group.say_once(reason)
    assert capsys.readouterr().err.split("\n")[:-1] == ["error: only here", "error: of all",
                                                        "error: only there"]
    group.tell_failure()  # then it is no news that a process has gone
    group.say_lost()
    assert not capsys.readouterr().err
    monkeypatch.setenv("MASTER_PORT", "1")  # nobody to ask
    group.say_once("of all")
    monkeypatch.delenv("MASTER_PORT")
    group.say_once("of all")
    assert capsys.readouterr().err == 2 * "error: of all\n"
    assert group.is_lost(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert not group.is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_process_that_stood_still_itself_does_not_blame_the_others(a_group, monkeypatch):
    times = iter([0, 1, 2, 100, 101, 102])  # stopped after two beats, and the other one with it

    class Stop:
        def wait(self, seconds):
            return next(beats, True)
    beats = iter([False] * 5)
    monkeypatch.setattr(group, "BEAT", 1.0)
    monkeypatch.setattr(group.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(group, "end", lambda reason: pytest.fail(reason))
    heart = group.Heartbeat()
    heart.stop = Stop()
    heart.store.set("beat1", "7")
    heart.run()
    assert next(times, None) is None


def test_one_that_never_comes_is_not_waited_for_a_day(a_group, monkeypatch):
    times, said = iter(range(0, 2000, 100)), []
    monkeypatch.setattr(group, "BEAT", 50.0)
    monkeypatch.setattr(group.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(group, "end", lambda reason: (said.append(reason), heart.stop.set()))
    heart = group.Heartbeat()
    heart.stop = SimpleNamespace(wait=lambda seconds: bool(said), set=lambda: None)
    heart.run()
    assert said[0].startswith("process 1 of 2 has not answered for 600 s: ")
    assert next(times) == 800  # the one before was the first above 600


@pytest.mark.parametrize("ending", [False, True])
def test_without_torchrun_a_process_saves_and_ends(a_group, monkeypatch, ending):
    def gone(*args):
        raise dist.DistNetworkError("the store is gone")
    sent = []
    monkeypatch.setattr(group.os, "kill", lambda *args: sent.append(args))
    heart = group.Heartbeat()
    heart.store = SimpleNamespace(set=gone)
    heart.stop = SimpleNamespace(wait=lambda seconds: False, is_set=lambda: ending)
    heart.run()
    assert sent == ([] if ending else [(os.getpid(), signal.SIGTERM)])


def stands_still(home):
    group.BEAT, group.SILENCE = 0.05, 0.5
    with open(home / f"said{os.environ['RANK']}", "w", encoding="utf-8") as sys.stderr:
        group.join("gloo")
        time.sleep(0.3)
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()


@posix
def test_a_process_that_stands_still_is_named_and_ends_the_others(tmp_path):
    first, second = start(2, stands_still, tmp_path).processes
    assert ended([first]) == [1]
    assert (tmp_path / "said0").read_text() == ("error: process 1 of 2 has not answered for 0 s: "
                                                "--init_from=resume goes on with what was saved\n")
    second.kill()


@slow
@posix
def test_torchrun_starts_a_run_again_and_it_goes_on(home):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    once = home / "once.py"  # its second process dies once, in the sixth step
    once.write_text(f"""
import os, runpy, sys, train
take, steps = train.lr_factor, []
def lr_factor(*args):
    steps.append(1)
    if len(steps) == 6 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
    return take(*args)
train.lr_factor = lr_factor
sys.argv[0] = {str(ROOT / 'train.py')!r}
train.launch(train.main, vars(train), train.Config, train.stored_settings)
""")
    together(2, run, home, "not_killed", *TOY)
    for name, more in (("again", []), ("over", ["--overwrite"])):
        done = script(*torchrun, "--max-restarts=2", str(once), *TOY, f"--out_dir=out/{name}", *more,
                      cwd=home)
        assert done.returncode == 0 and done.stdout.count("A sample") == 1, done.stderr
        assert done.stderr.count("error: another process of the run has died") == 1
        assert is_same_run(home, "not_killed", name) and rows_of(home, "not_killed") == rows_of(home, name)
    # a start that is refused does not resume what is there, however often it is tried
    done = script(*torchrun, "--max-restarts=2", str(once), *TOY, "--out_dir=out/over", cwd=home)
    assert done.returncode and done.stderr.count("error: out/over: a run is here already") == 3
    assert is_same_run(home, "not_killed", "over")


@pytest.mark.parametrize("flag, needed", [
    ("--momentum=0.3", "--optimizer=sgd"), ("--teacher_share=0.9", "--teacher=out/whole"),
    ("--mask_rate=0.9", "--causal=False"), ("--decay_fraction=0.1", "--schedule=wsd"),
    ("--pos_offset=2", "--pos=learned"), ("--muon_lr=0.1", "")])
def test_what_has_no_use_is_refused_by_name(home, flag, needed, tmp_path):
    """And is taken with what it is for."""
    unneeded = [] if needed else ["--optimizer=adamw"]
    with pytest.raises(SettingError, match=f"{flag[2:]}: of no use with .*: leave it out"):
        run_here(train, *TOY, flag, *unneeded, f"--out_dir={tmp_path / 'a'}", cwd=home)
    assert not (tmp_path / "a").exists()
    needs = [needed] if needed else []
    run_here(train, *TOY, flag, *needs, "--max_iters=1", f"--out_dir={tmp_path / 'b'}", cwd=home)


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
    together(world, resume, home, name)
    assert is_same_run(home, whole, name) and is_same_run(home, whole, name, file="best.pt")
    assert rows_of(home, whole) == rows_of(home, name)  # each line once, with the same numbers
    assert not list(folder.glob("*.tmp"))


def stopped_and_gone_on_with(home):
    """One process of two, the last, gets a signal in its third step."""
    rank, steps_taken, take = int(os.environ.get("RANK", 0)), itertools.count(1), train.train_step

    def step(*args):
        if next(steps_taken) == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train, "train_step", step)
        run(home, "stopped", *TOY)
    assert stopped.value.code == 143
    assert rank or "stopped after 3 steps, saved: --init_from=resume" in stopped.value.said
    resume(home, "stopped")
    run(home, "straight", *TOY)


@posix
def test_a_terminal_that_closes_ends_a_run_unless_that_is_ignored():
    hang_up, before = signal.SIGHUP, signal.getsignal(signal.SIGHUP)
    stop = Stop()
    os.kill(os.getpid(), hang_up)
    assert stop.agreed() == hang_up and stop.status() == 129
    stop.release()
    assert signal.getsignal(hang_up) == before
    signal.signal(hang_up, signal.SIG_IGN)  # as nohup does
    stop = Stop()
    os.kill(os.getpid(), hang_up)
    assert stop.agreed() == 0
    stop.release()
    assert signal.getsignal(hang_up) == signal.SIG_IGN
    signal.signal(hang_up, before)


@posix
def test_a_signal_to_one_process_stops_all_and_the_run_goes_on(home):
    together(2, stopped_and_gone_on_with, home)
    assert is_same_run(home, "stopped", "straight")


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
    with pytest.raises(SettingError, match="init_from=out/old: --overwrite would remove it"):
        run(home, "old", *TOY, "--init_from=out/old", "--overwrite")
    (home / "out/run.replaced").touch()  # of a run beside whose folds there are other runs
    try:
        with pytest.raises(SettingError, match="out/old: a run is here already"):
            run(home, "old", *TOY)
    finally:
        (home / "out/run.replaced").unlink()


def test_a_folder_in_use_is_locked(home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", lambda *_: run(home, "used", *TOY))  # in the same process, even
        holder = f"out/used: another .* here .process {os.getpid()}, on .*: wait"
        with pytest.raises(SettingError, match=holder):
            run(home, "used", *TOY)
    run(home, "used", *TOY, "--max_iters=1")


def test_auto_goes_on_or_begins_from_what_else_is_said(home):
    recipe = home / "recipe.py"
    recipe.write_text("init_from = 'out/whole'\n")
    short = [*TOY, "--max_iters=2"]
    for name, how, said in (("scratch", ["--init_from=auto"], "auto -> scratch"),
                            ("recipe", [str(recipe), "--init_from=auto"], "auto -> out/whole"),
                            ("other", ["--init_from=auto:out/whole"], "auto:out/whole -> out/whole")):
        assert f"init_from {said}" in run(home, f"auto_{name}", *short, *how)
        stored = json.loads((home / f"out/auto_{name}/settings.json").read_text())
        assert stored["init_from"] == said.split()[-1]
        assert "-> resume" in run(home, f"auto_{name}", *short, *how, "--max_iters=3")
        again = run(home, f"auto_{name}", *short, *how, "--max_iters=3")
        assert "finished after 3 steps: --max_iters=6 trains on" in again
        assert checkpoint(home / f"out/auto_{name}")["state"]["step"] == 3


def test_torchrun_s_later_attempts_go_on_with_what_the_first_began(home, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    run(home, "attempt", *TOY, "--max_iters=5", "--lr_decay_iters=8")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(home, "attempt", *TOY, "--overwrite")
    assert is_same_run(home, "whole", "attempt", EARLIER)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    with pytest.raises(SettingError, match="a run is here already"):
        run(home, "attempt", *TOY)


@pytest.mark.parametrize("damage, words", [
    (lambda saved: saved.update(optimizer={}, rng={}), "no state of an optimizer.*--init_from"),
    (lambda saved: saved["optimizer"].pop("blocks.0.mlp.up.weight"), "optimizer's state has nothing, wanted"),
    (lambda saved: saved["optimizer"]["wte.weight"].pop("exp_avg"), "wte.weight: .* wanted .*exp_avg"),
    (lambda saved: saved["optimizer"]["wte.weight"].update(exp_avg=torch.zeros(7)),
     r"wte.weight: .*exp_avg is \(7,\).*wanted \(300, 32\)"),
    (lambda saved: saved["rng"].update(cpu=[torch.zeros(3, dtype=torch.uint8)]), "does not fit"),
    (lambda saved: saved["model"]["wte.weight"].fill_(math.nan), "wte.weight: .*not finite"),
])
def test_a_checkpoint_that_is_none_of_a_run_is_one_line(home, damage, words):
    folder = shutil.copytree(home / "out/whole", home / "out/odd", dirs_exist_ok=True)
    saved = checkpoint(folder)
    damage(saved)
    torch.save(saved, folder / "ckpt.pt")
    with pytest.raises(UserError, match=words) as found:
        resume(home, "odd", "--max_iters=12")
    assert "\n" not in str(found.value)


def test_what_is_damaged_beside_the_checkpoint_is_dropped_with_a_line(home):
    folder = shutil.copytree(home / "out/whole", home / "out/beside")
    (folder / "settings.json").write_bytes(b"\xff[")
    lines = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)
    damaged = [b"\xff{}\n", b"[1]\n", b'{"iter": null}\n']
    (folder / "log.jsonl").write_bytes(b"".join([lines[0], *damaged, *lines[1:], b'{"iter": 7']))
    (folder / "best.pt").write_bytes(b"")
    said = resume(home, "beside", "--max_iters=12")
    assert "log.jsonl: 3 damaged lines dropped" in said and said.count("best.pt: missing or damaged") == 1
    assert [row["iter"] for row in log_of(folder) if "loss" in row] == list(range(1, 13))
    assert checkpoint(folder, "best.pt")["state"]["best"]["iter"] == 12


def test_a_file_of_the_data_that_was_altered_stops_the_run_before_it_saves(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    shutil.copytree(home / "data/toy", home / "data/altered")
    args = [*TOY, "--dataset=altered"]
    run(home, "unaltered", *args)
    seen = (home / "cache/transformer/sums.json").read_text()
    assert seen.count("altered/train.bin") == seen.count("altered/val.bin") == 1
    monkeypatch.setattr("hashlib.sha256", lambda: 1 / 0)  # it remembers
    resume(home, "unaltered", "--max_iters=9")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "toy.txt"))  # where nothing can be remembered
    data = bytearray((home / "data/altered/train.bin").read_bytes())
    data[100] ^= 1
    (home / "data/altered/train.bin").write_bytes(data)
    with pytest.raises(UserError, match="altered/train.bin: has other content"):
        run(home, "altered", *args)
    assert not list((home / "out/altered").glob("*.pt"))
    with pytest.raises(UserError, match="gone.bin: No such file"):
        beside(check_sums, {home / "gone.bin": ""}).result()
    code = "import time; from lib.run import beside; beside(time.sleep, 99)"  # of a large file
    assert script(sys.executable, "-c", code, cwd=ROOT, timeout=60).returncode == 0


def test_a_log_is_strict_json_whatever_is_in_it(home):
    run_ = Run(Machine("cpu", "float32"), home / "out/strict", "scratch")
    run_.begin({}, {})
    run_.log(iter=1, loss=math.nan, grad_norm=math.inf, lr=0.5)
    assert log_of(home / "out/strict") == [{"iter": 1, "loss": None, "grad_norm": None, "lr": 0.5}]
    run_.close()  # and can be drawn
    pace = Pace(State(step=1), 10)
    pace.since = time.time() + 100  # a clock that was put back, or stands still
    assert pace.measure(State(step=2))[0] > 0


@pytest.mark.parametrize("error, given, words", [
    (SettingError, ["--lr_decay_iters=50", "--warmup_iters=100", "--max_iters=1000"],
     "lr_decay_iters=50.*warmup_iters=100"),
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
    (UserError, ["--dataset=missing", "--init_from=gpt2"],
     "data/missing is not there: .*prepare.py .*=missing.*python.*toy"),
    (UserError, ["--dataset=openwebtext"], "--source=hf:Skylion007/openwebtext --tokenizer=gpt2 --dataset=o"),
    (UserError, ["--learning_rate=1e30"], "not finite.*learning_rate|validation loss.*learning_rate"),
])
def test_what_cannot_be_is_one_line(home, error, given, words):
    shutil.rmtree(home / "out/none", ignore_errors=True)
    with pytest.raises(error, match=words) as found:
        run(home, "none", *TOY, *given)
    assert "\n" not in str(found.value) and not (home / "out/none/best.pt").exists()


def test_positions_that_were_not_learned_are_refused_by_name():
    model = tiny("gpt2")
    saved = {"model_args": asdict(model.config), "model": model.state_dict()}
    assert model_of(saved, block_size=8).config.block_size == 8
    with pytest.raises(SettingError, match=f"^block_size=999: .* {model.config.block_size} positions"):
        model_of(saved, block_size=999)


def test_a_tokenizer_with_fewer_tokens_than_asked_for_is_no_obstacle_to_going_on(home):
    train.prepare.prepare("few", source=str(home / "toy.txt"), vocab_size=4096, root=home / "data")
    run(home, "few", *TOY, "--dataset=few", "--max_iters=2")
    resume(home, "few", "--max_iters=3")
    run(home, "few_again", str(home / "out/few/settings.json"), "--out_dir=out/few_again", "--max_iters=1")


def test_the_first_step_shows_at_once_and_little_learned_is_said(home):
    slowly = ["--log_interval=5", "--learning_rate=1e-9", "--muon_lr=1e-9", "--min_lr=0"]
    said = run(home, "shows", *TOY, *slowly)
    shown = [int(line.split("/")[0].split()[1]) for line in said.splitlines() if "/8  loss" in line]
    assert shown == [1, 5, 8]
    assert [row["iter"] for row in log_of(home / "out/shows") if "loss" in row] == [5, 8]
    assert "hardly anything was learned: guessing among all tokens has a loss of 5.70" in said
    constant = run(home, "constant", *TOY, "--decay_lr=False", "--warmup_iters=2000", "--min_lr=0.5")
    rates = {row["lr"] for row in log_of(home / "out/constant") if "lr" in row}
    assert "hardly" not in constant and rates == {0.01}


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

# -----------------------------------------------------------------------------
# The machine

OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
TRAINING = "batch_size=2: .*--batch_size=1 --gradient_accumulation_steps=4 is the same run in less; "


@pytest.mark.parametrize("script, owner, name", [
    (train, train, "train_step"), (train, train, "validate"), (train, train.Objective, "to"),
    (train, torch, "compile"), (finetune, finetune, "train_step"), (finetune, finetune, "evaluate"),
    (finetune, finetune.Tuned, "to")])
def test_out_of_memory_says_what_to_lower_wherever_it_shows(home, tmp_path, monkeypatch, capsys, script,
                                                            owner, name):
    def fails(*args, **more):
        raise OUT
    args = [*TOY, "--compile=True"] if script is train else ["--data=rows.csv", *QUICK, "--batch_size=2",
                                                            "--gradient_accumulation_steps=2"]
    write_rows(home / "rows.csv", ("text", "label"), *synthetic(40))
    monkeypatch.setattr(owner, name, fails)
    if name != "compile":
        monkeypatch.setattr(train, "compiled", lambda objective, *_: objective)
    monkeypatch.setattr("config.open_console", lambda: None)
    monkeypatch.setattr(sys, "argv", [script.__file__, *args, f"--out_dir={tmp_path}"])
    monkeypatch.chdir(home)
    for setting in script.__annotations__:
        monkeypatch.setattr(script, setting, getattr(script, setting))
    with pytest.raises(SystemExit, match="1"):
        launch(script.main, vars(script), Config, stored_settings)
    said = capsys.readouterr()
    assert re.search("^error: " + TRAINING + ("--remat .*; " if script is train else "") + "take a smaller",
                     said.err) and said.err.count("\n") == 1 and "compile failed" not in said.out


@pytest.fixture
def bfloat16_units(monkeypatch):
    """A CPU that has them, whether it has or not; tiny models are wide enough, but for one."""
    monkeypatch.setattr(run_file, "has_bfloat16_units", lambda: True)
    monkeypatch.setattr(run_file, "WIDE", 32)


@pytest.mark.parametrize("how, products", [
    (["--n_embd=16"], None), ([], "bfloat16"), (["--dtype=float32"], None), (["--matmul=float32"], None),
    (["--dtype=float16"], None), (["--n_embd=16", "--matmul=bfloat16"], "bfloat16")])
def test_products_of_training_steps_alone_are_in_bfloat16(home, monkeypatch, bfloat16_units, how, products):
    seen = {True: set(), False: set()}  # in a training step; elsewhere
    real, step = Transformer.hidden, train.train_step
    training = []

    def hidden(self, *args, **more):
        seen[bool(training)].add(torch.get_float32_matmul_precision())
        return real(self, *args, **more)

    def train_step(*args):
        training.append(1)
        found = step(*args)
        training.clear()
        return found

    monkeypatch.setattr(Transformer, "hidden", hidden)
    monkeypatch.setattr(train, "train_step", train_step)
    said = run(home, "products", *TOY, *how, "--max_iters=1", "--overwrite")
    assert seen == {True: {"medium" if products else "highest"}, False: {"highest"}}
    assert f"cpu, float32, {'products in bfloat16, ' if products else ''}1 thread," in said
    assert checkpoint(home / "out/products")["machine"] == {"threads": 1, "matmul": products or "float32"}


def test_a_run_with_products_in_bfloat16_goes_on_as_it_was(home, monkeypatch, bfloat16_units, capsys):
    run(home, "amx", *TOY)
    run(home, "amx_cut", *TOY, "--max_iters=5", "--lr_decay_iters=8")
    assert "products in bfloat16" in resume(home, "amx_cut", "--max_iters=8")
    assert is_same_run(home, "amx", "amx_cut", EARLIER)
    path = home / "out/amx_cut/ckpt.pt"
    torch.save({key: value for key, value in checkpoint(path.parent).items() if key != "machine"}, path)
    assert "products" not in resume(home, "amx_cut", "--max_iters=8")  # of before there was a choice
    path.with_name("ckpt.prev.pt").replace(path)
    said = resume(home, "amx_cut", "--max_iters=9", "--dtype=float32")
    assert "products" not in said and "dtype auto -> float32" in said
    monkeypatch.setattr(run_file, "has_bfloat16_units", lambda: False)
    said = resume(home, "amx", "--max_iters=9")
    assert "matmul bfloat16 -> float32, by this machine: last bits may differ" in said
    with pytest.raises(SettingError, match="matmul=bfloat16: cpu has no units for that: --matmul=auto"):
        resume(home, "amx", "--matmul=bfloat16")


def test_threads_are_those_of_free_cores_once_for_a_run(home, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(run_file, "free_cores", lambda: free)
    for have, free, earlier, chosen, words in (
            (3, math.inf, {}, 3, ""), (3, 2, {}, 2, "threads 3 -> 2: other programs use the other cores"),
            (3, 3, {"threads": 2}, 2, ""), (3, 1, {"threads": 2}, 2, ""),
            (3, 3, {"threads": 8}, 3, "threads 8 -> 3, by this machine: last bits may differ")):
        torch.set_num_threads(have)
        machine = Machine("cpu")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            machine.choose("auto", 32, earlier)
        assert said.getvalue().strip() == words and f", {chosen} thread" in str(machine)
        assert torch.get_num_threads() == machine.chosen["threads"] == chosen
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user knows better
    torch.set_num_threads(3)
    machine.choose("auto", 32, {"threads": 2})
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)


@pytest.mark.parametrize("rest, free", [(20.0, 2), (12.0, 1), (0.0, 1), (math.nan, math.inf)])
def test_a_core_is_free_if_nobody_else_works_on_it(monkeypatch, rest, free):
    monkeypatch.setattr(run_file, "BEGINNING", (100.0, 5.0, 1000.0))
    monkeypatch.setattr(run_file, "work_and_rest", lambda: (110.0, 5.0 + 2.0, 1000.0 + rest - 2.0))
    assert run_file.free_cores() == free  # of 10 seconds; this process has worked for 2 of them


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux says what its cores do")
@pytest.mark.parametrize("ticks, known", [("7", True), ("0", False)])
def test_a_sandbox_that_says_nothing_of_its_cores_has_them_all(monkeypatch, ticks, known):
    rows = [f"cpu{n} 1 1 1 {ticks} 0 1" for n in os.sched_getaffinity(0)]
    monkeypatch.setattr(run_file.Path, "read_text", lambda *_, **__: "\n".join(["cpu 5 5 5 0 0 5", *rows]))
    assert math.isnan(run_file.work_and_rest()[2]) != known


def test_what_compiles_is_not_imported_for_what_is_not_compiled(home):
    code = "import sys, train; train.launch(train.main, vars(train), train.Config); " \
           "assert 'torch._dynamo' not in sys.modules"
    done = script(sys.executable, "-c", code, *TOY, "--out_dir=out/light", cwd=home)
    assert done.returncode == 0, done.stderr


def test_what_is_said_to_type_next_can_be_pasted(capsys):
    train.say_goodbye(SimpleNamespace(elapsed=lambda: 0, folder=Path("out/my model")), "A text.")
    assert "python sample.py --out_dir='out/my model' --start=" in capsys.readouterr().out
