"""From a user's word to another bundle: the store, the review queue, promotion, sequential tests, clicks, drift."""

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprod import LLMProdError, data, machine
from llmprod.__main__ import main
from llmprod.deploy import bundle
from llmprod.deploy.registry import Registry
from llmprod.evaluate import drift, metrics
from llmprod.feedback import off_policy, promotion, review, sequential, watch
from llmprod.feedback.store import VERDICTS, FeedbackError, Store
from llmprod.finetune import fewshot
from llmprod.finetune.recipe import Recipe
from llmprod.models import Predictor
from llmprod.news_monitoring import channels, monitor, sources
from llmprod.news_monitoring.documents import NewsError
from llmprod.products import opened_store
from tests import test_monitor
from tests.conftest import ROOT
from tests.test_deploy import Running
from tests.test_monitor import news

# The store


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request, tmp_path):
    """An empty store in each database; the clock counts 0, 1, 2, …"""
    url = f"sqlite:///{tmp_path / 'store.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres")
    with Store(url, mask=lambda text: text.replace("a@b.c", "[email]"), clock=iter(range(10**6)).__next__) as opened:
        yield opened
        opened.delete_before(float("inf"))


@pytest.fixture(scope="session")
def postgres():
    """The address of a PostgreSQL server of our own, on a free port of this machine."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        pytest.skip("no PostgreSQL server in /usr/lib/postgresql: apt-get install postgresql")
    names = {entry.pw_name for entry in pwd.getpwall()}
    as_root = os.getuid() == 0  # the server refuses to run as root
    user = ("postgres" if "postgres" in names else "nobody") if as_root else None
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's own folders are closed to another user
    if as_root:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)

    def command(name: str, *arguments: str) -> None:
        subprocess.run(
            [found[-1] / name, *arguments], user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=120
        )

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command("initdb", "-D", f"{folder}/data", "-U", "tester", "-A", "trust", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    command("pg_ctl", "-D", f"{folder}/data", "-o", options, "-l", f"{folder}/log", "-w", "start")
    yield f"postgresql://tester:secret@127.0.0.1:{port}/postgres"
    command("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
    shutil.rmtree(folder, ignore_errors=True)


def answer(store: Store, request: str, user: str = "u1", **changes: object) -> None:
    """Stores an answer."""
    row = {"request": request, "bundle": "b", "text": f"text {request}", "label": "earn", "confidence": 0.9}
    store.add_answer(**{**row, "user": user} | changes)


def test_an_answer_is_stored_once_and_masked(store):
    answer(store, "r1", text="write to a@b.c")
    answer(store, "r1", text="something else")
    store.add_answers([])
    (row,) = store.table("answers").to_dict("records")
    assert (row["text"], row["source"], row["shadow"]) == ("write to [email]", "classify", "")
    with pytest.raises(FeedbackError):  # all or none: the second row has no label
        store.add_answers([{**row, "request": "r2"}, {**row, "request": "r3", "label": None}])
    assert len(store.table("answers")) == 1


def test_feedback_is_idempotent_and_the_last_word_counts(store):
    answer(store, "r1")
    said = [("up", ""), ("up", ""), ("corrected", "acq"), ("corrected", "acq"), ("corrected", "trade"), ("down", "")]
    assert [store.add_feedback("r1", "u1", *words) for words in said] == [True, False, True, False, True, True]
    assert store.add_feedback("r1", "u2", "up")
    table = store.table("feedback").set_index("user")
    assert table["verdict"].to_dict() == {"u1": "down", "u2": "up"} and table.loc["u1", "label"] == ""
    for request, verdict, label, words in [
        ("r9", "up", "", "no answer with the request 'r9'"),
        ("r1", "corrected", " ", "needs the right label"),
        ("r1", "up", "acq", "only a correction"),
        ("r1", "maybe", "", "maybe"),
    ]:
        with pytest.raises(FeedbackError, match=words):
            store.add_feedback(request, "u1", verdict, label)


def test_a_users_data_can_be_exported_and_deleted_and_old_data_goes(store):
    for number, user in enumerate(["u1", "u2", "u1"]):
        answer(store, f"r{number}", user)
    for request, user in [("r0", "u2"), ("r1", "u1"), ("r1", "u2")]:
        store.add_feedback(request, user, "up")
    store.queue({"r0": review.AUDIT, "r1": review.AUDIT})
    store.add_review("r0", "reviewer 1", "acq")
    exported = store.export_user("u1").set_index("request")
    assert sorted(exported.index) == ["r0", "r1", "r2"] and exported["verdict"].notna().tolist() == [False, True, False]
    assert store.delete_user("u1") == 3  # two answers, one statement
    assert store.table("answers")["request"].tolist() == ["r1"] and store.table("reviews").empty
    assert store.table("feedback")["user"].tolist() == ["u2"] and store.export_user("u1").empty
    assert store.delete_before(0) == 0 and store.delete_before(1e9) == 1
    assert all(store.table(name).empty for name in ("answers", "feedback", "queue", "reviews"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://bob:secret@127.0.0.1:1/x", "postgresql://127.0.0.1:1/x can't be used"),
        ("sqlite:////no/such/folder/secret", "unable to open"),
        ("mysql://bob:secret@host/x", "mysql"),
        ("secret", "can't be read"),
        ("postgresql://bob:secret/x", "can't be read"),
        ("sqlite://bob:secret@host/x", "can't be read"),
        ("postgresql://bob:secret@host/x?port=y", "can't be read"),
        ("sqlite:////tmp/secret\0", "can't be read"),
    ],
)
def test_a_store_that_cannot_be_reached_says_so_without_the_password(url, words):
    with pytest.raises(FeedbackError, match=words) as error:
        Store(url)
    assert "bob" not in str(error.value) and ("secret" not in str(error.value) or "sqlite" in url)


WRITER = """
import sys
from llmprod.feedback.store import Store
store = Store(sys.argv[1])
for number in range(2000):
    store.add_answer(f"r{number}", "b", "text", "earn", 0.5)
    print(f"r{number}", flush=True)
