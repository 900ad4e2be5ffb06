"""Sequential detection of a shift of a stream's mood: a CUSUM of ratings, standardised by the stream's own past."""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from scipy.special import expit, logit

from llmprod.news_monitoring.documents import DAY, NewsError
from llmprod.news_monitoring.surge import Alert, State, exponent, hysteresis

YEAR = 365.25  # days
GAP = 7  # days without a document count as at most so many, so that no date makes a stream older than it is
WHOLE = "all news"  # the key of the whole stream


@dataclass(frozen=True)
class Settings:
    """What the test of a key assumes. A key is the whole stream, a topic, a company or a currency.

    drift: half the shift to be found, in standard deviations of a document's rating: .1 finds one of .2 soonest;
        chosen on simulated streams (the study `simulated-shifts`)
    warmup, days: documents and days from which level and spread are learnt before the test begins
    memory: documents of the past that count for level and spread later on
    cut: a rating counts as at most so many standard deviations from the level, so that no outlier raises an alarm
    prior: days for which a day's ratings are assumed to be independent, before the stream itself has told
    patience: a shift that has lasted for so many documents is the new level
    """

    drift: float = 0.075
    warmup: int = 100
    days: float = 28.0
    memory: float = 2000.0
    cut: float = 3.0
    prior: float = 10.0
    patience: int = 1000

    def __post_init__(self) -> None:
        if not (self.drift > 0 and self.warmup > 1 and self.days >= 0 and self.memory >= self.warmup):
            raise NewsError(f"{self}: drift and warmup must be above 0, and memory at least warmup.")


def threshold(every: np.ndarray, settings: Settings) -> np.ndarray:
    """The score at which to raise an alarm for one false alarm in so many documents.

    The in-control average run length of a CUSUM of independent normal values of variance 1 and mean -d, started at 0,
    is (exp(y) - y - 1) / (2 d²) with y = 2 d (threshold + 1.166) (Siegmund 1985, 2.6 and 10.16). That level and spread
    are estimates is in the score (`step`).
    """
    height = exponent(2 * settings.drift**2 * np.asarray(every, dtype=float)) / (2 * settings.drift)
    return np.maximum(height - 1.166, settings.cut)


KNOWN = ("count", "mean", "squares", "ratio", "dates")


def start(streams: int = 1) -> State:
    """The state of so many streams before the first document, an array (streams,) for each name.

    count, mean, squares: documents that were learnt, with forgetting; their mean; sum of their squared deviations
    ratio, dates: sum over days of a day's squared sum of deviations, as a multiple of what independent documents
        have; and the number of days
    held_count and so on: the same of what is not learnt yet
    sum, number, before, mean_before: of the current day: deviations, documents, and count and mean at its beginning
    score, run: the CUSUM, and documents since it was last 0
    """
    others = ["sum", "number", "before", "mean_before", "score", "run"]
    return {name: np.zeros(streams) for name in (*KNOWN, *map("held_{}".format, KNOWN), *others)}


def close_day(state: State, settings: Settings) -> State:
    """Judges at a day's end how much documents of one day resemble each other.

    With n documents of the day, variance s² and N learnt before, the squared sum of n independent deviations is
    n s² (1 + n / N) on average. News of one day are alike, and the ratio says by how much; the test divides by it.
    """
    number, before = state["number"], state["before"]
    counts = (number > 0) & (before >= settings.warmup)
    variance = state["squares"] / np.maximum(state["count"], 1)
    expected = np.maximum(number * variance * (1 + number / np.maximum(before, 1)), 1e-9)
    ended = {"held_ratio": state["held_ratio"] + np.where(counts, state["sum"] ** 2 / expected, 0)}
    ended |= {"held_dates": state["held_dates"] + counts, "sum": 0 * number, "number": 0 * number}
    return state | ended | {"before": state["count"], "mean_before": state["mean"]}


def learn(state: State, which: np.ndarray, memory: np.ndarray) -> State:
    """In some of the streams (streams,), what was held back becomes known; of the past, `memory` documents stay.

    Mean and squared deviations of both together are those of Chan, Golub and LeVeque (1983).
    """
    held = {name: state[f"held_{name}"] for name in KNOWN}
    keep = (1 - 1 / memory) ** held["count"]
    count, moved = keep * state["count"], held["mean"] - state["mean"]
    share = held["count"] / np.maximum(count + held["count"], 1)
    together = {name: state[name] + held[name] for name in ("ratio", "dates")}
    together |= {"count": count + held["count"], "mean": state["mean"] + share * moved}
    together["squares"] = keep * state["squares"] + held["squares"] + share * count * moved**2
    together |= {f"held_{name}": np.zeros(len(which)) for name in KNOWN}
    return state | {name: np.where(which, value, state[name]) for name, value in together.items()}


