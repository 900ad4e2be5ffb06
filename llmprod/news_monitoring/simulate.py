"""How good a detector is: simulated streams, operating curves, paired comparisons."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.signal import lfilter

from llmprod.news_monitoring import shift
from llmprod.news_monitoring.documents import DAY, NewsError
from llmprod.news_monitoring.surge import Evidence, arl, hysteresis, threshold_for_arl

# Baseline detectors: functions of the whole stream; `values` are probabilities or labels (streams, documents)


def rolling_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` documents, for an alarm at a fixed threshold; -inf before there are as many."""
    total = np.pad(np.cumsum(values, axis=1, dtype=float), ((0, 0), (1, 0)))
    means = (total[:, window:] - total[:, :-window]) / window
    return np.pad(means, ((0, 0), (window - 1, 0)), constant_values=-np.inf)


def z_score(values: np.ndarray, window: int, past: int) -> np.ndarray:
    """How many standard errors the last `window` documents are above the `past` before them; -inf until there are."""
    mean, square = rolling_mean(values, past), rolling_mean(values**2, past)
    with np.errstate(invalid="ignore"):
        # without the floor a past without any negative document divides by 0
        error = np.sqrt(np.maximum(square - mean**2, 0.01) / window)
        z = (rolling_mean(values, window)[:, window:] - mean[:, :-window]) / error[:, :-window]
    return np.pad(np.where(np.isfinite(z), z, -np.inf), ((0, 0), (window, 0)), constant_values=-np.inf)


def ewma(values: np.ndarray, weight: float, centre: float) -> np.ndarray:
    """The exponentially weighted moving average, less its centre, from which it starts (Roberts 1959)."""
    return lfilter([weight], [1, weight - 1], values - centre, axis=1)


# Simulation


class Streams(NamedTuple):
    """Streams of one topic (streams, documents): `scores`, numbers of the `documents`, `negative`, `times` (seconds).

    starts: where each surge starts (streams,)
    """

    scores: np.ndarray
    starts: np.ndarray
    documents: np.ndarray
    negative: np.ndarray
    times: np.ndarray


def simulate(
    scores: np.ndarray,
    negative: np.ndarray,
    weeks: int,
    per_week: int,
    baseline: float | np.ndarray,
    ratio: float,
    length: int,
    rng: np.random.Generator,
    history: int = 0,
) -> Streams:
    """Weeks of a topic, made of held-out documents, each with one surge of known start, size and length.

    At each position the class is drawn, then a document of the class, with replacement.

    Args:
        scores, negative: a model's probability of being negative, and the truth, of held-out documents (n,)
        weeks, per_week: streams, and documents in each after `history` quiet ones
        baseline, ratio: share of negative documents, of all streams or of each (weeks,), and what it is multiplied by
            in the surge; 1 for quiet streams. A share is 0.95 at most
        length: documents of the surge, which lies in the week wholly, after at least one quiet document

    Raises NewsError if a surge doesn't fit into a week, or there are no documents of a class.
    """
    pools = [np.flatnonzero(~np.asarray(negative, dtype=bool)), np.flatnonzero(negative)]
    if not 0 < length < per_week or not all(map(len, pools)):
        raise NewsError("A surge must be shorter than a week, and documents of both classes are needed.")
    shape = (weeks, history + per_week)
    starts = history + rng.integers(1, per_week - length + 1, size=weeks)
    times = np.sort(rng.random(shape), axis=1) * 7 * DAY * shape[1] / per_week
    position = np.arange(shape[1]) - starts[:, None]
    raised = np.where((position >= 0) & (position < length), ratio, 1.0)
    truth = rng.random(shape) < np.minimum(np.reshape(baseline, (-1, 1)) * raised, 0.95)
    documents = np.where(truth, rng.choice(pools[1], shape), rng.choice(pools[0], shape))
    return Streams(np.asarray(scores)[documents], starts, documents, truth, times)


