"""Labelled texts: loading by name or path, cleaning, duplicates, leaks, likely label errors, splitting, the data card.

A table of texts is a pandas frame with the columns `text`, `label` and `split` (train, validation or test). Whatever
is removed from it is counted in a record, by reason and split.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, disable_progress_bars, load_from_disk
from tqdm.auto import tqdm

from llmprod import LLMProdError, artifacts, files

READERS = {".csv": pd.read_csv, ".tsv": pd.read_csv, ".jsonl": pd.read_json, ".parquet": pd.read_parquet}
SPLITS = ("train", "validation", "test")


class DataError(LLMProdError):
    """A data set can't be used as it is."""


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
    """All texts of a data set, unchanged, with the columns `text`, `label` and `split`.

    Args:
        dataset: an artifact's name (`reuters-r8`), a file (.csv, .tsv, .jsonl, .parquet), or a folder that
            `datasets` saved; a single file is the training split until `split` cuts it
        text_column, label_column: the columns of a file or folder; artifacts know theirs
        id_column: a column whose values must be unique, if there is one
        validation_file, test_file: the other splits, if they are in files of their own
        encoding: of text files

    Raises DataError, with the file and the way out, for whatever can't be read.
    """
    if dataset in artifacts.registry():
        return load_artifact(dataset)
    path = Path(dataset).expanduser()
    if not path.exists():
        raise DataError(
            f"'{dataset}' is neither a file or folder nor a known artifact ({', '.join(tables())}). "
            f"Relative paths start at {Path.cwd()}."
        )
    if path.is_dir():
        frames = read_saved_dataset(path)
    else:
        files = {"train": path, "validation": validation_file, "test": test_file}
        frames = {split: read_table(Path(file).expanduser(), encoding) for split, file in files.items() if file}
    return join_splits(frames, text_column, label_column, id_column, str(dataset))


def tables() -> list[str]:
    """The artifacts that are labelled texts, and so can be given as `dataset=`."""
    return [name for name, item in artifacts.registry().items() if "table" in item]


def load_artifact(name: str) -> pd.DataFrame:
    """The texts of a registered data set, with its published splits."""
    table = artifacts.entry(name).get("table")
    if not table:
        raise DataError(f"The artifact '{name}' is not a table of labelled texts; these are: {', '.join(tables())}.")
    folder = artifacts.fetch(name)
    options = table.get("read_csv", {})
    frames = {s: pd.read_csv(folder / f, keep_default_na=False, **options) for s, f in table["splits"].items()}
    return join_splits(frames, table["columns"]["text"], table["columns"]["label"], "", name)


def read_table(path: Path, encoding: str) -> pd.DataFrame:
    """One file as a frame. Raises DataError for a missing file, an unknown ending, a broken encoding or structure."""
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: files of the kind '{path.suffix}' can't be read; use one of {', '.join(READERS)}.")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file. Relative paths start at {Path.cwd()}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty.")
    options = {
        ".csv": {"encoding": encoding, "keep_default_na": False},
        ".tsv": {"encoding": encoding, "keep_default_na": False, "sep": "\t"},
        ".jsonl": {"encoding": encoding, "lines": True, "dtype": False, "convert_dates": False},
        ".parquet": {},
    }[path.suffix.lower()]
    try:
        return READERS[path.suffix.lower()](path, **options)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not {error.encoding}. Save the file as UTF-8, or pass its own encoding, "
            "for example encoding='latin-1'."
        ) from error
    except (ValueError, OSError, LookupError) as error:  # pandas' and pyarrow's parser errors are ValueErrors
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"{path}: can't be read as {path.suffix.lower()[1:]} ({reason}).") from error


def read_saved_dataset(folder: Path) -> dict[str, pd.DataFrame]:
    """The splits of a folder that `datasets`' `save_to_disk` wrote, label numbers turned into their names."""
    try:
        saved = load_from_disk(str(folder))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise DataError(f"{folder}: is not a folder that datasets' save_to_disk wrote.") from error
    saved = saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    unknown = sorted(set(saved) - set(SPLITS))
    if unknown or "train" not in saved:
        raise DataError(
            f"{folder}: has the splits {', '.join(saved)}; needed is train, and may be validation and test."
        )
    frames = {}
    for split, part in saved.items():
        frames[split] = part.to_pandas()
        for column, feature in part.features.items():
            if isinstance(feature, ClassLabel):
                frames[split][column] = [feature.int2str(number) for number in part[column]]
    return frames


def require(frame: pd.DataFrame, columns: Sequence[str], name: str, error: type[LLMProdError] = DataError) -> None:
    """Raises an error, with the table's name and its columns, if it lacks one of `columns`."""
    if missing := [column for column in columns if column not in frame.columns]:
        raise error(f"{name}: no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}.")


