"""
What must hold, on tiny models and a CPU, without network:  python -m pytest

What takes longer runs with SLOW=1; what compares with `transformers` or `tokenizers` is skipped where they
are missing. What measures a speed runs with TIMED=1, and wants a machine that does nothing else.
"""

import ast
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import prepare
import train
from config import SettingError, UserError
from lib.optim import Pruning, lr_factor, make_optimizers, optimizer_state, orthogonalise, update
from lib.run import load_checkpoint
from model import Config, Transformer, draw
from tests.helpers import (
    COLUMNS,
    ROOT,
    TINY,
    TOY,
    checkpoint,
    columns,
    difference,
    one_line,
    same,
    script,
    slow,
    tiny,
    tokens,
)


def test_gpt2_has_its_number_of_parameters():
    model = Transformer(Config(vocab_size=50257, bias=True))
    assert model.num_params() == 124_439_808  # as published: 124M
    assert model.head.weight is model.wte.weight


@columns
def test_first_predictions_are_about_uniform(column):
    torch.manual_seed(0)
    model = Transformer(Config(**{**TINY, **COLUMNS[column]}))
    _, loss = model(tokens(8, 16), tokens(8, 16, seed=1))
    assert abs(loss.item() - math.log(61)) < (0.35 if column == "vanilla" else 0.1)


@columns
def test_no_gradient_comes_from_the_future(column):
    model = tiny(column)
    x = model.wte(tokens(1, 16)).detach().requires_grad_()
    model.wte = torch.nn.Module()
    model.wte.forward = lambda idx: x
    hidden = model.hidden(torch.zeros(1, 16, dtype=torch.long))
    (grad,) = torch.autograd.grad(hidden[0, 8].square().sum(), x)
    assert grad[0, 9:].abs().max() == 0 and (grad[0, :9].abs().amax(-1) > 0).all()


def test_a_masked_model_sees_both_sides():
    model, idx = tiny("vanilla", causal=False), tokens(1, 16)
    other = idx.clone()
    other[0, -1] = (idx[0, -1] + 1) % 61
    assert (model(idx)[0][0, 0] - model(other)[0][0, 0]).abs().max() > 1e-3


@columns
@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(column, causal):
    model = tiny(column, causal=causal)
    idx = tokens(1, 9)
    alone = model(idx)[0]
    for left in (0, 3, 7):  # on the right, on both sides, on the left
        padded, mask = tokens(2, 16, seed=5), torch.zeros(2, 16, dtype=torch.bool)
        padded[1, left : left + 9], mask[1, left : left + 9], mask[0] = idx[0], True, True
        logits = model(padded, pad_mask=mask)[0]
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(logits[1, left : left + 9], alone[0], atol=1e-5, rtol=1e-5)


def test_targets_of_minus_one_do_not_count():
    model, idx, targets = tiny(), tokens(2, 16), tokens(2, 16, seed=1)
    targets[0, 3:], targets[1, :9] = -1, -1
    logits, loss = model(idx, targets)
    kept = targets != -1
    torch.testing.assert_close(loss, F.cross_entropy(logits[kept], targets[kept]))
    assert logits.shape == (2, 16, 61) and model(idx)[1] is None
    assert model(idx, torch.full_like(idx, -1))[1] == 0  # not NaN


def test_too_long_an_input_is_refused():
    with pytest.raises(ValueError, match="17 tokens.*block_size=16"):
        tiny()(tokens(1, 17))


@pytest.mark.parametrize(
    "field, value",
    [("n_head", 5), ("n_kv_head", 3), ("pos", "ropes"), ("act", "swish"), ("n_layer", 0), ("dropout", 1.0),
     ("softcap", 0.0), ("norm", "batch")],
)
def test_config_names_the_bad_field(field, value):
    with pytest.raises(ValueError, match=field):
        Config(**{**TINY, field: value})


@pytest.mark.parametrize("causal", [True, False])
def test_vanilla_equals_torch_transformer_encoder(causal):
    model = tiny("vanilla", causal=causal)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 128, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for ours, theirs in zip(model.blocks, encoder.layers):
        theirs.load_state_dict(
            {
                **{
                    f"self_attn.in_proj_{kind}": torch.cat(
                        [getattr(one, kind) for one in (ours.attn.q, ours.attn.k, ours.attn.v)]
                    )
                    for kind in ("weight", "bias")
                },
                **{
                    f"{new}.{kind}": getattr(getattr(part, old), kind)
                    for new, part, old in (("self_attn.out_proj", ours.attn, "o"),
                                           ("linear1", ours.mlp, "up"), ("linear2", ours.mlp, "down"),
                                           ("norm1", ours, "norm1"), ("norm2", ours, "norm2"))
                    for kind in ("weight", "bias")
                },
            }
        )
    idx = tokens(3, 16)
    position, i = torch.arange(16.0)[:, None], torch.arange(0, 32, 2.0)
    waves = torch.zeros(16, 32)
    waves[:, 0::2], waves[:, 1::2] = (torch.sin(position / 10000 ** (i / 32)),
                                      torch.cos(position / 10000 ** (i / 32)))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(16) if causal else None
    hidden = encoder(model.wte(idx) * math.sqrt(32) + waves, mask=mask)
    expected = F.linear(hidden, model.head.weight, model.head.bias)
    torch.testing.assert_close(model(idx)[0], expected, atol=1e-5, rtol=1e-5)


@columns
def test_cached_equals_uncached(column):
    model, prompt = tiny(column), tokens(2, 5)
    cached = model.generate(prompt, 3 * 16, temperature=0)
    assert cached.shape == (2, 5 + 48) and torch.equal(cached[:, :5], prompt)
    assert torch.equal(cached, model.generate(prompt, 3 * 16, temperature=0, use_cache=False))
    # and it is what forward says, as long as all fits
    for t in range(5, 16):
        assert torch.equal(model(cached[:, :t])[0][:, -1].argmax(-1), cached[:, t])
    long = tokens(1, 40)  # a prompt over block_size
    assert torch.equal(
        model.generate(long, 20, temperature=0), model.generate(long, 20, temperature=0, use_cache=False)
    )


@columns
def test_ragged_prompts_go_as_if_alone(column):
    model = tiny(column)
    prompts = [tokens(1, n, seed=n) for n in (2, 5, 9)]
    batch, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        batch[row, 9 - prompt.size(1) :], mask[row, 9 - prompt.size(1) :] = prompt, True
    together = model.generate(batch, 7, temperature=0, pad_mask=mask)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row, 9:], model.generate(prompt, 7, temperature=0)[0, prompt.size(1) :])


def test_generate_leaves_the_model_as_it_was():
    model = tiny(dropout=0.5).train()
    one = model.generate(tokens(1, 4), 8, temperature=0)
    assert model.training and torch.equal(one, model.generate(tokens(1, 4), 8, temperature=0))


