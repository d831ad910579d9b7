"""How far a command is, for who looks on."""

import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")


@asynccontextmanager
async def with_bar(done: AsyncGenerator[T], total: int, doing: str) -> AsyncIterator[AsyncIterator[T]]:
    """The same, one by one; on a terminal a bar on standard error says how many of them there were. Closes it at the end."""
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(doing, total=total)

        async def each() -> AsyncIterator[T]:
            async for one in done:
                yield one
                progress.advance(task)

        async with aclosing(done):
            yield each()
