"""What the tests share: tracking off unless a test turns it on, an empty cache, one smoke run of everything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:  # a thread for each worker: two processes that share cores wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("llmprod", deadline=None, max_examples=100)  # a busy machine is no failure
settings.register_profile("nightly", deadline=None, max_examples=2000)  # make fuzz
settings.load_profile("llmprod")

RUNS_NOTEBOOKS = ("test_nbval", "test_colab", "test_bring_your_own")  # by themselves, for minutes


def pytest_xdist_auto_num_workers(config):
    """One more than there are processors: many tests wait for services and processes that they started."""
    return (os.cpu_count() or 1) + 1


def pytest_itemcollected(item):
    """Groups tests before xdist reads the groups: those on the smoke run share it, those of a file its fixtures."""
    long = next((name for name in RUNS_NOTEBOOKS if item.name.startswith(name)), "")
    group = "smoke" if "smoke_run" in item.fixturenames else long or item.path.stem
    item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_modifyitems(items):
    """What takes longest comes first, so that no worker ends with it."""
    order = {"smoke": 0, **dict.fromkeys(RUNS_NOTEBOOKS, 1)}
    items.sort(key=lambda item: order.get(item.get_closest_marker("xdist_group").args[0], 2))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No tracking, and no key of the developer's in any test."""
    monkeypatch.setenv("TRACKING", "none")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """An empty cache folder, and no mirror."""
    monkeypatch.setenv("LLMPROD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMPROD_MIRROR", raising=False)
    return tmp_path / "cache"


def llmprod(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python -m llmprod` as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "llmprod", *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """All notebooks, run headless in the smoke profile with tracking on: the run's folder."""
    from llmprod.harness import pipeline, runner

    folder = tmp_path_factory.mktemp("run") / "smoke"
    with runner.environment(TRACKING="on"):
        os.environ.pop("WANDB_API_KEY", None)
        assert runner.run(list(pipeline.pipeline()), "smoke", {}, folder)
    return folder
