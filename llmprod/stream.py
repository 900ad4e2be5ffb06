"""Where text comes from in real time: feeds, growing files, standard input, replays.

A source keeps no state: `poll` takes a cursor and returns what is new with the next cursor, which the caller stores in
a `journal` in the same transaction as what it made of the documents.
"""

import codecs
import io
import json
import os
import queue
import re
import sys
import threading
import time
import zlib
from calendar import timegm
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from hashlib import sha256
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urljoin

import numpy as np
import pandas as pd
import requests

from llmprod import LLMProdError

HOUR, DAY = 3600, 86400
LIMIT = 1 << 20  # bytes of one line or .txt file: more is no news
Clock = Callable[[], float]  # seconds since 1970


class StreamError(LLMProdError):
    """A source or a journal can't be used as it is."""


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


def open_source(text: str) -> Source:
    """The source that a word of the command line names: a feed's address, `-`, a file or a folder.

    Raises StreamError, naming the word, for anything else.
    """
    if re.match(r"https?://[^/]", text, re.IGNORECASE):
        return Feed(text)
    if text == "-":
        return Lines()
    path = Path(text).expanduser()
    if path.is_file() or path.is_dir():
        return Tail(path)
    raise StreamError(
        f"'{text}' is no source: give the address of a feed (https://...), an existing file of JSON lines, "
        f"an existing folder, or - for JSON lines on standard input. Relative paths start at {Path.cwd()}."
    )


# Documents


def fingerprint(*parts: str) -> str:
    """16 hex digits of sha256: 64 bits, with which even 10 million texts hold two alike once in 400,000 times."""
    return sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()[:16]


