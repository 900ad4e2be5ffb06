"""A tracked run: seeds, threads, versions and parameters at its start; numbers, tables and figures on the way.

Weights & Biases is offline unless `WANDB_API_KEY` is set, and TensorBoard gets the same numbers. `TRACKING=none`
turns both off.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from llmprod import LLMProdError, machine, paths
from llmprod.machine import SHOWN, git_commit, quiet, seed_everything, set_threads, versions

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
    device, precision, reason = machine.device_and_precision(parameters.get("precision", "auto"))
    print(f"Python {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in versions(SHOWN).items()))
    print(f"device {device.type}, precision {precision}: {reason}")
    return Run(notebook, parameters)


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
