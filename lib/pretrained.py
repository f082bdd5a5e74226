"""
Checkpoints of others, in and out: models as Hugging Face's transformers has them, with the heads of its
classes for tasks, PEFT's adapters, sentence-transformers' encoders, and nanoGPT's ckpt.pt.

What a family calls its settings and weights is in lib/families.py, where its files are in lib/hub.py.
"""
import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from config import UserError
from lib.families import (CLASS_ENDS, GPT2, Family, body_prefix, canonical, class_of, from_hf_config, guessed,
                          pooler_name, their_names, to_hf_config, turned, unused)
from lib.hub import ADAPTER_FILES, WEIGHT_FILES, base_of, folder_of, open_weights, read_json, say
from lib.rows import WORDS
from lib.run import write_text
from model import Config, Transformer


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
    try:
        return read_model(cls, open_source(path), dropout, block_size, dtype, whole)
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:  # values of any type and size may be in these files
        told = str(error).strip().split("\n")[0][:120]
        raise ValueError(f"{path}: its files are damaged ({type(error).__name__}: {told})") from error


def read_model(cls: type[Transformer], source: Source, dropout: float, block_size: int | None,
               dtype: torch.dtype, whole: bool) -> tuple[Transformer, dict]:
    path, family, weights, kind = source.path, source.family, source.weights, source.kind
    complete(source, block_size, whole)
    with torch.device("meta"):  # shapes without memory: the weights come from the files
        model = cls(Config(**source.settings | {"dropout": dropout}))
    missing, state, of_task = their_names(model, family, "", kind), {}, {}
    unused = set()
    linear, heads = family.tasks.get(CLASS_ENDS.get(kind), "?"), tuple(family.head.values())
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
    if unused:
        say(f"{path}: not used: {', '.join(sorted(unused))}")
    model.load_state_dict(state, assign=True, strict=False)  # each was checked above
    model.tie()
    model.published = published(source)
    if model.head is None and not of_task and (kind == family.lm or kind in CLASS_ENDS):
        model.published["lacks"] = f"{linear if kind in CLASS_ENDS else family.head['head']}.weight"
    return model.eval(), head_of(source, of_task, model) | trained_as(source) if of_task else {}


def complete(source: Source, block_size: int | None, whole: bool) -> None:
    """Add the settings that the weights tell, and not config.json."""
    family, settings, weights, kind = source.family, source.settings, source.weights, source.kind
    if block_size is not None:
        if block_size > settings["block_size"]:
            raise ValueError(f"block_size={block_size}: the model was made for {settings['block_size']}")
        settings["block_size"] = block_size
    speaks = any(name.startswith(tuple(family.head.values())) for name in weights)
    needs_head = family.fixed.get("head") == "mlm" or not settings.get("tied", True)
    if kind in CLASS_ENDS or needs_head and not speaks:
        settings["head"] = "none"  # else it is the embedding
        pooler = pooler_name(family, "", kind) + ".weight"
        if whole and pooler in weights:
            settings["pooler"] = family.pooler[0]
        elif whole and CLASS_ENDS.get(kind) == "classify" and family.fixed.get("head") == "mlm":
            raise ValueError(f"{source.path}: has no weight {pooler}, which a classifier of its class needs")
    layers = {name.split(".")[family.blocks.count(".") + 1] for name in weights
              if name.startswith(family.blocks + ".")}
    if settings["n_layer"] != len(layers):
        raise ValueError(f"{source.path}: config.json: {family.fields['n_layer']}={settings['n_layer']}, but "
                         f"there are weights of {len(layers)}")


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
        return nanogpt_source(str(path), checkpoint)
    folder = folder_of(path)
    place, adapter = base_of(folder)
    if not (place / "config.json").is_file():
        raise FileNotFoundError(f"{place}: has no config.json, so it is no Hugging Face model")
    config, weights = read_json(place / "config.json"), open_weights(place, WEIGHT_FILES)
    kind = config.get("model_type")
    if not kind:
        kind, by = guessed(config, weights)
        say(f"{path}: config.json has no model_type: read as {kind}, by its {by}")
    try:
        family, settings = from_hf_config({**config, "model_type": kind})
        Config(**settings)  # its types and ranges
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: config.json: {str(error).removeprefix('config.json: ')}") from None
    weights = {canonical(name, family): read for name, read in weights.items()}
    ends = class_of(config).removeprefix(family.name)
    if adapter:
        ends = add_adapter(weights, folder, adapter, family, settings) or ends
    weights = {name.removeprefix(body_prefix(family, ends)): read for name, read in weights.items()}
    return Source(str(path), place, {**config, "model_type": kind}, family, settings, ends, weights)


