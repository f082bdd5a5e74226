"""
The Transformer, whole: one class whose settings span GPT-2, today's small models and the 2017 original.

    idx -> token embedding + positions -> n_layer x Block -> norm -> head -> logits

    Block, pre-norm                        Block, post-norm (2017)
    x ──┬─ norm ─ attention ─(+)──┐        x ──┬─ attention ─(+)─ norm ──┐
        └──────────────────────┘  │            └────────────────┘        │
      ┌───────────────────────────┘          ┌───────────────────────────┘
      └─┬─ norm ─ MLP ───────(+)── x         └─┬─ MLP ───────(+)─ norm ── x
        └─────────────────────┘                └──────────────┘

Axes: B batch, T time (tokens of the input), S tokens attended to (cached ones and the input), C n_embd,
H n_head, K n_kv_head, D head_dim = C / H, V vocab_size.

                GPT-2 (the defaults)    modern = NanoChat                    vanilla, 2017
    pos         learned                 rope                                 sinusoidal, embedding x sqrt(C)
    norm        layer, before           rms without weight, before,          layer, after
                                        and after the embedding
    act         gelu_tanh               relu2                                relu
    attention   plain                   grouped, q and k normed after rope   plain
    head        tied                    untied, logits soft-capped at 15     untied, with bias

A family is a column of settings: no name is tested below. Config is read where modules are built, so that
forward is straight.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, Optional

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class Config:
    """What a model is. Raises ValueError, naming the field, where a value cannot be."""
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # tokens, specials included (GPT-2's 50,257, padded to a multiple of 64)
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_kv_head: Optional[int] = None  # heads of keys and values, each shared by a group of heads; None: n_head
    n_embd: int = 768  # width of the residual stream
    n_inner: Optional[int] = None  # width inside the MLP; None: 4 * n_embd
    dropout: float = 0.0  # share of activations dropped while training; 0.1 and up for small data
    bias: bool = False  # biases in Linear and LayerNorm (GPT-2's own weights have them; without is no worse)
    causal: bool = True  # True: a position sees the past; False: both sides
    pos: Literal["learned", "rope", "sinusoidal"] = "learned"  # how positions are told apart
    rope_theta: float = 10000.0  # longest wavelength of the rotary positions, over 2 pi
    norm: Literal["layer", "rms"] = "layer"  # rms: no mean subtracted
    norm_weight: bool = True  # a learned gain in each norm
    norm_eps: float = 1e-5  # added to the variance
    norm_place: Literal["pre", "post"] = "pre"  # pre: x + f(norm(x)); post, 2017: norm(x + f(x))
    norm_embd: bool = False  # one more norm, after the embedding
    act: Literal["gelu_tanh", "gelu", "relu", "relu2"] = "gelu_tanh"  # inside the MLP; relu2: relu squared
    qk_norm: bool = False  # norm queries and keys, after rope, without a gain: scores stay bounded
    tied: bool = True  # the head's weight is the embedding's
    head_bias: bool = False  # a bias for each token in the head
    softcap: Optional[float] = None  # logits are bounded smoothly to +- this; None: they are not
    init: Literal["normal", "zero_out", "uniform"] = "normal"  # first weights: see init_weights

    def __post_init__(self):
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name, allowed in (("pos", POSITIONS), ("norm", NORMS), ("act", ACTIVATIONS), ("init", INITS),
                              ("norm_place", ("pre", "post"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd}: must be a multiple of n_head={self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head={self.n_kv_head}: must divide n_head={self.n_head}")
        if self.pos != "learned" and self.head_dim % 2:
            raise ValueError(f"n_embd={self.n_embd}: n_embd / n_head must be even for pos={self.pos!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap={self.softcap}: must be above 0, or None")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


# -----------------------------------------------------------------------------
# Leaves: norms, activations, positions

NORMS = {
    "layer": lambda c: nn.LayerNorm(c.n_embd, eps=c.norm_eps, elementwise_affine=c.norm_weight, bias=c.bias),
    "rms": lambda c: nn.RMSNorm(c.n_embd, eps=c.norm_eps, elementwise_affine=c.norm_weight),
}

ACTIVATIONS = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-2's approximation
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021
}


class Learned(nn.Module):
    """A vector a position, added to the token's."""

    def __init__(self, config: Config):
        super().__init__()
        self.wpe = nn.Embedding(config.block_size, config.n_embd)

    def forward(self, x, positions):  # (B, T, C), (B or 1, T) -> (B, T, C)
        return x + self.wpe(positions)


