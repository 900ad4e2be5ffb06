"""Labelled texts: real data, and twenty kinds of bad input, each with one clear error or a stated treatment."""

import json
import re
import unicodedata

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from llmprod import data

ROWS = pd.DataFrame(
    {"text": [f"text number {i} about {'money' if i % 2 else 'grain'}" for i in range(40)], "label": ["a", "b"] * 20}
)


def write(folder, name: str, content) -> str:
    """Writes a file and returns its path as a user would give it."""
    path = folder / name
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return str(path)


# Loading


def test_reuters_is_read_whole_with_its_published_split():
    table = data.load("reuters-r8")
    assert table["split"].value_counts().to_dict() == {"train": 5485, "test": 2189}
    assert table.loc[table["split"] == "test", "label"].value_counts()["earn"] == 1083
    assert table["text"][0].startswith("champion products ch approves stock split")


def test_banking_and_phrasebank_from_a_mirror(monkeypatch, tmp_path):
    """The readers of both, on files of their form (the real ones need the mirror or the network)."""
    from llmprod import artifacts

    (tmp_path / "train.csv").write_bytes(
        b'text,category\r\n"I lost my card, help",lost_card\r\nWhat is my PIN?,pin\r\n'
    )
    (tmp_path / "test.csv").write_bytes(b"text,category\r\nWhere is my card,lost_card\r\n")
    line = "Net sales of the Pöyry group rose, info@example.com said .@positive\nProfit fell .@negative\n"
    (tmp_path / "Sentences_50Agree.txt").write_bytes(line.encode("latin-1"))
    monkeypatch.setattr(artifacts, "fetch", lambda name: tmp_path)
    banking = data.load("banking77")
    assert banking["label"].tolist() == ["lost_card", "pin", "lost_card"]
    assert banking["text"][0] == "I lost my card, help"
    phrases = data.load("financial-phrasebank")
    assert phrases["label"].tolist() == ["positive", "negative"]
    assert phrases["text"][0] == "Net sales of the Pöyry group rose, info@example.com said ."


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_your_own_file(tmp_path, ending):
    path = tmp_path / f"mine.{ending}"
    mine = ROWS.rename(columns={"text": "body", "label": "topic"}).replace(
        {"a": "NA"}
    )  # a label that looks like "missing"
    writers = {
        "csv": lambda: mine.to_csv(path, index=False),
        "tsv": lambda: mine.to_csv(path, index=False, sep="\t"),
        "jsonl": lambda: mine.to_json(path, orient="records", lines=True),
        "parquet": lambda: mine.to_parquet(path),
    }
    writers[ending]()
    table = data.load(str(path), "body", "topic")
    assert table["text"].tolist() == ROWS["text"].tolist()
    assert set(table["label"]) == {"NA", "b"} and set(table["split"]) == {"train"}


def test_split_files_of_their_own(tmp_path):
    for name in ("train", "validation", "test"):
        ROWS.to_csv(tmp_path / f"{name}.csv", index=False)
    files = {f"{name}_file": str(tmp_path / f"{name}.csv") for name in ("validation", "test")}
    table = data.load(str(tmp_path / "train.csv"), **files)
    assert table["split"].value_counts().to_dict() == {"train": 40, "validation": 40, "test": 40}


def test_saved_datasets_folder_keeps_label_names(tmp_path):
    part = Dataset.from_pandas(ROWS).class_encode_column("label")
    DatasetDict(train=part, test=part.select(range(4))).save_to_disk(tmp_path / "saved")
    table = data.load(str(tmp_path / "saved"))
    assert table["split"].value_counts().to_dict() == {"train": 40, "test": 4}
    assert set(table["label"]) == {"a", "b"}


