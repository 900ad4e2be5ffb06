"""Sequential detection of surges of negative documents: a CUSUM of likelihood ratios."""

import heapq
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llmprod import LLMProdError
from llmprod.news_monitoring.documents import DAY

State = dict[str, np.ndarray]


class SurgeError(LLMProdError):
    """Probabilities or settings can't be used as they are."""


# The detector


@dataclass(frozen=True)
class Settings:
    """What a CUSUM assumes. Numbers of documents are documents of the one topic that it watches; nats are log units.

    share: the share of negative documents before anything was seen (the mean of a Beta prior of `strength` documents)
    ratio: the surge to be detected, as a multiple of the baseline share; the raised share is 0.95 at most
    prior: the share of negative documents at which the classifier was trained and calibrated
    half_life: documents after which half of the past is forgotten
    gain: step of the baseline's estimate, 1 for sure labels; best is 1 / the share of a label's information that a
        probability holds, which is about a third for a classifier of AUC 0.87: with 1 it learns too slowly
    freeze: from this height of the statistic on (nats) the baseline learns nothing, so that it can't learn a surge
    patience: unless the surge has lasted for so many documents: then it is the new baseline
    blocks: parts of the day with a baseline of their own, which counts as `block_strength` documents at the whole
        day's share; 1 for none
    hard: use labels (probability of at least 0.5) with these `sensitivity` and `specificity` in place of probabilities
    """

    share: float
    ratio: float = 3.0
    prior: float = 0.5
    strength: float = 50.0
    half_life: float = 500.0
    gain: float = 3.0
    freeze: float = 1.0
    patience: int = 200
    blocks: int = 1
    block_strength: float = 100.0
    hard: bool = False
    sensitivity: float = 1.0
    specificity: float = 1.0

    def __post_init__(self) -> None:
        if self.ratio <= 1 or not 0 < self.prior < 1:
            raise SurgeError(f"ratio is {self.ratio} and prior {self.prior}: above 1, and between 0 and 1, are needed.")


def start(settings: Settings, streams: int = 1) -> State:
    """The state before the first document. `negatives` and `counts` hold the whole day, then its blocks."""
    rows = 1 + settings.blocks if settings.blocks > 1 else 1
    return {
        "score": np.zeros(streams),
        "run": np.zeros(streams, dtype=int),
        "evidence": np.zeros(streams),
        "recent": np.zeros(streams),
        "baseline": np.zeros(streams) + settings.share,
        "negatives": np.zeros((rows, streams)),
        "counts": np.zeros((rows, streams)),
    }