def seconds(value: object, now: float) -> float:
    """Seconds since 1970 of a number or an ISO 8601 date (UTC where it names no zone); `now` for what is neither."""
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
    Raises StreamError where there is no text.
    """
    if not isinstance(record, dict) or not isinstance(record.get("text"), str) or not record["text"].strip():
        raise StreamError("no text")

    def field(name: str) -> str:  # SQLite stores neither halves of surrogate pairs nor, in every place, NUL
        value = record.get(name)
        return "" if value is None else str(value).encode("utf-8", "replace").decode().replace("\0", "").strip()

    source = field("source") or source
    name = field("id") or fingerprint(source, field("text"))
    return Document(name, source, seconds(record.get("time"), now), field("text"), field("title"), field("link"))


def from_line(line: bytes, source: str, now: float) -> Document:
    """The document in one line of JSON; StreamError says what is wrong with the line."""
    try:
        return document(json.loads(line.decode("utf-8-sig")), source, now)
    except UnicodeDecodeError:
        raise StreamError("broken UTF-8") from None
    except (ValueError, RecursionError):
        raise StreamError("no JSON" if line else f"longer than {LIMIT:,} bytes") from None


def whole_lines(file: BinaryIO, last: bool = False) -> Iterator[bytes]:
    """The lines of a file that end with a newline, each at most LIMIT bytes; a longer one is given as b"".

    last: give also a line without a newline at the end, since nothing will follow
    """
    while line := file.readline(LIMIT):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest, line = file.readline(LIMIT), line if len(line) < LIMIT else b""
        if rest or last:
            yield line


class _Text(HTMLParser):
    """Collects the text between tags, in `parts`."""

    INLINE = ("a", "abbr", "b", "code", "em", "font", "i", "small", "span", "strong", "sub", "sup", "u")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts, self.hidden = [], False

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.hidden = tag in ("script", "style")
        self.parts.append("" if tag in self.INLINE else " ")

    def handle_endtag(self, tag: str) -> None:
        self.handle_starttag("" if tag in ("script", "style") else tag, [])

    def handle_data(self, data: str) -> None:
        self.parts.append("" if self.hidden else data)


def plain(html: str) -> str:
    """The text of HTML without tags, scripts and styles, with single spaces.

    What lies beyond 100,000 characters is left out: the parser of the standard library is quadratic on some input.
    """
    parser = _Text()
    parser.feed(html[:100_000])
    parser.close()
    return " ".join("".join(parser.parts).split())


# Feeds


class _Session(requests.Session):
    def get_redirect_target(self, answer: requests.Response) -> None:
        """Feed follows redirects itself, since requests reads the body of a redirect, however large it is."""


class Feed(Source):
    """RSS or Atom at an address.

    Args:
        interval: seconds between two requests
        base: after n failures, the next request waits base * 2**n seconds, at most an hour, or as Retry-After says
        timeout: seconds for connecting and for each read
        deadline: seconds for the whole answer, and for making sense of it
        limit: bytes of the answer, uncompressed
        clock: seconds since 1970

    `poll` raises nothing; what went wrong is in cursor["error"] until an answer is good. Entries that can be read
    in a malformed feed are given. A document type that declares entities is refused. An entry is known by its id, else
    its link, else its text; its time is that of publication, else of its change, else now.
    """

    def __init__(
        self,
        url: str,
        interval: float = 60.0,
        base: float = 30.0,
        timeout: float = 10.0,
        deadline: float = 30.0,
        limit: int = 5_000_000,
        clock: Clock = time.time,
    ) -> None:
        self.name, self.clock, self.interval, self.base = url, clock, interval, base
        self.timeout, self.deadline, self.limit = timeout, deadline, limit

    def poll(self, cursor: dict) -> tuple[list[Document], dict]:
        """Entries that were not there before, and the next cursor."""
        now, retry = self.clock(), 0.0
        if now < cursor.get("not_before", 0) <= now + DAY:  # further away, the clock was wrong
            return [], cursor
        seen, tags = cursor.get("seen", []), cursor.get("tags", {})
        try:
            status, headers, documents, trouble = _within(self.deadline, lambda: self._ask(tags, now))
            if status == 304:
                return [], {"seen": seen, "tags": tags, "not_before": now + self.interval}
            if status != 200:
                retry = _retry_after(headers.get("Retry-After", ""), now)
                raise StreamError(f"answered {status}")
        except Exception as reason:  # feedparser, requests and urllib3 raise anything on hostile input
            failures = cursor.get("failures", 0) + 1
            wait = max(min(self.base * 2 ** min(failures, 30), HOUR), retry)
            error = f"{self.name}: {_explained(reason)}; asked again after {wait:.0f} s"
            return [], {"seen": seen, "failures": failures, "not_before": now + wait, "error": error}
        # A malformed answer may be half of one: it is asked for again, and what it lacks is not new when it returns.
        tags = {} if trouble else {name: headers[name] for name in ("ETag", "Last-Modified") if name in headers}
        found = {document.id: document for document in documents}
        kept = [*found, *(name for name in seen if name not in found)][: max(1000, len(found))]
        after = {"seen": kept, "tags": tags, "not_before": now + self.interval}
        known = set(seen)
        return [d for d in found.values() if d.id not in known], after | ({"error": trouble} if trouble else {})

    def _ask(self, tags: dict, now: float) -> tuple[int, Mapping[str, str], list[Document], str]:
        """Status and headers of the answer, after at most 5 redirects; documents in a good one, and what is wrong."""
        ends, url = time.monotonic() + self.deadline, self.name
        headers = {"User-Agent": "llmprod", "Accept-Encoding": "gzip"}
        for name, condition in (("ETag", "If-None-Match"), ("Last-Modified", "If-Modified-Since")):
            headers |= {condition: tags[name]} if name in tags else {}
        with _Session() as session:
            for _ in range(6):
                with session.get(url, headers=headers, stream=True, timeout=self.timeout) as answer:
                    if answer.status_code == 200:
                        text = decoded(self._body(answer, ends), answer.headers.get("Content-Type", ""))
                        return 200, answer.headers, *self._entries(text, now)
                    if not answer.is_redirect:
                        return answer.status_code, answer.headers, [], ""
                    url = urljoin(url, answer.headers["Location"])
        raise StreamError("more than 5 redirects")

    def _body(self, answer: requests.Response, ends: float) -> bytes:
        """The bytes of an answer, uncompressed; StreamError where they are too many or too few."""
        coding, body = answer.headers.get("Content-Encoding", "identity").strip().lower(), bytearray()
        if coding not in ("identity", "gzip", "x-gzip"):
            raise StreamError(f"sent the encoding {coding}, which was not asked for")
        unzip = None if coding == "identity" else zlib.decompressobj(wbits=31)
        while part := answer.raw.read1(1 << 16, decode_content=False):
            body += unzip.decompress(part, self.limit + 1 - len(body)) if unzip else part
            if len(body) > self.limit:
                raise StreamError(f"more than {self.limit:,} bytes")
            if time.monotonic() > ends:
                raise TimeoutError
        if unzip and not unzip.eof:
            raise StreamError("the answer broke off")
        return bytes(body)

    def _entries(self, text: str, now: float) -> tuple[list[Document], str]:
        """The documents in a feed, and what is wrong with it; StreamError where it is none."""
        import feedparser

        lower = text.lower()
        if (start := lower.find("<!doctype")) >= 0 and lower.find("<!entity", start) >= 0:
            raise StreamError("refused, since its document type declares entities")
        # Its own declaration goes: the text is UTF-8 now, and feedparser would use any codec that it names.
        xml = '<?xml version="1.0" encoding="utf-8"?>\n' + re.sub(r"^\s*<\?xml[^>]*\?>", "", text)
        parsed = feedparser.parse(io.BytesIO(xml.encode()), sanitize_html=False, resolve_relative_uris=False)
        documents = []
        for entry in parsed.entries:
            title, link = plain(entry.get("title") or ""), entry.get("link") or ""
            bodies = [entry.get("summary"), *(content.get("value") for content in entry.get("content", []))]
            body, name = plain(max(filter(None, bodies), key=len, default="")), entry.get("id") or link
            date = entry.get("published_parsed") or entry.get("updated_parsed")
            record = {"text": f"{title}\n{body}", "title": title, "link": link, "time": timegm(date) if date else now}
            with suppress(StreamError):  # neither title nor text
                # Ids as short as "17" are common, so that an id counts within its feed.
                documents.append(document(record | {"id": name and fingerprint(self.name, name)}, self.name, now))
        if not documents and (parsed.bozo or not parsed.version):
            raise StreamError("neither RSS nor Atom" if not parsed.version else "malformed, without an entry")
        reason = _explained(parsed.bozo_exception) if parsed.bozo else ""
        return documents, reason and f"{self.name}: malformed, {len(documents)} entries could be read ({reason})"


def _within(limit: float, work: Callable) -> object:
    """The result of `work`, or TimeoutError; a thread, since looking up a name and a drip of headers know no limit."""
    results = queue.Queue()

    def run() -> None:
        try:
            results.put((work(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = results.get(timeout=limit)
    except queue.Empty:
        raise TimeoutError from None
    if error:
        raise error
    return result


def _retry_after(text: str, now: float) -> float:
    """Seconds that a Retry-After header asks to wait, at most a day; 0 where it can't be read."""
    with suppress(TypeError, ValueError, OverflowError):
        wait = float(text) if text.strip().isdigit() else parsedate_to_datetime(text).timestamp() - now
        return min(max(wait, 0.0), DAY)
    return 0.0


