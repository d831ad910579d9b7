"""A progress bar for asynchronous results."""

import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")


@asynccontextmanager
async def progress_bar(results: AsyncGenerator[T], total: int, description: str) -> AsyncIterator[AsyncIterator[T]]:
    """Iterate over results with a progress bar on standard error if that is a terminal. Closes the generator on exit."""
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(description, total=total)

        async def advance() -> AsyncIterator[T]:
            async for result in results:
                yield result
                progress.advance(task)

        async with aclosing(results):
            yield advance()
