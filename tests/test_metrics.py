"""Metrics equal those of the reference libraries."""
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lib import metrics, report
from lib.metrics import ANSWER_METRICS, CLASS_METRICS, LABEL_METRICS, NUMBER_METRICS, TAG_METRICS, compute
from lib.rows import Row
from lib.run import in_words
from lib.tasks import Classify, as_cell
from tests.answers import CMRC, SQUAD
from tests.helpers import synthetic

close = partial(pytest.approx, abs=1e-9, rel=0, nan_ok=True)


@pytest.mark.parametrize("seed", range(6))
def test_class_metrics_equal_scikit_learn(seed):
    """On few values, so that scores tie; with classes that never occur, and some that are never called."""
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    n, k = [(40, 2), (60, 3), (50, 5), (9, 4), (30, 2), (200, 7)][seed]
    y = rng.integers(max(2, k - seed % 2), size=n)  # the last class is missing for odd seeds
    probs = rng.integers(1, 4, (n, k)).astype(float)
    probs[:, seed % k] += seed % 2
    probs /= probs.sum(1, keepdims=True)
    called, there = probs.argmax(1), [c for c in ([1] if k == 2 else range(k)) if (y == c).any()]
    ours = compute(CLASS_METRICS, y, probs)
    del ours["calibration_error"]  # below
    assert ours == close({
        "loss": sk.log_loss(y, probs, labels=range(k)), "accuracy": sk.accuracy_score(y, called),
        "f1_macro": sk.f1_score(y, called, average="macro"), "matthews": sk.matthews_corrcoef(y, called),
        "roc_auc": np.mean([sk.roc_auc_score(y == c, probs[:, c]) for c in there]),
        "average_precision": np.mean([sk.average_precision_score(y == c, probs[:, c]) for c in there])})
    two_of_three = np.array([0, 1, 1, 0]), np.eye(3)[[0, 1, 0, 0]]  # one never occurs
    theirs = sk.f1_score([0, 1, 1, 0], [0, 1, 0, 0], average="macro")
    assert CLASS_METRICS["f1_macro"](*two_of_three) == close(theirs)

    several, p = rng.random((n, k)) < 0.4, (rng.integers(1, 10, (n, k)) + 0.7) / 11
    several[0], several[1] = True, False  # each label occurs, and is missing
    f1 = partial(sk.f1_score, several, p > 0.5, zero_division=0)
    assert compute(LABEL_METRICS, several, p) == close({
        "loss": np.mean([sk.log_loss(several[:, c], p[:, c]) for c in range(k)]),
        "accuracy": sk.accuracy_score(several, p > 0.5),
        "f1_macro": f1(average="macro"), "f1_micro": f1(average="micro"),
        "roc_auc": sk.roc_auc_score(several, p), "average_precision": sk.average_precision_score(several, p)})


def test_calibration_error_is_how_far_confidence_is_from_accuracy_in_each_bin():
    y, probs = np.array([0, 0, 1, 1]), np.array([[0.62, 0.38], [0.68, 0.32], [0.62, 0.38], [0.05, 0.95]])
    assert metrics.calibration_error(y, probs) == close((3 * abs(2 / 3 - 0.64) + 0.05) / 4)
    y = np.arange(300) % 10 > 0  # and the majority's share is right to the last digit
    assert metrics.calibration_error(y.astype(int), np.tile([0.1, 0.9], (300, 1))) == 0


def test_number_metrics_equal_scipy():
    stats, rng = pytest.importorskip("scipy.stats"), np.random.default_rng(0)
    for decimals in (0, 1, 8):
        y, p = rng.integers(5, size=30) / 2, rng.integers(4, size=30) + rng.random(30).round(decimals)
        assert compute(NUMBER_METRICS, y, p) == close({
            "loss": np.mean((y - p) ** 2), "mean_absolute_error": np.mean(abs(y - p)),
            "pearson": stats.pearsonr(y, p)[0], "spearman": stats.spearmanr(y, p)[0]})


