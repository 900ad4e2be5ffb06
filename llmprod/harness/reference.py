"""The reference: our own results over seeds and machines, and how far a run may lie from them."""

import math
import statistics
from collections.abc import Hashable, Mapping

import numpy as np

from llmprod import LLMProdError, paths, shapes

METRIC = {"value": shapes.finites, "mean": shapes.finite, "sd": shapes.finite}
METRIC |= {"runs": shapes.positive, "n?": shapes.positive, "elsewhere?": shapes.finites, "machines?": shapes.finite}
REFERENCE = {"notebooks": {"*": {"metrics": {"*": METRIC}, "protocol": {}, "minutes": shapes.number_or_none}}}
KNOWN = 3.0  # standard deviations that a run of one of the reference's seeds may lie off
FALSE_ALARMS = 0.02  # share of honest reports of another seed in which a row drifts, or more


def judged_by(profile: str) -> str:
    """The profile whose reference judges a run: its own, or `cpu` for a run outside the profiles."""
    own = (paths.REFERENCE / f"{profile}.json").exists() or (paths.PROFILES / f"{profile}.yaml").exists()
    return profile if own else "cpu"


def load(profile: str) -> dict:
    """Our own results over seeds for a profile; for a run outside the profiles those of `cpu`; {} if there are none.

    Raises LLMProdError where the file is damaged, or a mean or deviation does not follow from its values.
    """
    path = paths.REFERENCE / f"{judged_by(profile)}.json"
    if not path.exists():
        return {}
    way_out = "take the committed one, or `make reference`"
    notebooks = shapes.read(path, REFERENCE, way_out)["notebooks"]
    metrics = {(n, name): metric for n, item in notebooks.items() for name, metric in item["metrics"].items()}
    found = {key: moments(m["value"], m.get("elsewhere")) for key, m in metrics.items()}
    parts = ("mean", "sd", "runs", "machines")
    wrong = [k for k, m in metrics.items() if not all(math.isclose(m.get(p, 0), found[k].get(p, 0)) for p in parts)]
    if wrong:
        raise LLMProdError(f"{path} was damaged or edited ({wrong[0]}): {way_out}.")
    return notebooks


def moments(values: Mapping[str, float], elsewhere: Mapping[str, float] | None = None) -> dict[str, float]:
    """Mean, sd and number of values by seed; `machines`: how far those `elsewhere` (by "seed, machine") are off."""
    sd = statistics.stdev(values.values()) if len(values) > 1 else 0.0
    found = {"mean": statistics.mean(values.values()), "sd": sd, "runs": len(values)}
    gaps = [value - values.get(who.partition(",")[0], math.nan) for who, value in (elsewhere or {}).items()]
    return found | ({"machines": math.hypot(*gaps) / math.sqrt(len(gaps))} if gaps else {})


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
        by_seed = {str(run["seed"]): run["metrics"][name]["value"] for run in runs}
        metrics[name] = metric | {"value": by_seed} | moments(by_seed)
    speeds = {k: statistics.median(run["speeds"][k] for run in runs) for k in runs[0]["speeds"]}
    minutes = statistics.median(run["provenance"]["minutes"] for run in runs)
    return {
        "machine": runs[0]["provenance"]["machine"],
        "minutes": minutes,
        "metrics": metrics,
        "speeds": speeds,
        "protocol": protocols[0],
    }


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


def noise(metric: Mapping[str, object]) -> float:
    """The standard deviation of one more run around the mean: by seed and, where it was measured, by machine.

    One seed has no spread: of a share it is the standard error over its n examples.
    """
    spread = math.hypot(metric["sd"], metric.get("machines", 0.0)) * math.sqrt(1 + 1 / metric["runs"])
    if metric["runs"] == 1 and "n" in metric:
        share = min(max(metric["mean"], 0.0), 1.0)
        spread = max(spread, math.sqrt(share * (1 - share) / metric["n"]))
    return spread


def tolerance(metric: Mapping[str, object], factor: float = KNOWN) -> float:
    """How far a run may lie from the mean: the larger of `factor` times the noise and of one test example."""
    varied = noise(metric)
    return max(factor * varied if varied else 0.0, 1 / metric["n"] if "n" in metric else 0.0)


def notices(metric: Mapping[str, object], factor: float = KNOWN) -> float:
    """The smallest change of a metric's true value that a run would show in nine of ten cases."""
    return tolerance(metric, factor) + 1.2816 * noise(metric)  # the normal distribution's quantile at .9


def factors(runs: Mapping[Hashable, tuple[Mapping[str, object], float]]) -> dict[Hashable, float]:
    """How many times its noise each row of a report may lie off, where the seed is none of the reference's.

    Student's t with runs - 1 degrees of freedom and Holm's correction over the rows whose values vary (Holm, "A simple
    sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979), so that an honest
    report has rows that drift with probability `FALSE_ALARMS` at most. From one seed nothing can be told: infinity.

    Args:
        runs: name of a row -> the reference's metric, and the run's value
    """
    from scipy import stats

    found, chances = dict.fromkeys(runs, math.inf), {}
    for row, (metric, value) in runs.items():
        if metric["runs"] > 1 and noise(metric):
            off = abs(value - metric["mean"]) / noise(metric)
            chances[row] = float(np.nan_to_num(stats.t.sf(off, metric["runs"] - 1))), metric["runs"] - 1
    left = len(chances)
    for row, (chance, freedom) in sorted(chances.items(), key=lambda item: item[1]):
        found[row] = float(stats.t.isf(FALSE_ALARMS / 2 / left, freedom))
        left -= chance < FALSE_ALARMS / 2 / left
    return found
