"""Sentiment: texts with ratings, lexicons, weak labels, and an encoder with one head for each task."""

import ast
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from llmprod import LLMProdError, artifacts, data, evaluate, models, track
from llmprod.finetune import TokenBudget

CLASSES = ("negative", "neutral", "positive")
DOMAINS = {
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "movies": "movieReviewSnippets",
}


class SentimentError(LLMProdError):
    """Rated texts can't be used as they are."""


# Data: frames with the columns text, rating (a number), sentiment (0 negative, 1 neutral, 2 positive), group


def load(
    dataset: str = "sentiment-human", part: str = "", text_column: str = "text", label_column: str = "label"
) -> pd.DataFrame:
    """Texts with their sentiment.

    Args:
        dataset: `sentiment-human`, `financial-phrasebank`, or a file (.csv, .tsv, .jsonl, .parquet)
        part: of sentiment-human a domain (nyt where it is left out, tweets, amazon, movies); of financial-phrasebank
            the share of annotators that had to agree (50Agree where it is left out, 66Agree, 75Agree, AllAgree)
        text_column, label_column: of a file; labels are numbers (ratings around 0) or negative, neutral, positive

    Returns a frame with text, rating (words become -1, 0, 1), sentiment, and group (the article of a sentence, where it
    is known). Raises SentimentError, or data.DataError, for what can't be used.
    """
    if dataset == "sentiment-human":
        return rated(part or "nyt")[["text", "rating", "sentiment", "group"]]
    if dataset == "financial-phrasebank":
        file = artifacts.fetch(dataset) / f"Sentences_{part or '50Agree'}.txt"
        if not file.is_file():
            raise SentimentError(f"part is '{part}'; financial-phrasebank has 50Agree, 66Agree, 75Agree and AllAgree.")
        rows = [line.rpartition("@") for line in file.read_text(encoding="latin-1").splitlines()]
        frame = pd.DataFrame({"text": [row[0] for row in rows], "label": [row[2] for row in rows]})
    else:
        frame = data.load(dataset, text_column, label_column)
    words = {name: k - 1 for k, name in enumerate(CLASSES)}
    rating = pd.to_numeric(frame["label"].map(lambda label: words.get(str(label).lower(), label)), errors="coerce")
    if rating.isna().any():
        raise SentimentError(
            f"{dataset}: '{frame['label'][rating.isna()].iloc[0]}' is no sentiment; use numbers around 0, or "
            f"{', '.join(CLASSES)}."
        )
    frame = frame.assign(rating=rating.astype(float), sentiment=to_class(rating), group=np.arange(len(frame)))
    return frame[["text", "rating", "sentiment", "group"]].drop_duplicates("text").reset_index(drop=True)


@cache
def rated(domain: str) -> pd.DataFrame:
    """The texts of one domain of `sentiment-human` with the mean of some twenty ratings, and `ratings`, all of them."""
    if domain not in DOMAINS:
        raise SentimentError(f"part is '{domain}'; sentiment-human has {', '.join(DOMAINS)}.")
    lines = {}
    with tarfile.open(artifacts.fetch("sentiment-human") / "hutto_ICWSM_2014.tar.gz") as archive:
        for kind in ("GroundTruth", "anonDataRatings"):
            content = archive.extractfile(f"hutto_ICWSM_2014/{DOMAINS[domain]}_{kind}.txt").read()
            lines[kind] = [line.split("\t") for line in content.decode("utf-8", "replace").splitlines()]
    texts = pd.DataFrame(lines["GroundTruth"], columns=["id", "mean", "text"]).set_index("id")
    everybody = pd.DataFrame(lines["anonDataRatings"], columns=["id", "mean", "sd", "ratings"]).set_index("id")
    texts["text"] = texts["text"].map(data.normalise)
    texts["rating"] = texts["mean"].astype(float)
    texts["sentiment"] = to_class(texts["rating"])
    texts["group"] = texts.index.str.partition("_").get_level_values(0)
    texts["ratings"] = everybody["ratings"].map(ast.literal_eval)
    return texts.reset_index()


def to_class(ratings: np.ndarray, low: float = -0.05, high: float = 0.05) -> np.ndarray:
    """0 (negative) up to `low`, 2 (positive) from `high`, else 1 (neutral).

    The thresholds of Hutto & Gilbert 2014. On the mean of ratings from -4 to 4 as it is: with them, and F1 averaged
    with the classes' shares as weights, the figures of the paper come out (VADER .55, one person .65 on NYT).
    """
    ratings = np.asarray(ratings)
    return np.where(ratings <= low, 0, np.where(ratings >= high, 2, 1))


