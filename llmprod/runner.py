"""Runs the notebooks headless: profiles, what is fresh, papermill, the provenance stamp, reference runs over seeds."""

import ast
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import nbformat
import yaml

from llmprod import LLMProdError, artifacts, models, paths, report, track


class RunError(LLMProdError):
    """A notebook can't be run, or stopped."""


# Parameters


@cache
def declared(notebook: str) -> dict[str, object]:
    """The parameters of a notebook and their defaults (its profile `cpu`)."""
    cells = [c for c in read(notebook).cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise RunError(f"{notebook}.ipynb needs exactly one cell with the tag 'parameters' and has {len(cells)}.")
    statements = ast.parse(cells[0].source).body
    return {s.targets[0].id: ast.literal_eval(s.value) for s in statements if isinstance(s, ast.Assign)}


def read(notebook: str) -> nbformat.NotebookNode:
    """A notebook's file. Raises RunError, with the names there are, where there is none."""
    path = paths.NOTEBOOKS / f"{notebook}.ipynb"
    if not path.is_file():
        raise RunError(f"There is no notebook '{notebook}'; there are: {', '.join(report.pipeline())}.")
    return nbformat.read(path, as_version=4)


def profile(name: str) -> dict[str, dict]:
    """What a profile overrides, by notebook. Raises RunError for an unknown profile or parameter."""
    path = paths.PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in paths.PROFILES.glob("*.yaml")))
        raise RunError(f"There is no profile '{name}'; there are: {known}.")
    overrides = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    for notebook, values in overrides.items():
        unknown = sorted(set(values) - set(declared(notebook)))
        if unknown:
            raise RunError(f"{path.name}: {notebook} has no parameter {', '.join(unknown)}.")
    return overrides


def parse_parameters(text: str) -> dict[str, object]:
    """`"epochs=2 seed=1"` as a dict; values are read as YAML, so that numbers are numbers."""
    parsed = {}
    for word in shlex.split(text):
        name, equals, value = word.partition("=")
        if not equals:
            raise RunError(f"PARAMS holds '{word}'; write name=value, for example PARAMS=\"epochs=2 seed=1\".")
        parsed[name] = yaml.safe_load(value)
    known = set().union(*(declared(notebook) for notebook in report.pipeline()))
    unknown = sorted(set(parsed) - known)
    if unknown:
        raise RunError(f"No notebook has the parameter {', '.join(unknown)}; there are: {', '.join(sorted(known))}.")
    return parsed


# What is fresh


def code_of(notebook: nbformat.NotebookNode) -> list[str]:
    """The code cells of a notebook, without the parameters that a run injected and without the set-up cell."""
    skipped = {"injected-parameters", "setup"}
    return [c.source for c in notebook.cells if c.cell_type == "code" and not skipped & set(c.metadata.get("tags", []))]


def modules_of(source: str) -> set[str]:
    """The llmprod modules that a piece of code imports, and those that they import."""
    found, waiting = set(), [source]
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop())):
            if isinstance(node, ast.ImportFrom) and node.module == "llmprod":
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmprod."):
                names = {node.module.split(".")[1]}
            else:
                continue
            for name in names - found:
                path = paths.PACKAGE / f"{name}.py"
                if path.is_file():
                    found.add(name)
                    waiting.append(path.read_text(encoding="utf-8"))
    return found


def source_hash(notebook: str) -> str:
    """A fingerprint of a notebook's code."""
    return hashlib.sha256("\n".join(code_of(read(notebook))).encode()).hexdigest()[:12]


def settings(profile_name: str, parameters: Mapping[str, object]) -> dict[str, dict]:
    """What is injected into each notebook: its profile's overrides, then those parameters that it declares."""
    overrides = profile(profile_name)
    return {
        notebook: overrides.get(notebook, {}) | {k: v for k, v in parameters.items() if k in declared(notebook)}
        for notebook in report.pipeline()
    }


