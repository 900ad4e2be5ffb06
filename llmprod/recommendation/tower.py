"""The text tower: an encoder fine-tuned on interactions."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from llmprod import machine, models

# The text tower


def pooled(encoder: models.Classifier, batch: dict, precision: str) -> torch.Tensor:
    """Text vectors of length 1 (texts, dimensions), with gradients."""
    with machine.autocast(encoder.device, precision):
        vectors = encoder(**batch.to(encoder.device)).vectors
    return normalize(vectors.float(), dim=-1)


def learn_tower(
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
    progress: bool = True,
) -> tuple[models.Predictor, list[float]]:
    """Fine-tunes an encoder so that what a user took lies near what the user takes next; returns it with its losses.

    A step encodes some items once. For every user who took at least two of them, each of these is the target in turn:
    the mean vector of the others has to be nearer to it than to all other items of the step (multinomial likelihood
    over a softmax of cosines). So a few thousand texts teach from all pairs of interactions.

    Args:
        texts: of all items
        train: interactions (users, items); items that nobody took are never shown

    Returns the encoder (without a head) and the loss of each step.
    """
    device, number_format, _ = machine.device_and_precision(precision)
    machine.seed_everything(seed)
    predictor = models.Predictor.pretrained(model, dropout=0.0, max_length=max_length, precision=precision)
    encoder, tokenizer = predictor.model, predictor.tokenizer
    encoder.encoder.embeddings.requires_grad_(False)
    encoder.to(device).train()
    parameters = [p for p in encoder.encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    # a tenth of fewer than 11 steps leaves none to warm up in, by which OneCycleLR would divide: they begin one of 11
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 11), pct_start=0.1)
    random, known, losses = np.random.default_rng(seed), np.flatnonzero(np.asarray(train.sum(axis=0)).ravel()), []
    popularity = np.sqrt(np.asarray(train.sum(axis=0)).ravel()[known])
    for _ in tqdm(range(steps), desc="text tower", leave=False, disable=not progress):
        chosen = random.choice(known, min(items, len(known)), replace=False, p=popularity / popularity.sum())
        batch = tokenizer([texts[i] for i in chosen], truncation=True, padding=True, return_tensors="pt")
        vectors = pooled(encoder, batch, number_format)
        took = torch.from_numpy(train[:, chosen].toarray()).to(device)
        took = took[took.sum(dim=1) > 1]
        users, targets = took.nonzero(as_tuple=True)
        profile = normalize((took @ vectors)[users] - vectors[targets], dim=-1)
        logits = (profile @ vectors.T / temperature).masked_fill(took[users].bool(), -torch.inf)
        logits[torch.arange(len(users)), targets] = (profile * vectors[targets]).sum(dim=1) / temperature
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    return predictor, losses
