"""Profiles, parameters, what is run again and what is not, failures and kills."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from filelock import FileLock
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from llmprod import LLMProdError, artifacts, converted, files, models, paths
from llmprod.__main__ import main
from llmprod.harness import pipeline, report, results, runner

from .conftest import llmprod
from .test_fingerprints import statement_in

PROFILES = sorted(p.stem for p in paths.PROFILES.glob("*.yaml"))


@pytest.mark.parametrize("profile", PROFILES)
def test_every_override_names_a_declared_parameter_of_its_type(profile):
    for notebook, overrides in pipeline.profile(profile).items():
        for name, value in overrides.items():
            default = pipeline.declared(notebook)[name]
            default = list(default) if isinstance(default, tuple) else default  # as YAML writes it
            assert type(value) is type(default), f"{profile}: {notebook}.{name}"
            assert value != default, f"{profile}: {notebook}.{name} overrides nothing"


def test_a_stray_override_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "smoke.yaml").write_text("02_finetune: {epoch: 1}")
    monkeypatch.setattr(paths, "PROFILES", tmp_path)
    with pytest.raises(LLMProdError, match="02_finetune has no parameter epoch"):
        pipeline.profile("smoke")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("02_finetune: {epochs: two}", "smoke.yaml: 02_finetune: epochs is 'two'; it takes a whole number"),
        ("01_data: {encoding: [a]}", r"encoding is \['a'\]; it takes a text"),
        ("01_data: {test_share: 20}", "test_share is '20'; it takes a number from 0 to 1, such as 0.2"),
        ("02_finetune: [epochs", "smoke.yaml is not YAML.*line 1"),
        ("02_finetune: 3", "smoke.yaml must hold names, each with a mapping"),
        ("09_x: {epochs: 1}", "smoke.yaml: no notebook '09_x'; there are"),
        ('"\\e[31m": {epochs: 1}', r"no notebook '·\[31m'"),
        ("02_finetune: {on: 1}", "no parameter on"),
        ("02_finetune: {1: 1, x: 2}", "no parameter 1, x"),
        ("02_finetune: {[a]: 1}", "smoke.yaml is not YAML.*unhashable"),
        ("02_finetune: {epochs: 1, epochs: 2}", "smoke.yaml is not YAML: epochs stands twice.*line 1"),
        ("02_finetune: {epochs: 1}\n02_finetune: {}", "02_finetune stands twice"),
        ("02_finetune: {epochs: 2024-02-30}", "epochs is '2024-02-30'; it takes a whole number"),
        ("02_finetune: {epochs: !!int abc}", "epochs is 'abc'; it takes a whole number"),
        ("02_finetune: {embeddings: !!bool x}", "embeddings is 'x'; it takes true or false"),
        ("02_finetune: {epochs: " + "[" * 5000, "smoke.yaml is not YAML"),
    ],
)
def test_an_odd_profile_is_one_message(monkeypatch, tmp_path, text, message):
    (tmp_path / "smoke.yaml").write_text(text)
    monkeypatch.setattr(paths, "PROFILES", tmp_path)
    with pytest.raises(LLMProdError, match=message):
        pipeline.profile("smoke")


def test_a_folder_is_no_profile(monkeypatch, tmp_path):
    (tmp_path / "smoke.yaml").mkdir()
    monkeypatch.setattr(paths, "PROFILES", tmp_path)
    with pytest.raises(LLMProdError, match=r"smoke\.yaml can't be read"):
        pipeline.profile("smoke")


def test_a_profile_and_params_read_a_value_alike(monkeypatch, tmp_path):
    (tmp_path / "smoke.yaml").write_text("02_finetune: {seed: 010, model: 0123}")
    monkeypatch.setattr(paths, "PROFILES", tmp_path)
    found = pipeline.profile("smoke")["02_finetune"]
    assert found == {"seed": 10, "model": "0123"} == pipeline.parse_parameters("seed=010 model=0123", ["02_finetune"])


@pytest.mark.parametrize("value", ["[" * 5000, "'!!timestamp x'", "'!!bool x'", "'{a: b}'"])
def test_a_list_that_cannot_be_read_is_one_short_message(value):
    with pytest.raises(LLMProdError, match=r"spoken is .*it takes a list of texts") as error:
        pipeline.converted({"spoken": value.strip("'")}, {"spoken": ["a"]}, "PARAMS")
    assert len(str(error.value)) < 200


def test_a_profile_reads_exponents_as_numbers(monkeypatch, tmp_path):
    (tmp_path / "smoke.yaml").write_text("02_finetune: {learning_rate: 3e-4}")
    monkeypatch.setattr(paths, "PROFILES", tmp_path)
    assert pipeline.profile("smoke") == {"02_finetune": {"learning_rate": 3e-4}}


@pytest.mark.parametrize("name", ["tpu", "../cpu", "../../profiles/cpu", "", "cpu.yaml"])
def test_an_unknown_profile_says_what_there_is_and_leads_nowhere_else(name):
    for function in (pipeline.profile, lambda name: runner.folder_for(name, {})):
        with pytest.raises(LLMProdError, match=r"There is no profile .*cpu, gpu, smoke"):
            function(name)


@pytest.mark.parametrize("name", ["02_fine_tune", "../notebooks/02_finetune", "", "profiles/cpu"])
def test_an_unknown_notebook_says_what_there_is(name):
    for function in (pipeline.read, pipeline.with_upstream):
        with pytest.raises(LLMProdError, match=r"There is no notebook .*02_finetune"):
            function(name)


@pytest.mark.parametrize(
    "cell", ["epochs = two", "epochs, seed = 1, 2", "import os", "epochs = (", "epochs: int = 1 + x"]
)
def test_an_odd_parameters_cell_and_a_damaged_notebook_are_one_message(own_notebooks, cell):
    path = own_notebooks / "02_finetune.ipynb"
    notebook = nbformat.read(path, as_version=4)
    next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])).source = cell
    nbformat.write(notebook, path)
    with pytest.raises(LLMProdError, match=r"02_finetune\.ipynb: its cell 'parameters'"):
        pipeline.declared.__wrapped__("02_finetune")
    whole = path.read_text()
    for damaged in (whole[:200], "[]", "{}", '{"cells": [1]}', whole.replace('"source"', '"sources"')):
        path.write_text(damaged)
        with pytest.raises(LLMProdError, match=r"02_finetune\.ipynb can't be read as a notebook"):
            pipeline.read("02_finetune")


# Parameters from the command line

ALL = list(pipeline.pipeline())


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("epochs=2 seed=1", {"epochs": 2, "seed": 1}),
        ("  epochs=1e1\n seed=0 ", {"epochs": 10, "seed": 0}),
        ("dataset='my file.csv' learning_rate=1.0e-4", {"dataset": "my file.csv", "learning_rate": 1e-4}),
        ("method=full learning_rate=3e-4", {"method": "full", "learning_rate": 3e-4}),
        ('text_column="Review: text"', {"text_column": "Review: text"}),
        ("embeddings=True", {"embeddings": True}),
        ("spoken='[hi, where are you]'", {"spoken": ["hi", "where are you"]}),
        ("test_file= label_column=''", {"test_file": "", "label_column": ""}),
        *((f"label_column={text}", {"label_column": text}) for text in (
            "on", "no", "null", "~", "1", "010", "0x10", "1_000", "1e3", "12:30", "2024-01-01", "@tag", "*", "&x", "%x",
            "[x]", "{x}", "#tag", "it's.csv", r"C:\Users\me\a.csv", "a=b", "$HOME", "`id`", "标题", "!!python/object:x",
        )),
    ],
)  # fmt: skip
def test_parameters_take_the_kind_of_their_default(text, values):
    found = pipeline.parse_parameters(text, ALL)
    assert found == values and [type(value) for value in found.values()] == [type(value) for value in values.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate=fast", "PARAMS: learning_rate is 'fast'; it takes a number of at least 0, such as"),
        *((f"epochs={value}", "epochs is .*; it takes a whole number of at least 1, such as") for value in (
            "two", "2.5", "true", "-1", "0", "", "2,seed=1", "nan", "1e999999999", "9" * 30,
        )),
        *((f"test_share={value}", "it takes a number from 0 to 1, such as 0.2") for value in ("20%", "20", "nan")),
        ("seed=4294967296", "seed is '4294967296'; it takes a whole number from 0 to 4294967295"),
        ("learning_rate=inf", "learning_rate is 'inf'"),
        ("embeddings=yes", "embeddings is 'yes'; it takes true or false"),
        ("spoken=hi", "spoken is 'hi'; it takes a list of texts"),
        ("epochs=2 epochs=3", "epochs is set twice"),
        ("epoch=2", "no notebook of this run has a parameter epoch; there are: .*epochs"),
        ("dataset=caf\udce9.csv", "dataset is .*; it takes a text"),
        *((text, r"is not name=value, or a quote in it is not closed; write for example PARAMS=") for text in (
            "epochs", "--epochs=2", "=2", 'dataset="unclosed', "dataset=my file.csv", "dataset='a'b", "# a comment",
        )),
    ],
)  # fmt: skip
def test_odd_parameters_are_one_message(text, message):
    with pytest.raises(LLMProdError, match=message) as error:
        pipeline.parse_parameters(text, ALL)
    assert "\n" not in str(error.value)


def test_a_parameter_of_other_notebooks_is_refused_not_dropped():
    assert pipeline.parse_parameters("k=5", ALL) == {"k": 5}
    with pytest.raises(LLMProdError, match=r"no notebook of this run has a parameter k; there are: .*epochs"):
        pipeline.parse_parameters("k=5", pipeline.with_upstream("02_finetune"))


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("a' b\\")
def test_any_text_with_at_most_one_kind_of_quote_stays_that_text(text):
    quote = "'" if '"' in text else '"'
    if quote not in text:
        assert pipeline.parse_parameters(f"seed=1 dataset={quote}{text}{quote}", ALL) == {"seed": 1, "dataset": text}


@given(st.text())
def test_any_parameters_are_values_of_their_kind_or_one_message(text):
    for prefix in ("", "epochs=", "learning_rate=", "embeddings=", "spoken=", "dataset="):
        try:
            found = pipeline.parse_parameters(prefix + text, ALL)
        except LLMProdError:
            continue
        for name, value in found.items():
            defaults = [pipeline.declared(n)[name] for n in ALL if name in pipeline.declared(n)]
            assert type(value) in {list if isinstance(d, tuple) else type(d) for d in defaults}
        assert json.loads(json.dumps(found)) == found


@given(st.floats(0, 1e18) | st.integers(0, 2**62))
def test_any_number_is_read_as_it_is_written(number):
    assert pipeline.parse_parameters(f"learning_rate={number!r}", ALL) == {"learning_rate": float(number)}


def test_every_default_is_a_value_of_its_own_kind_and_one_name_has_one_kind():
    kinds = {}
    for notebook in ALL:
        values = pipeline.declared(notebook)
        found = pipeline.converted(values, values, notebook)
        assert {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()} == values
        for name, value in values.items():
            assert kinds.setdefault(name, type(value)) is type(value), name
    assert not set(pipeline.RANGES) - set(kinds)


def test_a_run_with_parameters_has_a_folder_of_its_own():
    assert runner.folder_for("cpu", {}) == paths.REPORTS / "cpu"
    for pair in ([f"/data/{'x' * 90}/{name}.csv" for name in "ab"], ["a b.csv", "a/b.csv"], ["a_b", "a b"]):
        one, two = (runner.folder_for("cpu", {"dataset": name}) for name in pair)
        assert one != two and one.parent == paths.RUNS and len(one.name) < 90
    assert os.sep not in runner.folder_for("cpu", {"dataset": "../../etc"}).name


# A small notebook, run by the runner: what labels and texts may carry, the seal, the verdict

HOSTILE = [
    "<script>alert(1)</script>",
    "<ScRiPt >alert(1)</sCrIpT >",
    "<img src=http://example.org/x.png onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<div style='background:url(http://example.org/x)' onclick=alert(1)>x</div>",
    "<style>@import 'http://example.org/x.css';</style>",
    "<!--><script>alert(1)</script>-->",
    "<script>alert(1)",
    "![x](http://example.org/x.png)",
    "</td></table><script>alert(1)</script>",
    "<base href=http://example.org/><form action=/x><input onfocus=alert(1) autofocus></form>",
]
SOURCE = """
import json, os, pathlib, sys
import numpy as np
import pandas as pd
from IPython.display import HTML, Javascript, Markdown, SVG, display
from llmprod.harness import examples

