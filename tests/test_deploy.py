"""The bundle refuses what was changed; the service answers as it does: under load, exchanged, asked anything."""

import asyncio
import gzip
import json
import os
import shutil
import signal
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from benchmarks import load as benchmark
from llmprod import LLMProdError, artifacts, files, models
from llmprod.__main__ import main
from llmprod.deploy import batching, bundle, guard, load, messages, score, service
from llmprod.deploy.batching import Batcher, Busy
from llmprod.deploy.registry import Registry
from llmprod.feedback.store import Store
from llmprod.optimize import export

LABELS = ["grain", "oil", "rates"]
TEXTS = ["Wheat and corn exports rose.", "Crude oil prices fell.", "The bank cut its lending rate.", "Soybean harvest"]
FROZEN = {"text": TEXTS, "label": ["grain", "oil", "rates", "grain"]}


@pytest.fixture(scope="module")
def predictor():
    """The real encoder, with class vectors set to three sentences: it answers, without training."""
    made = models.Predictor.pretrained("minilm", LABELS, head="cosine", max_length=32)
    vectors = made.embed(["wheat, corn, grain", "crude oil, petroleum", "interest rates, central bank"])
    made.model.classifier.weight.data[:] = made.model.classifier.weight.data.new_tensor(vectors)
    return made


@pytest.fixture(scope="module")
def made(predictor, tmp_path_factory):
    """A bundle in fp32."""
    folder = tmp_path_factory.mktemp("bundles") / "fp32"
    return bundle.write(folder, predictor, FROZEN, "# A card", temperature=0.5, threshold=0.6)


@pytest.fixture(scope="module")
def other(predictor, made, tmp_path_factory):
    """The same model in int8: another bundle, with the same answers."""
    folder = tmp_path_factory.mktemp("bundles") / "int8"
    predictor.save(folder, "# A card")
    return bundle.write(
        folder.parent / "bundle", export.int8(folder), FROZEN, "# A card", temperature=0.5, threshold=0.6
    )


# The bundle


def test_a_bundle_answers_as_the_model_does(made, other, predictor):
    expected = [LABELS[k] for k in predictor.predict(TEXTS).argmax(axis=1)]
    assert [answer.label for answer in made.predict(TEXTS)] == expected == FROZEN["label"]
    assert [answer.label for answer in other.predict(TEXTS)] == expected
    (answer,) = made.predict(TEXTS[:1])
    logits = predictor.predict(TEXTS[:1])[0] / 0.5
    assert answer.confidence == pytest.approx((np.exp(logits) / np.exp(logits).sum()).max(), abs=1e-4)
    assert answer.sure == (answer.confidence >= 0.6) and sum(answer.probabilities.values()) == pytest.approx(
        1, abs=1e-5
    )
    assert made.predict([]) == []
    made.check()
    other.check()


def test_no_byte_of_a_bundle_may_change(made, tmp_path):
    """Any file changed, left out or added is refused by its name."""
    for name in made.manifest["files"]:
        copy = tmp_path / name
        files_of(made.folder, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(bundle.BundleError, match=name):
            bundle.load(copy)
        (copy / name).unlink()
        with pytest.raises(bundle.BundleError, match=name):
            bundle.load(copy)
    more = tmp_path / "more"
    files_of(made.folder, more)
    (more / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(bundle.BundleError, match=r"pytorch_model\.bin"):
        bundle.load(more)


def files_of(folder: Path, copy: Path) -> None:
    """Copies a bundle."""
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())


@pytest.mark.parametrize(("change", "message"), [({"format": 0}, "format 0"), ({"format": 2}, "this version reads 1")])
def test_a_bundle_of_another_format_is_refused_with_the_reason(made, tmp_path, change, message):
    files_of(made.folder, tmp_path / "b")
    files.write_json(tmp_path / "b/bundle.json", made.manifest | change)
    with pytest.raises(bundle.BundleError, match=message):
        bundle.load(tmp_path / "b")
    with pytest.raises(bundle.BundleError, match="is not a bundle"):
        bundle.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0}, {"temperature": "1"}, {"temperature": 1e-320}, {"temperature": 1e-40},
     {"threshold": 1e12}, {"threshold": float("nan")}, {"max_length": None},
     {"labels": ["oil", "grain", "rates"]}, {"labels": None}],
)  # fmt: skip
def test_a_manifest_that_does_not_fit_its_model_is_refused(made, tmp_path, change):
    files_of(made.folder, tmp_path / "b")
    files.write_json(tmp_path / "b/bundle.json", made.manifest | change)
    with pytest.raises(bundle.BundleError, match=r"bundle\.json does not fit the model beside it"):
        bundle.load(tmp_path / "b")
    for broken in ("[]", "1", "{}", "{"):
        (tmp_path / "b/bundle.json").write_text(broken)
        with pytest.raises(LLMProdError, match=r"b has the format|bundle\.json can't be read"):
            bundle.load(tmp_path / "b")


