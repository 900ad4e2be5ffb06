"""The project's own files agree with one another."""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import llmprod
from llmprod import paths
from llmprod.__main__ import chosen, parser
from llmprod.harness import notebooks, pipeline, study
from tests.dead_code import dead_code

PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = {
    canonicalize_name(name): version
    for name, _, version in (
        line.partition("==")
        for line in (paths.ROOT / "constraints.txt").read_text().splitlines()
        if line and line[0] != "#"
    )
}


def tracked() -> list[str]:
    done = subprocess.run(["git", "-C", str(paths.ROOT), "ls-files"], capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (paths.ROOT / name).is_file()]


def test_constraints_pin_every_dependency_within_its_range():
    for requirement in map(Requirement, sum(EXTRAS.values(), PROJECT["dependencies"])):
        if requirement.name != "llmprod":
            assert Version(PINS[canonicalize_name(requirement.name)]) in requirement.specifier, requirement.name


def test_constraints_are_complete():
    """Whatever `make setup` installs, down to the last dependency of a dependency, is pinned."""
    seen, todo = set(), [Requirement("llmprod[dev]")]
    while todo:
        wanted = todo.pop()
        for line in metadata.requires(wanted.name) or []:
            needed = Requirement(line)
            extras = wanted.extras | {""}
            if not needed.marker or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                key = (canonicalize_name(needed.name), frozenset(needed.extras))
                if key not in seen and not key[0].startswith(("nvidia", "cuda", "triton")):  # torch's own, if any
                    seen.add(key)
                    todo.append(needed)
    assert not {name for name, _ in seen} - set(PINS) - {"llmprod"}


# Extras: room -> the extra that its notebook installs; a file of the chain may name one where it needs it, any
# file Ray's, which no notebook imports
ROOMS = {
    "customer_service": "support",
    "deploy": "serve",
    "feedback": "serve",
    "financial_sentiment": "news",
    "news_monitoring": "news",
    "recommendation": "recsys",
}


def distributions(names: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(name).name) for name in names}


def outside_imports(node: ast.AST, within: str = "") -> Iterator[tuple[str, str]]:
    """(module that isn't ours nor Python's, the extra of the `with extra(…)` around its import, or "")."""
    if isinstance(node, ast.With) and isinstance(call := node.items[0].context_expr, ast.Call):
        within = call.args[0].value if getattr(call.func, "id", "") == "extra" else within
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
    for top in (name.partition(".")[0] for name in names):
        if top not in sys.stdlib_module_names and top != "llmprod":
            yield top, within
    for child in ast.iter_child_nodes(node):
        yield from outside_imports(child, within)


def test_every_import_is_of_the_core_or_of_an_extra_that_is_named_there():
    whose = {module: distributions(names) for module, names in metadata.packages_distributions().items()}
    core = distributions(PROJECT["dependencies"])
    for path in sorted(paths.PACKAGE.rglob("*.py")):
        room = ROOMS.get(path.relative_to(paths.PACKAGE).parts[0])
        for module, extra in outside_imports(ast.parse(path.read_text())):
            place = f"{path.relative_to(paths.ROOT)} imports {module}"
            assert whose[module] & (distributions(EXTRAS[extra]) if extra else core), place
            assert extra in ("", "ray", room) or room is None, f"{place} of another room's extra"


def test_a_missing_extra_is_one_clear_error(monkeypatch):
    from llmprod.financial_sentiment import weak_labels

    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.delitem(sys.modules, "vaderSentiment.vaderSentiment", raising=False)
    with pytest.raises(llmprod.LLMProdError, match="vaderSentiment") as error:
        weak_labels.vader(["good"])
    assert 'pip install "llmprod[news]"' in str(error.value) and "make setup" in str(error.value)


