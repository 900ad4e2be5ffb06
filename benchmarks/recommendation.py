"""How far one machine goes: time and memory of recommenders by users × items: `python -m benchmarks.recommendation`.

Interactions are synthetic and sparse throughout. An item's popularity follows the law of Zipf and Mandelbrot, a user's
activity is log-normal, and four interactions in five come from three clusters of items that the user likes, so that
there is something to learn; a tenth is held out. Text vectors are synthetic too, of 384 dimensions: a cluster's centre
and noise in 32 of them, and little noise in all (texts fill few of their dimensions).

Every row is a process of its own; `own MB` is what data and fitting added to the libraries. EASE is
`scorers.ease`, dense over items². `scorers.item_knn`, `ials` and `bpr` end in scores of users × items, so that
here the library `implicit` does the same with sparse results (its cosine is not shrunk).
"""

import argparse
import functools
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import faiss
import lightgbm  # noqa: F401  here, so that its own size is no growth
import numpy as np
import pandas as pd
import torch
from implicit.als import AlternatingLeastSquares
from implicit.bpr import BayesianPersonalizedRanking
from implicit.nearest_neighbours import CosineRecommender
from implicit.utils import ParameterWarning
from scipy.sparse import csr_matrix, load_npz, save_npz
from threadpoolctl import threadpool_limits

from benchmarks import record
from llmprod import machine, workers
from llmprod.recommendation import catalogues, ranking, reranker, scorers

CANDIDATES = 120
EASE_ITEMS = 10_000  # above, its four matrices of items² doubles are 3.2 GB and more


@dataclass
class Task:
    """What a model is fitted on, whom it is judged by, and who teaches the second stage (users are in no order)."""

    folder: Path
    seed: int
    train: csr_matrix
    test: csr_matrix
    judged: np.ndarray
    teachers: np.ndarray

    def ndcg(self, lists: np.ndarray, note: str = "") -> tuple[str, str]:
        """nDCG@20 of the lists of the judged users, as text, and a note."""
        return f"nDCG@20 {ranking.ranking_metrics(lists, self.test[self.judged])['nDCG'].mean():.3f}", note


Worth = Callable[[], tuple[str, str]]  # a fitted model's quality and a note; asked after the clock has stopped


# Data


