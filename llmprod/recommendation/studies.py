"""Experiments of the recommendation studies."""

import time
from collections.abc import Mapping

import numpy as np
import pandas as pd

from llmprod import machine, models
from llmprod.recommendation import datasets, protocols, ranking, reranker, scorers, sequence, tower
from llmprod.recommendation.catalogues import Catalogue, matrix


def recommendation(parameters: Mapping[str, object]) -> dict:
    """All models of `13_recommendation` under one protocol, and the gain of each part of the hybrid.

    For cold-start items: the gain of the graph over titles and over whole texts.
    """
    started, seed, protocol = time.perf_counter(), parameters["seed"], parameters["protocol"]
    catalogue = datasets.load(parameters["dataset"])
    train, test = protocols.split(catalogue.interactions, protocol, seed)
    encoder = models.Predictor.pretrained(parameters["model"], max_length=parameters["max_length"])
    texts, titles = catalogue.items["text"].tolist(), catalogue.items["title"].tolist()
    text, graph = scorers.center_and_normalize(encoder.embed(texts)), scorers.fact_vectors(catalogue)
    if protocol != "cold":
        options = protocol, parameters["folds"], parameters["candidates"], seed
        scores = reranker.rank(train, catalogue, {"text": text, "graph": graph}, *options)[0]
        others = ("EASE", "recent popularity", *list(reranker.ABLATION)[1:])
        gains = {f"gain over {other}": ("hybrid", other) for other in others}
        return summary(scores, train, test, catalogue, gains, started)
    user_items = matrix(train, catalogue.shape)
    tuned, _ = tower.train_tower(texts, user_items, parameters["model"], parameters["tower_steps"], seed=seed)
    vectors = {
        "titles": scorers.center_and_normalize(encoder.embed(titles)),
        "text, zero-shot": text,
        "text tower": scorers.center_and_normalize(tuned.embed(texts)),
    }
    both = {f"{name} + graph": scorers.concat_weighted(content, graph) for name, content in vectors.items()}
    scores = scorers.score_cold_items(train, catalogue, vectors | {"graph": graph} | both, seed)
    gains = {
        f"the graph's gain over {name}{kind}": (f"{name} + graph{kind}", f"{name}{kind}")
        for name in vectors
        for kind in ("", ", ridge")
    }
    return summary(scores, train, test, catalogue, gains, started, np.setdiff1d(test["item"], train["item"]))


def next_item(parameters: Mapping[str, object]) -> dict:
    """A transformer over histories compared with models that ignore their order, on the same split."""
    started = time.perf_counter()
    catalogue = datasets.load(parameters["dataset"])
    train, test = protocols.split(catalogue.interactions, parameters["protocol"], parameters["seed"])
    user_items = matrix(train, catalogue.shape)
    popular = np.broadcast_to(np.asarray(user_items.sum(axis=0)), catalogue.shape)
    new = np.diff(user_items.indptr)[:, None] == 0
    scores = {
        "popularity": popular,
        "recent popularity": scorers.recent_popularity(train, catalogue.shape),
        "EASE": np.where(new, popular, user_items @ scorers.ease(user_items)),
        "self-attention": np.where(new, popular, sequence.next_items(train, catalogue.shape, parameters["seed"])),
    }
    return summary(scores, train, test, catalogue, {"gain over EASE": ("self-attention", "EASE")}, started)


def summary(
    scores: Mapping[str, np.ndarray],
    train: pd.DataFrame,
    test: pd.DataFrame,
    catalogue: Catalogue,
    gains: Mapping[str, tuple[str, str]],
    started: float,
    candidates: np.ndarray | None = None,
) -> dict:
    """The row of a study: each model's mean metrics at 10, and gains in nDCG (one model, the other) with intervals."""
    user_items, relevant = matrix(train, catalogue.shape), matrix(test, catalogue.shape)
    found = ranking.evaluate(scores, relevant, 10, user_items, candidates)
    metrics = {f"{name}, {m}": float(v) for name, table in found.items() for m, v in table.mean().items()}
    for name, (one, other) in gains.items():
        gain, low, high = ranking.paired_bootstrap(found[one]["nDCG"], found[other]["nDCG"])
        metrics |= {name: gain, f"{name}, low": low, f"{name}, high": high}
    speeds = {"s": time.perf_counter() - started, "peak memory, MB": machine.peak_memory_mb()}
    return {"metrics": metrics, "speeds": speeds}
