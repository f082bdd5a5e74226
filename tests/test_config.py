"""Settings: flags, config files, types and ranges, help, and what a run remembers."""
import ast
import errno
import io
import os
import re
import subprocess
import sys

import pytest

import config as settings
import finetune
import prepare
import sample
import train
from config import SettingError
from model import Config
from tests.helpers import ROOT, TOY, checkpoint, one_line, posix, says, script, slow
from tools import bench, explain, search

SCRIPT = '''
"""What it does."""
from __future__ import annotations
from dataclasses import dataclass
from typing import Literal, Optional, Union
from config import above, at_least
SCHEDULES = {"cosine": 1, "linear": 2}
init_from: str = "scratch"  # or resume
out_dir: str = "out"  # where to
batch_size: at_least(1) = 12  # windows
learning_rate: above(0.0) = 1e-3  # highest
dropout: at_least(0.0, below=1.0) = 0.0  # share
compile: bool = True  # faster
top_k: Optional[at_least(1)] = None  # choose among
schedule: Literal[tuple(SCHEDULES)] = "cosine"  # of the rate
stop: Union[str, list] = ""  # end before
'''


@pytest.fixture
def a_script(tmp_path):
    """A script's globals, as configure sees them."""
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    namespace = {"__file__": str(tmp_path / "script.py")}
    exec(SCRIPT, namespace)
    return namespace


def test_settings_go_left_to_right(a_script, tmp_path):
    (tmp_path / "a.py").write_text(
        "import math\nfrom math import sqrt\n_half = 8\nbatch_size = 2 * _half\nn_layer = int(sqrt(9))\n")
    (tmp_path / "b.py").write_text("learning_rate = 1\n")
    a, b = str(tmp_path / "a.py"), str(tmp_path / "b.py")
    given = settings.configure(a_script, Config, [a, "--batch_size=5", b, "--n_embd=64", "--compile=false",
                                                  "--out_dir=a=b", "--top_k=None"])
    assert given == {"n_layer": 3, "n_embd": 64}  # only the fields that were given
    assert a_script["batch_size"] == 5 and a_script["out_dir"] == "a=b" and a_script["top_k"] is None
    assert type(a_script["learning_rate"]) is float and a_script["compile"] is False
    settings.configure(a_script, Config, [a, "--compile", "--stop=['a', 'b']"])
    assert a_script["batch_size"] == 16 and a_script["compile"] is True and a_script["stop"] == ["a", "b"]
    (tmp_path / "mine.py").write_text("from config.small import *\nn_layer = n_layer + 1\n")
    given = settings.configure(dict(vars(train)), Config, [str(tmp_path / "mine.py")])
    assert given["n_layer"] == 5 and given["pos"] == "rope"


def test_a_setting_without_a_type_has_its_value_s(tmp_path):
    text = SCRIPT.replace("batch_size: at_least(1) =", "mine = 0.5  # its help\nbatch_size =")
    (tmp_path / "script.py").write_text(text, encoding="utf-8")
    namespace = {"__file__": str(tmp_path / "script.py")}
    exec(text, namespace)
    before = settings.settings_of(namespace)
    assert before["mine"] == (float, 0.5, "its help") and before["batch_size"].kind is int
    settings.configure(namespace, None, ["--mine=2", "--batch_size=7"])
    values = settings.values_of(namespace)  # which every run stores
    assert (values["mine"], values["batch_size"]) == (2.0, 7)
    with pytest.raises(SettingError, match="--batch_size: wanted int"):
        settings.configure(namespace, None, ["--batch_size=x"])