for label in LABELS:
    display(HTML(f"<b>{label}</b> <span style='background:rgba(1,2,3,0.5)'>word</span>"))
    display(Markdown(f"## {label}"), pd.DataFrame({label: [label]}), pd.DataFrame({"label": [label]}).style)
    print(label)
display(Javascript("alert(1)"), SVG("<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'></svg>"))
folder = pathlib.Path(os.environ["LLMPROD_RUN"]) / "results"
folder.mkdir(exist_ok=True)
metrics = {"accuracy": {"value": 0.5, "n": 10}}
result = {"notebook": "tiny", "seed": seed, "metrics": metrics, "protocol": {"text": text}}
(folder / "tiny.json").write_text(json.dumps(result | {"speeds": {"peak memory, MB": 1.0}}))
examples.write(folder / "tiny.parquet", examples.table(["a", "b"], [0, 1], {"accuracy": np.eye(2)}, seed))
print(sys.executable)
"""


@pytest.fixture(scope="module")
def tiny_notebook(tmp_path_factory):
    """One notebook in a folder of its own, taken for all notebooks."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "pipeline.yaml").write_text("tiny: {needs: [], timeout: 120, title: t, headline: accuracy}")
    cell = nbformat.v4.new_code_cell
    cells = [cell('text = "a"\nseed = 0', metadata={"tags": ["parameters"]}), cell(f"LABELS = {HOSTILE!r}\n{SOURCE}")]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "tiny.ipynb")
    return folder