def likelihoods(probabilities: np.ndarray, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """The likelihood of each document if it is negative and if it is not, up to a factor that both share.

    For a calibrated probability p and a training prior π their ratio is p / (1 - p) · (1 - π) / π (Saerens et al.
    2002); for a label it follows from the error rates.
    """
    if not settings.hard:
        return probabilities * (1 - settings.prior), (1 - probabilities) * settings.prior
    label, hit, right = probabilities >= 0.5, settings.sensitivity, settings.specificity
    return np.where(label, hit, 1 - hit), np.where(label, 1 - right, right)


def information(share: np.ndarray, settings: Settings) -> np.ndarray:
    """What a quiet document says against a surge on average, in nats.

    The Kullback-Leibler divergence of true classes (where `hard`, of labels) at the baseline share from those in a
    surge, divided by `gain`, since a probability holds but a part of it (see `Settings`).
    """
    quiet, raised = np.asarray(share, dtype=float), np.minimum(settings.ratio * np.asarray(share), 0.95)
    if settings.hard:
        hit, miss = settings.sensitivity, 1 - settings.specificity
        quiet, raised = (np.clip(q * hit + (1 - q) * miss, 1e-9, 1 - 1e-9) for q in (quiet, raised))
    divergence = quiet * np.log(quiet / raised) + (1 - quiet) * np.log((1 - quiet) / (1 - raised))
    return divergence / settings.gain


def rarity(score: np.ndarray, share: np.ndarray, settings: Settings) -> np.ndarray:
    """How many quiet documents pass before the score reaches this height (nats) by chance, about.

    (exp(score) - score - 1) / I, exact for Brownian motion with the drift -I of the score (Siegmund 1985, 2.6); a
    document moves the score by leaps, so that more documents pass than that. Heights of topics with different shares
    can be compared by it: at a low share a document says little, and the same height is much rarer.
    """
    return (np.expm1(score) - score) / information(share, settings)


def height(documents: np.ndarray, share: np.ndarray, settings: Settings) -> np.ndarray:
    """The inverse of `rarity`, in nats; no lower than `freeze`, and than what a single document can add."""
    x = np.asarray(documents * information(share, settings), dtype=float)
    with np.errstate(invalid="ignore"):
        score = np.log1p(x + np.sqrt(2 * x))
        for _ in range(3):  # Newton
            score = score - (np.expm1(score) - score - x) / np.maximum(np.expm1(score), 1e-12)
    score = np.where(np.isfinite(x), score, np.inf)
    return np.maximum(score, max(settings.freeze, math.log(settings.ratio)))


def step(
    state: State, probabilities: np.ndarray, block: np.ndarray, settings: Settings, ceiling: float = math.inf
) -> tuple[State, np.ndarray]:
    """One document in each stream: the next state, and what the document added (its log likelihood ratio, nats).

    With a document's likelihoods a if it is negative and b if not, baseline share q0 and raised share q1 it adds
    log((q1·a + (1 - q1)·b) / (q0·a + (1 - q0)·b)), and the score is max(0, score + that) (Page 1954; Lorden 1971).
    The baseline counts, in place of unknown classes, their posterior under itself: recursive EM (Titterington 1984),
    with steps `gain` times as long, and with forgetting. `recent` is the share of negative documents since the score
    was last 0, by the same recursion, which starts from q1. Shares are kept within 0.001 and 0.9.

    Args:
        state: from `start` or from here
        probabilities: of being negative (streams,)
        block: which part of the day it is (streams,), from 0
        ceiling: the score rises no higher than the `height` of this rarity
    """
    here, (a, b) = np.arange(len(probabilities)), likelihoods(probabilities, settings)
    negatives, counts, row = state["negatives"], state["counts"], 1 + block
    whole = (negatives[0] + settings.strength * settings.share) / (counts[0] + settings.strength)
    q0 = whole
    if settings.blocks > 1:
        strength = settings.block_strength
        q0 = (negatives[row, here] + strength * whole) / (counts[row, here] + strength)
    q0 = np.clip(q0, 0.001, 0.9)
    q1 = np.minimum(settings.ratio * q0, 0.95)
    normal = q0 * a + (1 - q0) * b
    added = np.log((q1 * a + (1 - q1) * b) / normal)
    score = np.clip(state["score"] + added, 0, height(ceiling, q0, settings) if math.isfinite(ceiling) else math.inf)
    run = np.where(score > 0, state["run"] + 1, 0)
    evidence = np.where(score > 0, state["evidence"] + added, 0)  # as the score, but for the ceiling

    # decided before the document is seen, or high probabilities would be left out more often than low ones
    learn = (state["score"] < settings.freeze) | (state["run"] >= settings.patience)
    keep = np.where(learn, 0.5 ** (1 / settings.half_life), 1.0)
    negatives, counts = negatives * keep, counts * keep
    for place in [0] if settings.blocks == 1 else [0, (row, here)]:
        negatives[place] += learn * (q0 + settings.gain * (q0 * a / normal - q0))
        counts[place] += learn

    recent = np.where(state["run"] > 0, state["recent"], q1)
    posterior = recent * a / (recent * a + (1 - recent) * b)
    recent = np.clip(recent + settings.gain * (posterior - recent) / (run + settings.gain), 0.001, 0.999)
    names = ("score", "run", "evidence", "recent", "baseline", "negatives", "counts")
    return dict(zip(names, (score, run, evidence, recent, q0, negatives, counts), strict=True)), added


class Evidence(NamedTuple):
    """The path of a CUSUM: its score (nats) and the baseline share at each document (streams, documents)."""

    score: np.ndarray
    baseline: np.ndarray
    settings: Settings


def cusum(
    probabilities: np.ndarray, settings: Settings, times: np.ndarray | None = None, ceiling: float = math.inf
) -> Evidence:
    """The CUSUM's path: there is an alarm where the score is as high as the `height` of a threshold.

    Args:
        probabilities: of being negative (streams, documents)
        settings: `share` may be an array (streams,)
        times: in seconds (streams, documents)
        ceiling: see `step`; live it is the threshold, so that an alarm ends soon after its surge

    Raises SurgeError if the settings have blocks of the day and there are no times.
    """
    if times is None and settings.blocks > 1:
        raise SurgeError("A baseline for each part of the day needs the documents' times.")
    blocks = np.zeros(probabilities.shape, dtype=int) if times is None else part_of_day(times, settings.blocks)
    state, path = start(settings, len(probabilities)), []
    for column, block in zip(np.ascontiguousarray(probabilities.T), blocks.T, strict=True):
        state, _ = step(state, column, block, settings, ceiling)
        path.append((state["score"], state["baseline"]))
    return Evidence(*np.stack(path, axis=-1), settings)


def part_of_day(times: np.ndarray, blocks: int) -> np.ndarray:
    """The part of the day (UTC), from 0 to blocks - 1, of times in seconds since 1970."""
    return (np.asarray(times) % DAY * blocks // DAY).astype(int)


def switch(on: Any, wait: Any, statistic: Any, threshold: Any, release: float, cooldown: int) -> tuple[Any, Any, Any]:
    """One document later: whether the alarm is on, documents of cool-down left, and whether the alarm was raised now.

    An alarm is raised where the statistic reaches the threshold and no cool-down is left, and stays on until the
    statistic is under release · threshold (hysteresis). Numbers or arrays.
    """
    now = np.where(on, statistic >= release * threshold, (statistic >= threshold) & (wait <= 0))
    raised = now & ~np.asarray(on)
    return now, np.where(raised, cooldown, np.maximum(wait - 1, 0)), raised


class Alert(NamedTuple):
    """A surge: what a reader is shown.

    time, since: of the last document, and of the first one after the change point (where the statistic was last 0)
    documents: how many there were since the change point
    baseline, share: the share of negative documents, normally and since the change point (estimates)
    severity: share / baseline; too high when the alarm is raised, because it is raised where documents look worst
    evidence: log likelihood ratio of a surge since the change point (nats)
    causes: [document, its part of the evidence (nats)], the largest first
    """

    time: float
    since: float
    documents: int
    baseline: float
    share: float
    severity: float
    evidence: float
    causes: list[list]


@dataclass
class Cusum:
    """A CUSUM that watches one topic live. `asdict` gives its state for JSON, `from_dict` takes it back.

    threshold: the `rarity` that raises an alarm, in documents, and the ceiling; choose it with `operating_curve`
    release, cooldown: see `switch`; the cool-down is in documents
    keep: how many causes are remembered
    """

    settings: Settings
    threshold: float
    release: float = 0.5
    cooldown: int = 0
    keep: int = 5
    on: bool = False
    wait: int = 0
    seen: int = 0
    since: float | None = None
    causes: list[list] = field(default_factory=list)
    state: dict[str, list] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = self.state or {name: value.tolist() for name, value in start(self.settings).items()}

    def update(self, time: float, probability: float, document: str | int | None = None) -> Alert | None:
        """Takes the next document; an Alert if it raises the alarm.

        Args:
            time: in seconds since 1970
            probability: the classifier's, of being negative
            document: its id in `causes`; its number in the stream, from 0, if there is none

        Raises SurgeError for what is no probability.
        """
        if not 0 <= probability <= 1:
            raise SurgeError(f"{probability} is no probability: it must be between 0 and 1.")
        before = {name: np.array(value) for name, value in self.state.items()}
        block = part_of_day(np.array([time]), self.settings.blocks)
        after, added = step(before, np.array([probability]), block, self.settings, self.threshold)
        self.state = {name: value.tolist() for name, value in after.items()}
        if after["run"][0] <= 1:
            self.since, self.causes = (float(time) if after["run"][0] else None), []
        if added[0] > 0:
            cause = [self.seen if document is None else document, float(added[0])]
            self.causes = heapq.nlargest(self.keep, [*self.causes, cause], key=lambda pair: pair[1])
        self.seen += 1
        limit = height(self.threshold, after["baseline"], self.settings)[0]
        on, wait, raised = switch(self.on, self.wait, after["score"][0], limit, self.release, self.cooldown)
        self.on, self.wait = bool(on), int(wait)
        return self.describe(time) if raised else None

    def describe(self, time: float) -> Alert:
        """The surge as it stands, for an alarm that is on."""
        now = {name: value[0] for name, value in self.state.items()}
        severity = now["recent"] / now["baseline"]
        shares = (now["baseline"], now["recent"], severity)
        return Alert(float(time), self.since, now["run"], *shares, now["evidence"], self.causes)

    @classmethod
    def from_dict(cls, saved: dict) -> "Cusum":
        """The detector that `dataclasses.asdict` was called on."""
        return cls(**saved | {"settings": Settings(**saved["settings"])})