def test_draws_follow_the_filtered_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])
    probs = F.softmax(logits / 0.7, -1)[0]
    cases = {
        "all": ({}, probs),
        "top_k": ({"top_k": 3}, probs * torch.tensor([1, 1, 1, 0, 0, 0])),
        # 0.72 + 0.17 < 0.9 <= 0.72 + 0.17 + 0.08: three tokens
        "top_p": ({"top_p": 0.9}, probs * torch.tensor([1, 1, 1, 0, 0, 0])),
        "both": ({"top_k": 5, "top_p": 0.5}, probs * torch.tensor([1, 0, 0, 0, 0, 0])),
        "min_p": ({"min_p": 0.1}, probs * torch.tensor([1, 1, 1, 0, 0, 0])),
    }
    assert probs[:2].sum() < 0.9 < probs[:3].sum() and probs[0] > 0.5
    for name, (how, expected) in cases.items():
        n, expected = 20_000, expected / expected.sum()
        drawn = draw(logits.expand(n, -1), 0.7, generator=torch.Generator().manual_seed(0), **how)
        counts = torch.bincount(drawn, minlength=6).double()
        assert (counts[expected == 0] == 0).all(), name
        seen = expected > 0
        chi2 = ((counts - n * expected).square() / (n * expected))[seen].sum()
        assert chi2 < 25, f"{name}: chi-square {chi2:.1f} with {int(seen.sum()) - 1} degrees of freedom"


def test_top_k_1_is_greedy():
    model = tiny()
    greedy = model.generate(tokens(2, 5), 20, temperature=0)
    assert torch.equal(model.generate(tokens(2, 5), 20, temperature=1.3, top_k=1), greedy)
    assert torch.equal(model.generate(tokens(2, 5), 20, top_p=1e-9), greedy)


