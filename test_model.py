"""
What must hold, on tiny models and a CPU, without network:  python -m pytest

What takes longer runs with SLOW=1; what compares with `transformers` or `tokenizers` is skipped where they
are missing. Speed is measured by tools.bench.
"""

import copy
import math
import pickle
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import prepare
import sample
import train
from config import SettingError, UserError
from lib.optim import optimizer_state
from lib.run import Machine
from model import MLP, POSITIONS, Config, Learned, Sampling, Transformer, block_matrices, draw
from tests.helpers import (TOY, Half, checkpoint, difference, log_of, posix, run_here, same, script,
                           slow, tiny, together, tokens)

TINY = dict(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_embd=32)

MODERN = dict(pos="rope", norm="rms", norm_weight=False, norm_eps=1e-6, norm_embd=True, qk_norm="after",
              act="relu2", tied=False, softcap=15.0, init="zero_out")


class Near(Learned):
    """Each head likes near tokens better, more or less so, and sees none further away than 4."""

    def bias(self, query, key):
        distance = query - key
        slopes = 0.1 * 2.0 ** torch.arange(4, device=query.device).view(4, 1, 1)
        return torch.where(distance > 4, -math.inf, -slopes * distance.abs())


POSITIONS["near"] = Near

COLUMNS = {  # what you add to model.py gets a line here, and a dozen tests
    "gpt2": dict(bias=True),
    "modern": MODERN,
    "grouped": {**MODERN, "n_kv_head": 2},
    "vanilla": dict(pos="sinusoidal", norm_place="post", act="relu", bias=True, tied=False, head_bias=True,
                    init="uniform"),
    "n_gram": {**MODERN, "n_gram": 4, "n_gram_rows": 40},
    "llama": dict(pos="rope", norm="rms", act="swiglu", n_kv_head=2, tied=False),
    "qwen": dict(pos="rope", norm="rms", act="swiglu", n_kv_head=1, head_dim=6, qk_norm="before",
                 qkv_bias=True),
    "window": dict(pos="rope", norm="rms", act="swiglu", window=5),
    "near": dict(pos="near"),
}
columns = pytest.mark.parametrize("column", COLUMNS)


def fixed_shapes():
    """Inside `with`, compile=True gives the shapes that compiled code needs, without the compiler."""
    return torch.compiler.set_stance("force_eager")


def fresh(column, kind=Transformer):
    """As training begins with it, which `tiny` is not."""
    torch.manual_seed(0)
    return kind(Config(**{**TINY, **COLUMNS[column]}))


def batch(rows):
    """Inputs and targets, (rows, 16) each."""
    return tokens(rows, 16), tokens(rows, 16, seed=1)


def greedy(model, prompt, n, **how):
    return model.generate(prompt, n, temperature=0, **how)


# -----------------------------------------------------------------------------
# The model

def test_gpt2_has_its_number_of_parameters_and_flops():
    model = Transformer(Config(vocab_size=50257, bias=True))
    assert model.num_params() == 124_439_808  # as published: 124M
    assert model.head.weight is model.wte.weight
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert model.flops_per_token() == 6 * matrices + 12 * 12 * 768 * 1024


@columns
def test_first_predictions_are_about_uniform(column):
    _, loss = fresh(column)(*batch(8))
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


@columns
@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(column, causal):
    model = tiny(column, causal=causal)
    idx = tokens(1, 9)
    alone = model(idx)[0]
    for left in (0, 3, 7):  # on the right, on both sides, on the left
        padded, mask = tokens(2, 16, seed=5), torch.zeros(2, 16, dtype=torch.bool)
        padded[1, left:left + 9], mask[1, left:left + 9], mask[0] = idx[0], True, True
        logits = model(padded, pad_mask=mask)[0]
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(logits[1, left:left + 9], alone[0], atol=1e-5, rtol=1e-5)


def test_targets_of_minus_one_do_not_count_and_too_many_are_refused():
    model, (idx, targets) = tiny(), batch(2)
    targets[0, 3:], targets[1, :9] = -1, -1
    logits, loss = model(idx, targets)
    kept = targets != -1
    torch.testing.assert_close(loss, F.cross_entropy(logits[kept], targets[kept]))
    assert logits.shape == (2, 16, 61) and model(idx)[1] is None
    assert model(idx, torch.full_like(idx, -1))[1] == 0  # not NaN
    assert model.penalty() == 0
    with pytest.raises(ValueError, match="17 tokens.*block_size=16"):
        model(tokens(1, 17))


