"""Submission of a request's images to the engine, with deadline and cancellation."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from dinat.app.api.app_state import engine_of
from dinat.app.api.parameters import read_deadline
from dinat.app.engine.engine import ImageSource
from dinat.app.engine.runtimes.runtime import InferenceOptions, InferenceResult
from dinat.app.errors import ServiceError

T = TypeVar("T")

DISCONNECT_WATCH_DELAY = 0.02
"""Seconds until a request starts to watch for a disconnect. Most requests are answered earlier and never need to."""


async def infer(
    request: Request, images: Sequence[ImageSource], options: InferenceOptions, deadline_ms: int | None = None
) -> list[InferenceResult | ServiceError]:
    """Submit the images of a request to the engine, see Engine.submit.

    For a single image, the time of each part is stored in the request's state, for Server-Timing.

    Args:
        request: The request, whose body has been read.
        images: The images.
        options: What to compute.
        deadline_ms: Maximum time in milliseconds from the arrival of the request. Default: its X-Deadline-Ms header.

    Returns:
        For each image, in order, a result or an error.

    Raises:
        Unprocessable: The X-Deadline-Ms header is invalid.
        ClientDisconnect: The client has disconnected.
        ServiceError: The engine rejected the request.
    """
    engine = engine_of(request)
    deadline_ms = read_deadline(request) if deadline_ms is None else deadline_ms
    results = await cancel_on_disconnect(request, engine.submit(images, options, deadline_ms, request.state.arrived))
    if len(results) == 1 and isinstance(results[0], InferenceResult):
        request.state.seconds = dict(results[0].seconds)
    return results


async def infer_one(request: Request, image: ImageSource, options: InferenceOptions) -> InferenceResult:
    """Submit one image and return its result. Raises the image's error, and as `infer`."""
    (result,) = await infer(request, [image], options)
    if isinstance(result, ServiceError):
        raise result
    return result


async def infer_all(
    request: Request, images: Sequence[ImageSource], options: InferenceOptions, label: str, deadline_ms: int | None = None
) -> list[InferenceResult]:
    """Submit several images and return their results. Raises the error of the first image that has one, and as `infer`.

    Args:
        request: The request, whose body has been read.
        images: The images.
        options: What to compute.
        label: What an error message calls an image: "instance" for "instance 2 of 3: ...".
        deadline_ms: As for `infer`.
    """
    results = []
    for i, result in enumerate(await infer(request, images, options, deadline_ms)):
        if isinstance(result, ServiceError):
            raise result.at(f"{label} {i + 1} of {len(images)}")
        results.append(result)
    return results


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, and cancel it if the client disconnects. The request's body must have been read.

    Raises:
        ClientDisconnect: The client has disconnected.
    """
    task, disconnected = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal disconnected
        while (await request.receive())["type"] != "http.disconnect":
            pass
        disconnected = True
        task.cancel()

    watchers: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()
    timer = loop.call_later(DISCONNECT_WATCH_DELAY, lambda: watchers.append(loop.create_task(watch())))
    try:
        return await work
    except asyncio.CancelledError:
        if disconnected and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        timer.cancel()
        for watcher in watchers:
            watcher.cancel()
