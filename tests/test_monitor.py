"""The monitor from source to alert: killed at any moment, with channels that fail, over real HTTP on loopback."""

import hashlib
import hmac
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest

from llmprod import models
from llmprod.__main__ import main
from llmprod.evaluate import drift
from llmprod.financial_sentiment import multitask, sentiment
from llmprod.financial_sentiment.entities import Entity
from llmprod.news_monitoring import channels, monitor, sources
from llmprod.news_monitoring.documents import Document, NewsError
from llmprod.news_monitoring.journal import Journal
from llmprod.news_monitoring.scorer import MonitorConfig, Scorer
from tests.conftest import ROOT, llmprod

BAD = ("loss", "fraud", "collapse", "strike", "default", "layoffs", "fine", "recall")
FINE = ("dividend", "contract", "meeting", "profit", "order", "opening", "merger", "growth")


def by_words(documents):
    """A scorer without a model: a document is negative by its words."""
    return [
        {
            "topic": "earn" if "Acme" in d.text else "ship",
            "rating": 0.0,
            "negative": (negative := 0.9 if any(word in d.text for word in BAD) else 0.1),
            "length": len(d.text.split()),
            "about": {"company: acme": negative} if "Acme" in d.text else {},
        }
        for d in documents
    ]


def news(count: int, surge_from: int = 10**9, seed: int = 0) -> list[dict]:
    """Documents of two topics, an hour's worth each minute; from a place on those of one are mostly negative."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        acme = draw.random() < 0.7
        bad = draw.random() < (0.6 if acme and i >= surge_from else 0.1)
        words = " ".join(draw.choice(("north", "east", "red", "blue", "old", "new", "iron", "glass")) for _ in range(6))
        text = f"{'Acme' if acme else 'Boat'} {draw.choice(BAD if bad else FINE)} {words} {i} {i * 7}"
        rows.append({"id": str(i), "time": 1000.0 + 60 * i, "text": text})
    return rows


def watch(folder, channels=(), lateness=0.0):
    """A monitor with a small detector, on a journal in a folder."""
    config = MonitorConfig(sentiment.PlattScaling(-3.0, 0.0, 0.5), (-0.1, 0.1), threshold=10_000.0, share=0.1)
    return monitor.Monitor(by_words, Journal(folder / "journal.sqlite"), config.detector, channels, lateness)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def state_of(journal):
    """Everything that must not depend on kills: documents, detectors, alerts."""
    alerts = journal.alerts()
    seen = monitor.seen(journal)
    return (
        seen[["id", "time", "text", "negative", "fed"]].to_dict("records"),
        [journal.state(key) for key in ("topic: earn", "topic: ship", "company: acme")],
        alerts.reindex(columns=["id", "key", "count"]).to_dict("records"),
    )


def test_a_surge_is_told_once_with_what_caused_it(tmp_path):
    write(tmp_path / "in.jsonl", news(400, surge_from=250))
    watching = watch(tmp_path, [channels.Log(tmp_path / "alerts.jsonl")])
    counts = monitor.run(watching, [sources.Tail(tmp_path / "in.jsonl", batch=50)], once=True)
    assert counts["documents"] == 400
    told = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert {alert["key"] for alert in told} == {"topic: earn", "company: acme"}
    assert counts["alerts"] == len(told) == len({alert["id"] for alert in told})
    first = next(alert for alert in told if alert["key"] == "topic: earn")
    assert 1000 + 60 * 250 <= first["time"] < 1000 + 60 * 300
    assert first["share"] > 2 * first["baseline"]
    assert all(any(word in document["text"] for word in BAD) for document in first["documents"])
    # the same again: nothing new, nothing told
    assert monitor.run(watching, [sources.Tail(tmp_path / "in.jsonl")], once=True)["documents"] == 400
    assert len((tmp_path / "alerts.jsonl").read_text().splitlines()) == len(told)


def test_the_progress_line_tells_how_far_behind_it_is(tmp_path, capsys):
    write(tmp_path / "in.jsonl", [row | {"time": time.time() - 100 + i} for i, row in enumerate(news(20))])
    monitor.run(watch(tmp_path), [sources.Tail(tmp_path / "in.jsonl")], once=True)
    behind = re.search(r"(\d+) s behind", capsys.readouterr().err)
    assert 75 <= int(behind[1]) <= 100
    write(tmp_path / "old.jsonl", news(5, seed=1))
    (tmp_path / "old").mkdir()
    monitor.run(watch(tmp_path / "old"), [sources.Tail(tmp_path / "old.jsonl")], once=True)
    assert "behind" not in capsys.readouterr().err


KILLED = """
import os, random, signal, sys, time
from pathlib import Path

