"""Tracking: a notebook's run with its seed, versions and parameters, and the numbers, tables and figures it logs.

Weights & Biases does what the user's `WANDB_MODE` or `WANDB_DISABLED` says; without them it is offline unless
`WANDB_API_KEY` is set. TensorBoard gets the same numbers. `TRACKING=none` turns both off.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker

from llmprod import LLMProdError, machine, paths

KINDS = (str, int, float, bool, type(None))
NO_REPORTS = ("WANDB_ERROR_REPORTING", "false")  # errors and timings of W&B's client would go to its makers
UNSENT = "unsent"  # a file in the folder of an online run that W&B did not take as a whole


class Silent:
    """A tracker that is turned off: whatever is asked of it, nothing happens."""

    def __getattr__(self, name: str) -> "Silent":
        return self

    def __call__(self, *arguments: object, **named: object) -> "Silent":
        return self


class Run:
    """One notebook's run: its parameters, its folder, and the trackers of its numbers, tables and figures."""

    def __init__(self, notebook: str, parameters: dict):
        self.notebook, self.parameters = notebook, parameters
        self.seed = parameters["seed"]
        self.folder = paths.run_folder()
        self.work = self.folder / "work" / notebook
        self.work.mkdir(parents=True, exist_ok=True)
        self.wandb = self.tensorboard = self.kinds = Silent()  # `kinds` has W&B's classes Image and Table
        self.patience, self.lost = 0.0, False  # seconds that W&B's service may take; whether it took longer, or failed
        self.step = 0
        mode = os.environ.get("TRACKING", "on")
        if mode not in ("on", "none"):
            raise LLMProdError(f"TRACKING is '{mode}'; set it to 'none' to turn tracking off, or leave it out.")
        if mode == "on":
            self._open()

    def _open(self) -> None:
        """Starts W&B, unless the user turned it off, and TensorBoard."""
        os.environ.setdefault(*NO_REPORTS)
        if not os.access(Path.home(), os.W_OK):  # where W&B would put its logs and copies
            for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
                os.environ.setdefault(name, str(self.folder / "work" / "wandb"))
        from torch.utils.tensorboard import SummaryWriter

        mode, settings = wandb_settings()
        if mode != "disabled":
            self._open_wandb(mode, settings)
        self.tensorboard = SummaryWriter(self.folder / "work" / "tensorboard" / self.notebook)

    def _open_wandb(self, mode: str, settings: dict[str, object]) -> None:
        """Starts W&B: silent while offline, and offline where it can't be reached."""
        import wandb

        def begin(mode: str) -> wandb.Run:
            quiet = {
                "silent": mode in ("offline", "dryrun"),
                "console": "off",
                "disable_git": True,
                "disable_code": True,
                "host": "",  # or it would be this machine's name
                "program": self.notebook,  # or the path of the file that runs
                "finish_timeout_raises": True,
            }
            return wandb.init(
                name=f"{self.notebook}-{self.folder.name}-seed{self.seed}",
                group=machine.git_commit(),
                job_type=self.notebook,
                config=self.parameters,
                dir=self.folder / "work",
                mode=mode,
                settings=wandb.Settings(x_disable_stats=True, x_disable_meta=True, **quiet, **settings),
            )

        try:
            self.wandb = begin(mode)
        except wandb.Error as error:
            reason = first_line(error)
            if mode in ("offline", "dryrun"):
                raise LLMProdError(f"W&B can't start ({reason}); WANDB_MODE=disabled does without it.") from None
            print(f"W&B can't be reached ({reason}): this run stays offline, `make sync` uploads it.")
            self.wandb = begin("offline")
        self.kinds, self.patience = wandb, self.wandb.settings.finish_timeout

    def _ask(self, what: str, do: Callable[[], object]) -> None:
        """Does what waits for W&B's service where it is online: for so long, and a failure costs the notebook nothing.

        A service that failed once is not asked again. W&B keeps the numbers on disk in any case, for `make sync`.
        """
        if self.wandb.offline:
            do()
            return
        if self.lost:
            return
        problems = []

        def attempt() -> None:
            try:
                do()
            except Exception as error:  # W&B's client raises errors of many kinds, ValueError among them
                problems.append(first_line(error))

        thread = threading.Thread(target=attempt, daemon=True)  # which holds up neither the notebook nor its end
        thread.start()
        thread.join(self.patience or None)  # 0 is no limit, as in W&B's own setting
        if thread.is_alive():
            problems.append(f"no answer in {self.patience:g} seconds")
        if problems:
            self.lost = True
            print(f"W&B did not take {what} ({problems[0]}): the run goes on without.")

    def log(self, numbers: Mapping[str, float], step: int | None = None) -> None:
        """Logs numbers at a step of training; by default the next one."""
        self.step = self.step + 1 if step is None else step
        self.wandb.log({**numbers, "step": self.step})
        for name, value in numbers.items():
            self.tensorboard.add_scalar(name, value, self.step)

    def figure(self, name: str, figure: plt.Figure) -> None:
        """Saves a figure as `figures/<notebook>-<name>.png` and logs it."""
        path = self.folder / "figures" / f"{self.notebook}-{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        plain_numbers(figure)
        machine.drawable(figure)
        figure.savefig(path, dpi=120, bbox_inches="tight")
        self.wandb.log({f"figures/{name}": self.kinds.Image(str(path))})
        self.tensorboard.add_figure(name, figure, close=False)

    def table(self, name: str, table: pd.DataFrame) -> None:
        """Logs a table."""
        shown = self.kinds.Table(dataframe=table.astype(object).map(python_value))
        self._ask(f"table {name}", lambda: self.wandb.log({f"tables/{name}": shown}))
        self.tensorboard.add_text(name, table.to_markdown())

    def lineage(self, made: Mapping[str, object], of: Sequence[Mapping[str, object]]) -> None:
        """Tells W&B what this run made and of what: a notebook's result is an artifact, those that it needs are used.

        W&B draws data, model, bundle and feedback as a graph from it. An artifact can be used online only; offline its
        metadata name what it was made of, by sha256, and `make sync` uploads them with it.
        """

        def content(result: Mapping[str, object]) -> str:
            return json.dumps({k: v for k, v in result.items() if k != "provenance"}, sort_keys=True)  # added later

        def artifact(result: Mapping[str, object], **metadata: object) -> object:
            name = re.sub(r"[^\w.-]", "-", f"{result['notebook']}-{self.folder.name}")[:128]
            found = self.kinds.Artifact(name, type="result", metadata=metadata)
            with found.new_file(f"{result['notebook']}.json", encoding="utf-8") as file:
                file.write(content(result))
            return found

        def tell() -> None:
            names = {result["notebook"]: hashlib.sha256(content(result).encode()).hexdigest() for result in of}
            self.wandb.log_artifact(artifact(made, made_of=names))
            for result in of if self.wandb.offline is False else ():
                self.wandb.use_artifact(artifact(result))

        if not isinstance(self.wandb, Silent):
            self._ask("the lineage", tell)

    def finish(self, numbers: Mapping[str, float], config: dict[str, object]) -> None:
        """Closes the run with its final numbers (the run's summary) and the checksums of data and model."""
        self.wandb.config.update(config)
        self.wandb.summary.update(dict(numbers))
        for name, value in numbers.items():
            self.tensorboard.add_scalar(f"results/{name}", value)
        self.tensorboard.close()
        try:
            self.wandb.finish()
        except TimeoutError:
            self.lost = True
        if self.lost:
            Path(self.wandb.dir).parent.joinpath(UNSENT).touch()
            print("W&B did not take the whole run; `make sync` uploads the numbers that it lacks.")


