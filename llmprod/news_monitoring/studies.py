"""Experiments: when does a stream's mood raise its first alarm, read by whom; how well are chosen topics found?"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import multivariate_normal, norm
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline

from llmprod import converted, corpora, data
from llmprod.evaluate import baselines
from llmprod.financial_sentiment import entities, multitask, sentiment, weak_labels
from llmprod.financial_sentiment.studies import in_int8, timed, training_of
from llmprod.finetune import learn
from llmprod.finetune.recipe import Recipe
from llmprod.news_monitoring import shift, simulate, streams
from llmprod.news_monitoring.documents import DAY
from llmprod.news_monitoring.topics import Topics, parse


def bag_of_words(train: pd.DataFrame, texts: Sequence[str]) -> np.ndarray:
    """Ratings by ridge regression on TF-IDF of words and pairs, its strength by leave-one-out (scikit-learn)."""
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    return make_pipeline(vectors, RidgeCV(np.logspace(-2, 2, 9))).fit(train["text"], train["rating"]).predict(texts)


def naive(scores: pd.Series) -> pd.Series:
    """The rule that everybody writes first: whether a day's standardised mean (by day) is above three."""
    return scores > 3


def ewma_chart(scores: pd.Series, every: float, weight: float = 0.1) -> pd.Series:
    """A control chart of the exponentially weighted mean (Roberts 1959) of a day's standardised mean (by day).

    An alarm is raised where it comes to exceed the height that an EWMA of independent normal values comes to exceed
    once in `every` days: two values that follow each other have a correlation of 1 - weight.
    """
    apart = [[1, 1 - weight], [1 - weight, 1]]
    height = brentq(lambda h: norm.sf(h) - multivariate_normal.cdf([-h, -h], cov=apart) - 1 / every, 0, 8)
    values = pd.Series(simulate.ewma(scores.to_numpy()[None], weight, 0.0)[0], scores.index)
    high = values > height * (weight / (2 - weight)) ** 0.5
    return high & ~high.shift(fill_value=False)


def by_day(values: np.ndarray, days: np.ndarray, learnt: float, rule: Callable[[pd.Series], pd.Series]) -> np.ndarray:
    """A rule on means of days, standardised by those of the first `learnt` days, which raise no alarm themselves.

    At each document (documents,): an alarm is raised at the last of its day.
    """
    means = pd.Series(values).groupby(days).mean()
    past = means[means.index < days[0] + learnt]
    raised = rule(((means - past.mean()) / past.std())[means.index >= days[0] + learnt])
    return np.isin(days, raised.index[raised]) & (np.append(np.diff(days), 1) > 0)


