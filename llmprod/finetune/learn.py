"""Fine-tunes a pretrained model with any method and few-shot strategy."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import DatasetDict
from transformers import TrainerCallback

from llmprod import machine
from llmprod.finetune import fewshot, methods
from llmprod.finetune.recipe import Recipe
from llmprod.finetune.trainer import tokenize, trainer
from llmprod.models import ModelError, Predictor

STUDENT_EPOCHS = 2  # in self-training


def untrained(recipe: Recipe, labels: Sequence[str]) -> Predictor:
    """The pretrained model with the recipe's new head, the same for the same seed."""
    machine.seed_everything(recipe.seed)
    head = "linear" if recipe.strategy == "plain" else "cosine"
    settings = {"dropout": recipe.dropout, "max_length": recipe.max_length, "precision": recipe.precision}
    return Predictor.pretrained(recipe.model, labels, head=head, **settings)


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint that a Trainer wrote into its folder, or None."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]  # which it writes last
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


@dataclass
class Learnt:
    """The result of `learn`."""

    predictor: Predictor
    history: list[dict[str, float]]  # what the Trainer logged
    trained_parameters: int
    seconds: float
    texts_per_second: float


def learn(
    splits: DatasetDict,
    labels: Sequence[str],
    recipe: Recipe,
    folder: Path,
    *,
    validate: bool | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
    resumable: bool = False,
) -> Learnt:
    """Fine-tunes a pretrained model on the training split, or on `recipe.shots` texts of each class of it.

    Args:
        splits: `train` and `validation` with `text` and `label`
        labels: the class names
        folder: the Trainer's output folder
        validate: whether to evaluate on validation after every epoch and keep the best one; None: only where all labels
            are used, since with few shots validation would hold more labels than training does
        callbacks: of the Trainer; in self-training, of the student's
        resumable: whether a checkpoint is written into `folder` after every epoch, and training goes on from one that
            is there; in self-training, of the teacher

    Raises ModelError for an unknown strategy, and for self-training without unlabelled texts.
    """
    if recipe.strategy not in fewshot.STRATEGIES:
        raise ModelError(f"strategy is '{recipe.strategy}'; use one of {', '.join(fewshot.STRATEGIES)}.")
    if recipe.strategy == "self-training" and not recipe.shots:
        raise ModelError("self-training needs texts without labels: set shots, and the other texts are used as such.")
    started = time.perf_counter()
    chosen, others = fewshot.sample_shots(splits["train"], recipe.shots, recipe.seed)
    predictor = untrained(recipe, labels)
    train = tokenize(chosen, predictor.tokenizer, recipe.max_length, recipe.model)
    validation = None
    if validate if validate is not None else not recipe.shots:
        validation = tokenize(splits["validation"], predictor.tokenizer, recipe.max_length, recipe.model)
    if recipe.strategy == "contrastive":
        fewshot.train_contrastive(predictor, chosen["text"], chosen["label"], str(folder), recipe.seed)
    if recipe.strategy != "plain":
        fewshot.set_prototypes(predictor, chosen["text"], chosen["label"])
    of_first = () if recipe.strategy == "self-training" else callbacks
    settings = {"callbacks": of_first, "progress": progress, "resumable": resumable}
    runner = trainer(predictor, train, validation, folder, recipe, **settings)
    last = last_checkpoint(folder) if resumable else None
    outcome = runner.train(resume_from_checkpoint=last)
    if recipe.strategy == "self-training":  # the model so far is the teacher; a new one learns from its predictions
        logits = predictor.predict(others["text"])
        unlabelled = tokenize(others, predictor.tokenizer, recipe.max_length, recipe.model)
        train = fewshot.with_pseudo_labels(logits, train, unlabelled)
        predictor = untrained(recipe, labels)
        texts, guesses = [*chosen["text"], *others["text"]], [*chosen["label"], *logits.argmax(axis=1)]
        fewshot.set_prototypes(predictor, texts, guesses)
        shorter = replace(recipe, epochs=STUDENT_EPOCHS)
        runner = trainer(predictor, train, None, folder, shorter, callbacks=callbacks, progress=progress)
        outcome = runner.train()
    before = int(last.rpartition("-")[2]) / runner.state.global_step if last else 0  # share of the steps
    seen = (
        (1 - before) * len(runner.train_dataset) * outcome.metrics["epoch"]
    )  # of the epochs that ran, not of those allowed
    rate = seen / outcome.metrics["train_runtime"]
    history = runner.state.log_history
    return Learnt(predictor, history, methods.count(predictor.model), time.perf_counter() - started, rate)
