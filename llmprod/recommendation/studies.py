"""What a run of a recommendation study does."""

import time
from collections.abc import Mapping

import numpy as np

from llmprod import machine, models
from llmprod.recommendation import catalogues, datasets, protocols, ranking, reranker, scorers, sequence, tower


def recommendation(parameters: Mapping[str, object]) -> dict:
    """All models of `13_recommendation` by one protocol, and what the parts of the learned ranking gain.

    Of cold items: what the graph gains beside titles and beside whole texts.
    """
    started, seed, protocol = time.perf_counter(), parameters["seed"], parameters["protocol"]
    catalogue = datasets.load(parameters["dataset"])
    train, test = protocols.split(catalogue.interactions, protocol, seed)
    taken, relevant = catalogues.matrix(train, catalogue.shape), catalogues.matrix(test, catalogue.shape)
    texts = catalogue.items["text"].tolist()
    encoder = models.Predictor.pretrained(parameters["model"], max_length=parameters["max_length"])
    text, titles = (scorers.centred(encoder.embed(some)) for some in (texts, catalogue.items["title"].tolist()))
    graph = scorers.fact_vectors(catalogue)
    if protocol == "cold":
        tuned_encoder, _ = tower.learn_tower(
            texts, taken, parameters["model"], parameters["tower_steps"], seed=seed, progress=False
        )
        tuned = scorers.centred(tuned_encoder.embed(texts))
        contents = {"titles": titles, "text, zero-shot": text, "text tower": tuned, "graph": graph}
        contents |= {f"{name} + graph": scorers.combined(contents[name], graph) for name in list(contents)[:3]}
        scores = scorers.cold_start(train, catalogue, contents, seed)
        cold = np.setdiff1d(test["item"], train["item"])
        scores = {name: reranker.spread(s[:, cold], np.tile(cold, (len(s), 1)), s.shape) for name, s in scores.items()}
    else:
        folds, k, vectors = parameters["folds"], parameters["candidates"], {"text": text, "graph": graph}
        taught = reranker.examples(train, catalogue, vectors, protocol, folds, k, seed)
        scores = scorers.first_stage(train, catalogue, vectors, seed)
        known, candidates = reranker.features(train, catalogue, scores), reranker.retrieve(scores, taken, k)
        for name, left_out in reranker.ABLATION.items():
            ranker = reranker.teach(taught, reranker.without(known, left_out), seed)
            scores[name] = reranker.spread(ranker.scores(known, candidates), candidates, catalogue.shape)
    found = {name: ranking.per_user(ranking.top(s, 10, taken), relevant) for name, s in scores.items()}
    metrics = {f"{name}, {m}": float(v) for name, table in found.items() for m, v in table.mean().items()}
    others = ("EASE", "recent popularity", *list(reranker.ABLATION)[1:])
    gains = {f"gain over {other}": ("hybrid", other) for other in others}
    if protocol == "cold":
        gains = {
            f"the graph's gain over {name}{kind}": (f"{name} + graph{kind}", f"{name}{kind}")
            for name in ("titles", "text, zero-shot", "text tower")
            for kind in ("", ", ridge")
        }
    for name, (one, other) in gains.items():
        gain, low, high = ranking.paired(found[one]["nDCG"], found[other]["nDCG"])
        metrics |= {name: gain, f"{name}, low": low, f"{name}, high": high}
    return {
        "metrics": metrics,
        "speeds": {"s": time.perf_counter() - started, "peak memory, MB": machine.peak_memory_mb()},
    }


def next_item(parameters: Mapping[str, object]) -> dict:
    """A transformer over histories, in their order, beside models that know no order, on the same split."""
    started = time.perf_counter()
    catalogue = datasets.load(parameters["dataset"])
    train, test = protocols.split(catalogue.interactions, parameters["protocol"], parameters["seed"])
    taken, relevant = catalogues.matrix(train, catalogue.shape), catalogues.matrix(test, catalogue.shape)
    popular = np.broadcast_to(np.asarray(taken.sum(axis=0)), catalogue.shape)
    new = np.diff(taken.indptr)[:, None] == 0
    scores = {
        "popularity": popular,
        "recent popularity": scorers.recent(train, catalogue.shape),
        "EASE": np.where(new, popular, taken @ scorers.ease(taken)),
        "self-attention": np.where(
            new, popular, sequence.next_items(train, catalogue.shape, parameters["seed"], progress=False)
        ),
    }
    found = {name: ranking.per_user(ranking.top(s, 10, taken), relevant) for name, s in scores.items()}
    metrics = {f"{name}, {m}": float(v) for name, table in found.items() for m, v in table.mean().items()}
    gain, low, high = ranking.paired(found["self-attention"]["nDCG"], found["EASE"]["nDCG"])
    metrics |= {"gain over EASE": gain, "gain over EASE, low": low, "gain over EASE, high": high}
    return {"metrics": metrics, "speeds": {"s": time.perf_counter() - started}}
