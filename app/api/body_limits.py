"""The limits on the body of one request: bytes, time, and memory in flight."""

import asyncio
import time

from starlette.types import Message, Receive, Scope

from dinat.app.api.budgets import Reservation
from dinat.app.api.parameters import parse_integer
from dinat.app.errors import TooLarge, Unavailable, UploadTooSlow
from dinat.app.settings import Settings


class LimitedBody:
    """ASGI receive callable that enforces MAX_UPLOAD_BYTES and UPLOAD_SECONDS, and reserves memory for the body.

    Args:
        receive: Callable to wrap.
        scope: Scope of the request; its state has the time of arrival.
        content_length: Value of the Content-Length header, "0" if it is missing.
        settings: The limits.
        reservation: Holds the bytes received so far.
    """

    def __init__(
        self, receive: Receive, scope: Scope, content_length: bytes, settings: Settings, reservation: Reservation
    ) -> None:
        self.received = 0
        self._receive = receive
        self._state = scope["state"]
        self._limit = settings.max_upload_bytes
        self._seconds = settings.upload_seconds
        self._reservation = reservation
        self._complete = False
        self._is_announced_too_large = parse_integer(content_length.decode("latin-1"), self._limit) is None

    async def __call__(self) -> Message:
        """Receive the next part of the body, or wait for the client to disconnect.

        Raises:
            TooLarge: The body is larger than MAX_UPLOAD_BYTES, by its Content-Length or by what was received.
            UploadTooSlow: The body was not received within UPLOAD_SECONDS of the request's arrival.
            Unavailable: The bodies in flight leave no memory for it.
        """
        if self._complete:
            return await self._receive()
        self._check_size()
        message = await self._next_message()
        self.received += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        self._check_size()
        try:
            self._reservation.hold(self.received)
        except Unavailable as error:
            raise Unavailable(error.detail, {**(error.headers or {}), "Connection": "close"}) from None
        return message

    def _check_size(self) -> None:
        if self._is_announced_too_large or self.received > self._limit:
            raise TooLarge(f"the request is larger than {self._limit:,} bytes", headers={"Connection": "close"})

    async def _next_message(self) -> Message:
        if self._state.get("body_received"):
            return await self._receive()
        try:
            async with asyncio.timeout(self._state["arrived"] + self._seconds - time.monotonic()):
                return await self._receive()
        except TimeoutError:
            detail = f"the upload took longer than {self._seconds:g} s"
            raise UploadTooSlow(detail, headers={"Connection": "close"}) from None
