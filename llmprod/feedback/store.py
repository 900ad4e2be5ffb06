"""The store of answers, of what users say of them, and of reviews: SQLite by default, PostgreSQL by its address."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self

import pandas as pd

from llmprod import LLMProdError
from llmprod.extras import extra

with extra("serve"):
    import sqlalchemy as sql
    from sqlalchemy.dialects import postgresql, sqlite

VERDICTS = ("up", "down", "corrected")
WAIT = 30  # seconds that a writer waits for another one
UPSERT = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}

TABLES = sql.MetaData()
NAME = sql.String(255)
ANSWERS = sql.Table(
    "answers",
    TABLES,
    sql.Column("request", NAME, primary_key=True),
    sql.Column("time", sql.Float, nullable=False, index=True),
    sql.Column("source", NAME, nullable=False, default="classify"),
    sql.Column("bundle", NAME, nullable=False),
    sql.Column("text", sql.Text, nullable=False),
    sql.Column("label", sql.Text, nullable=False),
    sql.Column("confidence", sql.Float, nullable=False),
    sql.Column("shadow", sql.Text, nullable=False, default=""),
    sql.Column("user", NAME, nullable=False, default="", index=True),
)


def about_an_answer(name: str, who: str, *columns: sql.Column) -> sql.Table:
    """A table of what people say of answers: one row for each request and person, gone with the answer."""
    answer = sql.ForeignKey("answers.request", ondelete="CASCADE")
    keys = [sql.Column("request", NAME, answer, primary_key=True)]
    keys += [sql.Column(who, NAME, primary_key=True, index=True)] if who else []
    return sql.Table(name, TABLES, *keys, sql.Column("time", sql.Float, nullable=False), *columns)


FEEDBACK = about_an_answer(
    "feedback", "user", sql.Column("verdict", NAME, nullable=False), sql.Column("label", sql.Text, nullable=False)
)
QUEUE = about_an_answer("queue", "", sql.Column("reason", NAME, nullable=False))
REVIEWS = about_an_answer("reviews", "reviewer", sql.Column("label", sql.Text, nullable=False))


class FeedbackError(LLMProdError):
    """Something can't be stored, found or reviewed as it is."""


class StoreLost(FeedbackError, ConnectionError):
    """The database fails: the same may succeed later."""


