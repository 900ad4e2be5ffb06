"""The monitor: scores a stream of documents, watches topics and companies for surges of negatives, raises alerts."""

import hashlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict

import pandas as pd
from tqdm.auto import tqdm

from llmprod.news_monitoring import surge
from llmprod.news_monitoring.documents import DAY, Document, NewsError
from llmprod.news_monitoring.journal import Journal, new_documents, ready


class Monitor:
    """Polls sources, drops repeats, scores, watches, alerts.

    The documents of a step, their scores, the detectors and the sources' cursors go into the journal in one
    transaction: a kill at any moment loses nothing and counts nothing twice. Alerts are written to the journal's
    outbox in it and delivered after it, so that they survive as well.
    """

    def __init__(
        self,
        scorer: Callable[[Sequence[Document]], list[dict]],
        journal: Journal,
        detector: Callable[[str], surge.Cusum],
        channels: Sequence = (),
        lateness: float = 3600.0,
    ):
        """
        Args:
            scorer: documents -> scores with topic, negative (probability) and about (the same by company or currency)
            detector: makes one for a topic or company that is new, from its key
            channels: where alerts go
            lateness: seconds that a document may come late and still be put in order of time before it is watched
        """
        self.scorer, self.journal, self.detector = scorer, journal, detector
        self.channels, self.lateness, self.counts, self.problems = list(channels), lateness, Counter(), {}
        self.newest = 0.0  # event time of the newest document

    def step(self, sources: Sequence, last: bool = False) -> int:
        """One round over all sources. Returns how many documents came; `last` watches also those that still wait.

        A channel that fails keeps its alerts for the next round; the message is in `problems`, by its name.
        """
        came, cursors = [], {}
        for source in sources:  # before the transaction, which a slow feed must not hold
            documents, cursors[source.name] = source.poll(self.journal.cursor(source.name))
            self.note(source.name, cursors[source.name].get("error"))
            came += documents
        with self.journal.transaction():
            for name, cursor in cursors.items():
                self.journal.set_cursor(name, cursor)
            new = new_documents(self.journal, came)
            for document, scores in zip(new, self.scorer(new), strict=True):
                self.journal.add(document, scores)
            detectors: dict[str, surge.Cusum] = {}
            fed = ready(self.journal, self.lateness, flush=last)
            alerts = sum(self.watch(document, scores, detectors) for document, scores in fed)
            for key, detector in detectors.items():
                self.journal.set_state(key, asdict(detector))
        self.newest = max([self.newest, *(document.time for document in new)])
        self.counts.update({"documents": len(new), "repeats": len(came) - len(new), "alerts": alerts})
        self.deliver()
        return len(came)

    def watch(self, document: Document, scores: dict, detectors: dict[str, surge.Cusum]) -> int:
        """Updates the detectors of a document's topic, companies and currencies; alerts go into the outbox.

        Returns how many alerts there were.
        """
        alerts = 0
        for key, probability in {f"topic: {scores['topic']}": scores["negative"], **scores["about"]}.items():
            if key not in detectors:
                detectors[key] = self.detector(key)
                if state := self.journal.state(
                    key
                ):  # the past is the journal's; settings and threshold are of this run
                    now = {name: asdict(detectors[key])[name] for name in ("settings", "threshold")}
                    detectors[key] = surge.Cusum.from_dict(state | now)
            alarm = detectors[key].update(document.time, probability, document.id)
            if alarm:
                name = hashlib.sha256(f"{key} {document.id}".encode()).hexdigest()[:12]
                found = alarm._asdict() | {"key": key, "count": alarm.documents}
                found["documents"] = [self.journal.document(cause) for cause, _ in found.pop("causes")]
                self.journal.add_alert(name, document.time, found)
                alerts += 1
        return alerts

    def deliver(self) -> None:
        """Sends every channel the alerts that it has not had, in order; one that fails keeps the rest for later."""
        for channel in self.channels:
            try:
                for alert in self.journal.undelivered(channel.name):
                    channel.send(alert)
                    self.journal.delivered(alert["id"], channel.name)
                self.note(channel.name, None)
            except (NewsError, OSError) as error:
                self.note(channel.name, str(error))

    def note(self, name: str, problem: str | None) -> None:
        """Prints a problem once, when it begins."""
        if problem and self.problems.get(name) != problem:
            tqdm.write(problem, file=sys.stderr)
        self.problems = {k: v for k, v in self.problems.items() if k != name} | ({name: problem} if problem else {})


def run(monitor: Monitor, sources: Sequence, once: bool = False, pause: float = 5.0) -> Counter:
    """Steps until the sources are finished, or for ever; a first Ctrl-C or SIGTERM ends it after the current step.

    The progress line shows documents per second and, where the newest is of today, how far behind it is.

    Args:
        once: end as soon as no source has anything new
        pause: seconds to wait where nothing came
    """
    stopping = []
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = {s: signal.signal(s, lambda number, frame: stopping.append(number)) for s in signals}
    try:
        with tqdm(desc="monitor", unit=" documents") as bar:
            while not stopping:
                came = monitor.step(sources)
                counts = monitor.counts
                bar.update(counts["documents"] - bar.n)
                lag = time.time() - monitor.newest
                shown = f"{counts['repeats']} repeats, {counts['alerts']} alerts"
                bar.set_postfix_str(shown + (f", {lag:.0f} s behind" if lag < DAY else ""))
                if not came:
                    finished = all(source.finished(monitor.journal.cursor(source.name)) for source in sources)
                    if once or finished:
                        break
                    waited = time.time()
                    while not stopping and time.time() - waited < pause:
                        time.sleep(min(0.2, pause))
            monitor.step([], last=not stopping)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
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
