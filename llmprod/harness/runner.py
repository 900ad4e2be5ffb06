"""Running notebooks: up-to-date check, papermill, provenance stamp, reference runs over seeds."""

import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from llmprod import LLMProdError, files, machine, paths
from llmprod.harness import examples, pipeline, reference, results
from llmprod.harness.fingerprints import fingerprint
from llmprod.harness.pipeline import declared, settings, source_hash, with_upstream

# what a web page of a run may load: its own styles and figures, nothing from elsewhere, no script
POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; font-src data:; base-uri 'none'; "
    "form-action 'none'"
)


def is_up_to_date(notebook: str, injected: Mapping[str, dict], folder: Path) -> bool:
    """Whether a folder holds this notebook's results, and nothing that they depend on has changed since."""
    stamp = results.stamp_of(folder, notebook)
    return bool(stamp) and stamp.get("fingerprint") == fingerprint(notebook, injected)


def run(notebooks: list[str], profile_name: str, parameters: Mapping[str, object], folder: Path) -> bool:
    """Runs notebooks in order, except those that are up to date. Returns whether any ran.

    Raises LLMProdError while another process runs notebooks in the folder.
    """
    injected, ran = settings(profile_name, parameters), False
    (folder / "work").mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "work" / ".lock", timeout=0):  # free again when the process ends, however that happens
            for number, notebook in enumerate(notebooks, 1):
                label = f"[{number}/{len(notebooks)}] {notebook}"
                if is_up_to_date(notebook, injected, folder):
                    print(f"{label}: nothing has changed", flush=True)
                else:
                    execute(notebook, injected, folder, label)
                    ran = True
    except Timeout:
        raise LLMProdError(f"Another process is running notebooks in {shown(folder)}: wait until it ends.") from None
    return ran


def execute(notebook: str, injected: Mapping[str, dict], folder: Path, label: str) -> None:
    """Runs one notebook with papermill, and stamps the executed copy and its results with their provenance.

    Raises LLMProdError if a cell fails; the executed copy with its traceback stays in the folder.
    """
    import papermill
    from ipykernel.kernelspec import write_kernel_spec
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    target, stamp = folder / f"{notebook}.ipynb", fingerprint(notebook, injected)
    done, result = folder / "work" / notebook / "done.json", folder / "results" / f"{notebook}.json"
    # so that no verdict is given on the results of an earlier state
    for outdated in (done, result, examples.of_run(folder, notebook)):
        outdated.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="llmprod-") as place,
            environment(
                LLMPROD_RUN=str(folder), JUPYTER_PATH=f"{place}{os.pathsep}{os.environ.get('JUPYTER_PATH', '')}"
            ),
        ):
            write_kernel_spec(f"{place}/kernels/python3")  # starts this interpreter, whatever has that name elsewhere
            ipc = {"transport": "ipc", "ip": f"{place}/socket"}
            papermill.execute_notebook(
                paths.NOTEBOOKS / f"{notebook}.ipynb",
                target,
                injected[notebook],
                kernel_name="python3",
                progress_bar={"desc": label},
                start_timeout=120,
                execution_timeout=pipeline.pipeline()[notebook]["timeout"],
                cwd=os.getcwd(),
                config=Config({"KernelManager": ipc} if os.name == "posix" else {}),
            )
    except (PapermillExecutionError, TimeoutError, RuntimeError) as error:
        tidy(target)
        if isinstance(error, PapermillExecutionError):
            what = f" in cell {error.cell_index}: {plain_text(error.ename)}: {plain_text(error.evalue)}"
        else:  # a cell ran too long, or the kernel died
            what = f": {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise LLMProdError(
            f"{notebook} stopped{what}\nThe executed copy is {shown(target)}; the next run resumes with this notebook."
        ) from None
    recorded = files.read_json(result)
    asked = (declared(notebook) | injected[notebook]).get("precision", "auto")
    device, precision, reason = machine.device_and_precision(asked)
    provenance = {
        "source": source_hash(notebook),
        "parameters": injected[notebook],
        "commit": machine.git_commit(),
        "versions": machine.versions(machine.SHOWN),
        "machine": machine.describe(),
        "device": f"{device.type}, {precision}: {reason}",
        "minutes": round((time.time() - started) / 60, 2),
        "peak memory, MB": recorded["speeds"]["peak memory, MB"],
    }
    tidy(target, provenance)
    files.write_json(result, recorded | {"provenance": provenance})
    to_html(target)
    files.write_json(done, {"fingerprint": stamp, "seal": results.seal(folder, notebook)})


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
    """Removes what an executed notebook should not carry, and adds the provenance.

    That is this machine's paths and clock times, and whatever in outputs could run, or load something from elsewhere,
    when the notebook is opened: a label or a text of the data may be HTML.
    """
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    for name in ("papermill", "widgets"):
        notebook.metadata.pop(name, None)
    notebook.metadata["llmprod"] = provenance or {}
    for cell in notebook.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            cell.outputs = harmless(cell.outputs)
    nbformat.write(notebook, path)