def nanogpt_source(path: str, checkpoint: dict) -> Source:
    settings = {name: value for name, value in checkpoint["model_args"].items() if value is not None}
    settings.setdefault("act", "gelu")  # exact, where GPT-2 approximates it
    family = GPT2._replace(transposed=False)
    weights = {canonical(name, family): w.detach for name, w in checkpoint["model"].items()}
    settings.setdefault("bias", "h.0.ln_1.bias" in weights)  # it was no setting once: all had them
    if "lm_head.weight" in weights:  # its own, of before nanoGPT tied it to the embedding
        settings["tied"] = torch.equal(weights["lm_head.weight"](), weights["wte.weight"]())
    return Source(path, None, {}, family, settings, family.lm, weights)


def of_nanogpt(checkpoint: dict) -> dict:
    """nanoGPT's checkpoint as one of ours, without a tokenizer and an optimizer. Raises UserError."""
    dropout = checkpoint["model_args"].get("dropout", 0.0)
    source = nanogpt_source("a checkpoint of nanoGPT", checkpoint)
    try:
        model = read_model(Transformer, source, dropout, None, torch.float32, whole=False)[0]
    except (TypeError, ValueError) as error:
        raise UserError(f"{source.path}, changed in a way that is not known here ({error})") from None
    return {"model": model.state_dict(), "model_args": asdict(model.config), "tokenizer": None,
            "settings": {}, "defaults": {}, "optimizer": {}, "rng": {}, "state": {"best": {}},
            "nanogpt": checkpoint.get("config", {})}


# -----------------------------------------------------------------------------
# The files' names for weights, and an adapter's

def add_adapter(weights: dict[str, Callable], folder: Path, adapter: dict, family: Family,
                settings: dict) -> str:
    """Add PEFT's low-rank matrices to the base's weights. Returns how its class is called, if said."""
    wanted = {"peft_type": ("LORA",), "use_dora": (False,), "fan_in_fan_out": (True, False)}
    for name, values in wanted.items():
        if adapter.get(name, values[0]) not in values:
            raise ValueError(f"adapter_config.json: {name}={adapter[name]!r}: only {values[0]} is supported")
    begun = str(adapter.get("init_lora_weights"))
    if begun.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ValueError(f"adapter_config.json: init_lora_weights={begun!r}: such an adapter changes its "
                         "base too: only those that do not are supported")
    added = {}
    for name, read in open_weights(folder, ADAPTER_FILES).items():
        name = re.sub(r"^base_model\.model\.|\.(modules_to_save|base_layer)\b", "", name)
        added[canonical(name, family)] = read
    whole = {name: read for name, read in added.items()  # trained as a whole
             if ".lora_" not in name and ".original_module." not in name}
    ends = [f"{family.names['wte']}.weight", f"{family.head.get('head')}.weight"]
    if settings.get("tied") and set(ends) & set(whole):  # each may have been trained for itself
        settings["tied"] = False
        weights.setdefault(ends[1], weights[ends[0]])
    if ends[0] in whole:
        settings["vocab_size"] = len(whole[ends[0]]())  # there may be new tokens
    weights |= whole
    for name, read in added.items():
        layer, low_rank, end = name.partition(".lora_")
        if not low_rank:
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
    generation = read_json(source.folder / "generation_config.json")
    for file, names in (("config.json", unused(source.config, source.family)),
                        ("generation_config.json", unused(generation))):
        if names:
            say(f"{source.path}: {file}: not used: {', '.join(names)}")
    return {"model_type": source.config["model_type"], "ids": ids, "generation": generation,
            "encoder": encoder_of(source.folder)}


