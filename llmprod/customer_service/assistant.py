"""The assistant: decides between answering, asking back and handing over; one dialogue's state; saving and loading."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from scipy.special import expit
from sentence_transformers import CrossEncoder
from sklearn.linear_model import LogisticRegression

from llmprod import files, models, segment
from llmprod.customer_service import phrases, privacy, reply, retrieval, understanding
from llmprod.customer_service.desk import Passage, SupportError

ANSWER, ASK, HAND_OVER, SILENT = "answer", "ask back", "hand over", "silent"
FOLLOW_UP = 6  # words of a message, at most, that is read together with what came before ("and from abroad?")
LONGEST = 5000  # characters of a question; a longer one goes to a person


@dataclass
class Reply:
    """What the assistant says (`text`), and apart from it what it does (`action`), and why."""

    action: str
    text: str = ""
    reason: str = ""
    confidence: float = 0.0
    intents: dict[str, float] = field(default_factory=dict)  # the most probable ones
    slots: dict[str, str] = field(default_factory=dict)
    sentences: list[reply.Sentence] = field(default_factory=list)  # of an answer out of articles
    tried: list[str] = field(default_factory=list)  # ids of the passages that were found

    def summary(self) -> dict:
        """What a person who takes over sees; without the text of the customer."""
        return asdict(self) | {"sentences": [asdict(sentence) for sentence in self.sentences]}


@dataclass
class Thresholds:
    """Chosen on validation questions; infinity: never."""

    answer: float  # least confidence of an intent for its best answer
    passage: float  # least probability that an article answers
    suggest: float = 0.2  # least probability that an article answers for quoting it with a question
    ask: float = 0.35  # least confidence of the two best intents together for asking which one


@dataclass
class Answerable:
    """Whether the passage found answers: a logistic regression on the cosine and the cross-encoder's logit."""

    weights: list[float]  # of cosine and logit, and the constant

    @classmethod
    def fit(cls, features: np.ndarray, right: np.ndarray) -> "Answerable":
        """From features (questions, 2) and whether the passage answered."""
        model = LogisticRegression().fit(features, right)
        return cls([*model.coef_[0].tolist(), float(model.intercept_[0])])

    def probability(self, features: np.ndarray) -> np.ndarray:
        """The probability of each row of `features`."""
        *slopes, constant = self.weights
        return expit(features @ np.array(slopes) + constant)


