"""Content negotiation by the Accept header (RFC 9110, sections 12.4.2 and 12.5.1)."""

import re
from collections.abc import Sequence

_WEIGHT = re.compile(r";[ \t]*q[ \t]*=[ \t]*([\d.]*)", re.IGNORECASE)


def negotiate(accept: str, offered: Sequence[str]) -> str | None:
    """Return the offered media type that a client prefers, or None if it accepts none of them.

    A type's weight is that of the most specific range that matches it. The first range in the header decides between equal
    weights, then the order of `offered`.

    Args:
        accept: Value of the Accept header; empty for any type. Parameters other than the weight are ignored.
        offered: Media types, in order of preference.
    """
    ranges = {
        part.partition(";")[0].strip().lower(): (_weight(part), -place)
        for place, part in reversed(list(enumerate(accept.split(","))))
        if part.strip()
    } or {"*/*": (1.0, 0)}
    ranked = [(rank, media_type) for media_type in offered if (rank := _rank(media_type, ranges))[0] > 0]
    return max(ranked, key=lambda entry: entry[0])[1] if ranked else None


def _rank(media_type: str, ranges: dict[str, tuple[float, int]]) -> tuple[float, int]:
    """Return the weight and the place of the most specific range."""
    kind = media_type.partition("/")[0]
    return next((ranges[name] for name in (media_type, f"{kind}/*", "*/*") if name in ranges), (0.0, 0))


def _weight(part: str) -> float:
    """Return the weight of a range, 0 to 1; 1 if it has none, or one that is no number."""
    found = _WEIGHT.search(part)
    try:
        return 1.0 if found is None else min(max(float(found[1]), 0.0), 1.0)
    except ValueError:
        return 1.0
