"""What every request goes through: an id, limits to its body, a key where one is wanted, and a line in the log."""

import asyncio
import hmac
import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import ServiceError, TooLarge, Unauthorized, UploadTooSlow, problem
from app.metrics import Metrics
from app.settings import Settings

log = structlog.get_logger("dinat")

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestContext:
    """The outermost layer.

    Puts request_id into the request's state, the log and the X-Request-ID header of the answer: the client's own, or a new one.
    Refuses a body over MAX_UPLOAD_BYTES, by its Content-Length or else as soon as that many bytes have come, and one that takes
    longer than UPLOAD_SECONDS. Counts and logs every request.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.bind_contextvars(request_id=request_id)
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["X-Request-ID"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    answer.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, self._limited(receive, headers), send_with_headers)
        finally:
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.request(route, status, seconds)
            log.info("request", method=scope["method"], path=scope["path"], status=status, milliseconds=round(seconds * 1e3, 1))
            structlog.contextvars.unbind_contextvars("request_id")

    def _limited(self, receive: Receive, headers: Headers) -> Receive:
        """`receive`, within the limits of size and time."""
        limit, seconds = self._settings.max_upload_bytes, self._settings.upload_seconds
        announced = headers.get("content-length", "")
        received = int(announced) if announced.isdecimal() and int(announced) > limit else 0
        until = time.monotonic() + seconds
        complete = False

        async def limited() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            if received <= limit:
                try:
                    async with asyncio.timeout(until - time.monotonic()):
                        message = await receive()
                except TimeoutError:
                    raise UploadTooSlow(f"the upload took longer than {seconds:g} s", headers={"Connection": "close"}) from None
                received += len(message.get("body", b""))
                complete = not message.get("more_body", False)
            if received > limit:
                raise TooLarge(f"the request is larger than {limit:,} bytes", headers={"Connection": "close"})
            return message

        return limited


class ApiKeys:
    """Wants one of API_KEYS, as `Authorization: Bearer KEY` or `X-API-Key: KEY`, but at the keyless doors."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._keys = [key.get_secret_value().encode() for key in settings.api_keys]
        self._keyless = tuple(f"/{name}" for name in settings.keyless)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as ASGI calls it."""
        if scope["type"] == "http" and not self._is_let_in(scope):
            await self._refuse(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_let_in(self, scope: Scope) -> bool:
        path = scope["path"]
        if any(path == prefix or path.startswith(f"{prefix}/") for prefix in self._keyless):
            return True
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = (token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")).encode()
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return any(matches)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: ServiceError = Unauthorized(
            "an API key is wanted: send it as Authorization: Bearer KEY or X-API-Key: KEY", {"WWW-Authenticate": "Bearer"}
        )
        await problem(Request(scope), error.status, error.detail, error.headers)(scope, receive, send)
