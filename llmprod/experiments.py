"""The experiments that studies run: parameters -> {"metrics": ..., "speeds": ...}, each in a process of its own."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from scipy.special import softmax

from llmprod import (
    artifacts,
    data,
    entities,
    evaluate,
    feedback,
    fewshot,
    finetune,
    methods,
    models,
    optimize,
    ranking,
    recommend,
    robust,
    runner,
    sentiment,
    sequence,
    study,
    track,
)

STRENGTH = 0.3  # of the changes by which robustness is compared


def prepared(dataset: str) -> tuple:
    """A data set's splits, class names and protocol."""
    return data.prepared(study.work(dataset) / "work" / "01_data" / "splits")


def finetuning(parameters: Mapping[str, object]) -> dict:
    """One run of `finetune.learn` and its scores on a split: the test split unless settings are being chosen."""
    splits, labels, _ = prepared(parameters["dataset"])
    return fitted(splits, labels, parameters)


def fitted(splits: DatasetDict, labels: Sequence[str], parameters: Mapping[str, object]) -> dict:
    """`finetuning` on splits that are there; without a validation split it trains all epochs."""
    track.set_threads()
    track.quiet()
    settings = {name: parameters[name] for name in runner.declared("02_finetune")}
    settings["judged"] = None if "validation" in splits else False
    with tempfile.TemporaryDirectory() as folder:
        learnt = finetune.learn(splits, labels, Path(folder) / "trainer", progress=False, **settings)
        memory = track.peak_memory_mb()
        size = sum(weights.numel() * 4 for weights in methods.trained_state(learnt.classifier).values()) / 1e6
        methods.merge(learnt.classifier)
        texts, y = list(splits[parameters["split"]]["text"]), np.array(splits[parameters["split"]]["label"])
        started = time.perf_counter()
        logits = models.predict(learnt.classifier, learnt.tokenizer, texts, precision=parameters["precision"])
        rate = len(texts) / (time.perf_counter() - started)
    scores = evaluate.summary(y, softmax(logits.astype(float), axis=1))
    if parameters["robust_texts"]:
        scores |= changed_texts(learnt, texts, y, parameters)
    return {
        "metrics": scores | {"trained parameters": learnt.trained_parameters},
        "speeds": {
            "training, s": learnt.seconds,
            "peak memory, MB": memory,
            "checkpoint, MB": size,
            "inference, texts/s": rate,
        },
    }


def changed_texts(learnt: finetune.Learnt, texts: list[str], y: np.ndarray, parameters: Mapping) -> dict[str, float]:
    """Accuracy on some texts after each kind of change of `robust` in `STRENGTH` of the words."""
    some = np.random.default_rng(0).permutation(len(texts))[: parameters["robust_texts"]]

    def answer(changed: list[str]) -> np.ndarray:
        return models.predict(learnt.classifier, learnt.tokenizer, changed, precision=parameters["precision"]).argmax(1)

    found = robust.steadiness(answer, [texts[i] for i in some], y[some], [0, STRENGTH], seed=0)
    return {"unchanged": float(found[0].iloc[0]), **found[STRENGTH]}


def setfit_library(parameters: Mapping[str, object]) -> dict:
    """The setfit library on the same labelled texts: contrastive pairs, then logistic regression on the vectors."""
    from setfit import SetFitModel, Trainer, TrainingArguments

    track.set_threads()
    track.quiet()
    track.seed_everything(parameters["seed"])
    splits, _, _ = prepared(parameters["dataset"])
    chosen, _ = fewshot.choose(splits["train"], parameters["shots"], parameters["seed"])
    started = time.perf_counter()
    model = SetFitModel.from_pretrained(str(models.model_folder(parameters["model"])))
    model.model_body.max_seq_length = parameters["max_length"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            batch_size=32,
            num_epochs=1,
            num_iterations=parameters["pairs"],
            seed=parameters["seed"],
            show_progress_bar=False,
            save_strategy="no",
            report_to="none",
        )
        train = Dataset.from_dict({"text": list(chosen["text"]), "label": list(chosen["label"])})
        Trainer(model=model, args=arguments, train_dataset=train).train()
    seconds = time.perf_counter() - started
    part = splits[parameters["split"]]
    probabilities = np.asarray(model.predict_proba(list(part["text"]), as_numpy=True))
    scores = evaluate.summary(np.array(part["label"]), probabilities)
    return {"metrics": scores, "speeds": {"training, s": seconds, "peak memory, MB": track.peak_memory_mb()}}


