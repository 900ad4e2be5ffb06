"""Sentiment without labels: lexicons, labelling functions, a label model."""

import re
from collections.abc import Sequence
from functools import cache

import numpy as np
import pandas as pd

from llmprod import artifacts
from llmprod.financial_sentiment.sentiment import CLASSES

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
