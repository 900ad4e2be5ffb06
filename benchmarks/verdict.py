"""What the verdict stops and what it lets through, in rates: `make bench BENCH=verdict`.

Small runs of Reuters R8 (500 training and 600 test texts, all weights of MiniLM for four epochs on 32 tokens) are
judged as a report of `03_evaluate` is: accuracy, macro-F1, log loss and calibration error of the fine-tuned model, the
frozen encoder and a bag of words, and the predictions of all three. The test texts are the same for all; the seed draws
the training texts. The reference has five seeds, of which the first was run in bf16, too, as if on another machine.
Runs with nothing wrong should not drift: other seeds; seeds of the reference on two threads or in bf16. Runs with
something wrong should. Those of a known seed are judged twice: as a run of the reference's machine, where every
prediction must be equal, and as one of another machine, where as many may differ as between two seeds.

    python -m benchmarks.verdict [--fresh 12] [--wrong 4] [--processes 2]
"""

import argparse
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

REFERENCE = range(5)  # its seeds
TRAIN, TEST, LENGTH, EPOCHS = 500, 600, 32, 4  # texts, texts, tokens
FINE_TUNED, FROZEN, WORDS = "fine-tuned", "frozen encoder", "bag of words"
NOTHING, THREADS, BF16 = "nothing", "two threads", "bf16"
LABELS, LEAK, SPLIT = "10 % wrong training labels", "1 test text in 50 leaked into training", "another split"
FEWER = "an epoch less"
REPLACED = {f"the {name} in place of the fine-tuned model": name for name in (FROZEN, WORDS)}
WRONG = (*REPLACED, LABELS, LEAK, SPLIT, FEWER)
NEW, KNOWN, ELSEWHERE = "another seed", "a known seed", "a known seed, another machine"
OWN, ANOTHER, ADDED = "the reference's", "another", "added to the reference"  # machine


