"""Drift: planted differences of inputs, and none."""

import math

import numpy as np
import pandas as pd
import pytest

from llmprod import LLMProdError
from llmprod.evaluate import drift


def table(size: int, random: np.random.Generator, longer: float = 0, topics=(0.5, 0.3, 0.2)) -> pd.DataFrame:
    columns = {f"number {i}": random.normal(size=size) for i in range(4)}
    columns |= {f"class {i}": random.choice(["a", "b", "c"], size, p=(0.5, 0.3, 0.2)) for i in range(2)}
    return pd.DataFrame(columns | {"length": random.normal(longer, 1, size), "topic": random.choice(3, size, p=topics)})


def test_drift_finds_what_was_planted_and_says_how_large_it_is():
    random = np.random.default_rng(0)
    reference, current = table(1500, random), table(1500, random, longer=0.5, topics=(0.3, 0.3, 0.4))
    reference["topic"], current["topic"] = (frame["topic"].map("topic {}".format) for frame in (reference, current))
    found = drift.drift(reference, current)
    assert found.index[found["drifted"]].tolist() == ["length", "topic"]
    assert found.loc["length", "effect"] == pytest.approx(0.197, abs=0.04), "2 Φ(0.25) - 1"
    # shares p and q: χ²/n is half the sum of (p - q)² / (p + q), over the mean of both
    assert found.loc["topic", "effect"] == pytest.approx(math.sqrt((0.04 / 0.8 + 0.04 / 0.6) / 2), abs=0.04)
    assert (found["adjusted p"] >= found["p"]).all()


def test_a_small_difference_of_many_documents_is_significant_but_no_drift():
    random = np.random.default_rng(0)
    found = drift.drift(table(40000, random), table(40000, random, longer=0.05)).loc["length"]
    assert found["adjusted p"] < 0.001 and not found["drifted"]


def test_false_discoveries_are_rare_without_drift():
    """In 5 % of comparisons or fewer there is any, though in a third of them some p of eight is under 0.05."""
    random = np.random.default_rng(0)
    tables = [drift.drift(table(300, random), table(300, random), least=0) for _ in range(60)]
    assert np.mean([found["drifted"].any() for found in tables]) < 0.09
    assert np.mean([(found["p"] < 0.05).any() for found in tables]) > 0.2


def test_rare_values_are_one_and_empty_tables_are_refused():
    reference = pd.DataFrame({"word": ["a"] * 500 + [f"rare {i}" for i in range(60)]})
    current = pd.DataFrame({"word": ["a"] * 500 + [f"other {i}" for i in range(60)]})
    assert drift.drift(reference, current).loc["word", "p"] == 1
    with pytest.raises(LLMProdError, match="word"):
        drift.drift(reference, pd.DataFrame({"word": [None]}))
    with pytest.raises(LLMProdError, match="share no column"):
        drift.drift(reference, pd.DataFrame({"other": [1.0]}))
