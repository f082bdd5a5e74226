"""
Optimizers that torch does not have, and what goes with them: Muon, LARS, SGD with decoupled decay, pruning.

    Muon(matrices, lr=0.02)
    Momentum(parameters, lr=0.1, trust=0.001)    LARS; without trust, SGD

Each leaves everything as it is in a step whose `found_inf` is not 0, as torch's own fused optimizers do: what
is not finite is found on the device, and nobody waits to read it. See `update` in train.py.
"""
from __future__ import annotations

import inspect

import torch
import torch.distributed as dist
from torch.nn.utils import prune

from model import block_matrices


class Uncompiled(torch.optim.Optimizer):
    """torch imports all of torch.compile, 1.4 s, only to keep it out of these functions."""
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(Uncompiled, torch.optim.AdamW):
    """torch's own."""
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(Uncompiled):
    """Momentum, whose step is made orthogonal: all directions of a matrix move alike (Jordan et al. 2024).

    Takes matrices only. Those of one shape are stacked, so that a model's worth of small products becomes a
    few large ones, and the stack is dealt out to all processes. The momentum itself warms up, from 0.85 to
    `momentum` over 300 steps. Decay is decoupled.
    """
    _step_supports_amp_scaling = True  # torch's name for an optimizer that looks at found_inf

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, steps=5):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay,
                                  "steps": steps})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": torch.zeros((), device=p.device), "momentum": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self):
        ok = may_move(self)
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():
                self.move(params, group, ok)

    def move(self, params, group, ok):
        """One step of all the matrices of one shape: ok is 1, or 0 for none."""
        steps = [self.state[p]["step"] for p in params]
        buffers = [self.state[p]["momentum"] for p in params]
        warm = (steps[0] / 300).clamp(max=1)
        mu = (1 - warm) * 0.85 + warm * group["momentum"]
        grads = torch.where(ok, torch.stack([p.grad for p in params]), 0)  # (N, rows, columns)
        momentum = torch.stack(buffers).lerp_(grads, (1 - mu) * ok)
        update = orthogonalise_together(grads.lerp(momentum, mu), group["steps"])  # Nesterov's
        # a tall matrix's orthogonal step moves its outputs less, by this factor
        rows, columns = params[0].shape
        factor = max(1.0, rows / columns) ** 0.5 * group["lr"]
        update = update.to(grads.dtype) * (factor * ok)
        torch._foreach_copy_(buffers, list(momentum))
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * ok)
        torch._foreach_sub_(params, list(update))
        torch._foreach_add_(steps, [ok.float()] * len(steps))  # a single one would be read on the host


class Momentum(Uncompiled):
    """SGD with momentum; with `trust`, LARS (You et al. 2017).

    LARS gives each tensor a step of its own size: lr * trust times its length, whatever the gradient's. Its
    decay is part of the gradient, as in the paper; that of SGD is decoupled.
    """
    _step_supports_amp_scaling = True

    def __init__(self, params, lr=0.1, momentum=0.9, weight_decay=0.0, trust=None):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay,
                                  "trust": trust})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"momentum": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self):
        ok = may_move(self)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, torch.where(ok, p.grad, 0), self.state[p]["momentum"], group, ok)

    def move(self, p, grad, momentum, group, ok):
        """Change p and its momentum in place; if `ok` is False, neither changes."""
        lr, decay, trust = group["lr"], group["weight_decay"], group["trust"]
        if trust is None:
            p.mul_(1 - lr * decay * ok)
        else:
            length, slope = p.norm(), grad.norm() + decay * p.norm()
            # a tensor that is still 0 would never leave it
            ratio = torch.where((length > 0) & (slope > 0), length / slope, 1.0)
            grad = (grad + decay * p) * (trust * ratio)
        momentum.copy_(torch.where(ok, group["momentum"] * momentum + lr * grad, momentum))
        p.sub_(momentum * ok)


