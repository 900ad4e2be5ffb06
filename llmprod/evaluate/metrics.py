"""Metrics, intervals, significance tests, calibration, out-of-distribution scores; one small function each."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import cdist
from scipy.special import logsumexp, softmax
from scipy.stats import beta, binomtest
from sklearn.covariance import LedoitWolf
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_recall_fscore_support, roc_auc_score

Metric = Callable[[np.ndarray, np.ndarray], float]


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The share of predictions that are right."""
    return float(accuracy_score(labels, predictions))


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 = 2PR / (P + R) averaged over classes, which count equally whatever their size."""
    return float(f1_score(labels, predictions, average="macro", zero_division=0))


def per_class(labels: np.ndarray, predictions: np.ndarray, names: list[str]) -> pd.DataFrame:
    """Precision, recall, F1 and number of texts (`support`) of every class, the largest first."""
    numbers = range(len(names))
    columns = precision_recall_fscore_support(labels, predictions, labels=numbers, zero_division=0)
    table = pd.DataFrame(dict(zip(("precision", "recall", "F1", "support"), columns, strict=True)), index=names)
    return table.sort_values("support", ascending=False)


def bootstrap_interval(
    metric: Metric,
    labels: np.ndarray,
    predictions: np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """The percentile bootstrap interval of a metric: texts drawn with replacement (Efron & Tibshirani 1993)."""
    draws = np.random.default_rng(seed).integers(0, len(labels), size=(resamples, len(labels)))
    values = [metric(labels[draw], predictions[draw]) for draw in draws]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap(
    metric: Metric, labels: np.ndarray, one: np.ndarray, other: np.ndarray, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """The difference `metric(one) - metric(other)` and its 95 % bootstrap interval.

    Both models are scored on the same draw, so that texts that are hard for both cancel (Koehn 2004).
    """

    def difference(labels: np.ndarray, both: np.ndarray) -> float:
        return metric(labels, both[:, 0]) - metric(labels, both[:, 1])

    both = np.column_stack([one, other])
    return difference(labels, both), *bootstrap_interval(difference, labels, both, resamples, seed)


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> pd.DataFrame:
    """The reliability diagram: texts in bins of equal width according to confidence, the predicted class's probability.

    Returns, for every bin that holds a text, its mean `confidence`, its `accuracy`, and its `share` of all texts.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    number = np.minimum((confidence * bins).astype(int), bins - 1)
    grouped = pd.DataFrame({"confidence": confidence, "accuracy": right.astype(float)}).groupby(number)
    return grouped.mean().assign(share=grouped.size() / len(labels))


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> float:
    """The gap between confidence and accuracy in a bin of `reliability`, averaged over texts (Guo et al. 2017)."""
    table = reliability(labels, probabilities, bins)
    return float((table["share"] * (table["confidence"] - table["accuracy"]).abs()).sum())


