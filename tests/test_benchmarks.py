"""The GPU benchmark in its shrunken form: no line of it is first tried on somebody's GPU."""

import json
import os
import subprocess
import sys

from llmprod import paths


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
