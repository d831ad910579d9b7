"""POST /classify and /classify/batch: the best labels of pictures, and the network's maps of them."""

import asyncio
import base64
import time
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from app.api.parameters import OPENAPI_PARAMETERS, FeatureFormat, read_deadline, read_parameters
from app.api.schemas import PROBLEMS, BatchClassification, Classification
from app.engine.engine import Engine
from app.engine.runtime import Answer, Array, Wanted
from app.errors import ServiceError, problem_fields
from app.hangup import unless_gone
from app.uploads import OPENAPI_BATCH_BODY, OPENAPI_BODY, read_image, read_images
from model.config import DinatConfig

router = APIRouter(tags=["classify"], responses=PROBLEMS)
DOORS = ("/classify", "/classify/batch")
"""Paths whose POST is work for the engine."""


@router.post(
    "/classify", response_model=Classification, openapi_extra={"parameters": OPENAPI_PARAMETERS, "requestBody": OPENAPI_BODY}
)
async def classify(request: Request) -> Response:
    """Classify one picture: multipart field `image`, the bytes as the body, or base64 in JSON."""
    engine: Engine = request.app.state.engine
    parameters, deadline_ms = read_parameters(request), read_deadline(request)
    config = engine.loaded.config  # kept: what was taken is answered also when, by then, nothing more is
    wanted = parameters.wanted(config)
    picture = await read_image(request)
    (answer,) = await unless_gone(request, engine.submit([picture], wanted, deadline_ms, request.state.arrived))
    if isinstance(answer, ServiceError):
        raise answer
    body = {"model": engine.settings.model} | _result(answer, config, parameters.feature_format)
    return await _response(request, body, wanted)


@router.post(
    "/classify/batch",
    response_model=BatchClassification,
    openapi_extra={"parameters": OPENAPI_PARAMETERS, "requestBody": OPENAPI_BATCH_BODY},
)
async def classify_batch(request: Request) -> Response:
    """Classify several pictures: repeated multipart fields `image`, or base64 in JSON.

    The results are in order; a picture that cannot be classified has an error in its place and does not spoil the others.
    """
    engine: Engine = request.app.state.engine
    parameters, deadline_ms = read_parameters(request), read_deadline(request)
    config = engine.loaded.config
    wanted = parameters.wanted(config)
    pictures = await read_images(request)
    taken = [picture for picture in pictures if isinstance(picture, bytes)]
    answers = iter(await unless_gone(request, engine.submit(taken, wanted, deadline_ms, request.state.arrived)))
    results = [next(answers) if isinstance(picture, bytes) else picture for picture in pictures]
    body = {
        "model": engine.settings.model,
        "results": [
            {"error": problem_fields(request.state.request_id, result.status, result.detail)}
            if isinstance(result, ServiceError)
            else _result(result, config, parameters.feature_format)
            for result in results
        ],
    }
    return await _response(request, body, wanted)


def _result(answer: Answer, config: DinatConfig, feature_format: FeatureFormat) -> dict[str, Any]:
    result: dict[str, Any] = {
        "predictions": [
            {"label": config.id2label[class_id], "class_id": class_id, "score": score}
            for class_id, score in zip(answer.class_ids.tolist(), answer.scores, strict=True)
        ]
    }
    if answer.features:
        result["features"] = {
            name: [_feature_map(one, feature_format) for one in value]
            if isinstance(value, list)
            else _feature_map(value, feature_format)
            for name, value in answer.features.items()
        }
    return result


def _feature_map(values: Array, feature_format: FeatureFormat) -> dict[str, Any]:
    data = base64.b64encode(values.astype("<f4").tobytes()).decode() if feature_format == "base64" else values
    return {"shape": list(values.shape), "dtype": "float32", "data": data}


async def _response(request: Request, body: dict[str, Any], wanted: Wanted) -> Response:
    """The body as JSON; maps are large, so they are written in a thread."""
    body["request_id"] = request.state.request_id

    def encode() -> bytes:
        started = time.monotonic()
        written = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        request.app.state.engine.metrics.part("encode", time.monotonic() - started)
        return written

    return Response(await asyncio.to_thread(encode) if wanted.features else encode(), media_type="application/json")
