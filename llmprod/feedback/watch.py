"""Drift of what the service sees, and how often the alarm is false."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from llmprod import segment
from llmprod.evaluate.drift import drift


def traits(texts: Sequence[str], labels: Sequence[str], confidences: Sequence[float]) -> pd.DataFrame:
    """What is watched of texts and the model's answers: length in words, confidence, predicted label."""
    words = [len(segment.words(text)) for text in texts]
    return pd.DataFrame({"words": words, "confidence": np.asarray(confidences, float), "label": list(labels)})


def false_alarm_rate(reference: pd.DataFrame, rounds: int = 200, seed: int = 0) -> float:
    """How often `drift` finds a difference between two random halves of the same table, where there is none."""
    random, alarms = np.random.default_rng(seed), 0
    for _ in range(rounds):
        rows = random.permutation(len(reference))
        halves = np.array_split(rows, 2)
        alarms += bool(drift(*(reference.iloc[half].reset_index(drop=True) for half in halves))["drifted"].any())
    return alarms / rounds
