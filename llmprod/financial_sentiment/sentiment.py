"""Texts rated by people: loading, splits, metrics, thresholds, calibration."""

import ast
import tarfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from llmprod import LLMProdError, artifacts, data, files, tables
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


def load(
    dataset: str = "sentiment-human",
    part: str = "",
    text_column: str = "text",
    label_column: str = "label",
    encoding: str = "utf-8",
) -> pd.DataFrame:
    """A frame of texts: text, rating (a number around 0), sentiment (0 negative, 1 neutral, 2 positive), group.

    Class names get the ratings -1, 0 and 1; `group` is the article of a sentence, where it is known.

    Args:
        dataset: `sentiment-human`, `financial-phrasebank`, or a file (see `formats.read`)
        part: a domain of sentiment-human (nyt by default, tweets, amazon, movies), or the share of annotators of
            financial-phrasebank that had to agree (50Agree by default, 66Agree, 75Agree, AllAgree)
        text_column, label_column: of a file; labels are numbers (ratings around 0) or negative, neutral, positive
        encoding: of a file

    Raises SentimentError, or data.DataError, for a file that can't be used.
    """
    if dataset == "sentiment-human":
        return rated_texts(part or "nyt")[["text", "rating", "sentiment", "group"]]
    if dataset == "financial-phrasebank":
        file = artifacts.fetch(dataset) / f"Sentences_{part or '50Agree'}.txt"
        if not file.is_file():
            raise SentimentError(f"part is '{part}'; financial-phrasebank has 50Agree, 66Agree, 75Agree and AllAgree.")
        rows = [line.rpartition("@") for line in file.read_text(encoding="latin-1").splitlines()]
        frame = pd.DataFrame({"text": [row[0] for row in rows], "label": [row[2] for row in rows]})
    else:
        frame = data.load(dataset, text_column, label_column, encoding=encoding)
    for column in ("text", "label"):
        if (lacking := frame[column].isna()).any():
            raise SentimentError(f"{dataset}: row {lacking.argmax() + 1} has no {column}; fill it in or take it out.")
    words = {name: str(k - 1) for k, name in enumerate(CLASSES)}
    labels = frame["label"].str.lower()
    try:
        rating = tables.numbers(labels.map(lambda label: words.get(label, label)), dataset)
    except data.DataError as error:
        raise SentimentError(f"{error} Ratings are numbers around 0, or {', '.join(CLASSES)}.") from error
    if (lacking := rating.isna()).any():  # NA, as other programs write what is missing
        raise SentimentError(f"{dataset}: row {lacking.argmax() + 1} has no label; fill it in or take it out.")
    if rating.min() >= 0 and not labels.isin(CLASSES).any():
        raise SentimentError(
            f"{dataset}: the ratings go from {rating.min():g} to {rating.max():g}, and should lie around 0, those of "
            "negative texts below it. Subtract what is neutral (3 where they go from 1 to 5), or write "
            f"{', '.join(CLASSES)}."
        )
    frame = frame.assign(rating=rating.astype(float), sentiment=to_class(rating), group=np.arange(len(frame)))
    unlike = frame.groupby("text")["rating"].transform("nunique") > 1
    if unlike.any() and dataset not in artifacts.registry():
        row = int(unlike.to_numpy().argmax())
        text = tables.shown(frame["text"].iloc[row], 60)
        raise SentimentError(
            f"{dataset}: row {row + 1} ({text}) has other ratings elsewhere; give each text one, such as their mean."
        )
    return frame[["text", "rating", "sentiment", "group"]].drop_duplicates("text").reset_index(drop=True)


@cache
def rated_texts(domain: str) -> pd.DataFrame:
    """One domain of `sentiment-human`: each text with the mean of some twenty ratings, and all of them (`ratings`)."""
    if domain not in DOMAINS:
        raise SentimentError(f"part is '{domain}'; sentiment-human has {', '.join(DOMAINS)}.")
    lines = {}
    with tarfile.open(artifacts.fetch("sentiment-human") / "hutto_ICWSM_2014.tar.gz") as archive:
        for kind in ("GroundTruth", "anonDataRatings"):
            content = archive.extractfile(f"hutto_ICWSM_2014/{DOMAINS[domain]}_{kind}.txt").read()
            lines[kind] = [line.split("\t") for line in content.decode("utf-8", "replace").splitlines()]
    texts = pd.DataFrame(lines["GroundTruth"], columns=["id", "mean", "text"]).set_index("id")
    raters = pd.DataFrame(lines["anonDataRatings"], columns=["id", "mean", "sd", "ratings"]).set_index("id")
    texts["text"] = texts["text"].map(data.normalise)
    texts["rating"] = texts["mean"].astype(float)
    texts["sentiment"] = to_class(texts["rating"])
    texts["group"] = texts.index.str.partition("_").get_level_values(0)
    texts["ratings"] = raters["ratings"].map(ast.literal_eval)
    return texts.reset_index()


