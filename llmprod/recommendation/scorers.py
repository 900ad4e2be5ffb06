"""First stage: from training interactions to scores of all users and items."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter1d
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from llmprod.extras import extra
from llmprod.recommendation.catalogues import DAY, Catalogue, matrix

# First stage: training interactions -> scores (users, items), higher is better


def ease(train: csr_matrix, strength: float = 400.0) -> np.ndarray:
    """EASE (Steck 2019): the item-item weights B that rebuild a row of X from its other items; scores are X B.

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
    return train @ nearest(cosine, k).T


def nearest(similarity: np.ndarray, k: int) -> np.ndarray:
    """Similarities of each row, all but the k largest set to 0."""
    least = -np.sort(-similarity, axis=1)[:, min(k, similarity.shape[1]) - 1, None]
    return np.where(similarity >= least, similarity, 0)


def ials(train: csr_matrix, seed: int) -> np.ndarray:
    """Implicit alternating least squares (Hu, Koren & Volinsky 2008), library `implicit`."""
    with extra("recsys"):
        from implicit.als import AlternatingLeastSquares

    return factorised(AlternatingLeastSquares, train, seed, factors=128, regularization=50, alpha=10, iterations=15)


def bpr(train: csr_matrix, seed: int) -> np.ndarray:
    """Bayesian personalised ranking (Rendle et al. 2009), library `implicit`."""
    with extra("recsys"):
        from implicit.bpr import BayesianPersonalizedRanking

    return factorised(
        BayesianPersonalizedRanking, train, seed, factors=64, learning_rate=0.01, regularization=0.01, iterations=40
    )


def factorised(kind: type, train: csr_matrix, seed: int, **settings: float) -> np.ndarray:
    """Scores of a model of `implicit`; on one thread, so that they repeat and BLAS does not wait for others."""
    with threadpool_limits(1, "blas"):
        model = kind(random_state=seed, num_threads=1, **settings)
        model.fit(train, show_progress=False)
    return model.user_factors @ model.item_factors.T


def by_content(train: csr_matrix, vectors: np.ndarray) -> np.ndarray:
    """The cosine of an item's vector (of text, of facts) and the mean of those of the user's past (0 without one)."""
    profile = train @ vectors
    return profile / np.maximum(np.linalg.norm(profile, axis=1, keepdims=True), 1e-9) @ vectors.T


def by_neighbours(train: csr_matrix, vectors: np.ndarray, k: int = 30) -> np.ndarray:
    """The sum over the user's past of squared cosines to an item, over each item's k nearest by their vectors."""
    cosine = np.maximum(vectors @ vectors.T, 0) ** 2
    np.fill_diagonal(cosine, 0)
    return train @ nearest(cosine, k).T


def by_ridge(train: csr_matrix, vectors: np.ndarray, strength: float = 10.0) -> np.ndarray:
    """Kernel ridge regression from items' vectors to who took them: what similar items in training lead to expect.

    With K = V Vᵀ over the items that somebody took, scores are v Vᵀ (K + λ I)⁻¹ (Xᵀ - x̄), plus the users' means x̄.
    """
    known = np.flatnonzero(train.getnnz(axis=0))
    took, kernel = train[:, known].toarray().T, vectors @ vectors[known].T
    mean = took.mean(axis=0)
    return (kernel @ np.linalg.solve(kernel[known] + strength * np.eye(len(known)), took - mean) + mean).T


def fact_vectors(catalogue: Catalogue) -> np.ndarray:
    """An item's facts as a vector of length 1 (items, entities that items share), 0 where nothing is known of it.

    Tf-idf, without what all items that have facts have in common: so that an item without is neither near nor far.
    """
    facts, n = catalogue.facts, len(catalogue.items)
    entity = facts.groupby(["relation", "entity"])
    count = entity["item"].transform("size").to_numpy(int)
    code, rows = pd.factorize(entity.ngroup()[count > 1])[0], facts["item"].to_numpy(int)[count > 1]
    vectors = np.zeros((n, code.max(initial=-1) + 1), dtype=np.float32)
    vectors[rows, code] = np.log(n / count[count > 1])
    known = vectors.any(axis=1)
    if known.any():
        vectors[known] = centred(vectors[known] / np.linalg.norm(vectors[known], axis=1, keepdims=True))
    return vectors


def combined(text: np.ndarray, facts: np.ndarray, weight: float = 2.0) -> np.ndarray:
    """Vectors whose products are those of the texts plus `weight` times those of the facts."""
    return np.hstack([text, np.sqrt(weight, dtype=np.float32) * facts])


