"""
The Transformer, whole: one class whose settings span eight families, from the 2017 original to Qwen 3.

    idx -> token embedding + positions -> n_layer x Block -> norm -> head -> logits

    Block, pre-norm                        Block, post-norm (2017)
    x ──┬─ norm ─ attention ─(+)──┐        x ──┬─ attention ─(+)─ norm ──┐
        └──────────────────────┘  │            └────────────────┘        │
      ┌───────────────────────────┘          ┌───────────────────────────┘
      └─┬─ norm ─ MLP ───────(+)── x         └─┬─ MLP ───────(+)─ norm ── x
        └─────────────────────┘                └──────────────┘

Axes: B batch, T time (tokens of the input), S tokens attended to (cached ones and the input), C n_embd,
H n_head, K n_kv_head, D head_dim (C / H unless said), V vocab_size.

            GPT-2       Llama 3    Qwen 2, 3            NanoChat            BERT, RoBERTa    2017
pos         learned     rope       rope                 rope                learned, and     sinusoidal,
                                                                            segments         x sqrt(C)
norm        layer, pre  rms, pre   rms, pre             rms without gain,   layer, post,     layer, post
                                                        pre, and after the  and after the
                                                        embedding           embedding
act         gelu_tanh   swiglu     swiglu               relu2               gelu             relu
bias        yes         no         2: of q, k and v     no                  yes              yes
attention   plain       grouped    grouped; 3: q and k  grouped, q and k    plain            plain
                                   normed before rope   normed after rope
head        tied        either     either               untied, soft cap    tied, transform  untied
causal      yes         yes        yes                  yes                 no               either

A family is a column of settings: no name is tested below. Config is read where modules are built, so that
forward is straight. lib/pretrained.py says what each column is called in Hugging Face's checkpoints.
"""
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Optional

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
    head_dim: Optional[int] = None  # width of a head; None: n_embd / n_head
    n_embd: int = 768  # width of the residual stream
    n_inner: Optional[int] = None  # width inside the MLP; None: 4 * n_embd
    dropout: float = 0.0  # share of activations dropped while training; 0.1 and up for small data
    bias: bool = False  # biases in Linear and LayerNorm (GPT-2's own weights have them; without is no worse)
    qkv_bias: Optional[bool] = None  # biases of queries, keys and values (Qwen 2); None: as bias
    causal: bool = True  # True: a position sees the past; False: both sides
    pos: Literal["learned", "rope", "sinusoidal"] = "learned"  # how positions are told apart
    pos_offset: int = 0  # rows of the learned positions before the first in use (2 in RoBERTa)
    n_segment: int = 0  # kinds of token, each with a learned vector, as BERT's first and second text; 0: none
    n_gram: int = 1  # runs of up to so many tokens have learned vectors of their own; 1: single tokens alone
    n_gram_rows: int = 16384  # vectors for the runs of each length: many runs may share one
    rope_theta: float = 10000.0  # longest wavelength of the rotary positions, over 2 pi
    rope_scaling: Optional[dict] = None  # how Llama 3 stretches the longest wavelengths: see wave_angles
    norm: Literal["layer", "rms"] = "layer"  # rms: no mean subtracted
    norm_weight: bool = True  # a learned gain in each norm
    norm_eps: float = 1e-5  # added to the variance
    norm_place: Literal["pre", "post"] = "pre"  # pre: x + f(norm(x)); post, 2017: norm(x + f(x))
    norm_embd: bool = False  # one more norm, after the embedding
    act: Literal["gelu_tanh", "gelu", "relu", "relu2", "swiglu"] = "gelu_tanh"  # inside the MLP
    qk_norm: Optional[Literal["before", "after"]] = None  # norm q and k: before rope, with a gain; or after
    head: Literal["linear", "mlm", "none"] = "linear"  # mlm: dense, act, norm before it; none: an encoder
    tied: bool = True  # the head's weight is the embedding's
    head_bias: bool = False  # a bias for each token in the head
    softcap: Optional[float] = None  # logits are bounded smoothly to +- this; None: they are not
    init: Literal["normal", "zero_out", "uniform"] = "normal"  # first weights: see init_weights

    def __post_init__(self):
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd
        if self.qkv_bias is None:
            self.qkv_bias = self.bias
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner",
                     "n_gram", "n_gram_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("pos_offset", "n_segment", "norm_eps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0")
        for name, allowed in (("pos", POSITIONS), ("norm", NORMS), ("act", ACTIVATIONS), ("init", INITS),
                              ("norm_place", ("pre", "post")), ("qk_norm", (None, "before", "after")),
                              ("head", HEADS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of "
                                 f"{', '.join(map(str, allowed))}")
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd={self.n_embd}: must be a multiple of n_head={self.n_head}")
            self.head_dim = self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head={self.n_kv_head}: must divide n_head={self.n_head}")
        if self.pos == "rope" and (self.head_dim % 2 or self.head_dim < 2):
            raise ValueError(f"head_dim={self.head_dim}: must be even for pos='rope'")
        if self.pos == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"n_embd={self.n_embd}: must be even for pos='sinusoidal'")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta={self.rope_theta}: must be above 0")
        if self.rope_scaling is not None and not set(LLAMA3) <= set(self.rope_scaling):
            raise ValueError(f"rope_scaling={self.rope_scaling}: must have {', '.join(LLAMA3)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap={self.softcap}: must be above 0, or None")


