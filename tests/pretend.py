"""
A pretended GPU: tensors that say they are on cuda:0, with their data on the CPU. Without a GPU it tells if
an operation mixes devices, and where the host waits for the device: reads a number, copies from memory that
is not pinned, looks how many are not 0.

    python -m tests.pretend adamw tag    a step of these paths; prints {"adamw": {"item train.py:507": 1}}

Needs g++, to tell torch that there is such a device, and a torch without CUDA.
"""
import collections
import ctypes
import importlib.util
import json
import subprocess
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
GUARD = r"""
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
constexpr auto GPU = c10::DeviceType::CUDA;
struct OneDevice : c10::impl::NoOpDeviceGuardImpl<GPU> {
  c10::Device getDevice() const override { return {GPU, 0}; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Stream getStream(c10::Device d) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, d);
  }
  c10::Stream exchangeStream(c10::Stream s) const noexcept override { return s; }
  bool queryEvent(void*) const override { return true; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
};
static OneDevice device;
static c10::impl::DeviceGuardImplRegistrar registrar(GPU, &device);
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}
"""


def load_guard() -> None:
    """Compile it, and load it: before torch itself, which asks only once."""
    root = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD, encoding="utf-8")
        places = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include", f"-L{root}/lib",
                  f"-Wl,-rpath,{root}/lib"]
        command = ["g++", "-shared", "-fPIC", "-std=c++20", *places, source, "-ltorch_cpu", "-lc10"]
        subprocess.run([*command, "-o", library], check=True)
        ctypes.CDLL(str(library))


load_guard()

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402


def pretend() -> None:
    """From here on torch takes cuda:0 for a device that is there."""
    for name, value in {"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
                        "get_device_capability": (9, 0), "get_device_name": "NVIDIA H100 80GB HBM3",
                        "is_current_stream_capturing": False, "is_bf16_supported": True,
                        "_lazy_init": None, "set_device": None,
                        "synchronize": None, "manual_seed_all": None}.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.Generator = OfTheHost
    made = torch.tensor  # which asks the device itself for memory
    torch.tensor = lambda data, device="cpu", **how: made(data, **how).to(device)
    torch.Tensor.pin_memory = pinned
    torch.autograd.set_multithreading_enabled(False)  # a device has a thread of its own for the backward pass
    torch.__future__.set_overwrite_module_params_on_conversion(True)


class OfTheHost(torch.Generator):
    """A generator that says it is the device's."""

    def __new__(cls, device="cpu"):
        return torch._C.Generator.__new__(torch._C.Generator, "cpu")


def pinned(tensor):
    copy = tensor.clone()
    copy.is_in_pinned_memory = True
    return copy


class Pretended(torch.Tensor):
    """A tensor on cuda:0; its data is .inner, on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        like = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **like, device="cuda:0")
        made.inner = inner
        return made

    def tolist(self):
        wait("tolist")
        return self.inner.detach().tolist()

    def __repr__(self):
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Device(TorchDispatchMode):
    """Inside `with`, what is made on cuda is pretended, too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


waits = collections.Counter()


def wait(what: str) -> None:
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent.name != "tests"]
    ours = [frame for frame in frames if frame.filename.startswith(str(ROOT))]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    waits[f"{what} {place}"] += 1


LOOK = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount"}
CROSS = {"_to_copy", "copy_", "index", "index_put_", "_index_put_impl_"}  # may have arguments on both devices


def inner(value):
    return value.inner if isinstance(value, Pretended) else value


def run(function, args, kwargs):
    """An operation on the inner tensors; of tensors on both devices it is an error, as on a GPU."""
    name = function._schema.name.removeprefix("aten::")
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    target = kwargs.get("device")
    on_gpu = bool(there) if target is None else torch.device(target).type == "cuda"
    if not there and not on_gpu:
        return function(*args, **kwargs)
    apart = [tuple(tensor.shape) for tensor in tensors if tensor.dim() and not isinstance(tensor, Pretended)]
    if there and apart and name not in CROSS:
        raise RuntimeError(f"{name}: arguments on cuda:0, and on the CPU: {apart}")
    look_for_waits(name, args, kwargs, on_gpu)
    plain = {**kwargs, "device": "cpu"} if target is not None else kwargs
    found = function(*tree_map(inner, args), **tree_map(inner, plain))
    if not on_gpu:
        return found.clone() if name == "_to_copy" and there else found
    known = {} if name == "detach" else {id(tensor.inner): tensor for tensor in there}  # changed in place
    return tree_map(partial(outer, known=known), found)


def outer(value, known: dict):
    if not isinstance(value, torch.Tensor) or isinstance(value, Pretended):
        return value
    return known.get(id(value), Pretended(value))


def look_for_waits(name: str, args, kwargs, on_gpu: bool) -> None:
    if name == "_local_scalar_dense":
        wait("item")
    elif name in LOOK:
        wait(name)
    elif name in ("_to_copy", "copy_"):
        source = args[1] if name == "copy_" else args[0]
        to_gpu = isinstance(args[0], Pretended) if name == "copy_" else on_gpu
        if isinstance(source, Pretended) and not to_gpu:
            wait("copy to the host")
        elif to_gpu and not isinstance(source, Pretended):
            free = getattr(source, "is_in_pinned_memory", False) and (
                kwargs.get("non_blocking") or args[2:3] == (True,))
            if not free:
                wait("copy of pageable memory")
    elif name.startswith(("index", "_index")):
        indices = [one for one in args[1] if one is not None] if isinstance(args[1], (list, tuple)) else []
        if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
            wait("boolean index")


