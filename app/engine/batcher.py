"""Puts requests together: one batch runs while the next one gathers."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from app.engine.torch_runtime import Answer, Wanted
from model.image_processor import Pixels

Run = Callable[[list[Pixels], list[Wanted]], list[Answer]]


@dataclass
class Job:
    """A picture waiting for its batch, and who waits for the answer."""

    pixels: Pixels
    wanted: Wanted
    answer: asyncio.Future[Answer]


class Batcher:
    """Runs one batch at a time in a thread of its own. A job never waits while that thread is idle."""

    def __init__(self, run: Run, max_batch: int) -> None:
        self._run = run
        self._max_batch = max_batch
        self._waiting: deque[Job] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._running: asyncio.Task[None] | None = None

    async def submit(self, pixels: Pixels, wanted: Wanted) -> Answer:
        """The answer for a picture, in the order of arrival."""
        job = Job(pixels, wanted, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        if self._running is None:
            self._running = asyncio.create_task(self._run_batches())
        return await job.answer

    async def stop(self) -> None:
        """Finish what waits, then end the thread."""
        if self._running is not None:
            await self._running
        self._thread.shutdown()

    async def _run_batches(self) -> None:
        while batch := self._next_batch():
            try:
                answers = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._run, [job.pixels for job in batch], [job.wanted for job in batch]
                )
            except Exception as error:
                for job in batch:
                    if not job.answer.done():
                        job.answer.set_exception(error)
                continue
            for job, answer in zip(batch, answers, strict=True):
                if not job.answer.done():
                    job.answer.set_result(answer)
        self._running = None

    def _next_batch(self) -> list[Job]:
        """The oldest jobs whose pictures are of one size, without those whose client has gone."""
        batch: list[Job] = []
        while self._waiting and len(batch) < self._max_batch:
            job = self._waiting[0]
            if batch and job.pixels.shape != batch[0].pixels.shape:
                break
            self._waiting.popleft()
            if not job.answer.done():
                batch.append(job)
        return batch
