"""Benchmarks: `make bench`. Apart from the tests, which never depend on time."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmprod import files, machine, paths


def record(name: str, rows: Sequence[Mapping[str, object]], **facts: object) -> Path:
    """Writes what a benchmark found to `reports/bench/<name>.json`, with the machine, versions and commit."""
    stamp = {"machine": machine.describe(), "commit": machine.git_commit(), "versions": machine.versions(machine.SHOWN)}
    target = paths.REPORTS / "bench" / f"{name}.json"
    files.write_json(target, stamp | facts | {"rows": list(rows)})
    print(f"written to {target}")
    return target
