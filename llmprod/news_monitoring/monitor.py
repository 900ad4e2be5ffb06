"""The monitor: scores a stream of documents, watches each topic and company for surges of negatives, and warns."""

import hashlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from llmprod import LLMProdError, files, models, optimize, paths
from llmprod.financial_sentiment import entities, multitask, sentiment
from llmprod.news_monitoring import surge
from llmprod.news_monitoring.documents import DAY, Document
from llmprod.news_monitoring.journal import Journal, new_documents, ready


class MonitorError(LLMProdError):
    """A monitor can't start or go on as it was asked to."""


# The model: what `14_news_monitoring` saves, and what reads it


def save_models(
    folder: Path,
    topics: tuple | None,
    feelings: tuple,
    negative: sentiment.PlattScaling,
    thresholds: tuple[float, float],
    detector: dict[str, float],
    reference: dict[str, list],
    card: str,
) -> None:
    """Writes what a monitor needs into a folder.

    Args:
        topics: (classifier, tokenizer) that tells topics; None where the other one has a head for them
        feelings: (classifier, tokenizer) with a head "sentiment" that gives a rating
        negative, thresholds: from validation texts, see `sentiment.PlattScaling.fit` and `sentiment.fit_thresholds`
        detector: `threshold` of `surge.Cusum` and `every`, the documents to a false alarm that it was measured to have;
            others of its settings, and `shares`: topic -> first baseline
        reference: what drift is measured against: "length" (words), "rating" and "topic" of held-out texts
        card: the model card
    """
    models.save_checkpoint(*feelings, folder / "sentiment", card)
    if topics:
        models.save_checkpoint(*topics, folder / "topics", card)
    settings = {"negative": asdict(negative), "thresholds": list(thresholds), "detector": detector}
    settings["reference"] = reference
    files.write_json(folder / "monitor.json", settings)


def default_models() -> Path:
    """Where `14_news_monitoring` leaves the models in the profile cpu."""
    return paths.REPORTS / "cpu" / "work" / "14_news_monitoring" / "models"


