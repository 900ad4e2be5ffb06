"""The project's own files agree with one another."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import llmprod
from llmprod import paths

PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    name.lower().replace("_", "-"): version
    for name, _, version in (
        line.partition("==")
        for line in (paths.ROOT / "constraints.txt").read_text().splitlines()
        if line and line[0] != "#"
    )
}


def tracked() -> list[str]:
    done = subprocess.run(["git", "-C", str(paths.ROOT), "ls-files"], capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (paths.ROOT / name).is_file()]


def test_constraints_pin_every_dependency_within_its_range():
    extras = PROJECT["optional-dependencies"]["dev"]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        assert Version(PINS[requirement.name.lower()]) in requirement.specifier, requirement.name


def test_constraints_install_on_any_machine():
    text = (paths.ROOT / "constraints.txt").read_text()
    assert PINS["torch"] == "2.13.0" and "nvidia" not in text and "+cpu" not in text and "@" not in text


def test_conda_environment_is_the_same_environment():
    environment = yaml.safe_load((paths.ROOT / "environment.yml").read_text())
    python, pip, with_pip = environment["dependencies"]
    assert Version(python.removeprefix("python=")) in SpecifierSet(PROJECT["requires-python"])
    assert pip == f"pip={PINS['pip']}"
    assert with_pip == {"pip": ["-c constraints.txt", "-e .[dev]"]}, "what pip installs, pinned, and nothing beside it"


def test_make_help_explains_every_target():
    done = subprocess.run(["make", "help"], cwd=paths.ROOT, capture_output=True, text=True, check=True)
    makefile = (paths.ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    wanted = [
        "setup",
        "reproduce",
        "test",
        "run",
        "smoke",
        "verify",
        "report",
        "bench",
        "reference",
        "study",
        "lab",
        "lint",
        "sync",
        "clean",
        "help",
    ]
    assert set(wanted) <= set(targets)
    assert all(f"make {target} " in done.stdout for target in targets)


def test_one_version_and_one_address():
    citation = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text())
    assert citation["version"] == llmprod.__version__
    assert citation["repository-code"] == PROJECT["urls"]["Repository"] and citation["license"] == PROJECT["license"]


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_links_in_the_readmes_lead_somewhere(readme):
    text = (paths.ROOT / readme).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (paths.ROOT / target).exists(), target


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in (paths.ROOT / ".ci/run").read_text() and "make test" in (paths.ROOT / "README.md").read_text()


def test_both_readmes_tell_the_same():
    english, chinese = ((paths.ROOT / name).read_text() for name in ("README.md", "README.zh.md"))
    for pattern in (r"^#+ ", r"^```", r"<!-- generated: \w+ -->"):
        assert len(re.findall(pattern, english, re.MULTILINE)) == len(re.findall(pattern, chinese, re.MULTILINE)), (
            pattern
        )
    commands = re.compile(r"^(?:make|python|git|pip|conda) .*?(?=\s+#|$)", re.MULTILINE)
    assert commands.findall(english) == commands.findall(chinese)


def test_no_secret_home_path_or_large_file_is_committed():
    secret = re.compile(rb"(?:hf_[A-Za-z0-9]{30}|ghp_[A-Za-z0-9]{30}|sk-[A-Za-z0-9]{30}|AKIA[A-Z0-9]{16})")
    for name in tracked():
        content = (paths.ROOT / name).read_bytes()
        assert len(content) < 5_000_000, name
        assert not secret.search(content), name
        assert not re.search(rb"/home/[a-z]+/|/Users/[a-z]+/", content) or name.startswith("tests/"), name


def test_no_data_set_is_committed():
    kinds = (".csv", ".tsv", ".tab", ".parquet", ".arrow", ".safetensors", ".jsonl")
    assert not [n for n in tracked() if n.endswith(kinds) and not n.startswith("reports/studies/")]


def test_nothing_pickled_is_loaded_and_no_remote_code_runs():
    for path in sorted(paths.PACKAGE.glob("*.py")) + sorted(paths.NOTEBOOKS.glob("*.ipynb")):
        text = path.read_text()
        assert not re.search(r"torch\.load\(|pickle\.load|joblib\.load|shell=True|os\.system\(", text), path.name
        assert "trust_remote_code=True" not in text, path.name


def test_style():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
