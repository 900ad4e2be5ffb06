"""Second stage: candidates, features, a learned ranking, reasons."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from tqdm.auto import tqdm

from llmprod.extras import extra
from llmprod.recommendation import ranking
from llmprod.recommendation.catalogues import FACTS, Catalogue, matrix
from llmprod.recommendation.protocols import out_of_fold
from llmprod.recommendation.scorers import by_group, first_stage, genre_shares

# Second stage: a learned ranking over all scores and features

RAW = ("age", "male", "past")  # features of a user: the same for all candidates


ABLATION = {  # what the learned ranking is made without: features, by how their names begin
    "hybrid": (),
    "hybrid without text": ("text",),
    "hybrid without graph": ("graph",),
    "hybrid without text and graph": ("text", "graph"),
    "hybrid without times": ("recent popularity",),
    "hybrid of scores alone": (*RAW, "genre match", "year", "age group", "gender group", "occupation group"),
}


def features(train: pd.DataFrame, catalogue: Catalogue, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All scores, and beside them what is known of users and items: name -> (users, items)."""
    taken, users, items = matrix(train, catalogue.shape), catalogue.users, catalogue.items
    past = np.diff(taken.indptr)
    year = items["year"].astype(float).fillna(items["year"].astype(float).median()).fillna(0).to_numpy()
    genres = genre_shares(items)
    mean_year = np.where(past, taken @ year / np.maximum(past, 1), year.mean())
    age = pd.to_numeric(users["age"], errors="coerce").astype(float)
    found = dict(scores) | {
        "genre match": (taken @ genres) @ genres.T / np.maximum(past, 1)[:, None],
        "year": year[None],
        "year distance": np.abs(year[None] - mean_year[:, None]),
        "past": np.log1p(past / len(train) * 75_000)[:, None],
        "age": age.fillna(0).to_numpy()[:, None],
        "male": users["gender"].eq("M").to_numpy(float)[:, None],
    }
    if users["age"].notna().any():
        for name, group in (
            ("age group", pd.cut(age, [0, 20, 27, 35, 45, 120]).astype(str)),
            ("gender group", users["gender"]),
            ("occupation group", users["occupation"]),
        ):
            found[name] = by_group(taken, group)
    return {name: np.broadcast_to(value, catalogue.shape) for name, value in found.items()}


def without(names: Iterable[str], left_out: tuple[str, ...]) -> list[str]:
    """The features that begin with none of `left_out`, a row of ABLATION."""
    return [name for name in names if not name.startswith(left_out)]


def stack(found: dict[str, np.ndarray], candidates: np.ndarray) -> np.ndarray:
    """The features of each user's candidates (users x candidates, features), float32.

    What differs between candidates is standardised within the user: a first stage that learnt from fewer interactions,
    as that of a fold, gives scores of another size, and a ranking that was taught on them must not notice.
    """
    columns = []
    for name, values in found.items():
        column = np.take_along_axis(values, candidates, axis=1).astype(float)
        if name not in RAW:
            column = (column - column.mean(axis=1, keepdims=True)) / (column.std(axis=1, keepdims=True) + 1e-9)
        columns.append(column.ravel())
    return np.stack(columns, axis=-1).astype(np.float32)


def retrieve(scores: dict[str, np.ndarray], seen: csr_matrix, k: int) -> np.ndarray:
    """The candidates of the second stage: the k best by EASE and recent popularity in turn (users, k), none seen."""
    ranks = [(-scores[name]).argsort(axis=1).argsort(axis=1) for name in ("EASE", "recent popularity")]
    return ranking.top(-np.minimum(ranks[0], 2 * ranks[1] + 0.5), k, seen)


@dataclass
class Ranker:
    """LightGBM's LambdaMART (Burges 2010) and the names of its features."""

    model: object
    names: list[str]

    def scores(self, found: dict[str, np.ndarray], candidates: np.ndarray) -> np.ndarray:
        """Scores of candidates (users, candidates)."""
        rows = stack({name: found[name] for name in self.names}, candidates)
        return self.model.predict(rows).reshape(candidates.shape)

    def importance(self) -> pd.Series:
        """Each feature's share of the gain of all splits."""
        gain = pd.Series(self.model.booster_.feature_importance("gain"), index=self.names)
        return (gain / gain.sum()).sort_values(ascending=False)


def teach(examples: Sequence[tuple[dict, np.ndarray, np.ndarray]], names: Sequence[str], seed: int) -> Ranker:
    """Learns the second stage from examples out of fold.

    Args:
        examples: (features by name, candidates, relevance of the candidates) of each fold
        names: the features to use

    Users without a relevant candidate teach nothing and are left out.
    """
    with extra("recsys"):
        from lightgbm import LGBMRanker

    rows, labels = [], []
    for found, candidates, relevance in examples:
        some = relevance.any(axis=1)
        chosen = {name: found[name][some] for name in names}
        rows.append(stack(chosen, candidates[some]))
        labels.append(relevance[some].ravel())
    size, labels = examples[0][1].shape[1], np.concatenate(labels)
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
    return Ranker(model, list(names))


def examples(
    train: pd.DataFrame, catalogue: Catalogue, vectors: Mapping, protocol: str, folds: int, k: int, seed: int
) -> list[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]]:
    """What the second stage is taught: of each fold the features by name, k candidates a user, and their relevance.

    The first stage of a fold learns without what is held out there, so that its scores are as good, and no better,
    than those it will have on new interactions.
    """
    found = []
    for before, after in tqdm(list(out_of_fold(train, protocol, folds, seed)), desc="folds", leave=False):
        scores = first_stage(before, catalogue, vectors, seed)
        candidates = retrieve(scores, matrix(before, catalogue.shape), k)
        relevance = np.take_along_axis(matrix(after, catalogue.shape).toarray(), candidates, axis=1)
        found.append((features(before, catalogue, scores), candidates, relevance))
    return found


def spread(ranked: np.ndarray, candidates: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Scores of candidates (users, candidates) as scores of all items (users, items); others come last."""
    everything = np.full(shape, ranked.min() - 1.0)
    np.put_along_axis(everything, candidates, ranked, axis=1)
    return everything


# Reasons


def reasons(train: pd.DataFrame, catalogue: Catalogue, listed: pd.DataFrame) -> pd.DataFrame:
    """Why a user is shown an item: a fact that it shares with something that this user liked.

    (user, item, relation, entity, past, rating) for each row of `listed` (user, item) that has a reason: the relation
    that tells most, then what was rated highest, then the rarest fact. What more than a twentieth of the items share,
    as a language, is no reason.
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


def hold(claims: pd.DataFrame, train: pd.DataFrame, catalogue: Catalogue) -> np.ndarray:
    """Whether each reason is true: the graph says the fact of both items, and the user gave the other that rating."""
    said = set(catalogue.facts[FACTS].itertuples(index=False, name=None))
    gave = set(train[["user", "item", "rating"]].fillna(0).itertuples(index=False, name=None))
    return np.array(
        [
            {(c.item, c.relation, c.entity), (c.past, c.relation, c.entity)} <= said
            and (c.user, c.past, c.rating) in gave
            for c in claims.fillna({"rating": 0}).itertuples()
        ],
        dtype=bool,
    )