@pytest.mark.parametrize("settings, given, words", [
    (Config, {"n_head": 5}, "n_embd=32: must be a multiple of n_head=5"),
    (Config, {"n_kv_head": 3}, "n_kv_head=3: must divide n_head=4"),
    (Config, {"pos": "ropes"}, "pos='ropes': must be one of learned, sinusoidal, rope"),
    (Config, {"qk_norm": "first"}, "qk_norm='first': must be one of None, before, after"),
    (Config, {"dropout": 1.0}, "dropout=1.0: must be float at least 0 and below 1"),
    (Config, {"pos": "rope", "head_dim": 5}, "head_dim=5: must be even for pos='rope'"),
    (Config, {"rope_scaling": {"factor": 2}}, "rope_scaling={'factor': 2}: must have factor, low_freq"),
    (Sampling, {"temperature": -1}, "temperature=-1: must be float at least 0"),
    (Sampling, {"top_p": 1.5}, "top_p=1.5: must be float above 0 and at most 1 or None"),
    (Sampling, {"repetition_penalty": 0}, "repetition_penalty=0: must be float at least 0.01")])
def test_a_bad_setting_is_named(settings, given, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        settings(**{**(TINY if settings is Config else {}), **given})


@pytest.mark.parametrize("causal", [True, False])
def test_vanilla_equals_torch_transformer_encoder(causal):
    model, idx = tiny("vanilla", causal=causal), tokens(3, 16)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 128, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for block, theirs in zip(model.blocks, encoder.layers):
        names = {"self_attn.out_proj": block.attn.o, "linear1": block.mlp.up, "linear2": block.mlp.down,
                 "norm1": block.norm1, "norm2": block.norm2}
        state = {f"{name}.{kind}": value for name, part in names.items()
                 for kind, value in part.state_dict().items()}
        for kind in ("weight", "bias"):
            parts = [getattr(part, kind) for part in (block.attn.q, block.attn.k, block.attn.v)]
            state[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
        theirs.load_state_dict(state)
    angles = torch.arange(16.0)[:, None] / 10000 ** (torch.arange(0, 32, 2) / 32)
    waves = torch.zeros(16, 32)
    waves[:, 0::2], waves[:, 1::2] = angles.sin(), angles.cos()
    mask = torch.nn.Transformer.generate_square_subsequent_mask(16) if causal else None
    hidden = encoder(model.wte(idx) * math.sqrt(32) + waves, mask=mask)
    expected = F.linear(hidden, model.head.weight, model.head.bias)
    torch.testing.assert_close(model(idx)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("column", ["modern", "vanilla"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_and_angles_never(column, dtype):
    model, idx, places = tiny(column, block_size=512), tokens(2, 512), torch.arange(512)
    size = 2 * len(model.positions.waves.frequencies)
    exact = places.double()[:, None] / 10000 ** (torch.arange(0, size, 2) / size)  # (512, size / 2)
    cast = copy.deepcopy(model.to(dtype))
    torch.testing.assert_close(cast.positions.waves(places), exact.float(), atol=0, rtol=1e-6)
    rounded = copy.deepcopy(cast).float()  # the same weights, computed with exactly
    assert difference(cast.hidden(idx).float(), rounded.hidden(idx)) < 0.02


def naive(model, idx):
    """GPT-2 with Near's scores, pair by pair: (B, T) -> (B, T, C)."""
    x = model.wte(idx) + model.positions.wpe.weight[:idx.size(1)]
    for block in model.blocks:
        h = block.norm1(x)
        q, k, v = (part(h).unflatten(-1, (4, 8)) for part in (block.attn.q, block.attn.k, block.attn.v))
        mixed = torch.zeros_like(q)
        for head, slope in enumerate((0.1, 0.2, 0.4, 0.8)):
            for i in range(idx.size(1)):
                seen = range(max(0, i - 4), i + 1)
                scores = [(q[:, i, head] * k[:, j, head]).sum(-1) / 8**0.5 - slope * (i - j) for j in seen]
                weights = torch.stack(scores).softmax(0)
                mixed[:, i, head] = sum(w[:, None] * v[:, j, head] for w, j in zip(weights, seen))
        x = x + block.attn.o(mixed.flatten(-2))
        x = x + block.mlp(block.norm2(x))
    return model.norm_f(x)


@torch.no_grad()
def test_what_a_position_adds_to_scores_is_what_it_says():
    model, idx = tiny("near").double(), tokens(2, 12)
    exact = naive(model, idx)
    for one in (model.train(), model.eval()):  # the slopes are float32
        torch.testing.assert_close(one.hidden(idx), exact, atol=1e-6, rtol=1e-6)
    assert tiny("gpt2", bias=False).flops_per_token() - model.flops_per_token() == 12 * 2 * 32 * (16 - 5)


class Pair(torch.nn.Module):
    """Two MLPs side by side, in place of one."""

    def __init__(self, config):
        super().__init__()
        self.parts = torch.nn.ModuleList(MLP(config) for _ in range(2))

    def forward(self, x):
        return sum(part(x) for part in self.parts)


def test_what_a_module_is_and_not_its_name_says_how_it_is_treated(monkeypatch):
    alone = fresh("modern")
    monkeypatch.setattr("model.MLP", Pair)
    model = Transformer(alone.config)
    assert [len(block_matrices(one)) for one in (alone, model)] == [2 * (4 + 2), 2 * (4 + 2 * 2)]
    names = {p: name for name, p in model.named_parameters()}
    assert {names[layer.weight].split(".")[0] for layer in block_matrices(torch.nn.Sequential(model))} == {
        "blocks"}
    assert model.flops_per_token() - alone.flops_per_token() == 6 * 2 * (2 * 32 * 128)
    assert all(part.down.weight.eq(0).all() and part.up.weight.std() > 0.1
               for block in model.blocks for part in block.mlp.parts)


# -----------------------------------------------------------------------------
# Writing text

@columns
def test_a_pickled_model_is_the_same(column):
    """So torch.save(model) and processes that are spawned can have it."""
    model, x = tiny(column).eval(), tokens(2, 9)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x)[0], model(x)[0])


@columns
def test_cached_equals_uncached(column):
    model, prompt = tiny(column), tokens(2, 5)
    cached = greedy(model, prompt, 3 * 16)
    assert cached.shape == (2, 5 + 48) and torch.equal(cached[:, :5], prompt)
    assert torch.equal(cached, greedy(model, prompt, 3 * 16, use_cache=False))
    with fixed_shapes():
        assert torch.equal(cached, greedy(model, prompt, 3 * 16, compile=True))
    # and it is what forward says, as long as all fits
    assert torch.equal(model(cached[:, :15])[0][:, 4:].argmax(-1), cached[:, 5:16])
    long = tokens(1, 40)  # a prompt over block_size
    assert torch.equal(greedy(model, long, 20), greedy(model, long, 20, use_cache=False))


@columns
def test_ragged_prompts_go_as_if_alone(column):
    model, prompts = tiny(column), [tokens(n, seed=n) for n in (2, 5, 9)]
    idx, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        idx[row, -len(prompt):] = prompt
        mask[row, -len(prompt):] = True
    together = greedy(model, idx, 30, pad_mask=mask)
    drawn = model.generate(idx, 30, pad_mask=mask, generator=[seeded(row) for row in range(3)])
    for row, prompt in enumerate(prompts):  # past block_size too
        assert torch.equal(together[row, 9:], greedy(model, prompt[None], 30)[0, len(prompt):])
        alone = model.generate(prompt[None], 30, generator=seeded(row))
        assert torch.equal(drawn[row, 9:], alone[0, len(prompt):])
    with fixed_shapes():
        assert torch.equal(together, greedy(model, idx, 30, pad_mask=mask, compile=True))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_what_cannot_be_written_is_one_line(monkeypatch, capsys):
    model, prompt = tiny(), tokens(2, 5)
    assert torch.equal(model.generate(prompt, 20, temperature=1e-40), greedy(model, prompt, 20))
    for mask in ([[True] * 5, [True] * 4 + [False]], [[True] * 5, [False] * 5]):  # on the right, and empty
        with pytest.raises(ValueError, match="pad_mask"):
            model.generate(prompt, 2, pad_mask=torch.tensor(mask))
    expected = greedy(model, prompt, 20)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: 1 / 0)  # as on a Python that it does not know
    assert torch.equal(greedy(model, prompt, 20, compile=True), expected)
    assert capsys.readouterr().err == (
        "warning: torch.compile failed, going on without it (ZeroDivisionError: division by zero)\n")
    for bad in (math.nan, math.inf):
        model.wte.weight.data[:, 0] = bad
        for how in ({}, {"temperature": 0}, {"top_k": 3}):
            with pytest.raises(ValueError, match="not finite"):
                model.generate(prompt, 2, **how)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_write_in_any_precision(dtype):
    for column in COLUMNS:
        with torch.autocast("cpu", dtype):
            assert tiny(column).generate(tokens(2, 5), 20).shape == (2, 25)
        assert tiny(column).to(dtype).generate(tokens(2, 5), 20).shape == (2, 25)


@pytest.mark.parametrize("how, kept", [
    ({}, 6), ({"top_k": 3}, 3), ({"top_p": 0.9}, 3), ({"top_k": 5, "top_p": 0.5}, 1), ({"min_p": 0.1}, 3)])
def test_draws_follow_the_filtered_softmax(how, kept):
    logits, n = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]]), 20_000
    expected = F.softmax(logits / 0.7, -1)[0]
    assert expected[:2].sum() < 0.9 < expected[:3].sum() and expected[0] > 0.5  # so the top_p above
    expected[kept:] = 0
    expected *= n / expected.sum()
    drawn = draw(logits.expand(n, -1), Sampling(0.7, **how), None, generator=seeded(0))
    counts = torch.bincount(drawn, minlength=6)
    assert (counts[kept:] == 0).all()
    chi2 = ((counts - expected).square() / expected)[:kept].sum()
    assert chi2 < 25, f"chi-square {chi2:.1f} with {kept - 1} degrees of freedom"


