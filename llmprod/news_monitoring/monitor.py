"""The monitor: scores a stream of documents, watches topics and companies for surges of negatives, raises alerts."""

import hashlib
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict

import pandas as pd
from tqdm.auto import tqdm

from llmprod import LLMProdError
from llmprod.news_monitoring import shift, surge, watchdog
from llmprod.news_monitoring.documents import DAY, HOUR, Document, NewsError
from llmprod.news_monitoring.duplicates import new_documents
from llmprod.news_monitoring.journal import DAMAGED, OVER, Journal
from llmprod.news_monitoring.order import ready
from llmprod.tables import shown

SILENT = 7 * DAY  # seconds without a document after which a key is in alarm no longer
BATCH = 64  # documents that are scored between two looks at the signals
PROBE = Document("probe", "probe", 0.0, "The company held its annual meeting.")
LOSSES = {  # count -> what is said of it at the end
    "skipped": "could not be read and were skipped; the messages above name them",
    "undated": "had no time that can be read: they were watched as they came",
    "ahead": "were dated more than an hour ahead of this machine's clock: their time is when they came",
    "late": "came too late to be watched; a larger --lateness waits for more",
    "aside": "could not be scored and were set aside; the messages above name them",
}


class Monitor:
    """Polls sources, drops repeats, scores, watches, alerts.

    Documents go into the journal with their scores, a batch in one transaction; then the sources' cursors and the
    detectors, in another: a kill at any moment loses nothing and counts nothing twice, since a document that is there
    already is a repeat. Alerts are written to the journal's outbox with the detectors and delivered after it, so that
    they survive as well.
    """

    slow = 3.0  # seconds after which a process that ends while it scores leaves a suspicion against the documents

    def __init__(
        self,
        scorer: Callable[[Sequence[Document]], list[dict]],
        journal: Journal,
        detector: Callable[[str], surge.Cusum | shift.Shift],
        channels: Sequence = (),
        lateness: float = 3600.0,
        keep: int = 100_000,
    ):
        """
        Args:
            scorer: documents -> scores with topic, negative (probability) and about (the same by company or currency)
            detector: makes one for a topic or company that is new, from its key; where it makes a `shift.Shift`, the
                whole stream is a key too, and all keys share the false alarms that it allows
            channels: where alerts go
            lateness: seconds that a document may come late and still be put in order of time before it is watched
            keep: the newest documents whose texts and scores stay in the journal; about a kilobyte each

        Raises NewsError for a lateness or number that can't be used.
        """
        if not (0 <= lateness < math.inf and keep >= 0):
            raise NewsError(f"lateness is {lateness} and keep {keep}: give seconds and documents from 0 on.")
        self.scorer, self.journal, self.detector = scorer, journal, detector
        self.channels, self.lateness, self.keep = list(channels), lateness, keep
        kind = detector(shift.WHOLE)
        self.whole, self.allowed = isinstance(kind, shift.Shift), getattr(kind, "allowed", 0.0)
        self.ready, self.scoring = 0, 0.0  # keys that are tested; seconds that the models took
        self.on: dict[str, list] = {}  # keys in alarm: [the event that it belongs to, the time of its last document]
        self.counts, self.problems, self.stopping = Counter(), {}, []
        self.waits: dict[str, tuple[int, float]] = {}  # a channel that failed: how often, and until when it rests
        self.newest = 0.0  # event time of the newest document
        # A byte in this file says that scoring took long; see `watchdog`.
        self._evidence = journal.path.with_name(f"{journal.path.name}.slow")
        self._suspects = Counter(journal.state("suspects", {}))
        if self._evidence.exists() and self._evidence.stat().st_size:
            self._suspects.update(journal.state("begun", []))
            journal.set_state("suspects", self._suspects)
            self._evidence.unlink()

    def step(self, sources: Sequence, last: bool = False) -> int:
        """One round over all sources. Returns how many documents came or were watched.

        `last` also reads a last line without an end, and watches the documents that still wait. A signal (`stopping`)
        ends it after a batch: the sources then stand where they stood, and what was scored is known.
        """
        came, cursors = [], {}
        for source in sources:  # before the transaction, which a slow feed must not hold
            before = self.journal.cursor(source.name)
            try:
                documents, cursor = source.poll(before, last)
            except (LLMProdError, OSError, ValueError) as error:  # one source must not stop the others
                self.note(source.name, f"{source.name}: {error}")
                continue
            skipped, error = cursor.get("bad", 0), cursor.get("error")
            self.note(source.name, error and error + (f" ({skipped} skipped so far)" if skipped > 1 else ""))
            self._count("skipped", skipped - before.get("bad", 0))
            cursors[source.name] = cursor
            came += documents
        new = new_documents(self.journal, came)
        for start in range(0, len(new), BATCH):
            if self.stopping:
                return 0
            self._take(new[start : start + BATCH])
        behind = any(cursor.get("behind") for cursor in cursors.values())
        with self.journal.transaction():
            for name, cursor in cursors.items():
                self.journal.set_cursor(name, cursor)
            detectors: dict[str, surge.Cusum | shift.Shift] = {}
            self.ready, self.on = self.journal.state("ready", 0), self.journal.state("on", {})
            late = self.journal.late()
            # A watermark follows the newest of what was read: it waits for the end of what was there at first.
            fed = [] if behind and not last else ready(self.journal, self.lateness, flush=last)
            try:
                alerts = sum(self.watch(document, scores, detectors) for document, scores in fed)
            except (KeyError, TypeError, ValueError) as error:  # scores were checked when they were written
                raise NewsError(f"{self.journal.path} {DAMAGED}") from error
            for key, detector in detectors.items():
                self.journal.set_state(detector.name + key, asdict(detector))
            self.journal.set_state("ready", self.ready)
            self.journal.set_state("on", self.on)
            late = self.journal.late() - late
            if self._suspects and not behind:
                self._suspects.clear()
                self.journal.set_state("suspects", {})
            self.journal.forget(self.keep)
        self.counts.update({"repeats": len(came) - len(new), "alerts": alerts})
        self._count("late", late)
        if late:
            self.note("late", "Documents come too late to be watched; a larger --lateness waits for more.")
        return len(came) + len(fed)

    def _count(self, name: str, more: int) -> None:
        """Counts what was lost; a loss that there is none of is not shown."""
        if more > 0:
            self.counts[name] += more

    def _take(self, batch: Sequence[tuple[Document, bytes]]) -> None:
        """Scores new documents and writes them to the journal."""
        now, started = self.journal.clock(), time.monotonic()
        scored = self._scored([document for document, _ in batch])
        self.scoring += time.monotonic() - started
        with self.journal.transaction():
            for (document, signature), scores in zip(batch, scored, strict=True):
                self.journal.add(document, scores, signature)
        self.counts["documents"] += len(batch)
        self._count("undated", sum(math.isnan(document.time) for document, _ in batch))
        self._count("ahead", sum(document.time > now + HOUR for document, _ in batch))
        self._count("aside", scored.count(None))
        self.newest = max([self.newest, *(min(d.time, now) for d, _ in batch if not math.isnan(d.time))])

    def _scored(self, documents: Sequence[Document]) -> list[dict | None]:
        """The scores of documents, each alone where they fail together; None for one that fails alone as well.

        Raises what the scorer raises where it fails with any document. A document that was begun alone, took long and
        was not finished when an earlier process ended, is not begun again.
        """
        if not any(self._suspects[document.id] for document in documents):
            try:
                return self._scores(documents)
            except Exception:  # the libraries under the models raise anything
                pass
        found: list[dict | None] = []
        for document in documents:
            problem = "the monitor ended twice while it was scored"
            scores = None
            if self._suspects[document.id] < 2:
                try:
                    (scores,) = self._scores([document])
                except Exception as error:
                    self._scores([PROBE])  # is it the document's fault?
                    problem = f"{type(error).__name__}: {error}"
            if scores is None:
                text = f"{document.source}: the document {document.id} was set aside ({problem}): {document.text[:80]}"
                self.note(f"document {document.id}", text)
            found.append(scores)
        return found

    def _scores(self, documents: Sequence[Document]) -> list[dict]:
        """The scores of documents. Raises NewsError for a score that is no probability, or what the scorer raises."""
        self.journal.set_state("begun", [document.id for document in documents])
        with self._evidence.open("wb", buffering=0) as file, watchdog.after(self.slow, file.fileno()):
            try:
                found = self.scorer(documents)
            except Exception:  # it failed and did not hang
                file.truncate(0)
                raise
        self._evidence.unlink()
        for scores in found:
            for probability in (scores["negative"], *scores["about"].values()):
                if not 0 <= probability <= 1:
                    raise NewsError(f"The model's score {probability} is not between 0 and 1.")
            if not isinstance(scores["topic"], str):
                raise NewsError(f"The model's topic {scores['topic']} is not a text.")
        return found

    def watch(self, document: Document, scores: dict, detectors: dict[str, surge.Cusum | shift.Shift]) -> int:
        """Updates the detectors of a document's topic, companies and currencies; alerts go into the outbox.

        An alert that is raised while another key is in alarm belongs to the same `event`, the id of the first of them.
        When none of them is in alarm any more, or was in the news for `SILENT`, the end of the event is told, too.
        Returns how many alerts there were.
        """
        alerts, keys = 0, {f"topic: {scores['topic']}": scores["negative"], **scores["about"]}
        if self.whole:
            keys = {shift.WHOLE: scores["negative"], **keys}
        for key in [key for key, (_, last) in self.on.items() if document.time - last > SILENT]:
            self._calm(key, document.time)
        for key, probability in keys.items():
            if key not in detectors:
                detectors[key] = self.detector(key)
                if state := self.journal.state(detectors[key].name + key):
                    detectors[key] = detectors[key].with_past(state)
            detector = detectors[key]
            if self.whole:
                waited = not detector.ready
                detector.allowed = self.allowed * shift.part(key, self.ready)
            alarm = detector.update(document.time, probability, document.id)
            if self.whole and waited and detector.ready and key != shift.WHOLE:
                self.ready += 1
            if key in self.on and detector.on:
                self.on[key][1] = document.time
            elif key in self.on:
                self._calm(key, document.time)
            if alarm:
                name = hashlib.sha256(f"{key} {document.id}".encode()).hexdigest()[:12]
                self.on[key] = [next((event for event, _ in self.on.values()), name), document.time]
                found = alarm._asdict() | {"key": key, "count": alarm.documents, "event": self.on[key][0]}
                found["documents"] = [self.journal.document(cause) for cause, _ in found.pop("causes")]
                self.journal.add_alert(name, document.time, found)
                alerts += 1
        return alerts

    def _calm(self, key: str, time: float) -> None:
        """Notes that a key is in alarm no longer; if it was the last of its event, the end goes into the outbox."""
        event, _ = self.on.pop(key)
        if event not in (other for other, _ in self.on.values()):
            end = {"key": key, "event": event, "said": "is back at its usual level; the event is over"}
            self.journal.add_alert(event + OVER, time, end | {"since": time, "count": 0, "documents": []})

    def deliver(self, budget: float = 10.0) -> None:
        """Sends every channel the alerts that it has not had, in order; one that fails keeps the rest for later.

        It rests for a minute, then for twice as long each time, at most for an hour; the message is in `problems`, by
        its name. After `budget` seconds none is begun, so that a slow channel does not keep the sources waiting.
        """
        for channel in self.channels:
            ends = time.monotonic() + budget
            failures, until = self.waits.get(channel.name, (0, 0.0))
            if time.monotonic() < until:
                continue
            try:
                while (alerts := self.journal.undelivered(channel.name)) and time.monotonic() < ends:
                    for alert in alerts:
                        if time.monotonic() < ends and not self.stopping:
                            channel.send(alert)
                            self.journal.delivered(alert["id"], channel.name)
                    if self.stopping:
                        break
                self.waits.pop(channel.name, None)
                self.note(channel.name, None)
            except (NewsError, OSError, ValueError) as error:
                self.waits[channel.name] = failures + 1, time.monotonic() + min(60.0 * 2 ** min(failures, 10), HOUR)
                self.note(channel.name, str(error))

    def note(self, name: str, problem: str | None) -> None:
        """Prints a problem once, when it begins, without the control characters of what others sent."""
        if problem and self.problems.get(name) != problem:
            tqdm.write(shown(problem, 500), file=sys.stderr)
        self.problems = {k: v for k, v in self.problems.items() if k != name} | ({name: problem} if problem else {})