def _explained(error: Exception) -> str:
    """What an error says, in one line."""
    for kinds, words in (
        ((TimeoutError, requests.Timeout), "no whole answer in time"),
        ((requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema), "leads to what is not http"),
        ((requests.ConnectionError, requests.exceptions.ChunkedEncodingError), "can't be reached"),
    ):
        if isinstance(error, kinds):
            return words
    return " ".join(str(error).split())[:200] or type(error).__name__


def decoded(body: bytes, content_type: str = "") -> str:
    """The text of an XML document: UTF-8 where it is valid, else as declared, else UTF-8 with Windows-1252 in gaps."""
    for mark, name in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if body.startswith(mark) or body.startswith("<".encode(name)):
            return body.decode(name, "replace").removeprefix("\ufeff")
    with suppress(UnicodeDecodeError):
        return body.decode("utf-8-sig")
    # Python knows codecs that take quadratic time or are no text, so these names are the ones that count.
    names = r"(?:charset|encoding)=[\"']?((?:iso|windows|cp|koi|gb|big5|euc|shift|latin|mac)[\w-]*)"
    if name := re.search(names, content_type + " " + body[:200].decode("latin-1"), re.IGNORECASE):
        with suppress(UnicodeDecodeError, LookupError):
            return body.decode(name[1])
    return body.decode("utf-8-sig", "windows-1252 in gaps")


