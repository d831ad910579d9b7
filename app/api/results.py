"""Answers of the engine, as bodies have them."""

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


def predictions(answer: InferenceResult, config: DinatConfig) -> list[dict[str, Any]]:
    """Labels with their classes and scores, best first."""
    return [
        {"label": config.id2label[class_id], "class_id": class_id, "score": score}
        for class_id, score in zip(answer.class_ids.tolist(), answer.scores, strict=True)
    ]


def result(answer: InferenceResult, config: DinatConfig, feature_format: FeatureFormat) -> dict[str, Any]:
    """What /classify says of one picture."""
    said: dict[str, Any] = {"predictions": predictions(answer, config)}
    if answer.features:
        said["features"] = features(answer, feature_format)
    return said


def features(answer: InferenceResult, feature_format: FeatureFormat, dtype: str = "float32") -> dict[str, Any]:
    """Its maps, by name."""
    return {
        name: [_feature_map(one, feature_format, dtype) for one in maps]
        if isinstance(maps, list)
        else _feature_map(maps, feature_format, dtype)
        for name, maps in answer.features.items()
    }


def _feature_map(values: Array, feature_format: FeatureFormat, dtype: str) -> dict[str, Any]:
    numbers = values.astype(dtype, copy=False)
    data = (
        base64.b64encode(numbers.tobytes()).decode() if feature_format == "base64" else numbers.astype(np.float32, copy=False)
    )
    return {"shape": list(values.shape), "dtype": dtype, "data": data}


def encoded(request: Request, started: float) -> None:
    """Note how long the body took to write, which began at that time."""
    seconds = time.monotonic() - started
    request.app.state.engine.metrics.observe_part("encode", seconds)
    if hasattr(request.state, "seconds"):
        request.state.seconds["encode"] = seconds


async def in_json(request: Request, body: Any, large: bool = False) -> Response:
    """A body as JSON. large: it has maps, and is written in a thread."""

    def encode() -> bytes:
        started = time.monotonic()
        written = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        encoded(request, started)
        return written

    return Response(await asyncio.to_thread(encode) if large else encode(), media_type="application/json")
