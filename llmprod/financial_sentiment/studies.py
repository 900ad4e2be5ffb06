"""What a run of a sentiment study does."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict

from llmprod import artifacts, data, machine, models, optimize
from llmprod.evaluate import metrics
from llmprod.evaluate.studies import fitted
from llmprod.financial_sentiment import entities, multitask, sentiment, weak_labels


def training_of(parameters: Mapping[str, object]) -> dict[str, object]:
    """The arguments of `multitask.learn` among a run's parameters."""
    names = ("model", "layers", "epochs", "max_length", "batch_tokens", "learning_rate", "precision", "seed")
    return {name: parameters[name] for name in names} | {"progress": False}


def rating(parameters: Mapping[str, object]) -> dict:
    """Sentiment as a number, learnt on half of a domain: Pearson r and F1 on the other half, and on other domains."""
    machine.set_threads()
    machine.quiet()
    table = sentiment.load(parameters["dataset"], parameters["part"])
    train, validation, test = sentiment.split_half(table, parameters["seed"], parameters["by"] or "text")
    started = time.perf_counter()
    tasks = multitask.rating_tasks(train, parameters["borrowed"], parameters["part"], parameters["seed"])
    learnt = multitask.learn(tasks, **training_of(parameters))
    seconds = time.perf_counter() - started
    if parameters["int8"]:
        with tempfile.TemporaryDirectory() as folder:
            models.save_checkpoint(*learnt, Path(folder) / "learnt", "")
            learnt = optimize.int8(Path(folder) / "learnt")

    def rate(texts: Sequence[str]) -> np.ndarray:
        return multitask.predict(*learnt, list(texts), parameters["precision"])["sentiment"]

    low, high = sentiment.fit_thresholds(rate(validation["text"]), validation["sentiment"])
    shown = validation if parameters["split"] == "validation" else test
    metrics, started = {}, time.perf_counter()
    found = rate(shown["text"])
    speed = len(shown) / (time.perf_counter() - started)
    metrics |= sentiment.scores(shown, found, sentiment.to_class(found, low, high))
    others = [d for d in sentiment.DOMAINS if d != (parameters["part"] or "nyt")] if parameters["transfer"] else []
    for domain in others:
        other = sentiment.split_half(sentiment.load(part=domain), parameters["seed"])[2]
        metrics[f"r on {domain}"] = float(np.corrcoef(rate(other["text"]), other["rating"])[0, 1])
    return {"metrics": metrics, "speeds": {"training, s": seconds, "inference, texts/s": speed}}


def ten_fold(parameters: Mapping[str, object]) -> dict:
    """One fold of ten, stratified, of Financial PhraseBank; the fold's number is the seed.

    With `split` "validation" the fold itself is left alone: a sixth of the other nine is scored in its place.
    """
    from sklearn.model_selection import StratifiedKFold

    def parted(table: pd.DataFrame, parts: int, number: int, seed: int) -> list[pd.DataFrame]:
        folds = StratifiedKFold(parts, shuffle=True, random_state=seed).split(table, table["sentiment"])
        return [table.iloc[rows] for rows in list(folds)[number]]

    table = sentiment.load(parameters["dataset"], parameters["part"])
    train, test = parted(table, 10, parameters["seed"], 0)
    if parameters["split"] == "validation":
        train, test = parted(train, 6, 0, 1)
    columns = {"sentiment": "label"}
    splits = DatasetDict(
        {
            name: Dataset.from_pandas(part[["text", "sentiment"]].rename(columns=columns), preserve_index=False)
            for name, part in (("train", train), ("test", test))
        }
    )
    return fitted(splits, sentiment.CLASSES, {**parameters, "split": "test"})


