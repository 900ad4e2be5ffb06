"""The training loop of models that the library's Trainer does not train."""

from collections.abc import Callable, Iterable

import torch
from tqdm.auto import tqdm


def train(
    model: torch.nn.Module,
    batches: Iterable,
    loss: Callable[[object], torch.Tensor],
    steps: int,
    learning_rate: float,
    *,
    weight_decay: float = 0.01,
    progress: str = "",
    log: Callable[[object, float, int], None] | None = None,
) -> list[float]:
    """Trains a model in place, on its own device: AdamW on the parameters that require gradients, norms clipped at 1.

    The learning rate rises over the first tenth of the steps and then falls linearly to 0.

    Args:
        batches: yields at least `steps` batches
        loss: the loss of a batch
        learning_rate: its maximum
        progress: the title of the progress bar; "" for none
        log: is called with each batch, its loss and the number of the step

    Returns the loss of each step.
    """
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay, fused=True)
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses, source = [], iter(batches)
    for step in tqdm(range(steps), desc=progress, leave=False, disable=not progress):
        batch = next(source)
        value = loss(batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(value.detach()))
        if log:
            log(batch, losses[-1], step)
    return losses
