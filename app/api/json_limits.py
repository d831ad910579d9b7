"""JSON of bounded cost."""

from dataclasses import dataclass
from typing import Any

import orjson

from dinat.app.errors import TooLarge


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
        ValueError: The body is not JSON.
    """
    length = len(body) if length is None else length
    counts = {
        "values": (body.count(b",", 0, length), limits.values),
        "lists and objects": (body.count(b"[", 0, length) + body.count(b"{", 0, length), limits.containers),
        "keys": (body.count(b":", 0, length), limits.keys),
    }
    for name, (count, limit) in counts.items():
        if count > limit:
            raise TooLarge(f"the JSON has about {count:,} {name}, the maximum is {limit:,}: {limits.advice}")
    return orjson.loads(memoryview(body)[:length])
