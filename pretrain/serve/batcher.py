"""Requests that wait, and the packed calls that they become: a bounded queue, one task that fills calls, one thread that runs them."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from pretrain.serve.metrics import Metrics
from pretrain.serve.sampler import Abandoned, Draw, Watch

PAUSE_S = 0.005
"""Between calls: clients that have just been answered may ask again and share the next one."""
LONGEST_RETRY_S = 60


class Draws(Protocol):
    """What a `Sampler` does."""

    def draw(self, draws: Sequence[Draw], watched: Sequence[Watch | None], abandoned: "Asked") -> list[list[int]]: ...


class Asked(Protocol):
    """Whether nobody waits any more."""

    def __call__(self) -> bool: ...


class QueueFull(Exception):
    """More texts wait than may; `retry_after_s` is when to ask again."""

    def __init__(self, retry_after_s: int):
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class Closed(Exception):
    """The server is ending."""


class _Job:
    """A text on its way, and who waits for it."""

    def __init__(self, draw: Draw, watch: Watch | None, done: "asyncio.Future[list[int]]"):
        self.draw, self.watch, self.done = draw, watch, done


class Batcher:
    """Fills packed calls with the texts that wait: the first, and all others of its settings that fit beside it.

    A text beyond the window takes a place at the queue's end for each of its blocks, so that shorter ones do not wait for all of them.
    A text of a client that is gone leaves the queue at once, and a call whose clients are all gone ends at its next step.
    """

    def __init__(self, sampler: Draws, metrics: Metrics, max_batch_tokens: int, queue: int):
        self._sampler, self._metrics = sampler, metrics
        self._max_batch_tokens, self._queue = max_batch_tokens, queue
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampler")
        self._call_s = 1.0
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def start(self) -> None:
        """Begin to serve the queue."""
        self._task = asyncio.create_task(self._serve())

    async def close(self) -> None:
        """Stop after the step that is being computed; whoever still waits gets Closed."""
        self._closed = True
        for job in [*self._waiting, *self._running]:
            if not job.done.done():
                job.done.set_exception(Closed())
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)

    @property
    def num_waiting(self) -> int:
        """Texts."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Texts of the present call whose clients are there."""
        return sum(not job.done.done() for job in self._running)

    def submit(self, draws: Sequence[Draw], watches: Sequence[Watch] = ()) -> "Ticket":
        """A request's texts, which take their places in the queue at once; whoever submits must `leave` in the end.

        Args:
            watches: one a text, called in this loop; or none.

        Raises: QueueFull; Closed.
        """
        if self._closed:
            raise Closed
        if len(self._waiting) + len(draws) > self._queue:
            self._metrics.refused.inc()
            raise QueueFull(self._retry_after_s())
        loop = asyncio.get_running_loop()
        jobs = [_Job(one, watches[place] if watches else None, loop.create_future()) for place, one in enumerate(draws)]
        self._waiting.extend(jobs)
        self._tell()
        self._arrived.set()
        return Ticket(self, jobs)

    def leave(self, jobs: Sequence[_Job]) -> None:
        """Nobody waits for these any more."""
        for job in jobs:
            if not job.done.cancel() and not job.done.cancelled():
                job.done.exception()  # else asyncio says that nobody has seen it
        self._waiting = deque(job for job in self._waiting if not job.done.done())
        self._tell()

    def _retry_after_s(self) -> int:
        tokens = sum(job.draw.num_tokens for job in self._waiting)
        calls = 1 + math.ceil(tokens / self._max_batch_tokens)
        return max(1, min(LONGEST_RETRY_S, math.ceil(calls * self._call_s)))

    def _next_call(self) -> list[_Job]:
        first = self._waiting[0]
        chosen, others, tokens = list[_Job](), deque[_Job](), 0
        for job in self._waiting:
            fits = not chosen or tokens + job.draw.num_tokens <= self._max_batch_tokens
            if fits and job.draw.settings == first.draw.settings:
                chosen.append(job)
                tokens += job.draw.num_tokens
            else:
                others.append(job)
        self._waiting = others
        return chosen

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            await asyncio.sleep(PAUSE_S)
            if not self._waiting:
                self._arrived.clear()
                continue
            self._running = jobs = self._next_call()
            self._tell()
            begun = time.monotonic()
            try:
                texts = await loop.run_in_executor(self._thread, self._call, jobs, loop)
            except Abandoned:
                texts = []
            except asyncio.CancelledError:
                raise
            except Exception as error:
                for job in jobs:
                    if not job.done.done():
                        job.done.set_exception(error)
                texts = []
            for job, tokens in zip(jobs, texts):
                if not job.done.done():
                    job.draw, whole = job.draw.after(tokens)
                    if whole:
                        job.done.set_result(list(job.draw.found))
                    else:
                        self._waiting.append(job)
            self._call_s = 0.7 * self._call_s + 0.3 * (time.monotonic() - begun)
            self._metrics.calls.observe(len(jobs))
            self._running = []
            self._tell()

    def _call(self, jobs: list[_Job], loop: asyncio.AbstractEventLoop) -> list[list[int]]:
        """In the thread."""

        def watch_of(job: _Job) -> Watch | None:
            watch = job.watch
            if watch is None:
                return None

            def pass_on(step: int, t: float, tokens: list[int]) -> None:
                if not job.done.done():
                    loop.call_soon_threadsafe(watch, step, t, tokens)

            return pass_on

        draws, watched = [job.draw for job in jobs], [watch_of(job) for job in jobs]
        return self._sampler.draw(draws, watched, lambda: all(job.done.done() for job in jobs))

    def _tell(self) -> None:
        self._metrics.waiting.set(self.num_waiting)
        self._metrics.running.set(self.num_running)


class Ticket:
    """A request's texts in the queue and after."""

    def __init__(self, batcher: Batcher, jobs: list[_Job]):
        self._batcher, self._jobs = batcher, jobs

    async def texts(self) -> list[list[int]]:
        """The tokens of each. Raises: Closed; what the sampler raised."""
        return await asyncio.gather(*(job.done for job in self._jobs))

    def leave(self) -> None:
        """Free the places; also when all is done."""
        self._batcher.leave(self._jobs)
