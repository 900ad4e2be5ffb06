"""The runs of the fine-tuning studies: train, then score."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from llmprod import artifacts, data, machine, models
from llmprod.evaluate import active, baselines, metrics, robust
from llmprod.extras import extra
from llmprod.finetune import fewshot, learn, methods
from llmprod.finetune.recipe import Recipe

STRENGTH = 0.3  # of the text perturbations


def finetuning(parameters: Mapping[str, object]) -> dict:
    """One run of `learn.learn` and its scores on a split: test, or validation where settings are chosen."""
    splits, labels, _ = data.prepared(Path(parameters["splits"]))
    return fitted(splits, labels, parameters)


def fitted(splits: DatasetDict, labels: Sequence[str], parameters: Mapping[str, object]) -> dict:
    """`finetuning` on splits that are there; without a validation split it trains all epochs."""
    recipe, validate = Recipe.of(parameters), None if "validation" in splits else False
    with tempfile.TemporaryDirectory() as folder:
        learnt = learn.learn(splits, labels, recipe, Path(folder) / "trainer", validate=validate, progress=False)
        predictor, memory = learnt.predictor, machine.peak_memory_mb()
        size = sum(weights.numel() * 4 for weights in methods.trained_state(predictor.model).values()) / 1e6
        methods.merge(predictor.model)
        texts, y = list(splits[parameters["split"]]["text"]), np.array(splits[parameters["split"]]["label"])
        started = time.perf_counter()
        logits = predictor.predict(texts)
        rate = len(texts) / (time.perf_counter() - started)
    scores = metrics.summary(y, softmax(logits.astype(float), axis=1))
    if parameters.get("combine"):
        scores |= combined(splits, predictor, texts, y, logits)
    if parameters["robust_texts"]:
        some = np.random.default_rng(0).permutation(len(texts))[: parameters["robust_texts"]]
        subset = [texts[i] for i in some]
        curve = robust.robustness_curve(
            lambda changed: predictor.predict(changed).argmax(axis=1), subset, y[some], [0, STRENGTH], seed=0
        )
        scores |= {"unchanged": float(curve[0].iloc[0]), **curve[STRENGTH]}
    return {
        "metrics": scores | {"trained parameters": learnt.trained_parameters},
        "speeds": {
            "training, s": learnt.seconds,
            "peak memory, MB": memory,
            "checkpoint, MB": size,
            "inference, texts/s": rate,
        },
    }


def combined(
    splits: DatasetDict, predictor: models.Predictor, texts: Sequence[str], y: np.ndarray, logits: np.ndarray
) -> dict[str, float]:
    """Scores of a bag of words and of its product with the fine-tuned model, both chosen on validation texts."""
    train, validation = (
        (list(splits[name]["text"]), np.array(splits[name]["label"])) for name in ("train", "validation")
    )
    words = baselines.chosen(train, validation)
    weights = baselines.expert_weights(
        predictor.predict(validation[0]), words.predict_log_proba(validation[0]), validation[1]
    )
    log_words = words.predict_log_proba(texts)
    both = metrics.summary(y, np.exp(baselines.product(logits, log_words, weights)))
    alone = metrics.summary(y, np.exp(log_words))
    return {f"{name}, bag of words": value for name, value in alone.items()} | {
        f"{name}, combined": value for name, value in both.items()
    }


def bag_of_words(parameters: Mapping[str, object]) -> dict:
    """A bag of words trained on the labelled texts: TF-IDF of words and pieces of words, logistic regression."""
    splits, _, _ = data.prepared(Path(parameters["splits"]))
    chosen, _ = fewshot.sample_shots(splits["train"], parameters["shots"], parameters["seed"])
    started = time.perf_counter()
    model = baselines.bag_of_words(list(chosen["text"]), chosen["label"], parameters["c"], characters=True)
    return scored(splits[parameters["split"]], started, lambda texts: model.predict_proba(texts))


def frozen_encoder(parameters: Mapping[str, object]) -> dict:
    """Logistic regression on the vectors of the encoder as it was pretrained."""
    splits, _, _ = data.prepared(Path(parameters["splits"]))
    chosen, _ = fewshot.sample_shots(splits["train"], parameters["shots"], parameters["seed"])
    started = time.perf_counter()
    settings = {"max_length": parameters["max_length"], "precision": parameters["precision"]}
    encoder = models.Predictor.pretrained(parameters["model"], **settings)
    model = LogisticRegression(C=parameters["c"], max_iter=2000)
    model.fit(encoder.embed(list(chosen["text"])), chosen["label"])
    return scored(splits[parameters["split"]], started, lambda texts: model.predict_proba(encoder.embed(texts)))


def scored(part: Dataset, started: float, probabilities: Callable[[list[str]], np.ndarray]) -> dict:
    """A baseline's scores on a split, seconds of training since `started`, and texts per second."""
    seconds, texts = time.perf_counter() - started, list(part["text"])
    started = time.perf_counter()
    scores = metrics.summary(np.array(part["label"]), probabilities(texts))
    speeds = {"training, s": seconds, "inference, texts/s": len(texts) / (time.perf_counter() - started)}
    return {"metrics": scores, "speeds": speeds | {"peak memory, MB": machine.peak_memory_mb()}}


