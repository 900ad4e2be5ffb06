"""The examples behind a score: what a run predicted for each text, and whether another run predicts the same."""

import hashlib
import itertools
import math
import platform
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from llmprod import LLMProdError, files, paths


def is_text(values: pd.Series) -> bool:
    """Whether a column holds texts alone, as they are or as categories."""
    return pd.api.types.is_string_dtype(getattr(values.dtype, "categories", values))


COLUMNS = dict.fromkeys(("score", "machine", "id"), is_text) | dict.fromkeys(
    ("seed", "truth", "prediction"), pd.api.types.is_integer_dtype
)


def table(texts: Sequence[str], truth: np.ndarray, probabilities: Mapping[str, np.ndarray], seed: int) -> pd.DataFrame:
    """The predictions of a run, one row for each score and text.

    Args:
        texts: the test texts, of which a fingerprint is kept
        truth: their classes, as numbers
        probabilities: name of an accuracy -> the probabilities that it is computed from, texts × classes
        seed: of the run
    """
    ids = pd.Series([hashlib.sha256(text.encode()).hexdigest()[:10] for text in texts], dtype="str")
    ids += "-" + ids.groupby(ids).cumcount().astype(str)  # a text may occur twice
    parts = [
        pd.DataFrame(
            {
                "score": score,
                "seed": seed,
                "machine": kind(),
                "id": ids,
                "truth": np.asarray(truth, dtype="int16"),
                "prediction": shares.argmax(axis=1).astype("int16"),
                "probability": shares.max(axis=1).astype("float32"),
            }
        )
        for score, shares in probabilities.items()
    ]
    return pd.concat(parts, ignore_index=True)


def kind() -> str:
    """What a run's last digits depend on: processor with its instructions and caches (or GPU), threads, PyTorch."""
    able = torch.cpu.get_capabilities()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else able.get("cpu_name") or platform.machine()
    digest = hashlib.sha256(repr(sorted(able.items())).encode()).hexdigest()[:8]
    return f"{name} ({digest}), {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def write(path: Path, found: pd.DataFrame) -> None:
    """Writes predictions as a Parquet file, atomically."""
    with files.atomic(path) as temporary:
        found.astype({"score": "category", "machine": "category"}).to_parquet(
            temporary, compression="zstd", index=False
        )


def read(path: Path) -> pd.DataFrame | None:
    """The predictions in a file, None where there is none. Raises LLMProdError for a damaged one."""
    try:
        found = pd.read_parquet(path) if path.exists() else None
        wrong = found is not None and [name for name, kind in COLUMNS.items() if not kind(found[name])]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        raise LLMProdError(f"{path} is damaged ({wrong}): take the committed one, or run again.")
    return found


def gather(sources: Sequence[Path], target: Path) -> None:
    """Writes the predictions of several seeds or machines as one file, if there are any; of the same, the last."""
    parts = [part for path in sources if (part := read(path)) is not None]
    if parts:
        target.parent.mkdir(parents=True, exist_ok=True)
        found = pd.concat([part.astype({"score": str, "machine": str}) for part in parts], ignore_index=True)
        write(target, found.drop_duplicates(["score", "seed", "machine", "id"], keep="last", ignore_index=True))


def of_run(folder: Path, notebook: str) -> Path:
    """The file with the predictions of a run's notebook."""
    return folder / "results" / f"{notebook}.parquet"


def of_reference(profile: str, notebook: str) -> Path:
    """The file with the predictions of all seeds of a profile's reference."""
    return paths.REFERENCE / "examples" / profile / f"{notebook}.parquet"


def differences(a: pd.DataFrame, b: pd.DataFrame) -> tuple[int, int, int, int]:
    """How two runs differ: texts of both, predictions that differ, right in `a` only, right in `b` only."""
    both = a.merge(b, on="id", suffixes=("", "_b"))
    right_a, right_b = both["prediction"] == both["truth"], both["prediction_b"] == both["truth"]
    differ = int((both["prediction"] != both["prediction_b"]).sum())
    return len(both), differ, int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())


def allowed(runs: Collection[pd.DataFrame], n: float) -> float:
    """How many of n predictions of another run may differ from those of one of these runs, by how many theirs differ.

    The mean over the pairs of runs and 3 sd √(1 + 1/runs) more, where the sd is at least that of a Poisson count. No
    limit without pairs that have half of the texts in common: each seed of a validation split has texts of its own.
    """
    pairs = [differences(a, b)[:2] for a, b in itertools.combinations(runs, 2)]
    counts = [differ * n / common for common, differ in pairs if common >= n / 2]
    if not counts:
        return math.inf
    mean, sd = statistics.mean(counts), statistics.stdev(counts) if len(counts) > 1 else 0.0
    return mean + 3 * max(sd, math.sqrt(mean)) * math.sqrt(1 + 1 / len(runs))


def judge(mine: pd.DataFrame, reference: pd.DataFrame) -> tuple[bool, str]:
    """Whether a run predicts what the reference predicts for each text, and how they differ, in words.

    With a seed of the reference, on a machine of the same kind, all predictions are equal. Another machine is at worst
    another seed: of both, as many predictions may differ as `allowed` says.

    Args:
        mine: the rows of one score of a run, as `table` makes them
        reference: the rows of the same score, of one or more seeds and machines
    """
    seed, machine = mine["seed"].iloc[0], mine["machine"].iloc[0]
    parts = dict(list(reference.groupby(["seed", "machine"], observed=True)))
    runs = {run: part for run, part in parts.items() if part["id"].isin(mine["id"]).any()}
    same = [part for run, part in runs.items() if run[0] == seed]
    alike = [runs[seed, machine]] if (seed, machine) in runs else []
    found = [differences(mine, other) for other in alike or same or runs.values()]
    if not found:
        return True, ""
    n, differ, better, worse = (statistics.mean(column) for column in zip(*found, strict=True))
    limit = 0.0 if alike else allowed(runs.values(), n)
    gain, half = (better - worse) / n, 1.96 * math.sqrt(max(better + worse - (better - worse) ** 2 / n, 0)) / n
    words = f"{differ:,.0f} of {n:,.0f} predictions differ from {'the same' if same else 'another'} seed's"
    words += f" (accuracy {gain:+.4f}, 95 % {gain - half:+.4f} to {gain + half:+.4f})" if differ else ""
    return differ <= limit, words if differ <= limit else f"{words}; at most {limit:,.0f} may"
