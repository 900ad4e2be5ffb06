"""The experiment of the study `alarms`: when does a stream's mood raise its first alarm, read by whom?"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline

from llmprod.financial_sentiment import multitask, sentiment, weak_labels
from llmprod.financial_sentiment.studies import timed, training_of
from llmprod.news_monitoring import shift, simulate, streams


def bag_of_words(train: pd.DataFrame, texts: Sequence[str]) -> np.ndarray:
    """Ratings by ridge regression on TF-IDF of words and pairs, its strength by leave-one-out (scikit-learn)."""
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    return make_pipeline(vectors, RidgeCV(np.logspace(-2, 2, 9))).fit(train["text"], train["rating"]).predict(texts)


def naive(values: np.ndarray, days: np.ndarray, learnt: float) -> np.ndarray:
    """Whether the mean of a day is more than three standard deviations above those of the first `learnt` days.

    The rule that everybody writes first. At each document (documents,): an alarm is raised at the last of its day.
    """
    means = pd.Series(values).groupby(days).mean()
    past = means[means.index < days[0] + learnt]
    high = means.index[(means > past.mean() + 3 * past.std()) & (means.index >= days[0] + learnt)]
    return np.isin(days, high) & (np.append(np.diff(days), 1) > 0)


def alarms(parameters: Mapping[str, object]) -> dict:
    """Trains the encoder of `12_financial_sentiment`; rates two streams with it, with VADER and with a bag of words.

    For each: days from the stream's beginning to the first alarm (NaN without one), and how many alarms there are, at
    `false_alarms` a year that are allowed by chance; and those of `naive` on the encoder's ratings. For the headlines
    also how many false alarms there are in years made of their quiet days, by the number of keys (`quiet_years`).
    """
    train, _, test = sentiment.split_half(sentiment.load(), parameters["seed"])
    tasks = multitask.rating_tasks(train, parameters["borrowed"], "", parameters["seed"])
    predictor, seconds = timed(multitask.train_multitask, tasks, **training_of(parameters))
    metrics = {"r": float(np.corrcoef(multitask.rate(predictor, test["text"]), test["rating"])[0, 1])}
    settings, allowed = shift.Settings(), float(parameters["false_alarms"])
    speeds = {"training, s": seconds}
    for name in streams.STREAMS:
        stream = streams.load(name)
        days, texts = streams.days(stream["date"]).to_numpy(), stream["text"].tolist()
        own, spent = timed(multitask.rate, predictor, texts)
        speeds[f"{name}, rating, texts/s"] = len(texts) / spent
        ratings = {"encoder": own, "VADER": weak_labels.vader(texts), "bag of words": bag_of_words(train, texts)}
        raised = {
            reader: shift.replay(-values[None], days, np.array(allowed), settings)["raised"][0] > 0
            for reader, values in ratings.items()
        }
        raised["naive rule"] = naive(-own, days, settings.days)
        for reader, alarm in raised.items():
            first = float(days[alarm.argmax()] - days[0]) if alarm.any() else float("nan")
            metrics |= {f"{name}, {reader}, first alarm, day": first, f"{name}, {reader}, alarms": int(alarm.sum())}
        quiet = (stream["date"] < streams.QUIET.get(name, stream["date"].min())).to_numpy()
        for keys in (1, 5, 30) if quiet.any() else ():
            by_chance = simulate.quiet_years(-own[quiet], days[quiet], keys, 200, allowed, parameters["seed"])
            metrics[f"{name}, false alarms a year, keys: {keys}"] = by_chance
    return {"metrics": metrics, "speeds": speeds}
