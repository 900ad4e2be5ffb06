"""A study on a Ray cluster of two nodes, one of which is killed: the same rows as on one machine."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from llmprod import LLMProdError, machine, paths

pytest.importorskip("ray", reason="no Ray: pip install 'llmprod[ray]'")
from llmprod.harness import fanout

EXPERIMENT = '''"""An experiment that takes a while."""

import os
import random
import time
from pathlib import Path


def slow(parameters: dict) -> dict:
    """Notes whose process it is, and works on."""
    Path(parameters["notes"], f"{parameters['seed']}-{os.getpid()}").touch()
    time.sleep(3)
    return {"metrics": {"value": random.Random(parameters["seed"]).random()}, "speeds": {}}
'''


@pytest.fixture
def checkout(tmp_path):
    """A checkout of the working tree with one study, of three runs that take some seconds."""
    root = tmp_path / "checkout"
    shutil.copytree(paths.PACKAGE, root / "llmprod", ignore=shutil.ignore_patterns("__pycache__", "repository"))
    shutil.copytree(paths.NOTEBOOKS, root / "notebooks")
    shutil.copy(paths.ROOT / "pyproject.toml", root)
    (root / "llmprod/slow.py").write_text(EXPERIMENT)
    (root / ".gitignore").write_text("__pycache__/\nreports/\n")
    (tmp_path / "notes").mkdir()
    experiment = {"run": "llmprod.slow:slow", "parameters": {"notes": str(tmp_path / "notes")}}
    declared = {"experiments": {"slow": experiment}, "tiny": {"parameters": {"experiment": "slow"}, "vary": [{}]}}
    declared["tiny"]["seeds"] = [0, 1, 2]
    (root / "notebooks/studies.yaml").write_text(yaml.safe_dump(declared))
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init"], ["add", "."], ["commit", "-m", "a"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    return root


def study(checkout: Path, *options: str, **environment: str) -> subprocess.Popen:
    """Runs the study as a user does."""
    command = [sys.executable, "-m", "llmprod", "study", "tiny", *options]
    there = os.environ | {"PYTHONPATH": str(checkout)} | environment
    return subprocess.Popen(
        command, cwd=checkout, env=there, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def rows(checkout: Path) -> list[dict]:
    """The study's rows, without what another run of them may change."""
    lines = (checkout / "reports/studies/tiny.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for row in found:
        del row["provenance"]["minutes"], row["provenance"]["machine"]  # which says how many ran at a time
    return found


def test_a_node_is_killed_and_the_rows_are_those_of_one_machine(checkout, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(checkout))
    monkeypatch.chdir(checkout)  # a node's processes import from where it was started
    notes = checkout.parent / "notes"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        process = study(checkout, "--engine", "ray", RAY_ADDRESS=cluster.address)
        (raylet,) = node.all_processes["raylet"]
        there, deadline = psutil.Process(raylet.process.pid), time.monotonic() + 240
        while not (lost := pids(notes) & {child.pid for child in there.children(recursive=True)}):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=60)[0]
            time.sleep(0.2)
        cluster.remove_node(node, allow_graceful=False)
        said = process.communicate(timeout=240)[0]
    finally:
        cluster.shutdown()
    assert process.returncode == 0 and "tiny: 3 runs, 3 in all, 0 of earlier code" in said, said
    assert not any(psutil.pid_exists(pid) for pid in lost), "a run ends with its node"
    assert len(pids(notes)) == 3 + len(lost), "and is run again, no other"
    spread = rows(checkout)
    shutil.rmtree(checkout / "reports")
    assert study(checkout, "--jobs", "3").wait(240) == 0
    assert spread == rows(checkout)


def pids(notes: Path) -> set[int]:
    """The processes in which runs have begun."""
    return {int(re.search(r"-(\d+)$", path.name)[1]) for path in notes.iterdir()}


def test_a_node_with_another_commit_is_refused():
    with pytest.raises(
        LLMProdError, match=f"has the commit {machine.git_commit().removesuffix('+')}, not 0123456789ab"
    ):
        fanout.measured({}, 1, "0123456789ab")