def journal_file(name: str = "") -> Path:
    """The monitor's memory: a file of that name, by default one under `runs/`; its folder is made."""
    path = Path(name) if name else paths.RUNS / "monitor" / "journal.sqlite"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class Scorer:
    """From documents to scores: topic, rating, sentiment, probability of being negative, companies and currencies."""

    def __init__(self, folder: Path, precision: str = "auto", every: float = 0):
        """Reads what `save_models` wrote. Raises MonitorError where it is not there.

        Args:
            precision: as in `machine.device_and_precision`, or "int8": see `optimize.int8`, faster on a processor
            every: documents of a topic or company to a false alarm; 0 for as many as the threshold was measured with
        """
        if not (folder / "monitor.json").is_file():
            raise MonitorError(
                f"There is no model for the monitor in {folder}: run `make run NOTEBOOK=14_news_monitoring`, or "
                "name another folder with --models."
            )
        settings = files.read_json(folder / "monitor.json")
        self.negative, self.thresholds = sentiment.PlattScaling(**settings["negative"]), settings["thresholds"]
        self.settings, self.reference = settings["detector"], settings["reference"]
        measured = self.settings.pop("every", 0)
        if not every >= 0:
            raise MonitorError(f"every is {every:g}: give a number of documents above 0, or leave it out.")
        if every and not measured:
            raise MonitorError(f"The models in {folder} do not say how rare false alarms are: leave --every out.")
        if every:  # the threshold counts documents, and so goes with them
            self.settings["threshold"] *= every / measured
        self.how = {"precision": precision}
        if precision == "int8":  # which needs smaller batches to stay in the processor's cache
            self.how = {"precision": "fp32", "batch_size": 32}
        load = optimize.int8 if precision == "int8" else models.load_checkpoint
        self.feelings = load(folder / "sentiment")
        self.topics = load(folder / "topics") if (folder / "topics").is_dir() else None

    def detector(self, key: str) -> surge.Cusum:
        """A detector for a topic or company that was not seen before."""
        return new_detector(key, self.negative.share, **self.settings)

    def __call__(self, documents: Sequence[Document]) -> list[dict]:
        """The scores of each document, as the journal keeps them."""
        if not documents:
            return []
        texts = [f"{document.title} {document.text}".strip() for document in documents]
        said = multitask.predict(*self.feelings, texts, **self.how)
        if self.topics:
            logits = models.predict(*self.topics, texts, **self.how)
            names = list(self.topics[0].config.id2label.values())
        else:
            logits, names = said["topic"], multitask.class_names(self.feelings[0], "topic")
        classes = sentiment.to_class(said["sentiment"], *self.thresholds)
        return [
            {
                "topic": names[topic],
                "rating": round(float(rating), 4),
                "sentiment": sentiment.CLASSES[kind],
                "negative": round(float(probability), 4),
                "length": len(text.split()),
                "about": named,
            }
            for text, topic, rating, kind, probability, named in zip(
                texts,
                logits.argmax(axis=1),
                said["sentiment"],
                classes,
                self.negative(said["sentiment"]),
                self.about(texts),
                strict=True,
            )
        ]

    def about(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """For each text and each company or currency in it, how probably what is said about that one is negative."""
        passages = []
        for number, text in enumerate(texts):
            found = entities.about(text, entities.by_rules(text, amounts=False))
            passages += [(number, f"{kind}: {name}", " ".join(said)) for (kind, name), said in found.items()]
        answers = [{} for _ in texts]
        if passages:
            ratings = multitask.predict(*self.feelings, [said for *_, said in passages], **self.how)["sentiment"]
            for (number, key, _), probability in zip(passages, self.negative(ratings), strict=True):
                answers[number][key] = round(float(probability), 4)
        return answers


# The monitor


def new_detector(
    key: str, negative: float, threshold: float, share: float = 0.2, shares: dict | None = None, **settings: float
) -> surge.Cusum:
    """A detector for what was not seen before.

    Args:
        key: `topic: name`, `company: name` or `currency: name`
        negative: the share of negative texts where the probabilities were calibrated
        threshold, settings: see `surge.Cusum` and `surge.Settings`
        share, shares: the first baseline, and those of topics that are known
    """
    first = (shares or {}).get(key.removeprefix("topic: "), share)
    return surge.Cusum(surge.Settings(share=first, prior=negative, **settings), threshold)


class Monitor:
    """Polls sources, drops repeats, scores, watches, warns.

    What a step takes in, what it makes of it and where the sources stand go into the journal in one transaction: a
    kill at any moment loses nothing and counts nothing twice. Alerts are written to the journal's outbox there and
    delivered after it, so that they survive as well.
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
        """One round over all sources. Returns how many documents came; `last` watches also what is still in order.

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
        """Lets the detectors of a document's topic, companies and currencies see it; alerts go into the outbox.

        Returns how many alerts there were.
        """
        alerts = 0
        for key, probability in {f"topic: {scores['topic']}": scores["negative"], **scores["about"]}.items():
            if key not in detectors:
                state = self.journal.state(key, None)
                detectors[key] = self.detector(key)
                if state:  # what was seen is the journal's; settings and threshold are those of this run
                    told = {name: asdict(detectors[key])[name] for name in ("settings", "threshold")}
                    detectors[key] = surge.Cusum.from_dict(state | told)
            alarm = detectors[key].update(document.time, probability, document.id)
            if alarm:
                name = hashlib.sha256(f"{key} {document.id}".encode()).hexdigest()[:12]
                found = alarm._asdict() | {"key": key, "count": alarm.documents}
                found["documents"] = [self.journal.document(cause) for cause, _ in found.pop("causes")]
                self.journal.add_alert(name, document.time, found)
                alerts += 1
        return alerts

    def deliver(self) -> None:
        """Hands every channel what it has not had yet, in order; one that fails keeps the rest for later."""
        for channel in self.channels:
            try:
                for alert in self.journal.undelivered(channel.name):
                    channel.send(alert)
                    self.journal.delivered(alert["id"], channel.name)
                self.note(channel.name, None)
            except (MonitorError, OSError) as error:
                self.note(channel.name, str(error))

    def note(self, name: str, problem: str | None) -> None:
        """Says a problem once, when it begins."""
        if problem and self.problems.get(name) != problem:
            tqdm.write(problem, file=sys.stderr)
        self.problems = {k: v for k, v in self.problems.items() if k != name} | ({name: problem} if problem else {})


def run(monitor: Monitor, sources: Sequence, once: bool = False, pause: float = 5.0) -> Counter:
    """Steps until the sources are finished, or for ever; a first Ctrl-C or SIGTERM ends it after the step at hand.

    The progress line tells documents a second and, where the newest is of today, how far behind it is.

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


# Afterwards


def seen(journal: Journal, since: float = -float("inf")) -> pd.DataFrame:
    """The documents of a journal from an event time on, in its order, with a column for each score."""
    found = journal.recent(since)
    return found.drop(columns="scores").join(pd.DataFrame(found["scores"].tolist(), index=found.index))


def judged(journal: Journal) -> pd.DataFrame:
    """The documents behind judged alerts, as rows for training: text and label.

    Of an alert that was right the documents are negative; of one that was wrong the label is left empty, to be filled
    in by a person: these are the texts that misled the model.
    """
    rows = [
        {"text": document["text"], "label": "negative" if alert["right"] else "", "alert": alert["id"]}
        for alert in journal.alerts().to_dict("records")
        if alert["right"] is not None
        for document in alert["documents"]
    ]
    return pd.DataFrame(rows, columns=["text", "label", "alert"]).drop_duplicates("text")
