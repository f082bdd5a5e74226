"""What the README promises."""
import json
import re
import shlex
import shutil

import pytest

import config as settings
import finetune
import prepare
import sample
import train
from model import Config
from tests.helpers import ROOT, run_here, script, slow
from tools import explain, search

NANOGPT = {  # their files, a statement a word
    "shakespeare_char": "out_dir='out-shakespeare-char' eval_interval=250 eval_iters=200 log_interval=10 "
        "always_save_checkpoint=False wandb_log=False wandb_project='shakespeare-char' "
        "wandb_run_name='mini-gpt' dataset='shakespeare_char' gradient_accumulation_steps=1 batch_size=64 "
        "block_size=256 n_layer=6 n_head=6 n_embd=384 dropout=0.2 learning_rate=1e-3 max_iters=5000 "
        "lr_decay_iters=5000 min_lr=1e-4 beta2=0.99 warmup_iters=100",
    "gpt2": "wandb_log=True wandb_project='owt' wandb_run_name='gpt2-124M' batch_size=12 block_size=1024 "
        "gradient_accumulation_steps=5*8 max_iters=600000 lr_decay_iters=600000 eval_interval=1000 "
        "eval_iters=200 log_interval=10 weight_decay=1e-1",
}
SMALLER = {
    "shakespeare_char": ["--n_embd=24", "--batch_size=2"],
    "gpt2": ["--dataset=toy", "--block_size=64", "--n_layer=1", "--n_embd=24", "--batch_size=1",
             "--gradient_accumulation_steps=2"],
}


@pytest.mark.parametrize("name", NANOGPT)
def test_nanogpt_config_files_run_unmodified(home, tmp_path, monkeypatch, name):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    shutil.copytree(home / "data", tmp_path / "data")
    (tmp_path / "theirs.py").write_text(NANOGPT[name].replace(" ", "\n"), encoding="utf-8")
    chars = tmp_path / "chars.txt"
    chars.write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n" * 90)
    prepare.prepare("shakespeare_char", source=str(chars), tokenizer="bytes", test_fraction=0,
                    root=tmp_path / "data")  # the name is a built-in, its text a download
    said = run_here(train, "theirs.py", "--max_iters=2", "--eval_iters=2", "--compile=False", "--device=cpu",
                    *SMALLER[name], cwd=tmp_path)
    assert "iter 2/2" in said


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [part.strip() for line in lines if line for part in line.split("&&")]


def test_the_readme_s_commands_are_right(monkeypatch):
    """Each is pip, pytest, or a script of ours with files and settings that it takes."""
    monkeypatch.chdir(ROOT)
    seen = set()
    for words in map(shlex.split, readme_commands()):
        if words[0] == "pip" or words[:3] == ["python", "-m", "pytest"]:
            continue
        if words[:3] == ["python", "-m", "tools.search"]:
            own = [word for word in words if word.partition("=")[0].lstrip("-") in search.__annotations__]
            settings.configure(dict(vars(search)), None, own)
            others = [word for word in words[4:] if word not in own]
            assert search.read_words(others, search.settings_of(words[3]))[1]
            continue
        scripts = {"train.py": train, "prepare.py": prepare, "sample.py": sample, "finetune.py": finetune,
                   "tools.explain": explain}
        at = next(i for i, word in enumerate(words) if word in scripts)
        args = [word for word in words[at + 1:] if word != "--help"]
        module = scripts[words[at]]
        settings.configure(dict(vars(module)), Config if module in (train, finetune) else None, args)
        seen.add(words[at])
    assert seen >= {"train.py", "prepare.py", "sample.py"}


def test_every_recipe_is_one_that_train_takes():
    others = set((ROOT / "config").glob("finetune_*.py"))
    for path in sorted(set((ROOT / "config").glob("[!_]*.py")) - others):
        given = settings.configure(dict(vars(train)), Config, [str(path)])
        Config(**given)


@slow
def test_the_quickstart(tmp_path):
    """The README's first command as it stands, with fewer steps; then sampling without the data."""
    done = script(
        "train.py", str(ROOT / "config/small.py"), "--max_iters=60", "--eval_interval=30", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and "A sample" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out/small/log.jsonl").read_text().splitlines()]
    assert rows[-1]["val_bpb"] < 3.0 and rows[-1]["iter"] == 60
    shutil.rmtree(tmp_path / "data")
    done = script("sample.py", "--start=import ", "--max_new_tokens=20", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("import "), done.stderr
