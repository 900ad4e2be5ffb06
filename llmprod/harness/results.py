"""Results and the verdict on them.

A result is never apart from its protocol: all parameters but those of `OUTSIDE`, the checksums of data and model, and
the protocols of the notebooks it builds on. A verdict compares only what has the same protocol.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import yaml

from llmprod import LLMProdError, machine, paths, shapes
from llmprod.files import read_json, write_json
from llmprod.harness import examples, reference, track
from llmprod.harness.pipeline import declared, notebooks_of, pipeline, source_hash, with_upstream
from llmprod.tables import shown

REPRODUCED, DRIFTED, NOT_COMPARABLE, MISSING = "REPRODUCED", "DRIFTED", "NOT COMPARABLE", "MISSING"
EDITED, BLUNT = "EDITED", "BLUNT"
OUTSIDE = {"seed", "processes"}  # a seed is judged over seeds, and a number of processes changes nothing but rounding
COLUMNS = ["notebook", "metric", "published", "reference", "yours", "tolerance", "notices", "verdict", "reason"]
SHARP = 0.2  # a row that would not notice a change by this share of its value is shown, and not called reproduced
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # and what turns the direction of a text
STAMP = dict.fromkeys(("source", "commit", "machine"), shapes.text)
STAMP |= {"minutes": shapes.number, "versions": {"*": shapes.text}, "parameters": {}}
RESULT = {
    "notebook": shapes.text, "seed": shapes.whole,
    "metrics": {"*": {"value": shapes.number}},
    "speeds": {"*": shapes.number},
    "protocol": {}, "provenance": STAMP,
}  # fmt: skip


def record(
    run: track.Run,
    scores: Mapping[str, float],
    n: int | Mapping[str, int],
    counts: Mapping[str, int] | None = None,
    speeds: Mapping[str, float] | None = None,
    checksums: Mapping[str, str] | None = None,
    predictions: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Writes a notebook's results to `results/<notebook>.json`, ends its tracking, and compares with the reference.

    Args:
        run: the run that `track.start` began
        scores: shares and means over test examples, judged with a tolerance measured over seeds
        n: the number of examples behind the scores; or name of a score -> number, "" for all others
        counts: whole numbers, judged in the same way
        speeds: numbers that depend on the machine; shown, never judged
        checksums: name -> fingerprint of data and model
        predictions: the examples behind some of the scores (`examples.table`), compared one by one with the reference's

    Returns the notebook's verdict table.
    """
    counts, speeds = counts or {}, speeds or {}
    checksums = {f"sha256 of {name}": value for name, value in (checksums or {}).items()}
    protocol = {name: value for name, value in run.parameters.items() if name not in OUTSIDE} | checksums
    needed = [read_json(run.folder / "results" / f"{name}.json") for name in pipeline()[run.notebook]["needs"]]
    protocol |= {upstream["notebook"]: upstream["protocol"] for upstream in needed}
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
    if predictions is not None:
        examples.write(examples.of_run(run.folder, run.notebook), predictions)
    write_json(run.folder / "results" / f"{run.notebook}.json", result)
    run.lineage(result, of=needed)
    run.finish({name: metric["value"] for name, metric in metrics.items()} | result["speeds"], checksums)
    return verdict({run.notebook: result}, reference.load(run.folder.name), [run.notebook], run.folder)


def results(folder: Path) -> dict[str, dict]:
    """The results in a run's folder that the runner finished and that nobody changed since: notebook -> result.

    Raises LLMProdError for one that does not hold what a result holds.
    """
    sound = [name for name in pipeline() if stamp_of(folder, name) and not edited(folder, name)]
    found = {folder / "results" / f"{name}.json": name for name in sound}
    return {name: shapes.read(path, RESULT, "delete it and run again") for path, name in found.items()}


def stamp_of(folder: Path, notebook: str) -> dict[str, object]:
    """What the runner wrote when a notebook was done: `fingerprint` and `seal`; {} where either file is not sealed."""
    if not all((folder / name).is_file() for name in (f"results/{notebook}.json", f"{notebook}.ipynb")):
        return {}
    try:
        stamp = read_json(folder / "work" / notebook / "done.json")
    except LLMProdError:
        return {}
    sealed = stamp.get("seal") if isinstance(stamp, dict) else None
    whole = isinstance(sealed, dict) and {f"results/{notebook}.json", f"{notebook}.ipynb"} <= sealed.keys()
    return stamp if whole else {}


