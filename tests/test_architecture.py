"""The house: imports go one way, code is found by its notebook's name, nothing is too large, nothing is dead.

Every checker is also shown a broken example, which it must find.
"""

import ast
from pathlib import Path

import nbformat
import pytest

from llmprod import paths
from llmprod.harness import fingerprints, report, study

GROUND = (
    "paths",
    "files",
    "machine",
    "artifacts",
    "adapters",
    "extras",
    "formats",
    "tables",
    "segment",
    "corpora",
    "shapes",
    "cluster",
    "workers",
)
CHAIN = ("data", "models", "converted", "finetune", "evaluate", "optimize", "deploy", "feedback")
CASES = ("customer_service", "financial_sentiment", "recommendation", "news_monitoring")
BORROWS = {"news_monitoring": {"financial_sentiment"}}
COMMANDS = ("llmprod.__main__", "llmprod.products")
HARNESS_ORDER = ("pipeline", "fingerprints", "track", "results", "runner", "study", "fanout", "report")
FILE, PACKAGE, CELL, SECTIONS = 350, 18_000, 35, 30


def room_of(module: str) -> str:
    """The room or file at the top of the package: `llmprod.evaluate.metrics` -> `evaluate`; "" for the package."""
    return [*module.split("."), ""][1]


def may_import(room: str) -> set[str]:
    """The rooms that a room may import from, besides itself; the package's own names are free to all."""
    if room in GROUND:
        return {"", *GROUND}
    if room in CHAIN:
        return {"", *GROUND, *CHAIN[: CHAIN.index(room)]}
    if room in CASES:
        return {"", *GROUND, *CHAIN, *BORROWS.get(room, ())}
    return {"", *GROUND} if room == "harness" else set()  # the package's own file imports nothing


def sources() -> dict[str, str]:
    """The modules of the package by name, with their code."""
    found = {}
    for file in sorted(paths.PACKAGE.rglob("*.py")):
        parts = file.relative_to(paths.PACKAGE).with_suffix("").parts
        name = ".".join(("llmprod", *parts)).removesuffix(".__init__")
        if parts[0] != "repository":
            found[name] = file.read_text(encoding="utf-8")
    return found


def notebooks() -> dict[str, nbformat.NotebookNode]:
    """The notebooks by name."""
    return {path.stem: nbformat.read(path, as_version=4) for path in sorted(paths.NOTEBOOKS.glob("*.ipynb"))}


def code_of(notebook: nbformat.NotebookNode) -> str:
    """A notebook's code as one text, without IPython's commands."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return "\n".join(line for cell in cells for line in cell.splitlines() if not line.startswith("%"))


def imports(code: str) -> set[str]:
    """The modules of ours that a piece of code imports."""
    return fingerprints.imports_of(ast.parse(code)) - {"llmprod"}


# The checkers: each returns what is wrong


def wrong_way(module: str, code: str) -> list[str]:
    """Imports of a module that its layer may not make."""
    if module in COMMANDS:
        return []
    own = room_of(module)
    wrong = [name for name in imports(code) if room_of(name) not in may_import(own) | {own}]
    if own == "harness" and (here := module.split(".")[-1]) in HARNESS_ORDER:
        above = {f"llmprod.harness.{name}" for name in HARNESS_ORDER[HARNESS_ORDER.index(here) :]}
        wrong += sorted(imports(code) & above)
    return wrong


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A cycle among imports, as the list of its modules; [] if there is none."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := search(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := search(name, []))), [])


def without_module(notebook: str, modules: set[str]) -> bool:
    """Whether no module or room has a notebook's name."""
    return f"llmprod.{notebook.partition('_')[2]}" not in modules


def strays(notebook: str, code: str) -> set[str]:
    """Rooms that a notebook imports and may not: its own, what that may import, the harness, `models`, `converted` may.

    These two have no notebook of their own; 01_data takes a model's tokenizer from them.
    """
    own = notebook.partition("_")[2]
    return {room_of(name) for name in imports(code)} - may_import(own) - {own, "harness", "models", "converted"}


def too_long(lengths: dict[str, int], limit: int) -> dict[str, int]:
    """The names whose length is above a limit."""
    return {name: length for name, length in lengths.items() if length > limit}