def test_a_name_that_no_system_takes_is_no_bundle(capsys):
    with pytest.raises(bundle.BundleError, match="is not a bundle"):
        bundle.load("x" * 5000)
    with pytest.raises(bundle.BundleError, match="serves no bundle yet"):
        Registry(Path("x" * 5000)).state()
    for command, option, words in (
        ("serve", "", "is not a bundle"), ("answer", "--bundle=", "no assistant is saved here"),
        ("monitor", "--models=", "There is no model for the monitor"),
    ):  # fmt: skip
        more = {"serve": [], "answer": ["Where?"], "monitor": ["--source=/"]}[command]
        assert main([command, *more, option + "x" * 5000]) == 2 and words in capsys.readouterr().err


def test_a_folder_of_nobody_is_no_bundle():
    with pytest.raises(bundle.BundleError, match="is not a bundle"):
        bundle.load("~nobody-of-this-name/x")


KEPT = {"text": "a", "label": "oil", "answer": "oil", "confidence": 1}
ODD = ({"text": 1}, {"text": "\ud800"}, {"answer": "x"}, {"answer": []}, {"confidence": "1"})


@pytest.mark.parametrize(
    "frozen",
    ["{", "1", "[1]", "[{}]", "[" * 100_000, "\udcff"]
    + [json.dumps([KEPT | change]) for change in ODD],
)  # fmt: skip
def test_frozen_texts_that_are_none_are_refused_whatever_their_checksum(made, tmp_path, frozen):
    files_of(made.folder, tmp_path / "b")
    (tmp_path / "b/frozen.json").write_bytes(frozen.encode(errors="surrogateescape"))
    sums = artifacts.checksums(tmp_path / "b", (bundle.MANIFEST,))
    files.write_json(tmp_path / "b/bundle.json", made.manifest | {"files": sums})
    with pytest.raises(bundle.BundleError, match=r"frozen\.json was damaged or edited"):
        bundle.load(tmp_path / "b")


def test_a_bundle_whose_model_answers_otherwise_fails_its_check(made, tmp_path):
    """As on a machine where a library computes otherwise: the frozen answers are what it is held to."""
    frozen = json.loads((made.folder / "frozen.json").read_text())
    frozen[1]["answer"] = "grain"
    files_of(made.folder, tmp_path / "b")
    files.write_json(tmp_path / "b/frozen.json", frozen)
    changed = made.manifest | {"files": artifacts.checksums(tmp_path / "b", (bundle.MANIFEST,))}
    files.write_json(tmp_path / "b/bundle.json", changed)
    with pytest.raises(bundle.BundleError, match="answers a frozen text 'oil'"):
        bundle.load(tmp_path / "b").check()
    with pytest.raises(bundle.BundleError, match="labels that the model lacks: weather"):
        bundle.write(tmp_path / "c", made.predictor, {"text": ["a"], "label": ["weather"]}, "")


# The registry


def test_promotion_roll_back_and_shadow(made, other, tmp_path):
    registry = Registry(tmp_path / "served")
    with pytest.raises(bundle.BundleError, match="serves no bundle yet"):
        registry.load()
    first, second = registry.add(made), registry.add(other)
    assert first == made.id != second
    registry.promote(first, "first")
    with pytest.raises(bundle.BundleError, match="never served another"):
        registry.roll_back("?")
    registry.shadow(second)
    registry.promote(second, "better")
    assert registry.state()["shadow"] == "", "what is served casts no shadow"
    assert registry.load().id == second and registry.roll_back("worse after all") == first == registry.load().id
    assert [entry["why"] for entry in registry.state()["history"]] == ["first", "better", "worse after all"]
    for unknown in ("nothing", "../served", "", "."):
        with pytest.raises(bundle.BundleError):
            registry.promote(unknown or "x", "?")