codecs.register_error(
    "windows-1252 in gaps", lambda error: (error.object[error.start : error.end].decode("cp1252", "replace"), error.end)
)


# Files, standard input, dated documents


class Tail(Source):
    """A file of JSON lines that grows, or a folder into which such files (.jsonl) and texts (.txt) are put.

    A line has the field text and, if there are any, id, time (seconds or ISO 8601), title, link and source. A line
    without a newline waits for the rest. A .txt file is one document of the file's time. A line that can't be used
    is skipped; cursor["bad"] counts these, and cursor["error"] names the last.

    A file that was rotated or truncated starts anew: a place in it holds a hash of what stands at the file's head and
    before the place. What is written to a file between the last poll and its rotation is seen only where the old file
    stays in a folder that is followed. Put a .txt file under another name and rename it, so that no half is read.

    Args:
        batch: lines of each file in one poll
    """

    def __init__(self, path: str | Path, batch: int = 1000, clock: Clock = time.time) -> None:
        self.path, self.batch, self.clock = Path(path).expanduser(), batch, clock
        self.name = str(self.path.resolve())

    def poll(self, cursor: dict) -> tuple[list[Document], dict]:
        """Documents in lines that were not read yet, and the next cursor."""
        before, after, documents, troubles = cursor.get("files", {}), {}, [], []
        error = cursor.get("error", "")
        try:
            files = self._files()
        except OSError as reason:
            return [], cursor | {"error": f"{self.path}: can't be listed ({reason.strerror})"}
        for path in files:
            place = after[path.name] = before.get(path.name, {})
            try:
                with path.open("rb") as file:
                    read = self._text if path.suffix == ".txt" else self._lines
                    after[path.name] = read(file, place, documents, troubles)
            except OSError as reason:
                error = f"{path}: can't be read ({reason.strerror})"
        after = {"files": after, "bad": cursor.get("bad", 0) + len(troubles)}
        error = troubles[-1] if troubles else error
        return documents, after | ({"error": error} if error else {})

    def _files(self) -> list[Path]:
        """The files to read; one that is gone for a moment, as while it is rotated, is none."""
        if not self.path.is_dir():
            return [self.path] if self.path.is_file() else []
        return sorted(path for path in self.path.iterdir() if path.suffix in (".jsonl", ".txt") and path.is_file())

    def _lines(self, file: BinaryIO, place: dict, documents: list, troubles: list) -> dict:
        """Reads lines from a place on; returns the next place."""
        offset, line = place.get("offset", 0), place.get("line", 0)
        if place and _mark(file, offset) != place["mark"]:
            offset = line = 0
        file.seek(offset)
        for text in islice(whole_lines(file), self.batch):
            line, offset = line + 1, file.tell()
            try:
                documents += [] if text.isspace() else [from_line(text, file.name, self.clock())]
            except StreamError as error:
                troubles.append(f"{file.name}, line {line}: {error}")
        return {"offset": offset, "line": line, "mark": _mark(file, offset)}

    def _text(self, file: BinaryIO, place: dict, documents: list, troubles: list) -> dict:
        """Reads a file that is one document, if it has changed; returns the place at its end."""
        status = os.fstat(file.fileno())
        after = {"offset": status.st_size, "mark": _mark(file, status.st_size)}
        if status.st_size and after != place:
            file.seek(0)
            text = file.read(min(status.st_size, LIMIT + 1))
            try:
                if len(text) > LIMIT:
                    raise StreamError(f"longer than {LIMIT:,} bytes")
                record = {"text": text.decode("utf-8-sig"), "time": status.st_mtime}
                documents.append(document(record, file.name, self.clock()))
            except (StreamError, UnicodeDecodeError) as error:
                troubles.append(f"{file.name}: {'broken UTF-8' if isinstance(error, UnicodeDecodeError) else error}")
        return after


