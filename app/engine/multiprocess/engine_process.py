"""The engine process: runs the model for the frontend processes that connect to it."""

import asyncio
import os
import signal
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from dinat.app.engine.backend import State
from dinat.app.engine.events import BackendEvents
from dinat.app.engine.job import Job
from dinat.app.engine.local_backend import LocalBackend
from dinat.app.engine.multiprocess import wire
from dinat.app.engine.multiprocess.channel import Channel, mapped
from dinat.app.engine.multiprocess.shared_slots import Slots
from dinat.app.engine.multiprocess.wire import (
    CancelMessage,
    FailedMessage,
    JobMessage,
    JobResult,
    LoadedMessage,
    ReadyMessage,
    ResultsMessage,
)
from dinat.app.engine.runtimes.runtime import InferenceResult, LoadedModel
from dinat.app.errors import ServiceError
from dinat.app.metrics import Metrics
from dinat.app.settings import Settings

log = structlog.get_logger("dinat")

LOAD_FAILED_STATUS = 3
"""Exit status when the model cannot be loaded: a restart would not help."""

READY_SECONDS = 10
"""How long the state "ready" is delayed until the frontend processes are ready too."""

FLUSH_SECONDS = 0.2
"""How long a failed engine process sends its last messages before it exits."""


@dataclass(eq=False, kw_only=True)
class FrontendJob(Job):
    """A job of a frontend process.

    Attributes:
        number: Identifies the job to the frontend process.
        slot: The slot that the job holds; None once its pixels are copied.
    """

    frontend: "Frontend"
    number: int
    slot: int | None


