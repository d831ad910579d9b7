"""The processes of one service: frontend processes that speak HTTP, one engine process, and the supervisor.

Each frontend process has a listening socket of its own on the same port, and the kernel distributes connections among them.
The supervisor owns all sockets: connections that wait at a frontend process that crashes are accepted by its replacement.
"""

import asyncio
import errno
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import structlog
import torch

from dinat.app.engine.backend import State
from dinat.app.engine.engine import Engine
from dinat.app.engine.local_backend import RESTARTS
from dinat.app.engine.multiprocess.engine_client import EngineClient
from dinat.app.engine.multiprocess.engine_process import LOAD_FAILED_STATUS, EngineProcess
from dinat.app.engine.runtimes.torch_runtime import resolve_devices
from dinat.app.host import GRACE_SECONDS, cores, stop_signals
from dinat.app.logs import flush_logs
from dinat.app.main import create_app
from dinat.app.metrics import Metrics, SharedMetrics
from dinat.app.server.heap import IdleTrim, reduce_gc
from dinat.app.server.server import Server
from dinat.app.server.status_board import StatusBoard
from dinat.app.settings import Settings
from dinat.model import ConfigError

log = structlog.get_logger("dinat")

FORK = multiprocessing.get_context("fork") if sys.platform == "linux" else None
"""Processes are forked: they start in milliseconds and share imported modules. The supervisor has no threads and no CUDA."""

STARTING = "starting"
NOT_RESPONDING = "not responding"
MAX_FAILED_STARTS = 3
"""How many frontend processes in a row may exit while they start."""

CHECK_SECONDS = 1
"""How often the supervisor checks that the processes have reported their state, which each does more often than that."""

SILENT_CHECKS, KILL_CHECKS = 5, 10
"""After how many checks in a row without a report a process counts as not responding, and is killed.

Checks are counted, not seconds: while the whole host or container is suspended, the supervisor counts none. Event loops report,
and are free while other threads compute; a process that is only slow reports within these checks.
"""

LOADING_CHECKS = 120
"""After how many it is killed while it starts or loads its model: a library may then block all threads."""


class ServiceFailed(Exception):
    """The service cannot continue; the reason in one sentence."""


def resolve_frontends(settings: Settings) -> int:
    """The number of frontend processes. "auto" is 1 on a CPU; on a GPU host the number of cores minus 2.

    Raises:
        ConfigError: More than one is set, on another system than Linux.
    """
    if settings.frontends != "auto":
        if settings.frontends > 1 and FORK is None:
            raise ConfigError(f"FRONTENDS {settings.frontends} requires Linux, where processes can share one port: set 1")
        return settings.frontends
    if FORK is None or settings.device == "cpu" or torch.version.cuda is None:
        return 1
    probe = FORK.Process(target=_exit_0_if_gpu, args=[settings.device])  # CUDA initialized here would not work after a fork
    probe.start()
    probe.join()
    return max(1, cores() - 2) if probe.exitcode == 0 else 1


def _exit_0_if_gpu(device: str) -> None:
    with suppress(ConfigError):  # which the engine process reports
        sys.exit(0 if resolve_devices(device)[0].type == "cuda" else 1)
    sys.exit(1)


