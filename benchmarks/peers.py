"""Recommenders of the library Cornac compared with ours: `python -m benchmarks.peers` (`pip install -e ".[peers]"`).

One run, one split (random 75/25 within each item, seed 42), one metric (ten items; all unseen items are candidates).
BiVAE has the settings of the recommenders benchmark, whose best row it is: 50 dimensions, one hidden layer of 100,
tanh, Poisson, 500 epochs in batches of 128 at 0.001; VAECF (Liang et al. 2018) the same. Ours is the hybrid of
`13_recommendation`. Seconds are for all that a model needs. LightGCN is left out: Cornac's needs the library DGL, which
has no build for today's PyTorch.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
from cornac.data import Dataset
from cornac.models import VAECF, BiVAECF, Recommender

from benchmarks import record
from llmprod import machine, models
from llmprod.harness import results
from llmprod.recommendation import catalogues, datasets, protocols, ranking, reranker, scorers


def of_cornac(model: Recommender, train: pd.DataFrame, shape: tuple[int, int]) -> np.ndarray:
    """Scores (users, items) of a model of Cornac; items that it never saw come last."""
    numbers = [(int(u), int(i), 1.0) for u, i in zip(train["user"], train["item"], strict=True)]
    data = Dataset.build(numbers, seed=0)
    model.fit(data)
    scores = np.full(shape, -np.inf)
    columns = [data.iid_map[item] for item in sorted(data.iid_map)]
    for user, number in data.uid_map.items():
        scores[user, sorted(data.iid_map)] = model.score(number)[columns]
    return scores


def hybrid(train: pd.DataFrame, catalogue: catalogues.Catalogue, seed: int) -> np.ndarray:
    """Scores of the re-ranker over text, graph, interactions and times."""
    texts = scorers.center_and_normalize(
        models.Predictor.pretrained("minilm", max_length=32).embed(catalogue.items["text"].tolist())
    )
    content = {"text": texts, "graph": scorers.fact_vectors(catalogue)}
    return reranker.rank(train, catalogue, content, "within items", 6, 120, seed, {"hybrid": ()})[0]["hybrid"]


def main() -> None:
    """Prints a row for each model: nDCG and precision at ten, seconds, the hybrid's gain (paired bootstrap)."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--epochs", type=int, default=500, help="of Cornac's models")
    options.add_argument("--seed", type=int, default=0)
    options = options.parse_args()
    machine.set_threads()
    machine.quiet()
    catalogue = datasets.load()
    train, test = protocols.split(catalogue.interactions, "within items")
    user_items, relevant = (catalogues.matrix(part, catalogue.shape) for part in (train, test))
    settings = {"k": 50, "act_fn": "tanh", "likelihood": "pois", "n_epochs": options.epochs, "batch_size": 128}
    settings |= {"learning_rate": 0.001, "use_gpu": False, "seed": options.seed}
    bivae = BiVAECF(encoder_structure=[100], **settings)
    vae = VAECF(autoencoder_structure=[100], **settings)
    makers: dict[str, Callable[[], np.ndarray]] = {
        "ours: hybrid": lambda: hybrid(train, catalogue, options.seed),
        "ours: EASE": lambda: user_items @ scorers.ease(user_items),
        "ours: iALS (implicit)": lambda: scorers.ials(user_items, options.seed),
        "ours: BPR (implicit)": lambda: scorers.bpr(user_items, options.seed),
        "Cornac: BiVAE": lambda: of_cornac(bivae, train, catalogue.shape),
        "Cornac: VAECF": lambda: of_cornac(vae, train, catalogue.shape),
    }
    rows, numbers, first = [], [], None
    for name, make in makers.items():
        started = time.perf_counter()
        scores = make()
        seconds = time.perf_counter() - started
        found = ranking.ranking_metrics(ranking.top_k(scores, 10, user_items), relevant)
        first = found["nDCG"] if first is None else first
        gain, low, high = ranking.paired_bootstrap(first, found["nDCG"])
        shown = "" if name == "ours: hybrid" else f"{gain:+.4f} ({low:+.4f} to {high:+.4f})"
        means = [found[metric].mean() for metric in ("nDCG", "precision")]
        rows.append([name, *(f"{mean:.4f}" for mean in means), f"{seconds:.0f}", shown])
        numbers.append(dict(zip(("model", "nDCG@10", "precision@10", "s"), [name, *means, seconds], strict=True)))
        print(*rows[-1], flush=True)
    print(machine.describe())
    print(results.markdown(pd.DataFrame(rows, columns=["model", "nDCG@10", "precision@10", "s", "the hybrid's gain"])))
    record("peers", numbers)


if __name__ == "__main__":
    main()
