"""The one call through which every door reaches the network."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import structlog

from dinat.app.engine.backend import Backend, State
from dinat.app.engine.batcher import Job, ResultCallback
from dinat.app.engine.local_backend import LocalBackend
from dinat.app.engine.runtimes.runtime import Array, InferenceOptions, InferenceResult, LoadedModel
from dinat.app.errors import DeadlinePassed, NoImage, ServiceError, TooLarge, Unavailable
from dinat.app.images import decode
from dinat.app.metrics import Metrics
from dinat.app.settings import Settings
from dinat.model import DinatImageProcessor
from dinat.model.cpu.resize import Pixels
from dinat.model.native import library

log = structlog.get_logger("dinat")

ImageSource = bytes | Path | Pixels | Array

BackendFactory = Callable[[Settings, Metrics, ResultCallback], Backend]


@dataclass(eq=False, kw_only=True)
class ImageJob(Job):
    """A job and who waits for it. data: what was submitted, until it is pixels."""

    data: ImageSource
    answer: "asyncio.Future[InferenceResult | Exception]"
    seconds_to_decode: float = 0.0


class Engine:
    """Decodes pictures in threads, has them computed, and answers. Every method is for the event loop's thread.

    create_backend: whoever computes; this process, if nothing is said.
    """

    def __init__(
        self, settings: Settings, create_backend: BackendFactory = LocalBackend, metrics: Metrics | None = None
    ) -> None:
        self.settings = settings
        self.metrics = metrics or Metrics()
        self.backend = create_backend(settings, self.metrics, self._answered)
        self.metrics.show(settings.served_name, lambda: self.backend.waiting, lambda: self.backend.loaded)
        self.on_started: Callable[[], object] = lambda: None
        self._draining = False
        self._closes = math.inf
        self._closed = False
        self._drain_until = math.inf
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def state(self) -> State:
        """Where the service is in its life. It may take work while it is draining: see drain."""
        draining = self._draining and self.backend.state is not State.FAILED
        return State.DRAINING if draining else self.backend.state

    @property
    def failure(self) -> BaseException | None:
        """Why it has failed, if it has."""
        return self.backend.failure

    @property
    def loaded(self) -> LoadedModel:
        """What serves. Raises Unavailable, saying why, when nothing can be taken."""
        if self.backend.loaded is None or not self._takes_work:
            raise Unavailable(self.why_not_ready(), headers={"Retry-After": "1"})
        return self.backend.loaded

    @property
    def waiting(self) -> int:
        """Pictures taken and not yet running; those being decoded count."""
        return self.backend.waiting

    @property
    def _takes_work(self) -> bool:
        return self.backend.state is State.READY and not self._closed

    def why_not_ready(self) -> str:
        """One sentence."""
        if self.backend.failure is not None:
            return str(self.backend.failure)
        return {
            State.LOADING: f"the model {self.settings.served_name} is loading: try again soon",
            State.DRAINING: "the service is stopping: ask another instance",
            State.READY: "the service is ready",
        }[self.state]

    async def start(self) -> None:
        """Load the network and warm it up. A failure is kept in `failure`, not raised.

        Calls on_started when it is over, either way.
        """
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(library)  # by which pictures are resized: if it must be compiled, then before they come
        await self.backend.start()
        self.on_started()

    async def drain(self, lame_duck_seconds: float = 0) -> None:
        """Take work for so many seconds more, then none, and wait until all that was taken is answered, DRAIN_SECONDS at most.

        From the first moment on `state` is DRAINING, so that a load balancer sends its requests elsewhere.
        """
        now = time.monotonic()
        self._draining = True
        self._closes = min(self._closes, now + lame_duck_seconds)
        self._drain_until = min(self._drain_until, self._closes + self.settings.drain_seconds)
        await asyncio.sleep(self._closes - now)
        self._closed = True  # by the loop, not by the clock: what reached it in time is taken, however late its turn comes
        try:
            async with asyncio.timeout(self._drain_until - time.monotonic()):
                await self._idle.wait()
        except TimeoutError:
            if self._under_way:
                log.warning("stopping with work undone", requests=self._under_way)

    async def stop(self) -> None:
        """Drain, answer what is left with an error, and end the threads."""
        await self.drain()
        await self.backend.stop()
        self._decoders.shutdown(cancel_futures=True)

    def check_capacity(self, pictures: int = 1) -> None:
        """Raise Unavailable, saying when to come back, unless that many more pictures may wait."""
        if not self._takes_work:
            raise Unavailable(self.why_not_ready(), headers={"Retry-After": "1"})
        limit = self.settings.queue_limit
        if pictures > limit:
            raise TooLarge(f"the request has {pictures} pictures, at most {limit} can wait at once: send fewer")
        waiting = self.waiting
        if waiting + pictures > limit:
            raise Unavailable(
                f"{waiting} pictures wait already, at most {limit} may: come back later",
                headers={"Retry-After": str(self._seconds_to_wait(waiting))},
            )

    def late(self, arrived: float) -> DeadlinePassed | None:
        """What to answer to a request that came at that time, by time.monotonic, if its deadline has passed already."""
        return _late() if time.monotonic() > arrived + self.settings.deadline_ms / 1000 else None

    async def submit(
        self,
        pictures: Sequence[ImageSource],
        wanted: InferenceOptions,
        deadline_ms: int | None = None,
        arrived: float | None = None,
    ) -> list[InferenceResult | ServiceError]:
        """Classify pictures; in order, an error in the place of a picture that has one.

        pictures: the bytes of each file, or where it is; or (H, W, 3), uint8 of any size, or float32 that is resized and
        normalised already.
        deadline_ms: how long the caller waits, DEADLINE_MS at most and if None.  arrived: since when, by time.monotonic; now if
        None.  Raises Unavailable and TooLarge when not even one can be taken. Cancelling the call drops what has not run yet.
        """
        self.check_capacity(len(pictures))
        arrived = time.monotonic() if arrived is None else arrived
        allowed = self.settings.deadline_ms
        deadline = arrived + min(allowed, allowed if deadline_ms is None else deadline_ms) / 1000
        loop = asyncio.get_running_loop()
        jobs = [ImageJob(wanted, arrived, deadline, data=data, answer=loop.create_future()) for data in pictures]
        if not jobs:
            return []
        if not self.backend.take(jobs):
            raise Unavailable("others were faster to take the last places in the queue: come back later", {"Retry-After": "1"})
        self._under_way += 1
        self._idle.clear()
        decoding = [self._decoders.submit(self._decode, job) for job in jobs]
        try:
            return await self._answers(jobs, decoding)
        finally:
            self._under_way -= 1
            if self._under_way == 0:
                self._idle.set()

    async def _answers(self, jobs: list[ImageJob], decoding: "list[Future[None]]") -> list[InferenceResult | ServiceError]:
        """What became of each job, by its deadline, which is one for all."""
        over = asyncio.get_running_loop().call_later(jobs[0].deadline - time.monotonic(), _deliver, jobs, [_late()] * len(jobs))
        try:
            answers = [_checked(await job.answer, job) for job in jobs]
        finally:
            over.cancel()
            for job, running in zip(jobs, decoding, strict=True):
                running.cancel()
                self.backend.withdraw(job)
        for one in answers:
            self.metrics.image(one)
        return answers

    def _decode(self, job: ImageJob) -> None:
        """In a decoding thread: bytes to pixels, then to whoever computes."""
        if not job.alive or self.backend.loaded is None:
            return
        started = time.monotonic()
        try:
            job.pixels, job.data = self._pixels(job.data, self.backend.loaded.processor), b""
        except Exception as error:
            self._answered([job], [error])
            return
        job.decoded = time.monotonic()
        job.seconds_to_decode = job.decoded - started
        self.metrics.observe_stage("decode", job.seconds_to_decode)
        self.backend.put(job)

    def _pixels(self, data: ImageSource, processor: DinatImageProcessor) -> Pixels | Array:
        if isinstance(data, Path):
            try:
                data = data.read_bytes()
            except OSError as error:
                raise NoImage(f"it cannot be read: {error.strerror}") from None
        if not isinstance(data, bytes):
            return data if data.dtype == np.float32 else processor.resize(data.astype(np.uint8, copy=False))
        size, enough = processor.output_size, None
        if self.settings.decode == "draft" and size is not None:
            enough = 2 * size[1], 2 * size[0]  # never below twice what is wanted: the resize still smooths
        return processor.resize(decode(data, self.settings.max_pixels, enough))

    def _answered(self, jobs: Sequence[Job], answers: Sequence[InferenceResult | Exception]) -> None:
        """Give answers to who waits for them. From any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(_deliver, jobs, answers)

    def _seconds_to_wait(self, waiting: int) -> int:
        """When half of what waits will have run, at the rate of the last batches."""
        rate = self.backend.rate
        return 1 if rate is None else min(60, max(1, math.ceil(waiting / 2 / rate)))


def _deliver(jobs: Sequence[Job], answers: Sequence[InferenceResult | Exception]) -> None:
    for job, answer in zip(jobs, answers, strict=True):
        if isinstance(job, ImageJob) and not job.answer.done():
            job.answer.set_result(answer)


def _late() -> DeadlinePassed:
    return DeadlinePassed("the answer did not come within the deadline: send fewer pictures at once, or allow more time")


def _checked(answer: InferenceResult | Exception, job: ImageJob) -> InferenceResult | ServiceError:
    """An answer as a door may give it, with its times: what went wrong on this side is for the log alone."""
    if isinstance(answer, Exception) and not isinstance(answer, ServiceError):
        log.error("a picture could not be computed", exc_info=answer)
        return ServiceError("something went wrong on this side; the log has it under this request_id")
    if isinstance(answer, InferenceResult):
        queue, compute = job.started - job.decoded, job.computed - job.started
        return replace(answer, seconds={"decode": job.seconds_to_decode, "queue": queue, "compute": compute})
    return answer
