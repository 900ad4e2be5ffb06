"""The commands that use what the notebooks saved: answer, serve, score, feedback, iterate, monitor, topics, alerts."""

import argparse
import contextlib
import functools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from llmprod import LLMProdError, paths


def add(command: Callable[..., argparse.ArgumentParser], profile: argparse.ArgumentParser) -> None:
    """Adds the commands and their options; `command` as in `__main__.parser`."""
    journal = argparse.ArgumentParser(add_help=False)
    file = paths.RUNS / "monitor" / "journal.sqlite"
    journal.add_argument("--journal", default=file, help="the monitor's memory (%(default)s)")

    answer = command("answer", answer_question, "answer a question, or turns of a dialogue from standard input")
    answer.add_argument("question", nargs="?", default="", type=text, help="one question")
    answer.add_argument("--dialogue", action="store_true", help="a turn in each line; an empty line reopens the case")
    bundle = paths.REPORTS / "cpu" / "work" / "11_customer_service" / "assistant"
    answer.add_argument("--bundle", default=bundle, help="what 11_customer_service saved (%(default)s)")

    serving = command("serve", serve, "answer over HTTP with a bundle, or with the current one of a registry")
    served = paths.REPORTS / "cpu" / "work" / "05_deploy" / "served"
    serving.add_argument("bundle", nargs="?", default=served, help="a bundle or a registry (%(default)s)")
    serving.add_argument("--host", default="127.0.0.1", help="another than this machine needs $LLMPROD_API_KEY")
    serving.add_argument("--port", type=int, default=8000, help="0: a free one (%(default)s)")
    serving.add_argument("--store", default="", help="where answers and feedback go: a file, or postgresql://…")
    serving.add_argument("--assistant", default="", help="what 11_customer_service saved, for /answer")
    serving.add_argument("--recommender", default="", help="what 13_recommendation saved, for /recommend")
    serving.add_argument("--rate", type=number(float), default=0.0, help="requests a second of one client; 0: no limit")
    serving.add_argument("--page", action="store_true", help="a page to try it, at /")
    what = "so many processes on a Ray cluster ($RAY_ADDRESS, or a local one); one that dies is replaced"
    serving.add_argument("--replicas", type=number(int, 1), default=0, metavar="N", help=what)

    batch = command(
        "score", score_corpus, "label a corpus, file by file, with a bundle or the current one of a registry"
    )
    batch.add_argument("corpus", help="a file of rows (CSV, TSV, JSON, Parquet; packed or not), or a folder of them")
    batch.add_argument("folder", help="where to: for a.csv there a.csv.parquet, with label, confidence and sure")
    batch.add_argument("--bundle", default=served, help="a bundle or a registry (%(default)s)")
    batch.add_argument("--text-column", default="text", type=text, help="the column of the texts (%(default)s)")
    batch.add_argument("--encoding", default="utf-8", help="of text files (%(default)s)")
    batch.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: on the cluster $RAY_ADDRESS")

    kept = command("feedback", manage_feedback, "what users say of the answers; the shadow bundle; export or delete")
    kept.add_argument("--store", required=True, help="a file, or postgresql://…")
    kept.add_argument("--judged", action="store_true", help="how often users say that answers and alerts are right")
    kept.add_argument("--export", metavar="USER", help="as CSV, on standard output")
    kept.add_argument("--delete", metavar="USER")
    kept.add_argument("--older-than", type=number(float), metavar="DAYS", help="delete older answers and what was said")
    kept.add_argument("--shadow", action="store_true", help="whether the shadow bundle is better, on audited answers")
    again = command("iterate", iterate, "train on reviewed feedback; promote the new bundle if it is better", profile)
    again.add_argument("--store", required=True, help="a file, or postgresql://…")
    again.add_argument("--registry", default=served, help="where the served bundle is (%(default)s)")

    watch = command("monitor", monitor_stream, "watch a stream of documents; warn when negative ones surge", journal)
    what = "the address of a feed, a file or folder that grows, or - for standard input; repeatable"
    watch.add_argument("--source", action="append", required=True, help=what)
    what = "console (default), wandb, the address of a webhook, a file.jsonl, or a feedback store, where people say "
    what += "which alerts were real (sqlite:///FILE or postgresql://…); repeatable"
    watch.add_argument("--alert", action="append", help=what)
    models = paths.REPORTS / "cpu" / "work" / "14_news_monitoring" / "models"
    watch.add_argument("--models", default=models, help="the models that 14_news_monitoring saved (%(default)s)")
    what = "a topic of your own, by name or 'name: example; example', in place of the models'; repeatable"
    watch.add_argument("--topic", action="append", default=[], type=text, help=what)
    watch.add_argument("--precision", choices=("auto", "fp32", "bf16", "int8"), default="auto", help="int8: faster")
    what = "a month, of all that is watched together: the test of a shift from a key's own past (%(default)s)"
    watch.add_argument("--false-alarms", type=number(float), default=1.0, metavar="N", help=what)
    what = "test instead for a surge of negatives among texts like the models', one false alarm in N documents of a key"
    watch.add_argument("--every", type=number(float), default=0, metavar="N", help=what)
    watch.add_argument("--once", action="store_true", help="end as soon as nothing new comes")
    watch.add_argument("--lateness", type=number(float), default=3600.0, help="seconds that a document may come late")
    watch.add_argument("--keep", type=number(int, 1), default=100_000, metavar="N", help="documents whose text is kept")
    watch.add_argument("--pause", type=number(float), default=5.0, help="seconds to wait when nothing came")
    proposed = command("topics", propose_topics, "find topics in a stream, as options for monitor to change and use")
    proposed.add_argument("source", help="a file of JSON lines, or a folder, as for monitor")
    proposed.add_argument("--number", type=number(int, 2), default=8, help="of topics (%(default)s)")
    alerts = command("alerts", judge_alerts, "list and judge the monitor's alerts; export texts behind them", journal)
    for option in ("acknowledge", "right", "wrong"):
        alerts.add_argument(f"--{option}", metavar="ID", action="append", default=[], type=text)
    alerts.add_argument("--store", default="", help="a feedback store that gets all of the journal's verdicts, too")
    alerts.add_argument("--export", default="", metavar="FILE.csv", help="texts behind judged alerts, for training")