def alarms(parameters: Mapping[str, object]) -> dict:
    """Trains the encoder of `12_financial_sentiment`; rates two streams with it, with VADER and with a bag of words.

    For each: days from the stream's beginning to the first alarm (NaN without one), and how many alarms there are, at
    `false_alarms` a year that are allowed by chance; and those of `ewma_chart` and `naive` on the encoder's ratings.
    For the headlines also how many false alarms there are in 200 years made of their quiet days, by the number of keys
    (`quiet_years`), and with `ewma_chart`.
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
        chart = partial(ewma_chart, every=shift.YEAR / allowed)
        raised["EWMA"] = by_day(-own, days, settings.days, chart)
        raised["naive rule"] = by_day(-own, days, settings.days, naive)
        for reader, alarm in raised.items():
            first = float(days[alarm.argmax()] - days[0]) if alarm.any() else float("nan")
            metrics |= {f"{name}, {reader}, first alarm, day": first, f"{name}, {reader}, alarms": int(alarm.sum())}
        quiet = (stream["date"] < streams.QUIET.get(name, stream["date"].min())).to_numpy()
        if quiet.any():
            calm = -own[quiet], days[quiet]
            for keys in (1, 5, 30):
                by_chance = simulate.quiet_years(*calm, keys, 200, allowed, parameters["seed"])
                metrics[f"{name}, false alarms a year, keys: {keys}"] = by_chance
            years, calendar = simulate.made_years(*calm, 200, parameters["seed"])
            by_chance = np.mean([by_day(year, calendar, settings.days, chart).sum() for year in years])
            metrics[f"{name}, false alarms a year, EWMA"] = float(by_chance)
    return {"metrics": metrics, "speeds": speeds}


def unrated(number: int, seed: int) -> list[str]:
    """A random sample of sentences, without their ratings: of movies, products, tweets and the newswire of 1996."""
    texts = [text for domain in ("tweets", "amazon", "movies") for text in sentiment.load(part=domain)["text"]]
    texts += [text for text, _ in entities.conll("train") if len(text.split()) > 5]  # no headings, no lines of tables
    some = list(dict.fromkeys(texts))
    return [some[i] for i in np.random.default_rng(seed).permutation(len(some))[:number]]


def distillation(parameters: Mapping[str, object]) -> dict:
    """Trains a large encoder on rated sentences, and small ones on these and on its ratings of `unrated` sentences.

    Teacher and students (Hinton et al. 2015; on texts without labels, as Jiao et al. 2020) are scored on the same test
    sentences, together with small encoders that saw the rated sentences alone, in float32 and in int8. For each: r, the
    headlines of 2020 that it rates in a second, and days to the first alarm and the number of alarms, as in `alarms`.
    """
    seed, settings = parameters["seed"], training_of(parameters)
    train, _, test = sentiment.split_half(sentiment.load(), seed)
    rated, others = multitask.rating_tasks(train), unrated(parameters["unrated"], seed)
    large = {"model": parameters["teacher"], "learning_rate": parameters["teacher_rate"]}
    teacher, seconds = timed(multitask.train_multitask, rated, **settings | large)
    speeds, readers = {"training of the teacher, s": seconds}, {"teacher": teacher}
    targets = np.concatenate([train["rating"], multitask.rate(teacher, others)])
    taught = [multitask.Task("sentiment", [*train["text"], *others], targets)]
    for name, tasks in (("student", taught), ("untaught", rated)):
        for layers in parameters["sizes"]:
            small, seconds = timed(multitask.train_multitask, tasks, **settings | {"layers": layers})
            readers |= {f"{name}, {layers} layers": small, f"{name}, {layers} layers, int8": in_int8(small)}
            speeds[f"training, {name}, {layers} layers, s"] = seconds
    stream = streams.load("business-headlines")
    days, allowed = streams.days(stream["date"]).to_numpy(), np.array(float(parameters["false_alarms"]))
    metrics = {}
    for name, reader in readers.items():
        multitask.rate(reader, stream["text"].head(64))  # the first call is slower
        own, seconds = timed(multitask.rate, reader, stream["text"])
        speeds[f"{name}, headlines/s"] = len(stream) / seconds
        metrics[f"{name}, r"] = float(np.corrcoef(multitask.rate(reader, test["text"]), test["rating"])[0, 1])
        raised = shift.replay(-own[None], days, allowed, shift.Settings())["raised"][0] > 0
        first = float(days[raised.argmax()] - days[0]) if raised.any() else float("nan")
        metrics |= {f"{name}, first alarm, day": first, f"{name}, alarms": int(raised.sum())}
    return {"metrics": metrics, "speeds": speeds}


def chinese_news(parameters: Mapping[str, object]) -> dict:
    """Trains a Chinese encoder and a bag of words to tell good reviews from bad ones, and rates a newspaper with both.

    A rating is the log odds of a good one. For each reader: accuracy on the test reviews; the day of January 1998 of
    the first alarm (NaN without one) and how many alarms there are, after a warm-up of `warmup` days; and how many of
    the paragraphs that count most in the first alarm name the earthquake of 10 January. `curve` has the mean by day.
    """
    table = data.drop_duplicates(data.clean(corpora.load("chinese-reviews"))[0])[0]
    with tempfile.TemporaryDirectory() as folder:
        data.save(
            data.split(table, train_rows=parameters["rows"], seed=parameters["seed"]), Path(folder) / "splits", {}
        )
        splits, labels, _ = data.prepared(Path(folder) / "splits")
        recipe = Recipe.of(parameters | {"model": converted.model(str(parameters["model"]))})
        encoder = learn.learn(splits, labels, recipe, Path(folder) / "trainer", progress=False).predictor
        reviews = {name: (list(splits[name]["text"]), np.array(splits[name]["label"])) for name in data.SPLITS}
    words, good = baselines.chosen(reviews["train"], reviews["validation"]), labels.index("positive")
    readers = {"encoder": encoder.predict, "bag of words": words.predict_log_proba}
    stream, metrics, speeds = streams.newspaper(), {}, {}
    days, settings = streams.days(stream["date"]), replace(shift.Settings(), days=float(parameters["warmup"]))
    for reader, read in readers.items():
        metrics[f"{reader}, accuracy on reviews"] = float(
            (read(reviews["test"][0]).argmax(1) == reviews["test"][1]).mean()
        )
        found, seconds = timed(read, stream["text"].tolist())
        stream[reader] = found[:, good] - found[:, 1 - good]
        test, alarms = shift.Shift(settings, allowed=float(parameters["false_alarms"])), []
        for day, rating, text in zip(days, stream[reader], stream["text"], strict=True):
            if alarm := test.update(day * DAY, float(expit(-rating)), text):
                alarms.append((day, [text for text, _ in alarm.causes]))
        first, causes = alarms[0] if alarms else (np.nan, [])
        metrics |= {
            f"{reader}, first alarm, day of January": float(first - days[0] + stream["date"][0].day),
            f"{reader}, alarms": len(alarms),
            f"{reader}, causes that name the earthquake": sum("震" in text for text in causes),
            f"{reader}, causes": len(causes),
        }
        speeds[f"{reader}, paragraphs/s"] = len(stream) / seconds
    curve = stream.groupby(stream["date"].dt.day)[list(readers)].mean().rename_axis("day").reset_index()
    return {"metrics": metrics, "speeds": speeds, "curve": curve.to_dict("list")}


# quiet streams: documents a day, how much alike they are, false alarms a year, years, streams
QUIET = [
    (4, 0.2, 1.0, 1, 300), (20, 0.0, 1.0, 1, 300), (20, 0.2, 1.0, 1, 300), (40, 0.2, 1.0, 1, 300),
    (4, 0.2, 0.2, 4, 300), (20, 0.2, 0.2, 4, 300), (4, 0.2, 0.02, 1, 2000), (20, 0.2, 0.02, 1, 2000),
]  # fmt: skip
# turns for the worse of a stream of twenty a day: standard deviations of a document, days until it is as bad as that
TURNS = [(0.15, 0), (0.25, 0), (0.4, 0), (0.4, 30), (0.4, 60)]


def simulated_shifts(parameters: Mapping[str, object]) -> dict:
    """Plays the test of a shift with a given drift on simulated streams, on which its settings were chosen.

    False alarms in the quiet streams of `QUIET` as a multiple of what was asked for; and the median days to the alarm
    after the turns of `TURNS`, which begin 40 days after the stream, in 200 streams at one false alarm a year.
    """
    settings, seed = replace(shift.Settings(), drift=float(parameters["drift"])), int(parameters["seed"])
    metrics = {}
    for a_day, alike, asked, years, number in QUIET:
        raised = 0.0
        for part in range(0, number, 500):  # not all at once, for the memory
            length = round(settings.days) + 365 * years
            quiet = simulate.quiet_days(min(number, 500), a_day, length, alike, [seed, part])
            raised += shift.replay(*quiet, np.array(asked), settings)["raised"].sum()
        metrics[f"false alarms, {a_day} a day, alike {alike}, {asked} a year"] = raised / (number * years * asked)
    values, days = simulate.quiet_days(200, 20, 200, 0.15, [seed, 1])
    for size, lasting in TURNS:
        turned = values + size * np.clip((days - 40) / max(lasting, 1e-9), 0, 1)
        raised = shift.replay(turned, days, np.array(1.0), settings)["raised"][:, days >= 40] > 0
        delays = np.where(raised.any(axis=1), days[raised.argmax(axis=1)], np.inf)
        metrics[f"days to the alarm, {size} in {lasting} days"] = float(np.median(delays))
    return {"metrics": metrics, "speeds": {}}


NEWSWIRE = {  # the classes of Reuters R8, as a reader would name them who has seen none of its texts
    "earn": "company earnings: quarterly profit and loss; dividend",
    "acq": "takeover: company buys another company; bid for shares",
    "grain": "grain: wheat and corn harvest; grain exports",
    "crude": "oil: crude oil price; OPEC output",
    "trade": "foreign trade: trade deficit; tariffs and import quotas",
    "interest": "interest rates: central bank raises or cuts its rate; prime rate",
    "ship": "shipping: ships and ports; strike of seamen",
    "money-fx": "currencies: dollar exchange rate; central bank intervenes in the foreign exchange market",
}


def found(cosines: np.ndarray, truth: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether each text gets a topic, and whether it gets its own (texts,); -1 in `truth` is none of them."""
    given = cosines.max(axis=1) >= least
    return given, np.where(truth < 0, ~given, given & (cosines.argmax(axis=1) == truth))