"""


def test_exported_answers_are_no_formulas(tmp_path, capsys):
    place = str(tmp_path / "answers.sqlite")
    with opened_store(place) as store:
        answer(store, "r1", text="=1+1")
    assert main(["feedback", "--store", place, "--export", "u1"]) == 0
    assert ",'=1+1," in capsys.readouterr().out


def test_a_killed_writer_loses_no_acknowledged_answer(tmp_path):
    url = f"sqlite:///{tmp_path / 'store.db'}"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True)
    acknowledged = [writer.stdout.readline().strip() for _ in range(1000)]  # in the middle of 2,000 writes
    writer.send_signal(signal.SIGKILL)
    acknowledged += writer.stdout.read().splitlines()
    assert writer.wait() == -signal.SIGKILL and 1000 <= len(acknowledged) < 2000
    with Store(url) as store:
        kept = set(store.table("answers")["request"])
        assert kept >= {request for request in acknowledged if request.startswith("r")}
        answer(store, "afterwards")


def test_what_is_not_utf8_is_one_message(store):
    """As an argument of the command line can be."""
    answer(store, "r1")
    for call in (store.export_user, store.delete_user, lambda name: store.add_review("r1", name, "oil")):
        with pytest.raises(FeedbackError, match="is not UTF-8"):
            call("\udcff")


def test_a_stores_file_has_the_name_that_was_given(tmp_path):
    with opened_store(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xff.db"))) as store:
        answer(store, "r1")
    assert os.path.isfile(os.path.join(os.fsencode(tmp_path), b"\xff.db"))
    with opened_store(str(tmp_path / "a?b #1.db")) as store:
        answer(store, "r1")
    assert (tmp_path / "a?b #1.db").stat().st_size and not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(LLMProdError, match="its folder can't be made"):
        opened_store(str(tmp_path / "file" / "x.db"))


# The review queue


def test_the_queue_takes_each_answer_for_one_reason_and_audits_at_random(store):
    rows = {"bundle": "b", "text": "t", "label": "earn"}
    store.add_answers([{**rows, "request": f"r{i:03}", "confidence": i / 200} for i in range(100)])
    answer(store, "s1", shadow="acq")
    answer(store, "alert", source="alert", confidence=0.0)
    for user, label in (("u1", "acq"), ("u2", "trade")):
        store.add_feedback("r050", user, "corrected", label)
    store.add_feedback("r051", "u1", "down")
    quotas = {review.UNSURE: 5, review.DOWN: 1, review.DISAGREEMENT: 9, review.AUDIT: 10}
    first = review.fill(store, quotas, seed=3)
    reasons = first["reason"].to_dict()
    assert first.index.is_unique and "alert" not in reasons and len(store.table("queue")) == len(first)
    assert first["reason"].value_counts()[review.AUDIT] == 10 and reasons["s1"] in (review.DISAGREEMENT, review.AUDIT)
    unsure = [request for request, reason in reasons.items() if reason == review.UNSURE]
    assert unsure == sorted(unsure) and unsure[-1] < "r016"
    again = review.fill(store, {review.AUDIT: 10}, seed=3)
    assert len(again) == 10 and not set(again.index) & set(first.index)
    with pytest.raises(FeedbackError, match="boredom"):
        review.fill(store, {"boredom": 1})


def test_two_reviewers_settle_a_label_or_a_third_decides(store):
    for number in range(4):
        answer(store, f"r{number}")
    store.queue({f"r{number}": review.AUDIT for number in range(4)})
    said = {"reviewer 1": ["acq", "acq", "earn", "earn"], "reviewer 2": ["acq", "earn", "acq"]}
    for name, labels in said.items():
        assert review.waiting_for(store, name)["request"].tolist() == ["r0", "r1", "r2", "r3"]
        for request, label in zip(review.waiting_for(store, name)["request"], labels, strict=False):
            store.add_review(request, name, label)
    assert review.settled(store)["request"].tolist() == ["r0"]
    assert review.waiting_for(store, "reviewer 3")["request"].tolist() == ["r1", "r2", "r3"]
    store.add_review("r1", "reviewer 3", "trade")
    found = review.settled(store).set_index("request")
    assert found["label"].to_dict() == {"r0": "acq", "r1": "trade"} and found.loc["r1", "how"] == "adjudicated"
    # on r0 to r2: one of three equal; by chance 2/3 · 2/3 + 1/3 · 1/3 = 5/9
    kappa = review.agreement(store, "reviewer 1", "reviewer 2", resamples=50)
    assert kappa["kappa"] == pytest.approx((1 / 3 - 5 / 9) / (1 - 5 / 9)) and kappa["reviewed by both"] == 3
    with pytest.raises(FeedbackError, match="no answer in common"):
        review.agreement(store, "reviewer 1", "reviewer 9")


def test_the_shadow_is_tested_from_the_log(store):
    """On 60 audited texts the shadow is right throughout, the served one on every other; picked ones don't count."""
    with pytest.raises(FeedbackError, match="shadow"):
        review.shadow_test(store)
    for number in range(90):
        label = "acq" if number % 2 else "earn"
        answer(store, f"r{number}", label=label, shadow="" if number >= 80 else "acq")
    store.queue({f"r{number}": review.AUDIT if number < 60 or number >= 80 else review.UNSURE for number in range(90)})
    for name in ("reviewer 1", "reviewer 2"):
        for number in range(90):
            store.add_review(f"r{number}", name, "acq" if number < 60 else "earn")
    found = review.shadow_test(store)
    assert len(found) == 60 and found["time"].is_monotonic_increasing
    assert found["mean"].iloc[-1] == 0.5 and found["low"].iloc[-1] > 0 and found["p"].iloc[-1] < 0.01
    assert found["low"].iloc[3] < 0, "not after four texts"


