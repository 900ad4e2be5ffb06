"""One encoder with a head for each task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from llmprod import machine, models
from llmprod.financial_sentiment.sentiment import DOMAINS, load, split_half
from llmprod.finetune.trainer import TokenBudget

# An encoder with one head for each task


@dataclass
class Task:
    """What one head learns: numbers (texts,), or class numbers with the classes' names, or beliefs (texts, classes)."""

    name: str
    texts: Sequence[str]
    targets: np.ndarray
    classes: Sequence[str] = ()

    def outputs(self) -> list[str]:
        """The names of the head's outputs."""
        return [f"{self.name}: {c}" for c in self.classes] or [self.name]

    def loss(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Mean squared error for numbers, cross-entropy for classes or beliefs."""
        targets = torch.as_tensor(self.targets[rows], device=logits.device)
        if not self.classes:
            return torch.nn.functional.mse_loss(logits[:, 0], targets.float())
        return torch.nn.functional.cross_entropy(logits, targets.float() if targets.ndim == 2 else targets.long())


def rating_tasks(train: pd.DataFrame, borrowed: int = 0, part: str = "", seed: int = 0) -> list[Task]:
    """The task of rating training texts, and beside it a head for each other domain of `sentiment-human`.

    Ratings of tweets and reviews teach the encoder what feeling sounds like elsewhere; their heads are not used.

    Args:
        borrowed: training texts of each other domain
        part: the domain that `train` is of, where it is one
    """
    tasks = [Task("sentiment", train["text"].tolist(), train["rating"].to_numpy())]
    for domain in DOMAINS if borrowed else ():
        if domain != (part or "nyt"):
            other = split_half(load(part=domain), seed)[0].head(borrowed)
            tasks.append(Task(domain, other["text"].tolist(), other["rating"].to_numpy()))
    return tasks


def learn(
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
) -> tuple[models.Classifier, PreTrainedTokenizerBase]:
    """Fine-tunes one encoder with a linear head for each task; the batches of all tasks come in random order.

    The heads are rows of one layer, so that a checkpoint is an ordinary one of `models`; its outputs are named
    `task` or `task: class`, and `predict` takes them apart. Without dropout, token embeddings left as they are.

    Args:
        layers: how many of the encoder's layers to keep, from below (0: all); fewer are faster
        log: is told the loss of each step
    """
    device, precision, _ = machine.device_and_precision(precision)
    machine.seed_everything(seed)
    names = [name for task in tasks for name in task.outputs()]
    classifier, tokenizer = models.load_classifier(model, names, dropout=0.0)
    if layers:
        del classifier.encoder.encoder.layer[layers:]
        classifier.config.num_hidden_layers = layers
    classifier.encoder.embeddings.requires_grad_(False)
    classifier.to(device).train()
    tokenizer.model_max_length = max_length
    tokens = [tokenizer(list(task.texts), truncation=True, max_length=max_length)["input_ids"] for task in tasks]
    batches = [TokenBudget([len(t) for t in those], batch_tokens, seed) for those in tokens]
    random, steps = np.random.default_rng(seed), max(1, round(epochs * sum(map(len, batches))))
    trained = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01, fused=True)
    rise = max(1, steps // 10)
    shape = lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    order, ends = [], np.cumsum([0, *(len(task.outputs()) for task in tasks)])
    for step in tqdm(range(steps), desc="training", leave=False, disable=not progress):
        if not order:
            order = [(k, rows) for k, some in enumerate(batches) for rows in some]
            order = [order[i] for i in random.permutation(len(order))]
        k, rows = order.pop()
        batch = tokenizer.pad({"input_ids": [tokens[k][row] for row in rows]}, return_tensors="pt").to(device)
        with machine.autocast(device, precision):
            logits = classifier(**batch).logits
        loss = tasks[k].loss(logits.float()[:, ends[k] : ends[k + 1]], rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if log:
            log({f"loss, {tasks[k].name}": float(loss.detach())}, step)
    return classifier, tokenizer


def predict(
    classifier: models.Classifier,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    precision: str = "auto",
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """What each head says: numbers (texts,), or probabilities (texts, classes), by the task's name."""
    logits = models.predict(classifier, tokenizer, texts, batch_size, precision).astype(float)
    names = pd.Series([classifier.config.id2label[k].partition(": ")[0] for k in range(logits.shape[1])])
    columns = {task: logits[:, names == task] for task in names.unique()}
    return {task: softmax(part, axis=1) if part.shape[1] > 1 else part[:, 0] for task, part in columns.items()}


def class_names(classifier: models.Classifier, task: str) -> list[str]:
    """The classes of a task's head."""
    names = [classifier.config.id2label[k].partition(": ") for k in range(classifier.config.num_labels)]
    return [name for head, _, name in names if head == task]
