"""Studies on a Ray cluster: runs are spread over its nodes, and one that is lost with its node is run again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from filelock import FileLock

from llmprod import LLMProdError, cluster, machine
from llmprod.extras import extra
from llmprod.harness import study

with extra("ray"):
    import ray

RETRIES = 3  # of a run whose node or process was lost; one that fails by itself is not tried again


@contextmanager
def workers(jobs: int = 1) -> Iterator[tuple[Callable, int]]:
    """What `study.run` takes as `cluster`: `study.measure` on a node of the cluster, and how many runs fit at a time.

    A run gets the `jobs`-th part of a node, its GPUs included, as it does of one machine. Every node has the checkout,
    at the same path and commit; it prepares the splits and fetches the models that a run needs.
    """
    with cluster.connected():
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [node for node in nodes if node.get("GPU")] or [node for node in nodes if node.get("CPU")]
        processors = max(1, int(min(node.get("CPU", 1) for node in nodes) / jobs))
        gpus = min(node.get("GPU", 0) for node in nodes) / jobs
        part = {
            "num_cpus": processors,
            "num_gpus": int(gpus) if gpus > 1 else gpus,
        }  # Ray knows halves, no one and a half
        task, commit = ray.remote(max_retries=RETRIES, **part)(measured), machine.git_commit()

        def measure(parameters: Mapping[str, object], jobs: int) -> dict:
            try:
                return ray.get(task.remote(parameters, jobs, commit))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:
                raise LLMProdError(f"A run was lost {RETRIES + 1} times with its process or node: {error}") from error

        yield measure, sum(int(node.get("CPU", 1) // processors) for node in nodes)


def measured(parameters: Mapping[str, object], jobs: int, commit: str) -> dict:
    """The row of a run, on a node of the cluster. Raises LLMProdError if its checkout is not the commit asked for."""
    here, wanted = machine.git_commit().removesuffix("+"), commit.removesuffix("+")
    if here != wanted:
        raise LLMProdError(f"A node of the cluster has the commit {here}, not {wanted}: check that out on all nodes.")
    study.require_commit()
    if dataset := study.splits_of(parameters):
        study.work(dataset).mkdir(parents=True, exist_ok=True)
        with FileLock(study.work(dataset) / ".preparing"):  # several runs on a node may need them at once
            study.prepare(dataset)
    return study.measure(parameters, jobs)
