"""How a door asks the engine: for the caller's own time, and not for one who has gone."""

from collections.abc import Sequence

from fastapi import Request

from app.api.hangup import unless_gone
from app.api.parameters import read_deadline
from app.engine.engine import Engine, Submitted
from app.engine.runtime import Answer, Wanted
from app.errors import ServiceError


async def ask(
    request: Request, pictures: Sequence[Submitted], wanted: Wanted, deadline_ms: int | None = None
) -> list[Answer | ServiceError]:
    """Engine.submit, of a request. deadline_ms: that of its header if None.

    Leaves what each part took in the request's state, for Server-Timing; several pictures at once have no parts of their own.
    Raises Unprocessable, for that header; ClientDisconnect; and what submit raises.
    """
    engine: Engine = request.app.state.engine
    deadline_ms = read_deadline(request) if deadline_ms is None else deadline_ms
    answers = await unless_gone(request, engine.submit(pictures, wanted, deadline_ms, request.state.arrived))
    if len(answers) == 1 and isinstance(answers[0], Answer):
        request.state.seconds = dict(answers[0].seconds)
    return answers


async def ask_one(request: Request, picture: Submitted, wanted: Wanted) -> Answer:
    """The same of one picture. Raises what is wrong with it, too."""
    (answer,) = await ask(request, [picture], wanted)
    if isinstance(answer, ServiceError):
        raise answer
    return answer


async def ask_all(
    request: Request, pictures: Sequence[Submitted], wanted: Wanted, called: str, deadline_ms: int | None = None
) -> list[Answer]:
    """The same of several, where one that is wrong fails all. called: what the error calls a picture there."""
    answers = []
    for i, answer in enumerate(await ask(request, pictures, wanted, deadline_ms)):
        if isinstance(answer, ServiceError):
            raise type(answer)(f"{called} {i + 1} of {len(pictures)}: {answer.detail}", answer.headers)
        answers.append(answer)
    return answers
