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

        Raises RecommendError where something is missing or does not fit together, ModelError where it was changed.
        """
        models.checked(folder)
        try:
            items = pd.DataFrame(json.loads((folder / ITEMS).read_text(encoding="utf-8"))).astype(str)
            with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in ("weights", "vectors", "popularity")}
        except (OSError, ValueError, KeyError) as error:
            raise RecommendError(f"{folder} is no recommender that 13_recommendation saved ({error}).") from error
        n = len(items)
        if found["weights"].shape != (n, n) or len(found["vectors"]) != n or found["popularity"].shape != (n,):
            raise RecommendError(f"{folder}: its arrays are for another catalogue than its {n} items.")
        return cls(items, encoder=Predictor.load(folder / ENCODER), **found)
