"""Tasks: what becomes of rows, what is minimised, what the outputs mean."""
from types import SimpleNamespace


import numpy as np
import pytest
import torch
from torch.nn import functional as F

from config import SettingError, UserError
from lib.tasks import LM, TASKS, Answer, Classify, Example, Regress, Tag, one_spelling
from lib.rows import Row
from lib.tokenizer import make_tokenizer

PLAIN = {"max_length": 64, "paired": False, "apart": False}
BYTES = make_tokenizer("bytes", [], 0)
CLASSES = {**PLAIN, "labels": ["a", "b", "c"]}
SPANS = {**PLAIN, "paired": True, "labels": ["first", "last"], "no_answer": False}


def contexts(n):
    """Questions on contexts, several of them longer than 64 tokens."""
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        facts = [f"n{j} has {rng.integers(100)}." for j in rng.permutation(30)[:rng.integers(2, 25)]]
        name, _, answer = facts[0].rstrip(".").split()
        context = " ".join(rng.permutation(facts))
        begin = context.index(facts[0]) + len(f"{name} has ")
        rows.append(Row("", f"what has {name}?", context, [(answer, begin)], unit=f"article {i % 20}"))
    return rows


def weighted_mean(out, y):
    """Each row by the weight of its class, the smoothed share of the others included."""
    each = torch.stack([F.cross_entropy(a[None], b[None], label_smoothing=0.1) for a, b in zip(out, y)])
    return (WEIGHT[y] * each).sum() / WEIGHT[y].sum()


WEIGHT = torch.tensor([0.5, 1.0, 3.0])
CLASSIFY, SEVERAL = Classify(CLASSES, None), Classify({**CLASSES, "several": True}, None)
NUMBER = Regress({**PLAIN, "labels": ["number"], "mean": 3.0, "std": 2.0}, None)
TARGET = torch.arange(9) % 3
LOSSES = {  # the task, outputs, targets, weight, label smoothing, and torch's mean
    "class": (CLASSIFY, (9, 3), TARGET, None, 0.0, F.cross_entropy),
    "weighted": (CLASSIFY, (9, 3), TARGET, WEIGHT, 0.0, lambda out, y: F.cross_entropy(out, y, WEIGHT)),
    "weighted and smoothed": (CLASSIFY, (9, 3), TARGET, WEIGHT, 0.1, weighted_mean),
    "labels": (SEVERAL, (9, 3), F.one_hot(TARGET).float(), WEIGHT, 0.0, lambda out, y:
               F.binary_cross_entropy_with_logits(out, y, pos_weight=WEIGHT)),
    "labels smoothed": (SEVERAL, (9, 3), F.one_hot(TARGET).float(), WEIGHT, 0.1, lambda out, y:
                        F.binary_cross_entropy_with_logits(out, y * 0.9 + 0.05, y * (WEIGHT - 1) + 1)),
    "number": (NUMBER, (9, 1), torch.arange(9.0), None, 0.0, lambda out, y: F.mse_loss(out[:, 0], y)),
    "answer": (Answer(SPANS, None), (9, 20, 2),
               torch.arange(18).view(9, 2), None, 0.0, F.cross_entropy),
    "tokens": (LM({**PLAIN, "labels": []}, None), (9, 50), torch.arange(9), None, 0.0, F.cross_entropy)}


@pytest.mark.parametrize("kind", LOSSES)
def test_sums_of_the_loss_over_parts_of_a_batch_are_its_mean(kind):
    task, shape, target, weight, smoothing, mean = LOSSES[kind]
    out = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole, parts = out.clone().requires_grad_(), out.clone().requires_grad_()
    mean(whole, target).backward()
    count = sum(task.count(y, weight) for y in target.split(4))
    total = sum(task.loss(x, y, weight, smoothing) for x, y in zip(parts.split(4), target.split(4))) / count
    total.backward()
    torch.testing.assert_close(total, mean(out, target))
    torch.testing.assert_close(parts.grad, whole.grad)
    if kind in ("class", "number", "answer", "tokens"):  # one batch: bit for bit
        once = task.loss(out, target, weight, smoothing) / task.count(target, weight)
        assert torch.equal(once, mean(out, target))


