"""GET /health, /health/live, /health/ready, /model and /metrics."""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from dinat.app.api.schemas import PROBLEMS, Disabled, Health, ModelCard, Process
from dinat.app.engine.backend import State
from dinat.app.engine.engine import Engine

router = APIRouter(tags=["health"])

_UNHEALTHY = {503: {"model": Health, "description": "Not now; detail says why"}}


@router.get("/health", responses=_UNHEALTHY, response_model_exclude_none=True)  # type: ignore[arg-type]
@router.get("/health/ready", responses=_UNHEALTHY, response_model_exclude_none=True)  # type: ignore[arg-type]
async def ready(request: Request, response: Response) -> Health:
    """Whether pictures are taken now."""
    return _health(request, response, request.app.state.engine.state is State.READY)


@router.get("/health/live", responses=_UNHEALTHY, response_model_exclude_none=True)  # type: ignore[arg-type]
async def live(request: Request, response: Response) -> Health:
    """Whether the process does its work, or is on its way to: if not, start it anew."""
    return _health(request, response, request.app.state.engine.state is not State.FAILED)


def _health(request: Request, response: Response, healthy: bool) -> Health:
    engine: Engine = request.app.state.engine
    response.status_code = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
    response.headers["Cache-Control"] = "no-store"
    read = request.app.state.processes
    processes = None if read is None else [Process.model_validate(told) for told in read()]
    return Health(status=engine.state, detail=engine.status_detail(), model=engine.settings.served_name, processes=processes)


NOT_NOW: dict[int | str, dict[str, Any]] = {503: {"description": "Not now; the text says why", "content": {"text/plain": {}}}}


def ready_in_words(request: Request) -> Response:
    """200 once pictures are taken, and a sentence: for those who want no more."""
    engine: Engine = request.app.state.engine
    status = HTTPStatus.OK if engine.state is State.READY else HTTPStatus.SERVICE_UNAVAILABLE
    return PlainTextResponse(engine.status_detail(), status)


@router.get("/model", responses={503: PROBLEMS[503]})
async def model(request: Request) -> ModelCard:
    """What is being served: labels, configuration, input, precision and who computes."""
    engine: Engine = request.app.state.engine
    loaded = engine.loaded
    config = loaded.config
    return ModelCard(
        model=engine.settings.served_name,
        labels=[config.id2label[i] for i in range(config.num_labels)],
        config={name: value for name, value in config.to_dict().items() if name not in ("id2label", "label2id")},
        input_size=loaded.processor.to_dict(),
        runtime=loaded.runtime,
        device=loaded.device,
        precision=loaded.precision,
        attention=loaded.attention,
        disabled=[Disabled(what=one.name, why=one.reason) for one in loaded.disabled],
        features=config.feature_names,
    )


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """What the service counts, for Prometheus."""
    return Response(request.app.state.engine.metrics.exposition(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
