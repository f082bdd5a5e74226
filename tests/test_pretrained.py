"""Checkpoints of other libraries, in and out."""
import json
import re
from dataclasses import asdict

import pytest
import torch

import sample
from config import UserError
from lib.run import save_checkpoint
from lib.tokenizer import make_tokenizer
from model import Config, Transformer
from test_model import MODERN, TINY
from tests.helpers import FAMILIES, same, script, theirs, tiny, tokens


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
    unknown = {"pooler.dense.weight", "pooler.dense.bias"}  # which BertModel has and we do not
    assert set(info["missing_keys"]) <= unknown
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    kept, state = their.state_dict(), again.state_dict()
    assert all(torch.equal(kept[name], state[name]) for name in set(kept) - unknown)


@pytest.fixture
def llama(tmp_path):
    """A folder as transformers saves it, with rope stretched as Llama 3 does, and its config.json."""
    theirs("llama 3").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama", json.loads((tmp_path / "llama/config.json").read_text())


def test_sharded_files_of_before_transformers_5_are_read(llama, tmp_path):
    folder, config = llama
    theirs("llama 3").save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "sharded/config.json").write_text(json.dumps(config))
    sharded = Transformer.from_pretrained(tmp_path / "sharded")
    assert same(sharded.state_dict(), Transformer.from_pretrained(folder).state_dict())
    assert sharded.config.rope_scaling["factor"] == 4.0 and sharded.config.rope_theta == 500.0


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
    ("model.norm.weight", None, "has no weight model.norm.weight")])
def test_weights_that_do_not_fit_are_named(llama, name, weight, words):
    safetensors, (folder, _) = pytest.importorskip("safetensors.torch"), llama
    weights = safetensors.load_file(folder / "model.safetensors")
    weights[name] = weight
    safetensors.save_file({name: value for name, value in weights.items() if value is not None},
                          folder / "model.safetensors")
    with pytest.raises(ValueError, match=words):
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


def test_a_damaged_or_missing_file_is_named(llama, tmp_path):
    folder, _ = llama
    (folder / "model.safetensors").write_bytes(b"\x10" * 99)
    with pytest.raises(ValueError, match="damaged"):
        Transformer.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        Transformer.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="config.json"):
        Transformer.from_pretrained(tmp_path)


def test_gpt2_files_of_all_ages(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    their, idx = theirs("gpt2"), tokens(2, 20, vocab_size=97)
    wanted = their(idx).logits
    their.save_pretrained(tmp_path)
    # as on the hub: no prefix, and the causal mask among the weights
    state = {name: value.clone() for name, value in their.transformer.state_dict().items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 96, 96)
    safetensors.save_file(state, tmp_path / "model.safetensors")
    torch.testing.assert_close(Transformer.from_pretrained(tmp_path)(idx)[0], wanted)
    # as nanoGPT saves it: compiled, matrices the other way round
    state = {"_orig_mod." + name: value.T if value.ndim == 2 and ".h." in name else value
             for name, value in their.state_dict().items()}
    fields = dict(n_layer=2, n_head=4, n_embd=32, block_size=96, bias=True, vocab_size=97, dropout=0.0)
    torch.save({"model": state, "model_args": fields, "config": {"dataset": "x"},
                "best_val_loss": torch.tensor(1.0)}, tmp_path / "ckpt.pt")
    torch.testing.assert_close(Transformer.from_pretrained(tmp_path / "ckpt.pt")(idx)[0], wanted)


def test_weights_that_have_no_place_here_are_left_out(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    theirs("bert").save_pretrained(tmp_path)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    for name in ("bert.pooler.dense.weight", "bert.embeddings.position_ids", "cls.seq_relationship.bias"):
        state[name] = torch.ones(2)  # as in the files of bert-base-uncased
    safetensors.save_file(state, tmp_path / "model.safetensors")
    assert Transformer.from_pretrained(tmp_path).head is not None


def test_what_no_family_has_is_not_exported(tmp_path):
    pytest.importorskip("safetensors")
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


@pytest.mark.parametrize("column, bias", [("modern", False), ("gpt2", False), ("gpt2", True)])
def test_a_run_is_exported_whole(column, bias, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny(column, bias=bias, vocab_size=258, block_size=32)
    tokenizer = make_tokenizer("bytes", [], 258)
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run/ckpt.pt", {
        "version": 1, "model": model.state_dict(), "model_args": asdict(model.config), "iter_num": 1,
        "tokenizer": tokenizer.to_dict()})
    done = script("sample.py", "--out_dir=run", "--export=hf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("class A:", return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == tokenizer.encode("class A:")
    text = theirs.generate(**prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(text, model.generate(prompt["input_ids"], 20, temperature=0))
    again = script("sample.py", "--out_dir=hf", "--start=class A:", "--temperature=0", "--max_new_tokens=20",
                   cwd=tmp_path, PYTHONUTF8="1")
    ids = text[0].tolist()
    ids = ids[:ids.index(tokenizer.eot)] if tokenizer.eot in ids else ids
    assert again.stdout.startswith(tokenizer.decode(ids).rstrip("\ufffd")), again.stderr
