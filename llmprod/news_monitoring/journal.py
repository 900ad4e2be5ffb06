"""SQLite event store: exactly-once processing, order of time, an outbox of alerts."""

import json
import math
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from llmprod import shapes
from llmprod.news_monitoring.documents import DAY, Clock, Document, NewsError

APPLICATION, VERSION = 0x6C6C6D70, 2  # mark our files; tables or detector states that differ are another version

SCHEMA = f"""
BEGIN;
CREATE TABLE cursors (source TEXT PRIMARY KEY, cursor TEXT NOT NULL);
CREATE TABLE states (key TEXT PRIMARY KEY, state TEXT NOT NULL);
CREATE TABLE documents (id TEXT PRIMARY KEY, source TEXT NOT NULL, time REAL NOT NULL, text TEXT NOT NULL,
    title TEXT NOT NULL, link TEXT NOT NULL, scores TEXT NOT NULL, fed INTEGER NOT NULL DEFAULT 0);
CREATE INDEX documents_time ON documents (time);
CREATE INDEX documents_fed ON documents (fed, time) WHERE fed <> 1;
CREATE TABLE alerts (id TEXT PRIMARY KEY, time REAL NOT NULL, alert TEXT NOT NULL,
    acknowledged INTEGER NOT NULL DEFAULT 0, "right" INTEGER);
CREATE TABLE deliveries (alert TEXT, channel TEXT, PRIMARY KEY (alert, channel)) WITHOUT ROWID;
CREATE TABLE signatures (document TEXT PRIMARY KEY, time REAL NOT NULL, signature BLOB NOT NULL);
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
COMMIT;
"""

UNDATED, ASIDE = 3, 4  # documents.fed: 0 waits, 1 was watched, 2 came too late, 3 waits without a time, 4 set aside
HORIZON = 3 * DAY  # seconds of event time in which nearly the same text is a repeat
SIGNATURES = 50_000  # that are compared, at most
OVER = ".over"  # ends the id of an event whose end is told

NUMBER = (int, float)
SHAPES = {"watermark": NUMBER, "newest": NUMBER, "forgotten": NUMBER, "ready": int}  # of states, by their key
CURSOR = dict.fromkeys(("bad?", "line?", "position?", "failures?"), shapes.whole)
CURSOR |= {"asked?": shapes.number, "not_before?": shapes.number, "error?": shapes.text, "seen?": [shapes.text]}
PLACE = {"offset": shapes.whole, "line?": shapes.whole, "mark": shapes.text}  # in a file; {} before it was read
CURSOR |= {"tags?": {"*": shapes.text}, "files?": {"*": lambda found: found == {} or shapes.fits(found, PLACE)}}
ALERT = {"documents?": lambda found: isinstance(found, list)}
SHAPES |= {"suspects": dict, "on": dict, "begun": list}

DAMAGED = "is damaged or not a journal. Restore it from a copy, or start one under another name; it was left as it was."

FIXABLE = {  # SQLite's primary result codes
    5: "is held by another process. End that one, or wait.",
    8: "can't be written. Make it writable, or choose a journal in another folder.",
    10: "can't be read or written: the disk reports an error.",
    11: DAMAGED,
    13: "can't grow: the disk is full. Free some space; what was committed is whole.",
    14: "can't be opened. Make its folder writable, or choose a journal in another folder.",
    26: DAMAGED,
}


def _made_of(db: sqlite3.Connection) -> set[tuple[str, str, str]]:
    """The tables and indices of a database: kind, name, definition."""
    query = "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'"
    return {(kind, name, " ".join(sql.split())) for kind, name, sql in db.execute(query)}


def _as_made() -> set[tuple[str, str, str]]:
    """`_made_of` a new journal."""
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA)
        return _made_of(db)


