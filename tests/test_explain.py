"""Looking inside."""
import json
import math
import re
from dataclasses import asdict

import pytest
import torch
from torch.nn import functional as F

import finetune
import sample
from lib import tasks
from lib.run import save_checkpoint
from lib.tokenizer import make_tokenizer
from tests.helpers import columns, one_line, script, tiny, tokens
from tools import explain


def test_all_four_methods_find_the_token_that_matters():
    """In a block whose heads look everywhere alike, by a score for what one token alone carries."""
    model = tiny("llama", norm="layer", n_kv_head=4, n_layer=1)
    mark = F.normalize(torch.randn(32), dim=0)
    mark = F.normalize(mark - mark.mean(), dim=0)  # which is what a norm subtracts
    with torch.no_grad():
        model.wte.weight -= (model.wte.weight @ mark).unsqueeze(1) * mark
        model.wte.weight[60] += mark
        model.blocks[0].attn.q.weight.zero_()
        model.blocks[0].attn.v.weight.copy_(torch.eye(32))
        model.blocks[0].attn.o.weight.copy_(torch.eye(32))
        model.blocks[0].mlp.down.weight.zero_()
    for place in (0, 5, 11):
        idx = tokens(1, 12).clamp(max=59)
        idx[0, place] = 60

        def score(ids):
            with explain.watched(model) as states:
                model.hidden(ids)
            return states[-1][:, -1] @ mark  # the last place: what was elsewhere came by attention

        found, _ = explain.attributions(model, score, idx, neutral=0, samples=300)
        assert list(found) == ["gradient x input", "integrated gradients", "Grad-CAM", "LIME"]
        assert [values.argmax().item() for values in found.values()] == [place] * 4


def test_attributions_of_a_linear_model_are_its_weights():
    model = tiny("llama")
    with torch.no_grad():
        for block in model.blocks:  # what goes in comes out
            block.attn.o.weight.zero_()
            block.mlp.down.weight.zero_()
    idx, weights = tokens(1, 10), torch.randn(10, 32)

    def score(ids, weights=weights):
        with explain.watched(model) as states:
            model.hidden(ids)
        return (states[-1] * weights).sum((1, 2))

    x, neutral = model.wte(idx)[0], model.wte.weight[3]
    found, _ = explain.attributions(model, score, idx, neutral=3, samples=300)
    for method in ("gradient x input", "integrated gradients", "LIME"):
        assert torch.allclose(found[method].float(), ((x - neutral) * weights).sum(1), atol=1e-3), method
    same = weights[:1].expand(10, 32)  # Grad-CAM knows one weight a channel
    found, _ = explain.attributions(model, lambda ids: score(ids, same), idx, neutral=3, samples=300)
    assert torch.allclose(found["Grad-CAM"].float(), (x * same).sum(1).clamp(min=0), atol=1e-4)


@columns
def test_integrated_gradients_are_complete(column):
    """They add up to the change of the score, within one percent; other methods do not."""
    model, idx = tiny(column), tokens(1, 9)
    likeliest = model(idx)[0][0, -1].argmax()

    def score(ids):
        return model(ids)[0][:, -1, likeliest]

    found, change = explain.attributions(model, score, idx, neutral=60, samples=50)
    assert change == pytest.approx((score(idx) - score(torch.full_like(idx, 60))).item(), rel=1e-4)
    assert found["integrated gradients"].sum().item() == pytest.approx(change, rel=0.01)
    assert found["gradient x input"].sum().item() != pytest.approx(change, rel=0.01)


@columns
@pytest.mark.parametrize("causal", [True, False])
def test_attention_maps_are_what_the_kernel_used(column, causal):
    model, idx, seen = tiny(column, causal=causal), tokens(1, 9), {}
    attn = model.blocks[1].attn
    handles = [getattr(attn, name).register_forward_hook(
        lambda module, args, out, name=name: seen.update({name: out, name + "_from": args[0]}))
        for name in "qkvo"]
    with torch.no_grad(), explain.AttentionMaps() as maps:
        model.hidden(idx)
    for handle in handles:
        handle.remove()
    weights = maps.layers[1]
    assert len(maps.layers) == 2 and torch.allclose(weights.sum(-1), torch.ones(1, 4, 9))
    assert (weights.triu(1) == 0).all() == causal
    q, k, v = (seen[name].view(1, 9, -1, attn.head_dim).transpose(1, 2) for name in "qkv")
    mixed = weights @ v.repeat_interleave(4 // v.size(1), dim=1)
    assert torch.allclose(mixed.transpose(1, 2).flatten(2), seen["o_from"], atol=1e-5)
    if column == "gpt2":  # nothing happens to queries and keys
        scores = torch.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(8)
        by_hand = scores.exp().tril() if causal else scores.exp()
        assert torch.allclose(weights, by_hand / by_hand.sum(-1, keepdim=True), atol=1e-6)


def test_rank_agreement_is_spearman_s():
    a, b = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)).double()
    ranks = torch.stack((a, b)).argsort(1).argsort(1).double()
    assert explain.rank_agreement(a, b) == pytest.approx(torch.corrcoef(ranks)[0, 1].item())
    assert explain.rank_agreement(a, a.exp()) == pytest.approx(1) == -explain.rank_agreement(a, -a)
    assert explain.rank_agreement(a, torch.zeros(20).double()) == 0


