"""Many pictures through the service's own engine, from the command line."""

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from rich.console import Console
from rich.progress import Progress

from app.cli import Refused
from app.engine.engine import Engine, Submitted
from app.engine.runtime import Answer, Wanted
from app.errors import ServiceError
from app.settings import Settings

PATIENCE_MS = 24 * 3600 * 1000
"""How long a picture may wait: nobody else does."""


@asynccontextmanager
async def started(settings: Settings) -> AsyncIterator[Engine]:
    """An engine that has loaded its checkpoint. Raises Refused if it cannot, and in the place of a ServiceError."""
    engine = Engine(settings)
    await engine.start()
    try:
        if engine.failure is not None:
            raise Refused(f"{settings.model} cannot be loaded: {engine.failure}")
        yield engine
    except ServiceError as error:
        raise Refused(error.detail) from None
    finally:
        await engine.stop()


async def answers(
    engine: Engine, paths: Sequence[str], wanted: Wanted, read: Callable[[str], Awaitable[Submitted]], doing: str
) -> AsyncIterator[tuple[str, Answer | str]]:
    """What becomes of each picture, in order: an answer, or what is wrong with it. A bar on a terminal says how far it is.

    read: what to submit for a path.  As many are under way as may wait in the engine, and no more are in memory.
    """

    async def one(path: str) -> Answer | str:
        try:
            (answer,) = await engine.submit([await read(path)], wanted)
        except OSError as error:
            return str(error)
        return answer.detail if isinstance(answer, ServiceError) else answer

    under_way: deque[tuple[str, asyncio.Task[Answer | str]]] = deque()
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(doing, total=len(paths))
        try:
            for path in paths:
                if len(under_way) == engine.settings.queue_limit:
                    first, oldest = under_way.popleft()
                    yield first, await oldest
                    progress.advance(task)
                under_way.append((path, asyncio.create_task(one(path))))
            while under_way:
                first, oldest = under_way.popleft()
                yield first, await oldest
                progress.advance(task)
        finally:
            for _, left in under_way:
                left.cancel()
