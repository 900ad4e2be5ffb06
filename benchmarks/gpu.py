"""Training and inference on a GPU, compared with the plain Trainer and the library's pipeline: `make bench-gpu`.

An encoder of BERT-base's shape with random weights, which are as fast as trained ones, on random words: texts per
second, ratios, peak memory and model FLOP utilisation (MFU), the share of the peak measured on this card that goes
into the model's own products. Without a GPU it runs in a shrunken form, so that no line is first tried on somebody's.
"""

import argparse
import gc
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    pipeline,
)

from benchmarks import record
from llmprod import artifacts, data, machine, models
from llmprod.finetune.recipe import Recipe
from llmprod.finetune.trainer import trainer
from llmprod.models import Predictor

TRAINING = {
    "plain Trainer": "what Trainer does by itself: float32, AdamW, dropout, random batches of 32, padded",
    "plain Trainer, bf16": "the same with bf16=True",
    "llmprod": "bf16, batches by token budget, fused AdamW, no dropout, token embeddings left as they are",
    "llmprod, compiled": "the same with torch.compile",
}
INFERENCE = {
    "pipeline": "transformers.pipeline on the same texts: float32, batches of 32",
    "llmprod": "Predictor: bf16, batches of texts of similar length",
}
LABELS = ["a", "b"]


def main() -> None:
    """Measures every variant and length in turn, prints the tables and records them."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512] if cuda else [16])
    parser.add_argument("--layers", type=int, default=12 if cuda else 2)
    parser.add_argument("--seconds", type=float, default=4 if cuda else 1, help="of each measurement, about")
    parser.add_argument("--batch-tokens", type=int, default=32768 if cuda else 512)
    options = parser.parse_args()
    machine.quiet()
    disable_progress_bars()
    machine.set_threads()
    machine.seed_everything(0)
    torch.use_deterministic_algorithms(False)  # as plain users of a GPU have it
    peak = gemm_peak(8192 if cuda else 512)
    print(f"{machine.describe()}; {driver()}; peak {peak / 1e12:.3g} TFLOP/s", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = random_encoder(Path(temporary) / "encoder", options.layers)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        parts = {f"{length} tokens": random_texts(tokenizer, length) for length in options.lengths}
        if banking := real_texts("banking77"):
            parts["Banking77"] = banking
        for part, texts in parts.items():
            tokens = tokenizer(list(texts[:512]), truncation=True, max_length=512)["input_ids"]
            words = float(np.mean([len(ids) for ids in tokens]))
            flop = flop_a_token(options.layers, words)
            for task, variants in (("training", TRAINING), ("inference", INFERENCE)):
                for variant in variants:
                    if variant.endswith("compiled") and (part != "128 tokens" or not cuda):
                        continue  # one length shows what it gives; each costs a compilation, and the CPU's a compiler
                    start = train if task == "training" else infer
                    few = max(32, 4 * options.batch_tokens // round(words))
                    done = rate(start(variant, folder, texts, options.batch_tokens), options.seconds, few)
                    factor = 3 if task == "training" else 1
                    done |= {"MFU": done["texts/s"] * words * factor * flop / peak}
                    rows.append({"texts": part, "task": task, "variant": variant} | done)
                    print(json.dumps(rows[-1]), flush=True)
    table = pd.DataFrame(rows)
    first = table.groupby(["texts", "task"])["texts/s"].transform("first")
    table["ratio"] = table["texts/s"] / first
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    for task, variants in (("training", TRAINING), ("inference", INFERENCE)):
        print(f"\n{task}\n" + "\n".join(f"  {name}: {text}" for name, text in variants.items()))
    facts = {"driver": driver(), "peak, TFLOP/s": peak / 1e12, "layers": options.layers}
    record("gpu" if cuda else "gpu-shrunken", table.to_dict("records"), **facts)


# What is measured


def random_encoder(folder: Path, layers: int) -> Path:
    """A folder with an encoder of BERT-base's shape (Devlin et al. 2019) and random weights, and MiniLM's tokenizer."""
    BertModel(BertConfig(num_hidden_layers=layers)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(models.model_folder("minilm"))  # BERT's uncased vocabulary
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    return folder


def random_texts(tokenizer: AutoTokenizer, length: int, count: int = 4096) -> list[str]:
    """Texts of random whole words of one piece, `length` tokens each with the two that mark its ends."""
    words = np.array([word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2])
    return [" ".join(row) for row in np.random.default_rng(0).choice(words, (count, length - 2))]


def real_texts(name: str) -> list[str]:
    """The training texts of a data set; none where it can't be fetched."""
    try:
        return data.clean(data.load(name))[0].query("split == 'train'")["text"].tolist()
    except artifacts.ArtifactError:
        print(f"{name}: left out, it can't be fetched here", flush=True)
        return []


