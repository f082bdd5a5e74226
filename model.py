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
H n_head, K n_kv_head, D head_dim (C / H unless set), V vocab_size.

            GPT-2       Llama 3,   Qwen 2, 3            NanoChat            BERT, RoBERTa,   2017
                        Mistral                                             DistilBERT
pos         learned     rope       rope                 rope                learned, and     sinusoidal,
                                                                            segments         x sqrt(C)
norm        layer, pre  rms, pre   rms, pre             rms without gain,   layer, post,     layer, post
                                                        pre, and after the  and after the
                                                        embedding           embedding
act         gelu_tanh   swiglu     swiglu               relu2               gelu             relu
bias        yes         no         2: of q, k and v     no                  yes              yes
attention   plain       grouped;   grouped; 3: q and k  grouped, q and k    plain            plain
                        M: window  normed before rope   normed after rope
head        tied        either     either               untied, soft cap    tied, transform  untied
causal      yes         yes        yes                  yes                 no               either

A family is a column of settings: nothing below asks which family it is. Config is read where modules are
built, so that forward has few branches. lib/pretrained.py knows what each column is called in Hugging Face's
checkpoints.
"""
from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import torch
import torch.nn as nn
from torch.nn import functional as F

from config import above, at_least, check


@dataclass
class Config:
    """What a model is. Raises ValueError, naming the field, if a value cannot be."""
    block_size: at_least(1) = 1024  # longest context, in tokens
    vocab_size: at_least(1) = 50304  # tokens, specials included (GPT-2's 50,257, padded to a multiple of 64)
    n_layer: at_least(1) = 12  # blocks
    n_head: at_least(1) = 12  # attention heads
    n_kv_head: Optional[at_least(1)] = None  # heads of keys and values, shared by groups; None: n_head
    head_dim: Optional[at_least(1)] = None  # width of a head; None: n_embd / n_head
    n_embd: at_least(1) = 768  # width of the residual stream
    n_inner: Optional[at_least(1)] = None  # width inside the MLP; None: 4 * n_embd
    dropout: at_least(0.0, below=1.0) = 0.0  # share of activations dropped in training; for small data
    bias: bool = False  # biases in Linear and LayerNorm (GPT-2's own weights have them; without is no worse)
    qkv_bias: bool | None = None  # biases of queries, keys and values (Qwen 2); None: as bias
    causal: bool = True  # True: a position sees the past; False: both sides
    pos: Literal[tuple(POSITIONS)] = "learned"  # how positions are told apart
    pos_offset: at_least(0) = 0  # rows of the learned positions before the first in use (2 in RoBERTa)
    n_segment: at_least(0) = 0  # kinds of token with a learned vector each, as BERT's two texts; 0: none
    n_gram: at_least(1) = 1  # n-grams of up to so many tokens have learned vectors; 1: only tokens do
    n_gram_rows: at_least(1) = 16384  # vectors for the n-grams of each length, many of which may share one
    rope_theta: above(0.0) = 10000.0  # longest wavelength of the rotary positions, over 2 pi
    rope_scaling: dict | None = None  # how Llama 3 stretches the longest wavelengths: see Waves
    window: Optional[at_least(1)] = None  # a position sees those less than so many away; None: all
    norm: Literal[tuple(NORMS)] = "layer"  # rms: no mean subtracted
    norm_weight: bool = True  # a learned gain in each norm
    norm_eps: at_least(0.0) = 1e-5  # added to the variance
    norm_place: Literal[tuple(NORM_PLACES)] = "pre"  # pre: x + f(norm(x)); post, 2017: norm(x + f(x))
    norm_embd: bool = False  # one more norm, after the embedding
    act: Literal[tuple(ACTIVATIONS)] = "gelu_tanh"  # inside the MLP
    qk_norm: Literal[tuple(QK_NORMS)] = None  # norm q and k: before rope, with a gain; or after
    head: Literal[tuple(HEADS)] = "linear"  # mlm: dense, act, norm before it; none: an encoder
    tied: bool = True  # the head's weight is the embedding's
    head_bias: bool = False  # a bias for each token in the head
    pooler: Literal[tuple(POOLERS)] = None  # a layer on a text's vector, which fine-tuned encoders have
    softcap: Optional[above(0.0)] = None  # logits are bounded smoothly to +- this; None: they are not
    init: Literal[tuple(INITS)] = "normal"  # first weights: GPT-2's, NanoChat's, those of 2017

    def __post_init__(self):
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd
        if self.qkv_bias is None:
            self.qkv_bias = self.bias
        check(self)
        must(self, "n_kv_head", self.n_head % self.n_kv_head == 0, f"divide n_head={self.n_head}")
        if self.head_dim is None:
            must(self, "n_embd", self.n_embd % self.n_head == 0, f"be a multiple of n_head={self.n_head}")
            self.head_dim = self.n_embd // self.n_head
        if self.pos == "rope":
            must(self, "head_dim", self.head_dim % 2 == 0, "be even for pos='rope'")
        if self.pos == "sinusoidal":
            must(self, "n_embd", self.n_embd % 2 == 0, "be even for pos='sinusoidal'")
        if self.pooler is not None:
            must(self, "pooler", self.head == "none", f"be None if head={self.head!r}")
        if self.rope_scaling is not None:
            must(self, "rope_scaling", set(LLAMA3) <= set(self.rope_scaling), f"have {', '.join(LLAMA3)}")


def must(settings, name: str, holds: bool, what: str):
    if not holds:
        raise ValueError(f"{name}={getattr(settings, name)!r}: must {what}")


# -----------------------------------------------------------------------------
# Leaves: norms, activations; and layers with a type of their own, by which INITS and the optimizers find them

NORMS = {
    "layer": lambda c: nn.LayerNorm(c.n_embd, eps=c.norm_eps, elementwise_affine=c.norm_weight, bias=c.bias),
    "rms": lambda c: nn.RMSNorm(c.n_embd, eps=c.norm_eps, elementwise_affine=c.norm_weight),
}

NORM_PLACES = {  # of the residual stream x, a layer f and its norm
    "pre": lambda x, f, norm: x + f(norm(x)),
    "post": lambda x, f, norm: norm(x + f(x)),  # 2017
}


def relu_squared(x):  # So et al. 2021; a function with a name, for pickle
    return F.relu(x).square()


ACTIVATIONS = {  # what it is -> the function, and whether its output gates a second projection
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), False),  # GPT-2's approximation
    "gelu": (F.gelu, False),
    "relu": (F.relu, False),
    "relu2": (relu_squared, False),
    "swiglu": (F.silu, True),  # Shazeer 2020
}

QK_NORMS = {  # the norm of a query or key before rope, and the one after it, each over head_dim numbers
    None: lambda c: (nn.Identity(), nn.Identity()),
    "before": lambda c: (nn.RMSNorm(c.head_dim, eps=c.norm_eps), nn.Identity()),
    "after": lambda c: (nn.Identity(), nn.RMSNorm(c.head_dim, c.norm_eps, elementwise_affine=False)),
}


class Projection(nn.Linear):
    """Makes queries, keys or values."""


class Residual(nn.Linear):
    """Writes to the residual stream: its output is added to x."""


class TokenEmbedding(nn.Embedding):
    """Looked up by token, so in each step most rows have no gradient."""


class NGrams(TokenEmbedding):
    """A vector for each n-gram of 2, 3 ... n_gram tokens that ends here, added to the token's own.

    A small model spends its first layers on learning which tokens stand next to each other; this looks it up
    instead. For each n, n-grams are hashed into n_gram_rows vectors, as in BLT (Pagnoni et al. 2024).

    tokens: (B, S), ids + 1, with 0 where there is no token; slots: (T,), which of these S are the input.
    """

    def __init__(self, config: Config):
        super().__init__((config.n_gram - 1) * config.n_gram_rows, config.n_embd)
        self.n_gram, self.rows = config.n_gram, config.n_gram_rows

    def forward(self, tokens, slots):  # (B, S) tokens + 1, 0 for none; (T,) of these S -> (B, T, C)
        hashed, x = tokens[:, slots], 0
        for n in range(1, self.n_gram):  # each n-gram is the one before and a token further back
            earlier = tokens[:, (slots - n).clamp(min=0)] * (slots >= n)
            hashed = hashed * 0x9E3779B1 + earlier  # int64, which wraps around
            row = (hashed ^ hashed >> 29) % self.rows
            x = x + super().forward(row + (n - 1) * self.rows)
        return x


# -----------------------------------------------------------------------------
# Positions

class Positions(nn.Module):
    """How positions are told apart: there are three places to do it. Here nothing is done at any of them."""

    def __init__(self, config: Config):
        super().__init__()

    def embed(self, x, positions):
        """Token vectors (B, T, C) at positions (B or 1, T) -> what enters the first block, (B, T, C)."""
        return x

    def rotation(self, positions, dtype):
        """Cosines and sines, (B or 1, 1, T, D) each, by which queries and keys are rotated; or None."""

    def bias(self, query, key):
        """What is added to the scores of queries in slots (T, 1) for keys in slots (S,): (T, S) or (H, T, S),
        -inf for a key that is not seen; or None. Of query - key only, since padding shifts both."""


class Learned(Positions):
    """A learned vector for each position, added to the token's."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.offset = config.pos_offset
        self.wpe = nn.Embedding(self.offset + config.block_size, config.n_embd)

    def embed(self, x, positions):
        return x + self.wpe(positions + self.offset)