def test_heads_are_called_by_what_they_do():
    ids = torch.tensor([4, 7, 9, 4, 7, 2, 9, 4])
    T, eye = 8, torch.eye(8)
    before = torch.roll(eye, 1, 0).tril()
    before[0, 0] = 1
    same, after = eye.clone(), eye.clone()
    for t, s in ((3, 0), (4, 1), (6, 2), (7, 3)):
        same[t], after[t] = eye[s], eye[s + 1]
    for weights, name in ((eye, "itself"), (before, "previous token"), (eye[:1].expand(T, T), "first token"),
                          (same, "same token"), (after, "after the same token"), (before.T, "next token")):
        assert explain.habit(weights, ids) == f"{name} 100%"
    even = torch.ones(T, T).tril()
    assert explain.habit(even / even.sum(1, keepdim=True), ids) == ""


def read_page(path) -> dict:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "://" not in text and text.count("</script>") == 1
    data = text.split("const D = ")[1].split("\n")[0]
    assert "<" not in data  # no token can end the script
    return json.loads(data)


def test_a_page_about_a_language_model(home):
    start = "import <|endoftext|>\nx </script>"
    done = script("tools/explain.py", "--out_dir=out/whole", f"--start={start}", "--samples=99", cwd=home)
    assert done.returncode == 0, done.stderr
    page = read_page(home / "out/whole/explain.html")
    model, tokenizer = sample.load(home / "out/whole")
    ids = tokenizer.encode(start, specials=True)
    probs = model(torch.tensor([ids]))[0][0].softmax(-1)
    assert len(page["tokens"]) == len(ids) == len(page["said"]) - 1
    assert {"<|endoftext|>", "\u21b5"} <= set(page["tokens"])
    for i, row in enumerate(page["said"][1:-1]):
        p = probs[i, ids[i + 1]].item()
        assert row["p"] == pytest.approx(p, rel=1e-4)
        assert row["bits"] == pytest.approx(-math.log2(p), rel=1e-4)
        assert row["rank"] == (probs[i] > p * 1.00001).sum() + 1
        assert len(row["lens"]) == 3 and row["lens"][-1] == row["best"][0]  # embedding, two blocks
    assert page["token"] == page["said"][-1]["best"][0][0]
    assert page["said"][0]["best"] == [] and page["said"][-1]["token"] == "?"
    assert len(page["heads"]) == 2 and len(page["heads"][0]) == model.config.n_head
    for word in ("integrated gradients add up to", "% off", "rank agreement", "layer  1", *page["methods"]):
        assert word in done.stdout
    wrong = script("tools/explain.py", "--out_dir=out/whole", "--target=zq q", cwd=home)
    one_line(wrong, 2, "--target", "one token")
    shortest = script("tools/explain.py", "--out_dir=out/whole", "--start=i", "--target=q", cwd=home)
    assert shortest.returncode == 0 and "Warning" not in shortest.stderr, shortest.stderr


