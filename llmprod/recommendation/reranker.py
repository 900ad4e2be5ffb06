"""Second stage: candidates, features, a learned re-ranker over all scores, reasons."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from tqdm.auto import tqdm

from llmprod.extras import extra
from llmprod.recommendation import ranking
from llmprod.recommendation.catalogues import FACTS, Catalogue, RecommendError, matrix
from llmprod.recommendation.protocols import out_of_fold
from llmprod.recommendation.scorers import genre_shares, group_popularity, score_items

Examples = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]  # features by name, candidates and their relevance

RAW = ("age", "male", "past")  # features of a user: the same for all candidates

ABLATION = {  # re-ranker -> the features that it does without, by how their names begin
    "hybrid": (),
    "hybrid without text": ("text",),
    "hybrid without graph": ("graph",),
    "hybrid without text and graph": ("text", "graph"),
    "hybrid without times": ("recent popularity",),
    "hybrid of scores alone": (*RAW, "genre match", "year", "age group", "gender group", "occupation group"),
}


def features(train: pd.DataFrame, catalogue: Catalogue, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All first-stage scores and the properties of users and items: name -> (users, items)."""
    user_items, users, items = matrix(train, catalogue.shape), catalogue.users, catalogue.items
    past = np.diff(user_items.indptr)
    year = items["year"].astype(float).fillna(items["year"].astype(float).median()).fillna(0).to_numpy()
    genres = genre_shares(items)
    mean_year = np.where(past, user_items @ year / np.maximum(past, 1), year.mean())
    age = pd.to_numeric(users["age"], errors="coerce").astype(float)
    found = dict(scores) | {
        "genre match": (user_items @ genres) @ genres.T / np.maximum(past, 1)[:, None],
        "year": year[None],
        "year distance": np.abs(year[None] - mean_year[:, None]),
        # as in a training set of 75,000: what a fold saw less of is scaled up
        "past": np.log1p(past / len(train) * 75_000)[:, None],
        "age": age.fillna(0).to_numpy()[:, None],
        "male": users["gender"].eq("M").to_numpy(float)[:, None],
    }
    if users["age"].notna().any():
        age_group = pd.cut(age, [0, 20, 27, 35, 45, 120]).astype(str)
        groups = {"age group": age_group, "gender group": users["gender"], "occupation group": users["occupation"]}
        found |= {name: group_popularity(user_items, group) for name, group in groups.items()}
    return {name: np.broadcast_to(value, catalogue.shape) for name, value in found.items()}


def drop_features(names: Iterable[str], prefixes: tuple[str, ...]) -> list[str]:
    """The names that begin with none of the prefixes, a value of ABLATION."""
    return [name for name in names if not name.startswith(prefixes)]


def feature_matrix(found: dict[str, np.ndarray], candidates: np.ndarray) -> np.ndarray:
    """The features of each user's candidates (users x candidates, features), float32.

    Features that differ between candidates are standardised within the user: first-stage models trained on fewer
    interactions, as in a fold, give scores of another scale, which the re-ranker must not notice.
    """
    columns = []
    for name, values in found.items():
        column = np.take_along_axis(values, candidates, axis=1).astype(float)
        if name not in RAW:
            column = (column - column.mean(axis=1, keepdims=True)) / (column.std(axis=1, keepdims=True) + 1e-9)
        columns.append(column.ravel())
    return np.stack(columns, axis=-1).astype(np.float32)


def generate_candidates(scores: dict[str, np.ndarray], seen: csr_matrix, k: int) -> np.ndarray:
    """The k best unseen items (users, k): two from EASE for each one from recent popularity."""
    ranks = [(-scores[name]).argsort(axis=1).argsort(axis=1) for name in ("EASE", "recent popularity")]
    return ranking.top_k(-np.minimum(ranks[0], 2 * ranks[1] + 0.5), k, seen)


@dataclass
class Reranker:
    """LightGBM's LambdaMART (Burges 2010) and the names of its features."""

    model: object
    names: list[str]

    def scores(self, found: dict[str, np.ndarray], candidates: np.ndarray) -> np.ndarray:
        """Scores of candidates (users, candidates)."""
        rows = feature_matrix({name: found[name] for name in self.names}, candidates)
        return self.model.predict(rows).reshape(candidates.shape)

    def importance(self) -> pd.Series:
        """Each feature's share of the gain of all splits."""
        gain = pd.Series(self.model.booster_.feature_importance("gain"), index=self.names)
        return (gain / gain.sum()).sort_values(ascending=False)