class Sinusoidal(Positions):
    """Sines and cosines of many wavelengths, added to the scaled embedding (Vaswani et al. 2017)."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.scale = math.sqrt(config.n_embd)
        self.waves = Waves(config.n_embd, 10000.0)

    def embed(self, x, positions):
        angles = self.waves(positions)  # (B or 1, T, C / 2)
        encoding = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)  # interleaved
        return x * self.scale + encoding.to(x.dtype)


class Rope(Positions):
    """Rotary positions (Su et al. 2021): each pair of dimensions of a query or key is rotated by an angle
    that grows with its position, so that their product depends on the distance alone.

    A pair is dimension i and i + D/2, as in Llama.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.waves = Waves(config.head_dim, config.rope_theta, config.rope_scaling)

    def rotation(self, positions, dtype):
        angles = self.waves(positions).unsqueeze(1)  # (B or 1, 1, T, D / 2)
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.to(dtype), sin.to(dtype)


def rotate(x, cos, sin):  # (B, H, T, D); the sign of the swapped half is in sin
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


POSITIONS = {"learned": Learned, "sinusoidal": Sinusoidal, "rope": Rope}

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Waves(nn.Module):
    """position * theta^(-2i / size): the angles of a position, in float32 whatever the weights are.

    scaling, for a context longer than in the first training (Llama 3.1, as in transformers): a pair that
    turns fewer than low_freq_factor times over the original context turns `factor` times slower, one that
    turns more than high_freq_factor times keeps its angle, those between are mixed.
    """

    def __init__(self, size: int, theta: float, scaling: dict | None = None):
        super().__init__()
        frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)
        if scaling is not None:
            factor, low, high, context = (scaling[key] for key in LLAMA3)
            keep = ((context * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
            frequencies = frequencies * (keep + (1 - keep) / factor)
        self.register_buffer("frequencies", frequencies, persistent=False)  # (size / 2,)

    def _apply(self, fn, recurse=True):
        # .to(device, dtype) comes here: move, but do not cast. Rounded to bfloat16, a frequency is off by up
        # to 0.4%, and after a few hundred positions the angle is arbitrary.
        exact = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = exact.to(self.frequencies.device)
        return self

    def forward(self, positions):  # (...) -> (..., size / 2)
        return positions.unsqueeze(-1) * self.frequencies


# -----------------------------------------------------------------------------
# The two layers of a block

class KVCache:
    """Keys and values of one layer, for the tokens already seen, in slots that are filled from the left."""

    def __init__(self, config: Config, batch_size: int, slots: int, like: torch.Tensor,
                 fixed: bool = False):
        shape = (batch_size, config.n_kv_head, slots, config.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.tokens = torch.zeros(batch_size, slots, dtype=torch.long, device=like.device)  # for NGrams
        for tensor in (self.k, self.v, self.tokens) if fixed else ():  # CUDA graphs look for them there
            torch._dynamo.mark_static_address(tensor, guard=False)

    def put(self, k, v, slots, end: int):  # (B, K, T, D) into slots (T,) -> those before `end`, (B, K, S, D)
        self.k.index_copy_(2, slots, k.to(self.k.dtype))  # under autocast they differ
        self.v.index_copy_(2, slots, v.to(self.v.dtype))
        return self.k[:, :, :end], self.v[:, :, :end]


class Places(NamedTuple):
    """What attention needs to know about where the tokens of the input are."""
    rotation: tuple[torch.Tensor, torch.Tensor] | None  # cosines and sines, (B or 1, 1, T, D) each
    mask: dict  # who sees whom: arguments of scaled_dot_product_attention
    slots: torch.Tensor  # (T,): where the input goes in the cache
    end: int  # S: the slots before it are attended to


class Attention(nn.Module):
    """Each position looks at others, and takes a mix of their values weighted by softmax(q k / sqrt(D))."""

    def __init__(self, config: Config):
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.q = Projection(C, config.n_head * D, bias=config.qkv_bias)
        self.k = Projection(C, config.n_kv_head * D, bias=config.qkv_bias)
        self.v = Projection(C, config.n_kv_head * D, bias=config.qkv_bias)
        self.o = Residual(config.n_head * D, C, bias=config.bias)
        self.norm_q, self.norm_rotated = QK_NORMS[config.qk_norm](config)
        self.norm_k, _ = QK_NORMS[config.qk_norm](config)
        self.head_dim = D
        self.grouped = config.n_kv_head < config.n_head
        self.dropout = config.dropout

    def forward(self, x, places: Places, cache: KVCache | None):
        B, T, _ = x.shape
        q = self.q(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)
        k = self.k(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = self.norm_q(q), self.norm_k(k)
        if places.rotation is not None:
            q, k = rotate(q, *places.rotation), rotate(k, *places.rotation)
        q, k = self.norm_rotated(q), self.norm_rotated(k)
        if cache is not None:
            k, v = cache.put(k, v, places.slots, places.end)  # (B, K, T, D) -> (B, K, S, D)
        # softmax(q k / sqrt(D)) v by the fastest kernel there is, such as flash attention: (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, **places.mask, enable_gqa=self.grouped,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))  # heads side by side again, then mixed: (B, T, C)


class MLP(nn.Module):
    """Each position by itself: out to n_inner, a nonlinearity, and back."""

    def __init__(self, config: Config):
        super().__init__()
        act, gated = ACTIVATIONS[config.act]
        self.act = copy.deepcopy(act)  # one with weights has its own in each layer
        self.gate = nn.Linear(config.n_embd, config.n_inner, bias=config.bias) if gated else None
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.down = Residual(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x):  # (B, T, C) -> (B, T, n_inner) -> (B, T, C)
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.norm1 = NORMS[config.norm](config)
        self.attn = Attention(config)
        self.norm2 = NORMS[config.norm](config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.norm_place = config.norm_place

    def forward(self, x, places, cache):
        add = NORM_PLACES[self.norm_place]
        x = add(x, lambda x: self.dropout(self.attn(x, places, cache)), self.norm1)
        return add(x, lambda x: self.dropout(self.mlp(x)), self.norm2)


def block_matrices(model: nn.Module) -> list[nn.Linear]:
    """The linear layers inside a model's blocks: what Muon orthogonalises, pruning thins and LoRA adds to."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    return [module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)]


# -----------------------------------------------------------------------------
# Heads

class Head(nn.Linear):
    """A score for each token of the vocabulary."""

    def __init__(self, config: Config):
        super().__init__(config.n_embd, config.vocab_size, bias=config.head_bias)


class MLMHead(Head):
    """BERT's: a dense layer, activation and norm, before the scores of the tokens."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.dense = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.act, _ = ACTIVATIONS[config.act]
        self.norm = NORMS[config.norm](config)

    def forward(self, x):
        x = self.norm(self.act(self.dense(x)))
        return super().forward(x)


HEADS = {"linear": Head, "mlm": MLMHead, "none": lambda c: None}


class Pooler(nn.Linear):
    """BERT's: what its files have between a text's vector and the linear layer of a task."""

    def __init__(self, config: Config):
        super().__init__(config.n_embd, config.n_embd)
        self.act = POOLERS[config.pooler]

    def forward(self, x):  # (B, C) -> (B, C)
        return self.act(super().forward(x))


POOLERS = {None: None, "tanh": torch.tanh, "relu": F.relu}


# -----------------------------------------------------------------------------
# First weights: how a layer begins, by the first kind in the table that it is of. Biases begin at 0, gains
# at 1.

def normal(std: float):
    return partial(nn.init.normal_, std=std)


def uniform(bound: float):
    return partial(nn.init.uniform_, a=-bound, b=bound)


def init_normal(c: Config) -> dict:  # GPT-2's
    return {
        Residual: normal(0.02 / math.sqrt(2 * c.n_layer)),  # each block adds two of them to the stream
        (nn.Linear, nn.Embedding): normal(0.02),
    }


def init_zero_out(c: Config) -> dict:  # NanoChat's
    return {
        Residual: nn.init.zeros_,  # a block changes nothing at first
        Head: nn.init.zeros_,  # all tokens are equally likely
        TokenEmbedding: normal(0.02 if c.tied else 1.0),  # a tied head wants small logits
        nn.Embedding: normal(0.02),
        nn.Linear: uniform(math.sqrt(3 / c.n_embd)),  # a standard deviation of 1 / sqrt(n_embd)
    }


def init_uniform(c: Config) -> dict:  # 2017, as in PyTorch's example; PyTorch's defaults for the rest
    return {
        (Head, TokenEmbedding): uniform(0.1),
        nn.Embedding: normal(0.02),
        Projection: uniform(math.sqrt(6 / (4 * c.n_embd))),  # Xavier's, of q, k and v as one matrix
    }


INITS = {"normal": init_normal, "zero_out": init_zero_out, "uniform": init_uniform}


# -----------------------------------------------------------------------------
# The next token

@dataclass
class Sampling:
    """How the next token is drawn. Raises ValueError, naming the field, if a value cannot be."""
    temperature: at_least(0.0) = 1.0  # 0: always the likeliest token; 1: as the model has it; above: wilder
    top_k: Optional[at_least(1)] = None  # choose among so many of the likeliest tokens only; None: all
    top_p: Optional[above(0.0, at_most=1.0)] = None  # among the likeliest with so much together; None: all
    min_p: Optional[at_least(0.0, at_most=1.0)] = None  # among those so likely, against the likeliest
    repetition_penalty: at_least(0.01, at_most=100.0) = 1.0  # above 1: what was said becomes less likely

    def __post_init__(self):
        check(self)


def draw(logits, how: Sampling, idx, pad_mask=None, generator=None):
    """One token from each row of scores, (B, V) -> (B,), that continues the text idx, (B, T).

    generator: one for all rows, a list of one for each, or None: torch's own.
    top_p: Holtzman et al. 2020; min_p: Nguyen et al. 2024; repetition_penalty: Keskar et al. 2019.
    """
    if how.repetition_penalty != 1:
        if pad_mask is not None:
            idx = torch.where(pad_mask, idx, idx[:, -1:])  # padding is no part of the text
        seen = logits.gather(1, idx)  # (B, T)
        seen = torch.where(seen > 0, seen / how.repetition_penalty, seen * how.repetition_penalty)
        logits = logits.scatter(1, idx, seen)
    if how.temperature < 1e-6:  # float32 has nothing between that and 0
        return logits.argmax(-1)
    if how == Sampling(how.temperature, repetition_penalty=how.repetition_penalty):  # nothing to filter
        return pick(F.softmax(logits / how.temperature, -1), generator).squeeze(1)
    V = logits.size(-1)
    best, ids = logits.topk(min(how.top_k or V, V))  # (B, k), likeliest first
    probs = F.softmax(best / how.temperature, -1)
    if how.top_p is not None:  # from here on probs need not add up to 1
        before = probs.cumsum(-1) - probs  # what the likelier ones have already
        probs = probs.masked_fill(before >= how.top_p, 0.0)
    if how.min_p is not None:
        probs = probs.masked_fill(probs < how.min_p * probs.amax(-1, keepdim=True), 0.0)
    return ids.gather(1, pick(probs, generator)).squeeze(1)


def pick(probs, generator=None):
    """A number of each row by its probabilities, which need not add up to 1: (B, k) -> (B, 1)."""
    if not isinstance(generator, list):
        return torch.multinomial(probs, 1, generator=generator)
    rows = zip(probs.split(1), generator, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=its_own) for row, its_own in rows])


def shortened(idx, pad_mask, block_size: int):
    """Texts of more than block_size tokens, cut to their last block_size // 2; the others as they are.

    (B, T) and its pad_mask, if any, with padding on the left; padding does not count. So each row of a batch
    is cut when it would be alone.
    """
    half = max(1, block_size // 2)
    if pad_mask is None:
        return idx[:, -half:], None
    lengths = pad_mask.sum(1)
    lengths = torch.where(lengths > block_size, half, lengths)  # (B,)
    T = int(lengths.max())
    return idx[:, -T:], torch.arange(T, device=idx.device) >= T - lengths.unsqueeze(1)


class Compiled:
    """torch.compile(function); if that fails, the function itself from then on, after a warning."""

    def __init__(self, function, **how):
        self.function, self.how = function, how
        self.faster = None  # when it is called first

    def __call__(self, *args, **given):
        if self.faster is not self.function:
            try:
                self.faster = self.faster or torch.compile(self.function, **self.how)
                return self.faster(*args, **given)
            except Exception as error:  # no C++ compiler, no Triton, a Python that it does not know...
                tell_compile_failed(error)
                self.faster = self.function
        return self.function(*args, **given)


def tell_compile_failed(error: Exception):
    reason = str(error).strip().split("\n")[0][:160]
    print(f"warning: torch.compile failed, going on without it ({type(error).__name__}: {reason})",
          file=sys.stderr)


def lay_by_columns(model: nn.Module):
    """Store each tall weight matrix by columns; shapes and values stay the same.

    Writing one token at a time, a CPU does little but read weights, and its matrix-vector product reads a
    tall matrix up to 1.8 times faster this way.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.out_features >= layer.in_features:
            weight = layer.weight
            if weight.is_contiguous():
                weight.data = weight.data.t().contiguous().t()


def extended(pad_mask, n: int):  # by n real tokens on the right
    return None if pad_mask is None else F.pad(pad_mask, (0, n), value=True)


# -----------------------------------------------------------------------------
# The model

class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.wte = TokenEmbedding(config.vocab_size, config.n_embd)
        self.wse = nn.Embedding(config.n_segment, config.n_embd) if config.n_segment else None
        self.wge = NGrams(config) if config.n_gram > 1 else None
        self.positions = POSITIONS[config.pos](config)
        self.norm_embd = NORMS[config.norm](config) if config.norm_embd else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # blocks of the post-norm kind end in a norm already
        self.norm_f = NORMS[config.norm](config) if config.norm_place != "post" else nn.Identity()
        self.head = HEADS[config.head](config)
        self.pooler = Pooler(config) if config.pooler else None  # hidden() and logits() do not use it
        self.published = {}  # what else its files said, if it was published: see lib/pretrained.py
        self.tie()
        self.init_weights()

    def tie(self):
        if self.config.tied and self.head is not None:
            self.head.weight = self.wte.weight

    @torch.no_grad()
    def init_weights(self):
        """Draw the initial weights, as INITS says."""
        table = INITS[self.config.init](self.config)
        for module in self.modules():
            init = next((init for kind, init in table.items() if isinstance(module, kind)), None)
            if init is not None and not (module is self.head and self.config.tied):
                init(module.weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.wge is not None:  # an n-gram that is hardly ever trained must not add noise
            nn.init.zeros_(self.wge.weight)

    def hidden(self, idx, pad_mask=None, segments=None, cache=None, past=0):
        """The model up to its head: (B, T) token ids -> (B, T, C), after the last norm.

        pad_mask: (B, S), True at real tokens, padding to their left or right; real positions count from 0 and
        never see padding. segments: (B, T), the kind of each token if the model knows kinds (n_segment);
        None: all are 0. cache: a list of KVCache, one a layer, that holds `past` tokens; idx continues them.
        With past a tensor, (1,), all shapes stay the same from step to step, as a compiled step needs it: all
        slots are looked at, and pad_mask, if any, covers them all.
        Raises ValueError if the context is longer than block_size.
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
        x = self.positions.embed(x, positions)
        if self.wse is not None:
            x = x + self.wse(torch.zeros_like(idx) if segments is None else segments)
        x = self.dropout(self.norm_embd(x))
        rotation = self.positions.rotation(positions, x.dtype)
        mask = self.attention_mask(past, slots, end, pad_mask, x.dtype)
        places = Places(rotation, mask, slots, end)
        for i, block in enumerate(self.blocks):
            x = block(x, places, cache[i] if cache else None)
        return self.norm_f(x)

    def bias(self, query, key):
        """What all scores have added, -inf if a query must not see a key; see Positions.bias."""
        bias, window = self.positions.bias(query, key), self.config.window
        if window is None or len(key) <= window:
            return bias
        return torch.where((query - key).abs() < window, 0.0 if bias is None else bias, -math.inf)

    def attention_mask(self, past, slots, end: int, pad_mask, dtype) -> dict:
        """Who sees whom, as scaled_dot_product_attention's two arguments: (B or 1, H or 1, T, S).

        slots: (T,), where the queries are among `end` keys; pad_mask: (B, end). Whatever is added to a score
        or masks it comes together here: in training, with a cache, with padding.
        """
        T, causal = len(slots), self.config.causal
        query = slots.unsqueeze(1)  # (T, 1)
        key = torch.arange(end, device=slots.device)  # (S,)
        bias = self.bias(query, key)
        one_piece = isinstance(past, int) and (past == 0 or T == 1)  # one new token sees all before
        if bias is None and pad_mask is None and one_piece:  # no mask in memory: the kernels know this one
            return {"attn_mask": None, "is_causal": causal and past == 0 and T > 1}
        mask = (key <= query if causal else key >= 0).expand(1, 1, T, end)  # key >= 0: always true
        if pad_mask is not None:
            # padding sees itself, for a softmax over nothing would be NaN
            mask = mask & pad_mask[:, None, None, :] | (key == query)
        if bias is not None:
            mask = torch.where(mask, bias, -math.inf).to(dtype)
        return {"attn_mask": mask, "is_causal": False}

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

        The loss is the mean cross-entropy, in nats, over the targets (B, T) that are not -1: 0 if none
        counts, None without targets.
        """
        logits = self.logits(self.hidden(idx, pad_mask))
        if targets is None:
            return logits, None
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
        return logits, total / (targets != -1).sum().clamp(min=1)

    def penalty(self):
        """What training adds to the loss of the forward pass just made: a number, or a 0-d tensor."""
        return 0.0

    # -------------------------------------------------------------------------
    # Writing text

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, pad_mask=None, generator=None, use_cache=True, compile=False,
               **sampling) -> Iterator[torch.Tensor]:
        """Continue the prompts, (B, T): yields max_new_tokens times (B,) token ids, past <|endoftext|> too.

        pad_mask: (B, T), True at real tokens: prompts of several lengths are padded on the left. generator: a
        torch.Generator on idx's device, for repeatable draws, or a list with one for each row. sampling: see
        Sampling.
        Past block_size, the last block_size // 2 tokens of a text are kept and read again. The same tokens
        come with the cache and without, and for a row of a batch as for it alone. compile: torch.compile the
        step for one token, for GPUs: half a minute at the start, then no time is lost between its many small
        kernels (CUDA graphs).
        Raises ValueError for an empty prompt, a model that is not causal, or scores that are not finite.
        """
        if not self.config.causal:
            raise ValueError("causal=False: a masked model fills gaps, it does not continue text")
        if idx.size(1) == 0:
            raise ValueError("empty prompt: it needs at least one token, <|endoftext|> for instance")
        if pad_mask is not None and not pad_mask[:, -1].all():
            raise ValueError("pad_mask: a prompt ends in padding, which belongs to its left, or has no token")
        how = Sampling(**sampling)
        block_size = self.config.block_size
        # slots of the cache; in steps of 256, so that a compiled step serves many lengths
        room = min(block_size, (idx.size(1) + max_new_tokens + 255) // 256 * 256)
        step = Compiled(self.hidden, mode="reduce-overhead", dynamic=False)
        training = self.training
        self.eval()  # no dropout
        if not training and idx.device.type == "cpu" and len(idx) == 1:  # not while it trains
            lay_by_columns(self)
        try:
            past, cache = 0, None  # tokens in the cache
            text, text_mask = idx, pad_mask  # all of it, also what has left the context
            for _ in range(max_new_tokens):
                if idx.size(1) > block_size:
                    past = 0
                    idx, pad_mask = shortened(idx, pad_mask, block_size)
                if past == 0 and use_cache:
                    cache = [KVCache(self.config, len(idx), room, self.wte.weight, fixed=compile)
                             for _ in self.blocks]
                if past > 0 and compile:
                    mask = extended(pad_mask, room - past - 1)
                    here = torch.tensor([past]).to(idx.device)
                    # strides that do not grow with the text: one graph serves all steps
                    last = idx[:, past:].clone(memory_format=torch.contiguous_format)
                    x = step(last, mask, cache=cache, past=here)  # (B, 1, C)
                else:  # the prompt, then one more token; without a cache all of the text, again and again
                    x = self.hidden(idx[:, past:], pad_mask, cache=cache, past=past)  # (B, T, C)
                logits = self.logits(x[:, -1])  # (B, V)
                # a GPU is asked at the beginning only: an answer is waited for
                if (past == 0 or idx.device.type == "cpu") and not logits.amax(-1).isfinite().all():
                    raise ValueError("the scores are not finite: damaged weights, or too large for this "
                                     "dtype")
                past = idx.size(1) if use_cache else 0
                token = draw(logits, how, text, text_mask, generator)  # (B,)
                yield token
                if how.repetition_penalty != 1:
                    text = torch.cat((text, token.unsqueeze(1)), dim=1)
                    text_mask = extended(text_mask, 1)
                idx = torch.cat((idx, token.unsqueeze(1)), dim=1)
                pad_mask = extended(pad_mask, 1)
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
        """Of a training step at full context: 6 for each weight in a matrix product, and 12 for each
        dimension of a head and each key, causal or not (Chowdhery et al. 2022, appendix B)."""
        matrices = sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))
        c = self.config
        key = torch.arange(c.block_size, device=self.wte.weight.device)
        most = -1 if c.causal else c.block_size // 2  # the token that sees most
        bias = self.bias(key[most], key)
        keys = c.block_size if bias is None else int((bias > -math.inf).sum(-1).max())
        return 6 * matrices + 12 * c.n_layer * c.n_head * c.head_dim * keys

    # -------------------------------------------------------------------------
    # Checkpoints from elsewhere: lib/pretrained.py, which nothing above needs

    @classmethod
    def from_pretrained(cls, path: str | Path, dropout: float = 0.0, block_size: int | None = None,
                        dtype: torch.dtype = torch.float32) -> Transformer:
        """A Hugging Face model (a folder, or an id on the hub), or the ckpt.pt of a nanoGPT run; without the
        head of a classifier and the like, which sample.load keeps.

        block_size: a shorter context than the model's own. Weights are read one at a time, whatever their
        precision, into `dtype`. Raises ValueError naming the setting or weight that does not fit, and
        FileNotFoundError; ImportError if a package is missing.
        """
        from lib.pretrained import load
        return load(cls, path, dropout, block_size, dtype)[0]

    def save_pretrained(self, folder: str | Path, **extra):
        """config.json (and what `extra` adds to it) and model.safetensors, which transformers loads strictly.

        Raises ValueError if no family of transformers has this combination of settings, naming what differs;
        ImportError without safetensors.
        """
        from lib.pretrained import save
        save(self, folder, extra)
