"""Checkpoints of other libraries, in and out."""
import json
import math
import os
import re
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import finetune
import sample
import train
from config import SettingError, UserError
from lib.hub import OWNERS
from lib.rows import Row
from lib.run import Machine, load_body, read_dict, save_checkpoint
from lib.tasks import TASKS
from lib.tokenizer import Tokenizer, make_tokenizer
from model import Config, Transformer
from test_model import MODERN, TINY
from tests.helpers import (FAMILIES, QUICK, ROOT, in_cache, posix, run_here, same, says, script, slow,
                           synthetic, theirs, tiny, tokens, write_rows)


tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


@pytest.mark.parametrize("name", FAMILIES)
def test_families_equal_transformers_in_and_out(name, tmp_path):
    their = theirs(name)
    their.save_pretrained(tmp_path / "in")
    model = Transformer.from_pretrained(tmp_path / "in")
    idx = tokens(3, 20, vocab_size=97).clamp(min=3)
    pad_mask = torch.ones_like(idx, dtype=torch.bool)
    pad_mask[0, 12:] = pad_mask[1, 5:] = False
    idx[~pad_mask] = 1
    segments = idx % 2 if model.config.n_segment > 1 else None
    more = {} if segments is None else {"token_type_ids": segments}
    with torch.no_grad():
        wanted = their(idx, attention_mask=pad_mask.long(), **more)[0]
        found = model.hidden(idx, pad_mask, segments)
        found = found if model.head is None else model.logits(found)
    torch.testing.assert_close(found[pad_mask], wanted[pad_mask], atol=1e-4, rtol=1e-4)
    if model.config.causal:
        prompt = tokens(2, 5, vocab_size=97)
        for penalty in (1.0, 1.4):
            text = their.generate(prompt, max_new_tokens=64, do_sample=False, repetition_penalty=penalty)
            ours = model.generate(prompt, 64, temperature=0, repetition_penalty=penalty)
            assert torch.equal(ours, text), penalty

    model.save_pretrained(tmp_path / "out")
    again, info = type(their).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info  # no key is missing, unexpected or of another shape
    assert same(again.state_dict(), their.state_dict())
    kinds = [json.loads((tmp_path / place / "config.json").read_text())["model_type"]
             for place in ("in", "out")]
    assert kinds[0] == kinds[1]


@pytest.fixture
def llama(tmp_path):
    """A folder as transformers saves it, with rope stretched as Llama 3 does, and its config.json."""
    theirs("llama 3").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama", json.loads((tmp_path / "llama/config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision_dropout_and_context_are_ours_to_choose(dtype, tmp_path):
    their = theirs("gpt2").to(dtype)
    their.save_pretrained(tmp_path)
    model = Transformer.from_pretrained(tmp_path, dropout=0.1, block_size=24)
    assert torch.equal(model.wte.weight, their.transformer.wte.weight.float())
    assert Transformer.from_pretrained(tmp_path, dtype=dtype).head.weight.dtype == dtype
    assert model.positions.wpe.weight.shape == (24, 32) and model.blocks[0].attn.dropout == 0.1
    with pytest.raises(ValueError, match="block_size=97: the model was made for 96"):
        Transformer.from_pretrained(tmp_path, block_size=97)


@pytest.mark.parametrize("name, weight, words", [
    ("lm_head.bias", torch.zeros(97), "weight lm_head.bias has no place"),
    ("model.norm.weight", torch.ones(33), r"norm.weight has shape \(33,\), but config.json says \(32,\)"),
    ("model.norm.weight", None, "has no weight model.norm.weight"),
    ("model.norm.weight", torch.full((32,), math.nan), "norm.weight: damaged: not all of its"),
    ("model.norm.weight", torch.full((32,), math.inf), "norm.weight: damaged: not all of its")])
def test_weights_that_do_not_fit_are_named(llama, name, weight, words):
    folder, _ = llama
    weights = safetensors.load_file(folder / "model.safetensors") | {name: weight}
    safetensors.save_file({name: value for name, value in weights.items() if value is not None},
                          folder / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        Transformer.from_pretrained(folder)


@pytest.mark.parametrize("name, content, words", [
    ("model.safetensors", b"\x10" * 99, "damaged"), ("model.safetensors", None, "has no model.safetensors"),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "only a pointer to it"),
    ("config.json", None, "has no config.json")])
def test_a_damaged_or_missing_file_is_named(llama, name, content, words):
    folder, _ = llama
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        Transformer.from_pretrained(folder)


@pytest.mark.parametrize("change, words", [
    ({"attention_bias": True}, "attention_bias=True"), ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"model_type": "t5"}, "'t5'"), ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"layer_types": ["sliding_attention"]}, "layer_types"), ({"hidden_size": None}, "no hidden_size")])
def test_what_we_cannot_follow_is_named(llama, change, words):
    folder, config = llama
    config = {name: value for name, value in {**config, **change}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        Transformer.from_pretrained(folder)


def test_what_is_not_followed_is_named_in_a_line(llama, capsys):
    folder, config = llama
    more = {"task_specific_params": {"summary": {"beams": 4}}, "odd_scale": 0.5, "odd_off": False}
    (folder / "config.json").write_text(json.dumps(config | more))
    (folder / "generation_config.json").write_text('{"top_p": 0.9, "eos_token_id": 5}')
    Transformer.from_pretrained(folder)
    assert capsys.readouterr().err.splitlines() == [
        f"({folder}: config.json: not used: task_specific_params, odd_scale)",
        f"({folder}: generation_config.json: not used: top_p)"]


def test_what_no_family_has_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match="nanochat, differs in act=gelu"):
        Transformer(Config(**TINY | MODERN | {"act": "gelu"})).save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_masked_model_fills_gaps():
    model = tiny("gpt2", causal=False, head="mlm", head_bias=True, vocab_size=258)
    tokenizer = make_tokenizer("bytes", [], 258)
    found = sample.fill(model, tokenizer, "a<|mask|>b<|mask|>", best=3)
    idx = torch.tensor([[ord("a"), tokenizer.mask, ord("b"), tokenizer.mask, tokenizer.eot]])
    for row, at in zip(found, (1, 3), strict=True):
        probs = model(idx)[0][0, at].softmax(-1)
        assert [p for _, p in row] == pytest.approx(probs.topk(3).values.tolist())
    for text, words in (("no gap", "<|mask|>"), ("x" * 20 + "<|mask|>", "22 tokens")):
        with pytest.raises(UserError, match=re.escape(words)):
            sample.fill(model, tokenizer, text)


@pytest.mark.parametrize("name, end", [("bert", ""), ("llama", ""), ("bert", "ForSequenceClassification")])
def test_characters_without_an_id_are_counted_wherever_a_text_is_read(name, end, tmp_path):
    if end:
        published_head(tmp_path / "in", name, end)
    else:
        theirs(name).save_pretrained(tmp_path / "in")
        write_tokenizer(tmp_path / "in", causal=name == "llama")
    start = "--start=中文中 a" + " [MASK]" * (name == "bert" and not end)
    said = run_here(sample, f"--init_from={tmp_path / 'in'}", start)
    told = "(the tokenizer has no ids for some characters: '中' 2 times, '文' 1 times)"
    assert said.count(told) == 1


