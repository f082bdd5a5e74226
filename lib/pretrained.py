"""
What others call it: how Hugging Face's transformers names the settings and weights of model.py's families.

A family is one row of FAMILIES: a column of settings, the names in config.json, and a table of weight names,
read in one direction to load a checkpoint and in the other to save one. A new family is a new row, and
nothing else. nanoGPT's ckpt.pt is GPT-2's row. An adapter of PEFT is added to its base while that is read.
"""
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from lib.hub import ADAPTER_FILES, WEIGHT_FILES, base_of, folder_of, open_weights, read_json
from lib.run import main_process, write_text
from model import Config, Transformer


class Family(NamedTuple):
    """What a column is called in transformers: read in one direction to load, in the other to save."""
    name: str  # its classes' names begin so
    lm: str  # and end so, if they have a head for tokens
    fixed: dict  # our settings that all its models share; the rest are Config's defaults
    fields: dict  # our setting -> its name in config.json
    defaults: dict  # what config.json may leave out
    only: dict  # what we follow at this value alone
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

TASKS = {"ForSequenceClassification": "classify", "ForTokenClassification": "tag",
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
# In

class Source(NamedTuple):
    """A published model: what its files say, and a function for each weight that reads it."""
    path: str  # as it was asked for
    folder: Path | None  # where it is
    config: dict  # config.json
    family: Family
    settings: dict  # ours
    kind: str  # how its class's name ends: ForMaskedLM
    weights: dict[str, Callable]  # in the order of the files, without the body's prefix


def load(cls: type[Transformer], path: str | Path, dropout: float, block_size: int | None,
         dtype: torch.dtype, whole: bool = True) -> tuple[Transformer, dict]:
    """What Transformer.from_pretrained promises; and the head of a task, as a checkpoint of ours keeps it.

    whole: with the layers behind a body, if it is one of a task. What is not used is told on stderr.
    """
    source = open_source(path)
    family, settings, weights, kind = source.family, source.settings, source.weights, source.kind
    if block_size is not None:
        if block_size > settings["block_size"]:
            raise ValueError(f"block_size={block_size}: the model was made for {settings['block_size']}")
        settings["block_size"] = block_size
    unused = set()
    speaks = any(name.startswith(tuple(family.head.values())) for name in weights)
    if kind in TASKS or not speaks and (family.fixed.get("head") == "mlm" or not settings.get("tied", True)):
        settings["head"] = "none"  # else it is the embedding
        if kind == family.lm:
            unused.add(f"(no head for tokens: there is no {family.head['head']}.weight)")
        if whole and pooler_name(family, "", kind) + ".weight" in weights:
            settings["pooler"] = family.pooler[0]
    layers = {name.split(".")[family.blocks.count(".") + 1] for name in weights
              if name.startswith(family.blocks + ".")}
    if settings["n_layer"] != len(layers):
        raise ValueError(f"{path}: config.json: {family.fields['n_layer']}={settings['n_layer']}, but there "
                         f"are weights of {len(layers)}")
    try:
        with torch.device("meta"):  # shapes without memory: the weights come from the files
            model = cls(Config(**settings | {"dropout": dropout}))
    except RuntimeError as error:  # sizes that no memory has
        raise ValueError(f"{path}: config.json: no such model can be: {str(error)[:120]}") from None
    missing, state, of_task = their_names(model, family, "", kind), {}, {}
    linear, heads = family.tasks.get(TASKS.get(kind), "?"), tuple(family.head.values())
    ours_alone = {name.split(".")[0] for name in missing if not name.startswith(heads)}
    for name in list(weights):
        where, read = f"{path}: {name}", weights.pop(name)  # so that a file's memory is freed after it
        if name in missing:
            ours = missing.pop(name)
            weight = turned(read(), ours[0], family, model.config.head_dim)
            state |= fitted(weight, ours, model, dtype, where)
        elif whole and name.rpartition(".")[0] == linear:
            of_task[name.rpartition(".")[2]] = finite(read(), where).float()
        elif re.match(family.ignore, name):
            continue
        elif name.split(".")[0] in ours_alone or model.head is not None and name.startswith(heads):
            raise ValueError(f"{path}: weight {name} has no place in this model")
        else:
            unused.add(name.rpartition(".")[0])
    if model.config.tied:
        missing = {their: ours for their, ours in missing.items() if ours != ["head.weight"]}
    if missing:
        raise ValueError(f"{path}: has no weight {family.prefix}{next(iter(missing))}")
    if unused and main_process():
        print(f"({path}: not used: {', '.join(sorted(unused))})", file=sys.stderr)
    model.load_state_dict(state, assign=True, strict=False)  # each was checked above
    model.tie()
    model.published = published(source)
    return model.eval(), head_of(source, of_task, model) if of_task else {}


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
    parts = zip(ours, finite(weight, where).split(rows))
    return {name: torch.empty(part.shape, dtype=dtype).copy_(part) for name, part in parts}


def finite(weight: torch.Tensor, where: str) -> torch.Tensor:
    if not weight.is_floating_point() or not weight.isfinite().all():
        raise ValueError(f"{where}: damaged: not all of its {weight.dtype} are finite numbers")
    return weight


def open_source(path: str | Path) -> Source:
    """A folder with config.json, or with an adapter's, an id on Hugging Face's hub, or nanoGPT's ckpt.pt."""
    if Path(path).is_file():
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not {"model", "model_args"} <= set(checkpoint) or "version" in checkpoint:
            raise ValueError(f"{path}: not a nanoGPT checkpoint (a run of ours is read by sample.load)")
        settings = {name: value for name, value in checkpoint["model_args"].items() if value is not None}
        family = GPT2._replace(transposed=False)
        weights = {canonical(name, family): w.detach for name, w in checkpoint["model"].items()}
        return Source(str(path), None, {}, family, settings, family.lm, weights)
    folder = folder_of(path)
    place, adapter = base_of(folder)
    if not (place / "config.json").is_file():
        raise FileNotFoundError(f"{place}: has no config.json, so it is no Hugging Face model")
    config, weights = read_json(place / "config.json"), open_weights(place, WEIGHT_FILES)
    kind = config.get("model_type") or guessed(config, weights, path)
    try:
        family, settings = from_hf_config({**config, "model_type": kind})
        Config(**settings)  # its types and ranges
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
        told = str(error).removeprefix("config.json: ")  # a value may be of any type and size
        raise ValueError(f"{path}: config.json: {told}") from None
    weights = {canonical(name, family): read for name, read in weights.items()}
    ends = class_of(config).removeprefix(family.name)
    if adapter:
        ends = add_adapter(weights, folder, adapter, family) or ends
    weights = {name.removeprefix(body_prefix(family, ends)): read for name, read in weights.items()}
    return Source(str(path), place, {**config, "model_type": kind}, family, settings, ends, weights)


def class_of(config: dict) -> str:
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def guessed(config: dict, weights: dict, path: str | Path) -> str:
    """The model_type of a config.json without one: by its class, else by the names of its weights."""
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
    if main_process():
        print(f"({path}: config.json has no model_type: read as {found[0]}, by its {by})",
              file=sys.stderr)
    return found[0]


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


# -----------------------------------------------------------------------------
# The files' names for weights, and an adapter's

def canonical(name: str, family: Family) -> str:
    """A weight's name without what wraps the model, and as it is called today."""
    name = name.removeprefix("_orig_mod.").removeprefix("module.").removeprefix(family.prefix)
    return re.sub(r"\bLayerNorm\.(gamma|beta)$",
                  lambda old: "LayerNorm." + {"gamma": "weight", "beta": "bias"}[old[1]], name)


def add_adapter(weights: dict[str, Callable], folder: Path, adapter: dict, family: Family) -> str:
    """Add PEFT's low-rank matrices to the base's weights. Returns how its class is called, if said."""
    wanted = {"peft_type": ("LORA",), "use_dora": (False,), "fan_in_fan_out": (True, False)}
    for name, values in wanted.items():
        if adapter.get(name, values[0]) not in values:
            raise ValueError(f"adapter_config.json: {name}={adapter[name]!r}: only {values[0]} is supported")
    added = {canonical(name.removeprefix("base_model.model.").replace(".modules_to_save", ""), family): read
             for name, read in open_weights(folder, ADAPTER_FILES).items()}
    for name, read in added.items():
        layer, low_rank, end = name.partition(".lora_")
        if not low_rank:
            weights[name] = read  # trained as a whole
            continue
        if end not in ("A.weight", "B.weight") or f"{layer}.weight" not in weights:
            raise ValueError(f"{folder}: the adapter's {name} has no place in this model")
        if end == "A.weight":
            alpha = next((alpha for pattern, alpha in (adapter.get("alpha_pattern") or {}).items()
                          if re.match(rf"(.*\.)?({pattern})$", layer)), adapter["lora_alpha"])
            weights[f"{layer}.weight"] = partial(
                with_low_rank, weights[f"{layer}.weight"], read, added[f"{layer}.lora_B.weight"],
                alpha, adapter.get("use_rslora"), family.transposed)
    of_type = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification",
               "QUESTION_ANS": "ForQuestionAnswering"}
    return of_type.get(adapter.get("task_type"), "")


