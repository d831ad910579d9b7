"""The engine process: the network, and the front-end processes that send it pictures."""

import asyncio
import os
import signal
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from dinat.app.engine.backend import State
from dinat.app.engine.batcher import Job
from dinat.app.engine.local_backend import LocalBackend
from dinat.app.engine.multiprocess.channel import Arrays, Channel, mapped
from dinat.app.engine.multiprocess.shared_slots import Slots
from dinat.app.engine.runtimes.runtime import Array, InferenceOptions, InferenceResult, LoadedModel
from dinat.app.errors import ServiceError
from dinat.app.metrics import Metrics
from dinat.app.settings import Settings

log = structlog.get_logger("dinat")

LOAD_FAILED_STATUS = 3
"""The exit status of an engine process that another try would not help."""

READY_SECONDS = 10
"""How long "ready" waits for the front ends to be so too."""

FLUSH_SECONDS = 0.2
"""How long a failed engine stays, for its last messages to be sent."""


@dataclass(eq=False, kw_only=True)
class Sent(Job):
    """A job of a front end. number: by which that knows it.  slot: which it holds until its pixels are copied, then None."""

    front: "_FrontEnd"
    number: int
    slot: int | None


class EngineProcess:
    """Serves front ends, which connect to `listener`, until `lifeline` is closed at its other end.

    say: told where the engine is in its life.  frontends: how many there are to be.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        listener: socket.socket,
        lifeline: int,
        say: Callable[[str], object],
        frontends: int,
    ) -> None:
        self._settings = settings
        self._listener, self._lifeline, self._say, self._expected = listener, lifeline, say, frontends
        self._backend = LocalBackend(settings, metrics, self._answered, self._started, self._changed, restarts=0)
        self._frontends: dict[int, _FrontEnd] = {}
        self._slots: Slots | None = None
        self._freeing = threading.Lock()
        self._ready: set[_FrontEnd] = set()
        self._all_ready = asyncio.Event()
        self._over = asyncio.Event()

    async def run(self) -> int:
        """Until it is over; the exit status, 0 if it was the lifeline that ended it."""
        loop = asyncio.get_running_loop()
        for ignored in (signal.SIGTERM, signal.SIGINT):  # it ends after the front ends, when it is told so
            signal.signal(ignored, signal.SIG_IGN)
        self._listener.setblocking(False)
        loop.add_reader(self._listener, self._accept)
        loop.add_reader(self._lifeline, self._over.set)
        self._say(State.LOADING)
        loading = asyncio.create_task(self._backend.start())
        await self._over.wait()
        loop.remove_reader(self._lifeline)
        failed = self._backend.state is State.FAILED
        if failed:
            await asyncio.sleep(FLUSH_SECONDS)
        elif not loading.done():
            os._exit(0)  # nobody waits for it any more, and a thread that loads cannot be stopped
        else:
            await self._backend.stop()
        loop.remove_reader(self._listener)
        for front in list(self._frontends.values()):
            front.channel.close()
        return 0 if not failed else LOAD_FAILED_STATUS if self._slots is None else 1

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        owner = next(number for number in range(1, 256) if number not in self._frontends)
        self._frontends[owner] = front = _FrontEnd(self, owner, connection)
        if self._backend.state is State.FAILED:
            front.channel.send(["failed", str(self._backend.failure)])
        elif self._backend.loaded is not None and self._slots is not None:
            self._welcome(front, self._backend.loaded, self._slots)

    async def _changed(self) -> None:
        """The core's state has changed."""
        if self._backend.state is State.READY and self._backend.loaded is not None:
            if self._slots is None:
                height, width = self._backend.loaded.processor.output_size or (
                    0,
                    0,
                )  # pictures of no fixed size are sent beside
                self._slots = Slots.create(self._settings.queue_limit, max(1, height * width * 3))
            for front in self._frontends.values():
                self._welcome(front, self._backend.loaded, self._slots)
            try:
                await asyncio.wait_for(self._all_ready.wait(), READY_SECONDS)
            except TimeoutError:
                log.warning("not every front end is ready", ready=len(self._ready), expected=self._expected)
            self._say(State.READY)
        elif self._backend.state is State.FAILED:
            self._say(str(self._backend.failure))
            for front in self._frontends.values():
                front.channel.send(["failed", str(self._backend.failure)])
            self._over.set()

    def _welcome(self, front: "_FrontEnd", loaded: LoadedModel, slots: Slots) -> None:
        told = {
            "config": loaded.config.to_dict(),
            "processor": loaded.processor.to_dict(),
            "runtime": loaded.runtime,
            "device": loaded.device,
            "precision": loaded.precision,
            "attention": loaded.attention,
            "disabled": [{"name": left.name, "reason": left.reason} for left in loaded.disabled],
        }
        front.channel.send(["loaded", front.owner, slots.count, slots.size, told], (), [slots.descriptor])

    def received(self, front: "_FrontEnd", message: Any, arrays: Arrays, descriptors: Sequence[int]) -> None:
        """A message from a front end."""
        match message:
            case ["job", *rest]:
                self._put(front, descriptors, *rest)
            case ["drop", number]:
                job = front.jobs.pop(number, None)
                if job is not None:
                    self._drop([job])
            case ["ready"]:
                self._ready.add(front)
                if len(self._ready) >= self._expected:
                    self._all_ready.set()

    def _put(
        self,
        front: "_FrontEnd",
        descriptors: Sequence[int],
        number: int,
        slot: int,
        shape: list[int],
        dtype: str,
        arrived: float,
        deadline: float,
        decoded: float,
        top_k: int,
        features: list[str],
        point: list[float] | None,
    ) -> None:
        assert self._slots is not None
        pixels = mapped(descriptors[0], shape, dtype) if descriptors else self._slots.view(slot, shape)
        wanted = InferenceOptions(top_k, frozenset(features), (point[0], point[1]) if point else None)
        job = Sent(wanted, arrived, deadline, pixels, decoded, front=front, number=number, slot=slot)
        front.jobs[number] = job
        self._backend.put(job)

    def gone(self, front: "_FrontEnd") -> None:
        """A front end has died, or ended: nobody waits for its pictures, and its places are free."""
        del self._frontends[front.owner]
        self._ready.discard(front)
        self._drop(list(front.jobs.values()))
        if self._slots is not None:
            with self._freeing:
                for slot in self._slots.owned(front.owner):  # taken, and not sent yet
                    self._slots.free(slot)

    def _drop(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.dropped = True
        self._free(jobs)

    def _started(self, batch: Sequence[Job]) -> None:
        """In a thread of the core's: the pixels of a batch are copied."""
        self._free(batch)

    def _free(self, jobs: Sequence[Job]) -> None:
        with self._freeing:
            for job in jobs:
                if isinstance(job, Sent) and job.slot is not None and self._slots is not None:
                    self._slots.free(job.slot)
                    job.slot = None

    def _answered(self, jobs: Sequence[Job], answers: Sequence[InferenceResult | Exception]) -> None:
        """In a thread of the core's: send answers back, those for a front end in one message."""
        plain: dict[_FrontEnd, list[Any]] = defaultdict(list)
        self._free(jobs)  # those that never ran
        for job, answer in zip(jobs, answers, strict=True):
            assert isinstance(job, Sent)
            if job.front.jobs.pop(job.number, None) is None:
                continue  # dropped meanwhile
            arrays: list[Array] = []
            written = _written(answer, arrays)
            if arrays:
                job.front.channel.send(
                    ["answers", self._backend.rate, [[job.number, job.started, job.computed, written]]], arrays
                )
            else:
                plain[job.front].append([job.number, job.started, job.computed, written])
        for front, several in plain.items():
            front.channel.send(["answers", self._backend.rate, several])


class _FrontEnd:
    """A front-end process that is connected."""

    def __init__(self, engine: EngineProcess, owner: int, connection: socket.socket) -> None:
        self.owner = owner
        self.jobs: dict[int, Sent] = {}
        self.channel = Channel(connection, lambda *message: engine.received(self, *message), lambda: engine.gone(self))


def _written(answer: InferenceResult | Exception, arrays: list[Array]) -> list[Any]:
    """An answer as a message has it. Its maps are added to arrays."""
    if isinstance(answer, ServiceError):
        return ["refused", int(answer.status), answer.detail, answer.headers]
    if isinstance(answer, Exception):
        log.error("a picture could not be computed", exc_info=answer)
        return ["error", f"{type(answer).__name__}: {answer}"]
    features: dict[str, int | list[int]] = {}
    for name, maps in answer.features.items():
        first = len(arrays)
        arrays.extend(maps if isinstance(maps, list) else [maps])
        features[name] = list(range(first, len(arrays))) if isinstance(maps, list) else first
    seen = []
    for one in answer.neighborhoods:
        told = {"stage": one.stage, "layer": one.layer, "dilation": one.dilation, "rows": one.rows, "columns": one.columns}
        seen.append([len(arrays), one.size, one.query, told])
        arrays.append(one.weights.numpy())
    return ["answer", answer.class_ids, answer.scores, features, seen]
