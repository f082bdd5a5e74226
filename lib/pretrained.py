"""
What others call it: how Hugging Face's transformers names the settings and weights of model.py's families.

A family is one row of FAMILIES: a column of settings, the names in config.json, and a table of weight names,
read in one direction to load a checkpoint and in the other to save one. A new family is a new row, and
nothing else. nanoGPT's ckpt.pt is GPT-2's row.
"""
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from lib.run import write_text
from model import Config, Transformer


class Family(NamedTuple):
    """What a column is called in transformers: read in one direction to load, in the other to save."""
    classes: tuple[str, str]  # with a head, without
    fixed: dict  # our settings that all its models share; the rest are Config's defaults
    fields: dict  # our setting -> its name in config.json
    defaults: dict  # what config.json may leave out
    only: dict  # what we follow at this value alone
    names: dict  # our layer of the body -> theirs; those of a block without its number
    head: dict  # our layer or parameter of the head -> theirs
    prefix: str  # of the body's weights, if there is a head
    blocks: str  # their name for our "blocks"
    ignore: str = r"$."  # weights that have no place here, as a regular expression
    transposed: bool = False  # matrices of the blocks are (in, out)
    mirrored: bool = False  # rope turns the other way: as if each head had its halves swapped


ACTS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu",
        "relu2": "relu2"}  # theirs -> ours

FIELDS = dict(vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
              n_head="num_attention_heads", n_embd="hidden_size", n_inner="intermediate_size",
              tied="tie_word_embeddings")

GPT2 = Family(
    classes=("GPT2LMHeadModel", "GPT2Model"), prefix="transformer.", blocks="h",
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
    ignore=r".*\.attn\.(masked_)?bias$",  # the causal mask, which old versions stored
    transposed=True)

LLAMA = Family(
    classes=("LlamaForCausalLM", "LlamaModel"), prefix="model.", blocks="layers",
    fixed=dict(pos="rope", norm="rms", act="swiglu"),
    fields=FIELDS | dict(n_kv_head="num_key_value_heads", head_dim="head_dim", norm_eps="rms_norm_eps"),
    defaults=dict(num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, tie_word_embeddings=False),
    only=dict(hidden_act="silu", attention_bias=False, mlp_bias=False),
    names={"wte": "embed_tokens", "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
           "norm_f": "norm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
           "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj",
           "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"},
    head={"head": "lm_head"},
    ignore=r".*rotary_emb\.inv_freq$")