def fingerprint(notebook: str, injected: Mapping[str, dict]) -> str:
    """Everything a notebook's results depend on: code, parameters, modules, artifacts and files, versions, upstream."""
    values = declared(notebook) | injected[notebook]
    code = "\n".join(line for cell in code_of(read(notebook)) for line in cell.splitlines() if not line.startswith("%"))
    parts = {
        "source": source_hash(notebook),
        "parameters": values,
        "modules": {m: (paths.PACKAGE / f"{m}.py").read_text(encoding="utf-8") for m in sorted(modules_of(code))},
        "inputs": {k: artifacts.checksum(v) for k, v in values.items() if isinstance(v, str) and is_input(v)},
        "versions": track.versions(track.SHOWN),
        "upstream": {name: fingerprint(name, injected) for name in report.pipeline()[notebook]["needs"]},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def is_input(value: str) -> bool:
    """Whether a parameter's value names an artifact or an existing file or folder."""
    return value in artifacts.registry() or (bool(value) and Path(value).expanduser().exists())


def is_fresh(notebook: str, injected: Mapping[str, dict], folder: Path) -> bool:
    """Whether a folder holds this notebook's results for exactly what they depend on today."""
    stamp = folder / "work" / notebook / "done.json"
    if not stamp.exists() or not (folder / "results" / f"{notebook}.json").exists():
        return False
    return report.read_json(stamp)["fingerprint"] == fingerprint(notebook, injected)


# Running


def run(notebooks: list[str], profile_name: str, parameters: Mapping[str, object], folder: Path) -> bool:
    """Runs notebooks in order, those left out that are fresh. Returns whether any ran."""
    injected, ran = settings(profile_name, parameters), False
    for number, notebook in enumerate(notebooks, 1):
        label = f"[{number}/{len(notebooks)}] {notebook}"
        if is_fresh(notebook, injected, folder):
            print(f"{label}: nothing has changed", flush=True)
        else:
            execute(notebook, injected, folder, label)
            ran = True
    return ran


def execute(notebook: str, injected: Mapping[str, dict], folder: Path, label: str) -> None:
    """Runs one notebook with papermill, and stamps the executed copy and its results with their provenance.

    Raises RunError where a cell fails; the executed copy with its traceback stays in the folder.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    target, stamp = folder / f"{notebook}.ipynb", fingerprint(notebook, injected)
    done, result = folder / "work" / notebook / "done.json", folder / "results" / f"{notebook}.json"
    for outdated in (done, result):  # so that no verdict is given on the results of an earlier state
        outdated.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    try:
        with environment(LLMPROD_RUN=str(folder)), tempfile.TemporaryDirectory(prefix="llmprod-") as sockets:
            ipc = {"transport": "ipc", "ip": f"{sockets}/kernel"}
            papermill.execute_notebook(
                paths.NOTEBOOKS / f"{notebook}.ipynb",
                target,
                injected[notebook],
                kernel_name="python3",
                progress_bar={"desc": label},
                start_timeout=120,
                execution_timeout=report.pipeline()[notebook]["timeout"],
                cwd=os.getcwd(),
                config=Config({"KernelManager": ipc} if os.name == "posix" else {}),
            )
    except PapermillExecutionError as error:
        tidy(target)
        raise RunError(
            f"{notebook} stopped in cell {error.cell_index}: {plain_text(error.ename)}: {plain_text(error.evalue)}\n"
            f"The executed copy is {shown(target)}; the next run resumes with this notebook."
        ) from None
    except (TimeoutError, RuntimeError) as error:  # a cell ran too long, or the kernel died
        tidy(target)
        raise RunError(
            f"{notebook} stopped: {type(error).__name__}: {str(error).strip().splitlines()[0]}\n"
            f"The executed copy is {shown(target)}; the next run resumes with this notebook."
        ) from None
    recorded = report.read_json(result)
    asked = (declared(notebook) | injected[notebook]).get("precision", "auto")
    device, precision, reason = models.device_and_precision(asked)
    provenance = {
        "source": source_hash(notebook),
        "parameters": injected[notebook],
        "commit": track.git_commit(),
        "versions": track.versions(track.SHOWN),
        "machine": track.machine(),
        "device": f"{device.type}, {precision}: {reason}",
        "minutes": round((time.time() - started) / 60, 2),
        "peak memory, MB": recorded["speeds"]["peak memory, MB"],
    }
    tidy(target, provenance)
    report.write_json(result, recorded | {"provenance": provenance})
    to_html(target)
    report.write_json(done, {"fingerprint": stamp})


@contextlib.contextmanager
def environment(**variables: str):
    """Sets environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def tidy(path: Path, provenance: Mapping[str, object] | None = None) -> None:
    """Takes this machine's paths and the clock times out of an executed notebook, and puts the provenance in."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    notebook.metadata["llmprod"] = provenance or {}
    for cell in notebook.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
    nbformat.write(notebook, path)


def to_html(path: Path) -> None:
    """Writes the web page of an executed notebook beside it."""
    from nbconvert import HTMLExporter

    path.with_suffix(".html").write_text(HTMLExporter().from_filename(str(path))[0], encoding="utf-8")


def plain_text(text: str) -> str:
    """Text without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text or "")


