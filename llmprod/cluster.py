"""Ray: the cluster that $RAY_ADDRESS names, else one on this machine's loopback that ends with whoever started it."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llmprod import LLMProdError, machine
from llmprod.extras import extra

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray reads these while it is imported
os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # it would drop lines that resemble one another, such as a log of requests
for check in ("READY", "HEALTH"):  # Serve would kill a proxy that a busy machine takes more than 5 s to start
    os.environ.setdefault(f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S", "60")
if not os.environ.get("RAY_ADDRESS"):
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # so its ports are on loopback, whatever the system
with extra("ray"):
    import ray


RETRIES = 3  # of a call whose node or process was lost; one that fails by itself is not tried again


def not_started(error: Exception) -> LLMProdError:
    """The error to raise where Ray, or a part of it, did not come up."""
    said = str(error).partition("\n")[0]
    return LLMProdError(f"Ray does not start: {said} Is the machine very busy? Then start it again.")


@contextmanager
def connected(processors: int = 1) -> Iterator[None]:
    """Connects to the cluster within the block. Raises LLMProdError if there is none at $RAY_ADDRESS, or none starts.

    Args:
        processors: that a local cluster has at least, so that as many of our processes find a place
    """
    options = {"logging_level": "ERROR"}
    if address := os.environ.get("RAY_ADDRESS", ""):
        host, _, port = address.rpartition(":")
        try:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError, ValueError) as error:
            raise LLMProdError(
                f"RAY_ADDRESS={address}: no Ray cluster answers there, as host:port ({error})."
            ) from error
    else:
        options |= {"address": "local", "include_dashboard": False, "num_cpus": max(processors, machine.cores())}
    try:
        ray.init(**options)
    except Exception as error:  # which is what Ray raises
        ray.shutdown()
        raise not_started(error) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def tasks(function: Callable, jobs: int = 0) -> Iterator[tuple[Callable, int]]:
    """Within the block, what calls a function on a node of the cluster, and how many calls run at a time.

    A call gets the `jobs`-th part of a node, its GPUs included; with 0 a processor, and a GPU where there are any. It
    raises what the function raises, and LLMProdError where it was lost again and again.
    """
    with connected():
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [node for node in nodes if node.get("GPU")] or [node for node in nodes if node.get("CPU")]
        processors = max(1, int(min(node.get("CPU", 1) for node in nodes) / jobs)) if jobs else 1
        gpus = min(node.get("GPU", 0) for node in nodes)
        gpus = gpus / jobs if jobs else min(1, gpus)
        gpus = int(gpus) if gpus > 1 else gpus  # Ray knows halves, no one and a half
        task = ray.remote(max_retries=RETRIES, num_cpus=processors, num_gpus=gpus)(function)

        def call(*arguments: object) -> object:
            try:
                return ray.get(task.remote(*arguments))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:
                raise LLMProdError(f"A run was lost {RETRIES + 1} times with its process or node: {error}") from error

        yield call, sum(int(node.get("CPU", 1) // processors) for node in nodes)
