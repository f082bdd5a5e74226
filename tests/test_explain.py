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
from lib.tokenizer import Tokenizer, make_tokenizer
from test_model import columns
from tests.helpers import one_line, script, slow, tiny, tokens, write_rows
from tests.test_tokenizer import HUB, of_the_hub
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

        found, *_ = explain.attributions(model, score, idx, neutral=0, samples=300)
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
    found, *_ = explain.attributions(model, score, idx, neutral=3, samples=300)
    for method in ("gradient x input", "integrated gradients", "LIME"):
        assert torch.allclose(found[method].float(), ((x - neutral) * weights).sum(1), atol=1e-3), method
    same = weights[:1].expand(10, 32)  # Grad-CAM knows one weight a channel
    found, *_ = explain.attributions(model, lambda ids: score(ids, same), idx, neutral=3, samples=300)
    assert torch.allclose(found["Grad-CAM"].float(), (x * same).sum(1).clamp(min=0), atol=1e-4)


@columns
def test_integrated_gradients_are_complete(column):
    """They add up to the change of the score, within one percent; other methods do not."""
    model, idx = tiny(column), tokens(1, 9)
    likeliest = model(idx)[0][0, -1].argmax()

    def score(ids):
        return model(ids)[0][:, -1, likeliest]

    found, change, _ = explain.attributions(model, score, idx, neutral=60, samples=50)
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
        assert explain.habits(weights.unsqueeze(0), ids)[0] == (pytest.approx(1), f"{name} 100%")
    even = F.normalize(torch.ones(T, T).tril(), p=1)
    assert explain.habits(torch.stack((even, 0.6 * eye + 0.4 * even)), ids)[0] == (0, "")


def test_parts_of_a_character_are_one():
    """Chinese by bytes: each character is three tokens, shown, masked and added up as one."""
    tokenizer = make_tokenizer("bytes", [], 0)
    text = "你a好<|endoftext|>!\n"
    ids = tokenizer.encode(text, specials=True)
    units = explain.Units(tokenizer, [*ids, 0xE4, 0xBD])  # cut within a character
    names = ["你", "a", "好", "<|endoftext|>", "!", "↵", "\\xe4\\xbd"]
    assert units.names() == names and [len(one) for one in units.places] == [3, 1, 3, 1, 1, 1, 2]
    assert explain.Units(tokenizer, [0xE4, 97, tokenizer.eot, 0xE4, tokenizer.eot]).names() == [
        "\\xe4a", "<|endoftext|>", "\\xe4", "<|endoftext|>"]
    assert torch.equal(units.members().sum(0), torch.ones(len(ids) + 2))
    assert units.members(3).sum(1).tolist() == [3 + 1 + 3, 1 + 1 + 1, 2]  # neighbours together

    idx, units = torch.tensor([ids]), explain.Units(tokenizer, ids)
    model = tiny("modern", vocab_size=tokenizer.vocab_size)

    def score(ids):
        return model(ids)[0][:, -1, 97]

    alone, *_ = explain.attributions(model, score, idx, 60, 50)
    found, *_ = explain.attributions(model, score, idx, 60, 50, units=units)
    for method in ("gradient x input", "integrated gradients", "Grad-CAM"):
        added = [alone[method][places].sum() for places in units.places]
        assert torch.allclose(found[method], torch.stack(added)), method
    assert len(found["LIME"]) == 6
    rows = explain.guesses(model, idx, units, None)
    nats = F.cross_entropy(model(idx)[0][0, :-1], idx[0, 1:], reduction="none")
    for row, places in zip(rows[1:-1], units.places[1:]):
        bits = sum(nats[i - 1].item() for i in places) / math.log(2)
        assert [row["bits"], row["p"]] == pytest.approx([bits, 2 ** -bits], rel=1e-4)
        assert (row["rank"] is None) == (len(places) > 1)
    masked = tiny("gpt2", causal=False, vocab_size=tokenizer.vocab_size)
    hidden = idx.index_fill(1, torch.tensor([0, 1, 2]), tokenizer.mask)
    p = masked(hidden)[0][0].softmax(-1)[range(3), ids[:3]].prod()
    assert explain.guesses(masked, idx, units, tokenizer.mask)[0]["p"] == pytest.approx(p.item(), rel=1e-3)