def test_a_config_file_computes_with_what_is_set_before_and_with_names_of_its_own(a_script, tmp_path):
    file = tmp_path / "c.py"
    lines = ("scale = 3", "n_layer = scale * 2", "learning_rate = learning_rate / 4", "n_embd = 2 * n_embd")
    file.write_text("\n".join(lines))
    given = settings.configure(a_script, Config, ["--learning_rate=1.0", str(file)])
    assert a_script["learning_rate"] == 0.25 and given == {"n_layer": 6, "n_embd": 2 * 768}
    file.write_text("batch_size = 1e1\nn_layer = 6 / 2")
    assert settings.configure(a_script, Config, [str(file)]) == {"n_layer": 3}
    assert type(a_script["batch_size"]) is int and a_script["batch_size"] == 10
    for text, words in (("n_layer = 2.5\n", ["c.py:1: n_layer: wanted int", "got 2.5"]),
                        ("scale = 3\n", ["c.py:1: unknown setting 'scale'", "begins with _"]),
                        ("n_layers = 3\nn_embd = 64 * n_layers\n", ["c.py:1", "'n_layers'", "'n_layer'"])):
        file.write_text(text)
        with pytest.raises(SettingError) as error:
            settings.configure(a_script, Config, [str(file)])
        says(error, *words)
    file.write_text("out_dir = 'out/mine'\nmax_iter = 3\n")
    with pytest.raises(SettingError, match="c.py:2: unknown setting 'max_iter', did you mean 'max_iters'"):
        settings.configure(dict(vars(train)), Config, [str(file)])
    with pytest.raises(SettingError, match="a recipe is to train by: --out_dir=out/mine is its run"):
        settings.configure(dict(vars(sample)), None, [str(file)])


@pytest.mark.parametrize("arg, words", [
    ("--batchsize=3", ["--batchsize", "'batch_size'"]), ("--n_layers=3", ["--n_layers", "--n_layer"]),
    ("--batch-size=3", ["--batch-size", "'batch_size'"]), ("-h2", ["-h2"]),
    ("--batch_size=2.5", ["--batch_size", "int", "2.5"]), ("--batch_size=True", ["int", "True"]),
    ("--batch_size", ["--batch_size", "needs a value", "int"]), ("--learning_rate=fast", ["float", "fast"]),
    ("--compile=3", ["bool", "3"]), ("--top_k=x", ["int at least 1 or None", "x"]),
    ("--schedule=cosin", ["cosine, linear", "cosin"]), ("--n_head=many", ["--n_head", "int", "many"]),
    ("smal", ["smal", "config/small.py"]), ("32", ["32", "--key=value"]),
    # ranges
    ("--batch_size=0", ["int at least 1", "0"]), ("--learning_rate=0", ["float above 0", "0"]),
    ("--dropout=1.0", ["float at least 0 and below 1", "1.0"]), ("--dropout=-0.1", ["-0.1"]),
    ("--top_k=0", ["int at least 1 or None", "0"]), ("--learning_rate=nan", ["float above 0", "nan"]),
    # what was a setting, or a recipe
    ("--zzz=1", ["unknown setting 'zzz' (--help"]), (str(ROOT), ["a folder", f"--out_dir={ROOT}?"]),
    ("--profile", ["profile", "no setting any more", "python -m tools.bench"]),
    ("--teacher_weight=0.3", ["teacher_share"]), ("--chat", ["unknown setting 'chat' (--help"]),
    ("config/bench.py", ["config/bench.py", "is gone", "tools.bench"]),
])
def test_wrong_flags_are_named_with_the_remedy(a_script, arg, words):
    with pytest.raises(SettingError) as error:
        settings.configure(a_script, Config, [arg])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("n_layer = 2\nbatchsize = 3\n", ["bad.py:2", "'batchsize'", "'batch_size'"]),
    ("n_layer = '2'\n", ["bad.py:1", "n_layer", "int", "'2'"]),
    ("n_layer = 2\nn_head = 1 / 0\n", ["bad.py:2", "ZeroDivisionError"]),
    ("n_layer = (\n", ["bad.py:1", "SyntaxError"]),
    ("from config.smal import *\n", ["bad.py:1", "config.smal"]),
    ("schedule = 'cubic'\n", ["bad.py:1", "cosine, linear", "cubic"]),
    ("dropout = float('nan')\n", ["bad.py:1", "at least 0 and below 1", "nan"]),
    ("\nprofile = True\n", ["bad.py:2", "tools.bench"]),
])
def test_wrong_config_files_are_named_with_the_line(a_script, tmp_path, text, words):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(SettingError) as error:
        settings.configure(a_script, Config, [str(tmp_path / "bad.py")])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_bounds_are_in_the_range_unless_they_are_exclusive():
    for kind, inside, outside in (
            (settings.at_least(1), (1, 10**9), (0, 1.0, True)), (settings.at_least(0.0), (0, 0.0), (-1e-9,)),
            (settings.above(0.0, at_most=1.0), (1e-9, 1, 1.0), (0.0, 1.0001)),
            (settings.at_least(0.0, below=1.0), (0.0, 0.999), (1.0, 1, float("inf"))),
            (settings.above(2), (3,), (2,))):
        assert all(settings.is_a(value, kind) for value in inside), kind
        assert not any(settings.is_a(value, kind) for value in outside), kind


