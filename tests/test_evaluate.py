"""Metrics against hand-worked examples and against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import classification_report

from llmprod import evaluate

Y, P = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])


def test_by_hand():
    assert evaluate.accuracy(Y, P) == pytest.approx(4 / 6)
    # F1: class 0 P 2/3 R 2/3 -> 2/3; class 1 P 2/3 R 1 -> 4/5; class 2 -> 0
    assert evaluate.macro_f1(Y, P) == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    table = evaluate.per_class(Y, P, ["a", "b", "c"])
    assert table.index.tolist() == ["a", "b", "c"] and table["support"].tolist() == [3, 2, 1]
    assert table.loc["b", "precision"] == pytest.approx(2 / 3) and table.loc["b", "recall"] == 1


def test_calibration_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    labels = np.array([0, 1, 0, 1])
    # two bins of ten: confidence .9 with accuracy 1/2, and .6 with accuracy 1, each half of the texts
    assert evaluate.expected_calibration_error(labels, probabilities, bins=10) == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)


def test_certain_and_right_has_no_calibration_error():
    assert evaluate.expected_calibration_error(np.array([0, 1]), np.eye(2)) == 0


@settings(deadline=None)
@given(st.integers(2, 60).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 4), min_size=n, max_size=n)] * 2)))
def test_equals_sklearn(pair):
    y, p = map(np.array, pair)
    theirs = classification_report(y, p, output_dict=True, zero_division=0)
    assert evaluate.macro_f1(y, p) == pytest.approx(theirs["macro avg"]["f1-score"])
    assert evaluate.accuracy(y, p) == pytest.approx((y == p).mean())


def test_bootstrap_interval_covers_as_often_as_it_says():
    """Of 200 samples from a classifier that is right 80 % of the time, about 95 % of the intervals hold 0.8."""
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        y = np.zeros(100, dtype=int)
        p = (random.random(100) > 0.8).astype(int)
        low, high = evaluate.bootstrap_interval(lambda a, b: (a == b).mean(), y, p, resamples=200, seed=trial)
        covered += low <= 0.8 <= high
    assert 0.88 <= covered / 200 <= 0.99