@pytest.mark.parametrize("column, bias", [("modern", False), ("gpt2", False), ("gpt2", True)])
def test_a_run_is_exported_whole(column, bias, tmp_path):
    model = tiny(column, bias=bias, vocab_size=258, block_size=32)
    tokenizer = make_tokenizer("bytes", [], 258)
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run/ckpt.pt", {
        "version": 1, "model": model.state_dict(), "model_args": asdict(model.config), "iter_num": 1,
        "tokenizer": tokenizer.to_dict()})
    run_here(sample, "--out_dir=run", "--export=hf", cwd=tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("class A:", return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == tokenizer.encode("class A:")
    text = theirs.generate(**prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(text, model.generate(prompt["input_ids"], 20, temperature=0))
    again = run_here(sample, "--out_dir=hf", "--start=class A:", "--temperature=0", "--max_new_tokens=20",
                     cwd=tmp_path)
    ids = text[0].tolist()
    ids = ids[:ids.index(tokenizer.eot)] if tokenizer.eot in ids else ids
    assert again.startswith(tokenizer.decode(ids).rstrip("\ufffd")), again


# -----------------------------------------------------------------------------
# Files as they are published: old names, old formats, damage

def published_bert(folder, **config):
    """A small BERT with all that old files hold. Returns transformers' model."""
    their = theirs("bert")
    full = transformers.BertForPreTraining(their.config).eval()
    full.load_state_dict(their.state_dict(), strict=False)
    full.save_pretrained(folder)
    return full


def rewrite(folder, name, change):
    """Replace what a file of settings says. change: of the content, in place."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def old_name(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def as_bin(folder, zipped=True, shards=1, name=old_name):
    """The weights as torch saves them, in one file or several."""
    state = safetensors.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = list(state), {}
    for k in range(shards):
        file = f"pytorch_model-{k + 1:05}-of-{shards:05}.bin" if shards > 1 else "pytorch_model.bin"
        part = {name(one): state[one] for one in names[k::shards]}
        torch.save(part, folder / file, _use_new_zipfile_serialization=zipped)
        index.update(dict.fromkeys(part, file))
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize("zipped, shards", [(True, 1), (True, 3), (False, 1), (False, 3)])
def test_what_torch_saved_is_read_with_its_old_names(zipped, shards, tmp_path, capsys):
    their, idx = published_bert(tmp_path), tokens(2, 20, vocab_size=97)
    as_bin(tmp_path, zipped, shards)
    model = Transformer.from_pretrained(tmp_path)
    torch.testing.assert_close(model(idx)[0], their(idx).prediction_logits, atol=1e-4, rtol=1e-4)
    assert "not used: cls.seq_relationship, pooler.dense" in capsys.readouterr().err


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_nothing_in_a_file_runs_and_a_flipped_byte_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published_bert(tmp_path)
    as_bin(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # in a weight
    file.write_bytes(content)
    with pytest.raises(ValueError, match="pytorch_model.bin: damaged"):
        Transformer.from_pretrained(tmp_path)
    torch.save({"x": Evil()}, file)
    with pytest.raises(ValueError, match="pytorch_model.bin: damaged, or more than tensors") as error:
        Transformer.from_pretrained(tmp_path)
    says(error)
    assert not (tmp_path / "pwned").exists()


def test_a_config_without_its_kind_is_known_by_class_or_weights(tmp_path, capsys):
    for name in ("bert", "roberta", "distilbert", "gpt2", "mistral", "qwen2", "qwen3"):
        theirs(name).save_pretrained(tmp_path / name)
        for field, by in (("model_type", "class"), ("architectures", "weights")):
            rewrite(tmp_path / name, "config.json", lambda config, field=field: config.pop(field))
            Transformer.from_pretrained(tmp_path / name)
            kind = "llama" if (name, by) == ("mistral", "weights") else name  # whose weights are called alike
            assert f"no model_type: read as {kind}, by its {by}" in capsys.readouterr().err


HOSTILE = {  # what is in config.json -> what the one line says
    "num_hidden_layers": (10**6, "num_hidden_layers=1000000, but there are weights of 2"),
    "hidden_size": ("32", "n_embd='32'"),
    "vocab_size": (10**18, ""), "num_attention_heads": (0, ""), "intermediate_size": ([], ""),
    "max_position_embeddings": (None, ""), "rms_norm_eps": ("x", ""), "rope_parameters": ([1], ""),
    "head_dim": (10**15, ""), "tie_word_embeddings": ("maybe", "tied='maybe'"),
    "layer_types": (7, ""), "eos_token_id": ({}, "eos_token_id"), "model_type": (["llama"], ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_settings_are_one_line(name, llama):
    folder, _ = llama
    value, words = HOSTILE[name]
    rewrite(folder, "config.json", lambda config: config.update({name: value}))
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(folder)
    says(error, words, str(folder))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b"{" * 10**5, b'"a"', b"null",
                                     b'{"weight_map": 3}', b'{"weight_map": {"x": "../model.safetensors"}}',
                                     b'{"weight_map": {"x": "/etc/passwd"}}', b'{"weight_map": {"x": 1}}'])
def test_damaged_settings_are_one_line(file, content, llama):
    folder, _ = llama
    (folder / file).write_bytes(content)
    if file == "generation_config.json" and content.startswith(b'{"w'):
        return
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(folder)
    says(error, str(folder))


# -----------------------------------------------------------------------------
# Heads of others

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + letter for letter in LETTERS)]


def write_tokenizer(folder, causal=False):
    """A tokenizer of letters with BERT's template, or with none."""
    fast = tokenizers.Tokenizer(tokenizers.models.WordPiece({word: i for i, word in enumerate(WORDS)},
                                                            unk_token="[UNK]"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    more = {"eos_token": "[SEP]"}
    if not causal:
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        more = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[PAD]", unk_token="[UNK]",
                                                **more)
    made.save_pretrained(folder)
    return made


def published_head(folder, name, end, labels=("no", "yes", "may be"), **config):
    """A small random model of one of transformers' classes for tasks, with its tokenizer."""
    fields = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0} | FAMILIES[name][1]
    cls = getattr(transformers, theirs(name).base_model.__class__.__name__.removesuffix("Model") + end)
    made = cls.config_class(**fields, id2label=dict(enumerate(labels)), **config)
    torch.manual_seed(0)
    their = cls(made).eval()
    with torch.no_grad():
        for p in their.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    their.save_pretrained(folder)
    return their, write_tokenizer(folder, causal=name in ("gpt2", "llama", "mistral", "qwen2", "qwen3"))


def same_class(folder, their):
    """Does transformers load the folder strictly, as the same class with the same weights?"""
    again, info = type(their).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert same(again.state_dict(), their.state_dict()) and again.config.id2label == their.config.id2label


QUICKLY = {("bert", "ForSequenceClassification"), ("llama", "ForSequenceClassification"),
           ("roberta", "ForTokenClassification"), ("distilbert", "ForQuestionAnswering")}
OF_TASKS = [pytest.param(name, end, marks=[slow] * ((name, end) not in QUICKLY))
            for end in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
            for name in ("bert", "roberta", "xlm-roberta", "distilbert", "gpt2", "llama", "mistral", "qwen3")]


@pytest.mark.parametrize("name, end", OF_TASKS)
@torch.no_grad()
def test_heads_of_others_equal_transformers_in_and_out(name, end, tmp_path):
    labels = ("LABEL_0", "LABEL_1") if end == "ForQuestionAnswering" else ("no", "yes", "may be")
    their, tokenizer = published_head(tmp_path / "in", name, end, labels)
    model, ours = sample.load(tmp_path / "in")
    texts = ["abc de f9", "hello"]
    if end == "ForTokenClassification":  # Chinese has no spaces, and each character its tag
        assert model.task.row("", "我们 en中X，文").words == ["我", "们", "en", "中", "X，", "文"]
    for text in texts:
        wanted = their(**tokenizer(text, return_tensors="pt", return_token_type_ids=name == "bert"))
        if end == "ForSequenceClassification":
            found = model.predict([text])[0]
            wanted = wanted.logits[0].softmax(-1).tolist()
            assert [found[f"prob_{label}"] for label in labels] == pytest.approx(wanted, abs=1e-5)
            continue
        wanted = wanted.logits if "logits" in wanted else torch.stack((wanted.start_logits,
                                                                       wanted.end_logits), -1)
        ids, segments = ours.wrap(ours.encode(text))
        found = model(torch.tensor([ids]), None, torch.tensor([segments]) if name == "bert" else None)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    sample.write_pretrained(model, ours, tmp_path / "out")
    same_class(tmp_path / "out", their)


def test_a_score_is_the_logit_unless_its_files_say_otherwise(tmp_path):
    for activation, wanted in ((None, "logit"), ("torch.nn.modules.linear.Identity", "logit"),
                               ("torch.nn.modules.activation.Sigmoid", "sigmoid"), ("x.Tanh", "refused")):
        their, tokenizer = published_head(tmp_path / "in", "bert", "ForSequenceClassification", ["LABEL_0"])
        named = {} if activation is None else {"sbert_ce_default_activation_function": activation}
        rewrite(tmp_path / "in", "config.json", lambda config, named=named: config.update(named))
        if wanted == "refused":
            with pytest.raises(UserError, match="Tanh"):
                sample.load(tmp_path / "in")
            return
        model, ours = sample.load(tmp_path / "in")
        read = tokenizer("ab c", "de", return_tensors="pt", return_token_type_ids=True)
        score = their(**read).logits[0, 0]
        score = score.sigmoid() if wanted == "sigmoid" else score
        assert model.predict([("ab c", "de")])[0]["prediction"] == pytest.approx(score.item(), abs=1e-5)
        sample.write_pretrained(model, ours, tmp_path / "out")
        again, ours = sample.load(tmp_path / "out")
        assert again.predict([("ab c", "de")])[0]["prediction"] == pytest.approx(score.item(), abs=1e-5)
        exported = json.loads((tmp_path / "out/config.json").read_text())
        assert exported.get("sentence_transformers") == (activation and {"activation_fn": activation})


@slow
def test_sample_and_explain_use_a_published_head_and_finetune_goes_on_with_its_body(tmp_path):
    published_head(tmp_path / "in", "bert", "ForSequenceClassification")
    said = run_here(sample, f"--out_dir={tmp_path / 'in'}", "--start=abc de")
    assert "prediction" in said and "prob_may be" in said
    texts, labels = synthetic(60)
    data = write_rows(tmp_path / "data.csv", ("label", "text"), labels, texts)
    said = run_here(finetune, f"--data={data}", f"--init_from={tmp_path / 'in'}", "--epochs=1",
                    f"--out_dir={tmp_path / 'out'}", "--device=cpu")
    assert "not used: classifier, pooler.dense)" in said
    assert "pooling   first, of 96 tokens at most" in said
    done = script("tools/explain.py", "--out_dir=in", "--start=abc de", "--samples=20", cwd=tmp_path)
    assert done.returncode == 0 and "explained: " in done.stdout, done.stderr


def test_a_published_classifier_teaches(tmp_path):
    their, tokenizer = published_head(tmp_path / "in", "bert", "ForSequenceClassification")
    model, _ = sample.load(tmp_path / "in")
    taught, _ = finetune.teacher_probs(str(tmp_path / "in"), model.task, [Row("", "abc de")], Machine("cpu"))
    with torch.no_grad():
        wanted = their(**tokenizer("abc de", return_tensors="pt")).logits.softmax(-1)
    torch.testing.assert_close(taught, wanted, rtol=1e-5, atol=1e-5)
    theirs("bert").save_pretrained(tmp_path / "body")
    write_tokenizer(tmp_path / "body", causal=False)
    with pytest.raises(SettingError, match="teacher=.*body: has no head for classes"):
        finetune.teacher_probs(str(tmp_path / "body"), model.task, [], Machine("cpu"))


# -----------------------------------------------------------------------------
# Adapters, sentence encoders, ids on the hub

ADAPTERS = [("gpt2", "", dict(target_modules=["c_attn", "c_fc"])),
            ("llama", "", dict(target_modules=["q_proj", "down_proj"], use_rslora=True)),
            ("qwen2", "", dict(target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 3})),
            ("qwen2", "", dict(target_modules=["q_proj", "lm_head"], bias="all")),
            ("llama grouped, tied", "", dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
            ("llama grouped, tied", "", dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
            ("bert", "ForSequenceClassification", dict(target_modules=["query"], task_type="SEQ_CLS"))]


@pytest.mark.parametrize("name, end, how", ADAPTERS)
@torch.no_grad()
def test_an_adapter_is_added_to_its_base(name, end, how, tmp_path):
    peft = pytest.importorskip("peft")
    if end:
        their, _ = published_head(tmp_path / "base", name, end)
    else:
        their = theirs(name)
        their.save_pretrained(tmp_path / "base")
        write_tokenizer(tmp_path / "base", causal=True)
    their.name_or_path = str(tmp_path / "base")
    if "lm_head" in how.get("modules_to_save", ()):
        their.resize_token_embeddings(their.config.vocab_size + 3)  # as for new special tokens
    their = peft.get_peft_model(their, peft.LoraConfig(r=3, lora_alpha=5, **how)).eval()
    for p in their.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p) * 0.2)
    their.save_pretrained(tmp_path / "adapter")
    idx = tokens(2, 12, vocab_size=77)
    model, _ = sample.load(tmp_path / "adapter")
    found = model(idx, None) if end else model(idx)[0]
    torch.testing.assert_close(found, their(idx).logits, atol=1e-4, rtol=1e-4)
    rewrite(tmp_path / "adapter", "adapter_config.json",
            lambda config: config.update(base_model_name_or_path="no/where"))
    with pytest.raises(UserError, match="adapter of 'no/where'") as error:
        sample.load(tmp_path / "adapter")
    says(error)


def sentence_encoder(folder, pooling, normalize=True, **text):
    """A BERT with its files of sentence-transformers, as old versions wrote them."""
    theirs("encoder").save_pretrained(folder)
    write_tokenizer(folder)
    modules = ["Transformer", "Pooling"] + ["Normalize"] * normalize
    (folder / "1_Pooling").mkdir()
    files = {"1_Pooling/config.json": {"word_embedding_dimension": 32, **pooling},
             "sentence_bert_config.json": {"max_seq_length": 8, "do_lower_case": False, **text},
             "modules.json": [{"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "",
                               "type": f"sentence_transformers.models.{name}"}
                              for i, name in enumerate(modules)]}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


SENTENCES = ["ab cde f", "Hello 99", "a b c d e f g h i j k l m n"]  # the last is longer than 8 tokens


@pytest.mark.parametrize("pooling, normalize, text", [
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, True, {}),
    ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, False, {"do_lower_case": True}),
    ({"pooling_mode": "lasttoken"}, True, {"max_seq_length": None}), ({"pooling_mode": "mean"}, True, {})])
