"""What tools.bench measures, not how fast it is: that depends on the machine."""
import re

import pytest
import torch

import train
from tests.helpers import TOY, one_line, script
from tools import bench


def test_a_step_is_stopped_after_each_part(monkeypatch):
    laps, model = [], torch.nn.Linear(1, 2)
    monkeypatch.setattr(bench.Stopwatch, "lap", lambda self, part: laps.append(part))
    batches = [(torch.ones(1),)] * 2
    train.train_step(model, batches, torch.tensor(1), model, [], bench.Stopwatch("cpu"), 1.0)
    assert laps == ["backward"] + ["backward", "forward"] * 2 + ["backward"]  # the first takes no time


def test_a_training_step_is_taken_apart(home):
    done = script("tools/bench.py", *TOY, "--out_dir=out/bench", cwd=home)
    assert done.returncode == 0, done.stderr
    parts = {name: float(ms) for name, ms in re.findall(r"^(\w+) +([\d.]+) ms", done.stdout, re.MULTILINE)}
    assert list(parts) == ["data", "forward", "backward", "update", "step"]
    assert sum(parts.values()) == pytest.approx(2 * parts["step"], abs=0.3)
    assert min(parts["forward"], parts["backward"], parts["update"]) > 0.1
    speed = re.search(r"speed +([\d,]+) tokens/s, [\d,]+ GFLOP/s: \d+% of [\d,]+", done.stdout)[1]
    a_step = 32 * 2 * 2  # block_size, batch_size, gradient_accumulation_steps
    assert int(speed.replace(",", "")) == pytest.approx(1000 * a_step / parts["step"], rel=0.05)
    assert "to the end of the first step" in done.stdout and "GB at most" in done.stdout
    assert not (home / "out/bench").exists()
    again = script("tools/bench.py", "--init_from=resume", "--out_dir=out/whole", cwd=home)
    assert again.returncode == 0 and "2 layers, 32 wide" in again.stdout, again.stderr


@pytest.mark.parametrize("words, weights", [
    (("--out_dir=out/whole", "--prompt_tokens=999"), ["float32"]),
    (("--n_layer=1", "--n_head=2", "--n_embd=32", "--vocab_size=50", "--block_size=32", "--quantize=int8"),
     ["float32", "int8"])])
def test_writing_is_measured_against_reading(words, weights, home):
    done = script("tools/bench.py", "write", "--device=cpu", "--batch_size=3", *words, cwd=home)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+) +(\d) +([\d,.]+) tokens/s +([\d,.]+) tokens/s +([\d.]+) ms +\d+%", done.stdout,
                      re.MULTILINE)
    assert [(name, count) for name, count, *_ in rows] == [(name, n) for n in "13" for name in weights]
    assert "16 tokens at once" in done.stdout and "16 one by one" in done.stdout  # of a context of 32
    for _, count, _, rate, ms in rows:
        assert float(rate.replace(",", "")) * float(ms) / 1000 == pytest.approx(int(count), rel=0.5)


@pytest.mark.parametrize("words, status, named", [
    (("write", "--out_dir=out/whole", "--n_layer=3"), 2, ["n_layer", "out/whole"]),
    (("write", "--causal=False"), 2, ["causal=False"]), (("write", "--n_head=5"), 2, ["n_head=5"]),
    (("write", "--max_new_tokens=1"), 2, ["at least 2"]),
    (("write", "--out_dir=out/whole", "--compare"), 2, ["compare", "transformers"]),
    (("--init_from=resume", "--out_dir=none"), 1, ["none", "no checkpoint"]), (("rite",), 2, ["rite"])])
def test_what_cannot_be_measured_is_said(words, status, named, home):
    one_line(script("tools/bench.py", *words, cwd=home), status, *named)
