"""The command line: `python -m llmprod --help`. The Makefile's targets call it."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from llmprod import DISK_ERRORS, LLMProdError, paths

WAY_OUT = "Free some space or make it writable, or set LLMPROD_HOME to another folder. What was finished is kept."


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(prog="llmprod", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, function: Callable, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=parents)
        sub.set_defaults(function=function)
        return sub

    profile, notebook, journal = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    profile.add_argument("--profile", default="cpu", help="smoke, cpu (default) or gpu")
    notebook.add_argument("--notebook", default="", help="for example 02_finetune; by default all")
    notebook.add_argument("--params", default="", help='for example "epochs=2 seed=1"')
    file = paths.RUNS / "monitor" / "journal.sqlite"
    journal.add_argument("--journal", default=file, help="the monitor's memory (%(default)s)")

    text = "list models and data: size, licence, source, present or not; or fetch those that are named"
    command("artifacts", list_artifacts, text).add_argument("fetch", nargs="*")
    command("run", run, "run one notebook with those that it needs, or all", profile, notebook)
    command("reproduce", lambda o: run(o) or verify(o), "run all, write report, print verdict", profile, notebook)
    command("verify", verify, "print the verdict", profile)
    command("report", write_report, "write the report and the generated blocks of README and docs", profile)
    reference = command("reference", measure_reference, "measure the reference over seeds", profile)
    reference.add_argument("--seeds", type=number(int), nargs="+", default=[0, 1, 2])
    reference.add_argument("--notebook", default="", help="measure only this one and those that it needs")
    study = command("study", run_studies, "run the missing runs of the studies in notebooks/studies.yaml")
    study.add_argument("names", nargs="*", help="by default all")
    study.add_argument("--stale", action="store_true", help="also repeat runs of earlier code")
    study.add_argument("--jobs", type=number(int, 1), default=1, metavar="N", help="runs at a time (default: 1)")
    study.add_argument("--check", type=number(int, 1), metavar="N", help="run N random rows again, and judge them")
    command("pin", pin, "write the commit that Colab installs into the notebooks' first cell")
    command("sync", sync, "upload offline W&B runs")

    answer = command("answer", answer_question, "answer a question, or turns of a dialogue from standard input")
    answer.add_argument("question", nargs="?", default="", help="one question")
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

    kept = command("feedback", manage_feedback, "export or delete what the service keeps; test the shadow bundle")
    kept.add_argument("--store", required=True, help="a file, or postgresql://…")
    kept.add_argument("--export", metavar="USER", help="as CSV, on standard output")
    kept.add_argument("--delete", metavar="USER")
    kept.add_argument("--older-than", type=number(float), metavar="DAYS", help="delete older answers and what was said")
    kept.add_argument("--shadow", action="store_true", help="whether the shadow bundle is better, on audited answers")
    again = command("iterate", iterate, "train on reviewed feedback; promote the new bundle if it is better", profile)
    again.add_argument("--store", required=True, help="a file, or postgresql://…")
    again.add_argument("--registry", default=served, help="where the served bundle is (%(default)s)")

    watch = command("monitor", monitor_stream, "watch a stream of documents; warn when negative ones surge", journal)
    text = "the address of a feed, a file or folder that grows, or - for standard input; repeatable"
    watch.add_argument("--source", action="append", required=True, help=text)
    text = "console (default), wandb, the address of a webhook, or a file.jsonl; repeatable"
    watch.add_argument("--alert", action="append", help=text)
    models = paths.REPORTS / "cpu" / "work" / "14_news_monitoring" / "models"
    watch.add_argument("--models", default=models, help="the models that 14_news_monitoring saved (%(default)s)")
    text = "a topic of your own, by name or 'name: example; example', in place of the models'; repeatable"
    watch.add_argument("--topic", action="append", default=[], help=text)
    watch.add_argument("--precision", choices=("auto", "fp32", "bf16", "int8"), default="auto", help="int8: faster")
    text = "a month, of all that is watched together: the test of a shift from a key's own past (%(default)s)"
    watch.add_argument("--false-alarms", type=number(float), default=1.0, metavar="N", help=text)
    text = "test instead for a surge of negatives among texts like the models', one false alarm in N documents of a key"
    watch.add_argument("--every", type=number(float), default=0, metavar="N", help=text)
    watch.add_argument("--once", action="store_true", help="end as soon as nothing new comes")
    watch.add_argument("--lateness", type=number(float), default=3600.0, help="seconds that a document may come late")
    watch.add_argument("--keep", type=number(int, 1), default=100_000, metavar="N", help="documents whose text is kept")
    watch.add_argument("--pause", type=number(float), default=5.0, help="seconds to wait when nothing came")
    alerts = command("alerts", judge_alerts, "list and judge the monitor's alerts; export texts behind them", journal)
    for option in ("acknowledge", "right", "wrong"):
        alerts.add_argument(f"--{option}", metavar="ID", action="append", default=[])
    alerts.add_argument("--export", default="", metavar="FILE.csv", help="texts behind judged alerts, for training")
    return top


def number(kind: type, least: float = 0) -> Callable[[str], float]:
    """Reads an option that is a finite number of a kind and of at least `least`."""

    def read(text: str) -> float:
        if least <= kind(text) < math.inf:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least {least}")

    return read


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for a failing verdict, 2 for an error that the user can fix."""
    options = parser().parse_args(arguments)
    try:
        return options.function(options)
    except LLMProdError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"{error.strerror}: {error.filename or 'a file'} could not be written. {WAY_OUT}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. What was finished is kept; the next run goes on from there.", file=sys.stderr)
        return 130


