"""The desk's data: questions with their intents, the best answer of each intent, help articles, past dialogues."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import yaml

from llmprod import LLMProdError, artifacts, data, formats, tables
from llmprod.extras import extra

with extra("support"):
    from bs4 import BeautifulSoup

HERE = Path(__file__).parent  # with the data sets that this repository brings, in English and in Chinese
OWN = {"support-desk": HERE / "support_desk", "support-desk-zh": HERE / "support_desk_zh"}
OUT_OF_SCOPE = "out_of_scope"  # the class of questions that no intent covers
ARTICLES = (".md", ".txt", ".html", ".htm")
LARGEST = 1 << 20  # bytes of an article
MARKED = re.compile(r"\[([^\[\]]+)\]\((\w+)\)")  # [12 May](date)
SENTENCE_END = re.compile(r'(?<=[.!?])["”’)]*\s+(?=["“(]?[A-Z0-9])|(?<=[。！？])(?![。！？”’」』）])')


class SupportError(LLMProdError):
    """A table of questions, a folder of articles or an assistant can't be used as it is."""


@dataclass(frozen=True)
class Passage:
    """A paragraph of an article; `id` is the article's name and the paragraph's number."""

    id: str
    title: str
    text: str

    @property
    def article(self) -> str:
        """The name of the article."""
        return self.id.partition("#")[0]

    @property
    def indexed(self) -> str:
        """The text that retrieval reads: a paragraph means little without its title."""
        return f"{self.title}: {self.text}"

    def sentences(self) -> list[str]:
        """The sentences of the paragraph."""
        return [part.strip() for part in SENTENCE_END.split(self.text) if part.strip()]


@dataclass
class Desk:
    """What an assistant learns from.

    `questions` has the columns text, intents (a list; empty: out of scope), split, and slots (a list of start, end,
    name); `searches` has text, passage (an id, "" where no article answers), quote (the sentences that do) and split.
    """

    questions: pd.DataFrame
    answers: dict[str, str] = field(default_factory=dict)  # intent -> the best answer, with {slots}
    slots: dict[str, dict[str, str]] = field(default_factory=dict)  # name -> pattern, and how to ask for it
    passages: list[Passage] = field(default_factory=list)
    dialogues: list[dict] = field(default_factory=list)
    searches: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["text", "passage", "quote", "split"]))

    @property
    def intents(self) -> list[str]:
        """The names of the intents, sorted."""
        return sorted({intent for some in self.questions["intents"] for intent in some})

    def sample(self, rows: int, seed: int = 0) -> "Desk":
        """The desk with at most so many searches and questions of each split, the latter to intents that are taught."""
        drawn, searches = (table.sample(frac=1, random_state=seed) for table in (self.questions, self.searches))
        taught = set(drawn[drawn["split"] == "train"].head(rows)["intents"].explode())
        drawn = drawn[(drawn["split"] == "train") | drawn["intents"].map(lambda some: set(some) <= taught)]
        first = [table.groupby("split").head(rows).sort_index().reset_index(drop=True) for table in (drawn, searches)]
        return replace(self, questions=first[0], searches=first[1])

    def answerable(self, split: str) -> pd.DataFrame:
        """The searches of a split that an article answers."""
        return self.searches[(self.searches["split"] == split) & (self.searches["passage"] != "")]

    def part(self, split: str) -> pd.DataFrame:
        """The questions of a split."""
        return self.questions[self.questions["split"] == split].reset_index(drop=True)


