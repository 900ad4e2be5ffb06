"""Tracking online: what reaches W&B's service, for which a stand-in on loopback answers, and what happens if it fails.

What only the service itself can show is not tested: how it draws runs and lineage, sweeps, permissions of a team.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time

import pandas as pd
import pytest

from llmprod import LLMProdError, paths
from llmprod.harness import results, track
from tests.conftest import ROOT
from tests.wandb_stand_in import KEY, StandIn

PROGRAM = """
import socket, sys
socket.gethostname = lambda: "the-name-of-this-machine"
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt, pandas as pd
from llmprod.harness import results, track

a_name_in_the_code = 0
print("a line on the console")
for notebook in ("01_data", "02_finetune"):
    run = track.start(notebook, {"seed": 3, "dataset": "reuters-r8"})
    for step, loss in enumerate((0.5, 0.25), 1):
        run.log({"loss": loss}, step=step)
    run.figure("one", plt.figure())
    run.table("two", pd.DataFrame({"class": ["grain"], "F1": [0.5]}))
    results.record(run, {"accuracy": 0.75}, n=100, checksums={"data": "abc"})
"""
KILLED = """
import matplotlib; matplotlib.use("Agg")
import time
from llmprod.harness import track

run = track.start("02_finetune", {"seed": 3})
for step in (1, 2, 3):
    run.log({"loss": 1 / step}, step=step)