@pytest.mark.parametrize("p", [np.ones(9), np.zeros(9), np.full(9, 0.1), 3.3 + 4e-16 * np.arange(9) % 1e-15])
def test_correlation_with_what_is_constant_is_not_defined(p):
    stats, y = pytest.importorskip("scipy.stats"), np.arange(9.0)
    with pytest.warns((stats.ConstantInputWarning, stats.NearConstantInputWarning)):
        stats.pearsonr(y, p)
    for arrays in ((y, p), (p, y)):
        found = compute(NUMBER_METRICS, *arrays)
        assert math.isnan(found["pearson"]) and math.isnan(found["spearman"])


def test_metrics_that_are_not_defined_are_not_made_up():
    scores = compute(CLASS_METRICS, np.array([1, 1, 1]), np.array([[0.2, 0.8]] * 3))
    assert math.isnan(scores["roc_auc"]) and scores["accuracy"] == 1 and scores["matthews"] == 0


@pytest.mark.parametrize("labels, tags, expected", [
    ("B-a I-a O", "O B-a I-a O", {("a", 1, 3)}),
    ("B-a", "B-a B-a", {("a", 0, 1), ("a", 1, 2)}),
    ("I-a I-b", "I-a I-a O I-b", {("a", 0, 2), ("b", 3, 4)}),  # conlleval: an I- after nothing begins one
    ("B-a I-b", "B-a I-b", {("a", 0, 1), ("b", 1, 2)}),
    ("B-a-b I-a-b", "B-a-b I-a-b", {("a-b", 0, 2)}),
    ("B_a I_a", "B_a I_a", {("a", 0, 2)}),
    ("b-per i-per o", "o b-per i-per o", {("per", 1, 3)}),
    ("B:a I:a O", "B:a I:a O", {("a", 0, 2)}),
    ("PER-B PER-I O", "PER-B PER-I O PER-B", {("PER", 0, 2), ("PER", 3, 4)}),
    ("per o", "o per", {("per", 1, 2)}),
    ("NN NN-S VB", "NN-S VB", {("NN-S", 0, 1), ("VB", 1, 2)}),  # one of three: no scheme
    ("B I O", "O B I I B", {("", 1, 4), ("", 4, 5)}),
    ("B I O", "O O", set()),
    # with marks of ends only whole entities count
    ("B-a I-a E-a S-a", "B-a I-a E-a S-a E-a I-a E-a", {("a", 0, 3), ("a", 3, 4)}),
    ("B-a I-a E-a S-a", "B-a I-a O S-a B-a O", {("a", 3, 4)}),
    ("B-a I-a L-a U-a B-b L-b", "B-a L-b U-a B-b L-b", {("a", 2, 3), ("b", 3, 5)}),
    ("B-a M-a E-a S-a", "B-a M-a E-a B-a M-a", {("a", 0, 3)}),
    ("B M E S", "B E S B M E M E", {("", 0, 2), ("", 2, 3), ("", 3, 6)}),
    ("B-a E-a", "B-a O B-a E-a", {("a", 0, 1), ("a", 2, 4)}),  # no S- in the set: a B- alone is whole
    ("I-a E-a", "I-a E-a E-a I-a", {("a", 0, 2), ("a", 2, 3)}),  # IOE
    # no prefixes: each word by itself
    ("PER O LOC", "PER PER O LOC", {("PER", 0, 1), ("PER", 1, 2), ("LOC", 3, 4)}),
    ("NOUN S B I-x V", "S NOUN B", {("S", 0, 1), ("NOUN", 1, 2), ("B", 2, 3)}),
])
def test_entities_are_those_of_conlleval_and_of_seqeval_s_strict_mode(labels, tags, expected):
    assert metrics.TagScheme(labels.split()).entities(tags.split()) == expected


@pytest.mark.parametrize("letters, scheme", [("BI", None), ("BIES", "IOBES"), ("BILU", "BILOU"),
                                             ("IE", "IOE2")])
