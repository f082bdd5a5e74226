"""
What others call it: how Hugging Face's transformers names the settings and weights of model.py's families.

A family is one row of FAMILIES: a column of settings, the names in config.json, and a table of weight names,
read in one direction to load a checkpoint and in the other to save one. A new family is a new row, and
nothing else. nanoGPT's ckpt.pt is GPT-2's row.
"""
import re
from collections.abc import Collection
from dataclasses import asdict
from typing import NamedTuple

import torch

from model import Config


class Family(NamedTuple):
    """What a column is called in transformers: read in one direction to load, in the other to save."""
    name: str  # its classes' names begin so
    lm: str  # and end so, if they have a head for tokens
    fixed: dict  # our settings that all its models share; the rest are Config's defaults
    fields: dict  # our setting -> its name in config.json
    defaults: dict  # what config.json may leave out
    only: dict  # what is refused unless it has this value
    names: dict  # our layer of the body -> theirs; those of a block without its number
    head: dict  # our layer or parameter of the head -> theirs
    tasks: dict  # the ends of other classes' names -> their head, one linear layer
    prefix: str  # of the body's weights, if there is a head
    blocks: str  # their name for our "blocks"
    pooler: tuple = ("tanh", None)  # its activation; its name if a classifier has it, not the body
    qa_prefix: str | None = None  # of the body's weights in its class for answers, if it is another there
    ignore: str = r"$."  # weights that say nothing new, as a regular expression
    transposed: bool = False  # matrices of the blocks are (in, out)
    mirrored: bool = False  # rope turns the other way: as if each head had its halves swapped


ACTS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu",
        "relu2": "relu2"}  # theirs -> ours

CLASS_ENDS = {"ForSequenceClassification": "classify", "ForTokenClassification": "tag",
         "ForQuestionAnswering": "qa"}  # how a class's name ends -> the task of ours

FIELDS = dict(vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
              n_head="num_attention_heads", n_embd="hidden_size", n_inner="intermediate_size",
              tied="tie_word_embeddings")

GPT2 = Family(
    name="GPT2", lm="LMHeadModel", prefix="transformer.", blocks="h",
    fixed=dict(bias=True),
    fields=dict(vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head",
                n_embd="n_embd", n_inner="n_inner", tied="tie_word_embeddings", act="activation_function",
                norm_eps="layer_norm_epsilon"),
    defaults=dict(n_inner=None, activation_function="gelu_new", layer_norm_epsilon=1e-5,
                  tie_word_embeddings=True),
    only=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False),
    names={"wte": "wte", "positions.wpe": "wpe", "norm1": "ln_1", "norm2": "ln_2", "norm_f": "ln_f",
           "attn.q": "attn.c_attn", "attn.k": "attn.c_attn", "attn.v": "attn.c_attn",  # one, side by side
           "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    head={"head": "lm_head"},
    tasks=dict(classify="score", tag="classifier", qa="qa_outputs"),
    ignore=r".*\.attn\.(masked_)?bias$",  # the causal mask, which old versions stored
    transposed=True)

LLAMA = Family(
    name="Llama", lm="ForCausalLM", prefix="model.", blocks="layers",
    fixed=dict(pos="rope", norm="rms", act="swiglu"),
    fields=FIELDS | dict(n_kv_head="num_key_value_heads", head_dim="head_dim", norm_eps="rms_norm_eps"),
    defaults=dict(num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, tie_word_embeddings=False),
    only=dict(hidden_act="silu", attention_bias=False, mlp_bias=False),
    names={"wte": "embed_tokens", "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
           "norm_f": "norm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
           "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj",
           "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"},
    head={"head": "lm_head"},
    tasks=dict(classify="score", tag="score", qa="qa_outputs"),
    qa_prefix="transformer.",
    ignore=r".*rotary_emb\.inv_freq$")

MISTRAL = LLAMA._replace(
    name="Mistral", qa_prefix=None,
    fields=LLAMA.fields | dict(window="sliding_window"),
    defaults=LLAMA.defaults | dict(num_key_value_heads=8, sliding_window=4096),
    only=dict(hidden_act="silu"))