def load(
    dataset: str = "support-desk",
    articles: str = "",
    dialogues: str = "",
    intent_column: str = "intent",
    answer_column: str = "answer",
    seed: int = 0,
    encoding: str = "utf-8",
) -> Desk:
    """The desk of a data set: one of OWN, a registered table of labelled questions, or a file of one's own.

    A file (see `formats.read`) has the columns `text`, `intent_column` (several intents apart by |; empty:
    out of scope) and, if there is one, `answer_column`; its best answer to an intent is the most frequent one.
    `articles` is a folder of help articles, `dialogues` a .jsonl file of past ones (see `pairs_of`); `encoding` is that
    of the two files.

    Raises SupportError or DataError for what can't be used.
    """
    if dataset in OWN:
        desk = support_desk(OWN[dataset])
    elif dataset in artifacts.registry():
        table, _ = data.clean(data.load_artifact(dataset))
        table = data.split(data.drop_duplicates(table)[0], seed=seed)
        desk = Desk(unmarked(table["text"], [[label] for label in table["label"]], table["split"]))
    else:
        desk = own_table(dataset, intent_column, answer_column, seed, encoding)
    if articles:
        desk.passages = read_articles(Path(os.path.expanduser(articles)))  # see `formats.read`
    if dialogues:
        desk.dialogues = read_dialogues(dialogues, encoding)
    return desk


def read_lines(path: Path) -> pd.DataFrame:
    """A file with a JSON object in each line."""
    return pd.DataFrame([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])


def support_desk(folder: Path) -> Desk:
    """A data set that this repository brings (its card: the folder's `README.md`)."""
    names = ("questions", "out_of_scope", "article_questions")
    asked, foreign, searches = (read_lines(folder / f"{name}.jsonl") for name in names)
    both = pd.concat([asked, foreign.assign(intents=[[]] * len(foreign))], ignore_index=True)
    questions = unmarked(both["text"], both["intents"], both["split"]).assign(about=both["about"].fillna("intents"))
    passages = read_articles(folder / "articles")
    of_article = {}
    for passage in passages:
        of_article.setdefault(passage.article, []).append(passage)
    searches["passage"] = [
        next((p.id for p in of_article[article] if quote in p.text), "") if quote else ""
        for article, quote in zip(searches["article"], searches["quote"], strict=True)
    ]
    settings = yaml.safe_load((folder / "answers.yaml").read_text(encoding="utf-8"))
    dialogues = read_lines(folder / "dialogues.jsonl").query("split == 'train'").to_dict("records")
    return Desk(questions, settings["answers"], settings["slots"], passages, dialogues, searches)


def own_table(path: str, intent_column: str, answer_column: str, seed: int, encoding: str) -> Desk:
    """A file of questions, split by `data.split` unless it has a column `split`.

    Raises SupportError for fewer than two intents or such that look the same, and for splits that can't be used.
    """
    table = formats.read(path, encoding)
    tables.require(table, ["text", intent_column], path, SupportError)
    for column in {"text", intent_column, answer_column, "split"} & set(table):
        table[column] = tables.texts(table[column], f"{path}, column {column}").fillna("")
    table["text"] = table["text"].map(data.normalise)
    table = table[table["text"] != ""].copy()  # its index still counts the file's rows
    intents = [names_in(value.split("|")) for value in table[intent_column]]
    known = sorted({name for some in intents for name in some})
    if len(known) < 2:
        raise SupportError(f"{path}: {len(known)} intent(s); a classifier needs at least two.")
    try:
        data.check_look(["", *known])
        if "split" in table:
            check_splits(table["split"], intents)
        else:
            labels = [(some or [OUT_OF_SCOPE])[0] for some in intents]
            rows = pd.DataFrame({"text": table.index, "label": labels, "split": "train"})
            table["split"] = data.split(rows, seed=seed).set_index("text")["split"].reindex(table.index)
    except LLMProdError as error:
        words = re.sub(r"use \w+_share=.*", "add texts, or a column split.", str(error))  # no parameters here
        raise SupportError(f"{path}: {words}") from error
    answers = {}
    if answer_column in table:
        alone = [some[0] if len(some) == 1 else "" for some in intents]
        by = pd.DataFrame({"intent": alone, "answer": table[answer_column]}).query("intent != '' and answer != ''")
        answers = by.groupby("intent")["answer"].agg(lambda column: column.mode().iloc[0]).to_dict()
    return Desk(unmarked(table["text"], intents, table["split"]), answers)


