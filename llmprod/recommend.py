"""Recommendation: a catalogue with text and facts, protocols, first-stage models, a learned ranking, a text tower."""

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter1d
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from threadpoolctl import threadpool_limits
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from llmprod import LLMProdError, artifacts, data, models, ranking, track

DAY = 86400
FACTS = ["item", "relation", "entity"]
RELATIONS = {  # of the graph of MovieLens, the most telling first; no awards: they say how a film was received later
    "film.film.directed_by": "director",
    "film.film.written_by": "writer",
    "film.film.subjects": "subject",
    "film.film.actor": "actor",
    "film.film.cinematography": "cinematographer",
    "film.film.produced_by": "producer",
    "film.film.production_companies": "company",
    "film.film.genre": "genre",
    "film.film.rating": "certificate",
    "film.film.country": "country",
    "film.film.language": "language",
}


class RecommendError(LLMProdError):
    """Interactions or items can't be used as they are."""


# Data


@dataclass
class Catalogue:
    """Users and items are numbered from 0 in the order of their tables.

    interactions: user, item (numbers), rating, time (seconds)
    items: item (as in the source), title, year, genres (words separated by spaces), text
    users: user (as in the source), age, gender, occupation; empty columns where they are not known
    facts: item (number), relation, entity: what a knowledge graph says of the items, relations that tell most first
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    users: pd.DataFrame
    facts: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=FACTS))

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of users and items."""
        return len(self.users), len(self.items)


def load(dataset: str = "movielens-100k", items_file: str = "", facts_file: str = "") -> Catalogue:
    """A catalogue: the artifact `movielens-100k`, or your own tables.

    Args:
        dataset: the artifact, or a file of interactions (.csv, .tsv, .jsonl, .parquet) with the columns user, item
            and, if there are any, rating and time (in seconds)
        items_file: a table of items with the columns item and text and, if there are any, title, year and genres
        facts_file: if there is one, a table with the columns item, relation and entity (film 7, director, Ann Hui)

    Raises RecommendError, or data.DataError, naming the file, for what can't be used.
    """
    if dataset in artifacts.registry():
        if dataset != "movielens-100k":
            raise RecommendError(f"The artifact '{dataset}' holds no interactions; use movielens-100k or a file.")
        return movielens(artifacts.fetch(dataset), artifacts.fetch("movielens-titles"))
    if not items_file:
        raise RecommendError(f"{dataset}: set items_file to a table with the columns item and text.")
    taken = data.read_table(Path(dataset).expanduser(), "utf-8")
    items = data.read_table(Path(items_file).expanduser(), "utf-8")
    facts = pd.DataFrame(columns=FACTS)
    if facts_file:
        facts = data.read_table(Path(facts_file).expanduser(), "utf-8")
    for name, frame, needed in (
        (dataset, taken, ["user", "item"]),
        (items_file, items, ["item", "text"]),
        (facts_file, facts, FACTS),
    ):
        if missing := [column for column in needed if column not in frame]:
            raise RecommendError(
                f"{name}: no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}."
            )
    if items["item"].duplicated().any():
        raise RecommendError(
            f"{items_file}: the item '{items['item'][items['item'].duplicated()].iloc[0]}' stands twice."
        )
    for name, frame in ((dataset, taken), (facts_file, facts)):
        unknown = frame.loc[~frame["item"].isin(items["item"]), "item"]
        if len(unknown):
            raise RecommendError(
                f"{name}: {unknown.nunique()} items are not in {items_file} (the first is '{unknown.iloc[0]}')."
            )
    items = items.reindex(columns=["item", "title", "year", "genres", "text"])
    items["title"] = items["title"].fillna(items["text"])
    items["genres"] = items["genres"].fillna("")
    users = pd.DataFrame({"user": np.sort(taken["user"].unique())}).reindex(
        columns=["user", "age", "gender", "occupation"]
    )
    taken = taken.reindex(columns=["user", "item", "rating", "time"])
    return number(taken, items, users, facts)


