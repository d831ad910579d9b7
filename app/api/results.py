"""Response bodies from inference results."""

import asyncio
import base64
import time
from typing import Any

import numpy as np
import orjson
from fastapi import Request, Response

from dinat.app.api.parameters import FeatureFormat
from dinat.app.engine.runtimes.runtime import Array, InferenceResult
from dinat.model import DinatConfig


def predictions(result: InferenceResult, config: DinatConfig) -> list[dict[str, Any]]:
    """Return the predicted labels with class ids and scores, best first."""
    return [
        {"label": config.id2label[class_id], "class_id": class_id, "score": score}
        for class_id, score in zip(result.class_ids.tolist(), result.scores, strict=True)
    ]


def classification(result: InferenceResult, config: DinatConfig, feature_format: FeatureFormat) -> dict[str, Any]:
    """Return the predictions and, if any were requested, the feature maps of one image."""
    body: dict[str, Any] = {"predictions": predictions(result, config)}
    if result.features:
        body["features"] = features(result, feature_format)
    return body


def features(result: InferenceResult, feature_format: FeatureFormat, dtype: str = "float32") -> dict[str, Any]:
    """Return the feature maps by name, as in the schema FeatureMap."""
    return {
        name: [_feature_map(values, feature_format, dtype) for values in feature]
        if isinstance(feature, list)
        else _feature_map(feature, feature_format, dtype)
        for name, feature in result.features.items()
    }


def _feature_map(values: Array, feature_format: FeatureFormat, dtype: str) -> dict[str, Any]:
    converted = values.astype(dtype, copy=False)
    data = (
        base64.b64encode(converted.tobytes()).decode()
        if feature_format == "base64"
        else converted.astype(np.float32, copy=False)
    )
    return {"shape": list(values.shape), "dtype": dtype, "data": data}


def record_encode_time(request: Request, started: float) -> None:
    """Record the time since `started` (time.monotonic) as the encode stage, for the metrics and Server-Timing."""
    seconds = time.monotonic() - started
    request.app.state.engine.metrics.observe_part("encode", seconds)
    if hasattr(request.state, "seconds"):
        request.state.seconds["encode"] = seconds


async def json_response(request: Request, body: Any, large: bool = False) -> Response:
    """Encode a body as a JSON response.

    Args:
        request: The request.
        body: JSON-serializable value, which may contain NumPy arrays.
        large: Whether the body contains feature maps. It is then encoded in a thread.
    """

    def encode() -> bytes:
        started = time.monotonic()
        encoded = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        record_encode_time(request, started)
        return encoded

    return Response(await asyncio.to_thread(encode) if large else encode(), media_type="application/json")