def halves(table: pd.DataFrame, seed: int, by: str = "text") -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(training, validation, test): a random half tests, as in the paper; a tenth of the other half validates.

    Args:
        by: "text", or "group" to keep the sentences of an article together, so that none is tested beside others of
            its own that trained
    """
    names = table[by].drop_duplicates().to_numpy()
    drawn = np.random.default_rng(seed).permutation(len(names))
    place = table[by].map(dict(zip(names, drawn / len(names), strict=True)))
    parts = (place < 0.45, (place >= 0.45) & (place < 0.5), place >= 0.5)
    return tuple(table[part].reset_index(drop=True) for part in parts)


def one_person(domain: str = "nyt") -> dict[str, float]:
    """How well one person does, on average over people: Pearson r with the mean of all, and of the others; F1."""
    ratings = np.array(rated(domain)["ratings"].tolist(), dtype=float)
    total = ratings.sum(axis=1)
    truth, people = to_class(total / ratings.shape[1]), ratings.T
    return {
        "r": float(np.mean([np.corrcoef(one, total)[0, 1] for one in people])),
        "r, left out of the mean": float(np.mean([np.corrcoef(one, total - one)[0, 1] for one in people])),
        "F1": float(np.mean([weighted_f1(truth, to_class(one)) for one in people])),
    }


def weighted_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The mean of the classes' F1, each weighted by its share of the labels: the average of Hutto & Gilbert 2014."""
    return float(f1_score(labels, predictions, average="weighted", zero_division=0))


