"""ASGI middleware of all requests: request id, API key, admission, body limits, metrics and the access log."""

import asyncio
import hmac
import re
import time
from collections.abc import Sequence
from random import getrandbits

import structlog
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dinat.app.api.decompression import decompressed
from dinat.app.api.page import FILES, PAGE
from dinat.app.api.problems import problem_body
from dinat.app.engine.backend import State
from dinat.app.engine.engine import Engine
from dinat.app.errors import ServiceError, TooLarge, Unauthorized, Unavailable, UploadTooSlow
from dinat.app.settings import Settings

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

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestMiddleware:
    """Middleware of all HTTP requests.

    * Sets the request id, the client's X-Request-ID or a new one, in the request's state, the log and the response header.
    * Requires one of API_KEYS, except for the endpoints in KEYLESS and for the web page.
    * When the queue is full, rejects requests with 503 before the body is read or the request is routed; the same with 504
      for requests whose deadline has passed while they waited in this process.
    * Rejects a body larger than MAX_UPLOAD_BYTES, by its Content-Length or as soon as it has received more, and a body that
      takes longer than UPLOAD_SECONDS.
    * Records the metrics and logs every request, and adds the Server-Timing header.

    Args:
        app: Application to wrap.
        engine: Engine of the service.
        endpoints: Routes whose POST requests are processed by the engine.
    """

    def __init__(self, app: ASGIApp, engine: Engine, endpoints: Sequence[Route]) -> None:
        self._app = app
        self._engine = engine
        self._settings = engine.settings
        self._endpoints = [(route.path_regex, route.path) for route in endpoints if "POST" in (route.methods or ())]
        self._api_keys = _ApiKeys(engine.settings)
        self._rejection_limit = _RateLimit(REJECTIONS_PER_SECOND)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        arrived = state.setdefault("arrived", time.monotonic())
        headers = dict(scope["headers"])
        client_id = headers.get(b"x-request-id", b"")
        request_id = client_id.decode() if _REQUEST_ID.fullmatch(client_id) else new_request_id()
        state["request_id"] = request_id
        structlog.contextvars.bind_contextvars(request_id=request_id)
        status = 500
        is_head = scope["method"] == "HEAD"
        if is_head:  # handled as GET, and sent without the body (RFC 9110, section 9.3.2)
            scope = {**scope, "method": "GET"}

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                extended = [*message.get("headers", ()), (b"x-request-id", request_id.encode()), *SECURITY_HEADERS]
                if "seconds" in state:
                    extended.append((b"server-timing", _server_timing(state["seconds"], time.monotonic() - arrived)))
                if self._engine.state is State.DRAINING:
                    extended.append((b"connection", b"close"))
                message["headers"] = extended
            elif is_head:
                message["body"] = b""
            await send(message)

        try:
            error = self._api_keys.check(scope["method"], scope["path"], headers) or await self._admit(scope, arrived)
            if error is None:
                limited = self._limit_body(receive, scope, headers.get(b"content-length", b""))
                encoding = headers.get(b"content-encoding")
                if encoding is not None:
                    limited = decompressed(limited, encoding.decode("latin-1"), self._settings.max_upload_bytes)
                await self._app(scope, limited, send_with_headers)
            else:
                await _send_error(error, request_id, scope["path"], send_with_headers)
        finally:
            seconds = time.monotonic() - arrived
            matched, path = scope.get("route"), scope["path"]
            route = matched.path if matched is not None else self._endpoint(path) or "none"
            self._engine.metrics.count_request(route, status, seconds)
            log.info(
                "request",
                method="HEAD" if is_head else scope["method"],
                path=path,
                status=status,
                milliseconds=round(seconds * 1e3, 1),
            )
            structlog.contextvars.unbind_contextvars("request_id")

    def _endpoint(self, path: str) -> str | None:
        return next((endpoint for pattern, endpoint in self._endpoints if pattern.match(path)), None)

    async def _admit(self, scope: Scope, arrived: float) -> ServiceError | None:
        """Return the error if the engine cannot accept the request now. Delays rejections beyond the rate limit."""
        if scope["method"] != "POST" or self._endpoint(scope["path"]) is None:
            return None
        error = self._capacity_error(arrived)
        if isinstance(error, Unavailable):
            await self._rejection_limit.acquire()
            error = self._capacity_error(arrived)  # the queue may have space by now
        return error

    def _capacity_error(self, arrived: float) -> ServiceError | None:
        try:
            self._engine.check_capacity()
        except Unavailable as error:
            return error
        return self._engine.deadline_error(arrived)

    def _limit_body(self, receive: Receive, scope: Scope, content_length: bytes) -> Receive:
        """Wrap `receive` so that it enforces the limits on the size and duration of the upload."""
        limit, seconds = self._settings.max_upload_bytes, self._settings.upload_seconds
        received = int(content_length) if content_length.isdigit() and int(content_length) > limit else 0
        until = scope["state"]["arrived"] + seconds
        complete = False

        async def limited() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            if received <= limit:
                if scope["state"].get("body_received"):
                    message = await receive()
                else:
                    try:
                        async with asyncio.timeout(until - time.monotonic()):
                            message = await receive()
                    except TimeoutError:
                        detail = f"the upload took longer than {seconds:g} s"
                        raise UploadTooSlow(detail, headers={"Connection": "close"}) from None
                received += len(message.get("body", b""))
                complete = not message.get("more_body", False)
            if received > limit:
                raise TooLarge(f"the request is larger than {limit:,} bytes", headers={"Connection": "close"})
            return message

        return limited


def _server_timing(parts: dict[str, float], total: float) -> bytes:
    """Format the Server-Timing header (https://www.w3.org/TR/server-timing/), in milliseconds."""
    return ", ".join(f"{name};dur={seconds * 1e3:.2f}" for name, seconds in (*parts.items(), ("total", total))).encode()


def new_request_id() -> str:
    """Return 32 random hexadecimal digits. They need not be cryptographically secure."""
    return f"{getrandbits(128):032x}"


class _ApiKeys:
    """Requires one of API_KEYS, as `Authorization: Bearer KEY` or `X-API-Key: KEY`, except for the endpoints in KEYLESS.

    The web page is public as well: it has no secrets, and a browser cannot send a key for it. The page asks the user for one.
    """

    def __init__(self, settings: Settings) -> None:
        self._keys = [key.get_secret_value().encode() for key in settings.api_keys]
        self._keyless = tuple(f"/{name}" for name in settings.keyless)

    def check(self, method: str, path: str, headers: dict[bytes, bytes]) -> ServiceError | None:
        """Return an error if the request requires a key and has no valid one."""
        if not self._keys or any(path == prefix or path.startswith(f"{prefix}/") for prefix in self._keyless):
            return None
        if method in ("GET", "HEAD") and (path == PAGE or path.startswith(f"{FILES}/")):
            return None
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        sent = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if any([hmac.compare_digest(sent, key) for key in self._keys]):  # a list: every key is compared, for constant time
            return None
        return Unauthorized(
            "an API key is required: send it as Authorization: Bearer KEY or X-API-Key: KEY", {"WWW-Authenticate": "Bearer"}
        )


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


async def _send_error(error: ServiceError, request_id: str, path: str, send: Send) -> None:
    """Send an error response directly, without the application."""
    body, headers = problem_body(error, request_id, path)
    await send({"type": "http.response.start", "status": int(error.status), "headers": headers})
    await send({"type": "http.response.body", "body": body})
