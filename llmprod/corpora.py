"""Corpora: registered files with a text in each line, a file for each label."""

import re

import pandas as pd

from llmprod import artifacts
from llmprod.formats import DataError


def names() -> list[str]:
    """The artifacts that are corpora."""
    return [name for name, item in artifacts.registry().items() if "lines" in item]


def load(name: str) -> pd.DataFrame:
    """The lines of a corpus in their order, with the columns `text`, `label` and `split` (all of them train).

    Raises DataError for an unknown name.
    """
    if name not in names():
        raise DataError(f"'{name}' is no corpus; there are: {', '.join(names())}.")
    entry, folder = artifacts.entry(name), artifacts.fetch(name)
    tags, parts = re.compile(entry.get("tags", "$^")), []
    for label, file in entry["lines"].items():
        lines = (folder / file).read_text(encoding="utf-8").split("\n")
        parts.append(pd.DataFrame({"text": [tags.sub("", line).strip() for line in lines], "label": label}))
    table = pd.concat(parts, ignore_index=True).assign(split="train")
    return table[table["text"] != ""].reset_index(drop=True)