def draw(seed: int, change: str) -> pd.DataFrame:
    """The texts of a run: text, label, split; changed as `change` says."""
    from llmprod import data

    table = data.clean(data.load("reuters-r8"))[0]
    table = data.split(table, test_rows=TEST, seed=0).query("split != 'validation'")  # one test split for all
    table = data.split(table, train_rows=TRAIN, seed=seed + 1000 * (change == SPLIT))
    random, train = np.random.default_rng(seed), table.index[table["split"] == "train"]
    if change == LABELS:
        wrong, names = random.choice(train, len(train) // 10, replace=False), table["label"].unique()
        table.loc[wrong, "label"] = [random.choice(names[names != label]) for label in table.loc[wrong, "label"]]
    if change == LEAK:
        leaked = table[table["split"] == "test"].sample(frac=1 / 50, random_state=seed)
        table = pd.concat([table, leaked.assign(split="train")], ignore_index=True)
    return table


def run(seed: int, change: str, learners: Iterable[str]) -> tuple[dict[str, float], pd.DataFrame]:
    """The scores of one run, and the predictions behind its accuracies."""
    import torch
    from scipy.special import softmax
    from sklearn.linear_model import LogisticRegression

    from llmprod import data, machine, models
    from llmprod.evaluate import baselines, metrics
    from llmprod.finetune import learn
    from llmprod.finetune.recipe import Recipe
    from llmprod.harness import examples

    machine.quiet()
    torch.set_num_threads(2 if change == THREADS else 1)
    settings, shares = {"max_length": LENGTH, "precision": "bf16" if change == BF16 else "fp32"}, {}
    with tempfile.TemporaryDirectory() as folder:
        data.save(draw(seed, change), Path(folder) / "splits", {})
        splits, labels, _ = data.prepared(Path(folder) / "splits")
        texts, y, tested = list(splits["train"]["text"]), splits["train"]["label"], list(splits["test"]["text"])
        if WORDS in learners:
            shares[WORDS] = baselines.bag_of_words(texts, y, 10.0).predict_proba(tested)
        if FROZEN in learners:
            encoder = models.Predictor.pretrained("minilm", **settings)
            model = LogisticRegression(C=10.0, max_iter=2000).fit(encoder.embed(texts), y)
            shares[FROZEN] = model.predict_proba(encoder.embed(tested))
        if FINE_TUNED in learners and change not in REPLACED:
            recipe = {"epochs": EPOCHS - (change == FEWER), "batch_tokens": 512, "seed": seed}
            place = Path(folder) / "trainer"
            learnt = learn.learn(splits, labels, Recipe(**recipe, **settings), place, validate=False, progress=False)
            shares[FINE_TUNED] = softmax(learnt.predictor.predict(tested).astype(float), axis=1)
    if change in REPLACED:
        shares[FINE_TUNED] = shares[REPLACED[change]]
    truth, scores = np.array(splits["test"]["label"]), {}
    for learner, probabilities in shares.items():
        scores |= {f"{learner}, {name}": value for name, value in metrics.summary(truth, probabilities).items()}
    return scores, examples.table(tested, truth, {f"{name}, accuracy": p for name, p in shares.items()}, seed)


def result(scores: dict[str, float], seed: int) -> dict:
    """Scores in the form of a notebook's result."""
    metrics = {name: {"value": value, "n": TEST} for name, value in scores.items()}
    stamp = {"machine": OWN, "minutes": 0.0}
    return {"notebook": "report", "seed": seed, "metrics": metrics, "speeds": {}, "protocol": {}, "provenance": stamp}


def measured(runs: dict[int, tuple], elsewhere: tuple) -> tuple[dict, pd.DataFrame]:
    """A reference over the seeds of `runs`, with the first seed's run of another machine, and all their predictions."""
    from llmprod.harness import reference

    first, (scores, predicted) = next(iter(runs)), elsewhere
    expected = reference.summarise([result(found, seed) for seed, (found, _) in runs.items()])
    for name, metric in expected["metrics"].items():
        metric |= {"elsewhere": {f"{first}, {ADDED}": scores[name]}}
        metric |= reference.moments(metric["value"], metric["elsewhere"])
    own = [table.assign(machine=OWN) for _, table in runs.values()]
    return expected, pd.concat([*own, predicted.assign(machine=ADDED)], ignore_index=True)


def drifts(found: tuple[dict[str, float], pd.DataFrame], seed: int, on: str, theirs: tuple[dict, pd.DataFrame]) -> bool:
    """Whether the verdict on a run has a row that drifts, by its scores or by its predictions."""
    from llmprod.harness import examples, results

    table = results.verdict({"report": result(found[0], seed)}, {"report": theirs[0]}, ["report"])
    known = dict(list(theirs[1].groupby("score")))
    agree = [examples.judge(part.assign(machine=on), known[name])[0] for name, part in found[1].groupby("score")]
    return results.DRIFTED in set(table["verdict"]) or not all(agree)


def rates(found: dict[tuple[int, str], tuple]) -> list[dict[str, str]]:
    """For each kind of run, and each way to judge it: how many of how many reports drift."""
    theirs = measured({seed: found[seed, NOTHING] for seed in REFERENCE}, found[REFERENCE[0], BF16])
    counted: dict[str, dict[str, list[bool]]] = {}
    for (seed, change), one in found.items():
        if seed in REFERENCE and (change == NOTHING or (seed, change) == (REFERENCE[0], BF16)):
            continue  # the reference itself
        columns = counted.setdefault(change, {column: [] for column in (NEW, KNOWN, ELSEWHERE)})
        if seed not in REFERENCE:
            columns[NEW].append(drifts(one, seed, ANOTHER, theirs))
        else:
            columns[ELSEWHERE].append(drifts(one, seed, ANOTHER, theirs))
            if change in WRONG:  # on two threads, or in bf16, a machine is another
                columns[KNOWN].append(drifts(one, seed, OWN, theirs))
    rows = []
    for change, columns in counted.items():
        said = {name: f"{sum(drifted)} of {len(drifted)}" if drifted else "" for name, drifted in columns.items()}
        rows.append({"run": change} | said)
    return rows


def main() -> None:
    """Runs all, two at a time, and writes the rates."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--fresh", type=int, default=12, help="other seeds with nothing wrong (%(default)s)")
    options.add_argument("--wrong", type=int, default=4, help="known seeds, and other seeds, of each wrong run")
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--learners", nargs="+", default=[WORDS, FROZEN, FINE_TUNED])
    options = options.parse_args()

    from benchmarks import record
    from llmprod.harness import results

    jobs = [(seed, change) for change in (NOTHING, BF16, THREADS) for seed in REFERENCE]
    jobs += [(100 + k, NOTHING) for k in range(options.fresh)]
    jobs += [(first + k, change) for change in WRONG for first in (0, 200) for k in range(options.wrong)]
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        work = pool.map(partial(run, learners=options.learners), *zip(*jobs, strict=True))
        found = dict(zip(jobs, tqdm(work, total=len(jobs)), strict=True))
    rows = rates(found)
    print(results.markdown(pd.DataFrame(rows)))
    record("verdict", rows)


if __name__ == "__main__":
    main()
