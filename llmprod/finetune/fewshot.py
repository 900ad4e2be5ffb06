"""Few-shot learning: sampling the shots, prototypes, contrastive pairs, pseudo-labels."""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from llmprod.machine import device_and_precision
from llmprod.models import ModelError, Predictor, label_as_words, model_folder

STRATEGIES = {
    "plain": "a new linear head",
    "prototypes": "class vectors are set from the names and texts of the classes, then trained",
    "contrastive": "the encoder is trained on pairs of texts, then as with prototypes",
    "self-training": "a prototypes teacher labels the other training texts; a new model learns from both",
}
TEMPERATURE = 0.5  # of the teacher's soft labels: below 1 sharpens them
LABELLED_TIMES = 3  # oversampling factor of the labelled texts among the pseudo-labelled ones


def sample_shots(train: Dataset, shots: int, seed: int) -> tuple[Dataset, Dataset]:
    """Draws `shots` random texts of each class (all where `shots` is 0); returns them, and the texts that are left."""
    if shots <= 0:
        return train, train.select([])
    labels = np.array(train["label"])
    random = np.random.default_rng(seed)
    chosen = np.concatenate([random.permutation(np.flatnonzero(labels == c))[:shots] for c in np.unique(labels)])
    rest = np.setdiff1d(np.arange(len(labels)), chosen)
    return train.select(np.sort(chosen)), train.select(rest)


def set_prototypes(predictor: Predictor, texts: Sequence[str], labels: Sequence[int]) -> None:
    """Sets the class vectors of a cosine head to prototypes (Snell et al. 2017): name plus mean of the texts.

    Both vectors have length 1 before they are added. With no texts this is the zero-shot classifier, the class whose
    name is nearest. Raises ModelError for a head that is not "cosine".
    """
    model = predictor.model
    if model.config.head != "cosine":
        raise ModelError(f"Prototypes need a classifier with head='cosine', this one has '{model.config.head}'.")
    names = [label_as_words(label) for label in predictor.labels]
    vectors = predictor.embed([*names, *texts])
    prototypes, of_texts, labels = vectors[: len(names)].copy(), vectors[len(names) :], np.asarray(labels, dtype=int)
    for k in np.unique(labels):
        mean = of_texts[labels == k].mean(axis=0)
        prototypes[k] += mean / np.linalg.norm(mean)
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(prototypes))


def with_pseudo_labels(logits: np.ndarray, labelled: Dataset, unlabelled: Dataset) -> Dataset:
    """The student's training set: labelled texts, oversampled, and unlabelled ones with the teacher's soft labels.

    Soft labels are the softmax of the teacher's `logits` (unlabelled texts, classes) at a temperature below 1, as in
    noisy student training (Xie et al. 2020). The column `labels` holds a probability for every class.
    """
    soft = torch.softmax(torch.from_numpy(logits) / TEMPERATURE, dim=-1).numpy()
    certain = np.eye(logits.shape[1], dtype=np.float32)[np.array(labelled["labels"], dtype=int)]
    parts = [
        part.remove_columns("labels").add_column("labels", list(targets))
        for part, targets in ((labelled, certain), (unlabelled, soft))
    ]
    return concatenate_datasets([parts[0]] * LABELLED_TIMES + [parts[1]])


def train_contrastive(
    predictor: Predictor,
    texts: Sequence[str],
    labels: Sequence[int],
    folder: str,
    seed: int,
    *,
    pairs: int = 5,
    batch_size: int = 32,
    learning_rate: float = 5e-5,
) -> None:
    """Trains the encoder, in place, on pairs of texts: cosine 1 within a class and 0 across (SetFit's first phase).

    Each text is paired `pairs` times with one of its class and as often with one of another (Tunstall et al. 2022);
    the loss is sentence-transformers' CosineSimilarityLoss. The head is not touched.
    """
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    random, labels = np.random.default_rng(seed), np.asarray(labels)
    rows = {"sentence1": [], "sentence2": [], "label": []}
    for i, label in enumerate(labels):
        same, other = np.flatnonzero(labels == label), np.flatnonzero(labels != label)
        for target, candidates in ((1.0, same[same != i]), (0.0, other)):
            for j in random.choice(candidates, pairs) if len(candidates) else []:
                rows["sentence1"].append(texts[i])
                rows["sentence2"].append(texts[int(j)])
                rows["label"].append(target)
    device, _, _ = device_and_precision(predictor.precision)
    model, max_length = predictor.model, predictor.tokenizer.model_max_length
    transformer = Transformer(str(model_folder(model.name_or_path)), max_seq_length=max_length)
    transformer.model = model.encoder
    sentences = SentenceTransformer(modules=[transformer, Pooling(model.config.hidden_size)], device=str(device))
    settings = {
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "precision": predictor.precision,
    }
    arguments = sentence_arguments(SentenceTransformerTrainingArguments, folder, **settings)
    SentenceTransformerTrainer(
        model=sentences, args=arguments, train_dataset=Dataset.from_dict(rows), loss=CosineSimilarityLoss(sentences)
    ).train()


def sentence_arguments(
    kind: type,
    folder: str,
    learning_rate: float,
    batch_size: int,
    seed: int,
    epochs: float = 1,
    precision: str = "fp32",
    **more: object,
) -> object:
    """Training arguments of sentence-transformers' `kind`; nothing is saved, reported or shown."""
    device, precision, _ = device_and_precision(precision)
    return kind(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=0.1,
        bf16=precision == "bf16",
        use_cpu=device.type == "cpu",
        seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )
