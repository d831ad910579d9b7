"""Images in base64, as clients send them in JSON and forms."""

import base64
import re

from dinat.app.errors import NoImage, Unprocessable
from dinat.app.images import EMPTY_IMAGE

_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
"""Maps the URL-safe alphabet of base64 to the standard one (RFC 4648, sections 4 and 5)."""

_WHITESPACE = b" \t\n\r\v\f"

_PERCENT_ENCODED = ((b"%2B", b"+"), (b"%2b", b"+"), (b"%2F", b"/"), (b"%2f", b"/"), (b"%3D", b"="), (b"%3d", b"="))


def decode_base64(text: str) -> bytes:
    """Decode base64 or a base64 data: URL. Both alphabets, whitespace and missing padding are accepted.

    Raises:
        NoImage: The data is empty.
        Unprocessable: The text is not base64.
    """
    text = text.strip()
    if re.match(r"https?:|[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        raise Unprocessable("image is a URL, and URLs are not fetched: send the image itself")
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise Unprocessable("image is a data: URL that is not base64: expected data:image/...;base64,...")
    if text.startswith(("b'", 'b"')):
        raise Unprocessable("image is the repr of bytes, not base64: in Python, send base64.b64encode(data).decode()")
    try:
        plain = _without_transport_encoding(text.encode("ascii")).translate(_STANDARD_ALPHABET, _WHITESPACE).rstrip(b"=")
        data = base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except ValueError as error:
        raise Unprocessable(f"image is not base64: {error}") from None
    if not data:
        raise NoImage(EMPTY_IMAGE)
    return data


def _without_transport_encoding(data: bytes) -> bytes:
    """Restore base64 that was percent-encoded twice, or whose "+" became spaces in a form that was not percent-encoded.

    Lines of equal length that are joined by spaces remain as they are: those spaces are white space.
    """
    if b"%" in data:
        for encoded, character in _PERCENT_ENCODED:
            data = data.replace(encoded, character)
    first = data.find(b" ")
    if first < 0 or b"+" in data or b"-" in data or b"_" in data or data.translate(None, b"\r\n\t\v\f") != data:
        return data
    at_line_ends = data[first :: first + 1]
    is_wrapped = at_line_ends.count(b" ") == len(at_line_ends) == data.count(b" ")
    return data if is_wrapped else data.replace(b" ", b"+")
