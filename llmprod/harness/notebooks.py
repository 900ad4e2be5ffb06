"""The generated parts of notebooks: badge and first cell; and the repository's address that they show."""

import re
import subprocess

import nbformat

from llmprod import LLMProdError, files, paths
from llmprod.harness import pipeline


def repository() -> str:
    """The repository's address, from the one place that holds it."""
    import tomllib

    return tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


ADDRESS = re.compile(r"https?://(?:127\.0\.0\.1:\d+|[\w-]+(?:\.[\w-]+)+)(?:/[\w.-]+){2,}", re.ASCII)
NAMED = {"pyproject.toml": 'Repository = "{}"', "CITATION.cff": "repository-code: {}"}  # where the address is written


def move(url: str) -> str:
    """Writes another address of the repository, as of a fork, wherever it is named by hand; `pin` writes the rest.

    Returns it. Raises LLMProdError for what is no address of a repository, or has a password in it.
    """
    url, old = url.strip().rstrip("/").removesuffix(".git"), repository()
    if not ADDRESS.fullmatch(url):
        raise LLMProdError(
            f"URL is {url!r}; it is an address such as https://github.com/you/llmprod, without a password."
        )
    for name, line in NAMED.items():
        file = paths.ROOT / name
        text = file.read_text(encoding="utf-8")
        if line.format(old) not in text:
            raise LLMProdError(
                f"{name} lacks the line {line.format(old)}: put it back, or write the new address there."
            )
        with files.atomic(file) as temporary:
            temporary.write_text(text.replace(line.format(old), line.format(url)), encoding="utf-8")
    return url


def colab(notebook: str) -> str:
    """The badge that opens a notebook in Colab; "" for a repository that is not on GitHub, where Colab finds none."""
    place = repository().removeprefix("https://github.com/")
    if place == repository():
        return ""
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
        head.source = "\n\n".join(part for part in (title, colab(name), body) if part)
        (cell,) = [c for c in notebook.cells if "setup" in c.metadata.get("tags", [])]
        cell.source = setup_cell(name, commit)
        nbformat.write(notebook, path)
    return commit
