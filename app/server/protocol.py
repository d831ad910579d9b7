"""HTTP connections: their number, their timeouts, and the rejection of connections over the limit."""

import asyncio
import time

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dinat.app.api.middleware import new_request_id
from dinat.app.api.problems import problem_body
from dinat.app.engine.engine import Engine
from dinat.app.errors import Unavailable

LINGER_SECONDS = 2
"""How long a rejected connection may take to send its request and read the 503; and how long the server still answers
requests after a drain, before it closes."""


def http_protocol(engine: Engine) -> type[asyncio.Protocol]:
    """Uvicorn's protocol with MAX_CONNECTIONS, UPLOAD_SECONDS and the arrival time of each request."""
    max_connections, timeout = engine.settings.max_connections, engine.settings.upload_seconds

    class HttpConnection(HttpToolsProtocol):
        """One connection."""

        head_timer: asyncio.TimerHandle | None = None
        """Closes the connection if the next request does not begin, or its head does not end, within UPLOAD_SECONDS."""
        in_head = True

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Reject the connection if there are too many."""
            if len(self.connections) >= max_connections:
                transport.set_protocol(_RejectedConnection(transport, engine))
                return
            super().connection_made(transport)
            self.head_timer = self.loop.call_later(timeout, transport.close)

        def data_received(self, data: bytes) -> None:
            """Handle a part of a request."""
            super().data_received(data)
            if not self.in_head:
                self._stop_head_timer()
            elif self.head_timer is None and not self.transport.is_closing():
                self.head_timer = self.loop.call_later(timeout, self.transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            """The connection is closed, by either side."""
            self._stop_head_timer()
            if self.transport is not None:  # None if the connection was rejected
                super().connection_lost(exc)

        def on_message_begin(self) -> None:
            """A request begins; its deadline starts."""
            super().on_message_begin()
            self.in_head = True
            self.scope["state"]["arrived"] = time.monotonic()

        def on_headers_complete(self) -> None:
            """The head is complete; RequestContext limits the time of the body."""
            super().on_headers_complete()
            self.in_head = False

        def on_message_complete(self) -> None:
            """The body is complete, so reading it needs no timeout."""
            super().on_message_complete()
            self.scope["state"]["body_received"] = True

        def _stop_head_timer(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

    return HttpConnection


class _RejectedConnection(asyncio.Protocol):
    """A connection over the limit: answers 503 to its first request without reading it, then sends EOF.

    Closing at once would reset the connection while the client still sends, and the 503 would be lost.
    """

    def __init__(self, transport: asyncio.Transport, engine: Engine) -> None:
        self._transport = transport
        self._engine = engine
        self._answered = False
        self._timer = asyncio.get_running_loop().call_later(LINGER_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Answer the first bytes of the request, and discard the others."""
        if self._answered:
            return
        self._answered = True
        self._engine.metrics.count_request("none", Unavailable.status, 0)
        limit = self._engine.settings.max_connections
        error = Unavailable(
            f"{limit} connections are open, no more are accepted: retry later", {"Retry-After": "1", "Connection": "close"}
        )
        body, headers = problem_body(error, new_request_id(), "")
        lines = [b"HTTP/1.1 503 Service Unavailable", *(b"%b: %b" % header for header in headers), b"", body]
        self._transport.write(b"\r\n".join(lines))
        self._transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._timer.cancel()
