"""The notebooks: clean when committed, running from anywhere, and their executed smoke copies true."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import fields
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import nbformat
import pandas as pd
import pytest

from llmprod import LLMProdError, paths
from llmprod.finetune.recipe import Recipe
from llmprod.harness import notebooks, pipeline, reference

NAMES = list(pipeline.pipeline())
SMOKE = paths.ROOT / "reports" / "smoke"
PRIVATE = re.compile(
    r"/home/\w|/root/|\.venv/|/Users/\w|/tmp/\w|[A-Z]:\\\\|hf_[A-Za-z0-9]{20}|\b[0-9a-f]{40}\b"
)  # a W&B key: 40


def committed(name: str) -> nbformat.NotebookNode:
    return nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4)


def tagged(notebook: nbformat.NotebookNode, tag: str) -> list:
    return [c for c in notebook.cells if tag in c.metadata.get("tags", [])]


def test_every_notebook_is_in_the_pipeline():
    assert sorted(p.stem for p in paths.NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_hygiene(name):
    notebook = committed(name)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert not [c for c in code if c.outputs or c.execution_count], "outputs"
    assert len(tagged(notebook, "parameters")) == 1 and len(tagged(notebook, "setup")) == 1
    assert code[0] == tagged(notebook, "setup")[0] and code[1] == tagged(notebook, "parameters")[0]
    assert notebooks.colab(name) in notebook.cells[0].source
    assert not PRIVATE.search(re.sub(r"@[0-9a-f]{40}", "", json.dumps(notebook))), (
        "a path of someone's machine, or a key"
    )
    source = "\n".join(c.source for c in code)
    assert f'track.start("{name}", globals())' in source and "results.record(" in code[-1].source
    assert "# NBVAL_CHECK_OUTPUT" in source
    assert not re.search(r"\bif .*(smoke|profile)", source), "a notebook must not know its profile"
    prose = [c for c in notebook.cells if c.cell_type == "markdown"]
    assert len(prose) >= len(code) / 2 and notebook.cells[0].source.startswith("# ")


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_plain_and_used(name):
    parameters = pipeline.declared(name)
    assert "seed" in parameters
    rest = "\n".join(pipeline.code_of(committed(name))[1:])
    recipe = {field.name for field in fields(Recipe)} if "Recipe.of(" in rest else set()  # takes them by name
    assert not [p for p in parameters if not re.search(rf"\b{p}\b", rest) and p not in recipe], (
        "declared and never used"
    )


@pytest.mark.parametrize(
    ("name", "inputs"),
    [("11_customer_service", ("questions", "articles", "dialogues")), ("12_financial_sentiment", ("ratings",)),
     ("13_recommendation", ("interactions", "items_file", "facts_file"))],
)  # fmt: skip
def test_a_result_is_of_all_the_files_that_it_was_made_from(name, inputs):
    (code,) = [code for code in pipeline.code_of(committed(name)) if "results.record(" in code]
    checksums = code.partition("checksums=")[2]
    assert [name for name in inputs if not re.search(rf"\b{name}\b", checksums)] == []


@pytest.mark.parametrize("name", NAMES)
def test_first_cell_is_generated_and_its_commit_holds_this_module(name):
    """Colab installs the pinned commit: it must be in the history, with today's committed module."""
    (cell,) = tagged(committed(name), "setup")
    commit = re.search(r"@([0-9a-f]{40})", cell.source)[1]
    assert cell.source == notebooks.setup_cell(name, commit)

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(paths.ROOT), *arguments], capture_output=True, text=True)

    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("no history here to look the commit up in")
    assert git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0, "unknown commit; run make pin"
    changed = git("diff", "--name-only", commit, "HEAD", "--", "llmprod").stdout.split()
    assert not changed, f"the module has changed since ({', '.join(changed)}); run make pin and commit"


