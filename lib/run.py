"""
Where a run happens, and what it leaves behind: Machine and Run. A first reading can skip this file.

    machine = Machine("auto", "auto", seed=1337)     device, precision, processes
    run = Run(machine, "out/small", "scratch")       a folder: checkpoints, log, clock, signals
    model, tokenizer = load_body("out/small")        the model of a run, or of Hugging Face

A checkpoint is one dict of tensors and plain values: nothing in the file can run code. At every moment a
whole one is on the disk, and a damaged one is detected when it is read.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Optional

import torch
import torch.distributed as dist

from config import OF_THE_COMMAND, SettingError, UserError
from lib.hub import folder_of_tokenizer, is_published
from lib.optim import load_optimizer_state, optimizer_state
from lib.text import try_lock
from lib.tokenizer import HubTokenizer, Tokenizer
from model import Config, Transformer

# about when the process began: `elapsed` includes the imports, for which its user waits too
STARTED = time.time() - time.process_time()


# -----------------------------------------------------------------------------
# The machine

class Machine:
    """This process's device, the precision of its matrix products, and its rank under torchrun.

    device: auto, cpu, cuda, cuda:1 or mps. dtype: auto, float32, bfloat16 or float16. Seeds torch. Raises
    SettingError for what this machine does not have.
    """

    def __init__(self, device: str = "auto", dtype: str = "auto", seed: int = 1337,
                 deterministic: bool = False, backend: str = "auto"):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.device = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
        self.dtype = pick_dtype(dtype, self.device)
        self.scaler = None
        if self.dtype == torch.float16:
            if self.device.type == "cpu":
                raise SettingError("dtype=float16: not on a CPU: use --dtype=float32, or bfloat16")
            self.scaler = torch.amp.GradScaler(self.device.type)
        if self.world > 1 and not dist.is_initialized():
            # gloo beside nccl: to agree on stopping, the processes need not wait for the GPUs
            both = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(both if backend in ("auto", "nccl") else backend)
        torch.set_float32_matmul_precision("high")  # tf32 where a GPU has it
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(seed)

    def __str__(self) -> str:
        processes = "1 process" if self.world == 1 else f"{self.world} processes"
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.device}, {name}, {torch.get_num_threads()} threads, {processes}"

    def say(self, text: str) -> None:
        """Print, in the first process only."""
        if self.main:
            print(text, flush=True)

    def amp(self):
        """A context in which matrix products are done in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def to(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device, on CUDA without waiting for the copy."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """This tensor of every process, by rank; all have one shape."""
        if self.world == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(found, tensor.contiguous())
        return found

    def mfu(self, flops: float) -> Optional[float]:
        """Model FLOPs utilization: the share of all devices' peak, if that is known. flops: per second."""
        peak = peak_flops(self.device)
        return flops / (peak * self.world) if peak else None

    def broadcast(self, values: list[float]) -> list[float]:
        """The first process's values, for all, so that all decide alike."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return tensor.tolist()

    def looks_each_step(self) -> bool:
        """Is each loss read at once? That is free on a CPU, and float16 needs it: its scaler skips steps."""
        return self.device.type == "cpu" or self.scaler is not None

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        """The last thing that a process does with the others."""
        if self.world > 1:
            dist.barrier()  # the first to leave ends the others
            dist.destroy_process_group()

    def random_states(self) -> dict[str, list[torch.Tensor]]:
        """The random state of every process: {"cpu": [...], "cuda": [...]}."""
        states = {"cpu": self.gather(torch.get_rng_state())}
        if self.device.type == "cuda":
            states["cuda"] = self.gather(torch.cuda.get_rng_state(self.device))
        return states

    def set_random_states(self, states: dict[str, list[torch.Tensor]]) -> None:
        """Those that random_states() gave, if they are of as many processes."""
        if len(states["cpu"]) == self.world:
            torch.set_rng_state(states["cpu"][self.rank])
            if self.device.type == "cuda" and "cuda" in states:
                torch.cuda.set_rng_state(states["cuda"][self.rank], self.device)


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """Raises SettingError if the machine has no such device."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(kind for kind in there if there[kind])
    kind, _, index = device.partition(":")
    if kind not in there or not (index or "0").isdigit():
        raise SettingError(f"device={device}: wanted auto, cuda, mps or cpu")
    if not there[kind]:
        raise SettingError(f"device={device}: torch finds no such device on this machine: use --device=cpu")
    if kind != "cuda":
        return torch.device(kind)
    chosen, count = torch.device("cuda", int(index or local_rank)), torch.cuda.device_count()
    if chosen.index >= count:
        raise SettingError(f"device={chosen}: there are {count} GPUs, from cuda:0 on: run at most as many "
                           "processes, or --device=cpu")
    torch.cuda.set_device(chosen)
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


# dense bfloat16 (V100, T4: float16) FLOP/s from the makers' data sheets; the longest name that matches counts
PEAK_FLOPS = {"V100": 125e12, "T4": 65e12, "A10": 125e12, "A100": 312e12, "L4": 121e12, "L40": 181e12,
              "L40S": 362e12, "RTX 3090": 71e12, "RTX 4090": 165e12, "RTX 5090": 209e12, "H100": 989e12,
              "H100 PCIe": 756e12, "H200": 989e12, "B200": 2250e12}


def peak_flops(device: torch.device) -> Optional[float]:
    """Of this GPU, if it is known: what MFU is a share of."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [key for key in PEAK_FLOPS if key in name]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def peak_memory() -> float:
    """Of this process, in bytes; nan where the system does not say."""
    with contextlib.suppress(OSError):  # Linux's ru_maxrss has what the process before it held, too
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * float(re.search(r"VmHWM:\s+(\d+)", status)[1])
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def memory_advice(batch_size: int, steps: int, more: str = "") -> Iterator[None]:
    """Turns out-of-memory errors into one line that says what to lower so that the run stays the same.

    steps: gradient_accumulation_steps; more: other advice.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate|not enough memory", str(error).lower()):
            raise
        told = f"batch_size={batch_size}: out of memory: "
        half = max((n for n in range(1, batch_size) if batch_size % n == 0), default=None)
        if half:
            told += (f"--batch_size={half} --gradient_accumulation_steps={steps * batch_size // half} "
                     "is the same run in less; ")
        told += more or "take shorter inputs, or a smaller model"
        if not main_process():  # only the first reports an error of all, and this may be here alone
            print(f"error: {told}", file=sys.stderr, flush=True)
        raise UserError(told) from None


# -----------------------------------------------------------------------------
# Files

@contextlib.contextmanager
def replacing(path: Path, keep: Optional[Path] = None) -> Iterator:
    """A file to write bytes into, which takes the place of `path` once it is whole and on the disk.

    keep: where to move what was there. Raises UserError if it cannot be written, and leaves the old one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        raise cannot_write(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def cannot_write(path: Path, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0]
    return UserError(f"{path}: cannot be written ({reason}): make room, then --init_from=resume goes on with "
                     "what was saved before, which is unharmed")


def write_text(path: Path, text: str) -> None:
    with replacing(path) as f:
        f.write(text.encode("utf-8"))


def write_json(path: Path, content) -> None:
    """Strict JSON: nan and inf become null."""
    write_text(path, json.dumps(strict(content), indent=1, ensure_ascii=False))


def strict(x):
    if isinstance(x, dict):
        return {key: strict(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [strict(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


# -----------------------------------------------------------------------------
# Checkpoints

VERSION = 2
RESUME = ("ckpt.pt", "ckpt.prev.pt")  # what a run goes on from, the newest first
USE = ("best.pt", *RESUME)  # what sample.py and others load, the best first
REPORTS = ("metrics.json", "predictions.csv", "curves.json", "report.txt", "loss.png", "roc.png",
           "precision_recall.png", "calibration.png", "confusion.png", "explain.html")


def left_by_runs(folder: Path) -> list[Path]:
    """What --overwrite removes: the checkpoints of the run in a folder, or of its folds, and its reports."""
    found = []
    for place in (folder, *sorted(folder.glob("fold*"))):
        others = (place / name for name in (*REPORTS, "settings.json", "log.jsonl"))
        found += [*sorted(place.glob("*.pt")), *others]
    return [file for file in found if file.exists()]


def refuse_to_replace(folder: Path) -> None:
    """Raises SettingError if the folder, or a fold in it, holds a checkpoint of any name."""
    for file in left_by_runs(folder):
        if file.suffix == ".pt":
            raise SettingError(f"{folder}: a run is here already ({file.relative_to(folder)}): "
                               "--init_from=resume goes on with it, --overwrite starts anew, "
                               "--out_dir=FOLDER writes elsewhere")


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """A whole one is there at every moment: the last ckpt.pt is kept as ckpt.prev.pt. Raises UserError."""
    keep = path.with_name("ckpt.prev.pt") if path.name == "ckpt.pt" else None
    with replacing(path, keep) as f:
        torch.save({"version": VERSION, **checkpoint}, f)


def read_checkpoint(path: Path) -> dict:
    """One file, on the CPU. Raises an error of any kind if it is damaged."""
    with zipfile.ZipFile(path) as f:  # a .pt is a zip, whose checksums torch.load ignores
        if f.testzip() is not None:
            raise zipfile.BadZipFile("checksum")
    return upgraded(torch.load(path, map_location="cpu", weights_only=True))


OFF = ("patience", "max_length", "lora_rank", "batch_size_end", "folds", "eval_interval")  # was 0, is None


def upgraded(checkpoint: dict) -> dict:
    """A checkpoint of an earlier version as today's."""
    if checkpoint["version"] == 1:
        place = checkpoint.pop("data", {})
        best = place.get("best", {})
        lowest = checkpoint.get("best_val_loss", math.inf)
        if not best and math.isfinite(lowest):
            best = {"goal": [-lowest]}
        state = {"step": checkpoint.pop("iter_num", 0), "seen": place.get("windows", 0), "best": best,
                 "since_best": place.get("since_best", place.get("waited", 0)),
                 "elapsed": place.get("elapsed", 0.0), "losses": place.get("running", torch.zeros(2))}
        settings = checkpoint.setdefault("settings", {})
        settings.update({name: None for name in OFF if settings.get(name) == 0})
        if "head" in checkpoint:
            settings.pop("vocab_size", None)  # of the bpe as it turned out, not as it was asked for
        if "teacher_weight" in settings:
            settings["teacher_share"] = settings.pop("teacher_weight")
        checkpoint.update(version=VERSION, state=state, defaults={}, data=place,
                          compiled=place.get("compiled", False))
    if checkpoint["version"] != VERSION:
        raise ValueError(f"version {checkpoint['version']}")
    return checkpoint


def find_checkpoint(folder: str | Path, names=USE) -> tuple[Path, dict]:
    """The first intact checkpoint of these names. A damaged one is skipped with a warning.

    Raises UserError if there is none. Nothing in the file is run: tensors and plain values only.
    """
    damaged = []
    for path in (Path(folder) / name for name in names):
        if not path.is_file():
            continue
        try:
            return path, read_checkpoint(path)
        except Exception as error:  # a damaged file can fail in any way
            damaged.append(f"{path} is damaged, or no checkpoint of ours ({type(error).__name__})")
            if main_process():
                print(f"warning: {damaged[-1]}: trying the one before", file=sys.stderr)
    if damaged:
        raise UserError("; ".join(damaged))
    raise UserError(f"{folder}: no checkpoint here, none of {', '.join(names)}: train one first, "
                    "python train.py config/small.py")


def stored_settings(folder: str | Path) -> tuple[dict, dict]:
    """The settings of the run in a folder, and its script's defaults then; empty if there is none.

    Only these are read. Whether the checkpoint is intact is checked when its weights are loaded.
    """
    for path in (Path(folder) / name for name in RESUME):
        try:
            found = upgraded(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
            return found["settings"], found["defaults"]
        except Exception:  # a damaged file can fail in any way
            continue
    try:  # it ended before its first checkpoint
        return json.loads((Path(folder) / "settings.json").read_text(encoding="utf-8")), {}
    except (OSError, ValueError):
        return {}, {}


def newest_run(folder: Path) -> Path:
    """The folder itself, if it is a run's, else the newest run in it."""
    changed = {}
    for file in (*folder.glob("*.pt"), *folder.glob("*/*.pt")):
        changed[file.parent] = max(changed.get(file.parent, 0), file.stat().st_mtime)
    return folder if folder in changed or not changed else max(changed, key=changed.get)


def model_of(checkpoint: dict, **changes) -> Transformer:
    """changes: of its settings; a shorter block_size cuts learned positions. Raises UserError."""
    try:
        model = Transformer(Config(**{**checkpoint["model_args"], **changes}))
        weights = dict(checkpoint["model"])
        if "positions.wpe.weight" in weights:
            rows = model.config.pos_offset + model.config.block_size
            weights["positions.wpe.weight"] = weights["positions.wpe.weight"][:rows]
        model.load_state_dict(weights)
        model.published = checkpoint.get("published", {})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"the checkpoint does not fit this version of model.py ({type(error).__name__}: "
                        f"{reason})") from None
    return model


def load_body(path: str | Path, dtype: torch.dtype = torch.float32,
              **changes) -> tuple[Transformer, Tokenizer | HubTokenizer]:
    """A run's model, the best one, or Hugging Face's (a folder, or an id on the hub), and its tokenizer.

    dtype: of the weights. changes: another dropout or block_size. Raises UserError.
    """
    return load_whole(path, dtype, whole=False, **changes)[:2]


def load_whole(path: str | Path, dtype: torch.dtype = torch.float32, whole: bool = True,
               **changes) -> tuple[Transformer, Tokenizer | HubTokenizer, dict]:
    """The same, and the head of a published classifier and the like, as a checkpoint of ours keeps it."""
    name = Path(path).as_posix()
    try:
        if is_published(path):
            from lib.pretrained import load  # which imports this file
            settings = {"dropout": 0.0, "block_size": None, **changes}
            model, head = load(Transformer, name, dtype=dtype, whole=whole, **settings)
            tokenizer = Tokenizer.from_pretrained(folder_of_tokenizer(name))
            if tokenizer.vocab_size > model.config.vocab_size:
                raise ValueError(f"its tokenizer has {tokenizer.vocab_size} tokens, its embedding "
                                 f"{model.config.vocab_size}")
            return model.train(), tokenizer, head
        checkpoint = find_checkpoint(path)[1]
        tokenizer = Tokenizer.from_dict(checkpoint["tokenizer"])
        return model_of(checkpoint, **changes).to(dtype), tokenizer, {}
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0].removeprefix(f'{name}: ')}") from None


