"""How fast the customer-service assistant is, on one thread: `python -m benchmarks.support`.

Replies: the test questions of `support-desk`, one at a time, with the assistant that notebook 11 saved (no generator).
Retrieval: BM25, and vectors, exact and by a graph, over many passages; texts are the articles' sentences with random
words of them, vectors random around the articles' own. Recall is against exact search.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import torch

from benchmarks import record
from llmprod import machine, paths
from llmprod.customer_service import assistant, desk, evaluation, retrieval

QUERIES = 200


def milliseconds(function: object, questions: list) -> dict[str, float]:
    """Median and 99th percentile of a call, in milliseconds."""
    took = []
    for question in questions:
        started = time.perf_counter()
        function(question)
        took.append(1000 * (time.perf_counter() - started))
    return {"p50, ms": float(np.median(took)), "p99, ms": float(np.quantile(took, 0.99))}


def many(shop: desk.Desk, vectors: np.ndarray, count: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """So many texts with vectors of length 1, made of the desk's passages."""
    random = np.random.default_rng(seed)
    words = np.array(" ".join(passage.text for passage in shop.passages).split())
    texts = [" ".join(words[row]) for row in random.integers(0, len(words), size=(count, 40))]
    made = vectors[random.integers(0, len(vectors), count)] + random.normal(0, 0.03, (count, vectors.shape[1]))
    return texts, (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def main() -> None:
    """Prints the figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--passages", type=int, nargs="+", default=[100_000, 1_000_000])
    bundle = paths.REPORTS / "cpu" / "work" / "11_customer_service" / "assistant"
    options.add_argument("--bundle", default=bundle, help="what 11_customer_service saved (%(default)s)")
    options = options.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    machine.quiet()
    print(f"{machine.describe()}; one thread")
    shop = desk.load()
    helper = assistant.Assistant.load(Path(options.bundle))
    questions = evaluation.every_question(shop, "test")["text"].tolist()[::2]
    helper.respond(questions[0])
    rows = []

    def timed(what: str, function: object, asked: list, passages: int) -> None:
        rows.append({"what": what, "passages": passages, "calls": len(asked)} | milliseconds(function, asked))
        print(f"{what}: p50 {rows[-1]['p50, ms']:.2f} ms, p99 {rows[-1]['p99, ms']:.2f} ms")

    timed("reply", helper.respond, questions, len(shop.passages))
    near = helper.index.vectors
    for count in options.passages:
        texts, vectors = many(shop, near, count)
        started = time.perf_counter()
        index = retrieval.Index(texts, helper.index.encoder, 1.0, vectors)
        took = time.perf_counter() - started
        print(f"{count:,} passages: indexed in {took:.0f} s, {machine.peak_memory_mb():.0f} MB peak")
        queries = vectors[:: count // QUERIES][:QUERIES]
        exact = faiss.IndexFlatIP(vectors.shape[1])
        exact.add(vectors)
        best, found = exact.search(queries, 10)[1], index.dense.search(queries, 10)[1]
        recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(best, found, strict=True)])
        for name, dense in ((type(index.dense).__name__, index.dense), ("exact", exact)):
            timed(f"vectors, {name}", partial(nearest, dense), list(queries), count)
        print(f"  recall@10 of the index: {recall:.3f}")
        for weight, name in ((0.0, "BM25"), (0.9, "fused, with the question's vector")):
            index.weight = weight
            timed(name, partial(ask, index), questions[:QUERIES], count)
    record("support", rows, threads=1)


def nearest(dense: faiss.Index, vector: np.ndarray) -> object:
    """The ten nearest vectors."""
    return dense.search(vector[None], 10)


def ask(index: retrieval.Index, question: str) -> object:
    """The ten best passages for a question."""
    return index.search([question])


if __name__ == "__main__":
    main()