@dataclass
class Assistant:
    """Understands a question, finds its answer, and says how sure it is."""

    understanding: understanding.Understanding
    index: retrieval.Index
    ranker: CrossEncoder | None
    passages: Sequence[Passage]
    answers: dict[str, str]
    slots: dict[str, dict[str, str]]
    answerable: Answerable
    thresholds: Thresholds
    found: int = 5  # passages that are read for an answer
    language: str = "en"  # of its own words, see `phrases`
    write: Callable[[str, Sequence[Passage]], str] | None = None  # a generator, in place of extraction
    vectors: dict[str, np.ndarray] = field(default_factory=dict, repr=False)  # of articles' sentences, once read

    @property
    def fixed(self) -> phrases.Phrases:
        """Its own words, and what it understands without a model."""
        return phrases.of(self.language)

    def rank(self, question: str, texts: Sequence[str]) -> np.ndarray:
        """How well each text of an article answers: the cross-encoder's logit, or 10 times the cosine without one."""
        if self.ranker is not None:
            return retrieval.rerank(self.ranker, question, texts)
        new = [text for text in texts if text not in self.vectors]
        query, *vectors = retrieval.embed(self.index.encoder, [question, *new])
        self.vectors |= dict(zip(new, vectors, strict=True))
        return 10 * np.array([self.vectors[text] @ query for text in texts])

    def search(self, question: str, context: str = "") -> tuple[list[Passage], np.ndarray]:
        """The passages for a question, best first, and the features of `Answerable` (cosine, logit) of the best."""
        query = retrieval.embed(self.index.encoder, [question])
        numbers, _ = self.index.search([question], self.found, [context] if context else (), query)
        found, cosines = [self.passages[n] for n in numbers[0]], self.index.vectors[numbers[0]] @ query[0]
        scores = 10 * cosines
        if self.ranker is not None:
            scores = retrieval.rerank(self.ranker, question, [passage.indexed for passage in found])
        order = np.argsort(-scores, kind="stable")
        return [found[n] for n in order], np.array([cosines[order[0]], scores[order[0]]])

    def understand(self, question: str) -> tuple[dict[str, float], float]:
        """The three most probable intents with their probabilities, and the confidence in the best one."""
        probabilities, likeness = self.understanding.read([question])
        best = np.argsort(-probabilities[0], kind="stable")[:3]
        intents = {self.understanding.intents[k]: round(float(probabilities[0, k]), 4) for k in best}
        return intents, float(understanding.confidence(probabilities, likeness)[0])

    def respond(self, question: str, context: str = "", known: dict[str, str] | None = None) -> Reply:
        """One reply to one question; `context` is what the customer wrote before, `known` the slots already given."""
        slots = dict(known or {})
        for start, end, name in understanding.find_slots(question[:LONGEST], self.slots):
            slots[name] = question[start:end]
        intents, sure = self.understand(question[:LONGEST])
        if context and len(segment.words(question)) <= FOLLOW_UP:  # means nothing alone: whichever reading is surer
            joined, surer = self.understand(f"{context} {question}"[-LONGEST:])
            intents, sure = (joined, surer) if surer > sure else (intents, sure)
        best, second = [*intents][:2]
        base = Reply(ANSWER, confidence=sure, intents=intents, slots=slots)
        if len(question) > LONGEST:
            return self.hand_over(base, "hand over", f"the question is longer than {LONGEST} characters")
        if self.fixed.abuse.search(question):
            return self.hand_over(base, "abuse", "abuse")
        wishes = {self.fixed.person: "person", self.fixed.complaint: "complaint"}
        if best in wishes and sure >= min(0.5, self.thresholds.answer):
            return self.hand_over(base, wishes[best], f"the customer's wish: {best}")
        if sure >= self.thresholds.answer and best in self.answers:
            return self.from_template(base, best, question)
        found, features = self.search(question, context)
        base.tried = [passage.id for passage in found]
        likely = float(self.answerable.probability(features[None])[0])
        if likely >= min(self.thresholds.passage, self.thresholds.suggest):
            base.confidence = likely
            if done := self.from_articles(base, question, found):
                return done
        pair = sum([*intents.values()][:2]) * sure / max(intents[best], 1e-9)
        if best in self.answers and second in self.answers and pair >= self.thresholds.ask and intents[second] > 0.2:
            which = [name.replace("_", " ") for name in (best, second)]
            return self.finished(base, ASK, self.fixed.words["which"].format(*which), "two intents are likely")
        return self.hand_over(base, "hand over", "unsure")

    def from_template(self, base: Reply, intent: str, question: str) -> Reply:
        """The best answer to an intent, its slots filled; asks for the first one that is missing."""
        text = self.answers[intent]
        needed = re.findall(r"{(\w+)}", text)
        for name in needed:
            if name not in base.slots:
                asking = self.fixed.words["missing"].format(name.replace("_", " "))
                ask = self.slots.get(name, {}).get("ask", asking)
                return self.finished(base, ASK, ask, f"missing: {name}")
            text = text.replace(f"{{{name}}}", base.slots[name])
        return self.finished(base, ANSWER, self.with_note(question, text), f"best answer to {intent}")

    def from_articles(self, base: Reply, question: str, found: Sequence[Passage]) -> Reply | None:
        """An answer out of articles, each sentence with its passage, or where unsure a suggestion; None without any."""
        if self.write:
            sentences, dropped = reply.checked(self.write(question, found[:3]), found[:3])
            base.reason = f"generated, {len(dropped)} sentence(s) dropped"
        else:
            sentences, base.reason = reply.extract(question, found[:3], self.rank), "sentences of articles"
        if not sentences:
            return None
        sure = base.confidence >= self.thresholds.passage
        words = self.fixed.words
        before, *after = [words["grounded"]] if sure else [words["suggested"], words["helps?"]]
        base.sentences = [reply.Sentence(before), *sentences, *map(reply.Sentence, after)]
        text = " ".join(f"{s.text} [{s.passage}]" if s.passage else s.text for s in base.sentences)
        return self.finished(base, ANSWER if sure else ASK, self.with_note(question, text), base.reason)

    def with_note(self, question: str, text: str) -> str:
        """The reply, after a note where the question took something else for true (90 days for 30)."""
        return f"{self.fixed.words['differs']} {text}" if reply.contradicted(question, text) else text

    def hand_over(self, base: Reply, words: str, reason: str) -> Reply:
        """The reply that passes the case on to a person."""
        return self.finished(base, HAND_OVER, self.fixed.words[words], reason)

    def finished(self, base: Reply, action: str, text: str, reason: str) -> Reply:
        """The reply with its action, text and reason."""
        base.action, base.text, base.reason = action, text, reason
        return base

    def save(self, folder: Path, card: str) -> None:
        """Writes the assistant as one folder, atomically: models (safetensors), passages, answers, thresholds."""
        settings = {
            "passages": [asdict(passage) for passage in self.passages],
            "answers": self.answers,
            "slots": self.slots,
            "answerable": self.answerable.weights,
            "thresholds": {name: min(value, 2.0) for name, value in asdict(self.thresholds).items()},  # no infinity
            "weight": self.index.weight,
            "found": self.found,
            "language": self.language,
        }
        with models.sealed(folder) as temporary:
            self.understanding.save(temporary / "intents", card)
            self.index.encoder.save(str(temporary / "encoder"), create_model_card=False)
            if self.ranker is not None:
                self.ranker.save(str(temporary / "ranker"), create_model_card=False)
            files.write_json(temporary / "assistant.json", settings)

    @classmethod
    def load(cls, folder: Path) -> "Assistant":
        """Reads what `save` wrote.

        Raises SupportError where there is no assistant in the folder, ModelError where it was changed or is damaged.
        """
        path = folder / "assistant.json"
        if not os.path.isfile(path):  # Path's own fails for a name that is too long
            raise SupportError(
                f"{folder}: no assistant is saved here. Run notebook 11_customer_service, or give its bundle."
            )
        models.checked(folder)
        with models.reading(path):
            settings = {"language": "en"} | files.read_json(path)  # older ones do not say
            passages = [Passage(**passage) for passage in settings["passages"]]
            thresholds, answerable = Thresholds(**settings["thresholds"]), Answerable(settings["answerable"])
            right = {
                "passages": passages and all(isinstance(text, str) for one in passages for text in vars(one).values()),
                "answers": all(isinstance(text, str) for text in settings["answers"].values()),
                "slots": all(isinstance(slot["pattern"], str) for slot in settings["slots"].values()),
                "answerable": len(answerable.weights) == 3 and np.isfinite(answerable.weights).all(),
                "thresholds": np.isfinite([*asdict(thresholds).values()]).all(),
                "weight": 0 <= settings["weight"] <= 1,
                "found": isinstance(settings["found"], int) and settings["found"] > 0,
                "language": settings["language"] in phrases.LANGUAGES,
            }
            if wrong := [name for name, is_right in right.items() if not is_right]:
                raise ValueError(f"{', '.join(wrong)}: not what an assistant has there")
        encoder = retrieval.load_encoder(str(folder / "encoder"), 0)
        ranker = retrieval.load_ranker(folder / "ranker") if (folder / "ranker").is_dir() else None
        return cls(
            understanding.Understanding.load(folder / "intents"),
            retrieval.Index([passage.indexed for passage in passages], encoder, settings["weight"]),
            ranker,
            passages,
            settings["answers"],
            settings["slots"],
            answerable,
            thresholds,
            settings["found"],
            settings["language"],
        )