def encoder_of(folder: Path) -> dict:
    """How a sentence encoder makes a text's vector, from the files of sentence-transformers; {} without."""
    modules = read_json(folder / "modules.json", list)
    types = {str(module.get("type")).rpartition(".")[2]: str(module.get("path")) for module in modules}
    name = types.get("Pooling", "1_Pooling")
    if Path(name).name != name:
        raise ValueError(f"{folder}/modules.json: damaged, or names files outside of its folder")
    pooling = read_json(folder / name / "config.json")
    if not pooling:
        return {}
    old = [name.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
           for name, value in pooling.items() if name.startswith("pooling_mode_") and value is True]
    modes = pooling.get("pooling_mode", old or ["mean"])
    modes = [modes] if isinstance(modes, str) else modes
    text = read_json(folder / "sentence_bert_config.json")
    prompts = read_json(folder / "config_sentence_transformers.json")
    prompt = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"), "")
    others = [f"{name} behind the pooling"
              for name in sorted(set(types) - {"Transformer", "Pooling", "Normalize"})]
    if prompt and pooling.get("include_prompt") is False:
        others.append("a prompt that is not pooled")
    length = text.get("max_seq_length")
    if type(length) not in (int, type(None)):
        raise ValueError(f"{folder}/sentence_bert_config.json: max_seq_length={length!r}: must be an int")
    if others:
        say(f"{folder}: not used: {', '.join(others)}")
    return {"pool": POOLS.get(modes[0], modes[0]) if len(modes) == 1 else " and ".join(modes),
            "normalize": "Normalize" in types, "max_length": length,
            "lower": bool(text.get("do_lower_case")), "prompt": prompt, "settings": prompts,
            "others": ", ".join(others)}


def head_of(source: Source, weights: dict, model: Transformer) -> dict:
    """The head of a class of theirs, as a checkpoint of ours keeps a task's. Raises ValueError."""
    config, task, rows = source.config, CLASS_ENDS[source.kind], len(weights.get("weight", ()))
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
        return head | {"words": "mixed"}
    problem = config.get("problem_type")
    two = {"entailment", "not_entailment", "contradiction", "duplicate", "equivalent"}  # are said of two
    of_two = bool(two & {label.lower() for label in labels}) or ACTIVATION in config
    head |= {"pool": "last" if model.config.causal else "first", "paired": of_two or None,  # None: either
             "several": problem == "multi_label_classification"}
    if problem != "regression" and rows > 1 or head["several"]:
        return head
    named = (config.get("sentence_transformers") or {}).get("activation_fn")
    told = named or config.get(ACTIVATION)
    named = told or "Identity"
    if rows > 1 or named.rpartition(".")[2] not in ("Identity", "Sigmoid"):
        raise ValueError(f"config.json: a score of {rows} numbers, by {named}: only one, by Identity or "
                         "Sigmoid, is supported")
    return head | {"task": "regress", "mean": 0.0, "std": 1.0, "labels": ["number"],
                   "sigmoid": named.endswith("Sigmoid") if told else None}


TRAINED_AS = ("words", "max_answer", "no_answer", "paired", "max_length")


def trained_as(source: Source) -> dict:
    """What an export of ours says of a task's inputs and answers, which transformers has no names for."""
    said, lengths = source.config.get("trained_as"), range(1, source.settings["block_size"] + 1)
    known = zip(TRAINED_AS, ([*WORDS], lengths, (True, False), (True, False), lengths), strict=True)
    return {name: said[name] for name, values in known if isinstance(said, dict) and said.get(name) in values}


# -----------------------------------------------------------------------------
# Out

class HeadError(ValueError):
    """A task's head that no class of transformers has."""


