"""Files of rows: CSV, TSV, JSON or Parquet, packed or not, as a frame with each cell as it stands there.

A file is read whole, and so has at most 2 GiB (unpacked), 50 million rows and 1,000 columns.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from llmprod import LLMProdError

LARGEST, MOST_ROWS, MOST_COLUMNS = 2 << 30, 50_000_000, 1000  # bytes; see above
ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
DIGIT = re.compile(r"\d")
DAMAGED = (OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)

csv.field_size_limit(LARGEST)  # Python's own, 131,072 characters, is less than some texts have


class DataError(LLMProdError):
    """A data set can't be used as it is."""


def shown(value: object, width: int = 60) -> str:
    """A value for a message: without control characters, cut to so many characters."""
    text = "".join(c if c.isprintable() else "·" for c in str(value)[: width + 1])
    return text if len(text) <= width else f"{text[: width - 1]}…"


def too_large(path: Path) -> DataError:
    """The error for a file above the limits."""
    limits = f"{LARGEST / (1 << 30):g} GiB, {MOST_ROWS:,} rows and {MOST_COLUMNS:,} columns"
    return DataError(f"{path}: is larger than what is read at once, {limits}; take the part of it that you need.")


def read(file: str | Path, encoding: str = "utf-8") -> pd.DataFrame:
    """A file's rows, each cell as it stands: a text in CSV and TSV, in JSON and Parquet what it is there.

    Args:
        file: .csv, .tsv (with or without quotes), .json (a list of objects), .jsonl or .ndjson (an object in each line)
            or .parquet; it may be packed: .gz, .bz2, .xz, or a .zip that holds nothing else
        encoding: of text files

    Raises DataError, with the file, the line and the way out, for a missing or damaged file, another ending, a wrong
    encoding, rows of another length than the header, quotes that don't fit, and what is above the limits.
    """
    path = Path(os.path.expanduser(file))  # Path's own raises for a user that there isn't, and for long names
    if path.suffix.lower() != ".zip":
        kind_of(path.name, path)
    if not os.path.isfile(path):
        raise DataError(f"{path}: there is no such file. Relative paths start at {Path.cwd()}.")
    name, content = unpack(path)
    kind = kind_of(name, path)
    if kind == ".parquet" and content:
        return read_parquet(content, path)
    if kind in (".csv", ".tsv"):
        return read_separated(content, kind, encoding, path)
    return read_json(decode(content, encoding, path), path)


def kind_of(name: str, path: Path) -> str:
    """The ending that says how a file is read, without that of its packing. Raises DataError for any other."""
    kind = Path(re.sub(r"\.(gz|bz2|xz|zip)$", "", name.lower())).suffix
    if kind not in ENDINGS:
        raise DataError(f"{path}: files of the kind '{kind}' can't be read; use one of {', '.join(ENDINGS)}.")
    return kind


def unpack(path: Path) -> tuple[str, bytes]:
    """A file's name and content; where its first bytes say that it is packed, those of what is in it."""
    try:
        with path.open("rb") as file:
            head = file.read(6)
        if not head.startswith(b"PK\x03\x04"):
            with next((opened for start, opened in PACKED.items() if head.startswith(start)), open)(path, "rb") as file:
                return path.name, limited(file, path)
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX")]
            if len(names) != 1:
                raise DataError(f"{path}: is an archive of {len(names)} files, and a table is one; unpack it.")
            with archive.open(names[0]) as file:
                return names[0], limited(file, path)
    except DAMAGED as error:
        raise DataError(f"{path}: can't be read ({shown(error, 200)}). Make or download it anew.") from error


def limited(file: io.BufferedIOBase, path: Path) -> bytes:
    """All bytes of an open file, unless they are too many: a few packed ones can be a million times as many."""
    parts, size = [], 0
    while part := file.read(1 << 20):
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            raise too_large(path)
    return b"".join(parts)


def decode(content: bytes, encoding: str, path: Path) -> str:
    """Bytes as text, without the mark of UTF-8 at its beginning."""
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
        text.encode()  # some encodings give halves of surrogate pairs, which nothing else can write
        return text
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        guess = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin-1"
        raise DataError(
            f"{path}, line {line}: byte {error.start} is not {error.encoding}. Save the file as UTF-8, or say what "
            f"it is where there is a parameter for that, as encoding={guess}."
        ) from error
    except (LookupError, ValueError) as error:
        raise DataError(f"{path}: can't be read with encoding={shown(encoding)} ({shown(error)}).") from error