def with_low_rank(base: Callable, a: Callable, b: Callable, alpha: float, root: bool,
                  transposed: bool) -> torch.Tensor:
    a, b = a().float(), b().float()  # (r, in), (out, r)
    added = b @ a * (alpha / (math.sqrt(len(a)) if root else len(a)))
    return base().float() + (added.t() if transposed else added)


# -----------------------------------------------------------------------------
# What else a folder says

ACTIVATION = "sbert_ce_default_activation_function"  # of a score, in old cross-encoders
POOLS = {"cls": "first", "mean": "mean", "lasttoken": "last"}  # theirs, of sentence-transformers -> ours


def published(source: Source) -> dict:
    """What is neither a setting nor a weight and is kept, for use and for an export: plain values."""
    ids = {name: value for name, value in source.config.items() if name.endswith("_token_id")}
    for name, value in ids.items():
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(number) is int for number in numbers):
            raise ValueError(f"{source.path}: config.json: {name}={value!r}: wanted numbers of tokens")
    if source.folder is None:
        return {}
    return {"model_type": source.config["model_type"], "ids": ids,
            "generation": read_json(source.folder / "generation_config.json"),
            "encoder": encoder_of(source.folder)}


def encoder_of(folder: Path) -> dict:
    """How a sentence encoder makes a text's vector, from the files of sentence-transformers; {} without."""
    modules = read_json(folder / "modules.json", list)
    types = {str(module.get("type")).rpartition(".")[2]: str(module.get("path")) for module in modules}
    place = folder / types.get("Pooling", "1_Pooling") / "config.json"
    if not place.resolve().is_relative_to(folder.resolve()) and not place.is_file():
        raise ValueError(f"{folder}/modules.json: damaged, or names files outside of its folder")
    pooling = read_json(place)
    if not pooling:
        return {}
    old = [name.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
           for name, value in pooling.items() if name.startswith("pooling_mode_") and value is True]
    modes = pooling.get("pooling_mode", old or ["mean"])
    modes = [modes] if isinstance(modes, str) else modes
    text = read_json(folder / "sentence_bert_config.json")
    prompts = read_json(folder / "config_sentence_transformers.json")
    prompt = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"), "")
    others = sorted(set(types) - {"Transformer", "Pooling", "Normalize"})
    if others:
        print(f"({folder}: {', '.join(others)}, behind the pooling: not used)", file=sys.stderr)
    return {"pool": POOLS.get(modes[0], modes[0]) if len(modes) == 1 else " and ".join(modes),
            "normalize": "Normalize" in types, "max_length": text.get("max_seq_length"),
            "lower": bool(text.get("do_lower_case")), "prompt": prompt}


