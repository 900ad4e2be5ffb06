"""Next-item prediction: learns an order that co-occurrence does not show, does not look ahead, repeats."""

import numpy as np
import pandas as pd
import torch

from llmprod.recommendation import catalogues, scorers, sequence


def circle(users: int = 60, items: int = 12, steps: int = 9) -> pd.DataFrame:
    """Each user walks round a circle of items from a random start: the last item alone determines the next."""
    start = np.random.default_rng(0).integers(0, items, users)
    user, step = np.repeat(np.arange(users), steps), np.tile(np.arange(steps), users)
    return pd.DataFrame({"user": user, "item": (start[user] + step) % items, "time": step.astype(float)})


def test_the_order_is_learnt():
    interactions = circle()
    scores = sequence.next_items(interactions.sample(frac=1, random_state=0), (60, 12), 0, epochs=60)
    last = interactions.groupby("user")["item"].last().to_numpy()
    assert (scores.argmax(axis=1) == (last + 1) % 12).mean() > 0.9
    user_items = catalogues.matrix(interactions, (60, 12))
    unordered = np.where(user_items.toarray() > 0, -np.inf, user_items @ scorers.ease(user_items))
    assert (unordered.argmax(axis=1) == (last + 1) % 12).mean() < 0.7, "EASE ignores the order"


def test_runs_repeat_and_users_without_a_history_score_0():
    interactions = circle()
    once, again = (sequence.next_items(interactions, (61, 12), 3, epochs=2) for _ in range(2))
    assert np.array_equal(once, again)
    assert not once[60].any() and once[:60].any(axis=1).all()


def test_scores_depend_neither_on_later_items_nor_on_padding():
    torch.manual_seed(0)
    model = sequence.SASRec(5, length=6).eval()
    rows = [np.array([0, 1, 2, 3]), np.array([0, 1])]
    with torch.inference_mode():
        both, alone = model(sequence.padded(rows, 5)), model(sequence.padded(rows[1:], 5))
    assert torch.allclose(both[0, :2], both[1, :2], atol=1e-6), "later items"
    assert torch.allclose(both[1, :2], alone[0], atol=1e-6), "padding"
    assert not torch.allclose(both[0, 1], both[0, 3])