SERVED = {"current": "a" * 300, "shadow": "", "history": [{"id": "a", "why": ""}]}


@pytest.mark.parametrize(
    "state",
    ["", "[]", "1", "[" * 100_000, *(json.dumps({k: v for k, v in SERVED.items() if k != name}) for name in SERVED)]
    + [json.dumps(SERVED | change) for change in ({"current": 1}, {"shadow": None}, {"history": [1]}, {"history": {}})],
)
def test_a_damaged_registry_is_one_message(tmp_path, state):
    (tmp_path / "served.json").write_text(state)
    registry = Registry(tmp_path)
    for use in (registry.load, registry.state, lambda: registry.roll_back("?"), lambda: registry.shadow("")):
        with pytest.raises(bundle.BundleError, match=r"served\.json was damaged or edited: delete it, and promote"):
            use()
    (tmp_path / "served.json").write_text(json.dumps(SERVED))
    with pytest.raises(bundle.BundleError, match="has no bundle 'aaa"):
        registry.load()


# Batching


def batched(made, asked, **options):
    """Runs clients that ask at once, each for its texts; their results or errors, and the sizes of the batches."""
    sizes = []

    async def all_of_them():
        batcher = Batcher(made, done=lambda batch: sizes.append(len(batch.jobs)), **options)
        batcher.start()
        calls = [batcher.predict({f"{i}-{j}": t for j, t in enumerate(texts)}) for i, texts in enumerate(asked)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        await batcher.stop()
        return found

    return asyncio.run(all_of_them()), sizes


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from([*TEXTS, "oil " * 50, "a"]), min_size=1, max_size=5), min_size=1, max_size=6))
def test_every_client_gets_its_own_answers(made, asked):
    found, sizes = batched(made, asked, tokens=64)
    assert sum(sizes) == sum(map(len, asked))
    for i, texts in enumerate(asked):
        assert list(found[i]) == [f"{i}-{j}" for j in range(len(texts))]
        assert [answer.label for answer, _ in found[i].values()] == [a.label for a in made.predict(texts)]


def test_batches_keep_to_the_budget_and_the_queue_has_an_end(made):
    long, short = "oil " * 200, "oil"
    assert max(batched(made, [[short] * 8, [long] * 3], tokens=64)[1]) <= 64 // 2
    assert batched(made, [[long] * 4], tokens=64)[1] == [2, 2], "32 tokens each, the most that the model reads"
    found, sizes = batched(made, [[short] * 6, [short] * 6], waiting=10)
    assert len(found[0]) == 6 and isinstance(found[1], Busy) and found[1].seconds >= 1 and sum(sizes) == 6


def test_a_text_that_fails_fails_alone(made, monkeypatch):
    def predict(self, texts):
        if "bad" in texts:
            raise ValueError("no")
        return [bundle.Answer("oil", 1.0, True, {}) for _ in texts]

    monkeypatch.setattr(bundle.Bundle, "predict", predict)
    found, _ = batched(made, [["good", "good"], ["bad"], ["good"]])
    assert isinstance(found[1], ValueError) and len(found[0]) == 2 and len(found[2]) == 1


def test_a_shadow_that_fails_fails_no_answer(made):
    class Broken:
        def predict(self, texts):
            raise ValueError("no")

    seen = []

    async def asks():
        batcher = Batcher(made, shadow_share=1.0, done=seen.append)
        batcher.shadow = Broken()
        batcher.start()
        found = await batcher.predict({"a": "Crude oil prices fell."})
        await batcher.stop()
        return found

    assert asyncio.run(asks())["a"][0].label == "oil"
    assert [batch.failed for batch in seen] == ["ValueError: no"]