def test_entities_equal_seqeval_s(letters, scheme):
    seqeval = pytest.importorskip("seqeval")
    from seqeval.metrics.sequence_labeling import get_entities
    labels = ["O", *(f"{letter}-{kind}" for letter in letters for kind in "ab")]
    ours, rng = metrics.TagScheme(labels), np.random.default_rng(0)
    for n in rng.integers(1, 9, 500):
        tags = rng.choice(labels, n).tolist()
        if scheme:
            theirs = seqeval.scheme.Tokens(tags, getattr(seqeval.scheme, scheme)).entities
            expected = {(one.tag, one.start, one.end) for one in theirs}
        else:
            expected = {(kind, begin, last + 1) for kind, begin, last in get_entities(tags)}
        assert ours.entities(tags) == expected


def test_what_counts_as_an_entity_is_said():
    for labels, said in (("0 3 4", "no tag is O"), ("PER O", "whose tag is not O"),
                         ("PER o", "whose tag is not O"), ("B-a I-a O", "by B-, I-")):
        assert said in str(metrics.TagScheme(labels.split()))


def test_a_model_is_perfect_by_f1_only_if_it_is():
    gold = "B-a I-a E-a O S-b B-b E-b".split()
    scheme = metrics.TagScheme(gold)
    assert metrics.tag_counts(gold, gold, scheme) == [3, 3, 3, 7, 7]
    no_ends = [tag.replace("E-", "I-") for tag in gold]
    assert metrics.tag_counts(gold, no_ends, scheme) == [1, 1, 3, 5, 7]
    words = "DET NOUN VERB NOUN".split()
    tags = "DET NOUN VERB X".split()
    found, called, there, right, n = metrics.tag_counts(words, tags, metrics.TagScheme(words + tags))
    assert found / called == found / there == right / n == 3 / 4  # F1 is the accuracy


def test_numbers_near_0_are_no_0():
    shown = [as_cell(x) for x in (0.0, 0.25, 0.0018, 0.00045678, -3.2e-9, math.nan)]
    assert shown == ["0.000000", "0.250000", "0.001800", "0.00045678", "-3.2e-09", "nan"]
    scores = {"loss": 4.12e-7, "accuracy": 0.5, "none": 0.0}
    assert in_words(scores) == "val loss 4.1e-07, accuracy 0.5000, none 0.0000"
    found = {"loss": 4.12e-7, "loss_ci95": [1e-7, 0.02], "baselines": {"mean": {"loss": 6.4e-7}}}
    line = report.table(found).splitlines()[1].split()
    assert line == ["loss", "4.1e-07", "[1.0e-07,", "0.0200]", "6.4e-07"]


def test_large_numbers_stay_in_their_columns():
    """As of the prices of houses, and their squares."""
    others = {"mean": {"loss": 2.5e10}, "bag_of_words": {"loss": 123456.78}}
    found = {"loss": 1.23456789e10, "loss_ci95": [math.nan, math.nan], "baselines": others}
    assert report.table(found).splitlines()[1].split() == ["loss", "1.23457e+10", "2.5e+10", "123457"]
    assert in_words({"none": 999.99, "perplexity": 1234.567}) == "none 999.9900, perplexity 1234.57"