def python_value(value: object) -> object:
    """A NumPy scalar as the Python value that W&B's tables accept."""
    return value.item() if isinstance(value, np.generic) else value


def first_line(error: Exception) -> str:
    """What an error says, on one line; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def wandb_settings() -> tuple[str, dict[str, object]]:
    """W&B's mode, and further settings: the user's variables and settings decide, then whether there is a key.

    Raises LLMProdError where they hold what W&B can't take.
    """
    import wandb

    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "disabled", {}
    try:
        own = wandb.setup().settings
    except (ValueError, wandb.Error) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines() if "pydantic" not in line)
        raise LLMProdError(f"W&B can't take your WANDB_ variables ({reason}). A team's name is WANDB_ENTITY.") from None
    settings = {"project": own.project or "llmprod"}
    if "init_timeout" not in own.model_fields_set:
        settings["init_timeout"] = 15  # seconds; W&B's own 90 would pass in each notebook
    if "finish_timeout" not in own.model_fields_set:
        settings["finish_timeout"] = 60  # seconds; W&B's own is no limit, and a service that fails would hold the run
    mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    return own.mode if "mode" in own.model_fields_set else mode, settings


def start(notebook: str, cell: Mapping[str, object]) -> Run:
    """Begins a notebook's run: seeds everything, sets the threads, prints versions, device and precision.

    Args:
        notebook: its name, without .ipynb
        cell: the notebook's `globals()` just after its parameters cell; every plain value there is a parameter
    """
    parameters = {k: v for k, v in cell.items() if not k.startswith("_") and isinstance(v, KINDS)}
    machine.seed_everything(parameters["seed"])
    machine.set_threads()
    style()
    machine.quiet()
    device, precision, reason = machine.device_and_precision(parameters.get("precision", "auto"))
    versions = machine.versions(machine.SHOWN)
    print(f"Python {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    print(f"device {device.type}, precision {precision}: {reason}")
    return Run(notebook, parameters)


def style() -> None:
    """Sets the style of all figures, and lets styled tables show their texts as texts, not as HTML."""
    pd.set_option("styler.format.escape", "html")
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
            "text.parse_math": False,  # a dollar in a label is a dollar
        }
    )


def plain_numbers(figure: plt.Figure) -> None:
    """Labels logarithmic axes with plain numbers: matplotlib's are formulas, which `style` turns off."""
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(axis.get_major_formatter(), ticker.LogFormatter):
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.15g}"))
            axis.set_minor_formatter(ticker.NullFormatter())