@pytest.mark.parametrize("length", [150, 400, 4000])
def test_a_page_stays_small_and_its_clearest_heads_come_first(length):
    rows = min(length, explain.MOST)
    clear = torch.eye(rows)
    layers = torch.rand(12, 12, rows, rows).softmax(-1)
    layers[11, 11] = clear
    tokenizer = make_tokenizer("bytes", [], 0)
    units = explain.Units(tokenizer, [97] * length)
    assert length == 4000 or len(units.members(explain.MOST)) == length
    assert len(units.members(explain.MOST)) <= explain.MOST
    seen = [f"token {i}" for i in range(rows)]
    heads = explain.heads_of(list(layers), seen)
    assert len(heads) == 144 and len(json.dumps(heads)) < 4e6
    drawn = [(head["layer"], head["head"]) for head in heads if "weights" in head]
    if length == 150:
        assert len(drawn) > 100
    assert drawn[0] == (11, 11) and heads[0]["habit"] == "itself 100%" and len(drawn) < 144
    assert len(explain.heads_of(list(layers[:2, :3, :9, :9]), seen[:9])) == 6  # all, in their order


def test_a_large_model_is_asked_less_unless_more_is_asked_for(monkeypatch):
    model, idx = tiny("gpt2", block_size=40), tokens(1, 40)
    units = explain.Units(make_tokenizer("bytes", [], 0), idx[0].tolist())

    def score(ids):
        return model(ids)[0][:, -1, 5]

    assert "LIME by 1,000 copies" in explain.attributions(model, score, idx, 0, units=units)[2]
    monkeypatch.setattr(explain, "has_bfloat16_units", lambda: False)
    monkeypatch.setattr(explain, "BUDGET", 1e3)
    found, _, told = explain.attributions(model, score, idx, 0, units=units)
    assert told == ("integrated gradients at 4 points, LIME by 16 copies, in which 10 neighbours are masked "
                    "together")
    lime = found["LIME"].view(4, 10)
    assert torch.equal(lime, lime[:, :1].expand(4, 10))  # each has its share
    assert "LIME by 200 copies" in explain.attributions(model, score, idx, 0, 200, units=units)[2]


@pytest.mark.parametrize("budget, units, hurried", [
    (1e3, True, True), (1e3, False, False), (3e11, True, False)])
def test_a_large_model_is_run_in_bfloat16_where_that_is_faster(budget, units, hurried, monkeypatch):
    monkeypatch.setattr(explain, "BUDGET", budget)
    monkeypatch.setattr(explain, "has_bfloat16_units", lambda: units)
    model, seen = tiny("gpt2"), []

    def score(ids):
        seen.append(torch.is_autocast_enabled("cpu"))
        return model(ids)[0][:, -1, 5]

    told = explain.attributions(model, score, tokens(1, 12), 0)[2]
    assert told.endswith("; in bfloat16") == hurried
    assert not seen[0]  # of the whole text
    assert set(seen[1:]) == {hurried}


def test_a_large_masked_model_guesses_less(monkeypatch):
    """It reads the text again for each token."""
    tokenizer = make_tokenizer("bytes", [], 0)
    model = tiny("gpt2", causal=False, block_size=20, vocab_size=tokenizer.vocab_size)
    idx = tokens(1, 20)
    units = explain.Units(tokenizer, idx[0].tolist())
    assert len(explain.guesses(model, idx, units, tokenizer.mask)) == 20
    monkeypatch.setattr(explain, "BUDGET", 1e3)
    assert [row["at"] for row in explain.guesses(model, idx, units, tokenizer.mask)] == list(range(12, 20))


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
    heads = [(head["layer"], head["head"]) for head in page["heads"]]
    assert heads == [(n, h) for n in range(2) for h in range(model.config.n_head)]
    for word in ("integrated gradients add up to", "% off", "rank agreement", "layer  1", *page["methods"]):
        assert word in printed
    refused(home / "out/whole", ["--target=zq q"], 2, "--target", "one token")
    refused(home / "out/whole", ["--samples=0"], 2, "--samples", "at least 1")
    page_about(home / "out/whole", "--start=i", "--target=q")  # of a single token


