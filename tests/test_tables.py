"""Files of rows, and columns as texts, numbers and times: what is written comes back, and the rest is one message."""

import bz2
import csv
import gzip
import json
import lzma
import re
import zipfile
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprod import formats, tables
from llmprod.formats import DataError

ROWS = [["text", "label"], ["one, and", "01"], ['"two"', "1E2"], ["three\tfour", "NaN"], ["five", "null"]]


def written(path, content: str | bytes):
    """The path of a file with a content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows: list[list[str]]) -> str:
    """Rows as lines of JSON."""
    return "".join(json.dumps(dict(zip(rows[0], row, strict=True))) + "\n" for row in rows[1:])


def write_rows(path, rows: list[list[str]]) -> None:
    """Writes rows as the ending of a file says, with another library than the reader's."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    elif path.suffix == ".parquet":
        pd.DataFrame(rows[1:], columns=rows[0]).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps([dict(zip(rows[0], row, strict=True)) for row in rows[1:]]), encoding="utf-8")
    else:
        path.write_text(lines(rows), encoding="utf-8")


# Files


@pytest.mark.parametrize("ending", formats.ENDINGS)
@pytest.mark.parametrize("packed", ["", ".gz", ".bz2", ".xz", ".zip", "named otherwise"])
def test_what_is_written_comes_back(tmp_path, ending, packed):
    path = tmp_path / f"rows{ending}"
    write_rows(path, ROWS)
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "named otherwise": gzip.compress}
    if packed == ".zip":
        with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
            archive.write(path, f"folder/rows{ending}")
            archive.writestr("__MACOSX/._rows", "what a Mac adds")
        path = tmp_path / "rows.zip"
    elif packed:
        content = packers[packed](path.read_bytes())
        path = written(path.with_name(path.name + packed) if packed.startswith(".") else path, content)
    frame = formats.read(path)
    assert [list(frame.columns), *frame.to_numpy().tolist()] == ROWS


texts = st.text(st.characters(codec="utf-8"), max_size=12)


@given(
    rows=st.lists(st.tuples(texts, st.sampled_from(["a", "b", "01", '"', ","])), min_size=1, max_size=6),
    ending=st.sampled_from(formats.ENDINGS),
)
def test_any_text_comes_back_or_is_named(tmp_path_factory, rows, ending):
    """Only a text with a line break, where a row could end, may be refused, and only in CSV or TSV."""
    path = tmp_path_factory.getbasetemp() / f"any{ending}"
    table = [["text", "label"], *map(list, rows)]
    write_rows(path, table)
    try:
        frame = formats.read(path)
    except DataError as error:
        assert ending in (".csv", ".tsv") and re.search("holds whole rows", str(error))
        assert any(re.search(r"[\r\n]", text) for text, _ in rows)
    else:
        assert frame.to_numpy().tolist() == table[1:]


BEGINNINGS = [
    b"",
    b"text,label\n",
    b'text\tlabel\n"',
    b'{"text": ',
    b"\xef\xbb\xbf",
    b"PAR1",
    b"PK\x03\x04",
    b"\x1f\x8b",
]


@given(st.binary(max_size=80), st.sampled_from(BEGINNINGS), st.sampled_from(formats.ENDINGS))
def test_any_bytes_are_a_table_or_one_message(tmp_path_factory, content, start, ending):
    path = written(tmp_path_factory.getbasetemp() / f"bytes{ending}", start + content)
    try:
        frame = formats.read(path)
        for column in dict.fromkeys(frame.columns):
            if list(frame.columns).count(column) == 1:
                found = tables.texts(frame[column], "bytes")
                assert all(pd.isna(value) or isinstance(value, str) for value in found)
    except DataError as error:
        assert str(path) in str(error) or "bytes, row" in str(error)
        assert "\n" not in str(error) and len(str(error)) < 500


QUOTED = 'text\tlabel\n"a\tb"\tpos\n"say ""hi"""\tneg\nc\tneg\n'
PLAIN = 'text\tlabel\n"Great film\tpos\nplain\tneg\nit is 12"\tneg\n"Fine," he said\tpos\n'


