"""Work in processes of its own: memory that is given back, several at a time, and none that outlives its parent."""

import importlib
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor

import torch

from llmprod import LLMProdError, machine


def run(name: str, parameters: dict, jobs: int = 1) -> dict:
    """The result of a function (`module:function`) from a process of its own, so that its peak memory is its own.

    It gets the `jobs`-th part of the processors, unless $OMP_NUM_THREADS says otherwise.

    Forked, if the system can, from a server that has imported everything and computed nothing: a fork of a process
    whose threads have worked would wait for them for ever. Not with a GPU: a library may use CUDA while it is imported
    (JAX does, which bm25s imports where it is installed), and no fork can use it after that. Raises LLMProdError where
    that process ends before it has a result.
    """
    forks = hasattr(os, "fork") and not torch.cuda.is_available()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([name.partition(":")[0]])
    with ProcessPoolExecutor(1, context, begin, (jobs,)) as pool:
        try:
            return pool.submit(function(name), parameters).result()
        except BrokenExecutor as error:
            message = f"The process of {name} ended before it had a result: is there enough memory?"
            raise LLMProdError(message) from error


def function(name: str) -> Callable[[dict], dict]:
    """The function that `module:function` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def begin(jobs: int) -> None:
    """Sets threads and log level, and ends this process with its parent: a killed command leaves nothing running."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores() // jobs)))
    machine.set_threads()
    machine.quiet()
