"""Tracking: offline and silent without an account, with the same numbers as the results file."""

import base64
import hashlib
import http.server
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import types
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.text import Text

from llmprod import LLMProdError, paths
from llmprod.harness import track

KEY = "0123456789abcdef0123456789abcdef01234567"
TRACKED = """
import os, socket, sys

allowed, connect = {"127.0.0.1", "::1", "localhost"}, socket.socket.connect
def guarded(self, address):
    if isinstance(address, tuple) and address[0] not in allowed:
        print("CONNECTION TO", address, flush=True)
        raise ConnectionRefusedError(address)
    return connect(self, address)
socket.socket.connect = guarded

import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt, pandas as pd
from llmprod.harness import track

seed, dataset = 3, "reuters-r8"
run = track.start("01_data", {"seed": seed, "dataset": dataset})
run.log({"loss": 0.5}, step=1)
run.figure("one", plt.figure())
run.table("two", pd.DataFrame({"class": ["a"], "F1": [0.5]}))
run.lineage({"notebook": "01_data", "metrics": {}}, of=[{"notebook": "00_before", "metrics": {}}])
run.finish({"accuracy": 0.25}, {"sha256 of data": "abc"})
"""


@pytest.fixture
def trap():
    """A proxy on loopback that refuses every request and remembers it: any program's attempt to leave ends here."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            asked.append(self.path)
            self.send_error(403)

        do_GET = do_POST = do_HEAD = do_CONNECT

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def run_tracked(folder, proxy, **environment):
    """Runs the program above with every way out led into the trap."""
    ways = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"), proxy)
    # a W&B run of another test leaves its service's address in WANDB_SERVICE: a child would go out through that service
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    clean = {k: v for k, v in kept.items() if k not in ("TRACKING", "NO_PROXY", "no_proxy")}
    clean |= ways | {"LLMPROD_RUN": str(folder), "HOME": str(folder)} | environment
    return subprocess.run([sys.executable, "-c", TRACKED], env=clean, capture_output=True, text=True, timeout=120)


def test_the_trap_catches_what_leaves(trap):
    proxy, asked = trap
    code = "import requests; requests.get('https://example.com')"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"HTTPS_PROXY": proxy}, capture_output=True)
    assert asked == ["example.com:443"]


def test_without_an_account_it_is_offline_and_silent(trap, tmp_path):
    proxy, asked = trap
    done = run_tracked(tmp_path, proxy)
    assert done.returncode == 0, done.stderr
    assert asked == [] and "CONNECTION TO" not in done.stdout
    assert "wandb" not in (done.stdout + done.stderr).lower()
    assert list((tmp_path / "work/wandb").glob("offline-run-*")), "the offline run is there, to be synced later"
    assert list((tmp_path / "work/tensorboard").rglob("events*"))
    assert (tmp_path / "figures/01_data-one.png").exists()


def test_with_a_key_it_goes_online_and_without_a_network_offline_again(trap, tmp_path):
    """The key alone turns it online: the attempt is seen in the trap, the key in nothing that is written or shown."""
    proxy, asked = trap
    settings = {"WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "8", "WANDB_HTTP_TIMEOUT": "2"}
    done = run_tracked(tmp_path, proxy, **settings)
    assert done.returncode == 0, done.stderr
    assert asked and KEY not in done.stdout + done.stderr
    assert "W&B can't be reached" in done.stdout and list((tmp_path / "work/wandb").glob("offline-run-*"))
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_offline_is_offline_with_a_key_and_without_a_home(trap, tmp_path):
    """WANDB_MODE is the user's word; where HOME can't be written W&B says nothing, and its files stay in the run."""
    proxy, asked = trap
    done = run_tracked(
        tmp_path / "run", proxy, WANDB_API_KEY=KEY, WANDB_MODE="offline", HOME="/proc/none", MPLCONFIGDIR=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert asked == [] and done.stderr == ""
    (run,) = (tmp_path / "run/work/wandb").glob("offline-run-*/*.wandb")
    for private in (socket.gethostname(), sys.executable, KEY):
        assert private.encode() not in run.read_bytes() or len(private) < 6, private


@pytest.mark.parametrize(
    ("variables", "mode", "seconds"),
    [
        ({}, "offline", 15),
        ({"WANDB_API_KEY": KEY}, "online", 15),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline", 15),
        ({"WANDB_MODE": "online", "WANDB_INIT_TIMEOUT": "3"}, "online", None),
        ({"WANDB_DISABLED": "TRUE", "WANDB_MODE": "online"}, "disabled", None),
        ({"WANDB_PROJECT": "mine", "WANDB_API_KEY": KEY, "WANDB_DISABLED": "false"}, "online", 15),
    ],
)
def test_mode(monkeypatch, own_wandb, variables, mode, seconds):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found, settings = track.wandb_settings()
    assert (found, settings.get("init_timeout")) == (mode, seconds), "a network that is down costs little"
    assert settings.get("project", "") in (variables.get("WANDB_PROJECT", "llmprod"), "")


@pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "of"), ("WANDB_PROJECT", "team/x")])
def test_a_variable_that_wandb_cannot_take_is_one_message(monkeypatch, own_wandb, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(LLMProdError, match=f"W&B can't take your WANDB_ variables.*{value}.*WANDB_ENTITY") as error:
        track.wandb_settings()
    assert "\n" not in str(error.value)


@pytest.fixture
def own_wandb(monkeypatch, tmp_path):
    """No settings of the developer's or of another test."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.parametrize("choice", ["WANDB_DISABLED=true", "WANDB_MODE=disabled"])
