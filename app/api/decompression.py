"""Decompression of request bodies (RFC 9110, section 8.4)."""

import zlib

from starlette.types import Message, Receive

from dinat.app.errors import NoImage, TooLarge, UnsupportedImage

ENCODINGS = ("gzip", "x-gzip", "deflate")
"""Supported content encodings. zlib detects whether data is gzip or deflate."""


def decompressed(receive: Receive, encoding: str, limit: int) -> Receive:
    """Wrap `receive` so that the body is decompressed while it is received.

    Args:
        receive: ASGI callable to wrap.
        encoding: Value of the Content-Encoding header.
        limit: Maximum size of the decompressed body in bytes.

    Returns:
        A callable that raises UnsupportedImage if the encoding is not supported, TooLarge if the body exceeds the limit, and
        NoImage if the data is invalid.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return receive
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
    remaining, complete = limit, False

    async def inflate() -> Message:
        nonlocal remaining, complete
        if encoding not in ENCODINGS:
            detail = f"Content-Encoding {encoding} is not supported: use gzip or deflate"
            raise UnsupportedImage(detail, {"Accept-Encoding": "gzip, deflate"})
        message = await receive()
        if complete or message["type"] != "http.request":
            return message
        complete = not message.get("more_body", False)
        try:
            body = inflater.decompress(message.get("body", b""), remaining + 1)
        except zlib.error as error:
            raise NoImage(f"the body is not valid {encoding}: {error}") from None
        remaining -= len(body)
        if remaining < 0:
            raise TooLarge(f"the decompressed body is larger than {limit:,} bytes", {"Connection": "close"})
        if complete and not inflater.eof:
            raise NoImage(f"the body is not valid {encoding}: it is truncated")
        return {**message, "body": body}

    return inflate
