"""Active learning: which texts to label next."""

import numpy as np
import pandas as pd
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression

from llmprod import LLMProdError


def uncertain(probabilities: np.ndarray) -> np.ndarray:
    """Uncertainty: 1 less the margin between the two most probable classes (Scheffer et al. 2001)."""
    second, first = np.sort(probabilities, axis=1)[:, -2:].T
    return 1 - (first - second)


def random_texts(probabilities: np.ndarray, vectors: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """Random texts: the baseline of every strategy."""
    return random.choice(len(vectors), size, replace=False)


def least_sure(probabilities: np.ndarray, vectors: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """Uncertainty sampling: the texts of which the model is least sure."""
    return np.argsort(-uncertain(probabilities), kind="stable")[:size]


def diverse(probabilities: np.ndarray, vectors: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """Diversity sampling: the texts nearest to the centres of `size` clusters."""
    clusters = MiniBatchKMeans(size, random_state=int(random.integers(2**31)), n_init=1).fit(vectors)
    distance = clusters.transform(vectors)
    chosen = np.unique(distance.argmin(axis=0))  # a text can be nearest to two centres
    others = np.setdiff1d(np.arange(len(vectors)), chosen)
    return np.concatenate([chosen, random.choice(others, size - len(chosen), replace=False)])


def mixed(probabilities: np.ndarray, vectors: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """Diverse texts among the five times as many of which the model is least sure (as in Zhdanov 2019)."""
    unsure = least_sure(probabilities, vectors, min(5 * size, len(vectors)), random)
    return unsure[diverse(probabilities[unsure], vectors[unsure], size, random)]


STRATEGIES = {"random": random_texts, "least sure": least_sure, "diverse": diverse, "mixed": mixed}


def fit(vectors: np.ndarray, labels: np.ndarray) -> LogisticRegression:
    """Logistic regression on frozen text vectors, which is refitted in a second after each round."""
    return LogisticRegression(C=30, max_iter=1000).fit(vectors, labels)


def learning_curve(
    pool: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    strategy: str,
    first: int,
    batch: int,
    until: int,
    seed: int,
) -> pd.DataFrame:
    """Simulates active learning: labels are bought in batches, and the model is refitted after each.

    Before there is a model, strategies that look for diversity start with diverse texts, the others with random ones.

    Args:
        pool, test: text vectors of length 1 (texts, dimensions), and class numbers, which are hidden until bought
        strategy: a name in `STRATEGIES`
        first, batch, until: labels bought at the start, in each round, and in all

    Returns `labels` (bought so far) and `accuracy` on test. Raises LLMProdError for an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise LLMProdError(f"strategy is '{strategy}'; use one of {', '.join(STRATEGIES)}.")
    random = np.random.default_rng(seed)
    (vectors, labels), rows = pool, []
    start = diverse if strategy in ("diverse", "mixed") else random_texts
    bought = start(np.ones((len(labels), 2)), vectors, first, random)
    while True:
        model = fit(vectors[bought], labels[bought])
        rows.append({"labels": len(bought), "accuracy": float(model.score(*test))})
        left = np.setdiff1d(np.arange(len(labels)), bought)
        size = min(batch, until - len(bought), len(left))
        if size <= 0:
            return pd.DataFrame(rows)
        chosen = STRATEGIES[strategy](model.predict_proba(vectors[left]), vectors[left], size, random)
        bought = np.concatenate([bought, left[chosen]])


def labels_needed(curve: pd.DataFrame, accuracy: float) -> float:
    """The number of labels at which a curve first reaches an accuracy, linear between rounds; NaN if it never does."""
    reached = np.flatnonzero(curve["accuracy"].to_numpy() >= accuracy)
    if not len(reached):
        return float("nan")
    end = int(reached[0])
    if end == 0:
        return float(curve["labels"].iloc[0])
    part = curve.iloc[end - 1 : end + 1]
    return float(np.interp(accuracy, part["accuracy"], part["labels"]))
