"""The service as replicas on Ray: the same answers, one replica killed under load, and nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pandas as pd
import psutil
import pytest

from llmprod import LLMProdError
from llmprod.__main__ import main
from llmprod.feedback.store import Store

from . import test_deploy
from .test_deploy import TEXTS, Running

pytest.importorskip("ray", reason="no Ray: pip install 'llmprod[ray]'")
predictor, made, other, registry = (
    getattr(test_deploy, name) for name in ("predictor", "made", "other", "registry")
)  # fixtures
LOOPBACK = ("127.0.0.1", "::ffff:127.0.0.1", "::1")


@pytest.fixture(scope="module")
def running(registry):
    """Two replicas with a store."""
    options = ("--replicas", "2", "--store", str(registry.folder.parent / "answers.sqlite"))
    try:
        found = Running(registry.folder, *options)
    except LLMProdError as error:  # Ray gives its node 30 s, too few on a busy machine
        if "Ray does not start" not in str(error):
            raise
        found = Running(registry.folder, *options)
    yield found
    found.end()


def family(running: Running) -> list[psutil.Process]:
    """All processes of Ray that the command started."""
    return psutil.Process(running.process.pid).children(recursive=True)


def replicas(running: Running) -> set[int]:
    """The process ids of the replicas."""
    found = set()
    for process in family(running):
        try:
            found |= {process.pid} if process.cmdline()[:1] == ["ray::ServeReplica:llmprod:Replica"] else set()
        except psutil.Error:  # it has just ended
            continue
    return found


def soon(true, seconds: float = 240) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def names(running: Running) -> set[str]:
    """The replicas that have counted requests, as a scrape of the metrics names one after the other."""
    lines = [line for _ in range(20) for line in running.http.get("/metrics").text.splitlines()]
    return {line.split('replica="')[1].split('"')[0] for line in lines if line.startswith("requests_total{")}


def test_replicas_answer_as_one_process_does(running, registry, made):
    answers = running.http.post("/classify", json={"texts": TEXTS, "user": "u1"}).json()["answers"]
    assert [row["label"] for row in answers] == [answer.label for answer in made.predict(TEXTS)]
    assert {row["bundle"] for row in answers} == {made.id}
    said = {"id": answers[0]["id"], "user": "u1", "verdict": "up"}
    for new in (True, False):  # whichever replica hears it
        assert running.http.post("/feedback", json=said).json() == {"new": new}
    lines = running.http.post("/classify/lines", content="\n".join(TEXTS).encode()).text.splitlines()
    assert len(lines) == len(TEXTS) and '"error"' not in "".join(lines)
    assert running.http.get("/ready").json() == {"status": "ready", "bundle": made.id}
    assert running.http.post("/classify", json={"texts": []}).status_code == 422
    assert running.http.post("/classify", json={"texts": ["a" * 2_000_001]}).status_code == 413
    assert len(names(running)) == 2, "each replica counts for itself, under its name"
    with Store(f"sqlite:///{registry.folder.parent / 'answers.sqlite'}") as store:
        assert set(store.export_user("u1")["text"]) == set(TEXTS)
    assert running.logged('"route": "/classify"') and "Crude" not in running.log.read_text()


def test_no_port_is_open_to_others_but_one_that_asks_for_rays_token(running):
    import grpc

    listening = [c for p in family(running) for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    wide = [c.laddr.port for c in listening if c.laddr.ip not in LOOPBACK]
    assert listening and len(wide) == 2, "Ray gives each replica one, and no choice"
    for port in wide:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=30)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_replica_that_is_killed_is_replaced_and_the_service_answers_on(running):
    before, clients = replicas(running), 8
    assert len(before) == 2
    victim, seen, done = min(before), [], threading.Event()

    def ask(client: int) -> None:
        with httpx2.Client(base_url=running.url, timeout=60) as http:
            while not done.is_set():
                began = time.monotonic()
                reply = http.post("/classify", json={"texts": [*TEXTS, f"client {client}"]})
                seen.append((began, client, reply.status_code))

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask, client) for client in range(clients)]
        try:
            assert soon(lambda: len(seen) > 5 * clients)
            psutil.Process(victim).kill()
            killed = time.monotonic()
            assert soon(lambda: len(replicas(running)) == 2 and victim not in replicas(running)), "it is replaced"
            back = time.monotonic()
            assert soon(lambda: len([1 for began, _, _ in seen if began > back]) > 5 * clients)
        finally:
            done.set()
        for future in asking:
            future.result()
    failed = [began for began, _, status in seen if status != 200]
    assert len(failed) <= clients and max(failed, default=0) < killed, "what was asked afterwards was answered"


def test_each_replica_follows_the_registry(running, registry, made, other):
    registry.promote(other.id, "smaller")
    answered = lambda: {running.http.get("/ready").json()["bundle"] for _ in range(20)}  # noqa: E731
    try:
        assert soon(lambda: answered() == {other.id})
    finally:
        registry.promote(made.id, "first again")
    assert soon(lambda: answered() == {made.id})


def test_what_waits_is_answered_before_the_end_and_no_process_is_left(running):
    started = family(running)
    many = {"texts": ["crude oil " * 20] * 200}
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(httpx2.post, f"{running.url}/classify", json=many, timeout=60)
        time.sleep(0.3)
        running.process.send_signal(signal.SIGTERM)
        assert asking.result().status_code == 200 and len(asking.result().json()["answers"]) == 200
    assert running.process.wait(60) == 0
    assert not psutil.wait_procs(started, 30)[1]


def test_a_corpus_is_labelled_on_two_nodes_of_which_one_is_lost(made, tmp_path):
    from ray.cluster_utils import Cluster

    corpus, numbers = tmp_path / "corpus", range(6)
    corpus.mkdir()
    for number in numbers:
        rows = [f"{text} {number} {again}" for again in range(100) for text in TEXTS]
        pd.DataFrame({"text": rows}).to_parquet(corpus / f"{number}.parquet")

    def command(folder: str) -> list[str]:
        return ["score", str(corpus), str(tmp_path / folder), "--bundle", str(made.folder)]

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        given = [sys.executable, "-m", "llmprod", *command("spread"), "--engine", "ray"]
        environment = os.environ | {"RAY_ADDRESS": cluster.address}
        spread = subprocess.Popen(given, env=environment, stderr=subprocess.PIPE)
        assert soon(lambda: list(tmp_path.glob("spread/*.parquet")) or spread.poll() is not None)
        cluster.remove_node(node, allow_graceful=False)
        said = spread.communicate(timeout=240)[1]
    finally:
        cluster.shutdown()
    assert spread.returncode == 0, said
    assert main(command("alone")) == 0
    for number in numbers:
        one, other = (
            pd.read_parquet(tmp_path / f"{folder}/{number}.parquet.parquet") for folder in ("spread", "alone")
        )
        pd.testing.assert_frame_equal(one, other, atol=1e-5)
    assert len(list(tmp_path.glob("spread/*"))) == len(numbers)


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--page",), "--page needs one process"), (("--host", "0.0.0.0"), "LLMPROD_API_KEY"),
     (("--port", "70000"), "can't be listened on")],
)  # fmt: skip
def test_what_is_wrong_is_one_message_before_ray_is_started(registry, capsys, options, message):
    assert main(["serve", str(registry.folder), "--replicas", "2", *options]) == 2
    assert message in capsys.readouterr().err
    assert main(["serve", str(registry.folder.parent), "--replicas", "2"]) == 2
    assert "is not a bundle" in capsys.readouterr().err


def test_a_cluster_that_is_not_there_is_one_message(registry, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert main(["serve", str(registry.folder), "--replicas", "2", "--port", "0"]) == 2
    assert "no Ray cluster answers there" in capsys.readouterr().err