@contextmanager
def _fixable(path: Path) -> Iterator[None]:
    """Turns the errors of SQLite that a user can fix into NewsError."""
    try:
        yield
    except sqlite3.Error as error:
        words = FIXABLE.get((getattr(error, "sqlite_errorcode", None) or 0) & 0xFF)
        if words is None and ("decode" in str(error) or "file format" in str(error)):  # no UTF-8; a number in the head
            words = DAMAGED
        if words is None:
            raise
        raise NewsError(f"{path} {words}") from error


def _dump(value: object) -> str:
    """JSON; NumPy's numbers and single tensors become floats."""
    return json.dumps(value, default=float)


class Journal:
    """What a monitor has taken, where its sources and detectors stand, and its alerts: one SQLite file.

    The file is in WAL mode with synchronous=NORMAL: what was committed survives a killed process. A power cut can
    take back the last transactions, each as a whole, so that their documents are read again.

    Args:
        path: the file; it is made where it is missing, with its folder
        shared: open it while a monitor holds it, to read alerts or to judge them
        clock: seconds since 1970

    Raises NewsError, with a way out, for a file that is damaged, foreign or of another version, for a folder that
    can't be written, and where another process holds the journal, also under another name. A number or a text that
    was changed in place is not noticed: SQLite keeps no checksums.
    """

    def __init__(self, path: str | Path, shared: bool = False, clock: Clock = time.time) -> None:
        self.path, self.clock = Path(os.path.expanduser(path)).resolve(), clock  # a link would be another lock
        self._lock = FileLock(f"{self.path}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=self.path.parent).close()  # FileLock calls a folder that is read-only a lock that is held
            if not shared:
                self._lock.acquire(timeout=0)
        except Timeout:
            raise NewsError(f"{self.path} is held by another monitor. End that one, or name another journal.") from None
        except OSError as error:
            raise NewsError(
                f"{self.path}: its folder can't be written ({error.strerror or error}). Make it writable, or choose a "
                "journal in another folder."
            ) from error
        try:
            if os.path.isfile(self.path) and self.path.stat().st_nlink > 1:
                raise NewsError(f"{self.path} has a second name (a hard link), and SQLite would damage it. Copy it.")
            with _fixable(self.path):
                self.db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
                self._prepare()
        except BaseException as error:
            self.close()
            if isinstance(error, UnicodeDecodeError):  # SQLite's message names a damaged table, in bytes of no text
                raise NewsError(f"{self.path} {DAMAGED}") from error
            raise

    def _prepare(self) -> None:
        """Makes the tables of a new file; of an old one, checks that it is ours and whole."""
        application, version, tables = (
            self.db.execute(query).fetchone()[0]
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        if not (application or version or tables):
            self.db.executescript(SCHEMA)
        elif application != APPLICATION:
            raise NewsError(f"{self.path} is a database of something else. Name another file; it was left as it is.")
        elif version != VERSION:
            raise NewsError(
                f"{self.path} is a journal of version {version}, and this llmprod writes {VERSION}. "
                "Use the llmprod that wrote it, or start a journal under another name."
            )
        elif (
            self.db.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok"
            or _made_of(self.db) != _as_made()
            or not self._can_be_read()
        ):
            raise NewsError(f"{self.path} {DAMAGED}")
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = NORMAL")

    def _can_be_read(self) -> bool:
        """Whether what the next step and the alerts need is JSON, and of the right shape."""
        try:
            for query, shape in (("SELECT cursor FROM cursors", CURSOR), ("SELECT alert FROM alerts", ALERT)):
                if not all(shapes.fits(json.loads(text), shape) for (text,) in self.db.execute(query)):
                    return False
            for key, text in self.db.execute("SELECT key, state FROM states"):
                if not isinstance(json.loads(text), SHAPES.get(key, object)):
                    return False
            for time, fed, scores in self.db.execute("SELECT time, fed, scores FROM documents WHERE fed <> 1"):
                if not (isinstance(time, float) and isinstance(fed, int) and isinstance(json.loads(scores), dict)):
                    return False
            wrong = "SELECT count(*) FROM signatures WHERE typeof(time) <> 'real' OR length(signature) <> 256"
            return not self.db.execute(wrong).fetchone()[0]
        except (ValueError, TypeError, RecursionError, sqlite3.OperationalError):
            return False

    def close(self) -> None:
        """Closes the file and lets others have it."""
        if hasattr(self, "db"):
            self.db.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside is committed at the end, or, after an error or a kill, nothing of it."""
        with _fixable(self.path):
            self.db.execute("BEGIN IMMEDIATE")
            with self.db:
                yield

    def rows(self, query: str, parameters: tuple = ()) -> list[tuple]:
        """What an SQL statement gives. Raises NewsError for what a user can fix, and where the file is damaged."""
        with _fixable(self.path):
            return self.db.execute(query, parameters).fetchall()

    def _read(self, text: str) -> dict:
        """JSON as it was stored. Raises NewsError for anything else."""
        try:
            return json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise NewsError(f"{self.path} {DAMAGED}") from error

    def _inside(self) -> sqlite3.Connection:
        """The database, within a transaction: a fault of the program where there is none."""
        if not self.db.in_transaction:
            raise RuntimeError("This writes more than one row: call it within journal.transaction().")
        return self.db

    # Sources and detectors

    def cursor(self, source: str) -> dict:
        """Where a source stands; {} at the beginning."""
        found = self.rows("SELECT cursor FROM cursors WHERE source = ?", (source,))
        return self._read(found[0][0]) if found else {}

    def set_cursor(self, source: str, cursor: dict) -> None:
        """Stores where a source stands."""
        self.rows("INSERT OR REPLACE INTO cursors VALUES (?, ?)", (source, _dump(cursor)))

    def state(self, key: str, default: object = None) -> object:
        """What `set_state` stored."""
        found = self.rows("SELECT state FROM states WHERE key = ?", (key,))
        return self._read(found[0][0]) if found else default

    def set_state(self, key: str, value: object) -> None:
        """Stores what JSON can hold, as the state of a detector."""
        self.rows("INSERT OR REPLACE INTO states VALUES (?, ?)", (key, _dump(value)))

    # Documents

    def add(self, document: Document, scores: dict | None, signature: bytes = b"") -> None:
        """Takes a document with its scores (numbers by name); one that is there already stays as it is.

        It is never watched where `scores` is None. `signature` is that of `new_documents`.
        """
        d, moment = document, dated(document, self.clock())
        fed = ASIDE if scores is None else UNDATED if math.isnan(d.time) else 0
        row = (d.id, d.source, moment, d.text, d.title, d.link, _dump(scores or {}), fed)
        self.db.execute("INSERT OR IGNORE INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        if signature:
            self.db.execute("INSERT OR IGNORE INTO signatures VALUES (?, ?, ?)", (d.id, moment, signature))

    def forget(self, keep: int, horizon: float = HORIZON) -> None:
        """Clears the texts and scores of all but the last `keep` documents; their ids are known for ever.

        Counted in the order of their coming, so that no date makes it forget; those that wait are kept. Alerts keep
        their own documents. Signatures go that are `horizon` seconds of event time older than what was watched.
        """
        db, watermark = self._inside(), self.state("watermark", -1e12)
        newest = "(SELECT max(rowid) FROM signatures)"
        db.execute(f"DELETE FROM signatures WHERE time < ? OR rowid <= {newest} - ?", (watermark - horizon, SIGNATURES))
        last = (db.execute("SELECT max(rowid) FROM documents").fetchone()[0] or 0) - keep
        if last > (first := self.state("forgotten", 0)):
            part, rows = {"first": first, "last": last}, "rowid > :first AND rowid <= :last AND fed IN"
            clear = f"text = '', title = '', link = '', scores = '{{}}' WHERE {rows} (1, 2) AND text <> ''"
            db.execute(f"UPDATE documents SET {clear}", part)
            waits = f"SELECT ifnull(min(rowid) - 1, :last) FROM documents WHERE {rows} (0, {UNDATED})"
            self.set_state("forgotten", db.execute(waits, part).fetchone()[0])  # next time from the first that waits

    def document(self, name: str) -> dict:
        """A document by its id: its fields and scores in one dict."""
        query = f"SELECT {', '.join(FIELDS)}, scores FROM documents WHERE id = ?"
        ((*row, scores),) = self.rows(query, (name,))
        return dict(zip(FIELDS, row, strict=True)) | self._read(scores)

    def recent(self, since: float = -np.inf) -> pd.DataFrame:
        """Documents from an event time on, in its order: fields, scores (a dict), fed (see `UNDATED`).

        Without those that were set aside or forgotten.
        """
        query = (
            f"SELECT {', '.join(FIELDS)}, scores, fed FROM documents WHERE time >= ? AND fed <> {ASIDE} AND text <> '' "
            "ORDER BY time, id"
        )
        frame = pd.DataFrame(self.rows(query, (since,)), columns=[*FIELDS, "scores", "fed"])
        return frame.assign(scores=[self._read(scores) for scores in frame["scores"]])

    def late(self) -> int:
        """How many documents came too late to be fed."""
        return self.rows("SELECT count(*) FROM documents WHERE fed = 2")[0][0]

    # Alerts

    def add_alert(self, alert_id: str, time: float, alert: dict) -> None:
        """Puts an alert (JSON-able, of event time `time`) into the outbox; the same id twice does nothing."""
        values = (alert_id, time, _dump(alert))
        self.db.execute("INSERT OR IGNORE INTO alerts (id, time, alert) VALUES (?, ?, ?)", values)

    def undelivered(self, channel: str) -> list[dict]:
        """The first alerts that a channel has not had, oldest first: their own fields, id and time.

        Between sending and `delivered` a kill makes an alert come again, with the same id.
        """
        rows = self.rows(
            "SELECT id, time, alert FROM alerts WHERE id NOT IN (SELECT alert FROM deliveries WHERE channel = ?) "
            "ORDER BY time, rowid LIMIT 100",
            (channel,),
        )
        older = {"said": "negatives surge"}  # an alert of before there were words and events
        return [older | {"event": name} | self._read(alert) | {"id": name, "time": time} for name, time, alert in rows]

    def delivered(self, alert_id: str, channel: str) -> None:
        """Notes that a channel has had an alert."""
        self.rows("INSERT OR IGNORE INTO deliveries VALUES (?, ?)", (alert_id, channel))

    def acknowledge(self, alert_id: str, right: bool | None = None) -> None:
        """Notes that a person has seen an alert, and the person's word on it, if there is one.

        Raises NewsError for an unknown alert.
        """
        query = 'UPDATE alerts SET acknowledged = 1, "right" = coalesce(?, "right") WHERE id = ?'
        with _fixable(self.path):
            if not self.db.execute(query, (right, alert_id)).rowcount:
                raise NewsError(f"No alert '{alert_id}' in {self.path}; journal.alerts() lists those that are there.")

    def alerts(self) -> pd.DataFrame:
        """All alerts, oldest first: id, time, acknowledged, right (None, True, False), and their own fields."""
        query = 'SELECT id, time, acknowledged, "right", alert FROM alerts WHERE id NOT LIKE ? ORDER BY time, rowid'
        rows = self.rows(query, (f"%{OVER}",))
        own = pd.DataFrame([self._read(row[4]) for row in rows], index=range(len(rows)))
        frame = pd.DataFrame({"id": [row[0] for row in rows], "time": [row[1] for row in rows]})
        frame["acknowledged"] = [bool(row[2]) for row in rows]
        frame["right"] = pd.Series([None if row[3] is None else bool(row[3]) for row in rows], dtype=object)
        return frame.join(own.drop(columns=list(frame), errors="ignore"))


FIELDS = tuple(field.name for field in fields(Document))


def dated(document: Document, now: float) -> float:
    """The event time of a document: now at most, and now where it has none."""
    return now if math.isnan(document.time) else min(document.time, now)
