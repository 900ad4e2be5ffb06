"""From documents to scores: the models that `14_news_monitoring` saves, and the detectors that go with them."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from llmprod import files, models
from llmprod.financial_sentiment import multitask, passages, sentiment
from llmprod.financial_sentiment.recognizer import Recognizer
from llmprod.news_monitoring import surge
from llmprod.news_monitoring.documents import HEAD, Document, NewsError
from llmprod.news_monitoring.topics import Topics
from llmprod.optimize import export

# abbreviations of newswire's tables, which the classifier takes for companies: "avg shrs 4.2 mln three mths shr 17 cts"
NO_NAMES = {"avg", "co", "cts", "dlrs", "mln", "mths", "nil", "oper", "pct", "qtr", "qtrs", "revs", "shr", "shrs", "vs"}


@dataclass
class MonitorConfig:
    """All that a monitor needs besides its models; a JSON file next to them.

    negative, thresholds: from ratings to probabilities and to classes, see `PlattScaling.fit` and `fit_thresholds`
    threshold, ratio: see `surge.Cusum` and `surge.Settings`
    every: the documents to a false alarm that were measured at this threshold; 0 where nothing was measured
    share, shares: the first baseline of a topic or company, and of the topics that are known
    reference: what drift is measured against: "length" (words), "rating" and "topic" of held-out texts
    """

    negative: sentiment.PlattScaling
    thresholds: tuple[float, float]
    threshold: float
    every: float = 0
    ratio: float = 3.0
    share: float = 0.2
    shares: dict[str, float] = field(default_factory=dict)
    reference: dict[str, list] = field(default_factory=dict)

    def save(
        self,
        folder: Path,
        card: str,
        ratings: models.Predictor,
        topics: models.Predictor | None = None,
        finder: Recognizer | None = None,
    ) -> None:
        """Writes a folder with the models.

        Args:
            card: their model card
            ratings: has a head "sentiment" that gives a rating
            topics: tells topics; None where `ratings` has a head for them
            finder: finds companies; None to watch topics and currencies alone
        """
        with models.sealed(folder) as temporary:
            for name, model in (("sentiment", ratings), ("topics", topics), ("entities", finder)):
                if model:
                    model.save(temporary / name, card)
            files.write_json(temporary / "monitor.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "MonitorConfig":
        """What `save` wrote. Raises NewsError where it is not there, ModelError where it was changed or is damaged."""
        if not os.path.isfile(folder / "monitor.json"):  # Path's own fails for a name that is too long
            raise NewsError(
                f"There is no model for the monitor in {folder}: run `make run NOTEBOOK=14_news_monitoring`, or "
                "name another folder with --models."
            )
        with models.reading(models.checked(folder) / "monitor.json"):
            settings = files.read_json(folder / "monitor.json")
            found = cls(**settings | {"negative": sentiment.PlattScaling(**settings["negative"])})
            if not all(map(math.isfinite, (*found.thresholds, found.threshold, found.every, found.ratio, found.share))):
                raise ValueError("a setting is no number")
        return found

    def for_rate(self, every: float) -> "MonitorConfig":
        """With the threshold for a false alarm in so many documents of a topic or company; 0 leaves it as it is."""
        if not 0 <= every < math.inf:
            raise NewsError(f"every is {every:g}: give a number of documents above 0, or leave it out.")
        if every and not self.every:
            raise NewsError("These models do not say how rare false alarms are: leave --every out.")
        if every:  # the threshold is itself a number of documents, and so is proportional
            self.threshold, self.every = self.threshold * every / self.every, every
        return self

    def detector(self, key: str) -> surge.Cusum:
        """A detector for what was not seen before, by its key: `topic: name`, `company: name` or `currency: name`."""
        share = self.shares.get(key.removeprefix("topic: "), self.share)
        return surge.Cusum(surge.Settings(share=share, ratio=self.ratio, prior=self.negative.share), self.threshold)


class Scorer:
    """Scores documents: topic, rating, sentiment, probability of being negative, companies and currencies."""

    def __init__(self, folder: Path, precision: str = "auto", every: float = 0, chosen: Topics | None = None):
        """Reads what `MonitorConfig.save` wrote.

        Args:
            precision: as in `machine.device_and_precision`, or "int8": see `export.int8`, faster on a processor
            every: see `MonitorConfig.for_rate`
            chosen: the reader's topics; None for those of the models
        """
        self.config = MonitorConfig.load(folder).for_rate(every)
        small = partial(export.int8, batch_size=8, side_by_side=True)
        load = small if precision == "int8" else partial(models.Predictor.load, precision=precision)
        self.ratings = load(folder / "sentiment")
        self.topics = chosen or (load(folder / "topics") if (folder / "topics").is_dir() else None)
        fine = "auto" if precision == "int8" else precision
        self.finder = Recognizer.load(folder / "entities", fine) if (folder / "entities").is_dir() else None

    def __call__(self, documents: Sequence[Document]) -> list[dict]:
        """The scores of each document, as the journal keeps them; of a text the first `HEAD` characters count."""
        if not documents:
            return []
        texts = [f"{document.title} {document.text}"[:HEAD].strip() for document in documents]
        outputs = multitask.predict(self.ratings, texts)
        if self.topics:
            logits, names = self.topics.predict(texts), self.topics.labels
        else:
            logits, names = outputs["topic"], multitask.class_names(self.ratings, "topic")
        ratings = outputs["sentiment"]
        columns = {
            "topic": [names[k] for k in logits.argmax(axis=1)],
            "rating": [round(float(rating), 4) for rating in ratings],
            "sentiment": [sentiment.CLASSES[k] for k in sentiment.to_class(ratings, *self.config.thresholds)],
            "negative": [round(float(p), 4) for p in self.config.negative(ratings)],
            "length": [len(text.split()) for text in texts],
            "about": self.about(texts, ratings),
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def about(self, texts: Sequence[str], ratings: Sequence[float]) -> list[dict[str, float]]:
        """For each text and each company or currency in it, how probably its sentences on that one are negative.

        `ratings` are those of the whole texts, which need not be rated again where a text is one sentence.
        """
        found, parts = self.finder.find(texts) if self.finder else [[]] * len(texts), []
        for number, (text, named) in enumerate(zip(texts, found, strict=True)):
            companies = [entity for entity in named if entity.kind == "company" and entity.name not in NO_NAMES]
            said_of = passages.about(text, [*companies, *passages.currencies(text, named)])
            parts += [(number, f"{kind}: {name}", " ".join(said)) for (kind, name), said in said_of.items()]
        rated = dict(zip(texts, ratings, strict=True))
        if new := list(dict.fromkeys(said for *_, said in parts if said not in rated)):
            rated |= zip(new, multitask.rate(self.ratings, new), strict=True)
        answers: list[dict[str, float]] = [{} for _ in texts]
        for number, key, said in parts:
            answers[number][key] = round(float(self.config.negative(rated[said])), 4)
        return answers
