"""Benchmarks in a shrunken form: no line of them is first tried on somebody's GPU, or after an hour."""

import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks import load, monitor, record, scaling, serving, verdict
from llmprod import paths
from llmprod.harness import report


def test_the_gpu_benchmark_runs_shrunken_and_records_ratios(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--layers", "1", "--lengths", "8", "--seconds", "0.1"]
    environment = os.environ | {"LLMPROD_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--batch-tokens", "64"], capture_output=True, text=True, cwd=paths.ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "reports/bench/gpu-shrunken.json").read_text())
    rows = [row for row in found["rows"] if row["texts"] == "8 tokens"]
    assert [(row["task"], row["variant"]) for row in rows] == [
        ("training", "plain Trainer"), ("training", "plain Trainer, bf16"), ("training", "llmprod"),
        ("inference", "pipeline"), ("inference", "llmprod"),
    ]  # fmt: skip
    assert all(0 < row["MFU"] < 1 and row["texts/s"] > 0 for row in rows)
    first = {row["task"]: row["texts/s"] for row in reversed(rows)}
    assert all(abs(row["ratio"] - row["texts/s"] / first[row["task"]]) < 1e-9 for row in rows)
    assert found["driver"] == "no GPU" and found["commit"] and found["versions"]["torch"]


def test_what_a_benchmark_finds_is_a_table_of_the_readme(monkeypatch, tmp_path):
    """Medians of the turns, as ratios to the peer's; where it was not measured, the table says so."""
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    assert report.result_table("speed", "en") == "Not measured yet."
    slow, fast = ({"texts/s": n, "p50, ms": 1000 / n, "p99, ms": 1, "peak MB": 1} for n in (10.0, 45.0))
    ours = {name: fast | {"accuracy": 0.9, "MB": 80} for name in serving.OURS}
    ours["static embeddings"] = ours["static embeddings"] | {"accuracy": 0.875}
    found = {
        name: [turn, turn | {"texts/s": 1e9}, turn]
        for name, turn in (dict.fromkeys(serving.PEERS, slow) | ours).items()
    }
    serving.report(found)
    table = report.result_table("speed", "en")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:] if line.startswith("|")]
    assert [row[0] for row in rows] == list(serving.OURS)
    assert rows[0] == ["PyTorch fp32", "4.5", "4.5", "0.22", "0.00", "80"] and rows[-1][4] == "2.50"
    assert "`make bench BENCH=serving`: " in table


def test_rates_of_the_verdict_on_bags_of_words():
    """What is wrong in a known seed's run is seen on its machine; the table has each kind of run once."""
    right = [(seed, verdict.NOTHING) for seed in (*verdict.REFERENCE, 100, 101)]
    wrong = [(seed, change) for change in (verdict.LABELS, verdict.SPLIT) for seed in (0, 200)]
    found = {(seed, change): verdict.run(seed, change, [verdict.WORDS]) for seed, change in right + wrong}
    found[0, verdict.BF16] = found[0, verdict.NOTHING]
    found[1, verdict.THREADS] = found[1, verdict.NOTHING]
    rows = {row.pop("run"): row for row in verdict.rates(found)}
    assert rows[verdict.LABELS] == {
        "another seed": "1 of 1", "a known seed": "1 of 1", "a known seed, another machine": "1 of 1"
    }  # fmt: skip
    assert rows[verdict.SPLIT]["a known seed"] == "1 of 1" and rows[verdict.SPLIT]["another seed"] == "0 of 1"
    assert rows[verdict.NOTHING]["another seed"] == "0 of 2" and rows[verdict.NOTHING]["a known seed"] == ""
    assert rows[verdict.THREADS]["a known seed, another machine"] == "0 of 1" and verdict.BF16 not in rows


def test_load_is_beside_the_peer_with_as_many_clients_and_beside_one_client():
    rows = [(load.PEER, 1, 10.0, 100.0), (load.PEER, 64, 20.0, 900.0), (load.OURS, 1, 11.0, 90.0)]
    rows += [(load.OURS, 64, 60.0, 450.0), (load.EXCHANGE, 64, 50.0, 540.0)]
    found = load.ratios([dict(zip(("service", "clients", "requests/s", "p99, ms"), row, strict=True)) for row in rows])
    assert [row["requests/s over one text at a time"] for row in found] == [1, 1, 1.1, 3, 2.5]
    assert [row["p99 over one client's"] for row in found] == [1, 9, 1, 5, 6]


@pytest.mark.parametrize("step", scaling.STEPS)
def test_every_step_of_the_scaling_benchmark_runs(step, tmp_path):
    what, *_, sizes, _ = scaling.STEPS[step]
    found = what(16, tmp_path)
    assert found["seconds"] > 0 and found.get("disk, MB", 1) > 0 and list(sizes) == sorted(sizes)


def test_larger_sizes_are_reckoned_from_the_two_largest(monkeypatch, tmp_path):
    """A constant and a part that grows by the order; noise of a twentieth is not magnified a thousand times."""
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    assert scaling.reckon([1, 10, 20], [9.0, 3.0, 5.0], 1, 100) == pytest.approx(21)
    assert scaling.reckon([10, 20], [1 + 1e3, 1 + 8e3], 3, 100) == pytest.approx(1 + 1e6)
    assert scaling.reckon([10, 20], [500, 510], 1, 10**9) == 510
    child = scaling.measure("EASE", 20)
    assert child["seconds"] > 0 and child["memory, MB"] > 50, "in a process of its own"
    quick, slow = {"seconds": 4.0, "memory, MB": 600.0}, {"seconds": 32.0, "memory, MB": 1200.0}
    row = scaling.summary("EASE", [1000, 2000], [quick, slow])
    assert row["exponent"] == pytest.approx(3) and row["at 1e+06"] == "127 years, 200 TB memory"
    record("scaling", [row])
    assert "| EASE | 13 | 2,000 items | 32 s, 1.2 GB memory | n^3 (3.00) | 127 years, 200 TB memory |" in re.sub(
        " +", " ", report.result_table("scaling", "en")
    )


def test_the_monitor_is_timed_from_a_file_and_from_a_feed(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["monitor", "--documents", "24", "--layers", "1", "--precision", "auto"])
    monitor.main()
    rows = json.loads((tmp_path / "bench/monitor.json").read_text())["rows"]
    assert [row["texts"] for row in rows] == ["headlines", "headlines, companies", "newswire"]
    assert all(row["file, documents/s"] > 0 and row["feed, documents/s"] > 0 for row in rows)
    assert all(row["layers"] == 1 and row["precision"] == "auto" for row in rows)
