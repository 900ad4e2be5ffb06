"""Serving a classifier on the processor, compared with the plain Hugging Face pipeline: `make bench BENCH=serving`.

The peer is `transformers.pipeline("text-classification")` on a `BertForSequenceClassification` of the same size: the
same pretrained encoder, layers and vocabulary, with the library's own head, which is untrained, since speed does not
depend on what the weights are. It gets the same texts in the same order, cut at the same length, one at a time
(`batch_size=1`, its default) and 32 at a time, padded to the longest of the batch, as it does by default. Ours is the
checkpoint of `02_finetune` and what `optimize` makes of it; accuracy is on the test split, lost points are against the
checkpoint. Every row is a process of its own, so that peak memory is its own; rows take turns, figures are medians.

    python -m benchmarks.serving [--run reports/cpu] [--texts 500] [--repeats 3] [--threads 0]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm.auto import tqdm

PEERS = {"pipeline, one at a time": 1, "pipeline, batches of 32": 32}
OURS = ("PyTorch fp32", "ONNX fp32", "ONNX int8 dynamic", "student, pruned, int8", "static embeddings")


def peer(folder: Path, texts: list[str], alone: list[str], batch_size: int, labels: int, length: int) -> dict:
    """Texts a second and latency of the pipeline, after a warm-up."""
    import numpy as np
    from transformers import AutoTokenizer, BertForSequenceClassification, pipeline

    from llmprod.models import model_folder

    base = model_folder("minilm")
    model = BertForSequenceClassification.from_pretrained(base, num_labels=labels).eval()
    classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(base), device=-1)
    options = {"truncation": True, "max_length": length}
    classify(texts[:32], batch_size=batch_size, **options)
    times = []
    for text in alone:
        started = time.perf_counter()
        classify(text, **options)
        times.append(1000 * (time.perf_counter() - started))
    started = time.perf_counter()
    classify(texts, batch_size=batch_size, **options)
    rate = len(texts) / (time.perf_counter() - started)
    return {"texts/s": rate, "p50, ms": float(np.median(times)), "p99, ms": float(np.percentile(times, 99))}


def ours(name: str, folder: Path, texts: list[str], alone: list[str]) -> dict:
    """Speeds of one of our variants, and the classes that it gives."""
    from llmprod import models
    from llmprod.optimize import export, front

    predictor = models.Predictor.load(folder, "fp32") if name == "PyTorch fp32" else export.load(folder)
    predictor.predict(texts[:32])
    logits, speeds = front.timed(predictor, texts, alone)
    return speeds | {"MB": front.megabytes(folder), "classes": logits.argmax(axis=1).tolist()}


def make(run: Path, folder: Path) -> None:
    """Makes the variants with the values of `04_optimize`, in folders by name, on all threads."""
    import numpy as np

    from llmprod import data, models
    from llmprod.harness import pipeline
    from llmprod.optimize import compress, export

    settings = pipeline.declared("04_optimize")
    splits, _, _ = data.prepared(run / "work" / "01_data" / "splits")
    texts, y = list(splits["train"]["text"]), np.array(splits["train"]["label"])
    original = models.Predictor.load(run / "work" / "02_finetune" / "checkpoint", "fp32")
    exported = export.save(original, folder / "ONNX fp32")
    whole = folder / "ONNX fp32" / export.ONNX
    export.save(original, folder / "ONNX int8 dynamic", lambda file: export.quantise_dynamic(whole, file))
    rows = np.sort(np.random.default_rng(0).permutation(len(texts))[: settings["distill_texts"]])
    lessons = [texts[row] for row in rows]
    depth = original.model.config.num_hidden_layers
    layers = np.linspace(0, depth - 1, settings["student_layers"]).round().astype(int).tolist()
    student = compress.with_layers(original, layers)
    options = {"epochs": settings["distill_epochs"], "temperature": settings["temperature"]}
    compress.distill(student, lessons, exported.predict(lessons), progress="distillation", **options)
    small = compress.prune_vocabulary(student, texts)
    export.save(small, folder / "student, pruned, int8", lambda file: export.save_int8(small.model, file))
    bag = compress.static_embeddings(compress.prune_vocabulary(original, texts), texts, settings["dimensions"])
    options = {"epochs": settings["static_epochs"], "learning_rate": 1e-2}
    compress.distill(bag, texts, y, progress="static embeddings", **options)
    export.save(bag, folder / "static embeddings")


def measure(name: str, run: Path, folder: Path, count: int, threads: int) -> dict:
    """One row, in this process."""
    import numpy as np
    import torch

    from llmprod import data, machine

    machine.quiet()
    machine.set_threads()
    if threads:
        torch.set_num_threads(threads)
    splits, labels, _ = data.prepared(run / "work" / "01_data" / "splits")
    rows = np.random.default_rng(0).permutation(len(splits["test"]))[:count].tolist()
    texts, y = [splits["test"]["text"][row] for row in rows], np.array(splits["test"]["label"])[rows]
    checkpoint = run / "work" / "02_finetune" / "checkpoint"
    alone = texts[:100]
    if name in PEERS:
        length = json.loads((checkpoint / "tokenizer_config.json").read_text())["model_max_length"]
        found = peer(folder, texts, alone, PEERS[name], len(labels), length)
    else:
        found = ours(name, checkpoint if name == "PyTorch fp32" else folder / name, texts, alone)
        found["accuracy"] = float((np.array(found.pop("classes")) == y).mean())
    return found | {"peak MB": machine.peak_memory_mb()}


def main() -> None:
    """Makes the variants, runs every row in turn, prints the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=Path, help="a run with 01_data and 02_finetune (default: reports/cpu)")
    options.add_argument("--texts", type=int, default=500, help="test texts (%(default)s)")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--threads", type=int, default=0, help="0: all")
    options.add_argument("--row", help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help="where the variants are or shall be; default: a temporary one")
    options = options.parse_args()

    from llmprod import machine, paths
    from llmprod.optimize import front

    run = options.run or paths.REPORTS / "cpu"
    if options.row:
        print(json.dumps(measure(options.row, run, options.folder, options.texts, options.threads)))
        return
    machine.quiet()
    machine.set_threads()
    print(f"{machine.describe()}; {front.processor()}; {options.threads or machine.cores()} threads")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / OURS[-1]).is_dir():
            make(run, folder)
        found: dict[str, list[dict]] = {name: [] for name in (*PEERS, *OURS)}
        turns_of = [(name, turns) for _ in range(options.repeats) for name, turns in found.items()]
        for name, turns in (bar := tqdm(turns_of)):
            bar.set_postfix_str(name)
            command = [sys.executable, "-m", "benchmarks.serving", "--row", name, "--folder", str(folder)]
            command += ["--run", str(run), "--texts", str(options.texts), "--threads", str(options.threads)]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRACKING": "none"})
            if done.returncode:
                sys.exit(done.stderr)
            turns.append(json.loads(done.stdout.splitlines()[-1]))
    report(found)


