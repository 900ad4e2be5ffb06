"""A document: one text with its event time, and the interface of its source."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from urllib.parse import urlsplit

from llmprod import LLMProdError, tables

HOUR, DAY = 3600, 86400
LIMIT = 1 << 20  # maximum bytes of one line or .txt file
HEAD = 10_000  # characters of a text that are compared and scored: rules on names are quadratic on hostile input
FAR = 4e9  # a date ahead of the clock is set to now, since the clock may be wrong; a number from here on is no date
Clock = Callable[[], float]  # seconds since 1970


class NewsError(LLMProdError):
    """A source, journal, channel, model or setting of the monitor can't be used as it is."""


@dataclass(frozen=True)
class Document:
    """One text with its event time (seconds since 1970, UTC; NaN for none); `id` is unique over all sources."""

    id: str
    source: str
    time: float
    text: str
    title: str = ""
    link: str = ""


class Source:
    """Where documents come from; `name` is the key of its cursor.

    A cursor is a JSON-able dict, {} at the beginning. After trouble it holds `error`, one line that names the thing;
    `bad`, how many documents were skipped so far; `behind`, whether what was there at first is not all read.
    """

    name: str

    def poll(self, cursor: dict, last: bool = False) -> tuple[list[Document], dict]:
        """What is new since the cursor, and the next cursor; `last`: nothing more will be asked for."""
        raise NotImplementedError

    def finished(self, cursor: dict) -> bool:
        """True where nothing can follow the cursor."""
        return False


def fingerprint(*parts: str) -> str:
    """16 hex digits of sha256: 64 bits, so that 10 million texts collide with probability 1 in 400,000."""
    return sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()[:16]


def public(address: str) -> str:
    """An address as it may be shown or stored: scheme, host and a short hash, without path, user and password."""
    try:
        parts = urlsplit(address)
        host = f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}"
    except ValueError:
        host = "address"
    return tables.shown(f"{host}/…{fingerprint(address)[:8]}", 200)


def stored(value: object, longest: int) -> str:
    """A value as text that SQLite can store: without halves of surrogate pairs and NUL, cut to `longest`.

    NaN, as pandas writes what is missing, is no text; the words "NaN" and "None" are.
    """
    text = "" if not isinstance(value, str) and tables.is_missing(value) else str(value)[:longest]
    return text.encode("utf-8", "replace").decode().replace("\0", "").strip()


def seconds(value: object) -> float:
    """Seconds since 1970 of a time as `tables.moment` reads it, NaN for none. Raises DataError as that does."""
    moment = tables.moment(value, FAR)[1]
    return moment.timestamp() if moment else math.nan


def document(record: object, source: str) -> Document:
    """A document from a dict with `text` and, if there are any, id, time, title, link and source.

    Without an id it is named by source and text. Raises NewsError where there is no text, DataError for a bad time.
    """
    if isinstance(record, list):
        raise NewsError('a list; write one object in each line, like {"text": "…"}')
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str) or not (text := stored(text, LIMIT)):
        raise NewsError("no text")
    source, name = stored(record.get("source"), 200) or stored(source, 4096), stored(record.get("id"), LIMIT)
    name = name if 0 < len(name) <= 200 else fingerprint(*([name] if name else [source, text]))
    title, link = stored(record.get("title"), 1000), stored(record.get("link"), 2000)
    return Document(name, source, seconds(record.get("time")), text, title, link)
