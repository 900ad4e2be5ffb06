"""Continual learning: a model that learns phase after phase, and what it forgets meanwhile."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from llmprod import LLMProdError, machine
from llmprod.feedback.phases import Phase, Texts, some
from llmprod.finetune import loop, methods
from llmprod.models import Predictor

Loss = Callable[[torch.Tensor, list[int]], torch.Tensor]  # logits of a batch, its rows -> what is added to the loss


@dataclass(frozen=True)
class Settings:
    """How each phase is learnt; the same for all methods."""

    model: str = "minilm"
    method: str = "lora"  # which weights are trained: a name in `finetune.methods.METHODS`
    max_length: int = 32  # tokens of a text
    epochs: int = 6  # passes over the texts of a phase
    batch: int = 8  # texts in a batch
    learning_rate: float = 1e-3
    buffer: int = 15  # texts of each class that rehearsal keeps
    herding: bool = False  # whether it keeps those whose mean is nearest to the class's, or random ones
    strength: float = 1e4  # of EWC's penalty
    temperature: float = 2.0  # of learning without forgetting
    precision: str = "auto"
    seed: int = 0


# Methods


class Naive:
    """Fine-tuning: each phase goes on from the last one, with its own texts only."""

    def __init__(self, classes: int, settings: Settings):
        self.settings, self.classes = settings, classes
        self.predictor = self.fresh()
        self.seen: list[Texts] = []

    def fresh(self) -> Predictor:
        """A pretrained encoder with an untrained head, ready to be trained."""
        s = self.settings
        machine.seed_everything(s.seed)
        names = [str(k) for k in range(self.classes)]
        options = {"dropout": 0.0, "max_length": s.max_length, "precision": s.precision}
        predictor = Predictor.pretrained(s.model, names, **options)
        methods.prepare(predictor.model, s.method, steps=1000)
        return predictor

    def learn(self, phase: Phase) -> None:
        """Learns a phase."""
        self.fit(*phase.train)
        self.seen.append(phase.train)

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Class numbers; the method is not told the phase."""
        return self.predictor.predict(texts).argmax(axis=1)

    def fit(self, texts: list[str], labels: np.ndarray, extra: Loss | None = None) -> None:
        """Trains on texts, every class as often as the others; `extra` is added to the cross-entropy."""
        s, model, tokenizer = self.settings, self.predictor.model, self.predictor.tokenizer
        device, precision, _ = machine.device_and_precision(s.precision)
        model.to(device)
        tokens = tokenizer(texts, truncation=True, max_length=s.max_length)["input_ids"]
        wanted = torch.as_tensor(labels, device=device)
        share = 1 / np.bincount(labels)[labels]
        random = np.random.default_rng((s.seed, len(self.seen)))

        def batches() -> Iterator[list[int]]:
            while True:
                yield random.choice(len(texts), s.batch, p=share / share.sum()).tolist()

        def loss(rows: list[int]) -> torch.Tensor:
            padded = tokenizer.pad({"input_ids": [tokens[row] for row in rows]}, return_tensors="pt").to(device)
            with machine.autocast(device, precision):
                logits = model(**padded).logits.float()
            value = cross_entropy(logits, wanted[rows])
            return value + extra(logits, rows) if extra else value

        loop.train(model, batches(), loss, max(1, s.epochs * len(texts) // s.batch), s.learning_rate)


class Rehearsal(Naive):
    """A few texts of each old class are kept and learnt again (Robins 1995; herding: Rebuffi et al. 2017)."""

    def __init__(self, classes: int, settings: Settings):
        super().__init__(classes, settings)
        self.buffer: list[Texts] = []

    def learn(self, phase: Phase) -> None:
        """Learns a phase and the buffer, then keeps some of its texts."""
        texts = [*phase.train[0], *(text for kept, _ in self.buffer for text in kept)]
        self.fit(texts, np.concatenate([phase.train[1], *(labels for _, labels in self.buffer)]))
        self.buffer.append(self.keep(*phase.train))
        self.seen.append(phase.train)

    def keep(self, texts: list[str], labels: np.ndarray) -> Texts:
        """The texts of a phase that go into the buffer."""
        size, rows = self.settings.buffer, []
        if not self.settings.herding:
            return some((texts, labels), np.unique(labels), size, np.random.default_rng(self.settings.seed))
        vectors = self.predictor.embed(texts)
        for k in np.unique(labels):
            of = np.flatnonzero(labels == k)
            rows += of[herd(vectors[of], size)].tolist()
        return [texts[row] for row in rows], labels[rows]


def herd(vectors: np.ndarray, size: int) -> list[int]:
    """The rows whose running mean stays nearest to the mean of all, one after the other (Welling 2009)."""
    mean, total, chosen = vectors.mean(axis=0), np.zeros(vectors.shape[1]), []
    for count in range(1, min(size, len(vectors)) + 1):
        distance = np.linalg.norm(mean - (total + vectors) / count, axis=1)
        distance[chosen] = np.inf
        chosen.append(int(distance.argmin()))
        total += vectors[chosen[-1]]
    return chosen


class EWC(Naive):
    """Elastic weight consolidation: weights that mattered for old phases are held back (Kirkpatrick et al. 2017).

    The penalty is (strength / 2) Σ F (θ - θ*)²: θ* are the weights after the last phase, F the diagonal of the Fisher
    information, the mean square of the gradient of log p(y | x), summed over phases.
    """

    def __init__(self, classes: int, settings: Settings):
        super().__init__(classes, settings)
        self.fisher: dict[str, torch.Tensor] = {}
        self.anchor: dict[str, torch.Tensor] = {}

    def learn(self, phase: Phase) -> None:
        """Learns a phase under the penalty, then measures which weights matter to it."""
        self.fit(*phase.train, lambda logits, rows: self.penalty())
        self.seen.append(phase.train)
        self.consolidate(phase.train[0])

    def penalty(self) -> torch.Tensor:
        """The penalty at the present weights."""
        terms = [
            (self.fisher[name] * (weight - self.anchor[name]) ** 2).sum()
            for name, weight in self.predictor.model.named_parameters()
            if name in self.fisher
        ]
        return self.settings.strength / 2 * torch.stack(terms).sum() if terms else torch.zeros(())

    def consolidate(self, texts: Sequence[str], size: int = 32) -> None:
        """Adds the Fisher information of some texts, and takes the present weights as the anchor.

        y is drawn from the model's own distribution, text by text.
        """
        model, tokenizer = self.predictor.model.eval(), self.predictor.tokenizer
        random = np.random.default_rng(self.settings.seed)
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        chosen = random.permutation(len(texts))[:size]
        for row in chosen:
            one = tokenizer([texts[row]], truncation=True, max_length=self.settings.max_length, return_tensors="pt").to(
                model.device
            )
            logits = model(**{name: value for name, value in one.items() if name != "token_type_ids"}).logits.float()
            drawn = int(random.choice(self.classes, p=torch.softmax(logits[0].double(), -1).detach().cpu().numpy()))
            cross_entropy(logits, torch.tensor([drawn], device=model.device)).backward()
            for name, weight in trained.items():
                before = self.fisher.get(name, torch.zeros_like(weight))
                self.fisher[name] = before + weight.grad**2 / len(chosen)
            model.zero_grad()
        self.anchor = methods.trained_state(model)


class WithoutForgetting(Naive):
    """Learning without forgetting: on new texts the old outputs stay as they were (Li & Hoiem 2016).

    The loss adds T² KL(softmax(old / T) ‖ softmax(new / T)) over the classes seen before; no old text is kept.
    """

    def learn(self, phase: Phase) -> None:
        """Learns a phase while the old classes' outputs on its texts are kept."""
        old = np.unique(np.concatenate([labels for _, labels in self.seen])) if self.seen else np.array([], int)
        before = torch.from_numpy(self.predictor.predict(phase.train[0]))[:, old]

        def distance(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
            return distillation(before[rows].to(logits.device), logits[:, old], self.settings.temperature)

        self.fit(*phase.train, distance if len(old) > 1 else None)
        self.seen.append(phase.train)


def distillation(old: torch.Tensor, new: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² KL(softmax(old / T) ‖ softmax(new / T)) of logits (texts, classes), averaged over texts."""
    before, after = (log_softmax(logits / temperature, dim=-1) for logits in (old, new))
    return temperature**2 * kl_div(after, before, log_target=True, reduction="batchmean")


class Adapters(Naive):
    """One adapter and head a phase on a frozen encoder; a text goes to the phase whose class mean is most like it."""

    def __init__(self, classes: int, settings: Settings):
        super().__init__(classes, settings)
        self.start = methods.trained_state(self.predictor.model)
        self.learnt: list[tuple[dict[str, torch.Tensor], np.ndarray, np.ndarray]] = []

    def use(self, weights: dict[str, torch.Tensor]) -> None:
        """Puts an adapter and its head in place."""
        self.predictor.model.load_state_dict(weights, strict=False)

    def learn(self, phase: Phase) -> None:
        """Learns a phase from the pretrained encoder, and keeps adapter, head, classes and their mean vectors."""
        self.use(self.start)
        vectors, labels = self.predictor.embed(phase.train[0]), phase.train[1]
        means = np.stack([vectors[labels == k].mean(axis=0) for k in np.unique(labels)])
        self.fit(*phase.train)
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        self.learnt.append((methods.trained_state(self.predictor.model), np.unique(labels), means))
        self.seen.append(phase.train)

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Class numbers, each by the adapter of the phase that is most like the text."""
        self.use(self.start)
        vectors = self.predictor.embed(texts)
        chosen = np.stack([(vectors @ means.T).max(axis=1) for *_, means in self.learnt]).argmax(axis=0)
        answers = np.zeros(len(texts), dtype=int)
        for number, (weights, classes, _) in enumerate(self.learnt):
            if len(rows := np.flatnonzero(chosen == number)):
                self.use(weights)
                logits = self.predictor.predict([texts[row] for row in rows])[:, classes]
                answers[rows] = classes[logits.argmax(axis=1)]
        return answers


class Retraining(Naive):
    """Full retraining: from the pretrained encoder, on all texts so far; the ceiling, and the most expensive."""

    def learn(self, phase: Phase) -> None:
        """Learns all phases so far anew."""
        self.seen.append(phase.train)
        self.predictor = self.fresh()
        self.fit(
            [text for texts, _ in self.seen for text in texts], np.concatenate([labels for _, labels in self.seen])
        )


METHODS: dict[str, type[Naive]] = {
    "naive": Naive,
    "EWC": EWC,
    "learning without forgetting": WithoutForgetting,
    "one adapter a phase": Adapters,
    "rehearsal": Rehearsal,
    "full retraining": Retraining,
}


# Comparison


def run(method: str, phases: Sequence[Phase], classes: int, settings: Settings) -> tuple[np.ndarray, float]:
    """Learns the phases one after the other: the accuracy matrix R (phases, phases), and the seconds of learning.

    R[i, j] is the accuracy on the test of phase j after learning phase i. Raises LLMProdError for an unknown method.
    """
    if method not in METHODS:
        raise LLMProdError(f"method is '{method}'; use one of {', '.join(METHODS)}.")
    learner, seconds, rows = METHODS[method](classes, settings), 0.0, []
    texts = [text for phase in phases for text in phase.test[0]]
    number = np.repeat(np.arange(len(phases)), [len(phase.test[0]) for phase in phases])
    labels = np.concatenate([phase.test[1] for phase in phases])
    for phase in phases:
        started = time.perf_counter()
        learner.learn(phase)
        seconds += time.perf_counter() - started
        right = pd.Series(learner.predict(texts) == labels)
        rows.append(right.groupby(number).mean().to_numpy())
    return np.stack(rows), seconds


def summary(matrix: np.ndarray) -> dict[str, float]:
    """What an accuracy matrix comes to, of the last phase (Lopez-Paz & Ranzato 2017; Chaudhry et al. 2018).

    * average accuracy: the mean over the tests of all phases
    * backward transfer: the mean over earlier phases of R[last, j] - R[j, j]; negative where something is forgotten
    * forgetting: the mean over earlier phases of the best accuracy so far less that of the last phase
    * new accuracy: the mean of R[j, j], how well each phase is learnt when it comes
    """
    earlier = np.arange(len(matrix) - 1)
    last, own = matrix[-1], np.diag(matrix)
    best = np.array([matrix[j:, j].max() for j in earlier])
    return {
        "average accuracy": float(last.mean()),
        "backward transfer": float((last[earlier] - own[earlier]).mean()),
        "forgetting": float((best - last[earlier]).mean()),
        "new accuracy": float(own.mean()),
    }
