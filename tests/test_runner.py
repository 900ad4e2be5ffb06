"""Profiles, parameters, what is run again and what is not, failures and kills."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from llmprod import LLMProdError, artifacts, files, paths
from llmprod.harness import pipeline, results, runner

from .conftest import llmprod

PROFILES = sorted(p.stem for p in paths.PROFILES.glob("*.yaml"))


@pytest.mark.parametrize("profile", PROFILES)
def test_every_override_names_a_declared_parameter_of_its_type(profile):
    for notebook, overrides in pipeline.profile(profile).items():
        for name, value in overrides.items():
            default = pipeline.declared(notebook)[name]
            assert type(value) is type(default), f"{profile}: {notebook}.{name}"
            assert value != default, f"{profile}: {notebook}.{name} overrides nothing"


def test_a_stray_override_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "smoke.yaml").write_text("02_finetune: {epoch: 1}")
    monkeypatch.setattr(paths, "PROFILES", tmp_path)
    with pytest.raises(LLMProdError, match="02_finetune has no parameter epoch"):
        pipeline.profile("smoke")


def test_unknown_profile_and_notebook_say_what_there_is():
    with pytest.raises(LLMProdError, match="cpu, gpu, smoke"):
        pipeline.profile("tpu")
    with pytest.raises(LLMProdError, match="02_finetune"):
        pipeline.read("02_fine_tune")


def test_parameters_from_the_command_line():
    assert pipeline.parse_parameters("epochs=2 seed=1") == {"epochs": 2, "seed": 1}
    assert pipeline.parse_parameters("dataset='my file.csv' learning_rate=1.0e-4") == {
        "dataset": "my file.csv",
        "learning_rate": 1e-4,
    }
    assert pipeline.parse_parameters("method=full learning_rate=3e-4") == {"method": "full", "learning_rate": 3e-4}
    with pytest.raises(LLMProdError, match="learning_rate is 'fast', which is not a number"):
        pipeline.parse_parameters("learning_rate=fast")
    with pytest.raises(LLMProdError, match="epochs"):
        pipeline.parse_parameters("epoch=2")
    with pytest.raises(LLMProdError, match="name=value"):
        pipeline.parse_parameters("epochs")


def test_a_run_with_parameters_has_a_folder_of_its_own():
    assert runner.folder_for("cpu", {}) == paths.REPORTS / "cpu"
    one, two = (runner.folder_for("cpu", {"dataset": f"/data/{'x' * 90}/{name}.csv"}) for name in "ab")
    assert one != two and one.parent == paths.RUNS and len(one.name) < 90
    assert os.sep not in runner.folder_for("cpu", {"dataset": "../../etc"}).name


# Up-to-date check


def stale(folder) -> set[str]:
    """Which notebooks of the smoke run would run again."""
    injected = pipeline.settings("smoke", {})
    return {name for name in pipeline.pipeline() if not runner.is_up_to_date(name, injected, folder)}


def test_nothing_changed_nothing_runs(smoke_run):
    assert not stale(smoke_run)
    started = time.time()
    assert not runner.run(list(pipeline.pipeline()), "smoke", {}, smoke_run)
    assert time.time() - started < 10


def test_a_changed_profile_reruns_what_depends_on_it(smoke_run, monkeypatch):
    before = pipeline.profile
    changed = {"03_evaluate": {"resamples": 50}}
    monkeypatch.setattr(pipeline, "profile", lambda name: before(name) | changed)
    assert stale(smoke_run) == {"03_evaluate"}


@pytest.fixture
def own_notebooks(monkeypatch, tmp_path):
    """A copy of the notebooks that a test may change, and that the runner takes for the notebooks."""
    shutil.copytree(paths.NOTEBOOKS, tmp_path / "notebooks")
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    return tmp_path / "notebooks"


def test_a_changed_notebook_reruns_it_and_what_builds_on_it(smoke_run, own_notebooks):
    path = own_notebooks / "02_finetune.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source += "\n\nMore prose."
    nbformat.write(notebook, path)
    assert not stale(smoke_run), "prose is no code"
    notebook.cells[-1].source += "\n1 + 1"
    nbformat.write(notebook, path)
    after = {"03_evaluate", "04_optimize", "05_deploy", "06_feedback", "14_news_monitoring"}
    assert stale(smoke_run) == {"02_finetune", *after}


@pytest.mark.parametrize(
    ("module", "reruns"),
    [
        ("evaluate/robust", {"03_evaluate"}),
        ("recommendation/scorers", {"13_recommendation"}),
        ("models", {*pipeline.pipeline()}),
        ("harness/report", set()),
        ("harness/notebooks", set()),
    ],
)
def test_a_changed_module_reruns_what_imports_it(smoke_run, monkeypatch, tmp_path, module, reruns):
    shutil.copytree(paths.PACKAGE, tmp_path / "llmprod")
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "llmprod")
    assert not stale(smoke_run)
    with (tmp_path / "llmprod" / f"{module}.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    assert stale(smoke_run) == reruns


def fingerprints_of_all() -> dict[str, str]:
    return {name: pipeline.fingerprint(name, pipeline.settings("cpu", {})) for name in pipeline.pipeline()}


@pytest.fixture(scope="module")
def fingerprints():
    """Those of the notebooks as they are."""
    return fingerprints_of_all()


@pytest.mark.parametrize(
    ("file", "reruns"),
    [
        ("llmprod/recommendation/scorers.py", {"13_recommendation"}),
        ("llmprod/financial_sentiment/sentiment.py", {"12_financial_sentiment", "14_news_monitoring"}),
        ("llmprod/customer_service/support_desk/questions.jsonl", {"11_customer_service"}),
        ("llmprod/optimize/export.py", {"04_optimize", "05_deploy", "06_feedback", "14_news_monitoring"}),
        ("llmprod/machine.py", {*pipeline.pipeline()}),
        ("llmprod/harness/report.py", set()),
        ("llmprod/harness/page.html", set()),
        ("notebooks/tables.yaml", set()),
        ("README.md", set()),
    ],
)
def test_a_changed_file_changes_the_fingerprints_that_depend_on_it(monkeypatch, tmp_path, fingerprints, file, reruns):
    skipped = shutil.ignore_patterns("__pycache__", "repository")
    for name in ("llmprod", "notebooks"):
        shutil.copytree(paths.ROOT / name, tmp_path / name, ignore=skipped)
    shutil.copy(paths.ROOT / "README.md", tmp_path)
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "llmprod")
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    path = tmp_path / file
    more = {".py": "\nCHANGED = True\n", ".yaml": "\nchanged: true\n"}.get(path.suffix, "changed")
    path.write_text(path.read_text() + more)
    after = fingerprints_of_all()
    assert {name for name in after if after[name] != fingerprints[name]} == reruns


def test_a_file_that_a_module_names_counts_with_it(monkeypatch, tmp_path):
    shutil.copytree(paths.PACKAGE, tmp_path / "llmprod", ignore=shutil.ignore_patterns("__pycache__", "repository"))
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "llmprod")
    (tmp_path / "llmprod/evaluate/lists.py").write_text('WORDS = "words.yaml"\n')
    tree, prints = pipeline.syntax_tree("from llmprod.evaluate import lists"), []
    for words in ("a", "b", "b"):
        (tmp_path / "llmprod/evaluate/words.yaml").write_text(words)
        prints.append(pipeline.code_fingerprint(tree))
    assert prints[0] != prints[1] == prints[2]


@pytest.mark.parametrize(
    "code",
    [
        "import llmprod.nothing",
        "from llmprod import nothing",
        "from llmprod.evaluate import nothing",
        "from llmprod.evaluate.metrics import nothing",
        "from . import files",
    ],
)
def test_an_import_that_cannot_be_found_is_an_error(code):
    with pytest.raises(LLMProdError):
        pipeline.modules_of(pipeline.syntax_tree(code))


def test_a_changed_artifact_reruns_what_reads_it(smoke_run, monkeypatch):
    entry = json.loads(json.dumps(artifacts.registry()))
    entry["reuters-r8"]["files"]["reuters-r8-test.tab"]["sha256"] = "0" * 64
    monkeypatch.setattr(artifacts, "registry", lambda: entry)
    others = {"11_customer_service", "12_financial_sentiment", "13_recommendation"}
    assert stale(smoke_run) == {*pipeline.pipeline()} - others, "these read other data"
    monkeypatch.undo()
    entry["reuters-r52"]["files"]["reuters-r52-test.tab"]["sha256"] = "0" * 64
    assert not stale(smoke_run)


def test_provenance_stamp(smoke_run):
    for name in pipeline.pipeline():
        stamp = nbformat.read(smoke_run / f"{name}.ipynb", as_version=4).metadata["llmprod"]
        assert stamp["source"] == pipeline.source_hash(name)
        assert stamp["parameters"] == pipeline.profile("smoke").get(name, {})
        assert stamp["device"].startswith(("cpu, ", "cuda, ")) and stamp["peak memory, MB"] > 100
        assert stamp["versions"]["torch"] and stamp["machine"] and stamp["minutes"] > 0 and stamp["commit"]
        assert results.results(smoke_run)[name]["speeds"]["peak memory, MB"] > 100


# Failures


def test_bring_your_own_file_end_to_end_and_its_errors(tmp_path):
    """One command for a file of one's own; a wrong column is one clear message, and the next run goes on.

    Up to 03, since what comes after it takes minutes and reads other data, or the same splits.
    """
    rows = [
        f'"{text} number {i}",{label}'
        for i in range(60)
        for text, label in (("oil price", "oil"), ("bank loan", "bank"))
    ]
    path = tmp_path / "mine.csv"
    path.write_text("body,topic\n" + "\n".join(rows) + "\n")
    home = {"LLMPROD_HOME": str(tmp_path / "home")}
    common = f"dataset={path} max_length=16 epochs=1 resamples=20 latency_texts=2"
    command = ("reproduce", "--profile", "smoke", "--notebook", "03_evaluate")
    wrong = llmprod(*command, "--params", f"{common} text_column=text label_column=topic", **home)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    assert (
        "01_data stopped" in wrong.stderr
        and "(set text_column, label_column, id_column): no column text; it has body, topic." in wrong.stderr
    )
    assert list((tmp_path / "home/runs").rglob("01_data.ipynb")), "the executed copy stays"

    columns = "text_column=body label_column=topic"
    right = llmprod(*command, "--params", f"{common} {columns}", **home)
    assert right.returncode == 0, right.stderr
    assert "NOT COMPARABLE" in right.stdout and "dataset: " in right.stdout
    (result,) = (tmp_path / "home/runs").rglob("03_evaluate.json")
    assert json.loads(result.read_text())["metrics"]["accuracy"]["n"] == 24
    table = results.verify(result.parents[1]).query("notebook == '03_evaluate'")
    assert (table["verdict"] == results.NOT_COMPARABLE).all() and table["reason"].str.contains("dataset: ").all()


def test_a_failed_notebook_keeps_its_traceback_and_no_older_result(own_notebooks, tmp_path):
    path = own_notebooks / "01_data.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[4].source += "\nseed / 0"
    nbformat.write(notebook, path)
    files.write_json(tmp_path / "run/results/01_data.json", {"of": "an earlier state"})
    with pytest.raises(LLMProdError, match=r"01_data stopped in cell \d+: ZeroDivisionError: division by zero"):
        runner.run(["01_data"], "smoke", {}, tmp_path / "run")
    executed = nbformat.read(tmp_path / "run/01_data.ipynb", as_version=4)
    errors = [o for c in executed.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    assert errors and errors[0].ename == "ZeroDivisionError"
    assert not (tmp_path / "run/results/01_data.json").exists(), "a verdict on it would be a verdict on the past"
    assert not runner.is_up_to_date("01_data", pipeline.settings("smoke", {}), tmp_path / "run")


def test_a_killed_run_goes_on_where_it_stopped(smoke_run, tmp_path):
    """Killed in the second notebook: the first is not run again, and no half-written file is taken for a result."""
    folder = tmp_path / "home/reports/smoke"
    shutil.copytree(smoke_run, folder)
    for name in ("02_finetune", "03_evaluate"):
        for path in (folder / f"work/{name}/done.json", folder / f"results/{name}.json", folder / f"{name}.ipynb"):
            path.unlink()
    command = [sys.executable, "-m", "llmprod", "run", "--profile", "smoke"]
    environment = os.environ | {"LLMPROD_HOME": str(tmp_path / "home")}
    called_in = tmp_path / "called in"
    called_in.mkdir()
    process = subprocess.Popen(
        command, env=environment, cwd=called_in, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not (folder / "02_finetune.ipynb").exists():
        assert process.poll() is None
        time.sleep(0.2)
    time.sleep(1)  # its kernel is starting
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "results/02_finetune.json").exists()
    assert not list(called_in.iterdir()), "a killed kernel leaves its sockets in a temporary folder"
    again = llmprod("run", "--profile", "smoke", LLMPROD_HOME=str(tmp_path / "home"))
    assert again.returncode == 0, again.stderr
    finished = len(pipeline.pipeline()) - 2
    assert again.stdout.count("nothing has changed") == finished, "all but 02 and 03 were finished"
    assert results.results(folder)["03_evaluate"]["metrics"] == results.results(smoke_run)["03_evaluate"]["metrics"]


def test_the_command_line_shows_messages_not_tracebacks(tmp_path):
    for arguments in (["run", "--notebook", "99_x"], ["run", "--params", "x"], ["artifacts", "nothing"], ["sync"]):
        done = llmprod(*arguments, LLMPROD_HOME=str(tmp_path))
        assert done.returncode == 2 and "Traceback" not in done.stderr and "Error: " in done.stderr, arguments


def test_an_unwritable_place_is_one_message(tmp_path):
    (tmp_path / "home").write_text("a file where the folder should be")
    done = llmprod("run", "--profile", "smoke", LLMPROD_HOME=str(tmp_path / "home"))
    assert done.returncode == 2 and "Traceback" not in done.stderr and "could not be written" in done.stderr


def test_verify_fails_on_what_is_missing(tmp_path):
    done = llmprod("verify", LLMPROD_HOME=str(tmp_path))
    assert done.returncode == 1 and "MISSING" in done.stdout


def test_artifact_table():
    done = llmprod("artifacts")
    assert done.returncode == 0 and all(name in done.stdout for name in artifacts.registry())
    assert "CC BY-NC-SA 3.0" in done.stdout and "Apache-2.0" in done.stdout
