"""Users, items, interactions and facts: loading, splits."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from llmprod import LLMProdError

DAY = 86400


FACTS = ["item", "relation", "entity"]


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
