"""The next item of a history: a small transformer over interactions in the order of time."""

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from llmprod import machine


class NextItem(torch.nn.Module):
    """Self-attention over a history (SASRec, Kang & McAuley 2018): at each place, a score of every item as the next.

    An item's vector is the same where it is read and where it is scored. The item number `items` stands for no item.
    """

    def __init__(self, items: int, length: int, width: int = 64, layers: int = 2, heads: int = 2, dropout: float = 0.3):
        super().__init__()
        self.items = torch.nn.Embedding(items + 1, width, padding_idx=items)
        self.places = torch.nn.Embedding(length, width)
        for table in (self.items, self.places):
            torch.nn.init.normal_(table.weight, std=0.02)
        layer = torch.nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        norm = torch.nn.LayerNorm(width)
        self.encoder = torch.nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)
        self.dropout = torch.nn.Dropout(dropout)
        self.bias = torch.nn.Parameter(torch.zeros(items))

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        """Scores (users, places, items) from item numbers (users, places); what comes later is not looked at."""
        places = history.shape[1]
        hidden = self.dropout(self.items(history) * self.items.embedding_dim**0.5 + self.places.weight[:places])
        later = torch.ones(places, places, dtype=torch.bool).triu(1)
        return self.encoder(hidden, mask=later) @ self.items.weight[:-1].T + self.bias


def padded(rows: list[np.ndarray], empty: int) -> torch.Tensor:
    """Rows of numbers as one tensor (rows, longest), `empty` after those that are shorter."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=empty)


def next_items(
    train: pd.DataFrame,
    shape: tuple[int, int],
    seed: int,
    length: int = 50,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    progress: bool = True,
) -> np.ndarray:
    """Learns from all histories, and scores every item as each user's next: (users, items), 0 without a history.

    The loss is the cross-entropy over all items at every place of a history, which does better than the sampled
    negatives of the original (Klenitskiy & Vasilev 2023).

    Args:
        train: user, item (numbers) and time
        shape: numbers of users and items
        length: how much of a history is read at once; a longer one is cut into pieces to learn from
    """
    machine.seed_everything(seed)
    items = shape[1]
    histories = {u: rows.to_numpy() for u, rows in train.sort_values("time", kind="stable").groupby("user")["item"]}
    pieces = [
        taken[max(0, end - length - 1) : end]
        for taken in histories.values()
        for end in range(len(taken), 1, -length)  # from the end, so that the latest piece is a whole one
    ]
    model, random = NextItem(items, length), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    steps = epochs * -(-len(pieces) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 20), pct_start=0.1)
    for _ in tqdm(range(epochs), desc="histories", leave=False, disable=not progress):
        order = sorted(random.permutation(len(pieces)), key=lambda k: len(pieces[k]) // 10)  # of similar length
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        for k in random.permutation(len(batches)):
            rows = [pieces[row] for row in batches[k]]
            scores = model(padded([row[:-1] for row in rows], items))
            following = padded([row[1:] for row in rows], -100)
            cross_entropy(scores.flatten(0, 1), following.flatten(), ignore_index=-100).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()
    found, known = np.zeros(shape, dtype=np.float32), list(histories)
    with torch.inference_mode():
        for start in range(0, len(known), batch_size):
            some = known[start : start + batch_size]
            rows = [histories[u][-length:] for u in some]
            last = [len(row) - 1 for row in rows]
            found[some] = model(padded(rows, items))[range(len(rows)), last].numpy()
    return found
