"""Hugging Face's image-classification task, as in its Inference API and Inference Endpoints.

https://huggingface.co/docs/inference-providers/tasks/image-classification
"""

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from dinat.app.api.app_state import engine_of
from dinat.app.api.base64_images import decode_base64
from dinat.app.api.bodies import (
    BINARY_SCHEMA,
    EXAMPLE_IMAGE,
    MULTIPART,
    content_type,
    openapi_form,
    parse_json,
    read_body,
    read_one_without_json,
)
from dinat.app.api.inference import infer_one
from dinat.app.api.json_limits import is_json
from dinat.app.api.parameters import IS_NUMBER, openapi_parameters, read_parameters
from dinat.app.api.quoting import shorten
from dinat.app.api.response_size import PREDICTION_BYTES, reserve_response
from dinat.app.api.results import json_response
from dinat.app.api.schemas import NOT_FOUND, PROBLEMS
from dinat.app.engine.runtimes.runtime import LOGITS, Array, InferenceOptions, InferenceResult
from dinat.app.errors import NotFound
from dinat.model import DinatConfig

router = APIRouter(tags=["Hugging Face"], responses=PROBLEMS | NOT_FOUND)


class TaskParameters(BaseModel):
    """Parameters of the task. As in Hugging Face's API, `top_k` may exceed the number of labels."""

    model_config = ConfigDict(extra="forbid")

    top_k: Annotated[int, IS_NUMBER] = Field(5, ge=1, description="number of labels to return; all if there are fewer")
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = Field(None, description="default: that of the model")


class TaskOptions(BaseModel):
    """Options of Hugging Face's Inference API. They concern its queue and its cache, and change nothing here."""

    model_config = ConfigDict(extra="forbid")

    use_cache: bool = True
    wait_for_model: bool = False
    use_gpu: bool = False


class Task(BaseModel):
    """A JSON request body of the task."""

    model_config = ConfigDict(extra="forbid")

    inputs: str = Field(description="image file in base64")
    parameters: TaskParameters | None = None
    options: TaskOptions | None = None


_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "image/*": {"schema": BINARY_SCHEMA},
        MULTIPART: openapi_form(TaskParameters, BINARY_SCHEMA),
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "inputs": {"type": "string"},
                    "parameters": {"anyOf": [TaskParameters.model_json_schema(), {"type": "null"}]},
                    "options": {"anyOf": [TaskOptions.model_json_schema(), {"type": "null"}]},
                },
                "additionalProperties": False,
                "example": {"inputs": EXAMPLE_IMAGE, "parameters": {"top_k": 3}},
            }
        },
    },
}


_PARAMETERS = openapi_parameters(TaskParameters)


@router.post("/", openapi_extra={"parameters": _PARAMETERS, "requestBody": _BODY})
async def task(request: Request) -> Response:
    """Classify the image in the body, in a form, or in base64 in the JSON field `inputs`."""
    return await classify_task(request, await read_body(request))


async def classify_task(request: Request, body: bytes) -> Response:
    """Classify the image of a request whose body has been read."""
    config = engine_of(request).loaded.config
    image, parameters = await _read(request, body)
    options = InferenceOptions(config.num_labels, frozenset({LOGITS} if parameters.function_to_apply else ()))
    size = reserve_response(request, min(parameters.top_k, config.num_labels) * PREDICTION_BYTES)
    result = await infer_one(request, image, options)
    return await json_response(request, lambda: _output(result, parameters, config), size)


@router.post("/models/{name:path}", openapi_extra={"parameters": _PARAMETERS, "requestBody": _BODY})
async def task_of_model(request: Request, name: str) -> Response:
    """Classify an image with the model of this name, as POST /."""
    served_name = engine_of(request).settings.served_name
    if name != served_name:
        raise NotFound(f"model {shorten(name)} is not found, this service has {served_name}")
    return await task(request)


async def _read(request: Request, body: bytes) -> tuple[bytes, TaskParameters]:
    """Return the image and the parameters, which may be in the query, in a form or in the JSON."""
    if not is_json(content_type(request), body):
        return await read_one_without_json(request, TaskParameters, body)

    def convert(task: Task) -> tuple[bytes, TaskParameters]:
        fields = task.parameters.model_dump(exclude_unset=True) if task.parameters else {}
        return decode_base64(task.inputs), read_parameters(request, TaskParameters, "the JSON", fields.items())

    return await parse_json(request, body, Task, convert)


def _output(result: InferenceResult, parameters: TaskParameters, config: DinatConfig) -> list[dict[str, Any]]:
    """Return the task's output elements, best first."""
    scores, class_ids = result.scores, result.class_ids
    if parameters.function_to_apply is not None:
        logits = result.features[LOGITS]
        assert not isinstance(logits, list)
        class_scores = _apply(parameters.function_to_apply, logits)
        class_ids = np.argsort(-class_scores, kind="stable")
        scores = class_scores[class_ids]
    ranked = zip(class_ids.tolist(), scores, strict=True)
    return [{"label": config.id2label[class_id], "score": score} for class_id, score in list(ranked)[: parameters.top_k]]


def _apply(function: str, logits: Array) -> Array:
    if function == "none":
        return logits
    if function == "sigmoid":
        sigmoid: Array = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
        return sigmoid
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    scores: Array = (exponentials / exponentials.sum()).astype(np.float32)
    return scores