def names_in(values: Iterable[str]) -> list[str]:
    """Names of intents, each once and in Unicode's NFC, without those that are empty."""
    return list(dict.fromkeys(name for value in values if (name := data.normalise(value))))


def check_splits(splits: pd.Series, intents: Iterable[list[str]]) -> None:
    """Checks a column `split` whose index counts the file's rows (from 0).

    Raises SupportError for a name that is none of data.SPLITS (with its row) and for a split without an intent,
    DataError for an intent that training lacks.
    """
    rows = pd.DataFrame({"split": splits, "label": list(intents)}).explode("label").dropna()
    others = splits[~splits.isin(data.SPLITS)].map(formats.shown)
    wrong = [f", row {row + 1}: {name!r} is no split" for row, name in others.items()]
    wrong += [f": no question with an intent is {name}" for name in data.SPLITS if name not in set(rows["split"])]
    if wrong:
        raise SupportError(f"column split{wrong[0]}; write {', '.join(data.SPLITS)}, some of each, or no such column.")
    data.check_labels(rows)


def searchable(desk: Desk) -> Desk:
    """The desk, with its best answers as further passages where no question to its articles is known.

    Retrieval is then trained and judged on questions and their best answers. Raises SupportError where there are none.
    """
    if len(desk.searches):
        return desk
    if not desk.answers:
        raise SupportError("There is nothing to reply with: the questions need a column of answers (answer_column).")
    passages = [Passage(f"best-answer-{name}#1", name.replace("_", " "), text) for name, text in desk.answers.items()]
    asked = desk.questions[[len(some) == 1 and some[0] in desk.answers for some in desk.questions["intents"]]]
    intents = asked["intents"].str[0]
    searches = asked[["text", "split"]].assign(
        passage=[f"best-answer-{name}#1" for name in intents], quote=intents.map(desk.answers)
    )
    return replace(desk, passages=[*desk.passages, *passages], searches=searches.reset_index(drop=True))


def unmarked(texts: Iterable[str], intents: Iterable[list[str]], splits: Iterable[str]) -> pd.DataFrame:
    """Questions with the marks of their slots, `[12 May](date)`, taken out of the text and into a column."""
    rows = []
    for marked, some, split in zip(texts, intents, splits, strict=True):
        text, slots, end = "", [], 0
        for found in MARKED.finditer(marked):
            text += marked[end : found.start()]
            slots.append((len(text), len(text) + len(found[1]), found[2]))
            text, end = text + found[1], found.end()
        rows.append({"text": text + marked[end:], "intents": list(some), "split": split, "slots": slots})
    return pd.DataFrame(rows)


def read_articles(folder: Path) -> list[Passage]:
    """The passages of the articles in a folder (.md, .txt, .html), in the order of their names.

    An article's title is its first line. Raises SupportError for a folder without articles, for two of one name, and
    for an article that is empty, not UTF-8, or larger than 1 MiB.
    """
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in ARTICLES and path.is_file())
    if not files:
        raise SupportError(f"{folder}: there are no articles ({', '.join(ARTICLES)}) in this folder.")
    passages, named = [], {}
    for path in files:
        if (other := named.setdefault(path.stem, path)) != path:
            raise SupportError(f"{path}: {other.name} is an article of the same name; rename one, or join them.")
        if path.stat().st_size > LARGEST:
            raise SupportError(f"{path}: {path.stat().st_size / 1e6:.1f} MB; split articles above {LARGEST >> 20} MiB.")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise SupportError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error
        if path.suffix.lower().startswith(".htm"):
            page = BeautifulSoup(text, "html.parser")
            for hidden in page(["script", "style", "template"]):
                hidden.decompose()
            text = page.get_text("\n\n")
        found = to_passages(path.stem, text)
        if not found:
            raise SupportError(f"{path}: there is no text in this article.")
        passages += found
    return passages


