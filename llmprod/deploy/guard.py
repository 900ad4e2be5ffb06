"""What stands before every request: rate, key, time; an id, a log line without personal data, counts for Prometheus."""

import asyncio
import hmac
import ipaddress
import json
import os
import re
import secrets
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from llmprod import LLMProdError
from llmprod.deploy.batching import Batch
from llmprod.extras import extra
from llmprod.tables import shown

with extra("serve"):
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

KEY = "LLMPROD_API_KEY"  # the environment variable that holds the key which clients must send as X-API-Key
OPEN = ("/health", "/ready")  # what needs no key
CLIENTS = 10_000  # whose rate is remembered
TRACE = re.compile(
    r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}"
)  # W3C Trace Context, https://www.w3.org/TR/trace-context
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


@dataclass(frozen=True)
class Limits:
    """What one client may ask for."""

    body: int = 2_000_000  # bytes of a request; a stream of lines may have as many as it likes
    characters: int = 20_000  # of a text
    seconds: float = 10.0  # until an answer, and until a request's body has arrived
    waiting: int = 512  # texts in the queue
    tokens: int = 2048  # of a batch
    rate: float = 0.0  # requests a second of one client, on average; 0: as many as it likes
    burst: int = 50  # requests that a client may send at once
    key: str = field(default_factory=lambda: os.environ.get(KEY, ""), repr=False)


class Meters:
    """Counts and times in Prometheus' form, and the log: one line of JSON for each request, without its text."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = Counter("requests", "requests", ["route", "status"], registry=self.registry)
        self.latency = Histogram(
            "request_seconds", "until answered", ["route"], registry=self.registry, buckets=SECONDS
        )
        self.texts = Counter("texts", "texts answered", ["bundle", "label", "sure"], registry=self.registry)
        self.batches = Histogram(
            "batch_texts", "texts in a batch", registry=self.registry, buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        self.queued = Histogram("queue_seconds", "of a text in the queue", registry=self.registry, buckets=SECONDS)
        self.shadow = Counter("shadow_texts", "answers of a shadow bundle", ["agrees"], registry=self.registry)
        self.failures = Counter("failures", "what failed behind an answer", ["part"], registry=self.registry)
        self.waiting = Gauge("waiting_texts", "texts in the queue", registry=self.registry)

    def batch(self, batch: Batch) -> None:
        """Counts a batch."""
        self.batches.observe(len(batch.jobs))
        for seconds, answer in zip(batch.waited, batch.answers, strict=True):
            self.queued.observe(seconds)
            self.texts.labels(batch.bundle.id, answer.label, str(answer.sure).lower()).inc()
        for mine, theirs in zip(batch.answers, batch.shadow or [], strict=False):
            self.shadow.labels(str(mine.label == theirs.label).lower()).inc()

    def log(self, **values: object) -> None:
        """Writes one line to standard error."""
        print(
            json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **values}),
            file=sys.stderr,
            flush=True,
        )

    @contextmanager
    def counted(self, part: str, *errors: type[Exception]) -> Iterator[None]:
        """Counts and logs an error within the block instead of raising it."""
        try:
            yield
        except errors as error:
            self.failures.labels(part).inc()
            self.log(level="error", message=f"{part}: {error}")


class Guard:
    """ASGI middleware (https://asgi.readthedocs.io): refuses what comes too often, too slowly or without the key."""

    def __init__(self, app: Callable, limits: Limits, meters: Meters):
        self.app, self.limits, self.meters = app, limits, meters
        self.clients: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> requests it may send, when

    async def __call__(self, scope: MutableMapping, receive: Callable, send: Callable) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, headers = time.perf_counter(), {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        trace = TRACE.fullmatch(headers.get("traceparent", ""))
        trace_id, span = trace[1] if trace else secrets.token_hex(16), secrets.token_hex(8)
        status, begun = 500, False

        async def sending(message: MutableMapping) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                own = {"traceparent": f"00-{trace_id}-{span}-01", "x-content-type-options": "nosniff"}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in own.items())]
            await send(message)

        try:
            if refused := self.refusal(scope, headers):
                await respond(sending, *refused)
            else:
                await self.app(scope, self.in_time(receive), sending)
        except TimeoutError:
            if not begun:
                await respond(sending, 408, f"The request did not arrive within {self.limits.seconds:g} s.")
        finally:
            seconds, route = time.perf_counter() - started, getattr(scope.get("route"), "path", "(other)")
            self.meters.requests.labels(route, status).inc()
            self.meters.latency.labels(route).observe(seconds)
            if route not in (*OPEN, "/metrics", "(other)") or status >= 400:
                self.meters.log(trace=trace_id, route=route, status=status, ms=round(1000 * seconds, 2))

    def refusal(self, scope: MutableMapping, headers: dict[str, str]) -> tuple[int, str, dict] | None:
        """Status, reason and headers of a refusal; None where there is no reason."""
        sent = headers.get("x-api-key", "")
        needed = self.limits.key if scope["path"] not in OPEN else ""
        if needed and not hmac.compare_digest(sent.encode(), needed.encode()):
            return 401, "Send the key as X-API-Key.", {}
        wait = self.wait((scope.get("client") or ("",))[0])
        return (
            (429, f"Too many requests; try again in {wait:.1f} s.", {"retry-after": f"{wait + 0.5:.0f}"})
            if wait
            else None
        )

    def wait(self, client: str) -> float:
        """Seconds until a client may send again, 0 if it may now (token bucket)."""
        if not self.limits.rate:
            return 0.0
        now = time.monotonic()
        left, since = self.clients.pop(client, (float(self.limits.burst), now))
        left = min(float(self.limits.burst), left + (now - since) * self.limits.rate)
        may = left >= 1
        self.clients[client] = (left - may, now)
        while len(self.clients) > CLIENTS:
            self.clients.popitem(last=False)
        return 0.0 if may else (1 - left) / self.limits.rate

    def in_time(self, receive: Callable) -> Callable[[], Awaitable]:
        """`receive` that raises TimeoutError where a part of the body is late."""
        finished = False

        async def receiving() -> MutableMapping:
            nonlocal finished
            if finished:  # what comes then is the client's going away, whenever that is
                return await receive()
            async with asyncio.timeout(self.limits.seconds):
                message = await receive()
            finished = not message.get("more_body", False)
            return message

        return receiving


def listen(limits: Limits, host: str, port: int) -> socket.socket:
    """A socket that has the host and port for itself. Port 0 takes a free one.

    Raises LLMProdError for another host than this machine without a key, and for what can't be listened on.
    """
    tcp = socket.IPPROTO_TCP  # named, since asyncio sends small answers at once (TCP_NODELAY) on such sockets only
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, tcp)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        address = socket.gethostbyname(host)
        if not ipaddress.ip_address(address).is_loopback and not limits.key:
            raise LLMProdError(f"To listen on {host}, where others reach it, set {KEY}; clients send it as X-API-Key.")
        listening.bind((address, port))
    except (OSError, OverflowError, UnicodeError) as error:  # taken, unknown, IPv6; out of range; no host's name
        reason = getattr(error, "strerror", "") or error
        where = f"{shown(host)}:{port} can't be listened on: {reason}"
        raise LLMProdError(f"{where}. Choose another --port, or an IPv4 address as --host.") from error
    return listening


async def respond(send: Callable, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
    """Sends an error as JSON."""
    body = json.dumps({"detail": detail}).encode()
    sent = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(k.encode(), v.encode()) for k, v in sent.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
