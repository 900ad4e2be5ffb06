"""Catalogues to load: your own tables, or MovieLens-100K with the facts of Freebase joined to its films."""

import re
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from llmprod import artifacts, formats, tables
from llmprod.recommendation.catalogues import FACTS, Catalogue, RecommendError, build

RELATIONS = {  # of the graph of MovieLens, the most telling first; no awards: they follow the interactions
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


def load(
    dataset: str = "movielens-100k", items_file: str = "", facts_file: str = "", encoding: str = "utf-8"
) -> Catalogue:
    """A catalogue: the artifact `movielens-100k`, or your own tables.

    Args:
        dataset: the artifact, or a file of interactions (see `formats.read`) with the columns user, item and,
            optionally, rating (a number) and time (see `tables.moment`)
        items_file: a table of items with the columns item and text and, optionally, title, year and genres
        facts_file: optionally, a table with the columns item, relation and entity (film 7, director, Ann Hui)
        encoding: of the files

    Raises RecommendError, or formats.DataError, naming the file and the row (from 1), for what can't be used.
    """
    if dataset in artifacts.registry():
        if dataset != "movielens-100k":
            raise RecommendError(f"The artifact '{dataset}' holds no interactions; use movielens-100k or a file.")
        return movielens(artifacts.fetch(dataset), artifacts.fetch("movielens-titles"))
    if not items_file:
        raise RecommendError(f"{dataset}: set items_file to a table with the columns item and text.")
    interactions = read(dataset, ["user", "item"], ["rating", "time"], encoding)
    items = read(items_file, ["item", "text"], ["title", "year", "genres"], encoding)
    facts = read(facts_file, FACTS, [], encoding) if facts_file else pd.DataFrame(columns=FACTS)
    if twice := items.loc[items["item"].duplicated(), "item"].tolist():
        raise RecommendError(f"{items_file}: the item '{twice[0]}' stands twice.")
    for name, frame in ((dataset, interactions), (facts_file, facts)):
        if unknown := frame.loc[~frame["item"].isin(items["item"]), "item"].unique().tolist():
            raise RecommendError(f"{name}: {len(unknown)} items are not in {items_file} (the first is '{unknown[0]}').")
    items = items.assign(
        title=items["title"].fillna(items["text"]),
        year=tables.numbers(items["year"], f"{items_file}, column year"),
        genres=items["genres"].fillna(""),
    )
    times = tables.times(interactions["time"], f"{dataset}, column time")
    interactions = interactions.assign(
        rating=tables.numbers(interactions["rating"], f"{dataset}, column rating"),
        time=(times - pd.Timestamp(0, tz="UTC")).dt.total_seconds(),
    )
    users = pd.DataFrame({"user": np.sort(interactions["user"].unique())})
    users = users.reindex(columns=["user", "age", "gender", "occupation"])
    return build(interactions, items, users, facts)


def read(name: str, columns: list[str], others: list[str], encoding: str) -> pd.DataFrame:
    """The table in a file, with `columns` as texts, of which none may be missing, and `others`, where there are any.

    Raises RecommendError, naming the file and the row (from 1).
    """
    frame = formats.read(name, encoding)
    tables.require(frame, columns, name, RecommendError)
    frame = frame.reindex(columns=[*columns, *others])
    for column in [*columns, *{"title", "genres"} & set(others)]:
        frame[column] = tables.texts(frame[column], f"{name}, column {column}")
        if column in columns and (lacking := frame[column].isna()).any():
            raise RecommendError(
                f"{name}: rows without {column}: {lacking.sum()}, the first is row {lacking.argmax() + 1}. "
                "Fill it in, or take them out."
            )
    return frame


def movielens(folder: Path, titles: Path | None = None) -> Catalogue:
    """MovieLens-100K; an item's text is its title, year and genres, its facts are those of Freebase.

    The link file from films to Freebase numbers them as MovieLens-1M does (313 is linked to The Swan Princess, here it
    is Titanic; github.com/RUCAIBox/RecSysDatasets/issues/130). `titles` is a folder with `movies.csv`, which has titles
    in that numbering; without it the wrong link file is used, for comparison. Entities are bare identifiers without
    names, so that facts can't be part of the text.
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
    known = items["item"] if titles is None else match_films(items, pd.read_csv(titles / "movies.csv"))
    linked = table("link", "item", "entity").set_index("item")["entity"]
    facts = freebase_facts(table("kg", "head", "relation", "tail"), known.map(linked).set_axis(items["item"]).dropna())
    return build(table("inter", "user", "item", "rating", "time"), items, users.drop(columns="zip"), facts)


def title_variants(title: str) -> set[str]:
    """Normalised names of a film: "Postino, Il (Postman, The)" has two, `ilpostino` and `thepostman`.

    Without case, accents and punctuation, articles in front; text in brackets is a name of its own.
    """
    found = set()
    for name in re.split(r"[()]", title):
        name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower().strip()
        name = re.sub(r"^(.*), (the|an?|l[ae]|les|l'|il|el|das|de[rn]|die|los)$", r"\2\1", name.removeprefix("a.k.a. "))
        found.add(re.sub(r"[^a-z0-9]", "", name.replace("&", "and")))
    return found - {""}


def match_films(items: pd.DataFrame, movies: pd.DataFrame) -> pd.Series:
    """The number in `movies` (movieId, title with year) of each item (title, year), empty where it has none.

    The same film has a name in common, and a year that differs by one at most; of several, the nearest year wins.
    """
    title = movies["title"].str.extract(r"^(?P<title>.*\S)\s*\((?P<year>\d{4})\)\s*$")
    theirs = movies.assign(
        name=title["title"].fillna("").map(title_variants), year=pd.to_numeric(title["year"])
    ).explode("name")
    ours = pd.DataFrame(
        {"item": items.index, "name": items["title"].map(title_variants), "year": items["year"]}
    ).explode("name")
    pairs = ours.merge(theirs[["movieId", "name", "year"]], on="name", suffixes=("", " there"))
    pairs["apart"] = (pairs["year"] - pairs["year there"]).abs()
    pairs = pairs[pairs["apart"] <= 1].sort_values(["item", "apart", "movieId"]).drop_duplicates("item")
    return pairs.set_index("item")["movieId"].reindex(items.index)


def freebase_facts(triples: pd.DataFrame, linked: pd.Series) -> pd.DataFrame:
    """Facts about items from triples (head, relation, tail) and each item's own entity in them.

    Films that are sequels of one another, directly or not, have the same `series`.
    """
    sequels = triples[triples["relation"] == "film.film.sequel"]
    codes, films = pd.factorize(pd.concat([sequels["head"], sequels["tail"]]))
    edges = csr_matrix((np.ones(len(sequels)), codes.reshape(2, -1)), shape=(len(films), len(films)))
    series = connected_components(edges, directed=False)[1]
    sequel_facts = pd.DataFrame(
        {"head": films, "relation": "series", "tail": [f"series {number}" for number in series]}
    )
    plain = triples[triples["relation"].isin(RELATIONS)]
    known = pd.concat([sequel_facts, plain.assign(relation=plain["relation"].map(RELATIONS))])
    facts = linked.rename("head").rename_axis("item").reset_index().merge(known, on="head")
    facts = facts.rename(columns={"tail": "entity"})
    order = facts["relation"].map({relation: i for i, relation in enumerate(["series", *RELATIONS.values()])})
    return facts.iloc[np.lexsort([facts["item"], order])][FACTS]
