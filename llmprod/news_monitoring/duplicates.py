"""Repeats and near repeats among documents: ids, and MinHash signatures of their texts."""

import json
import math
from collections.abc import Sequence

import numpy as np

from llmprod import data
from llmprod.news_monitoring.documents import HEAD, Document
from llmprod.news_monitoring.journal import HORIZON, Journal, dated

PERMUTATIONS = 64


def new_documents(
    journal: Journal, documents: Sequence[Document], threshold: float = 0.8, horizon: float = HORIZON
) -> list[tuple[Document, bytes]]:
    """The documents that repeat neither the journal nor an earlier one of the batch, with signatures for the journal.

    A repeat has the id of any document in the journal, or nearly the text of one whose event time is within `horizon`
    seconds: MinHash (Broder 1997) of 64 permutations over the runs of three words estimates a Jaccard similarity of
    at least `threshold`, with a standard error of 0.05 there. The same text has the similarity 1. Of a text the first
    `HEAD` characters count.
    """
    from datasketch import MinHash

    ids = json.dumps([document.id for document in documents])
    listed = "IN (SELECT value FROM json_each(?))"  # a list of any length as one parameter
    query = f"SELECT id FROM documents WHERE id {listed} UNION SELECT document FROM signatures WHERE document {listed}"
    seen = {name for (name,) in journal.rows(query, (ids, ids))}
    firsts: dict[str, Document] = {}
    for d in documents:
        if d.id not in seen:
            firsts.setdefault(d.id, d)
    if not (batch := list(firsts.values())):
        return []
    shingles = ([run.encode() for run in data.word_shingles(data.normalise(d.text[:HEAD]), 3)] for d in batch)
    # The scheme is named, since signatures of different schemes are never alike.
    hashes = MinHash.generator(shingles, num_perm=PERMUTATIONS, seed=1, scheme="affine32")
    rows = journal.rows("SELECT signature, time FROM signatures")
    size, now = len(rows), journal.clock()
    old = np.frombuffer(b"".join(blob for blob, _ in rows), np.uint32).reshape(-1, PERMUTATIONS).T
    known = np.empty((PERMUTATIONS, size + len(batch)), np.uint32)  # a row for each permutation: fast to scan
    known[:, :size], times = old, np.array([*(time for _, time in rows), *(dated(d, now) for d in batch)])
    few = PERMUTATIONS - math.ceil(threshold * PERMUTATIONS) + 1  # alike enough: no more than few - 1 may differ
    new = []
    for d, minhash in zip(batch, hashes, strict=True):
        signature, moment = minhash.hashvalues, dated(d, now)
        near = np.flatnonzero((known[:few, :size] == signature[:few, None]).any(axis=0))
        near = near[np.abs(times[near] - moment) <= horizon]
        if ((known[:, near] == signature[:, None]).mean(axis=0) >= threshold).any():
            continue
        known[:, size], times[size], size = signature, moment, size + 1
        new.append((d, signature.tobytes()))
    return new