@dataclass
class Dialogue:
    """One customer's conversation: what was said, the slots given, what was asked, whether a person has taken over."""

    assistant: Assistant
    earlier: list[str] = field(default_factory=list)
    slots: dict[str, str] = field(default_factory=dict)
    asked: str = ""  # the question that waits for a slot or for a choice
    with_person: bool = False

    def turn(self, messages: Sequence[str]) -> Reply:
        """The reply to what the customer wrote since the last one; several short messages are one question.

        After a hand-over the assistant is silent until `reopen`.
        """
        question = " ".join(message.strip() for message in messages if message.strip())
        if self.with_person:
            return Reply(SILENT, reason="a person has taken over", slots=self.slots)
        fixed = self.assistant.fixed
        for name, pattern in fixed.small_talk.items():
            if pattern.fullmatch(question[:LONGEST]):
                return Reply(ASK, fixed.words[name], "nothing was asked", slots=self.slots)
        if self.asked and fixed.denial.fullmatch(question):
            self.with_person = True
            return Reply(HAND_OVER, fixed.words["person"], "what was suggested or asked did not help", slots=self.slots)
        given = understanding.find_slots(question[:LONGEST], self.assistant.slots)
        self.slots |= {name: question[start:end] for start, end, name in given}
        if self.asked and (given or len(segment.words(question)) <= 4):  # the answer to what we asked
            found = self.assistant.respond(f"{self.asked} {question}", "", self.slots)
        else:
            found = self.assistant.respond(question, " ".join(self.earlier[-2:]), self.slots)
        waits = found.action == ASK
        self.asked = (self.asked or question) if waits else ""
        self.earlier.append(question)
        self.with_person = found.action == HAND_OVER
        return found

    def reopen(self) -> None:
        """A reopened case starts fresh: nothing of the earlier one is carried over."""
        self.earlier, self.slots, self.asked, self.with_person = [], {}, "", False


def logged(question: str, found: Reply) -> dict:
    """What may be logged of a turn: personal data masked in the question and in every slot."""
    row = found.summary() | {"question": privacy.mask(question)}
    row["slots"] = {name: privacy.mask(value) for name, value in found.slots.items()}
    row["text"] = privacy.mask(found.text)
    return row


def answering(folder: Path) -> Callable[[Sequence[str]], dict]:
    """A function from a customer's turns to the saved assistant's reply to the last: action, text, summary."""
    assistant = Assistant.load(folder)

    def answer(turns: Sequence[str]) -> dict:
        dialogue = Dialogue(assistant)
        for turn in turns:
            said = dialogue.turn([turn])
        return {
            "action": said.action,
            "text": said.text,
            "summary": said.summary() if said.action == "hand over" else {},
        }

    return answer