def test_a_client_that_goes_away_takes_its_texts_with_it(made):
    seen = []

    async def leaves():
        batcher = Batcher(made, done=lambda batch: seen.extend(job.id for job in batch.jobs))
        leaving = asyncio.create_task(batcher.predict({"gone": "oil"}))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        batcher.start()
        await batcher.predict({"here": "oil"})
        await batcher.stop()

    asyncio.run(leaves())
    assert seen == ["here"]


# A corpus


@pytest.fixture
def corpus(tmp_path):
    """Four files of three kinds; one row has no text."""
    folder = tmp_path / "corpus"
    (folder / "more").mkdir(parents=True)
    (folder / "a.csv").write_text("id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(["", *TEXTS])))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in reversed(TEXTS))
    pd.DataFrame({"text": TEXTS * 2}).to_parquet(folder / "more/c.parquet")
    (folder / "empty.tsv").write_text("text\tid\n")
    (folder / "notes.md").write_text("no rows")
    return folder


def test_a_registrys_current_bundle_labels(corpus, registry, made, capsys):
    assert main(["score", str(corpus / "a.csv"), str(corpus / "labels"), "--bundle", str(registry.folder)]) == 0
    kept = json.loads(pq.read_schema(corpus / "labels/a.csv.parquet").metadata[score.SOURCE])
    assert kept["bundle"] == made.id and "files: 1, labelled now: 1, rows: 5" in capsys.readouterr().out


def test_a_corpus_is_labelled_file_by_file_and_only_once(corpus, made, other, capsys, monkeypatch):
    def said_of(model: object = made) -> str:
        assert main(["score", str(corpus), str(corpus / "labels"), "--bundle", str(model.folder)]) == 0
        return capsys.readouterr().out.strip()

    def part(name: str) -> pd.DataFrame:
        return pd.read_parquet(corpus / f"labels/{name}.parquet")

    assert said_of() == "files: 4, labelled now: 4, rows: 17, without a text: 1"
    said = [(answer.label, answer.confidence, answer.sure) for answer in made.predict(TEXTS)]
    first, backwards, twice = part("a.csv"), part("b.jsonl.gz"), part("more/c.parquet")
    assert first["row"].tolist() == [0, 1, 2, 3, 4] and first.iloc[0, 1:].isna().all()
    for found, rows in ((first[1:], said), (backwards, said[::-1]), (twice, said * 2)):
        assert list(zip(found["label"], found["sure"], strict=True)) == [(label, sure) for label, _, sure in rows]
        np.testing.assert_allclose(found["confidence"], [confidence for _, confidence, _ in rows], atol=1e-5)
    assert part("empty.tsv").empty and list(part("empty.tsv")) == ["row", "label", "confidence", "sure"]
    monkeypatch.chdir(corpus)
    assert main(["score", ".", "labels", "--bundle", str(made.folder)]) == 0
    assert "labelled now: 0" in capsys.readouterr().out, "the labels are not taken for a part of the corpus"
    pd.DataFrame({"text": TEXTS}).to_parquet(corpus / "more/c.parquet")
    (corpus / "labels/a.csv.parquet").write_bytes(b"PAR1 half")
    assert "labelled now: 2, rows: 13" in said_of(), "what was changed, and what is damaged"
    assert "labelled now: 4" in said_of(other)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("corpus", "--text-column", "body"), "a.csv: no column body; it has id, text."),
        (("nowhere",), "there is no such file"),
        (("corpus", "--bundle", "corpus"), "is not a bundle"),
        (("broken",), "can't be read"),
    ],
)
def test_what_can_not_be_labelled_is_one_message(corpus, made, tmp_path, monkeypatch, capsys, typed, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpus, "broken")
    Path("broken/b.jsonl.gz").write_bytes(Path("broken/b.jsonl.gz").read_bytes()[:-9])
    source, *options = typed
    assert main(["score", source, "labels", "--bundle", str(made.folder), *options]) == 2
    assert message in capsys.readouterr().err
    if source == "broken":  # the others are kept, and not labelled again
        shutil.copy(corpus / "b.jsonl.gz", "broken")
        assert main(["score", source, "labels", "--bundle", str(made.folder)]) == 0
        out = capsys.readouterr().out
        assert "files: 4" in out and "labelled now: 4" not in out


# The service, over HTTP on loopback