def movielens(folder: Path, titles: Path | None = None) -> Catalogue:
    """MovieLens-100K; an item's text is its title, year and genres, its facts are those of Freebase.

    The link file from films to Freebase numbers them as MovieLens-1M does (313 is linked to The Swan Princess, here it
    is Titanic; github.com/RUCAIBox/RecSysDatasets/issues/130). `titles` is a folder with `movies.csv`, which has titles
    in that numbering; without it the link file is believed, which is wrong and here to be compared. Entities are bare
    identifiers: who directed is known, but not by name, so that facts are no part of the text.
    """

    def table(kind: str, *columns: str) -> pd.DataFrame:
        return pd.read_csv(folder / f"ml-100k.{kind}", sep="\t", header=0, names=columns, keep_default_na=False)

    items = table("item", "item", "title", "year", "genres").sort_values("item").reset_index(drop=True)
    items["year"] = pd.to_numeric(items["year"], errors="coerce")
    items["text"] = [
        f"{title}{'' if pd.isna(year) else f' ({year:.0f})'}. {genres}."
        for title, year, genres in zip(items["title"], items["year"], items["genres"], strict=True)
    ]
    users = table("user", "user", "age", "gender", "occupation", "zip").sort_values("user").reset_index(drop=True)
    known = items["item"] if titles is None else same_films(items, pd.read_csv(titles / "movies.csv"))
    linked = table("link", "item", "entity").set_index("item")["entity"]
    facts = freebase(table("kg", "head", "relation", "tail"), known.map(linked).set_axis(items["item"]).dropna())
    return number(table("inter", "user", "item", "rating", "time"), items, users.drop(columns="zip"), facts)


def names(title: str) -> set[str]:
    """The names of a film in one form: "Postino, Il (Postman, The)" has two, `ilpostino` and `thepostman`.

    Without case, accents and punctuation, articles in front; what stands in brackets is a name of its own.
    """
    found = set()
    for name in re.split(r"[()]", title):
        name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower().strip()
        name = re.sub(r"^(.*), (the|an?|l[ae]|les|l'|il|el|das|de[rn]|die|los)$", r"\2\1", name.removeprefix("a.k.a. "))
        found.add(re.sub(r"[^a-z0-9]", "", name.replace("&", "and")))
    return found - {""}


def same_films(items: pd.DataFrame, movies: pd.DataFrame) -> pd.Series:
    """The number in `movies` (movieId, title with year) of each item (title, year), empty where it has none.

    The same film has a name in common, and a year that differs by one at most; of several, the nearest year counts.
    """
    title = movies["title"].str.extract(r"^(?P<title>.*\S)\s*\((?P<year>\d{4})\)\s*$")
    theirs = movies.assign(name=title["title"].fillna("").map(names), year=pd.to_numeric(title["year"])).explode("name")
    ours = pd.DataFrame({"item": items.index, "name": items["title"].map(names), "year": items["year"]}).explode("name")
    pairs = ours.merge(theirs[["movieId", "name", "year"]], on="name", suffixes=("", " there"))
    pairs["apart"] = (pairs["year"] - pairs["year there"]).abs()
    pairs = pairs[pairs["apart"] <= 1].sort_values(["item", "apart", "movieId"]).drop_duplicates("item")
    return pairs.set_index("item")["movieId"].reindex(items.index)


def freebase(triples: pd.DataFrame, linked: pd.Series) -> pd.DataFrame:
    """Facts about items from triples (head, relation, tail) and each item's own entity in them.

    Films that are sequels of one another, by whatever way, have the same `series`.
    """
    sequels = triples[triples["relation"] == "film.film.sequel"]
    codes, films = pd.factorize(pd.concat([sequels["head"], sequels["tail"]]))
    edges = csr_matrix((np.ones(len(sequels)), codes.reshape(2, -1)), shape=(len(films), len(films)))
    series = connected_components(edges, directed=False)[1]
    said = pd.DataFrame({"head": films, "relation": "series", "tail": [f"series {number}" for number in series]})
    plain = triples[triples["relation"].isin(RELATIONS)]
    said = pd.concat([said, plain.assign(relation=plain["relation"].map(RELATIONS))])
    facts = linked.rename("head").rename_axis("item").reset_index().merge(said, on="head")
    facts = facts.rename(columns={"tail": "entity"})
    order = facts["relation"].map({relation: i for i, relation in enumerate(["series", *RELATIONS.values()])})
    return facts.iloc[np.lexsort([facts["item"], order])][FACTS]


def number(
    taken: pd.DataFrame, items: pd.DataFrame, users: pd.DataFrame, facts: pd.DataFrame | None = None
) -> Catalogue:
    """A catalogue whose interactions and facts name users and items by their number; repeats are dropped."""
    position = {item: i for i, item in enumerate(items["item"])}
    person = {user: u for u, user in enumerate(users["user"])}
    taken = taken.assign(user=taken["user"].map(person), item=taken["item"].map(position))
    facts = pd.DataFrame(columns=FACTS) if facts is None else facts[FACTS]
    facts = facts.assign(item=facts["item"].map(position)).drop_duplicates().reset_index(drop=True)
    return Catalogue(taken.drop_duplicates(["user", "item"]).reset_index(drop=True), items, users, facts)


