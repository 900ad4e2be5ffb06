"""Studies: the same experiment over a grid of parameters and seeds, one row a run, resumable run by run.

`notebooks/studies.yaml` declares them; `make study` runs what is missing; the rows are committed under
`reports/studies/`, and notebooks show them from there. A run is what `02_finetune` does, with other parameters, and
the test split at its end; what is not named in a study is that notebook's own default.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from scipy.special import softmax
from tqdm.auto import tqdm

from llmprod import (
    LLMProdError,
    artifacts,
    data,
    evaluate,
    feedback,
    fewshot,
    finetune,
    methods,
    models,
    paths,
    report,
    robust,
    runner,
    track,
)

FOLDER = paths.REPORTS / "studies"
STRENGTH = 0.3  # of the changes by which robustness is compared


class StudyError(LLMProdError):
    """A study can't be run as it is declared."""


def declared() -> dict[str, dict]:
    """The studies by name, from `notebooks/studies.yaml`."""
    return yaml.safe_load((paths.NOTEBOOKS / "studies.yaml").read_text(encoding="utf-8"))


def defaults() -> dict[str, object]:
    """What a run uses where a study says nothing: the parameters of `02_finetune`, on the data set of `01_data`.

    Beside them: `experiment` (a name in `EXPERIMENTS`), `split` (where it is scored), `change` (a name for a setting,
    to be shown), `robust_texts` (how many of its texts are also scored changed), `pairs` (of the setfit library, for
    each text), `acquisition` (of active learning).
    """
    more = {"experiment": "finetune", "split": "test", "change": "", "robust_texts": 0, "pairs": 20}
    more["acquisition"] = "random"
    return {"dataset": runner.declared("01_data")["dataset"]} | runner.declared("02_finetune") | more