# -----------------------------------------------------------------------------
# The paths: each returns what makes one step

def models(**fields):
    from model import Config, Transformer
    small = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 258, "dropout": 0.1}
    return Transformer(Config(**{**small, **fields}))


def pretraining(machine, optimizer="adamw", teacher=None, remat=False, **fields):
    import train
    model = models(**fields).to(machine.device)
    made = train.make_optimizers(model, optimizer, 1e-3, 0.02, 0.1, (0.9, 0.95))
    if remat:
        train.recompute_blocks(model)
    if teacher:
        teacher = models().to(machine.device).requires_grad_(False)
    train.IN_MEMORY = 1  # the smallest chunks: 64 tokens, of 96
    model.head.register_forward_pre_hook(few_tokens)
    x = torch.randint(256, (3, 32))
    y, counted = x.roll(-1, 1), None
    if not model.config.causal:
        x, y = train.masked_tokens(x, range(3), 0, 0.3, 257, 258)
        counted = train.count_masked(32, 0.3)
    return partial(pretraining_step, train.Objective(model, counted, 0.0, teacher), x, y, made, machine)


def few_tokens(head, args):
    if args[0].numel() > 64 * 16:
        raise RuntimeError("the scores of all tokens at once")


def pretraining_step(objective, x, y, optimizers, machine):
    import train
    batch = [(machine.to(x), machine.to(y))]
    train.train_step(objective, batch, (y != -1).sum(), objective.model, optimizers, machine, 1.0)


HEAD = {"labels": ["x", "y"], "several": False, "space": "", "paired": False, "apart": False, "pool": "mean",
        "max_length": 32, "instruct": False, "mean": 1.0, "std": 1.0, "no_answer": False}
OF_TASKS = {  # what their heads have besides
    "classify": {}, "lm": {}, "regress": {"labels": ["number"]}, "tag": {"pool": None},
    "qa": {"labels": ["first", "last"], "paired": True, "pool": None}}
LABELS = {"classify": ["x", "y"], "regress": ["0", "1"], "tag": [["x", "x", "x"], ["x", "x"]],
          "qa": [[("a b c", 0)], [("d e", 0)]], "lm": [None, None]}


def tuning(machine, name):
    import finetune
    import train
    from lib.rows import Row
    from lib.tasks import TASKS
    from lib.tokenizer import make_tokenizer
    rows = [Row(str(n), text, label=label, words=text.split())
            for n, (text, label) in enumerate(zip(("a b c", "d e"), LABELS[name], strict=True))]
    if name == "qa":
        for row in rows:
            row.pair = row.text + " more"
    task = TASKS[name]({"task": name, **HEAD, **OF_TASKS[name]}, make_tokenizer("bytes", [], 0))
    body = models(causal=name == "lm", head="linear" if name == "lm" else "none")
    finetune.fit_head(body, TASKS[name])
    model = finetune.Tuned(body, task).to(machine.device)
    s = SimpleNamespace(token_dropout=0.1, label_smoothing=0.0, l1=0.0, l2=0.0, teacher_share=0.0,
                        teacher_temperature=1.0)
    made = train.make_optimizers(model, "adamw", 1e-3, 0.02, 0.1, (0.9, 0.95))
    return partial(tuning_step, finetune.Objective(model, None, s), task.examples(rows), task, made, machine)


def tuning_step(objective, examples, task, optimizers, machine):
    import finetune
    import train
    inputs, target = finetune.collate(examples, task, machine.device)
    counted = task.count(target, None)
    train.train_step(objective, [(inputs, target)], counted, objective.model, optimizers, machine, 1.0)


def sampling(machine):
    model = models().to(machine.device).eval()
    prompt = torch.randint(256, (1, 8)).to(machine.device)
    return lambda: list(model.stream(prompt, 4, temperature=0.8, top_k=50, top_p=0.9))


def explaining(machine):
    from lib.tokenizer import make_tokenizer
    from tools import explain
    explain.samples = 8
    model, tokenizer = models(dropout=0.0).to(machine.device).eval(), make_tokenizer("bytes", [], 0)
    case = partial(explain.of_a_token, model, tokenizer, "abc", "")
    return lambda: explain.look_inside(model, tokenizer, case(), True)


PATHS = {
    "adamw": pretraining,
    "muon": partial(pretraining, optimizer="muon"),
    "lars": partial(pretraining, optimizer="lars"),
    "sgd": partial(pretraining, optimizer="sgd"),
    "masked": partial(pretraining, causal=False),
    "teacher": partial(pretraining, teacher=True),
    "n_gram": partial(pretraining, n_gram=3, n_gram_rows=50, pos="rope"),
    "remat": partial(pretraining, remat=True),
    **{name: partial(tuning, name=name) for name in LABELS},
    "sample": sampling, "explain": explaining,
}


def main(names: list[str]) -> None:
    pretend()
    from lib.run import Machine
    found = {}
    with Device():
        machine = Machine("cuda")
        for name in names:
            try:
                step = PATHS[name](machine)
                step()  # the first makes states
                waits.clear()
                step()
                found[name] = dict(waits)
            except Exception as error:
                found[name] = {f"error: {error}": 1}
                traceback.print_exc()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:] or list(PATHS))
