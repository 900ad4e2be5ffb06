"""Fingerprints: what code reaches counts, all of it and nothing else."""

import ast
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llmprod import LLMProdError, data, paths, workers
from llmprod.harness import fingerprints, pipeline, study


def statement_in(function: str) -> Callable[[str], str]:
    """An edit that adds a statement at the end of a function."""

    def change(source: str) -> str:
        (node,) = [n for n in ast.parse(source).body if getattr(n, "name", "") == function]
        lines = source.splitlines(keepends=True)
        return "".join([*lines[: node.body[-1].lineno - 1], "    changed = 1\n", *lines[node.body[-1].lineno - 1 :]])

    return change


# What counts, on small packages


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Writes a package of the given modules and returns the fingerprint of code that uses it."""
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "llmprod")

    def written(code: str, **modules: str) -> str:
        shutil.rmtree(tmp_path / "llmprod", ignore_errors=True)
        for name, source in {"__init__": "", **modules}.items():
            file = tmp_path / "llmprod" / f"{name.replace('__in__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
            (file.parent / "__init__.py").touch()
        return fingerprints.of_code(code)

    return written


USES = "from llmprod import a\na.f(1)"


@pytest.mark.parametrize(
    ("code", "before", "after"),
    [
        (USES, "def f(x): return x", "def f(x): return 2 * x"),
        (USES, "def f(x): return g(x)\ndef g(x): return x", "def f(x): return g(x)\ndef g(x): return -x"),
        (USES, "N = 1\ndef f(x): return x + N", "N = 2\ndef f(x): return x + N"),
        (USES, "N = [1]\nN += [2]\ndef f(x): return N", "N = [1]\nN += [3]\ndef f(x): return N"),
        (USES, "def f(x, y=len('a')): return y", "def f(x, y=len('ab')): return y"),
        (USES, "import math as m\ndef f(x): return m.pi", "import cmath as m\ndef f(x): return m.pi"),
        (USES, "from math import sin as s\ndef f(x): return s(x)", "from math import cos as s\ndef f(x): return s(x)"),
        (USES, "def d(f): return f\n@d\ndef f(x): return x", "def d(f): return len\n@d\ndef f(x): return x"),
        (USES, "class B:\n  n = 1\nclass f(B):\n  pass", "class B:\n  n = 2\nclass f(B):\n  pass"),
        (USES, "class f:\n  def other(self): return 1", "class f:\n  def other(self): return 2"),
        (USES, "if 1:\n  def f(x): return 1\nelse:\n  f = len", "if 0:\n  def f(x): return 1\nelse:\n  f = len"),
        (USES, "D = {}\nD['a'] = 1\ndef f(x): return D", "D = {}\nD['a'] = 2\ndef f(x): return D"),
        (USES, "import csv\ncsv.limit(1)\ndef f(x): pass", "import csv\ncsv.limit(2)\ndef f(x): pass"),
        ("from llmprod.a import f", "def f(x): return g(x)\ndef g(x): return x", None),
        ("from llmprod import a\ngetattr(a, 'f')(1)", "def f(x): return x", "def f(x): return 2 * x"),
        ("import llmprod.a\nllmprod.a.f(1)", "def f(x): return x", "def f(x): return 2 * x"),
        ("import llmprod.a as b\nb.f(1)", "def f(x): return x", "def f(x): return 2 * x"),
        ("def g():\n  from llmprod.a import f\n  return f(1)", "def f(x): return x", "def f(x): return 2 * x"),
    ],
)  # fmt: skip
def test_what_code_reaches_counts(package, code, before, after):
    if after is None:  # imported, never used: no number depends on it
        assert package(code, a=before) == package(code, a=before.replace("return x", "return 2 * x"))
    else:
        assert package(code, a=before) != package(code, a=after)


@pytest.mark.parametrize(
    "more",
    ["def g(x): return 2", "M = 2", "import csv", "class g:\n  pass", "if __name__ == '__main__':\n  f(2)", "# f"],
)
def test_what_code_does_not_reach_does_not_count(package, more):
    source = "import math\ndef f(x):\n  '''Text.'''\n  return math.pi\n"
    assert package(USES, a=source) == package(USES, a=f"{source}{more}\n") == package(USES, a=f"\n{more}\n{source}")


def test_it_goes_on_through_other_modules(package):
    """By a name that one module imports from another, by a package's own file, and by a method."""
    a = "from llmprod.b import g as h\ndef f(x): return h(x)"
    assert package(USES, a=a, b="def g(x): return x") != package(USES, a=a, b="def g(x): return -x")
    assert package(USES, a="from llmprod.b import f", b="def f(x): return x") != package(
        USES, a="from llmprod.b import f", b="def f(x): return -x"
    )
    deep = "from llmprod.room import c\ndef f(x): return c.K().value.real"
    one, two = (package(USES, a=deep, room__in__c=f"class K:\n  value = {n}") for n in (1, 2))
    assert one != two
    side = "import llmprod.b\ndef f(x): return x"  # unused, but run by the import
    assert package(USES, a=side, b="import csv\ncsv.x(1)") != package(USES, a=side, b="import csv\ncsv.x(2)")


def test_a_file_that_a_statement_names_counts_with_it(package, tmp_path):
    def with_words(words: str, used: str) -> str:
        package("", a="WORDS = 'words.yaml'\nN = 1")
        (tmp_path / "llmprod/words.yaml").write_text(words)
        return fingerprints.of_code(f"from llmprod import a\na.{used}")

    assert with_words("a", "WORDS") != with_words("b", "WORDS") == with_words("b", "WORDS")
    assert with_words("a", "N") == with_words("b", "N")