def test_the_chain_does_not_need_any_extra():
    """With the packages of all extras hidden, everything that notebooks 01 to 04 import can be imported."""
    hidden = set().union(*(distributions(names) for name, names in EXTRAS.items() if name != "dev"))
    whose = metadata.packages_distributions()
    modules = [module for module, names in whose.items() if distributions(names) & hidden]
    code = f"import sys; sys.modules.update(dict.fromkeys({modules}))\n"
    for name in (name for name, item in pipeline.pipeline().items() if "extra" not in item):
        path = paths.NOTEBOOKS / f"{name}.ipynb"
        cells = [cell["source"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        imports = [line for cell in cells for line in cell if re.match(r"(from|import) ", line)]
        code += "".join(line.rstrip() + "\n" for line in imports if not line.rstrip().endswith("("))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_notebook_names_the_extra_of_its_room():
    for name, item in pipeline.pipeline().items():
        assert item.get("extra") == ROOMS.get(name.partition("_")[2]), name
        wanted = f'"llmprod[{item["extra"]}] @ git+' if "extra" in item else '"llmprod @ git+'
        assert wanted in notebooks.setup_cell(name, "0"), name


def test_the_first_cell_installs_the_pinned_commit_with_pinned_dependencies(monkeypatch):
    ran = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command[5:]))
    cell, commit = notebooks.setup_cell("12_financial_sentiment", "0" * 40), "0" * 40
    exec(cell, {})
    url = PROJECT["urls"]["Repository"]
    assert ran == [[f"llmprod[news] @ git+{url}@{commit}", "-c", f"{url}/raw/{commit}/constraints.txt"]]
    monkeypatch.setenv("LLMPROD_INSTALL", "/a/checkout@home")
    exec(cell, {})
    assert ran[1] == ["/a/checkout@home"]


def test_every_dependency_has_its_reason():
    names = set(re.findall(r"[\w-]+", (paths.ROOT / "docs/DEPENDENCIES.md").read_text()))
    wanted = distributions(sum(EXTRAS.values(), PROJECT["dependencies"]))
    assert not wanted - {canonicalize_name(name) for name in names} - {"llmprod"}


def test_constraints_install_on_any_machine():
    text = (paths.ROOT / "constraints.txt").read_text()
    assert PINS["torch"] == "2.13.0" and "nvidia" not in text and "+cpu" not in text and "@" not in text


def test_conda_environment_is_the_same_environment():
    environment = yaml.safe_load((paths.ROOT / "environment.yml").read_text())
    python, pip, with_pip = environment["dependencies"]
    assert Version(python.removeprefix("python=")) in SpecifierSet(PROJECT["requires-python"])
    assert pip == f"pip={PINS['pip']}"
    assert with_pip == {"pip": ["-c constraints.txt", "-e .[dev]"]}, "what pip installs, pinned, and nothing beside it"


def test_make_help_explains_every_target():
    done = subprocess.run(["make", "help"], cwd=paths.ROOT, capture_output=True, text=True, check=True)
    makefile = (paths.ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    wanted = [
        "setup",
        "reproduce",
        "test",
        "run",
        "smoke",
        "verify",
        "report",
        "bench",
        "reference",
        "study",
        "lab",
        "lint",
        "sync",
        "clean",
        "help",
    ]
    assert set(wanted) <= set(targets)
    assert all(f"make {target} " in done.stdout for target in targets)


def test_one_version_and_one_address():
    citation = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text())
    assert citation["version"] == llmprod.__version__
    assert citation["repository-code"] == PROJECT["urls"]["Repository"] and citation["license"] == PROJECT["license"]


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_links_in_the_readmes_lead_somewhere(readme):
    text = (paths.ROOT / readme).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (paths.ROOT / target).exists(), target


# What people type: the Makefile and every command line of the docs