def summary(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Accuracy, macro-F1, log loss and calibration error of predicted probabilities of shape (texts, classes)."""
    predictions = probabilities.argmax(axis=1)
    return {
        "accuracy": accuracy(labels, predictions),
        "macro-F1": macro_f1(labels, predictions),
        "log loss, nats": float(log_loss(labels, probabilities, labels=range(probabilities.shape[1]))),
        "calibration error": expected_calibration_error(labels, probabilities),
    }


def mcnemar(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[int, int, float]:
    """McNemar's exact test: on how many texts only `a` is right, on how many only `b`, and the two-sided p-value.

    Under the null hypothesis each text on which exactly one of them is right is a fair coin (McNemar 1947).
    """
    only_a = int(((a == labels) & (b != labels)).sum())
    only_b = int(((a != labels) & (b == labels)).sum())
    if only_a + only_b == 0:
        return 0, 0, 1.0
    return only_a, only_b, float(binomtest(only_a, only_a + only_b).pvalue)


def risk_coverage(labels: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
    """Selective classification: accuracy (1 - risk) on the most confident texts, one row for each number of texts kept.

    `coverage` is the share of texts kept (Geifman & El-Yaniv 2017); a person answers the others.
    """
    order = np.argsort(-probabilities.max(axis=1), kind="stable")
    right = (probabilities.argmax(axis=1) == labels)[order]
    kept = np.arange(1, len(labels) + 1)
    return pd.DataFrame({"coverage": kept / len(labels), "accuracy": right.cumsum() / kept})


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of a share of `n` (Wilson 1927; library scipy); (0, 1) where there are none."""
    return tuple(binomtest(successes, n).proportion_ci(level, "wilson")) if n else (0.0, 1.0)


def threshold_at_precision(
    confidence: np.ndarray, right: np.ndarray, precision: float, level: float = 0.95, steps: int = 10
) -> float:
    """The lowest confidence from which answers are right with at least `precision`; infinity if none is shown to be.

    Tested are the thresholds that answer 1, 2, … `steps` tenths (for 10 steps) of the questions, each by the one-sided
    Clopper-Pearson bound of the share that is right, at a level that allows for their number (Bonferroni). With one
    step, 98 % at level .95 takes 149 answers without an error. Choose it on validation.
    """
    order = np.argsort(-confidence, kind="stable")
    found = math.inf
    for step in range(1, steps + 1):
        threshold = confidence[order[max(0, len(order) * step // steps - 1)]]
        answered = confidence >= threshold  # equal confidences are answered together
        n, hits = int(answered.sum()), int(right[answered].sum())
        if beta.ppf((1 - level) / steps, hits, n - hits + 1) >= precision:
            found = float(threshold)
    return found


def temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """The T > 0 for which softmax(logits / T) has the least log loss (Guo et al. 2017); choose it on validation."""
    shifted = logits - logits.max(axis=1, keepdims=True)

    def loss(log_t: float) -> float:
        scaled = shifted / np.exp(log_t)
        return float(np.mean(logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels]))

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


# Out-of-distribution (OOD) detection: a higher score means more OOD


def maximum_softmax(logits: np.ndarray) -> np.ndarray:
    """Minus the probability of the predicted class (Hendrycks & Gimpel 2017)."""
    return -softmax(logits, axis=1).max(axis=1)


def energy(logits: np.ndarray) -> np.ndarray:
    """Minus the log-sum-exp of the logits (Liu et al. 2020)."""
    return -logsumexp(logits, axis=1)


def mahalanobis(vectors: np.ndarray, train_vectors: np.ndarray, train_labels: np.ndarray) -> np.ndarray:
    """The squared distance to the nearest class mean, in the pooled covariance of training (Lee et al. 2018).

    Vectors of shape (texts, dimensions); the covariance is shrunk (Ledoit & Wolf 2004), so that few texts suffice.
    """
    classes = np.unique(train_labels)
    centres = np.stack([train_vectors[train_labels == c].mean(axis=0) for c in classes])
    within = train_vectors - centres[np.searchsorted(classes, train_labels)]
    root = np.linalg.cholesky(LedoitWolf(assume_centered=True).fit(within).precision_)
    # the covariance is 1 in what `root` maps to; (texts, classes) is the largest table
    return cdist(vectors @ root, centres @ root, "sqeuclidean").min(axis=1)


def ood_metrics(known: np.ndarray, foreign: np.ndarray) -> dict[str, float]:
    """AUROC of an OOD score, and the false positive rate at 95 % true positives.

    As is usual in the field, known texts are the positives: the rate is the share of foreign texts that pass as known
    at the threshold that lets 95 % of the known ones pass.
    """
    truth = np.repeat([0, 1], [len(known), len(foreign)])
    threshold = np.quantile(known, 0.95)
    return {
        "AUROC": float(roc_auc_score(truth, np.concatenate([known, foreign]))),
        "FPR at 95 %": float((foreign <= threshold).mean()),
    }
