"""Users, items, interactions and facts of a catalogue."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from llmprod import LLMProdError

DAY = 86400  # seconds
FACTS = ["item", "relation", "entity"]


class RecommendError(LLMProdError):
    """Interactions or items can't be used as they are."""


@dataclass
class Catalogue:
    """Users and items are numbered from 0 in the order of their tables.

    interactions: user, item (numbers), rating, time (seconds)
    items: item (as in the source), title, year, genres (words separated by spaces), text
    users: user (as in the source), age, gender, occupation; empty columns where they are not known
    facts: item (number), relation, entity: facts of a knowledge graph, the most telling relations first
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    users: pd.DataFrame
    facts: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=FACTS))

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of users and items."""
        return len(self.users), len(self.items)


def build(
    interactions: pd.DataFrame, items: pd.DataFrame, users: pd.DataFrame, facts: pd.DataFrame | None = None
) -> Catalogue:
    """A catalogue from tables with the identifiers of the source, which become numbers; repeats are dropped."""
    item_number = {item: i for i, item in enumerate(items["item"])}
    user_number = {user: u for u, user in enumerate(users["user"])}
    interactions = interactions.assign(
        user=interactions["user"].map(user_number), item=interactions["item"].map(item_number)
    )
    facts = pd.DataFrame(columns=FACTS) if facts is None else facts[FACTS]
    facts = facts.assign(item=facts["item"].map(item_number)).drop_duplicates().reset_index(drop=True)
    return Catalogue(interactions.drop_duplicates(["user", "item"]).reset_index(drop=True), items, users, facts)


def subset(catalogue: Catalogue, users: int, seed: int) -> Catalogue:
    """The catalogue of some random users and the items they interacted with; all of it where `users` is 0."""
    if not 0 < users < len(catalogue.users):
        return catalogue
    some = np.sort(np.random.default_rng(seed).permutation(len(catalogue.users))[:users])
    interactions = catalogue.interactions[catalogue.interactions["user"].isin(some)]
    kept = np.sort(interactions["item"].unique())
    facts = catalogue.facts[catalogue.facts["item"].isin(kept)]
    return Catalogue(
        interactions.assign(
            user=np.searchsorted(some, interactions["user"]), item=np.searchsorted(kept, interactions["item"])
        ).reset_index(drop=True),
        catalogue.items.iloc[kept].reset_index(drop=True),
        catalogue.users.iloc[some].reset_index(drop=True),
        facts.assign(item=np.searchsorted(kept, facts["item"].astype(int))).reset_index(drop=True),
    )


def matrix(interactions: pd.DataFrame, shape: tuple[int, int]) -> csr_matrix:
    """Interactions as a sparse matrix (users, items): 1 where a user interacted with an item."""
    ones = np.ones(len(interactions), dtype=np.float32)
    return csr_matrix((ones, (interactions["user"], interactions["item"])), shape=shape)