class Running:
    """A service in a process of its own."""

    def __init__(self, served: Path, *options: str, **environment: str):
        self.log = served.parent / f"{time.monotonic_ns()}.log"
        command = ["llmprod", "serve", str(served), "--port", "0", *options]
        self.process, self.url = load.serve(command, self.log, **environment)
        self.http = httpx2.Client(base_url=self.url, timeout=30)

    def logged(self, text: str) -> bool:
        """Whether a text comes to stand in the log, which is written after the answer was sent."""
        deadline = time.monotonic() + 10
        while text not in (written := self.log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return text in written

    def end(self) -> int:
        """Stops it as an operator does, and returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def registry(made, other, tmp_path_factory):
    """A registry that serves the first of two bundles."""
    found = Registry(tmp_path_factory.mktemp("registry") / "served")
    found.add(other)
    found.promote(found.add(made), "first")
    return found


@pytest.fixture(scope="module")
def running(registry):
    """The real service, with a store and the page."""
    found = Running(registry.folder, "--store", str(registry.folder.parent / "answers.sqlite"), "--page")
    yield found
    found.end()


def test_one_text_many_and_lines(running, made):
    many = running.http.post("/classify", json={"texts": TEXTS}).json()["answers"]
    assert [a["label"] for a in many] == FROZEN["label"] and {a["bundle"] for a in many} == {made.id}
    assert len({a["id"] for a in many}) == len(TEXTS)
    lines = "\n".join([*TEXTS, "", "x" * 20_001, "last, without an end"] * 40)
    answered = running.http.post("/classify/lines", content=lines.encode()).text.splitlines()
    found = [json.loads(line).get("label") or json.loads(line)["error"] for line in answered]
    assert len(found) == 7 * 40 and found[:6] == [*FROZEN["label"], "an empty line", "more than 20,000 characters"]


@pytest.mark.parametrize("filler", [b"x", b" ", "é".encode()])
def test_a_line_without_end_is_dropped_as_it_comes(filler):
    class Echo:
        limits = guard.Limits(characters=100)

        async def classify(self, texts):
            return [messages.Classified(id=t, label=t, confidence=1, sure=True, bundle="b") for t in texts]

    async def parts():
        yield b"a\n"
        part = filler * 50_000
        for _ in range(100):
            yield part
        yield b"x\nb"

    async def ask():
        return b"".join([part async for part in service.answered(Echo(), parts())])

    tracemalloc.start()
    first, long, last = map(json.loads, asyncio.run(ask()).splitlines())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (first["label"], long, last["label"]) == ("a", {"error": "more than 100 characters"}, "b")
    assert peak < 2_000_000, "bytes, of a line of five million and more"


def test_feedback_reaches_the_store_once(running, registry):
    (answer,) = running.http.post("/classify", json={"texts": ["Call me: 4111 1111 1111 1111"], "user": "u7"}).json()[
        "answers"
    ]
    said = {"id": answer["id"], "user": "u7", "verdict": "corrected", "label": "rates"}
    assert [running.http.post("/feedback", json=said).json()["new"] for _ in range(2)] == [True, False]
    assert running.http.post("/feedback", json=said | {"id": "nothing"}).status_code == 404
    assert running.http.post("/feedback", json=said | {"label": "weather"}).status_code == 422
    with Store(f"sqlite:///{registry.folder.parent / 'answers.sqlite'}") as store:
        kept = store.export_user("u7")
    assert "4111" not in kept.to_json() and "rates" in kept.to_json(), "kept, without the card's number"
    assert "4111" not in running.log.read_text(), "no text is logged"


def test_the_trace_of_the_client_is_kept(running):
    trace = "0af7651916cd43dd8448eb211c80319c"
    reply = running.http.post(
        "/classify", json={"texts": ["oil"]}, headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    )
    assert trace in reply.headers["traceparent"] and running.logged(f'"trace": "{trace}"')
    own = running.http.post("/classify", json={"texts": ["oil"]}, headers={"traceparent": "x"}).headers["traceparent"]
    assert guard.TRACE.fullmatch(own)


def test_a_service_that_does_not_get_ready_is_one_error_and_leaves_no_process(tmp_path, monkeypatch):
    with pytest.raises(LLMProdError, match="no-such-folder"):
        load.serve(["llmprod", "serve", str(tmp_path / "no-such-folder"), "--port", "0"], tmp_path / "log")
    (tmp_path / "silent.py").write_text("import os, time\nprint(os.getpid(), file=open('pid', 'w'))\ntime.sleep(60)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "READY", 1.5)
    with pytest.raises(LLMProdError, match="did not get ready"):
        load.serve(["silent"], tmp_path / "log", PYTHONPATH=str(tmp_path))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_load_benchmark_exchanges_bundles_and_loses_nothing(registry, tmp_path):
    shutil.copytree(registry.folder, tmp_path / "served")
    asked = tmp_path / "texts.json"
    asked.write_text(json.dumps(["Oil prices rose.", "The bank cut its rate."]), encoding="utf-8")
    (row,) = benchmark.measure(tmp_path / "served", asked, [(benchmark.EXCHANGE, 3)], seconds=9)
    assert row["failed"] == 0 and row["bundles"] == 2 and row["requests"] > 3


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["/classify", "/feedback", "/classify/lines", "/answer", "/%00", "/../x"]),
    st.one_of(
        st.binary(max_size=300),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(),
            lambda s: st.lists(s) | st.dictionaries(st.text(), s),
            max_leaves=5,
        ).map(lambda found: json.dumps({"texts": found}).encode()),
    ),
    st.sampled_from(["application/json", "text/plain", "", "application/json; charset=utf-16"]),
)
def test_nothing_that_is_sent_breaks_it(running, path, body, kind):
    reply = running.http.post(path, content=body, headers={"Content-Type": kind})
    assert reply.status_code < 500, (path, body, kind)


def test_requests_made_from_its_own_description(running):
    """`schemathesis` reads the OpenAPI description and sends what it allows, and what it forbids: no 5xx."""
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    tried = 0
    for operation in schema.get_all_operations():
        if operation.ok().path == "/reload":
            continue

        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.ok().as_strategy())
        def send(case):
            nonlocal tried
            reply = case.call()
            tried += 1
            assert reply.status_code < 500, case

        send()
    assert tried > 30, "each operation with a body, fifteen times"


def test_an_assistant_and_a_recommender_answer_and_replies_are_kept(made, tmp_path):
    """Stand-ins for what 11 and 13 save: the routes, what is stored, and an item that the catalogue lacks."""

    def answer(turns):
        return {"action": "hand over" if "person" in turns[-1] else "answer", "text": "", "summary": {}}

    def recommend(liked, wish, count):
        if "x" in liked:
            raise LLMProdError("The catalogue has no item x.")
        return [{"id": "1", "title": wish, "because": list(liked)}][:count]

    store = Store(f"sqlite:///{tmp_path / 'store.db'}")
    with TestClient(service.build(made, store, answer=answer, recommend=recommend)) as client:
        said = client.post("/answer", json={"turns": ["Where is it?", "Get me a person"]}).json()
        assert said["action"] == "hand over"
        store.add_answer("5ba1e0c0ffee", "monitor", "topic: earn: negatives surge", "topic", 1.0, source="alert")
        for request in (said["id"], "5ba1e0c0ffee"):  # a reply and an alert: right or wrong, without a class
            verdict = {"id": request, "user": "u1", "verdict": "up"}
            assert client.post("/feedback", json=verdict).json() == {"new": True}
            wrong = client.post("/feedback", json=verdict | {"verdict": "corrected", "label": made.labels[0]})
            assert wrong.status_code == 404 and "say up or down" in wrong.text
            wrong = client.post("/feedback", json=verdict | {"verdict": "corrected", "label": "hand over"})
            assert wrong.status_code == 422
        assert store.table("feedback")["verdict"].tolist() == ["up", "up"]
        found = client.post("/recommend", json={"liked": ["7"], "wish": "robots", "count": 3}).json()["items"]
        assert found == [{"id": "1", "title": "robots", "because": ["7"]}]
        missing = client.post("/recommend", json={"liked": ["x"]})
        assert missing.status_code == 422 and "no item x" in missing.text
        assert client.post("/recommend", json={"count": 0}).status_code == 422
    (row,) = store.table("answers", "answer").to_dict("records")
    assert (row["request"], row["source"], row["label"], row["text"]) == (
        said["id"], "answer", "hand over", "Get me a person",
    )  # fmt: skip
    store.engine.dispose()


def test_limits_of_size_and_rate(running, registry):
    assert running.http.post("/classify", content=b"x" * 2_000_001).status_code == 413
    assert running.http.post("/classify", json={"texts": ["a"] * 257}).status_code == 422
    limits = guard.Limits(rate=1.0, burst=3)
    bucket = guard.Guard(None, limits, guard.Meters())
    assert [bucket.wait("a") > 0 for _ in range(5)] == [False] * 3 + [True] * 2 and bucket.wait("b") == 0


def test_a_bundle_is_exchanged_under_load_without_a_lost_request(running, registry, made, other, tmp_path):
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(TEXTS))
    process = load.start(running.url, texts, 4, 8.0)  # seconds for a busy machine: a bundle has to be read meanwhile
    time.sleep(0.5)  # the first answers
    registry.promote(other.id, "under load")
    try:
        assert running.http.post("/reload").json() == {"bundle": other.id}
        found = load.result(process)
    finally:
        registry.roll_back("and back")
    assert set(found["status"]) == {"200"} and found["requests"] > 20
    answered = [set(part) for part in found["timeline"] if part]
    assert answered[0] == {made.id} and answered[-1] == {other.id}, "first the one, then the other"
    time.sleep(3)  # it looks by itself
    assert running.http.get("/ready").json()["bundle"] == made.id


def test_a_load_test_of_a_service_that_is_not_there_is_one_message(tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    with pytest.raises(LLMProdError, match=r"http://127\.0\.0\.1:9 gives no answer"):
        load.start("http://127.0.0.1:9", tmp_path / "texts.json", 1, 1.0)


def test_a_damaged_bundle_is_not_served(running, registry, made, tmp_path):
    """The one that serves stays, and the error says what is wrong."""
    broken = registry.folder / "deadbeef"
    files_of(made.folder, broken)
    (broken / "config.json").write_text("{}")
    state = registry.state()
    try:
        files.write_json(registry.folder / "served.json", state | {"current": "deadbeef"})
        reply = running.http.post("/reload")
        assert reply.status_code == 409 and "config.json" in reply.text
        assert running.http.get("/ready").json()["bundle"] == made.id
    finally:
        files.write_json(registry.folder / "served.json", state)


def test_a_bundle_in_anothers_folder_is_refused(registry, made, other):
    """An id in `served.json` names the content, not the place."""
    files_of(other.folder, registry.folder / "feedbeef")
    with pytest.raises(bundle.BundleError, match=f"feedbeef holds the bundle {other.id}"):
        registry.promote("feedbeef", "by hand")
    assert registry.state()["current"] == made.id


def test_a_shadow_answers_unseen(running, registry, other):
    registry.shadow(other.id)
    running.http.post("/reload")
    bundles = {
        running.http.post("/classify", json={"texts": ["oil"]}).json()["answers"][0]["bundle"] for _ in range(40)
    }
    registry.shadow("")
    running.http.post("/reload")
    lines = [x for x in running.http.get("/metrics").text.splitlines() if x.startswith("shadow_texts_total")]
    assert other.id not in bundles and sum(float(line.split()[-1]) for line in lines) > 0
    with Store(f"sqlite:///{registry.folder.parent / 'answers.sqlite'}") as store:
        assert (store.table("answers")["shadow"] != "").any()


def test_a_key_is_asked_for_and_others_than_this_machine_need_one(registry):
    with pytest.raises(LLMProdError, match="LLMPROD_API_KEY"):
        service.run(service.build(registry), "0.0.0.0", 0)
    locked = Running(registry.folder, LLMPROD_API_KEY="a long secret")
    assert locked.http.get("/health").status_code == 200
    assert locked.http.post("/classify", json={"texts": ["oil"]}).status_code == 401
    assert locked.http.get("/metrics").status_code == 401
    assert locked.http.post("/classify", json={"texts": ["oil"]}, headers={"X-API-Key": "a long"}).status_code == 401
    good = locked.http.post("/classify", json={"texts": ["oil"]}, headers={"X-API-Key": "a long secret"})
    assert good.status_code == 200 and "a long secret" not in locked.log.read_text()
    assert locked.end() in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 70_000), ("127.0.0.1", -1), ("::1", 0), ("no host\x1b", 0), ("a" * 70, 0)]
)
def test_a_place_that_cannot_be_listened_on_is_one_message(made, host, port):
    with pytest.raises(LLMProdError, match=f":{port} can't be listened on: .*Choose another --port") as error:
        service.run(service.build(made), host, port)
    assert str(error.value).isprintable()


def test_what_waits_is_answered_before_the_end(registry):
    ending = Running(registry.folder)
    many = {"texts": ["crude oil " * 20] * 200}

    async def ask_and_stop():
        async with httpx2.AsyncClient(base_url=ending.url, timeout=60) as client:
            asking = asyncio.create_task(client.post("/classify", json=many))
            await asyncio.sleep(0.2)
            ending.process.send_signal(signal.SIGTERM)
            return await asking

    reply = asyncio.run(ask_and_stop())
    assert reply.status_code == 200 and len(reply.json()["answers"]) == 200
    assert ending.process.wait(30) in (0, -signal.SIGTERM)


def test_a_store_that_fails_fails_no_answer(made):
    class Full:
        def add_answers(self, rows):
            raise OSError(28, "No space left on device")

    app = service.build(made, Full())
    found = app.state.service
    answer = made.predict(["oil"])
    job = batching.Job("a", "oil", "", None)
    found.done(batching.Batch(made, [job], answer, [0.0], 0.1))
    counted = found.meters.registry.get_sample_value("failures_total", {"part": "store"})
    assert counted == 1


def test_feedback_that_can_not_be_kept_now_is_no_unknown_answer(made, tmp_path):
    with Store(f"sqlite:///{tmp_path / 'answers.sqlite'}") as store, TestClient(service.build(made, store)) as client:
        (answer,) = client.post("/classify", json={"texts": ["oil"]}).json()["answers"]
        said = {"id": answer["id"], "user": "u1", "verdict": "up"}
        assert client.post("/feedback", json=said | {"id": "other"}).status_code == 404
        store.engine.dispose()
        for path in tmp_path.glob("answers.sqlite*"):
            path.write_bytes(b"no database" * 1000)
        reply = client.post("/feedback", json=said)
        assert reply.status_code == 503 and reply.headers["Retry-After"] == "5" and "sqlite" not in reply.text
        assert 'failures_total{part="store"} 1.0' in client.get("/metrics").text


# The page, in a real browser


def test_the_page_shows_labels_as_texts():
    """One that is Markdown would load its image from elsewhere."""
    from llmprod.deploy import page  # gradio takes seconds

    label = "![x](http://example.org/x.png)"
    batcher = SimpleNamespace(bundle=SimpleNamespace(labels=["a", label]))
    shown = page.build(SimpleNamespace(batcher=batcher, limits=guard.Limits(), store=None)).config["components"]
    kinds = {part["type"] for part in shown if label in str(part["props"].get("value"))}
    assert kinds == {"textbox"}


def test_a_visitor_asks_and_corrects(running, registry, tmp_path):
    """A click, an answer with its words, a correction, and the row that it made."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = next((path for path in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(path).exists()), None)
    if not chromium:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1000})
        foreign = []
        page.on("request", lambda request: foreign.append(request.url) if "127.0.0.1" not in request.url else None)
        page.goto(running.url)
        page.locator("#text textarea").fill("Crude oil <b>prices</b> fell in the north.")
        page.locator("#classify").click()
        page.wait_for_function("document.querySelector('#answer textarea, #answer input').value.startsWith('oil')")
        page.locator("#label input").click()
        page.get_by_role("option", name="rates").click()
        page.locator("#correct").click()
        page.wait_for_function("document.querySelector('#thanks textarea, #thanks input').value.includes('rates')")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    foreign = [url for url in foreign if not url.startswith(("data:", "blob:"))]
    assert not foreign, "nothing is fetched from elsewhere"
    with Store(f"sqlite:///{registry.folder.parent / 'answers.sqlite'}") as store:
        kept = store.export_user("page").to_json()
    assert "rates" in kept and "<b>" in kept
