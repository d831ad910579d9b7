"""POST /attention: what the network sees from one point of a picture."""

from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from dinat.app.api.bodies import OPENAPI_BODY, read_one
from dinat.app.api.inference import infer_one
from dinat.app.api.parameters import DEADLINE_PARAMETER, openapi_parameters
from dinat.app.api.results import in_json
from dinat.app.api.schemas import PROBLEMS, AttentionOfPoint
from dinat.app.engine.engine import Engine
from dinat.app.engine.runtimes.runtime import InferenceOptions

router = APIRouter(tags=["attention"], responses=PROBLEMS)


class Point(BaseModel):
    """Where in the picture, as the network gets it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    y: Annotated[float, Field(ge=0, le=1, description="0 for the upper edge, 1 for the lower one")] = 0.5
    x: Annotated[float, Field(ge=0, le=1, description="0 for the left edge, 1 for the right one")] = 0.5


@router.post(
    "/attention",
    response_model=AttentionOfPoint,
    openapi_extra={"parameters": [*openapi_parameters(Point), DEADLINE_PARAMETER], "requestBody": OPENAPI_BODY},
)
async def attention(request: Request) -> Response:
    """For each layer which keys the query at (y, x) of a picture sees, and with which weights, by the definition in float32."""
    engine: Engine = request.app.state.engine
    engine.loaded  # noqa: B018  # raises while nothing is
    picture, point = await read_one(request, Point)
    answer = await infer_one(request, picture, InferenceOptions(1, point=(point.y, point.x)))
    layers = [
        {
            "stage": one.stage,
            "layer": one.layer,
            "dilation": one.dilation,
            "size": one.size,
            "query": one.query,
            "rows": one.rows,
            "columns": one.columns,
            "weights": one.weights.numpy(),
        }
        for one in answer.neighborhoods
    ]
    return await in_json(request, {"layers": layers, "request_id": request.state.request_id})
