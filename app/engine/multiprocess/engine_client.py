"""The backend of a frontend process: a client of the engine process."""

import asyncio
import itertools
import os
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dinat.app.engine.backend import State
from dinat.app.engine.events import BackendEvents
from dinat.app.engine.job import Job
from dinat.app.engine.multiprocess import wire
from dinat.app.engine.multiprocess.channel import Channel, share
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
from dinat.app.errors import Unavailable
from dinat.app.metrics import Metrics
from dinat.app.settings import Settings

RECONNECT_SECONDS = 0.1


@dataclass(eq=False, slots=True)
class PendingJob:
    """A job that has a place in the queue and is not released.

    Attributes:
        slot: The slot that this process owns; None once the job is sent.
        number: Identifies the job to the engine process; None until it is sent.
    """

    job: Job
    slot: int | None
    number: int | None = None


class EngineClient:
    """A Backend that sends jobs to the engine process. It reconnects when the engine process exits and is restarted.

    A place in the queue is a slot of memory that all processes share. This process owns the slot until the job is sent, then
    the engine process owns it and frees it.

    Args:
        events: Receives results.
        address: Path of the Unix socket on which the engine process listens.
        responds: Returns whether the engine process responds. The state is FAILED while it does not.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        events: BackendEvents,
        address: str,
        responds: Callable[[], bool] = lambda: True,
    ) -> None:
        self.settings = settings
        self._state = State.LOADING
        self._failure: BaseException | None = None
        self._responds = responds
        self.loaded: LoadedModel | None = None
        self.rate: float | None = None
        self._events = events
        self._address = address
        self._start_ended = asyncio.Event()
        self._stopping = False
        self._lock = threading.Lock()  # guards everything below
        self._channel: Channel | None = None
        self._slots: Slots | None = None
        self._owner = 0
        self._pending: dict[Job, PendingJob] = {}
        self._sent: dict[int, PendingJob] = {}
        self._numbers = itertools.count()

    @property
    def state(self) -> State:
        """See Backend."""
        return self._state if self._responds() else State.FAILED

    @property
    def failure(self) -> BaseException | None:
        """See Backend."""
        return self._failure if self._responds() else RuntimeError("the engine process does not respond: retry later")

    @property
    def waiting(self) -> int:
        """See Backend."""
        return 0 if self._slots is None else self._slots.used

    async def start(self) -> None:
        """See Backend."""
        self._connect()
        await self._start_ended.wait()

    def reserve(self, jobs: Sequence[Job]) -> bool:
        """See Backend."""
        with self._lock:
            slots = None if self._slots is None else self._slots.acquire(self._owner, len(jobs))
            if slots is None:
                return False
            for job, slot in zip(jobs, slots, strict=True):
                self._pending[job] = PendingJob(job, slot)
            return True

    def put(self, job: Job) -> None:
        """See Backend."""
        pixels = job.pixels
        assert pixels is not None
        fits = self._slots is not None and pixels.nbytes <= self._slots.size and pixels.dtype == np.uint8
        descriptor = None if fits else share([pixels])
        with self._lock:
            pending = self._pending.get(job)
            if pending is not None and pending.slot is not None and self._slots is not None and self._channel is not None:
                if fits:
                    self._slots.view(pending.slot, pixels.shape)[:] = pixels
                number = next(self._numbers)
                message = JobMessage(
                    number,
                    pending.slot,
                    pixels.shape,
                    pixels.dtype.str,
                    job.arrived,
                    job.deadline,
                    job.decoded,
                    job.options,
                    descriptor,
                )
                pending.slot, pending.number = None, number
                self._sent[number] = pending
                self._channel.send(*message.encode())
            elif not job.cancelled:
                self._events.on_results([job], [_engine_exited()])
        job.pixels = None
        if descriptor is not None:
            os.close(descriptor)

    def release(self, job: Job) -> None:
        """See Backend."""
        job.cancelled = True
        with self._lock:
            pending = self._pending.pop(job, None)
            if pending is None:
                return
            if pending.slot is not None and self._slots is not None:
                self._slots.release(pending.slot)
            if pending.number in self._sent and self._channel is not None:
                del self._sent[pending.number]
                self._channel.send(*CancelMessage(pending.number).encode())

    async def stop(self) -> None:
        """See Backend."""
        self._stopping = True
        self._start_ended.set()
        self._disconnect(Unavailable("the service stopped before this image was computed"))

    def _connect(self) -> None:
        if self._stopping:
            return
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(self._address)
        except OSError:
            connection.close()
            asyncio.get_running_loop().call_later(RECONNECT_SECONDS, self._connect)
            return
        self._channel = Channel(connection, lambda *received: self._on_message(wire.decode(*received)), self._on_closed)

    def _on_message(self, message: wire.Message) -> None:
        match message:
            case ResultsMessage():
                self.rate = message.rate
                self._on_results(message.results)
            case LoadedMessage():
                self._on_loaded(message)
            case FailedMessage():
                self._state, self._failure = State.FAILED, RuntimeError(message.reason)
                self._start_ended.set()

    def _on_loaded(self, message: LoadedMessage) -> None:
        self.loaded = message.model
        with self._lock:
            self._owner, self._slots = message.owner, Slots(message.slots, message.slot_count, message.slot_size)
        self._state, self._failure = State.READY, None
        assert self._channel is not None
        self._channel.send(*ReadyMessage().encode())
        self._start_ended.set()

    def _on_results(self, results: Sequence[JobResult]) -> None:
        jobs: list[Job] = []
        of_jobs: list[InferenceResult | Exception] = []
        with self._lock:
            for job_result in results:
                pending = self._sent.pop(job_result.number, None)
                if pending is not None:
                    pending.job.started, pending.job.computed = job_result.started, job_result.computed
                    jobs.append(pending.job)
                    of_jobs.append(job_result.result)
        self._events.on_results(jobs, of_jobs)

    def _on_closed(self) -> None:
        """The engine process exited."""
        if self._state is not State.FAILED:
            self._state, self._failure = State.LOADING, _engine_exited()
        self._disconnect(_engine_exited())
        self._connect()

    def _disconnect(self, error: Unavailable) -> None:
        """Fail all sent jobs with an error, and close the connection and the shared slots."""
        with self._lock:
            failed = [pending.job for pending in self._sent.values()]
            self._sent.clear()
            self._pending.clear()
            if self._slots is not None:
                self._slots.close()
            self._slots, channel, self._channel = None, self._channel, None
        if channel is not None:
            channel.close()
        self._events.on_results(failed, [error] * len(failed))


def _engine_exited() -> Unavailable:
    return Unavailable("the engine process exited and is being restarted: retry later", {"Retry-After": "1"})