def test_sentence_vectors_equal_sentence_transformers_in_and_out(pooling, normalize, text, tmp_path):
    import sentence_transformers as st  # slow to import
    sentence_encoder(tmp_path / "in", pooling, normalize, **text)
    more = {"prompts": {"query": "b c ", "document": ""}, "similarity_fn_name": "dot",
            "default_prompt_name": "query" if normalize else None}
    (tmp_path / "in/config_sentence_transformers.json").write_text(json.dumps(more))
    wanted = st.SentenceTransformer(str(tmp_path / "in"), device="cpu").encode(SENTENCES)
    model, tokenizer = sample.load(tmp_path / "in")
    assert finetune.vectors(model, tokenizer, SENTENCES) == pytest.approx(wanted, abs=1e-5)
    sample.write_pretrained(model, tokenizer, tmp_path / "out")
    again = st.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert again.encode(SENTENCES) == pytest.approx(wanted, abs=1e-5)
    assert again.prompts == more["prompts"] and again.similarity_fn_name == "dot"


def test_a_fine_tuned_encoder_is_exported_as_it_was_trained(tmp_path):
    """Its pooling and length, not its publisher's, and no prompt that training did not put before texts."""
    sentence_encoder(tmp_path / "in", {"pooling_mode": "mean"})
    prompts = {"prompts": {"query": "b c "}, "default_prompt_name": "query"}
    (tmp_path / "in/config_sentence_transformers.json").write_text(json.dumps(prompts))
    body, tokenizer = sample.load(tmp_path / "in")
    head = {"task": "regress", "labels": ["number"], "apart": True, "paired": True, "pool": "first",
            "max_length": 5, "mean": 0.0, "std": 1.0}
    tuned = finetune.Tuned(body, TASKS["regress"](head, tokenizer)).eval()
    sample.write_pretrained(tuned, tokenizer, tmp_path / "out")
    read = [tuned.task.wrapped(ids)[0] for ids in tuned.task.encoded(SENTENCES)]
    wanted = torch.cat([body.hidden(torch.tensor([ids.tolist()]))[:, 0] for ids in read])  # not its mean
    again, its_tokenizer = sample.load(tmp_path / "out")
    found = torch.from_numpy(finetune.vectors(again, its_tokenizer, SENTENCES))
    torch.testing.assert_close(found, F.normalize(wanted), atol=1e-5, rtol=1e-4)
    assert read_dict(tmp_path / "out/config_sentence_transformers.json") == {
        "prompts": {"query": "b c "}, "default_prompt_name": None}
    assert read_dict(tmp_path / "out/sentence_bert_config.json")["max_seq_length"] == 5
    with torch.no_grad():  # a vector of length 0 has none of length 1
        again.blocks[-1].norm2.weight.zero_()
        again.blocks[-1].norm2.bias.zero_()
    assert (finetune.vectors(again, its_tokenizer, SENTENCES) == 0).all()


