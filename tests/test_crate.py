"""A run as an RO-Crate: what is in it, what it says, and that a crate is believed only as it was packed."""

import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rocrate.rocrate import ROCrate

from llmprod import LLMProdError, files, paths
from llmprod.__main__ import main
from llmprod.harness import crate, reference, results

NAME = "02_finetune"


def finished(folder, change=lambda result: None):
    """A finished run of one notebook, with the numbers of our reference for seed 0, and a figure."""
    ours = reference.load("cpu")[NAME]
    metrics = {name: metric | {"value": metric["value"]["0"]} for name, metric in ours["metrics"].items()}
    provenance = {"commit": "0" * 12, "source": "x", "parameters": {}, "minutes": 1.0, "machine": ours["machine"]}
    provenance |= {"device": "cpu", "versions": {"torch": "2"}, "peak memory, MB": 1000.0}
    result = {"notebook": NAME, "seed": 0, "metrics": metrics, "speeds": {}, "provenance": provenance}
    result |= {"protocol": ours["protocol"]}
    change(result)
    files.write_json(folder / f"results/{NAME}.json", result)
    (folder / "figures").mkdir()
    for name in (f"{NAME}.ipynb", next((paths.REFERENCE / "cpu/figures").glob(f"{NAME}-*")).name):
        place = name if name.endswith("ipynb") else f"figures/{name}"
        (folder / place).write_bytes((paths.REFERENCE / "cpu" / place).read_bytes())
    (folder / "README.md").write_text("# The report\n")
    files.write_json(folder / f"work/{NAME}/done.json", {"fingerprint": "x", "seal": results.seal(folder, NAME)})
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return crate.pack(finished(folder / "cpu"), folder / "run.zip")


def rewritten(packed, target, change):
    """The crate with a change made to its files, name -> content."""
    with zipfile.ZipFile(packed) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    change(content)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return target


def test_a_crate_says_what_was_made_from_what(packed):
    """Read by the library, as archives read it."""
    found = ROCrate(packed)
    (action,) = [entity for entity in found.get_entities() if entity.type == "CreateAction"]
    made = {entity.id for entity in action["result"]}
    assert {f"results/{NAME}.json", f"{NAME}.ipynb", f"work/{NAME}/done.json"} < made
    assert any(name.startswith("figures/") for name in made)
    (model,) = [entity for entity in action["object"] if entity.id == "#minilm"]
    assert model["license"] == "Apache-2.0" and "model.safetensors" in model["sha256"]
    assert action["instrument"]["softwareVersion"] == "0" * 12
    assert "torch==" in zipfile.ZipFile(packed).read("environment.txt").decode()


def test_somebody_elses_run_is_judged_from_its_crate(packed, tmp_path, monkeypatch, capsys):
    assert main(["verify", str(packed)]) == 0
    told = capsys.readouterr().out
    assert "REPRODUCED" in told and "DRIFTED" not in told and "MISSING" not in told

    def worse(result):
        result["metrics"]["validation accuracy"]["value"] -= 0.1

    drifted = crate.pack(finished(tmp_path / "cpu", worse), tmp_path / "drifted.zip")
    assert main(["verify", str(drifted)]) == 1 and "DRIFTED" in capsys.readouterr().out

    def other(result):
        result["protocol"]["epochs"], result["provenance"]["parameters"] = 99, {"epochs": 99}

    set_there = crate.pack(finished(tmp_path / "own/cpu", other), tmp_path / "own.zip")
    assert main(["verify", str(set_there)]) == 0 and "epochs: 99" in capsys.readouterr().out

    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    assert main(["crate", "--profile", "cpu", str(tmp_path / "again.zip")]) == 0
    assert main(["verify", str(tmp_path / "again.zip")]) == 1
    assert main(["crate", "--profile", "smoke", str(tmp_path / "none.zip")]) == 2
    assert "No finished run" in capsys.readouterr().err and not (tmp_path / "none.zip").exists()


def test_a_run_that_was_changed_is_not_packed(tmp_path):
    folder = finished(tmp_path / "cpu")
    path = folder / f"results/{NAME}.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(LLMProdError, match=r"02_finetune\.json changed after the run"):
        crate.pack(folder, tmp_path / "run.zip")


def renamed(content, old, new):
    """The file under another name, in the description too."""
    content[new] = content.pop(old)
    content[crate.DESCRIPTION] = content[crate.DESCRIPTION].replace(f'"{old}"'.encode(), f'"{new}"'.encode())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update({"README.md": b"# Other\n"}), "README.md was changed"),
        (lambda c: c.update({"more.txt": b"x"}), "more.txt is missing or not described"),
        (lambda c: c.pop("README.md"), "README.md is missing or not described"),
        (lambda c: renamed(c, "README.md", "../README.md"), "missing or not described"),
        (lambda c: renamed(c, "README.md", "/tmp/README.md"), "missing or not described"),
        (lambda c: c.pop(crate.DESCRIPTION), "can't be read"),
        (lambda c: c.update({crate.DESCRIPTION: b"{" * 100_000}), "can't be read"),
        (lambda c: c.update({crate.DESCRIPTION: b'{"@graph": [{"@id": "./", "name": "llmprod run .."}]}'}), "can't be"),
    ],
)  # fmt: skip
def test_a_crate_that_was_changed_is_refused(packed, tmp_path, change, words, capsys):
    broken = rewritten(packed, tmp_path / "broken.zip", change)
    assert main(["verify", str(broken)]) == 2
    told = capsys.readouterr().err
    assert words in told and "broken.zip" in told and told.count("\n") == 1
    assert not (tmp_path / "README.md").exists()


def test_a_crate_is_no_bomb(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(crate, "LARGEST", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big", b"0" * 10_000)
    assert main(["verify", str(tmp_path / "bomb.zip")]) == 2 and "holds more than" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "not there.zip")]) == 2
    (tmp_path / "text.zip").write_text("text")
    assert main(["verify", str(tmp_path / "text.zip")]) == 2


@settings(max_examples=100)
@given(st.data())
def test_flipped_bytes_are_noticed(packed, data):
    """Wherever they are: the crate is refused, or what is read is what was packed."""
    content = bytearray(packed.read_bytes())
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    content[place] ^= 1 << bit
    flipped = packed.with_name("flipped.zip")
    flipped.write_bytes(content)
    with crate.opened(packed) as whole:
        before = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    try:
        with crate.opened(flipped) as folder:
            after = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    except LLMProdError:
        return
    assert after == before