def _mark(file: BinaryIO, offset: int) -> str:
    """A hash of up to 1024 bytes at the head of a file and of as many before a place in it."""
    size = min(offset, 1024)
    parts = []
    for start in (0, offset - size):
        file.seek(start)
        parts.append(file.read(size))
    return sha256(b"".join(parts)).hexdigest()[:16]


class Lines(Source):
    """JSON lines on standard input, as `Tail` reads them.

    What was read and not committed is lost when the process is killed: where that matters, pipe into a file and
    follow that with `Tail`.
    """

    def __init__(self, stream: BinaryIO | None = None, batch: int = 1000, clock: Clock = time.time) -> None:
        self.name, self.batch, self.clock = "-", batch, clock
        self._stream = sys.stdin.buffer if stream is None else stream
        self._queue, self._ended = queue.Queue(maxsize=batch), threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for line in whole_lines(self._stream, last=True):
                self._queue.put(line)
        finally:
            self._ended.set()

    def finished(self, cursor: dict) -> bool:
        """True where the stream was closed and all its lines were given."""
        return self._ended.is_set() and self._queue.empty()

    def poll(self, cursor: dict) -> tuple[list[Document], dict]:
        """What has come in, at most `batch` lines, and the next cursor."""
        documents, after = [], cursor | {"line": cursor.get("line", 0), "bad": cursor.get("bad", 0)}
        with suppress(queue.Empty):
            for _ in range(self.batch):
                line = self._queue.get_nowait()
                after["line"] += 1
                try:
                    documents += [] if line.isspace() else [from_line(line, "standard input", self.clock())]
                except StreamError as error:
                    after |= {"bad": after["bad"] + 1, "error": f"standard input, line {after['line']}: {error}"}
        return documents, after


class Replay(Source):
    """Dated documents in the order of their times, at a chosen speed.

    Args:
        frame: the columns text and time (seconds, ISO 8601 or dates) and, if there are any, id, title, link, source
        speed: seconds of event time in a second; 0: as fast as asked
        batch: documents in one poll
        clock: seconds, from which the speed is taken

    Rows without text are left out. Raises StreamError for a missing column or a time that can't be read.
    """

    def __init__(self, frame: pd.DataFrame, speed: float = 0, batch: int = 256, clock: Clock = time.monotonic) -> None:
        if missing := [column for column in ("text", "time") if column not in frame]:
            raise StreamError(
                f"Replay: no column {', '.join(missing)}; there are {', '.join(map(str, frame.columns))}."
            )
        self.speed, self.batch, self.clock, self._start = speed, batch, clock, None
        columns = [column for column in frame if column in ("id", "text", "time", "title", "link", "source")]
        self.documents = []
        for row in frame[columns].astype(object).to_dict("records"):
            row = {name: value for name, value in row.items() if not pd.isna(value)}
            if not np.isfinite(seconds(row.get("time"), np.nan)):
                raise StreamError(
                    f"Replay: the time '{row.get('time')}' is neither seconds nor a date like 2026-01-31."
                )
            with suppress(StreamError):
                self.documents.append(document(row, "replay", 0.0))
        self.documents.sort(key=lambda document: document.time)
        # Other documents are another replay, in which an old position means nothing.
        self.name = f"replay {fingerprint(*(document.id for document in self.documents))}"

    def finished(self, cursor: dict) -> bool:
        """True at the end."""
        return cursor.get("position", 0) >= len(self.documents)

    def poll(self, cursor: dict) -> tuple[list[Document], dict]:
        """What is due, at most `batch` documents, and the next cursor; the first one is due at once."""
        position = cursor.get("position", 0)
        due = self.documents[position : position + self.batch]
        if self.speed and due:
            self._start = self._start or (self.clock(), due[0].time)
            until = self._start[1] + (self.clock() - self._start[0]) * self.speed
            due = [document for document in due if document.time <= until]
        return due, {"position": position + len(due)}