def setfit_library(parameters: Mapping[str, object]) -> dict:
    """The setfit library on the same labelled texts."""
    splits, _, _ = data.prepared(Path(parameters["splits"]))
    chosen, _ = fewshot.sample_shots(splits["train"], parameters["shots"], parameters["seed"])
    started = time.perf_counter()
    model = setfit_model(parameters, list(chosen["text"]), np.array(chosen["label"]))
    seconds = time.perf_counter() - started
    part = splits[parameters["split"]]
    probabilities = np.asarray(model.predict_proba(list(part["text"]), as_numpy=True))
    scores = metrics.summary(np.array(part["label"]), probabilities)
    return {"metrics": scores, "speeds": {"training, s": seconds, "peak memory, MB": machine.peak_memory_mb()}}


def setfit_model(parameters: Mapping[str, object], texts: Sequence[str], labels: np.ndarray) -> object:
    """A SetFitModel: an encoder trained on contrastive pairs, then logistic regression on its vectors.

    Args:
        labels: class numbers (texts,), or 0 and 1 for each class (texts, classes): then one regression for each
    """
    with extra("peers"):
        from setfit import SetFitModel, Trainer, TrainingArguments

    machine.seed_everything(parameters["seed"])
    several = {"multi_target_strategy": "one-vs-rest"} if labels.ndim == 2 else {}
    model = SetFitModel.from_pretrained(str(models.model_folder(parameters["model"])), **several)
    model.model_body.max_seq_length = parameters["max_length"]
    with tempfile.TemporaryDirectory() as folder:
        settings = {"batch_size": 32, "num_iterations": parameters["pairs"], "seed": parameters["seed"]}
        quiet = {"show_progress_bar": False, "save_strategy": "no", "report_to": "none"}
        arguments = TrainingArguments(folder, num_epochs=1, **settings, **quiet)
        train = Dataset.from_dict({"text": list(texts), "label": labels.tolist()})
        Trainer(model=model, args=arguments, train_dataset=train).train()
    return model


def class_names(parameters: Mapping[str, object]) -> dict:
    """Zero-shot: the class whose name's vector lies nearest to the text's, with no labelled text at all."""
    splits, labels, _ = data.prepared(Path(parameters["splits"]))
    settings = {"max_length": parameters["max_length"], "precision": parameters["precision"]}
    predictor = models.Predictor.pretrained(parameters["model"], labels, head="cosine", **settings)
    fewshot.set_prototypes(predictor, [], [])
    part = splits[parameters["split"]]
    logits = predictor.predict(list(part["text"]))
    return {"metrics": metrics.summary(np.array(part["label"]), softmax(logits.astype(float), axis=1)), "speeds": {}}


def active_learning(parameters: Mapping[str, object]) -> dict:
    """Active learning with one acquisition strategy, until 12 % of the texts are labelled, on frozen text vectors."""
    splits, _, _ = data.prepared(Path(parameters["splits"]))
    folder, model = Path(parameters["splits"]).parents[2], artifacts.checksum(parameters["model"])

    def vectors(name: str) -> np.ndarray:
        path = folder / f"vectors-{model}-{parameters['max_length']}-{name}.npy"
        if not path.exists():
            encoder = models.Predictor.pretrained(parameters["model"], max_length=parameters["max_length"])
            np.save(path, encoder.embed(list(splits[name]["text"])))
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
