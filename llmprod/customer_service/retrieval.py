"""Retrieval: BM25 and dense vectors, their fusion, a fine-tuned bi-encoder and a cross-encoder that re-ranks."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import AutoModel, AutoModelForSequenceClassification, PrinterCallback, Trainer

from llmprod import machine, models, segment
from llmprod.extras import extra
from llmprod.finetune.fewshot import sentence_arguments

with extra("support"):
    import bm25s
    import faiss
    import Stemmer

EXACT = 200_000  # up to so many passages every vector is compared; above, a graph is searched (HNSW)


@dataclass
class Index:
    """Passages that BM25 and vectors can be searched in.

    The score of a passage is `weight` times the cosine plus 1 - `weight` times BM25 divided by its best in this
    search; at 1 BM25 is not asked, at 0 the vectors are not. Only its order means anything (see `rerank`).
    """

    texts: Sequence[str]
    encoder: SentenceTransformer
    weight: float = 1.0
    vectors: np.ndarray | None = None  # of the texts, if they are known already
    words: bm25s.BM25 = field(init=False)
    dense: faiss.Index = field(init=False)

    def __post_init__(self):
        self.stemmer = Stemmer.Stemmer("english")
        self.words = bm25s.BM25()
        self.words.index(self.tokens(self.texts), show_progress=False)
        if self.vectors is None:
            self.vectors = embed(self.encoder, self.texts)
        size = self.vectors.shape[1]
        self.dense = faiss.IndexFlatIP(size)
        if len(self.texts) > EXACT:
            self.dense = faiss.IndexHNSWFlat(size, 32, faiss.METRIC_INNER_PRODUCT)
            faiss.ParameterSpace().set_index_parameter(self.dense, "efSearch", 128)
        self.dense.add(self.vectors)

    def tokens(self, texts: Sequence[str]) -> list[list[str]]:
        """The stems of the words of each text, without English stop words."""
        settings = {"stopwords": "en", "stemmer": self.stemmer, "return_ids": False, "show_progress": False}
        return bm25s.tokenize([segment.pairs(text) for text in texts], **settings)

    def search(
        self, texts: Sequence[str], k: int = 10, contexts: Sequence[str] = (), queries: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and scores of the best `k` passages for each text, both of shape (texts, k).

        `contexts` are the customer's earlier turns: their vector counts half ("only those?" means nothing alone).
        `queries` are the vectors of the texts, if they are known already.
        """
        k = min(k, len(self.texts))
        many = min(len(self.texts), max(50, k)) if 0 < self.weight < 1 else k
        scores, numbers = np.zeros((len(texts), 0)), np.zeros((len(texts), 0), dtype=int)
        if queries is None and self.weight > 0:
            queries = embed(self.encoder, texts)
        if any(contexts) and self.weight > 0:
            queries = queries + 0.5 * embed(self.encoder, contexts) * np.array([[bool(c)] for c in contexts])
            queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        if self.weight > 0:
            found, numbers = self.dense.search(queries, many)
            scores = self.weight * found
        if self.weight < 1:
            both = [f"{text} {context}" for text, context in zip(texts, contexts, strict=True)] if contexts else texts
            others, found = self.words.retrieve(self.tokens(both), k=many, show_progress=False, n_threads=1)
            found = (1 - self.weight) * found / np.maximum(found.max(axis=1, keepdims=True), 1e-9)
            if self.weight == 0:
                return others[:, :k].astype(int), found[:, :k]
            numbers, scores = self.fuse(queries, numbers, others.astype(int), found)
        return numbers[:, :k], scores[:, :k]

    def fuse(
        self, queries: np.ndarray, numbers: np.ndarray, others: np.ndarray, found: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Both lists of candidates joined, each with both scores, the best first."""
        width, rows = numbers.shape[1], []
        for query, first, second, points in zip(queries, numbers, others, found, strict=True):
            union = np.union1d(first, second)
            total = self.weight * self.vectors[union] @ query
            total[np.searchsorted(union, second)] += points
            best = np.argsort(-total, kind="stable")[:width]
            rows.append((union[best], total[best]))
        return np.array([row[0] for row in rows]), np.array([row[1] for row in rows])


def local() -> dict[str, object]:
    """How the library reads a folder that `models.read` has checked: nothing from elsewhere, no code."""
    device, _, _ = machine.device_and_precision("fp32")
    return {"device": str(device), "local_files_only": True, "trust_remote_code": False}


def load_encoder(folder: str, max_length: int = 128) -> SentenceTransformer:
    """A sentence encoder of a registered model or a folder; mean pooling, vectors of length 1. Raises ModelError.

    It reads at most `max_length` tokens of a text; 0: as many as it was saved with.
    """
    place = models.model_folder(folder)
    weights = models.read(AutoModel, place, "pooler.")
    with models.reading(place):
        encoder = SentenceTransformer(str(place), **local())
        encoder[0].model = weights.to(encoder.device)  # those that were found to fit
        encoder.max_seq_length = max_length or encoder.max_seq_length
    return encoder


def load_ranker(folder: Path) -> CrossEncoder:
    """A cross-encoder that was trained and saved. Raises ModelError."""
    weights = models.read(AutoModelForSequenceClassification, folder)
    with models.reading(folder):
        ranker = CrossEncoder(str(folder), **local())
        ranker[0].model = weights.to(ranker.device)
    return ranker


def embed(encoder: SentenceTransformer, texts: Sequence[str]) -> np.ndarray:
    """Vectors of length 1, float32, of shape (texts, dimensions)."""
    return encoder.encode(list(texts), normalize_embeddings=True, show_progress_bar=len(texts) > 5000, batch_size=64)


def lighten(encoder: torch.nn.Module) -> None:
    """Turns dropout off and leaves the token embeddings as they are, as in `02_finetune`: steps are twice as fast."""
    encoder.embeddings.requires_grad_(False)
    for part in encoder.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0


def run(trainer: Trainer) -> None:
    """Trains without printing the library's summary, whose seconds differ from run to run."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def train_encoder(
    encoder: SentenceTransformer,
    questions: Sequence[str],
    texts: Sequence[str],
    hard: Sequence[str] = (),
    epochs: float = 2,
    learning_rate: float = 5e-5,
    batch_size: int = 32,
    seed: int = 0,
) -> None:
    """Trains a bi-encoder, in place, to put each question nearer to its text than to the other texts of the batch.

    The loss is the cross-entropy over the batch's cosines times 20 (Henderson et al. 2017; sentence-transformers'
    MultipleNegativesRankingLoss), with a mined negative for each question where `hard` has them. A batch holds no text
    twice, which would be its own negative.
    """
    machine.seed_everything(seed)
    lighten(encoder[0].auto_model)
    columns = {"anchor": list(questions), "positive": list(texts)} | ({"negative": list(hard)} if len(hard) else {})
    settings = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    kind, loss = SentenceTransformerTrainingArguments, MultipleNegativesRankingLoss(encoder)
    arguments = sentence_arguments(kind, tempfile.gettempdir(), **settings, batch_sampler="no_duplicates")
    run(SentenceTransformerTrainer(encoder, arguments, train_dataset=Dataset.from_dict(columns), loss=loss))


