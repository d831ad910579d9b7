"""Connections: how many, how long each may take, and what one that is too many is answered."""

import asyncio
import time

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dinat.app.api.middleware import new_request_id
from dinat.app.api.problems import problem_body
from dinat.app.engine.engine import Engine
from dinat.app.errors import Unavailable

LINGER_SECONDS = 2
"""How long a connection that is one too many may take to send its request and read that it is refused; and how long one that
asks while the door is about to close gets an answer."""


def http_protocol(engine: Engine) -> type[asyncio.Protocol]:
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
                transport.set_protocol(_RejectedConnection(transport, engine))
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
            """Stop the timer of the head: from now on RequestMiddleware limits the time."""
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


class _RejectedConnection(asyncio.Protocol):
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
