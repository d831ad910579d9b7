"""What every request gets: an id, and a limit to the bytes of its body."""

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import TooLarge

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestContext:
    """Puts request_id into the request's state and the X-Request-ID header of its answer: the client's own, or a new one.

    A body over max_upload_bytes is refused with TooLarge: by its Content-Length before any of it is read, or else as soon as
    that many bytes have come.
    """

    def __init__(self, app: ASGIApp, max_upload_bytes: int) -> None:
        self._app = app
        self._max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        announced = headers.get("content-length", "")
        received = int(announced) if announced.isdecimal() and int(announced) > self._max_upload_bytes else 0

        async def receive_limited() -> Message:
            nonlocal received
            if received > self._max_upload_bytes:
                raise self._too_large()
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_upload_bytes:
                raise self._too_large()
            return message

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        await self._app(scope, receive_limited, send_with_id)

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the request is larger than {self._max_upload_bytes:,} bytes", headers={"Connection": "close"})