def grid(name: str) -> list[dict[str, object]]:
    """The runs of a study, seeds outermost: the parameters of each.

    `vary` is a list of parameter sets, or parameter -> values whose combinations are taken. Raises StudyError for an
    unknown study or parameter.
    """
    if name not in declared():
        raise StudyError(f"There is no study '{name}'; there are: {', '.join(declared())}.")
    study = declared()[name]
    vary = study["vary"]
    if isinstance(vary, dict):
        vary = [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
    known, runs = defaults(), []
    for seed in study["seeds"]:
        for chosen in vary:
            parameters = study.get("parameters", {}) | chosen | {"seed": seed}
            if unknown := sorted(set(parameters) - set(known)):
                raise StudyError(f"studies.yaml: {name} sets {', '.join(unknown)}, which are no parameters.")
            runs.append(parameters)
    return runs


def key(parameters: Mapping[str, object]) -> str:
    """A fingerprint of what a run's numbers depend on by its declaration: parameters, data and model.

    A parameter that is off (0, "", False) does not count: a new one, off by default, leaves finished runs valid.
    """
    everything = {name: value for name, value in (defaults() | parameters).items() if value}
    inputs = [artifacts.checksum(str(everything[source])) for source in ("dataset", "model")]
    return hashlib.sha256(json.dumps([everything, inputs], sort_keys=True).encode()).hexdigest()[:16]


def rows(name: str) -> list[dict]:
    """The finished runs of a study; a last line that was cut off by a kill is left out."""
    path = FOLDER / f"{name}.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def run(name: str) -> int:
    """Runs what is missing of a study, each run in a process of its own; returns how many ran."""
    plan = grid(name)
    keys = [key(parameters) for parameters in plan]
    done = {row["key"]: row for row in rows(name)}
    keep(name, [done[k] for k in keys if k in done])  # rows of an earlier declaration go
    missing = [(k, parameters) for k, parameters in zip(keys, plan, strict=True) if k not in done]
    for k, parameters in (bar := tqdm(missing, desc=name)):
        bar.set_postfix_str(", ".join(f"{p}={v}" for p, v in parameters.items()))
        everything = defaults() | parameters
        prepare(everything["dataset"])
        started = time.time()
        found = in_process(EXPERIMENTS[everything["experiment"]], everything)
        stamp = {
            "minutes": round((time.time() - started) / 60, 2),
            "machine": track.machine(),
            "commit": track.git_commit(),
            "versions": track.versions(track.SHOWN),
        }
        keep(name, [*rows(name), {"key": k, "parameters": parameters, **found, "provenance": stamp}])
    return len(missing)


def keep(name: str, found: list[dict]) -> None:
    """Writes a study's rows, whole or not at all."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.jsonl"
    temporary = path.with_suffix(".writing")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    os.replace(temporary, path)


def in_process(experiment: Callable[[dict], dict], parameters: dict) -> dict:
    """An experiment's result from a process of its own, so that its peak memory is its own.

    Forked, where the system can, from a server that has imported everything and computed nothing: a fork of a process
    whose threads have worked would wait for them for ever.
    """
    context = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    if hasattr(os, "fork"):
        context.set_forkserver_preload(["llmprod.study"])
    with context.Pool(1, initializer=end_with_parent) as pool:
        return pool.apply(experiment, (parameters,))


def end_with_parent() -> None:
    """Ends this process when its parent is gone, so that a killed study leaves nothing running."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def prepare(dataset: str) -> None:
    """Lets `01_data` prepare a data set's splits, with its own seed, where that is not done."""
    with runner.environment(TRACKING="none"):
        runner.run(["01_data"], "cpu", {"dataset": dataset}, work(dataset))


def work(dataset: str) -> Path:
    """The folder in which a data set is prepared for studies."""
    return paths.RUNS / "studies" / dataset


def prepared(dataset: str) -> tuple:
    """A data set's splits, class names and protocol."""
    return data.prepared(work(dataset) / "work" / "01_data" / "splits")


# Experiments: parameters -> {"metrics": ..., "speeds": ...}


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
    kept = work(parameters["dataset"]) / f"vectors-{artifacts.checksum(parameters['model'])}-{parameters['max_length']}"

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


EXPERIMENTS = {
    "active learning": active_learning,
    "finetune": finetuning,
    "setfit": setfit_library,
    "class names": class_names,
}


# Tables


def table(name: str) -> pd.DataFrame:
    """A study's finished runs as a frame: parameters, metrics, speeds and minutes in columns."""
    return pd.DataFrame(
        [
            {
                **defaults(),
                **row["parameters"],
                **row["metrics"],
                **row["speeds"],
                "minutes": row["provenance"]["minutes"],
            }
            for row in rows(name)
        ]
    )


def means(name: str, by: list[str], metrics: list[str]) -> pd.DataFrame:
    """Mean, standard deviation and number of seeds of each metric, for each setting of `by`, in declared order."""
    found = table(name)
    if found.empty:
        index = pd.MultiIndex.from_arrays([[] for _ in by], names=by)
        return pd.DataFrame(columns=pd.MultiIndex.from_product([metrics, ["mean", "sd", "seeds"]]), index=index)
    grouped = found.reindex(columns=[*by, *metrics]).groupby(by, sort=False, dropna=False)[metrics]
    parts = {"mean": grouped.mean(), "sd": grouped.std(), "seeds": grouped.count()}
    return pd.concat(parts, axis=1).swaplevel(axis=1)


def curves(name: str, by: str) -> pd.DataFrame:
    """The learning curves of a study, one row a point: `by`, seed, labels, accuracy."""
    parts = [
        pd.DataFrame(row["curve"]).assign(**{by: row["parameters"][by], "seed": row["parameters"]["seed"]})
        for row in rows(name)
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[by, "seed", "labels", "accuracy"])


def styled(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame of `means` for people: mean ± sd (seeds) in each cell."""
    if frame.empty:
        return pd.DataFrame({"": ["not measured yet: make study"]})
    columns = {}
    for metric in frame.columns.get_level_values(0).unique():
        columns[metric] = [
            ""
            if not seeds
            else f"{report.number(mean)} ± {report.number(sd)} ({seeds:.0f})"
            if seeds > 1
            else report.number(mean)
            for mean, sd, seeds in frame[metric][["mean", "sd", "seeds"]].itertuples(index=False)
        ]
    return pd.DataFrame(columns, index=frame.index)