def test_a_seed_repeats_the_text():
    model = tiny()
    one, two, three = (
        model.generate(tokens(1, 3), 30, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, three)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_learning_rate_at_its_corners(schedule):
    def lr(it):
        return lr_factor(it, schedule, warmup_iters=10, decay_iters=110, floor=0.1, decay_fraction=0.5)

    assert lr(0) == 1 / 11 and lr(9) == 10 / 11 and lr(10) == 1.0
    middle = {"cosine": 0.55, "linear": 0.55, "wsd": 1 - 0.9 * 5 / 55}[schedule]
    assert lr(60) == pytest.approx(middle)
    assert lr(110) == 0.1 == lr(1000) and lr(109) == pytest.approx(0.1, abs=0.03) and lr(109) > 0.1
    assert all(lr(it) >= lr(it + 1) for it in range(10, 120))
    assert lr_factor(500, "constant", 10, 110, 0.1) == 1.0


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("ragged", [False, True])
def test_accumulation_equals_one_large_batch(ragged):
    x, y = tokens(16, 16), tokens(16, 16, seed=1)
    if ragged:  # windows with very different numbers of tokens that count
        for row in range(16):
            y[row, :row] = -1
    found = {}
    for batch_size in (16, 8, 4, 1):
        model = tiny()
        found[batch_size] = train.accumulate(train.Objective(model), x, y, batch_size), gradients(model)
    loss, grad = found[16]
    assert loss.item() == pytest.approx(tiny()(x, y)[1].item(), rel=1e-6)
    for batch_size in (8, 4, 1):
        assert found[batch_size][0].item() == pytest.approx(loss.item(), rel=1e-6)
        assert difference(found[batch_size][1], grad) < 1e-6


@columns
def test_the_chunked_loss_equals_the_plain_one(column, monkeypatch):
    monkeypatch.setattr(train, "IN_CACHE", 61 * 100)
    x, y = tokens(30, 16), tokens(30, 16, seed=1)  # 480 tokens: four chunks of 100 and a part
    y[3, 5:] = -1
    model, plain = tiny(column), tiny(column)
    loss = train.Objective(model)(x, y)[0] * 0.5
    loss.backward()
    reference = plain(x, y)[1] * (y != -1).sum() * 0.5
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    assert difference(gradients(model), gradients(plain)) < 1e-6
    with torch.no_grad():
        assert train.Objective(model)(x, y)[0].item() * 0.5 == pytest.approx(loss.item(), rel=1e-6)


def test_each_window_comes_once_an_epoch():
    data = np.arange(16 * 50 + 9)
    windows = train.Windows(data, 16, seed=3)
    first = windows.locate(0, windows.n)
    second = windows.locate(windows.n, windows.n)
    for starts in (first, second):
        assert len(set(starts.tolist())) == windows.n >= 49 and len(set((starts % 16).tolist())) == 1
        assert starts.min() >= 0 and starts.max() + 17 <= len(data)
    assert not np.array_equal(first, second) and not np.array_equal(first, np.sort(first))
    # the order is the same however it is asked for, across the end of an epoch too
    again = train.Windows(data, 16, seed=3)
    pieces = np.concatenate([again.locate(i, 7) for i in range(0, 2 * windows.n, 7)])[: 2 * windows.n]
    assert np.array_equal(pieces, np.concatenate([first, second]))
    assert not np.array_equal(train.Windows(data, 16, seed=4).locate(0, windows.n), first)
    x, y = windows.get(0, 3)
    assert x[2].tolist() == list(range(first[2], first[2] + 16)) and y[2].tolist() == [
        i + 1 for i in x[2].tolist()
    ]


@pytest.mark.parametrize("length", [17, 18, 33, 48])
def test_windows_of_the_smallest_data(length):
    windows = train.Windows(np.arange(length), 16, seed=0)
    for epoch in range(20):
        assert windows.get(epoch * windows.n, windows.n)[1].max() < length


@pytest.mark.parametrize("eval_iters", [0, 13])
def test_validation_is_one_number_for_any_batch_size(eval_iters):
    model, data = tiny(), tokens(16 * 40 + 5).numpy().astype(np.uint16)
    lengths = np.arange(61) % 4  # bytes of each token
    found = [
        train.evaluate(train.Objective(model), data, 16, eval_iters, batch_size, lengths, "cpu")
        for batch_size in (1, 7, 64)
    ]
    assert all(one == pytest.approx(found[0], rel=1e-6) for one in found)
    starts = np.arange(40) * 16 if eval_iters == 0 else (np.linspace(0, 39, 13).astype(int) * 16)
    x, y = train.gather(data, starts, 16)
    loss = model(x, y)[1].item()
    assert found[0]["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert found[0]["val_bpb"] == pytest.approx(loss * y.numel() / math.log(2) / lengths[y].sum(), rel=1e-5)
    # masks go with the windows
    hide = partial(train.masked_tokens, rate=0.3, mask=60, vocab_size=60)
    masked = [train.evaluate(train.Objective(tiny(causal=False), 5), data, 16, eval_iters, batch_size,
                             lengths, "cpu", hide=hide) for batch_size in (1, 7, 64)]
    assert all(one == pytest.approx(masked[0], rel=1e-6) for one in masked)
    x, y = hide(x, starts // 16, 0)
    assert masked[0]["val_loss"] == pytest.approx(tiny(causal=False)(x, y)[1].item(), rel=1e-5)


def test_orthogonalise_brings_singular_values_near_1():
    for shape in ((3, 24, 24), (2, 64, 16), (2, 16, 64)):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
        S = torch.linalg.svdvals(orthogonalise(G))
        assert S.max() < 1.3 and S.median() > 0.6
        assert (
            shape[1] == shape[2] or S.min() > 0.5
        )  # a square random matrix has directions of almost no length
        # a matrix's result does not depend on its stack
        torch.testing.assert_close(
            orthogonalise(G)[1:], orthogonalise(G[1:]), atol=1e-5, rtol=1e-5
        )
    U, V = torch.linalg.qr(torch.randn(16, 16))[0], torch.linalg.qr(torch.randn(16, 16))[0]
    kept = U.T @ orthogonalise((U @ torch.diag(torch.linspace(0.5, 1, 16)) @ V)[None])[0] @ V.T
    assert (
        kept - torch.diag(kept.diagonal())
    ).abs().max() < 1e-4  # the directions stay, their lengths even out
    assert 0.6 < kept.diagonal().min() and kept.diagonal().max() < 1.3


def test_muon_takes_the_blocks_matrices_and_only_matrices_decay():
    model = tiny("gpt2")
    adamw, muon = make_optimizers(model, "muon", 1e-3, 0.02, 0.1, (0.9, 0.95))
    names = {p: name for name, p in model.named_parameters()}
    held = {names[p] for group in muon.param_groups for p in group["params"]}
    assert held == {
        name
        for name in names.values()
        if name.startswith("blocks.") and name.endswith("weight") and "norm" not in name
    }
    for group in adamw.param_groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim == 2 else 0)
    assert sum(len(g["params"]) for one in (adamw, muon) for g in one.param_groups) == len(names)
    adamw, _ = make_optimizers(model, "muon", 1e-3, 0.02, 0.1, (0.9, 0.95), embd_lr=0.3)
    own = [names[p] for group in adamw.param_groups if group["lr"] == 0.3 for p in group["params"]]
    assert own == ["wte.weight"]
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(names) - len(held)


@pytest.mark.parametrize("column", ["gpt2", "modern", "vanilla"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_batch_is_learnt_by_heart(column, optimizer):
    torch.manual_seed(0)
    model = Transformer(Config(**{**TINY, **COLUMNS[column]}))
    x, y = tokens(4, 16), tokens(4, 16, seed=1)
    optimizers = make_optimizers(model, optimizer, 1e-2, 0.02, 0.0, (0.9, 0.95))
    for _ in range(120):
        loss = train.accumulate(train.Objective(model), x, y, 4)
        for one in optimizers:
            one.step()
            one.zero_grad()
    assert loss < 0.1


STATE = ("model", "optimizer", "rng", "iter_num", "best_val_loss",
         "model_args")  # what a run is, apart from its times


def test_a_run_does_max_iters_updates_and_leaves_what_it_promised(home):
    folder = home / "out/whole"
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps, evaluations = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    assert [r["iter"] for r in steps] == list(range(1, 9)) and [r["iter"] for r in evaluations] == [4, 8]
    assert steps[-1]["tokens"] == 8 * 2 * 2 * 32 and steps[0]["lr"] == pytest.approx(1e-2 / 3)
    assert set(steps[0]) == {"iter", "tokens", "loss", "lr", "grad_norm", "dt", "elapsed", "tokens_per_s",
                             "mfu"}
    assert set(evaluations[0]) == {"iter", "elapsed", "train_loss", "val_loss", "val_bpb"}
    assert evaluations[0]["train_loss"] == pytest.approx(np.mean([r["loss"] for r in steps[:4]]), rel=1e-5)
    assert evaluations[1]["val_loss"] < 5.7
    assert json.loads((folder / "settings.json").read_text())["n_layer"] == 2
    state = checkpoint(home, "whole")
    assert set(state) == {"version", "model", "model_args", "optimizer", "scaler", "rng", "data", "iter_num",
                          "best_val_loss", "settings", "tokenizer"}
    assert state["iter_num"] == 8 and state["data"]["windows"] == 8 * 4
    assert checkpoint(home, "whole", "ckpt.prev.pt")["iter_num"] == 4
    assert set(state["optimizer"]) == set(state["model"]) - {
        "head.weight"
    }  # by name; a tied head is the embedding
    assert not any(key.startswith(("module.", "_orig_mod.")) for key in state["model"])
    printed = (home / "printed.txt").read_text(encoding="utf-8")
    assert "left" in printed and "bits per byte" in printed and "A sample" in printed
    assert not list(folder.glob("*.tmp"))


def test_pruning_grows_and_a_resumed_run_keeps_it():
    model, twin = tiny("gpt2"), tiny("gpt2")
    pruning, shares = Pruning(model, 0.5, 300), []
    for step in range(1, 301):
        with torch.no_grad():
            for a, b in zip(model.parameters(), twin.parameters()):
                a.add_(0.003), b.add_(0.003)  # an update, which moves the zeros too
        pruning.after(step)
        if step in (181, 250):  # between two looks at the weights, and after the last
            twin.load_state_dict(model.state_dict())
            resumed = Pruning(twin, 0.5, 300)
        elif step > 181:
            resumed.after(step)
            assert all(map(torch.equal, model.parameters(), twin.parameters()))
        weight = model.blocks[0].mlp.up.weight
        shares.append((weight == 0).float().mean().item())
    assert shares[58] == 0 and 0.3 < shares[120] < shares[180] < 0.5 and shares == sorted(shares)
    for name, p in model.named_parameters():
        pruned = p.ndim == 2 and name.startswith("blocks.")
        assert (p == 0).float().mean().item() == pytest.approx(0.5 if pruned else 0.0, abs=1e-3)


def test_resuming_equals_never_stopping(home):
    cut_short = script("train.py", *TOY, "--out_dir=out/cut", "--max_iters=5", "--lr_decay_iters=8", cwd=home)
    assert cut_short.returncode == 0, cut_short.stderr
    resumed = script("train.py", *TOY, "--out_dir=out/cut", "--init_from=resume", cwd=home)
    assert resumed.returncode == 0, resumed.stderr
    one, other = checkpoint(home, "whole"), checkpoint(home, "cut")
    # one evaluation more was made on the way, at step 5: what it found may be the best
    assert all(same(one[key], other[key]) for key in STATE if key != "best_val_loss")
    rows = [json.loads(line) for line in (home / "out/cut/log.jsonl").read_text().splitlines()]
    assert [r["iter"] for r in rows if "loss" in r] == list(range(1, 9))
    assert rows[-1]["elapsed"] > max(r["elapsed"] for r in rows if r["iter"] <= 5)


def test_profile_accounts_for_the_whole_step(home):
    done = script("train.py", *TOY, "--out_dir=out/whole", "--profile", cwd=home)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(\w+) +[\d.]+ ms +([\d.]+)%$", done.stdout, re.MULTILINE))
    assert list(rows) == ["data", "forward", "backward", "update", "step"]
    assert sum(map(float, rows.values())) == pytest.approx(200, abs=0.5)
    assert checkpoint(home, "whole")["iter_num"] == 8  # nothing was written


def test_a_damaged_checkpoint_is_found_and_the_one_before_used(home, capsys):
    folder = home / "out/damaged"
    shutil.copytree(home / "out/whole", folder)
    data = (folder / "ckpt.pt").read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for damaged in (b"", *(data[:len(data) * percent // 100] for percent in (1, 50, 99)), bytes(flipped)):
        (folder / "ckpt.pt").write_bytes(damaged)
        assert load_checkpoint(folder, ("ckpt.pt", "ckpt.prev.pt"))["iter_num"] == 4
        assert "ckpt.pt is damaged" in capsys.readouterr().err
    resumed = script("train.py", *TOY, "--out_dir=out/damaged", "--init_from=resume", cwd=home)
    assert resumed.returncode == 0 and "ckpt.pt is damaged" in resumed.stderr
    one, other = checkpoint(home, "whole"), checkpoint(home, "damaged")
    assert all(same(one[key], other[key]) for key in STATE)
    # the damaged one has not taken the good one's place
    assert checkpoint(home, "damaged", "ckpt.prev.pt")["iter_num"] == 4
    (folder / "ckpt.prev.pt").unlink()
    (folder / "ckpt.pt").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(folder, ("ckpt.pt", "ckpt.prev.pt"))


def test_a_checkpoint_runs_no_code(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": Hostile()}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()
    for path in ROOT.glob("*.py"):  # nothing is ever unpickled, nor may become so
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True" or path.name == "test_model.py", path
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "pickle" not in ast.unparse(node), path


def test_what_a_run_refuses(home):
    one_line(script("train.py", *TOY, "--out_dir=out/whole", cwd=home), 2, "out/whole", "resume", "overwrite")
    one_line(script("train.py", *TOY, "--out_dir=out/whole", "--init_from=resume", "--n_layer=3", cwd=home),
             2, "n_layer=3", "n_layer=2")
    one_line(script("train.py", *TOY, "--out_dir=out/n", "--init_from=resume", cwd=home), 1, "no checkpoint")
    one_line(script("train.py", *TOY, "--out_dir=out/n", "--block_size=5000", cwd=home), 2, "5000", "toy")
    one_line(
        script("train.py", *TOY, "--out_dir=out/n", "--dataset=missing", cwd=home), 1, "missing", "prepare.py"
    )
    one_line(script("train.py", *TOY, "--out_dir=out/n", "--vocab_size=400", cwd=home), 2, "400", "300")
    one_line(script("train.py", *TOY, "--out_dir=out/n", "--learning_rate=1e30", cwd=home), 1, "loss",
             "learning_rate")
    assert not (home / "out/n/best.pt").exists()


def test_weights_of_another_run_start_a_new_one(home):
    done = script("train.py", *TOY, "--out_dir=out/tuned", "--init_from=out/whole", "--max_iters=1",
                  "--learning_rate=1e-9", "--muon_lr=1e-9", cwd=home)
    assert done.returncode == 0, done.stderr
    best = checkpoint(home, "whole", "best.pt")["best_val_loss"]
    assert checkpoint(home, "tuned")["best_val_loss"] == pytest.approx(best, abs=1e-3)
    assert checkpoint(home, "tuned")["iter_num"] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_sigterm_saves_and_exits_with_143(home):
    command = [sys.executable, str(ROOT / "train.py"), *TOY, "--out_dir=out/stopped", "--max_iters=100000",
               "--eval_interval=100000"]
    process = subprocess.Popen(
        command, cwd=home, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    for line in process.stdout:
        if line.startswith("iter"):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "init_from=resume" in rest
    state = checkpoint(home, "stopped")
    done = state["iter_num"]
    assert done >= 1
    # and it goes on from there to where an uninterrupted run would be
    for name, more in (("stopped", ["--init_from=resume"]), ("straight", [])):
        run = script("train.py", *TOY, f"--out_dir=out/{name}", f"--max_iters={done + 3}",
                     "--lr_decay_iters=100000", "--eval_interval=100000", *more, cwd=home)
        assert run.returncode == 0, run.stderr
    assert all(same(checkpoint(home, "stopped")[key], checkpoint(home, "straight")[key]) for key in STATE)


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun and gloo on Windows: not promised")
def test_two_processes_equal_one(home):
    def rows(name):
        return [json.loads(line) for line in (home / f"out/{name}/log.jsonl").read_text().splitlines()]

    plain = [arg for arg in TOY if not arg.startswith("--dropout")]
    alone = script("train.py", *plain, "--out_dir=out/alone", cwd=home)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    both = script(*torchrun, str(ROOT / "train.py"), *plain, "--out_dir=out/both", cwd=home)
    assert alone.returncode == 0 and both.returncode == 0, both.stderr
    for a, b in zip(rows("alone"), rows("both"), strict=True):
        for key in {"loss", "val_loss", "val_bpb", "train_loss", "grad_norm"} & set(a):
            assert a[key] == pytest.approx(b[key], rel=2e-4)
    first = [row["loss"] for row in (rows("alone")[0], rows("both")[0])]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    one, two = (
        torch.cat([v.flatten() for v in checkpoint(home, name)["model"].values()])
        for name in ("alone", "both")
    )
    assert difference(two, one) < 1e-4
    refused = script(*torchrun, str(ROOT / "train.py"), *plain, "--out_dir=out/odd",
                     "--gradient_accumulation_steps=3", cwd=home)
    assert refused.returncode != 0 and "gradient_accumulation_steps=3" in refused.stderr


# A run with something done to it: what follows `code` is what `python train.py` does.
DRIVER = """
import io, json, os, signal, sys
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
import train
from config import launch
from model import Config, Transformer

RANK = int(os.environ.get("RANK", 0))

def before(name, do, where=train):
    '''Call do(number of the call, *its arguments) before each call of a function of train.py.'''
    was, calls = getattr(where, name), [0]
    def wrapped(*args, **more):
        calls[0] += 1
        do(calls[0], *args)
        return was(*args, **more)
    setattr(where, name, wrapped)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
"""


AS_A_SCRIPT = '\nlaunch(train.main, vars(train), Config)\n'


posix = pytest.mark.skipif(sys.platform == "win32", reason="signals, limits and gloo are POSIX's")


def hacked(code, *args, cwd, world=1, timeout=200) -> list:
    """`world` processes that run `code` between importing train and its main; finished, one for each rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if world > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    ranks = [subprocess.Popen([sys.executable, "-c", DRIVER + code, *args], cwd=cwd, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, encoding="utf-8",
                              env={**env, **({"RANK": str(rank), "LOCAL_RANK": "0"} if world > 1 else {})})
             for rank in range(world)]
    found = []
    for process in ranks:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            process.kill()
        found.append(subprocess.CompletedProcess(args, process.returncode, stdout, stderr))
        if process.returncode == -signal.SIGKILL:  # the others would wait for it
            for other in ranks:
                other.kill()
    return found


def log_of(home, name):
    return [json.loads(line) for line in (home / "out" / name / "log.jsonl").read_text().splitlines()]


KILLS = {  # where a run is killed; the one that goes on from there is killed at the next
    "in a step": "before('update', lambda n, *_: n == 6 and die())",
    "in accumulation": "before('forward', lambda n, *_: n == 12 and die(), train.Objective)",
    "in an evaluation": "before('forward', lambda n, me, *_: not me.training and die(), train.Objective)",
    "while saving": '''
def half(n, checkpoint, f):
    if f.name.endswith("ckpt.pt.tmp") and checkpoint["iter_num"] == 16:
        buffer = io.BytesIO()
        saved(checkpoint, buffer)
        f.write(buffer.getvalue()[:len(buffer.getvalue()) // 2])
        f.flush()
        die()
saved = torch.save
before("save", half, torch)''',
    "between the renames": '''
def renamed(n, source, target):
    if str(target).endswith("/ckpt.pt") and n > 5:
        die()
before("replace", renamed, os)''',
    "in the second epoch": "before('update', lambda n, *_: n == 9 and die())"}


@slow
@posix
@pytest.mark.parametrize("world", [1, 2])
def test_killed_anywhere_a_run_ends_as_if_never_killed(home, world):
    long = [*TOY, "--batch_size=4", "--max_iters=28", "--sample_tokens=5"]
    whole, cut = f"out/never{world}", f"out/killed{world}"
    for rank in hacked(AS_A_SCRIPT, *long, f"--out_dir={whole}", cwd=home, world=world):
        assert rank.returncode == 0, rank.stderr
    points = [where for where in KILLS if world == 1 or where != "between the renames"]
    for i, (where, code) in enumerate((where, KILLS[where]) for where in points):
        more = ["--init_from=resume"] if i else []
        ranks = hacked(code + AS_A_SCRIPT, *long, f"--out_dir={cut}", *more, cwd=home, world=world)
        assert ranks[0].returncode == -signal.SIGKILL, (where, ranks[0].stderr)
    for rank in hacked(AS_A_SCRIPT, *long, f"--out_dir={cut}", "--init_from=resume", cwd=home, world=world):
        assert rank.returncode == 0, rank.stderr
    for file, keys in (("ckpt.pt", STATE), ("best.pt", ("model", "iter_num", "best_val_loss"))):
        one, other = checkpoint(home, f"never{world}", file), checkpoint(home, f"killed{world}", file)
        assert all(same(one[key], other[key]) for key in keys)
        assert one["data"]["windows"] == other["data"]["windows"]
    assert one["data"]["windows"] > 0 and not list((home / cut).glob("*.tmp"))
    toy = home / "data/toy"
    windows = train.Windows(prepare.read_split(toy, "train", prepare.read_meta(toy)), 32, 0)
    assert windows.n < 20 * 8  # the last was in the second epoch
    times = ("elapsed", "dt", "tokens_per_s")
    rows = [[{key: value for key, value in row.items() if key not in times} for row in log_of(home, name)]
            for name in (f"never{world}", f"killed{world}")]
    assert rows[0] == rows[1]  # each line once, with the same numbers


TOGETHER = """
torch.manual_seed(0)
world = int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
model = Transformer(Config(block_size=16, vocab_size=61, n_layer=3, n_head=4, n_embd=32))
x, y = torch.randint(61, (24, 16)), torch.randint(61, (24, 16))
for row in range(24):
    y[row, :row % 16] = -1  # very different numbers of tokens that count
objective = train.Objective(model)
if world > 1:
    objective = torch.nn.parallel.DistributedDataParallel(objective)
found = {}
for micro in (1, 2, 6):
    share = 24 // world
    mine = slice(RANK * share, (RANK + 1) * share)
    loss = train.accumulate(objective, x[mine], y[mine], micro)
    found[micro] = {"loss": loss, "grad": torch.cat([p.grad.flatten() for p in model.parameters()])}
    if micro < 6:
        model.zero_grad()
lengths, data = np.arange(61) % 4, torch.randint(61, (16 * 40 + 5,)).numpy()
found["val"] = [train.evaluate(objective, data, 16, 37, size, lengths, "cpu") for size in (1, 7, 64)]
optimizers = train.make_optimizers(model, "muon", 1e-2, 0.02, 0.1, (0.9, 0.95))
train.update(model, optimizers, loss, 1.0)
found["weights"] = torch.cat([p.detach().flatten() for p in model.parameters()])
torch.save(found, f"together{world}.{RANK}")
"""


@posix
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=slow), pytest.param(4, marks=slow)])
def test_any_number_of_processes_computes_the_same(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(DRIVER + TOGETHER, {})
    alone = torch.load("together1.0", weights_only=True)
    for rank in hacked(TOGETHER, cwd=tmp_path, world=world):
        assert rank.returncode == 0, rank.stderr
    every = [torch.load(f"together{world}.{rank}", weights_only=True) for rank in range(world)]
    for found in (alone, *every):
        for micro in (1, 2, 6):
            assert found[micro]["loss"].item() == pytest.approx(alone[6]["loss"].item(), rel=1e-6)
            assert difference(found[micro]["grad"], alone[6]["grad"]) < 1e-6
        for val in found["val"]:
            assert val == pytest.approx(alone["val"][0], rel=1e-6)
        assert difference(found["weights"], alone["weights"]) < 1e-5
    assert all(same(one["weights"], every[0]["weights"]) for one in every)
    # a mean of means would be far off: what is asserted above is not true of any weighting
    model, rows = tiny("gpt2"), tokens(24, 16)
    y = tokens(24, 16, seed=1)
    for row in range(24):
        y[row, :row % 16] = -1
    means = torch.stack([model(rows[i:i + 1], y[i:i + 1])[1] for i in range(24)])
    assert abs(means.mean() / model(rows, y)[1] - 1) > 1e-3


@posix
def test_a_signal_to_one_process_stops_all(home):
    code = "before('accumulate', lambda n, *_: n == 3 and RANK == 1 and os.kill(os.getpid(), signal.SIGTERM))"
    ranks = hacked(code + AS_A_SCRIPT, *TOY, "--out_dir=out/one", "--max_iters=100000",
                   "--eval_interval=100000", cwd=home, world=2)
    assert [rank.returncode for rank in ranks] == [143, 143], ranks[0].stderr
    assert "stopped after 3 steps" in ranks[0].stdout and checkpoint(home, "one")["iter_num"] == 3
    # a second signal, a while after the first, does not wait for the step
    code = '''
def twice(n, *_):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # the same one once more, passed on by torchrun
    train.time.sleep(1.1)
    os.kill(os.getpid(), signal.SIGINT)
    raise SystemError("still here")
before("update", twice)'''
    done, = hacked(code + AS_A_SCRIPT, *TOY, "--out_dir=out/now", cwd=home)
    assert done.returncode == 130 and not done.stderr and not (home / "out/now/ckpt.pt").exists()


@posix
def test_a_gradient_that_is_not_finite_changes_nothing(home):
    code = '''
was = train.update
def update(model, *args):
    norm = was(model, *args)
    weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    if len(weights) == 7:
        torch.save(weights[6], f"seventh.{RANK}")
    return norm
weights = []
train.update = update
forward = train.Objective.forward
def poisoned(self, idx, targets):
    sums = forward(self, idx, targets)
    return sums * float("nan") if self.training and RANK == 1 and len(weights) == 6 else sums
train.Objective.forward = poisoned
'''
    ranks = hacked(code + AS_A_SCRIPT, *TOY, "--out_dir=out/nan", "--eval_interval=6", "--max_bad_steps=1",
                   "--sample_tokens=3", cwd=home, world=2)
    assert [rank.returncode for rank in ranks] == [1, 1], ranks[0].stderr
    one_line(ranks[0], 1, "iter 7", "nan", "lr", "norm", "learning_rate")
    sixth = checkpoint(home, "nan")
    assert sixth["iter_num"] == 6
    for rank in range(2):
        weights = torch.load(home / f"seventh.{rank}", weights_only=True)
        assert all(same(weights[name], sixth["model"][name]) for name in weights)
    # where a few are allowed the run goes on
    code = code.replace("RANK == 1 and ", "")
    done, = hacked(code + AS_A_SCRIPT, *TOY, "--out_dir=out/nan", "--init_from=resume", "--max_iters=20",
                   "--max_bad_steps=2", cwd=home)
    assert done.returncode == 0 and "iter 13: loss nan" in done.stdout, done.stderr
    assert math.isfinite(log_of(home, "nan")[-1]["train_loss"])


@posix
def test_float16_steps_that_overflow_do_not_count(home):
    code = '''
from functools import partial
train.pick_dtype = lambda *_: torch.float16
torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=2.0**26)
'''
    done, = hacked(code + AS_A_SCRIPT, *TOY, "--out_dir=out/half", cwd=home)
    assert done.returncode == 0, done.stderr
    steps = [row for row in log_of(home, "half") if "loss" in row]
    skipped = done.stdout.count("not finite")
    assert skipped > 2 and [row["iter"] for row in steps] == list(range(1, 9))
    assert steps[-1]["tokens"] == (8 + skipped) * 4 * 32  # their tokens are gone, the schedule is not
    assert [row["lr"] for row in steps] == [row["lr"] for row in log_of(home, "whole") if "loss" in row]


@posix
def test_a_full_disk_harms_nothing(home):
    folder = home / "out/full"
    shutil.copytree(home / "out/whole", folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    done, = hacked(code + AS_A_SCRIPT, *TOY, "--out_dir=out/full", "--init_from=resume", "--max_iters=12",
                   cwd=home)
    one_line(done, 1, "best.pt", "cannot be written", "make room")
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.pt*")}
    assert len(next(iter(before.values()))) > 60_000
    code = code.replace("60_000", "1_000")
    done, = hacked(code + AS_A_SCRIPT, *TOY, "--out_dir=out/full", "--init_from=resume", "--max_iters=12",
                   cwd=home)
    one_line(done, 1, "cannot be written")
    assert not list(folder.glob("*.tmp"))


@slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_flat(home):
    code = '''
seen = []
def look(n, *_):
    if n in (500, 2000):
        seen.append(int(open("/proc/self/statm").read().split()[1]) * 4096)
        print("resident", *seen, flush=True)
before("update", look)
'''
    done, = hacked(code + AS_A_SCRIPT, *TOY, "--out_dir=out/flat", "--n_layer=1", "--max_iters=2001",
                   "--gradient_accumulation_steps=1", "--eval_interval=100", "--sample_tokens=4", cwd=home)
    assert done.returncode == 0, done.stderr
    early, late = map(int, re.findall(r"resident (\d+) (\d+)", done.stdout)[0])
    assert late < early + 4e6


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is kept")
def test_memory_that_is_kept_can_be_given_back():
    code = """
import torch, train
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
train.keep_memory()
blocks = [torch.ones(250_000) for _ in range(400)]  # 400 MB
left = blocks[::40]  # the free memory is in pieces
del blocks
for share in (1.0, 0.0):
    before = resident()
    train.give_back_memory(share)
    print((before - resident()) // 10**6)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, given = map(int, done.stdout.split())
    assert kept < 10 and given > 300  # MB


def test_masks_are_a_function_of_the_window_alone():
    idx = tokens(6, 40)
    how = dict(seed=3, rate=0.3, mask=60, vocab_size=60)
    x, y = train.masked_tokens(idx, range(10, 16), **how)
    assert ((y != -1).sum(1) == 12).all()  # the same number in each
    assert (y[y != -1] == idx[y != -1]).all() and (x[y == -1] == idx[y == -1]).all()
    for i in range(6):  # alone or in a batch
        one = train.masked_tokens(idx[i:i + 1], [10 + i], **how)
        assert torch.equal(one[0][0], x[i]) and torch.equal(one[1][0], y[i])
    assert not torch.equal(train.masked_tokens(idx, range(6), **how)[1], y)
    # of very many: 80% masked, 10% another token, 10% as they were
    idx = tokens(50, 1000, vocab_size=60)
    x, y = train.masked_tokens(idx, range(50), **how)
    chosen = y != -1
    assert (x[chosen] == 60).float().mean() == pytest.approx(0.8)
    assert (x[chosen] == y[chosen]).float().mean() == pytest.approx(0.1, abs=0.01)
    data = np.arange(16 * 50 + 9) % 60
    hide = partial(train.masked_tokens, rate=0.3, mask=60, vocab_size=60)
    windows = train.Windows(data, 16, seed=3, hide=hide)
    x, y = windows.get(5, 3)
    assert torch.equal(windows.get(7, 1)[0][0], x[2])
    assert torch.equal(torch.where(y == -1, x, y), train.gather(data, windows.locate(5, 3), 16)[0])


def test_the_head_sees_masked_positions_only():
    idx = tokens(5, 16)
    x, y = train.masked_tokens(idx, range(5), 0, 0.3, 60, 60)
    y[2, :12] = -1  # ragged, too
    model, plain, seen = tiny(causal=False), tiny(causal=False), []
    model.head.register_forward_pre_hook(lambda head, args: seen.append(args[0].numel() // 32))
    objective = train.Objective(model, train.hidden_in(16, 0.3))
    loss = objective(x, y)[0]
    loss.backward()
    reference = plain(x, y)[1] * (y != -1).sum()
    reference.backward()
    assert sum(seen) == 5 * 5 and loss.item() == pytest.approx(reference.item(), rel=1e-6)
    assert difference(gradients(model), gradients(plain)) < 1e-6
    right = (plain(x)[0].argmax(-1) == y).sum()
    assert objective.eval()(x, y).tolist() == pytest.approx([reference.item(), right.item()])


def test_smoothing_and_teacher_are_what_they_say():
    x, y = tokens(4, 16), tokens(4, 16, seed=1)
    y[1, 3:] = -1
    model, teacher = tiny(), tiny("gpt2", seed=1).requires_grad_(False)
    logits, flat = model(x)[0].flatten(0, 1), y.flatten()
    objective = train.Objective(model, label_smoothing=0.1)
    smooth = F.cross_entropy(logits, flat, ignore_index=-1, reduction="sum", label_smoothing=0.1)
    assert objective(x, y)[0].item() == pytest.approx(smooth.item(), rel=1e-5)
    hard = F.cross_entropy(logits, flat, ignore_index=-1, reduction="sum")
    assert objective.eval()(x, y)[0].item() == pytest.approx(hard.item(), rel=1e-5)
    objective = train.Objective(model, teacher=teacher, teacher_share=0.3, temperature=3.0)
    p, q = F.softmax(teacher(x)[0].flatten(0, 1) / 3, -1), F.softmax(logits / 3, -1)
    soft = 9 * (p * (p / q).log()).sum(-1)[flat != -1].sum()
    loss = objective(x, y)[0]
    assert loss.item() == pytest.approx((0.7 * hard + 0.3 * soft).item(), rel=1e-5)
    loss.backward()
    expected = torch.autograd.grad(0.7 * hard + 0.3 * soft, list(model.parameters()))
    assert difference(gradients(model), torch.cat([g.flatten() for g in expected])) < 1e-5
    assert all(p.grad is None for p in teacher.parameters())
    assert objective.eval()(x, y)[0].item() == pytest.approx(hard.item(), rel=1e-5)


def test_recomputed_activations_give_the_same_gradient():
    x, y = tokens(4, 16), tokens(4, 16, seed=1)
    found = []
    for remat in (False, True):
        model = tiny(dropout=0.2).train()
        if remat:
            train.recompute_blocks(model)
        torch.manual_seed(5)
        train.accumulate(train.Objective(model), x, y, 2)
        found.append((gradients(model), list(model.state_dict())))
        assert model.generate(x[:1], 4, temperature=0).shape == (1, 20)
    assert same(*(one[0] for one in found)) and found[0][1] == found[1][1]


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_momentum_optimizers_are_what_they_say(optimizer):
    model, plain = tiny("llama"), tiny("llama")
    optimizers = make_optimizers(model, optimizer, 0.1, 0.02, 0.01, (0.9, 0.95), momentum=0.8)
    params, held = list(plain.parameters()), [0.0] * 100
    for step in range(3):
        x, y = tokens(4, 16, seed=step), tokens(4, 16, seed=step + 1)
        for one in (model, plain):
            one.zero_grad()
            one(x, y)[1].backward()
        optimizers[0].step()
        with torch.no_grad():
            for i, p in enumerate(params):
                decay = 0.01 if p.ndim == 2 else 0
                if optimizer == "sgd":
                    held[i] = 0.8 * held[i] + 0.1 * p.grad
                    p.copy_(p * (1 - 0.1 * decay) - held[i])
                else:  # equations of You et al. 2017, section 5
                    local = 0.001 * p.norm() / (p.grad.norm() + decay * p.norm())
                    held[i] = 0.8 * held[i] + 0.1 * local * (p.grad + decay * p)
                    p.copy_(p - held[i])
    for p, q in zip(params, model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lars", "sgd"])
def test_a_step_left_out_leaves_no_trace(optimizer):
    model = tiny()
    optimizers = make_optimizers(model, optimizer, 0.01, 0.02, 0.1, (0.9, 0.95))
    x, y = tokens(4, 16), tokens(4, 16, seed=1)
    for step in range(3):
        was = [{name: p.clone() for name, p in model.state_dict().items()},
               {name: {key: value.clone() for key, value in state.items()}
                for name, state in optimizer_state(optimizers, model).items()}]
        loss = train.accumulate(train.Objective(model), x, y, 4)
        if step == 2:
            next(model.parameters()).grad[0, 0] = math.inf
        norm = update(model, optimizers, loss, 1.0)
        assert all(p.grad is None for p in model.parameters())
        now = [model.state_dict(), optimizer_state(optimizers, model)]
        assert norm.isfinite() == (step < 2) and same(was[0], now[0]) == (step == 2)
    assert same(was[1], now[1])


def test_bad_steps_in_a_row_end_the_run(capsys):
    good, bad = torch.tensor(1.0), torch.tensor(math.nan)
    for interval in (1, 3):
        counter = train.BadSteps(2, interval)
        for step, loss in enumerate([good, bad, good, good, bad, good], start=1):
            counter.add(step, 0.1, loss, good)
        assert capsys.readouterr().out.count("not finite") == 2
        counter.add(7, 0.1, good, bad)
        with pytest.raises(UserError, match=r"iter 8: loss nan, lr 1.00e-01, norm 1"):
            for step in (8, 9, 10):
                counter.add(step, 0.1, bad, good)
        capsys.readouterr()


def test_out_of_memory_says_what_to_lower():
    with pytest.raises(UserError, match=r"--batch_size=6 --gradient_accumulation_steps=10 .*--remat"):
        with train.memory_advice(12, 5, remat=False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(UserError, match="block_size"):
        with train.memory_advice(1, 5, remat=True):
            torch.empty(2**60)
    with pytest.raises(RuntimeError, match="other"):
        with train.memory_advice(1, 5, remat=True):
            raise RuntimeError("other")


@pytest.mark.parametrize("given, model_args, words", [
    (dict(lr_decay_iters=50, warmup_iters=100), {}, "lr_decay_iters=50.*warmup_iters=100"),
    (dict(dtype="float16", device="cpu"), {}, "dtype=float16.*float32"),
    (dict(device="meta"), {}, "device=meta.*cpu"),
    (dict(out_dir="toy.txt/run"), dict(block_size=32), "out_dir=toy.txt/run"),
    (dict(patience=0), {}, "patience=0.*at least 1"),
    (dict(label_smoothing=1.0), {}, "label_smoothing=1.0"),
    (dict(grad_clip=math.nan), {}, "grad_clip=nan"),
    ({}, dict(head="none"), "head=none"),
    (dict(teacher="out/whole"), dict(block_size=33), "block_size=33.*32"),
    (dict(teacher="out/whole"), dict(block_size=32, vocab_size=320), "vocab_size=320.*300|300.*320"),
    (dict(init_from="resume", out_dir="out/whole", optimizer="sgd"), {}, "optimizer=sgd.*muon"),
    (dict(init_from="out/whole"), dict(causal=False), "causal=False.*causal=True"),
])
def test_settings_that_cannot_be(home, monkeypatch, given, model_args, words):
    monkeypatch.chdir(home)
    given = {"dataset": "toy", "out_dir": "out/none", "device": "cpu", "compile": False, **given}
    for name, value in given.items():
        monkeypatch.setattr(train, name, value)
    with pytest.raises(SettingError, match=words):
        train.main({"n_layer": 2, "n_head": 2, "n_embd": 32, **model_args})


def test_limits_of_time_and_patience(home):
    done = script("train.py", *TOY, "--out_dir=out/short", "--max_minutes=0.001", cwd=home)
    assert done.returncode == 0 and "init_from=resume" in done.stdout, done.stderr
    assert checkpoint(home, "short")["iter_num"] == 0
    done = script("train.py", *TOY, "--out_dir=out/short", "--init_from=resume", "--learning_rate=0.5",
                  "--muon_lr=0.5", "--max_iters=100", "--eval_interval=3", "--patience=2", cwd=home)
    assert done.returncode == 0 and "no better one in 2 evaluations" in done.stdout, done.stderr
    values = [row["val_loss"] for row in log_of(home, "short") if "val_loss" in row]
    assert len(values) < 20 and min(values) == values[-3] and checkpoint(home, "short")["iter_num"] < 100


def test_a_run_stays_compiled_or_not(home):
    """The first one fails to compile; those that go on do not try again, or it would end with other bits."""
    code = "train.compiled = lambda objective, *_: objective"
    both = [*TOY, "--out_dir=out/uncompiled", "--compile=True"]
    assert hacked(code + AS_A_SCRIPT, *both, "--max_iters=2", cwd=home)[0].returncode == 0
    done, = hacked("train.compiled = die" + AS_A_SCRIPT, *both, "--init_from=resume", cwd=home)
    assert done.returncode == 0 and ", compiled" not in done.stdout, done.stderr


@slow
def test_a_compiled_run_resumes_bit_for_bit(home):
    fast = [*TOY, "--compile=True", "--lr_decay_iters=8", "--n_layer=1"]
    for name, more in (("fast_whole", []), ("fast_cut", ["--max_iters=5"]),
                       ("fast_cut", ["--init_from=resume"])):
        done = script("train.py", *fast, f"--out_dir=out/{name}", *more, cwd=home)
        assert done.returncode == 0 and ", compiled" in done.stdout, done.stderr
    one, other = checkpoint(home, "fast_whole"), checkpoint(home, "fast_cut")
    assert all(same(one[key], other[key]) for key in STATE if key != "best_val_loss")


def test_a_masked_model_is_trained_and_teaches(home):
    args = [*TOY, "--causal=False", "--out_dir=out/masked", "--max_iters=30", "--eval_interval=15",
            "--sample_tokens=10", "--eval_iters=0", "--dropout=0"]
    done = script("train.py", *args, cwd=home)
    assert done.returncode == 0 and "of the masked tokens right" in done.stdout, done.stderr
    rows = [row for row in log_of(home, "masked") if "val_loss" in row]
    assert set(rows[0]) == {"iter", "elapsed", "train_loss", "val_loss", "val_accuracy"}
    assert rows[1]["val_loss"] < rows[0]["val_loss"] and 0 < rows[1]["val_accuracy"] < 1
    assert re.search(r"\[.*\|.*\]", done.stdout, re.DOTALL)  # guesses, and the truth where they are wrong
    student = script("train.py", *args, "--out_dir=out/student", "--teacher=out/masked", "--n_layer=1",
                     "--remat", "--label_smoothing=0.1", cwd=home)
    assert student.returncode == 0, student.stderr
    assert "teacher" not in "".join(checkpoint(home, "student")["model"])


@slow
def test_hugging_face_models_can_be_trained_on(home):
    pytest.importorskip("safetensors"), pytest.importorskip("tokenizers")
    gpt2 = [*TOY, "--pos=learned", "--out_dir=out/gpt2"]
    for args in (["train.py", *gpt2], ["sample.py", "--out_dir=out/gpt2", "--export=theirs"],
                 ["prepare.py", "--source=toy.txt", "--dataset=theirs_toy", "--tokenizer=theirs"],
                 ["train.py", *gpt2, "--out_dir=out/more", "--bias", "--dataset=theirs_toy",
                  "--init_from=theirs", "--teacher=theirs", "--max_iters=1", "--learning_rate=1e-9",
                  "--muon_lr=1e-9",
                  "--eval_iters=0"],
                 ["train.py", *gpt2, "--init_from=resume", "--eval_only", "--eval_iters=0"]):
        done = script(*args, cwd=home)
        assert done.returncode == 0, done.stderr
    told = float(re.search(r"val loss (\S+),", done.stdout)[1])
    assert log_of(home, "more")[-1]["val_loss"] == pytest.approx(told, abs=0.02)
    refused = script("train.py", *TOY, "--out_dir=out/n", "--init_from=theirs", "--pos=learned", cwd=home)
    one_line(refused, 2, "dataset=toy", "tokenizer")


def test_the_loop_is_about_a_screen_and_reads_in_paragraphs():
    lines = (ROOT / "train.py").read_text(encoding="utf-8").splitlines()
    main = next(node for node in ast.parse("\n".join(lines)).body if getattr(node, "name", "") == "main")
    loop = next(node for node in main.body if isinstance(node, ast.While))
    body = "\n".join(lines[loop.lineno:loop.end_lineno])
    assert loop.end_lineno - loop.lineno < 75
    assert all(paragraph.lstrip().startswith("# ") for paragraph in body.split("\n\n"))