@pytest.fixture(scope="module")
def tiny_run(tiny_notebook, tmp_path_factory):
    """Its run, on a machine where the name `python3` stands for another interpreter."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "kernels/python3").mkdir(parents=True)
    kernel = {"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}
    (elsewhere / "kernels/python3/kernel.json").write_text(json.dumps(kernel))
    with pytest.MonkeyPatch.context() as patch, runner.environment(JUPYTER_PATH=str(elsewhere)):
        patch.setattr(paths, "NOTEBOOKS", tiny_notebook)
        assert runner.run(["tiny"], "cpu", {"text": '"; import os; x = "'}, folder)
        report.build(folder)
    return folder


@pytest.fixture
def tiny(tiny_run, tiny_notebook, tmp_path, monkeypatch):
    """A copy of it to change."""
    monkeypatch.setattr(paths, "NOTEBOOKS", tiny_notebook)
    return shutil.copytree(tiny_run, tmp_path / "tiny")


def test_a_run_starts_this_interpreter_whatever_kernel_is_installed(tiny):
    executed = nbformat.read(tiny / "tiny.ipynb", as_version=4)
    printed = "".join(o.text for c in executed.cells if c.cell_type == "code" for o in c.outputs if "text" in o)
    assert printed.strip().endswith(sys.executable)
    assert results.results(tiny)["tiny"]["protocol"] == {"text": '"; import os; x = "'}, "a text is injected as a text"


ACTIVE = re.compile(
    r"<(script|img|svg|iframe|style|base|form|input|link|object|embed)|\son\w+=|javascript:|url\(|@import", re.I
)


def test_an_executed_notebook_carries_nothing_that_runs_or_loads(tiny):
    executed = nbformat.read(tiny / "tiny.ipynb", as_version=4)
    outputs = [o.data for c in executed.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    kinds = set().union(*outputs)
    assert kinds <= {"text/plain", "text/html", "text/markdown"} and len(outputs) > len(HOSTILE)
    for data in outputs:
        shown = re.sub(r"&lt;[^<]*", "", data.get("text/html", ""))  # escaped: shown as a text
        assert not ACTIVE.search(shown), shown
        assert not re.search(r"<[a-z/!?]|!\[", data.get("text/markdown", ""), re.I)
    html = "".join(data.get("text/html", "") for data in outputs)
    assert "<table" in html and "rgba(1,2,3,0.5)" in html.replace(" ", ""), "tables and colours stay"


def test_pages_run_no_script_and_load_nothing_from_elsewhere(tiny):
    for name in ("tiny.html", "index.html"):
        page = (tiny / name).read_text()
        head = page[: page.index("<title>")]
        assert "Content-Security-Policy" in head and "default-src 'none'" in head and "script-src" not in page
        assert not re.search(r"<script|<link|<iframe|<base|<img[^>]+src=.?(?!data:|figures/)", page, re.I), name


def test_the_page_of_a_run_shows_texts_of_the_data_as_texts(tiny):
    path = tiny / "results/tiny.json"
    result = json.loads(path.read_text())
    result["metrics"] |= {
        label: {"value": 0.5, "n": 10} for label in [*HOSTILE, "a | b", "[x](http://example.org)", "`c"]
    }
    files.write_json(path, result)
    stamp = {"fingerprint": "", "seal": results.seal(tiny, "tiny")}
    files.write_json(tiny / "work/tiny/done.json", stamp)
    report.build(tiny)
    page = (tiny / "index.html").read_text()
    body = page[page.index("<body>") :]
    assert not re.search(r'<(script|img|svg|iframe|style|form|input)|href="(?!tiny\.html)', body)
    assert body.count("<tr>") == len(result["metrics"]) + len(result["speeds"]) + 2, "one row each, whatever it holds"
    assert "a | b" in body and "![x](http://example.org/x.png)" in body


# The verdict believes no file that was changed after the run


def verdicts(folder) -> set[str]:
    return set(results.verify(folder)["verdict"])


def test_a_run_that_nobody_changed_is_up_to_date_and_not_edited(tiny):
    parameters = {"text": '"; import os; x = "'}
    assert runner.is_up_to_date("tiny", pipeline.settings("cpu", parameters), tiny)
    assert verdicts(tiny) == {"NOT COMPARABLE"} and results.edited(tiny, "tiny") == []


@pytest.mark.parametrize("name", ["results/tiny.json", "tiny.ipynb"])
def test_a_file_that_was_changed_after_the_run_is_called_edited(tiny, name):
    before = (tiny / name).read_text()
    for text in (before.replace("0.5", "0.9", 1) + " ", before[:40], "", "[]"):
        (tiny / name).write_text(text)
        table = results.verify(tiny)
        assert set(table["verdict"]) == {"EDITED"} and results.fails(table, {"text": "b"})
        assert table["reason"][0] == f"changed after the run: {name}; delete it and run again"
        assert results.results(tiny) == {} and "EDITED" in report.page(tiny), "the report shows no number of it"
    (tiny / name).unlink()
    assert verdicts(tiny) == {"MISSING"}
    assert not runner.is_up_to_date("tiny", pipeline.settings("cpu", {"text": '"; import os; x = "'}), tiny)


def test_predictions_that_were_changed_or_deleted_after_the_run_are_edited(tiny):
    path = tiny / "results/tiny.parquet"
    path.write_bytes(path.read_bytes() + b" ")
    assert verdicts(tiny) == {"EDITED"}
    path.unlink()
    table = results.verify(tiny)
    assert set(table["verdict"]) == {"EDITED"} and "results/tiny.parquet" in table["reason"][0]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"seal": 1}', '{"fingerprint": 1}', "null", '{"seal": {}}', '{"seal": {"tiny.ipynb": ""}}'],
)
def test_a_damaged_stamp_is_no_stamp(tiny, text):
    (tiny / "work/tiny/done.json").write_text(text)
    assert verdicts(tiny) == {"MISSING"} and not runner.is_up_to_date("tiny", pipeline.settings("cpu", {}), tiny)


def test_no_escape_sequence_of_a_stamp_or_a_result_reaches_the_terminal(tiny, capsys):
    path = tiny / "work/tiny/done.json"
    stamp = files.read_json(path)
    files.write_json(path, stamp | {"seal": stamp["seal"] | {"\x1b[2J": "x"}})
    table = results.verify(tiny)
    assert "changed after the run: ·[2J" in table["reason"][0]
    assert "\x1b" not in results.markdown(table.assign(reason="a\x1b[2J\n"))
    for option in ("--profile", "--notebook"):
        assert main(["run", option, "\x1b[2J"]) == 2
    assert "\x1b" not in "".join(capsys.readouterr())


def test_other_source_and_an_uncommitted_tree_are_shown(tiny, monkeypatch):
    monkeypatch.setattr(results, "source_hash", lambda name: "other")
    monkeypatch.setattr(results.machine, "git_commit", lambda: "abc+")
    shown = " ".join(results.notes(tiny))
    assert "The notebook has changed since it ran: tiny." in shown and "differs from its commit: abc+." in shown
    stamped = json.loads((tiny / "results/tiny.json").read_text())["provenance"]["commit"]
    assert ("Measured with code that is in no commit" in shown) == (stamped == "none" or stamped.endswith("+"))
    assert all(note in report.page(tiny) for note in results.notes(tiny))


def test_a_run_in_progress_is_not_joined_by_another(tiny):
    with (
        FileLock(tiny / "work/.lock"),
        pytest.raises(LLMProdError, match=r"Another process is running notebooks in .*tiny"),
    ):
        runner.run(["tiny"], "cpu", {"text": '"; import os; x = "'}, tiny)
    assert not runner.run(["tiny"], "cpu", {"text": '"; import os; x = "'}, tiny), "free again"


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


def test_a_changed_function_reruns_what_uses_it(smoke_run, monkeypatch, tmp_path):
    shutil.copytree(paths.PACKAGE, tmp_path / "llmprod")
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "llmprod")
    assert not stale(smoke_run)
    path = tmp_path / "llmprod/evaluate/robust.py"
    path.write_text(statement_in("typos")(path.read_text()))
    assert stale(smoke_run) == {"03_evaluate"}


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


def shrunken(model: str, folder: Path) -> Path:
    """The folder of a BERT of one layer, with the real tokenizer of a model and random weights."""
    real = models.model_folder(converted.model(model))
    config = BertConfig.from_pretrained(real, num_hidden_layers=1, hidden_size=32, num_attention_heads=2)
    config.intermediate_size = 64
    BertModel(config).save_pretrained(folder / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (real / name).exists():
            shutil.copy(real / name, folder / "bert")
    return folder / "bert"


def test_the_chinese_profile_runs_its_notebooks_and_no_others(tmp_path):
    """With its own data and a shrunken encoder; the help desk's last section speaks Chinese."""
    small = shrunken("m3e-small", tmp_path)
    few = f"model={small} frozen_model={small} train_rows=200 test_rows=60 epochs=1 max_length=16 resamples=20"
    few += " latency_texts=2 foreign_texts=10 robust_texts=4 explained_texts=2 encoder_epochs=0.1"
    home = tmp_path / "home"
    done = llmprod("run", "--profile", "zh", "--params", few, LLMPROD_HOME=str(home))
    assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in home.rglob("results/*.json")}
    assert sorted(found) == pipeline.notebooks_of("zh") == [*ALL[:3], "11_customer_service"]
    assert found["01_data"]["protocol"]["dataset"] == "chinese-reviews"
    assert found["01_data"]["metrics"]["removed from training"]["value"] > 17_000, "each review is there twice"
    (executed,) = home.rglob("11_customer_service.ipynb")
    assert "请问有什么可以帮您？" in executed.read_text(encoding="utf-8")


