"""A recommender that can be saved and served: items for what someone liked, for a wish in words, or for both."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import zscore

from llmprod import models
from llmprod.models import Predictor
from llmprod.recommendation.catalogues import RecommendError

ITEMS, ARRAYS, ENCODER = "items.json", "arrays.npz", "encoder"


@dataclass
class Recommender:
    """Items with their texts' vectors and the weights that interactions gave them."""

    items: pd.DataFrame  # id, title
    weights: np.ndarray  # EASE's (items, items), see `scorers.ease`
    vectors: np.ndarray  # of the items' texts, of length 1 (items, dimensions)
    popularity: np.ndarray  # interactions of each item
    encoder: Predictor  # that made the vectors

    def recommend(self, liked: Sequence[str] = (), wish: str = "", k: int = 10) -> list[dict[str, object]]:
        """The k best items, without those that were liked: id, title, and the liked ones that speak most for each.

        Scores are EASE's sum of weights over what was liked and the cosine of wish and text; where both are asked for,
        the sum of the two, each standardised over items. Without either: the most popular.

        Raises RecommendError for an id that is not in the catalogue.
        """
        number = pd.Series(range(len(self.items)), index=self.items["id"])
        if unknown := [name for name in liked if name not in number.index]:
            raise RecommendError(f"The catalogue has no item {', '.join(unknown[:5])}.")
        past, parts = number[list(dict.fromkeys(liked))].to_numpy(), []
        if len(past):
            parts.append(self.weights[past].sum(axis=0))
        if wish.strip():
            parts.append(self.vectors @ self.encoder.embed([wish])[0])
        scores = np.sum([zscore(part) for part in parts], axis=0) if parts else self.popularity.astype(float)
        scores[past] = -np.inf
        best = np.argsort(-scores, kind="stable")[: min(k, len(scores) - len(past))]
        return [
            self.items.iloc[item][["id", "title"]].to_dict() | {"because": self.because(item, past)} for item in best
        ]

    def because(self, item: int, past: np.ndarray, most: int = 2) -> list[str]:
        """The titles of the liked items with the largest weights for an item."""
        largest = past[np.argsort(-self.weights[past, item], kind="stable")[:most]]
        return self.items["title"].iloc[largest[self.weights[largest, item] > 0]].tolist()

    def save(self, folder: Path, card: str) -> None:
        """Writes items, arrays and encoder into a folder, atomically, with a manifest."""
        with models.sealed(folder) as temporary:
            self.items[["id", "title"]].to_json(temporary / ITEMS, orient="records")
            arrays = {name: getattr(self, name) for name in ("weights", "vectors", "popularity")}
            np.savez(temporary / ARRAYS, **{name: array.astype(np.float32) for name, array in arrays.items()})
            self.encoder.save(temporary / ENCODER, card)

    @classmethod
    def load(cls, folder: Path) -> "Recommender":
        """Reads what `save` wrote.

        Raises RecommendError where something is missing or does not fit together, ModelError where it was changed or
        can't be read.
        """
        models.checked(folder)
        if missing := [name for name in (ITEMS, ARRAYS) if not (folder / name).is_file()]:
            raise RecommendError(f"{folder} is no recommender that 13_recommendation saved: no {', '.join(missing)}.")
        with models.reading(folder / ITEMS):
            items = pd.DataFrame(json.loads((folder / ITEMS).read_text(encoding="utf-8")))[["id", "title"]]
            if len(lacking := items[items.isna().any(axis=1)]):
                raise ValueError(f"item {lacking.index[0] + 1} has no id or no title")
        with models.reading(folder / ARRAYS), np.load(folder / ARRAYS, allow_pickle=False) as arrays:
            found = {name: arrays[name].astype(np.float32) for name in ("weights", "vectors", "popularity")}
        encoder, n = Predictor.load(folder / ENCODER), len(items)
        wanted = {"weights": (n, n), "vectors": (n, encoder.model.config.hidden_size), "popularity": (n,)}
        for name, shape in wanted.items():
            if found[name].shape != shape:
                raise RecommendError(
                    f"{folder / ARRAYS}: {name} has the shape {found[name].shape}; its {n} items and encoder need "
                    f"{shape}: it is for another catalogue or encoder. Write or copy the folder again."
                )
        return cls(items.astype(str), encoder=encoder, **found)