def scores(table: pd.DataFrame, ratings: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """Predicted ratings and classes against the true ones."""
    truth = table["sentiment"].to_numpy()
    return {
        "r": float(np.corrcoef(table["rating"], ratings)[0, 1]),
        "weighted F1": weighted_f1(truth, classes),
        "macro-F1": evaluate.macro_f1(truth, classes),
        "accuracy": evaluate.accuracy(truth, classes),
    }


# Lexicons


def vader(texts: Sequence[str]) -> np.ndarray:
    """VADER's compound score, -1 to 1 (Hutto & Gilbert 2014; library `vaderSentiment`)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    return np.array([analyser.polarity_scores(text)["compound"] for text in texts])


@cache
def financial_words() -> dict[str, int]:
    """1 for a positive and -1 for a negative word of company reports (Loughran & McDonald 2011), in lower case."""
    words = pd.read_csv(artifacts.fetch("loughran-mcdonald") / "LM.csv", keep_default_na=False)
    sign = (words["Positive"] > 0).astype(int) - (words["Negative"] > 0).astype(int)
    return {word.lower(): int(value) for word, value in zip(words["Word"], sign, strict=True) if value}


def loughran_mcdonald(texts: Sequence[str]) -> np.ndarray:
    """(positive - negative) / (positive + negative) words of a text, 0 where there is none."""
    known, found = financial_words(), []
    for text in texts:
        signs = [known[word] for word in re.findall(r"[a-z]+", text.lower()) if word in known]
        found.append(sum(signs) / max(len(signs), 1))
    return np.array(found)


# Weak supervision: functions that vote, a model of how far to trust each, soft labels

NO_VOTE = -1
GAIN = (
    r"\b(rose|rises?|rising|increas\w+|grew|grow(s|th|ing)|up|climb\w*|jump\w*|improv\w+|gain(s|ed)?|won|award\w*|"
    r"record)\b"
)
FALL = (
    r"\b(fell|falls?|falling|decreas\w+|declin\w+|down|drop\w*|shrank|plung\w*|cut(s|ting)?|lay\W?offs?|weak\w*|"
    r"slump\w*)\b"
)
COST = r"\b(loss(es)?|costs?|expenses?|debts?|unemployment|inflation)\b"


def earnings(text: str) -> int:
    """The vote of a line on earnings: loss against profit, and which way what went."""
    text = text.lower()
    if re.search(r"\b(loss(es)?|shr loss|net loss) (narrow|shrank|decreas)", text) or "turned to profit" in text:
        return 2
    up, down, cost = (re.search(pattern, text) for pattern in (GAIN, FALL, COST))
    if bool(up) == bool(down):
        return 0 if re.search(r"\b(net loss|shr loss|operating loss|lay\W?offs?|bankrupt\w*)\b", text) else NO_VOTE
    return 0 if bool(up) == bool(cost) else 2


def reported(texts: Sequence[str]) -> np.ndarray:
    """What tables of earnings in newswire say of the period: 1 for a loss, 0 for a profit, -1 where there is none.

    A table has "shr" or "net" and compares by "vs"; "shr loss two cts vs profit seven cts" is a loss, and where neither
    word follows the first "shr" or "net" it is a profit.
    """
    found = []
    for text in texts:
        first = re.search(r"\b(?:shr|net)\b(?: (loss|profit)\b)?", text.lower())
        found.append(-1 if not first or " vs " not in text else int(first[1] == "loss"))
    return np.array(found)


def votes(texts: Sequence[str]) -> pd.DataFrame:
    """What each labelling function says of each text: a class, or `NO_VOTE`.

    Words of general feeling (VADER), words of company reports, lines on earnings; and neutral where none of the
    last two finds anything.
    """
    general, financial = vader(texts), loughran_mcdonald(texts)
    lines = np.array([earnings(text) for text in texts])
    return pd.DataFrame(
        {
            "general words": np.select([general <= -0.3, general >= 0.3], [0, 2], NO_VOTE),
            "financial words": np.select([financial < 0, financial > 0], [0, 2], NO_VOTE),
            "earnings": lines,
            "nothing found": np.where((financial == 0) & (lines == NO_VOTE), 1, NO_VOTE),
        }
    )


def combine(voted: pd.DataFrame) -> np.ndarray:
    """Beliefs (texts, classes) from votes alone, without any label.

    Dawid & Skene 1979 (library `crowdkit`): each function has a table of what it says given the truth, found by
    expectation-maximisation where functions agree and disagree. A text without any vote gets the classes' mean share.
    """
    from crowdkit.aggregation import DawidSkene

    long = voted.stack().rename("label").rename_axis(["task", "worker"]).reset_index()
    found = DawidSkene(n_iter=100).fit_predict_proba(long[long["label"] != NO_VOTE])
    found = found.reindex(columns=range(len(CLASSES)), fill_value=0.0)
    return found.reindex(voted.index).fillna(found.mean()).to_numpy()


# An encoder with one head for each task


@dataclass
class Task:
    """What one head learns: numbers (texts,), or class numbers with the classes' names, or beliefs (texts, classes)."""

    name: str
    texts: Sequence[str]
    targets: np.ndarray
    classes: Sequence[str] = ()

    def outputs(self) -> list[str]:
        """The names of the head's outputs."""
        return [f"{self.name}: {c}" for c in self.classes] or [self.name]

    def loss(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Mean squared error for numbers, cross-entropy for classes or beliefs."""
        targets = torch.as_tensor(self.targets[rows], device=logits.device)
        if not self.classes:
            return torch.nn.functional.mse_loss(logits[:, 0], targets.float())
        return torch.nn.functional.cross_entropy(logits, targets.float() if targets.ndim == 2 else targets.long())


def rating_tasks(train: pd.DataFrame, borrowed: int = 0, part: str = "", seed: int = 0) -> list[Task]:
    """The task of rating training texts, and beside it a head for each other domain of `sentiment-human`.

    Ratings of tweets and reviews teach the encoder what feeling sounds like elsewhere; their heads are not used.

    Args:
        borrowed: training texts of each other domain
        part: the domain that `train` is of, where it is one
    """
    tasks = [Task("sentiment", train["text"].tolist(), train["rating"].to_numpy())]
    for domain in DOMAINS if borrowed else ():
        if domain != (part or "nyt"):
            other = halves(load(part=domain), seed)[0].head(borrowed)
            tasks.append(Task(domain, other["text"].tolist(), other["rating"].to_numpy()))
    return tasks


def learn(
    tasks: Sequence[Task],
    model: str = "minilm",
    layers: int = 0,
    epochs: float = 4,
    max_length: int = 64,
    batch_tokens: int = 1024,
    learning_rate: float = 2e-4,
    precision: str = "auto",
    seed: int = 0,
    progress: bool = True,
    log: Callable[[dict, int], None] | None = None,
) -> tuple[models.Classifier, PreTrainedTokenizerBase]:
    """Fine-tunes one encoder with a linear head for each task; the batches of all tasks come in random order.

    The heads are rows of one layer, so that a checkpoint is an ordinary one of `models`; its outputs are named
    `task` or `task: class`, and `predict` takes them apart. Without dropout, token embeddings left as they are.

    Args:
        layers: how many of the encoder's layers to keep, from below (0: all); fewer are faster
        log: is told the loss of each step
    """
    device, precision, _ = models.device_and_precision(precision)
    track.seed_everything(seed)
    names = [name for task in tasks for name in task.outputs()]
    classifier, tokenizer = models.load_classifier(model, names, dropout=0.0)
    if layers:
        del classifier.encoder.encoder.layer[layers:]
        classifier.config.num_hidden_layers = layers
    classifier.encoder.embeddings.requires_grad_(False)
    classifier.to(device).train()
    tokenizer.model_max_length = max_length
    tokens = [tokenizer(list(task.texts), truncation=True, max_length=max_length)["input_ids"] for task in tasks]
    batches = [TokenBudget([len(t) for t in those], batch_tokens, seed) for those in tokens]
    random, steps = np.random.default_rng(seed), max(1, round(epochs * sum(map(len, batches))))
    trained = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01, fused=True)
    rise = max(1, steps // 10)
    shape = lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    order, ends = [], np.cumsum([0, *(len(task.outputs()) for task in tasks)])
    for step in tqdm(range(steps), desc="training", leave=False, disable=not progress):
        if not order:
            order = [(k, rows) for k, some in enumerate(batches) for rows in some]
            order = [order[i] for i in random.permutation(len(order))]
        k, rows = order.pop()
        batch = tokenizer.pad({"input_ids": [tokens[k][row] for row in rows]}, return_tensors="pt").to(device)
        with models.autocast(device, precision):
            logits = classifier(**batch).logits
        loss = tasks[k].loss(logits.float()[:, ends[k] : ends[k + 1]], rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if log:
            log({f"loss, {tasks[k].name}": float(loss.detach())}, step)
    return classifier, tokenizer


def predict(
    classifier: models.Classifier,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    precision: str = "auto",
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """What each head says: numbers (texts,), or probabilities (texts, classes), by the task's name."""
    logits = models.predict(classifier, tokenizer, texts, batch_size, precision).astype(float)
    names = pd.Series([classifier.config.id2label[k].partition(": ")[0] for k in range(logits.shape[1])])
    columns = {task: logits[:, names == task] for task in names.unique()}
    return {task: softmax(part, axis=1) if part.shape[1] > 1 else part[:, 0] for task, part in columns.items()}


def class_names(classifier: models.Classifier, task: str) -> list[str]:
    """The classes of a task's head."""
    names = [classifier.config.id2label[k].partition(": ") for k in range(classifier.config.num_labels)]
    return [name for head, _, name in names if head == task]


@dataclass
class Negative:
    """From a predicted rating to the probability that a text is negative: a logistic curve (Platt 1999)."""

    slope: float
    shift: float
    share: float  # of negatives where it was fitted

    def __call__(self, ratings: np.ndarray) -> np.ndarray:
        """Probabilities (texts,)."""
        return 1 / (1 + np.exp(-(self.slope * np.asarray(ratings) + self.shift)))


def calibrate(ratings: np.ndarray, negative: np.ndarray) -> Negative:
    """Fits `Negative` on validation texts: predicted ratings, and whether each text is negative."""
    if len(np.unique(negative)) < 2:
        raise SentimentError("Calibration needs negative texts and others among the validation texts; add some.")
    fitted = LogisticRegression(C=1e6).fit(np.asarray(ratings)[:, None], negative)
    return Negative(float(fitted.coef_[0, 0]), float(fitted.intercept_[0]), float(np.mean(negative)))


def thresholds(ratings: np.ndarray, sentiment: np.ndarray) -> tuple[float, float]:
    """The two thresholds for `to_class` with the best weighted F1, on validation texts.

    A regression shrinks towards the mean, so that the thresholds of the true ratings are not those of predicted ones.
    """
    grid = np.linspace(-0.6, 0.6, 25)
    pairs = [(low, high) for low in grid for high in grid if low < high]
    return max(pairs, key=lambda pair: weighted_f1(sentiment, to_class(ratings, *pair)))
