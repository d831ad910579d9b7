"""The model repository extension of the protocol, of which this service has the index."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from dinat.app.api.app_state import engine_of
from dinat.app.api.bodies import parse_json, read_body
from dinat.app.api.open_inference.routes import VERSION
from dinat.app.api.parameters import check_no_query
from dinat.app.api.schemas import PROBLEMS
from dinat.app.engine.backend import State

router = APIRouter(prefix="/v2/repository", tags=["Open Inference Protocol"], responses=PROBLEMS)


class IndexRequest(BaseModel):
    """Which models to list."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ready: bool = Field(False, description="only those that are ready")


_BODY: dict[str, Any] = {"content": {"application/json": {"schema": IndexRequest.model_json_schema()}}}


@router.post("/index", openapi_extra={"requestBody": _BODY})
async def index(request: Request) -> list[dict[str, str]]:
    """List the models, of which there is one."""
    check_no_query(request, "send ready in the JSON")
    body = await read_body(request)
    only_ready = await parse_json(request, body, IndexRequest, lambda requested: requested.ready) if body else False
    engine = engine_of(request)
    is_ready = engine.state is State.READY
    if only_ready and not is_ready:
        return []
    state = "READY" if is_ready else "UNAVAILABLE"
    return [{"name": engine.settings.served_name, "version": VERSION, "state": state, "reason": engine.status_detail()}]
