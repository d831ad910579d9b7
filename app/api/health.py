"""GET /health, /health/live, /health/ready, /model and /metrics."""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from dinat.app.api.app_state import engine_of
from dinat.app.api.schemas import PROBLEMS, Disabled, Health, ModelCard, Process
from dinat.app.engine.backend import State

router = APIRouter(tags=["health"])

_UNHEALTHY = {503: {"model": Health, "description": "Not ready or failed; detail gives the reason"}}


@router.get("/health", responses=_UNHEALTHY, response_model_exclude_none=True)  # type: ignore[arg-type]
@router.get("/health/ready", responses=_UNHEALTHY, response_model_exclude_none=True)  # type: ignore[arg-type]
async def ready(request: Request, response: Response) -> Health:
    """Readiness: 200 if the service accepts requests."""
    return _health(request, response, engine_of(request).state is State.READY)


@router.get("/health/live", responses=_UNHEALTHY, response_model_exclude_none=True)  # type: ignore[arg-type]
async def live(request: Request, response: Response) -> Health:
    """Liveness: 503 if the engine has failed and the process must be restarted."""
    return _health(request, response, engine_of(request).state is not State.FAILED)


def _health(request: Request, response: Response, healthy: bool) -> Health:
    engine = engine_of(request)
    response.status_code = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
    response.headers["Cache-Control"] = "no-store"
    read_processes = request.app.state.processes
    processes = None if read_processes is None else [Process.model_validate(process) for process in read_processes()]
    return Health(status=engine.state, detail=engine.status_detail(), model=engine.settings.served_name, processes=processes)


NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"description": "Not ready; the text gives the reason", "content": {"text/plain": {}}}
}


def plain_text_readiness(request: Request) -> Response:
    """Return the readiness as plain text, with 200 or 503, for platforms that only read the status."""
    engine = engine_of(request)
    status = HTTPStatus.OK if engine.state is State.READY else HTTPStatus.SERVICE_UNAVAILABLE
    return PlainTextResponse(engine.status_detail(), status)


@router.get("/model", responses={503: PROBLEMS[503]})
async def model(request: Request) -> ModelCard:
    """Describe the active model: labels, configuration, preprocessing, runtime, device, precision and attention backends."""
    engine = engine_of(request)
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
        disabled=[Disabled(name=disabled.name, reason=disabled.reason) for disabled in loaded.disabled],
        features=config.feature_names,
    )


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Metrics in the Prometheus text format."""
    return Response(engine_of(request).metrics.exposition(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