def test_both_dialects_of_tsv(tmp_path):
    quoted = formats.read(written(tmp_path / "a.tsv", QUOTED))
    assert quoted["text"].tolist() == ["a\tb", 'say "hi"', "c"]
    plain = formats.read(written(tmp_path / "b.tsv", PLAIN))
    assert plain["text"].tolist() == ['"Great film', "plain", 'it is 12"', '"Fine," he said']
    assert plain["label"].tolist() == ["pos", "neg", "neg", "pos"]
    swallowing = (
        'text\tlabel\n"Great film\tpos\nplain\tneg\nit is 12"\tneg\nfine\tpos\n'  # would be two rows, by the book
    )
    assert formats.read(written(tmp_path / "c.tsv", swallowing))["label"].tolist() == ["pos", "neg", "neg", "pos"]
    of_ids = 'text\tid\n"Great film\t1\nplain\t2\nit is 12"\t3\nfine\t4\n'
    assert formats.read(written(tmp_path / "d.tsv", of_ids))["id"].tolist() == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("text;label\nx,1;y\n", ["x,1", "y"]),
        ("text\tlabel\nx,1\ty\n", ["x,1", "y"]),
        (b"\xef\xbb\xbftext,label\r\nx,y\r\n", ["x", "y"]),
        ("text,label\rx,y\r", ["x", "y"]),
        ("\n\ntext , label\n\nx,y\n\n", ["x", "y"]),
        ('text,label\n"one,\n\ntwo",y\n', ["one,\n\ntwo", "y"]),
        (f"text,label\n{'word ' * 300_000},y\n", ["word " * 300_000, "y"]),
        ('text,label\n5" disk,y\n', ['5" disk', "y"]),
        ("text,label,n\nx,y,1234567890123456789012345\n", ["x", "y"]),
        (" " * 1_000_000 + "\ntext,label\nx,y\n", ["x", "y"]),  # hours, were each of them a beginning to try
    ],
)
def test_odd_csv_is_read(tmp_path, content, kept):
    frame = formats.read(written(tmp_path / "a.csv", content))
    assert frame[["text", "label"]].to_numpy().tolist() == [kept]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl"])
