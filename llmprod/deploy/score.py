"""Batch scoring: a bundle labels a corpus, file by file, on this machine or on a Ray cluster; what is done stays."""

import contextlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from llmprod import LLMProdError, artifacts, files, formats, tables
from llmprod.deploy import bundle, registry

SOURCE = b"llmprod"  # the key of a part's metadata
SLICE = 4096  # texts between two steps of the progress bar
SCHEMA = pa.schema([("row", pa.int64()), ("label", pa.string()), ("confidence", pa.float64()), ("sure", pa.bool_())])


def sources(corpus: Path, but: Path) -> list[Path]:
    """The files of a corpus, sorted: itself, or those in the folder (not in `but`) with an ending that can be read.

    Raises LLMProdError where there is none.
    """
    if os.path.isfile(corpus):
        return [corpus]
    found = []
    for path in sorted(corpus.rglob("*")):
        with contextlib.suppress(formats.DataError):
            formats.kind_of(path.name, path)
            found += [path] if path.is_file() and but.resolve() not in path.resolve().parents else []
    if not found:
        raise LLMProdError(f"{corpus}: there is no such file, and no folder with {', '.join(formats.ENDINGS)} in it.")
    return found


def run(
    corpus: Path,
    folder: Path,
    model: Path,
    column: str = "text",
    encoding: str = "utf-8",
    elsewhere: tuple[Callable, int] | None = None,
) -> dict[str, int]:
    """Labels every text of a corpus, and writes for `a.csv` of it `a.csv.parquet` into a folder.

    That has `row` (of the file, from 0), `label`, `confidence` (0 to 1) and `sure` (whether that reaches the bundle's
    threshold); a row without a text has no label. Files that this bundle has labelled before are left as they are.

    Args:
        model: a bundle, or a registry, of which the current bundle is taken
        elsewhere: of `cluster.tasks`, what calls `one` on other machines, and how many at a time

    Returns how many files and rows there are, how many files were labelled now, and rows without a text.

    Raises LLMProdError for a bundle, a file or a column that can't be read: files in progress are finished, no other
    is begun.
    """
    top = corpus if os.path.isdir(corpus) else corpus.parent
    if os.path.exists(model / registry.STATE):
        model = model / registry.Registry(model).state()["current"]
    made = opened(str(model.absolute()))
    jobs = {path: folder / f"{path.relative_to(top).as_posix()}.parquet" for path in sources(corpus, folder)}
    call, places = elsewhere or (one, 1)
    found = {"files": len(jobs), "labelled now": 0, "rows": 0, "without a text": 0}
    pool = ThreadPoolExecutor(places)
    try:
        working = [
            pool.submit(
                call, str(path.absolute()), str(to.absolute()), str(model.absolute()), made.id, column, encoding
            )
            for path, to in jobs.items()
        ]
        for future in tqdm(as_completed(working), desc="scoring, files", total=len(working)):
            found = {name: number + future.result().get(name, 0) for name, number in found.items()}
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def one(path: str, to: str, model: str, wanted: str, column: str, encoding: str) -> dict[str, int]:
    """Labels a file, unless its part is there; how many rows it has, how many without a text, and "labelled now".

    Raises LLMProdError for what can't be read, and where the bundle in the folder is not the one that is wanted.
    """
    source, target = Path(path), Path(to)
    seal = {"bundle": wanted, "sha256": artifacts.sha256(source), "column": column, "encoding": encoding}
    if (kept := sealed(target, seal)) is not None:
        return kept
    made = opened(model)
    if made.id != wanted:
        raise bundle.BundleError(
            f"{model} holds the bundle {made.id} here, not {wanted}: copy that one to this machine."
        )
    frame = formats.read(source, encoding)
    tables.require(frame, [column], str(source))
    texts = tables.texts(frame[column], f"{source}, column {column}")
    have = texts.notna().to_numpy()
    given, answers = texts[have].tolist(), []
    for start in tqdm(range(0, len(given), SLICE), desc=source.name, leave=False, disable=None):  # None: in a terminal
        answers += made.predict(given[start : start + SLICE])
    rows = pd.DataFrame({"row": have.nonzero()[0], "label": [a.label for a in answers]})
    rows["confidence"], rows["sure"] = [a.confidence for a in answers], [a.sure for a in answers]
    table = pa.Table.from_pandas(rows.set_index("row").reindex(range(len(frame))).reset_index(), SCHEMA)
    counts = {"rows": len(frame), "without a text": int((~have).sum())}
    with files.atomic(target) as temporary:
        pq.write_table(table.replace_schema_metadata({SOURCE: json.dumps(seal | counts)}), temporary)
    return counts | {"labelled now": 1}


def sealed(target: Path, seal: dict[str, str]) -> dict[str, int] | None:
    """The counts of a part that was made of the same file by the same bundle; None where there is none."""
    try:
        said = json.loads(pq.read_schema(target).metadata[SOURCE])
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None
    return {name: said[name] for name in ("rows", "without a text")} if seal.items() <= said.items() else None


@cache
def opened(model: str) -> bundle.Bundle:
    """A bundle, read once in a process."""
    return bundle.load(model)