def test_a_repetition_penalty_remembers_what_has_left_the_context():
    model, prompts = tiny("modern", block_size=8), tokens(2, 3)
    real = torch.tensor([[False, True, True], [True, True, True]])
    text = model.generate(prompts, 20, pad_mask=real, temperature=0, repetition_penalty=100)
    assert all(len(set(row.tolist())) == 20 for row in text[:, 3:])  # of 61 tokens


def test_text_is_greedy_or_drawn_by_its_seed_and_the_model_is_left_as_it_was():
    model = tiny(dropout=0.5).train()
    written = greedy(model, tokens(2, 5), 20)
    for narrow in ({"temperature": 0}, {"temperature": 1.3, "top_k": 1}, {"top_p": 1e-9}):
        assert torch.equal(model.generate(tokens(2, 5), 20, **narrow), written)
    one, two, three = (model.generate(tokens(1, 3), 30, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three) and model.training


# -----------------------------------------------------------------------------
# Training. What a run leaves behind, and what ends one, is in tests/test_run.py.

MACHINE = Machine("cpu", "float32")


def step(model, x, y, batch_size, optimizers=(), objective=None, machine=MACHINE):
    """One of train.py's, in micro-batches: loss, penalty, norm. Without optimizers the gradient stays."""
    micro_batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    means, norm = train.train_step(objective or train.Objective(model), micro_batches, (y != -1).sum(), model,
                                   optimizers, machine, 0.0)
    return *means, norm


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def assert_same_step(loss, model, expected, plain):
    """The same loss, with the same gradient."""
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert difference(gradients(model), gradients(plain)) < 1e-5


def flat(weights: dict) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in weights.values()])


