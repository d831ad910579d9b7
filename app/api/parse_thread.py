"""A thread that parses large request bodies."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from dinat.app.reservations import Reservations

T = TypeVar("T")

INLINE_BYTES = 16 * 1024
"""Largest body that is parsed on the event loop. Parsing it takes a few milliseconds at most, for each of many connections; a
thread costs 0.1 ms."""

MAX_PAUSE_SECONDS = 0.25


class ParseThread:
    """Parses bodies one at a time, the smallest of the waiting ones first, see Reservations.

    Parsers written in C hold the GIL. Therefore each is followed by a pause of equal length in which the event loop runs
    without interruption; and one thread is enough, which also limits the memory of parsed values to that of one body.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="parse")
        self._turns = Reservations(1)
        self._free_at = 0.0

    async def run(self, size: int, parse: Callable[[], T]) -> T:
        """Run `parse` in the thread, or directly if its body of `size` bytes is small, and return its result."""
        if size <= INLINE_BYTES:
            return parse()
        async with self._turns.reserve(size):
            await asyncio.sleep(max(0, min(MAX_PAUSE_SECONDS, self._free_at - time.monotonic())))
            started = time.monotonic()
            try:
                return await asyncio.get_running_loop().run_in_executor(self._thread, parse)
            finally:
                ended = time.monotonic()
                self._free_at = ended + (ended - started)

    def stop(self) -> None:
        """End the thread after what it runs."""
        self._thread.shutdown(wait=False, cancel_futures=True)