def step(state: State, values: np.ndarray, limit: np.ndarray, settings: Settings) -> tuple[State, np.ndarray]:
    """One document in each stream: the next state, and its standardised rating, positive for bad news.

    The score is max(0, score + rating - drift) (Page 1954), with the rating's distance from the level in standard
    deviations of a document, divided by the root of `close_day`'s ratio and by that of 1 + n / N: the variance of the
    sum of n documents' distances from a level that was estimated from N is n s² (1 + n / N).

    Args:
        state: from `start` or from here
        values: the higher, the worse the news (streams,), on a scale on which quiet news are roughly normal
        limit: the threshold (streams,), which the score does not exceed; inf in the warm-up, in which it stays 0
    """
    spread = np.sqrt(np.maximum(state["squares"] / np.maximum(state["count"], 1), 1e-9))
    alike = np.sqrt((settings.prior + state["ratio"]) / (settings.prior + state["dates"]))
    testing = np.isfinite(limit)
    away = np.where(testing, np.clip((values - state["mean"]) / spread, -settings.cut, settings.cut), 0)
    estimated = np.sqrt(1 + state["run"] / np.maximum(state["count"], 1))
    score = np.where(testing, np.clip(state["score"] + away / (alike * estimated) - settings.drift, 0, limit), 0)
    after = {"score": score, "run": np.where(score > 0, state["run"] + 1, 0)}

    # A document is learnt when the score is back at 0: while it stands higher, it may belong to a shift.
    kept = np.where(testing, state["mean"] + away * spread, values)  # without outliers
    count, moved = state["held_count"] + 1, kept - state["held_mean"]
    mean = state["held_mean"] + moved / count
    after |= {"held_count": count, "held_mean": mean, "held_squares": state["held_squares"] + moved * (kept - mean)}
    after |= {"sum": state["sum"] + kept - state["mean_before"], "number": state["number"] + 1}
    due = (score == 0) | (after["run"] >= settings.patience)
    memory = np.where(testing, settings.memory, math.inf)
    return learn(state | after, due, memory), away


