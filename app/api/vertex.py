"""The container interface of Google Vertex AI: a health route and a prediction route, set by AIP_* variables.

https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
"""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dinat.app.api.app_state import engine_of
from dinat.app.api.base64_images import decode_base64
from dinat.app.api.bodies import EXAMPLE_IMAGE, read_json
from dinat.app.api.health import NOT_READY, plain_text_readiness
from dinat.app.api.inference import infer_all
from dinat.app.api.parameters import OPENAPI_PARAMETERS, Parameters, read_parameters
from dinat.app.api.response_size import estimate_size, measure_size, reserve_response
from dinat.app.api.results import classification, json_fragments, json_response
from dinat.app.api.schemas import PROBLEMS
from dinat.app.settings import Settings

IMAGE_FIELDS = ("image_bytes", "bytes_inputs", "content", "image")
"""Names under which TensorFlow's exported models, AutoML and this service's /classify take an image."""


class Instance(BaseModel):
    """An image, encoded as Vertex AI encodes bytes in JSON."""

    model_config = ConfigDict(extra="forbid")

    b64: str = Field(description="image file in base64")

    @model_validator(mode="before")
    @classmethod
    def _unwrap(cls, value: Any) -> Any:
        """Convert {"image_bytes": {"b64": ...}} and {"content": ...}."""
        if isinstance(value, dict) and len(value) == 1 and (name := next(iter(value))) in IMAGE_FIELDS:
            value = value[name]
        return {"b64": value} if isinstance(value, str) else value


class PredictRequest(BaseModel):
    """A prediction request; `parameters` are those of /classify, and may be in the query as well."""

    model_config = ConfigDict(extra="forbid")

    instances: list[Instance] = Field(min_length=1)
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
                "example": {"instances": [{"b64": EXAMPLE_IMAGE}], "parameters": {"top_k": 3}},
            }
        }
    },
}


def router(settings: Settings) -> APIRouter:
    """Create the endpoints at the paths given by the settings."""
    vertex_router = APIRouter(tags=["Vertex AI"], responses=PROBLEMS)
    vertex_router.add_api_route(
        settings.aip_predict_route,
        predict,
        methods=["POST"],
        openapi_extra={"parameters": OPENAPI_PARAMETERS, "requestBody": _BODY},
    )
    if settings.aip_health_route is not None:
        vertex_router.add_api_route(
            settings.aip_health_route, health, methods=["GET"], response_class=PlainTextResponse, responses=NOT_READY
        )
    return vertex_router


async def health(request: Request) -> Response:
    """Readiness: 200 if the service accepts requests."""
    return plain_text_readiness(request)


async def predict(request: Request) -> Response:
    """Classify the instances. Predictions are in order, as from /classify/batch; one invalid image fails the request."""
    engine = engine_of(request)
    loaded = engine.loaded

    def convert(body: PredictRequest) -> tuple[list[bytes], Parameters]:
        engine.check_capacity(len(body.instances))
        fields = body.parameters.model_dump(exclude_unset=True)
        parameters = read_parameters(request, Parameters, "the JSON", fields.items())
        return [decode_base64(instance.b64) for instance in body.instances], parameters

    images, parameters = await read_json(request, PredictRequest, convert)
    options, encoding = parameters.options(loaded.config), parameters.feature_format
    reserve_response(request, estimate_size(loaded, options.features, encoding, options.top_k, len(images)))
    results = await infer_all(request, images, options, label="instance")

    def build() -> dict[str, Any]:
        return {"predictions": json_fragments(classification(result, loaded.config, encoding) for result in results)}

    size = reserve_response(request, sum(measure_size(result, encoding) for result in results))
    return await json_response(request, build, size)