def read_separated(content: bytes, kind: str, encoding: str, path: Path) -> pd.DataFrame:
    """The rows of CSV or TSV. Fields are apart by what the header has: a comma, a semicolon or a tab.

    TSV comes in two dialects, with quotes around fields and with quotes that mean nothing: the second is read where
    the first does not fit and the header has no quotes.
    """
    if encoding.lower() not in ("utf-8", "utf8"):
        content = decode(content, encoding, path).encode()
    start = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    lines = re.compile(rb"[^\r\n]+").finditer(content, start)  # one expression that skips blanks takes their square
    if not (found := next((line for line in lines if not line[0].isspace()), None)):
        raise DataError(f"{path}: the file is empty.")
    head = decode(found[0], "utf-8", path)
    separators = ",;\t" if kind == ".csv" else "\t;,"
    separator = next((one for one in separators if one in head), separators[0])
    if head.count(separator) >= MOST_COLUMNS or content.count(b"\n") > MOST_ROWS:
        raise too_large(path)
    if (frame := quick_rows(content[found.start() :], head, separator)) is None:
        text = decode(content, "utf-8", path)
        try:
            frame = careful_rows(text, separator, csv.QUOTE_MINIMAL, path)
        except DataError:
            if separator != "\t" or '"' in head:
                raise
            frame = careful_rows(text, separator, csv.QUOTE_NONE, path)
    return frame.rename(columns=str.strip)


def quick_rows(content: bytes, head: str, separator: str) -> pd.DataFrame | None:
    """The rows by Arrow, in a tenth of the time that Python's reader takes; None where something may be wrong.

    Arrow forgives quotes that don't fit. Here each opens a field, closes one or is one of two, as by the standard.
    """
    if has_quotes := b'"' in content:
        numbers, edge = np.frombuffer(content, np.uint8), np.zeros(256, bool)
        edge[list(f'{separator}"\r\n'.encode())] = True
        quotes = np.flatnonzero(numbers == ord('"'))
        before, after = numbers.take(quotes[::2] - 1), numbers.take(quotes[1::2] + 1, mode="wrap")
        if len(quotes) % 2 or head.count('"') % 2 or not (edge[before].all() and edge[after].all()):
            return None
    columns = next(csv.reader([head], delimiter=separator))
    types = {f"f{number}": pa.string() for number in range(len(columns))}
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(content),
            pyarrow.csv.ReadOptions(autogenerate_column_names=True, skip_rows=1),
            pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=has_quotes),
            pyarrow.csv.ConvertOptions(column_types=types),
        )
    except pa.ArrowInvalid:
        return None
    if table.num_columns != len(columns):  # it takes their number from the first row
        return None
    frame = table.to_pandas().set_axis(columns, axis=1)
    in_fields = has_quotes and max(content.count(b"\n"), content.count(b"\r")) > len(frame) + 1
    return None if in_fields and swallowed(frame, separator) else frame


def careful_rows(text: str, separator: str, quoting: int, path: Path) -> pd.DataFrame:
    """The rows by Python's reader; a line that breaks the form is an error with its number."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    if not (found := [*numbered(reader, path)]):  # the header is blanks in quotes, and so no row
        raise DataError(f"{path}: the file is empty.")
    (_, header), *rows = found
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(
                f"{path}, line {line}: has {len(row):,} fields, and the header {len(header):,}. Put texts that "
                f"contain {separator!r} in quotes, or save the table as .jsonl."
            )
    frame = pd.DataFrame([row for _, row in rows], columns=header, dtype="str")
    if quoting == csv.QUOTE_MINIMAL and (row := swallowed(frame, separator)):
        raise DataError(
            f"{path}, line {rows[row - 1][0]}: a field in quotes that begins here holds whole rows: a quote is missing "
            "or too many. If the text is meant so, save the table as .jsonl."
        )
    return frame


def numbered(reader: Iterator[list[str]], path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of Python's csv.reader, each after the line where it begins; empty lines are none."""
    line = 1
    try:
        for row in reader:
            if len(row) > 1 or "".join(row).strip():
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: the quotes of the row that begins here don't fit ({error}). Close each, and write a "
            "quote inside a quoted field twice, or save the table as .jsonl."
        ) from error


