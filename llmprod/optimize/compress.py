"""Compression: fewer layers, a pruned vocabulary, distillation into a smaller encoder or into static embeddings."""

import copy
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from llmprod import files, machine, models
from llmprod.finetune import loop
from llmprod.finetune.trainer import TokenBudget


def with_layers(predictor: models.Predictor, layers: Sequence[int]) -> models.Predictor:
    """A copy of a BERT-like classifier that keeps only the given layers, in the given order; embeddings and head stay.

    The first k layers (Sajjad et al. 2023) or every n-th (DistilBERT, Sanh et al. 2019) are usual; train it afterwards.

    Raises ModelError for a layer that the model lacks.
    """
    here = len(predictor.model.encoder.encoder.layer)
    if not layers or not set(layers) <= set(range(here)):
        raise models.ModelError(f"layers {list(layers)}: the model has the layers 0 to {here - 1}.")
    small = copy.deepcopy(predictor.model)
    small.encoder.encoder.layer = torch.nn.ModuleList(small.encoder.encoder.layer[k] for k in layers)
    small.config.num_hidden_layers = small.encoder.config.num_hidden_layers = len(layers)
    return models.Predictor(small, predictor.tokenizer, predictor.precision, predictor.batch_size)


# Pruning the vocabulary


def prune_vocabulary(predictor: models.Predictor, texts: Sequence[str]) -> models.Predictor:
    """A copy of a classifier whose vocabulary holds only what `texts` need: fewer rows in the embedding matrix.

    Kept are the tokens that occur in the texts, special tokens, and all single characters, so that every word that
    could be written before still can, in more pieces. WordPiece takes the longest piece that fits, so that a text with
    kept tokens only is split as before, and its logits are equal (vocabulary trimming, Abdaoui et al. 2020).

    Raises ModelError for a tokenizer that is not WordPiece.
    """
    tokenizer, pruned = predictor.tokenizer, copy.deepcopy(predictor.model)
    seen = set().union(*tokenizer(list(texts), truncation=True, max_length=tokenizer.model_max_length)["input_ids"])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["model"]["type"] != "WordPiece":
            raise models.ModelError(f"The vocabulary is {content['model']['type']}; only WordPiece's can be pruned.")
        vocabulary, inner = content["model"]["vocab"], content["model"]["continuing_subword_prefix"]
        single = {k for token, k in vocabulary.items() if len(token.removeprefix(inner)) == 1}
        added = {token["id"] for token in content["added_tokens"]}  # MPNet's hold more than the special ones
        kept = sorted(seen | single | added | set(tokenizer.all_special_ids))
        number = {old: new for new, old in enumerate(kept)}
        content["model"]["vocab"] = {token: number[old] for token, old in vocabulary.items() if old in number}
        for token in content["added_tokens"]:
            token["id"] = number[token["id"]]
        for token in (content["post_processor"] or {}).get("special_tokens", {}).values():
            token["ids"] = [number[old] for old in token["ids"]]
        content["truncation"] = content["padding"] = None  # the tokenizer sets them at each call
        files.write_json(file, content)
        smaller = models.read_tokenizer(Path(folder), len(kept))
    table = pruned.encoder.get_input_embeddings()
    rows, padding = table.weight.detach()[kept].clone(), smaller.pad_token_id
    pruned.encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=padding))
    for config in (pruned.config, pruned.encoder.config):
        config.vocab_size, config.pad_token_id = len(kept), padding
    return models.Predictor(pruned, smaller, predictor.precision, predictor.batch_size)


# Distillation


