"""Classification of many images, for commands that wait for all results."""

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
"""DEADLINE_MS for commands: long enough never to pass."""

T = TypeVar("T")


@asynccontextmanager
async def running_engine(settings: Settings) -> AsyncIterator[Engine]:
    """An engine that has loaded its model, stopped on exit.

    Raises:
        DinatError: The model cannot be loaded, or the body raised a ServiceError.
    """
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


async def stream_results(
    engine: Engine,
    items: Iterable[T] | AsyncIterator[T],
    options: InferenceOptions,
    read: Callable[[T], Awaitable[ImageSource]],
    max_in_flight: int | None = None,
) -> AsyncGenerator[tuple[T, InferenceResult | str]]:
    """Classify items and yield each with its result or its error message, in order.

    Args:
        engine: A running engine.
        items: Identify the images.
        options: What to compute, for all images.
        read: Returns the image of an item; an OSError or ServiceError that it raises is the item's error.
        max_in_flight: Limit of images in flight, and thus in memory; the engine's queue limit if None.
    """
    limit = max_in_flight or engine.settings.queue_limit

    async def classify(item: T) -> InferenceResult | str:
        try:
            image = await read(item)
        except OSError as error:
            return str(error)
        except ServiceError as error:
            return error.detail
        (result,) = await engine.submit([image], options)
        return result.detail if isinstance(result, ServiceError) else result

    in_flight: deque[tuple[T, asyncio.Task[InferenceResult | str]]] = deque()
    try:
        async for item in items if isinstance(items, AsyncIterator) else _async_items(items):
            if len(in_flight) == limit:
                first, oldest = in_flight.popleft()
                yield first, await oldest
            in_flight.append((item, asyncio.create_task(classify(item))))
        while in_flight:
            first, oldest = in_flight.popleft()
            yield first, await oldest
    finally:
        for _, task in in_flight:
            task.cancel()


async def _async_items(items: Iterable[T]) -> AsyncIterator[T]:
    for item in items:
        yield item
