"""Studies: declared runs can run, finished ones are kept, changed code is noticed, committed rows are declared ones."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import yaml

from llmprod import LLMProdError, data, machine, paths, workers
from llmprod.harness import check, pipeline, results, study

from .test_fingerprints import statement_in

EMPTY = {"metrics": {}, "speeds": {}, "provenance": {"minutes": 1}}  # of a row that found nothing


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """One study of two quick runs in a folder of its own, on a prepared subset of R8."""
    declaration = {
        "experiments": {"finetune": study.declarations()["experiments"]["finetune"]},
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
    monkeypatch.setattr(study, "require_commit", lambda: None)
    monkeypatch.setattr(workers, "run", lambda name, parameters, jobs: workers.function(name)(parameters))
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
    assert study.styled(means).loc["plain", "accuracy"].endswith("(2)")

    path.write_text(path.read_text().replace(study.rows("tiny")[0]["code"], "", 1))
    assert study.stale("tiny") == [True, False] and study.run("tiny") == 0, "kept until it is asked for"
    assert study.styled(study.means("tiny", ["strategy"], ["accuracy"])).loc["plain", "accuracy"].endswith("(2)†")
    assert study.run("tiny", again=True) == 1 and not any(study.stale("tiny"))
    assert study.rows("tiny")[0]["metrics"] == first[0]["metrics"]


def test_a_check_runs_rows_again_and_finds_what_drifted(tiny, capsys):
    folder, declaration = tiny
    declaration["tiny"] |= {"vary": {"strategy": ["plain"]}, "seeds": [0, 1, 2]}
    (folder / "notebooks/studies.yaml").write_text(yaml.safe_dump(declaration))
    assert not check.show(3) and "Nothing to judge" in capsys.readouterr().out, "there is no row yet"
    plan = study.grid("tiny")
    row = study.measure(plan[0])
    seeds = {study.key(p): row | {"key": study.key(p), "parameters": p, "code": study.code(p)} for p in plan}
    draw = next(n for n in range(99) if np.random.default_rng(n).permutation(3)[0] == 0)  # of the measured one
    for wrong in (0, 2):  # in the rows of all seeds, so that their spread stays
        row["metrics"]["accuracy"] += wrong
        study.write("tiny", seeds, seeds)
        assert check.show(1, draw) == bool(wrong)
        shown = capsys.readouterr().out
        assert ("DRIFTED" in shown and "by 2" in shown) == bool(wrong) and "REPRODUCED" in shown


def test_the_verdict_on_a_row_knows_what_is_usual(monkeypatch):
    rows = [{"parameters": {"seed": s, "x": 1}, "metrics": {"accuracy": v}} for s, v in enumerate((0.90, 0.91, 0.92))]
    monkeypatch.setattr(study, "rows", lambda name: rows)

    def verdict(value):
        (found,) = check.compare("any", rows[0], {"metrics": {"accuracy": value} if value else {}})
        return found["verdict"], found["reason"]

    assert verdict(0.90) == (results.REPRODUCED, "equal")
    assert verdict(0.90 + 3 * 0.01 * 2**0.5 - 1e-6) == (results.REPRODUCED, "")
    assert verdict(0.90 + 3 * 0.01 * 2**0.5 + 1e-6)[0] == verdict(None)[0] == results.DRIFTED
    rows[0]["metrics"]["accuracy"] = float("nan")  # what a curve never reached
    assert verdict(float("nan")) == (results.REPRODUCED, "equal") and verdict(0.90)[0] == results.DRIFTED
    rows[0]["metrics"]["accuracy"] = 0.90
    del rows[2]
    assert verdict(0.90)[0] == results.REPRODUCED and verdict(0.901)[0] == results.NOT_COMPARABLE


@pytest.fixture
def own_package(monkeypatch, tmp_path):
    """A copy of the package that a test may change, with a finished row of every experiment: edit -> stale ones."""
    shutil.copytree(paths.PACKAGE, tmp_path / "llmprod", ignore=shutil.ignore_patterns("__pycache__", "repository"))
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "llmprod")
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    with (tmp_path / "all.jsonl").open("w") as file:
        for name in study.declarations()["experiments"]:
            parameters = {"experiment": name, "seed": 0}
            row = {"key": name, "code": study.code(parameters), "parameters": parameters} | EMPTY
            file.write(json.dumps(row) + "\n")

    def edit(module: str, change: Callable[[str], str]) -> set[str]:
        path = tmp_path / "llmprod" / module
        path.write_text(change(path.read_text()))
        rows = zip(study.rows("all"), study.stale("all"), strict=True)
        return {row["parameters"]["experiment"] for row, stale in rows if stale}

    return edit


@pytest.mark.parametrize(
    ("module", "function", "experiments"),
    [
        ("financial_sentiment/studies.py", "weak_supervision", {"weak labels"}),
        (
            "financial_sentiment/studies.py",
            "training_of",  # chinese news imports another name in the same line
            {"alarms", "chinese news", "distillation", "heads", "rating", "weak labels"},
        ),
        ("recommendation/sequence.py", "next_items", {"next item"}),
        ("recommendation/scorers.py", "ease", {"next item", "recommendation"}),
        (
            "machine.py",
            "device_and_precision",
            set(study.declarations()["experiments"]) - {"bag of words", "setfit", "next item", "simulated shifts"},
        ),
        ("harness/study.py", "table", set()),
    ],
)
def test_a_changed_function_makes_the_rows_that_it_made_stale(own_package, module, function, experiments):
    assert own_package(module, statement_in(function)) == experiments


def test_a_changed_docstring_or_comment_makes_none_stale(own_package):
    def change(source: str) -> str:
        return re.sub(r'(def .*:\n    """)', r"\1More words. ", source) + "\n# a comment\n"

    assert own_package("recommendation/studies.py", change) == set() == own_package("models.py", change)