def to_class(ratings: np.ndarray, low: float = -0.05, high: float = 0.05) -> np.ndarray:
    """0 (negative) up to `low`, 2 (positive) from `high`, else 1 (neutral).

    The defaults are the thresholds of Hutto & Gilbert 2014, on the mean of ratings from -4 to 4: with them and F1
    weighted by class shares their figures come out (VADER .55, one rater .65 on NYT).
    """
    ratings = np.asarray(ratings)
    return np.where(ratings <= low, 0, np.where(ratings >= high, 2, 1))


def split_half(table: pd.DataFrame, seed: int, by: str = "text") -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(training, validation, test): a random half tests, as in the paper; a tenth of the other half validates.

    Args:
        by: "text", or "group" to keep all sentences of an article in one part
    """
    names = table[by].drop_duplicates().to_numpy()
    drawn = np.random.default_rng(seed).permutation(len(names))
    place = table[by].map(dict(zip(names, drawn / len(names), strict=True)))
    parts = (place < 0.45, (place >= 0.45) & (place < 0.5), place >= 0.5)
    return tuple(table[part].reset_index(drop=True) for part in parts)


def rater_agreement(domain: str = "nyt") -> dict[str, float]:
    """Agreement of a single rater with the mean rating, averaged over raters: Pearson r, the same without the rater's
    own rating in the mean, and weighted F1.
    """
    ratings = np.array(rated_texts(domain)["ratings"].tolist(), dtype=float)
    total = ratings.sum(axis=1)
    truth = to_class(total / ratings.shape[1])
    return {
        "r": float(np.mean([np.corrcoef(one, total)[0, 1] for one in ratings.T])),
        "r, left out of the mean": float(np.mean([np.corrcoef(one, total - one)[0, 1] for one in ratings.T])),
        "F1": float(np.mean([weighted_f1(truth, to_class(one)) for one in ratings.T])),
    }


def weighted_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 averaged over classes with their shares of the labels as weights, as in Hutto & Gilbert 2014."""
    return float(f1_score(labels, predictions, average="weighted", zero_division=0))


def scores(table: pd.DataFrame, ratings: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """Metrics of predicted ratings and classes."""
    truth = table["sentiment"].to_numpy()
    return {
        "r": float(np.corrcoef(table["rating"], ratings)[0, 1]),
        "weighted F1": weighted_f1(truth, classes),
        "macro-F1": metrics.macro_f1(truth, classes),
        "accuracy": metrics.accuracy(truth, classes),
    }


@dataclass
class PlattScaling:
    """The probability that a text is negative, from its predicted rating: a logistic curve (Platt 1999)."""

    slope: float
    shift: float
    share: float  # of negatives among the texts it was fitted on

    @classmethod
    def fit(cls, ratings: np.ndarray, negative: np.ndarray) -> "PlattScaling":
        """Fits the curve on validation texts: predicted ratings, and whether each text is negative."""
        if len(np.unique(negative)) < 2:
            raise SentimentError("Calibration needs negative texts and others among the validation texts; add some.")
        curve = LogisticRegression(C=1e6).fit(np.asarray(ratings)[:, None], negative)
        return cls(float(curve.coef_[0, 0]), float(curve.intercept_[0]), float(np.mean(negative)))

    def __call__(self, ratings: np.ndarray) -> np.ndarray:
        """Probabilities (texts,)."""
        return 1 / (1 + np.exp(-(self.slope * np.asarray(ratings) + self.shift)))


def fit_thresholds(ratings: np.ndarray, sentiment: np.ndarray) -> tuple[float, float]:
    """The two thresholds of `to_class` with the best weighted F1 on validation texts.

    Predictions of a regression shrink towards the mean, so the thresholds of true ratings do not fit them.
    """
    grid = np.linspace(-0.6, 0.6, 25)
    pairs = [(low, high) for low in grid for high in grid if low < high]
    return max(pairs, key=lambda pair: weighted_f1(sentiment, to_class(ratings, *pair)))


def save(
    folder: Path,
    negative: PlattScaling,
    thresholds: tuple[float, float],
    validation: pd.DataFrame,
    test: pd.DataFrame,
) -> None:
    """Writes calibration, thresholds and the held-out texts with their ratings (`predicted`) into a folder."""
    files.write_json(folder / "sentiment.json", {"negative": asdict(negative), "thresholds": list(thresholds)})
    for name, rows in (("validation", validation), ("test", test)):
        with files.atomic(folder / f"{name}.parquet") as temporary:
            rows[["text", "rating", "sentiment", "predicted"]].to_parquet(temporary)


def saved(folder: Path) -> tuple[PlattScaling, tuple[float, float], pd.DataFrame, pd.DataFrame]:
    """Calibration, thresholds, validation and test texts, as `save` wrote them."""
    settings = files.read_json(folder / "sentiment.json")
    validation, test = (pd.read_parquet(folder / f"{name}.parquet") for name in ("validation", "test"))
    return PlattScaling(**settings["negative"]), tuple(settings["thresholds"]), validation, test