def recent(train: pd.DataFrame, shape: tuple[int, int], days: float = 14.0) -> np.ndarray:
    """How popular an item was around a user's last moment (Gaussian window), as share of all interactions then.

    For a user without a past it is the end of training.
    """
    if train["time"].isna().any():
        return np.zeros(shape)
    day = ((train["time"] - train["time"].min()) // DAY).astype(int)
    taken = csr_matrix((np.ones(len(train)), (train["item"], day)), shape=(shape[1], day.max() + 1)).toarray()
    near = gaussian_filter1d(taken, days, axis=1, mode="constant")
    share = near / (near.sum(axis=0) + 1)
    last = day.groupby(train["user"]).max().reindex(range(shape[0]), fill_value=day.max())
    return share[:, last].T


def by_group(train: csr_matrix, group: pd.Series) -> np.ndarray:
    """An item's share of what the user's group (of age, gender …) took, relative to its share of everything, as log."""
    codes = pd.factorize(group)[0]
    member = csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))))
    counts = (member @ train).toarray()
    share = np.asarray(train.sum(axis=0)) / train.nnz
    smoothed = (counts + 20 * share) / (counts.sum(axis=1, keepdims=True) + 20)
    return np.log((smoothed + 1e-6) / (share + 1e-6))[codes]


def genre_shares(items: pd.DataFrame) -> np.ndarray:
    """An item's genres (items, genres), each row with the sum 1, or 0 where there is none."""
    genres = items["genres"].str.get_dummies(" ").to_numpy(float)
    return genres / np.maximum(genres.sum(axis=1, keepdims=True), 1)


def first_stage(train: pd.DataFrame, catalogue: Catalogue, vectors: Mapping, seed: int) -> dict[str, np.ndarray]:
    """The scores of every model (users, items), by its name; where a user has no past, popularity decides.

    Args:
        vectors: name of a content (text, graph) -> vectors of length 1 (items, dimensions)
    """
    taken = matrix(train, catalogue.shape)
    weights = ease(taken)
    liked = matrix(train[train["rating"].isna() | (train["rating"] >= 4)], catalogue.shape)
    popular = np.broadcast_to(np.asarray(taken.sum(axis=0)), catalogue.shape)
    scores = {
        "popularity": popular,
        "recent popularity": recent(train, catalogue.shape),
        "item-KNN": item_knn(taken),
        "EASE": taken @ weights,
        "EASE, λ / 4": taken @ ease(taken, 100.0),
        "EASE on what was liked": liked @ weights,
        "iALS": ials(taken, seed),
        "BPR": bpr(taken, seed),
    }
    for name, content in vectors.items():
        scores |= {name: by_content(taken, content), f"{name} neighbours": by_neighbours(taken, content)}
    new = np.diff(taken.indptr) == 0
    for name in scores.keys() - {"popularity", "recent popularity"}:
        scores[name] = np.where(new[:, None], popular, scores[name]).astype(np.float32)
    return scores


# Items that nobody has taken yet: scores (users, items) from what is known of the items alone


def cold_start(train: pd.DataFrame, catalogue: Catalogue, contents: Mapping[str, np.ndarray], seed: int) -> dict:
    """Scores that need no interaction with an item: chance, its genres, and its content by each of `contents`.

    Args:
        contents: name -> vectors of texts, facts or both (items, dimensions)
    """
    taken, genres = matrix(train, catalogue.shape), genre_shares(catalogue.items)
    popularity = np.asarray(taken.sum(axis=0)).ravel()
    known = popularity > 0
    of_genre = (genres[known] * popularity[known, None]).sum(axis=0) / np.maximum(genres[known].sum(axis=0), 1e-9)
    scores = {
        "random": np.random.default_rng(seed).random(catalogue.shape),
        "popularity of the genres": np.broadcast_to(genres @ of_genre, catalogue.shape),
        "genres of the past": (taken @ genres) @ genres.T,
    }
    for name, vectors in contents.items():
        scores |= {name: by_content(taken, vectors), f"{name}, ridge": by_ridge(taken, vectors)}
    return scores


def centred(vectors: np.ndarray) -> np.ndarray:
    """Vectors without what all have in common, of length 1 (Mu & Viswanath 2018): cosines of short texts spread out."""
    vectors = vectors - vectors.mean(axis=0)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
