"""Comparisons that may be looked at any time: a confidence sequence for paired differences (A/B test, shadow)."""

import numpy as np
import pandas as pd


def confidence_sequence(differences: np.ndarray, alpha: float = 0.05, points: int = 401) -> pd.DataFrame:
    """The confidence sequence of the mean of paired differences, each from -1 to 1, in the order in which they came.

    With probability 1 - alpha the true mean lies inside at *all* times, so that one may look after every text and stop
    when one likes. For each candidate mean m a gambler bets on or against it; under m the capital is a martingale, and
    by Ville's inequality it ever reaches 1 / alpha with probability alpha at most; such m are out for good. The bets
    are predictable plug-ins, hedged in both directions (Waudby-Smith & Ramdas 2024, section 4.2 and theorem 3).

    For two classifiers a difference is 1 where only the new one is right, -1 where only the old one is, else 0.

    Args:
        differences: shape (texts,); the mean need not be the same at all times for the test of "always 0"
        points: how many candidate means from -1 to 1 are followed

    Returns one row for each text: `mean` so far, `low`, `high`, and `p`, the anytime p-value of "the mean is 0".
    """
    x = (np.asarray(differences, dtype=float) + 1) / 2  # from 0 to 1
    n, bound = len(x), 0.5  # the share of the capital that a bet may lose at most
    steps = np.arange(1, n + 1)
    mean = (0.5 + np.cumsum(x)) / (steps + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (steps + 1)
    before = np.concatenate([[0.25], variance[:-1]])  # a bet knows only what came before
    size = np.sqrt(2 * np.log(2 / alpha) / (before * steps * np.log(steps + 1)))
    m = np.linspace(0, 1, points)
    with np.errstate(divide="ignore"):
        up, down = np.minimum(size[:, None], bound / m), np.minimum(size[:, None], bound / (1 - m))
    logs = np.cumsum(np.log1p(np.stack([up, -down]) * (x[:, None] - m)), axis=1)  # (direction, texts, candidates)
    capital = np.logaddexp(*logs) - np.log(2)  # half of the stake on each direction
    inside = np.maximum.accumulate(capital, axis=0) < np.log(1 / alpha)
    low, high = m[inside.argmax(axis=1)], m[points - 1 - inside[:, ::-1].argmax(axis=1)]
    empty, half = ~inside.any(axis=1), 1 / (points - 1)  # candidates between two points of the grid are kept
    low, high = (np.where(empty, mean, edge) for edge in (np.maximum(low - half, 0), np.minimum(high + half, 1)))
    p = np.minimum(1, np.exp(-np.maximum.accumulate(capital[:, points // 2])))
    so_far = np.cumsum(x) / steps
    return pd.DataFrame({"mean": 2 * so_far - 1, "low": 2 * low - 1, "high": 2 * high - 1, "p": p})


def paired(labels: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """The differences of two classifiers' answers: 1 where only `new` is right, -1 where only `old` is, else 0."""
    return (new == labels).astype(int) - (old == labels).astype(int)


def false_alarms(test: object, share: float, texts: int, runs: int, alpha: float = 0.05, seed: int = 0) -> float:
    """How often a test that is looked at again and again finds a difference where there is none.

    Args:
        test: differences (texts,) -> a p-value at each look
        share: of the texts on which exactly one of two equally good classifiers is right
        texts: of each simulated comparison
    """
    random, alarms = np.random.default_rng(seed), 0
    for _ in range(runs):
        differences = random.choice([-1, 0, 1], texts, p=[share / 2, 1 - share, share / 2])
        alarms += bool((test(differences) <= alpha).any())
    return alarms / runs
