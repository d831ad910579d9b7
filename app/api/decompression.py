"""Bodies that come compressed (RFC 9110, 8.4)."""

import zlib

from starlette.types import Message, Receive

from dinat.app.errors import NoImage, TooLarge, UnsupportedImage

READ = ("gzip", "x-gzip", "deflate")
"""By zlib, which tells gzip and deflate apart by itself."""


def decompressed(receive: Receive, encoding: str, limit: int) -> Receive:
    """`receive`, its body decompressed as it comes, to `limit` bytes at most.

    The first call raises UnsupportedImage for an encoding that is not read; every one TooLarge, or NoImage where it is broken.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return receive
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
    left, complete = limit, False

    async def inflate() -> Message:
        nonlocal left, complete
        if encoding not in READ:
            detail = f"Content-Encoding {encoding} is not read here, gzip and deflate are"
            raise UnsupportedImage(detail, {"Accept-Encoding": "gzip, deflate"})
        message = await receive()
        if complete or message["type"] != "http.request":
            return message
        complete = not message.get("more_body", False)
        try:
            body = inflater.decompress(message.get("body", b""), left + 1)
        except zlib.error as error:
            raise NoImage(f"the body is said to be {encoding}, and is not: {error}") from None
        left -= len(body)
        if left < 0:
            raise TooLarge(f"the request is larger than {limit:,} bytes when it is decompressed", {"Connection": "close"})
        if complete and not inflater.eof:
            raise NoImage(f"the body is said to be {encoding}, and ends too soon")
        return {**message, "body": body}

    return inflate