def test_a_user_who_turned_wandb_off_has_no_run_of_it(monkeypatch, own_wandb, tmp_path, choice):
    name, _, value = choice.partition("=")
    for variable, text in {
        "TRACKING": "on",
        "WANDB_API_KEY": KEY,
        "LLMPROD_RUN": str(tmp_path / "run"),
        name: value,
    }.items():
        monkeypatch.setenv(variable, text)
    run = track.start("01_data", {"seed": 0})
    run.log({"loss": 1.0})
    run.finish({}, {})
    assert isinstance(run.wandb, track.Silent) and not (tmp_path / "run/work/wandb").exists()
    assert list((tmp_path / "run/work/tensorboard").rglob("events*"))


def test_styled_tables_show_texts_as_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPROD_RUN", str(tmp_path))
    track.start("01_data", {"seed": 0})
    assert "<script" not in pd.DataFrame({"label": ["<script>alert(1)</script>"]}).style.to_html()


def test_tracking_none_writes_nothing(tmp_path, monkeypatch, trap):
    done = run_tracked(tmp_path, trap[0], TRACKING="none")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "work/wandb").exists() and not (tmp_path / "work/tensorboard").exists()


def test_a_misspelt_switch_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKING", "off")
    monkeypatch.setenv("LLMPROD_RUN", str(tmp_path))
    with pytest.raises(LLMProdError, match="'none'"):
        track.start("01_data", {"seed": 0})


def test_sync_needs_a_key_and_a_run_that_can_be_read(monkeypatch, tmp_path):
    with pytest.raises(LLMProdError, match="WANDB_API_KEY"):
        track.sync()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    assert track.sync() == 0
    (tmp_path / "offline-run-1").mkdir()
    monkeypatch.setattr(sys, "executable", "/bin/false")  # as if the upload failed
    with pytest.raises(LLMProdError, match=r"could not upload .*offline-run-1.*make sync"):
        track.sync()


def read_offline_run(path):
    """The records of a .wandb file: protocol buffers in LevelDB's log format (blocks of 32 KiB, 7-byte headers)."""
    from wandb.proto import wandb_internal_pb2

    content, position, part = path.read_bytes(), 7, b""  # the file's own header is 7 bytes, too
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        part += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            yield record
            part = b""


def offline_run(folder, notebook):
    """What the tracker kept of a notebook's run: its identity, config, summary and artifacts."""
    for path in sorted(folder.glob("work/wandb/offline-run-*/*.wandb")):
        run, config, summary, made = None, {}, {}, {}
        for record in read_offline_run(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
                items = record.run.config.update
            elif kind == "config":
                items = record.config.update
            elif kind == "summary":
                summary |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.summary.update}
                continue
            elif kind == "artifact":
                made[record.artifact.name] = record.artifact
                continue
            else:
                continue
            config |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
        if run is not None and run.job_type == notebook:
            return run, config, summary, made
    raise AssertionError(f"no offline run of {notebook}")


@pytest.mark.parametrize("notebook", ["01_data", "02_finetune", "03_evaluate"])
def test_offline_run_holds_the_numbers_of_the_results_file(smoke_run, notebook):
    result = json.loads((smoke_run / "results" / f"{notebook}.json").read_text())
    run, config, summary, _ = offline_run(smoke_run, notebook)
    for name, metric in result["metrics"].items():
        assert summary[name] == pytest.approx(metric["value"]), name
    for name, value in result["speeds"].items():
        assert summary[name] == pytest.approx(value), name
    for name, value in result["protocol"].items():
        if not isinstance(value, dict):  # the protocols of upstream notebooks are in their own runs
            assert config[name] == value, name
    assert run.run_group == result["provenance"]["commit"]
    assert run.display_name == f"{notebook}-smoke-seed{result['seed']}"