@pytest.mark.parametrize("file, change, words", [
    ("1_Pooling/config.json", {"include_prompt": False}, "not supported: a prompt that is not pooled"),
    ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "mean and max: only cls, lasttoken"),
    ("modules.json", [{"type": "x.Pooling", "path": "1_Pooling"}, {"type": "x.Dense", "path": "2_Dense"}],
     "not supported: Dense behind the pooling")])
def test_vectors_that_need_more_are_not_made_without_it(file, change, words, tmp_path):
    sentence_encoder(tmp_path, {"pooling_mode_mean_tokens": True})
    prompts = {"prompts": {"query": "b c "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    content = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(content | change if isinstance(change, dict) else change))
    model, tokenizer = sample.load(tmp_path)
    with pytest.raises(UserError, match=words):
        finetune.vectors(model, tokenizer, SENTENCES)
    table = write_rows(tmp_path / "a.csv", ("text",), SENTENCES)
    with pytest.raises(UserError, match="a.csv: a table, .*one a line"):
        run_here(sample, f"--out_dir={tmp_path}", f"--start=FILE:{table}")
    sample.write_pretrained(model, tokenizer, tmp_path / "out")
    written = tmp_path / "out/1_Pooling/config.json"
    assert written.exists() == ("max" in words)
    assert not written.exists() or set(content | change) == set(json.loads(written.read_text()))


@slow
def test_a_fine_tuned_run_and_its_export_pool_as_the_encoder_did(tmp_path):
    import sentence_transformers as st  # slow to import
    sentence_encoder(tmp_path / "in", {"pooling_mode": "mean"}, False)
    texts, labels = synthetic(60)
    data = write_rows(tmp_path / "data.csv", ("label", "text"), labels, texts)
    said = run_here(finetune, f"--data={data}", f"--init_from={tmp_path / 'in'}", "--epochs=1",
                    f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--learning_rate=1e-3")
    assert "pooling   mean, of 8 tokens at most" in said
    said = run_here(sample, f"--out_dir={tmp_path / 'out'}", f"--export={tmp_path / 'hf'}")
    assert "pool=mean: transformers' Bert has no such head (it reads the first token): the head is" in said
    again = st.SentenceTransformer(str(tmp_path / "hf"), device="cpu")
    model, tokenizer = sample.load(tmp_path / "out")
    wanted = finetune.vectors(model.body, tokenizer, SENTENCES)
    assert again.encode(SENTENCES) == pytest.approx(wanted, abs=1e-5)
    said = run_here(sample, f"--out_dir={tmp_path / 'hf'}", "--start=ab cde\nab cde\nfgh").splitlines()
    assert said[0].startswith(" 1.0000") and said[1] == said[0] and not said[2].startswith(" 1.0")
    sentence_encoder(tmp_path / "max", {"pooling_mode": "max"})
    with pytest.raises(UserError, match="pools by max, which is not supported: --pool=mean"):
        run_here(finetune, f"--data={data}", f"--init_from={tmp_path / 'max'}", f"--out_dir={tmp_path / 'x'}")


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path):
    theirs("encoder").save_pretrained(tmp_path)
    made = write_tokenizer(tmp_path)
    made.add_tokens([f"<extra{i}>" for i in range(40)])
    made.save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        sample.load(tmp_path)
    says(error, f"{tmp_path.as_posix()}: its tokenizer has 117 tokens, its embedding 97")
    model = tiny("gpt2", vocab_size=258)
    for head in ({}, {"head": {"task": "classify", "weights": {}}}):
        (tmp_path / "run").mkdir(exist_ok=True)
        save_checkpoint(tmp_path / "run/ckpt.pt", {
            "version": 1, "model": model.state_dict(), "model_args": asdict(model.config), "iter_num": 1,
            "tokenizer": make_tokenizer("bpe", [TEXT], 300).to_dict(), **head})
        for read in (sample.load, load_body):
            with pytest.raises(UserError) as error:
                read(tmp_path / "run")
            says(error, "the checkpoint: its tokenizer has 300 tokens, its embedding 258")


@posix
def test_exported_files_can_be_read_by_others(tmp_path):
    theirs("gpt2").save_pretrained(tmp_path / "in")
    before = os.umask(0o027)
    try:
        Transformer.from_pretrained(tmp_path / "in").save_pretrained(tmp_path / "out")
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()} == {"0o640"}


