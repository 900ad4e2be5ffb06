"""The command line: `python -m llmprod --help`. The Makefile's targets call it."""

import argparse
import sys

from llmprod import DISK_ERRORS, LLMProdError


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for a verdict that fails, 2 for an error the user can mend."""
    parser = argparse.ArgumentParser(prog="llmprod", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    with_profile = argparse.ArgumentParser(add_help=False)
    with_profile.add_argument("--profile", default="cpu", help="smoke, cpu (default) or gpu")
    command("artifacts", "list models and data: size, licence, source, present or not").add_argument("fetch", nargs="*")
    for name, text in (
        ("run", "run one notebook with what it needs, or all"),
        ("reproduce", "run all notebooks, write the report, print the verdict"),
    ):
        sub = commands.add_parser(name, help=text, description=text, parents=[with_profile])
        sub.add_argument("--notebook", default="", help="for example 02_finetune; all where it is left out")
        sub.add_argument("--params", default="", help='for example "epochs=2 seed=1"')
    commands.add_parser("verify", help="print the verdict", parents=[with_profile])
    commands.add_parser(
        "report", help="write the report and the generated parts of the READMEs", parents=[with_profile]
    )
    reference = commands.add_parser("reference", help="measure the reference over seeds", parents=[with_profile])
    reference.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    reference.add_argument("--notebook", default="", help="measure only this one and what it needs; all others stay")
    command("study", "run what is missing of the studies in notebooks/studies.yaml").add_argument("names", nargs="*")
    journal = argparse.ArgumentParser(add_help=False)
    journal.add_argument("--journal", default="", help="the monitor's memory; runs/monitor/journal.sqlite by default")
    text = "watch a stream of documents and warn when negative ones surge"
    watch = commands.add_parser("monitor", help=text, description=text, parents=[journal])
    watch.add_argument(
        "--source",
        action="append",
        required=True,
        help="a feed's address, a file or folder that grows, or -; repeatable",
    )
    watch.add_argument(
        "--alert", action="append", help="console (default), wandb, a webhook's address, or a file.jsonl (repeatable)"
    )
    watch.add_argument("--models", default="", help="what 14_news_monitoring saved; by default in profile cpu")
    watch.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "int8"), default="auto", help="int8: faster on a processor"
    )
    watch.add_argument(
        "--every", type=float, default=0, metavar="N", help="a false alarm in N documents of a topic or company"
    )
    watch.add_argument("--once", action="store_true", help="end as soon as nothing new comes")
    watch.add_argument("--lateness", type=float, default=3600.0, help="seconds that a document may come late")
    watch.add_argument("--pause", type=float, default=5.0, help="seconds to wait where nothing came")
    text = "list the monitor's alerts; acknowledge and judge them; write the texts behind judged ones"
    alerts = commands.add_parser("alerts", help=text, description=text, parents=[journal])
    for option in ("acknowledge", "right", "wrong"):
        alerts.add_argument(f"--{option}", metavar="ID", action="append", default=[])
    alerts.add_argument("--export", default="", metavar="FILE.csv", help="texts behind judged alerts, for training")
    command("pin", "write the commit that Colab installs into the notebooks' first cell")
    command("sync", "upload offline W&B runs")
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except LLMProdError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(
            f"{error.strerror}: {error.filename or 'a file of the run'} could not be written. Free some space or "
            "make it writable, and run again: what was finished is kept.",
            file=sys.stderr,
        )
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


def run(options: argparse.Namespace) -> int:
    from llmprod.harness import pipeline, report, runner

    parameters = pipeline.parse_parameters(options.params)
    folder = runner.folder_for(options.profile, parameters)
    pipeline.read(options.notebook or "01_data")
    notebooks = pipeline.with_upstream(options.notebook) if options.notebook else list(pipeline.pipeline())
    runner.run(notebooks, options.profile, parameters, folder)
    report.build(folder)
    print(f"report: {runner.shown(folder / 'index.html')}")
    return 0


def reproduce(options: argparse.Namespace) -> int:
    return run(options) or verify(options)


def verify(options: argparse.Namespace) -> int:
    from llmprod.harness import pipeline, results, runner

    folder = runner.folder_for(options.profile, pipeline.parse_parameters(getattr(options, "params", "")))
    table = results.verify(folder)
    print(results.markdown(table))
    print(f"\n{results.tally(table)}")
    return int(table["verdict"].isin([results.DRIFTED, results.MISSING]).any())


def write_report(options: argparse.Namespace) -> int:
    from llmprod import paths
    from llmprod.harness import report, runner

    folder = runner.folder_for(options.profile, {})
    if (folder / "results").exists():
        report.build(folder)
    for name, language in (("README.md", "en"), ("README.zh.md", "zh")):
        (paths.ROOT / name).write_text(report.update_readme(paths.ROOT / name, language), encoding="utf-8")
    return 0


def measure_reference(options: argparse.Namespace) -> int:
    from llmprod.harness import report, runner

    print(runner.measure_reference(options.profile, options.seeds, options.notebook))
    write_report(options)
    report.keep(options.profile)
    return 0


def run_studies(options: argparse.Namespace) -> int:
    from llmprod.harness import study

    for name in options.names or study.declared():
        print(f"{name}: {study.run(name)} runs, {len(study.rows(name))} in all")
    return 0


def monitor_stream(options: argparse.Namespace) -> int:
    from pathlib import Path

    from llmprod import machine
    from llmprod.news_monitoring import channels, monitor, sources
    from llmprod.news_monitoring.journal import Journal

    machine.set_threads()
    machine.quiet()
    followed = [sources.open_source(word) for word in options.source]
    told = [channels.open_channel(word) for word in options.alert or ["console"]]
    folder = Path(options.models) if options.models else monitor.default_models()
    scorer = monitor.Scorer(folder, options.precision, options.every)
    with Journal(monitor.journal_file(options.journal)) as journal:
        watching = monitor.Monitor(scorer, journal, scorer.detector, told, options.lateness)
        counts = monitor.run(watching, followed, options.once, options.pause)
        late = journal.late()
    print(", ".join(f"{counts[name]} {name}" for name in ("documents", "repeats", "alerts")))
    if late:
        print(f"{late} documents of this journal came too late to be watched; a larger --lateness waits for more.")
    return 0


def judge_alerts(options: argparse.Namespace) -> int:
    from llmprod.harness import results
    from llmprod.news_monitoring import monitor
    from llmprod.news_monitoring.journal import Journal

    with Journal(monitor.journal_file(options.journal), shared=True) as journal:
        for alert in options.acknowledge:
            journal.acknowledge(alert)
        for right, names in ((True, options.right), (False, options.wrong)):
            for alert in names:
                journal.judge(alert, right)
        if options.export:
            monitor.judged(journal).to_csv(options.export, index=False)
        found = journal.alerts()
    if found.empty:
        print("no alerts yet")
    else:
        shown = ["id", "key", "severity", "count", "acknowledged", "right"]
        print(results.markdown(found[shown].astype(object).fillna("")))
    return 0


def pin(options: argparse.Namespace) -> int:
    from llmprod.harness import notebooks

    print(f"pinned {notebooks.pin()}")
    return 0


def sync(options: argparse.Namespace) -> int:
    from llmprod.harness import track

    print(f"uploaded {track.sync()} runs")
    return 0


COMMANDS = {
    "artifacts": list_artifacts,
    "run": run,
    "reproduce": reproduce,
    "verify": verify,
    "report": write_report,
    "reference": measure_reference,
    "study": run_studies,
    "monitor": monitor_stream,
    "alerts": judge_alerts,
    "pin": pin,
    "sync": sync,
}

if __name__ == "__main__":
    sys.exit(main())
