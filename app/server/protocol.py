"""HTTP connections: the phases of one connection, each with a limit in bytes and a deadline, and the limit on their number.

| phase | ends when | limit in bytes | deadline | beyond them |
|---|---|---|---|---|
| idle | a request begins | MAX_HEAD_BYTES | KEEP_ALIVE_SECONDS; for the first request UPLOAD_SECONDS | closed |
| head | the head is complete | MAX_HEAD_BYTES, MAX_HEADERS | UPLOAD_SECONDS after its first byte | 431, 408 |
| body | the body is complete | MAX_UPLOAD_BYTES, by RequestMiddleware | UPLOAD_SECONDS after the head's first byte | 413, 408 |
| answering | all requests are answered | MAX_PIPELINED requests | DEADLINE_MS, by Engine, and DOWNLOAD_SECONDS | closed |
| closing | the client has closed, too | MAX_UPLOAD_BYTES, discarded | see Connection.close | closed |

A client may send a request before the previous one is answered (pipelining): the phase is that of the request being received,
and "answering" when none is. Above MAX_CONNECTIONS, a connection gets one response: to a probe, or 503.
"""

import asyncio
import math
import re
import socket
import time
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from typing import Any

import httptools
import structlog
from uvicorn._types import ASGI3Application, HTTPScope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from dinat.app.api.middleware import new_request_id, read_request_id
from dinat.app.api.problems import problem_body
from dinat.app.api.quoting import quote
from dinat.app.engine.engine import Engine
from dinat.app.errors import BadRequest, HeadTooLarge, ServiceError, Unavailable, UnsupportedCoding, UploadTooSlow
from dinat.app.server.connections import Connections

log = structlog.get_logger("dinat")

KEEP_ALIVE_SECONDS = 5
"""How long a connection may be idle between two requests."""

LINGER_SECONDS = 2
"""How long a client may take to read a response that was sent before its request was complete.

Also how long a connection above MAX_CONNECTIONS is open, and how long a drained server still accepts connections."""

SHUTDOWN_SECONDS = 5
"""How long a response may take once the server stops, after the drain."""

DISCARD_SECONDS = 0.01
"""How long to pause after each read whose data is discarded. Without it, clients that send fast would occupy the event loop."""

MAX_HEAD_BYTES = 2**16 - 1
"""Also the most that httptools.parse_url can parse."""

MAX_HEADERS = 100
MAX_LENGTH_DIGITS = 19
MAX_CHUNKS = 4096
"""How many chunks of a body one read, of at most 256 KiB, may contain. A chunk costs as much time as 1 KiB in large chunks."""

MAX_PIPELINED = 64

PEER_CHECK_SECONDS = 0.1

_HOST = re.compile(rb"(?:\[[\w:.%~-]*\]|[\w.~!$&'()*+,;=%-]*)(?::\d*)?")
"""A host, which may be empty, and a port (RFC 3986, 3.2)."""


class Phase(StrEnum):
    """Phase of a connection."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    ANSWERING = "answering"
    CLOSING = "closing"


def http_protocol(engine: Engine) -> Any:
    """Return what creates a connection to the endpoints of this engine, for uvicorn's setting `http`."""
    return partial(Connection, engine, Connections(engine.settings))