@dataclass
class Shift:
    """A test of one key, live. `asdict` gives its state for JSON, `with_past` reads it back.

    allowed: false alarms a year; may be changed between documents, as `part` says
    release: an alarm ends below this share of the threshold, and the score starts again from 0
    keep: how many of the worst documents an alert has
    longest: days that are remembered of those since the score was last 0
    seen, day, age: how many documents there were, the day of the last, and the days from the first to it
    days: of each such day [time of its first document, documents, sum of their ratings, the worst: [document, rating]]
    """

    name: ClassVar[str] = "shift, "  # of its state in a journal, before the key
    settings: Settings
    allowed: float
    release: float = 0.5
    keep: int = 5
    on: bool = False
    seen: int = 0
    day: int = 0
    age: int = 0
    longest: int = 60
    days: list[list] = field(default_factory=list)
    state: dict[str, list] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = self.state or {name: value.tolist() for name, value in start().items()}

    @property
    def ready(self) -> bool:
        """Whether the warm-up is over."""
        return self.seen >= self.settings.warmup and self.age >= self.settings.days

    def limit(self) -> float:
        """The threshold of now: the allowed false alarms a year, in documents of this key; inf in the warm-up."""
        if not self.ready:
            return math.inf
        return float(threshold(self.seen / (self.age + 1) * YEAR / self.allowed, self.settings))

    def update(self, time: float, probability: float, document: str | int | None = None) -> Alert | None:
        """Sees the next document; an Alert if it raises the alarm. Arguments as in `surge.Cusum.update`.

        The log odds of a calibrated probability are a straight line of the rating (`PlattScaling`), so that both give
        the same standardised rating.
        """
        if not 0 <= probability <= 1:
            raise NewsError(f"{probability} is not a probability: it must be between 0 and 1.")
        before, day = {name: np.array(value) for name, value in self.state.items()}, int(time // DAY)
        if day > self.day or not self.seen:
            before = close_day(before, self.settings)
            self.age += min(day - self.day, GAP) if self.seen else 0
            self.day = day
        limit = self.limit()
        value = logit(np.clip([probability], 0.001, 0.999))
        after, away = step(before, value, np.array([limit]), self.settings)
        was, self.on = self.on, bool(hysteresis(self.on, after["score"][0], limit, self.release))
        if was and not self.on:  # it starts again, so that one long shift is not told twice
            after |= {name: np.zeros(1) for name in ("score", "run")}
        self.state = {name: value.tolist() for name, value in after.items()}
        self._remember(float(time), self.seen if document is None else document, float(away[0]))
        self.seen += 1
        return None if was or not self.on else self.alert(float(time))

    def _remember(self, time: float, document: str | int, rating: float) -> None:
        """Keeps what an alert will need of the days since the score was last 0."""
        if self.state["run"][0] <= 1:
            self.days = []
        if self.state["run"][0] == 0:
            return
        if not self.days or self.day > self.days[-1][0] // DAY:
            self.days = [*self.days, [time, 0, 0.0, []]][-self.longest :]
        start, number, total, worst = self.days[-1]
        worst = heapq.nlargest(self.keep, [*worst, [document, rating]], key=lambda pair: pair[1])
        self.days[-1] = [start, number + 1, total + rating, worst]

    def alert(self, time: float) -> Alert:
        """What a reader is told of an alarm that was raised now.

        The shift began on the day from which on the ratings are the least likely for quiet ones: where their sum is
        the largest against the root of their number (the likelihood ratio of a shift of unknown size).
        """
        numbers, sums = (np.array([day[k] for day in self.days])[::-1].cumsum()[::-1] for k in (1, 2))
        since = int(np.argmax(sums / np.sqrt(numbers)))
        documents, size = int(numbers[since]), float(sums[since] / numbers[since])
        causes = heapq.nlargest(self.keep, (pair for day in self.days[since:] for pair in day[3]), key=lambda p: p[1])
        now = {name: value[0] for name, value in self.state.items()}
        spread = math.sqrt(now["squares"] / now["count"])
        usual, lately = float(expit(now["mean"])), float(expit(now["mean"] + size * spread))
        rare = f"{12 / self.allowed:.0f} months" if self.allowed > 0.5 else f"{1 / self.allowed:.0f} years"
        said = f"{size:.1f} standard deviations worse than its usual level; expected by chance once in {rare}"
        return Alert(time, self.days[since][0], documents, usual, lately, size, now["score"], causes, said)

    def with_past(self, saved: dict) -> "Shift":
        """The detector that `dataclasses.asdict` was called on, with the settings of this one.

        A name that its state lacks, since an earlier version wrote it, is as at the start.
        """
        state = self.state | {name: value for name, value in saved["state"].items() if name in self.state}
        return Shift(**saved | {"settings": self.settings, "allowed": self.allowed, "state": state})


def allowing(a_month: float) -> Callable[[str], Shift]:
    """Makes detectors for keys that may raise so many false alarms a month together. Raises NewsError for none."""
    if not 0 < a_month < math.inf:
        raise NewsError(f"false-alarms is {a_month:g}: give a number a month above 0, such as 0.1.")
    return lambda key: Shift(Settings(), 12 * a_month)


def part(key: str, ready: int) -> float:
    """The part of the allowed false alarms that a key has, when so many keys besides the whole stream are tested.

    The whole stream has half of them and the others share a quarter (Bonferroni). Not the other half: a key that may
    raise an alarm in many years only raises two to five times as many in the first year, in which its level is least
    sure (the study `simulated-shifts`). Until another key is tested the whole stream has all.
    """
    return (1 / 2 if key == WHOLE else 1 / (4 * ready)) if ready else 1.0


def replay(
    values: np.ndarray, days: np.ndarray, allowed: np.ndarray, settings: Settings, release: float = 0.5
) -> State:
    """Many streams at once, as `Shift` sees them: `score`, `limit` and `raised` (streams, documents).

    Args:
        values: as in `step` (streams, documents)
        days: of the documents, in ascending order (documents,)
        allowed: false alarms a year, of all streams or of each (streams,)
    """
    state, on = start(len(values)), np.zeros(len(values), dtype=bool)
    ages = np.minimum(np.diff(days, prepend=days[:1]), GAP).cumsum()
    found = {name: np.zeros(values.shape) for name in ("score", "limit", "raised")}
    limit = np.full(len(values), math.inf)
    for number, (age, column) in enumerate(zip(ages, values.T, strict=True)):
        if number and age > ages[number - 1]:
            state = close_day(state, settings)
        if number >= settings.warmup and age >= settings.days:
            a_year = number / (age + 1) * YEAR
            limit = np.broadcast_to(threshold(a_year / allowed, settings), len(values))
        state, _ = step(state, column, limit, settings)
        was, on = on, hysteresis(on, state["score"], limit, release)
        ended = was & ~on
        state |= {name: np.where(ended, 0, state[name]) for name in ("score", "run")}
        for name, value in (("score", state["score"]), ("limit", limit), ("raised", on & ~was)):
            found[name][:, number] = value
    return found
