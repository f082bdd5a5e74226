"""What tools.bench measures, not how fast it is: that depends on the machine."""
import math
import re
import sys
import time
from multiprocessing import Pipe, get_context

import pytest
import torch

import train
from lib.run import peak_flops
from tests.helpers import TOY, one_line, script
from tools import bench, growth


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


def test_a_table_is_ready_to_paste(monkeypatch, capsys):
    tiny = "--n_layer=1 --n_head=2 --n_embd=32 --vocab_size=50 --block_size=32"
    rows = [f"--device=cpu {tiny}", f"write --device=cpu --batch_size=1 {tiny}", "--n_head=5"]
    monkeypatch.setattr(bench, "ROWS", {"cpu": rows, "cuda": rows, "mps": rows})
    bench.bench_table()
    machine, _, _, _, trained, written, refused = capsys.readouterr().out.splitlines()
    assert torch.__version__ in machine
    assert re.match(r"\| `--dev.*` \| [\d,]+ tokens/s, .*product's \| [\d.]+ GB \| [\d.]+ s \|$", trained)
    assert re.match(r"\| `write.*` \| [\d,.]+ tokens/s \|  \|  \|$", written)
    assert "n_head=5" in refused
    monkeypatch.setattr("config.open_console", lambda: None)
    monkeypatch.setattr(sys, "argv", ["bench.py", "table", "--prompt_tokens=5"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "unknown setting 'prompt_tokens'" in capsys.readouterr().err


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
    (("growth", "--part=none"), 2, ["none", "bootstrap"]),
    (("--init_from=resume", "--out_dir=none"), 1, ["none", "no checkpoint"]), (("rite",), 2, ["rite"])])
def test_what_cannot_be_measured_is_said(words, status, named, home):
    one_line(script("tools/bench.py", *words, cwd=home), status, *named)


@pytest.mark.parametrize("time_of, wanted", [
    (lambda n: 5 + n, 0.94), (lambda n: n * math.log(n), 1.0), (lambda n: 10**6 + n**2, 1.87),
    (lambda n: n**1.2 + 3, 1.12), (lambda n: 7.0, 0.0), (lambda n: n**0.5, 0.47),
    (lambda n: {62_500: 9, 250_000: 7, 10**6: 18}[n], 0.46)])
def test_what_every_size_costs_does_not_hide_how_a_part_grows(time_of, wanted):
    sizes = [62_500, 250_000, 10**6]
    assert growth.exponent(sizes, [time_of(n) for n in sizes], 0.1) == pytest.approx(wanted, abs=0.03)


def test_a_part_that_grows_too_fast_is_named(monkeypatch, capsys):
    """Of four: in step with its work, squared, one that fails, and one with memory that may not grow."""
    parts = {"good": lambda n: n, "squared": lambda n: n**2, "fails": lambda n: 1 / 0, "streams": lambda n: n}

    def measured(name, sizes):
        return [{"seconds": parts[name](n), "clock": 1.0, "megabytes": n} for n in sizes]

    monkeypatch.setattr(growth, "measured", measured)
    monkeypatch.setattr(growth, "PARTS", {
        name: growth.Part(None, "rows", 1600, 1600, "" if name == "streams" else "rows") for name in parts})
    with pytest.raises(growth.UserError, match="^squared, fails, streams: grows"):
        growth.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| good", "| squared", "| fails", "| streams"]
    assert "| 0.88 |" in rows[0] and "too fast" in rows[1] and "ZeroDivisionError" in rows[2]


def test_a_part_is_measured_in_a_process(tmp_path):
    done = script("tools/bench.py", "growth", "--part=grid", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| grid \| 64,000 trials \| \d+\.\d s \| \d+ MB \| [01]\.\d\d", done.stdout)


def hold(connection):
    growth.end_with_parent()
    connection.send("begun")
    time.sleep(60)


def start_one(connection):
    one = get_context("spawn").Process(target=hold, args=(connection,))
    one.start()
    connection.close()
    one.join()


def test_what_measures_ends_with_a_process_that_is_killed():
    mine, others = Pipe()
    parent = get_context("spawn").Process(target=start_one, args=(others,))
    parent.start()
    others.close()
    assert mine.recv() == "begun"
    parent.kill()
    with pytest.raises(EOFError):  # nobody holds the other end
        mine.poll(20) and mine.recv()


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A100-PCIE-40GB", 312),
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
    ("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA L40S", 362),
    ("NVIDIA RTX A1000", None), ("NVIDIA A1000", None), ("NVIDIA T400 4GB", None), ("NVIDIA A10G", None),
    ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None), ("NVIDIA H200 NVL", None)])
def test_no_card_is_taken_for_another(name, peak):
    assert peak_flops(name) == (None if peak is None else peak * 1e12)
