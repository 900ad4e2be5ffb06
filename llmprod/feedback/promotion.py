"""Iterate: reviewed feedback becomes training data, then a new bundle, which is served only if it proves better."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict

from llmprod.deploy import bundle
from llmprod.deploy.bundle import Bundle
from llmprod.deploy.registry import Registry
from llmprod.evaluate import metrics
from llmprod.feedback import review
from llmprod.feedback.store import FeedbackError, Store
from llmprod.finetune import methods, trainer
from llmprod.finetune.recipe import Recipe
from llmprod.models import Predictor
from llmprod.optimize import export
from llmprod.optimize.export import OnnxClassifier

RETRAIN = Recipe(method="lora", epochs=3, learning_rate=1e-3, max_length=128, batch_tokens=1024)


@dataclass(frozen=True)
class Rules:
    """What a new bundle must reach before it is served."""

    significance: float = 0.05  # of McNemar's exact test on the new data; of reviews that agree by chance
    old_tolerance: float = 0.005  # accuracy on the regression set that may be lost
    class_tolerance: float = (
        0.05  # share of a class's texts that may be lost, old and new together; one text always may
    )
    least_new: int = 20  # audited reviews without which nothing is promoted


@dataclass
class Decision:
    """Whether the new bundle is served, why, and all numbers behind that."""

    promoted: bool
    reasons: list[str]  # in words: what speaks against it, or why it is better
    parent: str  # the id of the served bundle
    candidate: str  # the id of the new one
    numbers: dict[str, float]
    classes: pd.DataFrame  # of the regression set and the new data: texts, right before, right after
    answers: dict[str, dict[str, np.ndarray]] = field(repr=False)  # set -> labels, served, candidate (class numbers)


def iterate(
    registry: Registry,
    store: Store,
    splits: DatasetDict,
    recipe: Recipe = RETRAIN,
    *,
    regression: Mapping[str, Sequence] | None = None,
    weights: Path | None = None,
    rehearsal: int = 100,
    repeat: int = 2,
    rules: Rules = Rules(),
) -> Decision:
    """Retrains what is served on reviewed feedback, compares, and promotes the new bundle if it keeps the rules.

    Training goes on from the served weights, with some old texts among the new ones (rehearsal): a pass then reads
    some hundred texts, and not all that the base model would need.

    What was audited at random is never trained on and is the new data of the comparison: the other reasons pick
    answers that the *served* model is likely to have wrong, so that any other model would look better on them.

    Args:
        registry: what is served, and where the new bundle goes
        store: its settled reviews are the feedback (`review.settled`); what users say alone is not
        splits: `train` and `validation` of the old data, with `text` and `label` (class numbers in the bundle's order)
        regression: "text" and "label" (names) of the frozen regression set; None: the bundle's frozen texts
        weights: a checkpoint of the served model, needed where the served bundle is ONNX and its weights are not kept
        rehearsal: old training texts of each class
        repeat: how many times a reviewed text is shown in an epoch

    Raises FeedbackError where nothing was reviewed, or labels are unknown.
    """
    served, settled = registry.load(), review.settled(store)
    if settled.empty:
        raise FeedbackError("Nothing is reviewed yet: two reviews of an answer that agree, or a third, settle it.")
    if unknown := set(settled["label"]) - set(served.labels):
        raise FeedbackError(f"Reviews have labels that the model lacks: {', '.join(sorted(unknown))}.")
    old = regression or {name: [row[name] for row in served.frozen] for name in ("text", "label")}
    held_out = {text.casefold() for text in [*old["text"], *(row["text"] for row in served.frozen)]}
    new = settled[settled["reason"] == review.AUDIT]
    lessons = settled[(settled["reason"] != review.AUDIT) & ~settled["text"].str.casefold().isin(held_out)]
    lessons = lessons[~lessons["text"].str.casefold().isin(set(new["text"].str.casefold()))]
    texts, labels = training_data(splits["train"], lessons, served.labels, rehearsal, repeat, recipe.seed)
    start = weights_of(registry, served, weights)
    with tempfile.TemporaryDirectory() as folder:
        trained = retrain(start, texts, labels, recipe, Path(folder))
        provenance = {
            "parent": served.id,
            "data": hashlib.sha256(json.dumps([texts, labels]).encode()).hexdigest(),
            "reviewed texts learnt": len(lessons),
            "reviewed texts to compare": len(new),
            "old texts": len(texts) - repeat * len(lessons),
            "recipe": asdict(recipe),
        }
        candidate = packed(trained, served, splits["validation"], provenance, Path(folder))
        decision = compare(served, candidate, old, new, rules)
        if decision.promoted:
            registry.add(candidate)
            keep_weights(registry, candidate.id, trained)
            registry.promote(candidate.id, "; ".join(decision.reasons))
    return decision


# Training


def training_data(
    train: Dataset, lessons: pd.DataFrame, names: Sequence[str], rehearsal: int, repeat: int, seed: int
) -> tuple[list[str], list[int]]:
    """Old texts, at most `rehearsal` of each class, and after them the reviewed ones, each `repeat` times."""
    random, labels = np.random.default_rng(seed), np.array(train["label"])
    rows = [random.permutation(np.flatnonzero(labels == k))[:rehearsal] for k in np.unique(labels)]
    chosen = np.sort(np.concatenate(rows))
    texts = [train[int(row)]["text"] for row in chosen] + repeat * lessons["text"].tolist()
    return texts, labels[chosen].tolist() + repeat * [names.index(label) for label in lessons["label"]]


def retrain(start: Predictor, texts: list[str], labels: list[int], recipe: Recipe, folder: Path) -> Predictor:
    """Trains a classifier further, in place, by a recipe's method; what that adds is merged into the weights."""
    length = min(recipe.max_length, start.tokenizer.model_max_length)
    tokens = start.tokenizer(texts, truncation=True, max_length=length)
    part = Dataset.from_dict({**tokens, "labels": labels})
    trainer.trainer(start, part, None, folder / "trainer", recipe, progress=False).train()
    methods.merge(start.model)
    start.model.requires_grad_(True)
    return start


def weights_of(registry: Registry, served: Bundle, weights: Path | None) -> Predictor:
    """The served model, ready to be trained. Raises FeedbackError where there is only ONNX."""
    kept = registry.folder / "weights" / served.id
    if kept.is_dir():
        return Predictor.load(kept, "fp32")
    if not isinstance(served.predictor.model, OnnxClassifier):
        return Predictor.load(served.folder, "fp32")
    if weights is None:
        raise FeedbackError(f"The bundle {served.id} is ONNX, which can't be trained: name the checkpoint behind it.")
    return Predictor.load(weights, "fp32")


def keep_weights(registry: Registry, identity: str, trained: Predictor) -> None:
    """Keeps the weights of a bundle that holds only ONNX next to the registry's bundles, for the next iteration."""
    if (registry.folder / identity / export.ONNX).exists():
        trained.save(registry.folder / "weights" / identity, f"# Weights of the bundle {identity}\n")


def packed(trained: Predictor, served: Bundle, validation: Dataset, provenance: dict, folder: Path) -> Bundle:
    """The new bundle, in the form of the served one: ONNX or safetensors, the same threshold and frozen texts.

    The temperature is fitted on validation anew.
    """
    if isinstance(served.predictor.model, OnnxClassifier):
        small = (served.folder / export.ONNX).stat().st_size < 2 * trained.model.num_parameters()
        write = (lambda file: export.save_int8(trained.model, file)) if small else None
        trained = export.save(trained, folder / "onnx", write)
    logits = trained.predict(list(validation["text"]))
    settings = {"temperature": metrics.temperature(np.array(validation["label"]), logits.astype(float))}
    settings |= {"threshold": served.manifest["threshold"], "provenance": provenance}
    frozen = {name: [row[name] for row in served.frozen] for name in ("text", "label")}
    card = (served.folder / "README.md").read_text(encoding="utf-8") + (
        f"\n## Trained further\n\nFrom the bundle {provenance['parent']}, on {provenance['reviewed texts learnt']} "
        f"reviewed answers and {provenance['old texts']} old texts.\n"
    )
    return bundle.write(folder / "bundle", trained, frozen, card, **settings)


# Comparison


def compare(
    served: Bundle, candidate: Bundle, old: Mapping[str, Sequence], new: pd.DataFrame, rules: Rules = Rules()
) -> Decision:
    """Compares two bundles on old and new data, and decides by the rules."""
    answers = {}
    for name, data in (("old", old), ("new", new)):
        labels = np.array([served.labels.index(label) for label in data["label"]], dtype=int)
        both = {
            who: np.array([served.labels.index(answer.label) for answer in of.predict(list(data["text"]))], dtype=int)
            for who, of in (("served", served), ("candidate", candidate))
        }
        answers[name] = {"labels": labels, **both}
    numbers = figures(answers)
    classes = by_class(answers, served.labels)
    against = objections(numbers, classes, rules)
    why = against or [
        f"right on {100 * numbers['new, candidate']:.1f} % of the audited answers, before "
        f"{100 * numbers['new, served']:.1f} % (p = {numbers['p']:.2g}); "
        f"old texts {100 * numbers['old, change']:+.2f} points"
    ]
    return Decision(not against, why, served.id, candidate.id, numbers, classes, answers)


def figures(answers: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Accuracy of both bundles on old and new data, the paired changes with intervals, and McNemar's exact test.

    "p, by chance" is how often permuted reviews agree with the served bundle as much as these do.
    """
    numbers: dict[str, float] = {}
    for name, of in answers.items():
        labels, before, after = of["labels"], of["served"], of["candidate"]
        numbers[f"{name}, texts"] = len(labels)
        if len(labels):
            change, low, high = metrics.paired_bootstrap(metrics.accuracy, labels, after, before)
            numbers |= {f"{name}, served": metrics.accuracy(labels, before)}
            numbers |= {f"{name}, candidate": metrics.accuracy(labels, after)}
            numbers |= {f"{name}, change": change, f"{name}, from": low, f"{name}, to": high}
    of = answers["new"]
    numbers["p, by chance"] = by_chance(of["labels"], of["served"])
    better, worse, numbers["p"] = metrics.mcnemar(of["labels"], of["candidate"], of["served"])
    return numbers | {"only candidate right": better, "only served right": worse}


def by_chance(labels: np.ndarray, served: np.ndarray, rounds: int = 1000) -> float:
    """The one-sided p-value of the agreement of two labellings by permutation: how often chance gives as much."""
    random, equal = np.random.default_rng(0), int((labels == served).sum())
    return (1 + sum(int((random.permutation(labels) == served).sum()) >= equal for _ in range(rounds))) / (rounds + 1)


def by_class(answers: Mapping[str, Mapping[str, np.ndarray]], names: Sequence[str]) -> pd.DataFrame:
    """For each class, over old and new data: how many texts it has, and how many are right before and after."""
    labels, before, after = (
        np.concatenate([of[name] for of in answers.values()]) for name in ("labels", "served", "candidate")
    )
    rows = {
        name: {
            "texts": int((labels == k).sum()),
            "served": int(((before == k) & (labels == k)).sum()),
            "candidate": int(((after == k) & (labels == k)).sum()),
        }
        for k, name in enumerate(names)
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["texts", "served", "candidate"])


def objections(numbers: Mapping[str, float], classes: pd.DataFrame, rules: Rules) -> list[str]:
    """What speaks against promotion, in words; [] if nothing does."""
    found = []
    if numbers["new, texts"] < rules.least_new:
        found.append(f"{numbers['new, texts']:.0f} audited reviews, and at least {rules.least_new} are needed")
    elif not (numbers["new, change"] > 0 and numbers["p"] <= rules.significance):
        found.append(
            f"not better on the {numbers['new, texts']:.0f} audited answers: {numbers['only candidate right']:.0f} "
            f"right that were wrong, {numbers['only served right']:.0f} wrong that were right (p = {numbers['p']:.2g})"
        )
    if numbers["new, texts"] >= rules.least_new and numbers["p, by chance"] > rules.significance:
        found.append(
            f"reviews agree with the served bundle no more than by chance ({100 * numbers['new, served']:.0f} % are "
            f"equal, p = {numbers['p, by chance']:.2g}): look at the reviews"
        )
    if numbers["old, change"] < -rules.old_tolerance - 1e-9:
        found.append(
            f"old texts lose {-100 * numbers['old, change']:.2f} points (95 %: {100 * numbers['old, from']:+.2f} "
            f"to {100 * numbers['old, to']:+.2f}), and {100 * rules.old_tolerance:g} are allowed"
        )
    lost = classes["served"] - classes["candidate"]
    for name in classes.index[lost > np.maximum(rules.class_tolerance * classes["texts"], 1)]:
        found.append(f"'{name}' loses {lost[name]} of {classes['texts'][name]} texts")
    return found