def report(found: dict[str, list[dict]]) -> None:
    """Prints one line for each row: medians, and ratios to the two ways of the pipeline."""
    import pandas as pd

    from benchmarks import record
    from llmprod.harness import results

    rows = {
        name: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]} for name, turns in found.items()
    }
    one, many = (rows[name] for name in PEERS)
    exact = rows["PyTorch fp32"]["accuracy"]
    lines = []
    for name, row in rows.items():
        row["texts/s over pipeline, one at a time"] = row["texts/s"] / one["texts/s"]
        row["texts/s over pipeline, batches of 32"] = row["texts/s"] / many["texts/s"]
        row["p50 over pipeline, one at a time"] = row["p50, ms"] / one["p50, ms"]
        row |= {"points lost": 100 * (exact - row["accuracy"])} if "accuracy" in row else {}
        lines.append(
            {
                "variant": name,
                "texts/s": f"{row['texts/s']:,.0f}",
                "/ pipeline, 1": f"{row['texts/s over pipeline, one at a time']:.1f}",
                "/ pipeline, 32": f"{row['texts/s over pipeline, batches of 32']:.1f}",
                "p50, ms": f"{row['p50, ms']:.2f}",
                "of the pipeline's": f"{row['p50 over pipeline, one at a time']:.2f}",
                "p99, ms": f"{row['p99, ms']:.2f}",
                "points lost": f"{row['points lost']:+.2f}" if "points lost" in row else "",
                "MB": f"{row['MB']:.0f}" if "MB" in row else "",
                "peak MB": f"{row['peak MB']:.0f}",
            }
        )
    print(results.markdown(pd.DataFrame(lines)))
    record("serving", [{"variant": name} | row for name, row in rows.items()])


if __name__ == "__main__":
    main()
