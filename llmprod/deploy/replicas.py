"""Where one machine ends: the same service as replicas on a Ray cluster; one that dies is replaced."""

import asyncio
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator

from llmprod import LLMProdError, cluster
from llmprod.deploy.guard import listen
from llmprod.extras import extra

with extra("serve"):
    from fastapi import FastAPI
    from prometheus_client import CollectorRegistry, Metric
with extra("ray"):
    import ray
    from ray import serve

NAME = "llmprod"  # of the application on the cluster


class Named:
    """Meters whose series carry the name of their replica: a scrape gets those of whichever replica answers it."""

    def __init__(self, registry: CollectorRegistry, replica: str):
        self.registry, self.replica = registry, replica

    def collect(self) -> Iterator[Metric]:
        """The meters, for `prometheus_client.generate_latest`."""
        for metric in self.registry.collect():
            metric.samples = [s._replace(labels=s.labels | {"replica": self.replica}) for s in metric.samples]
            yield metric


@serve.ingress()
class Replica:
    """The service in a process of its own, which Ray starts, checks, and replaces."""

    def __init__(self, build: Callable[[], FastAPI], folder: str):
        os.chdir(folder)  # so that names of files mean here what they meant to whoever typed them
        self.made = build()
        meters = self.made.state.service.meters
        meters.registry = Named(meters.registry, serve.get_replica_context().replica_id.unique_id)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application, for Ray."""
        return self.made

    async def check_health(self) -> None:
        """Raises BundleError where the bundle does not answer its frozen texts as it should: Ray then replaces it."""
        await asyncio.to_thread(self.made.state.service.batcher.bundle.check)


def run(build: Callable[[], FastAPI], host: str, port: int, number: int) -> None:
    """Serves replicas of an application until SIGTERM or Ctrl-C, then lets them answer what waits, and ends.

    Each has a processor, or $OMP_NUM_THREADS of them, and its part of the cluster's GPUs. Port 0 takes a free one.

    Raises LLMProdError for an application that can't be built, as `guard.listen` does, where the cluster serves
    something already, and where its nodes can't start the replicas.
    """
    service = build().state.service  # what is wrong with it is said now, and once
    with listen(service.limits, host, port) as listening:
        address, port = listening.getsockname()
    logging.getLogger("ray.serve").setLevel("WARNING")
    with cluster.connected(number):
        if serve.status().proxies:
            raise LLMProdError("The cluster at RAY_ADDRESS serves something already: end that (serve shutdown) first.")
        gpus = ray.cluster_resources().get("GPU", 0)
        deployment = serve.deployment(
            Replica,
            num_replicas=number,
            max_ongoing_requests=service.limits.waiting,  # the replica's own queue refuses more
            ray_actor_options={"num_cpus": 1, "num_gpus": 1 / math.ceil(number / gpus) if gpus else 0},
            graceful_shutdown_timeout_s=30,
            logging_config={"enable_access_log": False},  # the service has its own
        )
        ended = threading.Event()
        try:
            try:
                serve.start(http_options={"host": address, "port": port}, logging_config={"log_level": "WARNING"})
            except ray.exceptions.RayError as error:
                raise cluster.not_started(error) from error
            serve.run(deployment.bind(build, os.getcwd()), name=NAME)
            for kind in (signal.SIGTERM, signal.SIGINT):
                signal.signal(kind, lambda *_: ended.set())
            print(f"bundle {service.batcher.bundle.id} at http://{host}:{port}", flush=True)
            ended.wait()
            serve.delete(NAME)  # what waits is answered, while the proxy that carries it still lives
        except RuntimeError as error:
            raise LLMProdError(f"The replicas can't be started: {error}") from error
        finally:
            serve.shutdown()