def draw(count: int, users: int, items: int, cluster: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """User and item of `count` different interactions, in random order (count, 2)."""
    popularity, order = 1 / (random.permutation(items) + 30.0), np.argsort(cluster, kind="stable")
    below = np.concatenate([[0], np.cumsum(popularity[order] / popularity.sum())])
    edges = below[np.searchsorted(cluster[order], np.arange(cluster.max() + 2))]
    active = np.cumsum(random.lognormal(0, 1, users))
    liked, keys = random.integers(0, cluster.max() + 1, (users, 3)), np.zeros(0, dtype=np.int64)
    while len(keys) < count:  # what is drawn twice counts once
        n = int(1.1 * (count - len(keys))) + 1000
        user = np.searchsorted(active, active[-1] * random.random(n))
        one, anything = liked[user, random.choice(3, n, p=(0.6, 0.3, 0.1))], random.random(n) < 0.2
        low, high = np.where(anything, 0, edges[one]), np.where(anything, below[-1], edges[one + 1])
        place = np.searchsorted(below, low + (high - low) * random.random(n), side="right") - 1
        keys = np.unique(np.concatenate([keys, user * items + order[np.minimum(place, items - 1)]]))
    return np.stack(np.divmod(random.permutation(keys)[:count], items), axis=1)


def prepare(size: dict) -> None:
    """Writes training and held-out interactions and text vectors into the folder of a size."""
    random, shape, folder = np.random.default_rng(size["seed"]), (size["users"], size["items"]), Path(size["folder"])
    cluster = random.integers(0, round(shape[1] ** 0.4), shape[1])
    pairs = pd.DataFrame(draw(size["interactions"], *shape, cluster, random), columns=["user", "item"])
    for name, part in (("test", pairs[: len(pairs) // 10]), ("train", pairs[len(pairs) // 10 :])):
        save_npz(folder / name, catalogues.matrix(part, shape), compressed=False)
    latent = random.normal(size=(cluster.max() + 1, 32))[cluster] + random.normal(size=(shape[1], 32))
    vectors = latent @ random.normal(size=(32, 384)) + 0.5 * random.normal(size=(shape[1], 384))
    np.save(folder / "text.npy", scorers.center_and_normalize(vectors).astype(np.float32))


# Models: each fits, and returns the function that says what it is worth


def popularity(task: Task) -> Worth:
    """The same for everybody."""
    count, past = np.asarray(task.train.sum(axis=0)), task.train[task.judged]
    return lambda: task.ndcg(ranking.top_k(count.repeat(len(task.judged), axis=0), 20, past))


def ease(task: Task) -> Worth:
    """Closed form, items × items in double precision."""
    weights, past = scorers.ease(task.train), task.train[task.judged]
    return lambda: task.ndcg(ranking.top_k(past @ weights, 20, past), f"weights {weights.nbytes / 1e6:.0f} MB, dense")


def item_knn(task: Task) -> Worth:
    """Cosines between items, the 100 nearest of each kept."""
    warnings.simplefilter("ignore", ParameterWarning)  # the library's, about its own matrix
    model, past = CosineRecommender(K=100), task.train[task.judged]
    model.fit(task.train, show_progress=False)
    return lambda: task.ndcg(model.recommend(task.judged, past, N=20)[0], f"{model.similarity.nnz:,} cosines kept")


def factorised(kind: Callable, passes: int, settings: dict, task: Task) -> Worth:
    """iALS or BPR, the library's own threads; the factors of iALS stay for the serving."""
    passed, past = [], task.train[task.judged]
    with threadpool_limits(1, "blas"):
        model = kind(iterations=passes, random_state=task.seed, **settings)
        model.fit(task.train, show_progress=False, callback=lambda number, seconds, *rest: passed.append(seconds))
    if kind is AlternatingLeastSquares:
        np.savez(task.folder / "factors.npz", users=model.user_factors, items=model.item_factors)
    note = f"{passes} passes of {np.mean(passed):.2f} s"
    return lambda: task.ndcg(model.recommend(task.judged, past, N=20)[0], note)


def search_of(kind: str, vectors: np.ndarray) -> tuple[Callable[[np.ndarray, int], np.ndarray], Callable[[], int]]:
    """The search for the k items nearest to a vector of length 1, and the function that counts its index's bytes."""
    if kind == "exact":
        return lambda query, k: np.argpartition(-(vectors @ query), k)[:k], lambda: vectors.nbytes
    if kind == "HNSW":
        index = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 100, 200
    else:
        cells, coarse = round(len(vectors) ** 0.5), faiss.IndexFlatIP(vectors.shape[1])
        index = faiss.IndexIVFFlat(coarse, vectors.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = max(1, cells // 8)
        index.train(vectors)
    index.add(vectors)
    return lambda query, k: index.search(query[None], k)[1][0], lambda: len(faiss.serialize_index(index))


def profile(past: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The mean vector of a user's past, of length 1."""
    mean = vectors[past].mean(axis=0)
    return mean / np.linalg.norm(mean)


def spread(seconds: list[float]) -> str:
    """Median and 99th percentile in milliseconds, as text."""
    return "p50 {:.2f}, p99 {:.2f} ms".format(*np.percentile(1000 * np.array(seconds), [50, 99]))


def text(kind: str, task: Task) -> Worth:
    """An index of the items' text vectors, asked for the hundred nearest to a profile, one user and thread a time."""
    vectors = np.load(task.folder / "text.npy")
    search, size = search_of(kind, vectors)

    def worth() -> tuple[str, str]:
        faiss.omp_set_num_threads(1)
        shares, seconds = [], []
        with threadpool_limits(1, "blas"):
            for user in task.judged:
                query = profile(task.train[user].indices, vectors)
                started = time.perf_counter()
                near = search(query, 100)
                seconds.append(time.perf_counter() - started)
                shares.append(np.isin(near, np.argpartition(-(vectors @ query), 100)[:100]).mean())
        return f"recall@100 {np.mean(shares):.3f}", f"index {size() / 1e6:.0f} MB; a search {spread(seconds)}"

    return worth


def serving(task: Task) -> Worth:
    """Both stages for one user at a time, on one thread: iALS and text candidates, then the learned ranking."""
    torch.set_num_threads(1)  # reranker.fit_reranker gives LightGBM as many
    factors, vectors = np.load(task.folder / "factors.npz"), np.load(task.folder / "text.npy")
    people, items, (search, _) = factors["users"], factors["items"], search_of("HNSW", vectors)
    faiss.omp_set_num_threads(1)
    popular, norms = np.log1p(np.asarray(task.train.sum(axis=0)).ravel()), np.linalg.norm(items, axis=1)
    place, order = np.arange(CANDIDATES)[None], (-popular).argsort().argsort()

    def retrieve(user: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Unseen candidates, by factors and by text in turn, and their fifteen features (1, candidates)."""
        past, scores = task.train.indices[slice(*task.train.indptr[user : user + 2])], items @ people[user]
        query = profile(past, vectors)
        scores[past] = -np.inf
        best = np.argpartition(-scores, CANDIDATES)[:CANDIDATES]
        both = np.stack([best[np.argsort(-scores[best])], search(query, CANDIDATES)], axis=1).ravel()
        chosen = pd.unique(both[~np.isin(both, past)])[:CANDIDATES]
        score, near, fame = scores[chosen], vectors[chosen] @ query, popular[chosen]
        alike = {"iALS": items[chosen] @ items[past[-10:]].T, "text": vectors[chosen] @ vectors[past[-10:]].T}
        found = {"iALS": score, "text": near, "popularity": fame, "norm": norms[chosen], "order": order[chosen]}
        found |= {"cosine": score / (norms[chosen] + 1e-9), "place": place[0], "past": np.full(CANDIDATES, len(past))}
        found |= {"gap": np.abs(fame - popular[past].mean())}
        found |= {f"{name} nearest": value.max(axis=1) for name, value in alike.items()}
        found |= {f"{name} mean": value.mean(axis=1) for name, value in alike.items()}
        found |= {f"{name} place": (-value).argsort().argsort() for name, value in (("iALS", score), ("text", near))}
        return chosen, {name: value[None] for name, value in found.items()}

    with threadpool_limits(1):
        taught = [retrieve(user) for user in task.teachers]
        pairs = zip(task.teachers, taught, strict=True)
        relevance = np.concatenate([task.test[user, chosen].toarray() for user, (chosen, _) in pairs])
        rows = {name: np.concatenate([found[name] for _, found in taught]) for name in taught[0][1]}
        ranker = reranker.fit_reranker([(rows, place.repeat(len(taught), axis=0), relevance)], list(rows), task.seed)

    def worth() -> tuple[str, str]:
        lists, first, second = [], [], []
        with threadpool_limits(1):
            for user in task.judged:
                started = time.perf_counter()
                chosen, found = retrieve(user)
                first.append(time.perf_counter() - started)
                lists.append(chosen[ranking.top_k(ranker.scores(found, place), 20)[0]])
                second.append(time.perf_counter() - started - first[-1])
        both = [sum(parts) for parts in zip(first, second, strict=True)]
        note = f"a user {spread(both)}; candidates and features {spread(first)}; ranking {spread(second)}"
        return task.ndcg(np.array(lists), note)

    return worth


ALS = {"factors": 128, "regularization": 50, "alpha": 10}
BPR = {"factors": 64, "learning_rate": 0.01, "regularization": 0.01}
MODELS: dict[str, tuple[Callable[[Task], Worth], str]] = {  # and what to do where it ends
    "popularity": (popularity, ""),
    "item-KNN": (item_knn, "cap what one user counts: pairs grow with the square of a past"),
    "EASE": (ease, "the popular items alone, or the weights by blocks of items that share users"),
    "iALS": (functools.partial(factorised, AlternatingLeastSquares, 15, ALS), "users over machines, or a GPU"),
    "BPR": (functools.partial(factorised, BayesianPersonalizedRanking, 40, BPR), "a sample of a pass, or a GPU"),
    "text, exact": (functools.partial(text, "exact"), "an approximate index"),
    "text, HNSW": (functools.partial(text, "HNSW"), "compressed vectors, or shards of the items"),
    "text, IVF": (functools.partial(text, "IVF"), "compressed vectors, or shards of the items"),
    "serving": (serving, "factors of users in a store, not in the server"),
}


# The table


def measure(size: dict) -> dict:
    """Fits one model in this process: seconds, peak memory and what of it data and fit added, quality."""
    before = machine.peak_memory_mb()
    train, test = (load_npz(Path(size["folder"]) / f"{name}.npz") for name in ("train", "test"))
    users = np.flatnonzero((np.diff(train.indptr) > 0) & (np.diff(test.indptr) > 0))
    task = Task(Path(size["folder"]), size["seed"], train, test, users[:1000], users[1000:3000])
    started = time.perf_counter()
    worth = MODELS[size["model"]][0](task)
    seconds, peak = time.perf_counter() - started, machine.peak_memory_mb()
    quality, note = worth()
    numbers = {"seconds": seconds, "peak": peak, "own": peak - before}
    return size | numbers | {"quality": quality, "note": note}


def reach(rows: list[dict], what: str, limit: float) -> float:
    """The interactions at which `what` meets a limit, by what the two largest sizes tell (one alone: in proportion).

    The earlier of a power law, as EASE follows, and a straight line, which a fixed part at the start doesn't bend.
    """
    n, value = rows[-1]["interactions"], max(rows[-1][what], 1e-3)
    if len(rows) < 2:
        return n * limit / value
    before, less = rows[-2]["interactions"], max(rows[-2][what], 1e-3)
    power, slope = max(np.log(value / less) / np.log(n / before), 0.1), max(value - less, 1e-9) / (n - before)
    return min(n * (limit / value) ** (1 / power), n + (limit - value) / slope)


def ends(rows: list[dict], memory: float, hours: float = 8) -> str:
    """Where this machine ends: for each model the interactions at which memory or the night runs out, first first."""
    found, limits = [], {"memory": ("own", memory), "time": ("seconds", 3600 * hours)}
    for model, (_, then) in MODELS.items():
        if then and (own := [row for row in rows if row["model"] == model]):
            most, what = min((reach(own, *limit), name) for name, limit in limits.items())
            found.append((most, f"{model} at {most / 1e6:.0f} M interactions, out of {what} (then: {then})"))
    head = f"One machine ends here ({memory / 1000:.0f} GB, {hours:.0f} hours), at the earliest, by the growth above: "
    return head + "; ".join(sentence for _, sentence in sorted(found)) + "."


def main() -> None:
    """Prints the table, each row as soon as it is known, and where it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interactions", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--users-per", type=float, default=0.02, help="users for each interaction")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="serving needs iALS")
    parser.add_argument("--seed", type=int, default=0)
    options, rows = parser.parse_args(), []
    packages = machine.versions(("numpy", "scipy", "implicit", "faiss-cpu", "lightgbm"))
    print(f"{machine.describe()}; {', '.join(f'{name} {version}' for name, version in packages.items())}\n")
    print("| interactions | users × items | model | fit, s | own MB | peak MB | quality | |")
    print("|--:|--:|---|--:|--:|--:|---|---|")
    for count in sorted(options.interactions):
        users = round(count * options.users_per)
        items = round(50_000 * (users / 200_000) ** 0.7)
        with tempfile.TemporaryDirectory() as folder:
            size = {"interactions": count, "users": users, "items": items, "seed": options.seed, "folder": folder}
            workers.run(f"{__name__}:prepare", size)
            for model in options.models:
                start = f"| {count:,} | {users:,} × {items:,} | {model} |"
                if model == "EASE" and items > EASE_ITEMS:
                    print(f"{start} | | | | not run: 4 items² doubles are {32e-9 * items**2:.0f} GB |", flush=True)
                    continue
                row = workers.run(f"{__name__}:measure", size | {"model": model})
                numbers = f" {row['seconds']:.2f} | {row['own']:.0f} | {row['peak']:.0f} |"
                print(f"{start}{numbers} {row['quality']} | {row['note']} |", flush=True)
                rows.append(row)
    record("recommendation", [{name: value for name, value in row.items() if name != "folder"} for row in rows])
    print("\n" + ends(rows, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6))


if __name__ == "__main__":
    main()
