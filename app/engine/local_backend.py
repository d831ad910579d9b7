"""A backend in this process: loads the model, warms it up, runs batches, and restarts crashed threads."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import structlog
import torch

from dinat.app.contention import cpu_times, describe_contention
from dinat.app.engine.backend import State
from dinat.app.engine.batcher import Batcher
from dinat.app.engine.events import BackendEvents, BatcherEvents
from dinat.app.engine.job import Job
from dinat.app.engine.neighborhoods import NeighborhoodWorker
from dinat.app.engine.runtimes.runtime import (
    DeviceLost,
    DeviceUnusable,
    Disabled,
    InferenceResult,
    LoadedModel,
    Runtime,
    device_names,
)
from dinat.app.engine.runtimes.selection import load_runtimes
from dinat.app.errors import Unavailable
from dinat.app.metrics import Metrics
from dinat.app.settings import Settings

log = structlog.get_logger("dinat")

T = TypeVar("T")

RESTARTS = 1
"""How often a crashed engine, thread or process, is restarted."""


class LocalBackend(BatcherEvents):
    """A Backend in this process.

    Args:
        events: Receives results, batch starts and state changes.
        restarts: How often a crashed thread is restarted.
    """

    def __init__(self, settings: Settings, metrics: Metrics, events: BackendEvents, restarts: int = RESTARTS) -> None:
        self.settings = settings
        self.metrics = metrics
        self.state = State.LOADING
        self.failure: BaseException | None = None
        self.loaded: LoadedModel | None = None
        self.runtimes: Sequence[Runtime] = ()
        self._events = events
        self._waiting: set[Job] = set()
        self._restarts_left = restarts
        self._batcher: Batcher | None = None
        self._neighborhoods = NeighborhoodWorker(settings, self)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._start_ended = asyncio.Event()
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
        started, times = time.monotonic(), cpu_times()
        try:
            self.runtimes, max_batch, disabled = await self._warm_up(await in_own_thread(self.load))
            first = self.runtimes[0]
            self.loaded = LoadedModel(
                first.config,
                first.processor,
                first.name,
                device_names(self.runtimes),
                first.precision,
                first.attention(),
                disabled,
            )
            self._batcher = Batcher(self.runtimes, max_batch, self.settings.max_wait_ms / 1000, self)
            self._batcher.start()
            self.state = State.READY
            await self._events.on_state_change()
        except (Exception, DeviceLost) as error:
            self.state, self.failure = State.FAILED, error
            log.error("model failed to load", model=self.settings.model, reason=str(error))
            await self._events.on_state_change()
        else:
            self.metrics.watch_devices(self.runtimes)
            if first.device == "cpu" and (shared := describe_contention(times)) is not None:
                log.warning(shared)
            if disabled:
                log.warning("disabled", **{entry.name: entry.reason for entry in disabled})
            log.info(
                "ready",
                model=self.settings.model,
                device=self.loaded.device,
                runtime=self.loaded.runtime,
                precision=self.loaded.precision,
                attention=self.loaded.attention,
                threads=torch.get_num_threads(),
                seconds=round(time.monotonic() - started, 2),
            )
        finally:  # also if this is cancelled
            self._start_ended.set()

    def load(self) -> Sequence[Runtime]:
        """Load the checkpoint; runs in a thread. Raises CheckpointError, ConfigError, ExportError."""
        return load_runtimes(self.settings)

    def warm(self, runtime: Runtime, max_batch: int) -> int:
        """See Runtime.warm; runs in a thread."""
        return runtime.warm(max_batch)

    async def _warm_up(self, runtimes: Sequence[Runtime]) -> tuple[Sequence[Runtime], int, Sequence[Disabled]]:
        """Warm up the runtimes, and fall back to the CPU if no GPU passes its self-check.

        Returns:
            The runtimes that passed, the largest batch that fits all of them, and what is disabled.
        """
        max_batch = self.settings.max_batch or runtimes[0].default_batch
        usable: list[Runtime] = []
        unusable: list[Disabled] = []
        for runtime in runtimes:
            try:
                max_batch = min(max_batch, await in_own_thread(self.warm, runtime, max_batch))
            except (DeviceUnusable, DeviceLost) as error:
                unusable.append(Disabled(f"device {runtime.device}", str(error)))
            else:
                usable.append(runtime)
        if not usable:
            on_cpu = {"device": "cpu", "runtime": "auto", "precision": "auto", "attention": "auto"}
            usable = list(await in_own_thread(load_runtimes, self.settings.model_copy(update=on_cpu)))
            size = self.settings.max_batch or usable[0].default_batch
            max_batch = min(max_batch, await in_own_thread(self.warm, usable[0], size))
        disabled = dict.fromkeys([*unusable, *(entry for runtime in usable for entry in runtime.disabled)])
        return usable, max_batch, list(disabled)

    def reserve(self, jobs: Sequence[Job]) -> bool:
        """See Backend."""
        if self.waiting + len(jobs) > self.settings.queue_limit:
            return False
        self._waiting.update(jobs)
        return True

    def put(self, job: Job) -> None:
        """See Backend."""
        assert self._batcher is not None and self.loaded is not None
        if job.options.point is None:
            self._batcher.put(job)
        else:
            self._neighborhoods.put(job, self.loaded.processor)

    def release(self, job: Job) -> None:
        """See Backend."""
        job.cancelled = True
        self._waiting.discard(job)

    async def stop(self) -> None:
        """See Backend."""
        if self._loop is not None:
            await self._start_ended.wait()
        if self._batcher is not None:
            self._batcher.close(Unavailable("the service stopped before this image was computed"))
            await asyncio.to_thread(self._batcher.stop)
        self._neighborhoods.stop()

    def on_batch_start(self, batch: Sequence[Job]) -> None:
        """See BatcherEvents. Jobs that run no longer wait."""
        self._waiting.difference_update(batch)
        self.metrics.observe_queue(batch)
        self._events.on_batch_start(batch)

    def on_batch_end(self, size: int, seconds: float) -> None:
        """See BatcherEvents."""
        self.metrics.observe_batch(size, seconds)

    def on_results(self, jobs: Sequence[Job], results: Sequence[InferenceResult | Exception]) -> None:
        """See BatcherEvents."""
        self._events.on_results(jobs, results)

    def on_crash(self, error: BaseException, runtime: Runtime, in_flight: Sequence[Job]) -> None:
        """See BatcherEvents."""
        assert self._loop is not None
        # Stored because the event loop has only weak references to tasks.
        self._restarting = asyncio.run_coroutine_threadsafe(self._restart(error, runtime, in_flight), self._loop)

    async def _restart(self, error: BaseException, runtime: Runtime, in_flight: Sequence[Job]) -> None:
        """Fail the jobs of a crashed thread, and start another thread while restarts are left."""
        reason = f"the engine thread crashed: {type(error).__name__}: {error}"
        log.error("engine thread crashed", reason=repr(error), restarts_left=self._restarts_left)
        self._events.on_results(in_flight, [Unavailable(reason)] * len(in_flight))
        self.state, self.failure = State.FAILED, RuntimeError(reason)
        assert self._batcher is not None
        if not self._restarts_left:
            self._batcher.close(Unavailable(reason))
        await self._events.on_state_change()
        if not self._restarts_left:
            return
        self._restarts_left -= 1
        try:
            await in_own_thread(self.warm, runtime, self._batcher.max_batch)
        except (Exception, DeviceLost) as restart_error:
            self._batcher.close(Unavailable(f"{reason}; the restart failed: {restart_error}"))
            return
        self._batcher.start()
        self.state, self.failure = State.READY, None
        await self._events.on_state_change()
        log.info("engine thread restarted")


async def in_own_thread(call: Callable[..., T], *args: object) -> T:
    """Call in a thread that ends with the call. Nothing waits for the thread if this is cancelled, nor when the process exits.

    OpenMP creates a team of threads for each thread that has computed. With more of them than cores they sleep at each join
    instead of spinning, and a batch of one takes 1.5 times as long. So only the engine thread may own a team.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # from now on the future cannot be cancelled, and takes the result in any case

    def run() -> None:
        try:
            result = call(*args)
        except BaseException as error:  # DeviceLost is no Exception
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)
