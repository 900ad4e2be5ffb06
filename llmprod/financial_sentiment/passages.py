"""The passages of a text about one company or currency."""

import itertools
import re
from collections.abc import Iterable, Sequence

from llmprod.financial_sentiment.entities import Entity

WINDOW = 20  # words on either side of a mention, where there are no sentences
SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*(?=\s+["'“‘(\[]*[A-Z0-9])|\n\s*\n""")
ABBREVIATION = re.compile(
    r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|No|vs|Jan|Feb|Aug|Sept|Oct|Nov|Dec|Inc|Corp|Co|Ltd|plc|U\.S|U\.K|S\.A|N\.V)$"
)
# After a number a currency is the unit of an amount, which a text is hardly ever about. Marks, pounds and crowns are
# other things too, and need a country, or something that they are compared with.
CURRENCY = re.compile(
    r"(?<!\d )(?<!\bmln )(?<!\bbln )(?<!illion )\b(?:(?P<country>canadian|australian|hong kong|new zealand|singapore|"
    r"taiwan|swiss|french|belgian|mexican|indian) )?(?:(?P<name>dollar|yen|sterling|euro|franc|yuan|lira|peso|rupee|"
    r"rouble|guilder|cruzado)s?|(?:german |deutsche |british |swedish |danish |norwegian |against the )"
    r"(?P<other>mark|pound|crown)s?)\b(?! (?:zone|area|disney|silver))",
    re.IGNORECASE,
)


def currencies(text: str, found: Sequence[Entity] = ()) -> list[Entity]:
    """The currencies that a text names apart from amounts, outside of the entities `found`."""
    named = []
    for match in CURRENCY.finditer(text):
        name = " ".join(part.lower() for part in match.groups() if part)
        if all(match.end() <= entity.start or entity.end <= match.start() for entity in found):
            named.append(Entity("currency", name, *match.span()))
    return named


def sentences(text: str) -> list[tuple[int, int]]:
    """The (start, end) of the sentences of a cased text: one ends at . ! or ? before a capital or a digit."""
    ends = [match.end() for match in SENTENCE_END.finditer(text) if not ABBREVIATION.search(text[: match.start()])]
    parts = [(start, text[start:end]) for start, end in itertools.pairwise([0, *ends, len(text)])]
    return [
        (start + len(part) - len(part.lstrip()), start + len(part.rstrip())) for start, part in parts if part.strip()
    ]


def windows(text: str, mentions: Iterable[Entity]) -> list[tuple[int, int]]:
    """The (start, end) of `WINDOW` words before and after each mention, those that meet joined."""
    words, joined = [word.span() for word in re.finditer(r"\S+", text)], []
    for mention in sorted(mentions, key=lambda entity: entity.start):
        inside = [k for k, (start, end) in enumerate(words) if start < mention.end and mention.start < end]
        first, last = max(0, inside[0] - WINDOW), min(len(words) - 1, inside[-1] + WINDOW)
        start = words[first][0]
        if joined and start <= joined[-1][1] + 1:
            start, _ = joined.pop()
        joined.append((start, words[last][1]))
    return joined


def about(text: str, entities: Sequence[Entity]) -> dict[tuple[str, str], list[str]]:
    """The passages of a text that name an entity: (kind, name) -> passages in order.

    A passage is a sentence. Lower-cased newswire has no sentence ends: there it is `WINDOW` words on either side. A
    passage that names two entities is given for both.
    """
    is_cased = text != text.lower() and text != text.upper()
    bounds, passages = sentences(text) if is_cased else [], {}
    for key in dict.fromkeys((entity.kind, entity.name) for entity in entities):
        mentions = [entity for entity in entities if (entity.kind, entity.name) == key]
        places = [(a, b) for a, b in bounds if any(a < m.end and m.start < b for m in mentions)]
        passages[key] = [text[start:end] for start, end in places or windows(text, mentions)]
    return passages