class Sinusoidal(nn.Module):
    """Sines and cosines of many wavelengths, added to the scaled embedding (Vaswani et al. 2017)."""

    def __init__(self, config: Config):
        super().__init__()
        self.scale = math.sqrt(config.n_embd)
        angles = wave_angles(config.block_size, config.n_embd, 10000.0)  # (block_size, C / 2)
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)  # sine and cosine interleaved
        self.register_buffer("table", table, persistent=False)

    def forward(self, x, positions):
        return x * self.scale + self.table[positions]


class NoPosition(nn.Module):
    """Nothing at the embedding: positions enter in the attention."""

    def __init__(self, config: Config):
        super().__init__()

    def forward(self, x, positions):
        return x


class Rope(nn.Module):
    """Rotary positions (Su et al. 2021): each pair of dimensions of a query or key is turned by an angle that
    grows with its position, so that their product depends on the distance alone.

    A pair is dimension i and i + D/2, as in Llama.
    """

    def __init__(self, config: Config):
        super().__init__()
        angles = wave_angles(config.block_size, config.head_dim, config.rope_theta)  # (block_size, D / 2)
        self.register_buffer("cos", torch.cat((angles, angles), dim=-1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((-angles, angles), dim=-1).sin(), persistent=False)

    def forward(self, positions, dtype):  # (B or 1, T) -> two of (B or 1, 1, T, D)
        return self.cos[positions].unsqueeze(1).to(dtype), self.sin[positions].unsqueeze(1).to(dtype)


def wave_angles(n_positions: int, size: int, theta: float) -> torch.Tensor:
    """position / theta^(2i / size), (n_positions, size / 2): wavelengths in a geometric series."""
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    return torch.outer(torch.arange(n_positions, dtype=torch.float32), frequencies)


def rotate(x, cos, sin):  # (B, H, T, D); the sign of the swapped half sits in sin
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


# pos -> what is done to the embedding, and whether the attention rotates
POSITIONS = {"learned": (Learned, False), "sinusoidal": (Sinusoidal, False), "rope": (NoPosition, True)}


# -----------------------------------------------------------------------------
# The two layers of a block

class KVCache:
    """Keys and values of one layer, for tokens already seen: room for S_max, filled from the left."""

    def __init__(self, config: Config, batch_size: int, like: torch.Tensor):
        shape = (batch_size, config.n_kv_head, config.block_size, config.head_dim)
        self.k, self.v, self.length = like.new_empty(shape), like.new_empty(shape), 0

    def append(self, k, v):  # (B, K, T, D) -> all so far, (B, K, S, D)
        end = self.length + k.size(2)
        self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class Attention(nn.Module):
    """Each position looks at others, and takes a mix of their values weighted by softmax(q k / sqrt(D))."""

    def __init__(self, config: Config):
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.q = nn.Linear(C, config.n_head * D, bias=config.bias)
        self.k = nn.Linear(C, config.n_kv_head * D, bias=config.bias)
        self.v = nn.Linear(C, config.n_kv_head * D, bias=config.bias)
        self.o = nn.Linear(config.n_head * D, C, bias=config.bias)
        self.qk_norm = nn.Identity()
        if config.qk_norm:
            self.qk_norm = nn.RMSNorm(D, eps=config.norm_eps, elementwise_affine=False)
        self.head_dim, self.grouped, self.dropout = D, config.n_kv_head < config.n_head, config.dropout

    def forward(self, x, rope, mask, cache):
        B, T, _ = x.shape
        # (B, T, C) -> (B, T, heads * D) -> (B, heads, T, D), where heads is H for q, K for k and v
        q, k, v = (layer(x).view(B, T, -1, self.head_dim).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k = self.qk_norm(q), self.qk_norm(k)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, T, D) -> (B, K, S, D)
        # softmax(q k / sqrt(D)) v by the fastest kernel there is, flash attention for one: (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, **mask, dropout_p=self.dropout if self.training else 0.0,
                                           enable_gqa=self.grouped)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))  # heads side by side again, then mixed: (B, T, C)