def flop_a_token(layers: int, length: float, width: int = 768) -> float:
    """FLOP of a forward pass for each token: 2 for each weight of a layer, and attention's two products."""
    return layers * (2 * 12 * width**2 + 4 * length * width)


def gemm_peak(size: int) -> float:
    """The FLOP/s that a square matrix product reaches here; median of 10 after 3.

    In bf16, or in float32 where that is faster: some processors only emulate bf16.
    """
    device, peaks = machine.device_and_precision()[0], []
    for kind in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
        times = []
        for _ in range(13):
            started = clock()
            a @ b
            times.append(clock() - started)
        peaks.append(2 * size**3 / float(np.median(times[3:])))
    return max(peaks)


def clock() -> float:
    """Seconds, when the device has done all that it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def driver() -> str:
    """The GPU's driver and CUDA's version; "no GPU" without one."""
    if not torch.cuda.is_available():
        return "no GPU"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        found = "unknown"
    return f"driver {found}, CUDA {torch.version.cuda}"


# How


def rate(go: Callable[[int], None], seconds: float, few: int) -> dict[str, float]:
    """Texts per second and peak memory of `go(texts)`: twice a few texts to warm up, then as many as fill the time."""
    go(few)
    started = clock()
    go(few)
    count = max(few, round(few / (clock() - started) * seconds))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = clock()
    go(count)
    found = {"texts/s": count / (clock() - started), "peak MB": machine.peak_memory_mb()}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def cycled(texts: Sequence[str], count: int) -> list[str]:
    """As many texts as asked for, from the first on again where there are too few."""
    return [texts[number % len(texts)] for number in range(count)]


def train(variant: str, folder: Path, texts: Sequence[str], batch_tokens: int) -> Callable[[int], None]:
    """A function that trains on so many texts, tokenised before."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(list(texts), truncation=True, max_length=512)["input_ids"]

    def dataset(count: int) -> Dataset:
        rows = {"input_ids": cycled(ids, count), "labels": [number % 2 for number in range(count)]}
        return Dataset.from_dict(rows | {"attention_mask": [[1] * len(row) for row in rows["input_ids"]]})

    if variant.startswith("plain"):
        model = BertForSequenceClassification.from_pretrained(folder, num_labels=2)

        def go(count: int) -> None:
            arguments = TrainingArguments(
                str(folder.parent / "plain"),
                use_cpu=machine.device_and_precision()[0].type == "cpu",
                num_train_epochs=1,
                per_device_train_batch_size=32,
                learning_rate=1e-5,
                bf16=variant.endswith("bf16"),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
            )
            collate = DataCollatorWithPadding(tokenizer)
            plain = Trainer(model=model, args=arguments, train_dataset=dataset(count), data_collator=collate)
            plain.remove_callback(PrinterCallback)
            plain.train()

        return go
    predictor = prepared(variant, folder)
    recipe = Recipe(epochs=1, learning_rate=1e-5, batch_tokens=batch_tokens, max_length=512)

    def ours(count: int) -> None:
        trainer(predictor, dataset(count), None, folder.parent / "ours", recipe, progress=False).train()

    return ours


def infer(variant: str, folder: Path, texts: Sequence[str], batch_tokens: int) -> Callable[[int], None]:
    """A function that classifies so many texts, from text to class."""
    if variant == "pipeline":
        model = BertForSequenceClassification.from_pretrained(folder, num_labels=2)
        tokenizer, device = AutoTokenizer.from_pretrained(folder), machine.device_and_precision()[0]
        classify = pipeline("text-classification", model, tokenizer=tokenizer, device=device)
        return lambda count: classify(cycled(texts, count), batch_size=32, truncation=True)
    predictor = prepared(variant, folder)
    longest = len(predictor.tokenizer(texts[0])["input_ids"])
    predictor.batch_size = max(8, batch_tokens // longest)
    return lambda count: predictor.predict(cycled(texts, count))


def prepared(variant: str, folder: Path) -> Predictor:
    """A classifier on the encoder, compiled where the variant's name says so."""
    predictor = Predictor.pretrained(str(folder), LABELS, dropout=0.0, max_length=512)
    if variant.endswith("compiled"):
        predictor.model.compile()
    return predictor


if __name__ == "__main__":
    main()