def save(model: Transformer, folder: str | Path, extra: dict, head: dict | None = None,
         encoder: dict | None = None) -> None:
    """What Transformer.save_pretrained promises. head: of a task, as head_of gives it. encoder: how a
    sentence encoder makes a vector, see encoder_of, if not as its published files say.

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
        wanted = head["task"].replace("regress", "classify")
        kind = next((end for end, task in CLASS_ENDS.items() if task == wanted), "")  # see head_to_hf
        model, of_task, more = head_to_hf(model, family, head)
        theirs |= more
    theirs["architectures"] = [family.name + kind]
    ours, weights = model.state_dict(), of_task
    for their, names in their_names(model, family, body_prefix(family, kind), kind).items():
        if names != ["head.weight"] or not model.config.tied:
            weight = torch.cat([ours[name] for name in names])
            weights[their] = turned(weight, names[0], family, model.config.head_dim).contiguous().cpu()
    theirs |= {"dtype": str(model.wte.weight.dtype).removeprefix("torch."), **said.get("ids", {}), **extra}
    encoder = said.get("encoder", {}) if encoder is None else encoder
    with together(Path(folder)) as new:
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        write_text(new / "config.json", json.dumps(theirs, indent=1, ensure_ascii=False))
        shutil.copymode(new / "config.json", new / "model.safetensors")  # else its owner's alone
        if said.get("generation"):
            write_text(new / "generation_config.json", json.dumps(said["generation"], indent=1))
        if encoder.get("others"):
            say(f"{encoder['others']} is not exported, so that this is no sentence encoder")
        elif encoder.get("pool") and not head:
            write_encoder(new, encoder, model.config)


@contextlib.contextmanager
def together(folder: Path) -> Iterator[Path]:
    """A folder to write a model's files into, which then take the places of those in `folder`.

    Killed in between, it has no config.json: no model is better than the weights of one with the settings of
    another.
    """
    new = folder / ".new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for name in ("config.json", "generation_config.json", "modules.json"):
            (folder / name).unlink(missing_ok=True)  # a new one may have none
        files = [path for path in new.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda path: path == new / "config.json"):  # which is the last
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
            place = folder / file.relative_to(new)
            place.parent.mkdir(exist_ok=True)
            os.replace(file, place)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing has come into it


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
        if abs(head["mean"]) > 2**14 * head["std"]:  # of seconds since 1970 float32 knows every 128th
            raise HeadError(f"numbers near {head['mean']:g}, {head['std']:g} apart: transformers adds "
                            "them up in float32, which cannot tell them apart")
        bias = torch.zeros(1) if bias is None else bias
        weight, bias = weight * head["std"], bias * head["std"] + head["mean"]
        act = "torch.nn.modules." + ("activation.Sigmoid" if head.get("sigmoid") else "linear.Identity")
        more = {"problem_type": "regression"}
        if head.get("sigmoid", False) is not None:  # its files told of none
            more["sentence_transformers"] = {"activation_fn": act}
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
    more["trained_as"] = {name: head[name] for name in TRAINED_AS if head.get(name) is not None}
    more |= {"id2label": dict(enumerate(labels)), "label2id": {label: k for k, label in enumerate(labels)}}
    weights = {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
    return model, {name: value.detach().cpu().contiguous() for name, value in weights.items()}, more


def read_as_trained(folder: str | Path, head: dict, tokenizer, pad: int) -> None:
    """An exported tokenizer reads texts as the task did: what is put before, behind and between them."""
    stored = read_json(Path(folder) / "tokenizer.json")
    before = [{"type": "Lowercase"}] * bool(head.get("lower"))
    before += [{"type": "Prepend", "prepend": " "}] * bool(head.get("space"))
    before += [stored["normalizer"]] * bool(stored["normalizer"])
    stored["normalizer"] = {"type": "Sequence", "normalizers": before} if before else None
    if stored["post_processor"] is None:
        name = {i: name for name, i in tokenizer.specials.items()}
        forms = []
        for texts in (([-1],), ([-1], [-2])):
            parts = zip(*tokenizer.wrap(*texts))
            forms.append([{"Sequence": {"id": "BA"[i], "type_id": kind}} if i < 0 else
                          {"SpecialToken": {"id": name[i], "type_id": kind}} for i, kind in parts])
        used = [part["SpecialToken"]["id"] for part in forms[1] if "SpecialToken" in part]
        stored["post_processor"] = {
            "type": "TemplateProcessing", "single": forms[0], "pair": forms[1],
            "special_tokens": {one: {"id": one, "ids": [tokenizer.specials[one]], "tokens": [one]}
                               for one in used}}
    write_text(Path(folder) / "tokenizer.json", json.dumps(stored, ensure_ascii=False))
    said = read_json(Path(folder) / "tokenizer_config.json")
    said |= {"pad_token": name for name, i in tokenizer.specials.items() if i == pad}
    write_text(Path(folder) / "tokenizer_config.json", json.dumps(said, ensure_ascii=False, indent=1))


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
    pools = {pool: their for their, pool in POOLS.items()}
    modes = [pools.get(pool, pool).removesuffix("_tokens") for pool in encoder["pool"].split(" and ")]
    keys = {"cls": "cls_token", "lasttoken": "lasttoken"}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modules = ["Transformer", "Pooling"] + ["Normalize"] * encoder["normalize"]
    files = {
        "modules.json": [{"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "",
                          "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(modules)],
        "1_Pooling/config.json": {"word_embedding_dimension": config.n_embd} | {
            f"pooling_mode_{keys.get(mode, mode + '_tokens')}": True for mode in modes},
        "sentence_bert_config.json": {"max_seq_length": encoder["max_length"] or config.block_size,
                                      "do_lower_case": encoder["lower"]},
        "config_sentence_transformers.json": encoder.get("settings") or {
            "prompts": {"text": encoder["prompt"]},
            "default_prompt_name": "text" if encoder["prompt"] else None}}
    for name, content in files.items():
        write_text(folder / name, json.dumps(content, indent=1, ensure_ascii=False))
