"""Fingerprints: what the numbers of a notebook or of an experiment depend on, to the statement.

Of a module's top-level statements only those count that code reaches by name, as a static program slice does (Weiser,
"Program slicing", ICSE 1981): an edited function re-runs what uses it, and not whatever imports its module. Where names
leave a choice, too much counts: a class as a whole, a name even where a local one hides it, all of a module that is not
followed by a dot. What code finds by a text (`getattr(module, text)` apart, which counts the whole module) is not seen,
nor what a decorator registers where its module is imported.
"""

import ast
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from llmprod import LLMProdError, artifacts, machine, paths
from llmprod.harness import pipeline

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)
IMPORTS = (ast.Import, ast.ImportFrom)


def fingerprint(notebook: str, injected: Mapping[str, dict]) -> str:
    """A fingerprint of what a notebook's results depend on: code, parameters, inputs, library versions, upstream."""
    values, cells = pipeline.declared(notebook) | injected[notebook], pipeline.code_of(pipeline.read(notebook))
    code = "\n".join(line for cell in cells for line in cell.splitlines() if not line.startswith("%"))
    parts = {
        "code": of_code(code),
        "parameters": values,
        "inputs": {k: artifacts.checksum(v) for k, v in values.items() if isinstance(v, str) and is_input(v)},
        "versions": machine.versions(machine.SHOWN),
        "upstream": {name: fingerprint(name, injected) for name in pipeline.pipeline()[notebook]["needs"]},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def is_input(value: str) -> bool:
    """Whether a parameter's value names an artifact or an existing file or folder."""
    return value in artifacts.registry() or os.path.exists(os.path.expanduser(value))


def of_code(source: str) -> str:
    """A fingerprint of code and of all that it reaches in our modules: whatever can change its numbers.

    Raises LLMProdError for an import of ours that can't be found.
    """
    tree = syntax_tree(source)
    parts = [of_tree(tree), *sorted({f"{module}: {part}" for module, part in reached(tree)})]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# Statements


@cache
def syntax_tree(source: str) -> ast.Module:
    """The syntax tree of code without its docstrings: like comments and line breaks, they change no number."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *DEFINITIONS)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree


@cache
def of_tree(tree: ast.AST) -> str:
    """A fingerprint of code alone, reckoned once."""
    return hashlib.sha256(json.dumps(plain_tree(tree), sort_keys=True).encode()).hexdigest()


def plain_tree(node: object) -> object:
    """A syntax tree as plain values without its empty fields, of which each version of Python has others."""
    if isinstance(node, ast.AST):
        fields = {name: plain_tree(value) for name, value in ast.iter_fields(node) if value not in (None, [])}
        return [type(node).__name__, fields]
    return [plain_tree(item) for item in node] if isinstance(node, list) else repr(node)


@cache
def bound_by(statement: ast.stmt) -> frozenset[str]:
    """The names that a statement at the top of a module defines, assigns or imports."""
    if isinstance(statement, DEFINITIONS):
        return frozenset({statement.name})
    nodes = list(ast.walk(statement))
    names = {node.name for node in nodes if isinstance(node, DEFINITIONS)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return frozenset(names | set(aliases(statement)))


@cache
def binders(tree: ast.Module) -> dict[str, list[ast.stmt]]:
    """The names that a module defines, assigns or imports at its top, each with the statements that do."""
    return {name: [s for s in tree.body if name in bound_by(s)] for name in set().union(*map(bound_by, tree.body))}


def has_effect(statement: ast.stmt) -> bool:
    """Whether a statement does something where a module is imported, beyond giving names their values."""
    if isinstance(statement, ASSIGNMENTS):
        targets = getattr(statement, "targets", None) or [statement.target]
        return any(isinstance(node, (ast.Attribute, ast.Subscript)) for t in targets for node in ast.walk(t))
    main = isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)
    return not main and not isinstance(statement, (*DEFINITIONS, *IMPORTS))


# Imports


def module_file(name: str) -> Path | None:
    """The file of a module of ours (`llmprod.evaluate.metrics`; of a package its `__init__.py`), or None."""
    place = paths.PACKAGE.joinpath(*name.split(".")[1:])
    return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)


def module_tree(name: str) -> ast.Module:
    """`syntax_tree` of a module of ours. Raises LLMProdError if there is no such module."""
    if not (file := module_file(name)):
        raise LLMProdError(f"There is no module {name}, which is imported.")
    return syntax_tree(file.read_text(encoding="utf-8"))


@cache
def aliases(node: ast.AST) -> dict[str, str]:
    """The names that imports anywhere in code bind, with what each stands for: `metrics`, `llmprod.evaluate.metrics`.

    Raises LLMProdError for a relative import.
    """
    found = {}
    for part in ast.walk(node):
        if isinstance(part, ast.ImportFrom) and part.level:
            raise LLMProdError("Relative imports are not followed: write the module's full name.")
        start = f"{part.module}." if isinstance(part, ast.ImportFrom) else ""
        for alias in part.names if isinstance(part, IMPORTS) else ():
            name = alias.asname or (alias.name if start else alias.name.split(".")[0])
            found[name] = f"{start}{alias.name}" if start or alias.asname else name
    return found


@cache
def top_aliases(tree: ast.Module) -> dict[str, str]:
    """`aliases` at the top of a module, and not in its functions."""
    return {k: v for s in tree.body if not isinstance(s, DEFINITIONS) for k, v in aliases(s).items()}


@cache
def imported(tree: ast.AST) -> frozenset[str]:
    """The dotted names of all imports anywhere in code, of a `from` import with and without the name."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, IMPORTS)]
    plain = {alias.name for node in nodes for alias in node.names if isinstance(node, ast.Import)}
    return frozenset(plain | {*aliases(tree).values()} | {n.module for n in nodes if isinstance(n, ast.ImportFrom)})


def imports_of(tree: ast.AST) -> set[str]:
    """The modules of ours that code imports, anywhere in it. Raises LLMProdError for what can't be found."""
    found = set()
    for name in imported(tree):
        if name.split(".")[0] != "llmprod":
            continue
        above, _, last = name.rpartition(".")
        found.add(above if not module_file(name) and last in binders(module_tree(above)) else name)
    for name in found:
        module_tree(name)
    return found


def modules_of(tree: ast.AST) -> dict[str, ast.Module]:
    """The modules of ours that code imports, and those that they import, each with its syntax tree.

    Importing `llmprod.a.b` runs `llmprod` and `llmprod.a`, so they are among them.
    """
    found, waiting = {}, imports_of(tree)
    while waiting:
        name = waiting.pop()
        found[name] = module_tree(name)
        waiting |= (imports_of(found[name]) | {name.rpartition(".")[0]}) - set(found) - {""}
    return found


# What code reaches


def reached(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """What code reaches in our modules: module, and fingerprint of a statement or of a data file that one names."""
    found, renamed = statements(tree)
    yield from renamed
    for module, used in found.items():
        yield from ((module, of_tree(statement)) for statement in used)
        yield from ((module, " ".join(file)) for file in data_files(module, used).items())


def statements(tree: ast.Module) -> tuple[dict[str, set[ast.stmt]], set[tuple[str, str]]]:
    """The statements of our modules that code reaches, by module; and which names stand for another, by module.

    Also what any module that comes to be imported does by being imported. Of an import counts what is used of it.
    """
    modules, found, renamed = modules_of(tree), {}, set()
    waiting = [("", statement) for statement in tree.body]
    waiting += [(name, s) for name, module in modules.items() for s in module.body if has_effect(s)]
    while waiting:
        place, statement = waiting.pop()
        if statement in found.setdefault(place, set()):
            continue
        found[place].add(statement)
        for module, name in named(statement, place, modules.get(place, tree), modules):
            used = binders(modules[module])[name] if name else modules[module].body
            waiting += [(module, s) for s in used if not isinstance(s, IMPORTS)]
            if name in top_aliases(modules[module]):
                renamed.add((module, f"{name} is {top_aliases(modules[module])[name]}"))
    found.pop("", None)  # of code without a statement
    return found, renamed


def named(
    statement: ast.stmt, place: str, tree: ast.Module, modules: Mapping[str, ast.Module]
) -> Iterator[tuple[str, str]]:
    """What a statement names of our modules: module and name, without a name where all of the module counts."""
    for name, *attributes in dotted(statement):
        for known in (aliases(statement), top_aliases(tree)):
            if known.get(name, "").split(".")[0] == "llmprod":
                yield from followed(["llmprod", *known[name].split(".")[1:], *attributes], modules)
        if place and name in binders(tree):
            yield place, name


def followed(parts: list[str], modules: Mapping[str, ast.Module]) -> Iterator[tuple[str, str]]:
    """The module and name that a dotted name stands for, and so on where that module imports the name itself."""
    module, rest = parts[0], parts[1:]
    while rest and f"{module}.{rest[0]}" in modules:
        module, rest = f"{module}.{rest[0]}", rest[1:]
    name = rest[0] if rest and rest[0] in binders(modules[module]) else ""
    yield module, name
    target = top_aliases(modules[module]).get(name, "")
    if target.split(".")[0] == "llmprod":
        yield from followed([*target.split("."), *rest[1:]], modules)


def dotted(node: ast.AST) -> Iterator[list[str]]:
    """The dotted names in code, each whole and in its parts: `models.Predictor.load`."""
    parts, inner = [], node
    while isinstance(inner, ast.Attribute):
        parts, inner = [inner.attr, *parts], inner.value
    if isinstance(inner, ast.Name):
        yield [inner.id, *parts]
    else:
        for child in [inner] if parts else ast.iter_child_nodes(inner):
            yield from dotted(child)


def data_files(module: str, statements: Iterable[ast.stmt]) -> dict[str, str]:
    """The files and folders of data that statements name and that lie next to their module, such as word lists.

    Each with a fingerprint. Not the registry of artifacts, of which only the entries count that a parameter names.
    """
    nodes = (node for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Constant))
    texts = {node.value for node in nodes if isinstance(node.value, str)} - {"artifacts.yaml"}
    near = [path for path in sorted(module_file(module).parent.iterdir()) if path.name in texts]
    data = [path for path in near if path.suffix not in ("", ".py") or holds_data(path)]
    return {path.name: artifacts.checksum(str(path)) for path in data}


def holds_data(folder: Path) -> bool:
    """Whether a path is a folder without code."""
    return folder.is_dir() and not any(folder.rglob("*.py*"))
