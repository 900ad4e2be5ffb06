"""Sources of documents: feeds, files, standard input, replay."""

import json
import os
import queue
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import pandas as pd

from llmprod import LLMProdError, tables
from llmprod.news_monitoring.documents import LIMIT, Document, NewsError, Source, document, fingerprint, public, stored
from llmprod.news_monitoring.feeds import Feed

NO_END = "; its line has no end yet"  # of what is not skipped, but read again


def open_source(text: str) -> Source:
    """The source that a word of the command line names: a feed's address, `-`, a file or a folder.

    Raises NewsError, naming the word, for anything else.
    """
    if re.match(r"https?://[^/]", text, re.IGNORECASE):
        return Feed(text)
    if text == "-":
        return Lines()
    place = os.path.expanduser(text)  # Path's own raises for a user that there isn't, and `is_file` for long names
    if text.strip() and (os.path.isfile(place) or os.path.isdir(place)):
        return Tail(place)
    word = public(text) if "://" in text else tables.shown(text, 200)
    raise NewsError(
        f"'{word}' is not a source: give the address of a feed (https://...), an existing file of JSON lines, "
        f"an existing folder, or - for JSON lines on standard input. Relative paths start at {Path.cwd()}."
    )


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


def from_line(line: bytes, source: str) -> list[Document]:
    """The document in one line of JSON, [] for an empty line; its id counts within `source`.

    LLMProdError says what is wrong with the line.
    """
    if line.isspace():
        return []
    try:
        record = json.loads(line.decode("utf-8-sig"))
        found = document(record, source)
        own = stored(record.get("id"), LIMIT)
        return [replace(found, id=f"{found.id}@{fingerprint(source)[:8]}") if own else found]
    except UnicodeDecodeError:
        raise NewsError("broken UTF-8") from None
    except (ValueError, RecursionError):
        raise NewsError("no JSON" if line else f"longer than {LIMIT:,} bytes") from None


