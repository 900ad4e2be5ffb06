"""Sequential detection of surges of negative documents: a CUSUM of log likelihood ratios."""

import heapq
import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np

from llmprod.news_monitoring.documents import NewsError

State = dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """What a CUSUM assumes. Numbers of documents are documents of the one topic that it watches; nats are log units.

    share: the share of negative documents before anything was seen (the mean of a Beta prior of `strength` documents)
    ratio: the surge to be detected, as a multiple of the baseline share; the raised share is 0.95 at most
    prior: the share of negative documents at which the classifier was trained and calibrated
    half_life: documents after which half of the past is forgotten
    gain: step of the baseline's estimate, 1 for true classes; best is 1 / the share of a class's information that a
        probability holds, which is about a third for a classifier of AUC 0.87: with 1 it learns too slowly
    freeze: at this score (nats) and above the baseline learns nothing, so that it can't learn a surge
    patience: unless the surge has lasted for so many documents: then it is the new baseline
    """

    share: float
    ratio: float = 3.0
    prior: float = 0.5
    strength: float = 50.0
    half_life: float = 500.0
    gain: float = 3.0
    freeze: float = 1.0
    patience: int = 200

    def __post_init__(self) -> None:
        if self.ratio <= 1 or not 0 < self.prior < 1:
            raise NewsError(f"ratio is {self.ratio} and prior {self.prior}: above 1, and between 0 and 1, are needed.")


def kl_drift(share: np.ndarray, settings: Settings) -> np.ndarray:
    """The mean decrease of the score per quiet document, in nats (before it is cut off at 0).

    The Kullback-Leibler divergence of true classes at the baseline share from those in a surge, divided by `gain`,
    since a probability holds only part of a class's information (see `Settings`).
    """
    quiet, raised = np.asarray(share, dtype=float), np.minimum(settings.ratio * np.asarray(share), 0.95)
    divergence = quiet * np.log(quiet / raised) + (1 - quiet) * np.log((1 - quiet) / (1 - raised))
    return divergence / settings.gain


def arl(score: np.ndarray, share: np.ndarray, settings: Settings) -> np.ndarray:
    """Approximate in-control average run length (ARL₀): quiet documents until the score first reaches this level.

    (exp(score) - score - 1) / I, exact for Brownian motion with drift -I (Siegmund 1985, 2.6). Documents move the
    score in jumps, so the true run length is longer. It makes topics with different shares comparable: at a low share
    a document says little, and the same score is much rarer.
    """
    return (np.expm1(score) - score) / kl_drift(share, settings)


def exponent(x: np.ndarray) -> np.ndarray:
    """The y with exp(y) - y - 1 = x, by Newton's method."""
    with np.errstate(invalid="ignore"):
        y = np.log1p(x + np.sqrt(2 * x))
        for _ in range(3):
            y = y - (np.expm1(y) - y - x) / np.maximum(np.expm1(y), 1e-12)
    return np.where(np.isfinite(x), y, np.inf)


def threshold_for_arl(documents: np.ndarray, share: np.ndarray, settings: Settings) -> np.ndarray:
    """The inverse of `arl`, in nats; not below `freeze`, nor below what a single document can add."""
    score = exponent(np.asarray(documents * kl_drift(share, settings), dtype=float))
    return np.maximum(score, max(settings.freeze, math.log(settings.ratio)))


def start(settings: Settings, streams: int = 1) -> State:
    """The state of so many streams before the first document, an array (streams,) for each name."""
    state = {name: np.zeros(streams) for name in ("score", "evidence", "recent", "negatives", "counts")}
    return state | {"run": np.zeros(streams, dtype=int), "baseline": np.zeros(streams) + settings.share}


