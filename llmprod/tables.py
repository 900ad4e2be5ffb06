"""Columns of tables as texts, numbers or times: what can't be read as one is an error that names its row."""

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from email.utils import parsedate_to_datetime
from numbers import Number

import numpy as np
import pandas as pd

from llmprod import LLMProdError
from llmprod.formats import DataError, shown

EARLIEST = datetime(1990, 1, 1, tzinfo=UTC)  # what is older is a zero, or a number in another unit
MISSING = {"", "na", "nan", "nat", "none", "null"}  # as times and numbers; as texts and labels these are words
DIGITS = re.compile(r"\d{9,}(\.\d*)?|\d(\.\d+)?e\+?\d\d?", re.IGNORECASE | re.ASCII)
RFC_822 = re.compile(  # parsedate_to_datetime takes a zone that it does not know for UTC
    r"([a-z]{3,9},?\s+)?\d\d?\s+[a-z]{3,9}\s+([1-9]\d)?\d\d\s+\d\d?:\d\d(:\d\d)?"  # and the year 0001 for 2001
    r"(\s+([+-]\d{4}|UTC?|GMT|Z|[ECMP][SD]T))?",
    re.IGNORECASE | re.ASCII,
)


def require(frame: pd.DataFrame, columns: Sequence[str], name: str, error: type[LLMProdError] = DataError) -> None:
    """Raises an error, with the table's name and its columns, if it lacks one of `columns` or has one twice."""
    having = list(frame.columns)
    if missing := [column for column in columns if column not in having]:
        raise error(f"{name}: no column {', '.join(missing)}; it has {shown(', '.join(map(str, having)), 200)}.")
    if twice := next((column for column in columns if having.count(column) > 1), None):
        raise error(f"{name}: {having.count(twice)} columns are called {twice}; rename all but one.")


def texts(values: pd.Series, name: str) -> pd.Series:
    """A column as texts without white space at their ends; missing where there is nothing else.

    A whole number is written without a point (7.0 is "7"), since a column of ids in which some are missing has one.
    Raises DataError, with the column's name and the row (from 1), for lists, objects and bytes.
    """
    if isinstance(values.dtype, pd.StringDtype):
        return (stripped := values.str.strip()).mask(stripped == "")
    found = []
    for row, value in enumerate(values, 1):
        if isinstance(value, str):
            found.append(value.strip() or None)
        elif isinstance(value, bytes) or not pd.api.types.is_scalar(value):
            raise DataError(
                f"{name}, row {row}: {shown(value)} is {type(value).__name__}, and no text or number; write one text."
            )
        elif pd.isna(value):
            found.append(None)
        else:
            whole = isinstance(value, (float, np.floating)) and float(value).is_integer()
            found.append(str(int(value) if whole else value))
    return pd.Series(found, values.index, dtype=object, name=values.name)


def numbers(values: Iterable[object], name: str) -> pd.Series:
    """A column as numbers, NaN where there is none. Raises DataError with its name, the row (from 1) and the value."""
    found = []
    for row, value in enumerate(values, 1):
        try:
            found.append(np.nan if is_missing(value) else float(str(value).replace("_", "?")))  # 1_0 is 10 to Python
        except ValueError:
            found.append(np.inf)
        if np.isinf(found[-1]):
            raise DataError(f"{name}, row {row}: '{shown(value)}' is not a number.")
    return pd.Series(found, dtype=float)


def is_missing(value: object) -> bool:
    """Whether a time or a number is missing: None, NaN, NaT, or a text that says so."""
    if isinstance(value, str):
        return value.strip().lower() in MISSING
    return value is None or bool(pd.api.types.is_scalar(value) and pd.isna(value))


# Times


def moment(value: object, now: float | None = None) -> tuple[str, datetime | None]:
    """The kind of a time and the time itself in UTC; ("missing", None) where there is none.

    Seconds or milliseconds since 1970 (a number, or its digits), ISO 8601, RFC 822, a datetime, a datetime64, or one
    of these as {"$date": …}. A time without a zone is UTC.

    Args:
        now: the seconds since 1970 up to a day after which a time can be; by default the clock's

    Raises DataError for anything else, for years before 1990, and for what lies more than a day ahead.
    """
    for key in ("$date", "$numberLong"):  # MongoDB's Extended JSON
        value = value[key] if isinstance(value, dict) and list(value) == [key] else value
    if is_missing(value):
        return "missing", None
    try:
        kind, found = read_time(value)
        found = found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, TypeError, OverflowError, OSError) as error:
        slashes = " (is the day first, or the month?)" if re.search(r"\d/\d", str(value)) else ""
        raise DataError(
            f"'{shown(value)}' can't be read as a time{slashes}; "
            "use seconds or milliseconds since 1970, or 2024-12-31T23:59."
        ) from error
    latest = (datetime.now(UTC) if now is None else datetime.fromtimestamp(now, UTC)) + timedelta(days=1)
    if not EARLIEST <= found <= latest:
        raise DataError(
            f"'{shown(value)}', read as {kind}, is the time {found:%Y-%m-%d %H:%M}; "
            f"times lie between {EARLIEST.year} and tomorrow."
        )
    return kind, found


def read_time(value: object) -> tuple[str, datetime]:
    """The kind of a time, and the time, which has no zone where `value` names none. Raises ValueError or its like."""
    if isinstance(value, (np.datetime64, pd.Timestamp)):
        value = pd.Timestamp(value).to_pydatetime(warn=False)
    if isinstance(value, date):  # a datetime is one
        return "a date", value if isinstance(value, datetime) else datetime(value.year, value.month, value.day)
    if isinstance(value, str):
        text = value.strip().removesuffix(" UTC")
        if DIGITS.fullmatch(text):
            value = float(text)
        elif RFC_822.fullmatch(text):
            return "RFC 822", parsedate_to_datetime(text)
        else:
            return "ISO 8601", datetime.fromisoformat(re.sub(r"(?<!\s)\s+(?=[+-]\d\d)", "", text))
    if isinstance(value, bool) or not isinstance(value, Number):
        raise TypeError(f"{type(value).__name__} is not a time")
    kind, unit = ("seconds", 1) if abs(value) < 1e11 else ("milliseconds", 1000)
    return kind, datetime.fromtimestamp(float(value) / unit, UTC)


def times(values: Iterable[object], name: str = "time") -> pd.Series:
    """The times of a column as UTC timestamps (datetime64[us, UTC]); what is missing stays missing (NaT).

    Raises DataError, naming the column, the first bad value and its row (from 1), for what `moment` can't read and for
    a time of another kind than those before it (milliseconds after seconds, say).
    """
    index = values.index if isinstance(values, pd.Series) else None
    found, first = [], ""
    for row, value in enumerate(values, 1):
        try:
            kind, time = moment(value)
        except DataError as error:
            raise DataError(f"{name}, row {row}: {error}") from error
        if time is not None and kind != (first := first or kind):
            raise DataError(f"{name}, row {row}: '{shown(value)}' is a time as {kind}, those before it as {first}.")
        found.append(time)
    return pd.Series(found, index, dtype="datetime64[us, UTC]", name="time")