def head_of(source: Source, weights: dict, model: Transformer) -> dict:
    """The head of a class of theirs, as a checkpoint of ours keeps a task's. Raises ValueError."""
    config, task, rows = source.config, TASKS[source.kind], len(weights.get("weight", ()))
    if not rows or weights["weight"].shape[1:] != (model.config.n_embd,):
        raise ValueError(f"{source.path}: its head has no weights of the right shape")
    called = config.get("id2label") or {}
    labels = [str(called.get(str(k), f"LABEL_{k}")) for k in range(rows)]
    if len(set(labels)) < rows:
        raise ValueError(f"config.json: id2label={called}: wanted {rows} labels that differ")
    head = {"task": task, "labels": labels, "max_length": model.config.block_size, "space": False,
            "pool": None, "paired": task == "qa", "apart": False, "bias": "bias" in weights,
            "columns": {"text": "", "pair": "", "label": "", "header": None}, "weights": weights}
    if task == "qa":
        return head | {"labels": ["first", "last"], "no_answer": False}
    if task == "tag":
        return head
    problem = config.get("problem_type")
    two = {"entailment", "not_entailment", "contradiction", "duplicate", "equivalent"}  # are said of two
    of_two = bool(two & {label.lower() for label in labels}) or ACTIVATION in config
    head |= {"pool": "last" if model.config.causal else "first", "paired": of_two or None,  # None: either
             "several": problem == "multi_label_classification"}
    if problem != "regression" and rows > 1 or head["several"]:
        return head
    named = (config.get("sentence_transformers") or {}).get("activation_fn")
    named = named or config.get(ACTIVATION) or "Identity"
    if rows > 1 or named.rpartition(".")[2] not in ("Identity", "Sigmoid"):
        raise ValueError(f"config.json: a score of {rows} numbers, by {named}: only one, by Identity or "
                         "Sigmoid, is supported")
    return head | {"task": "regress", "mean": 0.0, "std": 1.0, "labels": ["number"],
                   "sigmoid": named.endswith("Sigmoid")}


