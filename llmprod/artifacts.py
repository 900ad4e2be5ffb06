"""Models and data by name: `fetch("minilm")` gives a local folder whose every file has the registered checksum."""

import ast
import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path

import platformdirs
import truststore
import yaml
from filelock import FileLock
from tqdm.auto import tqdm

from llmprod import DISK_ERRORS, LLMProdError

LARGEST = 2**30  # bytes of a download whose size is not registered
SLOWEST, PATIENCE = 20_000, 60  # bytes a second that a download must reach after these seconds


class ArtifactError(LLMProdError):
    """An artifact is unknown, damaged or unreachable."""


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
    """A fingerprint of data: of an artifact alone 12 hex digits of what is registered, else a whole sha256.

    That of files and folders is over the name, length and content of every file, and so over what is in which.
    """
    known = entry(source)["files"] if source in registry() else {}
    parts: list[object] = ["".join(known[file]["sha256"] for file in sorted(known))]
    if known and not any(more):
        return hashlib.sha256(parts[0].encode()).hexdigest()[:12]
    for name in ("" if known else source, *more):
        path = Path(os.path.expanduser(name))  # see `formats.read`
        found = sorted(path.rglob("*")) if name and os.path.isdir(path) else [path]
        top = path if os.path.isdir(path) else path.parent
        parts.append([(f.relative_to(top).as_posix(), f.stat().st_size, sha256(f)) for f in found if os.path.isfile(f)])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def checksums(folder: Path, but: Sequence[str]) -> dict[str, str]:
    """The sha256 of each file by its path in a folder, without those named `but`, hidden ones and remains of a kill.

    For a folder inside that has the first of `but`, a manifest of its own, that stands.
    """
    inner, found = {path.parent for path in folder.rglob(but[0])} - {folder}, {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        left_out = name in but or "/." in f"/{name}" or ".writing" in name
        if path.is_file() and not left_out and (path.name == but[0] or not inner & set(path.parents)):
            found[name] = sha256(path)
    return found


def differing(said: Mapping[str, str], found: Mapping[str, str]) -> str:
    """The names whose checksums differ, or that only one of the two has; "" if all agree."""
    return ", ".join(sorted(name for name in {*said, *found} if said.get(name) != found.get(name)))


def cache_folder() -> Path:
    """Where fetched artifacts are: `$LLMPROD_CACHE`, else the user's cache folder of this system."""
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

    def missing() -> list[str]:
        return [file for file in files if not is_intact(folder / file, files[file])]

    try:
        if not missing():  # asked before anything is written: a whole cache may be on a read-only mount
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_folder() / f"{name}.lock"):
            for left in cache_folder().glob(f".{name}-{8 * '?'}"):  # by a run that was killed
                shutil.rmtree(left)
            if wanted := missing():
                with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=f".{name}-") as temporary:
                    whole = obtain(name, wanted, Path(temporary))
                    for file in wanted:
                        (folder / file).parent.mkdir(parents=True, exist_ok=True)
                        os.replace(whole / file, folder / file)
    except OSError as error:
        raise ArtifactError(
            f"The cache folder {cache_folder()} can't be used for '{name}': {error.strerror or error}. Free some "
            "space or make it writable, or set LLMPROD_CACHE to another folder; its content is unchanged."
        ) from error
    return folder


def sha256(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_intact(path: Path, expected: dict) -> bool:
    """Whether a file is there with the registered checksum (of its LF form, where the entry says `newlines`)."""
    if not path.is_file():
        return False
    if expected.get("newlines"):
        return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest() == expected["sha256"]
    return sha256(path) == expected["sha256"]


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
        f"The artifact '{name}' could not be fetched. Tried:\n  - " + "\n  - ".join(tried) + "\n"
        f"Connect to the network and run again, or put the files into {cache_folder() / name}, "
        f"or set LLMPROD_MIRROR to a folder that holds {name}/{wanted[0]}."
    )


def sources(name: str) -> Iterator[tuple[str, Callable[[list[str], Path], object]]]:
    """(what to call it in a message, a function that puts the wanted files into a folder), in order."""
    mirror = os.environ.get("LLMPROD_MIRROR")
    if mirror:
        yield f"mirror {mirror}", partial(copy_files, Path(mirror) / name)
    for source in entry(name)["sources"]:
        kind = next(kind for kind in SOURCES if kind in source)
        yield f"{kind} {source[kind]}", partial(download, SOURCES[kind], source, entry(name)["files"])


def copy_files(folder: Path, wanted: list[str], target: Path) -> None:
    """Copies files out of the mirror."""
    for file in wanted:
        if not (folder / file).is_file():
            raise ArtifactError(f"it has no {folder.name}/{file}")
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, target / file)


def download(
    get: Callable[[dict, str, Path], Path], source: dict, known: Mapping[str, dict], wanted: list[str], target: Path
) -> None:
    """Downloads the wanted files, or the archive that holds them; its sha256 is checked before it is opened."""
    if "members" not in source:
        for file in wanted:
            get(source | {"size": known[file].get("size")}, file, target)
        return
    archive = get(source, source.get("archive", ""), target)
    if not is_intact(archive, source):
        raise ArtifactError(f"{archive.name} has another checksum than registered (cut or changed)")
    unpack(archive, source["members"], wanted, target)