# -----------------------------------------------------------------------------
# What finetune.py made, out

TUNED = {  # what is learned -> on which body, with which settings; columns of the data
    "classify": ("bert", [], ("label", "text")), "classify, relu": ("distilbert", [], ("label", "text")),
    "several": ("roberta", ["--multi_label"], ("label", "text")), "regress": ("bert", ["--task=regress"], ()),
    "last": ("llama", [], ("label", "text")), "lora": ("bert", ["--lora_rank=2"], ("label", "text"))}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[slow] * (case != "classify")) for case in TUNED])
def test_what_was_fine_tuned_is_exported_with_head_and_labels(case, tmp_path):
    name, args, header = TUNED[case]
    theirs(name).save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in", causal=name == "llama")
    texts, labels = synthetic(60)
    labels = [str(len(text)) for text in texts] if case == "regress" else labels
    data = write_rows(tmp_path / "data.csv", ("label", "text"), labels, texts)
    run_here(finetune, f"--data={data}", f"--init_from={tmp_path / 'in'}", f"--out_dir={tmp_path / 'out'}",
             "--epochs=2", "--device=cpu", "--learning_rate=1e-3", *args)
    if case == "lora":
        for file in tmp_path.glob("out/*ckpt*.pt"):
            file.unlink()
        (tmp_path / "out/best.pt").unlink()
    run_here(sample, f"--out_dir={tmp_path / 'out'}", f"--export={tmp_path / 'hf'}")
    model, _ = sample.load(tmp_path / "out")
    their, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in texts[:5]:
        found = model.predict([text])[0]
        logits = their.eval()(**tokenizer(text, return_tensors="pt")).logits[0]
        if case == "regress":
            assert logits.item() == pytest.approx(found["prediction"], rel=1e-4)
            continue
        probs = logits.sigmoid() if case == "several" else logits.softmax(-1)
        assert probs.detach().tolist() == pytest.approx([found["prob_bad"], found["prob_good"]], abs=1e-4)
    if case != "regress":
        assert their.config.id2label == {0: "bad", 1: "good"}
    again, _ = sample.load(tmp_path / "hf")
    assert again.predict(texts[:5])[0].keys() == model.predict(texts[:5])[0].keys()