def dead(modules: set[str], graph: dict[str, set[str]], roots: set[str]) -> set[str]:
    """Modules that nothing reaches: no notebook, command, study or benchmark."""
    reached, waiting = set(), set(roots)
    while waiting:
        name = waiting.pop()
        reached |= {name, name.rpartition(".")[0]}
        waiting |= graph.get(name, set()) - reached
    return modules - reached - {"llmprod"}


# The checks


GRAPH = {name: imports(code) - {name} for name, code in sources().items()}


@pytest.mark.parametrize("module", sources())
def test_imports_go_one_way(module):
    assert not wrong_way(module, sources()[module])


def test_every_room_has_a_layer():
    assert {room_of(name) for name in sources()} == {"", *GROUND, *CHAIN, *CASES, "harness", "__main__", "products"}


def test_no_import_cycles():
    assert not cycle(GRAPH)


@pytest.mark.parametrize("notebook", notebooks())
def test_a_notebook_finds_its_code_by_its_name(notebook):
    assert not without_module(notebook, set(sources()))
    assert not strays(notebook, code_of(notebooks()[notebook]))


def test_no_module_file_is_too_long():
    lengths = {name: len(code.splitlines()) for name, code in sources().items()}
    assert not too_long(lengths, FILE)
    assert not too_long({"llmprod": sum(lengths.values())}, PACKAGE)
    assert f"{PACKAGE:,} for all of them" in (paths.ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("notebook", notebooks())
def test_no_notebook_is_too_long(notebook):
    cells = notebooks()[notebook].cells
    code = {cell.id: len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code"}
    assert not too_long(code, CELL)
    assert not too_long({notebook: sections(cells)}, SECTIONS)


def sections(cells: list[nbformat.NotebookNode]) -> int:
    """The number of headings in the text cells of a notebook."""
    texts = [cell.source.splitlines() for cell in cells if cell.cell_type == "markdown"]
    return sum(line.startswith("#") for lines in texts for line in lines)


def test_no_module_is_dead():
    code = [code_of(notebook) for notebook in notebooks().values()]
    code += [path.read_text(encoding="utf-8") for path in Path(paths.ROOT, "benchmarks").glob("*.py")]
    runs = {item["run"].partition(":")[0] for item in study.declarations()["experiments"].values()}
    roots = {"llmprod.__main__", *runs}.union(*map(imports, code))
    assert not dead(set(sources()), GRAPH, roots)


def test_the_picture_of_the_house_is_true():
    path = paths.ROOT / "docs" / "ARCHITECTURE.md"
    assert report.update(path, "en") == path.read_text(encoding="utf-8"), "run make report"


# The checkers find what is broken


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("llmprod.files", "from llmprod import data"),
        ("llmprod.models", "from llmprod.finetune import learn"),
        ("llmprod.finetune.learn", "def f():\n    from llmprod.evaluate import metrics"),
        ("llmprod.evaluate.metrics", "from llmprod.harness import results"),
        ("llmprod.recommendation.tower", "import llmprod.financial_sentiment.sentiment"),
        ("llmprod.financial_sentiment.sentiment", "from llmprod.news_monitoring import surge"),
        ("llmprod.harness.study", "from llmprod.evaluate import studies"),
        ("llmprod.harness.results", "from llmprod.harness import report"),
    ],
)
def test_an_import_the_wrong_way_is_found(module, code):
    assert wrong_way(module, code)
    assert not wrong_way("llmprod.news_monitoring.monitor", "from llmprod.financial_sentiment import sentiment")


def test_what_is_broken_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"] and not cycle({"a": {"b", "c"}, "b": {"c"}})
    assert without_module("07_nothing", set(sources())) and not without_module("02_finetune", set(sources()))
    assert strays("02_finetune", "from llmprod.evaluate import metrics") == {"evaluate"}
    assert strays("13_recommendation", "from llmprod.news_monitoring import surge") == {"news_monitoring"}
    assert not strays(
        "12_financial_sentiment", "from llmprod.evaluate import metrics\nfrom llmprod.harness import track"
    )
    assert too_long({"short": 350, "long": 351}, FILE) == {"long": 351}
    cells = [nbformat.v4.new_markdown_cell("# One\n\ntext\n\n## Two"), nbformat.v4.new_code_cell("# a comment")]
    assert sections(cells) == 2
    assert dead({"llmprod.a", "llmprod.b"}, {"llmprod.a": set()}, {"llmprod.a"}) == {"llmprod.b"}