def class_names(parameters: Mapping[str, object]) -> dict:
    """Zero-shot: the class whose name's vector lies nearest to the text's, with no labelled text at all."""
    track.set_threads()
    track.quiet()
    splits, labels, _ = prepared(parameters["dataset"])
    classifier, tokenizer = models.load_classifier(parameters["model"], labels, head="cosine")
    tokenizer.model_max_length = parameters["max_length"]
    fewshot.set_prototypes(classifier, tokenizer, [], [], parameters["precision"])
    part = splits[parameters["split"]]
    logits = models.predict(classifier, tokenizer, list(part["text"]), precision=parameters["precision"])
    return {"metrics": evaluate.summary(np.array(part["label"]), softmax(logits.astype(float), axis=1)), "speeds": {}}


def active_learning(parameters: Mapping[str, object]) -> dict:
    """Labels bought by one acquisition strategy until 12 % of the texts have one, on frozen text vectors."""
    track.set_threads()
    track.quiet()
    splits, _, _ = prepared(parameters["dataset"])
    kept = (
        study.work(parameters["dataset"])
        / f"vectors-{artifacts.checksum(parameters['model'])}-{parameters['max_length']}"
    )

    def vectors(name: str) -> np.ndarray:
        path = kept.with_name(f"{kept.name}-{name}.npy")
        if not path.exists():
            np.save(path, models.embed(parameters["model"], list(splits[name]["text"]), parameters["max_length"]))
        return np.load(path)

    pool, test = ((vectors(name), np.array(splits[name]["label"])) for name in ("train", parameters["split"]))
    whole = float(feedback.fit(*pool).score(*test))
    classes, started = len(np.unique(pool[1])), time.perf_counter()
    curve = feedback.learning_curve(
        pool, test, parameters["acquisition"], 2 * classes, classes, len(pool[1]) * 12 // 100, parameters["seed"]
    )
    metrics = {
        "accuracy with all labels": whole,
        "labels to 90 % of it": feedback.labels_needed(curve, 0.9 * whole),
        "accuracy": float(curve["accuracy"].iloc[-1]),
    }
    return {"metrics": metrics, "speeds": {"s": time.perf_counter() - started}, "curve": curve.to_dict("list")}