def heads(parameters: Mapping[str, object]) -> dict:
    """Topic of newswire and sentiment of editorials: one encoder with two heads, or an encoder for each.

    `change` is "two encoders" or "one encoder".
    """
    machine.set_threads()
    machine.quiet()
    splits, labels, _ = data.prepared(Path(parameters["splits"]))
    train, validation, test = sentiment.split_half(sentiment.load(), parameters["seed"])
    topics = multitask.Task("topic", list(splits["train"]["text"]), np.array(splits["train"]["label"]), labels)
    feeling = multitask.Task("sentiment", train["text"].tolist(), train["rating"].to_numpy())
    together = [[topics, feeling]] if parameters["change"] == "one encoder" else [[topics], [feeling]]
    started = time.perf_counter()
    learnt = [multitask.learn(tasks, **training_of(parameters)) for tasks in together]
    seconds = time.perf_counter() - started

    def say(texts: Sequence[str]) -> dict[str, np.ndarray]:
        answers = [multitask.predict(*one, list(texts), parameters["precision"]) for one in learnt]
        return {task: value for answer in answers for task, value in answer.items()}

    rows = splits["validation" if parameters["split"] == "validation" else "test"]
    rated = validation if parameters["split"] == "validation" else test
    started = time.perf_counter()
    topic = say(rows["text"])["topic"]
    newswire = len(rows) / (time.perf_counter() - started)
    started = time.perf_counter()
    ratings = say(rated["text"])["sentiment"]
    sentences = len(rated) / (time.perf_counter() - started)
    return {
        "metrics": {
            "topic accuracy": metrics.accuracy(np.array(rows["label"]), topic.argmax(axis=1)),
            "sentiment r": float(np.corrcoef(rated["rating"], ratings)[0, 1]),
            "parameters": sum(p.numel() for classifier, _ in learnt for p in classifier.parameters()),
        },
        "speeds": {
            "training, s": seconds,
            "both answers, newswire texts/s": newswire,
            "both answers, sentences/s": sentences,
            "peak memory, MB": machine.peak_memory_mb(),
        },
    }


def weak_supervision(parameters: Mapping[str, object]) -> dict:
    """Sentiment without labels: lexicons, votes combined, and an encoder that learns from what they say.

    All are scored on the same test texts; no label is used to train or to choose.
    """
    machine.set_threads()
    machine.quiet()
    table = sentiment.load(parameters["dataset"], parameters["part"])
    train, _, test = sentiment.split_half(table, parameters["seed"])
    voted = {name: weak_labels.label_functions(part["text"]) for name, part in (("train", train), ("test", test))}
    beliefs = weak_labels.dawid_skene(voted["train"])
    task = multitask.Task("sentiment", train["text"].tolist(), beliefs, sentiment.CLASSES)
    learnt = multitask.learn([task], **training_of(parameters))
    student = multitask.predict(*learnt, test["text"].tolist(), parameters["precision"])["sentiment"]
    found = {
        "VADER": weak_labels.vader(test["text"]),
        "Loughran-McDonald": weak_labels.loughran_mcdonald(test["text"]),
        "votes combined": weak_labels.dawid_skene(voted["test"]),
        "encoder taught by votes": student,
    }
    metrics = {}
    for name, value in found.items():
        numbers = value if value.ndim == 1 else value[:, 2] - value[:, 0]
        classes = sentiment.to_class(value) if value.ndim == 1 else value.argmax(axis=1)
        metrics |= {f"{name}, {metric}": v for metric, v in sentiment.scores(test, numbers, classes).items()}
    return {"metrics": metrics, "speeds": {}}


def named_entities(parameters: Mapping[str, object]) -> dict:
    """Companies in agreements of US companies: rules, a token classifier taught on half of the sentences, both."""
    machine.set_threads()
    machine.quiet()
    table = entities.load(artifacts.fetch(parameters["dataset"]))
    table = entities.split(table, parameters["seed"])
    train, test = table[table["split"] != "test"], table[table["split"] == "test"]
    started = time.perf_counter()
    settings = {name: parameters[name] for name in ("model", "epochs", "learning_rate", "max_length", "precision")}
    learnt = entities.learn(train, seed=parameters["seed"], progress=False, **settings)
    seconds = time.perf_counter() - started
    rows = [entities.annotated(*row) for row in zip(test["tokens"], test["tags"], strict=True)]
    texts, truth = [text for text, _ in rows], [found for _, found in rows]
    answers = {
        "rules": [entities.by_rules(text) for text in texts],
        "classifier": entities.find(*learnt, texts, parameters["precision"]),
        "both": entities.both(*learnt, texts, parameters["precision"]),
    }
    metrics = {}
    for name, found in answers.items():
        metrics |= {f"{name}, {metric}": value for metric, value in entities.score(truth, found).items()}
        other = ([[e for e in some if e.name != "bank"] for some in part] for part in (truth, found))
        metrics[f"{name}, f1 without Bank"] = entities.score(*other)["f1"]
    return {"metrics": metrics | {"test sentences": len(test)}, "speeds": {"training, s": seconds}}