def test_a_page_about_a_masked_model(tmp_path):
    tokenizer = make_tokenizer("bytes", [], 0)
    model = tiny("gpt2", causal=False, vocab_size=tokenizer.vocab_size)
    save_checkpoint(tmp_path / "best.pt", {
        "version": 1, "model": model.state_dict(), "model_args": asdict(model.config),
        "tokenizer": tokenizer.to_dict()})
    done = script("tools/explain.py", f"--out_dir={tmp_path}", "--start=a <|mask|>c", "--samples=99", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = read_page(tmp_path / "explain.html")
    assert page["tokens"] == ["a", " ", "<|mask|>", "c", "<|endoftext|>"]
    assert [row["token"] for row in page["said"]] == ["a", " ", "?", "c", "<|endoftext|>"]
    assert ["bits" in row for row in page["said"]] == [True, True, False, True, True]
    (name, p), *_ = sample.fill(model, tokenizer, "a <|mask|>c")[0]
    assert page["said"][2]["best"][0][1] == pytest.approx(p, rel=1e-4)
    hidden = [97, tokenizer.mask, tokenizer.mask, 99, tokenizer.eot]  # the space is hidden, and guessed
    probs = model(torch.tensor([hidden]))[0][0, 1].softmax(-1)
    assert page["said"][1]["p"] == pytest.approx(probs[32].item(), rel=1e-4)
    one_line(script("tools/explain.py", f"--out_dir={tmp_path}", "--start=abc", cwd=tmp_path), 1, "<|mask|>")


def test_a_page_about_a_classifier(tuned):
    word, label, other = "fine", "good", "bad"
    done = script("tools/explain.py", f"--out_dir={tuned / 'out'}", f"--start=w1 w2 {word} w3", "--samples=200",
                  cwd=tuned)
    assert done.returncode == 0, done.stderr
    page = read_page(tuned / "out/explain.html")
    assert page["token"] == label and page["said"] == [] and f"prob_{label} 0." in done.stdout
    for method in ("integrated gradients", "LIME"):  # gradients alone are flat where the model is sure
        values = page["methods"][method]
        assert word.startswith(page["tokens"][values.index(max(values))].strip()), method
    turned = script("tools/explain.py", f"--out_dir={tuned / 'out'}", f"--start=w1 w2 {word} w3",
                    f"--target={other}", "--samples=200", cwd=tuned)
    assert turned.returncode == 0, turned.stderr
    values = read_page(tuned / "out/explain.html")["methods"]["integrated gradients"]
    assert word.startswith(page["tokens"][values.index(min(values))].strip())
    wrong = script("tools/explain.py", f"--out_dir={tuned / 'out'}", "--target=so-so", cwd=tuned)
    one_line(wrong, 2, "good", "bad")


@pytest.mark.parametrize("kind", ["qa", "regress", "classify"])
def test_what_a_task_predicts_is_what_is_explained(kind, tmp_path):
    """In qa, wherever in a context of several windows the answer is."""
    tokenizer = make_tokenizer("bytes", [], 0)
    body = tiny("gpt2", causal=False, head="none", vocab_size=tokenizer.vocab_size, block_size=64)
    head = {"task": kind, "labels": {"regress": ["number"]}.get(kind, ["a", "b"]), "apart": False,
            "paired": kind == "qa", "pool": None if kind == "qa" else "mean", "max_length": 64,
            "no_answer": False, "mean": 3.0, "std": 2.0}
    task, starts = tasks.TASKS[kind](head, tokenizer), set()
    tuned = finetune.Tuned(body, task.n_out, head["pool"], False).eval()
    torch.nn.init.normal_(tuned.head.weight)
    pair = " ".join(f"w{i}" for i in range(50)) if kind == "qa" else ""
    for text in ("what?", "who is it?", "when was it?"):
        idx, score, what, facts, neutral = explain.of_a_task(tuned, task, text, pair, "")
        row, value = tasks.Row("", text, pair or None), score(idx).item()
        header, (cells,) = task.table([row], finetune.predict(tuned, task, [row]))
        said = dict(zip(header, cells))
        if kind == "qa":
            assert what == said["prediction"] and what in pair
            starts.add(pair.index(what))
        elif kind == "regress":
            assert 2 * value + 3 == pytest.approx(float(said["prediction"]), abs=1e-4)
        else:
            other = explain.of_a_task(tuned, task, text, pair, "b" if what == "a" else "a")[1]
            p = 1 / (1 + math.exp(other(idx).item() - value))
            assert what == said["prediction"] and p == pytest.approx(float(said[f"prob_{what}"]), abs=1e-4)
    assert kind != "qa" or max(starts) > 64  # not in the first window
    save_checkpoint(tmp_path / "best.pt", {
        "version": 1, "model": body.state_dict(), "model_args": asdict(body.config),
        "tokenizer": tokenizer.to_dict(), "head": {**head, "weights": tuned.head.state_dict()}})
    words = ("tools/explain.py", f"--out_dir={tmp_path}", f"--start={text}", "--samples=99")
    done = script(*words, f"--pair={pair}", cwd=tmp_path)
    assert done.returncode == 0 and read_page(tmp_path / "explain.html")["token"] == what, done.stderr
    name, value = facts.split(", ")[-1].rsplit(" ", 1)  # a process of its own may differ in the last digits
    said = float(re.search(rf"{re.escape(name)} (-?[\d.]+)", done.stdout)[1])
    assert said == pytest.approx(float(value), abs=1e-4)
    one_line(script(*words, f"--pair={'' if pair else 'x'}", cwd=tmp_path), 2, "--pair")
