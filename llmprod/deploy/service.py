"""The service: a bundle over HTTP; a new bundle takes over without a lost request."""

import asyncio
import contextlib
import json
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from llmprod import LLMProdError
from llmprod.deploy.batching import Batch, Batcher, Busy
from llmprod.deploy.bundle import Bundle
from llmprod.deploy.guard import Guard, Limits, Meters, listen
from llmprod.deploy.messages import Classifications, Classified, Feedback, Texts, Turns, Wanted
from llmprod.deploy.registry import Registry
from llmprod.extras import extra

with extra("serve"):
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.exceptions import RequestValidationError
    from prometheus_client import generate_latest
    from starlette.requests import ClientDisconnect

LOOK = 2.0  # seconds between two looks at what the registry serves
WINDOW = 64  # streamed lines that are answered at a time


class Store(Protocol):
    """Where answers and feedback are kept: `feedback.store.Store`."""

    def add_answers(self, rows: Sequence[dict]) -> None:
        """Keeps answers, in one transaction."""

    def add_feedback(self, request: str, user: str, verdict: str, label: str = "") -> bool:
        """Keeps what a user says of an answer; False if that was known. Raises OSError where it can't now."""


@dataclass
class Service:
    """What the routes and the page share: the batches, the store, the meters, and where the bundle comes from."""

    batcher: Batcher
    registry: Registry | None
    store: Store | None
    meters: Meters
    limits: Limits
    ready: bool = False

    async def classify(self, texts: Sequence[str], user: str = "") -> list[Classified]:
        """Answers texts. Raises Busy, TimeoutError."""
        request = uuid.uuid4().hex
        named = {f"{request}-{i}": text for i, text in enumerate(texts)}
        async with asyncio.timeout(self.limits.seconds):
            found = await self.batcher.predict(named, user)
        return [
            Classified(id=name, label=answer.label, confidence=answer.confidence, sure=answer.sure, bundle=bundle)
            for name, (answer, bundle) in found.items()
        ]

    def done(self, batch: Batch) -> None:
        """Counts a batch, and keeps its answers; a store that fails is counted, and fails no answer."""
        self.meters.batch(batch)
        if batch.failed:
            self.meters.failures.labels("shadow").inc()
            self.meters.log(level="error", message=f"shadow: {batch.failed}")
        if self.store is None:
            return
        shadow = batch.shadow or [None] * len(batch.jobs)
        rows = [
            {
                "request": job.id,
                "bundle": batch.bundle.id,
                "text": job.text,
                "label": answer.label,
                "confidence": answer.confidence,
                "user": job.user,
                "shadow": other.label if other else "",
            }
            for job, answer, other in zip(batch.jobs, batch.answers, shadow, strict=True)
        ]
        with self.meters.counted("store", LLMProdError, OSError):
            self.store.add_answers(rows)

    def keep_reply(self, request: str, text: str, action: str) -> None:
        """Keeps what the assistant did with a customer's turn: "answer", "ask" or "hand over" is its label."""
        row = {"request": request, "bundle": "assistant", "text": text, "label": action, "confidence": 1.0}
        if self.store is not None:
            with self.meters.counted("store", LLMProdError, OSError):
                self.store.add_answers([row | {"source": "answer"}])

    def reload(self) -> str:
        """Serves what the registry names as current, and its shadow, if that changed; returns the current id.

        The new bundle answers its frozen texts before it takes over. Raises BundleError if it can't; the old one stays.
        """
        if self.registry is None:
            return self.batcher.bundle.id
        state = self.registry.state()
        if state["current"] != self.batcher.bundle.id:
            fresh = self.registry.load(state["current"])
            fresh.check()
            self.batcher.bundle = fresh
            self.meters.log(message=f"serves bundle {fresh.id}")
        if state["shadow"] != (self.batcher.shadow.id if self.batcher.shadow else ""):
            self.batcher.shadow = self.registry.load(state["shadow"]) if state["shadow"] else None
        return state["current"]

    async def follow(self) -> None:
        """Looks at the registry every few seconds; an error leaves what is served."""
        while True:
            await asyncio.sleep(LOOK)
            with self.meters.counted("reload", LLMProdError, OSError):
                await asyncio.to_thread(self.reload)