def test_splits_are_alike_in_labels_and_keep_together_what_belongs_together():
    rows = [Row("", f"t{i // 2}", None, "rare" if i < 40 else "often") for i in range(400)]
    part = Classify.split(rows, 10, 0)
    assert np.bincount(part).tolist() == [40] * 10
    assert np.bincount(part[:40], minlength=10).tolist() == [4] * 10  # the rare ones
    assert (part[::2] == part[1::2]).all()
    part = Answer.split(contexts(100), 10, 0)
    assert all(len(set(part[i::20])) == 1 for i in range(20))


@pytest.mark.parametrize("apart", [False, True])
def test_of_two_texts_the_longer_is_cut_first(apart):
    task = Classify({**CLASSES, "paired": True, "apart": apart}, BYTES)
    for a, b in ((5, 7), (100, 7), (7, 100), (100, 100), (0, 100), (31, 31)):
        example, = task.examples([Row("", "x" * a, "y" * b)])
        ids = [i for part, _ in example.parts for i in part]
        x, y = ids.count(ord("x")), ids.count(ord("y"))
        assert all(len(part) <= 64 for part, _ in example.parts)
        if apart:
            assert (x, y) == (min(a, 63), min(b, 63))
        else:
            assert x + y == min(a + b, 62)
            assert x >= min(a, 31) and y >= min(b, 31)
    assert task.notes["longer than 64 tokens: cut there"] == (5 if apart else 4)
    with pytest.raises(UserError, match="^a.csv:7: two texts are wanted"):
        task.examples([Row("a.csv:7", "x")])
    with pytest.raises(UserError, match="^--start: two texts are wanted.*: the second on a line below"):
        task.row("--start", "x")


def test_numbers_are_read_as_people_write_them_where_that_is_one_number_only(capsys):
    labels = {"4,5": 4.5, "-0,25": -0.25, "3": 3, " 1,1234": 1.1234, "2.5": 2.5, "5 %": 5, "4 stars": 4,
              "1 Star": 1, "4,5分": 4.5, "★★★☆☆": 3, "⭐️⭐️": 2}
    head = Regress.learn([Row("", "x", label=label) for label in labels], None)
    assert head["mean"] == pytest.approx(np.mean([*labels.values()]))
    assert capsys.readouterr().out == "labels    4,5 is read as 4.5\n"
    for label in ("1,234", "1,234,567", "1.234,5", "a,b", "4/5", "5 cars", "star", "☆"):
        with pytest.raises(UserError, match="a number is wanted"):
            Regress.learn([Row("", "x", label=label)], None)
    Regress.learn([Row("", "x", label=label) for label in "12"], None)
    assert not capsys.readouterr().out


def test_on_the_terminal_values_stand_below_each_other():
    task = Classify({**PLAIN, "labels": ["a", "comp.os.ms-windows.misc"]}, BYTES)
    lines = task.shown(Row("", "x"), task.answers([], [], [np.array([0.0, 1.0])])[0]).splitlines()
    assert len(lines) == 4 and {line.rindex(" ") for line in lines} == {len("prob_comp.os.ms-windows.misc")}


def test_all_is_read_of_a_text_that_thousands_of_spaces_begin(monkeypatch):
    """Which many tokenizers drop: a text must not be cut before they have."""
    task, encode = Classify({**CLASSES, "pool": "mean", "space": True}, BYTES), BYTES.encode
    monkeypatch.setattr(BYTES, "encode", lambda text: encode(" ".join(text.split())))
    texts = ["fine", " " * 10**5 + "fine", "\n" * 7000 + "x" * 99, ""]
    found = [example.parts[0][0].tolist() for example in task.inputs([Row("", text) for text in texts])]
    assert found[0] == found[1] == [*b"fine", BYTES.eot] and found[2] == [*b"x" * 63, BYTES.eot]
    assert found[3] == [BYTES.eot]  # as an export reads it: no space is put before nothing
    assert task.notes == {"longer than 64 tokens: cut there": 1}


