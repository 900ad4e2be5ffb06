"""The experiments that studies run: parameters -> {"metrics": ..., "speeds": ...}, each in a process of its own."""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from scipy.special import softmax

from llmprod import (
    artifacts,
    data,
    evaluate,
    feedback,
    fewshot,
    finetune,
    methods,
    models,
    ranking,
    recommend,
    robust,
    runner,
    study,
    track,
)

STRENGTH = 0.3  # of the changes by which robustness is compared


def prepared(dataset: str) -> tuple:
    """A data set's splits, class names and protocol."""
    return data.prepared(study.work(dataset) / "work" / "01_data" / "splits")


def finetuning(parameters: Mapping[str, object]) -> dict:
    """One run of `finetune.learn` and its scores on a split: the test split unless settings are being chosen."""
    track.set_threads()
    track.quiet()
    splits, labels, _ = prepared(parameters["dataset"])
    settings = {name: parameters[name] for name in runner.declared("02_finetune")}
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
    from datasets import Dataset
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
    """All models of `13_recommendation` by one protocol, and the gain of the learned ranking over the best of them."""
    track.set_threads()
    track.quiet()
    started, seed, protocol = time.perf_counter(), parameters["seed"], parameters["protocol"]
    catalogue = recommend.load(parameters["dataset"])
    train, test = recommend.split(catalogue.interactions, protocol, seed)
    taken, relevant = recommend.matrix(train, catalogue.shape), recommend.matrix(test, catalogue.shape)
    texts = catalogue.items["text"].tolist()
    vectors = recommend.centred(models.embed(parameters["model"], texts, parameters["max_length"]))
    if protocol == "cold":
        encoder, tokenizer, _ = recommend.learn_tower(
            texts, taken, parameters["model"], parameters["tower_steps"], seed=seed, progress=False
        )
        tower = recommend.centred(recommend.encode(encoder, tokenizer, texts))
        scores = recommend.cold_start(train, catalogue, {"text, zero-shot": vectors, "text tower": tower}, seed)
        cold = np.setdiff1d(test["item"], train["item"])
        scores = {name: recommend.spread(s[:, cold], np.tile(cold, (len(s), 1)), s.shape) for name, s in scores.items()}
    else:
        folds, k = parameters["folds"], parameters["candidates"]
        taught = recommend.examples(train, catalogue, vectors, protocol, folds, k, seed)
        scores = recommend.first_stage(train, catalogue, vectors, seed)
        known, candidates = recommend.features(train, catalogue, scores), recommend.retrieve(scores, taken, k)
        for name, left_out in recommend.ABLATION.items():
            names = [feature for feature in known if feature not in left_out]
            ranker = recommend.teach(taught, names, seed)
            scores[name] = recommend.spread(ranker.scores(known, candidates), candidates, catalogue.shape)
    found = {name: ranking.per_user(ranking.top(s, 10, taken), relevant) for name, s in scores.items()}
    metrics = {f"{name}, {m}": float(v) for name, table in found.items() for m, v in table.mean().items()}
    if protocol != "cold":
        for name in ("EASE", "recent popularity", "hybrid without text"):
            gain, low, high = ranking.paired(found["hybrid"]["nDCG"], found[name]["nDCG"])
            metrics |= {f"gain over {name}": gain, f"gain over {name}, low": low, f"gain over {name}, high": high}
    return {
        "metrics": metrics,
        "speeds": {"s": time.perf_counter() - started, "peak memory, MB": track.peak_memory_mb()},
    }


EXPERIMENTS: dict[str, Callable[[Mapping], dict]] = {
    "active learning": active_learning,
    "finetune": finetuning,
    "setfit": setfit_library,
    "class names": class_names,
    "recommendation": recommendation,
}