@pytest.mark.parametrize("kind, goes_on, targets, refused", [
    ("llama", True, {"]": "]", "th": "th", " th": " th", "\n": "<0x0A>", "</s>": "</s>"}, {"zq": 3}),
    ("llama", False, {"th": " th", "]": "]"}, {}),
    ("bert", False, {"a": "a", "##a": "##a", "[MASK]": "[MASK]"}, {"\n": 0, " ": 0, "\u9f98": 0, "ab": 2})])
def test_a_target_is_the_token_that_stands_there(kind, goes_on, targets, refused, tmp_path):
    """Not that with a space before it. What is none is neither the likeliest nor the unknown one."""
    fast = of_the_hub(tmp_path, **HUB[kind]())
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    for target, name in targets.items():
        found = fast.id_to_token(explain.token_of(tokenizer, target, goes_on))
        assert found.replace("\u2581", " ") == name, target
        assert name in (explain.shown(tokenizer, fast.token_to_id(found)), "<0x0A>")
    for target, n in refused.items():
        with pytest.raises(explain.SettingError, match=f"one token is wanted; these are {n}"):
            explain.token_of(tokenizer, target, goes_on)


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
    assert "(of 2 gaps the first)" in page_about(tmp_path, "--start=a<|mask|>c<|mask|>")[1]


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


@pytest.mark.parametrize("kind", ["qa", pytest.param("regress", marks=slow), "classify"])
def test_what_a_task_predicts_is_what_is_explained(kind, tmp_path):
    """In qa, wherever in a context of several windows the answer is."""
    tokenizer = make_tokenizer("bytes", [], 0)
    body = tiny("gpt2", causal=False, head="none", vocab_size=tokenizer.vocab_size, block_size=64)
    head = {"task": kind, "labels": {"regress": ["number"]}.get(kind, ["a", "b"]), "apart": False,
            "paired": kind == "qa", "pool": None if kind == "qa" else "mean", "max_length": 64,
            "no_answer": False, "mean": 3.0, "std": 2.0,
            "columns": {"text": "text", "pair": "", "label": "n"}}
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
    if kind == "regress":
        write_rows(tmp_path / "rows.csv", ("label", "n", "text"), "12", "34", ("other, text", text))
        of_row, _ = page_about(tmp_path, f"--start=FILE:{tmp_path / 'rows.csv'}", "--row=2")
        assert of_row["tokens"] == page["tokens"] and of_row["methods"] == page["methods"]
        (tmp_path / "rows.txt").write_text(f"other\n{text}\n", encoding="utf-8")  # a text a line
        of_row, said = page_about(tmp_path, f"--start=FILE:{tmp_path / 'rows.txt'}", "--row=2", "--samples=1")
        assert of_row["tokens"] == page["tokens"] and "rows.txt:2: --row for another" in said
        refused(tmp_path, [f"--start=FILE:{tmp_path / 'rows.csv'}", "--row=3"], 2, "row=3", "rows.csv")
        refused(tmp_path, ["--start=abc", "--row=2"], 2, "row=2")
    if kind != "classify":
        refused(tmp_path, [f"--pair={pair}", "--target=x"], 2, "--target")


def test_that_there_is_no_answer_is_explained():
    """Where that is predicted; of several windows that of the one that is least sure of it, as there."""
    tokenizer = make_tokenizer("bytes", [], 0)
    body = tiny("gpt2", causal=False, head="none", vocab_size=tokenizer.vocab_size, block_size=64)
    head = {"labels": ["first", "last"], "paired": True, "pool": None, "max_length": 64, "no_answer": True,
            "apart": False}
    tuned = finetune.Tuned(body, TASKS["qa"](head, tokenizer)).eval()
    context, kinds = " ".join(f"w{i}" for i in range(50)), set()
    for text, sign in (("what?", 1), ("who is it?", 1), ("when was it?", -1)):
        row = tuned.task.row("x", text, context)
        examples = tuned.task.examples([row])
        inputs = [finetune.collate([one], tuned.task, torch.device("cpu"))[0] for one in examples]
        x = torch.cat([body.hidden(one["idx"])[0] for one in inputs])  # (windows * T, C)
        first = torch.arange(len(x)).unsqueeze(1) % 64 == 0
        with torch.no_grad():  # the first position stands out
            tuned.head.weight.copy_(sign * torch.linalg.lstsq(x, first.float()).solution.T)
        outputs = [tuned(**one)[0].detach().numpy() for one in inputs]
        none = min(out[0].sum() for out in outputs)
        best = max(tuned.task.best_span(row, one, out)[0] for one, out in zip(examples, outputs))
        case = explain.of_a_row(tuned, row, "")
        assert case.score(case.idx).item() == pytest.approx(max(none, best), abs=1e-4)
        assert (case.answer == "no answer") == (none > best)
        kinds.add(case.answer == "no answer")
    assert kinds == {True, False} and len(outputs) > 2


