"""Dynamic batching: the texts of many clients are predicted together, as many as fit a budget of tokens."""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from llmprod import LLMProdError
from llmprod.deploy.bundle import Answer, Bundle

CHARACTERS = 4  # of a token, on average


class Busy(LLMProdError):
    """More texts wait than may; `seconds` says when to try again."""

    def __init__(self, seconds: float):
        super().__init__(f"Too many texts are waiting; try again in {seconds:.0f} s.")
        self.seconds = seconds


@dataclass
class Job:
    """One text that waits for its answer."""

    id: str
    text: str
    user: str
    answer: asyncio.Future
    since: float = field(default_factory=time.perf_counter)


@dataclass
class Batch:
    """What was answered together: by which bundle, in how many seconds, what a shadow bundle said (None: not asked)."""

    bundle: Bundle
    jobs: Sequence[Job]
    answers: list[Answer]
    waited: list[float]  # seconds in the queue, for each text
    seconds: float
    shadow: list[Answer] | None = None
    failed: str = ""  # why the shadow bundle gave no answers


class Batcher:
    """Answers texts in batches, in one thread; clients wait in a queue that has an end.

    While a batch is computed the next ones gather: with one client nothing waits, with many the batches are full
    (continuous batching). `bundle` can be replaced at any time: a batch is answered by one bundle, whole.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        tokens: int = 2048,
        waiting: int = 512,
        shadow_share: float = 0.25,
        done: Callable[[Batch], None] = lambda batch: None,
    ):
        """Needs `start` within an event loop.

        Args:
            bundle: what answers
            tokens: of a batch, padding included, by an estimate of four characters a token
            waiting: texts that may wait; more are refused
            shadow_share: of the batches, when nothing waits, that the shadow bundle answers too
            done: is told of every batch, in the computing thread
        """
        self.bundle, self.shadow = bundle, None
        self.tokens, self.waiting, self.shadow_share, self.done = tokens, waiting, shadow_share, done
        self.queue: deque[Job] = deque()
        self.rate = 100.0  # texts a second, as last measured
        self.thread = ThreadPoolExecutor(1, "predict")
        self.arrived, self.task, self.closing = asyncio.Event(), None, False
        self.random = random.Random(0)

    def start(self) -> None:
        """Begins to answer."""
        self.task = asyncio.create_task(self.work())

    async def stop(self) -> None:
        """Answers what waits, then ends."""
        self.closing = True
        self.arrived.set()
        await self.task
        self.thread.shutdown()

    async def predict(self, texts: Mapping[str, str], user: str = "") -> dict[str, tuple[Answer, str]]:
        """The answers to texts by their ids, each with the id of the bundle that gave it.

        Raises Busy where too many texts wait. A client that goes away takes its waiting texts with it.
        """
        if len(self.queue) + len(texts) > self.waiting:
            raise Busy(max(1.0, len(self.queue) / self.rate))
        loop = asyncio.get_running_loop()
        jobs = [Job(name, text, user, loop.create_future()) for name, text in texts.items()]
        self.queue.extend(jobs)
        self.arrived.set()
        try:
            return dict(zip(texts, await asyncio.gather(*(job.answer for job in jobs)), strict=True))
        finally:
            for job in jobs:
                job.answer.cancel()

    def next_batch(self) -> list[Job]:
        """Takes jobs from the queue while they fit the budget: the number of texts times the longest of them."""
        jobs, longest = [], 0
        limit, most = self.bundle.manifest["max_length"], self.bundle.predictor.batch_size
        while self.queue and len(jobs) < most:
            if self.queue[0].answer.done():  # the client is gone
                self.queue.popleft()
                continue
            longest = max(longest, min(limit, 2 + len(self.queue[0].text) // CHARACTERS))
            if jobs and longest * (len(jobs) + 1) > self.tokens:
                break
            jobs.append(self.queue.popleft())
        return jobs

    async def work(self) -> None:
        """Answers batch after batch until `stop`."""
        while not self.closing or self.queue:
            await self.arrived.wait()
            self.arrived.clear()
            while jobs := self.next_batch():
                await self.answer(jobs)

    async def answer(self, jobs: Sequence[Job]) -> None:
        """Answers jobs together; where that fails one by one, so that a text that fails fails alone."""
        try:
            batch = await asyncio.get_running_loop().run_in_executor(self.thread, self.compute, jobs)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    await self.answer([job])
            elif not jobs[0].answer.done():
                jobs[0].answer.set_exception(error)
            return
        for job, answer in zip(jobs, batch.answers, strict=True):
            if not job.answer.done():
                job.answer.set_result((answer, batch.bundle.id))

    def compute(self, jobs: Sequence[Job]) -> Batch:
        """Answers a batch of jobs; runs in the computing thread."""
        started, texts = time.perf_counter(), [job.text for job in jobs]
        bundle, shadow = self.bundle, self.shadow
        batch = Batch(bundle, jobs, bundle.predict(texts), [started - job.since for job in jobs], 0.0)
        batch.seconds = time.perf_counter() - started
        self.rate = 0.8 * self.rate + 0.2 * len(texts) / max(batch.seconds, 1e-6)
        if shadow and not self.queue and self.random.random() < self.shadow_share:
            try:
                batch.shadow = shadow.predict(texts)
            except Exception as error:  # whatever it is, the answers are there
                batch.failed = f"{type(error).__name__}: {error}"
        self.done(batch)
        return batch
