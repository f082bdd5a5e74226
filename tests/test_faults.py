"""
What may be pulled out from under a program: kills at every moment, signals in every phase, damaged files.

They are injected by mechanisms, not by examples: a hook that sees each file that is opened, renamed, flushed
or removed; a table of phases; damage that follows from a seed. The quick suite takes a sample of each.
"""
import contextlib
import gc
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import finetune
import prepare
import sample
import train
from config import UserError, launch
from lib import pictures, report, splits
from lib import run as run_file
from lib.optim import load_optimizer_state, optimizer_state
from lib.run import load_body, stored_settings
from lib.tokenizer import make_tokenizer
from model import Config, Transformer
from sample import Choice
from tests.helpers import (PAGES, QUICK, ROOT, TOY, checkpoint, log_of, posix, run_here, same, slow,
                           start, synthetic, tiny, write_rows)
from tools import search

ALL = bool(os.environ.get("SLOW"))


def some(what: list, count: int, seed: int = 0) -> list:
    """All of them under SLOW=1, else a few, the first and the last among them."""
    if ALL or len(what) <= count:
        return what
    others = np.random.default_rng(seed).permutation(np.arange(1, len(what) - 1))[:count - 2]
    return [what[i] for i in sorted([0, *others.tolist(), len(what) - 1])]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take most of the time, and are written last."""
    monkeypatch.setattr(run_file, "plot_losses", lambda *_: None)
    monkeypatch.setattr(train, "sample_text", lambda *_: "")
    monkeypatch.setattr(pictures, "can_draw", lambda: False)
    gc.freeze()  # what is there is no garbage: run_here looks for it
    yield
    gc.unfreeze()


# -----------------------------------------------------------------------------
# Kills: what is on the disk if a process dies now

class Moments:
    """What a job leaves on the disk, were it killed before it opens, flushes, renames or removes a file.

    A process that is killed leaves what the system had of it, so a copy of the folder at that moment is the
    same as a kill. Beside it stands what a kill within the next write leaves: a file that is empty or half
    there, a last line without its end. Equal ones are left out.
    """

    def __init__(self, folder: Path, into: Path):
        self.folder, self.into, self.busy = str(folder), into, False
        self.seen, self.fsync, self.events = set(), os.fsync, 0
        into.mkdir()
        os.fsync = self.flush
        sys.addaudithook(self.hook)  # there is no way to remove it: only for a process of its own

    def hook(self, event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], (str, Path)) and args[2] & (os.O_WRONLY | os.O_RDWR):
            ending = 0 if args[2] & os.O_TRUNC else b'{"iter": 1' if args[2] & os.O_APPEND else None
            self.take(args[0], ending)
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            self.take(args[0])

    def flush(self, number: int) -> None:
        path = os.readlink(f"/proc/self/fd/{number}")
        self.take(path, os.path.getsize(path) // 2 if path.endswith((".tmp", ".bin")) else None)
        self.fsync(number)

    def written(self, write):
        """A function that writes a file by itself, where no hook sees it: its second argument."""
        def traced(what, path, *args, **more):
            self.take(path)
            write(what, path, *args, **more)
            self.take(path, os.path.getsize(path) // 2)
        return traced

    def take(self, path: str | Path, ending: int | bytes | None = None) -> None:
        path = os.path.abspath(os.fspath(path))
        if self.busy or not path.startswith(self.folder + os.sep) or not os.path.isdir(self.folder):
            return
        self.busy, self.events = True, self.events + 1
        self.keep()
        if ending is not None and os.path.isdir(os.path.dirname(path)) and not path.endswith(".lock"):
            self.keep(os.path.relpath(path, self.folder), ending)
        self.busy = False

    def keep(self, torn: str = "", ending: int | bytes = 0) -> None:
        place = self.into / f"{len(self.seen):03d}"
        shutil.copytree(self.folder, place)
        if isinstance(ending, bytes):
            with open(place / torn, "ab") as f:
                f.write(ending)
        elif torn:
            with open(place / torn, "ab") as f:
                f.truncate(ending)
        content = hash(tuple(sorted(contents(place).items())))
        if content in self.seen:
            shutil.rmtree(place)
        self.seen.add(content)


def contents(folder: Path) -> dict:
    """Path in the folder -> bytes; of a folder in it: None. Locks are no content."""
    found = {}
    for path in folder.rglob("*"):
        if not path.name.endswith(".lock"):
            found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found


def watched(folder: Path, into: Path, job, *args) -> None:
    moments = Moments(folder, into)
    with contextlib.suppress(ImportError):
        import safetensors.torch
        safetensors.torch.save_file = moments.written(safetensors.torch.save_file)
    with contextlib.redirect_stdout(io.StringIO()):
        job(*args)
    (into / "events").write_text(str(moments.events), encoding="utf-8")


def moments(folder: Path, job, *args) -> list[Path]:
    """Copies of a folder, as it was at each moment of a job that is done in another process."""
    into = folder.with_name(folder.name + ".moments")
    running = start(1, watched, folder, into, job, *args)
    while not running.join():
        pass
    print(f"{folder.name}: {(into / 'events').read_text()} events, {len(list(into.glob('[0-9]*')))} states")
    return sorted(into.glob("[0-9]*"))


def put_back(moment: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(moment, folder)


def says_why(do, *args, **more):
    """What it returns; or the one line that it ends with."""
    try:
        return do(*args, **more)
    except UserError as error:
        assert "\n" not in str(error), error
        return error


def ends_like(folder: Path, wholes: list[Path]) -> bool:
    """Bit for bit the run of one of these folders, but for times."""
    def about(place: Path):
        saved = checkpoint(place)
        rows = [{key: value for key, value in row.items() if key not in ("elapsed", "dt", "tokens_per_s")}
                for row in log_of(place)]
        del saved["state"]["elapsed"]
        return [saved[key] for key in ("model", "optimizer", "rng", "state", "tokenizer")], rows
    found = about(folder)
    return any(same(found[0], one[0]) and found[1] == one[1] for one in map(about, wholes))


def pretrain(folder: Path, *args) -> str:
    """In the working directory that it is a run of: folder/../.."""
    return run_here(train, f"--out_dir=out/{folder.name}", *args, cwd=folder.parent.parent)


SHORT = [*TOY, "--max_iters=4", "--eval_interval=2", "--gradient_accumulation_steps=1", "--eval_iters=2"]


@posix
@pytest.mark.parametrize("case, args", [("new", SHORT), ("over another", [*SHORT, "--seed=7", "--overwrite"]),
                                        ("going on", ["--init_from=resume", "--max_iters=10"])])
def test_a_run_that_is_killed_is_the_old_one_or_goes_on(home, case, args):
    before = home / "out/whole"
    folder, whole, plain = (home / "out" / f"{kind} {case}" for kind in ("killed", "not killed", "plain"))
    if case != "new":
        shutil.copytree(before, folder)
        shutil.copytree(before, whole)
    pretrain(whole, *args)
    pretrain(plain, *SHORT)
    for moment in some(moments(folder, pretrain, folder, *args), 6):
        put_back(moment, folder)
        is_run = any(folder.glob("*.pt")) and not (folder / "run.replaced").exists()
        told = says_why(pretrain, folder, *SHORT)  # the plain command
        if is_run:
            assert "a run is here already" in str(told), (moment, told)
            found = says_why(sample.load, folder)
            assert not isinstance(found, UserError) or case != "going on", (moment, found)
            pretrain(folder, "--init_from=resume", *args[1 if case == "going on" else len(args):])
            assert ends_like(folder, [whole, before] if case == "over another" else [whole]), moment
        else:
            assert ends_like(folder, [plain]), (moment, told)
        assert not list(folder.glob("*.tmp")), moment


@posix
def test_a_report_that_is_killed_is_made_by_the_next_command(tmp_path):
    folder, whole, data = tmp_path / "out", tmp_path / "whole", tmp_path / "rows.csv"
    write_rows(data, ("text", "label"), *synthetic(60))
    args = [f"--data={data}", "--epochs=1", *QUICK, "--lora_rank=2"]

    def tuned(place, *args):
        run_here(finetune, f"--out_dir={place}", *args)
    tuned(whole, *args)
    expected = contents(whole)
    for moment in some(moments(folder, tuned, folder, *args), 4):
        put_back(moment, folder)
        told = says_why(tuned, folder, *args)
        if any(moment.glob("*.pt")):
            assert "a run is here already" in str(told), (moment, told)
            tuned(folder, "--init_from=resume")
        assert ends_like(folder, [whole]), moment
        found = contents(folder)
        assert found.keys() == expected.keys(), moment
        for name in ("metrics.json", "predictions.csv", "curves.json"):
            assert found[name] == expected[name], (moment, name)


def made(data: Path, **settings) -> dict:
    """A data set, as prepare.py leaves it."""
    return contents(prepare.prepare("a", source=str(data.parent / "a.txt"), root=data, **settings))


@posix
@pytest.mark.parametrize("case", ["new", "over another"])
def test_a_data_set_whose_making_is_killed_is_the_old_one_or_the_new_one(tmp_path, case):
    (tmp_path / "a.txt").write_text("\n\n".join(PAGES), encoding="utf-8")
    data, args = tmp_path / "data", dict(vocab_size=300, overwrite=case != "new")
    whole = made(tmp_path / "other", vocab_size=300)
    old = {}
    if case == "over another":
        (data / "a").mkdir(parents=True)
        (data / "b").mkdir()
        (data / "b/mine.txt").write_text("mine")
        old = made(data, tokenizer="bytes")
        (data / "a/notes.txt").write_text("mine")
    data.mkdir(exist_ok=True)
    for moment in some(moments(data, partial(made, **args), data), 8):
        put_back(moment, data)
        found = says_why(made, data, vocab_size=300)  # the plain command
        if isinstance(found, UserError):
            assert old and "other settings" in str(found), (moment, found)
            found = contents(data / "a")
            assert found.pop("notes.txt") == b"mine" and found == old, moment
        else:
            assert found.pop("notes.txt", None) == (b"mine" if old else None), moment
            assert found == whole, moment
        assert (data / "b/mine.txt").exists() == bool(old)
        left = {path.name for path in data.iterdir()}
        assert left == {"a", "b"} if old else left == {"a"}, (moment, left)


@posix
@pytest.mark.parametrize("case", ["new", "over another"])
def test_an_export_that_is_killed_is_whole_or_none(home, tmp_path, case):
    folder, tokenizer = tmp_path / "hf", load_body(home / "out/whole")[1]
    old, new = (tiny("modern", seed=seed, vocab_size=300) for seed in (1, 2))
    folder.mkdir()
    if case == "over another":
        old.published = {"generation": {"temperature": 0.5}}
        sample.write_pretrained(old, make_tokenizer("bytes", [], 0), str(folder))
    (folder / "mine.txt").write_text("mine")
    before = contents(folder)
    for moment in some(moments(folder, sample.write_pretrained, new, tokenizer, str(folder)), 8):
        put_back(moment, folder)
        found = says_why(load_body, folder)
        if isinstance(found, UserError):
            assert "no checkpoint here" in str(found), (moment, found)  # no config.json
        else:
            model, its = found
            which = [one for one in (old, new) if same(one.state_dict(), model.state_dict())]
            assert which == [new] or contents(folder).items() >= before.items(), moment
            assert its.encode(PAGES[0]) == tokenizer.encode(PAGES[0]) or which == [old], moment
        sample.write_pretrained(new, tokenizer, str(folder))
        model, its = load_body(folder)
        assert same(new.state_dict(), model.state_dict()), moment
        assert (folder / "mine.txt").exists() and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("args", [TOY, [*TOY, "--overwrite"], ["--init_from=resume", "--max_iters=9"]])
def test_what_another_process_trained_since_this_one_looked_stays(home, monkeypatch, args):
    folder, make = home / "out/met", train.make_optimizers
    shutil.rmtree(folder, ignore_errors=True)
    if args[0] not in TOY:
        pretrain(folder, *SHORT)

    def meanwhile(*args, **more):  # the other one begins and ends
        shutil.copytree(home / "out/whole", folder, dirs_exist_ok=True)
        for file in folder.glob("*.pt"):
            os.utime(file)
        return make(*args, **more)
    monkeypatch.setattr(train, "make_optimizers", meanwhile)
    with pytest.raises(UserError, match="another process has trained here since this one began"):
        pretrain(folder, *args)
    expected = {name: data for name, data in contents(home / "out/whole").items() if name.endswith(".pt")}
    assert contents(folder).items() >= expected.items()


# -----------------------------------------------------------------------------
# Signals, in each phase

SCRIPTS = {train: (Config, stored_settings), finetune: (Config, finetune.stored), prepare: (),
           sample: (Choice,)}


def interrupted(said: Path, number: int, owner, name: str, call: int, script, args: list, cwd: Path) -> None:
    """One of the scripts as its user starts it. The call of owner.name with that number sends a signal."""
    calls, real = itertools.count(1), getattr(owner, name)

    def signalled(*args, **more):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args, **more)
    setattr(owner, name, signalled)
    os.chdir(cwd)
    for one in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, one), signal.default_int_handler if one == "SIGINT" else signal.SIG_DFL)
    sys.argv = [script.__file__, *args]
    sys.stdout = open(os.devnull, "w", encoding="utf-8")
    sys.stderr = open(said, "w", encoding="utf-8")
    launch(script.main, vars(script), *SCRIPTS[script])


PHASES = [  # owner, function and its call in which the signal comes; what does
    (train, "settle", 1, "train"), (train, "fit", 1, "train"), (train, "make_optimizers", 1, "train"),
    (run_file, "write_json", 1, "train"), (train, "train_step", 1, "train"),
    (train, "train_step", 6, "train"), (train, "validate", 1, "train"), (train, "validate", 2, "train"),
    (torch, "save", 1, "train"), (torch, "save", 2, "train"), (torch, "save", 4, "train"),
    (run_file, "plot_losses", 1, "train"),
    (train, "sample_text", 1, "train"),
    (prepare, "read", 1, "prepare"), (prepare, "train_tokenizer", 1, "prepare"),
    (prepare, "write_split", 2, "prepare"), (prepare, "settle", 2, "prepare"),
    (finetune, "read_splits", 1, "folds"), (finetune, "train_step", 2, "folds"),
    (finetune, "evaluate", 1, "folds"), (finetune, "evaluate", 2, "folds"), (torch, "save", 1, "folds"),
    (torch, "save", 4, "folds"), (finetune, "tuned_of", 1, "folds"), (finetune, "predict", 3, "folds"),
    (finetune, "write_json", 1, "folds"), (report, "as_csv", 2, "folds"),
    (finetune, "write_results", 4, "folds"), (finetune, "summary_of_folds", 1, "folds"),
    (sample, "load", 1, "sample"), (Transformer, "hidden", 1, "sample"), (Transformer, "hidden", 5, "sample"),
]
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """Rows, the settings of three trainings on them, and what these leave."""
    folder = tmp_path_factory.mktemp("folds")
    write_rows(folder / "rows.csv", ("text", "label"), *synthetic(60))
    args = ["--data=rows.csv", "--folds=3", "--epochs=1", *QUICK]
    run_here(finetune, "--out_dir=whole", *args, cwd=folder)
    return folder, args


@posix
@pytest.mark.parametrize("number, phase", some(list(itertools.product(SIGNALS, PHASES)), 6, seed=1))
def test_a_signal_in_any_phase_loses_nothing(home, folds, tmp_path, number, phase):
    *where, what = phase
    number, name = getattr(signal, number), "signalled"
    cwd, script, args = {
        "train": (home, train, [*TOY, f"--out_dir=out/{name}"]),
        "prepare": (home, prepare, [f"--source={home / 'toy.txt'}", f"--dataset={name}", "--vocab_size=300"]),
        "folds": (folds[0], finetune, [*folds[1], f"--out_dir={name}"]),
        "sample": (home, sample, ["--out_dir=out/whole", "--max_new_tokens=9", "--stream"])}[what]
    for place in (home / "out" / name, home / "data" / name, folds[0] / name):
        shutil.rmtree(place, ignore_errors=True)
    process, = start(1, interrupted, tmp_path / "said", number, *where, script, args, cwd).processes
    process.join(100)
    status, said = process.exitcode, (tmp_path / "said").read_text(encoding="utf-8")
    assert status in (128 + number, -number) or status == 0 and what in ("train", "folds"), (status, said)
    if where[1] in ("fit", "make_optimizers", "train_step", "validate", "evaluate", "save"):
        assert status in (128 + number, 0)  # after a save
    assert "Traceback" not in said and len(said.splitlines()) < 2, said
    if what == "train":
        folder = home / "out" / name
        told = says_why(pretrain, folder, *TOY)
        if isinstance(told, UserError):
            assert "a run is here already" in str(told), told
            pretrain(folder, "--init_from=resume")
        assert ends_like(folder, [home / "out/whole"])
    elif what == "prepare":
        folder = prepare.prepare(name, source=str(home / "toy.txt"), root=home / "data", vocab_size=300)
        assert contents(folder)["train.bin"] == contents(home / "data/toy")["train.bin"]
        assert not list((home / "data").glob(f".{name}*"))
    elif what == "folds":
        place, args = folds
        told = says_why(run_here, finetune, f"--out_dir={name}", *args, cwd=place)
        if isinstance(told, UserError):
            assert "a run is here already" in str(told), told
            run_here(finetune, f"--out_dir={name}", "--init_from=resume", cwd=place)
        for file in ("metrics.json", "predictions.csv", "fold3/predictions.csv"):
            assert (place / name / file).read_bytes() == (place / "whole" / file).read_bytes()


@posix
@pytest.mark.parametrize("program", ["train.py", "finetune.py", "sample.py", "prepare.py", "tools/bench.py",
                                     "tools/explain.py", "tools/growth.py", "tools/search.py"])
def test_ctrl_c_during_the_imports_is_silent(tmp_path, program):
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt")  # for torch, which takes seconds
    ways = {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))), "PATH": ""}
    done = subprocess.run([sys.executable, "-m", program[:-3].replace("/", ".")], env=ways, cwd=tmp_path,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and not done.stderr, done.stderr
    if program == "train.py":  # one that is not ours keeps its traceback
        done = subprocess.run([sys.executable, "-c", "import train"], env=ways, cwd=tmp_path,
                              capture_output=True, text=True)
        assert "Traceback" in done.stderr


# -----------------------------------------------------------------------------
# Damaged files

def damaged(data: bytes, is_json: bool, rng) -> bytes:
    """Cut, a byte or a few changed, a block of zeros, something in between; JSON with another value in it."""
    at, end = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    kind = rng.integers(10 if is_json else 7)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes(min(end, at + 4096) - at) + data[end if end < at + 4096 else at + 4096:]
    if kind == 2:
        return data[:at] + rng.bytes(20) + data[at:]
    if kind == 3:
        return data[:at] + data[end:]
    if kind < 7:
        changed = bytearray(data)
        for i in rng.integers(0, len(data), 1 if kind == 4 else 5).tolist():
            changed[i] ^= int(rng.integers(1, 256))
        return bytes(changed)
    lines = data.decode("utf-8").splitlines() if data.count(b"\n{") else [data.decode("utf-8")]
    chosen = int(rng.integers(len(lines)))
    value = json.loads(lines[chosen])
    place, key = value, None
    while isinstance(place, (dict, list)) and len(place) and (key is None or rng.random() < 0.7):
        parent, key = place, list(place)[rng.integers(len(place))] if isinstance(place, dict) else int(
            rng.integers(len(place)))
        place = parent[key]
    if key is not None:
        others = [None, -1, 0, 2**70, 1e400, "x", [], {}, True, [[]], {"a": {}}]
        parent[key] = others[rng.integers(len(others))]
    lines[chosen] = json.dumps(value)
    return "\n".join(lines).encode("utf-8")


def go_on(folder: Path, original: dict) -> None:
    pretrain(folder, "--init_from=resume", "--max_iters=9")
    assert checkpoint(folder)["state"]["step"] == 9


def use(folder: Path, original: dict) -> None:
    model = sample.load(folder)[0]
    weights = dict(model.state_dict())
    files = [io.BytesIO(data) for name, data in original.items() if name.endswith(".pt")]
    assert any(same(weights, torch.load(file, weights_only=True)["model"]) for file in files)


def train_on(folder: Path, original: dict) -> None:
    os.environ["XDG_CACHE_HOME"] = str(folder)
    run_here(train, *TOY, "--max_iters=1", f"--dataset={folder.name}", "--out_dir=out/on_damaged",
             "--overwrite", cwd=folder.parent.parent)
    for name in ("train.bin", "val.bin"):
        assert original[name] == (folder / name).read_bytes()


def look_at(folder: Path, original: dict) -> None:
    prepare.print_report(folder)
    prepare.show_documents(folder, 1, 0)


def prepare_again(folder: Path, original: dict) -> None:
    prepare.prepare(folder.name, source=str(folder.parent.parent / "toy.txt"), vocab_size=300,
                    root=folder.parent)


def make_anew(folder: Path, original: dict) -> None:
    prepare.prepare(folder.name, source=str(folder.parent.parent / "toy.txt"), vocab_size=300,
                    root=folder.parent, overwrite=True)
    assert contents(folder)["train.bin"] == original["train.bin"]


def use_published(folder: Path, original: dict) -> None:
    model, tokenizer = load_body(folder)
    tokenizer.decode(tokenizer.encode("a b"))
    model.generate(torch.zeros(1, 1, dtype=torch.int64), 2)


def answer(folder: Path, original: dict) -> None:
    sample.load(folder)[0].predict(["w3 fine"])


def report_again(folder: Path, original: dict) -> None:
    run_here(finetune, f"--out_dir={folder}", "--init_from=resume")


def search_on(folder: Path, original: dict) -> None:
    first = json.loads(original["search.jsonl"].splitlines()[0])
    rows = search.read_rows(folder / "search.jsonl", first)
    search.table(search.ranked(rows, min), "val_loss")
    search.test_of(folder, "val_accuracy")


def read_rows_of(task: str, file: str, folder: Path, original: dict) -> None:
    s = SimpleNamespace(**{**finetune_defaults, "task": task, "data": str(folder / file), "out_dir": "out"})
    s.columns = splits.known_columns(s, {})
    splits.read_splits(s, lambda what: None)


finetune_defaults = {name: vars(finetune)[name] for name in finetune.__annotations__}
WORDS = [f"w{i} {'fine' if i % 2 else 'dull'} été\n" for i in range(40)]
LABELLED = {  # file -> task, content
    "rows.csv": ("classify", "text,label,n\n" + "".join(f'"{t.strip()}, ""x""",{i % 2},{i}\n'
                                                        for i, t in enumerate(WORDS))),
    "rows.tsv": ("regress", "text\tlabel\n" + "".join(f"{t.strip()}\t{i / 7}\n"
                                                      for i, t in enumerate(WORDS))),
    "rows.jsonl": ("classify", "".join(json.dumps({"text": t, "label": ["a", "b"][i % 2]}) + "\n"
                                       for i, t in enumerate(WORDS))),
    "rows.conll": ("tag", "".join(t.strip().replace(" ", " B-X\n") + " O\n\n" for t in WORDS)),
    "rows.json": ("qa", json.dumps({"data": [{"title": "t", "paragraphs": [{"context": t, "qas": [
        {"id": str(i), "question": "what?", "answers": [{"text": "w", "answer_start": 0}]}]}]}
        for i, t in enumerate(WORDS)]})),
}


