"""One HTTP connection: its phases, each with a limit in bytes and a deadline, and connections above the limit.

| phase | ends when | limit | deadline | beyond it |
|---|---|---|---|---|
| idle | a request begins | | KEEP_ALIVE_SECONDS (first request: UPLOAD_SECONDS) | closed |
| head | the head is complete | MAX_HEAD_BYTES, MAX_HEADERS | UPLOAD_SECONDS from its first byte | 431, 408 |
| body | the body is complete | MAX_UPLOAD_BYTES, by RequestMiddleware | UPLOAD_SECONDS from the first byte | 413, 408 |
| answering | the response is written | MAX_PIPELINED requests behind it | DEADLINE_MS, by the engine | 504 |
| closing | the client closes | CLOSING_BYTES | LINGER_SECONDS | aborted |

A written response that the client does not read within DOWNLOAD_SECONDS aborts the connection, in every phase.
"""

import asyncio
import socket
import time
from enum import StrEnum
from typing import Any

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dinat.app.api.middleware import new_request_id
from dinat.app.api.problems import problem_body
from dinat.app.engine.engine import Engine
from dinat.app.errors import BadRequest, HeadTooLarge, ServiceError, Unavailable, UploadTooSlow

log = structlog.get_logger("dinat")

KEEP_ALIVE_SECONDS = 5
"""How long a connection may be idle between two requests."""

LINGER_SECONDS = 2
"""How long a connection stays open after its last response, so that a client that is still sending can read it.

Closing at once would reset the connection, and the client would lose the response. Also how long a drained server still
accepts connections."""

CLOSING_BYTES = 1 << 20
"""How many bytes a client may send after its last response before the connection is aborted."""

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100
MAX_PIPELINED = 64

PROBE_RESERVE = 64
"""Connections above MAX_CONNECTIONS that are served if their first request is a health check or a scrape of the metrics."""

_PROBES = tuple(b"%b %b" % (method, path) for method in (b"GET", b"HEAD") for path in (b"/health", b"/metrics", b"/v2/health/"))

_PEER_CHECK_SECONDS = (0.02, 0.1, 0.5, 2.0)
"""When to look for a reset after a client has closed its sending side; see Connection.eof_received."""


class Phase(StrEnum):
    """Phase of a connection."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    ANSWERING = "answering"
    CLOSING = "closing"


def http_protocol(engine: Engine) -> type[asyncio.Protocol]:
    """Create uvicorn's protocol class for the endpoints of this engine."""

    class EngineConnection(Connection):
        """A connection to this engine."""

    EngineConnection.engine = engine
    EngineConnection.reserved = set()
    return EngineConnection