class Connection(HttpToolsProtocol):
    """One connection. Timestamps each request for its deadline, and enforces the limits of each phase.

    Args:
        engine: Engine of the service.
        shared: What the connections of a server share.
        arguments: See uvicorn.
    """

    def __init__(self, engine: Engine, shared: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._engine, self._settings, self._shared = engine, engine.settings, shared
        self._phase = Phase.IDLE
        self._deadline = self._timer_due = self._close_by = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None
        self._answer_by = math.inf
        self._is_probe = False
        """Whether this is the first request, a probe, and was received at once."""
        self._ended = False
        """Whether the client sends no further request, or is to send none."""
        self._rejection: tuple[ServiceError, HTTPScope | None] | None = None
        """The last response, once the requests before it are answered, and the request if the application has it."""
        self._num_headers = 0
        """Headers and trailers of the current request so far."""
        self._bytes_without_progress = 0
        """Bytes received since the last part of a body, or the last end of a head or request. Discarded bodies count."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The connection is open."""
        self._raw = transport
        super().connection_made(_Transport(transport, self.close))  # type: ignore[arg-type]
        self._shared.add(self, transport, len(self.connections))
        if self._shared.is_over_limit(self):
            self._close_by = self.loop.time() + LINGER_SECONDS
        self._enter(Phase.IDLE, self.loop.time() + self._settings.upload_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed, by either side."""
        self._phase, self._ended = Phase.CLOSING, True
        if self._timer is not None:
            self._timer.cancel()
        self._shared.remove(self)
        self._disconnect_answering()
        super().connection_lost(exc)
        self.transport.close = self._raw.close  # type: ignore[method-assign] # a reference cycle otherwise

    def data_received(self, data: bytes) -> None:
        """Parse what the client has sent."""
        if self._ended:
            self._bytes_without_progress += len(data)
            if self._bytes_without_progress > MAX_HEAD_BYTES + self._settings.max_upload_bytes:
                self._raw.abort()
                return
            self.flow.pause_reading()
            self.loop.call_later(DISCARD_SECONDS, self._resume_discarding)
            return
        self._is_probe = self.cycle is None and self._shared.is_probe(data)
        if self._shared.is_over_limit(self) and not self._shared.is_exempt(data):
            limit = self._settings.max_connections
            self._reject(Unavailable(f"{limit} connections are open, no more are accepted: retry later", {"Retry-After": "1"}))
            return
        self._bytes_without_progress += len(data)
        self._chunks = 0
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            self._reject(_service_error(error))
        else:
            if self._bytes_without_progress > MAX_HEAD_BYTES:
                self._reject(_head_too_large())

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client has closed its sending side, or the connection. Answer its complete requests in the former case.

        Only a client that has closed the connection resets it when it is sent something. An interim response, which a
        client ignores (RFC 9110, 15.2), shows which it is before the result is computed.
        """
        if self._phase is Phase.CLOSING:
            return False
        self._ended = True
        self._drop_incomplete()
        if self._answering is None:
            self._enter(Phase.CLOSING, self.loop.time() + self._settings.download_seconds)
            return False
        self._enter(Phase.ANSWERING, self._answer_by)
        if not self._answering.response_started and self._answering.scope["http_version"] == "1.1":
            self._raw.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._check_peer()
        return True

    def close(self) -> None:
        """Close once all responses are sent, and read within DOWNLOAD_SECONDS.

        A client that is still sending would be reset and lose its response (RFC 9112, 9.6). Only the sending side is closed
        then, and what the client sends is discarded, as long as it may still send its body, at least for LINGER_SECONDS.
        """
        if self._phase is Phase.CLOSING or self._raw.is_closing():
            return
        now, phase = self.loop.time(), self._phase
        if phase in (Phase.HEAD, Phase.BODY) or self.pipeline or self._rejection is not None:
            linger_until = now + LINGER_SECONDS
            self._enter(Phase.CLOSING, max(linger_until, self._deadline) if phase is Phase.BODY else linger_until)
            self.flow.resume_reading()
            try:
                self._raw.write_eof()
            except OSError:  # asyncio: the client has reset the connection
                self._raw.abort()
        else:
            self._enter(Phase.CLOSING, now + self._settings.download_seconds)
            self._raw.close()
        self._ended = True

    def shutdown(self) -> None:
        """Close, after the responses in flight; called when the server stops. A request that is incomplete is rejected."""
        if self._phase in (Phase.HEAD, Phase.BODY):
            self._reject(Unavailable(self._engine.status_detail(), {"Retry-After": "1"}))
        super().shutdown()
        self._close_by = self.loop.time() + (LINGER_SECONDS if self._answering is None else SHUTDOWN_SECONDS)
        self._enter(self._phase, self._deadline)

    def on_message_begin(self) -> None:
        """A request begins. Its deadline counts from here."""
        super().on_message_begin()
        self._num_headers = 0
        self.scope["state"]["arrived"] = time.monotonic()
        self._bytes_without_progress = 0
        self._enter(Phase.HEAD, self.loop.time() + self._settings.upload_seconds)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which is discarded (RFC 9110, 6.5.1)."""
        if self._phase is Phase.HEAD:
            super().on_header(name, value)
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS:
            raise _head_too_large()

    def on_headers_complete(self) -> None:
        """The head is complete."""
        _check_head(self.url, self.headers)
        _check_host(self.parser.get_http_version(), self.headers)
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise BadRequest("CONNECT is not supported: this is not a proxy")
            return  # _parse ignores the offer
        if not self.url.startswith(b"/"):
            self.url = _with_path(self.url)
        if len(self.pipeline) == MAX_PIPELINED:
            raise BadRequest(f"{MAX_PIPELINED} requests wait for their responses: send fewer ahead")
        super().on_headers_complete()
        if self._shared.is_over_limit(self):
            self.cycle.keep_alive = False
        self._bytes_without_progress = 0
        self._enter(Phase.BODY, self._deadline + LINGER_SECONDS)  # RequestMiddleware responds first

    def on_body(self, body: bytes) -> None:
        """A part of the body, which is discarded if the request is already answered."""
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            raise BadRequest(f"more than {MAX_CHUNKS} chunks were received at once: send larger ones")
        if not self.cycle.response_complete:
            super().on_body(body)
            self._bytes_without_progress = 0

    def on_message_complete(self) -> None:
        """The body is complete."""
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        if self.cycle is self._answering:
            self._set_answer_by()
        self.scope["state"]["body_received"] = True
        self._bytes_without_progress = 0
        if self._answering is None:
            self._enter(Phase.IDLE, self.loop.time() + KEEP_ALIVE_SECONDS)
        else:
            self._enter(Phase.ANSWERING, self._answer_by)

    def on_response_complete(self) -> None:
        """Start the next request."""
        self.server_state.total_requests += 1
        self._answering = None
        if self._phase is Phase.CLOSING:
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._ended:
            self._send_rejection()
        elif self._phase is Phase.ANSWERING:
            self._enter(Phase.IDLE, self.loop.time() + KEEP_ALIVE_SECONDS)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        self._set_answer_by()
        start = partial(super()._start_asgi_task, cycle, app)
        if self._is_probe:
            start()
        else:
            self._shared.start(self.loop, start)

    def _parse(self, data: bytes) -> None:
        """Parse data. Ignore each offer to switch to another protocol, such as h2c (RFC 9110, 7.8).

        At an offer httptools stops after the head, since the body could be of the other protocol. The head is parsed again
        without the offer.
        """
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                (end_of_head,) = offer.args
            head = self._head_without_upgrade()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            self.parser.feed_data(head)
            data = data[end_of_head:]

    def _head_without_upgrade(self) -> bytes:
        target = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        fields = [b"%b: %b" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([target, *fields, b"", b""])

    def _enter(self, phase: Phase, deadline: float) -> None:
        """Enter a phase. The timer is replaced only by an earlier one: most deadlines are met, and followed by a later one."""
        self._phase = phase
        self._deadline = min(deadline, self._close_by)
        if self._deadline < self._timer_due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_due = self._deadline
            self._timer = self.loop.call_at(self._deadline, self._check_deadline)

    def _check_deadline(self) -> None:
        self._timer_due = math.inf
        if self.loop.time() < self._deadline:
            self._enter(self._phase, self._deadline)
        elif self._phase is Phase.IDLE:
            self.close()
        elif self._phase is Phase.HEAD or (self._phase is Phase.BODY and self._answering is not None):
            self._reject(UploadTooSlow(f"the request took longer than {self._settings.upload_seconds:g} s"))
        else:
            self._raw.abort()

    def _set_answer_by(self) -> None:
        """Set when the response in progress must have been read. Requests that follow behind it do not extend that."""
        self._answer_by = self.loop.time() + self._settings.deadline_ms / 1000 + self._settings.download_seconds

    def _reject(self, error: ServiceError) -> None:
        """Respond with an error, after the responses to the requests before it, and close."""
        self._ended = True
        if self._phase is not Phase.BODY:
            self._rejection = error, None
        elif not self.cycle.response_started:
            self._rejection = error, self.cycle.scope if self.cycle is self._answering else None
        self._drop_incomplete()
        if self._answering is None:
            self._send_rejection()
        else:
            self._enter(Phase.ANSWERING, self._answer_by)

    def _send_rejection(self) -> None:
        if self._rejection is not None:
            error, scope = self._rejection
            if scope is None:
                request_id = new_request_id()
                _record(error, request_id, self._engine)
            else:
                request_id = read_request_id(scope)
                scope["state"]["rejection"] = error  # RequestMiddleware records it
            self._raw.write(_response(error, request_id))
        self.close()

    def _drop_incomplete(self) -> None:
        """Drop the request whose body is being received."""
        if self._phase is Phase.BODY:
            if self.cycle is self._answering:
                self._disconnect_answering()
            elif self.pipeline:
                self.pipeline.popleft()

    def _disconnect_answering(self) -> None:
        if self._answering is not None:
            self._answering.disconnected = True
            self._answering.waiting_for_100_continue = False
            self._answering.message_event.set()
            self._answering = None

    def _resume_discarding(self) -> None:
        if not self._raw.is_closing():
            self.flow.resume_reading()

    def _check_peer(self) -> None:
        """Abort once the client has reset the connection; a transport does not notice while it does not read."""
        if self._answering is None or self._raw.is_closing():
            return
        if self._raw.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._raw.abort()
        else:
            self.loop.call_later(PEER_CHECK_SECONDS, self._check_peer)


class _Transport:
    """The transport as uvicorn sees it, whose close() is that of the connection."""

    def __init__(self, transport: asyncio.Transport, close: Any) -> None:
        self.get_extra_info, self.is_closing = transport.get_extra_info, transport.is_closing
        self.pause_reading, self.resume_reading = transport.pause_reading, transport.resume_reading
        self.write, self.close = transport.write, close


def _service_error(error: httptools.HttpParserError) -> ServiceError:
    """Return the ServiceError that a callback of the parser has raised, or describe the error of the parser."""
    reason = error.__context__ or error
    if isinstance(reason, ServiceError):
        return reason.with_traceback(None)  # whose frames refer to the connection
    return BadRequest(f"the request is not HTTP/1.1: {reason}")


def _check_head(url: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
    size = len(url)
    for name, value in headers:
        size += len(name) + len(value)
        if name == b"content-length" and len(value) > MAX_LENGTH_DIGITS:
            raise BadRequest(f"Content-Length has {len(value)} digits, at most {MAX_LENGTH_DIGITS} are allowed")
        if name == b"transfer-encoding" and value.strip().lower() != b"chunked":
            coding = quote(value.decode("latin-1"))
            raise UnsupportedCoding(f"Transfer-Encoding is {coding}, only chunked is supported: use Content-Encoding")
    if size > MAX_HEAD_BYTES:
        raise _head_too_large()


def _with_path(url: bytes) -> bytes:
    """Return a target in absolute form with a path, / if it has none (RFC 9110, 4.2.3)."""
    target = httptools.parse_url(url)
    return url if target.path else b"/?" + (target.query or b"")


def _check_host(version: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Check that a head has one Host, which HTTP/1.0 does not require (RFC 9112, 3.2)."""
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        raise BadRequest(f"the request has {len(hosts) or 'no'} Host fields, HTTP/1.1 requires one")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise BadRequest(f"Host is {quote(hosts[0].decode('latin-1'))}, which is not a host with an optional port")


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(f"the request's head has more than {MAX_HEAD_BYTES:,} bytes or {MAX_HEADERS} headers")


def _record(error: ServiceError, request_id: str, engine: Engine) -> None:
    """Log and count a request that does not reach the application."""
    engine.metrics.count_request("none", error.status, 0)
    log.info("request", request_id=request_id, detail=error.detail, **{"http.response.status_code": int(error.status)})


def _response(error: ServiceError, request_id: str) -> bytes:
    body, headers = problem_body(error, request_id, "")
    fields = [*headers, (b"x-request-id", request_id.encode()), (b"connection", b"close")]
    status = b"HTTP/1.1 %d %b" % (error.status, error.status.phrase.encode())
    return b"\r\n".join([status, *(b"%b: %b" % field for field in fields), b"", body])
