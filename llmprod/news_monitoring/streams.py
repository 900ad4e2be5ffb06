"""Dated news whose past is known, for trying a detector on, and the stock index of the same days."""

import pandas as pd

from llmprod import artifacts, data
from llmprod.news_monitoring.documents import NewsError

STREAMS = ("business-headlines", "news-articles")
QUIET = {
    "business-headlines": pd.Timestamp("2020-02-20")
}  # until then nothing was to be told; the market fell after it


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


def days(dates: pd.Series) -> pd.Series:
    """Dates as numbers of days since 1970."""
    return (dates - pd.Timestamp(0)).dt.days


def sp500() -> pd.Series:
    """The daily close of the S&P 500, by date."""
    table = pd.read_csv(artifacts.fetch("sp500") / "sp500_index.csv.gz", parse_dates=["Date"])
    return table.set_index("Date")["SP500"]
