"""Fine-tuning by several processes on one machine, such as one for each GPU: data-parallel training (DDP).

Each process holds the whole model and takes its share of every batch; the gradients are averaged, so that together they
take the steps of one process, up to rounding. One that is killed costs what was learnt since the last epoch's end.
"""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import DatasetDict, load_from_disk
from safetensors.torch import load_file, save_file
from torch import distributed
from tqdm.auto import tqdm
from transformers import TrainerCallback

from llmprod import artifacts, files, workers
from llmprod.finetune import learn as alone
from llmprod.finetune import methods
from llmprod.finetune.callbacks import WEIGHTS
from llmprod.finetune.recipe import Recipe
from llmprod.models import ModelError

RESTARTS = 3  # times that all processes start again after one was killed
TASK, SPLITS, LOG, LEARNT = "task.json", "splits", "log.jsonl", "learnt.json"


def learn(
    splits: DatasetDict,
    labels: Sequence[str],
    recipe: Recipe,
    folder: Path,
    processes: int = 1,
    *,
    callbacks: Sequence[TrainerCallback] = (),
) -> alone.Learnt:
    """`learn.learn` in so many processes, with validation where all labels are used.

    In a folder in which the same was begun before and not finished, training goes on; the folder is deleted at the end.
    Contrastive terms compare a text with those of its process's share only.

    Args:
        processes: on a machine with GPUs at most as many as there are; each gets its part of the processors
        callbacks: only their `on_log` is called

    Raises ModelError for a strategy that trains more than once, for no processes or more than GPUs, and where processes
    are killed again and again; what `learn.learn` raises.
    """
    if processes == 1:
        return alone.learn(splits, labels, recipe, folder, callbacks=callbacks)
    if processes < 1 or recipe.strategy not in ("plain", "prototypes"):
        raise ModelError(f"{processes} processes can't train by '{recipe.strategy}': set processes to 1.")
    if (gpus := torch.cuda.device_count()) and processes > gpus:
        raise ModelError(f"processes is {processes}, but there are {gpus} GPUs: set it to {gpus} or less.")
    begin(splits, labels, recipe, folder)
    told = [0]
    with tqdm(total=recipe.epochs, desc=f"training, {processes} processes, epochs") as bar:
        for _ in range(RESTARTS + 1):
            if not (failed := together(folder, processes, lambda: tell(folder / LOG, told, callbacks, bar))):
                found = result(folder, labels, recipe)
                files.remove(folder)
                return found
            killed = any(isinstance(error.__cause__, BrokenExecutor) for error in failed)
            if not killed:
                raise failed[0]
    raise ModelError(f"A process of the training was killed {RESTARTS + 1} times: is there enough memory?")


def begin(splits: DatasetDict, labels: Sequence[str], recipe: Recipe, folder: Path) -> None:
    """Writes what is to be done into the folder; deletes what is there of another task."""
    data = {name: part._fingerprint for name, part in splits.items()}
    code = {path.name: artifacts.sha256(path) for path in sorted(Path(__file__).parent.glob("*.py"))}
    task = {"recipe": asdict(recipe), "labels": list(labels), "data": data, "code": code}
    if (folder / TASK).exists() and files.read_json(folder / TASK) == task:
        return
    files.remove(folder)
    splits.save_to_disk(folder / SPLITS)
    files.write_json(folder / TASK, task)


def together(folder: Path, processes: int, meanwhile: Callable[[], None]) -> list[Exception]:
    """Lets the processes work until all have ended; returns their errors."""
    files.remove(folder / "meeting")
    parts = [{"folder": str(folder), "number": number, "of": processes} for number in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        working = [pool.submit(workers.run, f"{__name__}:work", part, processes) for part in parts]
        try:
            while wait(working, timeout=0.5).not_done:
                meanwhile()
        except BaseException:  # stopped by hand: they would train on
            for process in multiprocessing.active_children():
                process.kill()
            raise
    meanwhile()
    return [error for error in (future.exception() for future in working) if error]


def work(part: dict) -> dict:
    """One process's work: `folder`, its `number`, how many there are `of`."""
    folder, number, of = Path(part["folder"]), part["number"], part["of"]
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    os.environ |= {"WORLD_SIZE": str(of), "LOCAL_WORLD_SIZE": str(of)}
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(number)
    # they meet by a file: by a port they would be open to the network
    distributed.init_process_group(backend, f"file://{folder / 'meeting'}", rank=number, world_size=of)
    task = files.read_json(folder / TASK)
    splits, recipe = load_from_disk(str(folder / SPLITS)), Recipe(**task["recipe"])
    settings = {"callbacks": [Tell(folder / LOG)], "progress": False, "resumable": True}
    found = alone.learn(splits, task["labels"], recipe, folder, **settings)
    if number == 0:
        save_file(methods.trained_state(found.predictor.model), folder / f"learnt-{WEIGHTS}")
        names = ("history", "trained_parameters", "seconds", "texts_per_second")
        files.write_json(folder / LEARNT, {name: getattr(found, name) for name in names})
    distributed.barrier()
    distributed.destroy_process_group()
    return {}


class Tell(TrainerCallback):
    """Writes what the Trainer logs, a line each, for the process that started this one."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs):
        """The library's hook."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "logs": logs}) + "\n")


def tell(log: Path, told: list[int], callbacks: Sequence[TrainerCallback], bar: tqdm) -> None:
    """Hands the new lines of `Tell` to the callbacks and the progress bar; `told[0]` counts those handed on."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    for line in lines[told[0] :]:
        if not line.endswith("\n"):
            return
        row = json.loads(line)
        for callback in callbacks:
            callback.on_log(None, SimpleNamespace(global_step=row["step"]), None, logs=row["logs"])
        bar.update(row["logs"].get("epoch", bar.n) - bar.n)
        told[0] += 1


def result(folder: Path, labels: Sequence[str], recipe: Recipe) -> alone.Learnt:
    """What the processes have learnt, as one process would return it."""
    predictor = alone.untrained(recipe, labels)
    found = files.read_json(folder / LEARNT)
    methods.prepare(predictor.model, recipe.method, found["history"][-1]["step"], recipe.embeddings)
    predictor.model.load_state_dict(load_file(folder / f"learnt-{WEIGHTS}"), strict=False)
    return alone.Learnt(predictor, **found)
