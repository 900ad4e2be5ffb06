"""A service under load, compared with the same service that answers one text at a time: `make bench BENCH=load`.

The bundle of `05_deploy` is served from a process of its own; clients in another one ask for one validation text after
the other, each as soon as it has its answer. The peer gathers nothing: its budget of tokens holds one text. In the last
row another bundle is promoted a third of the way, and taken back at two thirds. Everything shares this machine's cores.

    python -m benchmarks.load [--run reports/cpu] [--clients 64] [--seconds 60]
"""

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx2
from tqdm.auto import tqdm

from llmprod.deploy import load
from llmprod.deploy.registry import Registry

OURS, PEER, EXCHANGE = "batches by token budget", "one text at a time", "batches, with an exchange and a roll-back"


def serve(folder: Path, tokens: int) -> None:
    """Serves a registry on a free port until it is stopped, with batches of so many tokens."""
    from llmprod import machine
    from llmprod.deploy import guard, service

    machine.set_threads()
    machine.quiet()
    service.run(service.build(Registry(folder), limits=guard.Limits(tokens=tokens)), "127.0.0.1", 0)


@contextlib.contextmanager
def served(folder: Path, tokens: int, log: Path) -> Iterator[str]:
    """The address of a service in a process of its own, once it is ready."""
    command = ["benchmarks.load", "--serve", str(folder), "--tokens", str(tokens)]
    process, url = load.serve(command, log)
    try:
        yield url
    finally:
        process.terminate()
        process.wait()


def exchange(url: str, registry: Registry, other: str, seconds: float) -> None:
    """Promotes another bundle a third of the way through a load test, and takes that back at two thirds."""
    for change in (lambda: registry.promote(other, "to measure"), lambda: registry.roll_back("measured")):
        time.sleep(seconds / 3)
        change()
        httpx2.post(f"{url}/reload", timeout=60).raise_for_status()


def measure(folder: Path, texts: Path, plan: Sequence[tuple[str, int]], seconds: float) -> list[dict]:
    """One row for each service and number of clients."""
    from llmprod.deploy.guard import Limits

    registry, rows = Registry(folder), []
    current = registry.state()["current"]
    other = next(path.name for path in folder.iterdir() if path.is_dir() and path.name != current)
    for name, count in tqdm(plan, desc="load tests"):
        with served(folder, 1 if name == PEER else Limits().tokens, texts.with_name("service.log")) as url:
            asking = load.start(url, texts, count, seconds)
            if name == EXCHANGE:
                exchange(url, registry, other, seconds)
            found = load.result(asking)
        bundles = {bundle for tenth in found.pop("timeline") for bundle in tenth}
        failed = found["requests"] - found.pop("status").get("200", 0)
        rows.append({"service": name, **found, "failed": failed, "bundles": len(bundles)})
    return rows


def ratios(rows: list[dict]) -> list[dict]:
    """Adds the ratio of requests a second to the peer's with as many clients, and of p99 to that of one client."""
    alone = {row["service"]: row["p99, ms"] for row in rows if row["clients"] == 1}
    peer = {row["clients"]: row["requests/s"] for row in rows if row["service"] == PEER}
    return [
        row
        | {
            "requests/s over one text at a time": row["requests/s"] / peer[row["clients"]],
            "p99 over one client's": row["p99, ms"] / alone.get(row["service"], alone[OURS]),
        }
        for row in rows
    ]


def main() -> None:
    """Serves, asks, prints the table and writes it down."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=Path, help="a run with 01_data and 05_deploy (default: reports/cpu)")
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--seconds", type=float, default=60.0, help="of each test (%(default)s)")
    options.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.serve:
        serve(options.serve, options.tokens)
        return

    import pandas as pd

    from benchmarks import record
    from llmprod import data, machine, paths
    from llmprod.harness import results

    print(machine.describe())
    run = options.run or paths.REPORTS / "cpu"
    splits, _, _ = data.prepared(run / "work" / "01_data" / "splits")
    with tempfile.TemporaryDirectory() as temporary:
        texts = Path(temporary) / "texts.json"
        texts.write_text(json.dumps(list(splits["validation"]["text"])[:500]), encoding="utf-8")
        plan = [(PEER, 1), (PEER, options.clients), (OURS, 1), (OURS, options.clients), (EXCHANGE, options.clients)]
        rows = measure(run / "work" / "05_deploy" / "served", texts, plan, options.seconds)
    rows = ratios(rows)
    print(results.markdown(pd.DataFrame(rows).round(2)))
    record("load", rows, seconds=options.seconds)


if __name__ == "__main__":
    main()
