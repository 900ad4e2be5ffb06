"""A run as an RO-Crate: packed with all that it takes to cite it, and judged from the crate alone.

RO-Crate (Soiland-Reyes et al. 2022, doi 10.3233/DS-210053) is a folder or zip file with a description of its files as
linked data; archives such as Zenodo read it. Written by the library `rocrate`; read as data, checked before it is used.
"""

import importlib.metadata
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmprod import LLMProdError, artifacts, files, formats
from llmprod.harness import results
from llmprod.harness.pipeline import pipeline
from llmprod.tables import shown

if TYPE_CHECKING:  # imported where a crate is written: reading one needs no library
    from rocrate.model.entity import Entity
    from rocrate.rocrate import ROCrate

DESCRIPTION = "ro-crate-metadata.json"
LARGEST = 500 * 2**20  # bytes of a crate's files together
FORMATS = {
    ".html": "text/html",
    ".ipynb": "application/x-ipynb+json",
    ".json": "application/json",
    ".md": "text/markdown",
    ".parquet": "application/vnd.apache.parquet",
    ".png": "image/png",
    ".txt": "text/plain",
}


def contents(folder: Path, notebook: str) -> list[str]:
    """The files of a run that belong to a notebook: what is sealed, the seal, page and figures."""
    figures = sorted(f"figures/{path.name}" for path in (folder / "figures").glob(f"{notebook}-*.png"))
    names = [*results.seal(folder, notebook), f"work/{notebook}/done.json", f"{notebook}.html", *figures]
    return [name for name in names if (folder / name).is_file()]


def inputs(protocol: dict) -> list[str]:
    """The registered models and data that a result's protocol names."""
    return sorted({value for value in protocol.values() if isinstance(value, str)} & set(artifacts.registry()))


def pack(folder: Path, target: Path) -> Path:
    """Writes a run as a zipped crate: notebooks, results, predictions, report, environment, and what it was made from.

    Raises LLMProdError where nothing was finished, or what was finished was changed since.
    """
    from rocrate.rocrate import ROCrate

    found = results.results(folder)
    if changed := [name for notebook in pipeline() for name in results.edited(folder, notebook)]:
        raise LLMProdError(f"{', '.join(changed)} changed after the run in {folder}: delete it and run again.")
    if not found:
        raise LLMProdError(f"No finished run is in {folder}: run `make reproduce` first.")
    crate = ROCrate()
    crate.name = f"llmprod run {folder.name}"
    crate.description = f"A run of {', '.join(found)}: executed notebooks, results and their provenance."
    crate.license = "https://www.apache.org/licenses/LICENSE-2.0"
    for notebook, result in found.items():
        add_action(crate, result, [add_file(crate, folder / name, name) for name in contents(folder, notebook)])
    with tempfile.TemporaryDirectory() as temporary, files.atomic(target) as writing:
        environment = Path(temporary) / "environment.txt"
        versions = {f"{one.name}=={one.version}" for one in importlib.metadata.distributions()}
        environment.write_text("".join(f"{line}\n" for line in sorted(versions, key=str.lower)), encoding="utf-8")
        for path in (environment, folder / "README.md", folder / "index.html"):
            if path.is_file():
                add_file(crate, path, path.name)
        crate.write_zip(writing)
    return target


def add_file(crate: "ROCrate", path: Path, name: str) -> "Entity":
    """Adds a file under a name, with its kind, size and sha256."""
    described = {"name": name, "encodingFormat": FORMATS[path.suffix], "contentSize": str(path.stat().st_size)}
    return crate.add_file(path, name, properties=described | {"sha256": artifacts.sha256(path)})


def add_action(crate: "ROCrate", result: dict, made: "list[Entity]") -> None:
    """Adds that a notebook made files, by which version, from which models and data, with its provenance."""
    stamp = result["provenance"]
    version = {"name": "llmprod", "softwareVersion": stamp["commit"]}
    words = {"name": f"{result['notebook']}, seed {result['seed']}", "description": json.dumps(stamp, sort_keys=True)}
    crate.add_action(
        add_about(crate, f"#llmprod-{stamp['commit']}", "SoftwareApplication", version),
        identifier=f"#{result['notebook']}",
        object=[add_input(crate, name) for name in inputs(result["protocol"])],
        result=made,
        properties=words,
    )


def add_input(crate: "ROCrate", name: str) -> "Entity":
    """Adds a registered model or data set, with licence, citation and the sha256 of each of its files."""
    entry = artifacts.entry(name)
    words = {"name": name, "description": entry["about"], "license": entry["licence"], "citation": entry["citation"]}
    sums = {file: said["sha256"] for file, said in entry["files"].items()}
    return add_about(crate, f"#{name}", "CreativeWork", words | {"sha256": json.dumps(sums)})


def add_about(crate: "ROCrate", identifier: str, kind: str, words: dict) -> "Entity":
    """Adds something that is no file, once."""
    from rocrate.model.contextentity import ContextEntity

    return crate.get(identifier) or crate.add(ContextEntity(crate, identifier, properties={"@type": kind, **words}))


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The run in a crate, unpacked for a while into a folder with the run's name. Raises LLMProdError as `unpack`."""
    with tempfile.TemporaryDirectory() as temporary:
        yield unpack(path, Path(temporary))


def unpack(path: Path, place: Path) -> Path:
    """Unpacks the run in a crate into a folder with the run's name, in a place of ours.

    Raises LLMProdError for what is no crate of a run, is larger than `LARGEST`, or has a file that is missing, is not
    described, or is not as the description says.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist() if not member.is_dir()}
            if sum(member.file_size for member in members.values()) > LARGEST:
                raise LLMProdError(f"{path} holds more than {LARGEST / 2**20:.0f} MB: it is no crate of a run.")
            described = description(json.loads(archive.read(members.pop(DESCRIPTION))))
            folder = place / described.pop("")
            for name in sorted(described | members):
                target = folder / name
                if not (name in members and name in described and target.resolve().is_relative_to(folder.resolve())):
                    raise LLMProdError(f"{path}: {name} is missing or not described. Ask for the crate again.")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(members[name]))
                if artifacts.sha256(target) != described[name]:
                    raise LLMProdError(f"{path}: {name} was changed after it was packed. Ask for the crate again.")
        return folder
    except (*formats.DAMAGED, LookupError, TypeError, AttributeError) as error:
        reason = shown(f"{type(error).__name__}: {error}", 200)
        raise LLMProdError(f"{path} can't be read as the crate of a run ({reason}).") from error


def description(metadata: dict) -> dict[str, str]:
    """The sha256 of each file that a crate describes, by its name; and, by "", the name of the run."""
    entities = {entity["@id"]: entity for entity in metadata["@graph"]}
    (name,) = re.findall(r"^llmprod run (\w[\w=.-]{0,99})$", entities["./"]["name"])
    return {"": name} | {name: one["sha256"] for name, one in entities.items() if one["@type"] == "File"}
