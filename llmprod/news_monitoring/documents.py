"""A document: one text with its event time, and the interface of its source."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256

from llmprod import LLMProdError

HOUR, DAY = 3600, 86400
LIMIT = 1 << 20  # maximum bytes of one line or .txt file
Clock = Callable[[], float]  # seconds since 1970


class NewsError(LLMProdError):
    """A source, journal, channel, model or setting of the monitor can't be used as it is."""


@dataclass(frozen=True)
class Document:
    """One text with its event time (seconds since 1970, UTC); `id` is unique over all sources."""

    id: str
    source: str
    time: float
    text: str
    title: str = ""
    link: str = ""


class Source:
    """Where documents come from; `name` is the key of its cursor.

    A cursor is a JSON-able dict, {} at the beginning. After trouble it holds `error`, one line that names the thing.
    """

    name: str

    def poll(self, cursor: dict) -> tuple[list[Document], dict]:
        """What is new since the cursor, and the next cursor."""
        raise NotImplementedError

    def finished(self, cursor: dict) -> bool:
        """True where nothing can follow the cursor."""
        return False


def fingerprint(*parts: str) -> str:
    """16 hex digits of sha256: 64 bits, so that 10 million texts collide with probability 1 in 400,000."""
    return sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()[:16]


def seconds(value: object, now: float) -> float:
    """Seconds since 1970 of a number or an ISO 8601 date (UTC where it names no zone); `now` for anything else."""
    with suppress(TypeError, ValueError, OverflowError):
        if isinstance(value, str):
            value = value.strip()
            value = float(value) if re.fullmatch(r"\d{9,10}(\.\d*)?", value) else datetime.fromisoformat(value)
        if isinstance(value, datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        if not isinstance(value, bool) and abs(value) < 1e11:
            return float(value)
    return now


def document(record: object, source: str, now: float) -> Document:
    """A document from a dict with `text` and, if there are any, id, time, title, link and source.

    Without an id it is named by source and text; without a time that can be read, it happened now.
    Raises NewsError where there is no text.
    """
    if not isinstance(record, dict) or not isinstance(record.get("text"), str) or not record["text"].strip():
        raise NewsError("no text")

    def field(name: str) -> str:  # SQLite stores neither halves of surrogate pairs nor, in every place, NUL
        value = record.get(name)
        return "" if value is None else str(value).encode("utf-8", "replace").decode().replace("\0", "").strip()

    source = field("source") or source
    name = field("id") or fingerprint(source, field("text"))
    return Document(name, source, seconds(record.get("time"), now), field("text"), field("title"), field("link"))