QWEN2 = LLAMA._replace(
    name="Qwen2",
    fixed=LLAMA.fixed | dict(qkv_bias=True),
    only=dict(hidden_act="silu", use_sliding_window=False))

QWEN3 = LLAMA._replace(
    name="Qwen3",
    fixed=LLAMA.fixed | dict(qk_norm="before"),
    defaults=LLAMA.defaults | dict(head_dim=128),
    only=dict(hidden_act="silu", attention_bias=False, use_sliding_window=False),
    names=LLAMA.names | {"attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm"})

NANOCHAT = LLAMA._replace(
    name="NanoChat",
    fixed=dict(pos="rope", norm="rms", norm_weight=False, norm_embd=True, act="relu2", qk_norm="after"),
    fields=FIELDS | dict(n_kv_head="num_key_value_heads", norm_eps="rms_norm_eps",
                         softcap="final_logit_softcapping"),
    defaults=LLAMA.defaults | dict(final_logit_softcapping=15.0),
    only=dict(hidden_act="relu2", attention_bias=False),
    names=LLAMA.names | {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
    tasks={},
    mirrored=True)

BERT = Family(
    name="Bert", lm="ForMaskedLM", prefix="bert.", blocks="encoder.layer",
    fixed=dict(causal=False, norm_place="post", norm_embd=True, bias=True, head="mlm", head_bias=True),
    fields=FIELDS | dict(n_segment="type_vocab_size", act="hidden_act", norm_eps="layer_norm_eps"),
    defaults=dict(type_vocab_size=2, hidden_act="gelu", layer_norm_eps=1e-12, tie_word_embeddings=True),
    only=dict(position_embedding_type="absolute"),
    names={"wte": "embeddings.word_embeddings", "wse": "embeddings.token_type_embeddings",
           "positions.wpe": "embeddings.position_embeddings", "norm_embd": "embeddings.LayerNorm",
           "attn.q": "attention.self.query", "attn.k": "attention.self.key",
           "attn.v": "attention.self.value", "attn.o": "attention.output.dense",
           "norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm",
           "mlp.up": "intermediate.dense", "mlp.down": "output.dense", "pooler": "pooler.dense"},
    head={"head": "cls.predictions.decoder", "head.bias": "cls.predictions.bias",
          "head.dense": "cls.predictions.transform.dense",
          "head.norm": "cls.predictions.transform.LayerNorm"},
    tasks=dict(classify="classifier", tag="classifier", qa="qa_outputs"),
    ignore=r"embeddings\.position_ids$|.*\.decoder\.bias$")

ROBERTA = BERT._replace(
    name="Roberta", prefix="roberta.",
    fixed=BERT.fixed | dict(pos_offset=2),
    head={"head": "lm_head.decoder", "head.bias": "lm_head.bias", "head.dense": "lm_head.dense",
          "head.norm": "lm_head.layer_norm"},
    tasks=dict(classify="classifier.out_proj", tag="classifier", qa="qa_outputs"),
    pooler=("tanh", "classifier.dense"))

DISTILBERT = BERT._replace(
    name="DistilBert", prefix="distilbert.", blocks="transformer.layer",
    fixed=BERT.fixed | dict(n_segment=0, norm_eps=1e-12),
    fields=dict(vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="n_layers",
                n_head="n_heads", n_embd="dim", n_inner="hidden_dim", tied="tie_word_embeddings",
                act="activation"),
    defaults=dict(activation="gelu", tie_word_embeddings=True),
    only={},
    names={"wte": "embeddings.word_embeddings", "positions.wpe": "embeddings.position_embeddings",
           "norm_embd": "embeddings.LayerNorm", "attn.q": "attention.q_lin", "attn.k": "attention.k_lin",
           "attn.v": "attention.v_lin", "attn.o": "attention.out_lin", "norm1": "sa_layer_norm",
           "norm2": "output_layer_norm", "mlp.up": "ffn.lin1", "mlp.down": "ffn.lin2"},
    head={"head": "vocab_projector", "head.dense": "vocab_transform", "head.norm": "vocab_layer_norm"},
    pooler=("relu", "pre_classifier"))

FAMILIES = {  # model_type in config.json -> the column; of two that fit, the first
    "gpt2": GPT2, "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "nanochat": NANOCHAT,
    "distilbert": DISTILBERT, "bert": BERT, "roberta": ROBERTA,
    "xlm-roberta": ROBERTA._replace(name="XLMRoberta"),
}


# -----------------------------------------------------------------------------
# config.json

ONLY = dict(quantization_config=None, is_decoder=False, add_cross_attention=False, partial_rotary_factor=1.0)
ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "layer_types")

