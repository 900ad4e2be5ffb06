"""A run's plan: what it would run and fetch, and whether the machine has room for it. Nothing is run or fetched."""

import ast
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
import torch

from llmprod import artifacts
from llmprod.harness import fingerprints, pipeline, reference, runner

ROOM = 2.0  # GB that the files of a run may take, without what is fetched


def notebooks(names: list[str], injected: Mapping[str, dict], profile: str, folder: Path) -> pd.DataFrame:
    """For each notebook: whether it would run, and minutes and memory of the reference, where the profile has one."""
    known, rows = reference.load(profile), []
    for name in names:
        measured, fresh = known.get(name, {}), runner.is_up_to_date(name, injected, folder)
        peak = measured.get("speeds", {}).get("peak memory, MB")
        rows.append(
            {
                "notebook": name,
                "runs": "no: nothing has changed" if fresh else "yes",
                "minutes": f"{measured['minutes']:.1f}" if measured.get("minutes") else "not measured",
                "memory, GB": f"{peak / 1000:.1f}" if peak else "not measured",
                "sets": ", ".join(f"{k}={v}" for k, v in injected[name].items()),
            }
        )
    return pd.DataFrame(rows)


def inputs(names: list[str], injected: Mapping[str, dict], tried: Mapping[str, str]) -> pd.DataFrame:
    """The artifacts that the notebooks' parameters or the code that they reach name: size, source, present or not.

    Also the models that are tried before their stand-ins: `tried`, from the one to the other.
    """
    users = {model: [f"tried before {other}"] for model, other in tried.items()}
    for notebook in names:
        for artifact in sorted(named(notebook, injected[notebook])):
            users.setdefault(artifact, []).append(notebook.partition("_")[0])
    rows = [
        {
            "artifact": name,
            "MB": sum(file.get("size", 0) for file in artifacts.entry(name)["files"].values()) / 1e6,
            "source": next(kind for kind in artifacts.SOURCES if kind in artifacts.entry(name)["sources"][0]),
            "present": artifacts.is_present(name),
            "for": ", ".join(users[name]),
        }
        for name in users
    ]
    return pd.DataFrame(rows, columns=["artifact", "MB", "source", "present", "for"])


def named(notebook: str, injected: Mapping[str, object]) -> set[str]:
    """The registered artifacts that a notebook's parameters or the code that it reaches name, but to compare with."""
    values = [value for value in (pipeline.declared(notebook) | injected).values() if isinstance(value, str)]
    tree = fingerprints.syntax_tree(code_of(notebook))
    statements = [*tree.body, *(s for used in fingerprints.statements(tree)[0].values() for s in used)]
    return {*values, *(text for statement in statements for text in texts(statement))} & set(artifacts.registry())


def code_of(notebook: str) -> str:
    """The code of a notebook without magics, and without the defaults of its parameters, which a run may replace."""
    cells = pipeline.read(notebook)["cells"]
    kept = [cell for cell in cells if "parameters" not in cell["metadata"].get("tags", [])]
    lines = "\n".join(pipeline.code_of({"cells": kept})).splitlines()
    return "\n".join(line for line in lines if not line.startswith("%"))


def texts(node: ast.AST) -> Iterator[str]:
    """The texts in code, other than those that something is compared with."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in () if isinstance(node, ast.Compare) else ast.iter_child_nodes(node):
        yield from texts(child)


def machine(profile: str, table: pd.DataFrame, found: pd.DataFrame, folder: Path) -> tuple[list[str], list[str]]:
    """What the machine has, in lines of text, and what it lacks for the run."""
    fetched = found.loc[~found["present"].astype(bool), "MB"].sum() / 1000
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    peak = pd.to_numeric(table["memory, GB"], errors="coerce").max()
    needed = "" if pd.isna(peak) else f", of which the largest notebook takes {peak:.1f}"
    has, lacks = [f"memory: {total:.0f} GB{needed}"], []
    if peak > total:
        lacks.append(
            f"{peak:.1f} GB of memory; there are {total:.0f}. Set fewer rows (train_rows=), or a smaller model."
        )
    for place, wanted in ((artifacts.cache_folder(), fetched), (folder, ROOM)):
        there = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(there).free / 1e9
        has.append(f"disk: {free:.0f} GB free for {runner.shown(place)}, which may take {wanted:.1f}")
        if wanted > free:
            lacks.append(f"{wanted:.1f} GB of disk for {runner.shown(place)}; {free:.1f} are free.")
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        bf16 = "has" if torch.cuda.is_bf16_supported() else "lacks"
        has.append(f"GPU: {card.name}, {card.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}; it {bf16} bfloat16")
    else:
        build = f"PyTorch {torch.__version__}"
        has.append(f"GPU: none that {build} can use")
        if profile == "gpu":
            why = "it is a build for processors" if torch.version.cuda is None else "its driver is missing or too old"
            lacks.append(f"a GPU: {build} finds none ({why}). On a processor the profile may take days.")
    return has, lacks
