"""POST /attention: the keys and attention weights of one query in every layer."""

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from dinat.app.api.bodies import openapi_body, read_one
from dinat.app.api.inference import infer_one
from dinat.app.api.parameters import DEADLINE_PARAMETER, IS_NUMBER, openapi_parameters
from dinat.app.api.response_size import BYTES_PER_VALUE, reserve_response
from dinat.app.api.results import json_array, json_response
from dinat.app.api.schemas import PROBLEMS, AttentionOfPoint
from dinat.app.engine.runtimes.runtime import InferenceOptions

router = APIRouter(tags=["attention"], responses=PROBLEMS)


class Point(BaseModel):
    """A point of the preprocessed image, in relative coordinates."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    y: Annotated[float, Field(ge=0, le=1, description="0 at the top edge, 1 at the bottom edge"), IS_NUMBER] = 0.5
    x: Annotated[float, Field(ge=0, le=1, description="0 at the left edge, 1 at the right edge"), IS_NUMBER] = 0.5


@router.post(
    "/attention",
    response_model=AttentionOfPoint,
    openapi_extra={"parameters": [*openapi_parameters(Point), DEADLINE_PARAMETER], "requestBody": openapi_body(Point)},
)
async def attention(request: Request) -> Response:
    """Return the keys and weights of the query at (y, x) in every layer, computed in float32 by the reference attention."""
    image, point = await read_one(request, Point)
    result = await infer_one(request, image, InferenceOptions(1, point=(point.y, point.x)))

    def build() -> dict[str, Any]:
        layers = [
            {
                "stage": layer.stage,
                "layer": layer.layer,
                "dilation": layer.dilation,
                "size": layer.size,
                "query": layer.query,
                "rows": layer.rows,
                "columns": layer.columns,
                "weights": json_array(layer.weights.numpy()),
            }
            for layer in result.neighborhoods
        ]
        return {"layers": layers, "request_id": request.state.request_id}

    values = sum(layer.weights.numel() for layer in result.neighborhoods)
    return await json_response(request, build, reserve_response(request, values * BYTES_PER_VALUE["json"]))
