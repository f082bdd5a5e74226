"""Metrics equal those of the reference libraries."""
import math
from functools import partial

import numpy as np
import pytest

from lib import metrics
from tests.helpers import (
    synthetic,
)


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
    called, ours = probs.argmax(1), metrics.class_scores(y, probs)
    close = partial(pytest.approx, abs=1e-9, rel=0)
    assert ours["accuracy"] == close(sk.accuracy_score(y, called))
    assert ours["f1_macro"] == close(sk.f1_score(y, called, average="macro"))
    two_of_three = metrics.confusion(np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0]), 3)  # one never occurs
    assert metrics.f1_macro(two_of_three) == close(sk.f1_score([0, 1, 1, 0], [0, 1, 0, 0], average="macro"))
    assert ours["matthews"] == close(sk.matthews_corrcoef(y, called))
    assert ours["loss"] == close(sk.log_loss(y, probs, labels=range(k)))
    there = [c for c in ([1] if k == 2 else range(k)) if (y == c).any()]
    assert ours["roc_auc"] == close(np.mean([sk.roc_auc_score(y == c, probs[:, c]) for c in there]))
    assert ours["average_precision"] == close(
        np.mean([sk.average_precision_score(y == c, probs[:, c]) for c in there]))
    if k > 2 and len(there) == k:
        assert ours["roc_auc"] == close(sk.roc_auc_score(y, probs, multi_class="ovr"))
    several = rng.random((n, k)) < 0.4
    several[0], several[1] = True, False  # each label occurs, and is missing
    p = (rng.integers(1, 10, (n, k)) + 0.7) / 11
    ours = metrics.label_scores(several, p)
    assert ours["accuracy"] == close(sk.accuracy_score(several, p > 0.5))
    for average in ("macro", "micro"):
        assert ours[f"f1_{average}"] == close(sk.f1_score(several, p > 0.5, average=average, zero_division=0))
    assert ours["roc_auc"] == close(sk.roc_auc_score(several, p, average="macro"))
    assert ours["average_precision"] == close(sk.average_precision_score(several, p, average="macro"))


def test_number_metrics_equal_scipy_and_undefined_ones_are_not_made_up():
    stats, rng = pytest.importorskip("scipy.stats"), np.random.default_rng(0)
    for decimals in (0, 1, 8):
        y, p = rng.integers(5, size=30) / 2, rng.integers(4, size=30) + rng.random(30).round(decimals)
        ours = metrics.number_scores(y, p)
        assert ours["pearson"] == pytest.approx(stats.pearsonr(y, p)[0], abs=1e-9)
        assert ours["spearman"] == pytest.approx(stats.spearmanr(y, p)[0], abs=1e-9)
    assert math.isnan(metrics.number_scores(y, np.ones(30))["spearman"])
    scores = metrics.class_scores(np.array([1, 1, 1]), np.array([[0.2, 0.8]] * 3))
    assert math.isnan(scores["roc_auc"]) and scores["accuracy"] == 1 and scores["matthews"] == 0


@pytest.mark.parametrize("tags, expected", [
    ("O B-a I-a O", {("a", 1, 3)}),
    ("B-a B-a", {("a", 0, 1), ("a", 1, 2)}),
    ("I-a I-a O I-b", {("a", 0, 2), ("b", 3, 4)}),  # conlleval: an I- after nothing begins one
    ("B-a I-b", {("a", 0, 1), ("b", 1, 2)}),
    ("B-a-b I-a-b", {("a-b", 0, 2)}),
    ("O O", set()),
])
def test_entities_are_conlleval_s(tags, expected):
    assert metrics.entities(tags.split()) == expected


def test_entity_f1_is_that_of_all_sentences_together():
    gold, called = ["B-a I-a O B-b", "O B-a", "O"], ["B-a I-a O B-a", "O B-a", "B-b"]
    counts = np.array([metrics.tag_counts(g.split(), c.split()) for g, c in zip(gold, called)])
    scores = metrics.tag_scores(counts, np.zeros(3))
    for name, value in (("precision", 2 / 4), ("recall", 2 / 3), ("f1", 4 / 7), ("accuracy", 5 / 7)):
        assert scores[name] == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("prediction, answers, expected", [
    ("The Eiffel-Tower!", ["eiffel tower", "Eiffeltower"], (1, 1)),  # punctuation goes, it is no space
    ("in the year 1999", ["1999"], (0, 2 * (1 / 3) / (1 / 3 + 1))),
    ("a b", ["the b"], (1, 1)),  # articles go
    ("x x y", ["x y y"], (0, 2 / 3)),  # words are counted
    ("", [], (1, 1)), ("x", [], (0, 0)), ("", ["x"], (0, 0)),
    ("北京大学。", ["北京大学"], (1, 1)), ("北京", ["北京大学"], (0, 2 / 3)),
])
def test_answers_match_as_squad_says(prediction, answers, expected):
    assert metrics.answer_match(prediction, answers) == pytest.approx(expected, abs=1e-9)


def test_intervals_and_gaps_say_how_sure_one_can_be():
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=400)
    right = rng.random(400) < 0.8
    probs = np.where((y == 1) == right, 0.9, 0.1)
    arrays = (y, np.stack((1 - probs, probs), axis=1))
    scores = metrics.with_intervals(metrics.class_scores, arrays)
    p = scores["accuracy"]
    low, high = scores["accuracy_ci95"]
    spread = 1.96 * math.sqrt(p * (1 - p) / 400)  # the normal approximation
    assert low == pytest.approx(p - spread, abs=0.01) and high == pytest.approx(p + spread, abs=0.01)
    found = metrics.by_group(metrics.class_scores, arrays, np.where(right | (y == 0), "a", "b"))
    gap = found["gaps"]["accuracy"]
    assert found["groups"]["b"]["accuracy"] == 0 and gap["lowest"] == "b" and gap["highest"] == "a"
    assert gap["gap_ci95"][0] < gap["gap"] < gap["gap_ci95"][1]


def test_the_bag_of_words_baseline_is_scikit_learn_s():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    from sklearn.linear_model import LogisticRegression
    texts, labels = synthetic(120)
    y = np.array([int(label == "good") for label in labels])
    theirs = text.TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"\w+")
    model = LogisticRegression(C=5, max_iter=1000, tol=1e-8).fit(theirs.fit_transform(texts[:80]), y[:80])
    pairs = [(text, None) for text in texts]
    ours = metrics.BagOfWords("class", 2).fit(pairs[:80], y[:80]).predict(pairs[80:])
    # two columns of weights against one: the same model at half the penalty
    assert np.abs(ours - model.predict_proba(theirs.transform(texts[80:]))).max() < 0.02
