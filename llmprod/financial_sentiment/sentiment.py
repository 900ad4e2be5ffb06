"""Texts rated by people: loading, halves, metrics, thresholds, calibration."""

import ast
import tarfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from llmprod import LLMProdError, artifacts, data, files
from llmprod.evaluate import metrics

CLASSES = ("negative", "neutral", "positive")


DOMAINS = {
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "movies": "movieReviewSnippets",
}


class SentimentError(LLMProdError):
    """Rated texts can't be used as they are."""


# Data: frames with the columns text, rating (a number), sentiment (0 negative, 1 neutral, 2 positive), group


def load(
    dataset: str = "sentiment-human", part: str = "", text_column: str = "text", label_column: str = "label"
) -> pd.DataFrame:
    """Texts with their sentiment.

    Args:
        dataset: `sentiment-human`, `financial-phrasebank`, or a file (.csv, .tsv, .jsonl, .parquet)
        part: of sentiment-human a domain (nyt where it is left out, tweets, amazon, movies); of financial-phrasebank
            the share of annotators that had to agree (50Agree where it is left out, 66Agree, 75Agree, AllAgree)
        text_column, label_column: of a file; labels are numbers (ratings around 0) or negative, neutral, positive

    Returns a frame with text, rating (words become -1, 0, 1), sentiment, and group (the article of a sentence, where it
    is known). Raises SentimentError, or data.DataError, for what can't be used.
    """
    if dataset == "sentiment-human":
        return rated(part or "nyt")[["text", "rating", "sentiment", "group"]]
    if dataset == "financial-phrasebank":
        file = artifacts.fetch(dataset) / f"Sentences_{part or '50Agree'}.txt"
        if not file.is_file():
            raise SentimentError(f"part is '{part}'; financial-phrasebank has 50Agree, 66Agree, 75Agree and AllAgree.")
        rows = [line.rpartition("@") for line in file.read_text(encoding="latin-1").splitlines()]
        frame = pd.DataFrame({"text": [row[0] for row in rows], "label": [row[2] for row in rows]})
    else:
        frame = data.load(dataset, text_column, label_column)
    words = {name: k - 1 for k, name in enumerate(CLASSES)}
    rating = pd.to_numeric(frame["label"].map(lambda label: words.get(str(label).lower(), label)), errors="coerce")
    if rating.isna().any():
        raise SentimentError(
            f"{dataset}: '{frame['label'][rating.isna()].iloc[0]}' is no sentiment; use numbers around 0, or "
            f"{', '.join(CLASSES)}."
        )
    frame = frame.assign(rating=rating.astype(float), sentiment=to_class(rating), group=np.arange(len(frame)))
    return frame[["text", "rating", "sentiment", "group"]].drop_duplicates("text").reset_index(drop=True)


@cache
def rated(domain: str) -> pd.DataFrame:
    """The texts of one domain of `sentiment-human` with the mean of some twenty ratings, and `ratings`, all of them."""
    if domain not in DOMAINS:
        raise SentimentError(f"part is '{domain}'; sentiment-human has {', '.join(DOMAINS)}.")
    lines = {}
    with tarfile.open(artifacts.fetch("sentiment-human") / "hutto_ICWSM_2014.tar.gz") as archive:
        for kind in ("GroundTruth", "anonDataRatings"):
            content = archive.extractfile(f"hutto_ICWSM_2014/{DOMAINS[domain]}_{kind}.txt").read()
            lines[kind] = [line.split("\t") for line in content.decode("utf-8", "replace").splitlines()]
    texts = pd.DataFrame(lines["GroundTruth"], columns=["id", "mean", "text"]).set_index("id")
    everybody = pd.DataFrame(lines["anonDataRatings"], columns=["id", "mean", "sd", "ratings"]).set_index("id")
    texts["text"] = texts["text"].map(data.normalise)
    texts["rating"] = texts["mean"].astype(float)
    texts["sentiment"] = to_class(texts["rating"])
    texts["group"] = texts.index.str.partition("_").get_level_values(0)
    texts["ratings"] = everybody["ratings"].map(ast.literal_eval)
    return texts.reset_index()


def to_class(ratings: np.ndarray, low: float = -0.05, high: float = 0.05) -> np.ndarray:
    """0 (negative) up to `low`, 2 (positive) from `high`, else 1 (neutral).

    The thresholds of Hutto & Gilbert 2014. On the mean of ratings from -4 to 4 as it is: with them, and F1 averaged
    with the classes' shares as weights, the figures of the paper come out (VADER .55, one person .65 on NYT).
    """
    ratings = np.asarray(ratings)
    return np.where(ratings <= low, 0, np.where(ratings >= high, 2, 1))


