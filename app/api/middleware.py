"""What every request goes through: an id, a key where one is wanted, room, limits to its body, and a line in the log."""

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
"""How many requests a process refuses a second for want of room; more wait for their turn. Each costs it about 0.1 ms.

Clients that come back at once would otherwise take all of its time, and what was accepted would have none.
"""

TICK_SECONDS = 0.1

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestContext:
    """One layer around the application.

    Puts request_id into the request's state, the log and the X-Request-ID header of the answer: the client's own, or a new one.
    Wants one of API_KEYS, but at the keyless doors and for the page. Refuses, before anything is read or routed, what there is
    no room for, and what has waited in this process until its deadline. Refuses a body over MAX_UPLOAD_BYTES, by its
    Content-Length or else as soon as that many bytes have come, and one that takes longer than UPLOAD_SECONDS. Counts and logs
    every request; Server-Timing says what each part of it took.

    doors: routes whose POST is work for the engine.
    """

    def __init__(self, app: ASGIApp, engine: Engine, doors: Sequence[Route]) -> None:
        self._app = app
        self._engine = engine
        self._settings = engine.settings
        self._doors = [(route.path_regex, route.path) for route in doors if "POST" in (route.methods or ())]
        self._keys = _Keys(engine.settings)
        self._refusals = _Pace(REJECTIONS_PER_SECOND)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        arrived = state.setdefault("arrived", time.monotonic())
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else new_request_id()
        state["request_id"] = request_id
        structlog.contextvars.bind_contextvars(request_id=request_id)
        status = 500
        is_head = scope["method"] == "HEAD"
        if is_head:  # as GET, without the body (RFC 9110, 9.3.2)
            scope = {**scope, "method": "GET"}

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                answer = [*message.get("headers", ()), (b"x-request-id", request_id.encode()), *SECURITY_HEADERS]
                if "seconds" in state:
                    answer.append((b"server-timing", _server_timing(state["seconds"], time.monotonic() - arrived)))
                if self._engine.state is State.DRAINING:
                    answer.append((b"connection", b"close"))
                message["headers"] = answer
            elif is_head:
                message["body"] = b""
            await send(message)

        try:
            refusal = self._keys.refusal(scope["method"], scope["path"], headers) or await self._refusal(scope, arrived)
            if refusal is None:
                limited = self._limited(receive, scope, headers.get(b"content-length", b""))
                encoding = headers.get(b"content-encoding")
                if encoding is not None:
                    limited = decompressed(limited, encoding.decode("latin-1"), self._settings.max_upload_bytes)
                await self._app(scope, limited, send_with_headers)
            else:
                await _answer(refusal, request_id, scope["path"], send_with_headers)
        finally:
            seconds = time.monotonic() - arrived
            matched, path = scope.get("route"), scope["path"]
            route = matched.path if matched is not None else self._door(path) or "none"
            self._engine.metrics.count_request(route, status, seconds)
            log.info(
                "request",
                method="HEAD" if is_head else scope["method"],
                path=path,
                status=status,
                milliseconds=round(seconds * 1e3, 1),
            )
            structlog.contextvars.unbind_contextvars("request_id")

    def _door(self, path: str) -> str | None:
        return next((door for pattern, door in self._doors if pattern.match(path)), None)

    async def _refusal(self, scope: Scope, arrived: float) -> ServiceError | None:
        """Why work cannot be taken now, if it cannot. Waits where too many were refused just before."""
        if scope["method"] != "POST" or self._door(scope["path"]) is None:
            return None
        refusal = self._no_room(arrived)
        if isinstance(refusal, Unavailable):
            await self._refusals.turn()
            refusal = self._no_room(arrived)  # there may be room by now
        return refusal

    def _no_room(self, arrived: float) -> ServiceError | None:
        try:
            self._engine.check_capacity()
        except Unavailable as refusal:
            return refusal
        return self._engine.deadline_error(arrived)

    def _limited(self, receive: Receive, scope: Scope, announced: bytes) -> Receive:
        """`receive`, within the limits of size and time."""
        limit, seconds = self._settings.max_upload_bytes, self._settings.upload_seconds
        received = int(announced) if announced.isdigit() and int(announced) > limit else 0
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
                        why = f"the upload took longer than {seconds:g} s"
                        raise UploadTooSlow(why, headers={"Connection": "close"}) from None
                received += len(message.get("body", b""))
                complete = not message.get("more_body", False)
            if received > limit:
                raise TooLarge(f"the request is larger than {limit:,} bytes", headers={"Connection": "close"})
            return message

        return limited


def _server_timing(parts: dict[str, float], total: float) -> bytes:
    """https://www.w3.org/TR/server-timing/, in milliseconds."""
    return ", ".join(f"{name};dur={seconds * 1e3:.2f}" for name, seconds in (*parts.items(), ("total", total))).encode()


def new_request_id() -> str:
    """32 hexadecimal digits. Of random numbers that are no secret: these need none."""
    return f"{getrandbits(128):032x}"


class _Keys:
    """Wants one of API_KEYS, as `Authorization: Bearer KEY` or `X-API-Key: KEY`, but at the keyless doors.

    The page has no secrets, and a browser no way to send a key for it: the page itself asks for the key.
    """

    def __init__(self, settings: Settings) -> None:
        self._keys = [key.get_secret_value().encode() for key in settings.api_keys]
        self._keyless = tuple(f"/{name}" for name in settings.keyless)

    def refusal(self, method: str, path: str, headers: dict[bytes, bytes]) -> ServiceError | None:
        """Why a request may not pass, if it may not."""
        if not self._keys or any(path == prefix or path.startswith(f"{prefix}/") for prefix in self._keyless):
            return None
        if method in ("GET", "HEAD") and (path == PAGE or path.startswith(f"{FILES}/")):
            return None
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if any([hmac.compare_digest(given, key) for key in self._keys]):  # a list: every key is compared, whichever matches
            return None
        return Unauthorized(
            "an API key is wanted: send it as Authorization: Bearer KEY or X-API-Key: KEY", {"WWW-Authenticate": "Bearer"}
        )


class _Pace:
    """Lets so many through a second, in order, a tenth of a second's together: so their work interrupts others seldom."""

    def __init__(self, per_second: float) -> None:
        self._at_once = max(1, round(per_second * TICK_SECONDS))
        self._tick = 0
        self._left = 0

    async def turn(self) -> None:
        """Wait for one's turn."""
        now = time.monotonic()
        current = int(now / TICK_SECONDS)
        if self._tick < current:
            self._tick, self._left = current, self._at_once
        elif self._left == 0:
            self._tick, self._left = self._tick + 1, self._at_once
        self._left -= 1
        if self._tick > current:
            await asyncio.sleep(self._tick * TICK_SECONDS - now)


async def _answer(error: ServiceError, request_id: str, path: str, send: Send) -> None:
    """An error as a problem, with nothing between it and the socket."""
    body, headers = problem_body(error, request_id, path)
    await send({"type": "http.response.start", "status": int(error.status), "headers": headers})
    await send({"type": "http.response.body", "body": body})
