"""Active learning: strategies pick what they say, and the curve is honest."""

import numpy as np
import pandas as pd
import pytest

from llmprod import LLMProdError
from llmprod.evaluate import active


@pytest.fixture
def blobs():
    """Six classes as blobs on a sphere, two of them near each other: (vectors, labels)."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(6, 16))
    centres[1] = centres[0] + 0.5 * random.normal(size=16)
    labels = random.integers(0, 6, 1200)
    vectors = centres[labels] + 0.5 * random.normal(size=(1200, 16))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), labels


def test_uncertainty_is_the_margin():
    assert active.uncertain(np.array([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]])) == pytest.approx([0.5, 1.0])


@pytest.mark.parametrize("strategy", active.STRATEGIES)
def test_a_strategy_picks_that_many_different_texts(strategy, blobs):
    vectors, labels = blobs
    model = active.fit(vectors[:50], labels[:50])
    beliefs = model.predict_proba(vectors)
    rows = active.STRATEGIES[strategy](beliefs, vectors, 40, np.random.default_rng(0))
    assert len(rows) == len(set(rows.tolist())) == 40
    unsure = active.uncertain(beliefs)
    if strategy in ("least sure", "mixed"):
        assert unsure[rows].mean() > unsure.mean() + 0.1
    if strategy == "diverse":
        others = np.random.default_rng(1).choice(1200, 40, replace=False)
        ours, by_chance = (
            np.linalg.norm(vectors[:, None] - vectors[chosen][None], axis=-1).min(axis=1).mean()
            for chosen in (rows, others)
        )
        assert ours < by_chance, "every text has a chosen one nearer to it"


def test_a_curve_buys_in_rounds_and_ends_at_the_budget(blobs):
    vectors, labels = blobs
    pool, test = (vectors[:900], labels[:900]), (vectors[900:], labels[900:])
    curve = active.learning_curve(pool, test, "least sure", first=20, batch=30, until=130, seed=0)
    assert curve["labels"].tolist() == [20, 50, 80, 110, 130]
    assert curve["accuracy"].iloc[-1] > curve["accuracy"].iloc[0]
    pd.testing.assert_frame_equal(curve, active.learning_curve(pool, test, "least sure", 20, 30, 130, 0))
    with pytest.raises(LLMProdError, match="random, least sure, diverse, mixed"):
        active.learning_curve(pool, test, "psychic", 20, 30, 130, 0)


def test_labels_needed_lies_between_rounds():
    curve = pd.DataFrame({"labels": [10, 20, 30], "accuracy": [0.5, 0.7, 0.8]})
    assert active.labels_needed(curve, 0.6) == pytest.approx(15)
    assert active.labels_needed(curve, 0.4) == 10
    assert np.isnan(active.labels_needed(curve, 0.9))
