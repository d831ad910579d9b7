"""uvicorn: limits to its connections, requests timed from their first byte, and stopping without losing one."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.context import new_request_id
from app.api.problems import problem_body
from app.engine.engine import Engine
from app.errors import Unavailable

LINGER_SECONDS = 2
"""How long a connection that is one too many may take to send its request and read that it is refused; and how long one that
asks while the door is about to close gets an answer."""

QUIET_SECONDS = 0.25
"""A door closes once nobody has asked for so long: who asks just then would be cut off unheard."""


class Server(uvicorn.Server):
    """On a signal, takes work for LAME_DUCK_SECONDS more, drains the engine while still answering, then closes.

    Work that comes while it drains gets 503, and so does what comes until it is quiet, or LINGER_SECONDS have passed. On a
    second signal it closes at once.

    lifeline: of a front end; it drains as on a signal when the other end is closed, and leaves to its supervisor what is to
    happen on a second signal, and when the engine fails.  say: told of the engine's state.
    """

    def __init__(
        self, app: FastAPI, engine: Engine, lifeline: int | None = None, say: Callable[[str], object] = lambda _: None
    ) -> None:
        settings = engine.settings
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=_protocol(engine),
            ws="none",
            backlog=settings.max_connections,
            server_header=False,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._engine = engine
        self._lifeline, self._say = lifeline, say
        self._draining: asyncio.Task[None] | None = None
        if lifeline is None:
            engine.on_started = self._stop_if_failed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        if self._lifeline is not None:
            asyncio.get_running_loop().add_reader(self._lifeline, self._drain)

    async def on_tick(self, counter: int) -> bool:
        """See uvicorn."""
        self._say(self._engine.state)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn, whose own handler raises the signal again when all is over; here the exit status is the command's."""
        if self._draining is not None and self._lifeline is None:
            self.should_exit = self.force_exit = True
        else:
            self._drain()

    def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        if self._lifeline is not None:
            loop.remove_reader(self._lifeline)
        if self._draining is None:
            self._draining = loop.create_task(self._drain_then_exit())
            loop.call_soon_threadsafe(lambda: None)  # wakes the loop, which may be asleep

    async def _drain_then_exit(self) -> None:
        await self._engine.drain(self._engine.settings.lame_duck_seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await self._quiet()
        self.should_exit = True

    async def _quiet(self) -> None:
        answered = -1
        while answered != self.server_state.total_requests:
            answered = self.server_state.total_requests
            await asyncio.sleep(QUIET_SECONDS)

    def _stop_if_failed(self) -> None:
        if self._engine.failure is not None:
            self.should_exit = True


def _protocol(engine: Engine) -> type[asyncio.Protocol]:
    """Uvicorn's protocol for the doors of this engine."""
    most, seconds = engine.settings.max_connections, engine.settings.upload_seconds

    class Door(HttpToolsProtocol):
        """One connection."""

        slow: asyncio.TimerHandle | None = None
        """Ends a connection whose next request does not begin, or whose head does not end, in UPLOAD_SECONDS."""
        in_head = True

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Turn away a connection that is one too many."""
            if len(self.connections) >= most:
                transport.set_protocol(_TurnedAway(transport, engine))
                return
            super().connection_made(transport)
            self.slow = self.loop.call_later(seconds, transport.close)

        def data_received(self, data: bytes) -> None:
            """More of a request."""
            super().data_received(data)
            if not self.in_head:
                self._stop_waiting()
            elif self.slow is None and not self.transport.is_closing():
                self.slow = self.loop.call_later(seconds, self.transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            """The client has gone, or was told to."""
            self._stop_waiting()
            if self.transport is not None:  # else it was turned away
                super().connection_lost(exc)

        def on_message_begin(self) -> None:
            """Note when a request begins: its deadline counts from here."""
            super().on_message_begin()
            self.in_head = True
            self.scope["state"]["arrived"] = time.monotonic()

        def on_headers_complete(self) -> None:
            """Note that the head is here: from now on RequestContext sees to the time."""
            super().on_headers_complete()
            self.in_head = False

        def on_message_complete(self) -> None:
            """Note that the body is here: nothing need be waited for, nor timed."""
            super().on_message_complete()
            self.scope["state"]["body_is_here"] = True

        def _stop_waiting(self) -> None:
            if self.slow is not None:
                self.slow.cancel()
                self.slow = None

    return Door


class _TurnedAway(asyncio.Protocol):
    """A connection that is one too many: 503 to its first request, read by nobody, and an end that the client can see.

    To close at once would reset the connection under a client that is still sending, and the 503 would be lost.
    """

    def __init__(self, transport: asyncio.Transport, engine: Engine) -> None:
        self._transport = transport
        self._engine = engine
        self._answered = False
        self._end = asyncio.get_running_loop().call_later(LINGER_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """The first bytes of its request, or more of it, which nobody wants."""
        if self._answered:
            return
        self._answered = True
        self._engine.metrics.request("none", Unavailable.status, 0)
        most = self._engine.settings.max_connections
        error = Unavailable(
            f"{most} connections are open, more are not taken: come back later", {"Retry-After": "1", "Connection": "close"}
        )
        body, headers = problem_body(error, new_request_id(), "")
        lines = [b"HTTP/1.1 503 Service Unavailable", *(b"%b: %b" % header for header in headers), b"", body]
        self._transport.write(b"\r\n".join(lines))
        self._transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._end.cancel()
