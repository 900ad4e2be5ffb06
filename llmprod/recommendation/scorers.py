"""First stage: scores of all items for all users (users, items), higher is better, from training interactions."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter1d
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from llmprod.extras import extra
from llmprod.recommendation.catalogues import DAY, Catalogue, matrix

# Collaborative filtering: from interactions alone


def ease(train: csr_matrix, strength: float = 400.0) -> np.ndarray:
    """EASE (Steck 2019): the item-item weights B that reconstruct a row of X from its other items; scores are X B.

    In closed form: with G = XᵀX + λ I and P = G⁻¹, B = I - P / diag(P). λ is for 75,000 interactions and scaled to
    others. Shape (items, items): for some ten thousand items at most.
    """
    gram = (train.T @ train).toarray().astype(np.float64)
    gram[np.diag_indices_from(gram)] += strength * train.nnz / 75_000
    inverse = np.linalg.inv(gram)
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return weights


def item_knn(train: csr_matrix, k: int = 100, shrink: float = 20.0) -> np.ndarray:
    """The sum of shrunk cosines between an item and the user's own, over each item's k nearest."""
    together = (train.T @ train).toarray()
    length = np.sqrt(np.diag(together))
    cosine = together / (np.outer(length, length) + shrink)
    np.fill_diagonal(cosine, 0)
    return train @ keep_largest(cosine, k).T


def keep_largest(similarity: np.ndarray, k: int) -> np.ndarray:
    """Similarities with all but the k largest of each row set to 0."""
    least = -np.sort(-similarity, axis=1)[:, min(k, similarity.shape[1]) - 1, None]
    return np.where(similarity >= least, similarity, 0)


def ials(train: csr_matrix, seed: int) -> np.ndarray:
    """Implicit alternating least squares (Hu, Koren & Volinsky 2008), library `implicit`."""
    with extra("recsys"):
        from implicit.als import AlternatingLeastSquares as Model

    return factorisation(Model, train, seed, factors=128, regularization=50, alpha=10, iterations=15)


def bpr(train: csr_matrix, seed: int) -> np.ndarray:
    """Bayesian personalised ranking (Rendle et al. 2009), library `implicit`."""
    with extra("recsys"):
        from implicit.bpr import BayesianPersonalizedRanking as Model

    return factorisation(Model, train, seed, factors=64, learning_rate=0.01, regularization=0.01, iterations=40)


def factorisation(kind: type, train: csr_matrix, seed: int, **settings: float) -> np.ndarray:
    """Scores of a model of `implicit`; on one thread, so that they repeat and BLAS does not wait for others."""
    with threadpool_limits(1, "blas"):
        model = kind(random_state=seed, num_threads=1, **settings)
        model.fit(train, show_progress=False)
    return model.user_factors @ model.item_factors.T


def recent_popularity(train: pd.DataFrame, shape: tuple[int, int], days: float = 14.0) -> np.ndarray:
    """An item's share of all interactions around the day of a user's last one (Gaussian window).

    For a user without interactions that day is the end of training.
    """
    if train["time"].isna().any():
        return np.zeros(shape)
    day = ((train["time"] - train["time"].min()) // DAY).astype(int)
    counts = csr_matrix((np.ones(len(train)), (train["item"], day)), shape=(shape[1], day.max() + 1)).toarray()
    near = gaussian_filter1d(counts, days, axis=1, mode="constant")
    share = near / (near.sum(axis=0) + 1)
    last = day.groupby(train["user"]).max().reindex(range(shape[0]), fill_value=day.max())
    return share[:, last].T


def group_popularity(train: csr_matrix, group: pd.Series) -> np.ndarray:
    """An item's share of the interactions of the user's group (age, gender …) relative to its share of all, as log."""
    codes = pd.factorize(group)[0]
    member = csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))))
    counts = (member @ train).toarray()
    share = np.asarray(train.sum(axis=0)) / train.nnz
    smoothed = (counts + 20 * share) / (counts.sum(axis=1, keepdims=True) + 20)
    return np.log((smoothed + 1e-6) / (share + 1e-6))[codes]


# Content: from items' vectors of texts or facts


def content_cosine(train: csr_matrix, vectors: np.ndarray) -> np.ndarray:
    """The cosine of an item's vector and the mean of those of the user's items (0 without any)."""
    profile = train @ vectors
    return profile / np.maximum(np.linalg.norm(profile, axis=1, keepdims=True), 1e-9) @ vectors.T


def content_knn(train: csr_matrix, vectors: np.ndarray, k: int = 30) -> np.ndarray:
    """The sum over the user's items of squared cosines to an item, over each item's k nearest by their vectors."""
    cosine = np.maximum(vectors @ vectors.T, 0) ** 2
    np.fill_diagonal(cosine, 0)
    return train @ keep_largest(cosine, k).T


def content_ridge(train: csr_matrix, vectors: np.ndarray, strength: float = 10.0) -> np.ndarray:
    """Kernel ridge regression from items' vectors to their users.

    With K = V Vᵀ over the items that have interactions, scores are v Vᵀ (K + λ I)⁻¹ (Xᵀ - x̄), plus the users' means x̄.
    """
    known = np.flatnonzero(train.getnnz(axis=0))
    targets, kernel = train[:, known].toarray().T, vectors @ vectors[known].T
    mean = targets.mean(axis=0)
    return (kernel @ np.linalg.solve(kernel[known] + strength * np.eye(len(known)), targets - mean) + mean).T


def fact_vectors(catalogue: Catalogue) -> np.ndarray:
    """An item's facts as a tf-idf vector of length 1 (items, entities that items share), 0 for an item without facts.

    Centred over the items that have facts, so that an item without is neither near nor far.
    """
    facts, n = catalogue.facts, len(catalogue.items)
    entity = facts.groupby(["relation", "entity"])
    count = entity["item"].transform("size").to_numpy(int)
    code, rows = pd.factorize(entity.ngroup()[count > 1])[0], facts["item"].to_numpy(int)[count > 1]
    vectors = np.zeros((n, code.max(initial=-1) + 1), dtype=np.float32)
    vectors[rows, code] = np.log(n / count[count > 1])
    known = vectors.any(axis=1)
    if known.any():
        vectors[known] = center_and_normalize(vectors[known] / np.linalg.norm(vectors[known], axis=1, keepdims=True))
    return vectors


def center_and_normalize(vectors: np.ndarray) -> np.ndarray:
    """Vectors minus their mean, of length 1 (Mu & Viswanath 2018): cosines of short texts spread out."""
    vectors = vectors - vectors.mean(axis=0)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def concat_weighted(text: np.ndarray, facts: np.ndarray, weight: float = 2.0) -> np.ndarray:
    """Vectors whose dot products are those of the texts plus `weight` times those of the facts."""
    return np.hstack([text, np.sqrt(weight, dtype=np.float32) * facts])


def genre_shares(items: pd.DataFrame) -> np.ndarray:
    """An item's genres (items, genres), each row with the sum 1, or 0 where there is none."""
    genres = items["genres"].str.get_dummies(" ").to_numpy(float)
    return genres / np.maximum(genres.sum(axis=1, keepdims=True), 1)