def one_left_out(cosines: np.ndarray, truth: np.ndarray, least: float) -> float:
    """The mean of the shares of right answers to texts of the topics and of none of them, leaving out each topic."""
    shares = []
    for topic in range(cosines.shape[1]):
        some = np.where(np.arange(cosines.shape[1]) == topic, -1.0, cosines)
        _, right = found(some, np.where(truth == topic, -1, truth), least)
        shares += [right[truth == topic].mean(), right[truth != topic].mean()]
    return float(np.mean(shares))


def topics(parameters: Mapping[str, object]) -> dict:
    """Tells the topics of Reuters R8 by names, two written examples each, or a few of its training texts.

    For each: accuracy and the mean recall of a topic on R8's test texts where no topic is ruled out; with `least`
    (see `Topics`), the share that gets its topic, the share of right ones among those that get any, and the share of
    R52's test texts of other classes that get none. `chosen least` is best on 40 training texts of each topic.
    """
    table = data.drop_duplicates(data.clean(data.load(str(parameters["dataset"])))[0])[0]
    names, written = list(NEWSWIRE), parse(list(NEWSWIRE.values()))
    table["number"] = [names.index(label) if label in NEWSWIRE else -1 for label in table["label"]]
    test = table[table["split"] == "test"]
    train, draw = table[(table["split"] == "train") & (table["number"] >= 0)], {"random_state": parameters["seed"]}
    ways: dict[str, Mapping[str, Sequence[str]]] = {"names": dict.fromkeys(written, ()), "sentences": written}
    for shots in (1, 3, 10):
        drawn = train.groupby("number").sample(shots, **draw).groupby("number")["text"].apply(list)
        ways[f"texts: {shots}"] = dict(zip(written, drawn, strict=True))
    of = partial(Topics, model=str(parameters["model"]), precision="fp32")
    reader = of(written)
    vectors, truth = reader.encoder.embed(test["text"].tolist()), test["number"].to_numpy()
    known, least, metrics = truth >= 0, float(parameters["least"]), {}
    for way, examples in ways.items():
        cosines = of(examples).nearest(vectors)[:, :-1]
        right = pd.Series(cosines.argmax(axis=1) == truth)[known]
        given, kept = found(cosines, truth, least)
        metrics |= {
            f"{way}, accuracy": float(right.mean()),
            f"{way}, mean recall": float(right.groupby(truth[known]).mean().mean()),
            f"{way}, right topic": float(kept[known].mean()),
            f"{way}, right of those with a topic": float(kept[known & given].mean()),
            f"{way}, others ruled out": float(kept[~known].mean()),
        }
    some = train.groupby("number").sample(40, **draw)
    cosines, numbers = reader.nearest(reader.encoder.embed(some["text"].tolist()))[:, :-1], some["number"].to_numpy()
    grid = np.arange(0.2, 0.5, 0.025)
    metrics["chosen least"] = float(max(grid, key=lambda least: one_left_out(cosines, numbers, least)))
    return {"metrics": metrics, "speeds": {}}