def list_artifacts(options: argparse.Namespace) -> int:
    import pandas as pd

    from llmprod import artifacts
    from llmprod.harness import results

    for name in options.fetch:
        print(artifacts.fetch(name))
    if not options.fetch:
        print(results.markdown(pd.DataFrame(artifacts.table()).astype(object).fillna("")))
        print(f"\ncache: {artifacts.cache_folder()}")
    return 0


def chosen(options: argparse.Namespace) -> tuple[list[str], dict[str, object], Path]:
    """The notebooks, the parameters and the folder of the run that the options describe."""
    from llmprod.harness import pipeline, runner

    notebook = getattr(options, "notebook", "")
    notebooks = pipeline.with_upstream(notebook) if notebook else list(pipeline.pipeline())
    parameters = pipeline.parse_parameters(getattr(options, "params", ""), notebooks)
    return notebooks, parameters, runner.folder_for(options.profile, parameters)


def run(options: argparse.Namespace) -> int:
    from llmprod.harness import report, runner

    notebooks, parameters, folder = chosen(options)
    runner.run(notebooks, options.profile, parameters, folder)
    report.build(folder)
    print(f"report: {runner.shown(folder / 'index.html')}")
    return 0


def verify(options: argparse.Namespace) -> int:
    from llmprod.harness import results

    notebooks, parameters, folder = chosen(options)
    table = results.verify(folder, notebooks)
    print(results.markdown(table))
    print("", *results.notes(folder, notebooks), results.tally(table), sep="\n")
    return int(results.fails(table, parameters))


def write_report(options: argparse.Namespace) -> int:
    from llmprod.harness import report, runner

    folder = runner.folder_for(options.profile, {})
    if (folder / "results").exists():
        report.build(folder)
    for name, language in report.GENERATED.items():
        (paths.ROOT / name).write_text(report.update(paths.ROOT / name, language), encoding="utf-8")
    return 0


def measure_reference(options: argparse.Namespace) -> int:
    from llmprod.harness import report, runner

    print(runner.measure_reference(options.profile, options.seeds, options.notebook))
    write_report(options)
    report.keep(options.profile)
    return 0


