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

    from llmprod import artifacts, report

    for name in options.fetch:
        print(artifacts.fetch(name))
    if not options.fetch:
        print(report.markdown(pd.DataFrame(artifacts.table()).astype(object).fillna("")))
        print(f"\ncache: {artifacts.cache_folder()}")
    return 0


def run(options: argparse.Namespace) -> int:
    from llmprod import report, runner

    parameters = runner.parse_parameters(options.params)
    folder = runner.folder_for(options.profile, parameters)
    runner.read(options.notebook or "01_data")
    notebooks = runner.with_upstream(options.notebook) if options.notebook else list(report.pipeline())
    runner.run(notebooks, options.profile, parameters, folder)
    report.build(folder)
    print(f"report: {runner.shown(folder / 'index.html')}")
    return 0


def reproduce(options: argparse.Namespace) -> int:
    return run(options) or verify(options)


def verify(options: argparse.Namespace) -> int:
    from llmprod import report, runner

    folder = runner.folder_for(options.profile, runner.parse_parameters(getattr(options, "params", "")))
    table = report.verify(folder)
    print(report.markdown(table))
    print(f"\n{report.tally(table)}")
    return int(table["verdict"].isin([report.DRIFTED, report.MISSING]).any())


def write_report(options: argparse.Namespace) -> int:
    from llmprod import paths, report, runner

    folder = runner.folder_for(options.profile, {})
    if (folder / "results").exists():
        report.build(folder)
    for name, language in (("README.md", "en"), ("README.zh.md", "zh")):
        (paths.ROOT / name).write_text(report.update_readme(paths.ROOT / name, language), encoding="utf-8")
    return 0


def measure_reference(options: argparse.Namespace) -> int:
    from llmprod import runner

    print(runner.measure_reference(options.profile, options.seeds, options.notebook))
    return write_report(options)


def run_studies(options: argparse.Namespace) -> int:
    from llmprod import experiments, study

    for name in options.names or study.declared():
        print(f"{name}: {study.run(name, experiments.EXPERIMENTS)} runs, {len(study.rows(name))} in all")
    return 0


def pin(options: argparse.Namespace) -> int:
    from llmprod import notebooks

    print(f"pinned {notebooks.pin()}")
    return 0


def sync(options: argparse.Namespace) -> int:
    from llmprod import track

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
    "pin": pin,
    "sync": sync,
}

if __name__ == "__main__":
    sys.exit(main())
