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
from lib.run import save_checkpoint
from lib.tasks import TASKS
from lib.tokenizer import make_tokenizer
from test_model import columns
from tests.helpers import one_line, script, tiny, tokens
from tools import explain


def states_of(model, idx):
    with explain.watched(model) as states:
        model.hidden(idx)
    return states


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
            return states_of(model, ids)[-1][:, -1] @ mark  # what was elsewhere came by attention

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
        return (states_of(model, ids)[-1] * weights).sum((1, 2))

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


def page_about(folder, *words):
    """What explain.html holds, and what was printed."""
    done = script("tools/explain.py", f"--out_dir={folder}", "--samples=99", *words, cwd=folder)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    text = (folder / "explain.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "://" not in text and text.count("</script>") == 1
    data = text.split("const D = ")[1].split("\n")[0]
    assert "<" not in data  # no token can end the script
    return json.loads(data), done.stdout


def refused(folder, words, status, *named):
    one_line(script("tools/explain.py", f"--out_dir={folder}", *words, cwd=folder), status, *named)


def save(folder, model, tokenizer, **entries):
    save_checkpoint(folder / "best.pt", {
        "model": model.state_dict(), "model_args": asdict(model.config), "tokenizer": tokenizer.to_dict(),
        **entries})


def test_a_page_about_a_language_model(home):
    start = "import <|endoftext|>\nx </script>"
    page, printed = page_about(home / "out/whole", f"--start={start}")
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
        assert word in printed
    refused(home / "out/whole", ["--target=zq q"], 2, "--target", "one token")
    refused(home / "out/whole", ["--samples=0"], 2, "--samples", "at least 1")
    page_about(home / "out/whole", "--start=i", "--target=q")  # of a single token


def test_a_page_about_a_masked_model(tmp_path):
    tokenizer = make_tokenizer("bytes", [], 0)
    model = tiny("gpt2", causal=False, vocab_size=tokenizer.vocab_size)
    save(tmp_path, model, tokenizer)
    page, _ = page_about(tmp_path, "--start=a <|mask|>c")
    assert page["tokens"] == ["a", " ", "<|mask|>", "c", "<|endoftext|>"]
    assert [row["token"] for row in page["said"]] == ["a", " ", "?", "c", "<|endoftext|>"]
    assert ["bits" in row for row in page["said"]] == [True, True, False, True, True]
    (name, p), *_ = sample.fill(model, tokenizer, "a <|mask|>c")[0]
    assert page["said"][2]["best"][0][1] == pytest.approx(p, rel=1e-4)
    masked = [97, tokenizer.mask, tokenizer.mask, 99, tokenizer.eot]  # the space is masked, and guessed
    probs = model(torch.tensor([masked]))[0][0, 1].softmax(-1)
    assert page["said"][1]["p"] == pytest.approx(probs[32].item(), rel=1e-4)
    refused(tmp_path, ["--start=abc"], 1, "<|mask|>")


def test_a_page_about_a_classifier(tuned):
    start = "--start=w1 w2 fine w3"
    page, printed = page_about(tuned / "out", start)
    assert page["token"] == "good" and page["said"] == [] and "prob_good 0." in printed
    for method in ("integrated gradients", "LIME"):  # gradients alone are flat if the model is sure
        values = page["methods"][method]
        assert "fine".startswith(page["tokens"][values.index(max(values))].strip()), method
    values = page_about(tuned / "out", start, "--target=bad")[0]["methods"]["integrated gradients"]
    assert "fine".startswith(page["tokens"][values.index(min(values))].strip())
    refused(tuned / "out", ["--target=so-so"], 2, "good", "bad")


@pytest.mark.parametrize("kind", ["qa", "regress", "classify"])
def test_what_a_task_predicts_is_what_is_explained(kind, tmp_path):
    """In qa, wherever in a context of several windows the answer is."""
    tokenizer = make_tokenizer("bytes", [], 0)
    body = tiny("gpt2", causal=False, head="none", vocab_size=tokenizer.vocab_size, block_size=64)
    head = {"task": kind, "labels": {"regress": ["number"]}.get(kind, ["a", "b"]), "apart": False,
            "paired": kind == "qa", "pool": None if kind == "qa" else "mean", "max_length": 64,
            "no_answer": False, "mean": 3.0, "std": 2.0}
    tuned, starts = finetune.Tuned(body, TASKS[kind](head, tokenizer)).eval(), set()
    torch.nn.init.normal_(tuned.head.weight)
    pair = " ".join(f"w{i}" for i in range(50)) if kind == "qa" else ""
    for text in ("what?", "who is it?", "when was it?"):
        case = explain.of_a_task(tuned, text, pair, "")
        value, (said,) = case.score(case.idx).item(), tuned.predict([(text, pair or None)])
        if kind == "qa":
            assert case.answer == said["prediction"] and case.answer in pair
            starts.add(pair.index(case.answer))
        elif kind == "regress":
            assert 2 * value + 3 == pytest.approx(float(said["prediction"]), abs=1e-4)
        else:
            other = explain.of_a_task(tuned, text, pair, "b" if case.answer == "a" else "a").score(case.idx)
            p = 1 / (1 + math.exp(other.item() - value))
            assert case.answer == said["prediction"]
            assert p == pytest.approx(float(said[f"prob_{case.answer}"]), abs=1e-4)
    assert kind != "qa" or max(starts) > 64  # not in the first window
    save(tmp_path, body, tokenizer, head={**head, "weights": tuned.head.state_dict()})
    page, printed = page_about(tmp_path, f"--start={text}", f"--pair={pair}")
    assert page["token"] == case.answer
    name, value = case.facts.split(", ")[-1].rsplit(" ", 1)  # another process may differ in the last digits
    said = float(re.search(rf"{re.escape(name)} (-?[\d.]+)", printed)[1])
    assert said == pytest.approx(float(value), abs=1e-4)
    refused(tmp_path, [f"--pair={'' if pair else 'x'}"], 2, "--pair")
    if kind != "classify":
        refused(tmp_path, [f"--pair={pair}", "--target=x"], 2, "--target")
