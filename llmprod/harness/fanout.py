"""Studies on a Ray cluster: runs are spread over its nodes, and one that is lost with its node is run again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from filelock import FileLock

from llmprod import LLMProdError, cluster, machine
from llmprod.harness import study


@contextmanager
def workers(jobs: int = 1) -> Iterator[tuple[Callable, int]]:
    """What `study.run` takes as `cluster`: `study.measure` on a node of the cluster, and how many runs fit at a time.

    A run gets the `jobs`-th part of a node, as it does of one machine. Every node has the checkout, at the same path
    and commit; it prepares the splits and fetches the models that a run needs.
    """
    commit = machine.git_commit()
    with cluster.tasks(measured, jobs) as (call, places):
        yield lambda parameters, jobs: call(parameters, jobs, commit), places


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
