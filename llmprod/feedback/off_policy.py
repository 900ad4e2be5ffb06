"""Off-policy evaluation: what another policy would have earned, from the clicks that one policy's choices got."""

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import OneHotEncoder

from llmprod import LLMProdError, artifacts

CAMPAIGNS = ("all", "men", "women")
POLICIES = ("random", "bts")
USER = [f"user_feature_{k}" for k in range(4)]


def load(policy: str, campaign: str) -> pd.DataFrame:
    """Logged recommendations of Open Bandit Data: `item`, `position` (0 to 2), `click`, `propensity`, user features.

    The propensity is the probability with which the policy chose this item for this position. Raises LLMProdError for
    an unknown policy or campaign.
    """
    if policy not in POLICIES or campaign not in CAMPAIGNS:
        raise LLMProdError(f"There are the policies {', '.join(POLICIES)} and the campaigns {', '.join(CAMPAIGNS)}.")
    file = artifacts.fetch("open-bandit") / policy / campaign / f"{campaign}.csv"
    names = {"item_id": "item", "propensity_score": "propensity", "position": "position", "click": "click"}
    table = pd.read_csv(file, usecols=[*names, *USER]).rename(columns=names)
    return table.assign(position=table["position"].rank(method="dense").astype(int) - 1)


def choices(log: pd.DataFrame) -> np.ndarray:
    """How often a policy chose each item for each position: shape (items, positions), the columns add up to 1.

    Bernoulli Thompson sampling looks at no user; it changed while it ran, and this is its mean. Nothing is learnt here
    from its clicks.
    """
    counts = np.zeros((int(log["item"].max()) + 1, int(log["position"].max()) + 1))
    np.add.at(counts, (log["item"], log["position"]), 1)
    return counts / counts.sum(axis=0)


def expected_clicks(log: pd.DataFrame, items: int, seed: int = 0) -> np.ndarray:
    """A model of the click rate, shape (rows, items): logistic regression on item, position and user features.

    Each half of the rows is predicted by a model of the other half, so that no row is judged by itself (cross-fitting).
    """
    encoder = OneHotEncoder(handle_unknown="ignore").fit(log[["position", *USER]])
    users = encoder.transform(log[["position", *USER]])
    chosen = csr_matrix((np.ones(len(log)), (np.arange(len(log)), log["item"])), shape=(len(log), items))
    half = np.random.default_rng(seed).permutation(len(log)) % 2
    rates = np.zeros((len(log), items))
    for part in (0, 1):
        of, other = half == part, half != part
        model = LogisticRegression(C=0.1, max_iter=200).fit(hstack([users, chosen]).tocsr()[other], log["click"][other])
        weights = model.coef_[0]
        logits = (users[of] @ weights[:-items])[:, None] + weights[-items:] + model.intercept_
        rates[of] = 1 / (1 + np.exp(-logits))
    return rates


def estimates(
    log: pd.DataFrame, policy: np.ndarray, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """The click rate that `policy` would have had, estimated from another policy's log, with bootstrap intervals.

    Weights are w = π(item | position) / propensity.

    * logged clicks: their mean, which is the value of the policy that made the log
    * IPS: mean of w · click (Horvitz & Thompson 1952); unbiased, with a large variance where weights are large
    * SNIPS: the same, divided by the mean of w (Swaminathan & Joachims 2015)
    * doubly robust: a model's estimate plus IPS of what it gets wrong (Dudík et al. 2011)

    Args:
        log: see `load`
        policy: probabilities of the policy to be judged, shape (items, positions)

    Returns `value`, `low`, `high` by estimator, and the effective number of rows, (Σw)² / Σw², in `attrs`.
    """
    item, position, click = (log[name].to_numpy() for name in ("item", "position", "click"))
    weights = policy[item, position] / log["propensity"].to_numpy()
    rates = expected_clicks(log, len(policy), seed)
    direct = (rates * policy[:, position].T).sum(axis=1)
    robust = direct + weights * (click - rates[np.arange(len(log)), item])
    columns = np.column_stack([click, weights * click, weights, robust]).astype(float)
    random = np.random.default_rng(seed)
    counts = random.poisson(1.0, size=(resamples, len(log)))  # how often a row is drawn (Poisson bootstrap)
    means = np.vstack([columns.mean(axis=0), counts.astype(float) @ columns / counts.sum(axis=1, keepdims=True)])
    means[:, 2] = means[:, 1] / means[:, 2]
    low, high = np.quantile(means[1:], [(1 - level) / 2, (1 + level) / 2], axis=0)
    names = ["logged clicks", "IPS", "SNIPS", "doubly robust"]
    table = pd.DataFrame({"value": means[0], "low": low, "high": high}, index=names)
    table.attrs["effective rows"] = float(weights.sum() ** 2 / (weights**2).sum())
    return table
