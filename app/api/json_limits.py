"""JSON of bounded cost."""

from codecs import BOM_UTF8
from dataclasses import dataclass
from typing import Any

import orjson

from dinat.app.errors import TooLarge, Unprocessable

JSON_TYPES = ("application/json", "text/json")
UNSPECIFIC_TYPES = ("", "text/plain", "application/octet-stream", "application/x-www-form-urlencoded")
"""Media types that clients send by default, whatever the body is."""

MAX_WHITESPACE = 64


@dataclass(frozen=True)
class JsonLimits:
    """Limits on the structure of a JSON text.

    20 MB of JSON can be 10 million values, which take seconds and 800 MB to parse, while other threads wait for the GIL. The
    limits are checked on the text, where brackets, commas and colons within strings count as well: base64 has none.

    Attributes:
        values: Maximum number of commas.
        containers: Maximum number of lists and objects.
        keys: Maximum number of colons.
        advice: End of the error message.
    """

    values: int
    containers: int
    keys: int
    advice: str


def message_limits(queue_limit: int) -> JsonLimits:
    """Return the limits for JSON that has little but images in base64."""
    count = 8 * queue_limit + 1000
    return JsonLimits(count, count, count, f"at most {queue_limit} images can be queued")


def load_json(body: bytes, limits: JsonLimits, length: int | None = None) -> Any:
    """Parse JSON.

    Args:
        body: Bytes that start with JSON.
        limits: Limits on its structure.
        length: Length of the JSON in bytes; by default that of the body.

    Raises:
        TooLarge: The JSON exceeds a limit.
        Unprocessable: An object has a key twice.
        ValueError: The body is not JSON.
    """
    length = len(body) if length is None else length
    if body.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16: send UTF-8")
    counts = {
        "values": (body.count(b",", 0, length), limits.values),
        "lists and objects": (body.count(b"[", 0, length) + body.count(b"{", 0, length), limits.containers),
        "keys": (body.count(b":", 0, length), limits.keys),
    }
    for name, (count, limit) in counts.items():
        if count > limit:
            raise TooLarge(f"the JSON has about {count:,} {name}, the maximum is {limit:,}: {limits.advice}")
    start = len(BOM_UTF8) if body.startswith(BOM_UTF8) else 0  # as PowerShell and .NET write it
    value = orjson.loads(memoryview(body)[start:length])
    colons, _ = counts["keys"]
    keys = _count_keys(value)
    if keys != colons and keys != colons - _count_colons_in_strings(body[:length]):  # orjson returns the last one's value
        raise Unprocessable("a key occurs twice in an object of the JSON: send it once")
    return value


def _count_keys(value: Any) -> int:
    """Return the number of keys of all objects in a value."""
    keys, values = 0, [value]
    while values:
        node = values.pop()
        if isinstance(node, dict):
            keys += len(node)
            node = list(node.values())
        if isinstance(node, list) and not {dict, list}.isdisjoint(map(type, node)):
            values += [item for item in node if isinstance(item, dict | list)]
    return keys


def _count_colons_in_strings(text: bytes) -> int:
    """Return the number of colons within the strings of a JSON text, such as that of a data: URL."""
    if b"\\" in text:
        text = text.replace(rb"\\", b"").replace(rb"\"", b"")
    colons, start = 0, text.find(b'"')
    while start >= 0:
        end = text.find(b'"', start + 1)
        colons += text.count(b":", start, end)
        start = text.find(b'"', end + 1)
    return colons


def is_json(media_type: str, body: bytes) -> bool:
    """Whether a body is JSON: by its media type, or an object under one that says nothing, as curl -d and fetch() send it."""
    if media_type in JSON_TYPES or media_type.endswith("+json"):
        return True
    return media_type in UNSPECIFIC_TYPES and body[:MAX_WHITESPACE].removeprefix(BOM_UTF8).lstrip().startswith(b"{")
