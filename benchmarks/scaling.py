"""How time, memory and storage grow with the number of documents: `make bench BENCH=scaling`.

Each step of the notebooks runs at three sizes, in a process of its own. Documents are words of R8 drawn at random, so
that no two are alike; weights are untrained, since speed does not depend on them. Larger sizes are reckoned from the
two largest: a constant, and a part that grows by the order of the algorithm. The exponent of the time between these two
sizes is given too, as a check of that order.

    python -m benchmarks.scaling [--step "near duplicates"] [--sizes 1000 10000]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import record
from llmprod import data, machine, models

Measured = dict[str, float]  # "seconds", and "disk, MB" where something is written
BEYOND = (10**6, 10**9)
HARDLY = 1.05  # less growth than this between two sizes is noise, and would be magnified


def documents(count: int, words: int = 60) -> list[str]:
    """So many texts of words drawn from R8."""
    known = np.array(" ".join(data.load("reuters-r8")["text"].head(500)).split())
    return [" ".join(known[row]) for row in np.random.default_rng(0).integers(0, len(known), size=(count, words))]


def megabytes(folder: Path) -> float:
    """The size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


# Steps: each prepares what it needs, and times the rest


def near_duplicates(count: int, folder: Path) -> Measured:
    """01: cleaning, and near-duplicates by MinHash; the table on disk."""
    table = pd.DataFrame({"text": documents(count), "label": "a", "split": "train"})
    started = time.perf_counter()
    data.near_duplicates(data.clean(table)[0]["text"])
    seconds = time.perf_counter() - started
    table.to_parquet(folder / "table.parquet")
    return {"seconds": seconds, "disk, MB": megabytes(folder)}


def epoch(count: int, folder: Path) -> Measured:
    """02: one pass of fine-tuning (LoRA, at most 64 tokens a text)."""
    from datasets import Dataset, DatasetDict

    from llmprod.finetune import learn
    from llmprod.finetune.recipe import Recipe

    labels = np.arange(count) % 8
    splits = DatasetDict(train=Dataset.from_dict({"text": documents(count), "label": labels}))
    recipe = Recipe(epochs=1, max_length=64)
    learnt = learn.learn(splits, list("abcdefgh"), recipe, folder, validate=False, progress=False)
    return {"seconds": count / learnt.texts_per_second}


def classify(count: int, folder: Path) -> Measured:
    """03, 05, 12, 14: predictions by int8 weights (at most 64 tokens a text)."""
    from llmprod.optimize import export

    whole = models.Predictor.pretrained("minilm", list("abcdefgh"), dropout=0.0, max_length=64)
    served = export.save(whole, folder / "int8", lambda file: export.save_int8(whole.model, file))
    texts = documents(count)
    started = time.perf_counter()
    served.predict(texts)
    return {"seconds": time.perf_counter() - started}


def answers(count: int, folder: Path) -> Measured:
    """06: answers that are kept, 64 in a transaction."""
    from llmprod.feedback.store import Store

    texts = documents(count)
    rows = [
        {"request": f"q{i}", "bundle": "b", "text": text, "label": "a", "confidence": 0.9, "user": f"u{i % 100}"}
        for i, text in enumerate(texts)
    ]
    started = time.perf_counter()
    with Store(f"sqlite:///{folder / 'answers.db'}") as store:
        for first in range(0, count, 64):
            store.add_answers(rows[first : first + 64])
    return {"seconds": time.perf_counter() - started, "disk, MB": megabytes(folder)}


def index(count: int, folder: Path) -> Measured:
    """11: an index of passages whose vectors are known: BM25, and vectors in memory."""
    from llmprod.customer_service import retrieval

    vectors = np.random.default_rng(0).normal(size=(count, 384)).astype(np.float32)
    texts = documents(count)
    started = time.perf_counter()
    retrieval.Index(texts, None, 0.9, vectors)
    return {"seconds": time.perf_counter() - started}


def ease(count: int, folder: Path) -> Measured:
    """13: EASE on so many items; users and interactions add little."""
    from scipy import sparse

    from llmprod.recommendation import scorers

    seen = sparse.random(2 * count, count, density=min(1, 20 / count), format="csr", random_state=0, dtype=np.float32)
    started = time.perf_counter()
    scorers.ease(seen)
    return {"seconds": time.perf_counter() - started}


def stream(count: int, folder: Path) -> Measured:
    """14: documents from a file through the monitor and its journal (encoder of one layer: `classify` has the rest)."""
    from benchmarks.monitor import saved, through
    from llmprod.news_monitoring import sources
    from llmprod.news_monitoring.scorer import Scorer

    lines = [json.dumps({"id": str(i), "time": 1e9 + i, "text": t}) for i, t in enumerate(documents(count, 15))]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "kept").mkdir()
    scorer = Scorer(saved(folder / "models", 1, 32))
    rate = through(scorer, sources.Tail(folder / "in.jsonl"), folder / "kept", count)
    return {"seconds": count / rate, "disk, MB": megabytes(folder / "kept")}