def test_an_answer_has_the_accents_that_a_normalizer_joined_to_their_letters():
    context = "at the cafe\u0301 he sat"
    row, task = Row("", "where?", context, []), Answer(SPANS, None)
    spans = np.array([(0, 2), (3, 6), (7, 10), (10, 11), (13, 15)])  # as NFKC makes e and its accent one
    example = Example(0, [], None, np.arange(5), spans)
    assert task.best_span(row, example, 9 * np.eye(5)[:, [2, 3]])[1] == "cafe\u0301"
    row = Row("", "who?", "वह नमस्ते है", [])  # BERT's leaves out Hindi's vowels
    example = Example(0, [], None, np.arange(3), np.array([(0, 2), (3, 8), (10, 11)]))
    assert task.best_span(row, example, 9 * np.eye(3)[:, [1, 1]])[1] == "नमस्ते"


def test_predictions_are_told_as_the_file_has_them():
    rows, probs = [Row("", "x", None, "a"), Row("", "y", "z", "b")], np.array([0.7, 0.6, 0.1])
    header, lines = CLASSIFY.table(rows[:1], [probs])
    assert header == ["text", "label", "prediction", "prob_a", "prob_b", "prob_c"]
    assert lines == [["x", "a", "a", "0.700000", "0.600000", "0.100000"]]
    assert SEVERAL.said(probs)["prediction"] == ["a", "b"]
    assert SEVERAL.table(rows[1:], [probs])[1] == [["y", "z", "b", "a|b", "0.700000", "0.600000", "0.100000"]]
    many = Classify({**CLASSES, "labels": [f"l{k}" for k in range(5000)]}, None)
    shown = many.shown(rows[0], np.arange(5000) / 5000).splitlines()
    assert len(shown) == 3 + 20 + 1 and shown[3].split()[0] == "prob_l4980" and "4,980 less" in shown[-1]
    answer, = NUMBER.answers(rows[:1], [], [np.array([0.5])])
    assert NUMBER.said(answer) == {"prediction": 4.0} and NUMBER.target(Row("", "", label="4")) == 0.5
    tag, answer = Tag({**PLAIN, "labels": ["B", "O"]}, None), (["B", "O"], None)
    assert tag.said(answer) == {"prediction": ["B", "O"]}
    assert tag.table([tag.row("", "Rome is")], [answer])[1] == [["", "Rome", "", "B"], ["", "is", "", "O"]]


def test_one_number_for_all_has_no_correlation():
    """A body that gives every text the same output does so up to a bit, which batches and padding change."""
    rows = [Row("", "x", label=str(y)) for y in range(9)]
    outputs = np.float32(0.7) + np.float32(6e-8) * np.arange(9)[:, None]
    scores = NUMBER.scores(*NUMBER.arrays(rows, NUMBER.answers(rows, [], outputs)))
    assert np.isnan(scores["pearson"]) and np.isnan(scores["spearman"])
    assert scores["loss"] == pytest.approx(np.mean((np.arange(9) - 4.4) ** 2))
    different = NUMBER.arrays(rows, NUMBER.answers(rows, [], outputs + 1e-3 * np.arange(9)[:, None]))
    assert NUMBER.scores(*different)["spearman"] == pytest.approx(1)


def test_answers_are_scored_if_their_labels_were_learned():
    assert CLASSIFY.knows_label(Row("", "x", label="a")) and NUMBER.knows_label(Row("", "x", label="2.5"))
    assert all(SEVERAL.knows_label(Row("", "x", label=label)) for label in (["a", "b"], "a|b"))
    for task, label in ((CLASSIFY, "d"), (CLASSIFY, ""), (CLASSIFY, None), (CLASSIFY, ["a"]), (NUMBER, "no"),
                        (SEVERAL, "a|d")):
        assert not task.knows_label(Row("", "x", label=label))


