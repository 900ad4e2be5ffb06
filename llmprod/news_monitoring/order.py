"""In which order documents reach the detectors: that of event time, each once."""

import math

from llmprod.news_monitoring.documents import Document
from llmprod.news_monitoring.journal import FIELDS, UNDATED, Journal


def ready(
    journal: Journal, lateness: float, flush: bool = False, limit: int = 1000
) -> list[tuple[Document, dict[str, object]]]:
    """Documents for the detectors with their scores, in the order of event time, each once; within a transaction.

    Given are those up to the watermark: the latest event time of all that was added, less `lateness` seconds; with
    `flush`, all; `limit` at most, the rest the next time. The watermark is never later than now less `lateness`, and a
    document without a time does not move it: it is given as it came. A document from before a watermark that was
    already passed comes too late for tests that can't take back a step: it is never given, and `journal.late()`
    counts it.
    """
    db, now = journal._inside(), journal.clock()
    passed = min(journal.state("watermark", -1e12), now - lateness)  # it is later after a flush, or if the clock was
    db.execute("UPDATE documents SET time = ? WHERE fed = 0 AND time > ?", (now, now))  # the clock was ahead
    waiting = db.execute("SELECT coalesce(max(time), -1e12) FROM documents WHERE fed = 0").fetchone()[0]
    newest = min(max(journal.state("newest", -1e12), waiting), now)
    watermark = max(passed, newest - (0 if flush else lateness))
    db.execute("UPDATE documents SET fed = 2 WHERE fed = 0 AND time < ?", (passed,))
    query = (
        f"SELECT {', '.join(FIELDS)}, scores FROM documents WHERE fed = 0 AND time <= ? OR fed = {UNDATED} "
        "ORDER BY time, id LIMIT ?"
    )
    rows = db.execute(query, (math.inf if flush else watermark, limit)).fetchall()
    if len(rows) == limit:
        watermark = max(passed, min(watermark, rows[-1][FIELDS.index("time")]))
    db.executemany("UPDATE documents SET fed = 1 WHERE id = ?", [row[:1] for row in rows])
    journal.set_state("newest", newest)
    journal.set_state("watermark", watermark)
    return [(Document(*row[:-1]), journal._read(row[-1])) for row in rows]
