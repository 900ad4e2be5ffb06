"""Peers: other ways to read a question, trained on the same questions and asked the same way as `understanding`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import MultiLabelBinarizer

from llmprod import models, segment
from llmprod.customer_service.desk import SupportError
from llmprod.evaluate import studies

__all__ = ["FROZEN", "NEAREST", "SETFIT", "WAYS", "WORDS", "Peer", "train"]  # each way by name, for who asks for one
WAYS = NEAREST, WORDS, FROZEN, SETFIT = "nearest question", "bag of words", "frozen encoder", "setfit"


@dataclass
class Peer:
    """A trained peer: vectors of texts, a classifier of vectors, and the questions that it knows."""

    intents: list[str]
    vectors: Callable[[list[str]], object]  # texts -> matrix, dense or sparse
    classify: Callable[[object], np.ndarray]  # matrix -> probabilities (texts, intents)
    nearest: NearestNeighbors

    def read(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Probability of each intent (texts, intents), and likeness to the nearest known question (texts,)."""
        vectors = self.vectors(list(texts))
        distances, _ = self.nearest.kneighbors(vectors)
        return np.asarray(self.classify(vectors)), np.clip(1 - distances[:, 0], 0, 1)


def train(way: str, questions: pd.DataFrame, parameters: Mapping[str, object]) -> Peer:
    """Trains a peer on the training questions.

    NEAREST: the intents of the most similar question, by TF-IDF of pieces of words; WORDS: logistic regression on the
    same vectors; FROZEN: on those of the encoder as it was pretrained; SETFIT: the setfit library. Where questions have
    several intents, or none, each intent is a classifier of its own. Raises SupportError for a way that there is not.
    """
    if way not in WAYS:
        raise SupportError(f"There is no peer {way!r}; there are: {', '.join(WAYS)}.")
    asked = questions[questions["split"] == "train"]
    texts, names = asked["text"].tolist(), MultiLabelBinarizer()
    truth = names.fit_transform(asked["intents"])
    single = (truth.sum(axis=1) == 1).all()
    labels = truth.argmax(axis=1) if single else truth
    if way == SETFIT:
        model = studies.setfit_model(parameters, texts, labels)
        vectors = model.encode
    else:
        vectors = encoded(parameters) if way == FROZEN else pieces(texts)
    known = vectors(texts)
    nearest = NearestNeighbors(n_neighbors=1, metric="cosine").fit(known)

    def of_nearest(matrix: object) -> np.ndarray:
        return truth[nearest.kneighbors(matrix)[1][:, 0]].astype(float)

    if way in (WORDS, FROZEN):
        regression = LogisticRegression(C=parameters["c"], max_iter=2000)
        classify = (regression if single else OneVsRestClassifier(regression)).fit(known, labels).predict_proba
    else:
        classify = model.model_head.predict_proba if way == SETFIT else of_nearest
    return Peer(names.classes_.tolist(), vectors, classify, nearest)


def pieces(texts: Sequence[str]) -> Callable[[list[str]], object]:
    """TF-IDF of sequences of two to five characters inside words, which bear misspellings and inflection."""
    settings = {"sublinear_tf": True, "analyzer": "char_wb", "ngram_range": (2, 5)}
    return TfidfVectorizer(preprocessor=segment.lower_pairs, **settings).fit(texts).transform


def encoded(parameters: Mapping[str, object]) -> Callable[[list[str]], np.ndarray]:
    """Vectors of the encoder as it was pretrained."""
    settings = {"max_length": parameters["max_length"], "precision": parameters["precision"]}
    return models.Predictor.pretrained(parameters["model"], **settings).embed
