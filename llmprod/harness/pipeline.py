"""The pipeline: notebooks, parameters, profiles."""

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from functools import cache
from pathlib import Path

import yaml

from llmprod import LLMProdError, artifacts, paths
from llmprod.tables import shown


def pipeline() -> dict[str, dict]:
    """The notebooks in their order, with what each needs, as `notebooks/pipeline.yaml` lists them."""
    return mapping(paths.NOTEBOOKS / "pipeline.yaml")


class Texts(yaml.BaseLoader):
    """Reads every value as the text that it is, and refuses a name that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping. Raises yaml.YAMLError for a name that stands twice, since one of the values would be lost."""
        names = [key.value for key, _ in node.value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.constructor.ConstructorError(problem=f"{twice} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


UNREADABLE = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


def mapping(path: Path, loader: type = yaml.SafeLoader) -> dict[str, dict]:
    """The content of a YAML file that maps names to mappings. Raises LLMProdError, with the place, if it does not."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LLMProdError(f"{path} can't be read: {error.strerror}.") from None
    return parsed(path, content, loader)


@cache
def parsed(path: Path, content: bytes, loader: type) -> dict[str, dict]:
    """The content of `mapping`, parsed once: every row of a study asks for it."""
    try:
        found = yaml.load(content, loader) or {}
    except UNREADABLE as error:
        raise LLMProdError(f"{path} is not YAML: {shown(' '.join(str(error).split()), 500)}") from None
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise LLMProdError(f"{path} must hold names, each with a mapping, such as 02_finetune: {{epochs: 1}}.")
    return found


# Parameters


LARGEST = 2**63 - 1
SHARES = (
    "validation_share", "test_share", "near_duplicate_threshold", "planted_errors", "warmup", "dropout", "augment",
    "label_smoothing", "least_agreement", "precision_wanted", "corrects", "complains", "mistakes", "baseline",
)  # fmt: skip
COUNTS = ("max_length", "epochs", "batch_tokens", "resamples", "trials", "k")
RANGES = dict.fromkeys(SHARES, (0, 1)) | dict.fromkeys(COUNTS, (1, LARGEST)) | {"seed": (0, 2**32 - 1)}  # else from 0
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list of texts"}
WORD = re.compile(r"""\s*(\w+)=("[^"]*"|'[^']*'|[^\s"']\S*|)(?=\s|$)""")


@cache
def declared(notebook: str) -> dict[str, object]:
    """The parameters of a notebook and their defaults (its profile `cpu`). Raises LLMProdError if they aren't plain."""
    cells = [c for c in read(notebook)["cells"] if "parameters" in c["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise LLMProdError(f"{notebook}.ipynb needs exactly one cell with the tag 'parameters' and has {len(cells)}.")
    try:
        return {s.targets[0].id: ast.literal_eval(s.value) for s in ast.parse("".join(cells[0]["source"])).body}
    except (ValueError, SyntaxError, AttributeError):
        raise LLMProdError(
            f"{notebook}.ipynb: its cell 'parameters' may hold only names with plain values: epochs = 2."
        ) from None


def read(notebook: str) -> dict:
    """A notebook, from its file, as JSON: its own library, nbformat, takes every kernel two seconds to import.

    Raises LLMProdError, with the known names, for an unknown one, or if it is damaged.
    """
    if notebook not in pipeline():
        raise LLMProdError(f"There is no notebook '{shown(notebook)}'; there are: {', '.join(pipeline())}.")
    path = paths.NOTEBOOKS / f"{notebook}.ipynb"
    try:
        found = json.loads(path.read_bytes())
        code_of(found)
        return found
    except (ValueError, OSError, LookupError, TypeError, AttributeError) as error:
        raise LLMProdError(f"{path} can't be read as a notebook ({type(error).__name__}).") from None


SKIP = "skip"  # of a notebook in a profile: true where it is no part of it


def profile(name: str) -> dict[str, dict]:
    """The parameters that a profile overrides: notebook -> name -> value. Raises LLMProdError for an unknown one."""
    files = {path.stem: path for path in sorted(paths.PROFILES.glob("*.yaml"))}
    if name not in files:
        raise LLMProdError(f"There is no profile '{shown(name)}'; there are: {', '.join(files)}.")
    overrides = {}
    for notebook, values in mapping(files[name], Texts).items():
        if notebook not in pipeline():
            raise LLMProdError(f"{name}.yaml: no notebook '{shown(notebook)}'; there are: {', '.join(pipeline())}.")
        values = {name: value for name, value in values.items() if name != SKIP}
        if unknown := sorted(set(values) - set(declared(notebook))):
            raise LLMProdError(f"{name}.yaml: {notebook} has no parameter {shown(', '.join(unknown))}.")
        overrides[notebook] = converted(values, declared(notebook), f"{name}.yaml: {notebook}")
    return overrides


def notebooks_of(profile_name: str) -> list[str]:
    """The notebooks of a profile in their order, without those that it skips. Raises LLMProdError if it is unknown."""
    profile(profile_name)
    listed = mapping(paths.PROFILES / f"{profile_name}.yaml", Texts)
    asked = {name: values.get(SKIP, False) for name, values in listed.items()}
    skipped = [name for name, value in asked.items() if convert(SKIP, value, False, f"{profile_name}.yaml: {name}")]
    return [name for name in pipeline() if name not in skipped]


def converted(values: Mapping[str, object], defaults: Mapping[str, object], where: str) -> dict[str, object]:
    """Values in the kind of their defaults: a text stays the text it is, 3e-4 is a number.

    Raises LLMProdError, which says where it was set, for a value of another kind or outside of its range.
    """
    return {name: convert(name, value, defaults[name], where) for name, value in values.items()}


def convert(name: str, value: object, default: object, where: str) -> object:
    """One value of `converted`."""
    kind = list if isinstance(default, tuple) else type(default)
    low, high = RANGES.get(name, (0, LARGEST))
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind in (int, float):
            number = Decimal(str(value))  # exact, and 1e999999999 takes no memory
            if low <= number <= high and (kind is float or number == int(number)):
                return kind(number)
        elif kind is list:
            texts = yaml.safe_load(value) if isinstance(value, str) else value
            if isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts):
                return list(texts)
        elif isinstance(value, str):
            value.encode()  # a name that isn't UTF-8 could be written into no notebook
            return value
    except (ArithmeticError, *UNREADABLE):
        pass
    limits = "" if kind not in (int, float) else f" from {low} to {high}" if high < LARGEST else f" of at least {low}"
    raise LLMProdError(f"{where}: {name} is {shown(repr(value))}; it takes {KINDS[kind]}{limits}, such as {default!r}.")


def parse_parameters(text: str, notebooks: Iterable[str]) -> dict[str, object]:
    """`"epochs=2 dataset='my file.csv'"` as a dict, in the kinds that the notebooks of the run declare.

    Raises LLMProdError for what is not name=value, for a name that none of the notebooks declares, and for a name that
    is there twice.
    """
    found, position, text = {}, 0, text.strip()
    defaults = {name: value for notebook in notebooks for name, value in declared(notebook).items()}
    while position < len(text):
        if not (word := WORD.match(text, position)):
            raise LLMProdError(
                f"PARAMS: {text[position:].split()[0]!r} is not name=value, or a quote in it is not closed; write for "
                "example PARAMS=\"epochs=2 dataset='my file.csv'\"."
            )
        name, value = word.groups()
        if name not in defaults:
            known = ", ".join(sorted(defaults))
            raise LLMProdError(f"PARAMS: no notebook of this run has a parameter {name}; there are: {known}.")
        if name in found:
            raise LLMProdError(f"PARAMS: {name} is set twice.")
        found[name] = value[1:-1] if value[:1] in ("'", '"') else value
        position = word.end()
    return converted(found, defaults, "PARAMS")


# Notebooks and their order


def code_of(notebook: Mapping) -> list[str]:
    """The code cells of a notebook, without the parameters that a run injected and without the set-up cell."""
    skipped = {"injected-parameters", "setup"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in code if not skipped & set(cell["metadata"].get("tags", []))]


def source_hash(notebook: str) -> str:
    """A fingerprint of a notebook's code."""
    return hashlib.sha256(json.dumps(code_of(read(notebook))).encode()).hexdigest()


def settings(profile_name: str, parameters: Mapping[str, object]) -> dict[str, dict]:
    """The values to inject into each notebook: the profile's overrides, then those parameters that it declares.

    Of the overrides, a model that is not there may have a stand-in (`replaced`).
    """
    overrides, others = profile(profile_name), replaced(profile_name, parameters)
    return {
        notebook: {k: others.get((k, str(v)), v) for k, v in overrides.get(notebook, {}).items()}
        | {k: v for k, v in parameters.items() if k in declared(notebook)}
        for notebook in pipeline()
    }


def replaced(profile_name: str, parameters: Mapping[str, object]) -> dict[tuple[str, object], str]:
    """The models of a profile that are not in the cache and have another in their place (`instead` in artifacts.yaml).

    By the name of the parameter and the model; not where a run sets that parameter itself.
    """
    values = [pair for values in profile(profile_name).values() for pair in values.items()]
    pairs = {(name, str(value)) for name, value in values if name not in parameters}
    known = {pair: artifacts.entry(pair[1]).get("instead") for pair in pairs if pair[1] in artifacts.registry()}
    return {pair: other for pair, other in known.items() if other and not artifacts.is_present(pair[1])}


def get_models(profile_name: str, parameters: Mapping[str, object]) -> None:
    """Fetches the models of `replaced`, and says of those that can't be had what takes their place."""
    for name, other in sorted({(pair[1], other) for pair, other in replaced(profile_name, parameters).items()}):
        try:
            artifacts.fetch(name)
        except artifacts.ArtifactError as error:
            print(f"{error}\n{other} takes the place of {name}; the results are NOT COMPARABLE with its.", flush=True)


def with_upstream(notebook: str) -> list[str]:
    """A notebook, preceded by all those that it needs. Raises LLMProdError for an unknown one."""
    read(notebook)
    needed = [name for upstream in pipeline()[notebook]["needs"] for name in with_upstream(upstream)]
    return [*dict.fromkeys(needed), notebook]
