"""Studies: an experiment over a grid of parameters and seeds, one row for each run, resumable run by run.

`notebooks/studies.yaml` declares the experiments with their parameters, and the studies; `make study` runs what is
missing; the rows are committed under `reports/studies/`, and notebooks show them from there.
"""

import hashlib
import itertools
import json
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from llmprod import LLMProdError, artifacts, files, machine, paths, shapes, workers
from llmprod.harness import fingerprints, pipeline, results, runner
from llmprod.tables import shown

FOLDER = paths.REPORTS / "studies"
NUMBERS = {"*": shapes.number}
ROW = {
    "key": shapes.text, "metrics": NUMBERS, "speeds": NUMBERS,
    "parameters": {"experiment": shapes.text, "dataset?": shapes.text, "model?": shapes.text},
    "provenance": {"minutes": shapes.number}, "curve?": {"*": [shapes.number]},
}  # fmt: skip
VALUES = [lambda value: True]
STUDY = {"seeds": VALUES, "parameters?": {"experiment?": shapes.text}}
STUDY |= {"vary": lambda found: shapes.fits(found, [{}]) or shapes.fits(found, {"*": VALUES})}
STALE = "† measured by code that has changed since; `python -m llmprod study --stale` measures it again"


def declarations() -> dict[str, dict]:
    """The content of `notebooks/studies.yaml`: the studies by name, and `experiments`."""
    return pipeline.mapping(paths.NOTEBOOKS / "studies.yaml")


def declared() -> dict[str, dict]:
    """The studies by name."""
    return {name: study for name, study in declarations().items() if name != "experiments"}


def defaults(experiment: str) -> dict[str, object]:
    """An experiment's parameters with their defaults: those of the notebook that it repeats, if any, and its own.

    Raises LLMProdError for an unknown one.
    """
    known = declarations()["experiments"]
    if experiment not in known:
        raise LLMProdError(f"studies.yaml has no experiment '{shown(experiment)}'; it has: {', '.join(known)}.")
    declaration = known[experiment]
    notebook = pipeline.declared(declaration["notebook"]) if "notebook" in declaration else {}
    return {"experiment": experiment, "seed": 0} | notebook | declaration["parameters"]


def grid(name: str) -> list[dict[str, object]]:
    """The runs of a study, seeds outermost: the parameters that the declaration sets for each.

    `vary` is a list of parameter sets, or parameter -> values, of which every combination is run. Raises LLMProdError
    for an unknown study, and for a parameter that the experiment does not declare.
    """
    if name not in declared():
        raise LLMProdError(f"There is no study '{name}'; there are: {', '.join(declared())}.")
    study, runs = declared()[name], []
    if not shapes.fits(study, STUDY):
        form = "seeds: [0, 1], and vary: a list of parameter sets, or a list of values for each parameter"
        raise LLMProdError(f"studies.yaml: {name} needs {form}; and may have parameters: {{epochs: 1}}.")
    vary = study["vary"]
    if isinstance(vary, dict):
        vary = [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
    for seed, chosen in itertools.product(study["seeds"], vary):
        parameters = {"experiment": "finetune"} | study.get("parameters", {}) | chosen | {"seed": seed}
        if unknown := sorted(set(parameters) - set(defaults(parameters["experiment"]))):
            experiment = parameters["experiment"]
            raise LLMProdError(
                f"studies.yaml: {name} sets {', '.join(unknown)}, which the experiment '{experiment}' does not declare."
            )
        runs.append(pipeline.converted(parameters, defaults(parameters["experiment"]), f"studies.yaml: {name}"))
    return runs


def key(parameters: Mapping[str, object]) -> str:
    """The identity of a run: a fingerprint of the parameters that the declaration sets, its experiment and seed."""
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:16]


def code_of(experiment: str) -> str:
    """A fingerprint of an experiment's function and of all that it reaches in our modules."""
    module, _, function = declarations()["experiments"][experiment]["run"].partition(":")
    return fingerprints.of_code(f"from {module} import {function}\n{function}")