DOCUMENTED = ("README.md", "README.zh.md", "docs/DEPLOY.md", "CONTRIBUTING.md")
COMMAND = re.compile(r"^(?:make|python|pip) .*?(?=\s+#|$)", re.MULTILINE)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Runs the Makefile in an environment whose python only says with what it was called: (words, other output)."""
    project = tmp_path_factory.mktemp("a project")
    shutil.copy(paths.ROOT / "Makefile", project)
    for name in ("pyproject.toml", "constraints.txt"):
        (project / name).touch()
    there = project / "my $env"
    (there / "bin").mkdir(parents=True)
    (there / "bin/python").write_text('#!/bin/sh\nprintf "%s\\0" "$@" >> "$SAID"\n')
    (there / "bin/python").chmod(0o755)

    def call(*words: str, **environment: str) -> list[list[str]]:
        said = project / "said"
        said.unlink(missing_ok=True)
        (there / ".llmprod-ready").touch()
        clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "CONDA_PREFIX")}
        clean |= {"VIRTUAL_ENV": str(there), "SAID": str(said)} | environment
        done = subprocess.run(["make", *words], cwd=project, env=clean, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert sorted(path.name for path in project.iterdir() if path != said) == sorted(
            ["Makefile", "constraints.txt", "my $env", "pyproject.toml"]
        ), "nothing else was made"
        calls = said.read_text().split("-m\0")[1:] if said.exists() else []
        return [one.rstrip("\0").split("\0") for one in calls]

    return call


def parsed(words: list[str]):
    """What `python -m llmprod` makes of its arguments: the options, and the parameters of the run."""
    options = parser().parse_args(words)
    if hasattr(options, "params"):
        chosen(options)
    elif options.command == "study":
        assert set(options.names) <= {*study.declared(), "name"}
    return options


@pytest.mark.parametrize("document", DOCUMENTED)
def test_every_documented_command_is_one_that_exists(document, make):
    """Each is called, up to the program behind it, or parsed, with its parameters."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", (paths.ROOT / document).read_text(), re.DOTALL))
    if document == "CONTRIBUTING.md":  # its commands stand in the text
        text = "\n".join(re.findall(r"`((?:make|python) [^`]+)`", (paths.ROOT / document).read_text()))
    commands = COMMAND.findall(text)
    assert commands
    for command in commands:
        program, *words = shlex.split(command.partition(" < ")[0])
        if program == "pip":
            assert set(re.search(r"\[(.*)\]", words[-1])[1].split(",")) <= set(EXTRAS), command
            continue
        calls = make(*words) if program == "make" else [words[1:]]
        for module, *rest in calls:
            assert importlib.util.find_spec(module), f"{command}: {module}"
            if module == "llmprod":
                parsed(rest)


@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map("x".__add__)
)  # make strips spaces before
@example("$(touch made)`touch made`$HOME")
@example("'; touch made; '")
@example('"; touch made; "')
@example("$(shell touch made) a\\ b #x")
@settings(max_examples=20)
def test_make_hands_variables_on_as_they_are(make, text):
    """Neither make nor a shell reads them, not even where the environment's path holds a space and a dollar."""
    assert make("run", f"PARAMS={text}", f"NOTEBOOK={text}", f"PROFILE={text}") == [
        ["llmprod", "run", f"--notebook={text}", f"--profile={text}", f"--params={text}"]
    ]
    assert make("serve", STORE=text) == [["llmprod", "serve", f"--store={text}", "--page"]]


def test_every_target_quotes_what_users_write(make):
    bad = "$(touch made)`touch made`;touch made"
    for target in ("reproduce", "iterate", "verify", "report", "bench", "reference", "study", "check", "lab"):
        variables = dict.fromkeys(("PROFILE", "NOTEBOOK", "STUDY", "BENCH", "PARAMS", "SEEDS", "SAMPLE", "STORE"), bad)
        assert make(target, **variables) and make(target, *(f"{name}={value}" for name, value in variables.items()))
    assert make("study", STUDY="methods rates") == [["llmprod", "study", "methods", "rates", "--engine=local"]]
    assert make("study", ENGINE=bad) == [["llmprod", "study", f"--engine={bad}"]]


def test_workflows_name_actions_by_commit():
    """A tag can be moved to other code."""
    for path in (paths.ROOT / ".github/workflows").glob("*.yml"):
        for action in re.findall(r"uses: (\S+)", path.read_text()):
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action


