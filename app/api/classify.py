"""POST /classify and /classify/batch: the best labels of pictures, and the network's maps of them."""

import asyncio
import base64
import time
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Header, Query, Request, Response

from app.api.schemas import PROBLEMS, BatchClassification, Classification
from app.engine.engine import Engine
from app.engine.runtime import Answer, Array, Wanted
from app.errors import ServiceError, Unprocessable, problem_fields
from app.hangup import unless_gone
from app.uploads import OPENAPI_BATCH_BODY, OPENAPI_BODY, read_image, read_images
from model.config import DinatConfig

router = APIRouter(tags=["classify"], responses=PROBLEMS)

FeatureFormat = Literal["json", "base64"]
TopK = Annotated[int, Query(description="how many labels, 1 to the number of labels; 5, or all if fewer")]
Features = Annotated[
    str, Query(description="maps to return, by comma: stem, stage1, ..., pooled, hidden_states", examples=["stage4,pooled"])
]
Format = Annotated[FeatureFormat, Query(description="how the maps' values are written")]
DeadlineMs = Annotated[
    int | None, Header(alias="X-Deadline-Ms", ge=1, description="how long the caller waits; the service's own limit caps it")
]


@router.post("/classify", response_model=Classification, openapi_extra={"requestBody": OPENAPI_BODY})
async def classify(
    request: Request, top_k: TopK = 5, features: Features = "", feature_format: Format = "json", deadline_ms: DeadlineMs = None
) -> Response:
    """Classify one picture: multipart field `image`, the bytes as the body, or base64 in JSON."""
    engine: Engine = request.app.state.engine
    engine.check_room()
    wanted = _wanted(request, top_k, features, engine.runtime.config)
    picture = await read_image(request)
    (answer,) = await unless_gone(request, engine.submit([picture], wanted, deadline_ms))
    if isinstance(answer, ServiceError):
        raise answer
    body = {"model": engine.settings.model} | _result(answer, engine, feature_format)
    return await _response(request, body, wanted)


@router.post("/classify/batch", response_model=BatchClassification, openapi_extra={"requestBody": OPENAPI_BATCH_BODY})
async def classify_batch(
    request: Request, top_k: TopK = 5, features: Features = "", feature_format: Format = "json", deadline_ms: DeadlineMs = None
) -> Response:
    """Classify several pictures: repeated multipart fields `image`, or base64 in JSON.

    The results are in order; a picture that cannot be classified has an error in its place and does not spoil the others.
    """
    engine: Engine = request.app.state.engine
    engine.check_room()
    wanted = _wanted(request, top_k, features, engine.runtime.config)
    pictures = await read_images(request)
    taken = [picture for picture in pictures if isinstance(picture, bytes)]
    answers = iter(await unless_gone(request, engine.submit(taken, wanted, deadline_ms)))
    results = [next(answers) if isinstance(picture, bytes) else picture for picture in pictures]
    body = {
        "model": engine.settings.model,
        "results": [
            {"error": problem_fields(request, result.status, result.detail)}
            if isinstance(result, ServiceError)
            else _result(result, engine, feature_format)
            for result in results
        ],
    }
    return await _response(request, body, wanted)


def _wanted(request: Request, top_k: int, features: str, config: DinatConfig) -> Wanted:
    """Check what is asked for against what the network has. Raises Unprocessable."""
    if "top_k" not in request.query_params:
        top_k = min(top_k, config.num_labels)
    if not 1 <= top_k <= config.num_labels:
        raise Unprocessable(f"top_k is {top_k}, allowed are 1 to {config.num_labels}")
    names = frozenset(name.strip() for name in features.split(",") if name.strip())
    unknown = sorted(names - set(config.feature_names))
    if unknown:
        raise Unprocessable(f"features names {', '.join(unknown)}, allowed are {', '.join(config.feature_names)}")
    return Wanted(top_k, names)


def _result(answer: Answer, engine: Engine, feature_format: FeatureFormat) -> dict[str, Any]:
    labels = engine.runtime.config.id2label
    result: dict[str, Any] = {
        "predictions": [
            {"label": labels[class_id], "class_id": class_id, "score": score}
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