def mine(index: Index, questions: Sequence[str], gold: Sequence[int], count: int = 3, k: int = 20) -> np.ndarray:
    """Hard negatives: for each question the best `count` passages that are not its own, of shape (questions, count)."""
    numbers, _ = index.search(questions, min(k, len(index.texts)))
    return np.array([[n for n in found if n != right][:count] for found, right in zip(numbers, gold, strict=True)])


def train_cross_encoder(
    model: str,
    questions: Sequence[str],
    texts: Sequence[str],
    labels: Sequence[float],
    epochs: float = 2,
    learning_rate: float = 1e-4,
    batch_size: int = 32,
    max_length: int = 160,
    seed: int = 0,
) -> CrossEncoder:
    """A cross-encoder that reads question and text together and gives the logit that the text answers (label 1).

    A pretrained encoder with a new output (Nogueira & Cho 2019), trained by binary cross-entropy.
    """
    folder = models.model_folder(model)
    models.read(AutoModel, folder, "pooler.")  # the library says nothing of weights that are missing
    machine.seed_everything(seed)
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)  # it tells of the new head, with the path
    ranker = CrossEncoder(
        str(folder), num_labels=1, max_length=max_length, activation_fn=torch.nn.Identity(), **local()
    )
    lighten(ranker.model.base_model)
    rows = Dataset.from_dict({"question": list(questions), "text": list(texts), "label": [float(v) for v in labels]})
    settings = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    arguments = sentence_arguments(CrossEncoderTrainingArguments, tempfile.gettempdir(), **settings)
    run(CrossEncoderTrainer(ranker, arguments, train_dataset=rows, loss=BinaryCrossEntropyLoss(ranker)))
    return ranker


def rerank(ranker: CrossEncoder, question: str, texts: Sequence[str]) -> np.ndarray:
    """The logit of each text that it answers the question."""
    if not len(texts):
        return np.zeros(0)
    pairs = [(question, text) for text in texts]
    return ranker.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False, batch_size=64)


def ranking_metrics(
    numbers: np.ndarray, gold: Sequence[set[int]], cutoffs: Sequence[int] = (1, 5, 10)
) -> dict[str, np.ndarray]:
    """For each question: recall@k, MRR@10, nDCG@10 and whether all gold is among the first 10; of shape (questions,).

    `numbers` (questions, at least 10 where there are so many) are the passages found, best first; questions without
    gold do not belong here. Formulas as in `pytrec_eval`, against which they are tested.
    """
    right = np.array([[n in some for n in row] for row, some in zip(numbers, gold, strict=True)])
    count = np.array([len(some) for some in gold])
    discount = 1 / np.log2(np.arange(2, right.shape[1] + 2))
    first = np.where(right[:, :10].any(axis=1), right[:, :10].argmax(axis=1) + 1.0, np.inf)
    ideal = np.cumsum(discount)[np.minimum(count, min(10, right.shape[1])) - 1]
    found = {f"recall@{k}": right[:, :k].sum(axis=1) / count for k in cutoffs}
    found["MRR@10"] = 1 / first
    found["nDCG@10"] = (right[:, :10] * discount[:10]).sum(axis=1) / ideal
    found["all gold in 10"] = (right[:, :10].sum(axis=1) == count).astype(float)
    return found
