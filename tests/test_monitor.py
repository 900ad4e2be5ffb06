"""The monitor from source to alert: killed at any moment, with channels that fail, over real HTTP on loopback."""

import hashlib
import hmac
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import wandb
from sklearn.metrics import adjusted_mutual_info_score

from llmprod import data, models, tables
from llmprod.__main__ import main
from llmprod.evaluate import drift
from llmprod.financial_sentiment import multitask, sentiment
from llmprod.financial_sentiment.entities import Entity
from llmprod.news_monitoring import channels, monitor, shift, sources, topics
from llmprod.news_monitoring.documents import DAY, HEAD, LIMIT, Document, NewsError
from llmprod.news_monitoring.duplicates import new_documents
from llmprod.news_monitoring.journal import Journal
from llmprod.news_monitoring.scorer import MonitorConfig, Scorer
from llmprod.products import opened_store
from tests.conftest import ROOT, llmprod

BAD = ("loss", "fraud", "collapse", "strike", "default", "layoffs", "fine", "recall")
PREDICT = multitask.predict
START = 1e9  # seconds since 1970
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


def news(count: int, surge_from: int = 10**9, seed: int = 0, apart: int = 60) -> list[dict]:
    """Documents of two topics, so many seconds apart; from a place on those of one are mostly negative."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        acme = draw.random() < 0.7
        bad = draw.random() < (0.6 if acme and i >= surge_from else 0.1)
        words = " ".join(draw.choice(("north", "east", "red", "blue", "old", "new", "iron", "glass")) for _ in range(6))
        text = f"{'Acme' if acme else 'Boat'} {draw.choice(BAD if bad else FINE)} {words} {i} {i * 7}"
        rows.append({"id": str(i), "time": START + apart * i, "text": text})
    return rows


def watch(folder, channels=(), lateness=0.0, kind="surge"):
    """A monitor with a small detector of a kind, on a journal in a folder."""
    config = MonitorConfig(sentiment.PlattScaling(-3.0, 0.0, 0.5), (-0.1, 0.1), threshold=10_000.0, share=0.1)
    detector = config.detector if kind == "surge" else shift.allowing(0.2)
    return monitor.Monitor(by_words, Journal(folder / "journal.sqlite"), detector, channels, lateness)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def without_ids(state):
    """The state of a detector, without the ids, in which the file's name counts."""
    causes = state and (state["causes"] if "causes" in state else [cause for day in state["days"] for cause in day[3]])
    return state and state | {"causes": [weight for _, weight in causes], "days": None}


def state_of(journal, name=""):
    """Everything that must not depend on kills: documents, detectors, alerts."""
    alerts = journal.alerts()
    seen = monitor.seen(journal)
    return (
        seen[["time", "text", "negative", "fed"]].to_dict("records"),
        [
            without_ids(journal.state(name + key))
            for key in ("topic: earn", "topic: ship", "company: acme", shift.WHOLE)
        ],
        alerts.reindex(columns=["time", "key", "count"]).sort_values(["time", "key"]).to_dict("records"),
    )


def test_a_surge_is_told_once_with_what_caused_it(tmp_path):
    write(tmp_path / "in.jsonl", news(400, surge_from=250))
    watching = watch(tmp_path, [channels.Log(tmp_path / "alerts.jsonl")])
    counts = monitor.run(watching, [sources.Tail(tmp_path / "in.jsonl", batch=50)], once=True)
    assert counts["documents"] == 400
    told = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert {alert["key"] for alert in told} == {"topic: earn", "company: acme"}
    assert {alert["event"] for alert in told} == {told[0]["id"]}, "one event under two keys"
    assert counts["alerts"] == len(told) == len({alert["id"] for alert in told})
    first = next(alert for alert in told if alert["key"] == "topic: earn")
    assert START + 60 * 250 <= first["time"] < START + 60 * 300
    assert first["share"] > 2 * first["baseline"]
    assert all(any(word in document["text"] for word in BAD) for document in first["documents"])
    # the same again: nothing new, nothing told
    assert monitor.run(watching, [sources.Tail(tmp_path / "in.jsonl")], once=True)["documents"] == 400
    assert len((tmp_path / "alerts.jsonl").read_text().splitlines()) == len(told)