def from_hub(source: dict, file: str, target: Path) -> Path:
    """Downloads a file of a Hugging Face hub repository at its pinned commit."""
    from huggingface_hub import constants, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        raise ArtifactError("HF_HUB_OFFLINE is set")
    repository = source["hub"].removeprefix("datasets/")
    kind = "model" if repository == source["hub"] else "dataset"
    whole = hf_hub_url(repository, file, repo_type=kind, revision=source["revision"])
    return from_url(source | {"url": whole.removesuffix(f"/{file}")}, file, target)


def from_url(source: dict, file: str, target: Path) -> Path:
    """Downloads a file over HTTP."""
    from unearth.link import Link

    client, _ = connect()
    with client:
        return transfer(client, Link(f"{source['url']}/{file}"), (target / file).parent, source.get("size"))


def from_package(source: dict, _: str, target: Path) -> Path:
    """Downloads a package's archive, wheel or source, from where pip would. Nothing of the package is built or run."""
    import httpx2
    from unearth import PackageFinder
    from unearth.errors import URLError

    (client, places), failed = connect(), {}
    with client:
        # Place after place, so that one that can't be reached hides no other; twice, as a connection may break.
        for number, place in enumerate(2 * places):
            try:  # a file that is read as data may be one for another Python, so its tags aren't compared
                finder = PackageFinder(client, ignore_compatibility=True, **place)
                for package in finder.find_matches(source["package"], hashes={"sha256": [source["sha256"]]}):
                    return transfer(client, package.link, target / f"place-{number}", source.get("size"))
                failed["no archive with this version and the registered checksum where pip looks"] = True
            except (ArtifactError, httpx2.HTTPError, httpx2.InvalidURL, URLError, ValueError) as error:
                failed[f"{type(error).__name__}: {error}"] = True
    raise ArtifactError("; ".join(failed) or "pip is told to look nowhere for packages (no-index)")


def from_pieces(source: dict, _: str, target: Path) -> Path:
    """Joins an archive that came in pieces, each a file of a source of its own; one piece lies there at a time."""
    whole = target / "joined"
    for piece in source["pieces"]:
        with tempfile.TemporaryDirectory(dir=target) as temporary:
            kind = next(kind for kind in SOURCES if kind in piece)
            try:
                download(SOURCES[kind], piece, {piece["file"]: piece}, [piece["file"]], Path(temporary))
            except ArtifactError as error:
                raise ArtifactError(f"{piece[kind]}: {error}") from error
            with Path(temporary, piece["file"]).open("rb") as part, whole.open("ab") as output:
                shutil.copyfileobj(part, output)
    return whole


SOURCES = {"package": from_package, "hub": from_hub, "url": from_url, "joined": from_pieces}


def transfer(client: object, link: object, folder: Path, size: int | None) -> Path:
    """Downloads one file into a folder with a progress bar (a local file stays where it is). Returns its path.

    Raises ArtifactError where it is longer than `size` bytes (None: `LARGEST`), or comes slower than `SLOWEST`.
    """
    import httpx2
    from unearth.errors import UnpackError
    from unearth.preparer import download_link

    limit, seconds = size or LARGEST, PATIENCE + (size or LARGEST) / SLOWEST
    clock = threading.Timer(seconds, client.close)  # a read that is under way fails then
    with tqdm(desc=link.filename, unit="B", unit_scale=True, leave=False) as bar:

        def show(_: object, done: int, total: int | None) -> None:
            if done > limit:
                raise ArtifactError(f"{link.filename} is longer than the {limit:,} bytes that it may have")
            bar.total = total
            bar.update(done - bar.n)

        try:
            clock.start()
            return download_link(client, link, folder, None, show)
        except (httpx2.HTTPError, UnpackError) as error:
            why = f"took more than {seconds:.0f} s" if not clock.is_alive() else f"{type(error).__name__}: {error}"
            raise ArtifactError(f"{link.filename} can't be downloaded ({why})") from error
        finally:
            clock.cancel()


def pip_settings() -> dict[str, str]:
    """pip's settings by name, from its files and its environment variables, which win."""
    command = [sys.executable, "-m", "pip", "config", "list", "--disable-pip-version-check"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        raise ArtifactError(f"pip can't say where packages come from: {listed.stderr.strip()}")
    lines = [line.partition("=")[::2] for line in listed.stdout.splitlines()]
    found = {}
    for section in ("global.", "download.", ":env:."):
        found |= {k.removeprefix(section): ast.literal_eval(v) for k, v in lines if k.startswith(section)}
    return found


def connect() -> tuple[object, list[dict]]:
    """A client that trusts, waits, goes through a proxy and signs in (by URL or netrc) as pip does; where pip looks.

    Each place is the arguments of a PackageFinder; without any, it looks at pip's default index.
    """
    from unearth.auth import MultiDomainBasicAuth
    from unearth.fetchers import PyPIClient

    settings = pip_settings()
    urls = [settings.get("index-url"), *settings.get("extra-index-url", "").split()]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        urls = []
    places = [{"find_links": [place]} for place in settings.get("find-links", "").split()]
    places += [{"index_urls": [url]} if url else {} for url in urls]
    context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if "cert" in settings:
        context.load_verify_locations(settings["cert"])
    client = PyPIClient(
        trusted_hosts=settings.get("trusted-host", "").split(),
        verify=context,
        timeout=float(settings.get("timeout", settings.get("default-timeout", 30))),
        proxy=settings.get("proxy"),
        follow_redirects=True,
        auth=MultiDomainBasicAuth(prompting=False, index_urls=filter(None, urls)),
    )
    return client, places


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
