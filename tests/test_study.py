"""Studies: what is declared can run, what ran is kept, and the committed rows belong to the declaration."""

import json
import os
import subprocess
import sys
import time

import pytest
import yaml

from llmprod import LLMProdError, data, machine, paths
from llmprod.harness import study


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """One study of two quick runs in a folder of its own, on a prepared subset of R8."""
    declaration = {
        "experiments": {"finetune": "llmprod.evaluate.studies:finetuning"},
        "tiny": {
            "parameters": {"epochs": 1, "max_length": 16, "shots": 2, "precision": "fp32"},
            "vary": {"strategy": ["plain", "prototypes"]},
            "seeds": [0, 1],
        },
    }
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/studies.yaml").write_text(yaml.safe_dump(declaration))
    table = data.drop_duplicates(data.clean(data.load("reuters-r8"))[0])[0]
    folder = tmp_path / "work/work/01_data/splits"
    data.save(data.split(table, train_rows=200, test_rows=60), folder, {})
    monkeypatch.setattr(
        study, "declarations", lambda: yaml.safe_load((tmp_path / "notebooks/studies.yaml").read_text())
    )
    monkeypatch.setattr(study, "FOLDER", tmp_path / "studies")
    monkeypatch.setattr(study, "work", lambda dataset: tmp_path / "work")
    monkeypatch.setattr(study, "prepare", lambda dataset: None)
    monkeypatch.setattr(study, "in_process", lambda name, parameters: study.experiment_of(name)(parameters))
    return tmp_path, declaration


def test_a_study_runs_once_and_goes_on_where_it_stopped(tiny):
    folder, declaration = tiny
    assert study.run("tiny") == 4
    first = study.rows("tiny")
    assert [(r["parameters"]["seed"], r["parameters"]["strategy"]) for r in first] == [
        (0, "plain"), (0, "prototypes"), (1, "plain"), (1, "prototypes"),
    ]  # fmt: skip
    assert all(0 < r["metrics"]["accuracy"] <= 1 and r["speeds"]["peak memory, MB"] > 100 for r in first)
    assert study.run("tiny") == 0

    path = folder / "studies/tiny.jsonl"
    path.write_text(path.read_text()[:-40])  # killed in the last line
    assert study.run("tiny") == 1
    again = study.rows("tiny")
    assert [r["metrics"] for r in again] == [r["metrics"] for r in first], "a run repeated gives the same numbers"

    declaration["tiny"]["vary"] = {"strategy": ["plain"]}
    (folder / "notebooks/studies.yaml").write_text(yaml.safe_dump(declaration))
    assert study.run("tiny") == 0 and len(study.rows("tiny")) == 2, "rows of an earlier declaration go"

    means = study.means("tiny", ["strategy"], ["accuracy"])
    assert means.loc["plain", ("accuracy", "seeds")] == 2
    assert "(2)" in study.styled(means).loc["plain", "accuracy"]


def test_a_run_has_a_process_of_its_own():
    parameters = {"model": "minilm", "max_length": 16}
    assert study.in_process("builtins:dict", parameters) == parameters
    assert study.in_process("tests.test_study:pid", {}) != os.getpid()


def test_a_killed_study_leaves_no_process(tmp_path):
    code = (
        "import sys; from llmprod.harness import study; study.in_process('tests.test_study:linger', {'p': sys.argv[1]})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pid")], cwd=paths.ROOT)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert parent.poll() is None
        time.sleep(0.1)
    child = int((tmp_path / "pid").read_text())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the run goes on")


def linger(parameters: dict) -> None:
    """Says whose process it is, and works on."""
    with open(parameters["p"], "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)


def pid(parameters: dict) -> int:
    """Whose process it is."""
    return os.getpid()


def test_what_was_not_measured_is_said(tiny):
    assert "not measured yet" in study.styled(study.means("tiny", ["strategy"], ["accuracy"])).to_string()
    assert study.curves("tiny", "strategy").empty


def test_unknown_names_are_named(tiny):
    folder, declaration = tiny
    with pytest.raises(LLMProdError, match="there are: tiny"):
        study.grid("huge")
    declaration["tiny"]["parameters"]["epoch"] = 1
    (folder / "notebooks/studies.yaml").write_text(yaml.safe_dump(declaration))
    with pytest.raises(LLMProdError, match="epoch"):
        study.grid("tiny")


@pytest.mark.parametrize("name", study.declared())
def test_every_declared_run_has_known_parameters_and_a_key_of_its_own(name):
    plan = study.grid(name)
    assert len({study.key(parameters) for parameters in plan}) == len(plan)
    assert all(p.get("experiment", "finetune") in study.declarations()["experiments"] for p in plan)
    chosen = [p for p in plan if p.get("split", "test") != "test"]
    assert not chosen or (len(chosen) == len(plan) and {p["seed"] for p in plan} == {0}), "settings are chosen apart"


@pytest.mark.parametrize("path", sorted((paths.REPORTS / "studies").glob("*.jsonl")), ids=lambda p: p.stem)
def test_committed_rows_are_runs_of_the_declaration(path):
    """A row that was edited by hand, or measured under other settings, is found."""
    keys = {study.key(parameters) for parameters in study.grid(path.stem)}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert row["key"] == study.key(row["parameters"]) and row["key"] in keys
        assert set(row["provenance"]) == {"minutes", "machine", "commit", "versions"}
        assert set(row["provenance"]["versions"]) == set(machine.SHOWN)
