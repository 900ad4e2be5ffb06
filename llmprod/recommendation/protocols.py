"""Protocols: how interactions are split into training and test, and training into folds."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from llmprod.recommendation.catalogues import RecommendError


def within_items(taken: pd.DataFrame, seed: int = 42, share: float = 0.75) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A random three quarters of each item's interactions train: the split of the recommenders benchmark.

    As its `python_stratified_split(filter_by="item")`. It lets a model see the future.
    """
    order = taken.assign(draw=np.random.RandomState(seed).rand(len(taken))).sort_values(["item", "draw"])
    rank = (order.groupby("item").cumcount() + 1) / order.groupby("item")["item"].transform("count")
    order = order.drop(columns="draw")
    return order[rank <= share], order[rank > share]


def by_time(taken: pd.DataFrame, seed: int = 0, share: float = 0.75) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The past trains, the future tests: one moment for all users, before which `share` of the interactions lie."""
    moment = taken["time"].quantile(share)
    return taken[taken["time"] <= moment], taken[taken["time"] > moment]


def last_out(taken: pd.DataFrame, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Each user's last interaction tests (of several at one moment, the last in the table)."""
    last = taken.sort_values("time", kind="stable").groupby("user").tail(1).index
    last = last.intersection(taken.index[taken.groupby("user")["item"].transform("count") > 1])
    return taken.drop(last), taken.loc[last.sort_values()]


def cold_items(taken: pd.DataFrame, seed: int = 0, share: float = 0.2) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A random fifth of the items is never seen in training; they alone are tested, and they alone are candidates."""
    items = np.sort(taken["item"].unique())
    cold = np.random.default_rng(seed).permutation(items)[: round(share * len(items))]
    return taken[~taken["item"].isin(cold)], taken[taken["item"].isin(cold)]


PROTOCOLS: dict[str, Callable] = {"within items": within_items, "time": by_time, "last": last_out, "cold": cold_items}


def split(taken: pd.DataFrame, protocol: str, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and test interactions by a protocol. The benchmark's split has its own seed, 42, whatever `seed` is.

    Raises RecommendError for an unknown protocol, or one that needs times where there are none.
    """
    if protocol not in PROTOCOLS:
        raise RecommendError(f"protocol is '{protocol}'; use one of {', '.join(PROTOCOLS)}.")
    if protocol in ("time", "last") and taken["time"].isna().any():
        raise RecommendError(f"protocol='{protocol}' needs a time for every interaction; set protocol='within items'.")
    return within_items(taken) if protocol == "within items" else PROTOCOLS[protocol](taken, seed)


def out_of_fold(train: pd.DataFrame, protocol: str, folds: int, seed: int) -> Iterator[tuple]:
    """Splits of the training interactions like that of the protocol, to learn the second stage from.

    (what the first stage learns from, what the second stage is taught). By time: several moments, and what follows
    each until the next; else random parts, each held out once.
    """
    if protocol == "time":
        moments = train["time"].quantile(np.linspace(0.4, 1, folds + 1)).to_numpy()
        for start, end in itertools.pairwise(moments):
            yield train[train["time"] <= start], train[(train["time"] > start) & (train["time"] <= end)]
        return
    fold = np.random.default_rng(seed).integers(0, folds, len(train))
    for k in range(folds):
        yield train[fold != k], train[fold == k]