def test_entity_f1_is_that_of_all_sentences_together():
    gold, called = ["B-a I-a O B-b", "O B-a", "O"], ["B-a I-a O B-a", "O B-a", "B-b"]
    scheme = metrics.TagScheme(" ".join(gold + called).split())
    counts = np.array([metrics.tag_counts(g.split(), c.split(), scheme) for g, c in zip(gold, called)])
    assert compute(TAG_METRICS, metrics.TagTotals(*counts.sum(0), 3.5)) == close({
        "precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "accuracy": 5 / 7, "loss": 0.5})


@pytest.mark.parametrize("pairs", [SQUAD, CMRC], ids=["SQuAD", "CMRC"])
def test_answers_match_as_the_official_scripts_say(pairs):
    for said, golds, exact, f1 in pairs:
        assert metrics.answer_match(said, golds) == (exact, pytest.approx(f1, abs=5e-5)), (said, golds)
    matches = np.array([metrics.answer_match(said, golds) for said, golds, *_ in pairs])
    found = compute(ANSWER_METRICS, *matches.T)
    assert found["exact_match"] == close(np.mean([exact for *_, exact, _ in pairs]))


def test_words_keep_the_marks_on_their_letters():
    assert metrics.split_words("हिन्दी में, 中国")[:5] == ["हिन्दी", "में", ",", "中", "国"]
    assert metrics.split_words("Don't a_b ½")[:5] == ["don", "'", "t", "a_b", "½"]


def test_the_bag_of_words_baseline_is_scikit_learn_s():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    from sklearn.linear_model import LogisticRegression
    texts, labels = synthetic(120)
    y = np.array([label == "good" for label in labels])
    theirs = text.TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"\w+")
    model = LogisticRegression(C=2.5, max_iter=1000, tol=1e-8).fit(theirs.fit_transform(texts[:80]), y[:80])
    rows, target = [Row("", text) for text in texts], torch.from_numpy(y[:80, None]).float()
    out = metrics.bag_of_words(rows[:80], rows[80:], 1, lambda out: F.binary_cross_entropy_with_logits(
        out, target, reduction="sum"))
    ours = torch.from_numpy(out).sigmoid()[:, 0].numpy()
    assert np.abs(ours - model.predict_proba(theirs.transform(texts[80:]))[:, 1]).max() < 1e-3
    assert set(metrics.words_of(Row("", "a b", "b c"))) == {
        "1 a", "1 b", "1 a b", "2 b", "2 c", "2 b c", "= b", "! a", "! c", "! a b", "! b c"}


@pytest.mark.parametrize("limit, said", [("WORDS_OF_ROWS", "more than 8 words in all rows"),
                                         ("WORDS_TIMES_OUTPUTS", "10 words times 2 outputs, more than 8")])
def test_a_baseline_that_is_too_large_is_left_out_aloud(limit, said, monkeypatch, capsys):
    monkeypatch.setattr(metrics, limit, 8)
    task = Classify({"labels": ["a", "b"], "max_length": 8, "paired": False, "apart": False}, None)
    rows = [Row("", f"of {word} and none", label=label) for label in "ab" for word in ("x", "y")]
    assert [*task.baselines(rows, rows)] == ["majority"]
    assert capsys.readouterr().out == f"(baseline bag_of_words is left out: {said})\n"


@pytest.mark.parametrize("several", [False, True])
def test_the_report_has_each_class_by_its_name(several, tmp_path, monkeypatch):
    """Names that mean something to matplotlib too, and outputs that are not numbers."""
    sk, axes = pytest.importorskip("sklearn.metrics"), pytest.importorskip("matplotlib.axes")
    shown, legend = [], axes.Axes.legend
    monkeypatch.setattr(axes.Axes, "legend",
                        lambda *args, **how: shown.extend(legend(*args, **how).get_texts()))
    rng, labels = np.random.default_rng(0), ["$a$", "_b", "c"]
    truth = rng.random((50, 3)) < 0.4
    y = truth.astype(np.float32) if several else truth.argmax(1)
    probs = rng.dirichlet(np.ones(3), 50).round(1)
    files = metrics.report(tmp_path, y, probs, labels)
    names = ["curves.json", "report.txt", "roc.png", "precision_recall.png", "calibration.png"]
    assert files == names + ["confusion.png"] * (not several)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in files[2:])
    report = (tmp_path / "report.txt").read_text(encoding="utf-8")
    for label in labels:
        assert any(one.get_text().startswith(f" {label} (AUC = ") for one in shown) and label in report
    assert not any(one.get_parse_math() for one in shown)
    curve = json.loads((tmp_path / "curves.json").read_text(encoding="utf-8"))["curves"]["c"]
    right = truth[:, 2] if several else y == 2
    assert sk.auc(curve["false_positive_rate"], curve["true_positive_rate"]) == close(curve["roc_auc"])
    assert curve["roc_auc"] == close(sk.roc_auc_score(right, probs[:, 2]))
    assert curve["average_precision"] == close(sk.average_precision_score(right, probs[:, 2]))
    if not several:
        assert metrics.report(tmp_path, np.zeros(3, int), np.full((3, 3), math.nan), labels) == files