def recommendation(parameters: Mapping[str, object]) -> dict:
    """All models of `13_recommendation` by one protocol, and what the parts of the learned ranking gain.

    Of cold items: what the graph gains beside titles and beside whole texts.
    """
    track.set_threads()
    track.quiet()
    started, seed, protocol = time.perf_counter(), parameters["seed"], parameters["protocol"]
    catalogue = recommend.load(parameters["dataset"])
    train, test = recommend.split(catalogue.interactions, protocol, seed)
    taken, relevant = recommend.matrix(train, catalogue.shape), recommend.matrix(test, catalogue.shape)
    texts = catalogue.items["text"].tolist()
    text, titles = (
        recommend.centred(models.embed(parameters["model"], some, parameters["max_length"]))
        for some in (texts, catalogue.items["title"].tolist())
    )
    graph = recommend.fact_vectors(catalogue)
    if protocol == "cold":
        encoder, tokenizer, _ = recommend.learn_tower(
            texts, taken, parameters["model"], parameters["tower_steps"], seed=seed, progress=False
        )
        tower = recommend.centred(recommend.encode(encoder, tokenizer, texts))
        contents = {"titles": titles, "text, zero-shot": text, "text tower": tower, "graph": graph}
        contents |= {f"{name} + graph": recommend.combined(contents[name], graph) for name in list(contents)[:3]}
        scores = recommend.cold_start(train, catalogue, contents, seed)
        cold = np.setdiff1d(test["item"], train["item"])
        scores = {name: recommend.spread(s[:, cold], np.tile(cold, (len(s), 1)), s.shape) for name, s in scores.items()}
    else:
        folds, k, vectors = parameters["folds"], parameters["candidates"], {"text": text, "graph": graph}
        taught = recommend.examples(train, catalogue, vectors, protocol, folds, k, seed)
        scores = recommend.first_stage(train, catalogue, vectors, seed)
        known, candidates = recommend.features(train, catalogue, scores), recommend.retrieve(scores, taken, k)
        for name, left_out in recommend.ABLATION.items():
            ranker = recommend.teach(taught, recommend.without(known, left_out), seed)
            scores[name] = recommend.spread(ranker.scores(known, candidates), candidates, catalogue.shape)
    found = {name: ranking.per_user(ranking.top(s, 10, taken), relevant) for name, s in scores.items()}
    metrics = {f"{name}, {m}": float(v) for name, table in found.items() for m, v in table.mean().items()}
    others = ("EASE", "recent popularity", *list(recommend.ABLATION)[1:])
    gains = {f"gain over {other}": ("hybrid", other) for other in others}
    if protocol == "cold":
        gains = {
            f"the graph's gain over {name}{kind}": (f"{name} + graph{kind}", f"{name}{kind}")
            for name in ("titles", "text, zero-shot", "text tower")
            for kind in ("", ", ridge")
        }
    for name, (one, other) in gains.items():
        gain, low, high = ranking.paired(found[one]["nDCG"], found[other]["nDCG"])
        metrics |= {name: gain, f"{name}, low": low, f"{name}, high": high}
    return {
        "metrics": metrics,
        "speeds": {"s": time.perf_counter() - started, "peak memory, MB": track.peak_memory_mb()},
    }


def next_item(parameters: Mapping[str, object]) -> dict:
    """A transformer over histories, in their order, beside models that know no order, on the same split."""
    track.set_threads()
    track.quiet()
    started = time.perf_counter()
    catalogue = recommend.load(parameters["dataset"])
    train, test = recommend.split(catalogue.interactions, parameters["protocol"], parameters["seed"])
    taken, relevant = recommend.matrix(train, catalogue.shape), recommend.matrix(test, catalogue.shape)
    popular = np.broadcast_to(np.asarray(taken.sum(axis=0)), catalogue.shape)
    new = np.diff(taken.indptr)[:, None] == 0
    scores = {
        "popularity": popular,
        "recent popularity": recommend.recent(train, catalogue.shape),
        "EASE": np.where(new, popular, taken @ recommend.ease(taken)),
        "self-attention": np.where(
            new, popular, sequence.next_items(train, catalogue.shape, parameters["seed"], progress=False)
        ),
    }
    found = {name: ranking.per_user(ranking.top(s, 10, taken), relevant) for name, s in scores.items()}
    metrics = {f"{name}, {m}": float(v) for name, table in found.items() for m, v in table.mean().items()}
    gain, low, high = ranking.paired(found["self-attention"]["nDCG"], found["EASE"]["nDCG"])
    metrics |= {"gain over EASE": gain, "gain over EASE, low": low, "gain over EASE, high": high}
    return {"metrics": metrics, "speeds": {"s": time.perf_counter() - started}}


def training_of(parameters: Mapping[str, object]) -> dict[str, object]:
    """The arguments of `sentiment.learn` among a run's parameters."""
    names = ("model", "layers", "epochs", "max_length", "batch_tokens", "learning_rate", "precision", "seed")
    return {name: parameters[name] for name in names} | {"progress": False}