class MLP(nn.Module):
    """Each position by itself: out to n_inner, a nonlinearity, and back."""

    def __init__(self, config: Config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.act = ACTIVATIONS[config.act]

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.norm1, self.attn = NORMS[config.norm](config), Attention(config)
        self.norm2, self.mlp = NORMS[config.norm](config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.post = config.norm_place == "post"

    def forward(self, x, rope, mask, cache):
        if self.post:
            x = self.norm1(x + self.dropout(self.attn(x, rope, mask, cache)))
            return self.norm2(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(self.attn(self.norm1(x), rope, mask, cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


# -----------------------------------------------------------------------------
# The model

class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        embed_positions, rotary = POSITIONS[config.pos]
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = embed_positions(config)
        self.rope = Rope(config) if rotary else None
        self.norm_embd = NORMS[config.norm](config) if config.norm_embd else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # blocks of the post-norm kind end in a norm already
        self.norm_f = NORMS[config.norm](config) if config.norm_place == "pre" else nn.Identity()
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        if config.tied:
            self.head.weight = self.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """First weights; biases are 0 and gains 1.

                        normal (GPT-2)             zero_out (NanoChat)      uniform (2017, torch's example)
            wte         normal 0.02                normal 1                 +-0.1
            wpe         normal 0.02                normal 0.02              normal 0.02
            q k v       normal 0.02                +-sqrt(3 / n_embd)       Xavier, the three as one
            up          normal 0.02                +-sqrt(3 / n_embd)       torch's own
            o down      normal 0.02 / sqrt(2 L)    0: a block changes       torch's own
                        (L layers add up)          nothing at first
            head        normal 0.02                0: all tokens alike      +-0.1
        """
        INITS[self.config.init](self)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, pad_mask=None, cache=None):
        """What heads are built on: (B, T) token ids -> (B, T, C), after the last norm.

        pad_mask: (B, S), True at real tokens; real positions count from 0 and never see padding.
        cache: a list of KVCache, one a layer; idx then continues what they hold.
        Raises ValueError where the context is longer than block_size.
        """
        T = idx.size(1)
        past = cache[0].length if cache else 0
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens exceed block_size={self.config.block_size}")
        if pad_mask is None:
            positions = torch.arange(past, past + T, device=idx.device).unsqueeze(0)  # (1, T)
        else:
            positions = (pad_mask.cumsum(1) - 1).clamp(min=0)[:, past:]  # (B, T)
        mask = attention_mask(past, T, self.config.causal, pad_mask, idx.device)

        x = self.positions(self.wte(idx), positions)  # (B, T, C)
        x = self.dropout(self.norm_embd(x))
        rope = self.rope(positions, x.dtype) if self.rope is not None else None
        for i, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache[i] if cache else None)
        return self.norm_f(x)

    def logits(self, x):
        """The head: (..., C) -> (..., V), in float32."""
        logits = self.head(x).float()
        if self.config.softcap is not None:
            logits = self.config.softcap * torch.tanh(logits / self.config.softcap)
        return logits

    def forward(self, idx, targets=None, pad_mask=None):
        """(B, T) token ids -> logits (B, T, V) and the loss.

        The loss is the mean cross-entropy, in nats, over the targets (B, T) that are not -1: 0 where none
        counts, None without targets.
        """
        logits = self.logits(self.hidden(idx, pad_mask))
        if targets is None:
            return logits, None
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
        return logits, total / (targets != -1).sum().clamp(min=1)

    # -------------------------------------------------------------------------
    # Writing text

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, pad_mask=None,
               generator=None, use_cache=True) -> Iterator[torch.Tensor]:
        """Continue the prompts, (B, T): yields (B,) token ids, one step at a time, without end of their own.

        temperature: 0 takes the likeliest token, below 1 sharpens, above 1 flattens. top_k: choose among the
        k likeliest. top_p: among the likeliest that together have this probability. pad_mask: (B, T), True at
        real tokens: prompts of several lengths are padded on the left. generator: a torch.Generator on idx's
        device, for repeatable draws. Past block_size, the last block_size // 2 tokens are kept and read
        again. The same tokens come with the cache and without. Raises ValueError for an empty prompt or a
        model that is not causal.
        """
        if not self.config.causal:
            raise ValueError("causal=False: a masked model fills gaps, it does not continue text")
        if idx.size(1) == 0:
            raise ValueError("empty prompt: it needs at least one token, <|endoftext|> for instance")
        training = self.training
        self.eval()  # no dropout
        try:
            cache, unread = None, idx  # unread: tokens that the cache has not seen
            for _ in range(max_new_tokens):
                if idx.size(1) > self.config.block_size:
                    keep = max(1, self.config.block_size // 2)
                    idx, cache = idx[:, -keep:], None
                    pad_mask = pad_mask[:, -keep:] if pad_mask is not None else None
                if cache is None:
                    unread = idx
                    if use_cache:
                        cache = [KVCache(self.config, len(idx), like=self.wte.weight) for _ in self.blocks]
                x = self.hidden(unread if use_cache else idx, pad_mask, cache)  # (B, T or 1, C)
                token = draw(self.logits(x[:, -1]), temperature, top_k, top_p, generator)  # (B,)
                yield token
                unread = token.unsqueeze(1)
                idx = torch.cat((idx, unread), dim=1)
                if pad_mask is not None:
                    pad_mask = F.pad(pad_mask, (0, 1), value=True)
        finally:
            self.train(training)

    def generate(self, idx, max_new_tokens, **how):
        """The prompts and what `stream` adds to them: (B, T) -> (B, T + max_new_tokens)."""
        new = [token.unsqueeze(1) for token in self.stream(idx, max_new_tokens, **how)]
        return torch.cat([idx, *new], dim=1)

    # -------------------------------------------------------------------------
    # Counting

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Of a training step at full context: 6 for each weight in a matrix product, and 12 L C T for the
        scores and mixes of the attention, causal or not (Chowdhery et al. 2022, appendix B)."""
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.ndim == 2 and "wpe" not in name)
        if not self.config.tied:
            matrices -= self.wte.weight.numel()  # a look-up, no product
        c = self.config
        return 6 * matrices + 12 * c.n_layer * c.n_embd * c.block_size


def attention_mask(past: int, T: int, causal: bool, pad_mask, device) -> dict:
    """scaled_dot_product_attention's two mask arguments. A dense mask only where its own flag will not do."""
    if pad_mask is None and (past == 0 or T == 1):  # one new token sees all that came before
        return {"attn_mask": None, "is_causal": causal and past == 0 and T > 1}
    key = torch.arange(past + T, device=device)  # (S,)
    query = key[past:].unsqueeze(1)  # (T, 1)
    mask = (key <= query if causal else key >= 0).expand(1, 1, T, past + T)
    if pad_mask is not None:
        # padding sees itself, for a softmax over nothing would be NaN
        mask = mask & pad_mask[:, None, None, :] | (key == query)
    return {"attn_mask": mask, "is_causal": False}


def draw(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One token from each row of scores: (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is None and top_p is None:
        return torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator).squeeze(1)
    V = logits.size(-1)
    best, ids = logits.topk(min(top_k, V) if top_k else V)  # likeliest first
    probs = F.softmax(best / temperature, -1)
    if top_p is not None:
        before = probs.cumsum(-1) - probs  # what the likelier ones have already
        probs = probs.masked_fill((before >= top_p) & (before > 0), 0.0)
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator)).squeeze(1)


# -----------------------------------------------------------------------------
# First weights

def init_normal(model: Transformer):
    for name, p in model.named_parameters():
        if p.ndim == 2:
            residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * model.config.n_layer) if residual else 0.02)


def init_zero_out(model: Transformer):
    bound = math.sqrt(3 / model.config.n_embd)  # a uniform of standard deviation 1 / sqrt(n_embd)
    for name, p in model.named_parameters():
        if name.endswith(("attn.o.weight", "mlp.down.weight", "head.weight")):
            nn.init.zeros_(p)
        elif name == "wte.weight":
            nn.init.normal_(p, std=1.0 if not model.config.tied else 0.02)  # a tied head wants small logits
        elif p.ndim == 2:
            nn.init.uniform_(p, -bound, bound)


def init_uniform(model: Transformer):
    bound = math.sqrt(6 / (4 * model.config.n_embd))  # of q, k and v as one matrix of 3 C by C
    for name, p in model.named_parameters():
        if name in ("wte.weight", "head.weight"):
            nn.init.uniform_(p, -0.1, 0.1)
        elif "wpe" in name:
            nn.init.normal_(p, std=0.02)
        elif name.endswith(("attn.q.weight", "attn.k.weight", "attn.v.weight")):
            nn.init.uniform_(p, -bound, bound)


INITS = {"normal": init_normal, "zero_out": init_zero_out, "uniform": init_uniform}