def step(
    state: State, probabilities: np.ndarray, settings: Settings, cap: float = math.inf
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
        cap: the score rises no higher than the threshold for this ARL
    """
    # The likelihood ratio of a calibrated probability p is p / (1 - p) · (1 - prior) / prior (Saerens et al. 2002).
    a, b = probabilities * (1 - settings.prior), (1 - probabilities) * settings.prior
    negatives, counts = state["negatives"], state["counts"]
    # The baseline: counted documents, and the prior's `strength` as pseudo-counts.
    q0 = np.clip((negatives + settings.strength * settings.share) / (counts + settings.strength), 0.001, 0.9)
    q1 = np.minimum(settings.ratio * q0, 0.95)
    normal = q0 * a + (1 - q0) * b
    added = np.log((q1 * a + (1 - q1) * b) / normal)
    score = np.clip(state["score"] + added, 0, threshold_for_arl(cap, q0, settings) if math.isfinite(cap) else math.inf)
    run = np.where(score > 0, state["run"] + 1, 0)  # documents since the change point
    evidence = np.where(score > 0, state["evidence"] + added, 0)  # like the score, without the cap

    # Whether to learn is decided before the document counts, or high probabilities would be left out more often.
    learn = (state["score"] < settings.freeze) | (state["run"] >= settings.patience)
    keep = np.where(learn, 0.5 ** (1 / settings.half_life), 1.0)
    negatives = negatives * keep + learn * (q0 + settings.gain * (q0 * a / normal - q0))
    counts = counts * keep + learn

    recent = np.where(state["run"] > 0, state["recent"], q1)
    posterior = recent * a / (recent * a + (1 - recent) * b)
    recent = np.clip(recent + settings.gain * (posterior - recent) / (run + settings.gain), 0.001, 0.999)
    after = {"score": score, "run": run, "evidence": evidence, "recent": recent}
    return after | {"baseline": q0, "negatives": negatives, "counts": counts}, added


class Evidence(NamedTuple):
    """The path of a CUSUM: its score (nats) and the baseline share at each document (streams, documents)."""

    score: np.ndarray
    baseline: np.ndarray
    settings: Settings


def cusum(probabilities: np.ndarray, settings: Settings, cap: float = math.inf) -> Evidence:
    """The CUSUM's path: there is an alarm where the score reaches `threshold_for_arl`.

    Args:
        probabilities: of being negative (streams, documents)
        settings: `share` may be an array (streams,)
        cap: see `step`; live it is the threshold, so that an alarm ends soon after its surge
    """
    state, path = start(settings, len(probabilities)), []
    for column in np.ascontiguousarray(probabilities.T):
        state, _ = step(state, column, settings, cap)
        path.append((state["score"], state["baseline"]))
    return Evidence(*np.stack(path, axis=-1), settings)


def hysteresis(on: np.ndarray, statistic: np.ndarray, threshold: np.ndarray, release: float) -> np.ndarray:
    """Whether the alarm is on after a document: raised at the threshold, off again below release · threshold."""
    return np.where(on, statistic >= release * threshold, statistic >= threshold)


class Alert(NamedTuple):
    """A surge: what a reader is shown.

    time, since: of the last document, and of the first one after the change point (where the score was last 0)
    documents: how many there were since the change point
    baseline, share: the share of negative documents, normally and since the change point (estimates)
    severity: share / baseline, or of a `shift` its size in standard deviations; too high when the alarm is raised,
        because it is raised where documents look worst
    evidence: log likelihood ratio of a surge since the change point (nats), or the score of a `shift`
    causes: [document, its part of the evidence (nats), or its standardised rating], the largest first
    said: the same in words
    """

    time: float
    since: float
    documents: int
    baseline: float
    share: float
    severity: float
    evidence: float
    causes: list[list]
    said: str


@dataclass
class Cusum:
    """A CUSUM that watches one topic live. `asdict` gives its state for JSON, `with_past` reads it back.

    threshold: the ARL (documents) at which an alarm is raised, and the cap; choose it with `operating_curve`
    release: see `hysteresis`
    keep: how many causes are remembered
    """

    name: ClassVar[str] = ""  # of its state in a journal, before the key
    settings: Settings
    threshold: float
    release: float = 0.5
    keep: int = 5
    on: bool = False
    seen: int = 0
    since: float | None = None
    causes: list[list] = field(default_factory=list)
    state: dict[str, list] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = self.state or {name: value.tolist() for name, value in start(self.settings).items()}

    def update(self, time: float, probability: float, document: str | int | None = None) -> Alert | None:
        """Sees the next document; an Alert if it raises the alarm.

        Args:
            time: in seconds since 1970
            probability: the classifier's, of being negative
            document: its id in `causes`; by default its number in the stream, from 0

        Raises NewsError for a probability that is not between 0 and 1.
        """
        if not 0 <= probability <= 1:
            raise NewsError(f"{probability} is not a probability: it must be between 0 and 1.")
        before = {name: np.array(value) for name, value in self.state.items()}
        after, added = step(before, np.array([probability]), self.settings, self.threshold)
        self.state = {name: value.tolist() for name, value in after.items()}
        now = {name: value[0] for name, value in self.state.items()}
        if now["run"] <= 1:  # a change point: what came before doesn't belong to this surge
            self.since, self.causes = (float(time) if now["run"] else None), []
        if added[0] > 0:
            cause = [self.seen if document is None else document, float(added[0])]
            self.causes = heapq.nlargest(self.keep, [*self.causes, cause], key=lambda pair: pair[1])
        self.seen += 1
        limit = threshold_for_arl(self.threshold, after["baseline"], self.settings)[0]
        was, self.on = self.on, bool(hysteresis(self.on, now["score"], limit, self.release))
        if was or not self.on:
            return None
        usual, lately = now["baseline"], now["recent"]
        said = f"{lately:.0%} negative against {usual:.0%} ({lately / usual:.1f} times)"
        found = usual, lately, lately / usual, now["evidence"], self.causes, said
        return Alert(float(time), self.since, now["run"], *found)

    def with_past(self, saved: dict) -> "Cusum":
        """The detector that `dataclasses.asdict` was called on, with the settings and the threshold of this one."""
        return Cusum(**saved | {"settings": self.settings, "threshold": self.threshold})
