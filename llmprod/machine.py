"""The machine: device, precision, threads, seeds, versions, memory."""

import importlib.metadata
import os
import platform
import random
import subprocess
import sys
import unicodedata
import warnings
from contextlib import AbstractContextManager
from functools import cache

import numpy as np
import torch
import transformers

from llmprod import LLMProdError, paths


def device_and_precision(precision: str = "auto") -> tuple[torch.device, str, str]:
    """Chooses the device and the number format, and says why.

    Args:
        precision: "fp32", "bf16" (matrix products in bfloat16, weights and everything else in float32), or "auto":
            bf16 on a GPU that has it, fp32 on a processor, where some multiply bf16 faster, but with it the same seed
            gives other results than on the next machine

    Returns device, precision and the reason for the two, for people to read.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise LLMProdError(f"precision is '{precision}'; use 'auto', 'fp32' or 'bf16'.")
    if torch.cuda.is_available():
        device, name, has_bf16 = torch.device("cuda"), torch.cuda.get_device_name(), torch.cuda.is_bf16_supported()
    elif torch.backends.mps.is_available():
        device, name, has_bf16 = torch.device("mps"), "Apple GPU", False
    else:
        can, threads = torch.cpu.get_capabilities(), torch.get_num_threads()
        device, name = torch.device("cpu"), f"{can.get('cpu_name') or can.get('architecture')}, {threads} threads"
        has_bf16 = False
    if precision == "auto":
        reason = "the GPU has bfloat16" if has_bf16 else "float32, as on every processor"
        return device, "bf16" if has_bf16 else "fp32", f"{name}; {reason}"
    return device, precision, f"{name}; {precision} was asked for"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which a forward pass uses the precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


SHOWN = ("torch", "transformers", "datasets", "scikit-learn", "pandas", "numpy")


def quiet() -> None:
    """Silences warnings and progress bars of loading weights, which takes no time; training keeps its own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks for it


def drawable(figure: object) -> None:
    """Gives a figure's texts the installed fonts that have the characters which the usual one lacks.

    A script that no installed font has is named, once in a process; its characters are boxes.

    Args:
        figure: a figure of matplotlib
    """
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.text import Text

    with warnings.catch_warnings(action="ignore"):  # a line for each character
        figure.draw_without_rendering()  # makes the labels of the ticks
    texts, families = figure.findobj(Text), [*matplotlib.rcParams["font.family"]]

    def has(file: str) -> set[int]:
        return set(font_manager.get_font(file).get_charmap())

    lacking = {ord(character) for text in texts for character in text.get_text() if not character.isspace()}
    lacking -= has(font_manager.findfont(font_manager.FontProperties(family=families)))
    for font in font_manager.fontManager.ttflist if lacking else ():
        if not font.name.startswith("Last Resort") and (found := lacking & has(font.fname)):  # that has boxes for all
            families.append(font.name)
            lacking -= found
    for text in texts:
        text.set_fontfamily(families)
    if lacking:
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        say_once(", ".join(sorted({unicodedata.name(chr(code), "unnamed").split()[0] for code in lacking})))


@cache
def say_once(scripts: str) -> None:
    """Says that figures can't show some scripts."""
    print(f"Figures show boxes for {scripts}: no installed font has them. Install one (such as Noto Sans).")


def set_threads() -> None:
    """Lets PyTorch use every processor that this process may use, or as many as $OMP_NUM_THREADS says."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or cores()))


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch and asks for deterministic kernels.

    On a CPU two runs on one machine then give equal numbers; on a GPU a few kernels have no deterministic form.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The installed version of each package."""
    return {package: importlib.metadata.version(package) for package in packages}


def describe() -> str:
    """The machine in words: processor or GPU, cores, memory, system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.cpu.get_capabilities().get("cpu_name")
    return f"{name or platform.machine()}, {cores()} cores, {memory:.0f} GiB, {platform.system()}"


def git_commit() -> str:
    """The commit of the checkout, with a plus if files differ from it; "none" outside of a checkout."""
    try:
        command = ["git", "-C", str(paths.ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def peak_memory_mb() -> float:
    """The peak memory of this process so far, in MB (GPU memory if there is one)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