def test_the_nightly_target_tries_more():
    assert settings.get_profile("nightly").max_examples == 2000 and settings.get_profile("llmprod").max_examples == 100
    assert "-m hypothesis --hypothesis-profile nightly" in (paths.ROOT / "Makefile").read_text()


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in (paths.ROOT / ".ci/run").read_text() and "make test" in (paths.ROOT / "README.md").read_text()


def test_both_readmes_tell_the_same():
    english, chinese = ((paths.ROOT / name).read_text() for name in ("README.md", "README.zh.md"))
    for pattern in (r"^#+ ", r"^```", r"<!-- generated: \w+ -->"):
        assert len(re.findall(pattern, english, re.MULTILINE)) == len(re.findall(pattern, chinese, re.MULTILINE)), (
            pattern
        )
    commands = re.compile(r"^(?:make|python|git|pip|conda) .*?(?=\s+#|$)", re.MULTILINE)
    assert commands.findall(english) == commands.findall(chinese)


def test_no_secret_home_path_or_large_file_is_committed():
    secret = re.compile(rb"(?:hf_[A-Za-z0-9]{30}|ghp_[A-Za-z0-9]{30}|sk-[A-Za-z0-9]{30}|AKIA[A-Z0-9]{16})")
    for name in tracked():
        content = (paths.ROOT / name).read_bytes()
        assert len(content) < 5_000_000, name
        assert not secret.search(content), name
        assert not re.search(rb"/home/[a-z]+/|/Users/[a-z]+/", content) or name.startswith("tests/"), name


def test_no_data_set_is_committed_but_the_one_that_was_written_here():
    kinds = (".csv", ".tsv", ".tab", ".parquet", ".arrow", ".safetensors", ".jsonl")
    # predictions name their texts by fingerprints
    ours = ("reports/studies/", "reports/reference/examples/", "llmprod/customer_service/support_desk")
    assert not [n for n in tracked() if n.endswith(kinds) and not n.startswith(ours)]
    card = (paths.ROOT / ours[2] / "README.md").read_text(encoding="utf-8")
    assert "invented for this project" in card and "Licence" in card


def test_nothing_pickled_is_loaded_and_no_remote_code_runs():
    sources = sorted(paths.PACKAGE.rglob("*.py"))
    assert len(sources) > 60, "the rooms are among them"
    for path in sources + sorted(paths.NOTEBOOKS.glob("*.ipynb")):
        text = path.read_text()
        assert not re.search(r"torch\.load\(|pickle\.load|joblib\.load|shell=True|os\.system\(", text), path.name
        assert "trust_remote_code=True" not in text, path.name


def test_style():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_file_or_function_without_a_reader():
    assert dead_code() == []


def test_dead_code_is_found(monkeypatch, tmp_path):
    (tmp_path / "orphan.py").write_text("def nobody_calls_me():\n    pass\n")
    monkeypatch.setattr(paths, "PACKAGE", tmp_path)
    assert "unused function 'nobody_calls_me'" in "".join(dead_code())


def test_outputs_are_stripped_before_a_commit_and_tags_stay(tmp_path):
    hook = yaml.safe_load((paths.ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"][-1]
    executed = json.loads((paths.NOTEBOOKS / "01_data.ipynb").read_text())
    committed = (paths.NOTEBOOKS / "01_data.ipynb").read_bytes()
    for cell in executed["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"execution_count": 7, "outputs": [{"output_type": "stream", "name": "stdout", "text": ["x"]}]}
    (tmp_path / "x.ipynb").write_text(json.dumps(executed))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run([*shlex.split(hook["entry"]), str(tmp_path / "x.ipynb")], check=True, env=environment)
    assert (tmp_path / "x.ipynb").read_bytes() == committed


def test_templates_are_yaml_with_a_name():
    for path in (paths.ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        template = yaml.safe_load(path.read_text())
        assert template["name"] and template["description"] and template["body"], path.name
