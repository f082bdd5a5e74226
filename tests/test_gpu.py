"""
On a GPU: what the other tests promise on a CPU. Skipped without CUDA, but for a GPU that is pretended.

    python -m pytest tests/test_gpu.py                 in a few minutes, on a machine with a GPU
    DEVICE=cpu python -m pytest tests/test_gpu.py      a rehearsal
"""
import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import finetune
import train
from lib.run import Machine, read_checkpoint
from lib.tasks import TASKS
from test_model import batch, columns, fresh
from tests.helpers import QUICK, ROOT, TOY, difference, log_of, run_here, same, script, slow, tiny, tokens

DEVICE = torch.device(os.environ.get("DEVICE", "cuda"))
GPU = DEVICE.type == "cuda"
on_gpu = pytest.mark.skipif(GPU and not torch.cuda.is_available(), reason="no CUDA here")


@pytest.fixture
def exact():
    """Products in full float32."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("high")


@contextlib.contextmanager
def no_waits():
    """Inside `with`, it is an error that the host waits for the GPU."""
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    yield
    if GPU:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@columns
def test_logits_are_the_cpu_s(column, exact):
    """In float32, in bfloat16 products, with bfloat16 weights; with padding too."""
    model, idx = tiny(column), tokens(3, 16)
    mask = torch.ones(3, 16, dtype=torch.bool)
    mask[0, :5] = False
    with torch.no_grad():
        want, padded = model(idx)[0], model(idx, pad_mask=mask)[0][mask]
        model.to(DEVICE)
        idx, mask = idx.to(DEVICE), mask.to(DEVICE)
        assert difference(model(idx)[0].cpu(), want) < 2e-5
        assert difference(model(idx, pad_mask=mask)[0][mask].cpu(), padded) < 2e-5
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert difference(model(idx)[0].float().cpu(), want) < 0.05
        assert difference(model.to(torch.bfloat16)(idx)[0].float().cpu(), want) < 0.05


def gradients(column, device, compiled=False, dtype="float32"):
    """The loss of a step, and all gradients in one vector, on the CPU."""
    model = tiny(column).to(device).train()
    machine = Machine(str(device), dtype)
    x, y = (one.to(device) for one in batch(3))
    objective, _ = train.ready(train.Objective(model), machine, compiled, (x, y))
    with machine.amp():
        loss = objective(x, y)[0] / y.numel()
    loss.backward()
    found = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    return loss.detach().cpu(), torch.cat(found).cpu()


@on_gpu
@columns
@pytest.mark.parametrize("how, near", [({}, 1e-4), ({"dtype": "bfloat16"}, 0.15), ({"compiled": True}, 1e-3)])
def test_gradients_are_the_cpu_s(column, how, near, exact):
    if "compiled" in how and (column not in ("modern", "n_gram") or not GPU):
        pytest.skip("compiled: two columns, on a GPU")
    want, got = gradients(column, torch.device("cpu")), gradients(column, DEVICE, **how)
    assert difference(got[0], want[0]) < near and difference(got[1], want[1]) < near


@on_gpu
@pytest.mark.parametrize("column", ["gpt2", "grouped", "n_gram", "llama"])
def test_writing_is_the_cpu_s(column, exact):
    """With the cache and without, past the context, compiled, and beside other texts."""
    model, idx = tiny(column), tokens(2, 5)
    want = model.generate(idx[:1], 30, temperature=0)
    model.to(DEVICE)
    idx, mask = idx.to(DEVICE), torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    mask[1, :2] = False
    assert torch.equal(model.generate(idx[:1], 30, temperature=0).cpu(), want)
    assert torch.equal(model.generate(idx[:1], 30, temperature=0, use_cache=False).cpu(), want)
    both = model.generate(idx, 8, temperature=0, pad_mask=mask)
    assert torch.equal(both[1, 5:], model.generate(idx[1:, 2:], 8, temperature=0)[0, 3:])
    if GPU:
        assert torch.equal(model.generate(idx[:1], 30, temperature=0, compile=True).cpu(), want)


class Batch:
    """A model, and steps on one batch."""

    def __init__(self, optimizer, dtype):
        self.model, self.machine = fresh("modern").to(DEVICE), Machine(str(DEVICE), dtype)
        self.objective = train.Objective(self.model)
        self.optimizers = train.make_optimizers(self.model, optimizer, 1e-3, 0.02, 0.1, (0.9, 0.95))
        self.batch = [self.machine.to(one) for one in batch(3)]
        self.counted = (self.batch[1] != -1).sum()

    def step(self, scale=1.0):
        return train.train_step(lambda *batch: self.objective(*batch) * scale, [self.batch], self.counted,
                                self.model, self.optimizers, self.machine, 1.0)


@on_gpu
@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_a_step_waits_for_nothing_and_nan_moves_nothing(optimizer):
    made = Batch(optimizer, "float32")
    made.step()
    with no_waits():
        made.step()
    before = [p.clone() for p in made.model.parameters()]
    made.step(torch.nan)
    assert same(before, list(made.model.parameters()))
    made.step()
    assert not same(before, list(made.model.parameters()))


@on_gpu
@pytest.mark.skipif(not GPU, reason="float16 is for GPUs")
def test_float16_learns_after_its_scaler_has_come_down():
    made = Batch("muon", "float16")
    made.machine.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**40)
    losses = []
    for _ in range(60):
        loss, norm = made.step()
        losses.append(loss[0].item() if norm.isfinite() else torch.inf)
    assert losses[0] == torch.inf and min(losses[-5:]) < 3.5  # log 61 is 4.1


@on_gpu
def test_a_resumed_run_is_the_run(home):
    how = [word for word in TOY if "device" not in word] + [f"--device={DEVICE}", "--deterministic=True",
                                                            "--lr_decay_iters=8"]
    for name in ("gpu_whole", "gpu_half"):
        shutil.rmtree(home / "out" / name, ignore_errors=True)
    run_here(train, *how, "--out_dir=out/gpu_whole", cwd=home)
    run_here(train, *how, "--out_dir=out/gpu_half", "--max_iters=4", cwd=home)
    run_here(train, "--init_from=resume", "--out_dir=out/gpu_half", "--max_iters=8", cwd=home)
    torch.use_deterministic_algorithms(False)
    a, b = (read_checkpoint(home / "out" / name / "ckpt.pt")["model"] for name in ("gpu_whole", "gpu_half"))
    assert same(a, b)
    cpu = log_of(home / "out/whole")[-1]["val_loss"]
    assert log_of(home / "out/gpu_whole")[-1]["val_loss"] == pytest.approx(cpu, rel=0.05)


@on_gpu
def test_two_processes_are_one(home):
    """Both on one GPU, if there is no other: by gloo."""
    shutil.rmtree(home / "out/gpu_two", ignore_errors=True)
    how = [word for word in TOY if "device" not in word and "dropout" not in word]
    how += ["--dropout=0.0", "--dtype=float32", "--backend=gloo"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    device = f"--device={DEVICE.type}" + ":0" * GPU
    two = script(*command, str(ROOT / "train.py"), *how, device, "--out_dir=out/gpu_two", cwd=home)
    assert two.returncode == 0, two.stderr
    run_here(train, *how, device, "--out_dir=out/gpu_one", "--overwrite", cwd=home)
    one, two = (log_of(home / f"out/gpu_{name}")[-1]["val_loss"] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-3)


@on_gpu
def test_fine_tuning_and_its_use(tuned, tmp_path):
    how = [word for word in QUICK if "device" not in word]
    run_here(finetune, f"--out_dir={tmp_path}", f"--data={tuned / 'data.csv'}", "--epochs=4",
             f"--device={DEVICE}", *how)
    found = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert found["accuracy"] > 0.9
    page = script("tools/explain.py", f"--out_dir={tmp_path}", "--start=w1 fine w2", f"--device={DEVICE}",
                  cwd=tmp_path)
    assert page.returncode == 0 and "explained: 'good'" in page.stdout, page.stderr


@slow
@pytest.mark.skipif(not shutil.which("g++"), reason="a pretended GPU needs g++")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA: the other tests are for it")
def test_a_pretended_gpu_is_never_waited_for_in_training():
    """Nor are devices mixed, which is an error there: in a step of each optimizer, objective and task."""
    done = subprocess.run([sys.executable, "-m", "tests.pretend"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    waits = json.loads(done.stdout)
    errors = [what for path in waits.values() for what in path if what.startswith("error")]
    assert not errors, errors
    writing, looking = waits.pop("sample"), waits.pop("explain")
    assert list(waits) == [*train.OPTIMIZERS, "masked", "teacher", "n_gram", "remat", *TASKS]
    assert waits == {path: {} for path in waits}
    assert sum(writing.values()) <= 1  # of four tokens
    assert sum(looking.values()) < 100
