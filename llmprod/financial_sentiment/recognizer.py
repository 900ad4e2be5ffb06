"""Named-entity recognition: a token classifier that finds companies, persons and locations in texts."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmprod import machine, models
from llmprod.financial_sentiment.entities import TAGS, WORD, Annotated, Entity, EntityError, entities_of, tags_of
from llmprod.finetune import loop
from llmprod.finetune.trainer import TokenBudget


def encode(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[Sequence[str]],
    numbers: Sequence[Sequence[int]],
    max_length: int,
) -> list[dict[str, list[int]]]:
    """Sentences of words as rows of at most `max_length` word pieces; a long sentence fills several rows.

    `labels` has a word's number at its first piece (as in Devlin et al. 2019, section 5.3), -100 elsewhere.
    """
    settings = {"is_split_into_words": True, "truncation": True, "return_overflowing_tokens": True}
    rows = tokenizer([list(words) for words in sentences], max_length=max_length, **settings)
    encoded, before = [], None
    for row, sentence in enumerate(rows["overflow_to_sample_mapping"]):
        labels = []
        for word in rows.word_ids(row):
            is_first = word is not None and (sentence, word) != before  # a word may go on in the next row
            labels.append(numbers[sentence][word] if is_first else -100)
            before = before if word is None else (sentence, word)
        encoded.append({"input_ids": rows["input_ids"][row], "labels": labels})
    return encoded


@dataclass
class Recognizer:
    """A token classifier that finds entities in texts of any length."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    precision: str = "auto"

    @classmethod
    def load(cls, folder: Path, precision: str = "auto") -> "Recognizer":
        """Reads what `save` wrote."""
        model = models.read(AutoModelForTokenClassification, folder)
        return cls(model, models.read_tokenizer(folder, model.config.vocab_size), precision)

    def save(self, folder: Path, card: str) -> None:
        """Writes model (safetensors), tokenizer, model card and manifest into a folder, atomically."""
        with models.sealed(folder) as temporary:
            self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            (temporary / "README.md").write_text(card, encoding="utf-8")

    @torch.no_grad()  # as in models.Predictor.infer
    def find(self, texts: Sequence[str], batch_tokens: int = 4096) -> list[list[Entity]]:
        """The entities of each text, in order of appearance."""
        places = [[word.span() for word in WORD.finditer(text)] for text in texts]
        bounds = list(itertools.pairwise(np.cumsum([0, *map(len, places)]).tolist()))
        if not any(places):
            return [[] for _ in texts]
        words = [[text[start:end] for start, end in spots] for text, spots in zip(texts, places, strict=True)]
        # numbered through all texts, so that the rows of a long one are put together by themselves
        rows = encode(self.tokenizer, words, [range(*bound) for bound in bounds], self.tokenizer.model_max_length)
        tags, collate = torch.zeros(bounds[-1][1], dtype=torch.long), DataCollatorForTokenClassification(self.tokenizer)
        device, precision, _ = machine.device_and_precision(self.precision)
        self.model.to(device).eval()
        for chosen in TokenBudget([len(row["labels"]) for row in rows], batch_tokens, None):
            batch = collate([rows[i] for i in chosen])
            labels = batch.pop("labels")
            with machine.autocast(device, precision):
                best = self.model(**batch.to(device)).logits.argmax(dim=-1).cpu()
            tags[labels[labels >= 0]] = best[labels >= 0]
        names = [self.model.config.id2label[tag] for tag in tags.tolist()]
        return [entities_of(*one, names[slice(*bound)]) for *one, bound in zip(texts, places, bounds, strict=True)]


def train(
    sentences: Sequence[Annotated],
    model: str = "minilm",
    epochs: float = 3,
    learning_rate: float = 3e-4,
    max_length: int = 128,
    batch_tokens: int = 512,
    bare: float = 0.3,
    precision: str = "auto",
    seed: int = 0,
    progress: bool = True,
    log: Callable[[dict, int], None] | None = None,
) -> Recognizer:
    """Fine-tunes an encoder with a linear layer on its token vectors, which tags each word.

    Token embeddings are not trained, and there is no dropout.

    Args:
        model: a registered model or a folder
        bare: share of the sentences that lose numbers and punctuation, which some newswire has lost too
        log: called with the loss of each step

    Raises EntityError where there are no sentences.
    """
    if not sentences:
        raise EntityError("There are no sentences to learn from.")
    device, precision, _ = machine.device_and_precision(precision)
    machine.seed_everything(seed)
    folder, changes = models.model_folder(model), {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    changes |= {"id2label": dict(enumerate(TAGS)), "label2id": {tag: k for k, tag in enumerate(TAGS)}}
    classifier = models.read(AutoModelForTokenClassification, folder, "classifier.", **changes).to(device)
    classifier.base_model.embeddings.requires_grad_(False)
    tokenizer = models.read_tokenizer(folder, classifier.config.vocab_size, model_max_length=max_length)
    words, tags, random = [], [], np.random.default_rng(seed)
    for text, entities in sentences:
        places = [word.span() for word in WORD.finditer(text)]
        if random.random() < bare:
            places = [(start, end) for start, end in places if re.search(r"[^\W\d_]", text[start:end])]
        words.append([text[start:end] for start, end in places])
        tags.append(tags_of(places, entities))
    rows, collate = encode(tokenizer, words, tags, max_length), DataCollatorForTokenClassification(tokenizer)
    batches = TokenBudget([len(row["labels"]) for row in rows], batch_tokens, seed)

    def loss(chosen: list[int]) -> torch.Tensor:
        batch = collate([rows[i] for i in chosen]).to(device)
        with machine.autocast(device, precision):
            return classifier(**batch).loss

    order = itertools.chain.from_iterable(itertools.repeat(batches))
    told = (lambda _, value, step: log({"loss, entities": value}, step)) if log else None
    steps, title = round(epochs * len(batches)), "training" if progress else ""
    loop.train(classifier, order, loss, steps, learning_rate, progress=title, log=told)
    return Recognizer(classifier.eval(), tokenizer, precision)
