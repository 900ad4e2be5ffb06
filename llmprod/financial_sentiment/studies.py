"""The experiments of the sentiment studies: train, then score."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict

from llmprod import artifacts, data, machine, models
from llmprod.evaluate import metrics
from llmprod.evaluate.studies import fitted
from llmprod.financial_sentiment import entities, multitask, recognizer, sentiment, weak_labels
from llmprod.optimize import export


def training_of(parameters: Mapping[str, object]) -> dict[str, object]:
    """The arguments of `multitask.train_multitask` among a run's parameters."""
    names = ("model", "layers", "epochs", "max_length", "batch_tokens", "learning_rate", "precision", "seed")
    return {name: parameters[name] for name in names} | {"progress": False}


def timed(function: Callable, *arguments: object, **settings: object) -> tuple[object, float]:
    """The result of a function, and how many seconds it took."""
    started = time.perf_counter()
    return function(*arguments, **settings), time.perf_counter() - started


def in_int8(predictor: models.Predictor) -> models.Predictor:
    """A classifier with int8 weights, see `export.int8`."""
    with tempfile.TemporaryDirectory() as folder:
        predictor.save(Path(folder) / "float", "")
        return export.int8(Path(folder) / "float", batch_size=8, side_by_side=True)


def rating(parameters: Mapping[str, object]) -> dict:
    """Trains on the ratings of half a domain: Pearson r and F1 on the other half, and r on other domains."""
    table = sentiment.load(parameters["dataset"], parameters["part"])
    train, validation, test = sentiment.split_half(table, parameters["seed"], parameters["by"])
    tasks = multitask.rating_tasks(train, parameters["borrowed"], parameters["part"], parameters["seed"])
    predictor, seconds = timed(multitask.train_multitask, tasks, **training_of(parameters))
    if parameters["int8"]:
        predictor = in_int8(predictor)
    thresholds = sentiment.fit_thresholds(multitask.rate(predictor, validation["text"]), validation["sentiment"])
    shown = validation if parameters["split"] == "validation" else test
    ratings, inference = timed(multitask.rate, predictor, shown["text"])
    scores = sentiment.scores(shown, ratings, sentiment.to_class(ratings, *thresholds))
    for domain in sentiment.DOMAINS if parameters["transfer"] else ():
        if domain != (parameters["part"] or "nyt"):
            other = sentiment.split_half(sentiment.load(part=domain), parameters["seed"])[2]
            found = multitask.rate(predictor, other["text"])
            scores[f"r on {domain}"] = float(np.corrcoef(found, other["rating"])[0, 1])
    return {"metrics": scores, "speeds": {"training, s": seconds, "inference, texts/s": len(shown) / inference}}


def ten_fold(parameters: Mapping[str, object]) -> dict:
    """Trains on nine of ten stratified folds of Financial PhraseBank; tests on the fold whose number is the seed.

    With `split` "validation" that fold is not touched: a sixth of the other nine is scored instead.
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
    splits, labels, _ = data.prepared(Path(parameters["splits"]))
    train, validation, test = sentiment.split_half(sentiment.load(), parameters["seed"])
    topic = multitask.Task("topic", list(splits["train"]["text"]), np.array(splits["train"]["label"]), labels)
    tasks = [topic, *multitask.rating_tasks(train)]
    started = time.perf_counter()
    encoders = [
        multitask.train_multitask(some, **training_of(parameters))
        for some in ([tasks] if parameters["change"] == "one encoder" else [[task] for task in tasks])
    ]
    seconds = time.perf_counter() - started

    def predict(texts: Sequence[str]) -> dict[str, np.ndarray]:
        return {task: v for encoder in encoders for task, v in multitask.predict(encoder, list(texts)).items()}

    rows = splits["validation" if parameters["split"] == "validation" else "test"]
    rated = validation if parameters["split"] == "validation" else test
    newswire, newswire_seconds = timed(predict, rows["text"])
    sentences, sentences_seconds = timed(predict, rated["text"])
    return {
        "metrics": {
            "topic accuracy": metrics.accuracy(np.array(rows["label"]), newswire["topic"].argmax(axis=1)),
            "sentiment r": float(np.corrcoef(rated["rating"], sentences["sentiment"])[0, 1]),
            "parameters": sum(p.numel() for encoder in encoders for p in encoder.model.parameters()),
        },
        "speeds": {
            "training, s": seconds,
            "both answers, newswire texts/s": len(rows) / newswire_seconds,
            "both answers, sentences/s": len(rated) / sentences_seconds,
            "peak memory, MB": machine.peak_memory_mb(),
        },
    }


def weak_supervision(parameters: Mapping[str, object]) -> dict:
    """Sentiment without labels: lexicons, votes combined, and an encoder trained on their soft labels.

    All are scored on the same test texts; no label is used for training or for any choice.
    """
    table = sentiment.load(parameters["dataset"], parameters["part"])
    train, _, test = sentiment.split_half(table, parameters["seed"])
    votes = {name: weak_labels.label_functions(part["text"]) for name, part in (("train", train), ("test", test))}
    soft = weak_labels.dawid_skene(votes["train"])
    task = multitask.Task("sentiment", train["text"].tolist(), soft, sentiment.CLASSES)
    student = multitask.train_multitask([task], **training_of(parameters))
    outputs = {
        "VADER": weak_labels.vader(test["text"]),
        "Loughran-McDonald": weak_labels.loughran_mcdonald(test["text"]),
        "votes combined": weak_labels.dawid_skene(votes["test"]),
        "encoder taught by votes": multitask.rate(student, test["text"]),
    }
    scores = {}
    for name, value in outputs.items():
        is_rating = value.ndim == 1
        ratings = value if is_rating else value[:, 2] - value[:, 0]
        classes = sentiment.to_class(value) if is_rating else value.argmax(axis=1)
        scores |= {f"{name}, {metric}": v for metric, v in sentiment.scores(test, ratings, classes).items()}
    return {"metrics": scores, "speeds": {}}


def named_entities(parameters: Mapping[str, object]) -> dict:
    """A token classifier trained on CoNLL-2003: F1 there, and on companies in financial agreements (unseen domain)."""
    names = ("model", "epochs", "learning_rate", "max_length", "batch_tokens", "bare", "precision", "seed")
    settings = {name: parameters[name] for name in names} | {"progress": False}
    train = entities.conll("train", parameters["longest"])
    finder, seconds = timed(recognizer.train, train, **settings)
    texts, truth = zip(*entities.conll(parameters["split"]), strict=True)
    found, inference = timed(finder.find, texts)
    speeds = {"training, s": seconds, "inference, texts/s": len(texts) / inference}
    scores = {f"CoNLL-2003, {metric}": value for metric, value in entities.score(truth, found).items()}
    for kind in entities.KINDS.values():
        scores[f"CoNLL-2003, f1, {kind}"] = entities.score(truth, found, [kind])["f1"]
    texts, truth = zip(*entities.agreements(artifacts.fetch("ner-finance")), strict=True)
    found = finder.find(texts)
    companies = {f"agreements, company, {m}": v for m, v in entities.score(truth, found, ["company"]).items()}
    # more than half of the companies are the word Bank, a party's name in the agreement
    others = ([[e for e in some if e.name != "bank"] for some in part] for part in (truth, found))
    companies["agreements, company, f1 without Bank"] = entities.score(*others, ["company"])["f1"]
    return {"metrics": scores | companies, "speeds": speeds}