class _Transport:
    """The transport as uvicorn's request cycle sees it: times unsent bytes, and closes without losing the response."""

    def __init__(self, transport: asyncio.Transport, connection: "Connection") -> None:
        self.transport = transport
        self._connection = connection
        self.pause_reading, self.resume_reading = transport.pause_reading, transport.resume_reading
        self.get_extra_info, self.abort = transport.get_extra_info, transport.abort
        self._written = 0
        self._due = 0
        self._timer: asyncio.TimerHandle | None = None

    def write(self, data: bytes) -> None:
        """Write, and require that the client reads it within DOWNLOAD_SECONDS."""
        self.transport.write(data)
        self._written += len(data)
        if self._timer is None and self.transport.get_write_buffer_size():
            self._watch()

    def write_eof(self) -> None:
        """Close the sending side after all that was written."""
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()

    def is_closing(self) -> bool:
        """Whether no further response is to be written."""
        return self._connection.phase is Phase.CLOSING or self.transport.is_closing()

    def close(self) -> None:
        """Close once all is written; linger if the client may still be sending."""
        self._connection.close()

    def _watch(self) -> None:
        self._due = self._written
        seconds = self._connection.engine.settings.download_seconds
        self._timer = self._connection.loop.call_later(seconds, self._check)

    def _check(self) -> None:
        self._timer = None
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0:
            return
        if self._written - unsent < self._due:
            self.transport.abort()
        else:
            self._watch()

    def lost(self) -> None:
        """Stop watching: the connection is closed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Connection(HttpToolsProtocol):
    """One connection. Timestamps each request for its deadline, and keeps to the limits of each phase."""

    engine: Engine
    reserved: set["Connection"]
    """Connections of this server above MAX_CONNECTIONS that answer one probe each."""

    phase = Phase.IDLE
    _raw: _Transport
    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _closing_bytes = 0
    _is_upgrade = False
    _rejection: ServiceError | None = None
    """What ends this connection, once the requests before it are answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start, unless MAX_CONNECTIONS are open."""
        if len(self.connections) >= self.engine.settings.max_connections and self not in self.reserved:
            transport.set_protocol(RejectedConnection(transport, self))
            return
        self._raw = _Transport(transport, self)
        super().connection_made(self._raw)  # type: ignore[arg-type]
        self._enter(Phase.IDLE, self.engine.settings.upload_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release what the connection holds."""
        self._stop_timer()
        self.reserved.discard(self)
        if self.transport is not None:  # else it was rejected
            self._raw.lost()
            super().connection_lost(exc)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Answer a request in flight although the client has closed its sending side; close otherwise.

        A client that only half-closed still reads; one that is gone resets the connection as soon as it is sent anything.
        To tell them apart before the result is computed, an interim response (RFC 9110, 15.2) is sent.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return None
        cycle.keep_alive = False
        if not cycle.response_started and cycle.scope["http_version"] == "1.1":
            self._raw.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._check_peer(0)
        return True

    def _check_peer(self, attempt: int) -> None:
        """Abort once the peer has reset the connection."""
        if self.transport is None or self._raw.transport.is_closing() or attempt == len(_PEER_CHECK_SECONDS):
            return
        peer = self._raw.get_extra_info("socket")
        if attempt and peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._raw.abort()
            return
        self.loop.call_later(_PEER_CHECK_SECONDS[attempt], self._check_peer, attempt + 1)

    def data_received(self, data: bytes) -> None:
        """Parse more of a request."""
        if self.phase is Phase.CLOSING or self._rejection is not None:
            self._closing_bytes += len(data)
            if self._closing_bytes > CLOSING_BYTES:
                self._raw.abort()
            return
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._reject(self._rejection or BadRequest("the request is not HTTP/1.1"))
            return
        if self.phase is Phase.HEAD:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._reject(_head_too_large())

    def _feed(self, data: bytes) -> None:
        """Feed the parser. An offer to upgrade is ignored (RFC 9110, 7.8): the parser would take the body for another protocol.

        At such an offer the parser stops after the head. The same head without the offer is given to a new one.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stop:
            if not self._is_upgrade:  # CONNECT
                raise httptools.HttpParserError from None
            self._is_upgrade = False
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
            headers = [header for header in self.headers if header[0] != b"upgrade"]
            lines = [b"%b %b HTTP/%b" % (method, self.url, version), *(b"%b: %b" % header for header in headers), b"\r\n"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
            arrived = self.scope["state"]["arrived"]
            self._feed(b"\r\n".join(lines))
            self.scope["state"]["arrived"] = arrived
            self._feed(data[stop.args[0] :])

    def on_message_begin(self) -> None:
        """Note when a request begins: its deadline counts from here."""
        super().on_message_begin()
        self._head_bytes = 0
        self._enter(Phase.HEAD, self.engine.settings.upload_seconds)
        self.scope["state"]["arrived"] = time.monotonic()

    def on_url(self, url: bytes) -> None:
        """Take part of the target."""
        super().on_url(url)
        self._count_head(len(self.url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        super().on_header(name, value)
        self._count_head(len(self.headers))

    def _count_head(self, _: int) -> None:
        """Raise once the head in this packet is too large; data_received sees a head of many packets."""
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers[-1:])
        self._head_bytes += size
        if len(self.headers) > MAX_HEADERS or self._head_bytes > MAX_HEAD_BYTES:
            self._fail(_head_too_large())

    def on_headers_complete(self) -> None:
        """Start the request; RequestMiddleware limits its body."""
        if self.parser.should_upgrade():
            self._is_upgrade = self.parser.get_method() != b"CONNECT"
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            self._fail(BadRequest(f"more than {MAX_PIPELINED} requests wait on this connection: send fewer ahead"))
        super().on_headers_complete()
        self._enter(Phase.BODY, self.engine.settings.upload_seconds + LINGER_SECONDS)

    def on_message_complete(self) -> None:
        """Note that the whole body has been received."""
        if self._is_upgrade:
            return
        super().on_message_complete()
        self.scope["state"]["body_received"] = True
        if self.cycle.response_complete:
            self._enter(Phase.IDLE, KEEP_ALIVE_SECONDS)
        else:
            self._enter(Phase.ANSWERING, None)

    def on_response_complete(self) -> None:
        """Wait for the next request, or close where the rest of this one was never read."""
        if self.cycle.response_complete and self.cycle.more_body:
            self.server_state.total_requests += 1
            self.close()
            return
        super().on_response_complete()
        if self.pipeline or not self.cycle.response_complete:
            return
        if self._rejection is not None:
            self._reject(self._rejection)
        elif self.phase is Phase.ANSWERING:
            self._enter(Phase.IDLE, KEEP_ALIVE_SECONDS)

    def close(self) -> None:
        """Close; where the client may still be sending, linger."""
        if self.phase is Phase.CLOSING or self._raw.transport.is_closing():
            return
        if self.phase in (Phase.HEAD, Phase.BODY):
            self._linger()
        else:
            self._raw.transport.close()

    def _linger(self) -> None:
        """Close the sending side, and discard what the client still sends."""
        self._enter(Phase.CLOSING, LINGER_SECONDS)
        self._raw.resume_reading()
        self._raw.write_eof()

    def _enter(self, phase: Phase, seconds: float | None) -> None:
        self.phase = phase
        self._stop_timer()
        if seconds is not None:
            self._timer = self.loop.call_later(seconds, self._expired)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expired(self) -> None:
        self._timer = None
        if self.flow.read_paused:  # the service itself does not read: the client is not slow
            self._enter(self.phase, self.engine.settings.upload_seconds)
        elif self.phase is Phase.IDLE:
            self._raw.transport.close()
        elif self.phase is Phase.HEAD:
            self._reject(UploadTooSlow(f"the request's head took longer than {self.engine.settings.upload_seconds:g} s"))
        else:
            self._raw.abort()

    def _fail(self, error: ServiceError) -> None:
        """Leave the parser, which turns the exception into one of its own."""
        self._rejection = error
        raise error

    def _reject(self, error: ServiceError) -> None:
        """Answer what no endpoint can answer, after the requests before it, and close."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._rejection = error
            self._enter(Phase.ANSWERING, None)
            return
        self._raw.write(_response(error, self.engine))
        self._linger()