def swallowed(frame: pd.DataFrame, separator: str) -> int:
    """The first row (from 1) in which a quote too many has made one field of several rows; 0 where there is none.

    At a line break in such a field stands the end or the beginning of a row: a value that other rows have there. Where
    values don't repeat, whole rows between two breaks are told by a column whose values all have digits: ids, dates.
    """
    width = frame.shape[1]
    broken = np.logical_or.reduce([frame.iloc[:, k].str.contains("[\r\n]") for k in range(width)])
    if not broken.any():
        return 0
    sound = frame[~broken]
    first, last = (set(sound.iloc[:, k].to_numpy()) - {""} for k in (0, -1))

    @cache
    def forms(column: int) -> set[str]:
        """The forms of a column's values in rows without a line break; none unless each has a digit or is empty."""
        values = sound.iloc[:, column].to_numpy()
        return {form(value) for value in values} if all(DIGIT.search(value) for value in values if value) else set()

    for row, fields in zip(np.flatnonzero(broken), frame[broken].itertuples(index=False, name=None), strict=True):
        for place, field in enumerate(fields):
            head, *others = re.split(r"\r\n?|\n", field)
            for before, after in pairwise([head, *others]):
                (_, end, value), (name, start, _) = before.rpartition(separator), after.partition(separator)
                if (end and value in last) or (start and name in first):
                    return int(row) + 1
            rows = [line.split(separator) for line in others[:-1] if line]
            if rows:
                ends = head.split(separator), others[-1].split(separator)
                rows += [[None] * place + ends[0], ends[1] + [None] * (width - 1 - place)]
                for k, column in enumerate(zip(*rows, strict=True) if {*map(len, rows)} == {width} else ()):
                    seen = {form(value) for value in column if value is not None}
                    if seen != {""} and seen <= forms(k):
                        return int(row) + 1
    return 0


def form(value: str) -> str:
    """What a value has in common with others of its kind: 2024-12-31 becomes 0-0-0; one without a digit is its own."""
    return re.sub(r"\w+", "0", value) if DIGIT.search(value) else value


def read_json(text: str, path: Path) -> pd.DataFrame:
    """The rows of a list of objects, or of an object in each line; a field that an object lacks is missing (NaN)."""
    if not text.strip():
        raise DataError(f"{path}: the file is empty.")
    if text.lstrip().startswith("["):
        rows = [(f"row {number}", row) for number, row in enumerate(parse_json(text, 1, path), 1)]
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = [(f"line {number}", parse_json(line, number, path)) for number, line in lines if line.strip()]
    if wrong := next((where for where, row in rows if not isinstance(row, dict)), None):
        raise DataError(f'{path}, {wrong}: is not an object, as {{"text": "so", "label": "this"}} is one.')
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    if len(columns) > MOST_COLUMNS:
        raise too_large(path)
    return pd.DataFrame([row for _, row in rows], columns=columns, dtype=object)  # or 7 would be 7.0 where one lacks it


def parse_json(text: str, line: int, path: Path) -> object:
    """JSON that begins in a line of a file. Raises DataError with the line where it is broken."""
    try:
        found = json.loads(text, object_pairs_hook=each_once)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair: nothing else can write it
        return found
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        reason = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(
            f"{path}, line {line}: is not JSON ({shown(reason, 120)}). Needed is an object in each line, or one list "
            "of objects."
        ) from error


def each_once(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON; raises ValueError where a name stands twice, since one of the values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{next(name for name in found if sum(p[0] == name for p in pairs) > 1)!r} stands twice")
    return found


def read_parquet(content: bytes, path: Path) -> pd.DataFrame:
    """The rows of a Parquet file, in which whole numbers stay whole where some are missing.

    A few bytes can stand for gigabytes, so what they become is counted while it is read.
    """
    try:
        file = pyarrow.parquet.ParquetFile(pa.BufferReader(content))
        if file.metadata.num_rows > MOST_ROWS or file.metadata.num_columns > MOST_COLUMNS:
            raise too_large(path)
        batches, size = [], 0
        for batch in file.iter_batches(1024):
            batches.append(batch)
            size += batch.nbytes
            if size > LARGEST:
                raise too_large(path)
        table = pa.Table.from_batches(batches, file.schema_arrow)
        table.validate(full=True)  # or texts that are not UTF-8 are found where they are used
        return table.to_pandas(ignore_metadata=True, integer_object_nulls=True)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: can't be read as parquet ({shown(error, 120)}). Write it anew, in UTF-8.") from error
