"""The generated parts of notebooks: badge and first cell."""

import subprocess

import nbformat

from llmprod import LLMProdError, paths
from llmprod.harness import pipeline


def repository() -> str:
    """The repository's address, from the one place that holds it."""
    import tomllib

    return tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def colab(notebook: str) -> str:
    """The badge that opens a notebook in Colab."""
    place = repository().removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{notebook}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"


SETUP = """\
# Installs llmprod, and what was tested with it, where it is missing (Colab); does nothing where it is installed.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("llmprod") is None:
    _source = os.environ.get("LLMPROD_INSTALL", "llmprod{extra} @ git+{repository}@{commit}")
    _place, _, _commit = _source.partition("git+")[2].rpartition("@")
    _pins = ["-c", f"{{_place}}/raw/{{_commit}}/constraints.txt"] if _commit else []
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", _source, *_pins], check=True)"""


def setup_cell(notebook: str, commit: str) -> str:
    """The source of a notebook's first code cell, which installs the extra that the notebook needs and no other."""
    extra = pipeline.pipeline()[notebook].get("extra")
    return SETUP.format(extra=f"[{extra}]" if extra else "", repository=repository(), commit=commit)


def pin() -> str:
    """Writes the badge and the first cell of every notebook; they name the last commit that changed the module.

    Returns that commit. Raises LLMProdError where there is none.
    """
    command = ["git", "-C", str(paths.ROOT), "log", "-1", "--format=%H", "--", "llmprod", "pyproject.toml"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not commit:
        raise LLMProdError("There is no commit to pin: commit the module first.")
    for name in pipeline.pipeline():
        path = paths.NOTEBOOKS / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        head = notebook.cells[0]
        title, _, rest = head.source.partition("\n\n")
        body = rest.partition("\n\n")[2] if rest.startswith("[![Open in Colab]") else rest
        head.source = f"{title}\n\n{colab(name)}\n\n{body}"
        (cell,) = [c for c in notebook.cells if "setup" in c.metadata.get("tags", [])]
        cell.source = setup_cell(name, commit)
        nbformat.write(notebook, path)
    return commit
