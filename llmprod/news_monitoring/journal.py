"""SQLite event store: exactly-once processing, order of time, an outbox of alerts."""

import json
import math
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from llmprod import data
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


@contextmanager
def _fixable(path: Path) -> Iterator[None]:
    """Turns the errors of SQLite that a user can fix into NewsError."""
    try:
        yield
    except sqlite3.Error as error:
        if (words := FIXABLE.get((getattr(error, "sqlite_errorcode", None) or 0) & 0xFF)) is None:
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
        shared: open it beside the monitor that holds it, to read alerts or to judge them
        clock: seconds since 1970

    Raises NewsError, with a way out, for a file that is damaged, foreign or of another version, for a folder that
    can't be written, and where another process holds the journal.
    """

    def __init__(self, path: str | Path, shared: bool = False, clock: Clock = time.time) -> None:
        self.path, self.clock = Path(path).expanduser(), clock
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
            with _fixable(self.path):
                self.db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
                self._prepare()
        except BaseException:
            self.close()
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
        elif self.db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise NewsError(f"{self.path} {DAMAGED}")
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = NORMAL")

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

    def _inside(self) -> sqlite3.Connection:
        """The database, within a transaction: a fault of the program where there is none."""
        if not self.db.in_transaction:
            raise RuntimeError("This writes more than one row: call it within journal.transaction().")
        return self.db

    # Sources and detectors

    def cursor(self, source: str) -> dict:
        """Where a source stands; {} at the beginning."""
        found = self.db.execute("SELECT cursor FROM cursors WHERE source = ?", (source,)).fetchone()
        return json.loads(found[0]) if found else {}

    def set_cursor(self, source: str, cursor: dict) -> None:
        """Stores where a source stands."""
        self.db.execute("INSERT OR REPLACE INTO cursors VALUES (?, ?)", (source, _dump(cursor)))

    def state(self, key: str, default: object = None) -> object:
        """What `set_state` stored."""
        found = self.db.execute("SELECT state FROM states WHERE key = ?", (key,)).fetchone()
        return json.loads(found[0]) if found else default

    def set_state(self, key: str, value: object) -> None:
        """Stores what JSON can hold, as the state of a detector."""
        self.db.execute("INSERT OR REPLACE INTO states VALUES (?, ?)", (key, _dump(value)))

    # Documents

    def add(self, document: Document, scores: dict) -> None:
        """Takes a document with its scores (numbers by name); one that is there already stays as it is."""
        d = plausible(document, self.clock())
        row = (d.id, d.source, d.time, d.text, d.title, d.link, _dump(scores))
        self.db.execute("INSERT OR IGNORE INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, 0)", row)

    def document(self, name: str) -> dict:
        """A document by its id: its fields and scores in one dict."""
        query = f"SELECT {', '.join(FIELDS)}, scores FROM documents WHERE id = ?"
        *row, scores = self.db.execute(query, (name,)).fetchone()
        return dict(zip(FIELDS, row, strict=True)) | json.loads(scores)

    def recent(self, since: float = -np.inf) -> pd.DataFrame:
        """Documents from an event time on, in its order: fields, scores (a dict), fed (0 waits, 1 fed, 2 late)."""
        query = f"SELECT {', '.join(FIELDS)}, scores, fed FROM documents WHERE time >= ? ORDER BY time, id"
        frame = pd.DataFrame(self.db.execute(query, (since,)).fetchall(), columns=[*FIELDS, "scores", "fed"])
        return frame.assign(scores=[json.loads(scores) for scores in frame["scores"]])

    def late(self) -> int:
        """How many documents came too late to be fed."""
        return self.db.execute("SELECT count(*) FROM documents WHERE fed = 2").fetchone()[0]

    # Alerts

    def add_alert(self, alert_id: str, time: float, alert: dict) -> None:
        """Puts an alert (JSON-able, of event time `time`) into the outbox; the same id twice does nothing."""
        self.db.execute(
            "INSERT OR IGNORE INTO alerts (id, time, alert) VALUES (?, ?, ?)", (alert_id, time, _dump(alert))
        )

    def undelivered(self, channel: str) -> list[dict]:
        """The alerts that a channel has not had, oldest first: their own fields, id and time.

        Between sending and `delivered` a kill makes an alert come again, with the same id.
        """
        rows = self.db.execute(
            "SELECT id, time, alert FROM alerts WHERE id NOT IN (SELECT alert FROM deliveries WHERE channel = ?) "
            "ORDER BY time, id",
            (channel,),
        )
        return [json.loads(alert) | {"id": name, "time": time} for name, time, alert in rows]

    def delivered(self, alert_id: str, channel: str) -> None:
        """Notes that a channel has had an alert."""
        self.db.execute("INSERT OR IGNORE INTO deliveries VALUES (?, ?)", (alert_id, channel))

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
        rows = self.db.execute('SELECT id, time, acknowledged, "right", alert FROM alerts ORDER BY time, id').fetchall()
        own = pd.DataFrame([json.loads(row[4]) for row in rows], index=range(len(rows)))
        frame = pd.DataFrame({"id": [row[0] for row in rows], "time": [row[1] for row in rows]})
        frame["acknowledged"] = [bool(row[2]) for row in rows]
        frame["right"] = pd.Series([None if row[3] is None else bool(row[3]) for row in rows], dtype=object)
        return frame.join(own.drop(columns=list(frame), errors="ignore"))


FIELDS = tuple(field.name for field in fields(Document))


def plausible(document: Document, now: float) -> Document:
    """The document, which happened now if its date lies more than a day ahead: a watermark must not follow that."""
    return document if document.time <= now + DAY else replace(document, time=now)


# Duplicates

PERMUTATIONS = 64


def new_documents(
    journal: Journal, documents: Sequence[Document], threshold: float = 0.8, horizon: float = 3 * DAY
) -> list[Document]:
    """The documents that repeat neither the journal nor an earlier one of the batch; within a transaction.

    A repeat has the id of any document in the journal, or nearly the text of one of the last `horizon` seconds of
    event time: MinHash (Broder 1997) of 64 permutations over the runs of three words estimates a Jaccard similarity of
    at least `threshold`, with a standard error of 0.05 there. The same text has the similarity 1. Dates more than a
    day ahead are set to now.
    """
    from datasketch import MinHash

    db, now = journal._inside(), journal.clock()
    ids = json.dumps([document.id for document in documents])
    listed = "IN (SELECT value FROM json_each(?))"  # a list of any length as one parameter
    query = f"SELECT id FROM documents WHERE id {listed} UNION SELECT document FROM signatures WHERE document {listed}"
    seen = {name for (name,) in db.execute(query, (ids, ids))}
    batch = []
    for d in documents:
        if d.id not in seen:
            seen.add(d.id)
            batch.append(plausible(d, now))
    if not batch:
        return []
    shingles = ([run.encode() for run in data.word_shingles(data.normalise(d.text), 3)] for d in batch)
    # The scheme is named, since signatures of different schemes are never alike.
    hashes = MinHash.generator(shingles, num_perm=PERMUTATIONS, seed=1, scheme="affine32")
    latest = max(_latest(db, "signatures"), *(document.time for document in batch))
    db.execute("DELETE FROM signatures WHERE time < ?", (latest - horizon,))
    blobs = b"".join(blob for (blob,) in db.execute("SELECT signature FROM signatures"))
    old = np.frombuffer(blobs, np.uint32).reshape(-1, PERMUTATIONS).T
    known = np.empty((PERMUTATIONS, old.shape[1] + len(batch)), np.uint32)  # a row for each permutation: fast to scan
    known[:, : old.shape[1]], size = old, old.shape[1]
    few = PERMUTATIONS - math.ceil(threshold * PERMUTATIONS) + 1  # alike enough: no more than few - 1 may differ
    new = []
    for d, minhash in zip(batch, hashes, strict=True):
        signature = minhash.hashvalues
        near = np.flatnonzero((known[:few, :size] == signature[:few, None]).any(axis=0))
        if ((known[:, near] == signature[:, None]).mean(axis=0) >= threshold).any():
            continue
        known[:, size], size = signature, size + 1
        new.append((d, signature.tobytes()))
    db.executemany("INSERT INTO signatures VALUES (?, ?, ?)", [(d.id, d.time, signature) for d, signature in new])
    return [d for d, _ in new]


def _latest(db: sqlite3.Connection, table: str) -> float:
    """The latest event time in a table."""
    return db.execute(f"SELECT coalesce(max(time), -1e12) FROM {table}").fetchone()[0]


# Order


def ready(journal: Journal, lateness: float, flush: bool = False) -> list[tuple[Document, dict]]:
    """Documents for the detectors with their scores, in the order of event time, each once; within a transaction.

    Given are those up to the watermark: the latest event time of all that was added, less `lateness` seconds; with
    `flush`, all. A document from before a watermark that was already passed comes too late for tests that can't take
    back a step: it is never given, and `journal.late()` counts it.
    """
    db = journal._inside()
    passed = journal.state("watermark", -1e12)
    watermark = max(passed, _latest(db, "documents") - (0 if flush else lateness))
    db.execute("UPDATE documents SET fed = 2 WHERE fed = 0 AND time < ?", (passed,))
    query = f"SELECT {', '.join(FIELDS)}, scores FROM documents WHERE fed = 0 AND time <= ? ORDER BY time, id"
    rows = db.execute(query, (watermark,)).fetchall()
    db.execute("UPDATE documents SET fed = 1 WHERE fed = 0 AND time <= ?", (watermark,))
    journal.set_state("watermark", watermark)
    return [(Document(*row[:-1]), json.loads(row[-1])) for row in rows]
