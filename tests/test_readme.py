"""What the README promises."""
import json
import math
import re
import shlex
import shutil

import numpy as np
import pytest
import torch

import config as settings
import finetune
import prepare
import sample
import train
from config import SettingError
from lib.tokenizer import Tokenizer
from model import Config
from tests.helpers import ROOT, checkpoint, in_cache, log_of, run_here, script, slow
from tools import bench, explain, search

EVAL = "batch_size=8 eval_iters=500 eval_only=True wandb_log=False init_from='{}'"
NANOGPT = {  # their files, a statement a word
    "train_shakespeare_char": "out_dir='out-shakespeare-char' eval_interval=250 eval_iters=200 "
        "log_interval=10 always_save_checkpoint=False wandb_log=False wandb_project='shakespeare-char' "
        "wandb_run_name='mini-gpt' dataset='shakespeare_char' gradient_accumulation_steps=1 batch_size=64 "
        "block_size=256 n_layer=6 n_head=6 n_embd=384 dropout=0.2 learning_rate=1e-3 max_iters=5000 "
        "lr_decay_iters=5000 min_lr=1e-4 beta2=0.99 warmup_iters=100",
    "train_gpt2": "wandb_log=True wandb_project='owt' wandb_run_name='gpt2-124M' batch_size=12 "
        "block_size=1024 gradient_accumulation_steps=5*8 max_iters=600000 lr_decay_iters=600000 "
        "eval_interval=1000 eval_iters=200 log_interval=10 weight_decay=1e-1",
    "finetune_shakespeare": "import|time out_dir='out-shakespeare' eval_interval=5 eval_iters=40 "
        "wandb_log=False wandb_project='shakespeare' wandb_run_name='ft-'+str(time.time()) "
        "dataset='shakespeare' init_from='gpt2-xl' always_save_checkpoint=False batch_size=1 "
        "gradient_accumulation_steps=32 max_iters=20 learning_rate=3e-5 decay_lr=False",
    **{f"eval_{name.replace('-', '_')}": EVAL.format(name)
       for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
}
SHORTER = ["--n_layer=1", "--n_embd=24", "--batch_size=1", "--gradient_accumulation_steps=2",
           "--warmup_iters=2", "--max_iters=6", "--lr_decay_iters=6", "--log_interval=1"]


@pytest.fixture
def theirs_here(home, cache, monkeypatch):
    """A folder with small data/openwebtext, and small weights in Hugging Face's cache: GPT-2's, of each size.

    Returns a function: the name of one of their files, settings -> what is printed.
    """
    monkeypatch.setenv("WANDB_MODE", "disabled")
    folder = cache / "here"
    shutil.copytree(home / "data/toy", folder / "data/openwebtext")
    chars = folder / "chars.txt"
    chars.write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n" * 90)
    for name, tokenizer in (("shakespeare", "bpe"), ("shakespeare_char", "bytes")):  # a download's text
        monkeypatch.setitem(prepare.BUILT_IN, name, (str(chars), tokenizer))

    def run(name, *settings):
        config = folder / f"{name}.py"
        config.write_text(NANOGPT[name].replace(" ", "\n").replace("|", " "), encoding="utf-8")
        return run_here(train, config, "--compile=False", "--device=cpu", *settings, cwd=folder)
    return run


def small_gpt2(home, cache, name):
    """Weights under GPT-2's id, with the tokenizer of `home` as Hugging Face writes it."""
    torch.manual_seed(len(name))
    model = pytest.importorskip("transformers").GPT2LMHeadModel
    model = model(model.config_class(vocab_size=300, n_positions=48, n_embd=32, n_layer=2, n_head=2)).eval()
    folder = in_cache(cache, f"openai-community/{name}")
    model.save_pretrained(folder)
    meta = prepare.read_meta(home / "data/toy")
    Tokenizer.from_dict(meta["tokenizer"]).save_pretrained(folder, 48)
    return model


@pytest.mark.parametrize("name", ["train_shakespeare_char", "train_gpt2"])
def test_nanogpt_trains_from_scratch(theirs_here, cache, name):
    block = 64 if name == "train_gpt2" else 256
    said = theirs_here(name, *SHORTER, f"--block_size={block}")
    assert ("shakespeare_char:" if block == 256 else "openwebtext:") in said
    high, low = (1e-3, 1e-4) if block == 256 else (6e-4, 6e-5)
    falling = [low + (high - low) * (1 + math.cos(math.pi * it / 4)) / 2 for it in range(4)]
    wanted = [high / 3, high * 2 / 3, *falling]
    rows = log_of(cache / "here" / ("out-shakespeare-char" if block == 256 else "out"))
    assert [row["lr"] for row in rows if "lr" in row] == pytest.approx(wanted)


def test_nanogpt_finetunes_gpt2_xl(theirs_here, home, cache):
    their = small_gpt2(home, cache, "gpt2-xl")
    theirs_here("finetune_shakespeare", "--gradient_accumulation_steps=4")
    folder = cache / "here/out-shakespeare"
    rates = [row["lr"] for row in log_of(folder) if "lr" in row]
    assert rates == [3e-5] * 20
    meta = prepare.read_meta(cache / "here/data/shakespeare")
    assert meta["settings"]["tokenizer"] == "openai-community/gpt2-xl"
    moved = checkpoint(folder)["model"]["wte.weight"] - their.transformer.wte.weight
    assert 0 < moved.abs().max() < 20 * 3e-5 * 1.5
    said = run_here(sample, "--out_dir=out-shakespeare", "--max_new_tokens=5", cwd=cache / "here")
    assert "-----" in said


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_nanogpt_evaluates_gpt2(theirs_here, home, cache, name):
    """The loss of transformers' model on the same text."""
    their = small_gpt2(home, cache, name)
    said = theirs_here(f"eval_{name.replace('-', '_')}")
    ids = torch.from_numpy(np.fromfile(home / "data/toy/val.bin", "<u2").astype(np.int64))
    n = (len(ids) - 1) // 48
    x, y = ids[:n * 48].view(n, 48), ids[1:n * 48 + 1]
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(their(x).logits.flatten(0, 1), y).item()
    assert f"val loss {loss:.4f}" in said, (loss, said)
    assert not (cache / "here/out").exists()


def test_init_from_is_taken_as_in_nanogpt(home, cache):
    small_gpt2(home, cache, "gpt2-xl")
    how = ("--start=import", "--max_new_tokens=8", "--device=cpu")
    named = run_here(sample, "--init_from=gpt2-xl", *how, cwd=home)
    known = run_here(sample, "--out_dir=openai-community/gpt2-xl", *how, cwd=home)
    assert named == known.replace("(openai-community/gpt2-xl: ", "(gpt2-xl: ")
    assert named == run_here(sample, "--init_from=gpt2-xl", *how, cwd=home / "out")  # where runs are
    own = run_here(sample, "--init_from=resume", "--out_dir=out/whole", *how, cwd=home)
    assert own == run_here(sample, "--init_from=out/whole", *how, cwd=home) != named
    for module in (sample, explain, bench):
        with pytest.raises(SettingError, match="init_from=gpt2-xl: .* out_dir=out: leave out one of the two"):
            settings.model_asked({**vars(module), "init_from": "gpt2-xl", "out_dir": "out",
                                  "PLACES": {"out_dir": 1}})


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
            assert search.read_words(others, search.settings_of(words[3])[0])[1]
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
