"""ASGI middleware of all requests: request id, API key, admission, body limits, metrics and the access log."""

import asyncio
import re
import time
from collections.abc import Sequence
from random import getrandbits
from typing import Any

import structlog
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dinat.app.api.body_limits import LimitedBody
from dinat.app.api.budgets import ByteBudget, Reservation
from dinat.app.api.decompression import DecompressedBody
from dinat.app.api.keys import ApiKeys
from dinat.app.api.problems import problem_body
from dinat.app.api.quoting import shorten
from dinat.app.engine.backend import State
from dinat.app.engine.engine import Engine
from dinat.app.errors import BadRequest, PathTooLong, ServiceError, Unauthorized, Unavailable
from dinat.app.tracing import Tracing

log = structlog.get_logger("dinat")

SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]

REJECTIONS_PER_SECOND = 400
"""Maximum requests per second that a process rejects because the queue is full; further ones are delayed.

A rejection takes about 0.1 ms. Without the limit, clients that retry immediately would use all of the process's time and leave
none for accepted requests.
"""

TICK_SECONDS = 0.1
"""Interval in which the rate limit releases requests."""

MAX_PATH_CHARACTERS = 1024
"""Maximum length of a path. To find a file of the page, the file system is asked for each of the path's parts."""

SINGLE_FIELDS = (
    b"authorization",
    b"content-encoding",
    b"content-type",
    b"inference-header-content-length",
    b"x-api-key",
    b"x-deadline-ms",
)
"""Header fields that change how a request is handled, and may occur once."""

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestMiddleware:
    """Middleware of all HTTP requests.

    * Sets the request id, the client's X-Request-ID or a new one, in the request's state, the log and the response header.
    * Rejects paths of more than MAX_PATH_CHARACTERS, and repeated SINGLE_FIELDS.
    * Requires an API key, see ApiKeys.
    * When the queue is full, rejects requests with 503 before the body is read or the request is routed; the same with 504
      for requests whose deadline has passed while they waited in this process.
    * Limits the body: see LimitedBody and DecompressedBody.
    * Releases the memory that the request's body and response have reserved; the latter is `response_bytes` in its state.
    * Records the metrics and logs every request, and adds the Server-Timing header.

    Args:
        app: Application to wrap.
        engine: Engine of the service.
        endpoints: Routes whose POST requests are processed by the engine.
        tracing: Traces requests, if it is enabled.
    """

    def __init__(self, app: ASGIApp, engine: Engine, endpoints: Sequence[Route], tracing: Tracing | None) -> None:
        self._app = app
        self._tracing = tracing
        self._engine = engine
        self._endpoints = [(route.path_regex, route.path) for route in endpoints if "POST" in (route.methods or ())]
        self._api_keys = ApiKeys(engine.settings)
        self._rejection_limit = _RateLimit(REJECTIONS_PER_SECOND)
        settings, in_flight = engine.settings, engine.metrics.in_flight_bytes
        self._body_budget = ByteBudget(settings.body_budget, "request bodies", in_flight("request_bodies"))
        self._response_budget = ByteBudget(settings.response_budget, "responses", in_flight("responses"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(_with_root_path(scope, self._engine.settings.root_path), send, self._engine, self._tracing)
        body, response = Reservation(self._body_budget), Reservation(self._response_budget)
        exchange.state["response_bytes"] = response
        ids = {"request_id": exchange.request_id} | (self._tracing.fields() if self._tracing is not None else {})
        structlog.contextvars.bind_contextvars(**ids)
        try:
            await self._handle(exchange, receive, body)
        finally:
            body.release()
            response.release()
            matched = exchange.scope.get("route")
            exchange.record(matched.path if matched is not None else self._endpoint(exchange.path) or "none")
            structlog.contextvars.unbind_contextvars(*ids)

    async def _handle(self, exchange: "_Exchange", receive: Receive, reservation: Reservation) -> None:
        scope, headers = exchange.scope, exchange.headers
        try:
            if len(exchange.path) > MAX_PATH_CHARACTERS:
                raise PathTooLong(
                    f"the path has {len(exchange.path):,} characters, at most {MAX_PATH_CHARACTERS:,} are allowed"
                )
            if len(headers) < len(scope["headers"]):  # a name occurs twice
                _check_single_fields(scope["headers"])
            exchange.api_key = self._api_keys.identify(scope["method"], exchange.path, headers)
        except (BadRequest, PathTooLong, Unauthorized) as rejection:
            error: ServiceError | None = rejection
        else:
            error = await self._admit(exchange)
        if error is not None:
            await exchange.send_error(error)
            return
        if scope["method"] == "GET":  # or HEAD, see _Exchange; a body has no meaning, and none is read
            await self._app(scope, receive, exchange.send)
            return
        with self._engine.in_flight():
            await self._app(scope, self._limited_body(exchange, receive, reservation), exchange.send)

    def _limited_body(self, exchange: "_Exchange", receive: Receive, reservation: Reservation) -> Receive:
        settings, headers = self._engine.settings, exchange.headers
        length = headers.get(b"content-length", b"0")
        limited = exchange.body = LimitedBody(receive, exchange.scope, length, settings, reservation)
        encoding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
        if encoding in ("", "identity"):
            return limited
        return DecompressedBody(limited, encoding, settings.max_upload_bytes, reservation)

    def _endpoint(self, path: str) -> str | None:
        return next((endpoint for pattern, endpoint in self._endpoints if pattern.match(path)), None)

    async def _admit(self, exchange: "_Exchange") -> ServiceError | None:
        """Return the error if the engine cannot accept the request now. Delays rejections beyond the rate limit."""
        if exchange.scope["method"] != "POST" or self._endpoint(exchange.path) is None:
            return None
        error = self._capacity_error(exchange.arrived)
        if isinstance(error, Unavailable):
            await self._rejection_limit.acquire()
            error = self._capacity_error(exchange.arrived)  # the queue may have space by now
        return error

    def _capacity_error(self, arrived: float) -> ServiceError | None:
        try:
            self._engine.check_accepted(arrived)
            self._engine.check_capacity()
        except Unavailable as error:
            return error
        return self._engine.deadline_error(arrived)


def _check_single_fields(headers: Sequence[tuple[bytes, bytes]]) -> None:
    names = [name for name, _ in headers]
    repeated = next((name.decode() for name in SINGLE_FIELDS if names.count(name) > 1), None)
    if repeated is not None:
        raise BadRequest(f"the request has more than one {repeated}: send it once")


def _with_root_path(scope: Scope, default: str) -> Scope:
    """Set the root path of a request, and complete its path if a proxy has removed the root path from it, as ASGI has it."""
    root, path = scope.get("root_path") or default, scope["path"]
    if not root:
        return scope
    return {**scope, "root_path": root, "path": path if path == root or path.startswith(f"{root}/") else root + path}


class _Exchange:
    """One request, and the response to it.

    Attributes:
        path: Path of the request without the root path.
        api_key: Which API key it has, see ApiKeys.
        body: Its body.

    Args:
        scope: The request. HEAD is handled as GET, and sent without the body (RFC 9110, section 9.3.2).
        send: Sends the response.
        engine: Engine of the service.
        tracing: Traces requests, if it is enabled.
    """

    def __init__(self, scope: Scope, send: Send, engine: Engine, tracing: Tracing | None) -> None:
        self._tracing = tracing
        self._method = scope["method"]
        self._is_head = self._method == "HEAD"
        self._send = send
        self._engine = engine
        self._status = 500
        self._response_bytes = 0
        self.api_key: str | None = None
        self.body: LimitedBody | None = None
        self.state: dict[str, Any] = scope.setdefault("state", {})
        self.arrived: float = self.state.setdefault("arrived", time.monotonic())
        self.headers = dict(scope["headers"])
        self.request_id = read_request_id(scope)
        self.scope = {**scope, "method": "GET"} if self._is_head else scope
        self.path: str = scope["path"].removeprefix(scope.get("root_path", ""))

    async def send(self, message: Message) -> None:
        """Send a message of the response (ASGI), with the headers of all responses."""
        if message["type"] == "http.response.start":
            self._status = int(message["status"])
            headers = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode()), *SECURITY_HEADERS]
            if "seconds" in self.state:
                timing = _server_timing(self.state["seconds"], time.monotonic() - self.arrived)
                headers.append((b"server-timing", timing))
                if self._tracing is not None:
                    self._tracing.add_parts(self.state["seconds"])
            if self._engine.state is State.DRAINING:
                headers.append((b"connection", b"close"))
            message["headers"] = headers
        elif self._is_head:
            message["body"] = b""
        self._response_bytes += len(message.get("body", b""))
        await self._send(message)

    async def send_error(self, error: ServiceError) -> None:
        """Send an error response directly, without the application."""
        self.state["detail"] = error.detail
        body, headers = problem_body(error, self.request_id, self.scope["path"])
        await self.send({"type": "http.response.start", "status": int(error.status), "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def record(self, route: str) -> None:
        """Count the request in the metrics, and log it."""
        if "rejection" in self.state:  # the connection has rejected the request while its body was received
            self._status, self.state["detail"] = self.state["rejection"].status, self.state["rejection"].detail
        seconds = time.monotonic() - self.arrived
        self._engine.metrics.count_request(route, self._status, seconds)
        log.info("request", **self._fields(route, seconds))

    def _fields(self, route: str, seconds: float) -> dict[str, Any]:
        """Describe the request in the terms of OpenTelemetry's semantic conventions for HTTP servers."""
        fields: dict[str, Any] = {
            "http.request.method": self._method,
            "url.path": shorten(self.scope["path"]),
            "http.route": route,
            "http.response.status_code": self._status,
            "http.server.request.duration": round(seconds, 4),
            "http.request.body.size": self.body.received if self.body is not None else 0,
            "http.response.body.size": self._response_bytes,
        }
        if self.scope.get("client"):
            fields["client.address"] = self.scope["client"][0]
        if self.api_key is not None:
            fields["api_key"] = self.api_key
        if self._status >= 500 and "detail" in self.state:  # those below 500 may quote what the client sent
            fields["detail"] = shorten(self.state["detail"])
        return fields


def _server_timing(parts: dict[str, float], total: float) -> bytes:
    """Format the Server-Timing header (https://www.w3.org/TR/server-timing/), in milliseconds."""
    return ", ".join(f"{name};dur={seconds * 1e3:.2f}" for name, seconds in (*parts.items(), ("total", total))).encode()


def read_request_id(scope: Any) -> str:
    """Return the id of a request, the client's X-Request-ID or a new one. It is stored in the request's state."""
    state: dict[str, str] = scope["state"]
    if "request_id" not in state:
        client_id = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        state["request_id"] = client_id.decode() if _REQUEST_ID.fullmatch(client_id) else new_request_id()
    return state["request_id"]


def new_request_id() -> str:
    """Return 32 random hexadecimal digits. They need not be cryptographically secure."""
    return f"{getrandbits(128):032x}"


class _RateLimit:
    """Admits a number of callers per second, in order, those of one tick together so that they rarely interrupt other work."""

    def __init__(self, per_second: float) -> None:
        self._per_tick = max(1, round(per_second * TICK_SECONDS))
        self._tick = 0
        self._remaining = 0

    async def acquire(self) -> None:
        """Wait until the caller is admitted."""
        now = time.monotonic()
        current = int(now / TICK_SECONDS)
        if self._tick < current:
            self._tick, self._remaining = current, self._per_tick
        elif self._remaining == 0:
            self._tick, self._remaining = self._tick + 1, self._per_tick
        self._remaining -= 1
        if self._tick > current:
            await asyncio.sleep(self._tick * TICK_SECONDS - now)