# -----------------------------------------------------------------------------
# Out

class HeadError(ValueError):
    """A task's head that no class of transformers has."""


def save(model: Transformer, folder: str | Path, extra: dict, head: dict | None = None,
         pool: str | None = None) -> None:
    """What Transformer.save_pretrained promises. head: of a task, as head_of gives it. pool: of a sentence
    encoder that no published files tell of.

    Raises HeadError before anything is written.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError("this needs safetensors: pip install safetensors") from None
    said = model.published
    if model.config.pos == "learned" and not model.config.bias:  # GPT-2 has biases: 0 is as good as none
        model = twin(model, bias=True, qkv_bias=True)
    family, theirs = to_hf_config(model.config, said.get("model_type"))
    kind = family.lm if model.head is not None else "Model"
    of_task = {}
    if head:
        kind = next(end for end, task in TASKS.items() if task == head["task"].replace("regress", "classify"))
        model, of_task, more = head_to_hf(model, family, head)
        theirs |= more
    theirs["architectures"] = [family.name + kind]
    ours, weights = model.state_dict(), of_task
    for their, names in their_names(model, family, body_prefix(family, kind), kind).items():
        if names != ["head.weight"] or not model.config.tied:
            weight = torch.cat([ours[name] for name in names])
            weights[their] = turned(weight, names[0], family, model.config.head_dim).contiguous().cpu()
    theirs |= {"dtype": str(model.wte.weight.dtype).removeprefix("torch."), **said.get("ids", {}), **extra}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file(weights, folder / "model.safetensors.tmp", metadata={"format": "pt"})
        write_text(folder / "config.json", json.dumps(theirs, indent=1, ensure_ascii=False))
        shutil.copymode(folder / "config.json", folder / "model.safetensors.tmp")  # else its owner's alone
        os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
    finally:
        (folder / "model.safetensors.tmp").unlink(missing_ok=True)
    if said.get("generation"):
        write_text(folder / "generation_config.json", json.dumps(said["generation"], indent=1))
    encoder = said.get("encoder") or {"pool": pool, "normalize": False, "max_length": None, "lower": False,
                                      "prompt": ""}
    if encoder["pool"] and not head:
        write_encoder(folder, encoder, model.config)


def head_to_hf(model: Transformer, family: Family, head: dict) -> tuple[Transformer, dict, dict]:
    """A task's head as transformers has it: the body, the head's weights, what config.json says of it.

    Raises HeadError if no class of theirs computes the same.
    """
    task, config = head["task"], model.config
    name = family.tasks.get(task.replace("regress", "classify"))
    of_texts, pool = task in ("classify", "regress"), "last" if config.causal else "first"
    if name is None or head["apart"] or (of_texts and head["pool"] != pool):
        what = "two texts read apart" if head["apart"] else f"task={task}, pool={head['pool']}"
        raise HeadError(f"{what}: transformers' {family.name} has no such head (it reads the {pool} token)")
    weight, bias = head["weights"]["weight"], head["weights"].get("bias")
    labels, more = head["labels"], {}
    if task == "regress":
        bias = torch.zeros(1) if bias is None else bias
        weight, bias = weight * head["std"], bias * head["std"] + head["mean"]
        act = "torch.nn.modules." + ("activation.Sigmoid" if head.get("sigmoid") else "linear.Identity")
        more = {"problem_type": "regression", "sentence_transformers": {"activation_fn": act}}
        labels = ["LABEL_0"]
    elif task == "classify":
        kind = "multi_label" if head["several"] else "single_label"
        more = {"problem_type": f"{kind}_classification"}
    elif task == "qa":
        labels = ["LABEL_0", "LABEL_1"]
    if of_texts and not config.causal and model.pooler is None:
        model, weight, bias = with_pooler(model, family.pooler[0], weight, bias)
    if model.pooler is not None and not of_texts:
        model = twin(model, pooler=None)
    if of_texts and config.causal and bias is not None:
        if bias.any():
            raise HeadError(f"task={task}: transformers' {family.name} has no bias in such a head")
        bias = None
    more |= {"id2label": dict(enumerate(labels)), "label2id": {label: k for k, label in enumerate(labels)}}
    weights = {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
    return model, {name: value.detach().cpu().contiguous() for name, value in weights.items()}, more


def with_pooler(model: Transformer, act: str, weight: torch.Tensor,
                bias: torch.Tensor) -> tuple[Transformer, torch.Tensor, torch.Tensor]:
    """A model that has none gets a pooler that changes nothing; and the head behind it.

    tanh is linear near 0, where the vectors are made to be; relu is above 0, where they are moved to.
    """
    model, norm = twin(model, pooler=act), model.blocks[-1].norm2
    scale = 2.0**-16 if act == "tanh" else 1.0
    most = norm.weight.abs().max() * math.sqrt(model.config.n_embd) + norm.bias.abs().max()  # |x| is below
    shift = most if act == "relu" else torch.zeros(())
    with torch.no_grad():
        model.pooler.weight.copy_(scale * torch.eye(model.config.n_embd))
        model.pooler.bias.fill_(shift)
    return model, weight / scale, bias - weight.sum(1) * shift


def twin(model: Transformer, **changes) -> Transformer:
    """The model with other settings; weights that it has not are those of a new one."""
    other = type(model)(Config(**asdict(model.config) | changes)).to(model.wte.weight)
    other.load_state_dict(model.state_dict(), strict=False)
    return other.eval()


def write_encoder(folder: Path, encoder: dict, config: Config) -> None:
    """The files by which sentence-transformers makes a text's vector."""
    mode = next((their for their, pool in POOLS.items() if pool == encoder["pool"]), encoder["pool"])
    keys = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}  # others as they are
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modules = ["Transformer", "Pooling"] + ["Normalize"] * encoder["normalize"]
    files = {
        "modules.json": [{"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "",
                          "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(modules)],
        "1_Pooling/config.json": {"word_embedding_dimension": config.n_embd,
                                  f"pooling_mode_{keys.get(mode, mode)}": True},
        "sentence_bert_config.json": {"max_seq_length": encoder["max_length"] or config.block_size,
                                      "do_lower_case": encoder["lower"]},
        "config_sentence_transformers.json": {
            "prompts": {"text": encoder["prompt"]},
            "default_prompt_name": "text" if encoder["prompt"] else None}}
    for name, content in files.items():
        write_text(folder / name, json.dumps(content, indent=1, ensure_ascii=False))


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


# -----------------------------------------------------------------------------
# Both ways

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
    of_classifier = family.pooler[1] if TASKS.get(kind) == "classify" else None
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
