"""Ray: the cluster that $RAY_ADDRESS names, else one on this machine's loopback that ends with whoever started it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from llmprod import LLMProdError, machine
from llmprod.extras import extra

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray reads these while it is imported
os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # it would drop lines that resemble one another, such as a log of requests
if not os.environ.get("RAY_ADDRESS"):
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # so its ports are on loopback, whatever the system
with extra("ray"):
    import ray


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
        raise LLMProdError(f"Ray does not start: {error} Is the machine very busy? Then start it again.") from error
    try:
        yield
    finally:
        ray.shutdown()
