"""The uvicorn server: connection limits, and graceful shutdown that answers every accepted request."""

import asyncio
import contextlib
import contextvars
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Generator
from functools import partial
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn._types import ASGIReceiveCallable, ASGISendCallable, Scope
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from dinat.app.engine.engine import Engine
from dinat.app.host import GRACE_SECONDS, exit_after, stop_signals
from dinat.app.logs import flush_logs
from dinat.app.server.heap import IdleTrim
from dinat.app.server.protocol import LINGER_SECONDS, SHUTDOWN_SECONDS, http_protocol
from dinat.app.settings import ROOT_PATH

log = structlog.get_logger("dinat")

QUIET_SECONDS = 0.25
"""After a drain, the server closes once no request has come for this long: a request in transit would be reset."""


class _ForwardedHeaders(ProxyHeadersMiddleware):
    """Adds X-Forwarded-Prefix to the headers of a trusted proxy that uvicorn honors, as the root path."""

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        if scope["type"] == "http" and scope["client"] and scope["client"][0] in self.trusted_hosts:
            prefix = next((value for name, value in scope["headers"] if name == b"x-forwarded-prefix"), b"").rstrip(b"/")
            if prefix and re.fullmatch(ROOT_PATH.encode(), prefix):
                scope["root_path"] = prefix.decode()
        await super().__call__(scope, receive, send)


class Server(uvicorn.Server):
    """The HTTP server.

    On a signal the engine accepts requests that arrive within LAME_DUCK_SECONDS and then drains, while the server still
    answers; later requests get 503. The server closes once no request has come for QUIET_SECONDS, LINGER_SECONDS after the
    drain at the latest. A second SIGTERM or SIGINT ends the process at once. It also ends if that takes longer than
    DRAIN_SECONDS allows.

    Args:
        app: The application.
        engine: Its engine.
        lifeline: Of a frontend process: a file descriptor. When its other end is closed, the server drains as on a signal. The
            supervisor handles second signals, and failures of the engine.
        report_status: Receives the engine's state.
    """

    def __init__(
        self,
        app: FastAPI,
        engine: Engine,
        lifeline: int | None = None,
        report_status: Callable[[str], object] = lambda _: None,
    ) -> None:
        settings = engine.settings
        self._create_connection = http_protocol(engine)
        config = uvicorn.Config(
            app,
            proxy_headers=False,
            host=settings.host,
            port=settings.port,
            http=self._create_connection,
            ws="none",
            backlog=settings.max_connections,
            server_header=False,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS + 1,
        )
        config.app = _ForwardedHeaders(app, trusted_hosts=config.forwarded_allow_ips)  # type: ignore[arg-type]
        super().__init__(config)
        self._engine = engine
        self._lifeline, self._report_status = lifeline, report_status
        self._trim = IdleTrim()
        self._draining: asyncio.Task[None] | None = None
        if lifeline is None:
            engine.on_started = self._stop_if_failed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        self._listeners = [
            socket.socket(fileno=os.dup(listener.fileno())) for server in self.servers for listener in server.sockets
        ]
        if self._lifeline is not None:
            asyncio.get_running_loop().add_reader(self._lifeline, self._drain)

    async def on_tick(self, counter: int) -> bool:
        """See uvicorn."""
        self._report_status(self._engine.state)
        self._trim.tick(busy=bool(self.server_state.tasks))
        await self._accept_waiting()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        for listener in self._listeners:
            listener.close()
        await super().shutdown(sockets)

    async def _accept_waiting(self) -> None:
        """Accept all connections that wait.

        uvloop accepts one in each iteration of the event loop, and under load an iteration takes long: a probe would wait
        behind a thousand other connections.
        """
        loop = asyncio.get_running_loop()
        create_connection = partial(
            self._create_connection,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=loop,
        )
        accepted = []
        for listener in self._listeners:
            with contextlib.suppress(OSError):  # none waits, or too many files are open
                for _ in range(self._engine.settings.max_connections):
                    accepted.append(listener.accept()[0])
        connecting = (loop.connect_accepted_socket(create_connection, connection) for connection in accepted)
        await asyncio.gather(*connecting, return_exceptions=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """See uvicorn, which does not handle SIGHUP."""
        in_main_thread = threading.current_thread() is threading.main_thread()  # the only one that may handle signals
        original = {number: signal.signal(number, self.handle_exit) for number in stop_signals() if in_main_thread}
        try:
            with super().capture_signals():
                yield
        finally:
            for number, handler in original.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn, whose own handler raises the signal again on exit; here the command sets the exit status."""
        if self._draining is None:
            self._drain()
        elif self._lifeline is None and sig in (signal.SIGTERM, signal.SIGINT):  # a closed terminal sends SIGHUP twice
            with contextlib.suppress(RuntimeError):  # the signal has interrupted a write to the log
                flush_logs()
            os._exit(0)  # the event loop or a thread may be blocked

    def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        if self._lifeline is not None:
            loop.remove_reader(self._lifeline)
        if self._draining is None:
            # A signal interrupts any code, also that of a request, whose id would be in the log of the drain.
            self._draining = loop.create_task(self._drain_then_exit(), context=contextvars.Context())
            loop.call_soon_threadsafe(lambda: None)  # wakes the loop from a signal handler

    async def _drain_then_exit(self) -> None:
        settings = self._engine.settings
        exit_after(
            settings.lame_duck_seconds + settings.drain_seconds + GRACE_SECONDS,
            status=1,
            on_exit=lambda: log.error("process ended after timeout"),
        )
        self._engine.announce_drain()
        await asyncio.sleep(settings.lame_duck_seconds)
        await self._read_waiting()
        await self._engine.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await self._wait_until_quiet()
        self.should_exit = True

    async def _read_waiting(self) -> None:
        """Read the requests that have arrived: after a long iteration of the event loop, timers are handled before them."""
        await self._accept_waiting()
        for _ in range(8):  # a connection that is accepted is read three iterations later
            await asyncio.sleep(0)

    async def _wait_until_quiet(self) -> None:
        requests = -1
        while requests != self.server_state.total_requests:
            requests = self.server_state.total_requests
            await asyncio.sleep(QUIET_SECONDS)

    def _stop_if_failed(self) -> None:
        if self._engine.failure is not None:
            self.should_exit = True