def may_move(optimizer) -> torch.Tensor:
    """On the device, False for a step to leave out: `found_inf`, as torch's own fused optimizers have it."""
    device = optimizer.param_groups[0]["params"][0].device
    return getattr(optimizer, "found_inf", torch.zeros((), device=device)) == 0


def orthogonalise(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """U V^T of G = U S V^T, roughly, for a stack of matrices (N, rows, columns): singular values near 1.

    A quintic Newton-Schulz iteration whose slope at 0 is large rather than its limit exact (Jordan et al.
    2024). bfloat16 is enough on a GPU; a CPU without bfloat16 arithmetic would spend nine times as long.
    """
    X = G.bfloat16() if G.is_cuda else G.float()
    tall = X.size(1) > X.size(2)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)  # the largest singular value is below 1 now
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if tall else X


def orthogonalise_together(G: torch.Tensor, steps: int) -> torch.Tensor:
    """orthogonalise(G), (N, rows, columns): each process does its share of the N, and sends it around."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return orthogonalise(G, steps)
    share = -(-len(G) // dist.get_world_size())  # rounded up: the last ones may have less, or nothing
    first = dist.get_rank() * share
    mine = orthogonalise(G[first:first + share], steps)
    sent = mine.new_zeros(share, *G.shape[1:])
    sent[:len(mine)] = mine
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, sent)
    return torch.cat(parts)[:len(G)]


class Pruning:
    """Sets the smallest weights of each of the blocks' matrices to 0, a share of `sparsity`, half way.

    What is 0 then stays 0, and the other half of the training mends what that did (Han et al. 2015). A saved
    model carries no masks; a resumed run finds them in its weights, which must be there already, and whether
    they have been pruned in its state: its number of steps may have changed since.
    """

    def __init__(self, model, sparsity: float, steps: int):
        self.sparsity, self.at = sparsity, max(1, steps // 2)
        self.weights = [layer.weight for layer in block_matrices(model)] if sparsity else []
        self.masks = [(weight != 0).to(weight.dtype) for weight in self.weights]

    def is_done(self, state) -> bool:
        """From here on models compare: before, they had more weights left."""
        return not self.sparsity or state.pruned

    @torch.no_grad()
    def after(self, state) -> None:
        """What there is to do when state.step updates have been made."""
        if not self.sparsity or not state.pruned and state.step < self.at:
            return
        if not state.pruned:
            smallest = prune.L1Unstructured(self.sparsity)
            self.masks = [smallest.compute_mask(weight, torch.ones_like(weight)) for weight in self.weights]
            state.pruned = True
        torch._foreach_mul_(self.weights, self.masks)


def optimizer_state(optimizers, model) -> dict:
    """Parameter name -> that parameter's state."""
    states = {p: state for optimizer in optimizers for p, state in optimizer.state.items() if state}
    return {name: dict(states[p]) for name, p in model.named_parameters() if p in states}


def load_optimizer_state(optimizers, model, saved: dict) -> None:
    """What optimizer_state found. Raises ValueError, naming the parameter, if it is not of this model."""
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = saved.get(names[p], {})
                fresh = optimizer.state.get(p, {})
                if group.get("fused") and state:  # torch's makes them in its first step
                    fresh = {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}
                if fresh:
                    check_state(names[p], state, fresh)
                optimizer.state[p] = {key: on_device(value, p.device) for key, value in state.items()}


def check_state(name: str, state: dict, fresh: dict) -> None:
    """Kernels trust the shape of what they are given: another one corrupts the memory."""
    if state.keys() != fresh.keys():
        raise ValueError(f"{name}: the optimizer's state has {', '.join(state) or 'nothing'}, wanted "
                         f"{', '.join(fresh)}")
    for key, like in fresh.items():
        value = state[key]
        if (value.shape, value.dtype) != (like.shape, like.dtype):
            raise ValueError(f"{name}: the optimizer's {key} is {tuple(value.shape)} {value.dtype}, wanted "
                             f"{tuple(like.shape)} {like.dtype}")


def on_device(value, device):
    return value.to(device).contiguous() if torch.is_tensor(value) else value  # which kernels rely on