class Supervisor:
    """Starts, restarts and stops the processes of one service.

    Raises:
        OSError: The port is in use, or the host is unknown.
    """

    def __init__(self, settings: Settings, frontends: int) -> None:
        self._settings = settings
        self._names = [f"frontend-{n}" for n in range(1, frontends + 1)]
        self._board = StatusBoard(["supervisor", "engine", *self._names])
        self._sockets = dict(zip(self._names, listen(settings, frontends), strict=True))
        self._children: dict[str, BaseProcess] = {}
        self._restarts: dict[str, int] = {}
        self._failed_starts = 0
        self._stop_signals = stop_signals()
        self._signals = 0
        self._silent: dict[str, tuple[int, int]] = {}
        self._next_check = 0.0
        self._pid = os.getpid()
        self._stopping = self._killed = False
        self._failed_stops: list[str] = []
        self._stop_by = float("inf")
        self._lifelines: dict[str, int] = {}

    def run(self) -> None:
        """Serve until a signal, then shut down gracefully; a second SIGTERM or SIGINT kills. Raises ServiceFailed."""
        self._board.set_process("supervisor", os.getpid(), 0)
        self._board.set_state("supervisor", "watching")
        reduce_gc()  # also in the children, so that they share the memory of existing objects
        wakeup_reader, wakeup_writer = socket.socketpair()
        with (
            wakeup_reader,
            wakeup_writer,
            tempfile.TemporaryDirectory(prefix="dinat-supervisor-") as folder,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as engine_listener,
        ):
            self._folder = Path(folder)
            self._engine_listener = engine_listener
            engine_listener.bind(f"{folder}/engine")
            engine_listener.listen(len(self._names) + 8)
            self._install_signal_handlers(wakeup_reader, wakeup_writer)
            host, port = next(iter(self._sockets.values()))[0].getsockname()[:2]
            log.info(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", frontends=len(self._names))
            try:
                for name in ("engine", *self._names):
                    self._start(name)
                while self._children:
                    self._wait_for_event(wakeup_reader)
                if self._failed_stops and self._signals < 2:
                    raise ServiceFailed(f"processes did not stop by themselves: {', '.join(self._failed_stops)}")
            finally:
                signal.set_wakeup_fd(-1)
                for child in self._children.values():
                    child.kill()
                    child.join()

    def _install_signal_handlers(self, reader: socket.socket, writer: socket.socket) -> None:
        """Count signals, and write a byte to `writer` on each, which ends a wait for `reader`."""
        for end in (reader, writer):
            end.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        for number in self._stop_signals:
            signal.signal(number, self._count_signal)

    def _count_signal(self, number: int, _: object) -> None:
        if number in (signal.SIGTERM, signal.SIGINT) or not self._signals:  # a closed terminal sends SIGHUP twice
            self._signals += 1

    def _wait_for_event(self, wakeup: socket.socket) -> None:
        """Wait for a signal, the exit of a child or the timeout, and handle it. Raises ServiceFailed."""
        sentinels = {child.sentinel: name for name, child in self._children.items()}
        for ready in wait([wakeup, *sentinels], self._timeout()):
            if ready is wakeup:
                wakeup.recv(4096)
            elif isinstance(ready, int):
                self._on_exit(sentinels[ready])
        self._check_processes()
        if self._signals and not self._stopping:
            settings = self._settings
            self._stop(settings.lame_duck_seconds + settings.drain_seconds + GRACE_SECONDS)
        elif self._signals > 1:
            self._stop_by = 0
        self._stop_in_order()

    def _stop(self, seconds: float) -> None:
        self._stopping = True
        self._stop_by = time.monotonic() + seconds
        self._board.set_state("supervisor", "stopping")
        for sockets in self._sockets.values():
            for listener in sockets:
                listener.close()
        for name in self._names:
            if name in self._children:
                self._children[name].terminate()

    def _timeout(self) -> float | None:
        if self._killed:
            return None  # until they exit
        return max(0, (self._stop_by if self._stopping else self._next_check) - time.monotonic())

    def _check_processes(self) -> None:
        """Kill processes that have not reported their state for too long; their exit is then handled like any other."""
        now = time.monotonic()
        if self._stopping or now < self._next_check:
            return
        self._next_check = now + CHECK_SECONDS
        for name, child in self._children.items():
            status = self._board.get(name)
            reports, checks = self._silent.get(name, (-1, 0))
            checks = checks + 1 if status.reports == reports else 0
            self._silent[name] = status.reports, checks
            loading = status.state in (STARTING, State.LOADING)
            if checks == (LOADING_CHECKS if loading else KILL_CHECKS):
                log.error("process killed because it does not respond", process=name, pid=status.pid)
                child.kill()
            elif checks >= SILENT_CHECKS and not loading:
                self._board.set_state(name, NOT_RESPONDING)

    def _stop_in_order(self) -> None:
        """While stopping: stop the engine process after all frontend processes, and kill all of them at the timeout."""
        if not self._stopping:
            return
        if "engine" in self._lifelines and not any(name in self._children for name in self._names):
            os.close(self._lifelines.pop("engine"))
        if time.monotonic() >= self._stop_by and not self._killed:
            for name, child in self._children.items():
                log.warning("process killed after timeout", process=name)
                child.kill()
            self._killed = True

    def _start(self, name: str) -> None:
        assert FORK is not None
        reader, writer = os.pipe()
        self._lifelines[name] = writer
        body = self._run_engine if name == "engine" else self._run_frontend
        self._board.set_state(name, STARTING)
        self._silent.pop(name, None)
        child = FORK.Process(target=self._run_child, args=(name, reader, body), name=name)
        # Signals wait until the child has its own handlers, so that none is lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._stop_signals)
        child.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._stop_signals)
        os.close(reader)
        self._children[name] = child
        self._board.set_process(name, child.pid or 0, self._restarts.setdefault(name, 0))

    def _on_exit(self, name: str) -> None:
        """Handle the exit of a child: restart it, or give up. Raises ServiceFailed."""
        child = self._children.pop(name)
        child.join()
        exit_status, last = child.exitcode, self._board.get(name)
        child.close()
        if name in self._lifelines:
            os.close(self._lifelines.pop(name))
        if self._stopping:
            if exit_status not in (0, -signal.SIGTERM):  # the latter if it had only just started
                self._failed_stops.append(f"{name} (status {exit_status})")
            return
        if name == "engine" and exit_status == LOAD_FAILED_STATUS:
            self._give_up(f"{self._settings.model} cannot be served: {last.state}")
        log.error("process exited", process=name, pid=last.pid, status=exit_status, state=last.state)
        if name == "engine" and self._restarts[name] >= RESTARTS:
            self._give_up(f"the engine process exited again, with status {exit_status}; its last state: {last.state}")
        if name != "engine":
            self._failed_starts = self._failed_starts + 1 if last.state == STARTING else 0
            if self._failed_starts == MAX_FAILED_STARTS:
                self._give_up(
                    f"{MAX_FAILED_STARTS} frontend processes in a row exited while starting, the last with status {exit_status}"
                )
        self._restarts[name] += 1
        self._start(name)

    def _give_up(self, reason: str) -> None:
        """Stop the frontend processes, which answer their accepted requests, and raise ServiceFailed."""
        self._stop(GRACE_SECONDS)
        while self._children and time.monotonic() < self._stop_by:
            wait([child.sentinel for child in self._children.values()], self._timeout())
            for name in [name for name, child in self._children.items() if child.exitcode is not None]:
                self._on_exit(name)
            self._stop_in_order()
        raise ServiceFailed(reason)

    def _run_child(self, name: str, lifeline: int, body: Callable[[str, int], int]) -> None:
        """In a child: close what belongs to the supervisor and other children, and run."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for of_terminal in (signal.SIGINT, signal.SIGHUP):  # sent to all processes; the supervisor handles them
            signal.signal(of_terminal, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._stop_signals)
        for descriptor in self._lifelines.values():
            os.close(descriptor)
        for other, sockets in self._sockets.items():
            if other != name:
                for listener in sockets:
                    listener.close()
        try:
            status = body(name, lifeline)
        finally:
            flush_logs()  # multiprocessing children do not run atexit handlers
            if os.getppid() != self._pid:  # the supervisor was killed
                shutil.rmtree(self._folder, ignore_errors=True)
        sys.exit(status)

    def _metrics(self, name: str) -> Metrics:
        return Metrics(SharedMetrics(self._folder, name, self._board.pids))

    def _run_engine(self, name: str, lifeline: int) -> int:
        trim = IdleTrim()

        def report_status(state: str) -> None:
            self._board.report(name, state)
            trim.tick(engine.busy)

        engine = EngineProcess(
            self._settings, self._metrics(name), self._engine_listener, lifeline, report_status, len(self._names)
        )
        return asyncio.run(engine.run())

    def _run_frontend(self, name: str, lifeline: int) -> int:
        self._engine_listener.close()
        settings = self._settings.for_frontend(len(self._names))
        create_backend = partial(EngineClient, address=f"{self._folder}/engine", responds=self._engine_responds)
        engine = Engine(settings, create_backend, self._metrics(name))
        app = create_app(settings, engine, self._board.read)
        server = Server(app, engine, lifeline, partial(self._board.report, name))
        server.run(self._sockets[name])
        return 0

    def _engine_responds(self) -> bool:
        return not self._board.is_in_state("engine", NOT_RESPONDING)


def listen(settings: Settings, count: int) -> list[list[socket.socket]]:
    """Open the sockets of each frontend process, one for each address of the host, all on one port.

    Raises OSError, which names the host and the port, if the port is in use or the host is unknown.
    """
    try:
        return _listen(settings, count)
    except OSError as error:
        number = error.errno or 0  # negative for errors of the resolver
        reason = os.strerror(number) if number > 0 else error.strerror  # strerror of a socket repeats the address
        advice = "; --port selects another port" if number in (errno.EADDRINUSE, errno.EACCES) else ""
        raise OSError(f"cannot listen on {settings.host} port {settings.port}: {reason}{advice}") from None


def _listen(settings: Settings, count: int) -> list[list[socket.socket]]:
    addresses = socket.getaddrinfo(settings.host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    port = settings.port
    bound: list[list[socket.socket]] = [[] for _ in range(count)]
    for family, _, _, _, (host, *_rest) in addresses:
        with socket.create_server((host, port), family=family) as probe:  # reuse_port would not fail on a port in use
            port = probe.getsockname()[1]
        for sockets in bound:
            address = host, port
            sockets.append(socket.create_server(address, family=family, backlog=settings.max_connections, reuse_port=True))
    return bound
