"""Values that a client sent, shortened for error messages and the log."""

from reprlib import Repr

MAX_CHARACTERS = 200

_REPR = Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 100, 100


def quote(value: object) -> str:
    """Return the repr of a value, with long strings and long or nested collections abbreviated."""
    return shorten(_REPR.repr(value))


def shorten(text: str, limit: int = MAX_CHARACTERS) -> str:
    """Return the text, cut after `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def parse_integer(text: str, maximum: int) -> int | None:
    """Parse decimal digits. Return None for other text, and for integers above `maximum`."""
    digits = text.lstrip("0") or "0"
    if not (text.isascii() and text.isdecimal()) or len(digits) > len(str(maximum)):
        return None
    value = int(digits)  # Python raises ValueError for more than 4,300 digits
    return value if value <= maximum else None