@slow
def test_taggers_and_answerers_are_exported(tmp_path):
    theirs("bert").save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    texts, _ = synthetic(40)
    lines = [{"tokens": text.split(), "tags": ["B-X" if word in ("fine", "dull") else "O"
                                                for word in text.split()]} for text in texts]
    (tmp_path / "tags.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = []
    for i, text in enumerate(texts):
        answer = {"text": text.split()[0], "answer_start": 0}
        questions = [{"id": str(i), "question": "which word", "answers": [answer]}]
        asked.append({"title": str(i), "paragraphs": [{"context": text, "qas": questions}]})
    (tmp_path / "qa.json").write_text(json.dumps({"data": asked}))
    for task, data, cls in (("tag", "tags.jsonl", "TokenClassification"),
                            ("qa", "qa.json", "QuestionAnswering")):
        run_here(finetune, f"--data={tmp_path / data}", f"--task={task}", f"--init_from={tmp_path / 'in'}",
                 f"--out_dir={tmp_path / task}", "--epochs=1", "--device=cpu", "--learning_rate=1e-3")
        run_here(sample, f"--out_dir={tmp_path / task}", f"--export={tmp_path / (task + '_hf')}")
        model, _ = sample.load(tmp_path / task)
        their, info = getattr(transformers, "AutoModelFor" + cls).from_pretrained(
            tmp_path / (task + "_hf"), output_loading_info=True)
        assert not any(info.values()), info
        idx = tokens(2, 12, vocab_size=77)
        found, wanted = model(idx, None), their.eval()(idx)
        wanted = wanted.logits if task == "tag" else torch.stack((wanted.start_logits, wanted.end_logits), -1)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert their.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


@pytest.mark.parametrize("task, more", [
    ("classify", {"labels": ["a", "b"], "several": False, "pool": "first", "paired": True}),
    ("tag", {"labels": ["B-x", "O"], "words": "spaces"}),
    ("qa", {"labels": ["first", "last"], "paired": True, "no_answer": True, "max_answer": 2})])
def test_an_export_that_is_read_back_says_the_same(task, more, tmp_path):
    """What is cut where, which words are tagged, how long an answer is, and whether there is one."""
    theirs("bert").save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    body, tokenizer = load_body(str(tmp_path / "in"))
    finetune.fit_head(body, TASKS[task])
    head = {"task": task, "max_length": 24, "pool": None, "paired": False, "apart": False, "columns": {},
            **more}
    model = finetune.Tuned(body, TASKS[task](head, tokenizer)).eval()
    torch.nn.init.normal_(model.head.weight)
    sample.write_pretrained(model, tokenizer, str(tmp_path / "out"))
    again = sample.load(tmp_path / "out")[0]
    texts = ["fine w1", "w3 " * 40 + "fine", "北京fine 好", "w1\nw2 fine"]
    asked = texts if task == "tag" else [(text, other) for text in texts for other in texts]
    asked += ["fine\nw1 w2"] if task == "classify" else []
    for ours, back in zip(model.predict(asked), again.predict(asked), strict=True):
        numbers = {name: value for name, value in ours.items() if isinstance(value, float)}
        assert {name: back[name] for name in numbers} == pytest.approx(numbers, abs=1e-5)
        assert back.get("prediction") == ours["prediction"]


def test_a_body_that_knows_no_first_and_second_text_is_told_of_none(tmp_path):
    """transformers' GPT2 would add to each vector that of the token 0 or 1."""
    theirs("gpt2").save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    rewrite(tmp_path / "in", "tokenizer_config.json", lambda one: one.update(model_input_names=[
        "input_ids", "token_type_ids", "attention_mask"]))
    body, tokenizer = load_body(str(tmp_path / "in"))
    sample.write_pretrained(body, tokenizer, str(tmp_path / "out"))
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("ab c", "de", return_tensors="pt")
    their = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = body.logits(body.eval().hidden(read["input_ids"]))
    torch.testing.assert_close(their(**read).logits, found, atol=1e-4, rtol=1e-4)


def test_numbers_that_float32_cannot_tell_apart_are_not_exported(tmp_path, capsys):
    theirs("bert").save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    body, tokenizer = load_body(str(tmp_path / "in"))
    finetune.fit_head(body, TASKS["regress"])
    for mean, told in ((2000.0, False), (1.7e9, True)):
        head = {"task": "regress", "labels": ["number"], "mean": mean, "std": 3.0, "max_length": 24,
                "pool": "first", "paired": False, "apart": False, "columns": {}}
        model = finetune.Tuned(body, TASKS["regress"](head, tokenizer)).eval()
        sample.write_pretrained(model, tokenizer, str(tmp_path / "out"))
        assert ("the head is left out" in capsys.readouterr().err) is told


@slow
def test_a_classifier_from_scratch_is_read_by_others_as_it_was_trained(tmp_path):
    texts, labels = synthetic(60)
    data = write_rows(tmp_path / "data.csv", ("label", "text"), labels, texts)
    run_here(finetune, f"--data={data}", f"--out_dir={tmp_path / 'out'}", *QUICK, "--causal=True",
             "--act=swiglu", "--bias=False", "--epochs=1", "--n_inner=40", "--max_length=40")
    run_here(sample, f"--out_dir={tmp_path / 'out'}", f"--export={tmp_path / 'hf'}")
    model, _ = sample.load(tmp_path / "out")
    assert model.task.head["space"] and model.pool == "last"
    their = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.model_max_length == 40
    with torch.no_grad():
        probs = their(**tokenizer(texts[:8], return_tensors="pt", padding=True)).logits.softmax(-1)
    found = [[one["prob_bad"], one["prob_good"]] for one in model.predict(texts[:8])]
    torch.testing.assert_close(probs, torch.tensor(found), atol=1e-4, rtol=1e-4)


@slow
def test_an_export_keeps_generation_settings_and_ids_through_training(tmp_path):
    their, wanted = theirs("llama"), {"eos_token_id": [3, 5], "bos_token_id": 2, "top_p": 0.9}
    their.save_pretrained(tmp_path / "in")
    (tmp_path / "in/generation_config.json").write_text(json.dumps(wanted))
    rewrite(tmp_path / "in", "config.json", lambda config: config.update(eos_token_id=[3, 5], bos_token_id=2))
    write_tokenizer(tmp_path / "in", causal=True)
    (tmp_path / "data.txt").write_text("\n\n".join(synthetic(40)[0]))
    run_here(finetune, f"--data={tmp_path / 'data.txt'}", "--task=lm", f"--init_from={tmp_path / 'in'}",
             f"--out_dir={tmp_path / 'out'}", "--epochs=1", "--device=cpu")
    for start in ("in", "out"):
        run_here(sample, f"--out_dir={tmp_path / start}", f"--export={tmp_path / 'hf'}")
        assert json.loads((tmp_path / "hf/generation_config.json").read_text()) == wanted
        config = json.loads((tmp_path / "hf/config.json").read_text())
        assert (config["eos_token_id"], config["bos_token_id"]) == ([3, 5], 2)


@pytest.mark.parametrize("file, content", [
    ("modules.json", [{"type": "x.Pooling", "path": "../1_Pooling"}]), ("modules.json", [3]),
    ("modules.json", {}),
    ("1_Pooling/config.json", {"pooling_mode": 3}), ("sentence_bert_config.json", {"max_seq_length": "many"}),
    ("sentence_bert_config.json", []), ("config_sentence_transformers.json", {"prompts": [1]})])
def test_hostile_files_of_an_encoder_are_one_line(file, content, tmp_path):
    sentence_encoder(tmp_path, {"pooling_mode": "mean"})
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        sample.load(tmp_path)
    says(error, str(tmp_path))


@pytest.mark.parametrize("change", [
    {"peft_type": "IA3"}, {"use_dora": True}, {"init_lora_weights": "pissa_niter_4"}, {"lora_alpha": "x"},
    {"alpha_pattern": {"(": 3}}, {"alpha_pattern": 3}, {"task_type": []}, {"base_model_name_or_path": None},
    {"base_model_name_or_path": ""}])
def test_hostile_adapters_are_one_line(change, tmp_path):
    theirs("llama").save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base", causal=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    (tmp_path / "adapter").mkdir()
    safetensors.save_file({name.format("A"): torch.ones(2, 32), name.format("B"): torch.ones(32, 2)},
                          tmp_path / "adapter/adapter_model.safetensors")
    how = {"peft_type": "LORA", "lora_alpha": 4, "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(how))
    sample.load(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(how | change))
    with pytest.raises(UserError) as error:
        sample.load(tmp_path / "adapter")
    says(error, str(tmp_path))


# -----------------------------------------------------------------------------
# Published models: small ones of the same kind, under their ids in an offline cache

PRETRAINING = {"cls.seq_relationship.weight": (2, 32), "cls.seq_relationship.bias": (2,),
               "bert.pooler.dense.weight": (32, 32), "bert.pooler.dense.bias": (32,)}
PUBLISHED = {  # id -> the family; then what its files are like
    "openai-community/gpt2": ("gpt2", dict(prefix="", extra={"h.0.attn.bias": (1, 1, 96, 96)})),
    "distilbert/distilgpt2": ("gpt2", {}),
    "uer/gpt2-chinese-cluecorpussmall": ("gpt2", dict(bin=True, lost=["bos_token_id", "eos_token_id"])),
    "google-bert/bert-base-uncased": ("bert", dict(old=True, extra=PRETRAINING)),
    "google-bert/bert-base-chinese": ("bert", dict(old=True, extra=PRETRAINING)),
    "hfl/chinese-roberta-wwm-ext": ("bert", dict(old=True, bin=True, extra=PRETRAINING)),
    "prajjwal1/bert-tiny": ("encoder", dict(bin=True, lost=["model_type", "architectures"])),
    "FacebookAI/roberta-base": ("roberta", dict(extra={"roberta.embeddings.position_ids": None})),
    "FacebookAI/xlm-roberta-base": ("xlm-roberta", {}),
    "distilbert/distilbert-base-uncased": ("distilbert", {}),
    "HuggingFaceTB/SmolLM2-135M": ("llama grouped, tied", dict(rope=100000)),
    "jingyaogong/MiniMind2-Small": ("llama", dict(rope=1e6)),
    "meta-llama/Llama-3.2-1B": ("llama 3", dict(rope=500.0)),
    "mistralai/Mistral-7B-v0.1": ("mistral's window", dict(rope=10000.0, shards=2)),
    "Qwen/Qwen2.5-0.5B": ("qwen2", dict(rope=1e6)),
    "Qwen/Qwen3-0.6B": ("qwen3", dict(rope=1000000, shards=3)),
    "karpathy/nanochat-d32": ("nanochat", {}),
    "sentence-transformers/all-MiniLM-L6-v2": ("encoder", dict(pooling=("mean", True))),
    "BAAI/bge-small-en-v1.5": ("encoder", dict(pooling=("first", True))),
    "shibing624/text2vec-base-chinese": ("encoder", dict(pooling=("mean", False))),
}


def publish(folder, name):
    """Returns transformers' model of the same weights."""
    family, how = PUBLISHED[name]
    their = theirs(family)
    if "pooling" in how:
        pool, normalize = how["pooling"]
        key = {"mean": "mean_tokens", "first": "cls_token"}[pool]
        sentence_encoder(folder, {f"pooling_mode_{key}": True}, normalize)
    else:
        their.save_pretrained(folder, **{"max_shard_size": "20KB"} if "shards" in how else {})
        write_tokenizer(folder, causal=not family.endswith(("bert", "roberta", "encoder")))
    config = json.loads((folder / "config.json").read_text())
    for field in how.get("lost", ()):
        config.pop(field, None)
    if "rope" in how:  # as before transformers 5
        rope = config.pop("rope_parameters") | {"rope_theta": how["rope"]}
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if len(rope) > 1 else None}
        their.config.rope_parameters["rope_theta"] = how["rope"]
        their = type(their)(their.config).eval()
        their.load_state_dict(theirs(family).state_dict())
    (folder / "config.json").write_text(json.dumps(config))
    if "shards" in how:
        assert len(list(folder.glob("*.safetensors"))) > how["shards"]
        return their
    state = safetensors.load_file(folder / "model.safetensors")
    if "prefix" in how:
        state = {name.removeprefix("transformer."): value for name, value in state.items()}
    for extra, shape in how.get("extra", {}).items():
        state[extra] = torch.arange(98).unsqueeze(0) if shape is None else torch.ones(shape)
    if how.get("old"):
        state = {old_name(name): value for name, value in state.items()}
    (folder / "model.safetensors").unlink()
    if how.get("bin"):
        torch.save(state, folder / "pytorch_model.bin")
    else:
        safetensors.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return their


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_published_models_load_by_their_ids(name, cache, monkeypatch):
    monkeypatch.chdir(cache)
    folder = in_cache(cache, name)
    their, idx = publish(folder, name), tokens(2, 20, vocab_size=77).clamp(min=2)
    model, tokenizer = sample.load(name)
    found = model.hidden(idx) if model.head is None else model(idx)[0]
    torch.testing.assert_close(found, their(idx)[0], atol=1e-4, rtol=1e-4)
    assert Transformer.from_pretrained(folder).config == model.config
    owner, short = name.split("/")
    if OWNERS.get(short) == owner:
        assert sample.load(short)[0].config == model.config
    if "pooling" in PUBLISHED[name][1]:
        assert (model.published["encoder"]["pool"], model.published["encoder"]["normalize"]) == \
            PUBLISHED[name][1]["pooling"]


def test_ids_that_the_page_and_the_recipes_name_are_in_the_table():
    named, owners = set(), "|".join({name.split("/")[0] for name in PUBLISHED})
    for file in (ROOT / "README.md", *ROOT.glob("*.py"), *ROOT.glob("config/*.py"), *ROOT.glob("tools/*.py")):
        named |= set(re.findall(rf"\b(?:{owners})/[\w.-]*\w", file.read_text(encoding="utf-8")))
    assert named and named <= set(PUBLISHED)


def test_an_id_that_cannot_be_had_is_one_clear_exception(cache, monkeypatch):
    monkeypatch.chdir(cache)
    with pytest.raises(FileNotFoundError, match="no/where: neither a folder here nor a model") as error:
        Transformer.from_pretrained("no/where")
    assert error.value.__suppress_context__
    says(error)


@pytest.mark.parametrize("name, end, lost, words", [
    ("bert", "ForSequenceClassification", "bert.pooler.dense.weight", "no weight pooler.dense.weight"),
    ("roberta", "ForSequenceClassification", "classifier.dense.weight", "no weight classifier.dense.weight"),
    ("bert", "ForSequenceClassification", "classifier.weight", "no classifier.weight, so it neither writes"),
    ("llama", "ForCausalLM", "lm_head.weight", "has no lm_head.weight, so it neither writes nor fills gaps")])
def test_a_model_without_a_part_of_its_head_says_which(name, end, lost, words, tmp_path):
    published_head(tmp_path, name, end)
    weights = safetensors.load_file(tmp_path / "model.safetensors")
    del weights[lost]
    weights.pop("classifier.bias", None)
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=words):
        run_here(sample, f"--out_dir={tmp_path}", "--start=ab")
    assert load_body(tmp_path)[0].config.head == "none"  # which is whole