def join_splits(
    frames: dict[str, pd.DataFrame], text_column: str, label_column: str, id_column: str, name: str
) -> pd.DataFrame:
    """The splits under one another, with the columns `text`, `label` and `split`."""
    parts = []
    for split, frame in frames.items():
        columns = [text_column, label_column, id_column] if id_column else [text_column, label_column]
        require(frame, columns, f"{name}, {split} split (set text_column, label_column, id_column)")
        part = pd.DataFrame({"text": frame[text_column], "label": frame[label_column]})
        part["id"] = frame[id_column] if id_column else np.arange(len(frame))
        parts.append(part.assign(split=split))
    joined = pd.concat(parts, ignore_index=True)
    if id_column:
        repeated = joined["id"][joined["id"].duplicated()].astype(str).unique()
        if len(repeated):
            raise DataError(
                f"{name}: {len(repeated)} values of the id column '{id_column}' occur more than once "
                f"({', '.join(repeated[:5])}). Make them unique, or leave id_column empty."
            )
    return joined[["text", "label", "split"]]


# Cleaning


def clean(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Normalises texts, makes labels strings, and drops rows without text or label.

    Returns the clean table and the record of what was removed. Raises DataError where nothing is left.
    """
    table = table.astype({"text": object, "label": object})
    lacks_label = table["label"].isna() | (table["label"].astype(str).str.strip() == "")
    table["text"] = ["" if pd.isna(text) else normalise(str(text)) for text in table["text"]]
    is_empty = table["text"] == ""
    table["label"] = table["label"].astype(str).str.strip()
    record = removals(table, [("no text", is_empty), ("no label", lacks_label & ~is_empty)])
    if (is_empty | lacks_label).all():
        raise DataError(f"None of the {len(table)} rows has both a text and a label. Is text_column the right one?")
    return table[~is_empty & ~lacks_label].reset_index(drop=True), record


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
    index, pairs = MinHashLSH(threshold=threshold, num_perm=64), []
    for b, minhash in enumerate(tqdm(hashes, desc="near duplicates", leave=False)):
        for a in sorted(index.query(minhash)):
            similarity = len(shingles[a] & shingles[b]) / len(shingles[a] | shingles[b])
            if similarity >= threshold:
                pairs.append((a, b, similarity))
        index.insert(b, minhash)
    return pd.DataFrame(pairs, columns=["a", "b", "similarity"])


def word_shingles(text: str, length: int = 5) -> set[str]:
    """The set of runs of `length` words in a text (a shorter text is one run)."""
    words = text.casefold().split()
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

    Raises DataError for a single class, no training rows, or test labels that training lacks.
    """
    from sklearn.model_selection import train_test_split

    table = table.reset_index(drop=True)

    def cut(rows: pd.Index, share: float | int) -> pd.Index:
        labels = table.loc[rows, "label"]
        many = rows[(labels.map(labels.value_counts()) > 1).to_numpy()]
        size = round(share * len(rows)) if share < 1 else int(share)
        if not table.loc[many, "label"].nunique() <= size <= len(many) - table.loc[many, "label"].nunique():
            raise DataError(
                f"A stratified subset of {size} of {len(many)} rows needs at least one row of each of the "
                f"{table.loc[many, 'label'].nunique()} classes on both sides. Give more data or another share."
            )
        return train_test_split(many, test_size=size, random_state=seed, stratify=table.loc[many, "label"])[1]

    check_labels(table)
    if not (table["split"] == "test").any():
        table.loc[cut(table.index[table["split"] == "train"], test_share), "split"] = "test"
    for name, rows in (("train", train_rows), ("test", test_rows)):
        having = table.index[table["split"] == name]
        if 0 < rows < len(having):
            table = table.drop(having.difference(cut(having, rows)))
    if not (table["split"] == "validation").any():
        table.loc[cut(table.index[table["split"] == "train"], validation_share), "split"] = "validation"
    check_labels(table)
    return table.reset_index(drop=True)


def check_labels(table: pd.DataFrame) -> None:
    """Raises DataError unless there are two classes in training and every held-out label is among them."""
    train = set(table.loc[table["split"] == "train", "label"])
    if len(train) < 2:
        raise DataError(
            f"Training needs at least two classes and has {len(train)}"
            + (f" ('{next(iter(train))}')" if train else " rows left after cleaning")
            + ". Is label_column the right one?"
        )
    for name in ("validation", "test"):
        unknown = sorted(set(table.loc[table["split"] == name, "label"]) - train)
        if unknown:
            raise DataError(
                f"The {name} split has labels that training lacks: {', '.join(unknown[:5])}. A model can't learn them: "
                "add training rows, or take those rows out."
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