@pytest.mark.parametrize("kind", ["surge", "shift"])
def test_the_end_of_an_event_is_told_once(tmp_path, capsys, kind):
    """When the last of its keys is back; it is no alert to be judged, and the next event is told again."""
    apart = 3600 if kind == "shift" else 60
    rows = [
        *news(800),
        *news(60, surge_from=0),
        *news(800, seed=1),
        *news(60, surge_from=0, seed=1),
        *news(800, seed=2),
    ]
    write(tmp_path / "in.jsonl", [row | {"id": str(i), "time": START + apart * i} for i, row in enumerate(rows)])
    watching = watch(tmp_path, [channels.Console(), channels.Log(tmp_path / "alerts.jsonl")], kind=kind)
    monitor.run(watching, [sources.Tail(tmp_path / "in.jsonl", batch=50)], once=True)
    told = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    events = list(dict.fromkeys(alert["event"] for alert in told))
    assert len(events) == 2
    for event in events:
        *begun, end = [alert for alert in told if alert["event"] == event]
        assert begun[0]["id"] == event and end["id"] == f"{event}.over" and "is over" in end["said"]
        assert max(alert["time"] for alert in begun) < end["time"]
    assert capsys.readouterr().out.count("is over; since ") == 2
    assert len(watching.journal.alerts()) == len(told) - 2 == watching.counts["alerts"]


def test_a_key_that_is_in_the_news_no_longer_ends_its_event(tmp_path):
    """Else every later alert of any key would belong to the event of a company that nobody writes about."""
    rows = [*news(400, surge_from=250), *news(800, seed=1)]
    rows = [row | {"id": str(i), "time": START + 60 * i + (i >= 400) * 8 * 86400} for i, row in enumerate(rows)]
    rows = [row for i, row in enumerate(rows) if i < 400 or "Acme" not in row["text"]]
    write(tmp_path / "in.jsonl", rows)
    watching = watch(tmp_path, [channels.Log(tmp_path / "alerts.jsonl")])
    monitor.run(watching, [sources.Tail(tmp_path / "in.jsonl")], once=True)
    *_, end = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert end["id"].endswith(".over") and end["time"] == rows[400]["time"] and not watching.on


def test_the_progress_line_tells_how_far_behind_it_is(tmp_path, capsys):
    write(tmp_path / "in.jsonl", [row | {"time": time.time() - 100 + i} for i, row in enumerate(news(20))])
    monitor.run(watch(tmp_path), [sources.Tail(tmp_path / "in.jsonl")], once=True)
    told = capsys.readouterr().err
    behind = re.search(r"(\d+) s behind", told)
    assert 75 <= int(behind[1]) <= 100 and re.search(r"\d+% of the time scoring, \d+ s behind", told)
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
while kills < int(sys.argv[4]):
    child = os.fork()
    if child == 0:
        try:
            watching = watch(folder, [channels.Log(folder / "alerts.jsonl")], kind=sys.argv[3])
            monitor.run(watching, [sources.Tail(folder / "in.jsonl", batch=4)], once=True)
        finally:
            os._exit(0)
    time.sleep(draw.uniform(0.005, 0.2))
    os.kill(child, signal.SIGKILL)
    kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(kills, flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("kind", "kills"), [("surge", 50), ("shift", 20)])
