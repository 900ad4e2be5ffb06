"""The text tower: an encoder fine-tuned on interactions."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch.nn.functional import cross_entropy, normalize

from llmprod import machine, models
from llmprod.finetune import loop


def train_tower(
    texts: Sequence[str],
    train: csr_matrix,
    model: str = "minilm",
    steps: int = 40,
    items: int = 128,
    max_length: int = 32,
    learning_rate: float = 1e-4,
    temperature: float = 0.1,
    precision: str = "auto",
    seed: int = 0,
    progress: str = "",
) -> tuple[models.Predictor, list[float]]:
    """Fine-tunes an encoder so that the items of one user lie near each other.

    A step encodes some items once. For every user who interacted with at least two of them, each of these is the
    target in turn: the mean vector of the others has to be nearer to it than to all other items of the step
    (multinomial likelihood over a softmax of cosines). So a few thousand texts teach from all pairs of interactions.

    Args:
        texts: of all items
        train: interactions (users, items); items without any are never shown
        items: how many items a step encodes
        progress: the title of the progress bar; none where it is empty

    Returns the encoder (without a head) and the loss of each step.
    """
    device, number_format, _ = machine.device_and_precision(precision)
    machine.seed_everything(seed)
    predictor = models.Predictor.pretrained(model, dropout=0.0, max_length=max_length, precision=precision)
    encoder = predictor.model.to(device)
    encoder.encoder.embeddings.requires_grad_(False)
    popularity = np.asarray(train.sum(axis=0)).ravel()
    known = np.flatnonzero(popularity)
    chance = np.sqrt(popularity[known])
    chance /= chance.sum()

    def batches() -> Iterator[np.ndarray]:
        random = np.random.default_rng(seed)
        while True:
            yield random.choice(known, min(items, len(known)), replace=False, p=chance)

    def loss(chosen: np.ndarray) -> torch.Tensor:
        batch = predictor.tokenizer([texts[i] for i in chosen], truncation=True, padding=True, return_tensors="pt")
        with machine.autocast(device, number_format):
            vectors = encoder(**batch.to(device)).vectors
        vectors = normalize(vectors.float(), dim=-1)
        owned = torch.from_numpy(train[:, chosen].toarray()).to(device)
        owned = owned[owned.sum(dim=1) > 1]
        users, targets = owned.nonzero(as_tuple=True)  # one row for each interaction
        profile = normalize((owned @ vectors)[users] - vectors[targets], dim=-1)  # the user's other items
        # the user's other items are neither targets nor negatives
        logits = (profile @ vectors.T / temperature).masked_fill(owned[users].bool(), -torch.inf)
        logits[torch.arange(len(users)), targets] = (profile * vectors[targets]).sum(dim=1) / temperature
        return cross_entropy(logits, targets)

    return predictor, loop.train(encoder, batches(), loss, steps, learning_rate, progress=progress)