# What tells nothing of what a model computes, is of training, which has settings here, or is read elsewhere
ASIDE = re.compile(r"architectures|model_type|_.*|.*_version|.*dtype|.*_token_id|.*dropout.*|.*_pdrop|"
                   r"initializer_range|use_cache|output_.*|pretraining_tp|n_ctx|id2label|label2id|num_labels|"
                   r"problem_type|tokenizer_class|sentence_transformers|sbert_ce_.*|trained_as|"
                   r"max_(length|new_tokens)")


def unused(theirs: dict, family: Family | None = None) -> list[str]:
    """What a config.json or generation_config.json says and is not followed, by name."""
    used = {*family.fields.values(), *family.only, *ONLY, *ROPE} if family else set()
    if "use_sliding_window" in used:  # at False, these are nothing
        used |= {"sliding_window", "max_window_layers"}
    return [name for name, value in theirs.items()
            if value not in (None, False, "", [], {}) and name not in used and not ASIDE.fullmatch(name)]


def from_hf_config(theirs: dict) -> tuple[Family, dict]:
    """config.json -> the family and our settings. Raises ValueError, naming what we cannot follow."""
    kind = theirs.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"config.json: model_type={kind!r}: must be one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    theirs = {**family.defaults, **theirs}
    for name, value in {**ONLY, **family.only}.items():
        if theirs.get(name, value) != value:
            raise ValueError(f"config.json: {name}={theirs[name]!r}: only {value!r} is supported")
    if set(theirs.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"config.json: layer_types={theirs['layer_types']}: must be full_attention")
    ours = dict(family.fixed)
    for name, their in family.fields.items():
        if their not in theirs:
            raise ValueError(f"config.json: has no {their}")
        ours[name] = theirs[their]
    ours["block_size"] -= ours.get("pos_offset", 0)
    if "act" in family.fields:
        if ours["act"] not in ACTS:
            raise ValueError(f"config.json: {family.fields['act']}={ours['act']!r}: must be one of "
                             f"{', '.join(ACTS)}")
        ours["act"] = ACTS[ours["act"]]
    if ours.get("pos") == "rope":
        ours |= rope_of(theirs)
    return family, ours


