"""Labelled texts: loading by name or path, cleaning, duplicates, leaks, likely label errors, splitting, the data card.

A table of texts is a pandas frame with the columns `text`, `label` and `split` (train, validation or test). Whatever
is removed from it is counted in a record, by reason and split.
"""

import math
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, disable_progress_bars, load_from_disk
from tqdm.auto import tqdm

from llmprod import artifacts, files, segment
from llmprod.formats import DataError, read, shown
from llmprod.tables import require, texts

SPLITS = ("train", "validation", "test")
INVISIBLE = re.compile(  # what Unicode lists as such outside of Cf: fillers, joiners, variation selectors
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)


# Loading


def load(
    dataset: str,
    text_column: str = "text",
    label_column: str = "label",
    id_column: str = "",
    validation_file: str = "",
    test_file: str = "",
    encoding: str = "utf-8",
) -> pd.DataFrame:
    """All texts of a data set, with the columns `text`, `label` and `split`.

    Args:
        dataset: an artifact's name (`reuters-r8`), a file (see `formats.read`), or a folder that `datasets` saved; a
            single file is the training split until `split` cuts it
        text_column, label_column: the columns of a file or folder; artifacts know theirs
        id_column: a column whose values must be unique, if there is one
        validation_file, test_file: these splits, in files of their own; they replace those of an artifact or folder
        encoding: of text files

    Raises DataError, with the file and the way out, for whatever can't be read.
    """
    columns = (text_column, label_column, id_column)
    if dataset in artifacts.registry():
        frames, columns, id_column = read_artifact(dataset), (*columns[:2], ""), ""
    elif os.path.isdir(path := os.path.expanduser(dataset)):
        frames = named(read_saved_dataset(Path(path)), columns, dataset)
    elif os.path.exists(path):
        frames = named({"train": read(path, encoding)}, columns, dataset)
    else:
        raise DataError(
            f"'{shown(dataset, 200)}' is neither a file or folder nor a known artifact ({', '.join(tables())}). "
            f"Relative paths start at {Path.cwd()}."
        )
    for split, file in (("validation", validation_file), ("test", test_file)):
        if file:
            if not len(rows := read(file, encoding)):
                raise DataError(f"{file}: has no rows for the {split} split; add some, or leave {split}_file empty.")
            frames |= named({split: rows}, columns, file)
    return join_splits(frames, dataset, id_column)


def tables() -> list[str]:
    """The artifacts that are labelled texts, and so can be given as `dataset=`."""
    return [name for name, item in artifacts.registry().items() if "table" in item]


def load_artifact(name: str) -> pd.DataFrame:
    """The texts of a registered data set, with its published splits."""
    return join_splits(read_artifact(name), name)


def read_artifact(name: str) -> dict[str, pd.DataFrame]:
    """The splits of a registered data set, with the columns `text` and `label`."""
    table = artifacts.entry(name).get("table")
    if not table:
        raise DataError(f"The artifact '{name}' is not a table of labelled texts; these are: {', '.join(tables())}.")
    folder = artifacts.fetch(name)
    options = {"keep_default_na": False} | table.get("read_csv", {})
    frames = {split: pd.read_csv(folder / file, **options) for split, file in table["splits"].items()}
    return named(frames, (table["columns"]["text"], table["columns"]["label"], ""), name)


def read_saved_dataset(folder: Path) -> dict[str, pd.DataFrame]:
    """The splits of a folder that `datasets`' `save_to_disk` wrote; class numbers become names (-1: none)."""
    try:
        saved = load_from_disk(str(folder))
        saved = saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        frames = {split: part.to_pandas() for split, part in saved.items()}
        for split, part in saved.items():
            for column, feature in part.features.items():
                if isinstance(feature, ClassLabel):
                    names = {None: None, -1: None} | dict(enumerate(feature.names))
                    frames[split][column] = [names[number] for number in part[column]]
    except (ValueError, OSError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder}: is not a folder that datasets' save_to_disk wrote, or damaged ({shown(error)})."
        ) from error
    if not {"train"} <= set(saved) <= set(SPLITS):
        raise DataError(
            f"{folder}: has the splits {', '.join(saved)}; needed is train, and may be validation and test."
        )
    return frames


def named(frames: dict[str, pd.DataFrame], columns: tuple[str, str, str], name: str) -> dict[str, pd.DataFrame]:
    """Tables of a source with their columns (of text, label, id) called `text`, `label` and `id`, all of them texts."""
    if "" in columns[:2]:
        raise DataError(f"{name}: text_column and label_column are needed; set each to the name of a column.")
    chosen = {kind: column for kind, column in zip(("text", "label", "id"), columns, strict=True) if column != ""}
    found = {}
    for split, frame in frames.items():
        hint = "set " + ", ".join(f"{kind}_column" for kind in chosen)
        require(frame, list(chosen.values()), f"{name}, {split} split ({hint})")
        found[split] = pd.DataFrame({kind: texts(frame[c], f"{name}, column {c}") for kind, c in chosen.items()})
    return found