def test_kills_lose_nothing_and_double_nothing(tmp_path, kind, kills):
    name = "" if kind == "surge" else shift.Shift.name
    rows = news(1500, surge_from=600 if kind == "surge" else 1000, apart=60 if kind == "surge" else 3600)
    rows = rows + random.Random(1).sample(rows, 60)  # repeats
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "in.jsonl", rows)
    quiet = watch(tmp_path / "whole", [channels.Log(tmp_path / "whole" / "alerts.jsonl")], kind=kind)
    monitor.run(quiet, [sources.Tail(tmp_path / "whole" / "in.jsonl", batch=4)], once=True)

    killer = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), "0", kind, str(kills)]
    done = subprocess.run(killer, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(kills)
    again = watch(tmp_path / "killed", [channels.Log(tmp_path / "killed" / "alerts.jsonl")], kind=kind)
    before = len(again.journal.recent())
    assert before > 0  # it got somewhere between the kills
    monitor.run(again, [sources.Tail(tmp_path / "killed" / "in.jsonl", batch=4)], once=True)

    assert state_of(again.journal, name) == state_of(quiet.journal, name)
    assert again.journal.state("ready") == quiet.journal.state("ready")
    logs = [(tmp_path / name / "alerts.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    alerts = [sorted((alert["time"], alert["key"]) for alert in map(json.loads, log)) for log in logs]
    assert alerts[0] == alerts[1] and alerts[0] and len(set(logs[1])) == len(logs[1])


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


ALERT = {"id": "abc", "event": "abc", "key": "topic: earn", "said": "60% negative", "documents": []}


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
    watching.deliver()
    assert not receiver.got, "it rests after it failed"
    watching.waits.clear()
    watching.deliver()
    assert [json.loads(body)["id"] for _, body in receiver.got] == [json.loads(line)["id"] for line in told]
    assert hook.name not in watching.problems
    watching.deliver()
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
        channels.open_channel(word, opened_store)


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
    """Finds two companies without a model, and takes an abbreviation for a third."""

    def find(self, texts):
        found = [re.finditer("Acme|Beta|mths", text) for text in texts]
        return [[Entity("company", match.group().lower(), *match.span()) for match in matches] for matches in found]


def test_the_scorer_reads_what_was_saved(trained):
    documents = [
        Document("1", "s", 0.0, "Acme Corp said it suffered a terrible loss and fired workers in nine mths."),
        Document("2", "s", 0.0, "Acme Corp won a wonderful award for its great and happy results."),
        Document("3", "s", 0.0, "The tanker and the cargo ship."),
        Document("4", "s", 0.0, "Acme Corp won a wonderful award. Beta Inc suffered a terrible loss and scandal."),
    ]
    scorer = Scorer(trained)
    scorer.finder = Names()
    bad, good, ship, mixed = scorer(documents)
    assert bad["negative"] > good["negative"] + 0.2
    assert bad["rating"] < 0 < good["rating"] and set(bad["about"]) == {"company: acme"}
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
    (unmeasured / "manifest.json").unlink()  # as before there was one
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
    arguments = (*arguments, "--every", "70")
    store = f"sqlite:///{tmp_path / 'feedback.db'}"
    done = llmprod(*arguments, "--alert", "console", "--alert", str(tmp_path / "alerts.jsonl"), "--alert", store)
    assert done.returncode == 0, done.stderr
    assert "ALERT" in done.stdout
    alert = json.loads((tmp_path / "alerts.jsonl").read_text().splitlines()[0])
    with opened_store(store) as kept:
        assert kept.table("answers")["request"].tolist() == [alert["id"]]
        kept.add_feedback(alert["id"], "u1", "up")
    assert main(["feedback", "--store", store, "--judged"]) == 0
    words = re.findall(r"[\w.%]+", capsys.readouterr().out.splitlines()[-1])
    assert words == ["alert", alert["key"].partition(":")[0], "1", "1", "100.0%", "20.7%", "100.0%"]
    with (tmp_path / "in.jsonl").open("a") as stream:
        stream.write(json.dumps({"text": "Acme Corp in a telegram of long ago", "time": 1e9 - 1e6}) + "\n")
    assert "1 documents or lines came too late" in llmprod(*arguments).stderr
    assert main(["alerts", "--right", alert["id"], "--export", str(tmp_path / "judged.csv"), *journal]) == 0
    assert alert["id"] in capsys.readouterr().out
    judged = pd.read_csv(tmp_path / "judged.csv")
    other = str(tmp_path / "other.db")  # has no alert of the monitor yet
    for _ in range(2):
        for place in (store, other):
            assert main(["alerts", "--wrong", alert["id"], "--store", place, *journal]) == 0
    for place, said in ((store, {"u1": "up", "monitor": "down"}), (other, {"monitor": "down"})):
        with opened_store(place) as kept:
            assert kept.table("answers")["request"].tolist() == [alert["id"]]
            assert dict(kept.table("feedback")[["user", "verdict"]].to_numpy()) == said
    assert set(judged["label"]) == {"negative"}
    assert len(judged) == len(alert["documents"])
    for place in (tmp_path, tmp_path / "none" / "judged.csv"):
        assert main(["alerts", "--export", str(place), *journal]) == 2 and "--export" in capsys.readouterr().err
    assert main(["alerts", "--right", "nonsense", *journal]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert main(["monitor", "--source", str(tmp_path / "no such file"), *journal]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_shift_of_the_whole_stream_is_told_by_default(trained, tmp_path, capsys):
    """Two months of a few documents a day, then bad news; and a journal in which another test's detectors are."""
    bad, good = ("terrible loss after fraud", "disaster ruined hope"), ("wonderful award", "splendid and happy year")
    draw, rows = random.Random(0), []
    for i in range(900):
        words = draw.choice(bad if draw.random() < (0.3 if i < 700 else 0.8) else good)
        place = " ".join(draw.choice(("north", "east", "red", "blue", "old", "new", "iron", "glass")) for _ in range(8))
        rows.append({"text": f"{words} in the {place} town", "time": 1e9 + 8000 * i})
    write(tmp_path / "in.jsonl", rows)
    journal = ("--journal", str(tmp_path / "journal.sqlite"))
    arguments = ("monitor", "--source", str(tmp_path / "in.jsonl"), "--models", str(trained), "--once", *journal)
    done = llmprod(*arguments, "--false-alarms", "0.1", "--alert", "console", "--alert", str(tmp_path / "alerts.jsonl"))
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "alerts.jsonl").read_text().splitlines()[0])
    assert 1e9 + 8000 * 690 < first["since"] <= first["time"] < 1e9 + 8000 * 790
    assert done.stdout.count("ALERT") == 1, "a topic's alert belongs to the same event"
    assert f"{first['key']}: {first['said']}; since 20" in done.stdout and "standard deviations worse" in first["said"]
    assert all("fraud" in document["text"] or "ruined" in document["text"] for document in first["documents"])
    assert main([*arguments, "--every", "70"]) == 0, "the other test has its own past in the journal"
    assert main([*arguments, "--false-alarms", "0"]) == 2 and "false-alarms" in capsys.readouterr().err


TYPED = ["oil: crude oil price; OPEC", "grain: wheat harvest ; ", "takeovers"]


def test_topics_as_they_are_typed():
    assert topics.parse(TYPED) == {"oil": ["crude oil price", "OPEC"], "grain": ["wheat harvest"], "takeovers": []}
    for wrong in (["", ": x"], ["oil", "oil: x"], [" other : x"], [" "]):
        with pytest.raises(NewsError, match="a name of its own"):
            topics.parse(wrong)


def test_topics_of_the_readers_choosing(trained, tmp_path):
    """Found without training, by the scorer and by the command; what belongs to none of them is said to."""
    texts = ["Petrol is dearer since oil rose", "Farmers expect a record wheat crop", "A bid for the rival's shares"]
    texts.append("The choir sang in the old church")
    scorer = Scorer(trained, chosen=topics.Topics(topics.parse(TYPED)))
    found = scorer([Document(str(i), "s", START, text) for i, text in enumerate(texts)])
    assert [scores["topic"] for scores in found] == ["oil", "grain", "takeovers", topics.OTHER]
    write(tmp_path / "in.jsonl", [{"text": text, "time": START} for text in texts])
    journal = str(tmp_path / "journal.sqlite")
    arguments = ["monitor", "--source", str(tmp_path / "in.jsonl"), "--models", str(trained), "--once"]
    assert main([*arguments, "--journal", journal, *(word for some in TYPED for word in ("--topic", some))]) == 0
    with Journal(tmp_path / "journal.sqlite") as kept:
        assert set(monitor.seen(kept)["topic"]) == {"oil", "grain", "takeovers", topics.OTHER}
    assert main([*arguments, "--topic", "other"]) == 2


def test_topics_found_in_a_stream(tmp_path, capsys):
    """On newswire they say much of what the labels say; the command prints them as the monitor reads them."""
    wire = data.load("reuters-r8")
    wire = wire[wire["label"].isin(["crude", "grain", "interest"])].groupby("label").head(30)
    texts, odd = wire["text"].tolist(), "\x1b[31m it's; rm -rf: no"
    found = topics.find([*texts, texts[0], "12 34"], 3)
    guessed = topics.Topics(found, least=-1).predict(texts).argmax(axis=1)
    assert adjusted_mutual_info_score(wire["label"], guessed) > 0.6
    assert any("oil" in name or "crude" in name for name in found)
    assert topics.parse(topics.typed({"oil": [odd]})) == {"oil": [tables.shown(odd.replace(";", ","), 200)]}
    write(tmp_path / "in.jsonl", [{"text": text, "time": START} for text in texts])
    assert main(["topics", str(tmp_path / "in.jsonl"), "--number", "3"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[::2] == ["--topic"] * 3 and list(topics.parse(words[1::2])) == list(found)
    for wrong, message in ((["--number", "9999"], "9999 topics in"), (["--number", "3"], "nothing.jsonl")):
        file = "in.jsonl" if "9999" in wrong else "nothing.jsonl"
        assert main(["topics", str(tmp_path / file), *wrong]) == 2 and message in capsys.readouterr().err


def test_an_alert_of_an_older_journal_is_still_delivered(tmp_path, capsys):
    """It has neither words nor an event."""
    older = {"key": "topic: earn", "since": START, "count": 9, "severity": 3.0, "share": 0.6, "baseline": 0.2}
    watching = watch(tmp_path, [channels.Console()])
    watching.journal.add_alert("abc", START, older | {"documents": [{"text": "a loss"}]})
    watching.deliver()
    told = capsys.readouterr().out
    assert "ALERT abc  topic: earn: negatives surge; since 2001-09-09 01:46, 9 documents" in told and "a loss" in told
    assert not watching.journal.undelivered("console")


def test_keys_share_the_false_alarms_that_are_allowed(tmp_path):
    watching = watch(tmp_path, kind="shift")
    write(tmp_path / "in.jsonl", news(1500, apart=3600))
    monitor.run(watching, [sources.Tail(tmp_path / "in.jsonl")], once=True)
    keys = ("topic: earn", "topic: ship", "company: acme")
    allowed = [watching.journal.state(shift.Shift.name + key)["allowed"] for key in (*keys, shift.WHOLE)]
    assert watching.journal.state("ready") == 3
    assert allowed == pytest.approx([2.4 / 12] * 3 + [2.4 / 2]), "a fifth of one a month is 2.4 a year"


RINGING = """
import sys, threading
from llmprod.news_monitoring import watchdog

def deep(depth):
    return depth and 1 + deep(depth - 1)

threads = [threading.Thread(target=lambda: [deep(300) for _ in range(2000)]) for _ in range(3)]
for thread in threads:
    thread.start()
rung = 0
for number in range(300):
    with open(sys.argv[1], "wb", buffering=0) as file:
        with watchdog.after(0.001, file.fileno()):
            for _ in range(200):
                deep(300)
        rung += file.tell() > 0
for thread in threads:
    thread.join()
print(rung)
"""


def test_a_slow_batch_leaves_a_byte_and_never_ends_the_process(tmp_path):
    """`faulthandler` reads frames that other threads run: it killed a monitor on a busy machine."""
    command = [sys.executable, "-c", RINGING, str(tmp_path / "evidence")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) > 250


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
    monkeypatch.setattr(sys, "argv", ["llmprod", "--source", "https://user:hidden@example.org/"])
    channel = channels.Wandb()
    channel.send(ALERT)
    channel.run.finish()
    wandb.teardown()  # W&B writes an offline run's file after finish() has returned; this waits for it
    assert list(tmp_path.rglob("offline-run-*"))
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"topic: earn" in stored and b"hidden" not in stored


def test_wandb_that_can_not_start_is_one_message(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "a/b")
    with pytest.raises(NewsError, match="--alert wandb: "):
        channels.Wandb()


@pytest.mark.parametrize(
    ("variables", "mode", "seconds"),
    [
        ({}, "offline", 90.0),
        ({"WANDB_API_KEY": "0" * 40}, "online", 15.0),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline"}, "offline", 90.0),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "disabled"}, "disabled", 90.0),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_DISABLED": "true"}, "disabled", 90.0),
    ],
)
def test_the_users_word_on_wandb_decides_before_a_key(monkeypatch, variables, mode, seconds):
    began = []
    monkeypatch.setattr(wandb, "init", lambda **options: began.append(options))
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_INIT_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    channels.Wandb()
    (options,) = began
    settings = options["settings"]
    assert (options["mode"], settings.init_timeout) == (mode, seconds)
    assert settings.disable_git and settings.disable_code and settings.console == "off"
    assert settings.x_disable_stats and settings.x_disable_meta
    assert (settings.host, settings.program) == ("", "monitor")


def test_wandb_is_off_where_the_user_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DISABLED", "true")
    channels.Wandb().send(ALERT)
    assert not list(tmp_path.rglob("*run-*"))


@pytest.mark.parametrize("answer", ["endless", "drip"])
def test_a_webhook_that_never_ends_its_answer(answer):
    """Of the body nothing is read, and headers have a deadline."""

    class Slow(BaseHTTPRequestHandler):
        def do_POST(self):
            if answer == "endless":
                self.send_response(204)
                self.end_headers()
            try:
                while not self.server.ending.wait(0.01):
                    self.wfile.write(b"H" * (65536 if answer == "endless" else 1))
            except OSError:
                pass

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.ending, server.daemon_threads = threading.Event(), True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hook = channels.Webhook(
        f"http://127.0.0.1:{server.server_port}/", wait=0, deadline=60 if answer == "endless" else 1
    )
    try:
        if answer == "endless":
            hook.send(ALERT)
        else:
            with pytest.raises(NewsError, match="in time"):
                hook.send(ALERT)
    finally:
        server.ending.set()
        server.shutdown()


def test_a_webhook_is_not_led_elsewhere(receiver, monkeypatch):
    def elsewhere(handler):
        handler.server.got.append(handler.path)
        handler.send_response(307)
        handler.send_header("Location", "/inside")
        handler.end_headers()

    monkeypatch.setattr(Receiver, "do_POST", elsewhere)
    with pytest.raises(NewsError, match="it answered 307"):
        channels.Webhook(receiver.url, tries=1, wait=0).send(ALERT)
    assert receiver.got == ["/hook?token=hidden"]


def test_a_slow_channel_does_not_keep_the_sources_waiting(tmp_path):
    """What it could not be told in its time it is told after the next step."""
    sent = []

    class Slow:
        name = "slow"

        def send(self, alert):
            sent.append(alert["id"])
            time.sleep(0.2)

    watching = watch(tmp_path, [Slow()])
    for name in "abc":
        watching.journal.add_alert(name, START, {"key": "topic: earn", "documents": []})
    for many in (1, 2):
        watching.deliver(budget=0.1)
        assert len(sent) == many
    watching.deliver()
    assert sent == ["a", "b", "c"]


def test_webhooks_have_names_of_their_own_without_secrets():
    names = {channels.Webhook(f"https://user:hidden@chat/hook?room={room}").name for room in "ab"}
    assert len(names) == 2 and "hidden" not in str(names)
    with pytest.raises(NewsError) as refused:
        channels.open_channel("ftp://user:hidden@host", opened_store)
    assert "hidden" not in str(refused.value)


def test_an_id_of_a_document_is_none_of_an_alert(tmp_path):
    log = channels.Log(tmp_path / "alerts.jsonl")
    log.send(ALERT | {"documents": [{"id": "other"}]})
    log.send(ALERT | {"id": "other"})
    channels.Log(tmp_path / "alerts.jsonl").send(ALERT | {"id": "other"})
    assert [json.loads(row)["id"] for row in log.path.read_text().splitlines()] == ["abc", "other"]


def test_a_log_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    deep = Path(tmp_path, *["a"] * 1900, "alerts.jsonl")  # more folders than Python calls itself
    for path in (tmp_path / "file" / "alerts.jsonl", tmp_path / "folder.jsonl", deep):
        (tmp_path / "folder.jsonl").mkdir(exist_ok=True)
        with pytest.raises(NewsError, match="can't be written"):
            channels.open_channel(str(path), opened_store)


def test_no_document_forges_an_alert_on_the_console(tmp_path, capsys):
    text = "fine\nALERT forged \x1b[2J\u202e\rALERT"
    alert = ALERT | {
        "key": "topic: a\nb\x1b[0m",
        "since": START,
        "share": 0.5,
        "baseline": 0.1,
        "count": 3,
        "documents": [{"text": text}],
    }
    channels.Console().send(alert)
    watch(tmp_path).note("x", "a source said \x1b[31m\nALERT")
    out, error = capsys.readouterr()
    assert out.count("\n") == 2 and not set(out + error) & set("\x1b\r\u202e") and "\nALERT" not in error


@pytest.mark.parametrize("options", [{"lateness": math.nan}, {"lateness": math.inf}, {"lateness": -1}, {"keep": -1}])
def test_numbers_that_can_not_be_used(tmp_path, options):
    with pytest.raises(NewsError, match=str(next(iter(options)))), Journal(tmp_path / "j.sqlite") as journal:
        monitor.Monitor(by_words, journal, None, **options)
    watching = watch(tmp_path)
    for pause in (math.nan, -1, math.inf):
        with pytest.raises(NewsError, match="pause"):
            monitor.run(watching, [], pause=pause)
    with pytest.raises(NewsError, match="every"):
        MonitorConfig(sentiment.PlattScaling(-3.0, 0.0, 0.5), (-0.1, 0.1), 10.0, every=5).for_rate(math.inf)
    with pytest.raises(NewsError, match="is not a source"):
        sources.open_source("")


def test_the_texts_of_so_many_documents_are_kept(tmp_path):
    write(tmp_path / "in.jsonl", news(100))
    watching = watch(tmp_path)
    watching.keep = 10
    monitor.run(watching, [sources.Tail(tmp_path / "in.jsonl", batch=30)], once=True)
    assert len(watching.journal.recent()) == 10 and watching.journal.late() == 0
    assert watching.journal.db.execute("SELECT count(*) FROM documents").fetchone() == (100,)


def test_exported_texts_are_no_formulas(tmp_path):
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.add_alert("a", START, {"key": "topic: earn", "documents": [{"text": "=1+1"}]})
    to = ("--export", str(tmp_path / "judged.csv"), "--journal", str(tmp_path / "journal.sqlite"))
    assert main(["alerts", "--right", "a", *to]) == 0
    assert pd.read_csv(tmp_path / "judged.csv")["text"].tolist() == ["'=1+1"]


def test_losses_are_counted_and_said(tmp_path, capsys):
    rows = [row | {"time": time.time() - 50 + i} for i, row in enumerate(news(30))]
    rows += [{"text": "Boat of no time"}, {"text": "Boat of tomorrow", "time": time.time() + DAY}]
    write(tmp_path / "in.jsonl", rows)
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write("no json\n" * 3 + '{"text": "x", "time": "31/12/2024"}\n')
    watching = watch(tmp_path)
    source = sources.Tail(tmp_path / "in.jsonl")
    monitor.run(watching, [source], once=True)
    write(tmp_path / "in.jsonl", [{"text": "Boat that came too late", "time": START}])
    counts = monitor.run(watching, [source], once=True)
    assert {name: counts[name] for name in monitor.LOSSES} == {
        "skipped": 4,
        "undated": 1,
        "ahead": 1,
        "late": 1,
        "aside": 0,
    }
    error = capsys.readouterr().err
    assert "line 36: '31/12/2024' can't be read as a time" in error and "(4 skipped so far)" in error
    assert "4 documents or lines could not be read" in error and "1 documents or lines had no time" in error
    assert "Documents come too late" in error and "came too late to be watched" in error


def test_a_backlog_is_watched_whole(tmp_path):
    """Several files longer than a poll, and documents without a time or dated today, in an archive."""
    rows = news(600)
    (tmp_path / "in").mkdir()
    for month in range(3):
        write(tmp_path / "in" / f"{month}.jsonl", rows[month * 200 : month * 200 + 200])
    now = [{"text": "Boat without a time"}, {"text": "Boat of today", "time": time.time()}]
    write(
        tmp_path / "in" / "now.jsonl",
        now + [row | {"text": f"{row['text']} again {row['id']}"} for row in news(99, seed=3)],
    )
    watching = watch(tmp_path)
    monitor.run(watching, [sources.Tail(tmp_path / "in", batch=40)], once=True)
    assert watching.journal.late() == 0 and set(watching.journal.recent()["fed"]) == {1}


def test_a_document_that_fails_is_set_aside_and_named(tmp_path, capsys):
    def fragile(documents):
        if any("poison" in document.text for document in documents):
            raise RuntimeError("index out of range")
        return [
            row | ({"negative": math.nan} if "nan" in d.text else {})
            for d, row in zip(documents, by_words(documents), strict=True)
        ]

    rows = news(40)
    rows[7]["text"], rows[20]["text"] = "Boat poison", "Acme nan"
    write(tmp_path / "in.jsonl", rows)
    watching = watch(tmp_path)
    watching.scorer = fragile
    counts = monitor.run(watching, [sources.Tail(tmp_path / "in.jsonl")], once=True)
    assert counts["documents"] == 40 and counts["aside"] == 2 and len(watching.journal.recent()) == 38
    error = capsys.readouterr().err
    assert "Boat poison" in error and "index out of range" in error and "Acme nan" in error
    assert watching.journal.db.execute("SELECT text FROM documents WHERE fed = 4").fetchall() == [
        ("Boat poison",),
        ("Acme nan",),
    ]


HANGING = """
import sys, time
from pathlib import Path
from llmprod.news_monitoring import monitor, sources
from tests.test_monitor import by_words, watch

def hangs(documents):
    if any("poison" in document.text for document in documents):
        print("begun", len(documents), flush=True)
        time.sleep(600)
    return by_words(documents)

watching = watch(Path(sys.argv[1]))
watching.scorer = hangs
print(dict(monitor.run(watching, [sources.Tail(Path(sys.argv[1]) / "in.jsonl")], once=True)), flush=True)
"""


def test_a_document_begun_twice_and_never_finished_is_set_aside(tmp_path, monkeypatch):
    rows = news(10)
    rows[5]["text"] = "Boat poison"
    write(tmp_path / "in.jsonl", rows)
    begun = []
    for _ in range(2):
        command = [
            sys.executable,
            "-c",
            HANGING.replace("watching.scorer", "watching.slow = 0.2\nwatching.scorer"),
            str(tmp_path),
        ]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            begun.append(process.stdout.readline())
            evidence, ends = tmp_path / "journal.sqlite.slow", time.monotonic() + 60
            while not evidence.stat().st_size and time.monotonic() < ends:
                time.sleep(0.05)
            process.kill()
    assert begun == ["begun 10\n", "begun 1\n"]
    watching = watch(tmp_path)
    counts = monitor.run(watching, [sources.Tail(tmp_path / "in.jsonl")], once=True)
    assert counts["aside"] == 1 and len(watching.journal.recent()) == 9 and "ended twice" in str(watching.problems)


def test_a_signal_is_heeded_between_batches_and_nothing_is_lost(tmp_path):
    write(tmp_path / "in.jsonl", news(500))
    watching, source = watch(tmp_path), sources.Tail(tmp_path / "in.jsonl")

    def interrupted(documents):
        os.kill(os.getpid(), signal.SIGTERM)
        return by_words(documents)

    watching.scorer = interrupted
    assert monitor.run(watching, [source], once=True)["documents"] == monitor.BATCH
    watching.scorer = by_words
    monitor.run(watching, [source], once=True)
    recent = watching.journal.recent()
    assert len(recent) == 500 and set(recent["fed"]) == {1} and watching.journal.late() == 0


def test_the_journal_is_free_while_documents_are_scored(tmp_path):
    write(tmp_path / "in.jsonl", news(10))
    watching = watch(tmp_path)
    watching.journal.add_alert("x", START, {"key": "topic: earn", "documents": []})

    def judging(documents):
        with Journal(watching.journal.path, shared=True) as other:
            other.acknowledge("x", True)
        return by_words(documents)

    watching.scorer = judging
    watching.step([sources.Tail(tmp_path / "in.jsonl")])
    assert watching.journal.alerts()["right"].tolist() == [True]


def test_one_source_does_not_stop_the_others(tmp_path):
    class Broken(sources.Source):
        name = "broken"

        def poll(self, cursor, last=False):
            raise OSError("gone")

    write(tmp_path / "in.jsonl", news(10))
    watching = watch(tmp_path)
    watching.step([Broken(), sources.Tail(tmp_path / "in.jsonl")])
    assert watching.counts["documents"] == 10 and "gone" in watching.problems["broken"]


def test_the_work_on_a_document_is_bounded(trained, tmp_path, monkeypatch):
    """A megabyte is compared and scored by its head: of names alone, 100 kB took half a minute, and this hours."""
    scorer, lengths = Scorer(trained), []
    scorer.finder = Names()
    monkeypatch.setattr(
        multitask, "predict", lambda model, texts: lengths.extend(map(len, texts)) or PREDICT(model, texts)
    )
    for part in ("Acme Acme. ", "A. B. ", "e\u0301\u0300\u0316", "dollar yen ", "\u200b,"):
        rows = [Document(part, "s", START, (part * LIMIT)[:LIMIT])]
        with Journal(tmp_path / f"{len(lengths)}.sqlite") as journal:
            assert len(new_documents(journal, rows)) == 1 and len(scorer(rows)) == 1
    assert len(lengths) == 5 and max(lengths) <= HEAD


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