@pytest.mark.parametrize(
    "code",
    [
        "import llmprod.nothing",
        "from llmprod import nothing",
        "from llmprod.evaluate import nothing",
        "from llmprod.evaluate.metrics import nothing",
        "from llmprod.evaluate.metrics import *",
        "from . import files",
    ],
)
def test_an_import_that_cannot_be_found_is_an_error(code):
    with pytest.raises(LLMProdError):
        fingerprints.of_code(code)


def test_a_fingerprint_is_the_same_in_every_version_of_python():
    """3.12 gave functions type parameters, 3.13 leaves empty lists out of dumps: only what is written counts."""
    function = ["FunctionDef", {"name": "'f'", "args": ["arguments", {}], "body": [["Pass", {}]]}]
    assert fingerprints.plain_tree(ast.parse("def f():\n    pass  # nothing")) == ["Module", {"body": [function]}]


# Of the real notebooks and experiments


SENTIMENT, MONITORING = "12_financial_sentiment", "14_news_monitoring"


def of_notebooks() -> dict[str, str]:
    return {name: fingerprints.fingerprint(name, pipeline.settings("cpu", {})) for name in pipeline.pipeline()}


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    """The fingerprints of the notebooks as they are."""
    return of_notebooks()


@pytest.mark.parametrize(
    ("file", "edit", "reruns"),
    [
        ("llmprod/recommendation/scorers.py", statement_in("ease"), {"13_recommendation"}),
        ("llmprod/financial_sentiment/sentiment.py", statement_in("scores"), {SENTIMENT, MONITORING}),
        ("llmprod/financial_sentiment/sentiment.py", statement_in("saved"), {MONITORING}),
        ("llmprod/customer_service/support_desk/questions.jsonl", None, {"11_customer_service"}),
        ("llmprod/optimize/export.py", statement_in("int8"), {"05_deploy", "06_feedback", MONITORING}),
        ("llmprod/machine.py", statement_in("set_threads"), {*pipeline.pipeline()}),
        ("llmprod/harness/report.py", statement_in("build"), set()),
        ("llmprod/machine.py", lambda source: f"{source}\nCHANGED = True\n", set()),
        ("llmprod/harness/page.html", None, set()),
        ("notebooks/tables.yaml", lambda source: f"{source}\nchanged: true\n", set()),
        ("README.md", None, set()),
    ],
)  # fmt: skip
def test_a_changed_file_changes_the_fingerprints_that_depend_on_it(monkeypatch, tmp_path, before, file, edit, reruns):
    skipped = shutil.ignore_patterns("__pycache__", "repository")
    for name in ("llmprod", "notebooks"):
        shutil.copytree(paths.ROOT / name, tmp_path / name, ignore=skipped)
    shutil.copy(paths.ROOT / "README.md", tmp_path)
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "llmprod")
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    path = tmp_path / file
    path.write_text((edit or (lambda source: source + "changed"))(path.read_text()))
    after = of_notebooks()
    assert {name for name in after if after[name] != before[name]} == reruns


@pytest.mark.parametrize(
    ("notebook", "parameter"),
    [("01_data", "test_file"), ("11_customer_service", "articles"), ("13_recommendation", "items_file")],
)
def test_a_changed_file_that_a_parameter_names_changes_the_fingerprint(tmp_path, notebook, parameter):
    place = tmp_path if parameter == "articles" else tmp_path / "mine"
    found = set()
    for text in ("a", "b"):
        (tmp_path / "mine").write_text(text)
        found.add(fingerprints.fingerprint(notebook, pipeline.settings("cpu", {parameter: str(place)})))
    assert len(found) == 2


def executed(call: Callable[[], object]) -> set[tuple[str, int]]:
    """The functions of the package that a call runs, in any thread: module, and first line."""
    found: set[tuple[str, int]] = set()

    def seen(frame, event, _) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(paths.PACKAGE)) and code.co_name != "<module>":
            parts = Path(code.co_filename).relative_to(paths.PACKAGE).with_suffix("").parts
            found.add((".".join(("llmprod", *parts)).removesuffix(".__init__"), code.co_firstlineno))

    sys.setprofile(seen)
    threading.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found


def statement_at(module: str, line: int) -> ast.stmt:
    """The top-level statement of a module that is at a line, decorators included."""
    (found,) = [
        s for s in fingerprints.module_tree(module).body
        if min([s.lineno, *(d.lineno for d in getattr(s, "decorator_list", ()))]) <= line <= s.end_lineno
    ]  # fmt: skip
    return found


@pytest.mark.parametrize("experiment", ["finetune", "active learning", "continual learning"])
def test_every_function_that_an_experiment_runs_counts(tmp_path, experiment):
    """What is found by running it is among what is found by reading it."""
    table = data.drop_duplicates(data.clean(data.load("reuters-r8"))[0])[0]
    data.save(data.split(table, train_rows=200, test_rows=60), tmp_path / "splits", {})
    small = {"epochs": 1, "max_length": 16, "precision": "fp32", "shots": 2, "splits": str(tmp_path / "splits")}
    small |= {"phase_texts": 40, "phase_tests": 40}
    declared = study.defaults(experiment)
    run = study.declarations()["experiments"][experiment]["run"]
    parameters = declared | {k: v for k, v in small.items() if k in declared or k == "splits"}
    call = workers.function(run)
    ran = executed(lambda: call(parameters))
    module, _, function = run.partition(":")
    counted = set(fingerprints.reached(fingerprints.syntax_tree(f"from {module} import {function}\n{function}")))
    missed = {
        (name, line) for name, line in ran if (name, fingerprints.of_tree(statement_at(name, line))) not in counted
    }
    assert len(ran) > 10 and not missed
