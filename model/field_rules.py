"""Types and ranges of fields that come from files or users, checked before anything is computed or allocated from them."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from dinat.model.errors import DinatError

Rule = Callable[[Any], str | None]
"""Returns what a value must be if it is not, else None."""

SHOWN_CHARACTERS = 80


def integer(low: int, high: int) -> Rule:
    """An integer in [low, high]; True and False are none."""

    def check(value: Any) -> str | None:
        is_valid = isinstance(value, Integral) and not isinstance(value, bool) and low <= value <= high  # type: ignore[operator]
        return None if is_valid else f"an integer from {low:,} to {high:,}"

    return check


def number(low: float, high: float) -> Rule:
    """A finite number in [low, high]."""

    def check(value: Any) -> str | None:
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        return None if is_number and low <= value <= high else f"a number from {low:g} to {high:g}"

    return check


def flag(value: Any) -> str | None:
    """True or False."""
    return None if isinstance(value, bool) else "true or false"


def text(*choices: str) -> Rule:
    """One of these strings, or any without choices."""

    def check(value: Any) -> str | None:
        is_valid = isinstance(value, str) and (not choices or value in choices)
        return None if is_valid else f"one of {', '.join(choices)}" if choices else "a string"

    return check


def sequence(rule: Rule, low: int, high: int) -> Rule:
    """A list or tuple of low to high values that follow a rule."""

    def check(value: Any) -> str | None:
        if isinstance(value, str | bytes) or not isinstance(value, Sequence) or not low <= len(value) <= high:
            return f"a list of {low if low == high else f'{low:,} to {high:,}'} values"
        expected = next((expected for item in value if (expected := rule(item)) is not None), None)
        return None if expected is None else f"a list with {expected} at each place"

    return check


def optional(rule: Rule) -> Rule:
    """None, or what follows the rule."""
    return lambda value: None if value is None else rule(value)


def check_fields(values: Mapping[str, Any], rules: Mapping[str, Rule], error: type[DinatError]) -> None:
    """Raise `error`, which names the field, for the first value that does not follow its rule."""
    for name, rule in rules.items():
        expected = rule(values[name])
        if expected is not None:
            raise error(f"{name} must be {expected}, got {shown(values[name])}")


def shown(value: Any) -> str:
    """Return a short representation of a value for an error message."""
    try:
        whole = repr(value)
    except (RecursionError, ValueError):  # deeply nested, or an integer of thousands of digits
        return f"a {type(value).__name__}"
    return whole if len(whole) <= SHOWN_CHARACTERS else f"{whole[:SHOWN_CHARACTERS]}..."