def rating(parameters: Mapping[str, object]) -> dict:
    """Sentiment as a number, learnt on half of a domain: Pearson r and F1 on the other half, and on other domains."""
    track.set_threads()
    track.quiet()
    table = sentiment.load(parameters["dataset"], parameters["part"])
    train, validation, test = sentiment.halves(table, parameters["seed"], parameters["by"] or "text")
    started = time.perf_counter()
    tasks = sentiment.rating_tasks(train, parameters["borrowed"], parameters["part"], parameters["seed"])
    learnt = sentiment.learn(tasks, **training_of(parameters))
    seconds = time.perf_counter() - started
    if parameters["int8"]:
        with tempfile.TemporaryDirectory() as folder:
            models.save_checkpoint(*learnt, Path(folder) / "learnt", "")
            learnt = optimize.int8(Path(folder) / "learnt")

    def rate(texts: Sequence[str]) -> np.ndarray:
        return sentiment.predict(*learnt, list(texts), parameters["precision"])["sentiment"]

    low, high = sentiment.thresholds(rate(validation["text"]), validation["sentiment"])
    shown = validation if parameters["split"] == "validation" else test
    metrics, started = {}, time.perf_counter()
    found = rate(shown["text"])
    speed = len(shown) / (time.perf_counter() - started)
    metrics |= sentiment.scores(shown, found, sentiment.to_class(found, low, high))
    others = [d for d in sentiment.DOMAINS if d != (parameters["part"] or "nyt")] if parameters["transfer"] else []
    for domain in others:
        other = sentiment.halves(sentiment.load(part=domain), parameters["seed"])[2]
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
    track.set_threads()
    track.quiet()
    splits, labels, _ = prepared("reuters-r8")
    train, validation, test = sentiment.halves(sentiment.load(), parameters["seed"])
    topics = sentiment.Task("topic", list(splits["train"]["text"]), np.array(splits["train"]["label"]), labels)
    feeling = sentiment.Task("sentiment", train["text"].tolist(), train["rating"].to_numpy())
    together = [[topics, feeling]] if parameters["change"] == "one encoder" else [[topics], [feeling]]
    started = time.perf_counter()
    learnt = [sentiment.learn(tasks, **training_of(parameters)) for tasks in together]
    seconds = time.perf_counter() - started

    def say(texts: Sequence[str]) -> dict[str, np.ndarray]:
        answers = [sentiment.predict(*one, list(texts), parameters["precision"]) for one in learnt]
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
            "topic accuracy": evaluate.accuracy(np.array(rows["label"]), topic.argmax(axis=1)),
            "sentiment r": float(np.corrcoef(rated["rating"], ratings)[0, 1]),
            "parameters": sum(p.numel() for classifier, _ in learnt for p in classifier.parameters()),
        },
        "speeds": {
            "training, s": seconds,
            "both answers, newswire texts/s": newswire,
            "both answers, sentences/s": sentences,
            "peak memory, MB": track.peak_memory_mb(),
        },
    }


def weak_labels(parameters: Mapping[str, object]) -> dict:
    """Sentiment without labels: lexicons, votes combined, and an encoder that learns from what they say.

    All are scored on the same test texts; no label is used to train or to choose.
    """
    track.set_threads()
    track.quiet()
    table = sentiment.load(parameters["dataset"], parameters["part"])
    train, _, test = sentiment.halves(table, parameters["seed"])
    voted = {name: sentiment.votes(part["text"]) for name, part in (("train", train), ("test", test))}
    beliefs = sentiment.combine(voted["train"])
    task = sentiment.Task("sentiment", train["text"].tolist(), beliefs, sentiment.CLASSES)
    learnt = sentiment.learn([task], **training_of(parameters))
    student = sentiment.predict(*learnt, test["text"].tolist(), parameters["precision"])["sentiment"]
    found = {
        "VADER": sentiment.vader(test["text"]),
        "Loughran-McDonald": sentiment.loughran_mcdonald(test["text"]),
        "votes combined": sentiment.combine(voted["test"]),
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
    track.set_threads()
    track.quiet()
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


EXPERIMENTS: dict[str, Callable[[Mapping], dict]] = {
    "active learning": active_learning,
    "finetune": finetuning,
    "setfit": setfit_library,
    "class names": class_names,
    "recommendation": recommendation,
    "next item": next_item,
    "rating": rating,
    "ten-fold": ten_fold,
    "heads": heads,
    "weak labels": weak_labels,
    "entities": named_entities,
}
