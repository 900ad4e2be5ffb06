"""What the tests share: tracking off unless a test turns it on, an empty cache, one smoke run of everything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