def text(typed: str) -> str:
    """Reads an option that is a text: in a terminal of another encoding it may hold bytes that are none."""
    try:
        typed.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{typed!a} is not UTF-8") from None
    return typed


def number(kind: type, least: float = 0) -> Callable[[str], float]:
    """Reads an option that is a finite number of a kind and of at least `least`."""

    def read(text: str) -> float:
        if least <= kind(text) < math.inf:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least {least}")

    return read


def answer_question(options: argparse.Namespace) -> int:
    from llmprod import machine
    from llmprod.customer_service.assistant import Assistant, Dialogue

    if options.dialogue == bool(options.question):
        raise LLMProdError("Give one question, or --dialogue and turns on standard input.")
    machine.set_threads()
    machine.quiet()
    dialogue = Dialogue(Assistant.load(Path(options.bundle)))
    for line in sys.stdin if options.dialogue else [options.question]:
        if options.dialogue and not line.strip():
            dialogue.reopen()
            continue
        said = dialogue.turn([line])
        print(f"[{said.action}] {said.text}".rstrip(), flush=True)
        if said.action == "hand over":
            print(f"  for the agent: {json.dumps(said.summary(), ensure_ascii=False)}", file=sys.stderr, flush=True)
    return 0


def serve(options: argparse.Namespace) -> int:
    from llmprod.deploy import guard, service

    limits = guard.Limits(rate=options.rate / max(1, options.replicas))  # with the key of this process
    if not options.replicas:
        service.run(application(options, limits), options.host, options.port)
        return 0
    from llmprod.deploy import replicas

    if options.page:
        raise LLMProdError("--page needs one process, which knows its visitors: leave out --replicas, or the page.")
    replicas.run(functools.partial(application, options, limits), options.host, options.port, options.replicas)
    return 0


def application(options: argparse.Namespace, limits: object) -> object:
    """The service that the options of `serve` describe, a FastAPI application; `limits` is a `guard.Limits`."""
    from llmprod import machine
    from llmprod.deploy import bundle, registry, service

    machine.set_threads()
    machine.quiet()
    folder = Path(options.bundle)
    source = registry.Registry(folder) if os.path.exists(folder / registry.STATE) else bundle.load(folder)
    store = opened_store(options.store) if options.store else None
    more = {}
    if options.assistant:
        from llmprod.customer_service.assistant import answering

        more["answer"] = answering(Path(options.assistant))
    if options.recommender:
        from llmprod.recommendation.served import Recommender

        more["recommend"] = Recommender.load(Path(options.recommender)).recommend
    app = service.build(source, store, limits, **more)
    if options.page:
        from llmprod.deploy import page

        app = page.mount(app)
    return app


def score_corpus(options: argparse.Namespace) -> int:
    from llmprod import machine
    from llmprod.deploy import score

    machine.set_threads()
    machine.quiet()
    engine = contextlib.nullcontext()
    if options.engine == "ray":
        from llmprod import cluster

        engine = cluster.tasks(score.one)
    given = (Path(options.corpus), Path(options.folder), Path(options.bundle), options.text_column, options.encoding)
    with engine as elsewhere:
        found = score.run(*given, elsewhere)
    print(", ".join(f"{name}: {number:,}" for name, number in found.items()))
    return 0


