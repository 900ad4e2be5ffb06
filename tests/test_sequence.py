"""The next item: an order is learnt that no co-occurrence tells, nothing looks ahead, runs repeat."""

import numpy as np
import pandas as pd
import torch

from llmprod.recommendation import catalogues, scorers, sequence


def circle(users: int = 60, items: int = 12, steps: int = 9) -> pd.DataFrame:
    """Everybody walks round a circle of items from a place of his own: the next item follows from the last alone."""
    start = np.random.default_rng(0).integers(0, items, users)
    user, step = np.repeat(np.arange(users), steps), np.tile(np.arange(steps), users)
    return pd.DataFrame({"user": user, "item": (start[user] + step) % items, "time": step.astype(float)})


def test_the_order_is_learnt():
    taken = circle()
    scores = sequence.next_items(taken.sample(frac=1, random_state=0), (60, 12), 0, epochs=60, progress=False)
    last = taken.groupby("user")["item"].last().to_numpy()
    assert (scores.argmax(axis=1) == (last + 1) % 12).mean() > 0.9
    dense = catalogues.matrix(taken, (60, 12))
    unordered = np.where(dense.toarray() > 0, -np.inf, dense @ scorers.ease(dense))
    assert (unordered.argmax(axis=1) == (last + 1) % 12).mean() < 0.7, "what knows no order can't tell"


def test_runs_repeat_and_who_has_no_history_gets_nothing():
    taken = circle()
    once, again = (sequence.next_items(taken, (61, 12), 3, epochs=2, progress=False) for _ in range(2))
    assert np.array_equal(once, again)
    assert not once[60].any() and once[:60].any(axis=1).all()


def test_a_score_does_not_depend_on_what_comes_later_or_on_padding():
    torch.manual_seed(0)
    model = sequence.NextItem(5, length=6).eval()
    rows = [np.array([0, 1, 2, 3]), np.array([0, 1])]
    with torch.inference_mode():
        both, alone = model(sequence.padded(rows, 5)), model(sequence.padded(rows[1:], 5))
    assert torch.allclose(both[0, :2], both[1, :2], atol=1e-6), "what comes later"
    assert torch.allclose(both[1, :2], alone[0], atol=1e-6), "padding"
    assert not torch.allclose(both[0, 1], both[0, 3])