def test_the_mark_of_utf_8_is_no_part_of_a_row(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    write_rows(path, ROWS)
    frame = formats.read(written(path, b"\xef\xbb\xbf" + path.read_bytes()))
    assert [list(frame.columns), *frame.to_numpy().tolist()] == ROWS


MULTI_LINE = [
    ("text,id", ["Dear Sir,\nit is 1,250\nor so", "7"], "fine,8"),  # each line has its comma, but no id after the first
    ("text,id", ["milk, 2\neggs, 12\nbread", "7"], "fine,8"),  # of another form than the ids
    ("text,id", ["so, so\nwell, well\n12", "a7"], "fine,b8"),
    ("text,id", ["see 3,4\nand so on", "7"], "fine,8"),  # no whole row between
    ("text,name", ["a,Bob\nb,Cy\nc", "Di"], "fine,Ed"),  # rows, perhaps, but nothing tells
    ("id,text,day", ["1", "1,one\n2,two\n3,three", "2024-12-31"], "x9,fine,2024-12-30"),
]


@pytest.mark.parametrize(("header", "row", "other"), MULTI_LINE)
def test_a_text_of_several_lines_with_separators_is_read(tmp_path, header, row, other):
    with (path := tmp_path / "a.csv").open("w", newline="") as file:
        file.write(f"{header}\n{other}\n")
        csv.writer(file).writerow(row)
    assert formats.read(path).to_numpy().tolist() == [other.split(","), row]


@given(st.permutations(range(10, 30)), st.integers(0, 17), st.integers(2, 19), st.integers(0, 2))
def test_rows_between_stray_quotes_are_never_one_row(tmp_path_factory, ids, first, further, place):
    """In any column, whatever the ids, where whole rows lie between and one other row is left."""
    rows = [[f"text {id}", f"2024-01-{id}", f"name {id}"] for id in ids]
    rows[first][place] = f'"{rows[first][place]}'
    rows[last := min(first + further, 19)][place] += '"'
    content = "text,day,name\n" + "".join(",".join(row) + "\n" for row in rows)
    path = written(tmp_path_factory.getbasetemp() / "stray.csv", content)
    if last - first == 19:
        assert len(formats.read(path)) == 1  # nothing to compare with
    else:
        with pytest.raises(DataError, match=f"stray.csv, line {first + 2}: a field in quotes that begins here holds"):
            formats.read(path)


BAD = {
    "surplus fields in all rows": (
        "a.csv",
        "text,label\nwell, well,pos\nso, so,neg\n",
        "line 2: has 3 fields, and the header 2",
    ),
    "a surplus field": (
        "a.csv",
        'text,label\n"two\nlines",pos\n\nso, so,neg\n',
        "line 5: has 3 fields, and the header 2",
    ),
    "after empty lines": ("a.csv", "\n\ntext,label\nx\n", "line 4: has 1 fields"),
    "a header of blanks in quotes": ("a.csv", '"\n"\n', "the file is empty"),
    "a field too few": ("a.csv", "text,label\nx,y\nz\n", "line 3: has 1 fields, and the header 2"),
    "quotes with backslashes": ("a.csv", 'text,label\nx,y\n"say \\"hi\\" now",pos\n', "line 3: the quotes of the row"),
    "a quote that swallows rows": (
        "a.csv",
        'text,label\n"So, so,pos\nplain,neg\n12",neg\nx,pos\n',
        "line 2: a field in quotes",
    ),
    "labels first": (
        "a.csv",
        'label,text\npos,"So, so\nneg,12"\nneg,x\npos,y\n',
        "line 2: a field in quotes.*holds whole rows",
    ),
    "ids that never repeat": (
        "a.csv",
        'text,id\nx,1\n"Great film,2\nok,3\n12",4\n',
        "line 3: a field in quotes.*holds whole rows",
    ),
    "ids first": ("a.csv", 'id,text\na1,"Great\na2,ok\na3,12"\na4,x\n', "line 2: a field in quotes.*holds whole rows"),
    "both dialects at once": ("a.tsv", "text\tlabel\n\"x\ty\n'a\tb\tc\n", "line 3: has 3 fields"),
    "a broken line": ("a.jsonl", '{"text": "x"}\n\n{"text": \n', "line 3: is not JSON .column 10"),
    "a broken list": ("a.json", '[{"text": "x"},\n{"text": }]', "line 2: is not JSON"),
    "columns": (
        "a.json",
        '{"text": ["x"],\n"label": ["y"]}',
        "line 1: is not JSON.*an object in each line, or one list",
    ),
    "no object": ("a.ndjson", '{"text": "x"}\n["x"]\n', "line 2: is not an object"),
    "a name twice": ("a.jsonl", '{"text": "x", "text": "y"}\n', "line 1: is not JSON .'text' stands twice"),
    "half a character": ("a.jsonl", '{"text": "\\ud83d"}\n', "line 1: is not JSON .*surrogates"),
    "depth": ("a.json", "[" * 100_000, "line 1: is not JSON .maximum recursion depth"),
    "UTF-16": ("a.csv", "text,label\nx,y\n".encode("utf-16"), "line 1: byte 0 is not utf-8.*encoding=utf-16"),
    "Latin-1": ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', "line 2: byte 27 is not utf-8.*encoding=latin-1"),
    "nothing": ("a.csv", b"\xef\xbb\xbf \n", "the file is empty"),
    "cut": ("a.csv.gz", gzip.compress(b"text,label\nx,y\n")[:-9], "can't be read .Compressed file ended"),
    "another kind in it": ("a.gz", gzip.compress(b"x"), "files of the kind '' can't be read"),
    "a spreadsheet": ("a.xlsx", b"PK", "files of the kind '.xlsx' can't be read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_broken_file_is_named_with_its_line(tmp_path, kind):
    name, content, message = BAD[kind]
    with pytest.raises(DataError, match=f"{name}.*{message}") as error:
        formats.read(written(tmp_path / name, content))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_parquet_file_whose_texts_are_not_utf_8_is_named(tmp_path):
    latin = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"caf\xe9"))
    pyarrow.parquet.write_table(pa.table({"text": latin}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a.parquet: can't be read as parquet .*Invalid UTF8.*\. Write it anew, in UTF"
    ):
        formats.read(tmp_path / "a.parquet")


def test_an_archive_of_several_files_is_no_table(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.csv", "text,label\nx,y\n")
        archive.writestr("b.csv", "text,label\nx,y\n")
    with pytest.raises(DataError, match="an archive of 2 files"):
        formats.read(tmp_path / "a.zip")


def test_a_file_above_the_limits_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LARGEST", 1 << 20)
    monkeypatch.setattr(formats, "MOST_ROWS", 20_000)
    bombs = {
        "columns.csv": b"," * 5_000_000 + b"\nx,y\n",
        "rows.csv": b"text,label\n" + b"x,\n" * 30_000,
        "packed.csv.gz": gzip.compress(b"text,label\n" + b"x" * (2 << 20)),
        "keys.jsonl": "".join(f'{{"{k}": 1}}\n' for k in range(1001)).encode(),
    }
    monkeypatch.setattr(formats, "LARGEST", 60 << 20)
    for name in ("columns.csv", "rows.csv", "keys.jsonl"):
        with pytest.raises(
            DataError, match=f"{name}: is larger than what is read at once, .* GiB, 20,000 rows and 1,000"
        ):
            formats.read(written(tmp_path / name, bombs[name]))
    monkeypatch.setattr(formats, "LARGEST", 1 << 20)
    with pytest.raises(DataError, match=r"packed.csv.gz: is larger"):
        formats.read(written(tmp_path / "packed.csv.gz", bombs["packed.csv.gz"]))
    same = pa.table({"text": pa.array(["x" * 10_000] * 10_000).dictionary_encode()})  # 100 MB in a few thousand bytes
    pyarrow.parquet.write_table(same.cast(pa.schema([("text", pa.string())])), tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    with pytest.raises(DataError, match=r"bomb.parquet: is larger"):
        formats.read(tmp_path / "bomb.parquet")


# Columns


def test_whole_numbers_stay_whole_where_some_are_missing(tmp_path):
    large = 2**60 + 1
    pd.DataFrame({"id": pd.array([7, None, large], dtype="Int64")}).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame({"id": [7.0, None, 9.5]}).to_parquet(tmp_path / "b.parquet")
    content = f'{{"id": 7, "other": 1}}\n{{"other": 2}}\n{{"id": {large}}}\n'
    for name, last in (("a.parquet", str(large)), ("b.parquet", "9.5"), ("c.jsonl", str(large))):
        path = written(tmp_path / name, content) if name == "c.jsonl" else tmp_path / name
        found = tables.texts(formats.read(path)["id"], name)
        assert [found[0], found[2]] == ["7", last] and pd.isna(found[1])


def test_a_number_of_any_length_stands_in_a_column_that_nobody_reads(tmp_path):
    path = written(tmp_path / "a.jsonl", f'{{"text": "x", "n": {10**24}}}\n{{"text": "y", "n": 1}}\n')
    assert formats.read(path)["text"].tolist() == ["x", "y"]


@pytest.mark.parametrize("kind", ["str", object])
def test_white_space_at_the_ends_is_no_part_of_a_text(kind):
    found = tables.texts(pd.Series([" 07", "07\t", "\u00a007", " "], dtype=kind), "d.csv, column user")
    assert found[:3].tolist() == ["07"] * 3 and pd.isna(found[3])


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"a", np.array(["a"]), ("a",)])
def test_what_is_no_text_is_named(value):
    with pytest.raises(DataError, match=r"d.jsonl, column label, row 2: .* and no text or number"):
        tables.texts(pd.Series(["x", value], dtype=object), "d.jsonl, column label")


def test_numbers():
    found = tables.numbers(["1", 2.5, " -3e1 ", "", None, "NaN"], "column")
    np.testing.assert_array_equal(found, [1, 2.5, -30, np.nan, np.nan, np.nan])
    for bad in ("one", "1_0", "inf", "1,5", True, [1]):
        with pytest.raises(DataError, match=r"column, row 2: '.*' is not a number"):
            tables.numbers([1, bad], "column")


def test_a_column_that_is_missing_or_there_twice():
    frame = pd.DataFrame([[1, 2, 3]], columns=["text", "text", "a\x1b[31m" + "b" * 500])
    with pytest.raises(DataError, match=r"t: no column label; it has text, text, a·.31mb*…"):
        tables.require(frame, ["label"], "t")
    with pytest.raises(DataError, match="t: 2 columns are called text"):
        tables.require(frame, ["text"], "t")


# Times

NOON = datetime(2020, 9, 13, 12, 26, 40, tzinfo=UTC)


@pytest.mark.parametrize(
    "value",
    [
        1600000000, "1600000000", "1600000000.0", "1.6e9", np.int64(1600000000), 1600000000000, "1600000000000",
        "2020-09-13T12:26:40", "2020-09-13 12:26:40Z", "2020-09-13T14:26:40+02:00", "2020-09-13 07:26:40 -0500",
        "20200913T122640", "2020-09-13 12:26:40 UTC", "Sun, 13 Sep 2020 12:26:40 GMT", "13 Sep 20 08:26:40 EDT",
        "Sun, 13 Sep 2020 12:26:40", NOON, NOON.replace(tzinfo=None), np.datetime64("2020-09-13T12:26:40"),
        pd.Timestamp("2020-09-13 14:26:40", tz="Europe/Berlin"), {"$date": 1600000000000},
        {"$date": {"$numberLong": "1600000000000"}}, {"$date": "2020-09-13T12:26:40Z"},
    ],
)  # fmt: skip
def test_a_time_is_read_in_each_of_its_forms(value):
    assert tables.moment(value)[1] == NOON
    assert tables.times([value, None, "", float("nan"), pd.NaT]).tolist()[0] == NOON


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("03/04/2024", "is the day first, or the month"),
        ("2025/01/06", "can't be read as a time"),
        ("yesterday", "can't be read as a time"),
        ("Mon, 01 Jan 2024 10:00:00 CET", "can't be read"),
        ("2024-02-30", "can't be read"),
        ("Mon, 01 Jan 0001 00:00:00 GMT", "can't be read"),  # not 2001; so does .NET write that there is none
        ("0001-01-01T00:00:00", "between 1990 and tomorrow"),
        pytest.param(f"2024{' ' * 1_000_000}x", "can't be read", id="blanks"),
        ("1e400", "can't be read"),
        (True, "can't be read"),
        ([1600000000], "can't be read"),
        (float("inf"), "can't be read"),
        (0, "read as seconds, is the time 1970"),
        (1600000000000000, "can't be read"),
        (20240101, "read as seconds, is the time 1970"),
        ("1989-12-31", "between 1990 and tomorrow"),
        ("0001-01-01T00:00+10:00", "can't be read"),
        ("2999-12-31T00:00:00+00:00", "between 1990 and tomorrow"),  # not a time of today: workers must agree on names
    ],
)
def test_a_time_that_can_not_be_is_named_with_its_row(value, message):
    with pytest.raises(DataError, match=f"t.csv, column time, row 3: '.*{message}"):
        tables.times([None, *[None] * 1, value], "t.csv, column time")


