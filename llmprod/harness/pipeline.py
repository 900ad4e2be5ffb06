"""The pipeline: notebooks, parameters, profiles, fingerprints."""

import ast
import hashlib
import json
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import nbformat
import yaml

from llmprod import LLMProdError, artifacts, machine, paths


def pipeline() -> dict[str, dict]:
    """The notebooks in their order, with what each needs, as `notebooks/pipeline.yaml` lists them."""
    return yaml.safe_load((paths.NOTEBOOKS / "pipeline.yaml").read_text(encoding="utf-8"))


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
        raise RunError(f"There is no notebook '{notebook}'; there are: {', '.join(pipeline())}.")
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
    known = set().union(*(declared(notebook) for notebook in pipeline()))
    unknown = sorted(set(parsed) - known)
    if unknown:
        raise RunError(f"No notebook has the parameter {', '.join(unknown)}; there are: {', '.join(sorted(known))}.")
    return parsed


# Fingerprints


def code_of(notebook: nbformat.NotebookNode) -> list[str]:
    """The code cells of a notebook, without the parameters that a run injected and without the set-up cell."""
    skipped = {"injected-parameters", "setup"}
    return [c.source for c in notebook.cells if c.cell_type == "code" and not skipped & set(c.metadata.get("tags", []))]


def module_file(name: str) -> Path | None:
    """The file of a module of ours (`llmprod.evaluate.metrics`; of a package its `__init__.py`), None where none is."""
    place = paths.PACKAGE.joinpath(*name.split(".")[1:])
    return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)


def imports_of(source: str) -> set[str]:
    """The modules of ours that a piece of code imports, wherever in it. Raises RunError for one that is not there."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "llmprod"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llmprod":
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {node.module} | {name for name in submodules if module_file(name)}
            if node.module == "llmprod":  # the package itself defines few names: anything else must be a module
                defined = {name.id for name in ast.walk(syntax_tree(node.module)) if isinstance(name, ast.Name)}
                defined |= {item.name for item in syntax_tree(node.module).body if hasattr(item, "name")}
                found |= {name for name in submodules if name.removeprefix("llmprod.") not in defined}
    if missing := sorted(name for name in found if not module_file(name)):
        raise RunError(f"There is no module {', '.join(missing)}, which is imported.")
    return found


def modules_of(source: str) -> set[str]:
    """The modules of ours that a piece of code imports, and those that they import."""
    found, waiting = set(), imports_of(source)
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= imports_of(module_file(name).read_text(encoding="utf-8")) - found
    return found


def syntax_tree(module: str) -> ast.Module:
    """A module's syntax tree without its docstrings."""
    return without_docstrings(module_file(module).read_text(encoding="utf-8"))


def without_docstrings(source: str) -> ast.Module:
    """The syntax tree of code, in which neither comments nor docstrings nor line breaks count."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree


def code_fingerprint(source: str) -> str:
    """A fingerprint of code and of all modules of ours that it comes to import: what can change its numbers."""
    trees = {name: ast.dump(syntax_tree(name)) for name in sorted(modules_of(source))}
    trees[""] = ast.dump(without_docstrings(source))
    return hashlib.sha256(json.dumps(trees, sort_keys=True).encode()).hexdigest()


def source_hash(notebook: str) -> str:
    """A fingerprint of a notebook's code."""
    return hashlib.sha256("\n".join(code_of(read(notebook))).encode()).hexdigest()[:12]


def settings(profile_name: str, parameters: Mapping[str, object]) -> dict[str, dict]:
    """What is injected into each notebook: its profile's overrides, then those parameters that it declares."""
    overrides = profile(profile_name)
    return {
        notebook: overrides.get(notebook, {}) | {k: v for k, v in parameters.items() if k in declared(notebook)}
        for notebook in pipeline()
    }


def fingerprint(notebook: str, injected: Mapping[str, dict]) -> str:
    """Everything a notebook's results depend on: code, parameters, modules, artifacts and files, versions, upstream."""
    values = declared(notebook) | injected[notebook]
    code = "\n".join(line for cell in code_of(read(notebook)) for line in cell.splitlines() if not line.startswith("%"))
    parts = {
        "code": code_fingerprint(code),
        "parameters": values,
        "inputs": {k: artifacts.checksum(v) for k, v in values.items() if isinstance(v, str) and is_input(v)},
        "versions": machine.versions(machine.SHOWN),
        "upstream": {name: fingerprint(name, injected) for name in pipeline()[notebook]["needs"]},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def is_input(value: str) -> bool:
    """Whether a parameter's value names an artifact or an existing file or folder."""
    return value in artifacts.registry() or (bool(value) and Path(value).expanduser().exists())


def with_upstream(notebook: str) -> list[str]:
    """A notebook after all those that it needs."""
    needed = [name for upstream in pipeline()[notebook]["needs"] for name in with_upstream(upstream)]
    return [*dict.fromkeys(needed), notebook]