# -----------------------------------------------------------------------------
# Leaves: norms, activations, positions

NORMS = {
    "layer": lambda c: nn.LayerNorm(c.n_embd, eps=c.norm_eps, elementwise_affine=c.norm_weight, bias=c.bias),
    "rms": lambda c: nn.RMSNorm(c.n_embd, eps=c.norm_eps, elementwise_affine=c.norm_weight),
}

ACTIVATIONS = {  # what it is -> the function, and whether its output gates a second projection
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), False),  # GPT-2's approximation
    "gelu": (F.gelu, False),
    "relu": (F.relu, False),
    "relu2": (lambda x: F.relu(x).square(), False),  # So et al. 2021
    "swiglu": (F.silu, True),  # Shazeer 2020
}


class Learned(nn.Module):
    """A vector a position, added to the token's."""

    def __init__(self, config: Config):
        super().__init__()
        self.offset = config.pos_offset
        self.wpe = nn.Embedding(self.offset + config.block_size, config.n_embd)

    def forward(self, x, positions):  # (B, T, C), (B or 1, T) -> (B, T, C)
        return x + self.wpe(positions + self.offset)


class Sinusoidal(nn.Module):
    """Sines and cosines of many wavelengths, added to the scaled embedding (Vaswani et al. 2017)."""

    def __init__(self, config: Config):
        super().__init__()
        self.scale = math.sqrt(config.n_embd)
        self.register_buffer("frequencies", frequencies(config.n_embd, 10000.0), persistent=False)

    def forward(self, x, positions):
        angles = positions.unsqueeze(-1) * self.frequencies  # (B or 1, T, C / 2)
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)  # sine and cosine interleaved
        return x * self.scale + waves.to(x.dtype)


