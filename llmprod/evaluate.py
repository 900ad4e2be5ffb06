"""Metrics of a classifier, one small function each; all take class numbers of shape (n,)."""

import numpy as np
import pandas as pd
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The share of right predictions."""
    return float(accuracy_score(labels, predictions))


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The mean over classes of F1 = 2PR / (P + R); a class counts the same whatever its size."""
    return float(f1_score(labels, predictions, average="macro", zero_division=0))


def per_class(labels: np.ndarray, predictions: np.ndarray, names: list[str]) -> pd.DataFrame:
    """Precision, recall, F1 and number of texts (`support`) of every class, the largest first."""
    numbers = range(len(names))
    columns = precision_recall_fscore_support(labels, predictions, labels=numbers, zero_division=0)
    table = pd.DataFrame(dict(zip(("precision", "recall", "F1", "support"), columns, strict=True)), index=names)
    return table.sort_values("support", ascending=False)


def bootstrap_interval(
    metric, labels: np.ndarray, predictions: np.ndarray, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of a metric (Efron & Tibshirani 1993): test texts drawn with replacement."""
    random = np.random.default_rng(seed)
    draws = random.integers(0, len(labels), size=(resamples, len(labels)))
    values = [metric(labels[draw], predictions[draw]) for draw in draws]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> pd.DataFrame:
    """Confidence against accuracy: texts in bins of equal width by the probability of the predicted class.

    Returns for every bin that holds a text: `confidence` and `accuracy` (means in the bin) and `share` of all texts.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    number = np.minimum((confidence * bins).astype(int), bins - 1)
    grouped = pd.DataFrame({"confidence": confidence, "accuracy": right.astype(float)}).groupby(number)
    return grouped.mean().assign(share=grouped.size() / len(labels))


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> float:
    """The mean distance of confidence from accuracy over the bins of `reliability` (Guo et al. 2017)."""
    table = reliability(labels, probabilities, bins)
    return float((table["share"] * (table["confidence"] - table["accuracy"]).abs()).sum())