class EngineProcess(BackendEvents):
    """Serves frontend processes until the other end of `lifeline` is closed.

    Args:
        listener: Unix socket to which frontend processes connect.
        lifeline: File descriptor of a pipe whose other end the supervisor holds.
        report_status: Receives the engine's state, or the error that it failed with.
        frontends: Number of frontend processes to expect.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        listener: socket.socket,
        lifeline: int,
        report_status: Callable[[str], object],
        frontends: int,
    ) -> None:
        self._settings = settings
        self._listener, self._lifeline = listener, lifeline
        self._report_status, self._expected = report_status, frontends
        self._backend = LocalBackend(settings, metrics, self, restarts=0)
        self._frontends: dict[int, Frontend] = {}
        self._slots: Slots | None = None
        self._slots_lock = threading.Lock()
        self._ready: set[Frontend] = set()
        self._all_ready = asyncio.Event()
        self._stopped = asyncio.Event()

    async def run(self) -> int:
        """Run until the lifeline is closed or the engine fails. Return the exit status, 0 after a closed lifeline."""
        loop = asyncio.get_running_loop()
        for ignored in (signal.SIGTERM, signal.SIGINT):  # the supervisor ends it, after the frontend processes
            signal.signal(ignored, signal.SIG_IGN)
        self._listener.setblocking(False)
        loop.add_reader(self._listener, self._accept)
        loop.add_reader(self._lifeline, self._stopped.set)
        self._report_status(State.LOADING)
        loading = asyncio.create_task(self._backend.start())
        await self._stopped.wait()
        loop.remove_reader(self._lifeline)
        failed = self._backend.state is State.FAILED
        if failed:
            await asyncio.sleep(FLUSH_SECONDS)
        elif not loading.done():
            os._exit(0)  # the thread that loads the model cannot be stopped
        else:
            await self._backend.stop()
        loop.remove_reader(self._listener)
        for frontend in list(self._frontends.values()):
            frontend.channel.close()
        return 0 if not failed else LOAD_FAILED_STATUS if self._slots is None else 1

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        owner = next(number for number in range(1, 256) if number not in self._frontends)
        self._frontends[owner] = frontend = Frontend(self, owner, connection)
        if self._backend.state is State.FAILED:
            frontend.send(FailedMessage(str(self._backend.failure)))
        elif self._backend.loaded is not None and self._slots is not None:
            self._send_loaded(frontend, self._backend.loaded, self._slots)

    async def on_state_change(self) -> None:
        """See BackendEvents."""
        if self._backend.state is State.READY and self._backend.loaded is not None:
            if self._slots is None:
                # Images of no fixed size do not fit into slots; they are sent in shared memory of their own.
                height, width = self._backend.loaded.processor.output_size or (0, 0)
                self._slots = Slots.create(self._settings.queue_limit, max(1, height * width * 3))
            for frontend in self._frontends.values():
                self._send_loaded(frontend, self._backend.loaded, self._slots)
            try:
                await asyncio.wait_for(self._all_ready.wait(), READY_SECONDS)
            except TimeoutError:
                log.warning("frontend processes not ready", ready=len(self._ready), expected=self._expected)
            self._report_status(State.READY)
        elif self._backend.state is State.FAILED:
            self._report_status(str(self._backend.failure))
            for frontend in self._frontends.values():
                frontend.send(FailedMessage(str(self._backend.failure)))
            self._stopped.set()

    def _send_loaded(self, frontend: "Frontend", loaded: LoadedModel, slots: Slots) -> None:
        frontend.send(LoadedMessage(frontend.owner, slots.count, slots.size, slots.descriptor, loaded))

    def on_message(self, frontend: "Frontend", message: wire.Message) -> None:
        """Handle a message of a frontend process."""
        match message:
            case JobMessage():
                self._put(frontend, message)
            case CancelMessage():
                job = frontend.jobs.pop(message.number, None)
                if job is not None:
                    self._cancel([job])
            case ReadyMessage():
                self._ready.add(frontend)
                if len(self._ready) >= self._expected:
                    self._all_ready.set()

    def _put(self, frontend: "Frontend", message: JobMessage) -> None:
        assert self._slots is not None
        if message.pixels is None:
            pixels = self._slots.view(message.slot, message.shape)
        else:
            pixels = mapped(message.pixels, message.shape, message.dtype)
        job = FrontendJob(
            message.options,
            message.arrived,
            message.deadline,
            pixels,
            message.decoded,
            frontend=frontend,
            number=message.number,
            slot=message.slot,
        )
        frontend.jobs[message.number] = job
        self._backend.put(job)

    def on_closed(self, frontend: "Frontend") -> None:
        """A frontend process exited: cancel its jobs and free its slots."""
        del self._frontends[frontend.owner]
        self._ready.discard(frontend)
        self._cancel(list(frontend.jobs.values()))
        if self._slots is not None:
            with self._slots_lock:
                for slot in self._slots.owned(frontend.owner):  # reserved, and their jobs not sent
                    self._slots.release(slot)

    def _cancel(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.cancelled = True
        self._release_slots(jobs)

    def _release_slots(self, jobs: Sequence[Job]) -> None:
        with self._slots_lock:
            for job in jobs:
                if isinstance(job, FrontendJob) and job.slot is not None and self._slots is not None:
                    self._slots.release(job.slot)
                    job.slot = None

    def on_batch_start(self, batch: Sequence[Job]) -> None:
        """See BackendEvents. The pixels are copied, so the slots are free."""
        self._release_slots(batch)

    def on_results(self, jobs: Sequence[Job], results: Sequence[InferenceResult | Exception]) -> None:
        """See BackendEvents. Results without arrays are sent in one message for each frontend process."""
        plain: dict[Frontend, list[JobResult]] = defaultdict(list)
        self._release_slots(jobs)  # of jobs that never ran
        for job, result in zip(jobs, results, strict=True):
            assert isinstance(job, FrontendJob)
            if job.frontend.jobs.pop(job.number, None) is None:
                continue  # cancelled meanwhile
            job_result = JobResult(job.number, job.started, job.computed, result)
            if isinstance(result, InferenceResult) and (result.features or result.neighborhoods):
                job.frontend.send(ResultsMessage(self._backend.rate, [job_result]))
                continue
            if isinstance(result, Exception) and not isinstance(result, ServiceError):
                log.error("inference failed", exc_info=result)
            plain[job.frontend].append(job_result)
        for frontend, job_results in plain.items():
            frontend.send(ResultsMessage(self._backend.rate, job_results))


class Frontend:
    """A connected frontend process.

    Attributes:
        owner: Its number as an owner of slots.
        jobs: Its jobs that have not ended, by number.
    """

    def __init__(self, engine: EngineProcess, owner: int, connection: socket.socket) -> None:
        self.owner = owner
        self.jobs: dict[int, FrontendJob] = {}
        self.channel = Channel(
            connection,
            lambda *received: engine.on_message(self, wire.decode(*received)),
            lambda: engine.on_closed(self),
        )

    def send(self, message: wire.Message) -> None:
        """Send a message. Safe from any thread."""
        self.channel.send(*message.encode())