def test_a_row_of_uncommitted_code_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    with pytest.raises(LLMProdError, match="git checkout"):
        study.require_commit()
    (tmp_path / "llmprod").mkdir()
    (tmp_path / "llmprod/a.py").write_text("a = 1\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init"], ["add", "."], ["commit", "-m", "a"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    (tmp_path / "other.py").write_text("")
    study.require_commit()
    (tmp_path / "llmprod/a.py").write_text("a = 2\n")
    with pytest.raises(LLMProdError, match=r"llmprod/a\.py differ from it\. Commit"):
        study.require_commit()


def test_the_rows_before_it_do_not_make_a_rows_commit_uncommitted(monkeypatch):
    """They are tracked, so that the second row of a study would name a changed checkout."""
    monkeypatch.setattr(machine, "git_commit", lambda: "0123456789ab+")
    monkeypatch.setattr(workers, "run", lambda *_: {"metrics": {}, "speeds": {}})
    for changed, plus in (([], ""), (["llmprod/a.py"], "+")):  # code that was changed while the study ran is named
        monkeypatch.setattr(study, "uncommitted", lambda changed=changed: changed)
        row = study.measure({"experiment": "weak labels", "dataset": "sentiment-human", "seed": 0})
        assert row["provenance"]["commit"] == "0123456789ab" + plus


def test_a_run_has_a_process_of_its_own():
    parameters = {"model": "minilm", "max_length": 16}
    assert workers.run("builtins:dict", parameters) == parameters
    assert workers.run("tests.test_study:pid", {}) != os.getpid()


def test_a_run_whose_process_dies_is_an_error_and_no_endless_wait():
    with pytest.raises(LLMProdError, match="dies ended before it had a result"):
        workers.run("tests.test_study:dies", {"status": 9})


def test_runs_go_on_at_a_time_and_one_that_fails_loses_no_other(tiny, monkeypatch):
    meet = threading.Barrier(2)

    def together(name: str, parameters: dict, jobs: int) -> dict:
        meet.wait(timeout=60)
        if parameters["seed"] and parameters["strategy"] == "prototypes":
            raise LLMProdError("no space left")
        return {"metrics": {"accuracy": 1.0}, "speeds": {}}

    monkeypatch.setattr(workers, "run", together)
    with pytest.raises(LLMProdError, match="no space left"):
        study.run("tiny", jobs=2)
    found = [(row["parameters"]["seed"], row["parameters"]["strategy"]) for row in study.rows("tiny")]
    assert found == [(0, "plain"), (0, "prototypes"), (1, "plain")]
    assert all(row["provenance"]["machine"].endswith("2 runs at a time") for row in study.rows("tiny"))


def test_a_killed_study_leaves_no_process(tmp_path):
    code = "import sys; from llmprod import workers; workers.run('tests.test_study:linger', {'p': sys.argv[1]})"
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


def dies(parameters: dict) -> None:
    """Ends its process at once."""
    os._exit(parameters["status"])


def test_what_was_not_measured_is_said(tiny):
    assert "not measured yet" in study.styled(study.means("tiny", ["strategy"], ["accuracy"])).to_string()
    assert study.curves("tiny", "strategy").empty


def test_a_damaged_row_is_named_and_none_is_lost(tiny):
    """Only a last line may be cut: that is what a kill leaves. A row of an experiment that is gone counts as stale."""
    folder, _ = tiny
    sound = {"key": "k", "parameters": {"experiment": "gone", "seed": 0}} | EMPTY
    row = json.dumps(sound)
    (folder / "studies").mkdir()
    path = folder / "studies/tiny.jsonl"
    path.write_text(f"{row}\n{row[:20]}")
    assert study.stale("tiny") == [True]
    with pytest.raises(LLMProdError, match=r"has no experiment 'gone'; it has: finetune"):
        study.table("tiny")
    changes = [{"key": 1}, {"parameters": 1}, {"parameters": {"experiment": []}}, {"metrics": []}, {"speeds": 1}]
    changes += [{"parameters": {"experiment": "gone", name: None}} for name in ("dataset", "model")]
    changes += [{"metrics": {"accuracy": "1"}}, {"metrics": {"accuracy": 10**400}}, {"provenance": {}}, {"curve": 1}]
    lacking = [{k: v for k, v in sound.items() if k != name} for name in sound]
    others = [json.dumps(other) for other in [*lacking, *(sound | change for change in changes)]]
    for damaged in (row[:20], "[]", "{}", "[" * 100_000, *others):
        path.write_text(f"{row}\n{damaged}\n{row}\n")
        with pytest.raises(LLMProdError, match=r"tiny\.jsonl, line 2 is damaged"):
            study.run("tiny")
        assert path.read_text().count(row) == 2, "nothing was written"
    path.write_bytes(f"{row}\n".encode() + b'"\xff"\n' + row.encode())
    with pytest.raises(LLMProdError, match=r"tiny\.jsonl, line 2 is damaged"):
        study.rows("tiny")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"epochs": "two"}, "tiny: epochs is 'two'; it takes a whole number of at least 1, such as 4"),
        ({"method": 1}, "tiny: method is 1; it takes a text"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_study_sets_values_of_the_declared_kind(tiny, parameters, message):
    folder, declaration = tiny
    declaration["tiny"]["vary"] = [parameters]
    declaration["tiny"]["seeds"] = [parameters.pop("seed", 0)]
    (folder / "notebooks/studies.yaml").write_text(yaml.safe_dump(declaration))
    with pytest.raises(LLMProdError, match=message):
        study.grid("tiny")


@pytest.mark.parametrize(
    "change",
    [{"vary": None}, {"vary": 1}, {"vary": [1]}, {"vary": {"strategy": "plain"}}, {"seeds": None}, {"seeds": 1},
     {"parameters": None}, {"parameters": [1]}, {"parameters": {"experiment": ["finetune"]}}],
)  # fmt: skip
def test_a_study_of_another_shape_is_one_message(tiny, change):
    folder, declaration = tiny
    declaration["tiny"] |= change
    (folder / "notebooks/studies.yaml").write_text(yaml.safe_dump(declaration))
    with pytest.raises(LLMProdError, match=r"studies\.yaml: tiny needs seeds: \[0, 1\]"):
        study.grid("tiny")


def test_a_study_reads_exponents_as_numbers_and_keeps_the_keys_of_its_rows(tiny):
    folder, declaration = tiny
    keys = []
    for rate in ("3e-4", "3.0e-4"):  # YAML reads the first as a text
        text = yaml.safe_dump(declaration).replace("epochs: 1", f"learning_rate: {rate}")
        (folder / "notebooks/studies.yaml").write_text(text)
        keys.append([study.key(parameters) for parameters in study.grid("tiny")])
        assert study.grid("tiny")[0]["learning_rate"] == 3e-4
    assert keys[0] == keys[1]


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
    chosen = [p for p in plan if p.get("split", "test") != "test"]
    assert not chosen or (len(chosen) == len(plan) and {p["seed"] for p in plan} == {0}), "settings are chosen apart"


@pytest.mark.parametrize("path", sorted((paths.REPORTS / "studies").glob("*.jsonl")), ids=lambda p: p.stem)
def test_committed_rows_are_runs_of_the_declaration(path):
    """A row that was edited by hand, or measured under other settings, is found."""
    keys = {study.key(parameters) for parameters in study.grid(path.stem)}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert row["key"] == study.key(row["parameters"]) and row["key"] in keys
        assert not row["code"] or "+" not in row["provenance"]["commit"], "rows with a fingerprint come from a commit"
        assert set(row["provenance"]) == {"minutes", "machine", "commit", "versions"}
        assert set(row["provenance"]["versions"]) == set(machine.SHOWN)


def test_the_tables_of_the_notebooks_group_the_rows_that_are_declared():
    """A table of a study without rows shows nothing: that its columns are there must not first be tried with rows."""
    seen = 0
    for path in sorted(paths.NOTEBOOKS.glob("*.ipynb")):
        for node in ast.walk(ast.parse("\n".join(pipeline.code_of(pipeline.read(path.stem))))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "study.means"):
                continue
            try:
                name, by = (ast.literal_eval(argument) for argument in node.args[:2])
            except ValueError:  # the name of a study in a loop
                continue
            for parameters in study.grid(name):
                everything = study.defaults(parameters["experiment"]) | parameters
                values = [everything[column] for column in by]
                assert all(isinstance(value, str | int | float | bool) for value in values), (path.stem, name, by)
            seen += 1
    assert seen > 10
