"""Several processes as one service: front ends that speak HTTP, one engine, and this one, which starts them and sees them end.

Each front end has a listening socket of its own on the one port, over which the kernel spreads connections. All of them belong
to the supervisor: connections that wait at a front end that dies wait for its successor.
"""

import asyncio
import mmap
import multiprocessing
import os
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import structlog
import torch

from dinat.app.engine.engine import Engine
from dinat.app.engine.local_backend import RESTARTS
from dinat.app.engine.multiprocess.engine_client import EngineClient
from dinat.app.engine.multiprocess.engine_process import LOAD_FAILED_STATUS, EngineProcess
from dinat.app.engine.runtimes.torch_runtime import resolve_devices
from dinat.app.host import cores
from dinat.app.logs import flush_logs
from dinat.app.main import create_app
from dinat.app.metrics import Metrics, Shared
from dinat.app.server.heap import reduce_gc
from dinat.app.server.server import Server
from dinat.app.settings import Settings
from dinat.model import ConfigError

log = structlog.get_logger("dinat")

FORK = multiprocessing.get_context("fork") if sys.platform == "linux" else None
"""Children are forked: they start in milliseconds, and share what is imported. This process has no threads, and no CUDA."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STARTING = "starting"
MAX_FAILED_STARTS = 3
"""How many front ends in a row may die while they start."""

GRACE_SECONDS = 10
"""How long processes that were told to end may take beyond what they were given."""


class ServiceFailed(Exception):
    """The service cannot go on; the reason in one sentence."""


@dataclass(frozen=True)
class ProcessStatus:
    """What is known of a process. state: what it last said of itself.  restarts: how often its place was filled anew."""

    name: str
    pid: int
    state: str
    restarts: int


class Board:
    """Where every process reads what each is doing. Shared memory; each place is written by its process and the supervisor."""

    _STARTED = struct.Struct("<ii")
    _LENGTH = struct.Struct("<I")
    _TEXT = _STARTED.size + _LENGTH.size
    _SIZE = 1024

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._memory = mmap.mmap(-1, self._SIZE * len(names))

    def started(self, name: str, pid: int, restarts: int) -> None:
        """The supervisor has started a process."""
        self._STARTED.pack_into(self._memory, self._at(name), pid, restarts)

    def say(self, name: str, state: str) -> None:
        """What a process is doing, by itself."""
        at, text = self._at(name), state.encode()[: self._SIZE - self._TEXT]
        self._memory[at + self._TEXT : at + self._TEXT + len(text)] = text
        self._LENGTH.pack_into(self._memory, at + self._STARTED.size, len(text))

    def read(self) -> list[ProcessStatus]:
        """All of it."""
        return [self.of(name) for name in self._names]

    def of(self, name: str) -> ProcessStatus:
        """What is known of one."""
        at = self._at(name)
        pid, restarts = self._STARTED.unpack_from(self._memory, at)
        (length,) = self._LENGTH.unpack_from(self._memory, at + self._STARTED.size)
        text = self._memory[at + self._TEXT : at + self._TEXT + length].decode(errors="replace")
        return ProcessStatus(name, pid, text, restarts)

    def pids(self) -> Mapping[str, int]:
        """The processes' ids, by name."""
        return {told.name: told.pid for told in self.read() if told.pid}

    def _at(self, name: str) -> int:
        return self._names.index(name) * self._SIZE


def resolve_frontends(settings: Settings) -> int:
    """How many front ends the settings ask for. auto: 1 on a processor; on a GPU host one for every core but two.

    Raises ConfigError for more than one where that is not Linux.
    """
    if settings.frontends != "auto":
        if settings.frontends > 1 and FORK is None:
            raise ConfigError(f"FRONTENDS {settings.frontends}: several processes share one port on Linux alone, take 1")
        return settings.frontends
    if FORK is None or settings.device == "cpu" or torch.version.cuda is None:
        return 1
    probe = FORK.Process(target=_has_card, args=[settings.device])  # CUDA that was asked here would not start in a child
    probe.start()
    probe.join()
    return max(1, cores() - 2) if probe.exitcode == 0 else 1


