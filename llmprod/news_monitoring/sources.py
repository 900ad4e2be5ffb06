"""Sources of documents: feeds, files, standard input, replay."""

import json
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd

from llmprod.news_monitoring.documents import LIMIT, Clock, Document, NewsError, Source, document, fingerprint, seconds
from llmprod.news_monitoring.feeds import Feed


def open_source(text: str) -> Source:
    """The source that a word of the command line names: a feed's address, `-`, a file or a folder.

    Raises NewsError, naming the word, for anything else.
    """
    if re.match(r"https?://[^/]", text, re.IGNORECASE):
        return Feed(text)
    if text == "-":
        return Lines()
    path = Path(text).expanduser()
    if path.is_file() or path.is_dir():
        return Tail(path)
    raise NewsError(
        f"'{text}' is not a source: give the address of a feed (https://...), an existing file of JSON lines, "
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
                documents += from_line(text, file.name, self.clock())
            except NewsError as error:
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
                    raise NewsError(f"longer than {LIMIT:,} bytes")
                record = {"text": text.decode("utf-8-sig"), "time": status.st_mtime}
                documents.append(document(record, file.name, self.clock()))
            except (NewsError, UnicodeDecodeError) as error:
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
                    documents += from_line(line, "standard input", self.clock())
                except NewsError as error:
                    after |= {"bad": after["bad"] + 1, "error": f"standard input, line {after['line']}: {error}"}
        return documents, after


class Replay(Source):
    """Dated documents in the order of their times, `batch` of them in one poll.

    `frame` has the columns text and time (seconds, ISO 8601 or dates) and, if there are any, id, title, link, source.
    Rows without text are left out. Raises NewsError for a missing column or a time that can't be read.
    """

    def __init__(self, frame: pd.DataFrame, batch: int = 256) -> None:
        if missing := [column for column in ("text", "time") if column not in frame]:
            raise NewsError(f"Replay: no column {', '.join(missing)}; there are {', '.join(map(str, frame.columns))}.")
        self.batch = batch
        columns = [column for column in frame if column in ("id", "text", "time", "title", "link", "source")]
        self.documents = []
        for row in frame[columns].astype(object).to_dict("records"):
            row = {name: value for name, value in row.items() if not pd.isna(value)}
            if not np.isfinite(seconds(row.get("time"), np.nan)):
                raise NewsError(f"Replay: the time '{row.get('time')}' is neither seconds nor a date like 2026-01-31.")
            with suppress(NewsError):
                self.documents.append(document(row, "replay", 0.0))
        self.documents.sort(key=lambda document: document.time)
        # Other documents are another replay, in which an old position means nothing.
        self.name = f"replay {fingerprint(*(document.id for document in self.documents))}"

    def finished(self, cursor: dict) -> bool:
        """True at the end."""
        return cursor.get("position", 0) >= len(self.documents)

    def poll(self, cursor: dict) -> tuple[list[Document], dict]:
        """The next documents, and the next cursor."""
        end = min(cursor.get("position", 0) + self.batch, len(self.documents))
        return self.documents[cursor.get("position", 0) : end], {"position": end}
