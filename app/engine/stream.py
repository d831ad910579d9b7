"""Many pictures through the engine, for who wants all of their answers and is in no hurry for any."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar

from dinat.app.engine.engine import Engine, ImageSource
from dinat.app.engine.runtimes.runtime import InferenceOptions, InferenceResult
from dinat.app.errors import ServiceError
from dinat.app.settings import Settings
from dinat.model import DinatError

NO_DEADLINE_MS = 24 * 3600 * 1000
"""How long a picture may wait: nobody else does."""

T = TypeVar("T")


@asynccontextmanager
async def started(settings: Settings) -> AsyncIterator[Engine]:
    """An engine that has loaded its checkpoint. Raises DinatError if it cannot, and in the place of a ServiceError."""
    engine = Engine(settings)
    await engine.start()
    try:
        if engine.failure is not None:
            raise DinatError(f"{settings.model} cannot be loaded: {engine.failure}")
        yield engine
    except ServiceError as error:
        raise DinatError(error.detail) from None
    finally:
        await engine.stop()


async def answers(
    engine: Engine,
    items: Iterable[T] | AsyncIterator[T],
    wanted: InferenceOptions,
    read: Callable[[T], Awaitable[ImageSource]],
    at_once: int | None = None,
) -> AsyncGenerator[tuple[T, InferenceResult | str]]:
    """What becomes of each picture, in order: an answer, or what is wrong with it.

    read: what to submit for an item; an OSError or ServiceError that it raises is what is wrong with the picture.
    at_once: how many are under way, and no more are in memory; as many as may wait in the engine if None.
    """
    most = at_once or engine.settings.queue_limit

    async def one(item: T) -> InferenceResult | str:
        try:
            picture = await read(item)
        except OSError as error:
            return str(error)
        except ServiceError as error:
            return error.detail
        (answer,) = await engine.submit([picture], wanted)
        return answer.detail if isinstance(answer, ServiceError) else answer

    in_flight: deque[tuple[T, asyncio.Task[InferenceResult | str]]] = deque()
    try:
        async for item in items if isinstance(items, AsyncIterator) else _each(items):
            if len(in_flight) == most:
                first, oldest = in_flight.popleft()
                yield first, await oldest
            in_flight.append((item, asyncio.create_task(one(item))))
        while in_flight:
            first, oldest = in_flight.popleft()
            yield first, await oldest
    finally:
        for _, left in in_flight:
            left.cancel()


async def _each(items: Iterable[T]) -> AsyncIterator[T]:
    for item in items:
        yield item