def quiet_days(
    streams: int, a_day: int, days: int, alike: float, seed: int | list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Ratings of so many streams (streams, documents), normal ones of variance 1, and each document's day (documents,).

    alike: the standard deviation of the mood that the documents of a day share, in addition to their own.
    """
    random, dates = np.random.default_rng(seed), np.arange(a_day * days) // a_day
    moods = alike * random.standard_normal((streams, days))
    return random.standard_normal((streams, len(dates))) + moods[:, dates], dates


def made_years(
    values: np.ndarray, days: np.ndarray, years: int, seed: int | list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Years (years, documents) made of quiet days, each after the days of a warm-up, and the documents' days.

    Days are drawn with replacement, so that documents of one day stay together (a block bootstrap).

    Args:
        values, days: as in `shift.replay`, of the quiet part (documents,); each day counts with as many documents as
            the one with the fewest
    """
    numbers, counts = np.unique(days, return_counts=True)
    blocks = np.stack([values[days == day][: counts.min()] for day in numbers])
    length = 365 + round(shift.Settings().days)
    drawn = np.random.default_rng(seed).integers(0, len(blocks), (years, length))
    return blocks[drawn].reshape(years, -1), np.repeat(np.arange(length), counts.min())


def quiet_years(
    values: np.ndarray, days: np.ndarray, keys: int, years: int, allowed: float = 1.0, seed: int = 0
) -> float:
    """False alarms a year of so many keys together, the whole stream among them, on years of `made_years`.

    Keys are independent of each other, which is the worst case. `allowed`: false alarms a year that are asked for.
    """
    raised, some = 0.0, max(1, 500 // years)
    for first in range(0, keys, some):  # a few keys at a time, for the memory
        names = ["one of them" if key else shift.WHOLE for key in range(first, min(first + some, keys))]
        mine = allowed * np.repeat([shift.part(name, keys - 1) for name in names], years)
        streams, calendar = made_years(values, days, len(mine), [seed, first])
        raised += shift.replay(streams, calendar, mine, shift.Settings())["raised"].sum()
    return float(raised / years)


# Evaluation


class Outcomes(NamedTuple):
    """What a detector does at each threshold, first on the quiet streams, then on those with a surge.

    false: alarms where there is no surge (streams, thresholds)
    exposure: documents that could have raised one (streams,)
    delays: documents from the first one of the surge to the alarm, both counted; inf without one (surges, thresholds)
    thresholds: in ascending order
    """

    false: np.ndarray
    exposure: np.ndarray
    delays: np.ndarray
    thresholds: np.ndarray

    def rates(self, weights: np.ndarray) -> np.ndarray:
        """False alarms per document (..., thresholds), with each stream counted `weights` times (..., streams)."""
        return weights @ self.false / (weights @ self.exposure)[..., None]


def outcomes(
    quiet: np.ndarray | Evidence,
    surging: np.ndarray | Evidence,
    starts: np.ndarray,
    length: int,
    thresholds: np.ndarray,
    skip: int = 0,
    release: float = 0.5,
) -> Outcomes:
    """Plays the alarm through at every threshold, as the live detector does.

    An alarm before the surge is false; it must end before there can be one that counts as a detection.

    Args:
        quiet, surging: a detector's statistic (streams, documents), or a CUSUM's path without a cap, for which a
            threshold is an ARL and the cap of the score, as it is live
        starts, length: of the surges; only an alarm that is raised in the surge detects it
        skip: documents at the beginning in which detectors warm up, and false alarms are not counted
    """

    def play(statistic: np.ndarray | Evidence, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        path = statistic if isinstance(statistic, Evidence) else None
        values, limits = (path.score if path else statistic), thresholds
        shape, begin = (len(values), len(thresholds)), starts[:, None]
        on, false, delays = np.zeros(shape, dtype=bool), np.zeros(shape), np.full(shape, np.inf)
        level, before = np.zeros(shape), np.zeros((shape[0], 1))
        for position, column in enumerate(values.T[:, :, None]):
            if path:
                limits = threshold_for_arl(thresholds, path.baseline[:, position, None], path.settings)
            # A CUSUM with a cap makes the same steps as one without: it is the lower one, so at 0 whenever that is.
            level = np.clip(level + column - before, 0, limits) if path else column
            was, on = on, hysteresis(on, level, limits, release)
            raised, before = on & ~was, column
            false += raised & (skip <= position) & (position < begin)
            inside = raised & (begin <= position) & (position < begin + length)
            delays = np.where(inside & np.isinf(delays), position - begin + 1, delays)
        return false, delays

    thresholds = np.sort(np.asarray(thresholds, dtype=float))
    score = quiet.score if isinstance(quiet, Evidence) else quiet
    ends = np.full(len(score), score.shape[1])
    false, (early, delays) = play(quiet, ends)[0], play(surging, starts)
    exposure = np.maximum(np.concatenate([ends, starts]) - skip, 0)
    return Outcomes(np.concatenate([false, early]), exposure, delays, thresholds)


def candidate_thresholds(quiet: np.ndarray | Evidence, skip: int = 0, number: int = 101) -> np.ndarray:
    """Quantiles of the highest value in each quiet stream, so that there are few false alarms.

    The last threshold is infinite and never raises an alarm: it keeps to any rate of false alarms.
    """
    values = arl(*quiet) if isinstance(quiet, Evidence) else quiet
    highest = values[:, skip:].max(axis=1)
    return np.append(np.unique(np.quantile(highest[highest > 0], np.linspace(0, 1, number))), np.inf)


def operating_curve(played: Outcomes, documents_per_week: float, resamples: int = 500, seed: int = 0) -> pd.DataFrame:
    """False alarms against delay, a row for each threshold.

    Columns: `threshold`; `false alarms a week`; `median delay` in documents of the topic, over all surges, of which
    one that is not detected counts as inf, and its 95 % bootstrap interval (`, low` and `, high`); `detected`, the
    share of surges.
    """
    surges = len(played.delays)
    draws = np.random.default_rng(seed).integers(0, surges, (resamples, surges))
    # one threshold at a time, or the drawn delays would fill the memory
    medians = np.stack([np.median(column[draws], axis=1) for column in played.delays.T], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975], axis=0, method="nearest")  # inf can't be interpolated
    return pd.DataFrame(
        {
            "threshold": played.thresholds,
            "false alarms a week": documents_per_week * played.rates(np.ones(len(played.false))),
            "median delay": np.median(played.delays, axis=0),
            "median delay, low": low,
            "median delay, high": high,
            "detected": np.isfinite(played.delays).mean(axis=0),
        }
    )


def _lowest(rates: np.ndarray, most: float) -> int:
    """The number of the lowest threshold from which on rates are at most `most`; NewsError if there is none.

    Not simply the first: below it an alarm may never end, so that there are few false alarms as well.
    """
    if rates[-1] > most:
        raise NewsError(f"No threshold keeps to {most} false alarms a week; try higher ones.")
    return int(np.append(np.flatnonzero(rates > most), -1).max()) + 1


def delay_at(curve: pd.DataFrame, false_alarms: float = 1.0) -> pd.Series:
    """The row of an operating curve with the lowest threshold that keeps to so many false alarms a week.

    Raises NewsError if none does.
    """
    return curve.iloc[_lowest(curve["false alarms a week"].to_numpy(), false_alarms)]


def judge(
    variants: Sequence[Callable[[Streams], np.ndarray | Evidence]],
    quiet: Streams,
    surging: Streams,
    length: int,
    per_week: int,
    skip: int,
    release: float = 0.5,
) -> tuple[pd.DataFrame, Outcomes]:
    """Operating curve and outcomes of the variant that is fastest at one false alarm a week, the first one in a tie.

    Args:
        variants: one detector with several windows, each as a function from streams to its statistic
        length, skip, release: see `outcomes`
    """
    best = None
    for variant in variants:
        statistics = variant(quiet), variant(surging)
        thresholds = candidate_thresholds(statistics[0], skip, number=51)
        played = outcomes(*statistics, surging.starts, length, thresholds, skip, release)
        curve = operating_curve(played, per_week)
        if best is None or delay_at(curve)["median delay"] < delay_at(best[0])["median delay"]:
            best = curve, played
    return best


def compare(
    one: Outcomes,
    other: Outcomes,
    documents_per_week: float,
    false_alarms: float = 1.0,
    resamples: int = 500,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The difference of median delays (one - other) at equal false alarms a week, and its 95 % bootstrap interval.

    Both detectors saw the same streams, which are resampled in pairs; each resample chooses the thresholds anew. It is
    NaN where neither detects half of the surges. Raises NewsError if no threshold keeps to the false alarms.
    """
    quiet, surges = len(one.false) - len(one.delays), len(one.delays)

    def delay(played: Outcomes, weights: np.ndarray, rows: np.ndarray) -> float:
        chosen = _lowest(documents_per_week * played.rates(weights), false_alarms)
        return float(np.median(played.delays[rows, chosen]))

    def difference(quiet_rows: np.ndarray, rows: np.ndarray) -> float:
        drawn = np.bincount(np.concatenate([quiet_rows, quiet + rows]), minlength=quiet + surges).astype(float)
        first, second = delay(one, drawn, rows), delay(other, drawn, rows)
        return math.nan if math.isinf(first) and math.isinf(second) else first - second

    rng = np.random.default_rng(seed)
    draws = [difference(rng.integers(0, quiet, quiet), rng.integers(0, surges, surges)) for _ in range(resamples)]
    low, high = np.quantile(draws, [0.025, 0.975], method="nearest")
    return difference(np.arange(quiet), np.arange(surges)), float(low), float(high)