def shown(path: Path) -> str:
    """A path as the user would write it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def with_upstream(notebook: str) -> list[str]:
    """A notebook after all those that it needs."""
    needed = [name for upstream in report.pipeline()[notebook]["needs"] for name in with_upstream(upstream)]
    return [*dict.fromkeys(needed), notebook]


def ensure(notebook: str) -> Path:
    """For a notebook's use: the work folder of one it builds on, which is run first where it was not yet."""
    folder = paths.run_folder()
    if not (folder / "results" / f"{notebook}.json").exists():
        print(f"{notebook} has not run in {folder.name} yet; running it first")
        run(
            with_upstream(notebook),
            folder.name if (paths.PROFILES / f"{folder.name}.yaml").exists() else "cpu",
            {},
            folder,
        )
    return folder / "work" / notebook


def folder_for(profile_name: str, parameters: Mapping[str, object]) -> Path:
    """Where a run goes: `reports/<profile>`, or a folder of its own under `runs/` where parameters are set."""
    if not parameters:
        return paths.REPORTS / profile_name
    words = "-".join(f"{k}={v}" for k, v in sorted(parameters.items()))
    name = re.sub(r"[^\w=.-]+", "_", f"{profile_name}-{words}")
    digest = hashlib.sha256(words.encode()).hexdigest()[:6]
    return paths.RUNS / (name if len(name) < 80 else f"{name[:70]}-{digest}")


def measure_reference(profile_name: str, seeds: list[int], notebook: str = "") -> Path:
    """Runs the pipeline for every seed (those done are skipped), and writes `reports/reference/<profile>.json`.

    Then runs the profile itself and keeps its executed notebooks and figures beside the file, to be read; they end
    with their verdict. With `notebook` only that one and what it needs are measured, and the others' numbers stay.
    """
    everything = list(report.pipeline())
    notebooks = with_upstream(notebook) if notebook else everything
    folders = {seed: paths.RUNS / "reference" / profile_name / f"seed-{seed}" for seed in seeds}
    for seed, folder in folders.items():
        print(f"seed {seed}", flush=True)
        run(notebooks, profile_name, {"seed": seed}, folder)
    found = {seed: report.results(folder) for seed, folder in folders.items()}
    target = paths.REFERENCE / f"{profile_name}.json"
    summaries = {name: report.summarise([found[seed][name] for seed in seeds]) for name in notebooks}
    if notebook:
        summaries = report.reference(profile_name) | summaries
    measured = {name: summaries[name] for name in everything if name in summaries}
    report.write_json(target, {"profile": profile_name, "seeds": seeds, "notebooks": measured})
    shown, shelf = paths.REPORTS / profile_name, paths.REFERENCE / profile_name
    run(everything, profile_name, {}, shown)
    report.build(shown)
    shutil.rmtree(shelf, ignore_errors=True)
    shutil.copytree(shown / "figures", shelf / "figures")
    for name in (*(f"{name}.ipynb" for name in everything), "README.md"):
        shutil.copyfile(shown / name, shelf / name)
    return target