def rope_of(theirs: dict) -> dict:
    """Our settings of rope, from rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or kind == "default" and rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"config.json: rope_parameters={rope}: only default and llama3 are supported")
    theta = float(rope.get("rope_theta", theirs.get("rope_theta") or 10000.0))
    others = ("rope_type", "type", "rope_theta")
    scaling = {name: value for name, value in rope.items() if name not in others}
    return {"rope_theta": theta, "rope_scaling": scaling if kind == "llama3" else None}


def to_hf_config(config: Config, kind: str | None = None) -> tuple[Family, dict]:
    """The family whose column this is, and its config.json. Raises ValueError if there is none.

    kind: the model_type that it had, if it had one.
    """
    free = ["dropout", "init", "n_gram_rows", "pooler"]
    free += ["head", "head_bias", "tied"] if config.head == "none" else []
    wanted = {name: value for name, value in asdict(config).items() if name not in free}
    differs = {}
    for kind in sorted(FAMILIES, key=lambda other: other != kind):
        family = FAMILIES[kind]
        theirs = {"model_type": kind, **family.only,
                  **{their: getattr(config, name) for name, their in family.fields.items()}}
        if "act" in family.fields:
            acts = {name: their for their, name in ACTS.items()}  # gelu_new of two
            theirs[family.fields["act"]] = acts.get(config.act, config.act)
        theirs[family.fields["block_size"]] += config.pos_offset
        if family.fixed.get("pos") == "rope":
            scaling = config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling}
            theirs["rope_theta"], theirs["rope_scaling"] = config.rope_theta, scaling  # before transformers 5
            theirs["rope_parameters"] = {"rope_type": "default", **(scaling or {}),
                                         "rope_theta": config.rope_theta}
        try:
            found = asdict(type(config)(**from_hf_config(theirs)[1]))
        except ValueError:
            continue
        differs[kind] = [f"{name}={value}" for name, value in wanted.items() if found[name] != value]
        if not differs[kind]:
            return family, theirs
    nearest = min(differs, key=lambda kind: len(differs[kind]))
    raise ValueError(f"transformers has no such model: the nearest, {nearest}, differs in "
                     f"{', '.join(differs[nearest])}")


def class_of(config: dict) -> str:
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def guessed(config: dict, weights: Collection[str]) -> tuple[str, str]:
    """The model_type of a config.json without one, and by what it is known: its class, or weights."""
    named = class_of(config)
    found = [kind for kind, family in FAMILIES.items() if re.match(f"{family.name}(Model|LMHead|For)", named)]
    by = "class" if found else "weights"
    most = 0
    for kind, family in FAMILIES.items() if not found else ():
        parts = [f"{their}.weight" for ours, their in family.names.items() if ours[:5] in ("attn.", "mlp.u")]
        parts += [family.names["attn.q"] + ".bias"] * bool({"bias", "qkv_bias"} & set(family.fixed))
        for prefix in (family.prefix, ""):  # its own prefix tells it from its relatives
            if len(parts) > most and all(f"{prefix}{family.blocks}.0.{part}" in weights for part in parts):
                found, most = [kind], len(parts)
    if not found:
        raise ValueError(f"config.json: has no model_type: must be one of {', '.join(FAMILIES)}")
    return found[0], by


# -----------------------------------------------------------------------------
# Weights

def their_names(model: torch.nn.Module, family: Family, prefix: str, kind: str) -> dict[str, list[str]]:
    """Their weights -> ours: one each, but for those that lie side by side in theirs. kind: how the class's
    name ends."""
    groups = {}
    for name in model.state_dict():
        layer, _, end = name.rpartition(".")
        if layer.startswith("blocks."):
            _, number, part = layer.split(".", 2)
            their = f"{prefix}{family.blocks}.{number}.{family.names[part]}.{end}"
        elif layer == "pooler":
            their = f"{pooler_name(family, prefix, kind)}.{end}"
        elif layer in family.names:
            their = f"{prefix}{family.names[layer]}.{end}"
        else:
            their = family.head.get(name) or f"{family.head[layer]}.{end}"
        groups.setdefault(their, []).append(name)
    return groups


def pooler_name(family: Family, prefix: str, kind: str) -> str | None:
    of_classifier = family.pooler[1] if CLASS_ENDS.get(kind) == "classify" else None
    return of_classifier or prefix + family.names.get("pooler", "(none)")


def body_prefix(family: Family, kind: str) -> str:
    """What the names of the body's weights begin with in a class."""
    if kind == "ForQuestionAnswering" and family.qa_prefix:
        return family.qa_prefix
    return "" if kind == "Model" else family.prefix


def turned(weight: torch.Tensor, name: str, family: Family, head_dim: int) -> torch.Tensor:
    """A weight of ours as they keep it; and back, for twice changes nothing."""
    if family.transposed and name.startswith("blocks.") and weight.ndim == 2:
        return weight.t()
    if family.mirrored and ".attn." in name and name.endswith((".q.weight", ".k.weight")):
        return weight.unflatten(0, (-1, 2, head_dim // 2)).flip(1).flatten(0, 2)
    return weight


def canonical(name: str, family: Family) -> str:
    """A weight's name without what wraps the model, and as it is called today."""
    name = name.removeprefix("_orig_mod.").removeprefix("module.").removeprefix(family.prefix)
    return re.sub(r"\bLayerNorm\.(gamma|beta)$",
                  lambda old: "LayerNorm." + {"gamma": "weight", "beta": "bias"}[old[1]], name)
