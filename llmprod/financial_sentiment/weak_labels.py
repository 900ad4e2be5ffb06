"""Sentiment without labels: lexicons, labelling functions, a label model."""

import re
from collections.abc import Sequence
from functools import cache

import numpy as np
import pandas as pd

from llmprod import artifacts
from llmprod.extras import extra
from llmprod.financial_sentiment.sentiment import CLASSES


def vader(texts: Sequence[str]) -> np.ndarray:
    """VADER's compound score, -1 to 1 (Hutto & Gilbert 2014; library `vaderSentiment`)."""
    with extra("news"):
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
    """Vote of a sentence about earnings: a loss or a profit, and whether a figure rose or fell."""
    text = text.lower()
    if re.search(r"\b(loss(es)?|shr loss|net loss) (narrow|shrank|decreas)", text) or "turned to profit" in text:
        return 2
    up, down, cost = (re.search(pattern, text) for pattern in (GAIN, FALL, COST))
    if bool(up) == bool(down):
        return 0 if re.search(r"\b(net loss|shr loss|operating loss|lay\W?offs?|bankrupt\w*)\b", text) else NO_VOTE
    return 0 if bool(up) == bool(cost) else 2


def earnings_label(texts: Sequence[str]) -> np.ndarray:
    """The period's result in tables of earnings of newswire: 1 for a loss, 0 for a profit, -1 for other texts.

    A table has "shr" or "net" and compares with "vs": "shr loss two cts vs profit seven cts" is a loss. Where neither
    "loss" nor "profit" follows the first "shr" or "net", it is a profit.
    """
    labels = []
    for text in texts:
        first = re.search(r"\b(?:shr|net)\b(?: (loss|profit)\b)?", text.lower())
        labels.append(-1 if not first or " vs " not in text else int(first[1] == "loss"))
    return np.array(labels)


def label_functions(texts: Sequence[str]) -> pd.DataFrame:
    """The vote of each labelling function (columns) on each text (rows): a class, or `NO_VOTE`.

    Words of general sentiment (VADER), words of company reports, sentences about earnings; and neutral where neither
    of the last two votes.
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


def dawid_skene(votes: pd.DataFrame) -> np.ndarray:
    """Soft labels (texts, classes) from votes alone, without any label.

    Dawid & Skene 1979 (library `crowdkit`): each function has a confusion matrix, estimated by
    expectation-maximisation from where functions agree and disagree. A text without any vote gets the mean soft label.
    """
    with extra("news"):
        from crowdkit.aggregation import DawidSkene

    long = votes.stack().rename("label").rename_axis(["task", "worker"]).reset_index()
    found = DawidSkene(n_iter=100).fit_predict_proba(long[long["label"] != NO_VOTE])
    found = found.reindex(columns=range(len(CLASSES)), fill_value=0.0)
    return found.reindex(votes.index).fillna(found.mean()).to_numpy()