def run_studies(options: argparse.Namespace) -> int:
    from llmprod.harness import check, study

    if options.check:
        return int(check.show(options.check))
    for name in options.names or study.declared():
        ran = study.run(name, again=options.stale, jobs=options.jobs)
        print(f"{name}: {ran} runs, {len(study.rows(name))} in all, {sum(study.stale(name))} of earlier code (stale)")
    return 0


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
    from llmprod import machine
    from llmprod.deploy import bundle, guard, page, registry, service

    machine.set_threads()
    machine.quiet()
    folder = Path(options.bundle)
    source = registry.Registry(folder) if (folder / registry.STATE).exists() else bundle.load(folder)
    store = opened_store(options.store) if options.store else None
    more = {}
    if options.assistant:
        from llmprod.customer_service.assistant import answering

        more["answer"] = answering(Path(options.assistant))
    if options.recommender:
        from llmprod.recommendation.served import Recommender

        more["recommend"] = Recommender.load(Path(options.recommender)).recommend
    app = service.build(source, store, guard.Limits(rate=options.rate), **more)
    service.run(page.mount(app) if options.page else app, options.host, options.port)
    return 0


def manage_feedback(options: argparse.Namespace) -> int:
    from llmprod.feedback import review
    from llmprod.harness import results

    with opened_store(options.store) as store:
        if options.shadow:
            found = review.shadow_test(store)
            mean, low, high = 100 * found[["mean", "low", "high"]].iloc[-1]
            print(f"shadow less served, {len(found)} audited answers: {mean:+.1f} points ({low:+.1f} to {high:+.1f})")
        if options.export:
            results.spreadsheet(store.export_user(options.export)).to_csv(sys.stdout, index=False)
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
    from llmprod.feedback.store import Store

    if "://" not in place:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        place = f"sqlite:///{Path(place).resolve()}"
    return Store(place, mask)


def monitor_stream(options: argparse.Namespace) -> int:
    from llmprod import machine
    from llmprod.news_monitoring import channels, monitor, shift, sources, topics
    from llmprod.news_monitoring.journal import Journal
    from llmprod.news_monitoring.scorer import Scorer

    machine.set_threads()
    machine.quiet()
    followed = [sources.open_source(word) for word in options.source]
    told = [channels.open_channel(word) for word in options.alert or ["console"]]
    chosen = topics.parse(options.topic)
    scorer = Scorer(Path(options.models), options.precision, options.every, topics.Topics(chosen) if chosen else None)
    detector = scorer.config.detector if options.every else shift.allowing(options.false_alarms)
    with Journal(options.journal) as journal:
        watching = monitor.Monitor(scorer, journal, detector, told, options.lateness, keep=options.keep)
        counts = monitor.run(watching, followed, options.once, options.pause)
    print(", ".join(f"{counts[name]} {name}" for name in ("documents", "repeats", "alerts")))
    return 0


def judge_alerts(options: argparse.Namespace) -> int:
    from llmprod.harness import results
    from llmprod.news_monitoring import monitor
    from llmprod.news_monitoring.journal import Journal

    with Journal(options.journal, shared=True) as journal:
        for alert in options.acknowledge:
            journal.acknowledge(alert)
        for right, names in ((True, options.right), (False, options.wrong)):
            for alert in names:
                journal.acknowledge(alert, right)
        if options.export:
            results.spreadsheet(monitor.judged(journal)).to_csv(options.export, index=False)
        found = journal.alerts()
    found = found.reindex(columns=["id", "key", "said", "count", "acknowledged", "right"]).astype(object).fillna("")
    print("no alerts yet" if found.empty else results.markdown(found))
    return 0


def pin(options: argparse.Namespace) -> int:
    from llmprod.harness import notebooks

    print(f"pinned {notebooks.pin()}")
    return 0


def sync(options: argparse.Namespace) -> int:
    from llmprod.harness import track

    print(f"uploaded {track.sync()} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