# All of them


def score_items(train: pd.DataFrame, catalogue: Catalogue, vectors: Mapping, seed: int) -> dict[str, np.ndarray]:
    """The scores of every first-stage model by its name; popularity for users without interactions.

    Args:
        vectors: content (text, graph) -> vectors of length 1 (items, dimensions)
    """
    user_items = matrix(train, catalogue.shape)
    weights = ease(user_items)
    liked = matrix(train[train["rating"].isna() | (train["rating"] >= 4)], catalogue.shape)
    popular = np.broadcast_to(np.asarray(user_items.sum(axis=0)), catalogue.shape)
    scores = {
        "popularity": popular,
        "recent popularity": recent_popularity(train, catalogue.shape),
        "item-KNN": item_knn(user_items),
        "EASE": user_items @ weights,
        "EASE, λ / 4": user_items @ ease(user_items, 100.0),
        "EASE on what was liked": liked @ weights,
        "iALS": ials(user_items, seed),
        "BPR": bpr(user_items, seed),
    }
    for name, content in vectors.items():
        scores |= {name: content_cosine(user_items, content), f"{name} neighbours": content_knn(user_items, content)}
    new = np.diff(user_items.indptr) == 0
    for name in scores.keys() - {"popularity", "recent popularity"}:
        scores[name] = np.where(new[:, None], popular, scores[name]).astype(np.float32)
    return scores


def score_cold_items(train: pd.DataFrame, catalogue: Catalogue, vectors: Mapping, seed: int) -> dict[str, np.ndarray]:
    """Scores that need no interaction with an item, by name: chance, genres, and content (cosine and ridge).

    Args:
        vectors: content -> vectors of texts, facts or both (items, dimensions)
    """
    user_items, genres = matrix(train, catalogue.shape), genre_shares(catalogue.items)
    popularity = np.asarray(user_items.sum(axis=0)).ravel()
    known = popularity > 0
    of_genre = (genres[known] * popularity[known, None]).sum(axis=0) / np.maximum(genres[known].sum(axis=0), 1e-9)
    scores = {
        "random": np.random.default_rng(seed).random(catalogue.shape),
        "popularity of the genres": np.broadcast_to(genres @ of_genre, catalogue.shape),
        "genres of the past": (user_items @ genres) @ genres.T,
    }
    for name, content in vectors.items():
        scores |= {name: content_cosine(user_items, content), f"{name}, ridge": content_ridge(user_items, content)}
    return scores