class NGrams(nn.Embedding):
    """A vector for each run of 2, 3 ... n_gram tokens that ends here, added to the token's own.

    A small model spends its first layers on learning which tokens stand next to each other; here it looks it
    up. Runs are hashed into n_gram_rows vectors a length, as in BLT (Pagnoni et al. 2024).
    """

    def __init__(self, config: Config):
        super().__init__((config.n_gram - 1) * config.n_gram_rows, config.n_embd)
        self.n_gram, self.rows = config.n_gram, config.n_gram_rows

    def forward(self, tokens, slots):  # (B, S) tokens + 1, 0 for none; (T,) of these S -> (B, T, C)
        run, x = tokens[:, slots], 0
        for n in range(1, self.n_gram):  # each run is the one before and a token further back
            earlier = tokens[:, (slots - n).clamp(min=0)] * (slots >= n)
            run = run * 0x9E3779B1 + earlier  # int64, which wraps around
            x = x + super().forward((run ^ run >> 29) % self.rows + (n - 1) * self.rows)
        return x


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
        waves = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.register_buffer("frequencies", waves, persistent=False)

    def forward(self, positions, dtype):  # (B or 1, T) -> two of (B or 1, 1, T, D)
        angles = (positions.unsqueeze(-1) * self.frequencies).unsqueeze(1)  # (B or 1, 1, T, D / 2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def frequencies(size: int, theta: float, scaling: Optional[dict] = None) -> torch.Tensor:
    """theta^(-2i / size): the angle by which pair i turns from one position to the next, (size / 2,).

    scaling, for a context longer than the first training's (Llama 3.1, as in transformers): a pair that turns
    fewer than low_freq_factor times over the original context turns `factor` times slower, one that turns
    more than high_freq_factor times keeps its angle, those between are mixed.
    """
    angles = theta ** (-torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)
    if scaling is None:
        return angles
    factor, low, high, context = (scaling[key] for key in LLAMA3)
    keep = ((context * angles / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return angles * (keep + (1 - keep) / factor)


def rotate(x, cos, sin):  # (B, H, T, D); the sign of the swapped half sits in sin
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


# pos -> what is done to the embedding, and whether the attention rotates
POSITIONS = {"learned": (Learned, False), "sinusoidal": (Sinusoidal, False), "rope": (NoPosition, True)}


# -----------------------------------------------------------------------------
# The two layers of a block

class KVCache:
    """Keys and values of one layer, for the tokens already seen: slots, filled from the left."""

    def __init__(self, config: Config, batch_size: int, slots: int, like: torch.Tensor):
        shape = (batch_size, config.n_kv_head, slots, config.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.tokens = torch.zeros(batch_size, slots, dtype=torch.long, device=like.device)  # for NGrams

    def put(self, k, v, slots, end):  # (B, K, T, D) into slots (T,) -> those before `end`, (B, K, S, D)
        return self.k.index_copy_(2, slots, k)[:, :, :end], self.v.index_copy_(2, slots, v)[:, :, :end]


class Where(NamedTuple):
    """The tokens' places, as the layers need them."""
    rope: Optional[tuple[torch.Tensor, torch.Tensor]]  # cosines and sines, (B or 1, 1, T, D) each
    mask: dict  # who sees whom: arguments of scaled_dot_product_attention
    slots: torch.Tensor  # (T,) of the cache
    end: int  # slots looked at, S


class Attention(nn.Module):
    """Each position looks at others, and takes a mix of their values weighted by softmax(q k / sqrt(D))."""

    def __init__(self, config: Config):
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.q = nn.Linear(C, config.n_head * D, bias=config.qkv_bias)
        self.k = nn.Linear(C, config.n_kv_head * D, bias=config.qkv_bias)
        self.v = nn.Linear(C, config.n_kv_head * D, bias=config.qkv_bias)
        self.o = nn.Linear(config.n_head * D, C, bias=config.bias)
        self.norm_q = self.norm_k = self.norm_turned = nn.Identity()
        if config.qk_norm == "before":
            self.norm_q, self.norm_k = (nn.RMSNorm(D, eps=config.norm_eps) for _ in "qk")
        elif config.qk_norm == "after":
            self.norm_turned = nn.RMSNorm(D, eps=config.norm_eps, elementwise_affine=False)
        self.head_dim, self.grouped, self.dropout = D, config.n_kv_head < config.n_head, config.dropout

    def forward(self, x, where: Where, cache: Optional[KVCache]):
        B, T, _ = x.shape
        # (B, T, C) -> (B, T, heads * D) -> (B, heads, T, D), where heads is H for q, K for k and v
        q, k, v = (layer(x).view(B, T, -1, self.head_dim).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))
        q, k = self.norm_q(q), self.norm_k(k)
        if where.rope is not None:
            q, k = rotate(q, *where.rope), rotate(k, *where.rope)
        q, k = self.norm_turned(q), self.norm_turned(k)
        if cache is not None:
            k, v = cache.put(k, v, where.slots, where.end)  # (B, K, T, D) -> (B, K, S, D)
        # softmax(q k / sqrt(D)) v by the fastest kernel there is, flash attention for one: (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, **where.mask, enable_gqa=self.grouped,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))  # heads side by side again, then mixed: (B, T, C)


class MLP(nn.Module):
    """Each position by itself: out to n_inner, a nonlinearity, and back."""

    def __init__(self, config: Config):
        super().__init__()
        self.act, gated = ACTIVATIONS[config.act]
        self.gate = nn.Linear(config.n_embd, config.n_inner, bias=config.bias) if gated else None
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.down(self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.norm1, self.attn = NORMS[config.norm](config), Attention(config)
        self.norm2, self.mlp = NORMS[config.norm](config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.post = config.norm_place == "post"

    def forward(self, x, where, cache):
        if self.post:
            x = self.norm1(x + self.dropout(self.attn(x, where, cache)))
            return self.norm2(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(self.attn(self.norm1(x), where, cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


class MLMHead(nn.Linear):
    """BERT's: a dense layer, activation and norm, before the scores of the tokens."""

    def __init__(self, config: Config):
        super().__init__(config.n_embd, config.vocab_size, bias=config.head_bias)
        self.dense = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.act, self.norm = ACTIVATIONS[config.act][0], NORMS[config.norm](config)

    def forward(self, x):
        return super().forward(self.norm(self.act(self.dense(x))))


HEADS = {
    "linear": lambda c: nn.Linear(c.n_embd, c.vocab_size, bias=c.head_bias),
    "mlm": MLMHead,
    "none": lambda c: None,
}


# -----------------------------------------------------------------------------
# The model

class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        embed_positions, rotary = POSITIONS[config.pos]
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wse = nn.Embedding(config.n_segment, config.n_embd) if config.n_segment else None
        self.wge = NGrams(config) if config.n_gram > 1 else None
        self.positions = embed_positions(config)
        self.rope = Rope(config) if rotary else None
        self.norm_embd = NORMS[config.norm](config) if config.norm_embd else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # blocks of the post-norm kind end in a norm already
        self.norm_f = NORMS[config.norm](config) if config.norm_place == "pre" else nn.Identity()
        self.head = HEADS[config.head](config)
        self.tie()
        self.init_weights()

    def tie(self):
        if self.config.tied and self.head is not None:
            self.head.weight = self.wte.weight

    @torch.no_grad()
    def init_weights(self):
        """First weights; biases are 0 and gains 1.

                        normal (GPT-2)             zero_out (NanoChat)      uniform (2017, torch's example)
            wte         normal 0.02                normal 1                 +-0.1
            wpe wse     normal 0.02                normal 0.02              normal 0.02
            wge         0                          0                        0
            q k v       normal 0.02                +-sqrt(3 / n_embd)       Xavier, the three as one
            up gate     normal 0.02                +-sqrt(3 / n_embd)       torch's own
            o down      normal 0.02 / sqrt(2 L)    0: a block changes       torch's own
                        (L layers add up)          nothing at first
            head        normal 0.02                0: all tokens alike      +-0.1
        """
        INITS[self.config.init](self)
        for name, p in self.named_parameters():
            if name.endswith("bias") or name == "wge.weight":
                nn.init.zeros_(p)

    def hidden(self, idx, pad_mask=None, segments=None, cache=None, past=0):
        """What heads are built on: (B, T) token ids -> (B, T, C), after the last norm.

        pad_mask: (B, S), True at real tokens; real positions count from 0 and never see padding.
        segments: (B, T), the kind of each token where the model knows kinds (n_segment); None: all are 0.
        cache: a list of KVCache, one a layer, that holds `past` tokens; idx continues them. With past a
        tensor, (1,), all shapes stay the same from step to step, as a compiled step needs it: all slots are
        looked at, and pad_mask, if any, covers them all.
        Raises ValueError where the context is longer than block_size.
        """
        T = idx.size(1)
        end = past + T if isinstance(past, int) else cache[0].k.size(2)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens exceed block_size={self.config.block_size}")
        slots = past + torch.arange(T, device=idx.device)  # (T,)
        if pad_mask is None:
            positions = slots.unsqueeze(0)  # (1, T)
        else:
            positions = (pad_mask.cumsum(1) - 1).clamp(min=0)[:, slots]  # (B, T)
        x = self.wte(idx)  # (B, T, C)
        if self.wge is not None:
            tokens = idx + 1 if pad_mask is None else (idx + 1) * pad_mask[:, slots]  # 0: no token
            x = x + self.wge(cache[0].tokens.index_copy_(1, slots, tokens) if cache else tokens, slots)
        x = self.positions(x, positions)
        if self.wse is not None:
            x = x + self.wse(torch.zeros_like(idx) if segments is None else segments)
        x = self.dropout(self.norm_embd(x))
        rope = self.rope(positions, x.dtype) if self.rope is not None else None
        where = Where(rope, attention_mask(past, slots, end, self.config.causal, pad_mask), slots, end)
        for i, block in enumerate(self.blocks):
            x = block(x, where, cache[i] if cache else None)
        return self.norm_f(x)

    def logits(self, x):
        """The head: (..., C) -> (..., V), in float32. Raises ValueError for a model without one."""
        if self.head is None:
            raise ValueError("head='none': an encoder scores no tokens; its vectors are model.hidden(idx)")
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
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None,
               repetition_penalty=1.0, pad_mask=None, generator=None, use_cache=True,
               compile=False) -> Iterator[torch.Tensor]:
        """Continue the prompts, (B, T): yields (B,) token ids, one step at a time, without end of their own.

        temperature, top_k, top_p, min_p: see `draw`. repetition_penalty: above 1, tokens of the text so far
        get lower scores (Keskar et al. 2019). pad_mask: (B, T), True at real tokens: prompts of several
        lengths are padded on the left. generator: a torch.Generator on idx's device, for repeatable draws.
        Past block_size, the last block_size // 2 tokens are kept and read again. The same tokens come with
        the cache and without. compile: the step for one more token, for GPUs: half a minute at the start,
        then no time is lost between its many small kernels (CUDA graphs).
        Raises ValueError for an empty prompt or a model that is not causal.
        """
        if not self.config.causal:
            raise ValueError("causal=False: a masked model fills gaps, it does not continue text")
        if idx.size(1) == 0:
            raise ValueError("empty prompt: it needs at least one token, <|endoftext|> for instance")
        block_size = self.config.block_size
        # slots of the cache; in steps of 256, so that a compiled step serves many lengths
        room = min(block_size, (idx.size(1) + max_new_tokens + 255) // 256 * 256)
        step = torch.compile(self.hidden, mode="reduce-overhead", dynamic=False) if compile else self.hidden
        training = self.training
        self.eval()  # no dropout
        if not training and idx.device.type == "cpu" and len(idx) == 1:
            lay_by_columns(self)
        try:
            past = 0  # tokens in the cache
            for _ in range(max_new_tokens):
                if idx.size(1) > block_size:
                    keep, past = max(1, block_size // 2), 0
                    idx, pad_mask = idx[:, -keep:], pad_mask[:, -keep:] if pad_mask is not None else None
                if past == 0:  # read the prompt, or without a cache all of the text again
                    cache = None
                    if use_cache:
                        cache = [KVCache(self.config, len(idx), room, self.wte.weight) for _ in self.blocks]
                    if cache and compile:  # CUDA graphs may write to these: they stay where they are
                        for tensor in (tensor for one in cache for tensor in (one.k, one.v, one.tokens)):
                            torch._dynamo.mark_static_address(tensor, guard=False)
                    x = self.hidden(idx, pad_mask, cache=cache)  # (B, T, C)
                elif not compile:
                    x = self.hidden(idx[:, -1:], pad_mask, cache=cache, past=past)  # (B, 1, C)
                else:
                    mask = F.pad(pad_mask, (0, room - past - 1), value=True) if pad_mask is not None else None
                    x = step(idx[:, -1:].clone(), mask, cache=cache, past=torch.tensor([past]).to(idx.device))
                past = idx.size(1) if use_cache else 0
                scores = self.logits(x[:, -1])  # (B, V)
                if repetition_penalty != 1:
                    scores = penalise(scores, idx, pad_mask, repetition_penalty)
                token = draw(scores, temperature, top_k, top_p, min_p, generator)  # (B,)
                yield token
                idx = torch.cat((idx, token.unsqueeze(1)), dim=1)
                pad_mask = F.pad(pad_mask, (0, 1), value=True) if pad_mask is not None else None
        finally:
            self.train(training)

    def generate(self, idx, max_new_tokens, **how):
        """The prompts and what `stream` adds to them: (B, T) -> (B, T + max_new_tokens)."""
        new = [token.unsqueeze(1) for token in self.stream(idx, max_new_tokens, **how)]
        return torch.cat([idx, *new], dim=1)

    # -------------------------------------------------------------------------
    # Checkpoints of others. Their names for things are in lib/pretrained.py, which the rest of this file does
    # without.

    @classmethod
    def from_pretrained(cls, path: str | Path, dropout: float = 0.0, block_size: Optional[int] = None,
                        dtype: torch.dtype = torch.float32) -> "Transformer":
        """A Hugging Face model (a folder, or an id on the hub), or the ckpt.pt of a nanoGPT run.

        block_size: a shorter context than the model's own. Weights are read one at a time, whatever their
        precision, into `dtype`. Raises ValueError naming the setting or weight that does not fit, and
        FileNotFoundError; ImportError where a package is missing.
        """
        from lib.pretrained import grouped_names, open_weights, turned
        family, settings, read = open_weights(path)
        prefix = family.prefix if any(name.startswith(family.prefix) for name in read) else ""
        head = [name for name in family.names.values() if not name.startswith(family.prefix)]
        if not any(name.startswith(tuple(head)) for name in read) and (
                family.fixed.get("head") == "mlm" or not settings.get("tied", True)):
            settings["head"] = "none"  # an encoder: body only
        if block_size is not None:
            if block_size > settings["block_size"]:
                raise ValueError(f"block_size={block_size}: the model was made for {settings['block_size']}")
            settings["block_size"] = block_size
        with torch.device("meta"):  # shapes without memory: the weights come from the files
            model = cls(Config(**{**settings, "dropout": dropout}))
        weights = {}
        for their, ours in grouped_names(model, family, prefix).items():
            if their not in read:
                if ours == ["head.weight"] and model.config.tied:
                    continue
                raise ValueError(f"{path}: has no weight {their}")
            weight = turned(read.pop(their)(), ours[0], family, model.config.head_dim)
            shapes = [model.get_parameter(name).shape for name in ours]
            if "wpe" in ours[0]:
                weight = weight[:shapes[0][0]]  # the context may be cut
            rows = [shape[0] for shape in shapes]
            if weight.shape != (sum(rows), *shapes[0][1:]):
                raise ValueError(f"{path}: {their} has shape {tuple(weight.shape)}, where config.json says "
                                 f"{(sum(rows), *shapes[0][1:])}")
            for name, part in zip(ours, weight.split(rows)):
                weights[name] = torch.empty(part.shape, dtype=dtype).copy_(part)
        extra = [name for name in read if not re.match(family.ignore, name)]
        if extra:
            raise ValueError(f"{path}: weight {extra[0]} has no place in this model")
        model.load_state_dict(weights, assign=True, strict=False)  # each was checked above
        model.tie()
        return model.eval()

    def save_pretrained(self, folder: str | Path, **extra):
        """config.json (and what `extra` adds to it) and model.safetensors, which transformers loads strictly.

        Raises ValueError where no family of transformers has this combination of settings, naming what
        differs; ImportError without safetensors.
        """
        from lib.pretrained import grouped_names, to_hf_config, turned
        try:
            from safetensors.torch import save_file
        except ImportError:
            raise ImportError("this needs safetensors: pip install safetensors") from None
        model = self
        if self.config.pos == "learned" and not self.config.bias:  # GPT-2 has biases: 0 is as good as none
            model = Transformer(Config(**{**asdict(self.config), "bias": True, "qkv_bias": True}))
            model.load_state_dict(self.state_dict(), strict=False)
        family, theirs = to_hf_config(model.config)
        ours, weights = model.state_dict(), {}
        prefix = family.prefix if model.head is not None else ""
        for their, names in grouped_names(model, family, prefix).items():
            if names != ["head.weight"] or not model.config.tied:
                weight = torch.cat([ours[name] for name in names])
                weights[their] = turned(weight, names[0], family, self.config.head_dim).contiguous().cpu()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / "model.safetensors.tmp", metadata={"format": "pt"})
        os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
        theirs |= {"dtype": str(self.wte.weight.dtype).removeprefix("torch."), **extra}
        (folder / "config.json").write_text(json.dumps(theirs, indent=1), encoding="utf-8")

    # -------------------------------------------------------------------------
    # Counting

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Of a training step at full context: 6 for each weight in a matrix product, and 12 L C T for the
        scores and mixes of the attention, causal or not (Chowdhery et al. 2022, appendix B)."""
        matrices = sum(p.numel() for name, p in self.named_parameters()
                       if p.ndim == 2 and not name.startswith(("wte", "wse", "wge", "positions")))  # look-ups
        c = self.config
        if c.tied and self.head is not None:
            matrices += self.wte.weight.numel()
        return 6 * matrices + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size


def attention_mask(past, slots, end: int, causal: bool, pad_mask) -> dict:
    """scaled_dot_product_attention's two mask arguments. A dense mask only where its own flag will not do.

    slots: (T,), where the queries stand among `end` keys; pad_mask: (B, end).
    """
    T = len(slots)
    if pad_mask is None and isinstance(past, int) and (past == 0 or T == 1):  # one new token sees all before
        return {"attn_mask": None, "is_causal": causal and past == 0 and T > 1}
    key, query = torch.arange(end, device=slots.device), slots.unsqueeze(1)  # (S,), (T, 1)
    mask = (key <= query if causal else key >= 0).expand(1, 1, T, end)
    if pad_mask is not None:
        # padding sees itself, for a softmax over nothing would be NaN
        mask = mask & pad_mask[:, None, None, :] | (key == query)
    return {"attn_mask": mask, "is_causal": False}


def lay_by_columns(model: nn.Module):
    """Move the numbers of each tall matrix so that its columns lie together; shapes and values stay.

    One token at a time, a CPU does little but read weights, and its matrix-vector product reads a tall matrix
    up to 1.8 times faster this way.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.weight.size(0) >= layer.weight.size(1):
            if layer.weight.is_contiguous():
                layer.weight.data = layer.weight.data.t().contiguous().t()


def draw(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, generator=None):
    """One token from each row of scores: (B, V) -> (B,).

    temperature: 0 takes the likeliest token, below 1 sharpens, above 1 flattens. Of the probabilities then,
    top_k keeps the k largest, top_p (Holtzman et al. 2020) the largest that together have this much, min_p
    (Nguyen et al. 2024) those of at least this share of the largest.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is None and top_p is None and min_p is None:
        return torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator).squeeze(1)
    V = logits.size(-1)
    best, ids = logits.topk(min(top_k, V) if top_k else V)  # likeliest first
    probs = F.softmax(best / temperature, -1)
    drop = torch.zeros_like(probs, dtype=torch.bool)
    if top_p is not None:
        before = probs.cumsum(-1) - probs  # what the likelier ones have already
        drop |= (before >= top_p) & (before > 0)
    if min_p is not None:
        drop |= probs < min_p * probs[:, :1]
    probs = probs.masked_fill(drop, 0.0)
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator)).squeeze(1)


def penalise(logits, idx, pad_mask, penalty: float):
    """Scores (B, V) of the tokens in idx (B, T) made smaller: divided where positive, else multiplied."""
    if pad_mask is not None:
        idx = torch.where(pad_mask, idx, idx[:, -1:])  # padding is no part of the text
    scores = logits.gather(1, idx)
    return logits.scatter(1, idx, torch.where(scores > 0, scores / penalty, scores * penalty))


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
        elif name.startswith(("positions", "wse")):
            nn.init.normal_(p, std=0.02)
        elif p.ndim == 2:
            nn.init.uniform_(p, -bound, bound)


def init_uniform(model: Transformer):
    bound = math.sqrt(6 / (4 * model.config.n_embd))  # of q, k and v as one matrix of 3 C by C
    for name, p in model.named_parameters():
        if name in ("wte.weight", "head.weight"):
            nn.init.uniform_(p, -0.1, 0.1)
        elif name.startswith(("positions", "wse")):
            nn.init.normal_(p, std=0.02)
        elif name.endswith(("attn.q.weight", "attn.k.weight", "attn.v.weight")):
            nn.init.uniform_(p, -bound, bound)


INITS = {"normal": init_normal, "zero_out": init_zero_out, "uniform": init_uniform}