# -----------------------------------------------------------------------------
# The run

@dataclass
class State:
    """Where a run is. All that changes from step to step, but for weights and optimizers, is here: it is
    saved and restored as it is."""
    step: int = 0  # updates of the weights made
    seen: int = 0  # windows or examples taken, including those of skipped steps
    best: dict = field(default_factory=dict)  # the best evaluation: its metrics, iter and goal
    since_best: int = 0  # evaluations since
    pruned: bool = False  # the smallest weights are 0 for good
    elapsed: float = 0.0  # seconds, of all processes that had a part in the run
    losses: torch.Tensor = field(default_factory=lambda: torch.zeros(2))  # sum and number, see mean_loss

    def add_loss(self, loss: torch.Tensor) -> None:
        """One that is not finite does not count. Does not wait for the device."""
        self.losses = self.losses.to(loss.device)
        self.losses += torch.stack((loss.nan_to_num(0, 0, 0), loss.isfinite()))

    def mean_loss(self) -> float:
        """Of the steps since the last call."""
        total, number = self.losses
        mean = (total / number).item()
        self.losses.zero_()
        return mean

    def is_best(self, goal: list[float], metrics: dict) -> bool:
        """Note an evaluation, and say whether it is the best so far. goal: the higher, the better."""
        better = not self.best or goal > self.best["goal"]
        self.since_best = 0 if better else self.since_best + 1
        if better:
            self.best = {**metrics, "goal": goal, "iter": self.step}
        return better