def test_kinds_of_times_are_not_mixed():
    with pytest.raises(
        DataError, match="time, row 3: '1600000000000' is a time as milliseconds, those before it as sec"
    ):
        tables.times([1600000000, None, 1600000000000])
    with pytest.raises(DataError, match="row 2: '2024-01-01' is a time as ISO 8601, those before it as RFC 822"):
        tables.times(["Sun, 13 Sep 2020 12:26:40 GMT", "2024-01-01"])
    assert tables.moment(5e9, now=6e9)[1].year == 2128


@given(st.integers(631152000, 1767225600), st.sampled_from([1, 1000]), st.sampled_from([str, int, float]))
def test_numbers_and_dates_say_the_same(seconds, unit, kind):
    moment = tables.moment(kind(seconds * unit))[1]
    assert moment.timestamp() == seconds
    assert tables.moment(moment.isoformat())[1] == tables.moment(f"{moment:%a, %d %b %Y %H:%M:%S} +0000")[1] == moment


@given(st.one_of(st.text(), st.floats(), st.integers(), st.binary(), st.lists(st.integers()), st.booleans(),
                 st.dictionaries(st.sampled_from(["$date", "$numberLong"]), st.text()), st.datetimes()))  # fmt: skip
def test_any_value_is_a_time_missing_or_one_message(value):
    try:
        kind, moment = tables.moment(value)
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
    else:
        assert (moment is None) == (kind == "missing")
        assert moment is None or tables.EARLIEST <= moment <= datetime.now(UTC) + timedelta(days=1)