def test_what_is_explained_is_the_likeliest_class_or_the_one_asked_for():
    out = np.array([0.1, 0.9, 0.3])
    assert CLASSIFY.explained(None, None, None, out, "") == ("b", [1])
    assert CLASSIFY.explained(None, None, None, out, "c") == ("c", [2])
    with pytest.raises(SettingError, match="--target=d: must be a class, one of a, b, c"):
        CLASSIFY.explained(None, None, None, out, "d")
    stars = Classify({**PLAIN, "labels": ["1.0", "2.0", "true"]}, None)
    assert [stars.explained(None, None, None, out, one)[0] for one in ("2", "True")] == ["2.0", "true"]
    with pytest.raises(UserError, match="explain"):
        Classify({**CLASSES, "apart": True}, None).explained(None, None, None, out, "")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_answers_are_exact_and_in_some_window(kind):
    rows = contexts(40)
    tokenizer = make_tokenizer(kind, [row.pair for row in rows], 300)
    task = Answer(SPANS, tokenizer)
    examples, answered = task.examples(rows), set()
    assert len(examples) > len(rows) and max(len(one.parts[0][0]) for one in examples) <= 64
    for example in examples:
        row = rows[example.row]
        # outputs that point at the target give the answer, and only what stands in the context
        out = np.full((len(example.parts[0][0]), 2), -1.0, dtype=np.float32)
        out[example.target, [0, 1]] = 5
        (text, p), = task.answers([row], [example._replace(row=0)], [out])
        read = np.array(example.parts[0][0])[example.places]
        assert text in row.pair and tokenizer.decode(read) in row.pair
        if example.target.any():
            gold = row.label[0][0]
            assert gold in text and len(text) <= len(gold) + 3 and p > 0.5  # whole tokens
            first, last = example.target
            assert task.explained(row, None, example, out, "") == (text, [2 * first, 2 * last + 1])
            answered.add(example.row)
    assert answered == set(range(40))


def test_an_answer_may_be_as_long_as_the_longest_to_train_on():
    context = "It was " + "a long answer, " * 4 + "they said."
    answer = context[7:62]
    task = Answer({**SPANS, "max_length": 128}, BYTES)
    examples = task.examples([Row("", "what?", context, [(answer, 7)])])
    out = np.full((len(examples[0].parts[0][0]), 2), -1.0, dtype=np.float32)
    out[examples[0].target, [0, 1]] = 5
    row = Row("", "what?", context)
    assert task.answers([row], examples, [out])[0][0] != answer  # of old checkpoints: 40 tokens
    for asked, found in ((None, True), (54, False)):
        assert "the longest to train on has 55" in task.settle(examples, SimpleNamespace(max_answer=asked))
        assert (task.answers([row], examples, [out])[0][0] == answer) is found
    short = Answer({**SPANS, "max_length": 40}, BYTES)
    short.examples([Row("", "what?", context, [(answer, 7)])])
    assert short.notes["whose answer no window holds: it cannot be found"] == 1