class Store:
    """Answers, feedback, the review queue and reviews. What a method has stored survives a killed process.

    SQLite is in WAL mode with synchronous=FULL, so that a power cut takes nothing back either. A context manager.

    Args:
        url: "sqlite:///file" or "postgresql://user:password@host/database"
        mask: is applied to a text before it is stored, for example to take personal data out
        clock: seconds since 1970

    Raises FeedbackError, without any password, for an address that can't be read or reached.
    """

    def __init__(self, url: str, mask: Callable[[str], str] = str, clock: Callable[[], float] = time.time):
        self.mask, self.clock = mask, clock
        try:
            self.connect(sql.make_url(url))
        except (ValueError, sql.exc.ArgumentError):  # it names the address with its password
            raise FeedbackError(
                "The store's address can't be read: write sqlite:///file or postgresql://user:password@host/database."
            ) from None

    def connect(self, address: sql.URL) -> None:
        """Opens the database and makes the tables that it lacks."""
        kind = address.get_backend_name()
        if kind not in UPSERT:
            raise FeedbackError(f"A store is in SQLite or PostgreSQL, not in '{kind}'.")
        port = f":{address.port}" if address.port else ""
        self.place = f"{kind}://{address.host or ''}{port}/{address.database or ''}"
        if kind == "postgresql":
            address = address.set(drivername="postgresql+psycopg")
        waits = {"timeout": WAIT} if kind == "sqlite" else {"connect_timeout": WAIT}
        with extra("serve"):
            self.engine = sql.create_engine(address, pool_pre_ping=True, connect_args=waits, hide_parameters=True)
        if kind == "sqlite":
            sql.event.listen(self.engine, "connect", prepare_sqlite)
        self.upsert = UPSERT[kind]
        with self.begin() as connection:
            TABLES.create_all(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.dispose()

    @contextmanager
    def begin(self) -> Iterator[sql.Connection]:
        """A transaction. Raises StoreLost where the database fails, with the reason and without any password."""
        try:
            with self.engine.begin() as connection:
                yield connection
        except UnicodeEncodeError as error:  # half of a surrogate pair, as an argument of the command line can hold
            raise FeedbackError(f"{error.object!a} is not UTF-8, and so is in no store.") from None
        except sql.exc.DBAPIError as error:
            reason = (str(error.orig).strip() or type(error.orig).__name__).splitlines()[0]
            reason = reason.replace(self.engine.url.password or "\0", "***")
            raise StoreLost(f"The store {self.place} can't be used: {reason}") from None

    # Writing

    def add_answer(
        self, request: str, bundle: str, text: str, label: str, confidence: float, user: str = "", **more: object
    ) -> None:
        """Stores one answer; a request that is already there stays as it was.

        Args:
            more: `shadow`, the label that the shadow bundle gave; `source`: "classify", "answer" or "alert"
        """
        row = {"request": request, "bundle": bundle, "text": text, "label": label, "confidence": confidence}
        self.add_answers([row | {"user": user} | more])

    def add_answers(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Stores answers, with the arguments of `add_answer` as keys, in one transaction: all of them or none."""
        empty = {"user": "", "shadow": "", "source": "classify", "time": self.clock()}
        ready = [empty | {**row, "text": self.mask(row["text"])} for row in rows]
        if ready:
            with self.begin() as connection:
                connection.execute(self.upsert(ANSWERS).on_conflict_do_nothing(), ready)

    def add_feedback(self, request: str, user: str, verdict: str, label: str = "") -> bool:
        """Stores what a user says of an answer; a later statement of the same user replaces an earlier one.

        Args:
            verdict: "up", "down" or "corrected"
            label: the right one, with "corrected"

        Returns whether that was new. Raises FeedbackError for an unknown request, a correction without a label, and a
        correction of what the classifier did not answer: a reply or an alert has none of its labels.
        """
        if verdict not in VERDICTS:
            raise FeedbackError(f"The verdict is '{verdict}'; use {', '.join(VERDICTS)}.")
        if (verdict == "corrected") != bool(label.strip()):
            raise FeedbackError("A correction needs the right label, and only a correction has one.")
        of = "classify" if verdict == "corrected" else ""
        return self.say(FEEDBACK, {"request": request, "user": user}, {"verdict": verdict, "label": label}, of)

    def add_review(self, request: str, reviewer: str, label: str) -> bool:
        """Stores the label that a reviewer gives; returns whether it is new. Raises FeedbackError as `add_feedback`."""
        if not reviewer.strip() or not label.strip():
            raise FeedbackError("A review needs the reviewer's name and a label.")
        return self.say(REVIEWS, {"request": request, "reviewer": reviewer}, {"label": label})

    def say(self, table: sql.Table, key: dict[str, str], values: dict[str, str], source: str = "") -> bool:
        """Stores a row about an answer (of a source), in place of the one with its key; False if the same was there."""
        with self.begin() as connection:
            found = connection.scalar(sql.select(ANSWERS.c.source).where(ANSWERS.c.request == key["request"]))
            if found is None:
                raise FeedbackError(f"There is no answer with the request '{key['request']}'.")
            if source and found != source:
                raise FeedbackError(f"'{key['request']}' is of '{found}', and can't be corrected: say up or down.")
            same = [table.c[name] == value for name, value in (key | values).items()]
            if connection.scalar(sql.select(sql.exists().where(*same))):
                return False
            new = values | {"time": self.clock()}
            connection.execute(
                self.upsert(table).values(key | new).on_conflict_do_update(index_elements=list(key), set_=new)
            )
            return True

    def queue(self, reasons: Mapping[str, str]) -> None:
        """Puts requests into the review queue, each with its reason; one that is already there keeps its reason."""
        rows = [{"request": request, "reason": reason, "time": self.clock()} for request, reason in reasons.items()]
        if rows:
            with self.begin() as connection:
                connection.execute(self.upsert(QUEUE).on_conflict_do_nothing(), rows)

    # Reading

    def table(self, name: str, source: str = "") -> pd.DataFrame:
        """The rows of "answers", "feedback", "queue" or "reviews", the oldest first: all, or those of a source."""
        table = TABLES.tables[name]
        query = sql.select(table).order_by(table.c.time, *table.primary_key.columns)
        if source:
            query = query.where(table.c.request.in_(sql.select(ANSWERS.c.request).where(ANSWERS.c.source == source)))
        return self.frame(query)

    def frame(self, query: sql.Select) -> pd.DataFrame:
        """The rows that a query finds."""
        with self.begin() as connection:
            found = connection.execute(query)
            return pd.DataFrame(found.mappings().all(), columns=list(found.keys()))

    # One user's data, and old data

    def export_user(self, user: str) -> pd.DataFrame:
        """What the store holds of a user: the answers to them, and what they said of answers, with the texts."""
        said = sql.select(FEEDBACK.c.user, FEEDBACK.c.request, FEEDBACK.c.verdict, FEEDBACK.c.label.label("correction"))
        said = said.where(FEEDBACK.c.user == user).subquery()
        joined = sql.outerjoin(ANSWERS, said, ANSWERS.c.request == said.c.request)
        columns = [*ANSWERS.c, said.c.verdict, said.c.correction]
        of_user = (ANSWERS.c.user == user) | (said.c.user == user)
        return self.frame(sql.select(*columns).select_from(joined).where(of_user).order_by(ANSWERS.c.time))

    def delete_user(self, user: str) -> int:
        """Deletes the answers to a user, whatever was said of those, and what the user said of others.

        Returns how many answers and statements of the user are gone.
        """
        with self.begin() as connection:
            of_user = [sql.delete(table).where(table.c.user == user) for table in (FEEDBACK, ANSWERS)]
            return sum(connection.execute(statement).rowcount for statement in of_user)

    def delete_before(self, moment: float) -> int:
        """Deletes answers older than a moment (seconds since 1970) and all about them; returns how many answers."""
        with self.begin() as connection:
            return connection.execute(sql.delete(ANSWERS).where(ANSWERS.c.time < moment)).rowcount


def prepare_sqlite(connection: object, _: object) -> None:
    """Sets a new SQLite connection: write-ahead log, every commit on the disk, waiting writers, cascading deletes."""
    for setting in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={1000 * WAIT}", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}")
