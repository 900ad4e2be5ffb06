"""A tracked run: seeds, threads, versions and parameters at its start; numbers, tables and figures on the way.

Weights & Biases is offline unless `WANDB_API_KEY` is set, and TensorBoard gets the same numbers. `TRACKING=none`
turns both off.
"""

import importlib.metadata
import os
import platform
import random
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import transformers

from llmprod import LLMProdError, models, paths

SHOWN = ("torch", "transformers", "datasets", "scikit-learn", "pandas", "numpy")
KINDS = (str, int, float, bool, type(None))


class Run:
    """One notebook's run: its parameters, its folder, and where its numbers, tables and figures go."""

    def __init__(self, notebook: str, parameters: dict):
        self.notebook, self.parameters = notebook, parameters
        self.seed = parameters["seed"]
        self.folder = paths.run_folder()
        self.work = self.folder / "work" / notebook
        self.work.mkdir(parents=True, exist_ok=True)
        self.wandb = self.tensorboard = None
        self.step = 0
        mode = os.environ.get("TRACKING", "on")
        if mode not in ("on", "none"):
            raise LLMProdError(f"TRACKING is '{mode}'; set it to 'none' to turn tracking off, or leave it out.")
        if mode == "on":
            self._open()

    def _open(self) -> None:
        """Starts W&B, without a word and without the network unless there is a key, and TensorBoard."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb
        from torch.utils.tensorboard import SummaryWriter

        def begin(mode: str) -> wandb.Run:
            quiet = {"silent": mode == "offline", "console": "off", "disable_git": True, "disable_code": True}
            return wandb.init(
                project=os.environ.get("WANDB_PROJECT", "llmprod"),
                name=f"{self.notebook}-{self.folder.name}-seed{self.seed}",
                group=git_commit(),
                job_type=self.notebook,
                config=self.parameters,
                dir=self.folder / "work",
                mode=mode,
                settings=wandb.Settings(x_disable_stats=True, **quiet),
            )

        try:
            self.wandb = begin("online" if os.environ.get("WANDB_API_KEY") else "offline")
        except wandb.errors.CommError as error:
            print(
                f"W&B can't be reached ({str(error).splitlines()[0]}): this run stays offline, `make sync` uploads it."
            )
            self.wandb = begin("offline")
        self.tensorboard = SummaryWriter(self.folder / "work" / "tensorboard" / self.notebook)

    def log(self, numbers: Mapping[str, float], step: int | None = None) -> None:
        """Logs numbers at a step of training (the next one, where none is given)."""
        self.step = self.step + 1 if step is None else step
        if self.wandb:
            self.wandb.log({**numbers, "step": self.step})
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, self.step)

    def figure(self, name: str, figure: plt.Figure) -> None:
        """Saves a figure as `figures/<notebook>-<name>.png` and logs it."""
        path = self.folder / "figures" / f"{self.notebook}-{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, bbox_inches="tight")
        if self.wandb:
            import wandb

            self.wandb.log({f"figures/{name}": wandb.Image(str(path))})
            self.tensorboard.add_figure(name, figure, close=False)

    def table(self, name: str, table: pd.DataFrame) -> None:
        """Logs a table."""
        if self.wandb:
            import wandb

            self.wandb.log({f"tables/{name}": wandb.Table(dataframe=table.astype(object).map(plain))})
            self.tensorboard.add_text(name, table.to_markdown())

    def finish(self, numbers: Mapping[str, float], config: dict[str, object]) -> None:
        """Closes the run with its final numbers (the run's summary) and the checksums it worked on."""
        if self.wandb:
            self.wandb.config.update(config)
            self.wandb.summary.update(dict(numbers))
            for name, value in numbers.items():
                self.tensorboard.add_scalar(f"results/{name}", value)
            self.tensorboard.close()
            self.wandb.finish()


def plain(value: object) -> object:
    """A value as a tracker's table takes it."""
    return value.item() if isinstance(value, np.generic) else value


def start(notebook: str, cell: Mapping[str, object]) -> Run:
    """Begins a notebook's run: seeds everything, sets the threads, prints versions, parameters and the device.

    Args:
        notebook: its name, without .ipynb
        cell: the notebook's `globals()`, just after its parameters cell: what holds a plain value is a parameter
    """
    parameters = {k: v for k, v in cell.items() if not k.startswith("_") and isinstance(v, KINDS)}
    seed_everything(parameters["seed"])
    set_threads()
    style()
    quiet()
    device, precision, reason = models.device_and_precision(parameters.get("precision", "auto"))
    print(f"Python {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in versions(SHOWN).items()))
    print(f"device {device.type}, precision {precision}: {reason}")
    return Run(notebook, parameters)


def quiet() -> None:
    """No warnings and bars of loading weights, which takes no time; training keeps its own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks for it


def set_threads() -> None:
    """Lets PyTorch use every processor that this process may use."""
    torch.set_num_threads(cores())


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


def style() -> None:
    """How every figure looks."""
    plt.rcParams.update(
        {
            "figure.figsize": (7, 4),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.alpha": 0.3,
            "axes.prop_cycle": plt.cycler(color=["#0b6e99", "#e07a1f", "#4f9d4f", "#b5446e", "#6b5b95", "#7f7f7f"]),
            "legend.frameon": False,
        }
    )


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The installed version of each package."""
    return {package: importlib.metadata.version(package) for package in packages}


def machine() -> str:
    """The machine in words: processor or GPU, cores, memory, system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.cpu.get_capabilities().get("cpu_name")
    return f"{name or platform.machine()}, {cores()} cores, {memory:.0f} GiB, {platform.system()}"


def git_commit() -> str:
    """The commit of the checkout, with a plus where files differ from it; "none" outside of a checkout."""
    try:
        command = ["git", "-C", str(paths.ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def peak_memory_mb() -> float:
    """The most memory this process has held so far, in MB (of the GPU where one is used)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def callback(run: Run):
    """A Trainer callback that hands every number the Trainer logs to the run."""
    from transformers import TrainerCallback

    class Track(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            run.log({k: float(v) for k, v in (logs or {}).items() if k != "epoch"}, step=state.global_step)

    return Track()


def sync() -> int:
    """Uploads every offline W&B run under `reports/` and `runs/`; needs `WANDB_API_KEY`. Returns how many."""
    if not os.environ.get("WANDB_API_KEY"):
        raise LLMProdError("WANDB_API_KEY is not set: there is no account to upload to.")
    folders = [f for top in (paths.REPORTS, paths.RUNS) for f in sorted(Path(top).rglob("offline-run-*")) if f.is_dir()]
    for folder in folders:
        subprocess.run([sys.executable, "-m", "wandb", "sync", str(folder)], check=True)
    return len(folders)
