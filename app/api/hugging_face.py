"""Hugging Face's image-classification task, as its Inference API and Inference Endpoints speak it.

https://huggingface.co/docs/inference-providers/tasks/image-classification
"""

from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from dinat.app.api.bodies import JSON, content_type, read_json
from dinat.app.api.inference import infer_one
from dinat.app.api.results import in_json
from dinat.app.api.schemas import NOT_FOUND, PROBLEMS
from dinat.app.engine.engine import Engine
from dinat.app.engine.runtimes.runtime import LOGITS, Array, InferenceOptions, InferenceResult
from dinat.app.errors import NotFound
from dinat.app.images import decode_base64
from dinat.model import DinatConfig

router = APIRouter(tags=["Hugging Face"], responses=PROBLEMS | NOT_FOUND)


class TaskParameters(BaseModel):
    """The task's parameters. top_k: more than there are labels is all of them, as there."""

    model_config = ConfigDict(extra="forbid")

    top_k: int = Field(5, ge=1)
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = Field(None, description="the model's own if not given")


class Task(BaseModel):
    """The task's body, where that is JSON."""

    model_config = ConfigDict(extra="forbid")

    inputs: str = Field(description="base64 of the picture's file")
    parameters: TaskParameters | None = None


_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {"inputs": {"type": "string"}, "parameters": TaskParameters.model_json_schema()},
                "additionalProperties": False,
            }
        },
    },
}


@router.post("/", openapi_extra={"requestBody": _BODY})
async def task(request: Request) -> Response:
    """Classify the picture in the body, or in base64 under `inputs`."""
    engine: Engine = request.app.state.engine
    config = engine.loaded.config
    picture, parameters = await _read(request)
    wanted = InferenceOptions(config.num_labels, frozenset({LOGITS} if parameters.function_to_apply else ()))
    answer = await infer_one(request, picture, wanted)
    return await in_json(request, _elements(answer, parameters, config))


@router.post("/models/{name:path}", openapi_extra={"requestBody": _BODY})
async def task_of_model(request: Request, name: str) -> Response:
    """The same, by the model's name."""
    serves = request.app.state.engine.settings.served_name
    if name != serves:
        raise NotFound(f"model {name} is not here, {serves} is")
    return await task(request)


async def _read(request: Request) -> tuple[bytes, TaskParameters]:
    if content_type(request) != JSON:
        return await request.body(), TaskParameters()
    asked = await read_json(request, Task)
    return decode_base64(asked.inputs), asked.parameters or TaskParameters()


def _elements(answer: InferenceResult, parameters: TaskParameters, config: DinatConfig) -> list[dict[str, Any]]:
    scores, classes = answer.scores, answer.class_ids
    if parameters.function_to_apply is not None:
        logits = answer.features[LOGITS]
        assert not isinstance(logits, list)
        every = _applied(parameters.function_to_apply, logits)
        classes = np.argsort(-every, kind="stable")
        scores = every[classes]
    best = zip(classes.tolist(), scores, strict=True)
    return [{"label": config.id2label[class_id], "score": score} for class_id, score in list(best)[: parameters.top_k]]


def _applied(function: str, logits: Array) -> Array:
    if function == "none":
        return logits
    if function == "sigmoid":
        sigmoid: Array = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
        return sigmoid
    powers = np.exp(logits.astype(np.float64) - logits.max())
    scores: Array = (powers / powers.sum()).astype(np.float32)
    return scores
