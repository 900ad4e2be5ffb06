"""The command line: `python -m llmprod --help`. The Makefile's targets call it."""

import argparse
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from llmprod import DISK_ERRORS, LLMProdError, paths, products
from llmprod.products import number

WAY_OUT = "Free some space or make it writable, or set LLMPROD_HOME to another folder. What was finished is kept."


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(prog="llmprod", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, function: Callable, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=parents)
        sub.set_defaults(function=function)
        return sub

    profile, notebook = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    profile.add_argument("--profile", default="cpu", help="smoke, cpu (default), zh (Chinese) or gpu")
    notebook.add_argument("--notebook", default="", help="for example 02_finetune; by default all")
    notebook.add_argument("--params", default="", help='for example "epochs=2 seed=1"')

    text = "list models and data: size, licence, source, present or not; or fetch those that are named"
    command("artifacts", list_artifacts, text).add_argument("fetch", nargs="*")
    command("run", run, "run one notebook with those that it needs, or all", profile, notebook)
    command("reproduce", lambda o: run(o) or verify(o), "run all, write report, print verdict", profile, notebook)
    text = "say what `reproduce` would run and fetch, and whether disk, memory and GPU do; run and fetch nothing"
    command("plan", show_plan, text, profile, notebook)
    judge = command("verify", verify, "print the verdict on a run, or on somebody else's from its crate", profile)
    judge.add_argument("crate", nargs="?", help="what `crate` packed")
    pack = command("crate", pack_run, "pack a run as an RO-Crate, to be cited and verified", profile, notebook)
    pack.add_argument("file", nargs="?", default="", help="where to (runs/crates/<run>.zip)")
    command("report", write_report, "write the report and the generated blocks of README and docs", profile)
    reference = command("reference", measure_reference, "measure the reference over seeds", profile)
    reference.add_argument("--seeds", type=number(int), nargs="+", default=[0, 1, 2])
    reference.add_argument("--notebook", default="", help="measure only this one and those that it needs")
    text = "measure nothing: add this machine's finished run to the reference of others"
    reference.add_argument("--add", action="store_true", help=text)
    study = command("study", run_studies, "run the missing runs of the studies in notebooks/studies.yaml")
    study.add_argument("names", nargs="*", help="by default all")
    study.add_argument("--stale", action="store_true", help="also repeat runs of earlier code")
    study.add_argument(
        "--jobs", type=number(int, 1), default=1, metavar="N", help="runs at a time on a machine (default: 1)"
    )
    study.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: on the cluster $RAY_ADDRESS")
    study.add_argument("--check", type=number(int, 1), metavar="N", help="run N random rows again, and judge them")
    command("pin", pin, "write the commit that Colab installs into the notebooks' first cell")
    text = (
        "write another address of the repository, as of a fork, into the project file, citation, READMEs and notebooks"
    )
    command("address", move, text).add_argument("url", help="for example https://github.com/you/llmprod")
    command("sync", sync, "upload offline W&B runs")

    products.add(command, profile)
    return top


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
        rows = [
            {
                "name": name,
                "kind": item["kind"],
                "MB": round(sum(f.get("size", 0) for f in item["files"].values()) / 1e6, 1) or None,
                "licence": item["licence"],
                "source": next(item["sources"][0][kind] for kind in artifacts.SOURCES if kind in item["sources"][0]),
                "present": "yes" if artifacts.is_present(name) else "no",
                "citation": item["citation"],
            }
            for name, item in artifacts.registry().items()
        ]
        print(results.markdown(pd.DataFrame(rows).astype(object).fillna("")))
        print(f"\ncache: {artifacts.cache_folder()}")
    return 0


def chosen(options: argparse.Namespace) -> tuple[list[str], dict[str, object], Path]:
    """The notebooks, the parameters and the folder of the run that the options describe."""
    from llmprod.harness import pipeline, runner

    notebook = getattr(options, "notebook", "")
    notebooks = pipeline.with_upstream(notebook) if notebook else pipeline.notebooks_of(options.profile)
    parameters = pipeline.parse_parameters(getattr(options, "params", ""), notebooks)
    return notebooks, parameters, runner.folder_for(options.profile, parameters)