@pytest.mark.parametrize(
    ("notebook", "of"), [("01_data", []), ("06_feedback", ["01_data", "02_finetune", "05_deploy"])]
)
def test_an_offline_run_says_what_it_was_made_of(smoke_run, notebook, of):
    """Data, model, bundle, feedback: each result is an artifact whose metadata name the results behind it."""

    def content(name):
        result = json.loads((smoke_run / f"results/{name}.json").read_text())
        del result["provenance"]  # the runner adds it when the notebook has ended
        return json.dumps(result, sort_keys=True).encode()

    *_, made = offline_run(smoke_run, notebook)
    (entry,) = made[f"{notebook}-smoke"].manifest.contents
    assert Path(entry.local_path).read_bytes() == content(notebook), "as it is when it is uploaded"
    assert entry.digest == base64.b64encode(hashlib.md5(content(notebook)).digest()).decode()
    expected = {name: hashlib.sha256(content(name)).hexdigest() for name in of}
    assert json.loads(made[f"{notebook}-smoke"].metadata)["made_of"] == expected


def test_tensorboard_has_the_same_numbers(smoke_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(smoke_run / "work/tensorboard/02_finetune")).Reload()
    result = json.loads((smoke_run / "results/02_finetune.json").read_text())
    for name, metric in result["metrics"].items():
        last = events.Scalars(f"results/{name}")[-1].value
        assert last == pytest.approx(metric["value"], rel=1e-6)
    assert len(events.Scalars("loss")) > 1 or len(events.Scalars("train_loss")) == 1


def test_table_takes_numpy_values(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPROD_RUN", str(tmp_path))
    run = track.start("01_data", {"seed": 0})
    run.table("t", pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}))
    run.finish({}, {})


@pytest.fixture
def begun(monkeypatch):
    """What W&B was begun with, in place of a run of it."""
    import wandb

    seen = []
    monkeypatch.setattr(wandb, "init", lambda **options: seen.append(options) or track.Silent())
    return seen


def test_wandb_is_told_to_collect_nothing(monkeypatch, own_wandb, begun, tmp_path):
    monkeypatch.setenv("LLMPROD_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("TRACKING", "on")
    for key in ("", KEY):
        monkeypatch.setenv("WANDB_API_KEY", key)
        track.start("01_data", {"seed": 0}).finish({}, {})
    assert [options["mode"] for options in begun] == ["offline", "online"]
    for settings in (options["settings"] for options in begun):
        assert settings.disable_git and settings.disable_code and settings.console == "off"
        assert settings.x_disable_stats and settings.x_disable_meta
        assert (settings.host, settings.program) == ("", "01_data")


def test_a_figure_draws_labels_as_they_are(monkeypatch, tmp_path):
    """With two dollars, which mathematics would take for a formula that is wrong, and in the fonts that have them."""
    drawn = []
    monkeypatch.setattr(track.machine, "drawable", drawn.append)
    monkeypatch.setenv("LLMPROD_RUN", str(tmp_path))
    with plt.rc_context(), pd.option_context("styler.format.escape", None):
        run = track.start("01_data", {"seed": 0})
        figure, axes = plt.subplots()
        axes.set_yticks([0], ["$5_$9"])
        run.figure("classes", figure)
    plt.close(figure)
    assert drawn == [figure] and (tmp_path / "figures/01_data-classes.png").exists()


def test_logarithmic_axes_show_numbers_not_formulas(tmp_path):
    """The style takes a dollar in a label for a dollar, and matplotlib writes powers of ten as formulas."""
    with plt.rc_context(), pd.option_context("styler.format.escape", None):
        track.style()
        figure, (left, right) = plt.subplots(1, 2)
        left.plot([0.1, 1, 10], [1, 2, 3])
        left.set(xscale="log", title="a $ sign, $x^2$")
        right.plot([1, 2], [1_000, 1_000_000])
        right.set(yscale="log")
        logged = types.SimpleNamespace(log=lambda _: None, Image=str, add_figure=lambda *_, **__: None)
        run = types.SimpleNamespace(folder=tmp_path, notebook="02", wandb=logged, kinds=logged, tensorboard=logged)
        track.Run.figure(run, "logarithmic", figure)
        shown = {text.get_text() for text in figure.findobj(Text)}
        plt.close(figure)
    assert {"0.1", "1", "10", "1,000", "1,000,000", "a $ sign, $x^2$"} <= shown
    assert not any("mathdefault" in text for text in shown)
    assert (tmp_path / "figures/02-logarithmic.png").exists()
