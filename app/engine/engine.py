"""The inference engine: the one interface through which endpoints and commands classify images."""

import asyncio
import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import structlog

from dinat.app.engine.backend import Backend, State
from dinat.app.engine.events import BackendEvents
from dinat.app.engine.job import Job
from dinat.app.engine.local_backend import LocalBackend, in_own_thread
from dinat.app.engine.runtimes.runtime import Array, InferenceOptions, InferenceResult, LoadedModel, describe_not_finite
from dinat.app.errors import BrokenModel, DeadlinePassed, ServiceError, TooLarge, Unavailable, Unprocessable
from dinat.app.image_file import CHEAP_SIDE, ImageFile
from dinat.app.images import decode, inspect, read_file, resize_within
from dinat.app.metrics import Metrics
from dinat.app.plurals import plural
from dinat.app.settings import Settings
from dinat.model import DinatImageProcessor
from dinat.model.cpu.resize import Pixels
from dinat.model.native import library

if TYPE_CHECKING:
    from dinat.app.decode_processes import DecodeProcesses

log = structlog.get_logger("dinat")

ImageSource = bytes | Path | Pixels | Array | Callable[[], bytes | Pixels]

BackendFactory = Callable[[Settings, Metrics, BackendEvents], Backend]


@dataclass(eq=False, kw_only=True)
class ImageJob(Job):
    """A job of this process.

    Attributes:
        source: What was submitted; empty once it is decoded.
        result: Receives the result.
        decode_seconds: Time that decoding took.
        decoding: Decodes the image in a process, if it is not decoded in a thread.
    """

    source: ImageSource | ImageFile
    result: "asyncio.Future[InferenceResult | Exception]"
    decode_seconds: float = 0.0
    decoding: "asyncio.Task[None] | None" = None


