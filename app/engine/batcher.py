"""Puts pictures together into batches and runs them, in threads of their own: one for each lane of each runtime.

While batches run, the next one gathers. A picture never waits while a runtime is idle (unless max_wait says so); beside a
batch that it runs already, a runtime is given only full ones.
"""

import bisect
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinat.app.engine.runtimes.runtime import Array, InferenceOptions, InferenceResult, Runtime
from dinat.model.cpu.resize import Pixels

RATE_BATCHES = 32
"""Batches over which the rate of pictures is measured."""


@dataclass(eq=False)
class Job:
    """One picture on its way through the engine.

    arrived, deadline, decoded, started, computed: seconds of time.monotonic, which all processes of a machine share.
    pixels: (H, W, 3), as Runtime.run takes them, until they are copied into their batch.
    dropped: set when nobody waits any more; a dropped job is not computed.
    """

    wanted: InferenceOptions
    arrived: float
    deadline: float
    pixels: Pixels | Array | None = None
    decoded: float = 0.0
    started: float = 0.0
    computed: float = 0.0
    dropped: bool = False

    @property
    def alive(self) -> bool:
        """Whether somebody still waits for the answer."""
        return not self.dropped and time.monotonic() < self.deadline


ResultCallback = Callable[[Sequence[Job], Sequence[InferenceResult | Exception]], object]
"""Told of jobs and what became of each. Called from any thread."""


class Batcher:
    """The engine's threads and the pictures that wait for them.

    answered: told of every job that was put.  on_start: called in a thread with the jobs of each batch before they run, when
    their pixels are copied.  on_batch: then with their number and the seconds they took.  on_crash: called in the thread, as it
    ends, with what ended it, its runtime and the jobs that it had under way.
    """

    def __init__(
        self,
        runtimes: Sequence[Runtime],
        max_batch: int,
        max_wait: float,
        answered: ResultCallback,
        on_start: Callable[[list[Job]], object],
        on_batch: Callable[[int, float], object],
        on_crash: Callable[[BaseException, Runtime, list[Job]], object],
    ) -> None:
        self.max_batch = max_batch
        self._max_wait = max_wait
        self._answered = answered
        self._on_start, self._on_batch, self._on_death = on_start, on_batch, on_crash
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._closed: Exception | None = None
        self._rate: deque[tuple[int, float]] = deque(maxlen=RATE_BATCHES)
        self._lanes = [runtime for runtime in runtimes for _ in range(runtime.lanes)]
        self._threads: list[threading.Thread | None] = [None] * len(self._lanes)
        self._running: Counter[Runtime] = Counter()

    def start(self) -> None:
        """Start the threads, or new ones in the place of those that have died. What waits is kept."""
        for lane, thread in enumerate(self._threads):
            if thread is None:
                self._threads[lane] = thread = threading.Thread(target=self._live, args=[lane], name="engine", daemon=True)
                thread.start()

    def put(self, job: Job) -> None:
        """Let a job with its pixels wait, before all that arrived after it. Safe from every thread."""
        with self._changed:
            if self._closed is None:
                bisect.insort(self._waiting, job, key=lambda waiting: waiting.arrived)
                self._changed.notify_all()
                return
        self._answered([job], [self._closed])

    def close(self, error: Exception) -> None:
        """Answer every job that waits, and those that will be put from now on, with an error."""
        with self._changed:
            self._closed = error
            jobs, self._waiting = self._waiting, []
        self._answered(jobs, [error] * len(jobs))

    def stop(self) -> None:
        """End the threads once nothing waits, and wait for them."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not None:
                thread.join()

    def rate(self) -> float | None:
        """Pictures per second of the last batches, None before the first."""
        batches = list(self._rate)
        seconds = sum(taken for _, taken in batches)
        return len(self._lanes) * sum(count for count, _ in batches) / seconds if seconds > 0 else None

    def _live(self, lane: int) -> None:
        runtime = self._lanes[lane]
        batch: list[Job] = []
        try:
            while batch := self._next_batch(runtime):
                try:
                    self._run_batch(runtime, batch)
                finally:
                    self._end_batch(runtime)
                batch = []
        except BaseException as death:
            self._threads[lane] = None
            self._on_death(death, runtime, batch)

    def _next_batch(self, runtime: Runtime) -> list[Job]:
        """Wait for jobs and take the oldest, those whose pictures are of one kind. Empty when the thread is to end."""

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
                    if len(batch) == self.max_batch or (batch and _kind(job) != _kind(batch[0])):
                        rest.append(job)
                    elif job.alive:
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
                self._answered(batch, [error])
                return
            self._shrink(len(batch))
            self._run_batch(runtime, batch[: self.max_batch])
            self._run_batch(runtime, batch[self.max_batch :])
            return
        started = time.monotonic()
        for job in batch:
            job.started, job.pixels = started, None
        self._on_start(batch)
        answers = self._answers(runtime, pixels, [job.wanted for job in batch])
        computed = time.monotonic()
        for job in batch:
            job.computed = computed
        taken = computed - started
        self._rate.append((len(batch), taken))
        self._on_batch(len(batch), taken)
        self._answered(batch, answers)

    def _answers(
        self, runtime: Runtime, pixels: Pixels | Array, wanted: Sequence[InferenceOptions]
    ) -> Sequence[InferenceResult | Exception]:
        """Run a batch. One that fails is halved, down to the pictures that are the cause: the others are answered.

        One that needs too much memory is halved too, and the size that fits is kept as the largest from then on.
        """
        try:
            return runtime.run(pixels, wanted)
        except Exception as error:
            if len(wanted) == 1:
                return [error]
            half = (len(wanted) + 1) // 2
            if runtime.is_out_of_memory(error):
                self._shrink(len(wanted))
        return [*self._answers(runtime, pixels[:half], wanted[:half]), *self._answers(runtime, pixels[half:], wanted[half:])]

    def _shrink(self, size: int) -> None:
        """No batch as large as that from now on, but half of it."""
        self.max_batch = min(self.max_batch, (size + 1) // 2)


def _kind(job: Job) -> object:
    """What pictures of one batch have in common."""
    return None if job.pixels is None else (job.pixels.shape, job.pixels.dtype)