class Run:
    """A folder that training writes to: its checkpoints, its log, its clock, and the signals that end it.

    init_from: resume goes on with the run in the folder, else a new one begins. origin: what that run began
    from, if its settings.json cannot tell. Raises SettingError for a folder that holds a run already, unless
    `overwrite` allows it to be removed, and UserError if there is no run to go on with.
    """

    def __init__(self, machine: Machine, folder: str | Path, init_from: str, overwrite: bool = False,
                 max_minutes: Optional[float] = None, origin: Optional[str] = None):
        self.machine, self.folder = machine, Path(folder)
        self.init_from, self.overwrite = init_from, overwrite
        self.log_file = self.folder / "log.jsonl"
        self.replaces = [] if init_from == "resume" else left_by_runs(self.folder)
        self.lock, self.source, self.checkpoint = None, None, None
        self.resumed = init_from == "resume"
        self.compiled = None  # a resumed run stays compiled or not: its last bits depend on it
        if self.resumed:
            self.init_from = stored_settings(folder)[0].get("init_from", origin)
            if self.init_from is None or any((self.folder / name).exists() for name in RESUME):
                self.source, self.checkpoint = find_checkpoint(self.folder, RESUME)
                self.compiled = self.checkpoint.get("compiled")
            else:
                self.resumed = False  # it ended before its first checkpoint: it begins anew
        elif not overwrite:
            refuse_to_replace(self.folder)
        self.stop = Stop(max_minutes)
        self.forget = False  # the best so far, which no longer compares
        self.before = 0.0  # seconds that earlier processes took
        self.watcher = None  # is told each row of the log, too

    def same(self, settings: dict, fixed: tuple[str, ...], compared_on: tuple[str, ...] = ()) -> None:
        """A resumed run stays what it was: a setting that changes is reported, or refused if it is `fixed`.

        compared_on: settings without which the best evaluation so far does not compare: it is forgotten.
        """
        if not self.resumed:
            return
        earlier = self.checkpoint["settings"]
        for name, value in settings.items():
            then = earlier.get(name, value)
            if then == value or name in OF_THE_COMMAND:
                continue
            if name in fixed:
                raise SettingError(f"{name}={value}: the run has {then}: leave it out, or start another with "
                                   "--out_dir=FOLDER")
            if name == "compile":
                self.compiled = None  # it may become what it was not
            forgets = name in compared_on and bool(self.checkpoint["state"]["best"])
            self.forget = self.forget or forgets
            more = ", so the best so far is forgotten" if forgets else ""
            self.machine.say(f"{name} {then} -> {value}{more}")

    def check_data(self, data: dict) -> None:
        """Raises UserError if the run was begun with other data."""
        for name, value in data.items():
            if self.resumed and self.checkpoint["data"][name] != value:
                raise UserError(f"{self.folder}: was begun with other {name}: give the same data, seed and "
                                "settings, or --overwrite")

    def begin(self, settings: dict, defaults: dict, **made_of) -> None:
        """From here on files are written. made_of: what each checkpoint holds besides: model_args, tokenizer.

        Raises SettingError if the folder cannot be made, or another process is writing into it.
        """
        self.made_of = {"settings": settings, "defaults": defaults, **made_of}
        if not self.machine.main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError(f"out_dir={self.folder}: cannot be made ({error.strerror})") from None
        self.lock = locked(self.folder / "run.lock")
        damaged = self.folder / "ckpt.pt"
        if self.source and self.source.name == "ckpt.prev.pt" and damaged.exists():
            os.replace(damaged, self.folder / "ckpt.damaged.pt")  # it must not replace the good one
        best = self.folder / "best.pt"
        if self.forget and best.exists():
            os.replace(best, self.folder / "best.before.pt")  # which nothing loads by itself
        for file in self.replaces if self.overwrite else ():
            file.unlink(missing_ok=True)  # else it would be taken for this run's
        write_text(self.folder / "settings.json", json.dumps(settings, indent=1))
        write_text(self.log_file, self.rows_so_far())

    def rows_so_far(self) -> str:
        """The log up to the checkpoint: the steps after it will be repeated."""
        kept = []
        if self.resumed and self.log_file.exists():
            for row in self.log_file.read_text(encoding="utf-8").splitlines(keepends=True):
                if row.endswith("\n") and json.loads(row)["iter"] <= self.checkpoint["state"]["step"]:
                    kept.append(row)
        return "".join(kept)

    def restore(self, model, optimizers) -> State:
        """The state of the run, 0 for a new one; optimizers and random states are set as they were then."""
        state, saved = State(), self.checkpoint
        if self.resumed:
            load_optimizer_state(optimizers, model, saved["optimizer"])
            if self.machine.scaler and saved["scaler"]:
                self.machine.scaler.load_state_dict(saved["scaler"])
            self.machine.set_random_states(saved["rng"])
            known = {one.name for one in fields(State)}
            state = State(**{name: value for name, value in saved["state"].items() if name in known})
            self.before = state.elapsed
            if self.forget:
                state.best, state.since_best = {}, 0
            self.checkpoint = {"state": saved["state"]}  # free the memory of the weights
        state.losses = state.losses.to(self.machine.device)
        return state

    def elapsed(self) -> float:
        """Seconds, those of earlier processes too."""
        return self.before + time.time() - STARTED

    def log(self, **row) -> None:
        if not self.machine.main:
            return
        try:
            with open(self.log_file, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as error:
            raise cannot_write(self.log_file, error) from None
        if self.watcher:
            self.watcher.log(row, step=row["iter"])

    def start_wandb(self, project: str, name: str) -> None:
        """Log to Weights & Biases too, if it is installed."""
        if not self.machine.main:
            return
        try:
            import wandb
        except ImportError:
            print("warning: wandb_log=True, but wandb is not installed: pip install wandb; log.jsonl has "
                  "it all", file=sys.stderr)
            return
        wandb.init(project=project, name=name, config=self.made_of["settings"])
        self.watcher = wandb

    def save(self, name: str, state: State, module, optimizers: Optional[list] = None, **entries) -> None:
        """A checkpoint, by all processes together; with the optimizers, the run can go on from it.

        entries: of the checkpoint, beside those that `begin` was given, or in place of the module's weights.
        """
        state.elapsed = self.elapsed()
        extra = {"optimizer": {}, "scaler": {}, "rng": {}}
        if optimizers is not None:
            scaler = self.machine.scaler
            extra = {"optimizer": optimizer_state(optimizers, module), "rng": self.machine.random_states(),
                     "scaler": scaler.state_dict() if scaler else {}}
        if self.machine.main:
            save_checkpoint(self.folder / name, {"model": module.state_dict(), "state": dict(vars(state)),
                                                 **extra, **self.made_of, **entries})

    def stopped(self) -> bool:
        """Was any process asked to stop, or is the time over?"""
        return bool(self.stop.agreed())

    def close(self) -> None:
        """The end of the run, but not of the process."""
        self.stop.release()
        if self.machine.main:
            plot(self.log_file, self.folder / "loss.png")
            self.lock.close()


def locked(path: Path):
    """The file, open: until it is closed no other process can lock it. Raises SettingError if one has."""
    file = open(path, "a+", encoding="utf-8")
    try:
        try_lock(file)
    except (BlockingIOError, PermissionError):  # POSIX, Windows
        raise SettingError(f"{path.parent}: another process is writing here: wait for it, or "
                           "--out_dir=FOLDER writes elsewhere") from None
    except OSError as error:
        print(f"({path}: no lock here ({error.strerror}): let no other process write into this folder)")
    return file


OUT_OF_TIME = 1  # in place of a signal's number


class Stop:
    """When to leave the loop: at SIGINT or SIGTERM to any process, or after max_minutes.

    The first signal asks to stop after the step under way. Another one stops at once, but only a second later
    or more, since torchrun passes on what the terminal has sent to all processes already.
    """

    def __init__(self, max_minutes: Optional[float] = None):
        self.signal, self.asked = 0, math.inf
        self.deadline = STARTED + 60 * (max_minutes or math.inf)
        self.before = {one: signal.signal(one, self.ask) for one in (signal.SIGINT, signal.SIGTERM)}

    def release(self) -> None:
        """Put back the signal handlers that were there before."""
        for one, handler in self.before.items():
            signal.signal(one, handler)

    def ask(self, number, frame) -> None:
        if time.time() > self.asked + 1:
            os._exit(128 + number)
        self.signal, self.asked = number, min(self.asked, time.time())

    def agreed(self) -> int:
        """The signal that any process got, for all of them; 0: go on."""
        if not self.signal and time.time() > self.deadline:
            self.signal = OUT_OF_TIME
        if dist.is_initialized():
            got = torch.tensor(self.signal, device="cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(got, op=dist.ReduceOp.MAX)
            if not got:
                return 0  # one that came in the meantime is for the next time: all do the same
            self.signal = int(got)
        return self.signal

    def status(self) -> int:
        """The exit status of a process that was stopped."""
        return 0 if self.signal in (0, OUT_OF_TIME) else 128 + self.signal


class BadSteps:
    """Counts the steps that were skipped because the loss or the gradient was not finite, and reports each.

    The values are read from the device every `interval` steps only, because reading waits for it. Raises
    UserError after `limit` of them in a row. tell: print; False in all processes but one.
    """

    def __init__(self, limit: int, interval: int, tell: bool = True):
        self.limit, self.interval, self.tell = limit, interval, tell
        self.waiting, self.in_a_row = [], 0

    def add(self, step: int, lr: float, loss: torch.Tensor, norm: torch.Tensor) -> None:
        self.waiting.append((step, lr, loss, norm))
        if len(self.waiting) < self.interval:
            return
        values = torch.stack([torch.stack(one[2:]) for one in self.waiting]).tolist()
        for (step, lr, *_), (loss, norm) in zip(self.waiting, values, strict=True):
            fine = math.isfinite(loss) and math.isfinite(norm)
            self.in_a_row = 0 if fine else self.in_a_row + 1
            told = f"iter {step}: loss {loss:.4g}, lr {lr:.2e}, norm {norm:.3g}: not finite"
            if not fine and self.tell:
                print(f"{told}, the weights stay as they were", flush=True)
            if self.in_a_row >= self.limit:
                raise UserError(f"{told}, as are {self.in_a_row} steps in a row: lower learning_rate; "
                                "--init_from=resume goes on from the last checkpoint")
        self.waiting = []


class Pace:
    """How fast the steps go, and how long those that are left will take."""

    def __init__(self, state: State, last_step: int):
        self.last_step, self.first = last_step, state.step
        self.started = time.time()
        self.restart(state)

    def restart(self, state: State) -> None:
        """Measure from here on: an evaluation's time is not the steps'."""
        self.since, self.since_step = time.time(), state.step

    def measure(self, state: State) -> tuple[float, str]:
        """Seconds a step since the last measurement, and the time left."""
        now = time.time()
        each = (now - self.since) / (state.step - self.since_step)
        left = (self.last_step - state.step) * (now - self.started) / (state.step - self.first)
        self.since, self.since_step = now, state.step
        return each, clock(left)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def step_line(row: dict, steps: int, speed: str, left: str) -> str:
    """A step as it is printed; row: as it is logged."""
    number = f"{row['iter']:{len(str(steps))}}/{steps}"
    return (f"iter {number}  loss {row['loss']:7.4f}  lr {row['lr']:.2e}  norm {row['grad_norm']:6.2f}  "
            f"{speed}  {left} left")


WORDS = {"train_loss": "train loss {:.4f}", "val_loss": "val loss {:.4f}", "val_bpb": "{:.4f} bits per byte"}


def in_words(metrics: dict[str, float]) -> str:
    return ", ".join(WORDS.get(name, name + " {:.4f}").format(value) for name, value in metrics.items())


def plot(log: Path, picture: Path) -> None:
    """The losses in log.jsonl as a picture, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4))
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(row["iter"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, ms=4, lw=1)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture, dpi=100, bbox_inches="tight")
    plt.close(figure)