def test_class_numbers_that_are_missing_are_no_label(tmp_path):
    """-1 and None, as the hidden labels of a published test split; a number that no class has is an error."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    rows = {"text": list("uvwx"), "label": [0, 1, -1, None]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    table, record = data.clean(data.load(str(tmp_path / "saved")))
    assert table["label"].tolist() == ["a", "b"] and record["rows removed"].tolist() == [0, 2]
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(data.DataError, match="saved: is not a folder that datasets' save_to_disk wrote, or damaged"):
        data.load(str(tmp_path / "saved"))


@pytest.mark.parametrize("kind", ["artifact", "folder", "file"])
def test_a_test_file_is_the_test_split_whatever_the_data_set_is(tmp_path, kind):
    part = Dataset.from_pandas(ROWS)
    DatasetDict(train=part, test=part).save_to_disk(tmp_path / "folder")
    ROWS.to_csv(tmp_path / "file", index=False)
    (tmp_path / "file").rename(tmp_path / "file.csv")
    dataset = {"artifact": "reuters-r8", "folder": str(tmp_path / "folder"), "file": str(tmp_path / "file.csv")}[kind]
    mine = write(tmp_path, "mine.csv", "text,label\nmy own text,a\nanother,b\n")
    table = data.load(dataset, test_file=mine, validation_file=mine)
    for split in ("test", "validation"):
        assert table.loc[table["split"] == split, "text"].tolist() == ["my own text", "another"]
    assert (table["split"] == "train").sum() == (5485 if kind == "artifact" else 40)


def test_labels_are_texts_in_every_file(tmp_path):
    """Leading zeros, exponents, "NaN" and "None" are what they are; a canonically equal label is the same."""
    labels = ["0101", "1E2", "007", "07", "NaN", "None", "null", "e\u0301"]
    train = "text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels))
    test = "".join(json.dumps({"text": f"test {i}", "label": label}) + "\n" for i, label in enumerate(labels))
    table = data.load(write(tmp_path, "d.csv", train), test_file=write(tmp_path, "t.jsonl", test))
    assert table["label"].tolist() == labels * 2
    assert data.clean(table)[0]["label"].tolist() == [*labels[:-1], "\u00e9"] * 2


@pytest.mark.parametrize(("parameter", "value"), [("test_share", 20), ("test_share", 0.0), ("validation_share", 1)])
def test_a_share_is_a_share(parameter, value):
    with pytest.raises(data.DataError, match=f"{parameter} is {value}; it is a share, above 0 and below 1"):
        data.split(ROWS.assign(split="train"), **{parameter: value})


@given(st.lists(st.sampled_from("abcdef"), min_size=4, max_size=60), st.floats(0.01, 0.99))
def test_the_share_that_a_message_names_works(labels, share):
    table = pd.DataFrame({"text": [f"text {i}" for i in range(len(labels))], "label": labels, "split": "train"})
    table = table.assign(split=["train"] * len(labels))
    validation = table.groupby("label").head(1).assign(split="validation")
    table = pd.concat([table, validation], ignore_index=True)  # so that test alone is cut
    try:
        cut = data.split(table, test_share=share)
    except data.DataError as error:
        if found := re.search(r"use test_share=(\S+) to (\S+)\.", str(error)):
            for value in map(float, found.groups()):
                cut = data.split(table, test_share=value)
                assert set(cut["split"]) == {"train", "test", "validation"}
        else:
            assert "classes" in str(error) or "label" in str(error)
    else:
        assert set(cut["split"]) == {"train", "test", "validation"}


# Bad input: (what a user does, the files, the arguments, what the one error must say)

BAD = {
    "missing file": ({}, {"dataset": "{}/nowhere.csv"}, "neither a file or folder nor a known artifact"),
    "missing test file": ({"d.csv": "text,label\nx,y\n"}, {"test_file": "{}/t.csv"}, "t.csv: there is no such file"),
    "unknown ending": ({"d.xlsx": "x"}, {"dataset": "{}/d.xlsx"}, "files of the kind '.xlsx' can't be read"),
    "empty file": ({"d.csv": ""}, {}, "d.csv: the file is empty"),
    "wrong text column": ({"d.csv": "body,label\nx,y\n"}, {}, "set text_column.*no column text; it has body, label"),
    "wrong label column": ({"d.csv": "text,topic\nx,y\n"}, {}, "set .*label_column.*no column label"),
    "empty text column": ({"d.csv": "text,label\nx,y\n"}, {"text_column": ""}, "d.csv: text_column and .* are needed"),
    "test file without rows": (
        {"d.csv": "text,label\nx,y\n", "t.csv": "text,label\n"},
        {"test_file": "{}/t.csv"},
        "t.csv: has no rows for the test split; add some, or leave test_file empty",
    ),
    "wrong id column": ({"d.csv": "text,label\nx,y\n"}, {"id_column": "id"}, "set .*id_column.*no column id"),
    "broken encoding": (
        {"d.csv": b"text,label\ncaf\xe9,y\n"},
        {},
        "d.csv, line 2: byte 14 is not utf-8.*encoding=latin-1",
    ),
    "unknown encoding": (
        {"d.csv": "text,label\nx,y\n"},
        {"encoding": "klingon"},
        "d.csv: can't be read with encoding=klingon",
    ),
    "ragged CSV": ({"d.csv": "text,label\nx,y\na,b,c,d\n"}, {}, "d.csv, line 3: has 4 fields, and the header 2"),
    "unclosed quote": ({"d.csv": 'text,label\n"x,y\n'}, {}, "d.csv, line 2: the quotes of the row"),
    "broken JSON line": ({"d.jsonl": '{"text": "x"\n'}, {"dataset": "{}/d.jsonl"}, "d.jsonl, line 1: is not JSON"),
    "truncated Parquet": (
        {"d.parquet": b"PAR1 cut"},
        {"dataset": "{}/d.parquet"},
        "d.parquet: can't be read as parquet",
    ),
    "folder that datasets did not save": ({"x/y.txt": "z"}, {"dataset": "{}/x"}, "is not a folder that datasets"),
    "duplicate ids": (
        {"d.csv": "id,text,label\n7,x,y\n7,z,y\n"},
        {"id_column": "id"},
        "id column 'id' occur more than once .7",
    ),
    "model as data": ({}, {"dataset": "minilm"}, "'minilm' is not a table of labelled texts"),
    "only empty texts": ({"d.csv": "text,label\n ,y\n  ,z\n"}, {}, "None of the 2 rows has both a text and a label"),
    "one class only": ({"d.csv": "text,label\nx,y\nz,y\n"}, {}, "at least two classes and has 1 .'y'"),
    "labels in test that training lacks": (
        {
            "d.csv": "text,label\n" + "".join(f"t{i},{'ab'[i % 2]}\n" for i in range(40)),
            "t.csv": "text,label\nx,zebra\n",
        },
        {"test_file": "{}/t.csv"},
        "test split has labels that training lacks: zebra",
    ),
    "too few rows to stratify": (
        {"d.csv": "text,label\nw,a\nx,a\ny,b\nz,b\n"},
        {},
        "test_share=0.2 is 1 of 4 texts.*at least one on both sides: use test_share=0.5 to 0.5",
    ),
    "a class for each text": ({"d.csv": "text,label\nx,y\nz,w\n"}, {}, "Each of the 2 texts has a label of its own"),
    "labels that look the same": (
        {"d.csv": "text,label\nx,y\nz,y\u200b\n"},
        {},
        r"'y' and 'y\\u200b' differ in characters that can't be seen",
    ),
    "labels that are nested too deep": (
        {"d.jsonl": f'{{"text": "x", "label": {"[" * 100_000}{"]" * 100_000}}}\n'},
        {"dataset": "{}/d.jsonl"},
        "d.jsonl, line 1: is not JSON .maximum recursion depth",
    ),
    "labels that are lists": (
        {"d.jsonl": '{"text": "x", "label": "y"}\n{"text": "x", "label": ["y", "z"]}\n'},
        {"dataset": "{}/d.jsonl"},
        r"d.jsonl, column label, row 2: \['y', 'z'\] is list, and no text or number",
    ),
    "texts that are objects": (
        {"d.json": '[{"text": {"body": "x"}, "label": "y"}]'},
        {"dataset": "{}/d.json"},
        "d.json, column text, row 1: .* is dict",
    ),
    "a path that no system takes": ({}, {"dataset": "x" * 5000}, "neither a file or folder"),
    "the home of nobody": ({}, {"dataset": "~nobody-at-all/x.csv"}, "neither a file or folder"),
    "header without rows": ({"d.csv": "text,label\n"}, {}, "None of the 0 rows has both"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_gets_one_clear_error(tmp_path, kind):
    files, arguments, message = BAD[kind]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path, name, content)
    arguments = {k: v.format(tmp_path) for k, v in ({"dataset": "{}/d.csv"} | arguments).items()}
    with pytest.raises(data.DataError, match=message) as error:
        data.split(data.drop_duplicates(data.clean(data.load(**arguments))[0])[0])
    assert "Traceback" not in str(error.value) and len(str(error.value)) < 500


def test_twenty_kinds_of_bad_input_are_listed():
    assert len(BAD) >= 20


ALIKE = [
    "a b\u200b",
    "a\u00a0b",
    "a\u2009b",
    "a  b",
    "a\tb",
    "a\0 b",
    "a b\ufe0f",
    "a b\U000e0101",
    "a\u034f b",
    "a\u180b b",
]


@pytest.mark.parametrize("label", ALIKE)
def test_labels_that_look_the_same_are_named_whatever_can_not_be_seen(label):
    table = pd.DataFrame({"text": ["x", "y"], "label": ["a b", label], "split": "train"})
    with pytest.raises(data.DataError, match=re.escape(f"'a b' and {label!a} differ in characters that can't be seen")):
        data.clean(table)


def test_labels_that_can_be_told_apart_are_classes():
    data.check_look(["ab", "a b", "a-b", "m2", "m\u00b2", "\uff21", "A", "a", "e", "\u00e9", "\u2764", "\u2665", ""])


# Stated, recorded treatment


def test_rows_without_text_or_label_are_dropped_and_counted(tmp_path):
    rows = [
        {"text": "fine", "label": "a"},
        {"text": " \t", "label": "a"},
        {"text": None, "label": "b"},
        {"text": "x", "label": None},
    ]
    path = write(tmp_path, "d.jsonl", "\n".join(json.dumps(row) for row in rows))
    table, record = data.clean(data.load(path))
    assert table["text"].tolist() == ["fine"]
    assert dict(zip(record["reason"], record["rows removed"], strict=True)) == {"no text": 2, "no label": 1}


def test_duplicates_leave_training_only():
    rows = [
        ("same story", "a", "train"),
        ("Same story", "a", "train"),  # an exact repeat but for case
        ("leaked", "a", "train"),
        ("leaked", "a", "test"),
        ("two minds", "a", "train"),
        ("two minds", "b", "train"),
        ("twice in test", "b", "test"),
        ("twice in test", "b", "test"),
    ]
    table, record = data.drop_duplicates(pd.DataFrame(rows, columns=["text", "label", "split"]))
    assert table["text"].tolist() == ["same story", "leaked", "twice in test", "twice in test"]
    assert record["rows removed"].tolist() == [1, 2, 1]


def test_class_with_one_example_stays_in_training():
    table = pd.concat([ROWS, pd.DataFrame({"text": ["alone"], "label": ["rare"]})]).assign(split="train")
    for seed in range(5):
        cut = data.split(table, seed=seed)
        assert cut.loc[cut["label"] == "rare", "split"].tolist() == ["train"]


@given(seed=st.integers(0, 1000), validation=st.floats(0.1, 0.4), test=st.floats(0.1, 0.4))
def test_split_loses_nothing_and_is_stratified(seed, validation, test):
    table = ROWS.assign(split="train")
    cut = data.split(table, validation, test, seed=seed)
    assert sorted(cut["text"]) == sorted(table["text"])
    counts = pd.crosstab(cut["split"], cut["label"])
    assert set(counts.index) == {"train", "validation", "test"}
    assert (counts["a"] - counts["b"]).abs().max() <= 1
    pd.testing.assert_frame_equal(cut, data.split(table, validation, test, seed=seed))


def test_published_test_split_is_never_cut_again():
    table = data.load("reuters-r8")
    cut = data.split(table, seed=3)
    assert (cut["split"] == "test").sum() == 2189
    assert cut.loc[cut["split"] == "test", "text"].tolist() == table.loc[table["split"] == "test", "text"].tolist()


@given(st.text())
def test_normalise_is_idempotent_and_leaves_no_control_character(text):
    once = data.normalise(text)
    assert data.normalise(once) == once
    assert not [c for c in once if unicodedata.category(c) == "Cc"]
    assert "  " not in once and once == once.strip()


# Audit


def test_near_duplicates_finds_planted_ones_and_no_false_one():
    table = data.load("reuters-r8")
    texts = [t for t in table["text"] if 60 < len(t.split()) < 120][:150]
    edited = " ".join([*texts[10].split()[:-1], "zebra"])  # one word of some ninety changed: J is about 0.98
    halved = " ".join(texts[20].split()[: len(texts[20].split()) // 2])
    pairs = data.near_duplicates([*texts, edited, halved], threshold=0.8)
    found = {(a, b) for a, b in zip(pairs["a"], pairs["b"], strict=True)}
    assert (10, 150) in found and (20, 151) not in found
    for a, b, similarity in pairs.itertuples(index=False):
        one, two = (data.word_shingles([*texts, edited, halved][int(i)]) for i in (a, b))
        assert similarity == len(one & two) / len(one | two) >= 0.8


@pytest.mark.parametrize("threshold", [0.97, 1.0])
def test_near_duplicates_take_every_threshold(threshold):
    """LSH knows none above 0.96, with so many permutations."""
    texts = ["one two three four five six", "ONE two three four five six", "one two three four five seven"]
    assert data.near_duplicates(texts, threshold).to_numpy().tolist() == [[0, 1, 1]]


def test_prepared_data_comes_back_as_saved(tmp_path):
    cut = data.split(ROWS.assign(split="train"))
    data.save(cut, tmp_path / "splits", {"dataset": "mine"})
    splits, labels, protocol = data.prepared(tmp_path / "splits")
    assert labels == ["a", "b"] and protocol == {"dataset": "mine"}
    for name in data.SPLITS:
        part = cut[cut["split"] == name]
        assert list(splits[name]["text"]) == part["text"].tolist()
        assert [labels[k] for k in splits[name]["label"]] == part["label"].tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["splits"], "temporary folders were left"
