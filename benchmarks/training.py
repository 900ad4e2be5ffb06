"""Training throughput against the plain Trainer and against padding everything to 128: `make bench`.

Same model and data in one run; each variant is a process of its own, so that peak memory
is its own, and the variants take turns. Printed are texts per second, ratios, peak memory, and the share of the
machine's matrix-product peak: 6 FLOP for each weight of a layer and token that is no padding, attention not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm.auto import tqdm

VARIANTS = {
    "padded to 128": "the source text's recipe: every text padded to 128 tokens, float32",
    "plain Trainer": "dynamic padding, batches at random, AdamW, float32: what Trainer does by itself",
    "llmprod": "ours in float32: token budget, fused AdamW, no dropout, token embeddings left as they are",
    "llmprod bf16": "the same with bfloat16 products, which some processors compute faster",
}


def measure(variant: str, dataset: str, rows: int, batch_size: int) -> dict[str, float]:
    """Trains one epoch on a random subset after a warm-up, in this process: texts per second and peak memory."""
    from datasets import Dataset, disable_progress_bars
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from llmprod import data, machine
    from llmprod.finetune.recipe import Recipe
    from llmprod.finetune.trainer import trainer
    from llmprod.models import Predictor

    disable_progress_bars()
    machine.quiet()
    machine.seed_everything(0)
    machine.set_threads()
    table = data.clean(data.load(dataset))[0].query("split == 'train'").sample(rows, random_state=0)
    labels = sorted(table["label"].unique())
    ours = variant.startswith("llmprod")
    predictor = Predictor.pretrained("minilm", labels, dropout=0.0 if ours else None)
    model, tokenizer = predictor.model, predictor.tokenizer
    tokens = Dataset.from_dict(
        {
            **tokenizer(table["text"].tolist(), truncation=True, max_length=128),
            "labels": [labels.index(label) for label in table["label"]],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        collate = DataCollatorWithPadding(tokenizer)
        if variant.startswith("padded"):
            collate = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=128)

        def train(part) -> float:
            if ours:
                precision = "bf16" if variant.endswith("bf16") else "fp32"
                recipe = Recipe(epochs=1, learning_rate=1e-4, precision=precision)
                training = trainer(predictor, part, None, Path(folder), recipe, progress=False)
            else:
                arguments = TrainingArguments(
                    folder,
                    use_cpu=machine.device_and_precision()[0].type == "cpu",
                    num_train_epochs=1,
                    per_device_train_batch_size=batch_size,
                    learning_rate=1e-4,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                )
                training = Trainer(
                    model=model, args=arguments, train_dataset=part, data_collator=collate, processing_class=tokenizer
                )
            return training.train().metrics["train_samples_per_second"]

        train(tokens.select(range(2 * batch_size)))
        rate = train(tokens)
    words = sum(map(len, tokens["input_ids"])) / len(tokens)
    inner = sum(p.numel() for n, p in model.encoder.encoder.named_parameters() if p.ndim == 2)
    return {"rate": rate, "memory": machine.peak_memory_mb(), "GFLOP/s": rate * words * 6 * inner / 1e9}


def gemm_peak() -> dict[str, float]:
    """The most GFLOP/s that a matrix product of the model's shapes reaches here, by precision; median of 20."""
    import time

    import torch

    from llmprod import machine

    machine.set_threads()
    found = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2048, 384).to(kind), torch.randn(384, 1536).to(kind)
        times = []
        for _ in range(25):
            started = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - started)
        found[name] = 2 * 2048 * 384 * 1536 / statistics.median(times[5:]) / 1e9
    return found


def main() -> None:
    """Runs every variant in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", nargs="+", default=["reuters-r8", "banking77"])
    parser.add_argument("--rows", type=int, default=384)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options.dataset[0], options.rows, options.batch_size)))
        return

    from benchmarks import record
    from llmprod import artifacts, machine

    machine.set_threads()
    print(f"{machine.describe()}; {machine.device_and_precision()[2]}")
    peak = gemm_peak()
    print("GEMM peak, GFLOP/s: " + ", ".join(f"{name} {value:.0f}" for name, value in peak.items()))
    rows: list[dict] = []
    for dataset in options.dataset:
        try:
            artifacts.fetch(dataset)
        except artifacts.ArtifactError as error:
            print(f"\n{dataset}: left out. {error}")
            continue
        print(
            f"\n{dataset}, minilm, {options.rows} texts, batch {options.batch_size}, median of {options.repeats} turns"
        )
        found: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
        for variant in (bar := tqdm([variant for _ in range(options.repeats) for variant in VARIANTS], desc=dataset)):
            bar.set_postfix_str(variant)
            command = [sys.executable, "-m", "benchmarks.training", "--variant", variant, "--dataset", dataset]
            command += ["--rows", str(options.rows), "--batch-size", str(options.batch_size)]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRACKING": "none"})
            if done.returncode:
                sys.exit(done.stderr)
            found[variant].append(json.loads(done.stdout.splitlines()[-1]))
        rates = {variant: statistics.median(turn["rate"] for turn in turns) for variant, turns in found.items()}
        print(
            f"{'variant':16}{'texts/s':>9}{'/ padded':>10}{'/ plain':>9}{'peak MB':>9}{'GFLOP/s':>9}{'of GEMM':>9}"
            "   spread of texts/s"
        )
        for variant, turns in found.items():
            rate, each = rates[variant], [turn["rate"] for turn in turns]
            memory = statistics.median(turn["memory"] for turn in turns)
            useful = statistics.median(turn["GFLOP/s"] for turn in turns)
            share = useful / peak["bf16" if variant.endswith("bf16") else "fp32"]
            ratios = {f"texts/s over {peer}": rate / rates[peer] for peer in ("padded to 128", "plain Trainer")}
            numbers = {"texts/s": rate, "peak MB": memory, "GFLOP/s": useful, "share of GEMM peak": share}
            rows.append({"dataset": dataset, "variant": variant} | numbers | ratios)
            print(
                f"{variant:16}{rate:9.1f}{rate / rates['padded to 128']:10.2f}{rate / rates['plain Trainer']:9.2f}"
                f"{memory:9.0f}{useful:9.0f}{share:9.0%}   {min(each):.1f} to {max(each):.1f}"
            )
    print("\n" + "\n".join(f"{variant}: {text}" for variant, text in VARIANTS.items()))
    record("training", rows, **{"GEMM peak, GFLOP/s": peak})


if __name__ == "__main__":
    main()
