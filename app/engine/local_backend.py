"""The network's life: load, warm, run in batches, be started again when its thread dies, stop."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import structlog
import torch

from dinat.app.engine.backend import State
from dinat.app.engine.batcher import Batcher, Job, ResultCallback
from dinat.app.engine.runtimes.runtime import (
    DeviceLost,
    DeviceUnusable,
    Disabled,
    InferenceResult,
    LoadedModel,
    Runtime,
    devices,
    prepared,
)
from dinat.app.engine.runtimes.selection import load_runtimes
from dinat.app.errors import Unavailable
from dinat.app.metrics import Metrics
from dinat.app.settings import Settings
from dinat.model import DinatForImageClassification
from dinat.model.neighborhoods import neighborhoods

log = structlog.get_logger("dinat")

T = TypeVar("T")

RESTARTS = 1
"""How often an engine that died, thread or process, is started again."""


class LocalBackend:
    """A Backend in this process.

    answered: told of every job that was put.  on_start: of those of each batch, as it starts.  on_change: called when `state`
    is another, and awaited before "ready" is said.  restarts: how often a thread that dies is started again.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        answered: ResultCallback,
        on_start: Callable[[list[Job]], object] = lambda _: None,
        on_change: Callable[[], Awaitable[object]] | None = None,
        restarts: int = RESTARTS,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.state = State.LOADING
        self.failure: BaseException | None = None
        self.loaded: LoadedModel | None = None
        self.runtimes: Sequence[Runtime] = ()
        self._answered, self._on_start, self._on_change = answered, on_start, on_change
        self._waiting: set[Job] = set()
        self._restarts_left = restarts
        self._batcher: Batcher | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._settled = asyncio.Event()
        self._explaining = ThreadPoolExecutor(1, thread_name_prefix="explain")
        self._explainer: DinatForImageClassification | None = None
        self._restarting: Future[None] | None = None

    @property
    def waiting(self) -> int:
        """See Backend."""
        return len(self._waiting)

    @property
    def rate(self) -> float | None:
        """See Backend."""
        return None if self._batcher is None else self._batcher.rate()

    async def start(self) -> None:
        """See Backend."""
        self._loop = asyncio.get_running_loop()
        started = time.monotonic()
        try:
            self.runtimes, max_batch, disabled = await self._warmed(await _in_own_thread(self.load))
            first = self.runtimes[0]
            self.loaded = LoadedModel(
                first.config,
                first.processor,
                first.name,
                devices(self.runtimes),
                first.precision,
                first.attention(),
                disabled,
            )
            self._batcher = Batcher(
                self.runtimes,
                max_batch,
                self.settings.max_wait_ms / 1000,
                answered=self._answered,
                on_start=self._batch_started,
                on_batch=self.metrics.batch,
                on_crash=self._thread_crashed,
            )
            self._batcher.start()
            self.state = State.READY
            await self._changed()
        except (Exception, DeviceLost) as error:
            self.state, self.failure = State.FAILED, error
            log.error("the model could not be loaded", model=self.settings.model, reason=str(error))
            await self._changed()
        else:
            self.metrics.watch_devices(self.runtimes)
            if disabled:
                log.warning("left out", **{left.name: left.reason for left in disabled})
            log.info(
                "ready",
                model=self.settings.model,
                device=self.loaded.device,
                runtime=self.loaded.runtime,
                precision=self.loaded.precision,
                attention=self.loaded.attention,
                seconds=round(time.monotonic() - started, 2),
            )
        self._settled.set()

    def load(self) -> Sequence[Runtime]:
        """Read the checkpoint. Raises CheckpointError, ConfigError, ExportError. Runs in a thread."""
        return load_runtimes(self.settings)

    def warm(self, runtime: Runtime, max_batch: int) -> int:
        """Runtime.warm. Runs in a thread."""
        return runtime.warm(max_batch)

    async def _changed(self) -> None:
        if self._on_change is not None:
            await self._on_change()

    async def _warmed(self, runtimes: Sequence[Runtime]) -> tuple[Sequence[Runtime], int, Sequence[Disabled]]:
        """The runtimes that compute rightly, the largest batch that fits all, and what does not serve.

        Where no GPU computes rightly, the processor computes.
        """
        max_batch = self.settings.max_batch or runtimes[0].default_batch
        fit: list[Runtime] = []
        unfit: list[Disabled] = []
        for runtime in runtimes:
            try:
                max_batch = min(max_batch, await _in_own_thread(self.warm, runtime, max_batch))
            except (DeviceUnusable, DeviceLost) as why:
                unfit.append(Disabled(f"device {runtime.device}", str(why)))
            else:
                fit.append(runtime)
        if not fit:
            on_cpu = {"device": "cpu", "runtime": "auto", "precision": "auto", "attention": "auto"}
            fit = list(await _in_own_thread(load_runtimes, self.settings.model_copy(update=on_cpu)))
            max_batch = min(max_batch, await _in_own_thread(self.warm, fit[0], self.settings.max_batch or fit[0].default_batch))
        disabled = dict.fromkeys([*unfit, *(left for runtime in fit for left in runtime.disabled)])
        return fit, max_batch, list(disabled)

    def take(self, jobs: Sequence[Job]) -> bool:
        """See Backend."""
        if self.waiting + len(jobs) > self.settings.queue_limit:
            return False
        self._waiting.update(jobs)
        return True

    def put(self, job: Job) -> None:
        """See Backend."""
        assert self._batcher is not None
        if job.wanted.point is None:
            self._batcher.put(job)
        else:
            self._explaining.submit(self._explain, job)

    def _explain(self, job: Job) -> None:
        """In a thread of its own: the neighborhoods of a point. By a network of its own, in float32 on the processor."""
        assert job.pixels is not None and job.wanted.point is not None and self.loaded is not None
        pixels = np.array(job.pixels[None])
        job.started, job.pixels = time.monotonic(), None
        self._batch_started([job])
        if not job.alive:
            return
        try:
            if self._explainer is None:
                self._explainer = DinatForImageClassification.from_pretrained(
                    self.settings.model, revision=self.settings.revision
                ).eval()
            pixel_values = prepared(self.loaded.processor, torch.from_numpy(pixels))
            seen = neighborhoods(self._explainer, pixel_values, *job.wanted.point)
            job.computed = time.monotonic()
            nothing = np.empty(0, np.int64), np.empty(0, np.float32)
            self._answered([job], [InferenceResult(*nothing, {}, seen)])
        except Exception as error:
            self._answered([job], [error])

    def withdraw(self, job: Job) -> None:
        """See Backend."""
        job.dropped = True
        self._waiting.discard(job)

    async def stop(self) -> None:
        """See Backend."""
        if self._loop is not None:
            await self._settled.wait()
        if self._batcher is not None:
            self._batcher.close(Unavailable("the service stopped before this picture's turn came"))
            await asyncio.to_thread(self._batcher.stop)
        self._explaining.shutdown(cancel_futures=True)

    def _batch_started(self, batch: list[Job]) -> None:
        """In a thread of the engine's: what runs no longer waits."""
        self._waiting.difference_update(batch)
        self.metrics.queued(batch)
        self._on_start(batch)

    def _thread_crashed(self, death: BaseException, runtime: Runtime, in_flight: list[Job]) -> None:
        """In a thread of the engine's, as it ends."""
        assert self._loop is not None
        burial = self._restart(death, runtime, in_flight)
        self._restarting = asyncio.run_coroutine_threadsafe(burial, self._loop)

    async def _restart(self, death: BaseException, runtime: Runtime, in_flight: list[Job]) -> None:
        """Answer what the dead thread had under way, and start another, once."""
        reason = f"the engine's thread died: {type(death).__name__}: {death}"
        log.error("the engine's thread died", reason=repr(death), restarts_left=self._restarts_left)
        self._answered(in_flight, [Unavailable(reason)] * len(in_flight))
        self.state, self.failure = State.FAILED, RuntimeError(reason)
        assert self._batcher is not None
        if not self._restarts_left:
            self._batcher.close(Unavailable(reason))
        await self._changed()
        if not self._restarts_left:
            return
        self._restarts_left -= 1
        try:
            await _in_own_thread(self.warm, runtime, self._batcher.max_batch)
        except (Exception, DeviceLost) as error:
            self._batcher.close(Unavailable(f"{reason}; it could not be started again: {error}"))
            return
        self._batcher.start()
        self.state, self.failure = State.READY, None
        await self._changed()
        log.info("the engine's thread runs again")


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
