"""A document: one text with its event time, from a line, a row or a feed entry; and the interface of a source."""

import codecs
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from html.parser import HTMLParser

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


def from_line(line: bytes, source: str, now: float) -> list[Document]:
    """The document in one line of JSON, [] for an empty line; NewsError says what is wrong with the line."""
    if line.isspace():
        return []
    try:
        return [document(json.loads(line.decode("utf-8-sig")), source, now)]
    except UnicodeDecodeError:
        raise NewsError("broken UTF-8") from None
    except (ValueError, RecursionError):
        raise NewsError("no JSON" if line else f"longer than {LIMIT:,} bytes") from None


class _Text(HTMLParser):
    """Collects the text between tags, in `parts`; Beautiful Soup would make ATT of AT&T."""

    INLINE = ("a", "abbr", "b", "code", "em", "font", "i", "small", "span", "strong", "sub", "sup", "u")

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.hidden = [], False

    def handle_starttag(self, tag: str, attrs: list = ()) -> None:
        self.hidden = tag in ("script", "style")
        self.parts.append("" if tag in self.INLINE else " ")

    def handle_endtag(self, tag: str) -> None:
        self.handle_starttag("" if tag in ("script", "style") else tag)

    def handle_data(self, data: str) -> None:
        self.parts.append("" if self.hidden else data)


def strip_html(html: str) -> str:
    """The text of HTML without tags, scripts and styles, with single spaces.

    Text beyond 100,000 characters is left out: the parser of the standard library is quadratic on some input.
    """
    parser = _Text()
    parser.feed(html[:100_000])
    parser.close()
    return " ".join("".join(parser.parts).split())


def decoded(body: bytes, content_type: str = "") -> str:
    """The text of an XML document: UTF-8 where it is valid, else as declared, else UTF-8 with Windows-1252 in gaps."""
    for mark, name in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if body.startswith(mark) or body.startswith("<".encode(name)):
            return body.decode(name, "replace").removeprefix("\ufeff")
    with suppress(UnicodeDecodeError):
        return body.decode("utf-8-sig")
    # Only these declared names count: Python also knows codecs that take quadratic time or aren't text.
    names = r"(?:charset|encoding)=[\"']?((?:iso|windows|cp|koi|gb|big5|euc|shift|latin|mac)[\w-]*)"
    if name := re.search(names, content_type + " " + body[:200].decode("latin-1"), re.IGNORECASE):
        with suppress(UnicodeDecodeError, LookupError):
            return body.decode(name[1])
    return body.decode("utf-8-sig", "windows-1252 in gaps")


codecs.register_error(
    "windows-1252 in gaps", lambda error: (error.object[error.start : error.end].decode("cp1252", "replace"), error.end)
)