def run(monitor: Monitor, sources: Sequence, once: bool = False, pause: float = 5.0) -> Counter:
    """Steps until the sources are finished, or for ever; what was lost is said at the end.

    A first Ctrl-C or SIGTERM ends it after the batch that is being scored, a second one at once. The progress line
    shows documents per second, the share of the time that scoring takes and, if the newest is of today, how late it is.

    Args:
        once: end as soon as no source has anything new
        pause: seconds to wait where nothing came

    Raises NewsError for a pause that can't be used.
    """
    if not 0 <= pause < math.inf:
        raise NewsError(f"pause is {pause}: give a number of seconds from 0 on.")

    def stop(number: int, frame: object) -> None:
        if monitor.stopping:
            raise KeyboardInterrupt
        monitor.stopping.append(number)

    stopping, began = monitor.stopping, time.monotonic()
    stopping.clear()
    handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with tqdm(desc="monitor", unit=" documents") as bar:
            while not stopping:
                moved = monitor.step(sources)
                monitor.deliver()
                counts = monitor.counts
                bar.update(counts["documents"] - bar.n)
                lag = time.time() - monitor.newest
                words = [f"{counts[k]} {k}" for k in ("repeats", "alerts", "late") if k in counts]
                share = f"{monitor.scoring / (time.monotonic() - began):.0%} of the time scoring"
                bar.set_postfix_str(", ".join([*words, share, *([f"{lag:.0f} s behind"] if lag < DAY else [])]))
                if not moved and not stopping:
                    finished = all(source.finished(monitor.journal.cursor(source.name)) for source in sources)
                    if once or finished:
                        break
                    waited = time.time()
                    while not stopping and time.time() - waited < pause:
                        time.sleep(min(0.2, pause))
            moved = not stopping and monitor.step(sources, last=True)
            while moved and not stopping:
                moved = monitor.step([], last=True)
            bar.update(monitor.counts["documents"] - bar.n)
        monitor.deliver(math.inf)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, words in LOSSES.items():
            if monitor.counts[name]:
                tqdm.write(f"{monitor.counts[name]} documents or lines {words}.", file=sys.stderr)
    return monitor.counts


def seen(journal: Journal, since: float = -float("inf")) -> pd.DataFrame:
    """The documents of a journal from an event time on, in its order, with a column for each score."""
    found = journal.recent(since)
    return found.drop(columns="scores").join(pd.DataFrame(found["scores"].tolist(), index=found.index))


def judged(journal: Journal) -> pd.DataFrame:
    """The documents behind judged alerts, as rows for training: text and label.

    The documents of a right alert are negative; for a wrong one the label is left empty, for a person to fill in:
    these are the texts that misled the model.
    """
    rows = [
        {"text": document["text"], "label": "negative" if alert["right"] else "", "alert": alert["id"]}
        for alert in journal.alerts().to_dict("records")
        if alert["right"] is not None
        for document in alert["documents"]
    ]
    return pd.DataFrame(rows, columns=["text", "label", "alert"]).drop_duplicates("text")
