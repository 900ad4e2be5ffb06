"""Load tests: a service, and clients that ask it one text after the other, each in processes of their own.

`python -m llmprod.deploy.load http://127.0.0.1:8000 texts.json --clients 16 --seconds 5` prints "on" when it has the
first answer, then one line of JSON.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx2
import numpy as np

from llmprod import LLMProdError

READY = 300.0  # seconds that a service may take until it is ready: replicas on a busy machine need minutes
ON = "on"  # the first line of the process: the service has answered, the load begins


def serve(command: Sequence[str], log: Path, **environment: str) -> tuple[subprocess.Popen, str]:
    """Starts a service in a process of its own; returns the process and its address once the service is ready.

    Args:
        command: what follows `python -m`; it must print a line that ends with its address, as `llmprod serve` does
        log: the file that holds what it says besides
        environment: variables that it has besides this process's

    Raises LLMProdError, with the end of the log, where it ends before it is ready or takes longer than `READY` seconds.
    """
    with log.open("w", encoding="utf-8") as said:
        command = [sys.executable, "-m", *command]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, env=os.environ | environment
        )
    limit = threading.Timer(READY, process.kill)
    limit.start()
    try:
        url = process.stdout.readline().rpartition(" ")[2].strip()
        while process.poll() is None:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{url}/ready").status_code == 200:
                    return process, url
            time.sleep(0.1)
    finally:
        limit.cancel()
    raise LLMProdError(f"The service did not get ready ({log}): {log.read_text(encoding='utf-8')[-1000:].strip()}")


async def client(
    session: httpx2.AsyncClient, texts: Sequence[str], number: int, until: float, seen: list[dict]
) -> None:
    """Asks text after text until a time; notes when each answer came, how long it took, its status, its bundle."""
    turn = number
    while (started := time.perf_counter()) < until:
        try:
            reply = await session.post("/classify", json={"texts": [texts[turn % len(texts)]]})
            status = reply.status_code
            bundle = reply.json()["answers"][0]["bundle"] if status == 200 else ""
            pause = float(reply.headers.get("Retry-After", 0)) if status == 429 else 0.0
        except httpx2.HTTPError as error:
            status, bundle, pause = type(error).__name__, "", 0.0
        seen.append(
            {"at": time.perf_counter(), "seconds": time.perf_counter() - started, "status": status, "bundle": bundle}
        )
        turn += 1
        await asyncio.sleep(min(pause, max(0.0, until - time.perf_counter())))


async def drive(url: str, texts: Sequence[str], clients: int, seconds: float) -> dict:
    """The load of some clients for some seconds: requests by status, texts a second, latencies in ms.

    `timeline` has the requests that each bundle answered in each tenth of the time.
    """
    limits, seen = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients), []
    async with httpx2.AsyncClient(base_url=url, limits=limits, timeout=30) as session:
        await session.post("/classify", json={"texts": [texts[0]]})
        print(ON, flush=True)
        started = time.perf_counter()
        await asyncio.gather(*(client(session, texts, i, started + seconds, seen) for i in range(clients)))
        took = time.perf_counter() - started
    good = np.array([row["seconds"] for row in seen if row["status"] == 200])
    tenth = [
        Counter(r["bundle"] for r in seen if min(9, int(10 * (r["at"] - started) / took)) == i and r["bundle"])
        for i in range(10)
    ]
    return {
        "clients": clients,
        "requests": len(seen),
        "status": dict(Counter(str(row["status"]) for row in seen)),
        "requests/s": len(good) / took,
        "p50, ms": 1000 * float(np.quantile(good, 0.5)) if len(good) else None,
        "p99, ms": 1000 * float(np.quantile(good, 0.99)) if len(good) else None,
        "timeline": [dict(counts) for counts in tenth],
    }


def start(url: str, texts: Path, clients: int, seconds: float) -> subprocess.Popen:
    """Starts a load test in another process, and returns once it has its first answer; `result` waits for its end.

    Raises LLMProdError if the service gives no answer.
    """
    command = [sys.executable, "-m", __name__, url, str(texts), "--clients", str(clients), "--seconds", str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if process.stdout.readline().strip() != ON:
        process.wait()
        raise LLMProdError(f"{url} gives no answer (the reason is above): start the service, then the load test.")
    return process


def result(process: subprocess.Popen) -> dict:
    """What a load test found."""
    return json.loads(process.communicate()[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("texts", type=Path, help="a JSON file with a list of texts")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    asked = json.loads(options.texts.read_text(encoding="utf-8"))
    print(json.dumps(asyncio.run(drive(options.url, asked, options.clients, options.seconds))))