def halves(table: pd.DataFrame, seed: int, by: str = "text") -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(training, validation, test): a random half tests, as in the paper; a tenth of the other half validates.

    Args:
        by: "text", or "group" to keep the sentences of an article together, so that none is tested beside others of
            its own that trained
    """
    names = table[by].drop_duplicates().to_numpy()
    drawn = np.random.default_rng(seed).permutation(len(names))
    place = table[by].map(dict(zip(names, drawn / len(names), strict=True)))
    parts = (place < 0.45, (place >= 0.45) & (place < 0.5), place >= 0.5)
    return tuple(table[part].reset_index(drop=True) for part in parts)


def one_person(domain: str = "nyt") -> dict[str, float]:
    """How well one person does, on average over people: Pearson r with the mean of all, and of the others; F1."""
    ratings = np.array(rated(domain)["ratings"].tolist(), dtype=float)
    total = ratings.sum(axis=1)
    truth, people = to_class(total / ratings.shape[1]), ratings.T
    return {
        "r": float(np.mean([np.corrcoef(one, total)[0, 1] for one in people])),
        "r, left out of the mean": float(np.mean([np.corrcoef(one, total - one)[0, 1] for one in people])),
        "F1": float(np.mean([weighted_f1(truth, to_class(one)) for one in people])),
    }


def weighted_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The mean of the classes' F1, each weighted by its share of the labels: the average of Hutto & Gilbert 2014."""
    return float(f1_score(labels, predictions, average="weighted", zero_division=0))


def scores(table: pd.DataFrame, ratings: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """Predicted ratings and classes against the true ones."""
    truth = table["sentiment"].to_numpy()
    return {
        "r": float(np.corrcoef(table["rating"], ratings)[0, 1]),
        "weighted F1": weighted_f1(truth, classes),
        "macro-F1": metrics.macro_f1(truth, classes),
        "accuracy": metrics.accuracy(truth, classes),
    }


@dataclass
class Negative:
    """From a predicted rating to the probability that a text is negative: a logistic curve (Platt 1999)."""

    slope: float
    shift: float
    share: float  # of negatives where it was fitted

    def __call__(self, ratings: np.ndarray) -> np.ndarray:
        """Probabilities (texts,)."""
        return 1 / (1 + np.exp(-(self.slope * np.asarray(ratings) + self.shift)))


def calibrate(ratings: np.ndarray, negative: np.ndarray) -> Negative:
    """Fits `Negative` on validation texts: predicted ratings, and whether each text is negative."""
    if len(np.unique(negative)) < 2:
        raise SentimentError("Calibration needs negative texts and others among the validation texts; add some.")
    fitted = LogisticRegression(C=1e6).fit(np.asarray(ratings)[:, None], negative)
    return Negative(float(fitted.coef_[0, 0]), float(fitted.intercept_[0]), float(np.mean(negative)))


def thresholds(ratings: np.ndarray, sentiment: np.ndarray) -> tuple[float, float]:
    """The two thresholds for `to_class` with the best weighted F1, on validation texts.

    A regression shrinks towards the mean, so that the thresholds of the true ratings are not those of predicted ones.
    """
    grid = np.linspace(-0.6, 0.6, 25)
    pairs = [(low, high) for low in grid for high in grid if low < high]
    return max(pairs, key=lambda pair: weighted_f1(sentiment, to_class(ratings, *pair)))


# What the notebook leaves for others to build on


def save(
    folder: Path,
    negative: Negative,
    thresholds: tuple[float, float],
    validation: pd.DataFrame,
    test: pd.DataFrame,
) -> None:
    """Writes calibration, thresholds and the model's ratings (`predicted`) of the held-out texts into a folder."""
    files.write_json(folder / "sentiment.json", {"negative": asdict(negative), "thresholds": list(thresholds)})
    for name, rows in (("validation", validation), ("test", test)):
        with files.atomic(folder / f"{name}.parquet") as temporary:
            rows[["text", "rating", "sentiment", "predicted"]].to_parquet(temporary)


def saved(folder: Path) -> tuple[Negative, tuple[float, float], pd.DataFrame, pd.DataFrame]:
    """What `save` wrote: calibration, thresholds, validation and test texts."""
    settings = files.read_json(folder / "sentiment.json")
    validation, test = (pd.read_parquet(folder / f"{name}.parquet") for name in ("validation", "test"))
    return Negative(**settings["negative"]), tuple(settings["thresholds"]), validation, test