from llmprod.news_monitoring import channels, monitor, sources
from tests.test_monitor import watch

folder, kills = Path(sys.argv[1]), 0
draw = random.Random(int(sys.argv[2]))
while kills < 50:
    child = os.fork()
    if child == 0:
        try:
            watching = watch(folder, [channels.Log(folder / "alerts.jsonl")])
            monitor.run(watching, [sources.Tail(folder / "in.jsonl", batch=4)], once=True)
        finally:
            os._exit(0)
    time.sleep(draw.uniform(0.005, 0.09))
    os.kill(child, signal.SIGKILL)
    kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(kills, flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fifty_kills_lose_nothing_and_double_nothing(tmp_path):
    rows = news(1500, surge_from=600)
    rows = rows + random.Random(1).sample(rows, 60)  # repeats
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "in.jsonl", rows)
    quiet = watch(tmp_path / "whole", [channels.Log(tmp_path / "whole" / "alerts.jsonl")])
    monitor.run(quiet, [sources.Tail(tmp_path / "whole" / "in.jsonl", batch=4)], once=True)

    killer = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), "0"]
    done = subprocess.run(killer, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "50"
    again = watch(tmp_path / "killed", [channels.Log(tmp_path / "killed" / "alerts.jsonl")])
    before = len(again.journal.recent())
    assert before > 0  # it got somewhere between the kills
    monitor.run(again, [sources.Tail(tmp_path / "killed" / "in.jsonl", batch=4)], once=True)

    assert state_of(again.journal) == state_of(quiet.journal)
    logs = [(tmp_path / name / "alerts.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    assert [json.loads(line)["id"] for line in logs[1]] == [json.loads(line)["id"] for line in logs[0]]
    assert logs[0]


def test_a_step_that_fails_leaves_everything_as_it_was(tmp_path):
    write(tmp_path / "in.jsonl", news(100, surge_from=20))
    watching = watch(tmp_path)
    source = sources.Tail(tmp_path / "in.jsonl", batch=40)
    watching.step([source])
    before = state_of(watching.journal), watching.journal.cursor(source.name), dict(watching.counts)

    def broken(documents):
        raise MemoryError

    scorer, watching.scorer = watching.scorer, broken
    with pytest.raises(MemoryError):
        watching.step([source])
    assert (state_of(watching.journal), watching.journal.cursor(source.name), dict(watching.counts)) == before
    watching.scorer = scorer
    monitor.run(watching, [source], once=True)
    assert len(watching.journal.recent()) == 100


class Receiver(BaseHTTPRequestHandler):
    """A webhook that fails as often as it is told to."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((dict(self.headers), body))
        self.send_response(500 if len(self.server.got) <= self.server.failures else 204)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def receiver():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.got, server.failures = [], 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/hook?token=hidden"
    yield server
    server.shutdown()


ALERT = {"id": "abc", "key": "topic: earn", "severity": 3.0, "documents": []}


def test_a_webhook_is_signed_and_repeated_until_it_is_taken(receiver, monkeypatch):
    monkeypatch.setenv("LLMPROD_WEBHOOK_SECRET", "quiet")
    receiver.failures = 2
    channels.Webhook(receiver.url, wait=0.01).send(ALERT)
    assert len(receiver.got) == 3
    headers, body = receiver.got[-1]
    assert json.loads(body) == ALERT
    assert headers["Idempotency-Key"] == "abc"
    assert headers["X-Signature"] == "sha256=" + hmac.new(b"quiet", body, hashlib.sha256).hexdigest()
    assert "quiet" not in str(receiver.got)


def test_alerts_wait_for_a_channel_that_fails(receiver, tmp_path):
    write(tmp_path / "in.jsonl", news(400, surge_from=200))
    receiver.failures = 10**6
    hook = channels.Webhook(receiver.url, tries=1, wait=0)
    watching = watch(tmp_path, [hook, channels.Log(tmp_path / "alerts.jsonl")])
    monitor.run(watching, [sources.Tail(tmp_path / "in.jsonl")], once=True)
    assert "answered 500" in watching.problems[hook.name]
    assert "hidden" not in str(watching.problems)  # what stands after the question mark may be a secret
    told = (tmp_path / "alerts.jsonl").read_text().splitlines()
    assert told  # the other channel is not held up
    receiver.got.clear()
    receiver.failures = 0
    watching.step([])
    assert [json.loads(body)["id"] for _, body in receiver.got] == [json.loads(line)["id"] for line in told]
    assert hook.name not in watching.problems
    watching.step([])
    assert len(receiver.got) == len(told)


def test_a_log_ends_a_line_that_a_kill_cut_off(tmp_path):
    log = channels.Log(tmp_path / "alerts.jsonl")
    log.send(ALERT)
    log.path.write_bytes(log.path.read_bytes() + b'{"id": "half')
    log.send(ALERT)
    log.send(ALERT | {"id": "next"})
    lines = log.path.read_text().splitlines()
    assert [json.loads(lines[0])["id"], json.loads(lines[2])["id"]] == ["abc", "next"]


@pytest.mark.parametrize("word", ["ftp://example.org", "alerts.txt", "nonsense"])
def test_an_unknown_channel_is_named(word):
    with pytest.raises(NewsError, match="--alert"):
        channels.open_channel(word)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `14_news_monitoring` saves, from a minute's training on real ratings: one encoder with two heads."""
    table = sentiment.load()
    train, validation, _ = sentiment.split_half(table, seed=0)
    train = train.head(500)
    feeling = multitask.Task("sentiment", train["text"].tolist(), train["rating"].to_numpy())
    themes = [f"{theme} {i}" for i in range(20) for theme in ("quarterly profit and loss", "tanker and cargo ship")]
    topic = multitask.Task("topic", themes, np.tile([0, 1], 20), ["earn", "ship"])
    learnt = multitask.train_multitask(
        [feeling, topic], layers=3, epochs=2, max_length=32, learning_rate=5e-4, progress=False
    )
    rating = multitask.predict(learnt, validation["text"].tolist())["sentiment"]
    folder = tmp_path_factory.mktemp("models")
    reference = {"length": [10, 20, 30], "rating": rating[:3].tolist(), "topic": ["earn", "ship", "earn"]}
    negative = sentiment.PlattScaling.fit(rating, validation["sentiment"] == 0)
    config = MonitorConfig(negative, (-0.1, 0.1), threshold=40.0, every=70, reference=reference)
    config.save(folder, "a test", learnt)
    return folder


class Names:
    """Finds two companies without a model."""

    def find(self, texts):
        return [[Entity("company", m.group().lower(), *m.span()) for m in re.finditer("Acme|Beta", t)] for t in texts]


def test_the_scorer_reads_what_was_saved(trained):
    documents = [
        Document("1", "s", 0.0, "Acme Corp said it suffered a terrible loss and fired workers in a scandal."),
        Document("2", "s", 0.0, "Acme Corp won a wonderful award for its great and happy results."),
        Document("3", "s", 0.0, "The tanker and the cargo ship."),
        Document("4", "s", 0.0, "Acme Corp won a wonderful award. Beta Inc suffered a terrible loss and scandal."),
    ]
    scorer = Scorer(trained)
    scorer.finder = Names()
    bad, good, ship, mixed = scorer(documents)
    assert bad["negative"] > good["negative"] + 0.2
    assert bad["rating"] < 0 < good["rating"]
    assert bad["about"]["company: acme"] > good["about"]["company: acme"] + 0.2
    assert ship["topic"] == "ship" and ship["about"] == {}
    assert mixed["about"]["company: beta"] > mixed["about"]["company: acme"] + 0.1
    small = Scorer(trained, "int8")(documents)
    assert [score["topic"] for score in small] == [score["topic"] for score in (bad, good, ship, mixed)]
    assert small[0]["negative"] > small[1]["negative"] + 0.2
    assert Scorer(trained)([]) == []
    with pytest.raises(NewsError, match="14_news_monitoring"):
        Scorer(trained / "nowhere")


def test_the_threshold_goes_with_the_false_alarms_asked_for(trained, tmp_path):
    """Also for a topic that the journal knows from an earlier run."""
    for every, rows, threshold in ((0, 5, 40), (700, 10, 400)):
        scorer = Scorer(trained, every=every)
        write(tmp_path / "in.jsonl", news(rows))
        with Journal(tmp_path / "journal.sqlite") as journal:
            watching = monitor.Monitor(scorer, journal, scorer.config.detector, [], 0.0)
            monitor.run(watching, [sources.Tail(tmp_path / "in.jsonl")], once=True)
            states = [journal.state(f"topic: {topic}", None) for topic in monitor.seen(journal)["topic"]]
            assert len(states) == rows and {state["threshold"] for state in states} == {threshold}
            with journal.transaction():
                for topic, state in zip(monitor.seen(journal)["topic"], states, strict=True):  # an older version's
                    journal.set_state(f"topic: {topic}", state | {"settings": state["settings"] | {"ceiling": 4.0}})
    with pytest.raises(NewsError, match="every"):
        Scorer(trained, every=-1)
    unmeasured = shutil.copytree(trained, tmp_path / "models")
    settings = json.loads((trained / "monitor.json").read_text())
    settings.pop("every")
    (unmeasured / "monitor.json").write_text(json.dumps(settings))
    assert Scorer(unmeasured).config.detector("topic: ship").threshold == 40
    with pytest.raises(NewsError, match="every"):
        Scorer(unmeasured, every=700)


def test_the_command_line_watches_judges_and_exports(trained, tmp_path, capsys):
    bad = [
        "Acme Corp suffered a terrible loss after fraud and scandal",
        "The disaster ruined Acme Corp and killed hope",
    ]
    good = ["Acme Corp won a wonderful award", "A splendid and happy year for Acme Corp"]
    rows = [
        {"text": f"{(good if i < 60 else bad)[i % 2]}, item {i} of {i * i} in week {i // 7}", "time": 1e9 + 60 * i}
        for i in range(130)
    ]
    write(tmp_path / "in.jsonl", rows)
    journal = ("--journal", str(tmp_path / "memory" / "journal.sqlite"))
    arguments = ("monitor", "--source", str(tmp_path / "in.jsonl"), "--models", str(trained), "--once", *journal)
    done = llmprod(*arguments, "--alert", "console", "--alert", str(tmp_path / "alerts.jsonl"))
    assert done.returncode == 0, done.stderr
    assert "ALERT" in done.stdout
    alert = json.loads((tmp_path / "alerts.jsonl").read_text().splitlines()[0])
    with (tmp_path / "in.jsonl").open("a") as stream:
        stream.write(json.dumps({"text": "Acme Corp in a telegram of long ago", "time": 1e9 - 1e6}) + "\n")
    assert "1 documents of this journal came too late" in llmprod(*arguments).stdout
    assert main(["alerts", "--right", alert["id"], "--export", str(tmp_path / "judged.csv"), *journal]) == 0
    assert alert["id"] in capsys.readouterr().out
    judged = pd.read_csv(tmp_path / "judged.csv")
    assert set(judged["label"]) == {"negative"}
    assert len(judged) == len(alert["documents"])
    assert main(["alerts", "--right", "nonsense", *journal]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert main(["monitor", "--source", str(tmp_path / "no such file"), *journal]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_signal_ends_it_cleanly_and_it_goes_on(trained, tmp_path):
    write(tmp_path / "in.jsonl", news(30))
    command = [sys.executable, "-m", "llmprod", "monitor", "--source", str(tmp_path / "in.jsonl")]
    command += ["--models", str(trained), "--journal", str(tmp_path / "j.sqlite"), "--pause", "0.1"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while time.time() < deadline:
        time.sleep(0.2)
        if (tmp_path / "j.sqlite").exists():
            with Journal(tmp_path / "j.sqlite", shared=True) as journal:
                if len(journal.recent()) == 30:
                    break
    running.send_signal(signal.SIGTERM)
    out, error = running.communicate(timeout=30)
    assert running.returncode == 0, error
    assert "30 documents" in out
    assert "Traceback" not in error


def test_wandb_alerts_stay_offline_without_a_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    channel = channels.Wandb()
    channel.send(ALERT)
    channel.run.finish()
    assert list(tmp_path.rglob("offline-run-*"))


def test_drift_and_judged_texts_come_from_the_journal(tmp_path):
    write(tmp_path / "in.jsonl", news(400, surge_from=200))
    watching = watch(tmp_path)
    monitor.run(watching, [sources.Tail(tmp_path / "in.jsonl")], once=True)
    seen = monitor.seen(watching.journal)
    same = drift.drift(seen[["length", "topic"]], seen[["length", "topic"]])
    assert not same["drifted"].any()
    first = watching.journal.alerts().iloc[0]
    assert monitor.judged(watching.journal).empty
    watching.journal.acknowledge(first["id"], right=False)
    judged = monitor.judged(watching.journal)
    assert set(judged["label"]) == {""} and set(judged["text"]) <= set(seen["text"])


def test_saved_models_load_without_a_pickle(trained):
    assert not [path for path in trained.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert len(models.Predictor.load(trained / "sentiment").labels) == 3
