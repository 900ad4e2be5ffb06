"""One encoder with a head for each task."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax

from llmprod import machine, models
from llmprod.financial_sentiment.sentiment import DOMAINS, load, split_half
from llmprod.finetune import loop
from llmprod.finetune.trainer import TokenBudget


@dataclass
class Task:
    """Targets of one head: numbers (texts,), or class numbers with class names, or soft labels (texts, classes)."""

    name: str
    texts: Sequence[str]
    targets: np.ndarray
    classes: Sequence[str] = ()

    def outputs(self) -> list[str]:
        """The names of the head's outputs."""
        return [f"{self.name}: {c}" for c in self.classes] or [self.name]

    def loss(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Mean squared error for numbers, cross-entropy for classes or soft labels."""
        targets = torch.as_tensor(self.targets[rows], device=logits.device)
        if not self.classes:
            return torch.nn.functional.mse_loss(logits[:, 0], targets.float())
        return torch.nn.functional.cross_entropy(logits, targets.float() if targets.ndim == 2 else targets.long())


def rating_tasks(train: pd.DataFrame, borrowed: int = 0, part: str = "", seed: int = 0) -> list[Task]:
    """The task of rating training texts, and auxiliary tasks: rating texts of the other domains of `sentiment-human`.

    Args:
        borrowed: training texts of each other domain; their heads are not used afterwards
        part: the domain of `train`, if it is one
    """
    tasks = [Task("sentiment", train["text"].tolist(), train["rating"].to_numpy())]
    for domain in DOMAINS if borrowed else ():
        if domain != (part or "nyt"):
            other = split_half(load(part=domain), seed)[0].head(borrowed)
            tasks.append(Task(domain, other["text"].tolist(), other["rating"].to_numpy()))
    return tasks


def train_multitask(
    tasks: Sequence[Task],
    model: str = "minilm",
    layers: int = 0,
    epochs: float = 4,
    max_length: int = 64,
    batch_tokens: int = 1024,
    learning_rate: float = 2e-4,
    precision: str = "auto",
    seed: int = 0,
    progress: bool = True,
    log: Callable[[dict, int], None] | None = None,
) -> models.Predictor:
    """Fine-tunes one encoder with a linear head for each task; batches of all tasks come in random order.

    The heads are rows of one layer, so a checkpoint is an ordinary one of `models`; its outputs are named `task` or
    `task: class`, and `predict` separates them. There is no dropout, and token embeddings are not trained.

    Args:
        layers: how many of the encoder's layers to keep, from below (0: all); fewer are faster
        log: called with the loss of each step
    """
    device, number_format, _ = machine.device_and_precision(precision)
    machine.seed_everything(seed)
    names = [name for task in tasks for name in task.outputs()]
    predictor = models.Predictor.pretrained(model, names, dropout=0.0, max_length=max_length, precision=precision)
    classifier, tokenizer = predictor.model, predictor.tokenizer
    if layers:
        del classifier.encoder.encoder.layer[layers:]
        classifier.config.num_hidden_layers = layers
    classifier.encoder.embeddings.requires_grad_(False)
    classifier.to(device)
    tokens = [tokenizer(list(task.texts), truncation=True, max_length=max_length)["input_ids"] for task in tasks]
    budgets = [TokenBudget([len(t) for t in those], batch_tokens, seed) for those in tokens]
    steps = max(1, round(epochs * sum(map(len, budgets))))
    ends = np.cumsum([0, *(len(task.outputs()) for task in tasks)])

    def batches() -> Iterator[tuple[int, list[int]]]:
        random = np.random.default_rng(seed)
        while True:  # an epoch at a time: the batches of all tasks, shuffled
            order = [(k, rows) for k, budget in enumerate(budgets) for rows in budget]
            yield from (order[i] for i in reversed(random.permutation(len(order))))

    def loss(batch: tuple[int, list[int]]) -> torch.Tensor:
        k, rows = batch
        padded = tokenizer.pad({"input_ids": [tokens[k][row] for row in rows]}, return_tensors="pt").to(device)
        with machine.autocast(device, number_format):
            logits = classifier(**padded).logits
        return tasks[k].loss(logits.float()[:, ends[k] : ends[k + 1]], rows)

    def tell(batch: tuple[int, list[int]], value: float, step: int) -> None:
        log({f"loss, {tasks[batch[0]].name}": value}, step)

    title = "training" if progress else ""
    loop.train(classifier, batches(), loss, steps, learning_rate, progress=title, log=log and tell)
    return predictor


def predict(predictor: models.Predictor, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The output of each head, under its task's name: numbers (texts,), or probabilities (texts, classes)."""
    logits = predictor.predict(texts).astype(float)
    names = pd.Series([label.partition(": ")[0] for label in predictor.labels])
    columns = {task: logits[:, names == task] for task in names.unique()}
    return {task: softmax(part, axis=1) if part.shape[1] > 1 else part[:, 0] for task, part in columns.items()}


def rate(predictor: models.Predictor, texts: Iterable[str]) -> np.ndarray:
    """The predicted ratings of texts, from the head "sentiment"."""
    return predict(predictor, list(texts))["sentiment"]


def class_names(predictor: models.Predictor, task: str) -> list[str]:
    """The classes of a task's head."""
    return [name for head, _, name in (label.partition(": ") for label in predictor.labels) if head == task]
