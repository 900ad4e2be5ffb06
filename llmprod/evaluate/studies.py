"""What a run of a fine-tuning study does: train, then score."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from scipy.special import softmax

from llmprod import artifacts, data, machine, models
from llmprod.evaluate import active, metrics, robust
from llmprod.finetune import fewshot, learn, methods

STRENGTH = 0.3  # of the changes by which robustness is compared


def finetuning(parameters: Mapping[str, object]) -> dict:
    """One run of `learn.learn` and its scores on a split: the test split unless settings are being chosen."""
    splits, labels, _ = data.prepared(Path(parameters["splits"]))
    return fitted(splits, labels, parameters)


def fitted(splits: DatasetDict, labels: Sequence[str], parameters: Mapping[str, object]) -> dict:
    """`finetuning` on splits that are there; without a validation split it trains all epochs."""
    machine.set_threads()
    machine.quiet()
    settings = {name: parameters[name] for name in learn.settings()}
    settings["judged"] = None if "validation" in splits else False
    with tempfile.TemporaryDirectory() as folder:
        learnt = learn.learn(splits, labels, Path(folder) / "trainer", progress=False, **settings)
        memory = machine.peak_memory_mb()
        size = sum(weights.numel() * 4 for weights in methods.trained_state(learnt.classifier).values()) / 1e6
        methods.merge(learnt.classifier)
        texts, y = list(splits[parameters["split"]]["text"]), np.array(splits[parameters["split"]]["label"])
        started = time.perf_counter()
        logits = models.predict(learnt.classifier, learnt.tokenizer, texts, precision=parameters["precision"])
        rate = len(texts) / (time.perf_counter() - started)
    scores = metrics.summary(y, softmax(logits.astype(float), axis=1))
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


def changed_texts(learnt: learn.Learnt, texts: list[str], y: np.ndarray, parameters: Mapping) -> dict[str, float]:
    """Accuracy on some texts after each kind of change of `robust` in `STRENGTH` of the words."""
    some = np.random.default_rng(0).permutation(len(texts))[: parameters["robust_texts"]]

    def answer(changed: list[str]) -> np.ndarray:
        return models.predict(learnt.classifier, learnt.tokenizer, changed, precision=parameters["precision"]).argmax(1)

    found = robust.steadiness(answer, [texts[i] for i in some], y[some], [0, STRENGTH], seed=0)
    return {"unchanged": float(found[0].iloc[0]), **found[STRENGTH]}


def setfit_library(parameters: Mapping[str, object]) -> dict:
    """The setfit library on the same labelled texts: contrastive pairs, then logistic regression on the vectors."""
    from setfit import SetFitModel, Trainer, TrainingArguments

    machine.set_threads()
    machine.quiet()
    machine.seed_everything(parameters["seed"])
    splits, _, _ = data.prepared(Path(parameters["splits"]))
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
    scores = metrics.summary(np.array(part["label"]), probabilities)
    return {"metrics": scores, "speeds": {"training, s": seconds, "peak memory, MB": machine.peak_memory_mb()}}


def class_names(parameters: Mapping[str, object]) -> dict:
    """Zero-shot: the class whose name's vector lies nearest to the text's, with no labelled text at all."""
    machine.set_threads()
    machine.quiet()
    splits, labels, _ = data.prepared(Path(parameters["splits"]))
    classifier, tokenizer = models.load_classifier(parameters["model"], labels, head="cosine")
    tokenizer.model_max_length = parameters["max_length"]
    fewshot.set_prototypes(classifier, tokenizer, [], [], parameters["precision"])
    part = splits[parameters["split"]]
    logits = models.predict(classifier, tokenizer, list(part["text"]), precision=parameters["precision"])
    return {"metrics": metrics.summary(np.array(part["label"]), softmax(logits.astype(float), axis=1)), "speeds": {}}


def active_learning(parameters: Mapping[str, object]) -> dict:
    """Labels bought by one acquisition strategy until 12 % of the texts have one, on frozen text vectors."""
    machine.set_threads()
    machine.quiet()
    splits, _, _ = data.prepared(Path(parameters["splits"]))
    kept = (
        Path(parameters["splits"]).parents[2]
        / f"vectors-{artifacts.checksum(parameters['model'])}-{parameters['max_length']}"
    )

    def vectors(name: str) -> np.ndarray:
        path = kept.with_name(f"{kept.name}-{name}.npy")
        if not path.exists():
            np.save(path, models.embed(parameters["model"], list(splits[name]["text"]), parameters["max_length"]))
        return np.load(path)

    pool, test = ((vectors(name), np.array(splits[name]["label"])) for name in ("train", parameters["split"]))
    whole = float(active.fit(*pool).score(*test))
    classes, started = len(np.unique(pool[1])), time.perf_counter()
    curve = active.learning_curve(
        pool, test, parameters["acquisition"], 2 * classes, classes, len(pool[1]) * 12 // 100, parameters["seed"]
    )
    metrics = {
        "accuracy with all labels": whole,
        "labels to 90 % of it": active.labels_needed(curve, 0.9 * whole),
        "accuracy": float(curve["accuracy"].iloc[-1]),
    }
    return {"metrics": metrics, "speeds": {"s": time.perf_counter() - started}, "curve": curve.to_dict("list")}
