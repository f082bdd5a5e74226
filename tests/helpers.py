"""What several test files use: tiny models, ways to run the scripts, and the two finished runs."""
import contextlib
import csv
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import config as settings
import finetune
import prepare
import sample
import train
from lib import group
from lib.run import Machine, stored_settings
from model import Config, Transformer

torch.set_num_threads(1)  # as for `script`: the last bits depend on it

ROOT = Path(__file__).parent.parent

slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow: set SLOW=1")
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals, limits and gloo are POSIX's")


def tiny(column="modern", seed=0, **changes) -> Transformer:
    """A small model whose every weight is random, the ones that start at 0 or 1 too. column: of COLUMNS."""
    from test_model import COLUMNS, TINY  # which imports this file
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

def says(error, *words):
    """What was raised is one line with these words."""
    told = str(error.value)
    assert "\n" not in told and not [word for word in words if word not in told], told


CHINESE = "千里之行，始于足下。道可道，非常道；名可名，非常名。" * 3

MIXED = (
    "def f(x):\n    return x + 1  # aaaa aaaaa bananas\n\n\tif x:\r\n" * 4 + CHINESE + "🙂👩‍👩‍👧 été 123456 "
)


def words(n: int, seed: int) -> list[str]:
    """n words that no other seed gives in this order."""
    vocabulary = np.array([f"{a}{b}{c}" for a in ("ka", "lo", "mi") for b in ("ra", "tu")
                           for c in "snxyz"])
    return np.random.default_rng(seed).choice(vocabulary, n).tolist()


PAGES = [f"Page {i}: " + " ".join(words(30, i)) for i in range(80)]

TOY = ["--dataset=toy", "--device=cpu", "--compile=False", "--n_layer=2", "--n_head=2", "--n_embd=32",
       "--block_size=32", "--batch_size=2", "--gradient_accumulation_steps=2", "--learning_rate=1e-2",
       "--warmup_iters=0", "--max_iters=8", "--eval_interval=4", "--eval_iters=5", "--dropout=0.1",
       "--pos=rope", "--optimizer=muon"]


def run_here(module, *args, cwd=".") -> str:
    """Run train.py, finetune.py or sample.py in this process, which has imported torch. Returns its output.

    Settings, signals and the folder are as before afterwards. What is raised is raised, but exit status 0.
    """
    gc.collect()  # a run that ended in an error may hold its lock until here
    fields, stored = {train: (Config, stored_settings), finetune: (Config, finetune.stored),
                      sample: (sample.Choice, None)}[module]
    before = {name: getattr(module, name) for name in module.__annotations__}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    here, said = os.getcwd(), io.StringIO()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            module.main(settings.configure(vars(module), fields, [str(arg) for arg in args], stored))
    except SystemExit as stopped:
        if stopped.code:
            stopped.said = said.getvalue()
            raise
    finally:
        os.chdir(here)
        vars(module).update(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return said.getvalue()


class Half(Machine):
    """float16 on a CPU, where float32 takes its place, with a scale that is much too large at first."""

    def __init__(self, *how):
        super().__init__(*how)
        self.dtype = torch.float16
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)


@contextlib.contextmanager
def full_disk(size: int):
    """Inside `with`, a file of more bytes cannot be written."""
    import resource  # POSIX
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def start(world: int, job, *args):
    """job(*args) in `world` new processes that are a group as torchrun's are. They are the .processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    how = "fork" if sys.platform == "linux" else "spawn"  # torch is imported already then
    return torch.multiprocessing.start_processes(as_rank, (world, port, job, args), world, join=False,
                                                 start_method=how)


def as_rank(rank, world, port, job, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    job(*args)
    group.leave(0)


def together(world: int, job, *args) -> None:
    """The same, waited for; in this process, if it is one."""
    if world == 1:
        job(*args)
        return
    running = start(world, job, *args)
    while not running.join():
        pass


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A working directory with a small data set, toy, and a finished run on it, out/whole."""
    home = tmp_path_factory.mktemp("home")
    (home / "toy.txt").write_text((ROOT / "model.py").read_text(encoding="utf-8")[:9000], encoding="utf-8")
    prepare.prepare("toy", source=str(home / "toy.txt"), vocab_size=300, root=home / "data")
    said = run_here(train, *TOY, "--out_dir=out/whole", cwd=home)
    (home / "printed.txt").write_text(said, encoding="utf-8")
    return home


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def checkpoint(folder, name="ckpt.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


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


def tune(folder, *args) -> dict:
    """Run finetune.py in this process. Returns what metrics.json holds."""
    run_here(finetune, f"--out_dir={folder}", *args)
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
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": None}),
    "mistral's window": ("MistralForCausalLM", {**GROUPED, "sliding_window": 6}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}),
    "nanochat": ("NanoChatForCausalLM", GROUPED),
    "bert": ("BertForMaskedLM", SMALL),
    "roberta": ("RobertaForMaskedLM", {**SMALL, "pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", {**SMALL, "pad_token_id": 1, "type_vocab_size": 1}),
    "distilbert": ("DistilBertForMaskedLM", dict(vocab_size=97, dim=32, n_layers=2, n_heads=4, hidden_dim=56,
                                                 max_position_embeddings=96)),
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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Hugging Face's cache, empty and offline."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def in_cache(cache, name):
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("a" * 40)
    (place / "snapshots" / ("a" * 40)).mkdir(parents=True)
    return place / "snapshots" / ("a" * 40)