def subset(catalogue: Catalogue, users: int, seed: int) -> Catalogue:
    """The catalogue of some random users and what they took; all of it where `users` is 0."""
    if not 0 < users < len(catalogue.users):
        return catalogue
    some = np.sort(np.random.default_rng(seed).permutation(len(catalogue.users))[:users])
    taken = catalogue.interactions[catalogue.interactions["user"].isin(some)]
    kept = np.sort(taken["item"].unique())
    taken = taken.assign(user=np.searchsorted(some, taken["user"]), item=np.searchsorted(kept, taken["item"]))
    facts = catalogue.facts[catalogue.facts["item"].isin(kept)]
    facts = facts.assign(item=np.searchsorted(kept, facts["item"].astype(int))).reset_index(drop=True)
    items, people = (
        frame.iloc[rows].reset_index(drop=True) for frame, rows in ((catalogue.items, kept), (catalogue.users, some))
    )
    return Catalogue(taken.reset_index(drop=True), items, people, facts)


def matrix(interactions: pd.DataFrame, shape: tuple[int, int]) -> csr_matrix:
    """1 where a user took an item (users, items), sparse."""
    ones = np.ones(len(interactions), dtype=np.float32)
    return csr_matrix((ones, (interactions["user"], interactions["item"])), shape=shape)


# Protocols: interactions -> (training, test)


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
    from implicit.als import AlternatingLeastSquares

    return factorised(AlternatingLeastSquares, train, seed, factors=128, regularization=50, alpha=10, iterations=15)


def bpr(train: csr_matrix, seed: int) -> np.ndarray:
    """Bayesian personalised ranking (Rendle et al. 2009), library `implicit`."""
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


# The text tower


def pooled(encoder: models.Classifier, batch: dict, precision: str) -> torch.Tensor:
    """Text vectors of length 1 (texts, dimensions), with gradients."""
    with models.autocast(encoder.device, precision):
        vectors = encoder(**batch.to(encoder.device)).vectors
    return normalize(vectors.float(), dim=-1)


def learn_tower(
    texts: Sequence[str],
    train: csr_matrix,
    model: str = "minilm",
    steps: int = 40,
    items: int = 128,
    max_length: int = 32,
    learning_rate: float = 1e-4,
    temperature: float = 0.1,
    precision: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> tuple[models.Classifier, object, list[float]]:
    """Fine-tunes an encoder so that what a user took lies near what the user takes next; returns it with its losses.

    A step encodes some items once. For every user who took at least two of them, each of these is the target in turn:
    the mean vector of the others has to be nearer to it than to all other items of the step (multinomial likelihood
    over a softmax of cosines). So a few thousand texts teach from all pairs of interactions.

    Args:
        texts: of all items
        train: interactions (users, items); items that nobody took are never shown

    Returns encoder, tokenizer, and the loss of each step.
    """
    device, precision, _ = models.device_and_precision(precision)
    track.seed_everything(seed)
    encoder, tokenizer = models.load_classifier(model, ["none"], dropout=0.0)
    encoder.encoder.embeddings.requires_grad_(False)
    encoder.to(device).train()
    tokenizer.model_max_length = max_length
    parameters = [p for p in encoder.encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    # a tenth of fewer than 11 steps leaves none to warm up in, by which OneCycleLR would divide: they begin one of 11
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 11), pct_start=0.1)
    random, known, losses = np.random.default_rng(seed), np.flatnonzero(np.asarray(train.sum(axis=0)).ravel()), []
    popularity = np.sqrt(np.asarray(train.sum(axis=0)).ravel()[known])
    for _ in tqdm(range(steps), desc="text tower", leave=False, disable=not progress):
        chosen = random.choice(known, min(items, len(known)), replace=False, p=popularity / popularity.sum())
        batch = tokenizer([texts[i] for i in chosen], truncation=True, padding=True, return_tensors="pt")
        vectors = pooled(encoder, batch, precision)
        took = torch.from_numpy(train[:, chosen].toarray()).to(device)
        took = took[took.sum(dim=1) > 1]
        users, targets = took.nonzero(as_tuple=True)
        profile = normalize((took @ vectors)[users] - vectors[targets], dim=-1)
        logits = (profile @ vectors.T / temperature).masked_fill(took[users].bool(), -torch.inf)
        logits[torch.arange(len(users)), targets] = (profile * vectors[targets]).sum(dim=1) / temperature
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    return encoder, tokenizer, losses


def centred(vectors: np.ndarray) -> np.ndarray:
    """Vectors without what all have in common, of length 1 (Mu & Viswanath 2018): cosines of short texts spread out."""
    vectors = vectors - vectors.mean(axis=0)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def encode(encoder: models.Classifier, tokenizer: object, texts: Sequence[str], precision: str = "auto") -> np.ndarray:
    """Vectors of length 1 (texts, dimensions)."""
    vectors = models.infer(encoder, tokenizer, texts, precision=precision)[1]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
