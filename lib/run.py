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
import hashlib
import json
import math
import os
import platform
import re
import signal
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Optional

import torch
import torch.distributed as dist

from config import OF_THE_COMMAND, SettingError, UserError, why
from lib import group
from lib.hub import folder_of_tokenizer, is_published, say
from lib.optim import load_optimizer_state, optimizer_state
from lib.pictures import plot_losses
from lib.text import read_text, try_lock
from lib.tokenizer import Characters, Tokenizer, of_gpt2
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
        self.rank, self.world = group.rank(), group.world()
        self.main = self.rank == 0
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.first_here = local_rank == 0  # of this machine's processes
        self.device = pick_device(device, local_rank)
        on_gpu = self.device.type == "cuda"
        self.asked, self.dtype = dtype, pick_dtype(dtype, self.device)
        self.scaler = None
        if self.dtype == torch.float16 and self.device.type == "cpu":  # as nanoGPT's settings say by default
            say("dtype float16 -> float32, on a CPU")
            self.dtype = torch.float32
        if self.dtype == torch.float16:
            self.scaler = torch.amp.GradScaler(self.device.type)
        if self.world > 1 and not dist.is_initialized():
            # gloo beside nccl: to agree on stopping, the processes need not wait for the GPUs
            both = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            group.join(both if backend in ("auto", "nccl") else backend)
        if on_gpu:
            torch.set_float32_matmul_precision("high")  # tf32
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(seed)
        self.cores = torch.get_num_threads()
        self.chosen = {"threads": self.cores, "matmul": "float32"}

    def choose(self, matmul: str, width: int, earlier: dict) -> None:
        """On a CPU, how many threads, and how a training step multiplies: once for a run, since its last bits
        depend on both.

        matmul: auto, float32 or bfloat16. width: of the model. earlier: what an earlier process of the run
        chose, which is taken again, if this machine has it. Raises SettingError.
        """
        on_cpu = self.device.type == "cpu"
        units = on_cpu and not self.sum(torch.tensor(float(not has_bfloat16_units())))  # in all processes
        if matmul == "bfloat16" and not units:
            raise SettingError(f"matmul=bfloat16: {self.device} has no units for that: --matmul=auto")
        if matmul == "auto":
            pays = self.asked == "auto" and width >= WIDE
            wanted = earlier.get("matmul", "bfloat16" if pays else "float32")
            matmul = wanted if units else "float32"
        threads = self.cores
        if on_cpu and "OMP_NUM_THREADS" not in os.environ:  # else its user has chosen
            threads = min(threads, earlier.get("threads") or free_cores())
            torch.set_num_threads(threads)
        self.chosen = {"threads": threads, "matmul": matmul}
        for name, now in self.chosen.items():
            if on_cpu and earlier.get(name, now) != now:
                self.say(f"{name} {earlier[name]} -> {now}, by this machine: last bits may differ")
        if threads < self.cores and "threads" not in earlier:
            self.say(f"threads {self.cores} -> {threads}: other programs use the other cores")

    def __str__(self) -> str:
        n = self.chosen["threads"]
        threads = "1 thread" if n == 1 else f"{n} threads"
        processes = "1 process" if self.world == 1 else f"{self.world} processes"
        name = str(self.dtype).removeprefix("torch.")
        if self.chosen["matmul"] == "bfloat16":
            name += ", products in bfloat16"
        return f"{self.device}, {name}, {threads}, {processes}"

    def say(self, *lines: str) -> None:
        """Print, in the first process only."""
        if self.main and lines:
            print(*lines, sep="\n", flush=True)

    def agree(self, what: str, content: bytes) -> None:
        """Raises UserError in a process whose content differs from the first one's."""
        if self.broadcast([zlib.crc32(content)]) != [zlib.crc32(content)]:
            raise UserError(f"{what}: process {self.rank}, on {platform.node()}, has another than the first "
                            "process: copy it to all machines, or share it")

    def amp(self):
        """A context in which matrix products are done in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """A training step's products are as `choose` said; evaluation and use stay in full float32."""
        before = torch.get_float32_matmul_precision()
        if self.chosen["matmul"] == "bfloat16":
            torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def to(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device, on CUDA without waiting for the copy."""
        return to_device(tensor, self.device)

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

    def broadcast(self, values: list[float]) -> list[float]:
        """The first process's values, for all, so that all decide alike."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return tensor.tolist()

    def barrier(self) -> None:
        self.sum(torch.zeros(1))

    def mfu(self, flops: float) -> Optional[float]:
        """Model FLOPs utilization: the share of all devices' peak, if that is known. flops: per second."""
        peak = self.device.type == "cuda" and peak_flops(torch.cuda.get_device_name(self.device))
        return flops / (peak * self.world) if peak else None

    def looks_each_step(self) -> bool:
        """Is each loss read at once? That is free on a CPU, and float16 needs it: its scaler skips steps."""
        return self.device.type == "cpu" or self.scaler is not None

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


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On CUDA without waiting for the copy."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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
    here = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if not index and here > count:
        raise SettingError(f"device=cuda: {here} processes on this machine, which has {count} GPUs: "
                           f"--nproc_per_node={count}, or --device=cpu")
    if chosen.index >= count:
        raise SettingError(f"device={chosen}: there are {count} GPUs, from cuda:0 on")
    torch.cuda.set_device(chosen)
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


WIDE = 256  # narrower models lose as much by turning numbers into bfloat16 as their products gain


def has_bfloat16_units() -> bool:
    """Does this CPU multiply bfloat16 numbers faster than float32 ones?"""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def work_and_rest() -> tuple[float, float, float]:
    """Seconds: the clock, this process's work, the rest of its cores (on Linux; else nan)."""
    rest = math.nan
    with contextlib.suppress(AttributeError, OSError):
        mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        rows = [line.split() for line in Path("/proc/stat").read_text(encoding="ascii").splitlines()]
        # idle, and waiting for a disk
        ticks = sum(int(row[4]) + int(row[5]) for row in rows if row[0] in mine)
        rest = ticks / os.sysconf("SC_CLK_TCK") or math.nan  # in a sandbox all may be 0
    return time.monotonic(), sum(os.times()[:4]), rest


BEGINNING = work_and_rest()


def free_cores() -> float:
    """Of those that this process may use, how many no other program has used since it began: at least 1. inf:
    the system does not say."""
    clock, work, rest = (now - then for now, then in zip(work_and_rest(), BEGINNING, strict=True))
    return math.inf if math.isnan(rest) else max(1, int((work + rest) / clock + 0.5))


# dense bfloat16 (V100, T4: float16) FLOP/s from the makers' data sheets
PEAK_FLOPS = {"V100": 125e12, "T4": 65e12, "A10": 125e12, "A100": 312e12, "A100 PCIe": 312e12,
              "L4": 121e12, "L40": 181e12, "L40S": 362e12, "RTX 3090": 71e12, "RTX 4090": 165e12,
              "RTX 5090": 209e12, "H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12,
              "B200": 2250e12}


def peak_flops(name: str) -> Optional[float]:
    """Of a GPU that is called so, if it is known: what MFU is a share of. A10G is not A10."""
    return PEAK_FLOPS.get(re.sub(r"^(NVIDIA |Tesla |GeForce )+|-(SXM|PCIE)\d?|[ -]\d+GB| HBM3e?", "", name))


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
    return group.rank() == 0


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
    full = isinstance(error, RuntimeError)  # torch does not say why: hardly ever another reason
    return UserError(f"{path}: cannot be written ({'make room' if full else why(error)}): --init_from=resume "
                     "goes on with what was saved before, which is unharmed")


def write_text(path: Path, text: str) -> None:
    with replacing(path) as f:
        f.write(text.encode("utf-8"))


def write_json(path: Path, content) -> None:
    write_text(path, json.dumps(strict(content), indent=1, ensure_ascii=False))


def strict(content):
    """As strict JSON has it: nan and inf are None."""
    return json.loads(json.dumps(content), parse_constant=lambda name: None)


def read_dict(path: Path) -> dict:
    """Of a JSON file; empty if there is none, or it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return {}


def beside(work: Callable, *args) -> Future:
    """Its result, from a thread that an ending process does not wait for, as it would for an executor's."""
    found = Future()

    def run():
        try:
            found.set_result(work(*args))
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found


def check_sums(sums: dict[Path, str]) -> None:
    """Raises UserError if a file is not what its SHA-256 says. The user's cache remembers those that are, by
    size, time and inode."""
    place = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    memory = Path(place) / "transformer" / "sums.json"
    known = read_dict(memory)
    for path, expected in sums.items():
        try:
            about = path.stat()
            key = f"{path.resolve()} {about.st_size} {about.st_mtime_ns} {about.st_ino}"
            if known.get(key) != expected:
                known[key] = sha256_of(path)
        except OSError as error:  # it is gone, or cannot be read
            raise UserError(f"{path}: {why(error)}") from None
        if known[key] != expected:
            raise UserError(f"{path}: has other content than its meta.json says (SHA-256): make the data set "
                            "again, with --overwrite")
    with contextlib.suppress(OSError, UserError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, known)


def sha256_of(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            found.update(block)
    return found.hexdigest()


# -----------------------------------------------------------------------------
# Checkpoints

VERSION = 2
RESUME = ("ckpt.pt", "ckpt.prev.pt")  # what a run goes on from, the newest first
USE = ("best.pt", *RESUME)  # what sample.py and others load, the best first
REPORTS = ("settings.json", "log.jsonl", "metrics.json", "predictions.csv", "curves.json", "report.txt",
           "loss.png", "roc.png", "precision_recall.png", "calibration.png", "confusion.png", "explain.html")
REPLACED = "run.replaced"  # in a folder whose files --overwrite is removing: none of them counts any more


def left_by_runs(folder: Path) -> list[Path]:
    """What --overwrite removes: the checkpoints of the run in a folder, or of its folds, and its reports."""
    found = []
    for place in (folder, *sorted(folder.glob("fold*"))):
        reports = [place / name for name in REPORTS]
        found += [*sorted(place.glob("*.pt")), *filter(Path.exists, reports)]
    return found


def is_replaced(folder: Path) -> bool:
    """Was --overwrite killed while it removed the run in a folder, or the run that this is a fold of?"""
    places = (folder, folder.parent) if folder.name.startswith("fold") else (folder,)
    return any((place / REPLACED).exists() for place in places)


def remove_run(folder: Path, settings: dict) -> None:
    """If this process is killed meanwhile, all of it is gone. Raises SettingError if it has what a run of
    these settings begins from, or is taught by."""
    lost = {place.resolve() for file in left_by_runs(folder) for place in (file, file.parent)}
    for name in ("init_from", "teacher"):
        if settings.get(name) and Path(settings[name]).resolve() in lost:
            raise SettingError(f"{name}={settings[name]}: --overwrite would remove it: give another out_dir")
    marker = folder / REPLACED
    marker.touch()
    for file in left_by_runs(folder):
        file.unlink(missing_ok=True)
    marker.unlink()


def refuse_to_replace(folder: Path) -> None:
    """Raises SettingError if the folder, or a fold in it, holds a checkpoint of any name."""
    for file in left_by_runs(folder):
        if file.suffix == ".pt" and not is_replaced(folder):
            raise SettingError(f"{folder}: a run is here already ({file.relative_to(folder)}): "
                               "--init_from=resume goes on with it, --overwrite starts anew, "
                               "--out_dir=FOLDER writes elsewhere")


def times_of(folder: Path) -> dict[Path, int]:
    """When each checkpoint in a folder was written."""
    found = {}
    for file in folder.glob("*.pt"):
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed it
            found[file] = file.stat().st_mtime_ns
    return found


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
    """A checkpoint of an earlier version, or of nanoGPT, as today's."""
    if "version" not in checkpoint and {"model", "model_args"} <= checkpoint.keys():
        from lib.pretrained import of_nanogpt  # which imports this file
        return of_nanogpt(checkpoint)
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
    defaults = checkpoint.get("defaults", {})
    if defaults.get("dataset") == "python":  # the script's default has changed, not its user's
        del defaults["dataset"]
    if checkpoint["version"] != VERSION:
        raise ValueError(f"version {checkpoint['version']}")
    return checkpoint


def find_checkpoint(folder: str | Path, names=USE) -> tuple[Path, dict]:
    """The first intact checkpoint of these names, or the file itself; damaged ones are skipped, and told.

    Raises UserError if there is none. Nothing in the file is run: tensors and plain values only.
    """
    damaged, folder = [], Path(folder)
    for path in [folder] if folder.is_file() else [folder / name for name in names]:
        if not path.is_file() or is_replaced(path.parent):
            continue
        try:
            return path, read_checkpoint(path)
        except UserError:
            raise
        except Exception as error:  # a damaged file can fail in any way
            holds = re.search(r"GLOBAL (\S+)", str(error))  # as torch.load says it
            if holds:
                raise UserError(f"{path}: holds a {holds[1]}, but only tensors and plain values are read: "
                                "save it again without that") from None
            damaged.append(f"{path} is damaged, or no checkpoint of ours ({type(error).__name__})")
            if main_process():
                print(f"warning: {damaged[-1]}: trying the one before", file=sys.stderr)
    if damaged:
        raise UserError(f"{'; '.join(damaged)}: --overwrite starts anew")
    if folder.suffix == ".pt":
        others = ", ".join(sorted(file.name for file in folder.parent.glob("*.pt")))
        raise UserError(f"{folder}: is not there; {folder.parent} has {others or 'no checkpoint'}")
    raise UserError(f"{folder}: no checkpoint here, none of {', '.join(names)}: train one first, "
                    "python train.py config/small.py")


def stored_settings(folder: str | Path) -> tuple[dict, dict]:
    """The settings of the run in a folder, and its script's defaults then; empty if there is none.

    Only these are read. Whether the checkpoint is intact is checked when its weights are loaded.
    """
    folder = Path(folder)
    if is_replaced(folder):
        return {}, {}
    for path in (folder / name for name in RESUME):
        with contextlib.suppress(Exception):  # a damaged file can fail in any way
            found = upgraded(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
            return found["settings"], found["defaults"]
    return read_dict(folder / "settings.json"), {}  # of one that ended before its first checkpoint


def goes_on(folder: str | Path) -> bool:
    """Is this another attempt of torchrun's at the run in a folder, which an earlier one was let begin?"""
    holder = read_dict(Path(folder) / "run.lock")
    return group.attempt() > 0 and holder.get("torchrun") == group.run_id() is not None


def newest_run(folder: Path) -> Path:
    """The folder itself, if it is a run's, else the newest run in it."""
    changed = {}
    for file in (*folder.glob("*.pt"), *folder.glob("*/*.pt")):
        changed[file.parent] = max(changed.get(file.parent, 0), file.stat().st_mtime)
    return folder if folder in changed or not changed else max(changed, key=changed.get)


@torch.no_grad()
def merged(weights: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """A body's weights with the additions of LoRA, if there are any, added in: those of a body without it."""
    found = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    for name in weights:
        layer, _, kind = name.rpartition(".")
        if kind == "lora_b":
            product = scale * weights[name] @ weights[f"{layer}.lora_a"]
            found[f"{layer}.weight"] = found[f"{layer}.weight"] + product
    return found


def sum_of(body: torch.nn.Module) -> str:
    """Tells a body from others, and from itself when it has been trained on: of its weights without LoRA."""
    found = hashlib.sha256()
    for name, weight in sorted(body.state_dict().items()):
        if ".lora_" not in name:
            found.update(name.encode())
            found.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def model_of(checkpoint: dict, **changes) -> Transformer:
    """changes: of its settings; a shorter block_size cuts learned positions. Raises UserError."""
    try:
        model = Transformer(Config(**{**checkpoint["model_args"], **changes}))
        its = checkpoint.get("settings", {})
        weights = merged(checkpoint["model"], its.get("lora_alpha", 0) / (its.get("lora_rank") or 1))
        if "positions.wpe.weight" in weights:
            rows = model.config.pos_offset + model.config.block_size
            if rows > len(weights["positions.wpe.weight"]):
                known = checkpoint["model_args"]["block_size"]
                raise SettingError(f"block_size={model.config.block_size}: the checkpoint's model knows "
                                   f"{known} positions: leave it out, or start from scratch")
            weights["positions.wpe.weight"] = weights["positions.wpe.weight"][:rows]
        model.load_state_dict(weights)
        model.published = checkpoint.get("published", {})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"the checkpoint does not fit this version of model.py ({type(error).__name__}: "
                        f"{reason})") from None
    bad = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if bad:
        raise UserError(f"{bad[0]}: the checkpoint's weights are not finite: its training failed before")
    return model


def fitting(tokenizer: Tokenizer, size: int, where: str = "the checkpoint") -> Tokenizer:
    """The tokenizer, if each of its ids has a row in an embedding of that size. Raises UserError."""
    if tokenizer.vocab_size > size:
        raise UserError(f"{where}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding {size}")
    return tokenizer


def tokenizer_of(checkpoint: dict, chars: str = "") -> Tokenizer:
    """nanoGPT's have none: GPT-2's, or the characters of the text in the file `chars`. Raises UserError."""
    size = checkpoint["model_args"]["vocab_size"]
    if checkpoint["tokenizer"]:
        refuse_chars(chars)
        return fitting(Tokenizer.from_dict(checkpoint["tokenizer"]), size)
    beside = f"data/{checkpoint['nanogpt'].get('dataset')}/input.txt"  # where nanoGPT's sample.py looks too
    if not chars and size < 50257 and Path(beside).is_file():
        chars = beside
        if main_process():
            print(f"(a checkpoint of nanoGPT: its tokens are read as the characters of {chars})",
                  file=sys.stderr)
    if chars:
        found = Characters.of(read_text(chars).replace("\r\n", "\n"))
        if found.vocab_size != size:
            raise SettingError(f"chars={chars}: has {found.vocab_size} different characters, the model {size}"
                               ": give the text that it was trained on")
        return found
    if size < 50257:
        raise SettingError(f"a checkpoint of nanoGPT with {size} tokens, which it does not tell: "
                           "--chars=input.txt, the text whose characters they are")
    if main_process():
        print("(a checkpoint of nanoGPT, which keeps no tokenizer: read with GPT-2's)", file=sys.stderr)
    return of_gpt2(size)


def refuse_chars(chars: str) -> None:
    if chars:
        raise SettingError(f"chars={chars}: the model has a tokenizer: leave it out")


def load_body(path: str | Path, dtype: torch.dtype = torch.float32,
              **changes) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a run, nanoGPT's or ours, or of Hugging Face: a folder, or an id on the hub.

    dtype: of the weights. changes: another dropout or block_size; chars: see tokenizer_of. Raises UserError.
    """
    return load_whole(path, dtype, whole=False, **changes)[:2]


def load_whole(path: str | Path, dtype: torch.dtype = torch.float32, whole: bool = True,
               chars: str = "", **changes) -> tuple[Transformer, Tokenizer, dict]:
    """The same, and the head of a fine-tuned model or a published classifier, as a checkpoint keeps it."""
    name = Path(path).as_posix()
    try:
        if is_published(path):
            refuse_chars(chars)
            from lib.pretrained import load  # which imports this file
            settings = {"dropout": 0.0, "block_size": None, **changes}
            model, head = load(Transformer, name, dtype=dtype, whole=whole, **settings)
            tokenizer = Tokenizer.from_pretrained(folder_of_tokenizer(name))
            return model.train(), fitting(tokenizer, model.config.vocab_size, name), head
        checkpoint = find_checkpoint(path)[1]
        tokenizer = tokenizer_of(checkpoint, chars)
        return model_of(checkpoint, **changes).to(dtype), tokenizer, checkpoint.get("head", {})
    except (ImportError, OSError, ValueError) as error:
        told = str(error).splitlines()[0]
        raise UserError(told if told.startswith((f"{path}:", f"{path}/")) else f"{path}: {told}") from None


# -----------------------------------------------------------------------------
# The run

@dataclass
class State:
    """All that changes from step to step, but for weights and optimizers: saved and restored as it is."""
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
        self.init_from, self.log_file = init_from, self.folder / "log.jsonl"
        self.removes = None  # the folder whose run it takes the place of
        self.lock, self.source, self.checkpoint = None, None, {}
        self.times = times_of(self.folder)  # before it is looked at: see `begin`
        if init_from == "resume":
            self.find(origin)
        elif overwrite or is_replaced(self.folder):
            self.removes = self.folder
        else:
            refuse_to_replace(self.folder)
        self.resumed = bool(self.checkpoint)
        self.compiled = self.checkpoint.get("compiled")  # its last bits depend on it: it stays so, or not
        self.machine_then = self.checkpoint.get("machine", {})  # what Machine.choose chose
        if self.resumed:
            self.machine_then.setdefault("matmul", "float32")  # of a run of before there was a choice
        self.stop = Stop(max_minutes)
        self.forget = self.best_is_gone()  # the best so far, which no longer compares
        self.data_check = None  # the Future of a check that goes on beside the first steps
        self.before = 0.0  # seconds that earlier processes took
        self.unit = ("nats a token", 1.0)  # of the training loss; validation losses times this have it
        self.watcher = None  # is told each row of the log, too

    def find(self, origin: Optional[str]) -> None:
        """The checkpoint to go on from; none, if the run ended before its first: then it begins anew."""
        self.init_from = stored_settings(self.folder)[0].get("init_from", origin)
        if self.init_from is not None and not any((self.folder / name).exists() for name in RESUME):
            return
        self.source, self.checkpoint = find_checkpoint(self.folder, RESUME)
        if not self.checkpoint["optimizer"] and not self.checkpoint["rng"]:  # at step 0
            what = ("is of nanoGPT, whose optimizer is not taken over, so it is no run to go on with"
                    if "nanogpt" in self.checkpoint else
                    "has no state of an optimizer, so it is no run to go on with (a best.pt?)")
            raise UserError(f"{self.source}: {what}: --init_from={self.folder} --out_dir=FOLDER begins one "
                            "with its weights")

    def best_is_gone(self) -> bool:
        """Was there a best.pt that cannot be loaded any more? The next best is written anew."""
        if not self.resumed or not self.checkpoint["state"]["best"]:
            return False
        best = self.folder / "best.pt"
        try:
            read_checkpoint(best)
        except Exception as error:  # a damaged file can fail in any way
            self.machine.say(f"warning: {best}: missing or damaged ({type(error).__name__}): the best so far "
                             "is forgotten, the next evaluation writes another")
            return True
        return False

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
            if name in ("dtype", "matmul"):
                self.machine_then.pop("matmul", None)
            forgets = name in compared_on and bool(self.checkpoint["state"]["best"])
            self.forget = self.forget or forgets
            more = ", so the best so far is forgotten" if forgets else ""
            self.machine.say(f"{name} {then} -> {value}{more}")

    def check_data(self, data: dict) -> None:
        """Raises UserError if the run was begun with other data."""
        for name, value in data.items():
            if self.resumed and self.checkpoint["data"].get(name) != value:
                raise UserError(f"{self.folder}: was begun with other {name}: give the same data, seed and "
                                "settings, or --overwrite")

    def same_teacher(self, path: str, total: str) -> str:
        """Warns if a run that goes on learns from other weights than before. total: sum_of the teacher, which
        is returned; "" without one."""
        if self.resumed and self.checkpoint["settings"].get("teacher") == path and (
                self.checkpoint.get("teacher_sum", total) != total):
            self.machine.say(f"warning: teacher={path}: has other weights now than the run has learned from: "
                             "put those back, or know that it is another teacher from here on")
        return total

    def begin(self, settings: dict, defaults: dict, **made_of) -> None:
        """From here on files are written. made_of: what each checkpoint holds besides: model_args, tokenizer.

        Raises SettingError if the folder cannot be made, or another process is writing into it, or has since
        this one looked, before there was a lock.
        """
        self.made_of = {"settings": settings, "defaults": defaults, "machine": self.machine.chosen, **made_of}
        if not self.machine.main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError(f"out_dir={self.folder}: cannot be made ({error.strerror})") from None
        self.lock = locked(self.folder / "run.lock")
        if times_of(self.folder) != self.times:
            raise SettingError(f"{self.folder}: another process has trained here since this one began: give "
                               "the command again, or --out_dir=FOLDER writes elsewhere")
        holder = {"process": os.getpid(), "on": platform.node(), "torchrun": group.run_id()}
        self.lock.truncate(0)
        self.lock.write(json.dumps(holder))
        self.lock.flush()
        damaged = self.folder / "ckpt.pt"
        if self.source and self.source.name == "ckpt.prev.pt" and damaged.exists():
            os.replace(damaged, self.folder / "ckpt.damaged.pt")  # it must not replace the good one
        best = self.folder / "best.pt"
        if self.forget and best.exists():
            os.replace(best, self.folder / "best.before.pt")  # which nothing loads by itself
        if self.removes:
            remove_run(self.removes, settings)
        write_json(self.folder / "settings.json", settings)
        write_text(self.log_file, self.rows_so_far())

    def rows_so_far(self) -> str:
        """The log up to the checkpoint: the steps after it will be repeated."""
        kept, damaged = [], 0
        if self.resumed and self.log_file.exists():
            lines = self.log_file.read_text(encoding="utf-8", errors="replace").split("\n")
            for line in lines[:-1]:  # the last one ends the file, or was not finished
                try:
                    if json.loads(line)["iter"] <= self.checkpoint["state"]["step"]:
                        kept.append(line + "\n")
                except (KeyError, TypeError, ValueError):
                    damaged += 1
        if damaged:
            print(f"warning: {self.log_file}: {damaged} damaged lines dropped", file=sys.stderr)
        return "".join(kept)

    def restore(self, model, optimizers) -> State:
        """The state of the run, 0 for a new one; optimizers and random states are set as they were then."""
        if not self.resumed:
            return State()
        saved = self.checkpoint
        try:
            load_optimizer_state(optimizers, model, saved["optimizer"])
            if self.machine.scaler and saved["scaler"]:
                self.machine.scaler.load_state_dict(saved["scaler"])
            self.machine.set_random_states(saved["rng"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{self.source}: does not fit its own model ({error}): --init_from="
                            f"{self.folder} --out_dir=FOLDER begins a run with its weights") from None
        known = {one.name for one in fields(State)}
        state = State(**{name: value for name, value in saved["state"].items() if name in known})
        self.before = state.elapsed
        if self.forget:
            state.best, state.since_best = {}, 0
        self.checkpoint = {"state": saved["state"]}  # free the memory of the weights
        return state

    def elapsed(self) -> float:
        """Seconds, those of earlier processes too."""
        return self.before + time.time() - STARTED

    def log(self, **row) -> None:
        if not self.machine.main:
            return
        try:
            with open(self.log_file, "a", encoding="utf-8") as f:  # on the disk when `save` has been called
                f.write(json.dumps(strict(row)) + "\n")
        except OSError as error:
            raise cannot_write(self.log_file, error) from None
        if self.watcher:
            self.watcher.log(row, step=row["iter"])

    def start_wandb(self, wanted: bool, project: str, name: str) -> None:
        """Log to Weights & Biases too, if it is installed."""
        if not wanted or not self.machine.main:
            return
        try:
            import wandb
        except ImportError:
            print("warning: wandb_log=True, but wandb is not installed: pip install wandb; log.jsonl has "
                  "it all", file=sys.stderr)
        else:
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
            self.wait_for_check()
            with open(self.log_file, "a", encoding="utf-8") as f:
                os.fsync(f.fileno())
            save_checkpoint(self.folder / name, {"model": module.state_dict(), "state": dict(vars(state)),
                                                 **extra, **self.made_of, **entries})

    def wait_for_check(self) -> None:
        """Raises UserError if the data is not what its checksums say. Before an evaluation, and a save."""
        if self.data_check:
            self.data_check.result()

    def stopped(self, unless_late: bool = False) -> bool:
        """Was any process asked to stop, or is the time over? unless_late: then the time does not matter."""
        signal = self.stop.agreed()
        return bool(signal) and not (unless_late and signal == OUT_OF_TIME)

    def say_stopped(self, step: int) -> None:
        """A limit is kept with the settings, and stops the run that goes on too: it is named."""
        limit = f" (max_minutes={self.stop.max_minutes:g})" if self.stop.signal == OUT_OF_TIME else ""
        self.machine.say(f"stopped after {step} steps{limit}, saved: --init_from=resume goes on")

    def close(self) -> None:
        """The end of the run, but not of the process."""
        self.stop.release()
        if self.machine.main:
            plot_losses(self.log_file, self.folder / "loss.png", *self.unit)
            self.lock.close()
        if self.watcher:
            self.watcher.finish()


def locked(path: Path):
    """The file, open: until it is closed no other process can lock it. Raises SettingError if one has."""
    file = open(path, "a+", encoding="utf-8")
    try:
        try_lock(file)
    except (BlockingIOError, PermissionError):  # POSIX, Windows
        holder = ", ".join(f"{key} {value}" for key, value in read_dict(path).items() if value)
        raise SettingError(f"{path.parent}: another process is writing here ({holder}): wait for it, or "
                           "--out_dir=FOLDER writes elsewhere") from None
    except OSError as error:
        print(f"({path}: no lock here ({error.strerror}): let no other process write into this folder)")
    return file


OUT_OF_TIME = 1000  # in place of a signal's number


class Stop:
    """When to leave the loop: at SIGINT, SIGTERM or SIGHUP to any process, or after max_minutes.

    One that is ignored at the start stays ignored: that is what nohup does. The first asks to stop after the
    step under way. Another one stops at once, but only a second later or more, since torchrun passes on what
    the terminal has sent to all processes already.
    """

    def __init__(self, max_minutes: Optional[float] = None):
        self.signal, self.asked, self.max_minutes = 0, math.inf, max_minutes
        self.deadline = STARTED + 60 * (max_minutes or math.inf)
        self.before = {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            one = getattr(signal, name, None)
            if one and signal.getsignal(one) != signal.SIG_IGN:
                self.before[one] = signal.signal(one, self.ask)

    def release(self) -> None:
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
            got = torch.tensor(self.signal)
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
        now = max(time.time(), self.since + 1e-6)  # a coarse clock may stand still, or be put back
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


WORDS = {"train_loss": "train loss {}", "val_loss": "val loss {}", "loss": "val loss {}",
         "val_bpb": "{} bits per byte"}


def in_digits(value: float) -> str:
    """Four decimals; of a number that they would make 0, or a long one, its first digits."""
    if 0 < abs(value) < 5e-5:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.6g}"


def in_words(metrics: dict[str, float]) -> str:
    return ", ".join(WORDS.get(name, name + " {}").format(in_digits(one)) for name, one in metrics.items())