def build(
    source: Bundle | Registry,
    store: Store | None = None,
    limits: Limits | None = None,
    answer: Callable[[Sequence[str]], dict] | None = None,
    recommend: Callable[[Sequence[str], str, int], list[dict]] | None = None,
) -> FastAPI:
    """The application; `app.state.service` is what its routes use.

    Args:
        source: one bundle, or a registry whose changes are followed
        store: where answers and feedback are kept; without one there is no feedback
        limits: of size, rate and time
        answer: a customer's turns -> the assistant's reply; without it there is no /answer
        recommend: ids of liked items, a wish, how many -> items; without it there is no /recommend
    """
    registry = source if isinstance(source, Registry) else None
    bundle = registry.load() if registry else source
    limits, meters = limits or Limits(), Meters()
    service = Service(Batcher(bundle, tokens=limits.tokens, waiting=limits.waiting), registry, store, meters, limits)
    service.batcher.done = service.done

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        await asyncio.to_thread(bundle.check)
        following = asyncio.create_task(service.follow()) if registry else None
        service.ready = True
        yield
        service.ready = False
        if following:
            following.cancel()
        await service.batcher.stop()

    pages = {"docs_url": None, "redoc_url": None}  # they would fetch their code from elsewhere
    app = FastAPI(title="llmprod", version=bundle.id, lifespan=lifespan, max_body_size=limits.body, **pages)
    app.state.service = service
    app.add_middleware(Guard, limits=limits, meters=meters)
    add_routes(app, service)
    if answer:
        add_assistant(app, service, answer)
    if recommend:
        add_recommender(app, service, recommend)
    return app


def add_routes(app: FastAPI, service: Service) -> None:
    """Classification, feedback, and what operators ask."""
    busy = {429: {"description": "too many texts wait"}, 503: {"description": "no answer in time"}}

    @app.exception_handler(Busy)
    async def too_many(request: Request, error: Busy) -> Response:
        return problem(429, str(error), {"Retry-After": f"{error.seconds:.0f}"})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:  # FastAPI's own repeats the text
        return problem(422, [{key: found[key] for key in ("type", "loc", "msg")} for found in error.errors()])

    @app.exception_handler(TimeoutError)
    async def too_late(request: Request, error: TimeoutError) -> Response:
        return problem(503, f"No answer within {service.limits.seconds:g} s.", {"Retry-After": "1"})

    @app.post("/classify", responses=busy)
    async def classify(asked: Texts) -> Classifications:
        """Classifies one text or many."""
        return Classifications(answers=await service.classify(asked.texts, asked.user))

    @app.post("/classify/lines", max_body_size=sys.maxsize, responses={200: {"content": {"application/x-ndjson": {}}}})
    async def lines(request: Request) -> Lines:
        """Classifies a stream of texts, one in each line; answers are JSON, one in each line, in their order."""
        return Lines(answered(service, request.stream()))

    if service.store is not None:
        refused = {404: {"description": "no such answer, or none to correct"}, 503: {"description": "not kept now"}}

        @app.post("/feedback", responses=refused)
        async def feedback(said: Feedback) -> dict[str, bool]:
            """Keeps what a user says of an answer; said again it changes nothing."""
            if said.verdict == "corrected" and said.label not in service.batcher.bundle.labels:
                known = ", ".join(service.batcher.bundle.labels[:20])
                raise HTTPException(422, f"There is no label '{said.label[:50]}'; there are: {known}.")
            given = (said.id, said.user, said.verdict, said.label)
            try:
                with service.meters.counted("store", OSError):  # the database, or the disk
                    return {"new": await asyncio.to_thread(service.store.add_feedback, *given)}
            except LLMProdError as error:
                raise HTTPException(404, str(error)) from error
            raise HTTPException(503, "It can't be kept now: say it again later.", {"Retry-After": "5"})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "alive"}

    @app.get("/ready", responses={503: {"description": "not ready"}})
    async def ready() -> dict[str, str]:
        """Whether it may be sent requests: its bundle answered the frozen texts as it should."""
        if not service.ready:
            raise HTTPException(503, "starting or stopping")
        return {"status": "ready", "bundle": service.batcher.bundle.id}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        service.meters.waiting.set(len(service.batcher.queue))
        return Response(generate_latest(service.meters.registry), media_type="text/plain; version=0.0.4")

    @app.post("/reload", responses={409: {"description": "the bundle can't be served; the one before stays"}})
    async def reload() -> dict[str, str]:
        """Serves the registry's current bundle now, and not at the next look."""
        try:
            return {"bundle": await asyncio.to_thread(service.reload)}
        except LLMProdError as error:
            raise HTTPException(409, str(error)) from error


