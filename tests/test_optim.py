"""Optimizers that torch does not have, and pruning."""
import copy

import pytest
import torch

from lib.optim import Pruning, load_optimizer_state, optimizer_state, orthogonalise
from lib.run import State
from tests.helpers import same, tiny, tokens
from train import make_optimizers


def test_orthogonalise_brings_singular_values_near_1():
    for shape in ((3, 24, 24), (2, 64, 16), (2, 16, 64)):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
        S = torch.linalg.svdvals(orthogonalise(G))
        assert S.max() < 1.3 and S.median() > 0.6
        assert shape[1] == shape[2] or S.min() > 0.5  # a square one has directions of almost no length
        # a matrix's result does not depend on its stack
        torch.testing.assert_close(orthogonalise(G)[1:], orthogonalise(G[1:]), atol=1e-5, rtol=1e-5)
    U, V = (torch.linalg.qr(torch.randn(16, 16))[0] for _ in range(2))
    kept = U.T @ orthogonalise((U @ torch.diag(torch.linspace(0.5, 1, 16)) @ V)[None])[0] @ V.T
    lengths = kept.diagonal()
    assert (kept - torch.diag(lengths)).abs().max() < 1e-4  # the directions stay, their lengths even out
    assert 0.6 < lengths.min() and lengths.max() < 1.3


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
def test_states_are_kept_by_the_names_of_parameters(optimizer):
    """So that the order of groups, or of a model's modules, may change."""
    model, other = tiny(), tiny()
    first, second = (make_optimizers(one, optimizer, 0.1, 0.02, 0.1, (0.9, 0.95)) for one in (model, other))
    for step in range(3):
        if step == 2:
            other.load_state_dict(model.state_dict())
            load_optimizer_state(second, other, copy.deepcopy(optimizer_state(first, model)))
        for one, optimizers in ((model, first), (other, second)):
            one(tokens(2, 16), tokens(2, 16, seed=step))[1].backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
    assert set(optimizer_state(first, model)) == set(dict(model.named_parameters()))
    assert same(optimizer_state(first, model), optimizer_state(second, other))
    assert same(model.state_dict(), other.state_dict())


def test_pruning_is_once_half_way_and_a_resumed_run_keeps_it():
    model, twin, state = tiny("gpt2"), tiny("gpt2"), State()
    pruning, resumed, up = Pruning(model, 0.5, 30), None, model.blocks[0].mlp.up.weight
    for state.step in range(1, 31):
        with torch.no_grad():
            for p in (*model.parameters(), *twin.parameters()):
                p.add_(0.003)  # an update, which moves the zeros too
        smallest = up.abs().flatten().argsort()[:up.numel() // 2]
        pruning.after(state)
        zeros = (up == 0).flatten()
        done = state.step >= 15
        assert zeros.sum() == done * (up.numel() // 2) and pruning.is_done(state) == done
        if state.step == 15:
            assert zeros[smallest].all()
            chosen = zeros
        elif done:
            assert torch.equal(zeros, chosen)
        if state.step == 20:
            twin.load_state_dict(model.state_dict())
            resumed = Pruning(twin, 0.5, 300)  # more steps than before: what is 0 stays so all the same
        elif resumed:
            resumed.after(state)
            assert same(model.state_dict(), twin.state_dict())
    for name, p in model.named_parameters():
        pruned = p.ndim == 2 and name.startswith("blocks.")
        assert (p == 0).float().mean().item() == pytest.approx(0.5 if pruned else 0.0, abs=1e-3)
    assert Pruning(model, 0.0, 30).is_done(State())
    late = tiny("gpt2")  # a run that is resumed with fewer steps than before has its middle behind it
    Pruning(late, 0.5, 30).after(State(step=20))
    assert (late.blocks[0].mlp.up.weight == 0).float().mean() == 0.5
