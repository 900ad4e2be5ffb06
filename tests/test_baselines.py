"""A bag of words, and its product with another model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn.metrics import log_loss

from llmprod import data
from llmprod.evaluate import baselines, metrics


@pytest.fixture(scope="module")
def news():
    """Real newswire: training, validation and test texts with their class numbers."""
    table = data.clean(data.load("reuters-r8"))[0].sample(1500, random_state=0)
    numbers = table["label"].astype("category").cat.codes.to_numpy()
    texts = table["text"].tolist()
    return [(texts[a:b], numbers[a:b]) for a, b in ((0, 700), (700, 1000), (1000, 1500))]


def test_a_bag_of_words_learns_topics_and_its_strength_is_chosen_on_validation(news):
    train, validation, (texts, y) = news
    model = baselines.chosen(train, validation)
    best = max(baselines.bag_of_words(*train, c).score(*validation) for c in baselines.STRENGTHS)
    assert model.score(*validation) == best
    largest = np.bincount(train[1]).argmax()
    assert model.score(texts, y) > np.mean(y == largest) + 0.2


def test_pieces_of_words_know_inflected_and_misspelt_words():
    texts, y = ["shipping vessel", "shipments by vessels", "grain harvest", "harvests of grains"] * 3, [0, 0, 1, 1] * 3
    with_pieces = baselines.bag_of_words(texts, y, 10.0, characters=True)
    assert with_pieces.predict(["shippment", "harvesting grainy"]).tolist() == [0, 1]


def test_the_product_is_at_least_as_good_on_validation_as_either_expert_and_helps_where_errors_differ():
    random = np.random.default_rng(0)
    y = random.integers(3, size=4000)
    truth = np.eye(3)[y]
    first, second = (log_softmax(2 * truth + random.normal(size=truth.shape), axis=1) for _ in range(2))
    fit, rest = slice(0, 2000), slice(2000, None)
    weights = baselines.expert_weights(first[fit], second[fit], y[fit])
    both = baselines.product(first, second, weights)
    for part in (fit, rest):
        alone = min(log_loss(y[part], np.exp(expert[part])) for expert in (first, second))
        assert log_loss(y[part], np.exp(both[part])) < alone
    right = [metrics.accuracy(y[rest], scores[rest].argmax(axis=1)) for scores in (first, second, both)]
    assert right[2] > max(right[:2]) + 0.02


def test_an_expert_that_knows_nothing_gets_no_say():
    random = np.random.default_rng(1)
    y = random.integers(4, size=3000)
    good = log_softmax(3 * np.eye(4)[y] + random.normal(size=(3000, 4)), axis=1)
    noise = log_softmax(random.normal(size=(3000, 4)), axis=1)
    a, b = baselines.expert_weights(good, noise, y)
    assert b < 0.1 < a


@given(st.floats(0, 5), st.floats(0, 5), st.integers(0, 100))
def test_a_product_is_a_distribution_and_an_expert_to_the_power_of_one_is_itself(a, b, seed):
    first, second = np.random.default_rng(seed).normal(scale=5, size=(2, 6, 4))
    assert np.allclose(np.exp(baselines.product(first, second, (a, b))).sum(axis=1), 1)
    assert np.allclose(baselines.product(first, second, (1, 0)), log_softmax(first, axis=1))