@pytest.fixture(scope="module")
def kinds(home, tuned, tmp_path_factory):
    """Name -> a folder of files, those to damage, and what reads them."""
    folder = tmp_path_factory.mktemp("kinds")
    published = folder / "published"
    model = tiny("modern", vocab_size=300)
    model.published = {"generation": {"temperature": 0.5}}
    sample.write_pretrained(model, load_body(home / "out/whole")[1], str(published))
    parts = shutil.copytree(published, folder / "parts")
    import safetensors.torch
    weights = safetensors.torch.load_file(parts / "model.safetensors")
    (parts / "model.safetensors").unlink()
    names, where = list(weights), {}
    for n in (0, 1):
        some_of = {name: weights[name] for name in names[n::2]}
        safetensors.torch.save_file(some_of, parts / f"model-{n}.safetensors")
        where |= dict.fromkeys(some_of, f"model-{n}.safetensors")
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    rows = folder / "rows"
    rows.mkdir()
    for name, (_, content) in LABELLED.items():
        (rows / name).write_text(content, encoding="utf-8")
    trials = folder / "search"
    trials.mkdir()
    row = {"settings": {"learning_rate": 0.1}, "state": "done", "value": 0.5, "note": "", "seconds": 1.0,
           "curve": [[1, 0.5]]}
    lines = [{"script": "train.py"}, *({"trial": i, **row} for i in range(3))]
    (trials / "search.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copy(tuned / "out/metrics.json", trials)
    run, data = home / "out/whole", home / "data/toy"
    bins, ids = ("train.bin", "val.bin"), ("tokenizer.json", "tokenizer_config.json")
    found = [
        (run, ("ckpt.pt", "ckpt.prev.pt", "best.pt", "log.jsonl", "settings.json"), go_on),
        (run, ("ckpt.pt", "best.pt"), use),
        (data, ("meta.json", *bins), train_on), (data, ("meta.json", *bins, "test.bin"), look_at),
        (data, ("meta.json",), prepare_again), (data, ("meta.json", "val.bin"), make_anew),
        (published, ("config.json", "model.safetensors", "generation_config.json", *ids), use_published),
        (parts, ("model.safetensors.index.json", "model-0.safetensors", "config.json"), use_published),
        (tuned / "out", ("best.pt",), answer),
        (tuned / "out", ("metrics.json", "ckpt.pt", "best.pt", "log.jsonl"), report_again),
        (trials, ("search.jsonl", "metrics.json"), search_on),
        *((rows, (name,), partial(read_rows_of, task, name)) for name, (task, _) in LABELLED.items())]
    return [(where, name, read) for where, names, read in found for name in names]


def in_another_process(do, said: Path, seconds: float = 60.0) -> int | None:
    """The exit status: 0, 3 for one line of a reason, 1 for anything else; None if it hung."""
    number = os.fork()
    if not number:
        status = 1
        with open(said, "w", encoding="utf-8") as f:
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    do()
                status = 0
            except UserError as error:
                status = 1 if "\n" in str(error) else 3
                f.write(str(error))
            except BaseException:
                f.write(traceback.format_exc())
        os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    return None


@slow
@posix
def test_damaged_files_are_one_line_or_no_matter(home, kinds, tmp_path):
    """No traceback, no hang, no other weights, and what was refused is left as it was."""
    counts, wrong = Counter(), []
    for i in some(list(range(len(kinds) * -(-200 // len(kinds)))), 25):
        where, name, read = kinds[i % len(kinds)]
        folder = where.parent / "damaged"
        original = contents(put_back(where, folder))
        data = damaged(original[name], name.endswith((".json", ".jsonl")), np.random.default_rng(i))
        (folder / name).write_bytes(data)
        before = contents(folder)
        status = in_another_process(partial(read, folder, original), tmp_path / "said")
        counts[status] += 1
        after = contents(folder).values()
        kept = all(before[one] in after for one in before if one not in ("log.jsonl", "settings.json"))
        kept = kept or status == 0
        if status not in (0, 3) or not kept:
            wrong.append((i, name, read, status, kept, (tmp_path / "said").read_text(encoding="utf-8")))
        shutil.rmtree(folder)
    print(f"{sum(counts.values())} damaged files: {counts[0]} were of no matter, {counts[3]} are a line")
    assert not wrong, "\n".join(map(str, wrong))


# -----------------------------------------------------------------------------
# Optimizer states

@pytest.mark.parametrize("optimizer", list(train.OPTIMIZERS))
def test_a_state_of_another_shape_never_reaches_an_optimizer(optimizer):
    model = tiny("modern")
    names = {p: name for name, p in model.named_parameters()}
    made = partial(train.make_optimizers, model, optimizer, 1e-3, 1e-2, 0.1, (0.9, 0.95), 0.9)
    optimizers = made()
    model(torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64))[1].backward()
    for one in optimizers:
        one.step()
    saved = optimizer_state(optimizers, model)
    assert saved.keys() == set(names.values())
    for name, key in [(name, key) for name, state in saved.items() for key in state]:
        value = saved[name][key]
        others = [value.double(), value[..., None], value.new_zeros(3, 5), value.flatten()[:-1]]
        for other in others:
            with pytest.raises(ValueError, match=f"{name}: the optimizer's {key} is"):
                load_optimizer_state(made(), model, {**saved, name: {**saved[name], key: other}})
        one_number = value.flatten()[:1].expand(value.numel()).view(value.shape)  # in memory
        fresh = made()
        load_optimizer_state(fresh, model, {**saved, name: {**saved[name], key: one_number}})
        loaded = optimizer_state(fresh, model)[name][key]
        assert loaded.is_contiguous() and same(loaded, one_number)