def optimizers_of(model, optimizer, lr=1e-2, decay=0.1, **more):
    return train.make_optimizers(model, optimizer, lr, 0.02, decay, (0.9, 0.95), **more)


def ragged(rows):
    """Targets with so different numbers that count that a mean of means would be far off."""
    y = tokens(rows, 16, seed=1)
    for row in range(rows):
        y[row, :row % 16] = -1
    return y


@pytest.mark.parametrize("schedule", train.SCHEDULES)
def test_learning_rate_at_its_corners(schedule):
    rates = [train.lr_factor(i, schedule, warmup=10, end=110, floor=0.1, fraction=0.5) for i in range(200)]
    assert rates[0] == 1 / 11 and rates[9] == 10 / 11 and rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] >= 0.1
    known = {"cosine": (0.55, 0.1), "linear": (0.55, 0.1), "wsd": (1 - 0.9 * 5 / 55, 0.1), "constant": (1, 1)}
    middle, end = known.get(schedule, (rates[60], rates[110]))
    assert rates[60] == pytest.approx(middle) and rates[110] == rates[-1] == end
    assert rates[109] == pytest.approx(end, abs=0.03) and (end == 1 or rates[109] > end)


@pytest.mark.parametrize("places, settled", [
    ({"max_iters": 1, "learning_rate": 1}, {"warmup_iters": 1, "min_lr": 1e-6}),
    ({"warmup_iters": 1, "max_iters": 2, "learning_rate": 2}, {"warmup_iters": 1, "min_lr": 1e-6}),
    ({"warmup_iters": 2, "max_iters": 2, "learning_rate": 2}, "warmup_iters=2000: must be"),
    ({"min_lr": 1, "max_iters": 1, "learning_rate": 1}, "min_lr=6e-05: must be")])
def test_a_warmup_or_a_floor_that_is_too_large_yields_to_what_is_given_later(places, settled):
    given = {"max_iters": 10, "learning_rate": 1e-5, "warmup_iters": 2000, "min_lr": 6e-5,
             "lr_decay_iters": None, "PLACES": places}
    if isinstance(settled, str):
        with pytest.raises(SettingError, match=settled):
            train.settle(given, Machine("cpu"))
    else:
        assert train.settle(given, Machine("cpu")) == pytest.approx(settled)


