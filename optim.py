"""
Optimizers and their learning rate: AdamW from torch, Muon, and the schedules.

    optimizers = make_optimizers(model, "muon", 3e-3, muon_lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))
"""
import math

import torch


def lr_factor(it, schedule, warmup_iters, decay_iters, floor, decay_fraction=0.6) -> float:
    """The learning rate of step `it` (0 is the first) as a share of the highest; `floor` is the lowest.

    Rises over the warmup_iters first steps, has reached `floor` at step decay_iters and stays there.
    """
    if it < warmup_iters:
        return (it + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return 1.0
    if it >= decay_iters:
        return floor
    begin = warmup_iters if schedule != "wsd" else max(warmup_iters, decay_iters * (1 - decay_fraction))
    progress = max(0.0, (it - begin) / (decay_iters - begin))  # 0 -> 1 over the decay
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return floor + (1 - floor) * remaining


class Muon(torch.optim.Optimizer):
    """Momentum, whose step is made orthogonal: all directions of a matrix move alike (Jordan et al. 2024).

    Takes matrices only. Those of one shape are stacked, so that a model's worth of small products becomes a
    few large ones. The momentum itself warms up, from 0.85 to `momentum` over 300 steps.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, steps=5):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps))
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": 0, "momentum": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), params in shapes.items():
                states, grads = [self.state[p] for p in params], [p.grad for p in params]
                buffers = [state["momentum"] for state in states]
                warm = min(1.0, states[0]["step"] / 300)
                mu = (1 - warm) * 0.85 + warm * group["momentum"]
                torch._foreach_lerp_(buffers, grads, 1 - mu)
                nesterov = torch._foreach_lerp(grads, buffers, mu)
                update = orthogonalise(torch.stack(nesterov), group["steps"])
                # a tall matrix's orthogonal step moves its outputs less, by this factor
                update *= max(1.0, rows / columns) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(update.to(params[0].dtype)), alpha=-group["lr"])
                for state in states:
                    state["step"] += 1


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


def make_optimizers(model, optimizer, learning_rate, muon_lr, weight_decay, betas) -> list:
    """Muon for the matrices of the blocks if asked for, AdamW for the rest. Only matrices decay."""
    params = dict(model.named_parameters())
    in_muon = [name for name, p in params.items()
               if optimizer == "muon" and p.ndim == 2 and name.startswith("blocks.")]
    rest = [name for name in params if name not in in_muon]
    matrices = [params[name] for name in rest if params[name].ndim == 2]
    vectors = [params[name] for name in rest if params[name].ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    made = [torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=fused)]
    if in_muon:
        made.append(Muon([params[name] for name in in_muon], lr=muon_lr, weight_decay=weight_decay))
    for group in (group for one in made for group in one.param_groups):
        group["highest_lr"] = group["lr"]
    return made


def optimizer_state(optimizers, model) -> dict:
    """Parameter name -> that parameter's state."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: dict(state) for one in optimizers for p, state in one.state.items()}


def load_optimizer_state(optimizers, model, saved: dict) -> None:
    names = {p: name for name, p in model.named_parameters()}
    for one in optimizers:
        for p in (p for group in one.param_groups for p in group["params"]):
            one.state[p] = {key: value.to(p.device) if torch.is_tensor(value) else value
                            for key, value in saved.get(names[p], {}).items()}
