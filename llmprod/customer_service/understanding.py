"""Understanding a question: its intents, whether an intent covers it at all, its slots, and how sure that is."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from scipy.special import softmax

from llmprod import files, models
from llmprod.customer_service.desk import OUT_OF_SCOPE, Desk, SupportError
from llmprod.evaluate import metrics
from llmprod.finetune import learn, methods
from llmprod.finetune.recipe import Recipe


def with_pairs(desk: Desk, pairs: pd.DataFrame) -> pd.DataFrame:
    """The desk's questions, and for training those of past dialogues whose answer names its intents."""
    known = set(desk.intents)
    chosen = [bool(some) and set(some) <= known for some in pairs["based_on"]]
    named = pairs[np.array(chosen, dtype=bool)]  # an empty list would choose no columns
    more = pd.DataFrame({"text": named["question"], "intents": named["based_on"], "split": "train"})
    return pd.concat([desk.questions[["text", "intents", "split"]], more], ignore_index=True)


def training_splits(questions: pd.DataFrame) -> tuple[DatasetDict, list[str]]:
    """Questions as classification data, with the names of the classes.

    A question with two intents is two rows, so that the softmax learns to share its probability between them; a
    question without one belongs to the class `out_of_scope`.
    """
    rows = questions.assign(label=[some or [OUT_OF_SCOPE] for some in questions["intents"]]).explode("label")
    labels = sorted(rows.loc[rows["split"] == "train", "label"].unique())
    features = Features({"text": Value("string"), "label": ClassLabel(names=labels)})
    parts = DatasetDict()
    for name in ("train", "validation"):
        part = rows[(rows["split"] == name) & rows["label"].isin(labels)]
        columns = {"text": part["text"].tolist(), "label": [labels.index(label) for label in part["label"]]}
        parts[name] = Dataset.from_dict(columns, features=features)
    return parts, labels


def train(questions: pd.DataFrame, recipe: Recipe, folder: Path, progress: bool = True) -> "Understanding":
    """Fine-tunes the classifier on the training questions and calibrates it on the validation questions."""
    splits, labels = training_splits(questions)
    predictor = learn.learn(splits, labels, recipe, folder, progress=progress).predictor
    methods.merge(predictor.model)
    logits = predictor.predict(list(splits["validation"]["text"]))
    temperature = metrics.temperature(np.array(splits["validation"]["label"]), logits)
    train = splits["train"]
    known = [t for t, label in zip(train["text"], train["label"], strict=True) if labels[label] != OUT_OF_SCOPE]
    found = Understanding(predictor, temperature, predictor.embed(known))
    found.second = found.best_second(questions[questions["split"] == "validation"])
    return found


@dataclass
class Understanding:
    """A calibrated intent classifier with the vectors of the questions that it knows."""

    predictor: models.Predictor
    temperature: float
    known: np.ndarray  # vectors of length 1 of the training questions that have an intent
    second: float = 0.3  # least probability of a further intent

    @property
    def intents(self) -> list[str]:
        """The names of the intents, in the order of the columns of `probabilities`."""
        return [label for label in self.predictor.labels if label != OUT_OF_SCOPE]

    def read(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Probability of each intent (texts, intents), and likeness to the nearest known question (texts,)."""
        logits, vectors = self.predictor.infer(texts)
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        probabilities = softmax(logits.astype(float) / self.temperature, axis=1)
        columns = [k for k, label in enumerate(self.predictor.labels) if label != OUT_OF_SCOPE]
        return probabilities[:, columns], (vectors @ self.known.T).max(axis=1).clip(0, 1)

    def several(self, probabilities: np.ndarray, second: float | None = None) -> list[list[str]]:
        """The intents of each text, the most probable first: the best one, and others from probability `second`."""
        second = self.second if second is None else second
        order = np.argsort(-probabilities, axis=1, kind="stable")
        return [
            [self.intents[k] for i, k in enumerate(row) if i == 0 or p[k] >= second]
            for row, p in zip(order, probabilities, strict=True)
        ]

    def best_second(self, questions: pd.DataFrame) -> float:
        """The threshold of further intents with the best micro-F1 on validation questions."""
        some = questions[[bool(intents) for intents in questions["intents"]]]
        probabilities, _ = self.read(some["text"].tolist())
        grid = np.arange(0.1, 0.5, 0.05).tolist()
        return max(grid, key=lambda second: several_f1(some["intents"], self.several(probabilities, second)))

    def save(self, folder: Path, card: str) -> None:
        """Writes the classifier and what it was calibrated to."""
        with models.sealed(folder) as temporary:
            self.predictor.write(temporary, card)
            np.save(temporary / "known.npy", self.known.astype(np.float16))
            files.write_json(temporary / "calibration.json", {"temperature": self.temperature, "second": self.second})

    @classmethod
    def load(cls, folder: Path, precision: str = "auto") -> "Understanding":
        """Reads what `save` wrote."""
        predictor = models.Predictor.load(folder, precision)
        with models.reading(folder):
            known = np.load(folder / "known.npy", allow_pickle=False).astype(np.float32)
            return cls(predictor, known=known, **files.read_json(folder / "calibration.json"))


def confidence(probabilities: np.ndarray, likeness: np.ndarray) -> np.ndarray:
    """How sure the best intent is: its probability times the likeness to the nearest known question."""
    return probabilities.max(axis=1) * likeness


def several_f1(truth: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    """Micro-F1 of sets of intents: 2 x common / (expected + found)."""
    common = sum(len(set(a) & set(b)) for a, b in zip(truth, found, strict=True))
    return 2 * common / max(1, sum(map(len, truth)) + sum(map(len, found)))


# Slots


def find_slots(text: str, slots: Mapping[str, Mapping[str, str]]) -> list[tuple[int, int, str]]:
    """The slots in a text: start, end and name, by each slot's pattern; where two overlap the longer one stays.

    A pattern's group, if it has one, is the value. Raises SupportError for a pattern that can't be read.
    """
    found = []
    for name, slot in slots.items():
        try:
            matches = list(re.finditer(slot["pattern"], text, re.IGNORECASE))
        except re.error as error:
            raise SupportError(f"slot {name}: the pattern {slot['pattern']!r} can't be read ({error}).") from error
        found += [(*match.span(match.lastindex or 0), name) for match in matches]
    chosen = []
    for start, end, name in sorted(found, key=lambda one: (one[0] - one[1], one[0])):
        if all(end <= s or start >= e for s, e, _ in chosen):
            chosen.append((start, end, name))
    return sorted(chosen)