def seal(folder: Path, notebook: str) -> dict[str, str]:
    """The sha256 of each file of a run that nobody may change afterwards: result, executed copy, predictions if any."""
    names = [f"results/{notebook}.json", f"{notebook}.ipynb", f"results/{notebook}.parquet"]
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names if (folder / n).is_file()}


def edited(folder: Path, notebook: str) -> list[str]:
    """Which of the files of `seal` are not as the runner left them; none where the notebook was not finished."""
    sealed, found = stamp_of(folder, notebook).get("seal", {}), seal(folder, notebook)
    return [shown(name) for name in sealed | found if sealed and sealed.get(name) != found.get(name)]


# Verdict


def published(notebook: str, protocol: Mapping[str, object]) -> list[dict]:
    """Published figures for a notebook, on the data set of its protocol or of a notebook that it builds on."""
    while not (named := [protocol[name] for name in ("ratings", "interactions", "dataset") if name in protocol]):
        protocol = next((value for value in protocol.values() if isinstance(value, Mapping)), {"dataset": ""})
    figures = yaml.safe_load(paths.PUBLISHED.read_text(encoding="utf-8"))
    return figures.get(notebook, {}).get(str(named[0]), [])


def verdict(
    found: Mapping[str, dict], expected: Mapping[str, dict], notebooks: list[str], folder: Path | None = None
) -> pd.DataFrame:
    """The verdict table, one row for each metric: published, reference, yours, tolerance, verdict and its reason.

    With the run's folder, also the predictions behind a score are compared, example by example.
    """
    fresh = {
        (n, name): (metric, found[n]["metrics"][name]["value"])
        for n in notebooks
        for name, metric in expected.get(n, {"metrics": {}})["metrics"].items()
        if name in found.get(n, {"metrics": {}})["metrics"] and str(found[n]["seed"]) not in metric["value"]
    }
    factors, rows = reference.factors(fresh), []
    for notebook in notebooks:
        mine, theirs = found.get(notebook), expected.get(notebook)
        predicted = {} if folder is None or mine is None else by_example(folder, notebook)
        others = published(notebook, (theirs or mine or {}).get("protocol", {}))
        for name in (theirs or mine or {"metrics": ["(everything)"]})["metrics"]:
            other = next((o for o in others if o["metric"] == name), None)
            metric = theirs["metrics"].get(name) if theirs else None
            value = mine["metrics"].get(name, {}).get("value") if mine else None
            factor = factors.get((notebook, name), reference.KNOWN)
            rows.append(
                {
                    "notebook": notebook,
                    "metric": name,
                    "published": f"{other['value']:.4g} ({other['method']})" if other else "",
                    "reference": spread(metric) if metric else "",
                    "yours": "" if value is None else number(value),
                    "tolerance": number(reference.tolerance(metric, factor)) if metric else "",
                    "notices": number(reference.notices(metric, factor)) if metric else "",
                    **judge(mine, theirs, metric, value, predicted.get(name), factor),
                }
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def by_example(folder: Path, notebook: str) -> dict[str, tuple[bool, str]]:
    """For each score of which run and reference have the predictions: whether they agree, and how they differ."""
    mine = examples.read(examples.of_run(folder, notebook))
    theirs = examples.read(examples.of_reference(reference.judged_by(folder.name), notebook))
    if mine is None or theirs is None:
        return {}
    scores = dict(list(theirs.groupby("score", observed=True)))
    parts = mine.groupby("score", observed=True)
    return {score: examples.judge(part, scores[score]) for score, part in parts if score in scores}


def judge(
    mine: Mapping | None,
    theirs: Mapping | None,
    metric: Mapping | None,
    value: float | None,
    predicted: tuple[bool, str] | None = None,
    factor: float = reference.KNOWN,
) -> dict[str, str]:
    """The verdict on one metric, and its reason.

    A score is reproduced if it lies within the tolerance and, where there are predictions (`by_example`), these agree.
    Without them, a tolerance that is wide for the value (`SHARP`) says too little for that.
    """
    if mine is None:
        return {"verdict": MISSING, "reason": "no result; run the notebook"}
    if metric is None:
        return {"verdict": NOT_COMPARABLE, "reason": "no reference was measured"}
    unlike = reference.differences(mine["protocol"], theirs["protocol"])
    if unlike:
        return {"verdict": NOT_COMPARABLE, "reason": "; ".join(unlike)}
    if value is None:  # only now: other data may not have what a metric needs
        return {"verdict": MISSING, "reason": "no result; run the notebook"}
    distance, (agrees, words) = abs(value - metric["mean"]), predicted or (True, "")
    if not distance <= reference.tolerance(metric, factor) + 1e-9:  # so that a NaN drifts
        words = f"{distance:.4f} from the reference mean" + (f"; {words}" if words else "")
        return {"verdict": DRIFTED, "reason": words}
    sharp = not reference.noise(metric) or reference.notices(metric, factor) <= SHARP * abs(metric["mean"])
    if not words and not sharp:  # without predictions to compare
        return {"verdict": BLUNT, "reason": f"a change by {SHARP:.0%} may go unnoticed"}
    return {"verdict": REPRODUCED if agrees else DRIFTED, "reason": words}


def verify(folder: Path, notebooks: list[str] | None = None) -> pd.DataFrame:
    """The verdict table of a run's folder, over the notebooks of the run; by default over all of its profile."""
    if notebooks is None:
        notebooks = notebooks_of(reference.judged_by(folder.name))
    table = verdict(results(folder), reference.load(folder.name), notebooks, folder)
    for notebook in notebooks:
        if names := edited(folder, notebook):
            reason = f"changed after the run: {', '.join(names)}; delete it and run again"
            table.loc[table["notebook"] == notebook, ["yours", "verdict", "reason"]] = "", EDITED, reason
    return table


def fails(table: pd.DataFrame, parameters: Mapping[str, object]) -> bool:
    """Whether a verdict table shows anything but results that are reproduced or too blunt to say so.

    NOT COMPARABLE, which a missing reference is too, is no failure where the run set a parameter of the notebook, or of
    one that it builds on: that was the aim. What is `OUTSIDE` of the protocol excuses nothing.
    """
    own = set(parameters) - OUTSIDE
    changed = [n for n in pipeline() if any(not own.isdisjoint(declared(m)) for m in with_upstream(n))]
    excused = (table["verdict"] == NOT_COMPARABLE) & table["notebook"].isin(changed)
    return bool((~excused & ~table["verdict"].isin([REPRODUCED, BLUNT])).any())


def notes(folder: Path, notebooks: list[str] | None = None) -> list[str]:
    """What else to know of a run's results: other source than today's, uncommitted changes."""
    stamps = {
        name: result["provenance"] for name, result in results(folder).items() if name in (notebooks or pipeline())
    }
    other = [name for name, stamp in stamps.items() if stamp["source"] != source_hash(name)]
    unclean = [name for name, stamp in stamps.items() if stamp["commit"].endswith("+") or stamp["commit"] == "none"]
    here = [commit for commit in [machine.git_commit()] if commit[-1] == "+"]
    found = {
        "The notebook has changed since it ran": other,
        "Measured with code that is in no commit": unclean,
        "This checkout, the reference perhaps, differs from its commit": here,
    }
    return [f"{what}: {', '.join(names)}." for what, names in found.items() if names]


def tally(table: pd.DataFrame) -> str:
    """The number of rows with each verdict, in words."""
    return ", ".join(f"{count} of {len(table)} {name}" for name, count in table["verdict"].value_counts().items())


def markdown(table: pd.DataFrame) -> str:
    """A frame as a Markdown table, its cells unchanged but for control characters, which a terminal would obey."""
    cells = table.map(lambda value: CONTROL.sub("·", value) if isinstance(value, str) else value)
    return cells.to_markdown(index=False, disable_numparse=True)


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