def manage_feedback(options: argparse.Namespace) -> int:
    from llmprod.feedback import review
    from llmprod.harness import report, results

    with opened_store(options.store) as store:
        if options.shadow:
            found = review.shadow_test(store)
            mean, low, high = 100 * found[["mean", "low", "high"]].iloc[-1]
            print(f"shadow less served, {len(found)} audited answers: {mean:+.1f} points ({low:+.1f} to {high:+.1f})")
        if options.judged:
            found = review.judged(store)
            shares = found[["right", "95 % from", "to"]].map("{:.1%}".format).where(found["judged"] > 0, "")
            print("no answers yet" if found.empty else results.markdown(found.assign(**shares)))
        if options.export:
            report.spreadsheet(store.export_user(options.export)).to_csv(sys.stdout, index=False)
        if options.delete:
            print(f"{store.delete_user(options.delete)} answers of {options.delete} deleted")
        if options.older_than is not None:
            print(f"{store.delete_before(time.time() - 86400 * options.older_than)} old answers deleted")
    return 0


def iterate(options: argparse.Namespace) -> int:
    from llmprod import data, machine
    from llmprod.deploy.registry import Registry
    from llmprod.feedback import promotion
    from llmprod.harness import runner

    machine.set_threads()
    machine.quiet()
    work = runner.folder_for(options.profile, {}) / "work"
    splits, labels, _ = data.prepared(work / "01_data" / "splits")
    old = {"text": list(splits["test"]["text"]), "label": [labels[k] for k in splits["test"]["label"]]}
    with opened_store(options.store) as store:
        weights = work / "02_finetune" / "checkpoint"
        decision = promotion.iterate(Registry(Path(options.registry)), store, splits, regression=old, weights=weights)
    print(f"{'promoted' if decision.promoted else 'not promoted'}: {decision.candidate}, from {decision.parent}")
    print("\n".join(f"- {reason}" for reason in decision.reasons))
    return int(not decision.promoted)


def opened_store(place: str) -> object:
    from llmprod.customer_service.privacy import mask
    from llmprod.feedback.store import Store, sql

    if "://" not in place:
        path = Path(os.path.abspath(os.path.expanduser(place)))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LLMProdError(f"--store {place}: its folder can't be made ({error.strerror}).") from error
        place = sql.URL.create("sqlite", database=str(path))
    return Store(place, mask)


def monitor_stream(options: argparse.Namespace) -> int:
    from llmprod import machine
    from llmprod.news_monitoring import channels, monitor, shift, sources, topics
    from llmprod.news_monitoring.journal import Journal
    from llmprod.news_monitoring.scorer import Scorer

    machine.set_threads()
    machine.quiet()
    followed = [sources.open_source(word) for word in options.source]
    told = [channels.open_channel(word, opened_store) for word in options.alert or ["console"]]
    chosen = topics.parse(options.topic)
    scorer = Scorer(Path(options.models), options.precision, options.every, topics.Topics(chosen) if chosen else None)
    detector = scorer.config.detector if options.every else shift.allowing(options.false_alarms)
    with Journal(options.journal) as journal:
        watching = monitor.Monitor(scorer, journal, detector, told, options.lateness, keep=options.keep)
        counts = monitor.run(watching, followed, options.once, options.pause)
    print(", ".join(f"{counts[name]} {name}" for name in ("documents", "repeats", "alerts")))
    return 0


def propose_topics(options: argparse.Namespace) -> int:
    from llmprod import machine
    from llmprod.news_monitoring import sources, topics

    machine.quiet()
    source, cursor, texts = sources.Tail(options.source), {}, []
    while documents := (read := source.poll(cursor, last=True))[0]:
        texts, cursor = [*texts, *(document.text for document in documents)], read[1]
    if not texts:
        raise LLMProdError(read[1].get("error") or f"{options.source}: no file or folder with documents is there.")
    for line in topics.typed(topics.find(texts, options.number)):
        print("--topic", shlex.quote(line))
    return 0


def judge_alerts(options: argparse.Namespace) -> int:
    from llmprod.harness import report, results
    from llmprod.news_monitoring import monitor
    from llmprod.news_monitoring.journal import Journal

    with Journal(options.journal, shared=True) as journal:
        for alert in options.acknowledge:
            journal.acknowledge(alert)
        for right, names in ((True, options.right), (False, options.wrong)):
            for alert in names:
                journal.acknowledge(alert, right)
        if options.export:
            try:
                report.spreadsheet(monitor.judged(journal)).to_csv(options.export, index=False)
            except OSError as error:
                raise LLMProdError(
                    f"--export {options.export}: it can't be written ({error.strerror or error})."
                ) from error
        found = journal.alerts()
    if options.store:
        keep_verdicts(found.to_dict("records"), options.store)
    found = found.reindex(columns=["id", "key", "said", "count", "acknowledged", "right"]).astype(object).fillna("")
    print("no alerts yet" if found.empty else results.markdown(found))
    return 0


def keep_verdicts(alerts: list[dict], place: str) -> None:
    """Puts the judged events of a journal into a feedback store, with the verdict as that of a user `monitor`."""
    from llmprod.news_monitoring import channels

    with opened_store(place) as store:
        channel = channels.FeedbackStore(store)
        for alert in alerts:
            if alert["right"] is not None and alert.get("event") == alert["id"]:  # further keys are not judged there
                channel.send(alert)
                store.add_feedback(alert["id"], "monitor", "up" if alert["right"] else "down")
