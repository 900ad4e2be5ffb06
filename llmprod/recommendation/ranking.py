"""Ranking metrics, paired intervals, beyond-accuracy metrics, diversification."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from llmprod.evaluate import metrics


def top_k(scores: np.ndarray, k: int, seen: csr_matrix | None = None) -> np.ndarray:
    """The k best columns of each row of scores (rows, columns), best first; ties go to the lower number.

    Args:
        scores: higher is better
        seen: nonzero where a column must not appear in a row's list
    """
    scores = np.array(scores, dtype=float)
    if seen is not None:
        scores[seen.nonzero()] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def ranking_metrics(lists: np.ndarray, relevant: csr_matrix) -> pd.DataFrame:
    """nDCG, precision, recall, average precision, reciprocal rank and hit of each user who has something relevant.

    With k the length of the lists and n the number of a user's relevant items (Järvelin & Kekäläinen 2002; as the
    recommenders library computes them):

    * nDCG: the sum over hits of 1 / ln(1 + rank), divided by that of the best list there could be; the base of the
      logarithm cancels
    * AP: the sum over hits of the precision at their rank, divided by n, not by min(n, k)

    Args:
        lists: item numbers (users, k), best first
        relevant: nonzero where an item is relevant to a user (users, items)
    """
    users = np.flatnonzero(np.diff(relevant.indptr))
    count, ranks = np.diff(relevant.indptr)[users], np.arange(1, lists.shape[1] + 1)
    hits = np.take_along_axis(relevant[users].toarray() > 0, lists[users], axis=1)
    discount = 1 / np.log(1 + ranks)
    best = np.concatenate([[0], discount.cumsum()])[np.minimum(count, len(ranks))]
    return pd.DataFrame(
        {
            "nDCG": hits @ discount / best,
            "precision": hits.mean(axis=1),
            "recall": hits.sum(axis=1) / count,
            "MAP": (hits * hits.cumsum(axis=1) / ranks).sum(axis=1) / count,
            "MRR": (hits / ranks).max(axis=1),
            "hit rate": hits.any(axis=1).astype(float),
        },
        index=pd.Index(users, name="user"),
    )


def evaluate(
    scores: Mapping[str, np.ndarray],
    relevant: csr_matrix,
    k: int,
    seen: csr_matrix | None = None,
    candidates: np.ndarray | None = None,
) -> dict[str, pd.DataFrame]:
    """`ranking_metrics` of the k best items according to each of the scores (users, items), by name.

    Args:
        seen: nonzero where an item must not appear in a user's list
        candidates: the items that are ranked; None: all
    """
    items = np.arange(relevant.shape[1]) if candidates is None else candidates
    seen = None if seen is None else seen[:, items]
    return {name: ranking_metrics(items[top_k(s[:, items], k, seen)], relevant) for name, s in scores.items()}


def paired_bootstrap(one: pd.Series, other: pd.Series, seed: int = 0) -> tuple[float, float, float]:
    """The mean over users of `one - other` and its 95 % bootstrap interval: both models on the same resampled users."""
    difference = (one - other).to_numpy()
    low, high = metrics.bootstrap_interval(lambda values, _: values.mean(), difference, difference, 2000, seed=seed)
    return float(difference.mean()), low, high


def beyond_accuracy(lists: np.ndarray, train: csr_matrix, vectors: np.ndarray, genres: np.ndarray) -> dict[str, float]:
    """Metrics beyond accuracy.

    * coverage: share of all items that are in anybody's list
    * novelty: mean of -log2 of an item's share of users, in bits (Vargas & Castells 2011)
    * diversity: mean over pairs of a list of 1 - cosine of their vectors
    * popularity bias: mean popularity of the listed items, divided by that of the same users' items in training
    * miscalibration: Kullback-Leibler divergence of a list's genres from those of the user's past, smoothed by 0.01
      (Steck 2018); users with a past only

    Args:
        lists: item numbers (users, k)
        train: interactions (users, items)
        vectors: of length 1 (items, dimensions)
        genres: an item's genres (items, genres), rows that sum to 1, or to 0 where there is none
    """
    popularity = np.asarray(train.sum(axis=0)).ravel()
    past = np.diff(train.indptr) > 0
    share = np.maximum(popularity, 0.5) / train.shape[0]
    chosen, k = vectors[lists], lists.shape[1]
    likeness = np.einsum("ukd,uld->ukl", chosen, chosen).sum(axis=(1, 2)) - k
    wanted = (train[past] @ genres) / np.diff(train.indptr)[past, None]
    got = 0.99 * genres[lists[past]].mean(axis=1) + 0.01 * wanted
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.where(wanted > 0, wanted * np.log(wanted / got), 0).sum(axis=1)
    usual = (train[past] @ popularity) / np.diff(train.indptr)[past]
    return {
        "coverage": len(np.unique(lists)) / train.shape[1],
        "novelty, bits": float(-np.log2(share[lists]).mean()),
        "diversity": float(1 - (likeness / (k * (k - 1))).mean()),
        "popularity bias": float((popularity[lists[past]].mean(axis=1) / usual).mean()),
        "miscalibration": float(divergence.mean()),
    }


def mmr(candidates: np.ndarray, relevance: np.ndarray, vectors: np.ndarray, k: int, weight: float) -> np.ndarray:
    """Re-ranks each user's candidates by maximal marginal relevance (Carbonell & Goldstein 1998): items (users, k).

    Selects k times the candidate with the highest (1 - weight) relevance - weight (cosine to the nearest selected
    item); relevance is scaled to 0..1 within a user.

    Args:
        candidates: item numbers (users, candidates)
        relevance: their scores
        vectors: of length 1 (items, dimensions)
        weight: 0 keeps the order of relevance, 1 considers diversity alone
    """
    low, high = relevance.min(axis=1, keepdims=True), relevance.max(axis=1, keepdims=True)
    relevance = (relevance - low) / np.maximum(high - low, 1e-12)
    rows, selected = np.arange(len(candidates)), np.zeros(relevance.shape, dtype=bool)
    nearest, order = np.zeros(relevance.shape), []
    for _ in range(k):
        worth = np.where(selected, -np.inf, (1 - weight) * relevance - weight * nearest)
        best = worth.argmax(axis=1)
        order.append(candidates[rows, best])
        selected[rows, best] = True
        cosine = np.einsum("ucd,ud->uc", vectors[candidates], vectors[order[-1]])
        nearest = cosine if len(order) == 1 else np.maximum(nearest, cosine)
    return np.stack(order, axis=1)