def test_bring_your_own_file_end_to_end_in_the_gpu_profile_and_its_errors(tmp_path):
    """One command for a file of one's own; a wrong column is one clear message, and the next run goes on.

    Up to 03, since what comes after it takes minutes and reads other data, or the same splits. In the profile for a GPU
    with its own parameters and two processes, so that no name is first tried on somebody's GPU.
    """
    rows = [
        f'"{text} number {i}",{label}'
        for i in range(60)
        for text, label in (("oil price", "oil"), ("bank loan", "bank"))
    ]
    path = tmp_path / "mine.csv"
    path.write_text("body,topic\n" + "\n".join(rows) + "\n")
    home = {"LLMPROD_HOME": str(tmp_path / "home")}
    small = shrunken("minilm", tmp_path)
    common = f"dataset={path} model={small} frozen_model={small} epochs=1 processes=2 resamples=20"
    common += " latency_texts=2 foreign_texts=10 robust_texts=4 explained_texts=2"
    command = ("reproduce", "--profile", "gpu", "--notebook", "03_evaluate")
    wrong = llmprod(*command, "--params", f"{common} text_column=text label_column=topic", **home)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    assert (
        "01_data stopped" in wrong.stderr
        and "(set text_column, label_column): no column text; it has body, topic." in wrong.stderr
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
    protocol = json.loads((result.parent / "02_finetune.json").read_text())["protocol"]
    own = pipeline.profile("gpu")["02_finetune"]
    kept = {name: value for name, value in own.items() if name not in ("model", "epochs")}
    assert kept and kept == {name: protocol[name] for name in kept} and "processes" not in protocol


def test_a_model_that_can_not_be_had_has_a_stand_in(monkeypatch, capsys, empty_cache):
    """BERT is on the hub alone; where that is not reached the model of its size in the package index is taken."""
    gpu = pipeline.settings("gpu", {})
    assert gpu["02_finetune"]["model"] == gpu["03_evaluate"]["frozen_model"] == "mpnet-base"
    assert gpu["02_finetune"]["learning_rate"] == 1e-4 and "model" not in gpu["06_feedback"]
    assert pipeline.settings("gpu", {"model": "minilm"})["02_finetune"]["model"] == "minilm", "as the run says"
    asked = []

    def fetch(name):
        asked.append(name)
        raise artifacts.ArtifactError("No source gave it.")

    monkeypatch.setattr(artifacts, "fetch", fetch)
    pipeline.get_models("gpu", {})
    assert asked == ["bert-base-uncased"]
    assert "mpnet-base takes the place of bert-base-uncased" in capsys.readouterr().out
    pipeline.get_models("gpu", {"model": "minilm", "frozen_model": "minilm"})
    pipeline.get_models("cpu", {})
    assert asked == ["bert-base-uncased"], "what is not needed is not asked for"
    monkeypatch.setattr(artifacts, "is_present", lambda name: True)
    assert pipeline.settings("gpu", {})["02_finetune"]["model"] == "bert-base-uncased"


def test_01_says_what_it_cannot_measure_and_that_the_model_lacks_the_words(tmp_path):
    """One class alone has five texts; and they are in Chinese, of which an English vocabulary has a few characters."""
    path = tmp_path / "rare.csv"
    rows = [f"第{i}条评论说这家餐厅的味道很鲜美,oil" for i in range(60)] + [
        f"a note of {name},{name}" for name in ("b", "c")
    ]
    path.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    parameters = {"dataset": str(path), "max_length": 16}
    runner.run(["01_data"], "smoke", parameters, tmp_path / "run")
    executed = (tmp_path / "run/01_data.ipynb").read_text()
    assert "Label errors can't be measured here: fewer than two classes have five training texts." in executed
    assert "of the tokens are not in the vocabulary of minilm: take a model trained on such texts" in executed


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
    folder, name = tmp_path / "home/reports/smoke", list(pipeline.pipeline())[1]
    shutil.copytree(smoke_run, folder)
    for path in (folder / f"work/{name}/done.json", folder / f"results/{name}.json", folder / f"{name}.ipynb"):
        path.unlink()
    arguments = ("run", "--profile", "smoke", "--notebook", name)
    command = [sys.executable, "-m", "llmprod", *arguments]
    environment = os.environ | {"LLMPROD_HOME": str(tmp_path / "home")}
    called_in = tmp_path / "called in"
    called_in.mkdir()
    process = subprocess.Popen(
        command, env=environment, cwd=called_in, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not (folder / f"{name}.ipynb").exists():
        assert process.poll() is None
        time.sleep(0.2)
    time.sleep(1)  # its kernel is starting
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / f"results/{name}.json").exists()
    assert not list(called_in.iterdir()), "a killed kernel leaves its sockets in a temporary folder"
    again = llmprod(*arguments, LLMPROD_HOME=str(tmp_path / "home"))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("nothing has changed") == 1, "all but this one were finished"
    assert results.results(folder)[name]["metrics"] == results.results(smoke_run)[name]["metrics"]


def test_the_command_line_shows_messages_not_tracebacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    for arguments in (
        ["run", "--notebook", "99_x"],
        ["run", "--notebook", "../01_data"],
        ["run", "--params", "x"],
        ["run", "--profile", "../cpu"],
        ["verify", "--profile", "../../reports/cpu"],
        ["report", "--profile", "/tmp"],
        ["reference", "--profile", "../cpu"],
        ["reference", "--notebook", "99_x"],
        ["artifacts", "nothing"],
        ["study", "nothing"],
        ["sync"],
    ):
        assert main(arguments) == 2, arguments
        assert re.match(r"\w*Error: .", capsys.readouterr().err), arguments


@pytest.mark.parametrize(
    "arguments",
    [
        ["study", "--jobs", "0"],
        ["reference", "--seeds", "-1"],
        ["monitor", "--source", "x", "--lateness", "nan"],
        ["monitor", "--source", "x", "--every", "inf"],
        ["monitor", "--source", "x", "--pause", "-1"],
        ["serve", "--rate", "nan"],
        ["feedback", "--store", "x", "--older-than", "nan"],
        ["monitor", "--source", "x", "--topic", "oil \udcff"],
        ["alerts", "--right", "\udcff"],
    ],
)
def test_the_command_line_refuses_what_an_option_can_not_be(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"argument {arguments[-2]}" in capsys.readouterr().err


def test_an_unwritable_place_is_one_message(tmp_path):
    (tmp_path / "home").write_text("a file where the folder should be")
    done = llmprod("run", "--profile", "smoke", LLMPROD_HOME=str(tmp_path / "home"))
    assert done.returncode == 2 and "Traceback" not in done.stderr and "could not be written" in done.stderr
    assert "LLMPROD_HOME" in done.stderr, "the way out of a checkout that is read-only"


def test_verify_fails_on_what_is_missing(tmp_path):
    done = llmprod("verify", LLMPROD_HOME=str(tmp_path))
    assert done.returncode == 1 and "MISSING" in done.stdout


def test_artifact_table():
    done = llmprod("artifacts")
    assert done.returncode == 0 and all(name in done.stdout for name in artifacts.registry())
    assert "CC BY-NC-SA 3.0" in done.stdout and "Apache-2.0" in done.stdout
