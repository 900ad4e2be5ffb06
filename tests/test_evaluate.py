"""Metrics against hand-worked examples and against scikit-learn."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import LedoitWolf
from sklearn.metrics import classification_report

from llmprod.evaluate import metrics

Y, P = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])


def test_by_hand():
    assert metrics.accuracy(Y, P) == pytest.approx(4 / 6)
    # F1: class 0 P 2/3 R 2/3 -> 2/3; class 1 P 2/3 R 1 -> 4/5; class 2 -> 0
    assert metrics.macro_f1(Y, P) == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    table = metrics.per_class(Y, P, ["a", "b", "c"])
    assert table.index.tolist() == ["a", "b", "c"] and table["support"].tolist() == [3, 2, 1]
    assert table.loc["b", "precision"] == pytest.approx(2 / 3) and table.loc["b", "recall"] == 1


def test_calibration_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    labels = np.array([0, 1, 0, 1])
    # two bins of ten: confidence .9 with accuracy 1/2, and .6 with accuracy 1, each half of the texts
    assert metrics.expected_calibration_error(labels, probabilities, bins=10) == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)


def test_certain_and_right_has_no_calibration_error():
    assert metrics.expected_calibration_error(np.array([0, 1]), np.eye(2)) == 0


@given(st.integers(2, 60).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 4), min_size=n, max_size=n)] * 2)))
def test_equals_sklearn(pair):
    y, p = map(np.array, pair)
    theirs = classification_report(y, p, output_dict=True, zero_division=0)
    assert metrics.macro_f1(y, p) == pytest.approx(theirs["macro avg"]["f1-score"])
    assert metrics.accuracy(y, p) == pytest.approx((y == p).mean())


def test_bootstrap_interval_covers_as_often_as_it_says():
    """Of 200 samples from a classifier that is right 80 % of the time, about 95 % of the intervals hold 0.8."""
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        y = np.zeros(100, dtype=int)
        p = (random.random(100) > 0.8).astype(int)
        low, high = metrics.bootstrap_interval(lambda a, b: (a == b).mean(), y, p, resamples=200, seed=trial)
        covered += low <= 0.8 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_summary_is_the_single_metrics():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    found = metrics.summary(np.array([0, 1, 0]), probabilities)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["log loss, nats"] == pytest.approx(-np.log([0.7, 0.8, 0.3]).mean())


def test_mcnemar_by_hand():
    labels = np.zeros(10, dtype=int)
    one, other = labels.copy(), labels.copy()
    other[:5] = 1  # only one is right on five texts, never the other way round: two-sided p = 2 / 2^5
    assert metrics.mcnemar(labels, one, other) == (5, 0, pytest.approx(2 / 32))
    assert metrics.mcnemar(labels, one, one) == (0, 0, 1.0)


def test_paired_bootstrap_knows_a_real_difference_from_none():
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 400)
    good, worse = labels.copy(), labels.copy()
    good[:20] = (good[:20] + 1) % 3
    worse[:80] = (worse[:80] + 1) % 3
    gain, low, high = metrics.paired_bootstrap(metrics.accuracy, labels, good, worse)
    assert gain == pytest.approx(60 / 400) and 0 < low < gain < high
    assert metrics.paired_bootstrap(metrics.accuracy, labels, good, good) == (0, 0, 0)


def test_risk_coverage_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.45, 0.55]])
    table = metrics.risk_coverage(np.array([0, 1, 1, 1]), probabilities)  # the third most confident is wrong
    assert table["coverage"].tolist() == [0.25, 0.5, 0.75, 1]
    assert table["accuracy"].tolist() == pytest.approx([1, 1, 2 / 3, 3 / 4])


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_temperature_finds_what_logits_were_multiplied_with(true):
    random = np.random.default_rng(0)
    logits = random.normal(size=(20000, 4)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (probabilities.cumsum(axis=1) < random.random((20000, 1))).sum(axis=1)
    assert metrics.temperature(labels, true * logits) == pytest.approx(true, rel=0.05)


def test_ood_scores_are_their_formulas():
    logits = np.array([[2.0, 0.0], [0.0, 0.0]])
    assert metrics.maximum_softmax(logits) == pytest.approx([-np.exp(2) / (np.exp(2) + 1), -0.5])
    assert metrics.energy(logits) == pytest.approx([-np.log(np.exp(2) + 1), -np.log(2)])
    random = np.random.default_rng(0)
    train = np.concatenate([random.normal(0, 1, (500, 2)), random.normal([10, 0], 1, (500, 2))])
    near = metrics.mahalanobis(np.array([[0.0, 0.0], [10.0, 0.0], [5.0, 0.0]]), train, np.repeat([0, 1], 500))
    assert near[:2] == pytest.approx([0, 0], abs=0.05) and near[2] == pytest.approx(25, rel=0.1)


def test_ood_metrics_by_hand():
    known, foreign = np.arange(100.0), np.array([98.0, 200.0, 300.0, 50.0])
    found = metrics.ood_metrics(known, foreign)
    # 98 beats 98 known ones and ties with one, 50 beats 50 and ties with one, the others beat all
    assert found["AUROC"] == pytest.approx((98.5 + 100 + 100 + 50.5) / 400)
    assert found["FPR at 95 %"] == pytest.approx(1 / 4)


def test_mahalanobis_is_the_formula_and_its_memory_does_not_grow_with_classes_times_dimensions():
    random, classes, size = np.random.default_rng(0), 100, 64
    labels = np.arange(1000) % classes
    train = random.normal(size=(1000, size)).astype(np.float32) + labels[:, None] / 10
    vectors = random.normal(size=(1500, size)).astype(np.float32)
    centres = np.stack([train[labels == k].mean(axis=0) for k in range(classes)])
    precision = LedoitWolf(assume_centered=True).fit(train - centres[labels]).precision_
    expected = [min((v - c) @ precision @ (v - c) for c in centres) for v in vectors[:20]]
    tracemalloc.start()
    found = metrics.mahalanobis(vectors, train, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(found[:20], expected, rtol=1e-6)
    assert peak < 8 * len(vectors) * (classes + 4 * size), "a table of texts and classes, and one of texts"