STEPS: dict[str, tuple[Callable[[int, Path], Measured], str, str, tuple[int, ...], tuple[int, int]]] = {
    # name: what runs, its notebook, what is counted, sizes, orders of time and memory
    "near duplicates": (near_duplicates, "01", "documents", (1_000, 5_000, 25_000), (1, 1)),
    "fine-tuning, one pass": (epoch, "02", "documents", (200, 500, 1_000), (1, 1)),
    "classification, int8": (classify, "03, 05, 12, 14", "documents", (500, 1_500, 4_000), (1, 1)),
    "answers kept": (answers, "06", "answers", (1_000, 10_000, 50_000), (1, 1)),
    "index of passages": (index, "11", "passages", (1_000, 10_000, 100_000), (1, 1)),
    "EASE": (ease, "13", "items", (1_000, 2_500, 6_000), (3, 2)),
    "monitor without its encoder": (stream, "14", "documents", (500, 2_000, 8_000), (1, 1)),
}


# Reckoning


def measure(step: str, size: int) -> Measured:
    """One step at one size, in a process of its own; with its peak memory."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--child", step, "--sizes", str(size)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def reckon(sizes: Sequence[int], values: Sequence[float], order: int, beyond: int) -> float:
    """The value at a size beyond: a + b nᵒʳᵈᵉʳ through the two largest sizes; constant where it hardly grew."""
    (n, m), (low, high) = sizes[-2:], values[-2:]
    slope = (high - low) / (m**order - n**order) if high > HARDLY * low else 0.0
    return high + slope * (beyond**order - m**order)


def summary(step: str, sizes: Sequence[int], found: Sequence[Measured]) -> dict[str, object]:
    """One row: what the largest size took, the exponent of the time, and what larger ones would take."""
    _, notebook, counted, _, (of_time, of_memory) = STEPS[step]
    seconds = [each["seconds"] for each in found]
    exponent = np.log(seconds[-1] / seconds[-2]) / np.log(sizes[-1] / sizes[-2])
    row = {"step": step, "notebook": notebook, "counted": counted, "size": sizes[-1]} | found[-1]
    row |= {"order": of_time, "exponent": float(exponent)}
    orders = {"seconds": of_time, "memory, MB": of_memory, "disk, MB": 1}
    for beyond in BEYOND:
        for name in found[-1]:
            values = [each[name] for each in found]
            row[f"{name}, {beyond:.0e}"] = reckon(sizes, values, orders[name], beyond)
        row[f"at {beyond:.0e}"] = shown(row, f", {beyond:.0e}")
    return row | {"measured": shown(row), "sizes": list(sizes), "all": list(found)}


def shown(row: dict[str, object], at: str = "") -> str:
    """Time, memory and storage in units that one can read."""
    seconds = row[f"seconds{at}"]
    units = (("years", 3.156e7), ("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
    name, unit = next(((name, unit) for name, unit in units if seconds >= 2 * unit), units[-1])
    parts = [f"{seconds / unit:,.{0 if seconds >= 10 * unit else 1}f} {name}"]
    for what in ("memory", "disk"):
        if (size := row.get(f"{what}, MB{at}")) is not None:
            name, unit = next((u for u in (("PB", 1e9), ("TB", 1e6), ("GB", 1e3)) if size >= u[1]), ("MB", 1))
            parts.append(f"{size / unit:,.{0 if size >= 10 * unit or unit == 1 else 1}f} {name} {what}")
    return ", ".join(parts)


def main() -> None:
    """Measures every step, prints the table and writes it down."""
    from tqdm.auto import tqdm

    from llmprod.harness import results

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--step", choices=STEPS, nargs="+", default=list(STEPS), help="(default: all)")
    options.add_argument(
        "--sizes", type=int, nargs="+", help="two or more, growing (default: three of each step's own)"
    )
    options.add_argument("--child", choices=STEPS, help=argparse.SUPPRESS)
    options = options.parse_args()
    machine.set_threads()
    machine.quiet()
    if options.child:
        with tempfile.TemporaryDirectory() as folder:
            found = STEPS[options.child][0](options.sizes[0], Path(folder))
        print(json.dumps(found | {"memory, MB": machine.peak_memory_mb()}))
        return
    print(machine.describe())
    rows = []
    for step in tqdm(options.step, desc="steps"):
        sizes = options.sizes or STEPS[step][3]
        rows.append(summary(step, sizes, [measure(step, size) for size in sizes]))
    print(results.markdown(pd.DataFrame(rows)[["step", "size", "measured", "exponent", "at 1e+06", "at 1e+09"]]))
    record("scaling", rows)


if __name__ == "__main__":
    main()
