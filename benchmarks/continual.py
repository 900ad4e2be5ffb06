"""Continual learning, compared with Avalanche: `make bench BENCH=continual` (`pip install avalanche-lib` first).

Both learn the same phases of 20 Newsgroups, whose topics shift, with the same encoder, LoRA, head, length, batch,
learning rate and number of passes, in fp32: fine-tuning, EWC and rehearsal. What stays the library's own: its order of
texts (ours draws every class equally often), a learning rate that does not fall, a buffer of fixed size (equal to ours
in the last phase, larger before, when fewer phases share it), and its Fisher information, of the true labels and of
whole batches (ours draws labels from the model, text by text, as its source does). Neither λ was tuned. Avalanche is in
no extra: its last release is of October 2024, and it brings torchvision and twenty solvers of optimisation problems.

    python -m benchmarks.continual [--seeds 0 1 2]
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from benchmarks import image_operators, record  # noqa: F401 (the first before anything looks for torchvision)
from llmprod import machine
from llmprod.feedback import continual, phases
from llmprod.harness import results

METHODS = {"naive": "Naive", "EWC": "EWC", "rehearsal": "Replay"}  # ours -> Avalanche's strategy
TEXTS, TESTS = 60, 50  # of each class in a phase
SETTINGS = continual.Settings(max_length=32, epochs=4, batch=16, buffer=20, precision="fp32")


class Network(torch.nn.Module):
    """Our classifier as Avalanche calls it: token ids and mask in one tensor (texts, 2, length) -> logits."""

    def __init__(self, classifier: torch.nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits (texts, classes)."""
        return self.classifier(input_ids=tokens[:, 0], attention_mask=tokens[:, 1]).logits


def of_avalanche(method: str, some: Sequence[phases.Phase], classes: int, settings: continual.Settings) -> tuple:
    """The accuracy matrix of a strategy of Avalanche, and the seconds of learning."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.training import supervised
    from avalanche.training.plugins import EvaluationPlugin

    learner = continual.Naive(classes, settings)  # its encoder with a fresh head, and how it predicts
    model, tokenizer = learner.predictor.model, learner.predictor.tokenizer
    options = {"padding": "max_length", "truncation": True, "max_length": settings.max_length, "return_tensors": "pt"}

    def dataset(texts: list[str], labels: np.ndarray) -> object:
        found = tokenizer(texts, **options)
        tokens = torch.stack([found["input_ids"], found["attention_mask"]], dim=1)
        data = torch.utils.data.TensorDataset(tokens, torch.from_numpy(labels))
        data.targets = labels.tolist()
        return as_classification_dataset(data)

    stream = benchmark_from_datasets(train=[dataset(*phase.train) for phase in some]).train_stream
    more = {"EWC": {"ewc_lambda": settings.strength / 2}, "rehearsal": {"mem_size": settings.buffer * classes * 3}}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    strategy = getattr(supervised, METHODS[method])(
        model=Network(model),
        optimizer=torch.optim.AdamW(trained, lr=settings.learning_rate, fused=True),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=settings.batch,
        train_epochs=settings.epochs,
        evaluator=EvaluationPlugin(),
        **more.get(method, {}),
    )
    rows, seconds = [], 0.0
    for experience in stream:
        started = time.perf_counter()
        model.train()
        strategy.train(experience)
        seconds += time.perf_counter() - started
        rows.append([float((learner.predict(phase.test[0]) == phase.test[1]).mean()) for phase in some])
    return np.array(rows), seconds


def main() -> None:
    """Prints mean and sd over seeds of each method, ours and Avalanche's, and writes them down."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = options.parse_args()
    if importlib.util.find_spec("avalanche") is None:
        sys.exit("Avalanche is missing: pip install avalanche-lib")
    machine.set_threads()
    machine.quiet()
    sides: dict[str, Callable] = {"llmprod": continual.run, "Avalanche": of_avalanche}
    found = []
    runs = [(seed, method, side) for seed in options.seeds for method in METHODS for side in sides]
    for seed, method, side in (bar := tqdm(runs)):
        bar.set_postfix_str(f"{method}, {side}")
        some, names = phases.shifted_topics(TEXTS, TESTS, seed)
        matrix, seconds = sides[side](method, some, len(names), replace(SETTINGS, seed=seed))
        numbers = continual.summary(matrix)
        found.append({"method": method, "by": side, "learning, s": seconds} | numbers)
    table = pd.DataFrame(found).groupby(["method", "by"], sort=False).agg(["mean", "std"])
    table.columns = [name if which == "mean" else f"{name}, sd" for name, which in table.columns]
    rows = [row.dropna().to_dict() | {"seeds": len(options.seeds)} for _, row in table.reset_index().iterrows()]
    slow = {row["method"]: row["learning, s"] for row in rows if row["by"] == "Avalanche"}
    rows = [row | {"seconds over Avalanche's": row["learning, s"] / slow[row["method"]]} for row in rows]
    print(results.markdown(pd.DataFrame(rows).round(3)))
    record("continual", rows)


if __name__ == "__main__":
    main()