NANOCHAT = LLAMA._replace(
    classes=("NanoChatForCausalLM", "NanoChatModel"),
    fixed=dict(pos="rope", norm="rms", norm_weight=False, norm_embd=True, act="relu2", qk_norm="after"),
    fields=FIELDS | dict(n_kv_head="num_key_value_heads", norm_eps="rms_norm_eps",
                         softcap="final_logit_softcapping"),
    defaults=LLAMA.defaults | {"final_logit_softcapping": 15.0},
    only=dict(hidden_act="relu2", attention_bias=False),
    names=LLAMA.names | {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
    mirrored=True)

BERT = Family(
    classes=("BertForMaskedLM", "BertModel"), prefix="bert.", blocks="encoder.layer",
    fixed=dict(causal=False, norm_place="post", norm_embd=True, bias=True, head="mlm", head_bias=True),
    fields=FIELDS | dict(n_segment="type_vocab_size", act="hidden_act", norm_eps="layer_norm_eps"),
    defaults=dict(type_vocab_size=2, hidden_act="gelu", layer_norm_eps=1e-12, tie_word_embeddings=True),
    only=dict(position_embedding_type="absolute"),
    names={"wte": "embeddings.word_embeddings", "wse": "embeddings.token_type_embeddings",
           "positions.wpe": "embeddings.position_embeddings", "norm_embd": "embeddings.LayerNorm",
           "attn.q": "attention.self.query", "attn.k": "attention.self.key",
           "attn.v": "attention.self.value", "attn.o": "attention.output.dense",
           "norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm",
           "mlp.up": "intermediate.dense", "mlp.down": "output.dense"},
    head={"head": "cls.predictions.decoder", "head.bias": "cls.predictions.bias",
          "head.dense": "cls.predictions.transform.dense",
          "head.norm": "cls.predictions.transform.LayerNorm"},
    ignore=r"(pooler\..*|embeddings\.position_ids)$|cls\.seq_relationship\.|.*\.decoder\.bias$")

ROBERTA = BERT._replace(
    classes=("RobertaForMaskedLM", "RobertaModel"), prefix="roberta.",
    fixed=BERT.fixed | {"pos_offset": 2},
    head={"head": "lm_head.decoder", "head.bias": "lm_head.bias", "head.dense": "lm_head.dense",
          "head.norm": "lm_head.layer_norm"})

FAMILIES = {  # model_type in config.json -> the column
    "gpt2": GPT2,
    "llama": LLAMA,
    "nanochat": NANOCHAT,
    "bert": BERT,
    "roberta": ROBERTA,
    "qwen2": LLAMA._replace(classes=("Qwen2ForCausalLM", "Qwen2Model"),
                            fixed=LLAMA.fixed | {"qkv_bias": True},
                            only=dict(hidden_act="silu", use_sliding_window=False)),
    "qwen3": LLAMA._replace(classes=("Qwen3ForCausalLM", "Qwen3Model"),
                            fixed=LLAMA.fixed | {"qk_norm": "before"},
                            defaults=LLAMA.defaults | {"head_dim": 128},
                            only=dict(hidden_act="silu", attention_bias=False, use_sliding_window=False),
                            names=LLAMA.names | {"attn.norm_q": "self_attn.q_norm",
                                                 "attn.norm_k": "self_attn.k_norm"}),
}


# -----------------------------------------------------------------------------
# In

def load(cls: type[Transformer], path: str | Path, dropout: float, block_size: int | None,
         dtype: torch.dtype) -> Transformer:
    """What Transformer.from_pretrained promises."""
    family, settings, weights = open_weights(path)
    if block_size is not None:
        if block_size > settings["block_size"]:
            raise ValueError(f"block_size={block_size}: the model was made for {settings['block_size']}")
        settings["block_size"] = block_size
    if not any(name.startswith(tuple(family.head.values())) for name in weights):
        if family.fixed.get("head") == "mlm" or not settings.get("tied", True):
            settings["head"] = "none"  # else it is the embedding
    with torch.device("meta"):  # shapes without memory: the weights come from the files
        model = cls(Config(**settings | {"dropout": dropout}))
    prefix = family.prefix if any(name.startswith(family.prefix) for name in weights) else ""
    state = {}
    for their, ours in their_names(model, family, prefix).items():
        if their in weights:
            weight = turned(weights.pop(their)(), ours[0], family, model.config.head_dim)
            state |= fitted(weight, ours, model, dtype, f"{path}: {their}")
        elif ours != ["head.weight"] or not model.config.tied:
            raise ValueError(f"{path}: has no weight {their}")
    extra = [name for name in weights if not re.match(family.ignore, name.removeprefix(family.prefix))]
    if extra:
        raise ValueError(f"{path}: weight {extra[0]} has no place in this model")
    model.load_state_dict(state, assign=True, strict=False)  # each was checked above
    model.tie()
    return model.eval()


def fitted(weight: torch.Tensor, ours: list[str], model: Transformer, dtype: torch.dtype,
           where: str) -> dict[str, torch.Tensor]:
    """A weight of theirs, cut into those of ours that it holds one above the other."""
    shapes = [model.get_parameter(name).shape for name in ours]
    rows = [shape[0] for shape in shapes]
    if "wpe" in ours[0]:
        weight = weight[:rows[0]]  # the context may be shorter
    wanted = (sum(rows), *shapes[0][1:])
    if weight.shape != wanted:
        raise ValueError(f"{where} has shape {tuple(weight.shape)}, but config.json says {wanted}")
    parts = zip(ours, weight.split(rows))
    return {name: torch.empty(part.shape, dtype=dtype).copy_(part) for name, part in parts}


def from_hf_config(theirs: dict) -> tuple[Family, dict]:
    """config.json -> the family and our settings. Raises ValueError, naming what we cannot follow."""
    kind = theirs.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"config.json: model_type={kind!r}: must be one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    theirs = {**family.defaults, **theirs}
    only = {"quantization_config": None, "is_decoder": False, "add_cross_attention": False,
            "partial_rotary_factor": 1.0, **family.only}
    for name, value in only.items():
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


def open_weights(path: str | Path) -> tuple[Family, dict, dict[str, Callable]]:
    """A folder with config.json, an id on Hugging Face's hub, or nanoGPT's ckpt.pt: its family, our settings,
    and for each weight a function that reads it."""
    if Path(path).is_file():
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not {"model", "model_args"} <= set(checkpoint) or "version" in checkpoint:
            raise ValueError(f"{path}: not a nanoGPT checkpoint (a run of ours is read by sample.load)")
        settings = {name: value for name, value in checkpoint["model_args"].items() if value is not None}
        weights = {name.removeprefix("_orig_mod."): w.detach for name, w in checkpoint["model"].items()}
        return GPT2._replace(transposed=False), settings, weights
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError("Hugging Face models need safetensors: pip install safetensors") from None
    folder = Path(path) if Path(path).is_dir() else Path(download(str(path)))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: has no config.json, so it is no Hugging Face model")
    family, settings = from_hf_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    index, files = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    weights = {}
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder}: has no {file}; weights are read from safetensors files only")
        try:
            opened = safe_open(folder / file, framework="pt")  # reads a weight when it is asked for
        except SafetensorError as error:
            raise ValueError(f"{folder / file}: damaged ({error})") from None
        weights.update({name: partial(opened.get_tensor, name) for name in opened.keys()})
    return family, settings, weights