def distill(
    student: models.Predictor,
    texts: Sequence[str],
    targets: np.ndarray,
    *,
    epochs: float = 1,
    learning_rate: float = 2e-4,
    temperature: float = 2.0,
    batch_tokens: int = 2048,
    embeddings: bool = False,
    seed: int = 0,
    progress: str = "",
) -> list[float]:
    """Trains a classifier in place, on class numbers or on a teacher's logits (distillation, Hinton et al. 2015).

    The loss on logits is T² KL(softmax(teacher / T) ‖ softmax(student / T)), that on class numbers the cross-entropy.

    Args:
        targets: class numbers (texts,), or the teacher's logits (texts, classes)
        temperature: T; above 1 the teacher's small probabilities weigh more
        embeddings: whether the token embeddings are trained, too
        progress: the title of the progress bar; "" for none

    Returns the loss of each step. Raises ModelError where texts and targets differ in number.
    """
    if len(texts) != len(targets):
        raise models.ModelError(f"{len(texts)} texts have {len(targets)} targets.")
    device, precision, _ = machine.device_and_precision(student.precision)
    classifier, tokenizer = student.model.to(device), student.tokenizer
    classifier.requires_grad_(True)
    if hasattr(classifier, "encoder"):
        classifier.encoder.embeddings.requires_grad_(embeddings)
    tokens = tokenizer(list(texts), truncation=True, max_length=tokenizer.model_max_length)["input_ids"]
    budget = TokenBudget([len(t) for t in tokens], batch_tokens, seed)
    wanted = torch.as_tensor(targets, device=device)

    def batches() -> Iterator[list[int]]:
        while True:
            yield from budget

    def loss(rows: list[int]) -> torch.Tensor:
        padded = tokenizer.pad({"input_ids": [tokens[row] for row in rows]}, return_tensors="pt").to(device)
        with machine.autocast(device, precision):
            logits = classifier(**padded).logits
        if wanted.ndim == 1:
            return cross_entropy(logits.float(), wanted[rows].long())
        both = (log_softmax(z.float() / temperature, dim=-1) for z in (logits, wanted[rows]))
        return temperature**2 * kl_div(*both, log_target=True, reduction="batchmean")

    steps = max(1, round(epochs * len(budget)))
    return loop.train(classifier, batches(), loss, steps, learning_rate, progress=progress)


# Static embeddings


class StaticClassifier(torch.nn.Module):
    """A text's vector is the mean of fixed vectors of its tokens, whatever their neighbours are; then a linear head."""

    def __init__(self, vectors: torch.Tensor, config: object):
        """`vectors` (vocabulary, dimensions); `config` is copied from the classifier that it stands for."""
        super().__init__()
        self.config = copy.deepcopy(config)
        self.config.hidden_size = vectors.shape[1]
        self.embeddings = torch.nn.Embedding.from_pretrained(vectors, freeze=False)
        self.classifier = torch.nn.Linear(vectors.shape[1], config.num_labels)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> models.Outputs:
        """Logits and text vectors."""
        vectors = models.mean_over_tokens(self.embeddings(input_ids), attention_mask)
        return models.Outputs(logits=self.classifier(vectors), vectors=vectors)


@torch.no_grad()
def static_embeddings(
    predictor: models.Predictor, texts: Sequence[str], dimensions: int = 128, seed: int = 0
) -> models.Predictor:
    """A `StaticClassifier` with a vector for each token, taken from an encoder without any text; its head is untrained.

    Model2Vec (Tulkens & van Dongen 2024): every token of the vocabulary is sent through the encoder by itself, the mean
    of the output is its vector; these are rotated and cut by principal components, and weighted by how rare the token
    is, a / (a + p) with a = 0.001 (Arora et al. 2017). There p is by rank, here it is counted in `texts`.
    """
    tokenizer, size = predictor.tokenizer, predictor.model.config.vocab_size
    device, classifier = predictor.device, predictor.model.to(predictor.device).eval()
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    found = []
    for tokens in torch.arange(size, device=device).split(512):
        alone = torch.stack([torch.full_like(tokens, start), tokens, torch.full_like(tokens, end)], dim=1)
        found.append(classifier(input_ids=alone, attention_mask=torch.ones_like(alone)).vectors.float())
    vectors = torch.cat(found)
    vectors = vectors - vectors.mean(dim=0)
    machine.seed_everything(seed)
    components = torch.pca_lowrank(vectors, q=min(dimensions, *vectors.shape), center=False)[2]
    tokens = tokenizer(list(texts), truncation=True, max_length=tokenizer.model_max_length)["input_ids"]
    counts = torch.bincount(torch.tensor([t for each in tokens for t in each]), minlength=size).to(device)
    weights = 1e-3 / (1e-3 + counts / counts.sum())
    static = StaticClassifier((vectors @ components * weights[:, None]).clone(), classifier.config)
    return models.Predictor(static, tokenizer, predictor.precision, predictor.batch_size)