time.sleep(100)
"""
PRIVATE = {
    "the host": ["the-name-of-this-machine"],
    "the command line": ["a_file_that_runs", "--an-option", sys.executable],
    "the code": ["a_name_in_the_code"],
    "the console": ["a line on the console"],
    "a secret": [KEY, "another-secret"],
}


def environment(service, home, **more):
    """The variables of a user with an account, whose home is another folder, and whose service is the stand-in."""
    unset = ("WANDB", "TRACKING", "LLMPROD", "XDG")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    own = {"HOME": str(home), "LLMPROD_RUN": str(home / "run"), "MY_PASSWORD": "another-secret", "NO_PROXY": "*"}
    own["WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL"] = "1"  # seconds, where the client waits 15
    return clean | own | {"WANDB_BASE_URL": service.url, "WANDB_API_KEY": KEY} | more


@pytest.fixture
def service():
    with StandIn() as service:
        yield service
    assert not service.unknown, "the client asked for what the stand-in does not know"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A service that was told of two notebooks, one of which needs the other; and the folder of their run."""
    home = tmp_path_factory.mktemp("home")
    script = home / "a_file_that_runs.py"
    script.write_text(PROGRAM)
    with StandIn() as service:
        command = [sys.executable, str(script), "--an-option"]
        done = subprocess.run(command, env=environment(service, home), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not service.unknown and KEY not in done.stdout + done.stderr
    return service, home / "run"


def run_of(service, notebook):
    """The one run of a notebook that the service has."""
    (run,) = [run for run in service.runs.values() if run.fields["jobType"] == notebook]
    return run


def artifacts_of(service, kind="result"):
    """The artifacts of a type by name."""
    return {artifact.name: artifact for artifact in service.artifacts.values() if artifact.type == kind}


def reached(service, text):
    """The paths of requests that a text was in."""
    return [request.path for request in service.requests if text.encode() in request.path.encode() + request.body]


def test_parameters_scores_tables_and_figures_arrive(told):
    service, folder = told
    run = run_of(service, "01_data")
    config = {name: item["value"] for name, item in run.config.items()}
    assert config | {"seed": 3, "dataset": "reuters-r8", "sha256 of data": "abc"} == config
    assert run.summary["accuracy"] == 0.75
    assert [(row["loss"], row["step"]) for row in run.history if "loss" in row] == [(0.5, 1), (0.25, 2)]
    assert run.fields["displayName"] == "01_data-run-seed3" and run.exit_code == 0
    image = next(row["figures/one"] for row in run.history if "figures/one" in row)
    assert run.files[image["path"]] == (folder / "figures/01_data-one.png").read_bytes()
    table = next(row["tables/two"] for row in run.history if "tables/two" in row)
    assert json.loads(run.files[table["path"]])["data"] == [["grain", 0.5]]


def test_the_lineage_of_results_arrives(told):
    """The second run uses the very version that the first one made: the same digest, and a file with its sha256."""
    service, folder = told
    data, model = artifacts_of(service)["01_data-run"], artifacts_of(service)["02_finetune-run"]
    assert {found.state for found in service.artifacts.values()} == {"COMMITTED"}
    assert (data.made_by, model.made_by) == (run_of(service, "01_data").id, run_of(service, "02_finetune").id)
    assert run_of(service, "01_data").used == [] and run_of(service, "02_finetune").used == [data.id]
    assert json.loads(data.files["01_data.json"]) == json.loads((folder / "results/01_data.json").read_text())
    assert model.metadata["made_of"] == {"01_data": hashlib.sha256(data.files["01_data.json"]).hexdigest()}


@pytest.mark.parametrize("what", PRIVATE)
def test_what_is_private_is_not_sent(told, what):
    service, _ = told
    host = [socket.gethostname()] if len(socket.gethostname()) > 5 else []  # a short one may be part of another word
    for private in PRIVATE[what] + (host if what == "the host" else []):
        assert not reached(service, private), private
    assert not [r.path for r in service.requests if r.method == "PUT" and "authorization" in r.headers]
    assert not [r.path for r in service.requests if r.method == "PUT" and "authorization" in r.headers]
    streamed = set().union(*(run.streamed for run in service.runs.values()))
    assert streamed <= {"wandb-history.jsonl", "wandb-summary.json"}, "neither output nor the machine's load"


def test_the_home_folder_is_in_nothing_but_where_the_client_keeps_artifacts(told):
    """The client's manifest of an artifact says where the file lay: the one thing that a setting can't leave out."""
    service, folder = told
    assert {path.split("/")[2] for path in reached(service, str(folder.parent))} <= {"manifest"}
    names = {name for run in service.runs.values() for name in run.files}
    assert {name for name in names if "/" not in name} == {"config.yaml", "requirements.txt", "wandb-summary.json"}


@pytest.fixture
def online(monkeypatch, tmp_path, service):
    """This process as that of a user with an account, whose service is the stand-in; waits are short."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    waits = {"WANDB_INIT_TIMEOUT": "3", "WANDB_FINISH_TIMEOUT": "2"}
    for name, value in (environment(service, tmp_path, TRACKING="on") | waits).items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    yield service
    wandb.teardown()


def record(fails=lambda: None):
    """A notebook's run as `PROGRAM` has it, in this process; what `fails` does happens after it began."""
    run = track.start("01_data", {"seed": 3})
    fails()
    run.log({"loss": 0.5}, step=1)
    run.table("two", pd.DataFrame({"class": ["grain"], "F1": [0.5]}))
    results.record(run, {"accuracy": 0.75}, n=100)


def wait_until(true, seconds=60):
    """Waits until something is true; on a busy machine that may take a while."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_run_goes_on_where_the_user_wants_it(online, tmp_path, monkeypatch):
    """A killed notebook begins anew, in a run of its own; with WANDB_RESUME=auto it is the old run that goes on."""
    variables, quiet = environment(online, tmp_path, WANDB_RESUME="auto"), subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, "-c", KILLED], env=variables, stdout=quiet, stderr=quiet)
    try:
        wait_until(lambda: any(len(run.history) == 3 for run in online.runs.values()))
    finally:
        process.kill()
        process.wait()
    (killed,) = online.runs.values()
    assert killed.exit_code is None
    for resume, runs in (("auto", 1), ("", 2)):
        monkeypatch.setenv("WANDB_RESUME", resume) if resume else monkeypatch.delenv("WANDB_RESUME")
        run = track.start("02_finetune", {"seed": 3})
        run.log({"loss": 0.5}, step=1)
        run.finish({}, {})
        assert len(online.runs) == runs
    assert [row["step"] for row in killed.history] == [1, 2, 3, 1] and killed.exit_code == 0
    assert [row["step"] for row in online.runs[run.wandb.id].history] == [1]


@pytest.fixture
def runs(online, tmp_path, monkeypatch):
    """The folder of a run that `make sync` finds: that of a user in whose home all runs are."""
    monkeypatch.setenv("LLMPROD_RUN", str(tmp_path / "runs/one"))
    monkeypatch.setattr(paths, "REPORTS", tmp_path / "reports")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/one"


def test_sync_uploads_what_was_offline(online, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    record()
    assert not online.requests
    monkeypatch.delenv("WANDB_MODE")
    online.status = lambda request: 401
    with pytest.raises(LLMProdError, match="could not upload"):  # W&B's own command ends with 0
        track.sync()
    online.status = lambda request: 200
    command, variables = [sys.executable, "-m", "llmprod", "sync"], environment(online, tmp_path)
    variables |= {"LLMPROD_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.stdout == "uploaded 1 runs\n" and track.sync() == 0
    run = run_of(online, "01_data")
    assert run.config["seed"] == {"value": 3} and run.summary["accuracy"] == 0.75 and run.exit_code == 0
    assert [(row["loss"], row["step"]) for row in run.history if "loss" in row] == [(0.5, 1)]
    (table,) = [row["tables/two"] for row in run.history if "tables/two" in row]
    assert json.loads(run.files[table["path"]])["data"] == [["grain", 0.5]]
    made = artifacts_of(online)["01_data-one"]
    assert (made.made_by, made.state, made.metadata) == (run.id, "COMMITTED", {"made_of": {}})
    assert json.loads(made.files["01_data.json"]) == json.loads((runs / "results/01_data.json").read_text())
    assert not run.fields.get("host") and not reached(online, KEY) and not reached(online, "another-secret")
    assert not [request.path for request in online.requests if request.path.startswith("/sdk")], "no reports on itself"
    assert not (tmp_path / "wandb").exists(), "nothing where the user is"


@pytest.mark.parametrize("status", [401, 500])
def test_a_service_that_fails_from_the_start_is_done_without(online, runs, capfd, status):
    online.status = lambda request: status
    started = time.monotonic()
    record()
    assert time.monotonic() - started < 60
    said = capfd.readouterr().out
    assert "W&B can't be reached (" in said and "as the test wants it" in said
    assert (runs / "results/01_data.json").exists() and list((runs / "work/wandb").glob("offline-run-*"))


@pytest.mark.parametrize("status", [401, 500, 0])
def test_a_service_that_fails_later_holds_up_nothing(online, runs, capfd, status):
    """The result is there, after the time that the user gives W&B; the numbers follow when the service is back."""
    started = time.monotonic()
    record(fails=lambda: setattr(online, "status", lambda request: status))
    assert time.monotonic() - started < 60
    said = capfd.readouterr().out
    assert said.count("W&B did not take table two") == 1 and said.count("`make sync`") == 1
    assert (runs / "results/01_data.json").exists()
    online.status = lambda request: 200
    assert track.sync() == 1 and track.sync() == 0
    run = run_of(online, "01_data")
    assert run.summary["accuracy"] == 0.75 and run.history[0]["loss"] == 0.5


def test_a_service_that_refuses_artifacts_alone_costs_the_lineage(online, runs, capfd):
    online.status = lambda request: 403 if request.operation == "CreateArtifact" else 200
    runs.joinpath("results").mkdir(parents=True)
    record()
    run = track.start("01_data", {"seed": 3})
    run.lineage({"notebook": "01_data", "metrics": {}}, of=[{"notebook": "00_before", "metrics": {}}])
    run.finish({"accuracy": 0.5}, {})
    assert "W&B did not take the lineage (" in capfd.readouterr().out
    assert [found.summary["accuracy"] for found in online.runs.values()] == [0.75, 0.5]
