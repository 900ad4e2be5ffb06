"""Metrics of ranked lists against hand-worked lists and an independent library; re-ranking for diversity."""

import math

import numpy as np
import pandas as pd
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from llmprod.recommendation import ranking


def test_metrics_by_hand():
    """Hits at ranks 1 and 3 of 3, with 4 relevant items."""
    relevant = csr_matrix([[1, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    found = ranking.ranking_metrics(np.array([[0, 1, 2], [0, 1, 2]]), relevant)
    assert found.index.tolist() == [0], "a user with nothing relevant is not counted"
    row = found.loc[0]
    best = 1 / math.log(2) + 1 / math.log(3) + 1 / math.log(4)
    assert row["nDCG"] == pytest.approx((1 / math.log(2) + 1 / math.log(4)) / best)
    assert row["precision"] == pytest.approx(2 / 3) and row["recall"] == pytest.approx(2 / 4)
    assert row["MAP"] == pytest.approx((1 / 1 + 2 / 3) / 4), "divided by the number of relevant items"
    assert row["MRR"] == 1 and row["hit rate"] == 1
    late = ranking.ranking_metrics(np.array([[1, 0]]), csr_matrix([[1, 0]])).loc[0]
    assert late["MRR"] == 0.5 and late["nDCG"] == pytest.approx(math.log(2) / math.log(3))


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(5, 30), st.integers(1, 10))
def test_metrics_equal_an_independent_library(seed, users, items, k):
    """trec_eval, whose cut-off metrics are divided by the same numbers."""
    random = np.random.default_rng(seed)
    scores, k = random.permuted(np.tile(np.arange(items), (users, 1)), axis=1).astype(float), min(k, items)
    relevant = random.random((users, items)) < 0.3
    relevant[:, 0] = True
    mine = ranking.ranking_metrics(ranking.top_k(scores, k), csr_matrix(relevant))
    names = {"nDCG": "ndcg_cut", "precision": "P", "recall": "recall", "MAP": "map_cut", "hit rate": "success"}
    truth = {str(u): {str(i): int(relevant[u, i]) for i in range(items)} for u in range(users)}
    run = {str(u): {str(i): scores[u, i] for i in range(items)} for u in range(users)}
    theirs = pytrec_eval.RelevanceEvaluator(truth, {f"{name}.{k}" for name in names.values()}).evaluate(run)
    for metric, name in names.items():
        expected = [theirs[str(u)][f"{name}_{k}"] for u in range(users)]
        np.testing.assert_allclose(mine[metric], expected, atol=1e-9, err_msg=metric)


def test_seen_items_are_not_listed_and_ties_are_stable():
    lists = ranking.top_k(np.array([[1.0, 3.0, 3.0, 2.0]]), 3, csr_matrix([[0, 1, 0, 0]]))
    assert lists.tolist() == [[2, 3, 0]]
    assert ranking.top_k(np.zeros((1, 4)), 4).tolist() == [[0, 1, 2, 3]]


def test_paired_bootstrap_covers_the_difference():
    random = np.random.default_rng(0)
    base = pd.Series(random.random(400))
    gain, low, high = ranking.paired_bootstrap(base + 0.05 + random.normal(0, 0.1, 400), base)
    assert low < gain < high and low > 0.03 and high < 0.07
    gain, low, high = ranking.paired_bootstrap(base + random.normal(0, 0.1, 400), base)
    assert low < 0 < high


def test_beyond_accuracy_by_hand():
    train = csr_matrix([[1, 1, 0, 0], [1, 0, 0, 0]])
    vectors = np.eye(4)[[0, 0, 1, 2]]
    genres = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    alike = ranking.beyond_accuracy(np.array([[0, 1], [0, 1]]), train, vectors, genres)
    unlike = ranking.beyond_accuracy(np.array([[2, 3], [3, 2]]), train, vectors, genres)
    assert alike["diversity"] == 0 and unlike["diversity"] == 1
    assert alike["coverage"] == unlike["coverage"] == 0.5
    assert alike["novelty, bits"] == pytest.approx((0 + 1) / 2) and unlike["novelty, bits"] == 2
    assert alike["miscalibration"] < 1e-9 < unlike["miscalibration"]
    assert alike["popularity bias"] > unlike["popularity bias"] == 0


def test_mmr_trades_relevance_for_diversity_and_repeats_nothing():
    candidates, relevance = np.array([[5, 6, 7]]), np.array([[3.0, 2.9, 1.0]])
    vectors = np.zeros((8, 2))
    vectors[[5, 6]], vectors[7] = [1, 0], [0, 1]
    assert ranking.mmr(candidates, relevance, vectors, 2, 0.0).tolist() == [[5, 6]]
    assert ranking.mmr(candidates, relevance, vectors, 2, 0.9).tolist() == [[5, 7]]
    assert sorted(ranking.mmr(candidates, relevance, vectors, 3, 0.9)[0]) == [5, 6, 7]