def run(options: argparse.Namespace) -> int:
    from llmprod.harness import pipeline, report, runner

    notebooks, parameters, folder = chosen(options)
    pipeline.get_models(options.profile, parameters)
    runner.run(notebooks, options.profile, parameters, folder)
    report.build(folder)
    print(f"report: {runner.shown(folder / 'index.html')}")
    return 0


def show_plan(options: argparse.Namespace) -> int:
    from llmprod.harness import pipeline, plan, results

    names, parameters, folder = chosen(options)
    injected = pipeline.settings(options.profile, parameters)
    tried = {model: other for (_, model), other in pipeline.replaced(options.profile, parameters).items()}
    table, found = plan.notebooks(names, injected, options.profile, folder), plan.inputs(names, injected, tried)
    has, lacks = plan.machine(options.profile, table, found, folder)
    for part in (table, found.assign(present=found["present"].map({True: "yes", False: "no"})).round({"MB": 1})):
        print(results.markdown(part), end="\n\n")
    print(*has, *(f"LACKS {what}" for what in lacks), sep="\n")
    return int(bool(lacks))


def verify(options: argparse.Namespace) -> int:
    from llmprod.harness import crate, pipeline, results

    if not getattr(options, "crate", None):
        notebooks, parameters, folder = chosen(options)
        replaced = {name: other for (name, _), other in pipeline.replaced(options.profile, parameters).items()}
        return judged(folder, notebooks, replaced | parameters)
    with crate.opened(Path(options.crate)) as folder:
        found = results.results(folder)
        set_there = {name: value for one in found.values() for name, value in one["provenance"]["parameters"].items()}
        return judged(folder, list(found), set_there)


def judged(folder: Path, notebooks: list[str], parameters: Mapping[str, object]) -> int:
    from llmprod.harness import results

    table = results.verify(folder, notebooks)
    print(results.markdown(table))
    print("", *results.notes(folder, notebooks), results.tally(table), sep="\n")
    return int(results.fails(table, parameters))


def pack_run(options: argparse.Namespace) -> int:
    from llmprod.harness import crate

    _, _, folder = chosen(options)
    print(crate.pack(folder, Path(options.file or paths.RUNS / "crates" / f"{folder.name}.zip")))
    return 0


def write_report(options: argparse.Namespace) -> int:
    from llmprod.harness import report, runner

    folder = runner.folder_for(options.profile, {})
    if (folder / "results").exists():
        report.build(folder)
    report.generate()
    return 0


def measure_reference(options: argparse.Namespace) -> int:
    from llmprod.harness import report, runner

    if options.add:  # of notebooks that ran here; the executed copies that are kept stay
        print(runner.add_to_reference(options.profile))
        return write_report(options)
    print(runner.measure_reference(options.profile, options.seeds, options.notebook))
    write_report(options)
    report.keep(options.profile)
    return 0


def run_studies(options: argparse.Namespace) -> int:
    from llmprod.harness import check, study

    if options.check:
        return int(check.show(options.check))
    with engine(options) as workers:
        for name in options.names or study.declared():
            ran, old = study.run(name, options.stale, options.jobs, workers), sum(study.stale(name))
            print(f"{name}: {ran} runs, {len(study.rows(name))} in all, {old} of earlier code (stale)")
    return 0


def engine(options: argparse.Namespace) -> AbstractContextManager:
    """Where `study.run` measures: what it takes as `cluster`."""
    if options.engine == "local":
        return nullcontext()
    from llmprod.harness import fanout

    return fanout.workers(options.jobs)


def pin(options: argparse.Namespace) -> int:
    from llmprod.harness import notebooks

    print(f"pinned {notebooks.pin()}")
    return 0


def move(options: argparse.Namespace) -> int:
    from llmprod.harness import notebooks, report

    url, commit = notebooks.move(options.url), notebooks.pin()
    report.generate()
    print(f"{url}, at {commit}. Commit, then `make pin`, commit again and push: Colab installs that commit.")
    return 0


def sync(options: argparse.Namespace) -> int:
    from llmprod.harness import track

    print(f"uploaded {track.sync()} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