def code(parameters: Mapping[str, object], fingerprint: str = "") -> str:
    """A fingerprint of what made a run's numbers: code (`code_of`), parameters with their defaults, data and model.

    The splits of `01_data` count by that notebook's parameters.
    """
    experiment = declarations()["experiments"][parameters["experiment"]]
    everything = defaults(parameters["experiment"]) | parameters
    parts = [
        fingerprint or code_of(parameters["experiment"]),
        everything,
        [artifacts.checksum(everything[name]) for name in ("dataset", "model") if name in everything],
        pipeline.declared("01_data") if experiment.get("splits") else {},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def rows(name: str) -> list[dict]:
    """The finished runs of a study, without a last line that was cut off when the study was killed.

    Raises LLMProdError, with its number, for any other line that is not a row.
    """
    path = FOLDER / f"{name}.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            found += [None] if number < len(lines) else []
    for number, row in enumerate(found, 1):
        if not shapes.fits(row, ROW):
            raise LLMProdError(f"{path}, line {number} is damaged: delete it, or take the committed file.")
    return found


def stale(name: str) -> list[bool]:
    """For each finished run of a study, whether its code, defaults, data or model have changed since."""
    experiments, today, old = declarations()["experiments"], {}, []
    for row in rows(name):
        parameters, experiment = row["parameters"], row["parameters"]["experiment"]
        if experiment in experiments and experiment not in today:
            today[experiment] = code_of(experiment)
        old.append(experiment not in today or row.get("code") != code(parameters, today[experiment]))
    return old


def run(name: str, again: bool = False, jobs: int = 1, cluster: tuple[Callable, int] | None = None) -> int:
    """Runs the missing runs of a study, each in a process of its own, and returns their number.

    With `again`, also those whose rows are stale. `jobs` runs go on at a time (speeds are then those of a shared
    machine); a run that fails lets those in progress finish and starts no other. `cluster`, of `fanout.workers`, has
    in place of `measure` what measures runs elsewhere, and how many at a time.

    Raises LLMProdError if there are uncommitted changes: a row names the commit that made it.
    """
    plan = {key(parameters): parameters for parameters in grid(name)}
    outdated = {row["key"] for row, old in zip(rows(name), stale(name), strict=True) if old and again}
    done = {row["key"] for row in rows(name)} - outdated
    missing = {k: parameters for k, parameters in plan.items() if k not in done}
    if missing:
        require_commit()
    write(name, plan, {})  # rows of an earlier declaration go
    for dataset in {dataset for parameters in missing.values() if (dataset := splits_of(parameters))}:
        prepare(dataset)
    lock = threading.Lock()
    measuring, places = cluster or (measure, jobs)

    def one(k: str) -> str:
        row = measuring(missing[k], jobs)
        with lock:
            write(name, plan, {k: row})
        return ", ".join(f"{p}={v}" for p, v in missing[k].items())

    pool = ThreadPoolExecutor(places)
    try:
        finished = as_completed([pool.submit(one, k) for k in missing])
        for future in (bar := tqdm(finished, desc=name, total=len(missing))):
            bar.set_postfix_str(future.result())
    finally:
        pool.shutdown(cancel_futures=True)
    return len(missing)


def splits_of(parameters: Mapping[str, object]) -> str:
    """The data set whose splits a run needs; "" if none."""
    needs = declarations()["experiments"][parameters["experiment"]].get("splits")
    return (defaults(parameters["experiment"]) | parameters)["dataset"] if needs else ""


def measure(parameters: Mapping[str, object], jobs: int = 1) -> dict[str, object]:
    """A finished run: its row, with what it found and how."""
    experiment = declarations()["experiments"][parameters["experiment"]]
    everything = defaults(parameters["experiment"]) | parameters
    if dataset := splits_of(parameters):
        everything["splits"] = str(work(dataset) / "work" / "01_data" / "splits")
    started, fingerprint = time.time(), code(parameters)
    found = workers.run(experiment["run"], everything, jobs)
    stamp = {
        "minutes": round((time.time() - started) / 60, 2),
        "machine": machine.describe() + (f", {jobs} runs at a time" if jobs > 1 else ""),
        # the rows before this one change the checkout, not the code
        "commit": machine.git_commit().removesuffix("+") + "+" * bool(uncommitted()),
        "versions": machine.versions(machine.SHOWN),
    }
    return {"key": key(parameters), "code": fingerprint, "parameters": parameters, **found, "provenance": stamp}


def write(name: str, plan: Mapping[str, dict], new: Mapping[str, dict]) -> None:
    """Writes a study's rows, old and new, in the order of its declaration; atomically."""
    found = {row["key"]: row for row in rows(name)} | new
    with files.atomic(FOLDER / f"{name}.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(found[k]) + "\n" for k in plan if k in found), encoding="utf-8")


def uncommitted() -> list[str] | None:
    """The files of the code of runs that differ from their commit; None outside of a git checkout."""
    command = ["git", "-C", str(paths.ROOT), "status", "--porcelain", "--", "llmprod", "notebooks/studies.yaml"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return [line[3:] for line in found]


def require_commit() -> None:
    """Raises LLMProdError unless the code of a run is that of a commit (so also outside of a git checkout)."""
    changed = uncommitted()
    if changed is None:
        raise LLMProdError("Studies run in a git checkout: a row names the commit that made it. Clone it.")
    if changed:
        names = ", ".join(changed[:5])
        raise LLMProdError(f"A row names the commit that made it, and {names} differ from it. Commit, then run again.")


def prepare(dataset: str) -> None:
    """Lets `01_data` prepare a data set's splits, with its default seed, unless they are up to date."""
    with runner.environment(TRACKING="none"):
        runner.run(["01_data"], "cpu", {"dataset": dataset}, work(dataset))


def work(dataset: str) -> Path:
    """The folder in which a data set is prepared for studies."""
    return paths.RUNS / "studies" / dataset


# Tables


def table(name: str) -> pd.DataFrame:
    """A study's finished runs as a frame: parameters, metrics, speeds, minutes, and whether the row is stale."""
    return pd.DataFrame(
        [
            {
                **defaults(row["parameters"]["experiment"]),
                **row["parameters"],
                **row["metrics"],
                **row["speeds"],
                "minutes": row["provenance"]["minutes"],
                "stale": old,
            }
            for row, old in zip(rows(name), stale(name), strict=True)
        ]
    )


def means(name: str, by: list[str], metrics: list[str], where: Mapping[str, object] | None = None) -> pd.DataFrame:
    """Mean, standard deviation, number of seeds and staleness of each metric, for each setting of `by`.

    The settings stand in declared order; a mean is stale if the row of any of its seeds is. `where`: only rows with
    these values of parameters.
    """
    parts, found = ["mean", "sd", "seeds", "stale"], table(name)
    for parameter, value in (where or {}).items() if len(found) else ():
        found = found[found[parameter] == value]
    if found.empty:
        index = pd.MultiIndex.from_arrays([[] for _ in by], names=by)
        return pd.DataFrame(columns=pd.MultiIndex.from_product([metrics, parts]), index=index)
    grouped = found.reindex(columns=[*by, *metrics, "stale"]).groupby(by, sort=False, dropna=False)
    old, values = grouped["stale"].any(), grouped[metrics]
    old = pd.DataFrame(dict.fromkeys(metrics, old))
    frames = (values.mean(), values.std(), values.count(), old)
    return pd.concat(dict(zip(parts, frames, strict=True)), axis=1).swaplevel(axis=1)


def curves(name: str, by: str) -> pd.DataFrame:
    """The learning curves of a study, one row for each point: `by`, seed, labels, accuracy, stale."""
    parts = [
        pd.DataFrame(row["curve"]).assign(**{name: row["parameters"][name] for name in (by, "seed")}, stale=old)
        for row, old in zip(rows(name), stale(name), strict=True)
    ]
    columns = [by, "seed", "labels", "accuracy", "stale"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def cell(mean: float, sd: float, seeds: float, old: bool) -> str:
    """A cell of `means` for people: mean ± sd (seeds), with a † if it is stale."""
    return results.mean_sd(mean, sd, seeds) + ("†" if old and seeds else "")


def styled(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame of `means` for people; says below what a † means, if there is one."""
    if frame.empty:
        return pd.DataFrame({"": ["not measured yet: make study"]})
    metrics = frame.columns.get_level_values(0).unique()
    cells = {m: [cell(*row) for row in frame[m].itertuples(index=False)] for m in metrics}
    if any(text.endswith("†") for column in cells.values() for text in column):
        print(STALE)
    return pd.DataFrame(cells, index=frame.index)
