"""Turns for work of different cost, the cheapest first."""

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

OLDEST_EVERY = 4
"""Each fourth turn goes to who has waited longest: a stream of cheap work must not exclude what costs more."""


class Reservations:
    """Limits how much work is done at a time. The cheapest of the waiting work is first, now and then the oldest.

    Args:
        count: Maximum number of pieces of work.
        units: Maximum size of all work together, such as pixels.
    """

    def __init__(self, count: int, units: int = 0) -> None:
        self._count, self._units = count, units
        self._waiting: list[tuple[int, int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._admitted = 0

    @asynccontextmanager
    async def reserve(self, cost: int, units: int = 0) -> AsyncIterator[None]:
        """Wait until work of this cost and size may be done."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (cost, next(self._numbers), units, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._count += 1
                self._units += units
            self._admit()

    def _admit(self) -> None:
        while self._waiting and self._count > 0:
            is_oldest = self._admitted % OLDEST_EVERY == OLDEST_EVERY - 1
            first = min(self._waiting, key=lambda entry: entry[1]) if is_oldest else self._waiting[0]
            _, _, units, turn = first
            if not turn.cancelled():
                if self._units < units:
                    return
                self._count -= 1
                self._units -= units
                self._admitted += 1
                turn.set_result(None)
            self._waiting.remove(first)
            heapq.heapify(self._waiting)
