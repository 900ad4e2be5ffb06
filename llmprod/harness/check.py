"""Are the studies' rows still true? A random sample of them, run again and judged: `make check`."""

import math
import time
from collections.abc import Mapping

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from llmprod.harness import results, study

FLOOR = 1e-3  # what may differ between machines also where the rows of all seeds are equal
COLUMNS = ["study", "setting", "metric", "row", "again", "tolerance", "verdict", "reason"]


def show(number: int, seed: int | None = None) -> bool:
    """Runs so many random rows again, prints the verdict on them, and returns whether one has drifted.

    The sample is that of the day, unless a seed is given.
    """
    seed = int(time.time() // 86400) if seed is None else seed
    chosen = sample(number, seed)
    print(f"{len(chosen)} rows of today's code (sample {seed})")
    verdicts = []
    for name, row in (bar := tqdm(chosen, desc="check")):
        bar.set_postfix_str(name)
        if dataset := study.splits_of(row["parameters"]):
            study.prepare(dataset)
        verdicts += compare(name, row, study.measure(row["parameters"]))
    table = pd.DataFrame(verdicts, columns=COLUMNS)
    print(results.markdown(table))
    print(results.tally(table) or "Nothing to judge: no row was measured by today's code (make study).")
    return bool((table["verdict"] == results.DRIFTED).any())


def sample(number: int, seed: int) -> list[tuple[str, dict]]:
    """Random rows of all studies that today's code would measure again, each with its study; all if there are fewer."""
    current = [
        (name, row)
        for name in study.declared()
        for row, old in zip(study.rows(name), study.stale(name), strict=True)
        if not old
    ]
    chosen = np.random.default_rng(seed).permutation(len(current))[:number]
    return [current[i] for i in sorted(chosen)]


def compare(name: str, row: Mapping, again: Mapping) -> list[dict]:
    """The verdict on each metric of a row that was run again.

    On a processor of the same kind with as many threads it is equal. Else it may move by 3 sd √2, the spread of the
    difference of two runs, with the sd over the setting's seeds; with fewer than three seeds it is not judged.
    """
    others = [
        r["metrics"] for r in study.rows(name) if r["parameters"] | {"seed": 0} == row["parameters"] | {"seed": 0}
    ]
    setting, found = ", ".join(f"{key}={value}" for key, value in row["parameters"].items() if key != "experiment"), []
    for metric, value in row["metrics"].items():
        new = again["metrics"].get(metric, math.nan)
        known = [metrics[metric] for metrics in others if metric in metrics]
        tolerance = max(FLOOR, 3 * math.sqrt(2) * float(np.std(known, ddof=1))) if len(known) > 2 else math.nan
        equal = np.isclose(new, value, rtol=1e-6, atol=0, equal_nan=True)  # NaN: what a curve never reaches
        verdict, reason = results.REPRODUCED, "equal" if equal else ""
        if not reason and math.isnan(tolerance):
            verdict, reason = results.NOT_COMPARABLE, "fewer than three seeds say how much it usually moves"
        elif not reason and not abs(new - value) <= tolerance:  # so that a NaN drifts
            verdict, reason = results.DRIFTED, f"by {abs(new - value):.4g}"
        found.append(dict(zip(COLUMNS, (name, setting, metric, value, new, tolerance, verdict, reason), strict=True)))
    return found
