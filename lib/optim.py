"""
Optimizers and what goes with them: AdamW from torch, Muon, LARS, SGD; schedules, pruning, a look for NaN.

    optimizers = make_optimizers(model, "muon", 3e-3, muon_lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))
"""
import math

import torch
import torch.distributed as dist
from torch.nn.utils import prune

from config import UserError


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
    few large ones, and the stack is dealt out to all processes. The momentum itself warms up, from 0.85 to
    `momentum` over 300 steps. Decay is decoupled.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, steps=5):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps))
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
            for (rows, columns), params in shapes.items():
                steps, buffers = ([self.state[p][key] for p in params] for key in ("step", "momentum"))
                warm = (steps[0] / 300).clamp(max=1)
                mu = (1 - warm) * 0.85 + warm * group["momentum"]
                grads = torch.where(ok, torch.stack([p.grad for p in params]), 0)
                momentum = torch.stack(buffers).lerp_(grads, (1 - mu) * ok)
                update = orthogonalise_together(grads.lerp(momentum, mu), group["steps"])  # Nesterov's
                # a tall matrix's orthogonal step moves its outputs less, by this factor
                update = update.to(grads.dtype) * (max(1.0, rows / columns) ** 0.5 * group["lr"] * ok)
                torch._foreach_copy_(buffers, list(momentum))
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * ok)
                torch._foreach_sub_(params, list(update))
                torch._foreach_add_(steps, ok.float())


class Momentum(torch.optim.Optimizer):
    """SGD with momentum; with `trust`, LARS (You et al. 2017).

    LARS gives each tensor a step of its own size: lr * trust times its length, whatever the gradient's. Its
    decay is part of the gradient, as in the paper; that of SGD is decoupled.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=None):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"momentum": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self):
        ok = may_move(self)
        for group in self.param_groups:
            lr, decay, trust = group["lr"], group["weight_decay"], group["trust"]
            for p in (p for p in group["params"] if p.grad is not None):
                grad, momentum = torch.where(ok, p.grad, 0), self.state[p]["momentum"]
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


def make_optimizers(model, optimizer, learning_rate, muon_lr, weight_decay, betas, momentum=0.9,
                    embd_lr=None) -> list:
    """adamw, sgd or lars for all parameters; or muon for the matrices of the blocks, and AdamW for the rest.

    Only matrices decay. momentum: of sgd and lars. embd_lr: of the embedding, where it has its own.
    """
    params = dict(model.named_parameters())
    in_muon = [name for name, p in params.items()
               if optimizer == "muon" and p.ndim == 2 and "blocks." in name]
    rest = [name for name in params if name not in in_muon]
    apart = [name for name in rest if name.endswith(("wte.weight", "wge.weight")) and embd_lr is not None]
    matrices = [params[name] for name in rest if params[name].ndim == 2 and name not in apart]
    vectors = [params[name] for name in rest if params[name].ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0},
              {"params": [params[name] for name in apart], "weight_decay": weight_decay, "lr": embd_lr}]
    groups = [group for group in groups if group["params"]]
    if optimizer in ("sgd", "lars"):
        made = [Momentum(groups, learning_rate, momentum, trust=0.001 if optimizer == "lars" else None)]
    else:
        made = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
    if in_muon:
        made.append(Muon([params[name] for name in in_muon], lr=muon_lr, weight_decay=weight_decay))
    for group in (group for one in made for group in one.param_groups):
        group["highest_lr"] = group["lr"]
    return made


def update(model, optimizers, loss, grad_clip, scaler=None) -> torch.Tensor:
    """Clip the gradient and take a step, or none at all where the loss or the gradient is not finite.

    That is decided on the device: nobody waits to read it here, see BadSteps. Takes the gradients
    away, and returns their norm before clipping.
    """
    for one in optimizers if scaler else ():
        scaler.unscale_(one)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    found_inf = 1 - (loss.isfinite() & norm.isfinite()).float()
    for one in optimizers:
        one.found_inf = found_inf  # not GradScaler.step: that waits for the device
        one.step()
        one.zero_grad(set_to_none=True)
    if scaler:
        scaler.update()
    return norm


class BadSteps:
    """Counts the steps that `update` left out, and tells of each.

    What the device has found is looked at every `interval` steps, because each look waits for it. Raises
    UserError after `limit` of them in a row. tell: False in all processes but one.
    """

    def __init__(self, limit: int, interval: int, tell: bool = True):
        self.limit, self.interval, self.tell, self.waiting, self.in_a_row = limit, interval, tell, [], 0

    def add(self, step: int, lr: float, loss: torch.Tensor, norm: torch.Tensor) -> None:
        self.waiting.append((step, lr, torch.stack((loss, norm))))
        if len(self.waiting) < self.interval:
            return
        values = torch.stack([pair for _, _, pair in self.waiting]).tolist()
        for (step, lr, _), (loss, norm) in zip(self.waiting, values, strict=True):
            fine = math.isfinite(loss) and math.isfinite(norm)
            self.in_a_row = 0 if fine else self.in_a_row + 1
            told = f"iter {step}: loss {loss:.4g}, lr {lr:.2e}, norm {norm:.3g}"
            if not fine and self.tell:
                print(f"{told}: not finite, the weights stay as they were", flush=True)
            if self.in_a_row >= self.limit:
                raise UserError(f"{told}: not finite, as are {self.in_a_row} steps in a row: lower "
                                "learning_rate; --init_from=resume goes on from the last checkpoint")
        self.waiting = []


class Pruning:
    """Keeps the smallest weights of each of the blocks' matrices at 0, up to a share of `sparsity`.

    The share grows from a fifth of the training on, ever more slowly (Zhu and Gupta 2017); the last three
    tenths mend what that did. What is 0 stays 0: a saved model carries no masks, and a resumed run finds them
    in its weights, which must be there already.
    """

    def __init__(self, model, sparsity: float, steps: int):
        self.matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks." in name]
        self.sparsity, self.begin, self.end = sparsity, steps // 5, max(1, steps * 7 // 10)
        self.interval = max(1, steps // 100)
        self.masks = [(p != 0).to(p.dtype) for p in self.matrices] if sparsity else []

    def is_done(self, step: int) -> bool:
        """From here on models compare: before, they had more weights left."""
        return not self.sparsity or step >= self.end

    @torch.no_grad()
    def after(self, step: int) -> None:
        """What there is to do when so many updates have been made."""
        if not self.sparsity or step < self.begin:
            return
        if step <= self.end and ((step - self.begin) % self.interval == 0 or step == self.end):
            left = 1 - (step - self.begin) / max(1, self.end - self.begin)
            smallest = prune.L1Unstructured(self.sparsity * (1 - left ** 3))
            self.masks = [smallest.compute_mask(p, torch.ones_like(p)) for p in self.matrices]
        torch._foreach_mul_(self.matrices, self.masks)


def optimizer_state(optimizers, model) -> dict:
    """Parameter name -> that parameter's state."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: dict(state) for one in optimizers for p, state in one.state.items() if state}


def load_optimizer_state(optimizers, model, saved: dict) -> None:
    names = {p: name for name, p in model.named_parameters()}
    for one in optimizers:
        for p in (p for group in one.param_groups for p in group["params"]):
            one.state[p] = {key: value.to(p.device) if torch.is_tensor(value) else value
                            for key, value in saved.get(names[p], {}).items()}
