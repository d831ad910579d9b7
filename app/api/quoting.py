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