def computed(folder):
    """What one of several processes computes of its share of the same step."""
    machine, model = Machine("cpu", "float32"), tiny()
    share = 24 // machine.world
    mine = slice(machine.rank * share, (machine.rank + 1) * share)
    x, y = tokens(24, 16)[mine], ragged(24)[mine]
    objective, _ = train.ready(train.Objective(model), machine)
    optimizers, found = optimizers_of(model, "muon"), {"steps": []}
    for batch_size in (1, 2, 6):
        model.zero_grad()
        loss, _, norm = step(model, x, y, batch_size, (), objective, machine)
        found["steps"].append([loss, norm, gradients(model)])
    data, lengths = tokens(16 * 40 + 5).numpy(), np.arange(61) % 4
    found["val"] = [train.evaluate(objective, data, 37, size, 16, machine, token_bytes=lengths)
                    for size in (1, 7, 64)]
    model.zero_grad()
    step(model, x, y, 6, optimizers, objective, machine)
    found["weights"] = copy.deepcopy(model.state_dict())
    if machine.rank == machine.world - 1:
        model.penalty = lambda: torch.tensor(math.nan)  # here alone: nobody may take this step
    step(model, x, y, 6, optimizers, objective, machine)
    found["after"] = model.state_dict()
    torch.save(found, folder / f"{machine.world}.{machine.rank}")


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=posix), pytest.param(3, marks=[posix, slow]),
                                   pytest.param(4, marks=[posix, slow])])
def test_micro_batches_in_any_number_of_processes_are_one_batch(tmp_path, world):
    plain = tiny()
    expected = plain(tokens(24, 16), ragged(24))[1]
    expected.backward()
    wanted = gradients(plain)
    for number in {1, world}:
        together(number, computed, tmp_path)
    alone, *every = (torch.load(path, weights_only=True) for path in sorted(tmp_path.iterdir()))
    for found in (alone, *every):
        for loss, norm, grad in found["steps"]:
            assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
            assert norm.item() == pytest.approx(wanted.norm().item(), rel=1e-5)
            assert difference(grad, wanted) < 1e-6
        assert all(val == pytest.approx(alone["val"][0], rel=1e-6) for val in found["val"])
        assert difference(flat(found["weights"]), flat(alone["weights"])) < 1e-5
        assert same(found["weights"], found["after"])
        assert found is alone or same(found["weights"], every[0]["weights"])


def test_each_window_comes_once_an_epoch():
    data = np.arange(16 * 50 + 9)
    windows = train.Windows(data, 16, seed=3)
    first, second = (windows.locate(i * windows.n, windows.n) for i in range(2))
    for starts in (first, second):
        assert len(set(starts.tolist())) == windows.n >= 49 and len(set((starts % 16).tolist())) == 1
        assert starts.min() >= 0 and starts.max() + 17 <= len(data)
    assert not np.array_equal(first, second) and not np.array_equal(first, np.sort(first))
    # the order is the same however it is asked for, across the end of an epoch too
    again = train.Windows(data, 16, seed=3)
    pieces = np.concatenate([again.locate(i, 7) for i in range(0, 2 * windows.n, 7)])[:2 * windows.n]
    assert np.array_equal(pieces, np.concatenate([first, second]))
    assert not np.array_equal(train.Windows(data, 16, seed=4).locate(0, windows.n), first)
    x, y = windows.get(0, 3)
    assert x[2].tolist() == list(range(first[2], first[2] + 16)) and torch.equal(y, x + 1)
    for length in (17, 18, 33, 48):  # the smallest data
        windows = train.Windows(np.arange(length), 16, seed=0)
        assert all(windows.get(i, windows.n)[1].max() < length for i in range(0, 20 * windows.n, windows.n))


MASK = partial(train.masked_tokens, rate=0.3, token=60, vocab_size=60)


def test_masks_are_a_function_of_the_window_alone():
    idx = tokens(6, 40, vocab_size=60)
    x, y = MASK(idx, range(10, 16), 3)
    assert ((y != -1).sum(1) == 12).all()  # the same number in each
    assert torch.equal(torch.where(y == -1, x, y), idx)
    for i in range(6):  # alone or in a batch
        assert same([x[i:i + 1], y[i:i + 1]], list(MASK(idx[i:i + 1], [10 + i], 3)))
    for numbers, seed in ((range(6), 3), (range(10, 16), 4)):
        assert not torch.equal(MASK(idx, numbers, seed)[1], y)
    # of very many: 80% masked, 10% another token, 10% as they were
    x, y = MASK(tokens(50, 1000, vocab_size=60), range(50), 3)
    chosen = y != -1
    assert (x[chosen] == 60).float().mean() == pytest.approx(0.8)
    assert (x[chosen] == y[chosen]).float().mean() == pytest.approx(0.1, abs=0.01)
    windows = train.Windows(np.arange(16 * 50 + 9) % 60, 16, seed=3, mask=MASK)
    assert torch.equal(windows.get(7, 1)[0][0], windows.get(5, 3)[0][2])