def _has_card(device: str) -> None:
    sys.exit(0 if resolve_devices(device)[0].type == "cuda" else 1)


class Supervisor:
    """The processes of one service. run: until a signal has ended it."""

    def __init__(self, settings: Settings, frontends: int) -> None:
        """Raises OSError where the port is taken."""
        self._settings = settings
        self._names = [f"frontend-{n}" for n in range(1, frontends + 1)]
        self._board = Board(["supervisor", "engine", *self._names])
        self._sockets = dict(zip(self._names, _listen(settings, frontends), strict=True))
        self._children: dict[str, BaseProcess] = {}
        self._restarts: dict[str, int] = {}
        self._stillborn = 0
        self._signals = 0
        self._stopping = False
        self._stop_by = float("inf")
        self._lives: dict[str, int] = {}

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then end in order; a second one ends at once. Raises ServiceFailed."""
        self._board.started("supervisor", os.getpid(), 0)
        self._board.say("supervisor", "watching")
        reduce_gc()  # the children neither, and what they share stays shared
        awake, wake = socket.socketpair()
        with (
            awake,
            wake,
            tempfile.TemporaryDirectory(prefix="dinat-") as folder,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as doors,
        ):
            self._folder = Path(folder)
            self._doors = doors
            doors.bind(f"{folder}/engine")
            doors.listen(len(self._names) + 8)
            self._listen_to_signals(awake, wake)
            host, port = next(iter(self._sockets.values()))[0].getsockname()[:2]
            log.info(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", frontends=len(self._names))
            try:
                for name in ("engine", *self._names):
                    self._start(name)
                while self._children:
                    self._turn(awake)
            finally:
                signal.set_wakeup_fd(-1)
                for child in self._children.values():
                    child.kill()
                    child.join()

    def _listen_to_signals(self, awake: socket.socket, wake: socket.socket) -> None:
        """Have signals counted, and a byte written to `wake`, which ends the wait."""
        for end in (awake, wake):
            end.setblocking(False)
        signal.set_wakeup_fd(wake.fileno())
        for one in SIGNALS:
            signal.signal(one, self._count_signal)

    def _count_signal(self, *_: object) -> None:
        self._signals += 1

    def _turn(self, awake: socket.socket) -> None:
        """Wait for something to happen, and see to it. Raises ServiceFailed."""
        sentinels = {child.sentinel: name for name, child in self._children.items()}
        for ready in wait([awake, *sentinels], self._patience()):
            if ready is awake:
                awake.recv(4096)
            elif isinstance(ready, int):
                self._ended(sentinels[ready])
        if self._signals and not self._stopping:
            settings = self._settings
            self._stop(settings.lame_duck_seconds + settings.drain_seconds + GRACE_SECONDS)
        elif self._signals > 1:
            self._stop_by = 0
        self._end_in_order()

    def _stop(self, seconds: float) -> None:
        self._stopping = True
        self._stop_by = time.monotonic() + seconds
        self._board.say("supervisor", "stopping")
        for sockets in self._sockets.values():
            for one in sockets:
                one.close()
        for name in self._names:
            if name in self._children:
                self._children[name].terminate()

    def _patience(self) -> float | None:
        return max(0, self._stop_by - time.monotonic()) if self._stopping else None

    def _end_in_order(self) -> None:
        """While stopping: once no front end is left, the engine may end too. Whoever takes too long is killed."""
        if not self._stopping:
            return
        if "engine" in self._lives and not any(name in self._children for name in self._names):
            os.close(self._lives.pop("engine"))
        if time.monotonic() >= self._stop_by:
            for name, child in self._children.items():
                log.warning("it did not end in time, and is killed", process=name)
                child.kill()

    def _start(self, name: str) -> None:
        assert FORK is not None
        end, life = os.pipe()
        self._lives[name] = life
        body = self._engine if name == "engine" else self._frontend
        self._board.say(name, STARTING)
        child = FORK.Process(target=self._child, args=(name, end, body), name=name)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child has handlers of its own: none is lost
        child.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(end)
        self._children[name] = child
        self._board.started(name, child.pid or 0, self._restarts.setdefault(name, 0))

    def _ended(self, name: str) -> None:
        """A child has ended; start another in its place, or give up. Raises ServiceFailed."""
        child = self._children.pop(name)
        child.join()
        status, told = child.exitcode, self._board.of(name)
        child.close()
        if name in self._lives:
            os.close(self._lives.pop(name))
        if self._stopping:
            return
        if name == "engine" and status == LOAD_FAILED_STATUS:
            self._give_up(f"{self._settings.model} cannot be served: {told.state}")
        log.error("a process died", process=name, pid=told.pid, status=status, state=told.state)
        if name == "engine" and self._restarts[name] >= RESTARTS:
            self._give_up(f"the engine process died again, with status {status}; the last it said was: {told.state}")
        if name != "engine":
            self._stillborn = self._stillborn + 1 if told.state == STARTING else 0
            if self._stillborn == MAX_FAILED_STARTS:
                self._give_up(f"{MAX_FAILED_STARTS} front ends in a row died as they started, the last with status {status}")
        self._restarts[name] += 1
        self._start(name)

    def _give_up(self, why: str) -> None:
        """End the front ends, which answer what they have, and say why. Raises ServiceFailed."""
        self._stop(GRACE_SECONDS)
        while self._children and time.monotonic() < self._stop_by:
            wait([child.sentinel for child in self._children.values()], self._patience())
            for name in [name for name, child in self._children.items() if child.exitcode is not None]:
                self._ended(name)
            self._end_in_order()
        raise ServiceFailed(why)

    def _child(self, name: str, lifeline: int, body: Callable[[str, int], int]) -> None:
        """In a child: let go of what is the supervisor's, and live."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the supervisor sees to the others
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for life in self._lives.values():
            os.close(life)
        for other, sockets in self._sockets.items():
            if other != name:
                for one in sockets:
                    one.close()
        try:
            status = body(name, lifeline)
        finally:
            flush_logs()  # nothing that is registered for the end of a process runs in a child
        sys.exit(status)

    def _metrics(self, name: str) -> Metrics:
        return Metrics(Shared(self._folder, name, self._board.pids))

    def _engine(self, name: str, lifeline: int) -> int:
        say = partial(self._board.say, name)
        engine = EngineProcess(self._settings, self._metrics(name), self._doors, lifeline, say, len(self._names))
        return asyncio.run(engine.run())

    def _frontend(self, name: str, lifeline: int) -> int:
        self._doors.close()
        share = self._settings.for_frontend(len(self._names))
        backend = partial(EngineClient, address=f"{self._folder}/engine")
        engine = Engine(share, backend, self._metrics(name))
        app = create_app(share, engine, self._board.read)
        server = Server(app, engine, lifeline, say=partial(self._board.say, name))
        server.run(self._sockets[name])
        return 0


def _listen(settings: Settings, count: int) -> list[list[socket.socket]]:
    """For each front end its sockets, one for each address of the host; all on one port. Raises OSError where it is taken."""
    addresses = socket.getaddrinfo(settings.host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    port = settings.port
    bound: list[list[socket.socket]] = [[] for _ in range(count)]
    for family, _, _, _, (host, *_rest) in addresses:
        with socket.create_server((host, port), family=family) as probe:  # sharing it would not fail where it is taken
            port = probe.getsockname()[1]
        for sockets in bound:
            address = host, port
            sockets.append(socket.create_server(address, family=family, backlog=settings.max_connections, reuse_port=True))
    return bound
