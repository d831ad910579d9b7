"""The network in another process, as a front-end process sees it."""

import asyncio
import itertools
import os
import socket
import threading
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import numpy as np
import torch

from dinat.app.engine.backend import State
from dinat.app.engine.batcher import Job, ResultCallback
from dinat.app.engine.multiprocess.channel import Arrays, Channel, share
from dinat.app.engine.multiprocess.shared_slots import Slots
from dinat.app.engine.runtimes.runtime import Disabled, InferenceResult, LoadedModel
from dinat.app.errors import ServiceError, Unavailable
from dinat.app.metrics import Metrics
from dinat.app.settings import Settings
from dinat.model import DinatConfig, DinatImageProcessor
from dinat.model.neighborhoods import Neighborhood

RECONNECT_SECONDS = 0.1


class EngineClient:
    """A Backend that is the engine process listening at `address`; when that dies, the one that is started in its place.

    A picture's place in the queue is a slot of memory that all processes share. It belongs to this process until the picture is
    sent, then to the engine, which frees it.
    """

    def __init__(self, settings: Settings, metrics: Metrics, answered: ResultCallback, address: str) -> None:
        self.settings = settings
        self.state = State.LOADING
        self.failure: BaseException | None = None
        self.loaded: LoadedModel | None = None
        self.rate: float | None = None
        self._answered = answered
        self._address = address
        self._settled = asyncio.Event()
        self._stopping = False
        self._lock = threading.Lock()  # of all that follows
        self._channel: Channel | None = None
        self._slots: Slots | None = None
        self._owner = 0
        self._places: dict[Job, int] = {}
        self._sent: dict[int, Job] = {}
        self._numbers: dict[Job, int] = {}
        self._number = itertools.count()

    @property
    def waiting(self) -> int:
        """See Backend."""
        return 0 if self._slots is None else self._slots.used

    async def start(self) -> None:
        """See Backend."""
        self._connect()
        await self._settled.wait()

    def take(self, jobs: Sequence[Job]) -> bool:
        """See Backend."""
        with self._lock:
            slots = None if self._slots is None else self._slots.take(self._owner, len(jobs))
            if slots is None:
                return False
            self._places.update(zip(jobs, slots, strict=True))
            return True

    def put(self, job: Job) -> None:
        """See Backend."""
        pixels = job.pixels
        assert pixels is not None
        wanted = job.wanted.top_k, sorted(job.wanted.features), job.wanted.point
        fits = self._slots is not None and pixels.nbytes <= self._slots.size and pixels.dtype == np.uint8
        shared = [] if fits else [share([pixels])]
        with self._lock:
            slot = self._places.pop(job, None)
            if slot is not None and self._slots is not None and self._channel is not None:
                if fits:
                    self._slots.view(slot, pixels.shape)[:] = pixels
                number = next(self._number)
                self._sent[number], self._numbers[job] = job, number
                times = job.arrived, job.deadline, job.decoded
                self._channel.send(["job", number, slot, pixels.shape, pixels.dtype.str, *times, *wanted], (), shared)
            elif not job.dropped:
                self._answered([job], [_died()])
        job.pixels = None
        for descriptor in shared:
            os.close(descriptor)

    def withdraw(self, job: Job) -> None:
        """See Backend."""
        job.dropped = True
        with self._lock:
            slot, number = self._places.pop(job, None), self._numbers.pop(job, None)
            if slot is not None and self._slots is not None:
                self._slots.free(slot)
            if number in self._sent and self._channel is not None:
                del self._sent[number]
                self._channel.send(["drop", number])

    async def stop(self) -> None:
        """See Backend."""
        self._stopping = True
        self._settled.set()
        self._forget(Unavailable("the service stopped before this picture's turn came"))

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
        self._channel = Channel(connection, self._received, self._ended)

    def _received(self, message: Any, arrays: Arrays, descriptors: Sequence[int]) -> None:
        kind, *rest = message
        match kind:
            case "answers":
                self.rate, answers = rest
                self._give([(number, times, _answer(given, arrays)) for number, *times, given in answers])
            case "loaded":
                self._open(*rest, *descriptors)
            case "failed":
                self.state, self.failure = State.FAILED, RuntimeError(rest[0])
                self._settled.set()

    def _open(self, owner: int, count: int, size: int, loaded: dict[str, Any], descriptor: int) -> None:
        """The engine is ready."""
        disabled = [Disabled(**left) for left in loaded.pop("disabled")]
        config, processor = DinatConfig.from_dict(loaded.pop("config")), DinatImageProcessor.from_dict(loaded.pop("processor"))
        self.loaded = LoadedModel(config, processor, disabled=disabled, **loaded)
        with self._lock:
            self._owner, self._slots = owner, Slots(descriptor, count, size)
        self.state, self.failure = State.READY, None
        assert self._channel is not None
        self._channel.send(["ready"])
        self._settled.set()

    def _give(self, answers: Sequence[tuple[int, Sequence[float], InferenceResult | Exception]]) -> None:
        given: list[Job] = []
        of_given: list[InferenceResult | Exception] = []
        with self._lock:
            for number, times, answer in answers:
                job = self._sent.pop(number, None)
                if job is not None:
                    job.started, job.computed = times
                    given.append(job)
                    of_given.append(answer)
        self._answered(given, of_given)

    def _ended(self) -> None:
        """The engine has died, or ended."""
        if self.state is not State.FAILED:
            self.state, self.failure = State.LOADING, _died()
        self._forget(_died())
        self._connect()

    def _forget(self, why: Unavailable) -> None:
        """Answer all that was sent with an error, and let go of the engine's memory."""
        with self._lock:
            lost = list(self._sent.values())
            self._sent.clear()
            self._numbers.clear()
            self._places.clear()
            if self._slots is not None:
                self._slots.close()
            self._slots, channel, self._channel = None, self._channel, None
        if channel is not None:
            channel.close()
        self._answered(lost, [why] * len(lost))


def _died() -> Unavailable:
    return Unavailable("the engine process died and is being started again: come back soon", {"Retry-After": "1"})


def _answer(given: Any, arrays: Arrays) -> InferenceResult | Exception:
    match given:
        case ["answer", class_ids, scores, features, neighborhoods]:
            named = {
                name: arrays[at] if isinstance(at, int) else [arrays[one] for one in at]  # a map, or a list of them
                for name, at in features.items()
            }
            seen = [
                Neighborhood(**told, size=(h, w), query=(y, x), weights=torch.from_numpy(np.array(arrays[at])))
                for at, (h, w), (y, x), told in neighborhoods
            ]
            return InferenceResult(np.array(class_ids, np.int64), np.array(scores, np.float32), named, seen)
        case ["refused", status, detail, headers]:
            error = ServiceError(detail, headers)
            error.status = HTTPStatus(status)
            return error
        case ["error", detail]:
            return RuntimeError(detail)
    raise ValueError(f"an answer of the engine process that is not known: {given!r}")
