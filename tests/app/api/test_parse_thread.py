"""The order in which large bodies are parsed."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from dinat.app.api.parse_thread import INLINE_BYTES, ParseThread


def test_smallest_body_is_parsed_first() -> None:
    order: list[str] = []
    entered, proceed = threading.Event(), threading.Event()

    def parse(name: str) -> Callable[[], str]:
        return lambda: order.append(name) or name

    def block() -> str:
        entered.set()
        assert proceed.wait(10)
        return "first"

    async def main() -> list[object]:
        thread = ParseThread()
        first = asyncio.create_task(thread.run(10 * INLINE_BYTES, block))
        await asyncio.to_thread(entered.wait)
        waiting = [asyncio.create_task(thread.run(n * INLINE_BYTES, parse(str(n)))) for n in (4, 2, 3, 5)]
        await asyncio.sleep(0)
        waiting[3].cancel()
        assert await thread.run(INLINE_BYTES, parse("inline")) == "inline"  # not delayed by the thread
        proceed.set()
        results = await asyncio.gather(first, *waiting, return_exceptions=True)
        thread.stop()
        return results

    *results, cancelled = asyncio.run(main())
    assert results == ["first", "4", "2", "3"]
    assert isinstance(cancelled, asyncio.CancelledError)
    assert order == ["inline", "2", "3", "4"]


def test_error_is_raised_and_the_thread_continues() -> None:
    async def main() -> int:
        thread = ParseThread()
        with pytest.raises(ZeroDivisionError):
            await thread.run(INLINE_BYTES + 1, lambda: 1 // 0)
        return await thread.run(INLINE_BYTES + 1, lambda: 7)

    assert asyncio.run(main()) == 7
