"""Sequential recommendation: a small transformer over histories predicts the next item."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from llmprod import machine
from llmprod.finetune import loop


class SASRec(torch.nn.Module):
    """Self-attention over a history (Kang & McAuley 2018): at each position, a score of every item as the next.

    Input and output share the items' vectors. The item number `items` is padding.
    """

    def __init__(self, items: int, length: int, width: int = 64, layers: int = 2, heads: int = 2, dropout: float = 0.3):
        super().__init__()
        self.items = torch.nn.Embedding(items + 1, width, padding_idx=items)
        self.positions = torch.nn.Embedding(length, width)
        for table in (self.items, self.positions):
            torch.nn.init.normal_(table.weight, std=0.02)
        layer = torch.nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        norm = torch.nn.LayerNorm(width)
        self.encoder = torch.nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)
        self.dropout = torch.nn.Dropout(dropout)
        self.bias = torch.nn.Parameter(torch.zeros(items))

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        """Scores (users, positions, items) from item numbers (users, positions), without looking ahead."""
        positions = history.shape[1]
        hidden = self.dropout(self.items(history) * self.items.embedding_dim**0.5 + self.positions.weight[:positions])
        later = torch.ones(positions, positions, dtype=torch.bool).triu(1)
        return self.encoder(hidden, mask=later) @ self.items.weight[:-1].T + self.bias


def padded(rows: list[np.ndarray], empty: int) -> torch.Tensor:
    """Rows of numbers as one tensor (rows, longest), shorter ones filled up with `empty`."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=empty)


def next_items(
    train: pd.DataFrame,
    shape: tuple[int, int],
    seed: int,
    length: int = 50,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
) -> np.ndarray:
    """Trains on all histories and scores every item as each user's next: (users, items), 0 without a history.

    The loss is the cross-entropy over all items at every position of a history, which does better than the sampled
    negatives of the original (Klenitskiy & Vasilev 2023).

    Args:
        train: user, item (numbers) and time
        shape: numbers of users and items
        length: the longest piece of a history that is read at once; longer ones are cut into pieces for training
    """
    machine.seed_everything(seed)
    items = shape[1]
    histories = {u: rows.to_numpy() for u, rows in train.sort_values("time", kind="stable").groupby("user")["item"]}
    pieces = [
        history[max(0, end - length - 1) : end]
        for history in histories.values()
        for end in range(len(history), 1, -length)  # from the end, so that the latest piece is a whole one
    ]
    model = SASRec(items, length)

    def batches() -> Iterator[list[np.ndarray]]:
        random = np.random.default_rng(seed)
        while True:  # an epoch; pieces of similar length share a batch, so that little of it is padding
            order = sorted(random.permutation(len(pieces)), key=lambda k: len(pieces[k]) // 10)
            starts = range(0, len(order), batch_size)
            for start in random.permutation(starts):
                yield [pieces[k] for k in order[start : start + batch_size]]

    def loss(rows: list[np.ndarray]) -> torch.Tensor:
        scores = model(padded([row[:-1] for row in rows], items))
        following = padded([row[1:] for row in rows], -100)
        return cross_entropy(scores.flatten(0, 1), following.flatten(), ignore_index=-100)

    steps = epochs * -(-len(pieces) // batch_size)
    loop.train(model, batches(), loss, steps, learning_rate, weight_decay=0.0)
    model.eval()
    scores, known = np.zeros(shape, dtype=np.float32), list(histories)
    with torch.inference_mode():
        for start in range(0, len(known), batch_size):
            users = known[start : start + batch_size]
            rows = [histories[u][-length:] for u in users]
            last = [len(row) - 1 for row in rows]
            scores[users] = model(padded(rows, items))[range(len(rows)), last].numpy()
    return scores
