"""Results, the reference, the verdict.

A result is never apart from its protocol: all parameters but the seed, the checksums of data and model, and the
protocols of the notebooks it builds on. A verdict compares only what has the same protocol.
"""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import yaml

from llmprod import LLMProdError, machine, paths
from llmprod.files import read_json, write_json
from llmprod.harness import track
from llmprod.harness.pipeline import pipeline, with_upstream

REPRODUCED, DRIFTED, NOT_COMPARABLE, MISSING = "REPRODUCED", "DRIFTED", "NOT COMPARABLE", "MISSING"


def record(
    run: track.Run,
    scores: Mapping[str, float],
    n: int | Mapping[str, int],
    counts: Mapping[str, int] | None = None,
    speeds: Mapping[str, float] | None = None,
    checksums: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Writes a notebook's results to `results/<notebook>.json`, ends its tracking, and compares with the reference.

    Args:
        run: the run that `track.start` began
        scores: shares and means over test examples, judged with a tolerance measured over seeds
        n: the number of examples behind the scores; or name of a score -> number, "" for all others
        counts: whole numbers, judged in the same way
        speeds: numbers that depend on the machine; shown, never judged
        checksums: name -> fingerprint of data and model

    Returns the notebook's verdict table.
    """
    counts, speeds = counts or {}, speeds or {}
    checksums = {f"sha256 of {name}": value for name, value in (checksums or {}).items()}
    protocol = {name: value for name, value in run.parameters.items() if name != "seed"} | checksums
    for upstream in pipeline()[run.notebook]["needs"]:
        protocol[upstream] = read_json(run.folder / "results" / f"{upstream}.json")["protocol"]
    numbers = n if isinstance(n, Mapping) else {"": n}
    metrics = {name: {"value": float(value), "n": numbers.get(name, numbers[""])} for name, value in scores.items()}
    metrics |= {name: {"value": int(value)} for name, value in counts.items()}
    speeds = {**speeds, "peak memory, MB": machine.peak_memory_mb()}
    result = {
        "notebook": run.notebook,
        "seed": run.seed,
        "metrics": metrics,
        "speeds": {name: float(f"{value:.4g}") for name, value in speeds.items()},
        "protocol": protocol,
    }
    write_json(run.folder / "results" / f"{run.notebook}.json", result)
    run.finish({name: metric["value"] for name, metric in metrics.items()} | result["speeds"], checksums)
    return verdict({run.notebook: result}, reference(run.folder.name), [run.notebook])


def results(folder: Path) -> dict[str, dict]:
    """All results in a run's folder: notebook -> result."""
    return {path.stem: read_json(path) for path in sorted((folder / "results").glob("*.json"))}


# Reference and verdict


def reference(profile: str) -> dict:
    """Our own results over seeds for a profile; for a run outside the profiles those of `cpu`; {} if there are none."""
    path = paths.REFERENCE / f"{profile}.json"
    if not path.exists() and not (paths.PROFILES / f"{profile}.yaml").exists():
        path = paths.REFERENCE / "cpu.json"
    return read_json(path)["notebooks"] if path.exists() else {}


def summarise(runs: list[dict]) -> dict:
    """One notebook's results over seeds: the protocol, and each metric's values, mean, sd and number of runs.

    Raises LLMProdError if the runs have different protocols.
    """
    protocols = [run["protocol"] for run in runs]
    for other in protocols[1:]:
        if other != protocols[0]:
            raise LLMProdError(
                f"Runs of {runs[0]['notebook']} differ in {'; '.join(differences(other, protocols[0]))}."
            )
    metrics = {}
    for name, metric in runs[0]["metrics"].items():
        values = [run["metrics"][name]["value"] for run in runs]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        by_seed = {str(run["seed"]): run["metrics"][name]["value"] for run in runs}
        metrics[name] = metric | {"value": by_seed, "mean": statistics.mean(values), "sd": sd, "runs": len(values)}
    speeds = {k: statistics.median(run["speeds"][k] for run in runs) for k in runs[0]["speeds"]}
    minutes = statistics.median(run["provenance"]["minutes"] for run in runs)
    return {
        "machine": runs[0]["provenance"]["machine"],
        "minutes": minutes,
        "metrics": metrics,
        "speeds": speeds,
        "protocol": protocols[0],
    }


def tolerance(metric: Mapping[str, object]) -> float:
    """How far a new run may lie from the reference mean: max(3 sd sqrt(1 + 1/runs), one test example).

    The first term is the spread of one more draw around a mean of `runs` draws; the second is the least that a
    score over n examples can change. A count has no second term.
    """
    spread = 3 * metric["sd"] * math.sqrt(1 + 1 / metric["runs"])
    return max(spread, 1 / metric["n"] if "n" in metric else 0.0)


def differences(mine: Mapping[str, object], theirs: Mapping[str, object], prefix: str = "") -> list[str]:
    """The differences between two protocols, as "name: mine, reference theirs"."""
    found = []
    for name in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(name), theirs.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: {a}, reference {b}")
    return found


def published(notebook: str, protocol: Mapping[str, object]) -> list[dict]:
    """Published figures for a notebook, on the data set of its protocol or of a notebook that it builds on."""
    while not (named := [protocol[name] for name in ("ratings", "interactions", "dataset") if name in protocol]):
        protocol = next((value for value in protocol.values() if isinstance(value, Mapping)), {"dataset": ""})
    figures = yaml.safe_load(paths.PUBLISHED.read_text(encoding="utf-8"))
    return figures.get(notebook, {}).get(named[0], [])


def verdict(found: Mapping[str, dict], expected: Mapping[str, dict], notebooks: list[str]) -> pd.DataFrame:
    """The verdict table, one row for each metric: published, reference, yours, tolerance, verdict and its reason."""
    rows = []
    for notebook in notebooks:
        mine, theirs = found.get(notebook), expected.get(notebook)
        others = published(notebook, (theirs or mine or {}).get("protocol", {}))
        for name in (theirs or mine or {"metrics": ["(everything)"]})["metrics"]:
            other = next((o for o in others if o["metric"] == name), None)
            metric = theirs["metrics"].get(name) if theirs else None
            value = mine["metrics"].get(name, {}).get("value") if mine else None
            rows.append(
                {
                    "notebook": notebook,
                    "metric": name,
                    "published": f"{other['value']:.4g} ({other['method']})" if other else "",
                    "reference": spread(metric) if metric else "",
                    "yours": "" if value is None else number(value),
                    "tolerance": number(tolerance(metric)) if metric else "",
                    **judge(mine, theirs, metric, value),
                }
            )
    columns = ["notebook", "metric", "published", "reference", "yours", "tolerance", "verdict", "reason"]
    return pd.DataFrame(rows, columns=columns)


def judge(mine: Mapping | None, theirs: Mapping | None, metric: Mapping | None, value: float | None) -> dict[str, str]:
    """The verdict on one metric, and the reason if it is not REPRODUCED."""
    if mine is None:
        return {"verdict": MISSING, "reason": "no result; run the notebook"}
    if metric is None:
        return {"verdict": NOT_COMPARABLE, "reason": "no reference was measured"}
    unlike = differences(mine["protocol"], theirs["protocol"])
    if unlike:
        return {"verdict": NOT_COMPARABLE, "reason": "; ".join(unlike)}
    if value is None:  # only now: other data may not have what a metric needs
        return {"verdict": MISSING, "reason": "no result; run the notebook"}
    distance = abs(value - metric["mean"])
    if not distance <= tolerance(metric) + 1e-9:  # so that a NaN drifts
        return {"verdict": DRIFTED, "reason": f"{distance:.4f} from the reference mean"}
    return {"verdict": REPRODUCED, "reason": ""}


def verify(folder: Path, notebook: str = "") -> pd.DataFrame:
    """The verdict table of a run's folder, over a notebook and those that it needs; by default over all."""
    return verdict(results(folder), reference(folder.name), with_upstream(notebook) if notebook else list(pipeline()))


def tally(table: pd.DataFrame) -> str:
    """The number of rows with each verdict, in words."""
    return ", ".join(f"{count} of {len(table)} {name}" for name, count in table["verdict"].value_counts().items())


def markdown(table: pd.DataFrame) -> str:
    """A frame as a Markdown table, with its cells unchanged."""
    return table.to_markdown(index=False, disable_numparse=True)


def spread(metric: Mapping[str, object]) -> str:
    """A reference metric as mean ± sd (runs)."""
    return mean_sd(metric["mean"], metric["sd"], metric["runs"])


def mean_sd(mean: float, sd: float, n: float) -> str:
    """Mean ± standard deviation (number of seeds) for people; the mean alone for one seed, "" for none."""
    return f"{number(mean)} ± {number(sd)} ({n:.0f})" if n > 1 else number(mean) if n else ""


def number(value: float) -> str:
    """A number for people: whole numbers with thousands separators, shares to four decimal places."""
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.4f}"