def test_the_widget_writes_reviews(store):
    answer(store, "r1")
    store.queue({"r1": review.AUDIT})
    text, (choice, button) = (
        (box := review.widget(store, "reviewer 1", ["earn", "acq"])).children[0],
        box.children[1].children,
    )
    button.click()
    assert text.value == "text r1" and store.table("reviews").empty  # nothing chosen yet
    choice.value = "acq"
    button.click()
    assert store.table("reviews")["label"].tolist() == ["acq"] and button.disabled


# Alerts and replies beside the answers


def judge_others(store: Store, count: int, labels: list[str]) -> None:
    """Adds as many alerts and replies, all of them queued and reviewed twice with labels: what nobody should learn."""
    for source in ("alert", "answer"):
        for number in range(count):
            answer(store, f"{source} {number}", source=source, label="topic", shadow="acq", text=f"{source} {number}")
            store.queue({f"{source} {number}": review.AUDIT if number % 2 else review.DOWN})
            for name in ("reviewer 1", "reviewer 2"):
                store.add_review(f"{source} {number}", name, labels[number % len(labels)])
            store.add_feedback(f"{source} {number}", "u1", "down")


def test_the_queue_and_what_is_settled_are_of_one_source(store):
    for number in range(40):
        answer(store, f"r{number}", shadow="earn" if number % 3 else "acq")
    store.queue({f"r{number}": review.AUDIT for number in range(40)})
    for number in range(30):
        for name in ("reviewer 1", "reviewer 2"):
            store.add_review(f"r{number}", name, "earn" if number % 2 else "acq")

    def seen() -> list[pd.DataFrame]:
        kappa = pd.DataFrame([review.agreement(store, "reviewer 1", "reviewer 2", resamples=20)])
        return [review.settled(store), review.shadow_test(store), review.waiting_for(store, "reviewer 3"), kappa]

    before = seen()
    judge_others(store, 5, ["real", "false alarm"])
    answer(store, "alert 9", source="alert")
    store.queue({"alert 9": review.AUDIT})
    for one, other in zip(before, seen(), strict=True):
        pd.testing.assert_frame_equal(one, other)
    assert review.settled(store, "alert")["label"].value_counts().to_dict() == {"real": 3, "false alarm": 2}
    assert review.waiting_for(store, "reviewer 1", "alert")["request"].tolist() == ["alert 9"]
    assert review.widget(store, "reviewer 1", ["real"], "alert").children[0].value == "text alert 9"
    assert review.fill(store, {review.DOWN: 9}).empty, "what is said of an alert queues no answer"


