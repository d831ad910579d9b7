"""How a door asks the engine: for the caller's own time, and not for one who has gone."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from dinat.app.api.parameters import read_deadline
from dinat.app.engine.engine import Engine, ImageSource
from dinat.app.engine.runtimes.runtime import InferenceOptions, InferenceResult
from dinat.app.errors import ServiceError

T = TypeVar("T")

PATIENCE_SECONDS = 0.02
"""How long after its request a client may be gone unnoticed: most answers are there before, and nobody need watch."""


async def ask(
    request: Request, pictures: Sequence[ImageSource], wanted: InferenceOptions, deadline_ms: int | None = None
) -> list[InferenceResult | ServiceError]:
    """Engine.submit, of a request. deadline_ms: that of its header if None.

    Leaves what each part took in the request's state, for Server-Timing; several pictures at once have no parts of their own.
    Raises Unprocessable, for that header; ClientDisconnect; and what submit raises.
    """
    engine: Engine = request.app.state.engine
    deadline_ms = read_deadline(request) if deadline_ms is None else deadline_ms
    answers = await cancel_on_disconnect(request, engine.submit(pictures, wanted, deadline_ms, request.state.arrived))
    if len(answers) == 1 and isinstance(answers[0], InferenceResult):
        request.state.seconds = dict(answers[0].seconds)
    return answers


async def infer_one(request: Request, picture: ImageSource, wanted: InferenceOptions) -> InferenceResult:
    """The same of one picture. Raises what is wrong with it, too."""
    (answer,) = await ask(request, [picture], wanted)
    if isinstance(answer, ServiceError):
        raise answer
    return answer


async def infer_all(
    request: Request, pictures: Sequence[ImageSource], wanted: InferenceOptions, called: str, deadline_ms: int | None = None
) -> list[InferenceResult]:
    """The same of several, where one that is wrong fails all. called: what the error calls a picture there."""
    answers = []
    for i, answer in enumerate(await ask(request, pictures, wanted, deadline_ms)):
        if isinstance(answer, ServiceError):
            raise type(answer)(f"{called} {i + 1} of {len(pictures)}: {answer.detail}", answer.headers)
        answers.append(answer)
    return answers


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client hangs up first. The body must have been read.

    Raises ClientDisconnect then.
    """
    task, gone = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watching: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()
    timer = loop.call_later(PATIENCE_SECONDS, lambda: watching.append(loop.create_task(watch())))
    try:
        return await work
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        timer.cancel()
        for watcher in watching:
            watcher.cancel()