def test_the_best_answer_is_the_best_of_all_spans_that_are_not_too_long():
    task, row = Answer({**SPANS, "max_length": 128, "max_answer": 40}, BYTES), contexts(1)[0]
    row.pair = row.pair[:70]
    example, = task.examples([row])
    for seed in range(5):
        out = np.random.default_rng(seed).normal(size=(len(example.parts[0][0]), 2)).astype(np.float32)
        best = max((out[a, 0] + out[b, 1], a, b) for a in example.places for b in example.places
                   if a <= b < a + 40)
        score, text, ends = task.best_span(row, example, out)
        assert score == best[0] and tuple(ends) == best[1:]
        assert text == BYTES.decode(example.parts[0][0][ends[0]:ends[1] + 1]).strip()


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_each_word_has_its_tag_in_some_window(kind):
    rng, rows = np.random.default_rng(0), []
    for n in (120, 1, 0, 7):  # the first is longer than the model
        words = [("Rome", f"w{rng.integers(20)}é")[rng.integers(2)] for _ in range(n)]
        rows.append(Row("", " ".join(words), label=[f"B-{word[0]}" for word in words], words=words))
    tokenizer = make_tokenizer(kind, [row.text for row in rows], 300)
    task = Tag({**PLAIN, "labels": Tag.learn(rows, SimpleNamespace(words=None))["labels"]}, tokenizer)
    examples = task.examples(rows)
    assert len(examples) > len(rows)
    for example in examples:
        ids, words = example.parts[0][0], rows[example.row].words
        for place, w in zip(example.places, example.spans):
            assert words[w].startswith(tokenizer.decode(ids[place:place + 1]).strip() or "?")
    answers = task.answers(rows, examples, [np.eye(2, dtype=np.float32)[one.target] for one in examples])
    assert [tags for tags, _ in answers] == [row.label for row in rows]
    scores = task.scores(*task.arrays(rows, answers))
    assert scores["f1"] == 1 and scores["loss"] == pytest.approx(np.log(1 + np.exp(-1)))


def test_empty_contexts_have_empty_answers():
    task = Answer({**SPANS, "no_answer": True}, BYTES)
    rows = [Row("", "?", ""), Row("", "?", "a b")]
    examples = task.examples(rows)
    outputs = [np.zeros((len(one.parts[0][0]), 2), dtype=np.float32) for one in examples]
    assert task.answers(rows, examples, outputs)[0] == ("", pytest.approx(0))


def test_loss_is_on_the_response_alone_and_on_each_token_of_a_text():
    head = {**PLAIN, "labels": [], "instruct": True}
    example, = LM(head, BYTES).examples([Row("", "Say", None, "yes")])
    assert BYTES.decode(example.target[:-1]) == "yes" and example.target[-1] == BYTES.eot
    ids = np.array(example.parts[0][0])
    assert BYTES.decode(ids[example.places[1:]]) == "yes"  # seen before the next is guessed
    examples = LM({**head, "instruct": False}, BYTES).examples([Row("", "x" * 200)])
    assert sum(len(one.target) for one in examples) == 200  # all but the first, and the end
    assert max(len(one.parts[0][0]) for one in examples) == 64


def test_classes_that_are_rare_weigh_as_much_as_frequent_ones():
    rows = [Row("", "", label=label) for label in "aaaabbc"]
    weight = CLASSIFY.class_weight(rows)
    assert (weight * torch.tensor([4, 2, 1])).tolist() == pytest.approx([7 / 3] * 3)
    assert SEVERAL.class_weight(rows).tolist() == pytest.approx([3 / 4, 5 / 2, 6])
    rows = [Row("", "", label="a|b"), Row("", "", label="a"), Row("", "", label="a|c")]
    assert SEVERAL.class_weight(rows).tolist() == [1, 2, 2]  # a is never absent, and is learned


def test_of_many_labels_that_are_alike_the_first_are_named():
    said, labels = [], [f"{i}{end}" for i in range(500) for end in ("", ".0")]
    same = one_spelling([Row("", "x", label=label) for label in labels], said.append)
    assert len(same) == 500 and len(said) == 11 and "0, 0.0: one class" in said[0] and "490 more" in said[-1]


def test_a_target_of_several_labels_is_a_byte_each():
    target = SEVERAL.target(Row("", "x", label=SEVERAL.labels[1]))
    assert target.nbytes == len(SEVERAL.labels) and np.flatnonzero(target).tolist() == [1]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_in_one_way_what_its_outputs_are_of(name):
    task = TASKS[name]
    assert task.of_texts + task.by_token <= 1 and task.writes <= task.by_token
    assert task.metric in task.metrics