@pytest.mark.parametrize("eval_iters", [0, 13])
@pytest.mark.parametrize("causal", [True, False])
def test_validation_is_one_number_for_any_batch_size(monkeypatch, causal, eval_iters):
    monkeypatch.setitem(train.METRICS, "top3", lambda logits, y: (logits.topk(3)[1] == y[:, None]).any(-1))
    model, data = tiny(causal=causal), tokens(16 * 40 + 5).numpy().astype(np.uint16)
    monkeypatch.setattr(model, "penalty", lambda: 1e6)  # is no part of it
    objective = train.Objective(model, None if causal else 5, label_smoothing=0.1)
    mask, lengths = None if causal else MASK, np.arange(61) % 4  # bytes of each token
    found = [train.evaluate(objective, data, eval_iters, size, 16, MACHINE, mask, lengths)
             for size in (1, 7, 64)]
    assert all(one == pytest.approx(found[0], rel=1e-6) for one in found)
    windows = np.linspace(0, 39, eval_iters or 40).astype(int)
    x, y = train.gather(data, windows * 16, 16)
    if mask:
        x, y = mask(x, windows, 0)  # masks go with the windows
    (logits, loss), counted = model(x, y), y != -1
    ranks = (logits > logits.gather(-1, y.clamp(min=0).unsqueeze(-1))).sum(-1)[counted]
    assert found[0] == pytest.approx({
        "loss": loss.item(),
        "bpb": loss.item() * counted.sum().item() / math.log(2) / lengths[y].sum(),
        "accuracy": (ranks == 0).double().mean().item(),
        "top3": (ranks < 3).double().mean().item()}, rel=1e-5)