def test_the_tag_of_a_word_is_explained(capsys):
    """Of the first with a tag that is not O, or of the word that was asked for, in whichever window."""
    tokenizer = make_tokenizer("bytes", [], 0)
    body = tiny("gpt2", causal=False, head="none", vocab_size=tokenizer.vocab_size, block_size=64)
    head = {"task": "tag", "labels": ["A", "O"], "apart": False, "paired": False, "pool": None,
            "max_length": 64}
    tuned = finetune.Tuned(body, TASKS["tag"](head, tokenizer)).eval()
    torch.nn.init.normal_(tuned.head.weight)
    (said,) = tuned.predict(["one two three four"])
    for word, tag in zip(("one", "two", "three", "four"), said["prediction"], strict=True):
        case = explain.of_a_task(tuned, "one two three four", "", word)
        assert case.answer == f"{word}: {tag}"
        place = tokenizer.decode(case.idx[0].tolist()).index(word)
        out = tuned(case.idx, None)[0, place, "AO".index(tag)]
        assert case.score(case.idx).item() == pytest.approx(out.item(), abs=1e-5)
    first = (said["prediction"] + ["A"]).index("A") % 4
    named = ("one", "two", "three", "four")[first]
    assert explain.of_a_task(tuned, "one two three four", "", "").answer.startswith(f"{named}: ")
    explain.of_a_task(tuned, "one two one four", "", "one")
    assert "has 'one' 2 times: the first is explained" in capsys.readouterr().err
    with pytest.raises(explain.SettingError, match="five.*one, two"):
        explain.of_a_task(tuned, "one two three four", "", "five")
    long = " ".join(f"w{n}" for n in range(60))
    assert explain.of_a_task(tuned, long, "", "w55").answer.startswith("w55: ")
    # of a word in two windows, whose tag is the mean of both: one of them alone may say otherwise
    for bias, first in ((10, "w3: A"), (13, "w0: O")):
        with torch.no_grad():
            tuned.head.bias[1] = bias
        said, = tuned.predict([long])
        assert explain.of_a_task(tuned, long, "", "").answer == first
        assert ("A" in said["prediction"]) == (bias == 10)


def test_what_a_tuned_writer_is_given_as_a_table_is_a_prompt_of_a_row(tmp_path, monkeypatch, capsys):
    """With what training puts around it, not the file itself."""
    tokenizer = make_tokenizer("bytes", [], 0)
    body = tiny("gpt2", vocab_size=tokenizer.vocab_size, block_size=64)
    head = {"task": "lm", "labels": [], "instruct": True, "max_length": 64, "pool": None, "paired": None,
            "apart": False, "columns": {"text": "ask", "pair": "", "label": "say"}}
    save(tmp_path, body, tokenizer, head={**head, "weights": {}})
    rows = '{"ask": "a", "say": "b"}\n{"ask": "c", "say": "d"}\n'
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    settings = {"out_dir": str(tmp_path), "start": f"FILE:{tmp_path / 'rows.jsonl'}", "row": 2, "samples": 1}
    for name, value in settings.items():
        monkeypatch.setattr(explain, name, value)
    monkeypatch.setattr(explain.os, "access", lambda *asked: False)  # a folder of others, to be read alone
    monkeypatch.chdir(tmp_path.parent)
    explain.main()
    page = (tmp_path.parent / "explain.html").read_text(encoding="utf-8")
    page = page.split("const D = ")[1].split("\n")[0]
    said = "".join(json.loads(page)["tokens"]).replace("\u21b5", "\n")
    assert said == "### Instruction:\nc\n\n### Response:\n" and ":2: --row" in capsys.readouterr().out
