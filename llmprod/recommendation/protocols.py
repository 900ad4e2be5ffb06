"""Evaluation protocols: how interactions are split into training and test, and training into folds."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from llmprod.recommendation.catalogues import RecommendError


def stratified_by_item(
    interactions: pd.DataFrame, seed: int = 42, share: float = 0.75
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A random three quarters of each item's interactions train: the split of the recommenders benchmark.

    As its `python_stratified_split(filter_by="item")`. It lets a model see the future.
    """
    draw = np.random.RandomState(seed).rand(len(interactions))
    order = interactions.assign(draw=draw).sort_values(["item", "draw"])
    rank = (order.groupby("item").cumcount() + 1) / order.groupby("item")["item"].transform("count")
    order = order.drop(columns="draw")
    return order[rank <= share], order[rank > share]


def time_split(interactions: pd.DataFrame, seed: int = 0, share: float = 0.75) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The past trains, the future tests: one moment for all users, before which `share` of the interactions lie."""
    moment = interactions["time"].quantile(share)
    return interactions[interactions["time"] <= moment], interactions[interactions["time"] > moment]


def leave_last_out(interactions: pd.DataFrame, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Each user's last interaction tests (of several at one moment, the last in the table)."""
    last = interactions.sort_values("time", kind="stable").groupby("user").tail(1).index
    last = last.intersection(interactions.index[interactions.groupby("user")["item"].transform("count") > 1])
    return interactions.drop(last), interactions.loc[last.sort_values()]


def cold_item_split(interactions: pd.DataFrame, seed: int = 0, share: float = 0.2) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A random fifth of the items is never seen in training; only they are tested, and only they are candidates."""
    items = np.sort(interactions["item"].unique())
    cold = interactions["item"].isin(np.random.default_rng(seed).permutation(items)[: round(share * len(items))])
    return interactions[~cold], interactions[cold]


PROTOCOLS: dict[str, Callable] = {
    "within items": stratified_by_item,
    "time": time_split,
    "last": leave_last_out,
    "cold": cold_item_split,
}


def split(interactions: pd.DataFrame, protocol: str, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and test interactions under a protocol. The benchmark's split always has its own seed, 42.

    Raises RecommendError for an unknown protocol, one that needs times where there are none, and where nothing is left
    to train or to test on.
    """
    if protocol not in PROTOCOLS:
        raise RecommendError(f"protocol is '{protocol}'; use one of {', '.join(PROTOCOLS)}.")
    if protocol in ("time", "last") and interactions["time"].isna().any():
        raise RecommendError(f"protocol='{protocol}' needs a time for every interaction; set protocol='within items'.")
    train, test = PROTOCOLS[protocol](interactions, 42 if protocol == "within items" else seed)
    if train.empty or test.empty:
        raise RecommendError(
            f"protocol='{protocol}' leaves {len(train)} interactions to train on and {len(test)} to test on "
            f"(of {len(interactions)}, at {interactions['time'].nunique()} times); use another protocol, or more data."
        )
    return train, test


def out_of_fold(train: pd.DataFrame, protocol: str, folds: int, seed: int) -> Iterator[tuple]:
    """Splits of the training interactions, like the protocol's own: (for the first-stage models, for the re-ranker).

    Under "time", the interactions up to each of several moments, and those from there to the next moment; otherwise
    random parts, each held out once.
    """
    if protocol == "time":
        moments = train["time"].quantile(np.linspace(0.4, 1, folds + 1)).to_numpy()
        for start, end in itertools.pairwise(moments):
            yield train[train["time"] <= start], train[(train["time"] > start) & (train["time"] <= end)]
        return
    fold = np.random.default_rng(seed).integers(0, folds, len(train))
    for k in range(folds):
        yield train[fold != k], train[fold == k]