def test_a_new_line_of_a_table_is_a_value_that_is_taken(a_script):
    a_script["SCHEDULES"]["cubic"] = 3
    settings.configure(a_script, None, ["--schedule=cubic"])
    assert a_script["schedule"] == "cubic"


def test_a_resumed_run_has_its_settings_but_for_what_is_given(a_script):
    then = {"batch_size": 3, "learning_rate": 0.5, "out_dir": "elsewhere", "init_from": "scratch",
            "n_layer": 5, "gone": 1, "dropout": 0.0}
    defaults = {"batch_size": 12, "learning_rate": 1e-3, "dropout": 0.3}  # one was edited in the script since
    asked = []

    def stored(folder):
        asked.append(folder)
        return then, defaults
    given = settings.configure(a_script, Config, ["--init_from=resume", "--out_dir=x", "--learning_rate=0.1"],
                               stored)
    assert given == {"n_layer": 5} and asked == ["x"] and a_script["out_dir"] == "x"
    assert a_script["batch_size"] == 3 and a_script["learning_rate"] == 0.1 and a_script["dropout"] == 0.0
    then["dropout"] = 0.3  # what the script had then: the edited one counts as given
    settings.configure(a_script, Config, ["--init_from=resume"], stored)
    assert a_script["dropout"] == 0.0 and a_script["init_from"] == "resume"
    assert settings.configure(a_script, Config, ["--init_from=scratch"], stored) == {} and len(asked) == 2
    settings.configure(a_script, Config, ["--init_from=resume", "--out_dir=out/x/ckpt.pt"], stored)
    assert asked[2:] == [a_script["out_dir"]] == [os.path.join("out", "x")]  # the folder of a checkpoint


def test_settings_json_is_a_config_file(a_script, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"batch_size": 3, "top_k": null, "n_layer": 5, "overwrite": true}')
    assert settings.configure(a_script, Config, [str(file), "--batch_size=4"]) == {"n_layer": 5}
    assert a_script["batch_size"] == 4 and a_script["top_k"] is None and "overwrite" not in a_script
    for text, words in (("[", "damaged"), ('{"batch_size": "x"}', "batch_size: wanted int"),
                        ('{"gone": 1}', "gone")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(SettingError, match=f"bad.json: .*{words}"):
            settings.configure(a_script, Config, [str(tmp_path / "bad.json")])


def test_help_after_a_config_file_shows_what_it_says(a_script, tmp_path, capsys):
    (tmp_path / "a.py").write_text("batch_size = 7\n")
    with pytest.raises(SystemExit):
        settings.configure(a_script, Config, ["--help", str(tmp_path / "a.py"), "--n_layer=3"])
    said = capsys.readouterr().out
    assert re.search(r"--batch_size=7 .*; default 12$", said, re.MULTILINE)
    assert re.search(r"--n_layer=3 .*; default 12$", said, re.MULTILINE) and "--n_head=12 " in said
    with pytest.raises(SystemExit):  # and of a run what it remembers
        settings.configure(a_script, Config, ["--init_from=resume", "--help"], lambda _: ({"n_layer": 5}, {}))
    assert "--n_layer=5 " in capsys.readouterr().out


SCRIPTS = {train: Config, finetune: Config, sample: sample.Choice, prepare: None, explain: None, search: None,
           bench: Config}


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_help_lists_every_setting_with_type_default_and_comment(module, capsys):
    fields = SCRIPTS[module]
    with pytest.raises(SystemExit):
        settings.configure(dict(vars(module)), fields, ["--help"])
    said = capsys.readouterr().out
    tree = ast.parse((ROOT / module.__file__).read_text(encoding="utf-8"))
    declared = [node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)]
    inherited = list(fields.__dataclass_fields__) if fields else []  # of those that it extends, too
    assert len(declared) > 5
    for name in declared + inherited:
        assert re.search(rf"^  --{name}=\S.*? {{1,}}\S+.*; .+$", said, re.MULTILINE), name