class Tail(Source):
    """A file of JSON lines that grows, or a folder into which such files (.jsonl) and texts (.txt) are put.

    A line has the field text and, if there are any, id, time (see `tables.moment`), title, link and source. An id
    counts within its file. A line without a newline waits for the rest; the last poll reads it if it is whole. A .txt
    file is one document of the file's time. A line that can't be used is skipped; cursor["bad"] counts these, and
    cursor["error"] names the last. Links in a folder are not followed.

    A file that was truncated, or replaced by another, starts anew; one that was renamed within the folder goes on: a
    place in a file holds a hash of what stands at its head and before the place. What is written between the last poll
    and a rotation is seen only where the old file stays in the folder, with its ending. Put a .txt file under another
    name and rename it, so that no half is read.

    Args:
        batch: lines of each file in one poll
    """

    def __init__(self, path: str | Path, batch: int = 1000) -> None:
        self.path, self.batch = Path(os.path.expanduser(path)), batch
        self.name = str(self.path.resolve()).encode("utf-8", "backslashreplace").decode()
        self.ends: dict[str, int] = {}  # the size of each file when this process first saw it

    def poll(self, cursor: dict, last: bool = False) -> tuple[list[Document], dict]:
        """Documents in lines that were not read yet, and the next cursor."""
        before, after, documents, troubles = cursor.get("files", {}), {}, [], []
        error = cursor.get("error", "")
        try:
            files = self._files()
        except OSError as reason:
            return [], cursor | {"error": f"{self.path}: can't be listed ({reason.strerror})"}
        room = max(LIMIT, 32 * LIMIT // max(1, len(files)))  # bytes of each file in one poll
        for path in files:
            place = after[path.name] = before.get(path.name, {})
            if path.is_symlink() and path != self.path:
                error = f"{path}: a link, which is not followed; put the file itself there"
                continue
            try:
                with path.open("rb") as file:
                    self.ends.setdefault(str(path), os.fstat(file.fileno()).st_size)
                    if path.suffix == ".txt":
                        after[path.name] = self._text(file, place, documents, troubles)
                    else:
                        place = next((p for p in (place, *before.values()) if _goes_on(file, p)), {})
                        after[path.name] = self._lines(file, place, documents, troubles, room, last)
            except OSError as reason:
                error = f"{path}: can't be read ({reason.strerror})"
        self.ends = {str(path): self.ends.get(str(path), 0) for path in files}
        behind = any(after[path.name].get("offset", 0) < self.ends[str(path)] for path in files)
        after = {"files": after, "bad": cursor.get("bad", 0) + sum(not text.endswith(NO_END) for text in troubles)} | (
            {"behind": True} if behind else {}
        )
        error = troubles[-1] if troubles else error
        return documents, after | ({"error": error} if error else {})

    def _files(self) -> list[Path]:
        """The files to read; one that is gone for a moment, as while it is rotated, is none."""
        if not self.path.is_dir():
            return [self.path] if self.path.is_file() else []
        return sorted(path for path in self.path.iterdir() if path.suffix in (".jsonl", ".txt") and path.is_file())

    def _lines(
        self, file: BinaryIO, place: dict, documents: list, troubles: list, room: int, last: bool
    ) -> dict[str, object]:
        """Reads lines from a place on, until `room` bytes were read; returns the next place."""
        offset, line = place.get("offset", 0), place.get("line", 0)
        file.seek(offset)
        ends = offset + room
        for text in islice(whole_lines(file, last), self.batch):
            is_whole = text.endswith(b"\n") or not text  # of a line that is too long nothing is given
            try:
                documents += from_line(text, file.name)
            except LLMProdError as error:
                troubles.append(f"{file.name}, line {line + 1}: {error}")
                if not is_whole:  # half a line is no JSON: it may get its rest before another run
                    troubles[-1] += NO_END
                    break
            offset, line = file.tell(), line + is_whole
            if offset > ends:
                break
        if next(whole_lines(file), None) is None:  # what is left is half a line
            self.ends[file.name] = 0
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
                    raise NewsError(f"longer than {LIMIT:,} bytes")
                record = {"text": text.decode("utf-8-sig"), "time": max(status.st_mtime, tables.EARLIEST.timestamp())}
                documents.append(document(record, file.name))
            except (LLMProdError, UnicodeDecodeError) as error:
                troubles.append(f"{file.name}: {'broken UTF-8' if isinstance(error, UnicodeDecodeError) else error}")
        return after


def _goes_on(file: BinaryIO, place: dict) -> bool:
    """Whether a place in lines is one in this file, as far as it was read then."""
    return place.get("offset", 0) > 0 and "line" in place and _mark(file, place["offset"]) == place["mark"]


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

    What was read and not committed is lost when the process ends: where that matters, pipe into a file and follow
    that with `Tail`.
    """

    def __init__(self, stream: BinaryIO | None = None, batch: int = 1000) -> None:
        self.name, self.batch = "-", batch
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

    def poll(self, cursor: dict, last: bool = False) -> tuple[list[Document], dict]:
        """What has come in, at most `batch` lines, and the next cursor."""
        documents, after = [], cursor | {"line": cursor.get("line", 0), "bad": cursor.get("bad", 0)}
        with suppress(queue.Empty):
            for _ in range(self.batch):
                line = self._queue.get_nowait()
                after["line"] += 1
                try:
                    documents += from_line(line, "standard input")
                except LLMProdError as error:
                    after |= {"bad": after["bad"] + 1, "error": f"standard input, line {after['line']}: {error}"}
        return documents, after


class Replay(Source):
    """Dated documents in the order of their times, `batch` of them in one poll.

    `frame` has the columns text and time (numbers are seconds since 1970; else see `tables.moment`) and, if there are
    any, id, title, link, source. Rows without text are left out. Raises NewsError or DataError for a missing column or
    a time that can't be read.
    """

    def __init__(self, frame: pd.DataFrame, batch: int = 256) -> None:
        if missing := [column for column in ("text", "time") if column not in frame]:
            raise NewsError(f"Replay: no column {', '.join(missing)}; there are {', '.join(map(str, frame.columns))}.")
        self.batch = batch
        times = frame["time"]  # dates before 1990 are real ones here
        if not pd.api.types.is_numeric_dtype(times):
            times = (tables.times(times) - pd.Timestamp(0, tz="UTC")).dt.total_seconds()
        if not (times.abs() < 1e11).all():
            row = (times.abs() < 1e11).argmin()
            raise NewsError(f"Replay, row {row + 1}: the time '{frame['time'].iloc[row]}' is no time.")
        columns = [column for column in frame if column in ("id", "text", "title", "link", "source")]
        self.documents = []
        for row, moment in zip(frame[columns].astype(object).to_dict("records"), times, strict=True):
            with suppress(NewsError):
                row = {name: value for name, value in row.items() if not pd.isna(value)}
                self.documents.append(replace(document(row, "replay"), time=float(moment)))
        self.documents.sort(key=lambda document: document.time)
        # Other documents are another replay, in which an old position means nothing.
        self.name = f"replay {fingerprint(*(document.id for document in self.documents))}"

    def finished(self, cursor: dict) -> bool:
        """True at the end."""
        return cursor.get("position", 0) >= len(self.documents)

    def poll(self, cursor: dict, last: bool = False) -> tuple[list[Document], dict]:
        """The next documents, and the next cursor."""
        end = min(cursor.get("position", 0) + self.batch, len(self.documents))
        return self.documents[cursor.get("position", 0) : end], {"position": end}