def add_assistant(app: FastAPI, service: Service, answer: Callable[[Sequence[str]], dict]) -> None:
    """The customer-service assistant of 11_customer_service."""
    one_at_a_time = asyncio.Semaphore(1)

    @app.post("/answer", responses={503: {"description": "no answer in time"}})
    async def reply(asked: Turns) -> dict:
        """The reply to a customer's last turn (answer, question or hand-over); `id` is what feedback names."""
        async with asyncio.timeout(service.limits.seconds), one_at_a_time:
            said = await asyncio.to_thread(answer, asked.turns)
        request = uuid.uuid4().hex
        await asyncio.to_thread(service.keep_reply, request, asked.turns[-1], said["action"])
        return {"id": request} | said


def add_recommender(app: FastAPI, service: Service, recommend: Callable[[Sequence[str], str, int], list[dict]]) -> None:
    """The recommender of 13_recommendation."""

    @app.post("/recommend", responses={503: {"description": "no answer in time"}})
    async def items(asked: Wanted) -> dict[str, list]:
        """Items for what someone liked, for a wish in words, or for both."""
        try:
            async with asyncio.timeout(service.limits.seconds):
                return {"items": await asyncio.to_thread(recommend, asked.liked, asked.wish, asked.count)}
        except LLMProdError as error:
            raise HTTPException(422, str(error)) from error


class Lines(Response):
    """A response whose parts are sent while the request is still read; Starlette's own would read it too."""

    media_type = "application/x-ndjson"

    def __init__(self, parts: AsyncIterator[bytes]):
        super().__init__()
        self.parts = parts
        del self.headers["content-length"]

    async def __call__(self, scope: Mapping, receive: Callable, send: Callable) -> None:
        """Sends part after part, until there are no more or the client is gone."""
        with contextlib.suppress(ClientDisconnect):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in self.parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def answered(service: Service, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Answers lines as they come, a window at a time; a line that can't be answered says so in its place."""
    rest, waiting = bytearray(), []
    most = 4 * service.limits.characters + 1  # bytes that are kept of a line: so many are too long in any case
    async for part in stream:
        for number, piece in enumerate(part.split(b"\n")):
            if number:  # a newline stood before it
                waiting.append(bytes(rest))
                rest.clear()
            rest += piece[: most - len(rest)]
        while len(waiting) >= WINDOW:
            yield await answer_lines(service, waiting[:WINDOW])
            waiting = waiting[WINDOW:]
    waiting += [bytes(rest)] if rest.strip() else []
    for start in range(0, len(waiting), WINDOW):
        yield await answer_lines(service, waiting[start : start + WINDOW])


async def answer_lines(service: Service, lines: Sequence[bytes]) -> bytes:
    """The answers to lines, as lines of JSON."""
    texts = [line.decode("utf-8", "replace").strip() for line in lines]
    found: dict[int, dict] = {i: {"error": "an empty line"} for i, text in enumerate(texts) if not text}
    long = service.limits.characters
    too_long = [i for i, text in enumerate(texts) if len(text) > long or len(lines[i]) > 4 * long]
    found |= {i: {"error": f"more than {long:,} characters"} for i in too_long}
    asked = [i for i in range(len(texts)) if i not in found]
    while asked:
        try:
            answers = await service.classify([texts[i] for i in asked])
            found |= {i: answer.model_dump() for i, answer in zip(asked, answers, strict=True)}
            break
        except Busy as error:  # a stream waits, where a request is sent away
            await asyncio.sleep(error.seconds)
        except TimeoutError:
            found |= {i: {"error": "no answer in time"} for i in asked}
            break
    return b"".join(json.dumps(found[i], ensure_ascii=False).encode() + b"\n" for i in range(len(texts)))


def problem(status: int, detail: object, headers: dict[str, str] | None = None) -> Response:
    """An error in the form that FastAPI gives to its own."""
    return Response(json.dumps({"detail": detail}), status, headers, "application/json")


def run(app: FastAPI, host: str, port: int) -> None:
    """Listens until SIGTERM or Ctrl-C, then answers what waits and ends. Raises LLMProdError as `listen` does."""
    service = app.state.service
    listening = listen(service.limits, host, port)
    print(f"bundle {service.batcher.bundle.id} at http://{host}:{listening.getsockname()[1]}", flush=True)
    parts = {"loop": "asyncio", "http": "h11"}  # the same whether or not another library brings faster ones
    config = uvicorn.Config(
        app, access_log=False, log_level="warning", server_header=False, timeout_graceful_shutdown=30, **parts
    )
    uvicorn.Server(config).run(sockets=[listening])