class Scaled(Transformer):
    """A model with one more parameter in its logits, beside the head, and an extra loss."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.tensor(0.7))
        self.spread = torch.nn.Parameter(torch.ones(2, 3, 4))

    def logits(self, x):
        return super().logits(x) * self.scale

    def penalty(self):
        return 0.1 * self.spread.square().mean() + self.scale.square()


@pytest.mark.parametrize("column", [*COLUMNS, "scaled"])
@pytest.mark.parametrize("compiling", [False, True])
def test_the_chunked_loss_equals_the_plain_one(monkeypatch, column, compiling):
    monkeypatch.setattr(train, "IN_CACHE", 61 * 100)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)  # that path is not chunked
    x, y = batch(30)  # 480 tokens: four chunks of 100 and a part
    y[3, 5:] = -1
    model, plain = (fresh("modern", Scaled) if column == "scaled" else tiny(column) for _ in range(2))
    loss = train.Objective(model)(x, y).sum() * 0.5  # and the penalty
    expected = (plain(x, y)[1] + plain.penalty()) * (y != -1).sum() * 0.5
    assert_same_step(loss, model, expected, plain)


def test_the_head_sees_masked_positions_only():
    x, y = MASK(tokens(5, 16), range(5), 0)
    y[2, :12] = -1  # ragged, too
    model, plain, seen = tiny(causal=False), tiny(causal=False), []
    model.head.register_forward_pre_hook(lambda head, args: seen.append(args[0].numel() // 32))
    loss = train.Objective(model, train.count_masked(16, 0.3))(x, y)[0]
    assert_same_step(loss, model, plain(x, y)[1] * (y != -1).sum(), plain)
    assert sum(seen) == 5 * 5


def test_smoothing_and_teacher_are_what_they_say():
    x, y = batch(4)
    y[1, 3:] = -1
    model, plain, teacher = tiny(), tiny(), tiny("gpt2", seed=1).requires_grad_(False)
    kept = y != -1
    logits = plain(x)[0][kept]
    hard, smooth = (F.cross_entropy(logits, y[kept], reduction="sum", label_smoothing=share)
                    for share in (0.0, 0.1))
    smoothed = train.Objective(model, label_smoothing=0.1)
    assert smoothed(x, y)[0].item() == pytest.approx(smooth.item(), rel=1e-5)
    taught = train.Objective(model, teacher=teacher, teacher_share=0.3, temperature=3.0)
    p, q = F.softmax(teacher(x)[0][kept] / 3, -1), F.softmax(logits / 3, -1)
    expected = 0.7 * hard + 0.3 * 9 * (p * (p / q).log()).sum()
    assert_same_step(taught(x, y)[0], model, expected, plain)
    assert all(p.grad is None for p in teacher.parameters())
    for objective in (smoothed.eval(), taught.eval()):
        assert objective(x, y)[0].item() == pytest.approx(hard.item(), rel=1e-5)


def test_recomputed_activations_give_the_same_gradient():
    x, y = batch(4)
    model, plain = tiny(dropout=0.2).train(), tiny(dropout=0.2).train()
    train.recompute_blocks(model)
    for one in (model, plain):
        torch.manual_seed(5)
        step(one, x, y, 2)
    assert same(gradients(model), gradients(plain)) and list(model.state_dict()) == list(plain.state_dict())
    assert greedy(model, x[:1], 4).shape == (1, 20)


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_every_parameter_is_in_exactly_one_group(optimizer):
    model = fresh("modern", Scaled)
    names = {p: name for name, p in model.named_parameters()}
    matrices = {names[layer.weight] for layer in block_matrices(model)}
    for embd_lr in (None, 0.3):
        found = {}
        for group in (group for one in optimizers_of(model, optimizer, embd_lr=embd_lr)
                      for group in one.param_groups):
            for p in group["params"]:
                assert names[p] not in found
                found[names[p]] = group["lr"]
                assert group["weight_decay"] == (0.1 if p.ndim >= 2 else 0.0)  # those of more dimensions too
        rates = dict.fromkeys(names.values(), 0.01) | {"wte.weight": embd_lr or 0.01}
        if optimizer in train.BLOCKS_ONLY:
            rates |= dict.fromkeys(matrices, 0.02)
        assert found == rates


@columns
@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_a_batch_is_learnt_by_heart(column, optimizer):
    model, (x, y) = fresh(column), batch(4)
    lr = {"lars": 10.0, "sgd": 0.1}.get(optimizer, 1e-2)
    optimizers, losses = optimizers_of(model, optimizer, lr, decay=0.0), [math.inf]
    while losses[-1] > 0.1 and len(losses) < 200:
        losses.append(step(model, x, y, 4, optimizers)[0])
    assert losses[-1] < 0.1


@pytest.mark.parametrize("optimizer", [*train.OPTIMIZERS, "foreign"])
def test_a_step_that_is_not_finite_leaves_no_trace(monkeypatch, optimizer):
    """Also not in an optimizer that knows nothing of this."""
    monkeypatch.setitem(train.OPTIMIZERS, "foreign", lambda groups, *_: torch.optim.Adagrad(groups))
    model, (x, y) = tiny(), batch(4)
    optimizers = optimizers_of(model, optimizer)
    for bad in (False, False, True):
        before = copy.deepcopy([model.state_dict(), optimizer_state(optimizers, model)])
        if bad:
            model.penalty = lambda: torch.tensor(math.inf)
        norm = step(model, x, y, 2, optimizers)[2]
        assert all(p.grad is None for p in model.parameters()) and norm.isfinite()
        assert same(before, [model.state_dict(), optimizer_state(optimizers, model)]) == bad


@pytest.mark.parametrize("interval", [1, 3])
def test_bad_steps_in_a_row_end_the_run(capsys, interval):
    good, bad = torch.tensor(1.0), torch.tensor(math.nan)
    counter = train.BadSteps(2, interval)
    for i, loss in enumerate([good, bad, good, good, bad, good], start=1):
        counter.add(i, 0.1, loss, good)
    assert capsys.readouterr().out.count("not finite") == 2
    counter.add(7, 0.1, good, bad)
    with pytest.raises(UserError, match=r"iter 8: loss nan, lr 1.00e-01, norm 1"):
        for i in (8, 9, 10):
            counter.add(i, 0.1, bad, good)


def test_float16_steps_that_overflow_do_not_count(home, monkeypatch):
    monkeypatch.setattr(train, "Machine", Half)
    said = run_here(train, *TOY, "--out_dir=out/half", cwd=home)
    steps, skipped = [row for row in log_of(home / "out/half") if "loss" in row], said.count("not finite")
    assert skipped > 2 and [row["iter"] for row in steps] == list(range(1, 9))
    assert steps[-1]["tokens"] == (8 + skipped) * 4 * 32  # their tokens are gone, the schedule is not
    assert [row["lr"] for row in steps] == [row["lr"] for row in log_of(home / "out/whole") if "loss" in row]


def test_a_penalty_is_in_the_training_alone_and_a_bad_step_is_told(home, monkeypatch):
    penalties = iter([0.5] * 4 + [math.nan] * 2 + [0.5] * 100)
    monkeypatch.setattr(Transformer, "penalty", lambda self: next(penalties) + 0 * self.wte.weight.sum())
    args = [*TOY, "--out_dir=out/penalty", "--gradient_accumulation_steps=1", "--max_bad_steps=2"]
    with pytest.raises(UserError, match="iter 6: .* 2 steps in a row.*learning_rate"):
        run_here(train, *args, cwd=home)
    run_here(train, *args, "--init_from=resume", cwd=home)
    rows = [row for row in log_of(home / "out/penalty") if "loss" in row]
    assert [row["penalty"] for row in rows] == [0.5] * 8
    assert rows[0]["loss"] == pytest.approx(math.log(300), abs=0.2)  # without it
    evaluations = [row for row in log_of(home / "out/penalty") if "val_loss" in row]
    assert "val_accuracy" in evaluations[0] and evaluations[0]["mean_loss"] < 6


def test_a_masked_model_is_trained_and_teaches(home):
    args = [*TOY, "--causal=False", "--max_iters=30", "--eval_interval=15", "--sample_tokens=10",
            "--eval_iters=0", "--dropout=0"]
    said = run_here(train, *args, "--out_dir=out/masked", cwd=home)
    rows = [row for row in log_of(home / "out/masked") if "val_loss" in row]
    assert set(rows[0]) == {"iter", "elapsed", "train_loss", "val_loss", "mean_loss",
                            *(f"val_{name}" for name in train.METRICS)}
    assert rows[1]["val_loss"] < rows[0]["val_loss"] and 0 < rows[1]["val_accuracy"] < 1
    assert re.search(r"\[.*\|.*\]", said, re.DOTALL)  # guesses, and the truth where they are wrong
    run_here(train, *args, "--out_dir=out/student", "--teacher=out/masked", "--n_layer=1", "--remat",
             "--label_smoothing=0.1", cwd=home)
    assert "teacher" not in "".join(checkpoint(home / "out/student")["model"])
    run_here(train, *args, "--out_dir=out/masked", "--overwrite", "--seed=2", "--max_iters=1", cwd=home)
    said = run_here(train, "--out_dir=out/student", "--init_from=resume", "--max_iters=31", cwd=home)
    assert "teacher=out/masked: has other weights now than the run has learned from" in said
    assert "of no use" not in said  # the model's fields that stand in the checkpoint


def test_other_weights_start_a_new_run(home, monkeypatch):
    """Those of a run of ours, and of Hugging Face's."""
    gentle = [*TOY, "--max_iters=1", "--warmup_iters=0", "--learning_rate=1e-9", "--muon_lr=1e-9",
              "--min_lr=0"]
    run_here(train, *gentle, "--out_dir=out/from_ours", "--init_from=out/whole", cwd=home)
    best = checkpoint(home / "out/whole", "best.pt")["state"]["best"]["val_loss"]
    state = checkpoint(home / "out/from_ours")["state"]
    assert state["step"] == 1 and state["best"]["val_loss"] == pytest.approx(best, abs=1e-3)
    pytest.importorskip("safetensors"), pytest.importorskip("tokenizers")
    monkeypatch.chdir(home)
    gpt2 = ["--pos=learned", "--out_dir=out/gpt2"]
    run_here(train, *TOY, *gpt2)
    sample.write_pretrained(*sample.load("out/gpt2"), "theirs")
    prepare.prepare("theirs_toy", source="toy.txt", tokenizer="theirs")
    theirs = ["--pos=learned", "--bias", "--init_from=theirs", "--out_dir=out/from_theirs"]
    run_here(train, *gentle, *theirs, "--dataset=theirs_toy", "--teacher=theirs", "--eval_iters=0")
    said = run_here(train, "--out_dir=out/gpt2", "--init_from=resume", "--eval_only", "--eval_iters=0")
    told = float(re.search(r"val loss (\S+),", said)[1])
    assert log_of(home / "out/from_theirs")[-1]["val_loss"] == pytest.approx(told, abs=0.02)
    prepare.prepare("other", source="toy.txt", tokenizer="bytes")
    with pytest.raises(SettingError, match="dataset=other.*tokenizer"):
        run_here(train, *TOY, *theirs, "--dataset=other", "--out_dir=out/none")


