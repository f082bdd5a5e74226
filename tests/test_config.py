"""Settings: flags, config files, types, help."""
import ast
import re
from dataclasses import asdict

import pytest
import torch

import config as settings
import train
from config import SettingError
from model import Config
from tests.helpers import ROOT, one_line, script


@pytest.fixture
def a_script(tmp_path):
    """A script's globals, as configure sees them."""
    source = '''
"""What it does."""
from typing import Literal, Optional, Union
out_dir: str = "out"  # where to
batch_size: int = 12  # windows
learning_rate: float = 1e-3  # highest
compile: bool = True  # faster
top_k: Optional[int] = None  # choose among
schedule: Literal["cosine", "linear"] = "cosine"  # of the rate
stop: Union[str, list] = ""  # end before
'''
    (tmp_path / "script.py").write_text(source, encoding="utf-8")
    namespace = {"__file__": str(tmp_path / "script.py")}
    exec(source, namespace)
    return namespace


def test_settings_go_left_to_right(a_script, tmp_path):
    (tmp_path / "a.py").write_text(
        "import math\nfrom math import sqrt\n_half = 8\nbatch_size = 2 * _half\nn_layer = int(sqrt(9))\n"
    )
    (tmp_path / "b.py").write_text("learning_rate = 1\n")
    given = settings.configure(
        a_script,
        Config,
        [str(tmp_path / "a.py"), "--batch_size=5", str(tmp_path / "b.py"), "--n_embd=64", "--compile=false",
         "--out_dir=a=b", "--top_k=None"],
    )
    assert given == {"n_layer": 3, "n_embd": 64}  # only the fields that were given
    assert a_script["batch_size"] == 5 and a_script["out_dir"] == "a=b" and a_script["top_k"] is None
    assert a_script["learning_rate"] == 1.0 and type(a_script["learning_rate"]) is float
    assert a_script["compile"] is False
    settings.configure(a_script, Config, [str(tmp_path / "a.py"), "--compile", "--stop=['a', 'b']"])
    assert a_script["batch_size"] == 16 and a_script["compile"] is True and a_script["stop"] == ["a", "b"]


def test_a_config_starts_from_another(a_script, tmp_path):
    (tmp_path / "mine.py").write_text("from config.small import *\nn_layer = n_layer + 1\n")
    given = settings.configure(
        train.__dict__ | {"__file__": train.__file__}, Config, [str(tmp_path / "mine.py")]
    )
    assert given["n_layer"] == 5 and given["pos"] == "rope"


@pytest.mark.parametrize(
    "arg, words",
    [("--batchsize=3", ["--batchsize", "'batch_size'"]), ("--n_layers=3", ["--n_layers", "--n_layer"]),
     ("--batch-size=3", ["--batch-size", "'batch_size'"]), ("-h2", ["-h2"]),
     ("--batch_size=2.5", ["--batch_size", "int", "2.5"]), ("--batch_size=True", ["int", "True"]),
     ("--batch_size", ["--batch_size", "needs a value", "int"]), ("--learning_rate=fast", ["float", "fast"]),
     ("--compile=3", ["bool", "3"]), ("--top_k=x", ["int or None", "x"]),
     ("--schedule=cosin", ["cosine, linear", "cosin"]), ("--n_head=many", ["--n_head", "int", "many"]),
     ("smal", ["smal", "config/small.py"]), ("32", ["32", "--key=value"])],
)
def test_wrong_flags_are_named_with_the_remedy(a_script, arg, words):
    with pytest.raises(SettingError) as error:
        settings.configure(a_script, Config, [arg])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [("n_layer = 2\nbatchsize = 3\n", ["bad.py:2", "'batchsize'", "'batch_size'"]),
     ("n_layer = '2'\n", ["bad.py:1", "n_layer", "int", "'2'"]),
     ("n_layer = 2\nn_head = 1 / 0\n", ["bad.py:2", "ZeroDivisionError"]),
     ("n_layer = (\n", ["bad.py:1", "SyntaxError"]),
     ("from config.smal import *\n", ["bad.py:1", "config.smal"]),
     ("schedule = 'cubic'\n", ["bad.py:1", "cosine, linear", "cubic"])],
)
def test_wrong_config_files_are_named_with_the_line(a_script, tmp_path, text, words):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(SettingError) as error:
        settings.configure(a_script, Config, [str(tmp_path / "bad.py")])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["train.py", "prepare.py", "finetune.py", "sample.py", "tools/explain.py",
                                  "tools/search.py"])
def test_help_lists_every_setting_with_type_default_and_comment(name, tmp_path):
    text = script(name, "--help", cwd=tmp_path).stdout
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    declared = [node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)]
    assert len(declared) > 5
    for setting in declared + (list(asdict(Config())) if name == "train.py" else []):
        line = re.search(rf"^  --{setting}=\S.*? {{1,}}\S+.*; .+$", text, re.MULTILINE)
        assert line, f"{setting} has no default, type or comment in --help"


def test_scripts_end_with_2_on_a_bad_setting(tmp_path):
    one_line(script("train.py", "--n_layers=2", cwd=tmp_path), 2, "--n_layers", "--n_layer")
    one_line(script("train.py", "--n_head=5", cwd=tmp_path), 2, "n_embd", "n_head=5")
    if not torch.cuda.is_available():
        one_line(script("train.py", "--device=cuda", cwd=tmp_path), 2, "device=cuda")
    one_line(script("sample.py", "--top_p=2", cwd=tmp_path), 2, "top_p")
    one_line(script("sample.py", cwd=tmp_path), 1, "no checkpoint")