def test_only_a_class_is_corrected(store):
    for source in ("classify", "answer", "alert"):
        answer(store, source, source=source)
    assert store.add_feedback("classify", "u1", "corrected", "acq")
    for source in ("answer", "alert"):
        with pytest.raises(FeedbackError, match=f"is of '{source}', and can't be corrected: say up or down"):
            store.add_feedback(source, "u1", "corrected", "acq")
        assert store.add_feedback(source, "u1", "down") and not store.add_feedback(source, "u1", "down")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["alert", "answer", "classify"]), st.sampled_from(["a", "b"])), max_size=8),
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from(["u1", "u2", "u3"]), st.sampled_from(VERDICTS)), max_size=20),
)
def test_an_answer_is_judged_once_by_the_last_words_of_most(answers, said):
    words: dict[int, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder, Store(f"sqlite:///{folder}/store.db") as store:
        for number, (source, label) in enumerate(answers):
            answer(store, str(number), source=source, label=label)
        for number, user, verdict in said:
            if number < len(answers) and (verdict != "corrected" or answers[number][0] == "classify"):
                store.add_feedback(str(number), user, verdict, "c" if verdict == "corrected" else "")
                words.setdefault(number, {})[user] = verdict
        found = review.judged(store)
    of_label = dict(zip(zip(found["source"], found["label"], strict=True), found.to_dict("records"), strict=True))
    assert set(of_label) == set(answers) | {(source, "") for source, _ in answers}
    for (source, label), row in of_label.items():
        own = [k for k, of in enumerate(answers) if of[0] == source and label in ("", of[1])]
        heard = [list(words[k].values()) for k in own if k in words]
        right = sum(2 * verdicts.count("up") > len(verdicts) for verdicts in heard)
        assert (row["answers"], row["judged"]) == (len(own), len(heard))
        assert (row["95 % from"], row["to"]) == metrics.wilson(right, len(heard))
        assert row["right"] == pytest.approx(right / len(heard) if heard else np.nan, nan_ok=True)


def test_what_was_judged_is_printed(tmp_path, capsys):
    command = ["feedback", "--store", str(tmp_path / "answers.sqlite"), "--judged"]
    assert main(command) == 0 and capsys.readouterr().out == "no answers yet\n"
    with opened_store(command[2]) as store:
        for number in range(10):
            answer(store, f"r{number}", source="answer", label="answer" if number else "hand over")
            if number:
                store.add_feedback(f"r{number}", "u1", "down" if number < 3 else "up")
    assert main(command) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[2:] == [
        ["answer", "", "10", "9", "77.8%", "45.3%", "93.7%"],
        ["answer", "answer", "9", "9", "77.8%", "45.3%", "93.7%"],
        ["answer", "hand over", "1", "0", "", "", ""],
    ]


def two_surges(folder: Path) -> sources.Tail:
    """A source in which two events begin and end."""
    parts = [news(800), news(60, 0), news(800, seed=1), news(60, 0, seed=1), news(800, seed=2)]
    rows = [row | {"text": f"{row['text']} a@b.c"} for part in parts for row in part]
    test_monitor.write(folder / "in.jsonl", [row | {"id": str(i), "time": 1e9 + 60 * i} for i, row in enumerate(rows)])
    return sources.Tail(folder / "in.jsonl", batch=50)


def test_an_event_is_kept_once_to_be_judged(store, tmp_path):
    log, kept = channels.Log(tmp_path / "alerts.jsonl"), channels.FeedbackStore(store)
    watching = test_monitor.watch(tmp_path, [log, kept])
    monitor.run(watching, [two_surges(tmp_path)], once=True)
    told = [json.loads(line) for line in log.path.read_text().splitlines()]
    first = {alert["id"]: alert for alert in told if alert["event"] == alert["id"]}
    answers = store.table("answers")
    assert len(first) == 2 < len(told) and answers["request"].tolist() == list(first)
    for row in answers.to_dict("records"):
        alert = first[row["request"]]
        assert row["text"].startswith(f"{alert['key']}: {alert['said']}; since 2001-09-")
        assert row["text"].count("[email]") == 3 and "a@b.c" not in row["text"] and row["user"] == ""
        assert (row["source"], row["bundle"], row["confidence"]) == ("alert", "monitor", 1.0)
        assert alert["key"].startswith(f"{row['label']}: ")
    store.add_feedback(answers["request"][0], "u1", "up")
    watching.journal.rows("DELETE FROM deliveries WHERE channel = ?", (kept.name,))
    watching.deliver()  # all of them again
    pd.testing.assert_frame_equal(store.table("answers"), answers)
    assert len(store.table("feedback")) == 1 and not watching.journal.undelivered(kept.name)
    assert review.judged(store).loc[0, ["source", "answers", "judged", "right"]].tolist() == ["alert", 2, 1, 1.0]


KILLED = """
import os, signal, sys
from pathlib import Path
from llmprod.feedback.store import Store
from llmprod.news_monitoring import channels, monitor, sources
from tests.test_monitor import watch

class Killed(channels.FeedbackStore):
    def send(self, alert):
        super().send(alert)
        os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
with Store(f"sqlite:///{folder / 'store.db'}") as store:
    monitor.run(watch(folder, [Killed(store)]), [sources.Tail(folder / "in.jsonl", batch=50)], once=True)
"""


def test_an_alert_that_a_kill_makes_come_again_is_kept_once(tmp_path):
    """Killed between the store's commit and the journal's."""
    source = two_surges(tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        (before,) = store.table("answers").to_dict("records")
        watching = test_monitor.watch(tmp_path, [kept := channels.FeedbackStore(store)])
        assert watching.journal.undelivered(kept.name)[0]["id"] == before["request"]
        monitor.run(watching, [source], once=True)
        answers = store.table("answers").to_dict("records")
    assert answers[0] == before and len(answers) == 2


def test_alerts_wait_for_a_store_that_fails(store, tmp_path):
    """A table that is not there for a while stands for a database that is down; no message has a password."""
    watching = test_monitor.watch(tmp_path, [kept := channels.FeedbackStore(store)])
    with store.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE answers RENAME TO hidden")
    monitor.run(watching, [two_surges(tmp_path)], once=True)
    assert "is not kept (The store" in watching.problems[kept.name] and "tried again" in watching.problems[kept.name]
    assert "secret" not in f"{watching.problems} {kept.name}"
    with store.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE hidden RENAME TO answers")
    watching.deliver()
    assert store.table("answers").empty, "it rests after it failed"
    watching.waits.clear()
    watching.deliver()
    assert len(store.table("answers")) == 2 and kept.name not in watching.problems


def test_any_alert_can_be_kept(store):
    """What documents hold of control characters and halves of pairs would have it fail for ever."""
    alert = {"id": "abc", "event": "abc", "key": "topic\0\ud800: x", "said": "60% negative", "since": 1e9, "count": 3}
    texts = ["a\0b", "half \ud83d", "w " * 5000, "the fourth"]
    channels.FeedbackStore(store).send(alert | {"documents": [{"text": text} for text in texts]})
    (row,) = store.table("answers").to_dict("records")
    assert row["text"].splitlines()[1:3] == ["a·b", "half ·"] and len(row["text"]) < 1200 and row["label"] == "topic··"


def test_a_store_as_a_channel_of_the_command_line(tmp_path, capsys):
    channel = channels.open_channel(f"sqlite:///{tmp_path / 'a.db'}", opened_store)
    assert isinstance(channel, channels.FeedbackStore) and channel.name == f"store sqlite:///{tmp_path / 'a.db'}"
    channel.store.engine.dispose()
    (tmp_path / "in.jsonl").touch()
    for address, words in (
        ("postgresql://bob:secret@127.0.0.1:1/x", "postgresql://127.0.0.1:1/x can't be used"),
        (f"sqlite:///{tmp_path}/none/a.db", "unable to open"),
        ("mysql://bob:secret@host/x", "sqlite:///FILE"),
    ):
        assert main(["monitor", "--source", str(tmp_path / "in.jsonl"), "--alert", address]) == 2
        error = capsys.readouterr().err
        assert words in error and "bob" not in error and "secret" not in error
    with pytest.raises(NewsError, match="--alert"):
        channels.open_channel("sqlite.db", opened_store)


# Promotion, with the real small model on real texts

SHORT = 6  # words of a headline


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """R8 in small: splits, labels, a registry with a bundle trained on whole articles, texts of users, old texts."""
    folder = tmp_path_factory.mktemp("world")
    table = data.drop_duplicates(data.clean(data.load("reuters-r8"))[0])[0]
    table = table[table["label"].isin(["earn", "acq", "crude"])]
    data.save(data.split(table, validation_share=0.2, train_rows=240, test_rows=400, seed=1), folder / "splits", {})
    splits, labels, _ = data.prepared(folder / "splits")
    machine.seed_everything(0)  # the head's first weights are random, and other tests draw too
    start = Predictor.pretrained("minilm", labels, dropout=0.0, max_length=48, precision="fp32")
    chosen, _ = fewshot.sample_shots(splits["train"], 30, 0)
    recipe = Recipe(method="lora", learning_rate=3e-3, epochs=3, max_length=48, batch_tokens=1024)
    model = promotion.retrain(start, list(chosen["text"]), list(chosen["label"]), recipe, folder)
    frozen = {name: splits["validation"][:10][name] for name in ("text", "label")}
    frozen["label"] = [labels[k] for k in frozen["label"]]
    made = bundle.write(folder / "bundle", model, frozen, "# A model\n")
    registry = Registry(folder / "served")
    registry.promote(registry.add(made), "the first")
    texts, numbers = list(splits["test"]["text"]), list(splits["test"]["label"])
    users = [(" ".join(texts[i].split()[:SHORT]), labels[numbers[i]]) for i in range(200)]
    old = {"text": texts[200:], "label": [labels[k] for k in numbers[200:]]}
    return splits, labels, registry, users, old, texts


def iterated(world, tmp_path, users: list[tuple[str, str]], audits: int = 80, others: int = 0) -> promotion.Decision:
    """An iteration on texts and the labels that two reviewers give; the registry is put back afterwards.

    `others`: how many reviewed alerts and replies are in the store as well.
    """
    splits, _, registry, _, old, _ = world
    before = registry.state()["current"]
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        served = registry.load().predict([text for text, _ in users])
        row = {"bundle": before, "user": "u1"}
        store.add_answers(
            [
                {**row, "request": f"r{i:03}", "text": text, "label": said.label, "confidence": said.confidence}
                for i, ((text, _), said) in enumerate(zip(users, served, strict=True))
            ]
        )
        names = [f"r{i:03}" for i in range(len(users))]
        store.queue({name: review.AUDIT if i < audits else review.DOWN for i, name in enumerate(names)})
        for reviewer in ("reviewer 1", "reviewer 2"):
            for name, (_, label) in zip(names, users, strict=True):
                store.add_review(name, reviewer, label)
        judge_others(store, others, ["real", "earn"])
        recipe = Recipe(method="lora", learning_rate=2e-3, epochs=3, max_length=48, batch_tokens=512)
        rules = promotion.Rules(old_tolerance=0.02)  # 200 texts can't resolve half a point
        decision = promotion.iterate(registry, store, splits, recipe, regression=old, rehearsal=20, rules=rules)
    decision.current = registry.state()["current"]
    if decision.promoted:
        registry.roll_back("the next test")
    return decision


def test_a_correction_given_today_is_answered_tomorrow(world, tmp_path):
    """The whole round over HTTP: serve, 200 questions, corrections, review, iterate, the new bundle answers."""
    splits, _, registry, users, old, _ = world
    address, before = tmp_path / "answers.sqlite", registry.state()["current"]
    served = Running(registry.folder, "--store", str(address))
    try:
        texts, truth = [text for text, _ in users], {}
        asked = served.http.post("/classify", json={"texts": texts, "user": "u1"}).json()["answers"]
        for said, (_, right) in zip(asked, users, strict=True):
            truth[said["id"]] = right
        wrong = [said["id"] for said in asked if said["label"] != truth[said["id"]]][:30]
        for name in wrong:
            said = {"id": name, "user": "u1", "verdict": "corrected", "label": truth[name]}
            assert served.http.post("/feedback", json=said).json() == {"new": True}
        with Store(f"sqlite:///{address}") as store:
            queued = review.fill(store, {review.AUDIT: 80, review.DOWN: 30, review.UNSURE: 90}, seed=0)
            for reviewer in ("reviewer 1", "reviewer 2"):
                for name in review.waiting_for(store, reviewer)["request"]:
                    store.add_review(name, reviewer, truth[name])
            recipe = Recipe(method="lora", learning_rate=2e-3, epochs=3, max_length=48, batch_tokens=512)
            decision = promotion.iterate(registry, store, splits, recipe, regression=old, rehearsal=40)
        assert decision.promoted, decision.reasons
        assert decision.numbers["old, change"] >= -0.005
        assert decision.numbers["p"] <= 0.05 and decision.numbers["p, by chance"] <= 0.05
        kept = registry.load(decision.candidate).manifest["provenance"]
        assert kept["parent"] == before and 0 < kept["reviewed texts learnt"] <= 120 and len(kept["data"]) == 64
        assert decision.classes["texts"].sum() == 280
        assert served.http.post("/reload").json() == {"bundle": decision.candidate}
        learnt = [name for name in wrong if queued.loc[name, "reason"] == review.DOWN]
        number = {said["id"]: text for said, text in zip(asked, texts, strict=True)}
        again = served.http.post("/classify", json={"texts": [number[name] for name in learnt]}).json()["answers"]
        right = [said["label"] == truth[name] for said, name in zip(again, learnt, strict=True)]
        assert len(wrong) >= 15 and np.mean(right) >= 0.8
        assert {said["bundle"] for said in again} == {decision.candidate} != {before}
    finally:
        served.end()
        if registry.state()["current"] != before:
            registry.roll_back("the next test")


def test_a_poisoned_batch_is_refused(world, tmp_path):
    _, _, registry, users, _, _ = world
    users = users[:160]
    labels = np.random.default_rng(0).permutation([label for _, label in users])
    decision = iterated(world, tmp_path, [(text, str(label)) for (text, _), label in zip(users, labels, strict=True)])
    assert not decision.promoted and any("not better" in why for why in decision.reasons)
    assert any("by chance" in why for why in decision.reasons)
    assert decision.current == decision.parent and not (registry.folder / decision.candidate).exists()


def test_judged_alerts_and_replies_change_no_promotion(world, tmp_path, monkeypatch):
    """Neither what would be learnt nor the decision; the training itself is left out."""
    learnt, decisions = [], []
    monkeypatch.setattr(promotion, "retrain", lambda start, *given: learnt.append(given[:2]) or start)
    for others in (0, 20):
        (tmp_path / str(others)).mkdir()
        decisions.append(iterated(world, tmp_path / str(others), world[3][:60], audits=30, others=others))
    alone, beside = decisions
    assert learnt[0] == learnt[1] and sum(text in dict(world[3][30:60]) for text in learnt[0][0]) == 60, "each twice"
    assert beside.candidate == alone.candidate and beside.reasons == alone.reasons
    assert beside.numbers == alone.numbers and beside.classes.equals(alone.classes)


def test_reviews_in_random_order_agree_by_chance_alone():
    labels = np.random.default_rng(0).integers(0, 3, 200)
    half = np.where(np.arange(200) % 2, labels, 0)
    assert promotion.by_chance(labels, half) < 0.01
    assert promotion.by_chance(np.random.default_rng(1).permutation(labels), half) > 0.05
    assert promotion.by_chance(labels, np.zeros(200, int)) == 1, "one answer for all says nothing"


def test_a_batch_that_helps_one_class_at_anothers_cost_is_refused(world, tmp_path):
    _, _, _, users, _, texts = world
    whole = [(texts[i], "acq" if label == "earn" else label) for i, (_, label) in enumerate(users[:160])]
    decision = iterated(world, tmp_path, whole)
    assert not decision.promoted and any(reason.startswith("'earn' loses") for reason in decision.reasons)
    assert decision.numbers["new, change"] > 0  # it is better by what the reviewers said


def test_without_settled_reviews_nothing_happens(world, tmp_path):
    splits, _, registry, *_ = world
    with (
        Store(f"sqlite:///{tmp_path / 'store.db'}") as store,
        pytest.raises(FeedbackError, match="Nothing is reviewed"),
    ):
        answer(store, "r1")
        store.queue({"r1": review.AUDIT})
        store.add_review("r1", "reviewer 1", "earn")
        promotion.iterate(registry, store, splits)


# Sequential tests


def test_the_confidence_sequence_holds_under_peeking():
    """Without a difference, an alarm at any time comes in at most 5 % of the runs."""
    for share in (0.05, 0.3):
        rate = sequential.false_alarms(lambda d: sequential.confidence_sequence(d)["p"], share, texts=300, runs=200)
        assert rate <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)


@settings(max_examples=20)
@given(st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=60))
def test_the_confidence_sequence_knows_only_the_past(differences):
    whole = sequential.confidence_sequence(np.array(differences), points=41)
    part = sequential.confidence_sequence(np.array(differences[: max(1, len(differences) // 2)]), points=41)
    pd.testing.assert_frame_equal(whole.iloc[: len(part)], part)
    assert (whole["p"].diff().dropna() <= 1e-12).all() and (whole["low"] <= whole["high"]).all()


def test_a_real_difference_is_found_and_bounded():
    differences = np.random.default_rng(0).choice([-1, 0, 1], 1500, p=[0.02, 0.83, 0.15])
    bounds = sequential.confidence_sequence(differences).iloc[-1]
    assert 0 < bounds["low"] < 0.13 < bounds["high"] < 0.25 and bounds["p"] < 0.001
    labels, new, old = np.array([0, 1, 2, 2]), np.array([0, 1, 0, 1]), np.array([1, 1, 2, 0])
    assert sequential.paired(labels, new, old).tolist() == [1, 0, -1, 0]


# Clicks


def test_off_policy_estimates_are_right_where_the_truth_is_known():
    """A log whose click rates are known: logged clicks are far off, the three estimators are near."""
    random, items, n = np.random.default_rng(0), 5, 20_000
    rates, policy = np.array([0.05, 0.1, 0.2, 0.4, 0.6]), np.array([0.02, 0.03, 0.05, 0.3, 0.6])
    item = random.integers(0, items, n)
    log = pd.DataFrame({"item": item, "position": 0, "click": random.random(n) < rates[item], "propensity": 1 / items})
    log = log.assign(**dict.fromkeys(off_policy.USER, "same"))
    found, truth = off_policy.estimates(log, policy[:, None], resamples=200), float(rates @ policy)
    assert abs(found.loc["logged clicks", "value"] - truth) > 0.15
    for name in ("IPS", "SNIPS", "doubly robust"):
        assert found.loc[name, "value"] == pytest.approx(truth, abs=0.02)
        assert found.loc[name, "low"] < truth < found.loc[name, "high"]


def test_open_bandit_data_are_what_they_say():
    log, other = off_policy.load("random", "men"), off_policy.load("bts", "men")
    assert len(log) == len(other) == 10_000 and set(log["position"]) == {0, 1, 2}
    assert log["propensity"].nunique() == 1 and log["propensity"].iloc[0] == pytest.approx(1 / (log["item"].max() + 1))
    assert np.allclose(off_policy.choices(other).sum(axis=0), 1)
    with pytest.raises(LLMProdError, match="women"):
        off_policy.load("random", "children")


# Drift


def test_short_texts_drift_and_halves_do_not():
    random = np.random.default_rng(0)
    texts = [" ".join(["word"] * n) for n in random.integers(20, 200, 400)]
    known = watch.traits(texts, random.choice(["earn", "acq"], 400), random.uniform(0.5, 1, 400))
    short = watch.traits([" ".join(t.split()[:8]) for t in texts], known["label"], known["confidence"])
    found = drift.drift(known, short)["drifted"]
    assert found["words"] and not found["label"]
    assert watch.false_alarm_rate(known, rounds=100) <= 0.1
