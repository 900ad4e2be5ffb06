"""The assistant's own words, and the customer's that need no model, by language (`phrases.yaml`)."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

FILE = Path(__file__).with_suffix(".yaml")
LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Phrases:
    """What `phrases.yaml` has for a language."""

    person: str  # intents that end in a hand-over
    complaint: str
    abuse: re.Pattern
    denial: re.Pattern
    small_talk: dict[str, re.Pattern]  # what to say, as a name in `words` -> what the whole message is
    words: dict[str, str]
    prompt: dict[str, str]


@cache
def of(language: str) -> Phrases:
    """The phrases of a language of LANGUAGES."""
    found = yaml.safe_load(FILE.read_text(encoding="utf-8"))[language]
    patterns = {name: re.compile(found.pop(name), re.IGNORECASE) for name in ("abuse", "denial", "greeting", "thanks")}
    small_talk = {name: patterns.pop(name) for name in ("greeting", "thanks")}
    return Phrases(small_talk=small_talk, **patterns, **found)
