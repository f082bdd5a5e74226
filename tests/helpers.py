"""What several test files use: tiny models, ways to run the scripts, and the two finished runs."""
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import config as settings
import finetune
from model import Config, Transformer

ROOT = Path(__file__).parent.parent


slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow: set SLOW=1")


timed = pytest.mark.skipif(not os.environ.get("TIMED"), reason="a measurement: set TIMED=1")


TINY = dict(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_embd=32)


MODERN = dict(pos="rope", norm="rms", norm_weight=False, norm_eps=1e-6, norm_embd=True, qk_norm="after",
              act="relu2", tied=False, softcap=15.0, init="zero_out")


VANILLA = dict(
    pos="sinusoidal", norm_place="post", act="relu", bias=True, tied=False, head_bias=True, init="uniform"
)


COLUMNS = {"gpt2": dict(bias=True), "modern": MODERN, "grouped": {**MODERN, "n_kv_head": 2},
           "vanilla": VANILLA,
           "n_gram": {**MODERN, "n_gram": 4, "n_gram_rows": 40},
           "llama": dict(pos="rope", norm="rms", act="swiglu", n_kv_head=2, tied=False),
           "qwen": dict(pos="rope", norm="rms", act="swiglu", n_kv_head=1, head_dim=6, qk_norm="before",
                        qkv_bias=True)}


columns = pytest.mark.parametrize("column", COLUMNS)


def tiny(column="modern", seed=0, **changes) -> Transformer:
    """A small model whose every weight is random, the ones that start at 0 or 1 too."""
    torch.manual_seed(seed)
    model = Transformer(Config(**{**TINY, **COLUMNS[column], **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def tokens(*shape, seed=0, vocab_size=61):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def difference(a, b) -> float:
    """Norm of the difference over the norm."""
    return ((a - b).norm() / b.norm()).item()


def script(*args, cwd, timeout=300, **env):
    """Run one of the scripts as a user would. Returns the finished process, output as text."""
    command = list(args)
    if args[0].startswith("tools/"):
        command = [sys.executable, "-m", args[0].removesuffix(".py").replace("/", "."), *args[1:]]
    elif args[0].endswith(".py"):
        command = [sys.executable, str(ROOT / args[0]), *args[1:]]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, encoding="utf-8",
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env})


def one_line(process, status, *words):
    """Failed as promised: this exit status, one line on stderr without a traceback, and these words in it."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode == status, process.stderr
    assert len(lines) == 1 and "Traceback" not in process.stderr, process.stderr
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"


CHINESE = "千里之行，始于足下。道可道，非常道；名可名，非常名。" * 3


MIXED = (
    "def f(x):\n    return x + 1  # aaaa aaaaa bananas\n\n\tif x:\r\n" * 4 + CHINESE + "🙂👩‍👩‍👧 été 123456 "
)


def words(n: int, seed: int) -> list[str]:
    """n words that no other seed gives in this order."""
    vocabulary = np.array([f"{a}{b}{c}" for a in ("ka", "lo", "mi") for b in ("ra", "tu")
                           for c in "snxyz"])
    return np.random.default_rng(seed).choice(vocabulary, n).tolist()


TOY = ["--dataset=toy", "--device=cpu", "--compile=False", "--n_layer=2", "--n_head=2", "--n_embd=32",
       "--block_size=32", "--batch_size=2", "--gradient_accumulation_steps=2", "--learning_rate=1e-2",
       "--warmup_iters=2", "--max_iters=8", "--eval_interval=4", "--eval_iters=5", "--dropout=0.1",
       "--pos=rope", "--optimizer=muon"]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A working directory with a small data set, toy, and a finished run on it, out/whole."""
    home = tmp_path_factory.mktemp("home")
    (home / "toy.txt").write_text((ROOT / "model.py").read_text(encoding="utf-8")[:9000], encoding="utf-8")
    made = script("prepare.py", "--source=toy.txt", "--vocab_size=300", cwd=home)
    assert made.returncode == 0 and "data" in made.stdout, made.stderr
    finished = script("train.py", *TOY, "--out_dir=out/whole", cwd=home)
    assert finished.returncode == 0, finished.stderr
    (home / "printed.txt").write_text(finished.stdout, encoding="utf-8")
    return home


def checkpoint(home, name, file="ckpt.pt"):
    return torch.load(home / "out" / name / file, weights_only=True)


def same(a, b) -> bool:
    """Bit for bit, through dicts and lists."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def synthetic(n, seed=0, length=12):
    """Texts that are good or bad by one word somewhere in them."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for i in range(n):
        words = [f"w{j}" for j in rng.integers(30, size=rng.integers(3, length))]
        labels.append(("good", "bad")[i % 2])
        words[rng.integers(len(words))] = ("fine", "dull")[i % 2]
        texts.append(" ".join(words))
    return texts, labels


def write_rows(path, header, *columns):
    with open(path, "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([header, *zip(*columns)] if header else zip(*columns))
    return str(path)


QUICK = ("--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=64", "--causal=False", "--pos=rope",
         "--norm=rms", "--vocab_size=300", "--learning_rate=5e-3", "--device=cpu", "--log_interval=5",
         "--batch_size=16", "--weight_decay=0.0")


def tune(folder, *args):
    """Run finetune.py in this process. Returns what metrics.json holds."""
    before = {name: getattr(finetune, name) for name in finetune.__annotations__}
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        given = settings.configure(vars(finetune), Config, [f"--out_dir={folder}", *map(str, args)])
        finetune.main(given)
    finally:
        vars(finetune).update(before)
        for number, handler in handlers:
            signal.signal(number, handler)
    return json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """A finished classifier, its data beside it."""
    folder = tmp_path_factory.mktemp("tuned")
    texts, labels = synthetic(300)
    texts[0] = 'a "fine",\nlong one'
    write_rows(folder / "data.csv", ("label", "review", "who"), labels, texts, ["x", "y", "y"] * 100)
    tune(folder / "out", f"--data={folder / 'data.csv'}", "--group_column=who", "--epochs=4", *QUICK)
    return folder


SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56,
             max_position_embeddings=96)


GROUPED = dict(**SMALL, num_key_value_heads=2)


LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=48)


FAMILIES = {  # name -> transformers' class, its configuration
    "gpt2": ("GPT2LMHead", dict(vocab_size=97, n_positions=96, n_embd=32, n_layer=2, n_head=4)),
    "llama": ("LlamaForCausalLM", SMALL),
    "llama grouped, tied": ("LlamaForCausalLM", {**GROUPED, "head_dim": 16, "tie_word_embeddings": True}),
    "llama 3": ("LlamaForCausalLM", {**GROUPED, "rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}),
    "nanochat": ("NanoChatForCausalLM", GROUPED),
    "bert": ("BertForMaskedLM", SMALL),
    "roberta": ("RobertaForMaskedLM", {**SMALL, "pad_token_id": 1, "type_vocab_size": 1}),
    "encoder": ("BertModel", SMALL),
}


def theirs(name):
    """A small model of transformers, every weight random."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cls, fields = FAMILIES[name]
    cls = getattr(transformers, cls + "Model" * cls.endswith("Head"))
    torch.manual_seed(0)
    model = cls(cls.config_class(**{"bos_token_id": None, "eos_token_id": None, **fields})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model