class Lost(io.StringIO):
    """A stream to a place that is gone."""

    def __init__(self, error: OSError, fileno: int):
        super().__init__()
        self.error, self.fileno = error, lambda: fileno

    def flush(self):
        if not os.path.samestat(os.fstat(self.fileno()), os.stat(os.devnull)):
            raise self.error


@pytest.mark.parametrize("error, ends, words", [
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), SystemExit, "1"),
    (OSError(errno.ENOSPC, "No space left on device"), settings.UserError, "on device: make room"),
])
def test_a_console_that_is_lost_ends_only_those_that_need_it(tmp_path, monkeypatch, error, ends, words):
    monkeypatch.setattr(settings.Console, "needed", False)
    with open(tmp_path / "there", "w") as file:
        console = settings.Console(Lost(error, file.fileno()))
        monkeypatch.setattr(sys, "stdout", console)
        print("lost", flush=True)
        print("nor does this harm", flush=True)
    with open(tmp_path / "there", "w") as file:
        console.stream.fileno = file.fileno
        monkeypatch.setattr(settings.Console, "needed", True)
        with pytest.raises(ends, match=words):
            print("lost", flush=True)


def test_characters_that_a_console_lacks_are_replaced(tmp_path):
    with open(tmp_path / "ascii", "w", encoding="ascii") as file:
        print("a 中 z", file=settings.Console(file))
    assert (tmp_path / "ascii").read_text() == "a ? z\n"


@pytest.mark.parametrize("error, words", [
    (PermissionError(errno.EACCES, "Permission denied", "out/x"), "out/x: Permission denied: you may not"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300), "nnn: File name too long: give a shorter"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "data/x"), "Not a directory: a file is where"),
    (RuntimeError("CUDA out of memory. Tried"), "out of memory: take a smaller model"),
    (MemoryError(), "out of memory: take a smaller model"),
])
def test_what_the_machine_lacks_is_one_line_wherever_it_shows(monkeypatch, capsys, a_script, error, words):
    def main():
        raise error
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(settings, "open_console", lambda: None)
    with pytest.raises(SystemExit, match="1"):
        settings.launch(main, a_script)
    told = capsys.readouterr().err
    assert told.startswith("error: ") and words in told and told.count("\n") == 1
    with pytest.raises(RuntimeError, match="a fault of ours"):
        error = RuntimeError("a fault of ours")
        settings.launch(main, a_script)


@posix
@pytest.mark.parametrize("how", ["pipe", pytest.param("full", marks=slow), pytest.param("none", marks=slow)])
def test_training_goes_on_without_a_console_and_writing_does_not(home, how):
    for name, args, status in (("train.py", [*TOY, "--out_dir=out/unseen", "--overwrite"], 0),
                               ("sample.py", ["--out_dir=out/whole"], 1)):
        stdout = {"pipe": subprocess.PIPE, "full": open("/dev/full", "w"), "none": None}[how]
        command = [sys.executable, str(ROOT / name), *args]
        if how == "none":
            command = ["sh", "-c", '"$@" >&-', "sh", *command]
        process = subprocess.Popen(command, cwd=home, stdout=stdout, stderr=subprocess.PIPE, text=True)
        if process.stdout:
            process.stdout.close()
        said = process.communicate()[1]
        assert process.returncode == status and "Traceback" not in said, said
        assert ("cannot be written" in said) == (how == "full" and status == 1)
    assert checkpoint(home / "out/unseen")["state"]["step"] == 8


def test_scripts_end_with_2_on_a_bad_setting_and_1_on_what_is_missing(tmp_path):
    one_line(script("train.py", "--n_head=5", cwd=tmp_path), 2, "n_embd", "n_head=5")
    one_line(script("sample.py", cwd=tmp_path), 1, "no checkpoint")
    recipe = str(ROOT / "config" / "small.py")
    one_line(script("sample.py", recipe, cwd=tmp_path), 2, "small.py: a recipe", "--out_dir=out/small")
