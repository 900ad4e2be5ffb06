"""Studies: the same experiment over a grid of parameters and seeds, one row a run, resumable run by run.

`notebooks/studies.yaml` declares them; `make study` runs what is missing; the rows are committed under
`reports/studies/`, and notebooks show them from there. A run is what `02_finetune` does, with other parameters, and
the test split at its end; what is not named in a study is that notebook's own default.
"""

import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import yaml
from tqdm.auto import tqdm

from llmprod import LLMProdError, artifacts, files, machine, paths
from llmprod.harness import pipeline, results, runner

FOLDER = paths.REPORTS / "studies"


class StudyError(LLMProdError):
    """A study can't be run as it is declared."""


def declared() -> dict[str, dict]:
    """The studies by name, from `notebooks/studies.yaml`."""
    return {name: study for name, study in declarations().items() if name != "experiments"}


def declarations() -> dict[str, dict]:
    """The content of `notebooks/studies.yaml`: the studies, and `experiments`, the function of each by name."""
    return yaml.safe_load((paths.NOTEBOOKS / "studies.yaml").read_text(encoding="utf-8"))


def defaults() -> dict[str, object]:
    """What a run uses where a study says nothing: the parameters of `02_finetune`, on the data set of `01_data`.

    Beside them: `experiment` (a name in `experiments.EXPERIMENTS`), `split` (where it is scored), `change` (a name for
    a setting, to be shown), `robust_texts` (how many of its texts are also scored changed), `pairs` (of the setfit
    library, for each text), `acquisition` (of active learning), four of `13_recommendation`, and six of sentiment
    (`part` of a data set, by what it is halved, `layers` kept, texts `borrowed` of other domains, whether those are
    scored too, whether the weights become `int8` before anything is scored).
    """
    more = {"experiment": "finetune", "split": "test", "change": "", "robust_texts": 0, "pairs": 20}
    more["acquisition"] = "random"
    more |= {"protocol": "", "candidates": 0, "folds": 0, "tower_steps": 0}
    more |= {"part": "", "by": "", "layers": 0, "borrowed": 0, "transfer": False, "int8": False}
    return {"dataset": pipeline.declared("01_data")["dataset"]} | pipeline.declared("02_finetune") | more


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
        if "table" in artifacts.entry(everything["dataset"]):  # labelled texts
            prepare(everything["dataset"])
        started = time.time()
        everything["splits"] = str(work(everything["dataset"]) / "work" / "01_data" / "splits")
        found = in_process(declarations()["experiments"][everything["experiment"]], everything)
        stamp = {
            "minutes": round((time.time() - started) / 60, 2),
            "machine": machine.describe(),
            "commit": machine.git_commit(),
            "versions": machine.versions(machine.SHOWN),
        }
        keep(name, [*rows(name), {"key": k, "parameters": parameters, **found, "provenance": stamp}])
    return len(missing)


def keep(name: str, found: list[dict]) -> None:
    """Writes a study's rows atomically."""
    with files.atomic(FOLDER / f"{name}.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def in_process(experiment: str, parameters: dict) -> dict:
    """The result of an experiment (`module:function`) from a process of its own, so that its peak memory is its own.

    Forked, where the system can, from a server that has imported everything and computed nothing: a fork of a process
    whose threads have worked would wait for them for ever.
    """
    context = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    if hasattr(os, "fork"):
        context.set_forkserver_preload([experiment.partition(":")[0]])
    with context.Pool(1, initializer=end_with_parent) as pool:
        return pool.apply(experiment_of(experiment), (parameters,))


def experiment_of(name: str) -> Callable[[dict], dict]:
    """The function that `module:function` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


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
            else f"{results.number(mean)} ± {results.number(sd)} ({seeds:.0f})"
            if seeds > 1
            else results.number(mean)
            for mean, sd, seeds in frame[metric][["mean", "sd", "seeds"]].itertuples(index=False)
        ]
    return pd.DataFrame(columns, index=frame.index)
