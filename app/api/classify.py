"""POST /classify: the best labels of a picture, and the network's maps of it."""

import asyncio
import base64
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query, Request, Response

from app.api.schemas import PROBLEMS, Classification
from app.engine.engine import Engine
from app.engine.torch_runtime import Answer, Array, Wanted, feature_names
from app.errors import Unprocessable
from app.uploads import OPENAPI_BODY, read_image
from model.config import DinatConfig

router = APIRouter(tags=["classify"])

FeatureFormat = Literal["json", "base64"]


@router.post("/classify", response_model=Classification, responses=PROBLEMS, openapi_extra={"requestBody": OPENAPI_BODY})
async def classify(
    request: Request,
    top_k: Annotated[int, Query(description="how many labels, 1 to the number of labels; 5, or all if fewer")] = 5,
    features: Annotated[
        str, Query(description="maps to return, by comma: stem, stage1, ..., pooled, hidden_states", examples=["stage4,pooled"])
    ] = "",
    feature_format: Annotated[FeatureFormat, Query(description="how the maps' values are written")] = "json",
) -> Response:
    """Classify one picture: multipart field `image`, the bytes as the body, or base64 in JSON."""
    engine: Engine = request.app.state.engine
    config = engine.runtime.config
    wanted = Wanted(_top_k(top_k, "top_k" in request.query_params, config), _features(features, config))
    answer = await engine.submit(await read_image(request), wanted)
    if not wanted.features:
        return _response(request, engine.settings.model, answer, config, feature_format)
    return await asyncio.to_thread(_response, request, engine.settings.model, answer, config, feature_format)


def _top_k(asked: int, given: bool, config: DinatConfig) -> int:
    if not given:
        return min(asked, config.num_labels)
    if not 1 <= asked <= config.num_labels:
        raise Unprocessable(f"top_k is {asked}, allowed are 1 to {config.num_labels}")
    return asked


def _features(asked: str, config: DinatConfig) -> frozenset[str]:
    names = frozenset(name.strip() for name in asked.split(",") if name.strip())
    unknown = sorted(names - set(feature_names(config)))
    if unknown:
        raise Unprocessable(f"features names {', '.join(unknown)}, allowed are {', '.join(feature_names(config))}")
    return names


def _response(request: Request, model: str, answer: Answer, config: DinatConfig, feature_format: FeatureFormat) -> Response:
    body: dict[str, Any] = {
        "model": model,
        "predictions": [
            {"label": config.id2label[class_id], "class_id": class_id, "score": score}
            for class_id, score in zip(answer.class_ids.tolist(), answer.scores, strict=True)
        ],
    }
    if answer.features:
        body["features"] = {
            name: [_feature_map(one, feature_format) for one in value]
            if isinstance(value, list)
            else _feature_map(value, feature_format)
            for name, value in answer.features.items()
        }
    body["request_id"] = request.state.request_id
    return Response(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def _feature_map(values: Array, feature_format: FeatureFormat) -> dict[str, Any]:
    data = base64.b64encode(values.astype("<f4").tobytes()).decode() if feature_format == "base64" else values
    return {"shape": list(values.shape), "dtype": "float32", "data": data}
