"""Data in phases: classes that arrive a few at a time, topics that shift while the classes stay."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmprod import data

Texts = tuple[list[str], np.ndarray]  # texts and their class numbers


@dataclass(frozen=True)
class Phase:
    """What a model gets to see at one time, and a test of just that."""

    name: str
    train: Texts
    test: Texts


def new_classes(
    train: Texts, test: Texts, names: Sequence[str], together: int, texts: int, tests: int, seed: int
) -> list[Phase]:
    """Class-incremental phases: each brings `together` new classes, in random order, with at most `texts` of each."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(names))
    groups = [order[start : start + together] for start in range(0, len(order), together)]
    return [
        Phase(", ".join(names[k] for k in group), some(train, group, texts, random), some(test, group, tests, random))
        for group in groups
    ]


def some(of: Texts, classes: Sequence[int], size: int, random: np.random.Generator) -> Texts:
    """At most `size` random texts of each of the classes."""
    texts, labels = of
    rows = np.concatenate([random.permutation(np.flatnonzero(labels == k))[:size] for k in classes])
    return [texts[row] for row in rows], labels[rows]


def shifted_topics(texts: int, tests: int, seed: int) -> tuple[list[Phase], list[str]]:
    """Domain-incremental phases of 20 Newsgroups: always the classes comp, rec, sci and talk, each time other groups.

    In the first phase computers are graphics, say, and in the second the Macintosh. Returns phases and class names.
    """
    table, names = data.clean(data.load_artifact("20newsgroups"))[0], ["comp", "rec", "sci", "talk"]
    random = np.random.default_rng(seed)
    groups = {name: sorted(g for g in table["label"].unique() if g.startswith(name + ".")) for name in names}
    order = {name: random.permutation(groups[name])[:4] for name in names}
    phases = []
    for number in range(4):
        label = {order[name][number]: k for k, name in enumerate(names)}
        parts = []
        for split, size in (("train", texts), ("test", tests)):
            part = table[(table["split"] == split) & table["label"].isin(label)]
            found = part["text"].tolist(), part["label"].map(label).to_numpy()
            parts.append(some(found, range(4), size, random))
        phases.append(Phase(f"topics {number + 1}", *parts))
    return phases, names