def callback(run: Run):
    """A Trainer callback that hands every number the Trainer logs to the run."""
    from transformers import TrainerCallback

    class Track(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            run.log({k: float(v) for k, v in (logs or {}).items() if k != "epoch"}, step=state.global_step)

    return Track()


def sync() -> int:
    """Uploads the W&B runs under `reports/` and `runs/` that are offline or were cut off; needs `WANDB_API_KEY`.

    Returns their number. W&B marks what it uploaded: nothing is uploaded twice.
    """
    if not os.environ.get("WANDB_API_KEY"):
        raise LLMProdError("WANDB_API_KEY is not set; set it to the key of the account to upload to.")
    os.environ.setdefault(*NO_REPORTS)
    tops = [Path(paths.REPORTS), Path(paths.RUNS)]
    offline = [folder for top in tops for folder in top.rglob("offline-run-*") if folder.is_dir()]
    cut_off = [mark.parent for top in tops for mark in top.rglob(f"run-*/{UNSENT}")]
    folders = [folder for folder in sorted({*offline, *cut_off}) if not uploaded(folder)]
    for folder in folders:
        command = [sys.executable, "-m", "wandb", "sync", "--include-online", str(folder)]
        place = {"WANDB_DIR": str(folder.parent.parent)} | os.environ  # for its log, or that would be in the checkout
        # it exits with 0 where the key is refused
        if subprocess.run(command, env=place).returncode or not uploaded(folder):
            raise LLMProdError(f"W&B could not upload {folder} (see above); it is still there: run `make sync` again.")
    return len(folders)


def uploaded(folder: Path) -> bool:
    """Whether W&B marked a run's folder as uploaded."""
    return any(folder.glob("*.wandb.synced"))
