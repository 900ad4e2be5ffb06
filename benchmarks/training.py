"""Training throughput against the plain Trainer and against padding everything to 128: `make bench`.

Same model, data, batch size and number of steps in one run; each variant is a process of its own, so that peak memory
is its own, and the variants take turns. Printed are texts per second, ratios, and peak memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

VARIANTS = {
    "padded to 128": "the source text's recipe: every text padded to 128 tokens, float32",
    "plain Trainer": "dynamic padding, batches at random, AdamW, float32: what Trainer does by itself",
    "llmprod fp32": "batches of similar length, fused AdamW, float32",
    "llmprod": "the same in the precision of 02_finetune (bfloat16 products where the processor has them)",
}


def measure(variant: str, dataset: str, rows: int, batch_size: int) -> dict[str, float]:
    """Trains one epoch on a random subset after a warm-up, in this process: texts per second and peak memory."""
    from datasets import Dataset, disable_progress_bars
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from llmprod import data, finetune, track

    disable_progress_bars()
    track.seed_everything(0)
    track.set_threads()
    table = data.clean(data.load(dataset))[0].query("split == 'train'").sample(rows, random_state=0)
    labels = sorted(table["label"].unique())
    model, tokenizer = finetune.load_classifier("minilm", labels)
    tokens = Dataset.from_dict(
        {
            **tokenizer(table["text"].tolist(), truncation=True, max_length=128),
            "labels": [labels.index(label) for label in table["label"]],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        collate = DataCollatorWithPadding(tokenizer)
        common = {
            "num_train_epochs": 1,
            "per_device_train_batch_size": batch_size,
            "learning_rate": 1e-4,
            "disable_tqdm": True,
        }
        if variant.startswith("llmprod"):
            precision = "fp32" if variant.endswith("fp32") else "auto"
            nothing_kept = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
            arguments = finetune.training_arguments(Path(folder), 0, precision, **nothing_kept, **common)
        else:
            settings = {"use_cpu": finetune.device_and_precision()[0].type == "cpu", "report_to": "none"}
            arguments = TrainingArguments(folder, save_strategy="no", **settings, **common)
            if variant.startswith("padded"):
                collate = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=128)

        def train(part) -> float:
            trainer = Trainer(
                model=model, args=arguments, train_dataset=part, data_collator=collate, processing_class=tokenizer
            )
            return trainer.train().metrics["train_samples_per_second"]

        train(tokens.select(range(2 * batch_size)))
        return {"rate": train(tokens), "memory": track.peak_memory_mb()}


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

    from llmprod import artifacts, finetune, track

    track.set_threads()
    _, precision, reason = finetune.device_and_precision()
    print(f"{track.machine()}; precision {precision}: {reason}")
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
        for _ in range(options.repeats):
            for variant in VARIANTS:
                command = [sys.executable, "-m", "benchmarks.training", "--variant", variant, "--dataset", dataset]
                command += ["--rows", str(options.rows), "--batch-size", str(options.batch_size)]
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRACKING": "none"})
                if done.returncode:
                    sys.exit(done.stderr)
                found[variant].append(json.loads(done.stdout.splitlines()[-1]))
        rates = {variant: statistics.median(turn["rate"] for turn in turns) for variant, turns in found.items()}
        print(f"{'variant':16}{'texts/s':>9}{'/ padded':>10}{'/ plain':>9}{'peak MB':>9}   spread of texts/s")
        for variant, turns in found.items():
            rate, each = rates[variant], [turn["rate"] for turn in turns]
            memory = statistics.median(turn["memory"] for turn in turns)
            print(
                f"{variant:16}{rate:9.1f}{rate / rates['padded to 128']:10.2f}{rate / rates['plain Trainer']:9.2f}"
                f"{memory:9.0f}   {min(each):.1f} to {max(each):.1f}"
            )
    print("\n" + "\n".join(f"{variant}: {text}" for variant, text in VARIANTS.items()))


if __name__ == "__main__":
    main()
