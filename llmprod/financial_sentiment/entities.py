"""Named entities: annotated sentences (CoNLL-2003, financial agreements), names, precision and recall."""

import itertools
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmprod import LLMProdError, artifacts

KINDS = {"ORG": "company", "PER": "person", "LOC": "location", "MISC": "other"}
TAGS = ("O", *(f"{place}-{kind}" for kind in KINDS.values() for place in "BI"))
WORD = re.compile(r"\w+|[^\w\s]")
LEGAL_FORMS = re.compile(
    r"(?<=\S)(?: (?:inc|corp|corporation|co|company|ltd|limited|plc|ag|sa|nv|bv|oyj|oy|gmbh|group))+$"
)


class EntityError(LLMProdError):
    """Annotated sentences can't be used as they are."""


@dataclass(frozen=True)
class Entity:
    """A mention at `text[start:end]`: its kind (one of `KINDS`, or currency) and a name that its spellings share."""

    kind: str
    name: str
    start: int
    end: int


Annotated = tuple[str, list[Entity]]  # a text and the entities in it


def normal(name: str) -> str:
    """A name in lower case without its legal form: "AKAMAI TECHNOLOGIES , INC ." is "akamai technologies"."""
    plain = re.sub(r"['’]s\b|['’.]", "", name.lower()).replace(",", " ")
    return LEGAL_FORMS.sub("", " ".join(plain.split())) or name.lower()


def conll(split: str, longest: int = 0) -> list[Annotated]:
    """The sentences of CoNLL-2003 (Tjong Kim Sang & De Meulder 2003), their words joined by spaces.

    Args:
        split: train, valid or test
        longest: above 0, neighbouring sentences of an article are joined to texts of different lengths, up to so many
            words (or one longer sentence), so that a model learns from headlines and from paragraphs
    """
    content = (artifacts.fetch("conll2003") / f"{split}.txt").read_text(encoding="utf-8")
    texts, random = [], np.random.default_rng(0)
    for article in content.split("-DOCSTART- -X- -X- O"):
        rows, limit = [], random.integers(longest + 1)
        for sentence in article.split("\n\n"):
            lines = [line.split() for line in sentence.splitlines() if line]
            if rows and len(rows) + len(lines) > limit:
                texts.append(annotated(rows))
                rows, limit = [], random.integers(longest + 1)
            rows += lines
        texts += [annotated(rows)] if rows else []
    return texts


def annotated(rows: Sequence[Sequence[str]]) -> Annotated:
    """A sentence from its lines, of which the first column is the word and the last its BIO tag."""
    words = [row[0] for row in rows]
    ends = list(itertools.accumulate(len(word) + 1 for word in words))
    places = [(end - 1 - len(word), end - 1) for word, end in zip(words, ends, strict=True)]
    text, tags = " ".join(words), [row[-1][:2] + KINDS[row[-1][2:]] if row[-1] != "O" else "O" for row in rows]
    return text, entities_of(text, places, tags)


def agreements(folder: Path) -> list[Annotated]:
    """The sentences of the artifact `ner-finance`, from agreements of US companies.

    An answer is like "[Bank - ORGANIZATION, …]", in order of appearance; names may hold commas and hyphens.
    Raises EntityError for a file that is not the artifact's.
    """
    kinds = {"ORGANIZATION": "company", "PERSON": "person", "LOCATION": "location"}
    path, found = folder / "samples.jsonl", []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            text, entities, after = " ".join(sample["input"][-1]["content"].split()), [], 0
            answer = sample["ideal"][1:-1] if sample["ideal"].startswith("[") else ""
            for name, kind in re.findall(rf"(.+?) - ({'|'.join(kinds)})(?:, |$)", answer):
                start = f" {text} ".index(f" {' '.join(name.split())} ", after)
                after = start + len(" ".join(name.split()))
                entities.append(Entity(kinds[kind], normal(name), start, after))
            found.append((text, entities))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EntityError(f"{path}: is not the file of the artifact 'ner-finance' ({error}).") from error
    return found


def entities_of(text: str, places: Sequence[tuple[int, int]], tags: Sequence[str]) -> list[Entity]:
    """The entities that BIO tags mark, where `places` are the words' (start, end); a stray I- begins one."""
    found: list[Entity] = []
    for (start, end), before, tag in zip(places, ["O", *tags], tags, strict=False):
        kind = tag[2:]
        if tag[0] == "I" and before[2:] == kind:
            start = found.pop().start
        if kind:
            found.append(Entity(kind, normal(text[start:end]), start, end))
    return found


def tags_of(places: Sequence[tuple[int, int]], entities: Iterable[Entity]) -> list[int]:
    """The number of each word's BIO tag in `TAGS`."""
    starts, tags = [start for start, _ in places], [0] * len(places)
    for entity in entities:
        first, after = bisect_left(starts, entity.start), bisect_left(starts, entity.end)
        for word in range(first, after):
            tags[word] = TAGS.index(f"{'B' if word == first else 'I'}-{entity.kind}")
    return tags


def score(
    truth: Sequence[Iterable[Entity]], found: Sequence[Iterable[Entity]], kinds: Iterable[str] = tuple(KINDS.values())
) -> dict[str, float]:
    """Precision, recall and F1 over all entities of some kinds; right are those with exact span and kind.

    The definition of CoNLL-2003 and of the library `seqeval` (micro average); 0 where nothing is right.
    """
    true, said = (
        {(i, e.kind, e.start, e.end) for i, entities in enumerate(lists) for e in entities if e.kind in kinds}
        for lists in (truth, found)
    )
    right = len(true & said)
    precision, recall = right / max(len(said), 1), right / max(len(true), 1)
    return {"precision": precision, "recall": recall, "f1": 2 * right / max(len(said) + len(true), 1)}