def harmless(outputs: list[dict]) -> list[dict]:
    """A cell's outputs without scripts, style sheets, widgets, and images from elsewhere."""
    from nbconvert.preprocessors.sanitize import SanitizeHTML

    def allowed(_: str, name: str, value: str) -> bool:
        if name == "style":
            return not re.search(r"url|[\\@]", value, re.IGNORECASE)
        return name in ("class", "colspan", "href", "rowspan", "title")

    cleaner = SanitizeHTML(attributes=allowed, strip=True, sanitized_output_types={"text/html"})
    more = ["br", "caption", "div", "h1", "h2", "h3", "p", "pre", "span", "table", "tbody", "td", "th", "thead", "tr"]
    cleaner.tags = [*cleaner.tags, *more]
    cleaner.styles = [*cleaner.styles, "background", "padding"]
    cleaner.safe_output_keys |= {"text/markdown"}  # made safe here: bleach would escape what is Markdown
    for data in (output.data for output in outputs if "data" in output):
        if "text/html" in data:  # bleach takes away the tags alone
            data["text/html"] = re.sub(r"(?is)<(style|script)\b.*?</\1\s*>", "", data["text/html"])
        if "text/markdown" in data:
            text = re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", data["text/markdown"])
            data["text/markdown"] = text.replace("![", "!\\[")
    return cleaner.sanitize_code_outputs(outputs)


def to_html(path: Path) -> None:
    """Writes the web page of an executed notebook next to it; without scripts, so its formulas stay TeX."""
    from nbconvert import HTMLExporter

    page = re.sub(r"(?is)<script\b.*?</script\s*>", "", HTMLExporter().from_filename(str(path))[0])
    policy = f'<head><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    path.with_suffix(".html").write_text(page.replace("<head>", policy, 1), encoding="utf-8")


def plain_text(text: str) -> str:
    """Text without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text or "")


def shown(path: Path) -> str:
    """A path as the user would write it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def ensure(notebook: str) -> Path:
    """For use in a notebook: the work folder of another that it builds on, which runs first if it has not yet."""
    folder = paths.run_folder()
    if not (folder / "results" / f"{notebook}.json").exists():
        print(f"{notebook} has not run in {folder.name} yet; running it first")
        name = folder.name if (paths.PROFILES / f"{folder.name}.yaml").exists() else "cpu"
        run(with_upstream(notebook), name, {}, folder)
    return folder / "work" / notebook


def folder_for(profile_name: str, parameters: Mapping[str, object]) -> Path:
    """The folder of a run: `reports/<profile>`, or one of its own under `runs/` if parameters are set.

    Raises LLMProdError for an unknown profile.
    """
    pipeline.profile(profile_name)
    if not parameters:
        return paths.REPORTS / profile_name
    words = f"{profile_name}-" + "-".join(f"{k}={v}" for k, v in sorted(parameters.items()))
    name = re.sub(r"[^\w=.-]+", "_", words)
    if name == words and len(name) < 80:
        return paths.RUNS / name
    return paths.RUNS / f"{name[:60]}-{hashlib.sha256(words.encode()).hexdigest()[:12]}"  # another text, another folder


def add_to_reference(profile_name: str) -> Path:
    """Adds a profile's finished run, of another machine, to its reference: the noise between machines counts, too.

    Mean and deviation over seeds stay. Raises LLMProdError where the run is of another protocol, or of a seed that the
    reference lacks.
    """
    folder, target = paths.REPORTS / profile_name, paths.REFERENCE / f"{profile_name}.json"
    expected = reference.load(profile_name)
    for name, found in results.results(folder).items():
        theirs, who = expected[name], f"{found['seed']}, {found['provenance']['machine']}"
        if unlike := reference.differences(found["protocol"], theirs["protocol"]):
            raise LLMProdError(f"The run of {name} is of another protocol than the reference: {'; '.join(unlike)}.")
        for name_of, metric in theirs["metrics"].items():
            if str(found["seed"]) not in metric["value"]:
                raise LLMProdError(
                    f"The reference of {name} lacks the run's seed, {found['seed']}: add one of its seeds."
                )
            metric["elsewhere"] = metric.get("elsewhere", {}) | {who: found["metrics"][name_of]["value"]}
            metric |= reference.moments(metric["value"], metric["elsewhere"])
        shelf = examples.of_reference(profile_name, name)
        examples.gather([shelf, examples.of_run(folder, name)], shelf)
    files.write_json(target, files.read_json(target) | {"notebooks": expected})
    return target


def measure_reference(profile_name: str, seeds: list[int], notebook: str = "") -> Path:
    """Runs the pipeline for every seed, as far as it is not up to date, and writes `reports/reference/<profile>.json`.

    Then runs the profile itself, whose notebooks end with their verdict. With `notebook`, only that notebook and those
    that it needs are measured; the numbers of the others stay.
    """
    everything = pipeline.notebooks_of(profile_name)
    notebooks = with_upstream(notebook) if notebook else everything
    folders = {seed: paths.RUNS / "reference" / profile_name / f"seed-{seed}" for seed in seeds}
    for seed, folder in folders.items():
        print(f"seed {seed}", flush=True)
        run(notebooks, profile_name, {"seed": seed}, folder)
        if changed := [name for notebook in notebooks for name in results.edited(folder, notebook)]:
            raise LLMProdError(f"Changed after the run of seed {seed}: {', '.join(changed)}. Delete it and run again.")
    found = {seed: results.results(folder) for seed, folder in folders.items()}
    target = paths.REFERENCE / f"{profile_name}.json"
    summaries = {name: reference.summarise([found[seed][name] for seed in seeds]) for name in notebooks}
    if notebook:
        summaries = reference.load(profile_name) | summaries
    measured = {name: summaries[name] for name in everything if name in summaries}
    for name in notebooks:
        sources = [examples.of_run(folder, name) for folder in folders.values()]
        examples.gather(sources, examples.of_reference(profile_name, name))
    files.write_json(target, {"profile": profile_name, "seeds": seeds, "notebooks": measured})
    run(everything, profile_name, {}, paths.REPORTS / profile_name)
    return target