@pytest.mark.parametrize(
    ("texts", "labels", "reason"),
    [
        ([f"word{k} and" for k in range(10)], [f"class {k}" for k in range(10)], "fewer than two classes have five"),
        ([f"word{k}" for k in range(12)], ["a", "b"] * 6, "no terms remain"),
    ],
)
def test_01_goes_on_where_label_errors_cannot_be_measured(texts, labels, reason, capsys):
    """Where each class has one training text, and where no two texts share a word."""
    codes = pipeline.code_of(pipeline.read("01_data"))
    names = {"table": pd.DataFrame({"text": texts, "label": labels, "split": "train"}), "seed": 0}
    names |= {"planted_errors": 0.2, "display": lambda table: None}
    for line in next(code for code in codes if "import numpy" in code).splitlines():
        if line.startswith(("import ", "from ")):
            exec(line, names)
    for code in codes:
        if "find_doubtful(" in code:
            exec(code, names)
    said = capsys.readouterr().out
    assert "Label errors can't be measured here" in said and reason in said
    assert "nothing to measure" in said and names["recovery"] == {}


# The executed smoke copies


@pytest.mark.parametrize("name", NAMES)
def test_smoke_copy_is_of_today(name):
    executed = nbformat.read(SMOKE / f"{name}.ipynb", as_version=4)
    assert pipeline.code_of(executed) == pipeline.code_of(committed(name)), "stale; run make smoke and commit"
    injected = tagged(executed, "injected-parameters")
    overrides = pipeline.profile("smoke").get(name, {})
    assert len(injected) == bool(overrides)
    for parameter, value in overrides.items():
        written = json.dumps(value) if isinstance(value, str) else repr(value)
        assert f"{parameter} = {written}" in injected[0].source
    assert executed.metadata["llmprod"]["source"] == pipeline.source_hash(name)
    assert all(c.execution_count for c in executed.cells if c.cell_type == "code")
    errors = [o for c in executed.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    assert not errors


@pytest.mark.parametrize("folder", [SMOKE, paths.REFERENCE / "cpu"], ids=["smoke", "reference"])
def test_committed_copies_tell_nothing_of_their_machine(folder):
    copies = sorted(folder.glob("*.ipynb"))
    wanted = NAMES if folder == SMOKE else reference.load("cpu")
    assert [path.stem for path in copies] == sorted(wanted)
    for path in copies:
        text = re.sub(r'"image/png": "[^"]*"|@[0-9a-f]{40}', "", path.read_text())
        found = PRIVATE.search(text)
        assert not found, f"{path.name}: {text[max(0, found.start() - 60) : found.end() + 60]}"


def test_nbval_reproduces_the_checked_cells(tmp_path):
    """nbval runs the smoke copy of the first again, and compares the cells that are marked.

    The marked cells of all notebooks are compared in `test_smoke_run_gives_the_numbers_of_the_committed_copies`.
    """
    names = ["01_data"]
    options = ["--nbval-lax", "--nbval-cell-timeout=600", "-p", "no:cacheprovider", "-o", "addopts=", "-q"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *options,
            "--rootdir",
            str(SMOKE),
            *(f"{SMOKE}/{name}.ipynb" for name in names),
        ],
        env=os.environ | {"LLMPROD_RUN": str(tmp_path / "smoke")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and sorted(p.stem for p in (tmp_path / "smoke/results").glob("*.json")) == names


def test_smoke_run_gives_the_numbers_of_the_committed_copies(smoke_run):
    """Run by papermill, from another folder: the checked cells print what the committed copies show."""
    for name in NAMES:
        pairs = zip(
            *(
                [c for c in nbformat.read(folder / f"{name}.ipynb", as_version=4).cells if "# NBVAL_CHECK" in c.source]
                for folder in (smoke_run, SMOKE)
            ),
            strict=True,
        )
        for mine, theirs in pairs:
            # a kernel may send one cell's text in several pieces
            texts = [
                "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")
                for cell in (mine, theirs)
            ]
            assert texts[0] == texts[1] and texts[0], name


# Colab


class Host(SimpleHTTPRequestHandler):
    """What GitHub does for Colab: a bare repository to clone over HTTP, and its files by commit under raw/."""

    def do_GET(self):
        repository, raw, place = self.path.partition("/raw/")
        if raw:
            commit, _, name = place.partition("/")
            shown = subprocess.run(
                ["git", "-C", self.directory + repository, "show", f"{commit}:{name}"], capture_output=True
            )
            self.send_response(200 if shown.returncode == 0 else 404)
            self.end_headers()
            self.wfile.write(shown.stdout)
        else:
            super().do_GET()

    def log_message(self, *arguments):
        """Says nothing."""


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A copy of this checkout as a bare repository on loopback, whose address `make address` wrote; served."""
    served = tmp_path_factory.mktemp("served")
    work, bare = tmp_path_factory.mktemp("work"), served / "me/fork"
    listed = subprocess.run(["git", "-C", paths.ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(paths.ROOT / name, work / name)

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=llmprod", "-c", "user.email=llmprod@example.org"]
        return subprocess.run(["git", "-C", work, *who, *arguments], capture_output=True, text=True, check=True).stdout

    def command(*arguments: str) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "LLMPROD_HOME"} | {"PYTHONPATH": str(work)}
        subprocess.run([sys.executable, "-m", "llmprod", *arguments], cwd=work, env=environment, check=True)

    git("init", "-q", "-b", "main")
    git("add", "-A")
    git("commit", "-qm", "a copy")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Host, directory=str(served)))
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/me/fork"
    for arguments in (("address", f"{url}.git"), ("pin",)):
        command(*arguments)
        git("commit", "-qam", arguments[0])
    subprocess.run(["git", "clone", "-q", "--bare", work, bare], check=True)
    subprocess.run(["git", "-C", bare, "update-server-info"], check=True)
    yield url, work
    server.shutdown()


def test_colab_cells_and_all_else_name_the_forks_address(fork):
    """After `make address` no file names the old one, other than the copies of runs that were before."""
    url, work = fork
    old, names = notebooks.repository().removeprefix("https://"), []
    for path in work.rglob("*"):
        if path.is_file() and not {".git", "reports"} & set(path.parts):
            names += [path.name] if old.encode() in path.read_bytes() else []
    assert names == []
    for name in NAMES:
        cell = tagged(nbformat.read(work / f"notebooks/{name}.ipynb", as_version=4), "setup")[0].source
        assert f"git+{url}@" in cell and "colab" not in (work / f"notebooks/{name}.ipynb").read_text()
    assert url in (work / "CITATION.cff").read_text() and "colab" not in (work / "README.md").read_text()


@pytest.mark.parametrize(
    "url", ["", "llmprod", "https://github.com/llmprod", "https://me:word@github.com/a/b", "git@github.com:a/b.git",
            "https://github.com/a/b c", 'https://github.com/a/b"', "file:///etc/a/b", "https://github.com/a/b\n[x]"]
)  # fmt: skip
def test_what_is_no_address_of_a_repository_is_refused(url):
    with pytest.raises(LLMProdError, match=r"URL is .* such as https://github\.com/you/llmprod"):
        notebooks.move(url)


def test_colab_cell_installs_what_is_missing_and_nothing_else(tmp_path, fork):
    """A fresh environment without llmprod, an empty folder, one notebook of a fork alone, and the fork's address.

    The environment sees this one's other packages, so that only llmprod itself is installed.
    """
    site = Path(nbformat.__file__).parent.parent
    fresh = tmp_path / "venv"
    venv.create(fresh, with_pip=True, symlinks=True)
    python = fresh / "bin/python"
    (own,) = (fresh / "lib").glob("python*/site-packages")
    (own / "shared.pth").write_text(f"{site}\n")  # its .pth files are not read, so the editable llmprod is not seen
    missing = subprocess.run([python, "-c", "import llmprod"], cwd=tmp_path, capture_output=True, text=True)
    assert "ModuleNotFoundError" in missing.stderr

    kernel = fresh / "share/jupyter/kernels/python3"
    kernel.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "02_finetune.ipynb").write_bytes((fork[1] / "notebooks/02_finetune.ipynb").read_bytes())
    command = [python, "-m", "papermill", "02_finetune.ipynb", "out.ipynb", "--execution-timeout", "600"]
    for name, value in {"shots": 1, "epochs": 1, "max_length": 8}.items():
        command += ["-p", name, str(value)]
    shares = f"{fresh}/share/jupyter{os.pathsep}{sys.prefix}/share/jupyter"  # the fresh kernel, nbconvert's templates
    unproxied = f"127.0.0.1,{os.environ.get('no_proxy', '')}"
    environment = os.environ | {"JUPYTER_PATH": shares, "no_proxy": unproxied}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (own / "llmprod/repository/notebooks/01_data.ipynb").exists(), "it was installed, with its notebooks"
    assert (folder / "runs/lab/results/02_finetune.json").exists() and (
        folder / "runs/lab/results/01_data.json"
    ).exists()