class Engine(BackendEvents):
    """Decodes images in threads and processes, runs inference on a backend, and returns results.

    All methods run on the event loop's thread, except the events of the backend.

    Args:
        create_backend: Creates the backend; by default the model runs in this process.
        metrics: Where to count; a registry of its own if None.
    """

    def __init__(
        self, settings: Settings, create_backend: BackendFactory = LocalBackend, metrics: Metrics | None = None
    ) -> None:
        self.settings = settings
        self.metrics = metrics or Metrics()
        self.backend = create_backend(settings, self.metrics, self)
        self.metrics.add_engine(settings.served_name, lambda: self.backend.waiting, lambda: self.backend.loaded)
        self.on_started: Callable[[], object] = lambda: None
        self._draining = False
        self._closed_at = math.inf
        self._drain_until = math.inf
        self._jobs: set[ImageJob] = set()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._processes = _decode_processes(settings)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def state(self) -> State:
        """State of the service. While it is DRAINING the engine may still accept work: see announce_drain."""
        draining = self._draining and self.backend.state is not State.FAILED
        return State.DRAINING if draining else self.backend.state

    @property
    def failure(self) -> BaseException | None:
        """The error that the backend failed with, if it failed."""
        return self.backend.failure

    @property
    def loaded(self) -> LoadedModel:
        """The loaded model.

        Raises:
            Unavailable: It is not ready; the message says why.
        """
        if self.backend.loaded is None or self.backend.state is not State.READY:
            raise self._unavailable()
        return self.backend.loaded

    @property
    def waiting(self) -> int:
        """Number of queued images: accepted and not running yet, including those being decoded."""
        return self.backend.waiting

    def _unavailable(self) -> Unavailable:
        return Unavailable(self.status_detail(), {"Retry-After": "1"})

    def status_detail(self) -> str:
        """One sentence about the state, for clients."""
        if self.backend.failure is not None:
            return str(self.backend.failure)
        return {
            State.LOADING: f"the model {self.settings.served_name} is loading: retry later",
            State.DRAINING: "the service is stopping: retry on another instance",
            State.READY: "the service is ready",
        }[self.state]

    async def start(self) -> None:
        """Load the model and warm it up, then call on_started. An error is stored in `failure`, not raised."""
        self._loop = asyncio.get_running_loop()
        await in_own_thread(library)  # compile the resize kernels, if needed, before images arrive
        await self.backend.start()
        self.on_started()

    def announce_drain(self) -> None:
        """Change the state to DRAINING, so that load balancers send requests elsewhere. Work is still accepted."""
        self._draining = True

    async def drain(self) -> None:
        """Reject work that arrives from now on, and wait until the accepted work has ended.

        Images without a result after DRAIN_SECONDS fail with Unavailable.
        """
        self.announce_drain()
        now = time.monotonic()
        self._closed_at = min(self._closed_at, now)
        self._drain_until = min(self._drain_until, now + self.settings.drain_seconds)
        try:
            async with asyncio.timeout(self._drain_until - now):
                await self._idle.wait()
        except TimeoutError:
            if self._in_flight:
                log.warning("drain timed out: accepted requests have not ended")
            self._closed_at = -math.inf  # also for images whose upload or decompression ends later
            _set_results([*self._jobs], [_stopped()] * len(self._jobs))

    @contextlib.contextmanager
    def in_flight(self) -> Iterator[None]:
        """While accepted work is done: `drain` waits until it has ended."""
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    async def stop(self) -> None:
        """Drain, fail the remaining jobs, and stop the threads."""
        await self.drain()
        await self.backend.stop()
        if self._processes is not None:
            await self._processes.stop()
        self._decoders.shutdown(cancel_futures=True)

    def check_accepted(self, arrived: float) -> None:
        """Check that the engine accepts work that arrived at a time, in seconds of time.monotonic.

        Raises:
            Unavailable: The work arrived after the start of the drain.
        """
        if arrived > self._closed_at:
            raise self._unavailable()

    def check_capacity(self, count: int = 1) -> None:
        """Check that `count` more images can be queued.

        Raises:
            Unavailable: The model is not ready, or the queue is full; Retry-After says when to retry.
            TooLarge: `count` exceeds the queue limit.
        """
        if self.backend.state is not State.READY:
            raise self._unavailable()
        limit = self.settings.queue_limit
        if count > limit:
            raise TooLarge(
                f"the request has {plural(count, 'image')}, at most {limit} can be queued: send fewer images per request"
            )
        waiting = self.waiting
        if waiting + count > limit:
            raise Unavailable(
                f"the queue is full ({waiting} of {limit} images): retry later",
                headers={"Retry-After": str(self._retry_after(waiting))},
            )

    def deadline_error(self, arrived: float) -> DeadlinePassed | None:
        """The error for a request whose deadline has passed, or None.

        Args:
            arrived: When the request arrived, in seconds of time.monotonic.
        """
        return _deadline_passed() if time.monotonic() > arrived + self.settings.deadline_ms / 1000 else None

    async def submit(
        self,
        images: Sequence[ImageSource],
        options: InferenceOptions,
        deadline_ms: int | None = None,
        arrived: float | None = None,
    ) -> list[InferenceResult | ServiceError]:
        """Classify images. Cancelling the call cancels the images that do not run yet.

        Args:
            images: Each the bytes of a file, its path, or (H, W, 3): uint8 of any size, or float32, resized and normalized.
                Or a function that returns bytes or uint8, called when the image is decoded.
            options: What to compute, for all images.
            deadline_ms: How long the caller waits; DEADLINE_MS if None, and at most.
            arrived: Start of the deadline, in seconds of time.monotonic; now if None.

        Returns:
            For each image, in order, its result or its error.

        Raises:
            Unavailable: The engine does not accept work now, or the queue is full.
            TooLarge: There are more images than the queue holds.
        """
        arrived = time.monotonic() if arrived is None else arrived
        self.check_accepted(arrived)
        self.check_capacity(len(images))
        limit_ms = self.settings.deadline_ms
        deadline = arrived + min(limit_ms, limit_ms if deadline_ms is None else deadline_ms) / 1000
        loop = asyncio.get_running_loop()
        jobs = [ImageJob(options, arrived, deadline, source=source, result=loop.create_future()) for source in images]
        if not jobs:
            return []
        if not self.backend.reserve(jobs):
            raise Unavailable("the queue is full: retry later", {"Retry-After": "1"})  # filled by another frontend process
        with self.in_flight():
            decoding = [self._decoders.submit(self._decode, job) for job in jobs]
            return await self._wait_for_results(jobs, decoding)

    def on_batch_start(self, batch: Sequence[Job]) -> None:
        """See BackendEvents."""

    def on_results(self, jobs: Sequence[Job], results: Sequence[InferenceResult | Exception]) -> None:
        """See BackendEvents."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(_set_results, jobs, results)

    async def on_state_change(self) -> None:
        """See BackendEvents."""

    async def _wait_for_results(
        self, jobs: list[ImageJob], decoding: "list[Future[None]]"
    ) -> list[InferenceResult | ServiceError]:
        """Wait for all results until the deadline, which all jobs share."""
        timer = asyncio.get_running_loop().call_later(
            jobs[0].deadline - time.monotonic(), _set_results, jobs, [_deadline_passed()] * len(jobs)
        )
        self._jobs.update(jobs)
        try:
            results = [self._public_result(await job.result, job) for job in jobs]
        finally:
            timer.cancel()
            self._jobs.difference_update(jobs)
            for job, future in zip(jobs, decoding, strict=True):
                future.cancel()
                self.backend.release(job)
                if job.decoding is not None:
                    job.decoding.cancel()
        for result in results:
            self.metrics.count_image(result)
        return results

    def _public_result(self, result: InferenceResult | Exception, job: ImageJob) -> InferenceResult | ServiceError:
        """A result with its times, or an error without internal details, which are logged instead."""
        if isinstance(result, InferenceResult):
            if not result.is_finite:
                assert self.backend.loaded is not None
                return BrokenModel(describe_not_finite(self.settings.served_name, self.backend.loaded.precision))
            queue, compute = job.started - job.decoded, job.computed - job.started
            return replace(result, seconds={"decode": job.decode_seconds, "queue": queue, "compute": compute})
        if isinstance(result, ServiceError):
            return result
        log.error("inference failed", exc_info=result)
        return ServiceError("internal error: see the log of the service for this request_id")

    def _decode(self, job: ImageJob) -> None:
        """Decode and resize an image, and put its job; runs in a decoding thread. Images that may cost much go to a process."""
        if not job.active or self.backend.loaded is None:
            return
        started = time.monotonic()
        try:
            source = _read(job.source)
            if isinstance(source, ImageFile) and not source.is_cheap and self._processes is not None:
                job.source = source
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._start_decoding, job)
                return
            job.pixels, job.source = self._pixels(source, self.backend.loaded.processor), b""
        except Exception as error:
            self.on_results([job], [error])
            return
        self._put(job, started)

    def _start_decoding(self, job: ImageJob) -> None:
        if job.active:
            job.decoding = asyncio.get_running_loop().create_task(self._decode_in_process(job))

    async def _decode_in_process(self, job: ImageJob) -> None:
        """Decode and resize an image in a process, and put its job."""
        started = time.monotonic()
        loaded, file = self.backend.loaded, job.source
        assert self._processes is not None and isinstance(file, ImageFile)
        try:
            if loaded is None:
                raise self._unavailable()
            job.pixels = await self._processes.decode(file, loaded.processor, self._draft(loaded.processor))
            job.source = b""
            await asyncio.get_running_loop().run_in_executor(self._decoders, self._put, job, started)
        except Exception as error:
            _set_results([job], [error])

    def _put(self, job: ImageJob, started: float) -> None:
        """Put a job whose image is decoded."""
        job.decoded = time.monotonic()
        job.decode_seconds = job.decoded - started
        self.metrics.observe_part("decode", job.decode_seconds)
        self.backend.put(job)

    def _pixels(self, source: ImageFile | Pixels | Array, processor: DinatImageProcessor) -> Pixels | Array:
        max_pixels = self.settings.max_pixels
        if isinstance(source, ImageFile):
            return resize_within(processor, decode(source, max_pixels, self._draft(processor)), max_pixels)
        if source.dtype == np.float32:
            return source
        side = max(source.shape)
        if side > CHEAP_SIDE:  # such a file would be resized in a process
            raise Unprocessable(f"a tensor with a side of {side:,} pixels is too long: the maximum is {CHEAP_SIDE:,}")
        return resize_within(processor, source.astype(np.uint8, copy=False), max_pixels)

    def _draft(self, processor: DinatImageProcessor) -> tuple[int, int] | None:
        """The (width, height) that a large JPEG may be decoded to."""
        size = processor.output_size
        if self.settings.decode != "draft" or size is None:
            return None
        return 2 * size[1], 2 * size[0]  # at least twice the output size, so that the resize still smooths

    def _retry_after(self, waiting: int) -> int:
        """Seconds until half of the queue has run, at the current rate: 1 to 60."""
        rate = self.backend.rate
        return 1 if rate is None else min(60, max(1, math.ceil(waiting / 2 / rate)))


def _decode_processes(settings: Settings) -> "DecodeProcesses | None":
    """What decodes images that may cost much; None if this system cannot fork: they are decoded in threads."""
    if not hasattr(os, "fork"):
        return None
    from dinat.app.decode_processes import DecodeProcesses

    return DecodeProcesses(settings.decode_threads, settings.max_pixels, settings.decode_seconds)


def _read(source: ImageSource | ImageFile) -> ImageFile | Pixels | Array:
    """Read an image, and check the structure of an image file. Arrays are returned unchanged."""
    if isinstance(source, Path):
        source = read_file(source)
    elif callable(source):
        source = source()
    return inspect(source) if isinstance(source, bytes) else source


def _set_results(jobs: Sequence[Job], results: Sequence[InferenceResult | Exception]) -> None:
    for job, result in zip(jobs, results, strict=True):
        if isinstance(job, ImageJob) and not job.result.done():
            job.result.set_result(result)


def _stopped() -> Unavailable:
    return Unavailable("the service stopped before this image was computed: retry on another instance", {"Retry-After": "1"})


def _deadline_passed() -> DeadlinePassed:
    return DeadlinePassed("no result within the deadline: send fewer images per request, or set a longer deadline")
