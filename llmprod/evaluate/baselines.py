"""A trained bag of words, alone and together with a fine-tuned model (product of experts)."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline, make_pipeline, make_union

from llmprod import segment

STRENGTHS = (1, 10, 100)  # the C from which `chosen` chooses


def bag_of_words(texts: Sequence[str], labels: Sequence[int], c: float, characters: bool = False) -> Pipeline:
    """TF-IDF and logistic regression (scikit-learn), fitted on texts and their class numbers.

    Args:
        c: the inverse of the regularisation's strength
        characters: also uses sequences of two to five characters inside words, which bear misspellings and inflection
    """
    words = TfidfVectorizer(sublinear_tf=True, min_df=1 if characters else 2, preprocessor=segment.lower_pairs)
    pieces = TfidfVectorizer(sublinear_tf=True, analyzer="char_wb", ngram_range=(2, 5))
    features = make_union(words, pieces) if characters else words
    return make_pipeline(features, LogisticRegression(C=c, max_iter=2000)).fit(texts, labels)


def chosen(train: tuple[Sequence[str], Sequence[int]], validation: tuple[Sequence[str], Sequence[int]]) -> Pipeline:
    """The bag of words whose C (one of `STRENGTHS`) gives the highest accuracy on validation texts."""
    return max((bag_of_words(*train, c) for c in STRENGTHS), key=lambda model: model.score(*validation))


def expert_weights(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The two exponents, none negative, of the product of experts with the least log loss on validation texts.

    A product of experts is p ∝ p₁^a p₂^b: a logarithmic opinion pool (Genest & Zidek 1986; Hinton 2002). A sum a + b
    below 1 makes both less sure, as temperature scaling does.

    Args:
        first, second: log-probabilities or logits of the two models (texts, classes)
        labels: the true class numbers (texts,)
    """
    numbers = range(first.shape[1])
    found = minimize(
        lambda pair: log_loss(labels, np.exp(product(first, second, pair)), labels=numbers),
        x0=(0.5, 0.5), method="L-BFGS-B", bounds=[(0, 10), (0, 10)],
    )  # fmt: skip
    return float(found.x[0]), float(found.x[1])


def product(first: np.ndarray, second: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Log-probabilities (texts, classes) of the product of two experts with these exponents."""
    a, b = weights
    return log_softmax(
        a * log_softmax(first.astype(float), axis=1) + b * log_softmax(second.astype(float), axis=1), axis=1
    )