@slow
def test_compiling_changes_nothing_but_the_speed(home):
    """Not what is learned, nor that a run resumes bit for bit; without a compiler the run goes on."""
    plain = [*TOY, "--n_layer=1", "--lr_decay_iters=8", "--dropout=0"]  # compiled code draws others
    run_here(train, *plain, "--out_dir=out/plain", cwd=home)
    for name, more in (("fast", []), ("cut", ["--max_iters=5"]),
                       ("cut", ["--max_iters=8", "--init_from=resume"])):
        done = script("train.py", *plain, "--compile", f"--out_dir=out/{name}", *more, cwd=home)
        assert done.returncode == 0 and ", compiled" in done.stdout, done.stderr
    fast, cut, slow_one = (checkpoint(home / "out" / name) for name in ("fast", "cut", "plain"))
    assert same(fast["model"], cut["model"]) and same(fast["optimizer"], cut["optimizer"])
    assert difference(flat(fast["model"]), flat(slow_one["model"])) < 1e-3
    done = script("train.py", *TOY, "--out_dir=out/fallback", "--compile", "--max_iters=2", cwd=home,
                  CXX="/nowhere/c++", PATH="", TORCHINDUCTOR_CACHE_DIR=str(home / "cache"))
    assert done.returncode == 0 and "torch.compile failed" in done.stderr, done.stderr
    assert "iter 2/2" in done.stdout
