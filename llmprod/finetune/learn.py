"""Fine-tuning by any method and strategy."""

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from llmprod import machine, models
from llmprod.finetune import fewshot, methods
from llmprod.finetune.trainer import Trainer, tokenize, trainer
from llmprod.models import Classifier, ModelError

HEADS = {"plain": "linear", "prompt": "prompt"}  # of the strategies whose class vectors are not set to prototypes


def settings() -> list[str]:
    """The names of what `learn` and its Trainer can be told."""
    told = {**inspect.signature(learn).parameters, **inspect.signature(trainer).parameters}
    return [
        n
        for n, p in told.items()
        if p.kind is p.KEYWORD_ONLY and n not in ("judged", "callbacks", "progress", "student_epochs")
    ]


@dataclass
class Learnt:
    """What `learn` gives: the classifier on its device, its tokenizer, the Trainer, what it took."""

    classifier: Classifier
    tokenizer: PreTrainedTokenizerBase
    trainer: Trainer
    trained_parameters: int
    seconds: float
    texts_per_second: float


def learn(
    splits: DatasetDict,
    labels: Sequence[str],
    folder: Path,
    *,
    model: str = "minilm",
    max_length: int = 128,
    shots: int = 0,
    strategy: str = "plain",
    student_epochs: float = 2,
    dropout: float = 0.0,
    seed: int,
    judged: bool | None = None,
    **training: object,
) -> Learnt:
    """Fine-tunes a pretrained model on the training split, or on `shots` texts of each class of it.

    Args:
        splits: `train` and `validation` with `text` and `label`
        labels: the class names
        folder: the Trainer's output folder
        model, max_length, dropout: see `models.load_classifier` and `tokenize`
        shots: labelled texts of each class; 0 for all
        strategy: "plain" (a new linear head), "prototypes" (class vectors set from names and texts, then trained),
            "contrastive" (pairs first, then prototypes), "self-training" (a prototypes teacher labels the training
            texts that were not chosen, and a new model learns from both for `student_epochs`), "prompt" (the words of
            the class names are predicted at a mask after the text; for a masked language model)
        judged: whether validation is looked at after every epoch, and the best one kept; None: only where `shots` is 0,
            since with few labels it would hold more of them than training does
        training: see `trainer`

    Raises ModelError for an unknown strategy, and for self-training without unlabelled texts.
    """
    if strategy not in fewshot.STRATEGIES:
        raise ModelError(f"strategy is '{strategy}'; use one of {', '.join(fewshot.STRATEGIES)}.")
    if strategy == "self-training" and not shots:
        raise ModelError("self-training needs texts without labels: set shots, and the other texts are used as such.")
    started = time.perf_counter()
    chosen, others = fewshot.choose(splits["train"], shots, seed)
    precision = training.get("precision", "auto")

    def fresh() -> tuple[Classifier, PreTrainedTokenizerBase]:
        machine.seed_everything(seed)
        made, its_tokenizer = models.load_classifier(model, labels, dropout, HEADS.get(strategy, "cosine"))
        its_tokenizer.model_max_length = max_length
        return made, its_tokenizer

    classifier, tokenizer = fresh()
    train = tokenize(chosen, tokenizer, max_length, model)
    judged = not shots if judged is None else judged
    validation = None if not judged else tokenize(splits["validation"], tokenizer, max_length, model)
    if strategy == "contrastive":
        fewshot.contrast(classifier, tokenizer, chosen["text"], chosen["label"], str(folder), seed, precision=precision)
    if strategy not in HEADS:
        fewshot.set_prototypes(classifier, tokenizer, chosen["text"], chosen["label"], precision)
    teaching = training | ({"callbacks": ()} if strategy == "self-training" else {})  # what is tracked is the student
    made = trainer(classifier, tokenizer, train, validation, folder, seed=seed, **teaching)
    outcome = made.train()
    if strategy == "self-training":
        logits = models.predict(classifier, tokenizer, others["text"], precision=precision)
        unlabelled = tokenize(others, tokenizer, max_length, model)
        train = fewshot.pseudo_labelled(logits, train, unlabelled)
        classifier, tokenizer = fresh()
        texts, guesses = [*chosen["text"], *others["text"]], [*chosen["label"], *logits.argmax(axis=1)]
        fewshot.set_prototypes(classifier, tokenizer, texts, guesses, precision)
        made = trainer(classifier, tokenizer, train, None, folder, seed=seed, **training | {"epochs": student_epochs})
        outcome = made.train()
    passed = len(made.train_dataset) * outcome.metrics["epoch"]  # the epochs that were run, not those that were allowed
    rate = passed / outcome.metrics["train_runtime"]
    return Learnt(classifier, tokenizer, made, methods.count(classifier), time.perf_counter() - started, rate)