def to_passages(name: str, text: str) -> list[Passage]:
    """An article cut at its empty lines; the first line is the title, and the text where there is no other."""
    parts = [data.normalise(part.lstrip("# ")) for part in re.split(r"\n\s*\n", text.strip())]
    parts = [part for part in parts if part]
    title, body = (parts[0], parts[1:] or parts) if parts else ("", [])
    return [Passage(f"{name}#{number}", title, part) for number, part in enumerate(body, 1)]


# Past dialogues


def read_dialogues(path: str, encoding: str = "utf-8") -> list[dict]:
    """The dialogues in a .jsonl file, each turn's `about` as a list of names.

    Raises SupportError, with the row (from 1) and the turn, where one is not as `pairs_of` needs it.
    """
    table = formats.read(path, encoding)
    tables.require(table, ["turns"], path, SupportError)
    dialogues = table.to_dict("records")
    for row, dialogue in enumerate(dialogues, 1):
        if not isinstance(dialogue["turns"], list):
            raise SupportError(
                f"{path}, row {row}: turns is {formats.shown(dialogue['turns'])!r} and no list; write one in a .jsonl "
                'file, as {"turns": [{"speaker": "customer", "text": "Hello"}]}.'
            )
        turns = enumerate(dialogue["turns"], 1)
        dialogue["turns"] = [checked_turn(turn, f"{path}, row {row}, turn {number}") for number, turn in turns]
    return dialogues


def checked_turn(turn: object, where: str) -> dict:
    """A dialogue's turn, its `about` as a list of names. Raises SupportError that says `where` it is wrong."""
    if not isinstance(turn, dict):
        raise SupportError(f"{where}: {formats.shown(turn)!r} is no object with speaker and text.")
    for name in ("speaker", "text"):
        if not isinstance(turn.get(name), str):
            raise SupportError(f"{where}: {name} is {formats.shown(turn.get(name))!r}; it has to be a text.")
    about = turn.get("about")
    names = [about] if isinstance(about, str | None) else about
    if not (isinstance(names, list) and all(isinstance(name, str | None) for name in names)):
        raise SupportError(f"{where}: about is {formats.shown(about)!r}; it has to be a name of an intent, or a list.")
    return turn | {"about": names_in(name for name in names if name)}


def pairs_of(dialogues: Iterable[Mapping], mask: object) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Supervised pairs from dialogues: what the customer wrote last, with its context, and what a person answered.

    A dialogue has `turns` with `speaker` (customer, agent, or else) and `text`. Several messages in a row are one
    question; `mask` takes personal data out; equal questions keep their most frequent answer.

    Returns the pairs (question, context, answer, based_on, times), and a card: how many turns were left out, and why.
    """
    rows, left_out = [], {"answered by a bot": 0, "no question before": 0, "no answer after": 0}
    for dialogue in dialogues:
        context, waiting, answered = [], [], False
        for turn in dialogue["turns"]:
            text = mask(data.normalise(turn["text"]))
            if turn["speaker"] == "customer":
                waiting = [*waiting, text] if not answered else [text]
                answered = False
                continue
            if turn["speaker"] != "agent":
                left_out["answered by a bot"] += 1
            elif not waiting or answered:
                left_out["no question before"] += 1
            else:
                based_on = [name for name in turn.get("about") or [] if name]
                question = " ".join(waiting)
                rows.append(
                    {"question": question, "context": " ".join(context[-4:]), "answer": text, "based_on": based_on}
                )
            if turn["speaker"] == "agent":
                context, answered = [*context, *waiting, text], True
        left_out["no answer after"] += bool(waiting) and not answered
    found = pd.DataFrame(rows, columns=["question", "context", "answer", "based_on"])
    grouped = found.groupby([found["question"].str.casefold(), "context"], sort=False)
    pairs = grouped.agg(
        question=("question", "first"),
        answer=("answer", lambda column: column.mode().iloc[0]),
        based_on=("based_on", "first"),
        times=("answer", "size"),
    )
    pairs = pairs.reset_index("context").reset_index(drop=True)
    left_out["equal question"] = len(found) - len(pairs)
    return pairs, pd.DataFrame({"reason": left_out.keys(), "turns left out": left_out.values()})