class RejectedConnection(asyncio.Protocol):
    """A connection above MAX_CONNECTIONS: a probe is answered, anything else gets 503, unread."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport, self._connection = transport, connection
        self._is_answered = False
        self._timer = connection.loop.call_later(LINGER_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Answer the first bytes; discard the rest."""
        if self._is_answered:
            return
        self._is_answered = True
        connection, engine = self._connection, self._connection.engine
        if data.startswith(_PROBES) and len(connection.reserved) < PROBE_RESERVE:
            self._timer.cancel()
            connection.reserved.add(connection)
            self._transport.set_protocol(connection)
            connection.connection_made(self._transport)
            connection.data_received(data)
            if connection.cycle is not None:
                connection.cycle.keep_alive = False
            return
        most = engine.settings.max_connections
        self._transport.write(_response(Unavailable(f"{most} connections are open: retry later", {"Retry-After": "1"}), engine))
        self._transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has closed the connection."""
        self._timer.cancel()


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(f"the request's head has more than {MAX_HEAD_BYTES:,} bytes or {MAX_HEADERS} headers")


def _response(error: ServiceError, engine: Engine) -> bytes:
    """A whole HTTP response that closes the connection; logged and counted as a request without an endpoint."""
    request_id = new_request_id()
    engine.metrics.count_request("none", error.status, 0)
    log.info("request", request_id=request_id, status=int(error.status), detail=error.detail)
    body, headers = problem_body(error, request_id, "")
    fields: list[tuple[bytes, Any]] = [*headers, (b"x-request-id", request_id.encode()), (b"connection", b"close")]
    status = b"HTTP/1.1 %d %b" % (error.status, error.status.phrase.encode())
    return b"\r\n".join([status, *(b"%b: %b" % field for field in fields), b"", body])
