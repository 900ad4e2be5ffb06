"""Recommenders of the library Cornac beside ours: `python -m benchmarks.peers` (after `pip install -e ".[peers]"`).

One run, one split (random 75/25 within each item, seed 42), one metric (ten items; all that were not taken are
candidates). BiVAE has the settings of the recommenders benchmark, whose best row it is: 50 dimensions, one hidden layer
of 100, tanh, Poisson, 500 epochs in batches of 128 at 0.001; VAECF (Liang et al. 2018) the same. Ours is the learned
ranking of `13_recommendation`. Seconds are of all that a model needs. LightGCN is left out: Cornac's needs the library
DGL, which has no build for today's PyTorch.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
from cornac.data import Dataset
from cornac.models import VAECF, BiVAECF, Recommender

from llmprod import machine, models
from llmprod.harness import results
from llmprod.recommendation import catalogues, datasets, protocols, ranking, reranker, scorers


def of_cornac(model: Recommender, train: pd.DataFrame, shape: tuple[int, int]) -> np.ndarray:
    """Scores (users, items) of a model of Cornac; what it never saw comes last."""
    numbers = [(int(u), int(i), 1.0) for u, i in zip(train["user"], train["item"], strict=True)]
    data = Dataset.build(numbers, seed=0)
    model.fit(data)
    scores = np.full(shape, -np.inf)
    columns = [data.iid_map[item] for item in sorted(data.iid_map)]
    for user, number in data.uid_map.items():
        scores[user, sorted(data.iid_map)] = model.score(number)[columns]
    return scores


def hybrid(train: pd.DataFrame, catalogue: catalogues.Catalogue, seed: int) -> np.ndarray:
    """Scores of the learned ranking over text, graph, other users and times."""
    texts = scorers.centred(
        models.Predictor.pretrained("minilm", max_length=32).embed(catalogue.items["text"].tolist())
    )
    contents = {"text": texts, "graph": scorers.fact_vectors(catalogue)}
    taken = catalogues.matrix(train, catalogue.shape)
    scores = scorers.first_stage(train, catalogue, contents, seed)
    taught = reranker.examples(train, catalogue, contents, "within items", 6, 120, seed)
    known, candidates = reranker.features(train, catalogue, scores), reranker.retrieve(scores, taken, 120)
    ranker = reranker.teach(taught, list(known), seed)
    return reranker.spread(ranker.scores(known, candidates), candidates, catalogue.shape)


def main() -> None:
    """Prints a row for each model: nDCG and precision at ten, seconds, and how much worse than ours, in pairs."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--epochs", type=int, default=500, help="of Cornac's models")
    options.add_argument("--seed", type=int, default=0)
    options = options.parse_args()
    machine.set_threads()
    machine.quiet()
    catalogue = datasets.load()
    train, test = protocols.split(catalogue.interactions, "within items")
    taken, relevant = catalogues.matrix(train, catalogue.shape), catalogues.matrix(test, catalogue.shape)
    settings = {"k": 50, "act_fn": "tanh", "likelihood": "pois", "n_epochs": options.epochs, "batch_size": 128}
    settings |= {"learning_rate": 0.001, "use_gpu": False, "seed": options.seed}
    bivae = BiVAECF(encoder_structure=[100], **settings)
    vae = VAECF(autoencoder_structure=[100], **settings)
    makers: dict[str, Callable[[], np.ndarray]] = {
        "ours: hybrid": lambda: hybrid(train, catalogue, options.seed),
        "ours: EASE": lambda: taken @ scorers.ease(taken),
        "ours: iALS (implicit)": lambda: scorers.ials(taken, options.seed),
        "ours: BPR (implicit)": lambda: scorers.bpr(taken, options.seed),
        "Cornac: BiVAE": lambda: of_cornac(bivae, train, catalogue.shape),
        "Cornac: VAECF": lambda: of_cornac(vae, train, catalogue.shape),
    }
    rows, first = [], None
    for name, make in makers.items():
        started = time.perf_counter()
        scores = make()
        seconds = time.perf_counter() - started
        found = ranking.per_user(ranking.top(scores, 10, taken), relevant)
        first = found["nDCG"] if first is None else first
        gain, low, high = ranking.paired(first, found["nDCG"])
        shown = "" if name == "ours: hybrid" else f"{gain:+.4f} ({low:+.4f} to {high:+.4f})"
        rows.append([name, f"{found['nDCG'].mean():.4f}", f"{found['precision'].mean():.4f}", f"{seconds:.0f}", shown])
        print(*rows[-1], flush=True)
    print(machine.describe())
    print(results.markdown(pd.DataFrame(rows, columns=["model", "nDCG@10", "precision@10", "s", "the hybrid's gain"])))


if __name__ == "__main__":
    main()