def download(name: str) -> str:
    """A model of the hub to a folder in its cache. Raises FileNotFoundError if it cannot be had."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{name}: no such folder here; if it is a model on Hugging Face's hub: "
                                "pip install huggingface_hub") from None
    try:
        return snapshot_download(name, allow_patterns=["*.json", "model*.safetensors"])
    except Exception as error:  # of many kinds: no such name, no network, no permission
        reason = str(error).strip().split("\n")[0][:120]
        raise FileNotFoundError(f"{name}: neither a folder here nor a model that Hugging Face's hub gives us "
                                f"({reason})") from None


# -----------------------------------------------------------------------------
# Out

def save(model: Transformer, folder: str | Path, extra: dict) -> None:
    """What Transformer.save_pretrained promises."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError("this needs safetensors: pip install safetensors") from None
    if model.config.pos == "learned" and not model.config.bias:  # GPT-2 has biases: 0 is as good as none
        twin = type(model)(Config(**asdict(model.config) | {"bias": True, "qkv_bias": True}))
        twin.load_state_dict(model.state_dict(), strict=False)
        model = twin
    family, theirs = to_hf_config(model.config)
    prefix = family.prefix if model.head is not None else ""
    ours, weights = model.state_dict(), {}
    for their, names in their_names(model, family, prefix).items():
        if names != ["head.weight"] or not model.config.tied:
            weight = torch.cat([ours[name] for name in names])
            weights[their] = turned(weight, names[0], family, model.config.head_dim).contiguous().cpu()
    theirs |= {"dtype": str(model.wte.weight.dtype).removeprefix("torch."), **extra}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
    write_text(folder / "config.json", json.dumps(theirs, indent=1))


def to_hf_config(config) -> tuple[Family, dict]:
    """The family whose column this is, and its config.json. Raises ValueError if there is none."""
    free = ["dropout", "init", "n_gram_rows"]
    free += ["head", "head_bias", "tied"] if config.head == "none" else []
    wanted = {name: value for name, value in asdict(config).items() if name not in free}
    differs = {}
    for kind, family in FAMILIES.items():
        theirs = {"model_type": kind, "architectures": [family.classes[config.head == "none"]], **family.only,
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


# -----------------------------------------------------------------------------
# Both ways

def their_names(model: torch.nn.Module, family: Family, prefix: str) -> dict[str, list[str]]:
    """Their weights -> ours: one each, but for those that lie side by side in theirs."""
    groups = {}
    for name in model.state_dict():
        layer, _, kind = name.rpartition(".")
        if layer.startswith("blocks."):
            _, number, part = layer.split(".", 2)
            their = f"{prefix}{family.blocks}.{number}.{family.names[part]}.{kind}"
        elif layer in family.names:
            their = f"{prefix}{family.names[layer]}.{kind}"
        else:
            their = family.head.get(name) or f"{family.head[layer]}.{kind}"
        groups.setdefault(their, []).append(name)
    return groups


def turned(weight: torch.Tensor, name: str, family: Family, head_dim: int) -> torch.Tensor:
    """A weight of ours as they keep it; and back, for twice changes nothing."""
    if family.transposed and name.startswith("blocks.") and weight.ndim == 2:
        return weight.t()
    if family.mirrored and ".attn." in name and name.endswith((".q.weight", ".k.weight")):
        return weight.unflatten(0, (-1, 2, head_dim // 2)).flip(1).flatten(0, 2)
    return weight
