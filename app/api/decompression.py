"""Decompression of request bodies (RFC 9110, section 8.4)."""

import asyncio
import zlib
from collections import deque

from starlette.types import Message

from dinat.app.api.body_limits import LimitedBody
from dinat.app.api.budgets import Reservation
from dinat.app.api.quoting import shorten
from dinat.app.errors import NoImage, TooLarge, UnsupportedImage

ENCODINGS = ("gzip", "x-gzip", "deflate")
"""Supported content encodings. zlib detects whether data is gzip or deflate."""

PIECE_BYTES = 64 * 1024
INPUT_BYTES = 8 * 1024
"""Largest pieces of output and input in which a body is decompressed. One takes about 0.1 ms, a millisecond if it has blocks
without output; then other requests get a turn."""


class DecompressedBody:
    """ASGI receive callable that decompresses a body.

    The body is decompressed once all of it was received: a client that stops halfway occupies only the bytes that it sent.

    Args:
        receive: Callable to wrap.
        encoding: Value of the Content-Encoding header, other than identity.
        limit: Maximum size of the decompressed body in bytes.
        reservation: Holds the bytes received and decompressed so far.
    """

    def __init__(self, receive: LimitedBody, encoding: str, limit: int, reservation: Reservation) -> None:
        self._receive = receive
        self._encoding = encoding.strip().lower()
        self._limit = limit
        self._reservation = reservation
        self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
        self._compressed: deque[memoryview] = deque()
        self._received = False
        self._complete = False
        self._size = 0

    async def __call__(self) -> Message:
        """Return the next piece of the decompressed body.

        Raises:
            UnsupportedImage: The encoding is not supported.
            TooLarge: The decompressed body exceeds the limit.
            NoImage: The data is invalid.
            Unavailable: The bodies in flight leave no memory for it.
        """
        if self._encoding not in ENCODINGS:
            detail = f"Content-Encoding {shorten(self._encoding)} is not supported: use gzip or deflate"
            raise UnsupportedImage(detail, {"Accept-Encoding": "gzip, deflate"})
        if self._complete:
            return await self._receive()
        while not self._received:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._compressed.append(memoryview(message.get("body", b"")))
            self._received = not message.get("more_body", False)
        await asyncio.sleep(0)
        body = self._inflate()
        self._size += len(body)
        if self._size > self._limit:
            raise TooLarge(f"the decompressed body is larger than {self._limit:,} bytes")
        self._complete = not self._compressed
        self._reservation.hold(self._size if self._complete else self._receive.received + self._size)
        return {"type": "http.request", "body": body, "more_body": not self._complete}

    def _inflate(self) -> bytes:
        """Decompress the next piece. Afterwards `_compressed` has what is left; it is empty once the body is complete."""
        data = self._compressed.popleft()
        if len(data) > INPUT_BYTES:
            self._compressed.appendleft(data[INPUT_BYTES:])
        try:
            body = self._inflater.decompress(data[:INPUT_BYTES], PIECE_BYTES)
        except zlib.error as error:
            raise NoImage(f"the body is not valid {self._encoding}: {error}") from None
        rest = self._inflater.unconsumed_tail
        if self._inflater.eof:
            if self._inflater.unused_data or any(self._compressed):
                raise NoImage(f"the body is not valid {self._encoding}: data follows its end")
            self._compressed.clear()
        elif rest or len(body) == PIECE_BYTES:
            self._compressed.appendleft(memoryview(rest))
        elif not self._compressed:
            raise NoImage(f"the body is not valid {self._encoding}: it is truncated")
        return body
