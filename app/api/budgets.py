"""Limits on the bytes that all requests of a process hold at once."""

from collections.abc import Callable

from dinat.app.errors import Unavailable

FREE_BYTES = 64 * 1024
"""Bytes that each request may hold without a reservation, so that large requests do not exclude small ones."""


class ByteBudget:
    """Bytes that all requests of a process may hold together. All methods run on the event loop's thread.

    Args:
        limit: Maximum number of bytes.
        name: What is held, for error messages: "request bodies".
        on_change: Called with the number of bytes held, whenever it changes.
    """

    def __init__(self, limit: int, name: str, on_change: Callable[[int], object] = lambda _: None) -> None:
        self.limit = limit
        self.name = name
        self._used = 0
        self._on_change = on_change

    @property
    def used(self) -> int:
        """Bytes that requests hold now."""
        return self._used

    def add(self, size: int) -> None:
        """Count this many bytes more, or fewer if negative."""
        if size:
            self._used += size
            self._on_change(self._used)


class Reservation:
    """The bytes of a budget that one request holds."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._held = 0

    def hold(self, size: int) -> None:
        """Set the bytes that the request holds, of which FREE_BYTES are not counted.

        Raises:
            Unavailable: The budget is exhausted. The request then holds what it held before.
        """
        size = max(0, size - FREE_BYTES)
        budget = self._budget
        if size > self._held and budget.used - self._held + size > budget.limit:
            raise Unavailable(
                f"{budget.name} in flight have {budget.used:,} bytes, the limit is {budget.limit:,}: retry later",
                {"Retry-After": "1"},
            )
        budget.add(size - self._held)
        self._held = size

    def release(self) -> None:
        """Release all bytes."""
        self.hold(0)