def join_splits(frames: dict[str, pd.DataFrame], name: str, id_column: str = "") -> pd.DataFrame:
    """The splits under one another, with the columns `text`, `label` and `split`."""
    joined = pd.concat([frame.assign(split=split) for split, frame in frames.items()], ignore_index=True)
    if id_column:
        repeated = joined["id"][joined["id"].duplicated()].astype(str).unique()
        if len(repeated):
            raise DataError(
                f"{name}: {len(repeated)} values of the id column '{id_column}' occur more than once "
                f"({', '.join(map(shown, repeated[:5]))}). Make them unique, or leave id_column empty."
            )
    return joined[["text", "label", "split"]]


# Cleaning


def clean(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Normalises texts and labels, and drops rows without text or label.

    Returns the clean table and the record of what was removed. Raises DataError where nothing is left, and where two
    labels look the same.
    """
    table = table.astype({"text": object, "label": object})
    table["text"] = ["" if pd.isna(text) else normalise(str(text)) for text in table["text"]]
    table["label"] = [
        "" if pd.isna(label) else unicodedata.normalize("NFC", str(label)).strip() for label in table["label"]
    ]
    is_empty, lacks_label = table["text"] == "", table["label"] == ""
    check_look(table["label"].unique())
    record = removals(table, [("no text", is_empty), ("no label", lacks_label & ~is_empty)])
    if (is_empty | lacks_label).all():
        raise DataError(f"None of the {len(table)} rows has both a text and a label. Is text_column the right one?")
    return table[~is_empty & ~lacks_label].reset_index(drop=True), record


def check_look(labels: Iterable[str]) -> None:
    """Raises DataError where labels differ in nothing but white space and characters that can't be seen.

    Not by Unicode's NFKC: m² and m2, which are the same to it, can be told apart.
    """
    seen = {}
    for label in labels:
        look = "".join(c for c in label if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf"))
        look = " ".join(INVISIBLE.sub("", look).split())
        if (other := seen.setdefault(look, label)) != label:
            raise DataError(
                f"The labels {other!a} and {label!a} differ in characters that can't be seen, or in spaces alone, and "
                "so would be two classes. Write both the same."
            )


def normalise(text: str) -> str:
    """Unicode NFC, control characters and runs of white space turned into single spaces."""
    text = unicodedata.normalize("NFC", text)
    return " ".join("".join(c if unicodedata.category(c) != "Cc" else " " for c in text).split())


def removals(table: pd.DataFrame, masks: list[tuple[str, pd.Series]]) -> pd.DataFrame:
    """The record: one row for each reason and split, with the number of rows that the mask removes."""
    return pd.DataFrame(
        [
            {"reason": reason, "split": split, "rows removed": int(mask[table["split"] == split].sum())}
            for reason, mask in masks
            for split in table["split"].unique()
        ]
    )


def drop_duplicates(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Removes repeats, contradictory labels and leaks from training; validation and test stay as published.

    Returns the table without these rows and the record of what was removed.
    """
    key = table["text"].str.casefold()
    train, held_out = table["split"] == "train", table["split"] != "train"
    leak = train & key.isin(key[held_out])
    labels_of_text = table[train].groupby(key[train])["label"].nunique()
    contradiction = train & ~leak & key.isin(labels_of_text.index[labels_of_text > 1])
    repeat = train & ~leak & ~contradiction & table.assign(key=key).duplicated(["key", "split"])
    record = removals(
        table,
        [("also in validation or test", leak), ("same text, other label", contradiction), ("exact repeat", repeat)],
    )
    return table[~(leak | contradiction | repeat)].reset_index(drop=True), record[record["split"] == "train"]


def near_duplicates(texts: Iterable[str], threshold: float = 0.8, seed: int = 0) -> pd.DataFrame:
    """Pairs of texts that share most of their word 5-grams.

    Candidates come from MinHash with locality-sensitive hashing (Broder 1997; library `datasketch`) and are then
    compared exactly, so that the result holds no false pair; a few true ones near the threshold can be missed.

    Returns a frame of pairs: positions `a` < `b` and their Jaccard `similarity` of at least `threshold`.
    """
    from datasketch import MinHash, MinHashLSH

    shingles = [word_shingles(text) for text in texts]
    hashes = MinHash.bulk([[s.encode() for s in shingle] for shingle in shingles], num_perm=64, seed=seed + 1)
    index, pairs = MinHashLSH(threshold=min(threshold, 0.96), num_perm=64), []  # it knows none above
    for b, minhash in enumerate(tqdm(hashes, desc="near duplicates", leave=False)):
        for a in sorted(index.query(minhash)):
            similarity = len(shingles[a] & shingles[b]) / len(shingles[a] | shingles[b])
            if similarity >= threshold:
                pairs.append((a, b, similarity))
        index.insert(b, minhash)
    return pd.DataFrame(pairs, columns=["a", "b", "similarity"])


def word_shingles(text: str, length: int = 5) -> set[str]:
    """The set of runs of `length` words in a text (a shorter text is one run)."""
    words = segment.words(text.casefold())
    return {" ".join(words[i : i + length]) for i in range(max(1, len(words) - length + 1))}


# Splitting


def split(
    table: pd.DataFrame,
    validation_share: float = 0.1,
    test_share: float = 0.2,
    train_rows: int = 0,
    test_rows: int = 0,
    seed: int = 0,
) -> pd.DataFrame:
    """Adds the splits that the table lacks, stratified by label, and checks the labels (`check_labels`).

    A test split is cut from training only where there is none; then `train_rows` and `test_rows` above 0 keep a
    stratified subset; then a validation split is cut from training where there is none. A class with a single
    training text keeps it in training.

    Raises DataError for a single class, a class for each text, no training rows, test labels that training lacks, or a
    share or number that can't be stratified, with the values that can.
    """
    from sklearn.model_selection import train_test_split

    table = table.reset_index(drop=True)

    def cut(name: str, wanted: float, rows: pd.Index) -> pd.Index:
        """Some of the rows: a share of them or a number, as the parameter of this name says."""
        labels, is_share = table.loc[rows, "label"], name.endswith("share")
        if is_share and not 0 < wanted < 1:
            raise DataError(f"{name} is {wanted}; it is a share, above 0 and below 1, such as 0.2.")
        many = rows[(labels.map(labels.value_counts()) > 1).to_numpy()]
        counts, size = table.loc[many, "label"].value_counts(), round(wanted * len(rows)) if is_share else wanted
        classes, step = len(counts), 1000 / len(rows) if is_share else 1
        if not 0 < classes <= size <= len(many) - classes:
            sure = math.ceil(len(many) / counts.min()) if classes else 0  # of which the smallest class has its share
            least, most = math.ceil(sure * step), math.floor((len(many) - sure) * step)
            least, most = (least / 1000, most / 1000) if is_share else (least, most)
            way_out = f"use {name}={least} to {most}" if 0 < least <= most else "add texts of each class"
            raise DataError(
                f"{name}={wanted} is {size} of {len(rows)} texts, and each of the {classes} classes that have two "
                f"needs at least one on both sides: {way_out}."
            )
        return train_test_split(many, test_size=size, random_state=seed, stratify=table.loc[many, "label"])[1]

    check_labels(table)
    if table["label"].is_unique:
        raise DataError(f"Each of the {len(table)} texts has a label of its own. Is the column of labels right?")
    if not (table["split"] == "test").any():
        table.loc[cut("test_share", test_share, table.index[table["split"] == "train"]), "split"] = "test"
    for name, rows in (("train", train_rows), ("test", test_rows)):
        having = table.index[table["split"] == name]
        if 0 < rows < len(having):
            table = table.drop(having.difference(cut(f"{name}_rows", rows, having)))
    if not (table["split"] == "validation").any():
        rows = table.index[table["split"] == "train"]
        table.loc[cut("validation_share", validation_share, rows), "split"] = "validation"
    check_labels(table)
    return table.reset_index(drop=True)


def check_labels(table: pd.DataFrame) -> None:
    """Raises DataError unless there are two classes in training and every held-out label is among them."""
    train = set(table.loc[table["split"] == "train", "label"])
    if len(train) < 2:
        raise DataError(
            f"Training needs at least two classes and has {len(train)}"
            + (f" ('{shown(next(iter(train)))}')" if train else " rows left after cleaning")
            + ". Is the column of labels right?"
        )
    for name in ("validation", "test"):
        unknown = sorted(set(table.loc[table["split"] == name, "label"]) - train)
        if unknown:
            raise DataError(
                f"The {name} split has labels that training lacks: {', '.join(map(shown, unknown[:5]))}. "
                "A model can't learn them: add training rows, or take those rows out."
            )


# The prepared data


def save(table: pd.DataFrame, folder: Path, protocol: dict) -> None:
    """Writes the splits as a `datasets` folder with the protocol that made them, atomically."""
    disable_progress_bars()
    names = sorted(table["label"].unique())
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    parts = DatasetDict()
    for name in SPLITS:
        part = table[table["split"] == name]
        parts[name] = Dataset.from_dict(
            {"text": part["text"].tolist(), "label": [names.index(label) for label in part["label"]]}, features=features
        )
    with files.atomic(folder) as temporary:
        parts.save_to_disk(str(temporary))
        files.write_json(temporary / "protocol.json", protocol)


def prepared(folder: Path) -> tuple[DatasetDict, list[str], dict]:
    """Reads what `save` wrote: the splits with `text` and `label` (a class number), the class names, the protocol."""
    disable_progress_bars()
    splits = load_from_disk(str(folder))
    return splits, splits["train"].features["label"].names, files.read_json(folder / "protocol.json")
