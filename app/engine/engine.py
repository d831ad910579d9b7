"""The one call through which every door reaches the network, and the network's life: load, warm, run, drain, stop."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import TypeVar

import structlog

from app.engine.batcher import Batcher, Job
from app.engine.runtime import Answer, DeviceLost, LeftOut, Runtime, Unfit, Wanted, devices
from app.engine.runtimes import load_runtimes
from app.errors import DeadlinePassed, ServiceError, TooLarge, Unavailable
from app.images import decode
from app.metrics import Metrics
from app.settings import Settings

log = structlog.get_logger("dinat")

T = TypeVar("T")

RESTARTS = 1
"""How often an engine's thread that died is started again."""


class State(StrEnum):
    """Where the engine is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Engine:
    """Decodes pictures in threads, batches them, and answers. Every method is for the event loop's thread."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.state = State.LOADING
        self.failure: BaseException | None = None
        self.left_out: Sequence[LeftOut] = ()
        self.on_started: Callable[[], object] = lambda: None
        self.metrics = Metrics()
        self.metrics.watch_queue(lambda: self.waiting)
        self._waiting: set[Job] = set()
        self._restarts = 0
        self._drain_until = math.inf
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._runtimes: Sequence[Runtime] = ()
        self._batcher: Batcher | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._draft: tuple[int, int] | None = None

    @property
    def runtimes(self) -> Sequence[Runtime]:
        """The loaded network, once a device. Raises Unavailable, saying why, before the engine is ready and afterwards."""
        if self.state is not State.READY:
            raise Unavailable(self.why_not_ready(), headers={"Retry-After": "1"})
        return self._runtimes

    @property
    def runtime(self) -> Runtime:
        """The first of them: all have the same checkpoint."""
        return self.runtimes[0]

    @property
    def waiting(self) -> int:
        """Pictures taken and not yet running; those being decoded count."""
        return len(self._waiting)

    def why_not_ready(self) -> str:
        """One sentence."""
        if self.state is State.FAILED:
            return str(self.failure)
        return {
            State.LOADING: f"the model {self.settings.model} is loading: try again soon",
            State.DRAINING: "the service is stopping: ask another instance",
            State.READY: "the service is ready",
        }[self.state]

    async def start(self) -> None:
        """Load the checkpoint and warm it up. A failure is kept in `failure`, not raised.

        Calls on_started when it is over, either way.
        """
        self._loop = asyncio.get_running_loop()
        started = time.monotonic()
        try:
            self._runtimes, max_batch = await self._warmed(await _in_own_thread(self.load))
            first = self._runtimes[0]
            size = first.processor.output_size
            if self.settings.decode == "draft" and size is not None:
                self._draft = 2 * size[1], 2 * size[0]  # never below twice what is wanted: the resize still smooths
            self._batcher = Batcher(
                self._runtimes,
                max_batch,
                self.settings.max_wait_ms / 1000,
                on_start=self._batch_started,
                on_batch=self.metrics.batch,
                on_death=self._thread_died,
            )
            self._batcher.start()
        except (Exception, DeviceLost) as error:
            self.state, self.failure = State.FAILED, error
            log.error("the model could not be loaded", model=self.settings.model, reason=str(error))
        else:
            if self.state is State.LOADING:
                self.state = State.READY
            self.metrics.loaded(self.settings.model, self._runtimes, self.left_out)
            if self.left_out:
                log.warning("left out", **{left.what: left.why for left in self.left_out})
            log.info(
                "ready",
                model=self.settings.model,
                device=devices(self._runtimes),
                runtime=first.name,
                precision=first.precision,
                attention=first.attention(),
                seconds=round(time.monotonic() - started, 2),
            )
        self.on_started()

    def load(self) -> Sequence[Runtime]:
        """Read the checkpoint. Raises CheckpointError, ConfigError, ExportError. Runs in a thread."""
        return load_runtimes(self.settings)

    def warm(self, runtime: Runtime, max_batch: int) -> int:
        """Runtime.warm. Runs in a thread."""
        return runtime.warm(max_batch)

    async def _warmed(self, runtimes: Sequence[Runtime]) -> tuple[Sequence[Runtime], int]:
        """The runtimes that compute rightly, and the largest batch that fits all. Where no GPU does, the processor computes."""
        max_batch = self.settings.max_batch or runtimes[0].default_batch
        fit: list[Runtime] = []
        unfit: list[LeftOut] = []
        for runtime in runtimes:
            try:
                max_batch = min(max_batch, await _in_own_thread(self.warm, runtime, max_batch))
            except (Unfit, DeviceLost) as why:
                unfit.append(LeftOut(f"device {runtime.device}", str(why)))
            else:
                fit.append(runtime)
        if not fit:
            on_cpu = {"device": "cpu", "runtime": "auto", "precision": "auto", "attention": "auto"}
            fit = list(await _in_own_thread(load_runtimes, self.settings.model_copy(update=on_cpu)))
            max_batch = min(max_batch, await _in_own_thread(self.warm, fit[0], self.settings.max_batch or fit[0].default_batch))
        self.left_out = list(dict.fromkeys([*unfit, *(left for runtime in fit for left in runtime.left_out)]))
        return fit, max_batch

    async def drain(self) -> None:
        """Take no more work, and wait, DRAIN_SECONDS at most, until all that was taken is answered."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING
        self._drain_until = min(self._drain_until, time.monotonic() + self.settings.drain_seconds)
        try:
            async with asyncio.timeout(self._drain_until - time.monotonic()):
                await self._idle.wait()
        except TimeoutError:
            log.warning("stopping with work undone", requests=self._under_way)

    async def stop(self) -> None:
        """Drain, answer what is left with an error, and end the threads."""
        await self.drain()
        if self._batcher is not None:
            self._batcher.close(Unavailable("the service stopped before this picture's turn came"))
            await asyncio.to_thread(self._batcher.stop)
        self._decoders.shutdown(cancel_futures=True)

    def check_room(self, pictures: int = 1) -> None:
        """Raise Unavailable, saying when to come back, unless that many more pictures may wait."""
        if self.state is not State.READY:
            raise Unavailable(self.why_not_ready(), headers={"Retry-After": "1"})
        limit = self.settings.queue_limit
        if pictures > limit:
            raise TooLarge(f"the request has {pictures} pictures, at most {limit} can wait at once: send fewer")
        if self.waiting + pictures > limit:
            raise Unavailable(
                f"{self.waiting} pictures wait already, at most {limit} may: come back later",
                headers={"Retry-After": str(self._seconds_to_wait())},
            )

    async def submit(
        self, pictures: Sequence[bytes], wanted: Wanted, deadline_ms: int | None = None
    ) -> list[Answer | ServiceError]:
        """Classify pictures given as the bytes of their files; in order, an error in the place of a picture that has one.

        deadline_ms: how long the caller waits, DEADLINE_MS at most and if None.  Raises Unavailable and TooLarge when not even
        one can be taken. Cancelling the call drops what has not run yet.
        """
        self.check_room(len(pictures))
        allowed = self.settings.deadline_ms
        deadline = time.monotonic() + min(allowed, allowed if deadline_ms is None else deadline_ms) / 1000
        self._under_way += 1
        self._idle.clear()
        try:
            return await asyncio.gather(*(self._answer(data, wanted, deadline) for data in pictures))
        finally:
            self._under_way -= 1
            if self._under_way == 0:
                self._idle.set()

    async def _answer(self, data: bytes, wanted: Wanted, deadline: float) -> Answer | ServiceError:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer | Exception] = loop.create_future()

        def deliver(answer: Answer | Exception) -> None:
            if not future.done():
                future.set_result(answer)

        job = Job(data, wanted, deadline, done=lambda answer: loop.call_soon_threadsafe(deliver, answer))
        self._waiting.add(job)
        decoding = loop.run_in_executor(self._decoders, self._decode, job)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                answer = await future
        except TimeoutError:
            answer = DeadlinePassed(
                "the answer did not come within the deadline: send fewer pictures at once, or allow more time"
            )
        finally:
            decoding.cancel()
            job.dropped = True
            self._waiting.discard(job)
        if isinstance(answer, Exception) and not isinstance(answer, ServiceError):
            log.error("a picture could not be computed", exc_info=answer)
            answer = ServiceError("something went wrong on this side; the log has it under this request_id")
        self.metrics.picture(job, answer)
        return answer

    def _decode(self, job: Job) -> None:
        """In a decoding thread: bytes to pixels, then into the queue."""
        if not job.alive:
            return
        started = time.monotonic()
        try:
            assert self._batcher is not None
            job.pixels = self._runtimes[0].processor.resize(decode(job.data, self.settings.max_pixels, self._draft))
            job.data = b""
        except Exception as error:
            job.done(error)
            return
        job.decoded = time.monotonic()
        self.metrics.part("decode", job.decoded - started)
        self._batcher.put(job)

    def _batch_started(self, batch: list[Job]) -> None:
        """In a thread of the engine's: what runs no longer waits."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._waiting.difference_update, batch)

    def _thread_died(self, death: BaseException, runtime: Runtime, under_way: list[Job]) -> None:
        """In a thread of the engine's, as it ends."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._bury, death, runtime, under_way)

    def _bury(self, death: BaseException, runtime: Runtime, under_way: list[Job]) -> None:
        """Answer what the dead thread had under way, and start another, once."""
        reason = f"the engine's thread died: {type(death).__name__}: {death}"
        log.error("the engine's thread died", reason=repr(death), restarts_left=RESTARTS - self._restarts)
        for job in under_way:
            job.done(Unavailable(reason))
        draining = self.state is State.DRAINING
        self.state, self.failure = State.FAILED, RuntimeError(reason)
        assert self._batcher is not None
        if self._restarts == RESTARTS:
            self._batcher.close(Unavailable(reason))
            return
        self._restarts += 1
        state = State.DRAINING if draining else State.READY
        self._restarting = asyncio.get_running_loop().create_task(self._restart(runtime, state))

    async def _restart(self, runtime: Runtime, state: State) -> None:
        assert self._batcher is not None
        try:
            await _in_own_thread(self.warm, runtime, self._batcher.max_batch)
        except (Exception, DeviceLost) as error:
            self._batcher.close(Unavailable(f"{self.failure}; it could not be started again: {error}"))
            return
        self._batcher.start()
        self.state, self.failure = state, None
        log.info("the engine's thread runs again")

    def _seconds_to_wait(self) -> int:
        """When half of what waits will have run, at the rate of the last batches."""
        rate = None if self._batcher is None else self._batcher.rate()
        return 1 if rate is None else min(60, max(1, math.ceil(self.waiting / 2 / rate)))


async def _in_own_thread(call: Callable[..., T], *args: object) -> T:
    """Call in a thread that ends with the call.

    OpenMP keeps a team of threads for each thread that has computed. While there are more of them than cores they sleep at
    each join rather than spin, and a batch of one takes half as long again. So only the engine's own thread may keep a team.
    """
    thread = ThreadPoolExecutor(1)
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, call, *args)
    finally:
        thread.shutdown()
