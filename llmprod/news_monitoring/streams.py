"""Dated news whose past is known, for trying a detector on, and the stock index of the same days."""

import re

import numpy as np
import pandas as pd

from llmprod import artifacts, corpora, data
from llmprod.news_monitoring.documents import NewsError

STREAMS = ("business-headlines", "news-articles")
# until then nothing was to be told; the market fell after it
QUIET = {"business-headlines": pd.Timestamp("2020-02-20")}


def load(dataset: str) -> pd.DataFrame:
    """A stream, oldest first: text (a headline, in the articles their title) and date (without a time).

    The headlines are in the order in which the newspaper listed them, the articles in that of their file. Equal texts
    are one. Raises NewsError for an unknown name.
    """
    if dataset not in STREAMS:
        raise NewsError(f"dataset is '{dataset}'; the streams are {' and '.join(STREAMS)}.")
    folder = artifacts.fetch(dataset)
    if dataset == "business-headlines":
        table = pd.read_csv(folder / "guardian_headlines.csv.bz2")[::-1]
        table = pd.DataFrame({"text": table["Text"], "date": table["Date"]})
    else:
        table = pd.read_csv(folder / "NewsArticles.zip").dropna(subset="title")
        table = pd.DataFrame({"text": table["title"], "date": table["publish_date"]})
    table["text"], table["date"] = table["text"].map(data.normalise), pd.to_datetime(table["date"], format="mixed")
    table = table[table["date"] >= "2016-12-01"].drop_duplicates("text")  # three articles are older
    return table.sort_values("date", kind="stable")[["text", "date"]].reset_index(drop=True)


DATELINE = re.compile(r"(?:本报|新华社)\D{0,15}１月([０-９]{1,2})日[电讯]")  # of a report: Xinhua, Beijing, 10 January


def newspaper() -> pd.DataFrame:
    """The paragraphs of a Chinese newspaper of January 1998 in their order: text and date, in steps of a day.

    The paragraphs have no dates, but reports begin with that of the day before they are printed: the date is the day
    after the one that a tenth of the reports near a paragraph have reached.
    """
    table = corpora.load("chinese-newspaper")[["text"]]
    named = table["text"].str.extract(DATELINE)[0].map(int, na_action="ignore").astype(float)
    reached = named.rolling(401, center=True, min_periods=5).quantile(0.9).ffill().bfill().cummax()
    table["date"] = pd.Timestamp("1998-01-01") + pd.to_timedelta(reached.round(), unit="D")
    return table


def days(dates: pd.Series) -> pd.Series:
    """Dates as numbers of days since 1970."""
    return (dates - pd.Timestamp(0)).dt.days


def sp500() -> pd.Series:
    """The daily close of the S&P 500, by date."""
    table = pd.read_csv(artifacts.fetch("sp500") / "sp500_index.csv.gz", parse_dates=["Date"])
    return table.set_index("Date")["SP500"]


def beside_market(ratings: pd.Series, close: pd.Series) -> pd.DataFrame:
    """Trading days with the mean rating of the news since the last close, the close's log return, and the log close.

    Args:
        ratings: of single news, by date; those of a day without trading belong to the next day with it
        close: by date, as `sp500`
    """
    close = close[ratings.index.min() : ratings.index.max()]
    place = np.searchsorted(close.index, ratings.index)
    rating = ratings.groupby(place).mean().reindex(range(len(close))).to_numpy()
    level = np.log(close)
    return pd.DataFrame({"rating": rating, "return": level.diff(), "level": level}).dropna()


def lead_and_lag(
    table: pd.DataFrame, lags: range, block: int = 10, resamples: int = 500, seed: int = 0
) -> pd.DataFrame:
    """Correlation of a day's rating with the return so many days later (negative: earlier), for each lag.

    Columns: `r`; `low` and `high`, its 95 % interval by moving blocks of days (Künsch 1989); `p`, how often circular
    shifts of the returns by at least a block give as large a correlation (a permutation test that keeps both series'
    own dependence).
    """
    random, rows = np.random.default_rng(seed), {}
    for lag in lags:
        pairs = np.array([table["rating"], table["return"].shift(-lag)])[:, max(0, -lag) : len(table) - max(0, lag)]
        number = pairs.shape[1]
        starts = random.integers(0, number - block + 1, (resamples, -(-number // block), 1))
        draws = (starts + np.arange(block)).reshape(resamples, -1)[:, :number]
        low, high = np.quantile([np.corrcoef(pairs[:, draw])[0, 1] for draw in draws], [0.025, 0.975])
        r = np.corrcoef(pairs)[0, 1]
        shifted = [np.corrcoef(pairs[0], np.roll(pairs[1], k))[0, 1] for k in range(block, number - block)]
        p = (1 + np.sum(np.abs(shifted) >= abs(r))) / (1 + len(shifted))
        rows[lag] = {"r": r, "low": low, "high": high, "p": p}
    return pd.DataFrame(rows).T.rename_axis("days later")