# -----------------------------------------------------------------------------
# nanoGPT's own checkpoints

TEXT = "First Citizen:\r\nBefore we proceed any further, hear me speak.\r\n" * 9


@pytest.fixture
def nanogpt(tmp_path, monkeypatch):
    """A ckpt.pt in tmp_path/theirs as nanoGPT saves it, of input.txt's characters; transformers' model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_bytes(TEXT.encode())
    return save_nanogpt(tmp_path / "theirs", len(set(TEXT) - {"\r"}))


def save_nanogpt(folder, vocab_size):
    fields = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=vocab_size)
    torch.manual_seed(0)
    config = transformers.GPT2Config(**fields, n_positions=64, bos_token_id=None, eos_token_id=None,
                                     activation_function="gelu", initializer_range=0.2)
    their = transformers.GPT2LMHeadModel(config).eval()
    state = {"_orig_mod." + name: value.T if value.ndim == 2 and ".h." in name else value
             for name, value in their.state_dict().items()}
    folder.mkdir()
    torch.save({"model": state, "optimizer": {"state": {}}, "iter_num": 7, "config": {"dataset": "x"},
                "model_args": {**fields, "block_size": 64, "bias": True, "dropout": 0.1},
                "best_val_loss": torch.tensor(1.0)}, folder / "ckpt.pt")
    return their


def test_a_nanogpt_checkpoint_is_used_as_a_run_is(nanogpt, tmp_path, capsys):
    ids = [sorted(set(TEXT) - {"\r"}).index(c) for c in "hear me"]
    wanted = nanogpt.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids):]
    text = "hear me" + "".join(sorted(set(TEXT) - {"\r"})[i] for i in wanted)
    how = ("--start=hear me", "--temperature=0", "--max_new_tokens=12", "--device=cpu")
    before = (tmp_path / "theirs/ckpt.pt").read_bytes()
    for origin in ("--init_from=theirs", "--out_dir=theirs/ckpt.pt"):
        assert run_here(sample, origin, "--chars=input.txt", *how).startswith(text + "\n---")
    run_here(sample, "--init_from=theirs", "--chars=input.txt", "--export=hf")
    assert run_here(sample, "--init_from=hf", *how).startswith(text + "\n---")
    their = transformers.AutoTokenizer.from_pretrained("hf")
    assert their("hear me")["input_ids"] == ids and their.decode(ids) == "hear me"
    texts = [TEXT.replace("\r\n", " ")[i:i + 9] for i in range(50)]
    rows = write_rows("rows.csv", ("text", "label"), texts, ["a", "b"] * 25)
    run_here(finetune, "--init_from=theirs", "--chars=input.txt", f"--data={rows}", "--epochs=1",
             "--device=cpu", "--out_dir=tuned")
    shutil.move("input.txt", "elsewhere.txt")
    assert "prob_a" in run_here(sample, "--out_dir=tuned", "--start=speak")
    with pytest.raises(UserError, match="no class of transformers reads"):
        run_here(sample, "--out_dir=tuned", "--export=hf2")
    assert (tmp_path / "theirs/ckpt.pt").read_bytes() == before
    assert "damaged" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("change", ["older", "untied", "weights alone", "a class"])
def test_a_nanogpt_checkpoint_of_before_or_of_a_fork(change, nanogpt, tmp_path):
    path = tmp_path / "theirs/ckpt.pt"
    found = torch.load(path, weights_only=True)
    if change == "older":
        del found["model_args"]["bias"], found["model_args"]["dropout"], found["config"]
    if change == "untied":  # as the first were
        head = torch.randn_like(nanogpt.lm_head.weight)
        nanogpt.lm_head.weight = torch.nn.Parameter(head)
        found["model"]["_orig_mod.lm_head.weight"] = head
    if change == "weights alone":
        found = {"model": found["model"], "model_args": found["model_args"]}
    if change == "a class":
        found["args"] = Config()
    torch.save(found, path)
    if change == "a class":
        with pytest.raises(UserError, match=r"ckpt.pt: holds a model.Config, but only tensors and plain"):
            sample.load(path, chars="input.txt")
        return
    model, tokenizer = sample.load(path, chars="input.txt")
    idx = torch.tensor([tokenizer.encode("hear me")])
    torch.testing.assert_close(model(idx)[0], nanogpt(idx).logits, atol=1e-5, rtol=1e-5)


def test_a_nanogpt_checkpoint_without_its_characters_says_what_is_missing(nanogpt, tmp_path):
    (tmp_path / "other.txt").write_text("abc")
    size = len(set(TEXT) - {"\r"})
    for args, told in (
            (["--init_from=theirs"], [f"nanoGPT with {size} tokens", "--chars=input.txt"]),
            (["--init_from=theirs", "--chars=other.txt"], ["chars=other.txt: has 3", f"the model {size}"]),
            (["--init_from=theirs", "--chars=input.txt", "--start=%"], ["'%'", f"none of the {size}"])):
        with pytest.raises(UserError) as error:
            run_here(sample, *args)
        says(error, *told)
    with pytest.raises(UserError) as error:
        run_here(train, "--init_from=resume", "--out_dir=theirs")
    says(error, "of nanoGPT, whose optimizer is not taken over", "--init_from=theirs --out_dir=FOLDER")
    (tmp_path / "data/x").mkdir(parents=True)  # its config's data set
    shutil.copy("input.txt", "data/x")
    said = run_here(sample, "--init_from=theirs", "--start=hear", "--max_new_tokens=1")
    assert "read as the characters of data/x/input.txt)\nhear" in said


@pytest.mark.parametrize("size", [50257, 50304])
def test_a_nanogpt_checkpoint_of_gpt2_s_size_has_gpt2_s_tokenizer(size, tmp_path, monkeypatch, capsys):
    small = make_tokenizer("bytes", [], 0).to_dict()
    ours = {**small, "specials": {"<|endoftext|>": 50256, "<|mask|>": 50257}}
    monkeypatch.setattr("lib.tokenizer.make_tokenizer", lambda *how: Tokenizer.from_dict(ours))
    their = save_nanogpt(tmp_path / "theirs", size)
    model, tokenizer = sample.load(tmp_path / "theirs")
    idx = torch.tensor([tokenizer.encode("hear me")])
    torch.testing.assert_close(model(idx)[0], their(idx).logits, atol=1e-5, rtol=1e-5)
    assert same(Transformer.from_pretrained(tmp_path / "theirs/ckpt.pt").state_dict(), model.state_dict())
    assert "read with GPT-2's" in capsys.readouterr().err
    assert (tokenizer.eot, tokenizer.mask) == (50256, 50257 if size > 50257 else None)


def test_gpt2_is_found_where_nanogpt_left_it(tmp_path, cache, monkeypatch, capsys):
    """In the cache by its short name, and without a tokenizer."""
    small = make_tokenizer("bytes", [], 0).to_dict()
    gpt2 = {**small, "specials": {"<|endoftext|>": 50256, "<|mask|>": 50257}}
    monkeypatch.setattr("lib.tokenizer.make_tokenizer", lambda *how: Tokenizer.from_dict(gpt2))
    model = transformers.GPT2LMHeadModel
    their = model(model.config_class(n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()
    their.save_pretrained(in_cache(cache, "gpt2"))
    for name in ("gpt2", "openai-community/gpt2"):
        ours, tokenizer = sample.load(name)
        idx = torch.tensor([tokenizer.encode("hear me")])
        torch.testing.assert_close(ours(idx)[0], their(idx).logits, atol=1e-5, rtol=1e-5)
        assert (tokenizer.eot, tokenizer.mask) == (50256, None)
        assert "brings no tokenizer: read with GPT-2's" in capsys.readouterr().err
    with pytest.raises(UserError, match="gpt2-xl: neither a folder here nor"):
        sample.load("gpt2-xl")


def test_a_nanogpt_data_folder_is_read_and_nothing_of_it_unpickled(nanogpt, tmp_path):
    folder = tmp_path / "data/chars"
    folder.mkdir(parents=True)
    shutil.copy("input.txt", folder)
    text = TEXT.replace("\r", "")
    ids = np.array([sorted(set(text)).index(c) for c in text], "<u2")
    ids[:450].tofile(folder / "train.bin")
    ids[450:].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch run'\ntR.")
    how = ("--dataset=chars", "--device=cpu", "--compile=False", "--max_iters=1", "--eval_iters=0",
           "--batch_size=2", "--gradient_accumulation_steps=1", "--warmup_iters=0")
    said = run_here(train, "--init_from=theirs", "--chars=input.txt", "--out_dir=out", "--eval_only", *how)
    x, y = torch.from_numpy(ids[450:].astype(np.int64)).unfold(0, 65, 64).split([64, 1], dim=1)
    x, y = x.reshape(-1, 64), torch.from_numpy(ids[451:].astype(np.int64))[:x.numel()]
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(nanogpt(x).logits.flatten(0, 1), y).item()
    assert f"val loss {loss:.4f}" in said
    run_here(train, "--init_from=theirs", "--chars=input.txt", "--out_dir=out", *how)
    assert ": of nanoGPT, without a tokenizer: its tokens are read as the characters" in said
    assert "hear me" in run_here(sample, "--out_dir=out", "--start=hear me", "--device=cpu")
    assert not (tmp_path / "run").exists()
    (folder / "input.txt").write_text("abc" * 400)
    with pytest.raises(UserError) as error:
        run_here(train, "--out_dir=out2", *how)
    says(error, "meta.pkl is not read", "prepare.py --source=data/chars/input.txt --dataset=chars_new")
    (folder / "input.txt").unlink()
    with pytest.raises(UserError, match="meta.pkl is not read, .*: put input.txt, .* beside it"):
        run_here(train, "--out_dir=out2", *how)


def test_a_nanogpt_data_folder_without_a_pickle_is_gpt2_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = make_tokenizer("bytes", [], 0)
    monkeypatch.setattr("prepare.make_tokenizer", lambda name, *how: {"gpt2": small}[name])
    (tmp_path / "data/x").mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        np.array([*b"some text", 256] * 20, "<u2").tofile(f"data/x/{name}")
    data = train.open_data("x", None, 32)
    assert data.tokenizer.decode(data.train[:9].tolist()) == "some text" and data.prompt() == 256
    np.array([300] * 99, "<u2").tofile("data/x/train.bin")
    with pytest.raises(UserError, match="token 300 of 258: it has neither meta.json nor GPT-2's"):
        train.open_data("x", None, 32)