def fit_reranker(training_set: Sequence[Examples], names: Sequence[str], seed: int) -> Reranker:
    """Trains LambdaMART on the named features, and on the users with a relevant candidate.

    Raises RecommendError where there is no such user.
    """
    with extra("recsys"):
        from lightgbm import LGBMRanker

    rows, labels = [], []
    for found, candidates, relevance in training_set:
        some = relevance.any(axis=1)
        rows.append(feature_matrix({name: found[name][some] for name in names}, candidates[some]))
        labels.append(relevance[some].ravel())
    size, labels = training_set[0][1].shape[1], np.concatenate(labels)
    if not len(labels):
        raise RecommendError(
            "No user has a relevant candidate in any fold, so there is no ranking to learn; set fewer folds, more "
            "candidates or protocol='within items', or give more interactions."
        )
    model = LGBMRanker(
        objective="lambdarank",
        lambdarank_truncation_level=20,
        n_estimators=150,
        learning_rate=0.05,
        num_leaves=7,
        min_child_samples=300,
        subsample=0.7,
        subsample_freq=1,
        colsample_bytree=0.6,
        reg_lambda=5,
        random_state=seed,
        deterministic=True,
        force_row_wise=True,
        n_jobs=torch.get_num_threads(),
        verbose=-1,
    )
    model.fit(np.concatenate(rows), labels, group=[size] * (len(labels) // size))
    return Reranker(model, list(names))


def reranker_training_set(
    train: pd.DataFrame, catalogue: Catalogue, vectors: Mapping, protocol: str, folds: int, k: int, seed: int
) -> list[Examples]:
    """Out-of-fold training data for the re-ranker: k candidates a user in each fold.

    The first-stage models of a fold don't see the held-out interactions, so that their scores are as good as they will
    be on new interactions, and no better.
    """
    examples = []
    for before, after in tqdm(list(out_of_fold(train, protocol, folds, seed)), desc="folds", leave=False):
        scores = score_items(before, catalogue, vectors, seed)
        candidates = generate_candidates(scores, matrix(before, catalogue.shape), k)
        relevance = np.take_along_axis(matrix(after, catalogue.shape).toarray(), candidates, axis=1)
        examples.append((features(before, catalogue, scores), candidates, relevance))
    return examples


def scatter_scores(scores: np.ndarray, candidates: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Scores of candidates (users, candidates) as scores of all items (users, items); others come last."""
    everything = np.full(shape, scores.min() - 1.0)
    np.put_along_axis(everything, candidates, scores, axis=1)
    return everything


def rank(
    train: pd.DataFrame,
    catalogue: Catalogue,
    vectors: Mapping,
    protocol: str,
    folds: int,
    k: int,
    seed: int,
    ablation: Mapping[str, tuple[str, ...]] = ABLATION,
) -> tuple[dict[str, np.ndarray], dict[str, Reranker], np.ndarray]:
    """Both stages: scores of every first-stage model and every re-ranker (users, items), by name.

    Also returns the re-rankers by name, and the candidates (users, k).
    """
    scores = score_items(train, catalogue, vectors, seed)
    training_set = reranker_training_set(train, catalogue, vectors, protocol, folds, k, seed)
    found, candidates = (
        features(train, catalogue, scores),
        generate_candidates(scores, matrix(train, catalogue.shape), k),
    )
    rankers = {name: fit_reranker(training_set, drop_features(found, out), seed) for name, out in ablation.items()}
    for name, ranker in rankers.items():
        scores[name] = scatter_scores(ranker.scores(found, candidates), candidates, catalogue.shape)
    return scores, rankers, candidates


def reasons(train: pd.DataFrame, catalogue: Catalogue, listed: pd.DataFrame) -> pd.DataFrame:
    """Why a user is shown an item: a fact that it shares with an item that this user liked.

    (user, item, relation, entity, past, rating) for each row of `listed` (user, item) that has a reason: the most
    telling relation, then the highest rating, then the rarest fact. A fact that more than a twentieth of the items
    share, such as a language, is not a reason.
    """
    facts = catalogue.facts.astype({"item": int})
    count = facts.groupby(["relation", "entity"])["item"].transform("size")
    order = facts["relation"].map({relation: i for i, relation in enumerate(facts["relation"].unique())})
    facts = facts.assign(count=count, order=order)[count <= len(catalogue.items) / 20]
    liked = train[train["user"].isin(listed["user"]) & (train["rating"].isna() | (train["rating"] >= 4))]
    past = liked[["user", "item", "rating"]].merge(facts[FACTS], on="item").rename(columns={"item": "past"})
    shared = listed.merge(facts, on="item").merge(past, on=["user", "relation", "entity"])
    shared = shared[shared["item"] != shared["past"]].assign(worst=-shared["rating"])
    shared = shared.sort_values(["order", "worst", "count", "past"], kind="stable").drop_duplicates(["user", "item"])
    return listed.merge(shared, on=["user", "item"])[["user", *FACTS, "past", "rating"]]
