"""Google Vertex AI's contract for a container: a health route and a predict route, which its AIP_* variables name.

https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
"""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from dinat.app.api.bodies import read_json
from dinat.app.api.health import NOT_NOW, ready_in_words
from dinat.app.api.inference import infer_all
from dinat.app.api.parameters import Parameters
from dinat.app.api.results import in_json, result
from dinat.app.api.schemas import PROBLEMS
from dinat.app.engine.engine import Engine
from dinat.app.images import decode_base64
from dinat.app.settings import Settings


class Encoded(BaseModel):
    """Bytes, as JSON has them there."""

    model_config = ConfigDict(extra="forbid")

    b64: str = Field(description="base64 of the picture's file")


class Instances(BaseModel):
    """A request for predictions. parameters: those of /classify."""

    model_config = ConfigDict(extra="forbid")

    instances: list[Encoded] = Field(min_length=1)
    parameters: Parameters = Parameters()


_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["instances"],
                "properties": {
                    "instances": {
                        "type": "array",
                        "minItems": 1,
                        "items": {"type": "object", "required": ["b64"], "properties": {"b64": {"type": "string"}}},
                    },
                    "parameters": Parameters.model_json_schema(),
                },
                "additionalProperties": False,
            }
        }
    },
}


def router(settings: Settings) -> APIRouter:
    """The doors where the settings have them."""
    routes = APIRouter(tags=["Vertex AI"], responses=PROBLEMS)
    routes.add_api_route(settings.aip_predict_route, predict, methods=["POST"], openapi_extra={"requestBody": _BODY})
    if settings.aip_health_route is not None:
        routes.add_api_route(
            settings.aip_health_route, health, methods=["GET"], response_class=PlainTextResponse, responses=NOT_NOW
        )
    return routes


async def health(request: Request) -> Response:
    """200 once pictures are taken."""
    return ready_in_words(request)


async def predict(request: Request) -> Response:
    """Classify the instances; one prediction for each, in order, as /classify/batch has them. One bad picture fails all."""
    engine: Engine = request.app.state.engine
    config = engine.loaded.config
    asked = await read_json(request, Instances)
    wanted = asked.parameters.wanted(config)
    pictures = [decode_base64(one.b64) for one in asked.instances]
    answers = await infer_all(request, pictures, wanted, called="instance")
    predictions = [result(answer, config, asked.parameters.feature_format) for answer in answers]
    return await in_json(request, {"predictions": predictions}, bool(wanted.features))
