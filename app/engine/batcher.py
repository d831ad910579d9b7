"""Dynamic batching: collects jobs into batches and runs them in one thread for each lane of each runtime.

The next batch fills while others run. An idle runtime starts a batch at once, unless max_wait is set. A runtime that is busy
starts a further batch only if that batch is full.
"""

import bisect
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from dinat.app.engine.events import BatcherEvents
from dinat.app.engine.job import Job
from dinat.app.engine.runtimes.runtime import Array, InferenceOptions, InferenceResult, Runtime
from dinat.model.cpu.resize import Pixels

RATE_BATCHES = 32
"""Number of batches over which the rate is measured."""


class Batcher:
    """A queue of jobs and the threads that run them.

    Args:
        runtimes: Each runs in as many threads as it has lanes.
        max_batch: Largest batch, in images. It is halved when a batch runs out of memory.
        max_wait: Longest time, in seconds, that an idle runtime waits for a batch to fill.
        events: Receives results, batches and crashes.
    """

    def __init__(self, runtimes: Sequence[Runtime], max_batch: int, max_wait: float, events: BatcherEvents) -> None:
        self.max_batch = max_batch
        self._max_wait = max_wait
        self._events = events
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._closed: Exception | None = None
        self._rate: deque[tuple[int, float]] = deque(maxlen=RATE_BATCHES)
        self._lanes = [runtime for runtime in runtimes for _ in range(runtime.lanes)]
        self._threads: list[threading.Thread | None] = [None] * len(self._lanes)
        self._running: Counter[Runtime] = Counter()

    def start(self) -> None:
        """Start the threads, or restart those that crashed. Queued jobs stay queued."""
        for lane, thread in enumerate(self._threads):
            if thread is None:
                self._threads[lane] = thread = threading.Thread(target=self._run_lane, args=[lane], name="engine", daemon=True)
                thread.start()

    def put(self, job: Job) -> None:
        """Queue a job that has its pixels, in order of arrival. Safe from any thread."""
        with self._changed:
            if self._closed is None:
                bisect.insort(self._waiting, job, key=lambda waiting: waiting.arrived)
                self._changed.notify_all()
                return
        self._events.on_results([job], [self._closed])

    def close(self, error: Exception) -> None:
        """Fail all queued jobs, and all jobs that are put later, with an error."""
        with self._changed:
            self._closed = error
            jobs, self._waiting = self._waiting, []
        self._events.on_results(jobs, [error] * len(jobs))

    def stop(self) -> None:
        """Stop the threads once the queue is empty, and join them."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not None:
                thread.join()

    def rate(self) -> float | None:
        """Images per second over the last batches; None before the first batch."""
        batches = list(self._rate)
        seconds = sum(taken for _, taken in batches)
        return len(self._lanes) * sum(count for count, _ in batches) / seconds if seconds > 0 else None

    def _run_lane(self, lane: int) -> None:
        runtime = self._lanes[lane]
        batch: list[Job] = []
        try:
            while batch := self._next_batch(runtime):
                try:
                    self._run_batch(runtime, batch)
                finally:
                    self._end_batch(runtime)
                batch = []
        except BaseException as error:
            self._threads[lane] = None
            self._events.on_crash(error, runtime, batch)

    def _next_batch(self, runtime: Runtime) -> list[Job]:
        """Wait for the oldest jobs whose images have one shape. An empty batch means that the thread must end."""

        def may_start() -> bool:
            return bool(self._waiting) and (not self._running[runtime] or len(self._waiting) >= self.max_batch)

        with self._changed:
            while True:
                self._changed.wait_for(lambda: may_start() or self._stopping)
                if self._max_wait > 0 and not self._stopping:
                    self._changed.wait_for(lambda: len(self._waiting) >= self.max_batch or self._stopping, self._max_wait)
                batch: list[Job] = []
                rest: list[Job] = []
                for job in self._waiting:
                    if len(batch) == self.max_batch or (batch and _shape(job) != _shape(batch[0])):
                        rest.append(job)
                    elif job.active:
                        batch.append(job)
                self._waiting = rest
                if batch or (self._stopping and not rest):
                    self._running[runtime] += bool(batch)
                    return batch

    def _end_batch(self, runtime: Runtime) -> None:
        with self._changed:
            self._running[runtime] -= 1
            self._changed.notify_all()

    def _run_batch(self, runtime: Runtime, batch: list[Job]) -> None:
        try:
            pixels: Any = np.stack([job.pixels for job in batch if job.pixels is not None])
        except MemoryError as error:
            if len(batch) == 1:
                self._events.on_results(batch, [error])
                return
            self._reduce_max_batch(len(batch))
            self._run_batch(runtime, batch[: self.max_batch])
            self._run_batch(runtime, batch[self.max_batch :])
            return
        started = time.monotonic()
        for job in batch:
            job.started, job.pixels = started, None
        self._events.on_batch_start(batch)
        results = self._infer(runtime, pixels, [job.options for job in batch])
        computed = time.monotonic()
        for job in batch:
            job.computed = computed
        seconds = computed - started
        self._rate.append((len(batch), seconds))
        self._events.on_batch_end(len(batch), seconds)
        self._events.on_results(batch, results)

    def _infer(
        self, runtime: Runtime, pixels: Pixels | Array, options: Sequence[InferenceOptions]
    ) -> Sequence[InferenceResult | Exception]:
        """Run a batch; split it in half on an error, until only the images that cause the error fail.

        Out of memory also reduces max_batch for the batches that follow.
        """
        try:
            return runtime.run(pixels, options)
        except Exception as error:
            if len(options) == 1:
                return [error]
            half = (len(options) + 1) // 2
            if runtime.is_out_of_memory(error):
                self._reduce_max_batch(len(options))
        return [*self._infer(runtime, pixels[:half], options[:half]), *self._infer(runtime, pixels[half:], options[half:])]

    def _reduce_max_batch(self, size: int) -> None:
        """Limit batches to half of a size that did not fit into memory."""
        self.max_batch = min(self.max_batch, (size + 1) // 2)


def _shape(job: Job) -> object:
    """Shape and dtype, which all images of a batch share."""
    return None if job.pixels is None else (job.pixels.shape, job.pixels.dtype)
