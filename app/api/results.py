"""Response bodies from inference results."""

import asyncio
import base64
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from dinat.app.api.app_state import engine_of
from dinat.app.api.parameters import FeatureFormat
from dinat.app.api.parse_thread import INLINE_BYTES
from dinat.app.engine.runtimes.runtime import Array, InferenceResult
from dinat.model import DinatConfig

T = TypeVar("T")

CHUNK_VALUES = 2**16
"""Values that are encoded in one call, which holds the GIL for about 3 ms."""

CHUNK_BYTES = 256 * 1024
"""Size of the parts in which a large response is sent."""


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
    if feature_format == "base64":
        data = orjson.Fragment(b'"%b"' % base64.b64encode(np.ascontiguousarray(converted).data))
    else:
        data = json_array(converted.astype(np.float32, copy=False))
    return {"shape": list(values.shape), "dtype": dtype, "data": data}


def json_array(values: npt.NDArray[Any]) -> orjson.Fragment:
    """Encode an array as nested lists, in several calls, between which other threads can run."""
    return orjson.Fragment(_encode_array(values))


def _encode_array(values: npt.NDArray[Any]) -> bytes:
    if values.size <= CHUNK_VALUES:
        return orjson.dumps(np.ascontiguousarray(values), option=orjson.OPT_SERIALIZE_NUMPY)
    if values.ndim > 1:
        return b"[" + b",".join(_encode_array(row) for row in values) + b"]"
    chunks = (values[start : start + CHUNK_VALUES] for start in range(0, values.size, CHUNK_VALUES))
    return b"[" + b",".join(_encode_array(chunk)[1:-1] for chunk in chunks) + b"]"


async def encode(request: Request, function: Callable[[], T], size: int) -> T:
    """Run a function that encodes a response, in a thread if it is large, and record its time.

    Args:
        request: The request.
        function: Encodes the response.
        size: Estimated size of the response in bytes.
    """

    def timed() -> T:
        started = time.monotonic()
        encoded = function()
        _record_encode_time(request, time.monotonic() - started)
        return encoded

    return await asyncio.to_thread(timed) if size > INLINE_BYTES else timed()


def _record_encode_time(request: Request, seconds: float) -> None:
    """Record the time of encoding, for the metrics and Server-Timing."""
    engine_of(request).metrics.observe_part("encode", seconds)
    if hasattr(request.state, "seconds"):
        request.state.seconds["encode"] = seconds


async def json_response(request: Request, build: Callable[[], Any], size: int) -> Response:
    """Encode a JSON response.

    Args:
        request: The request.
        build: Returns the JSON-serializable body, which may contain NumPy arrays. Runs in a thread if the response is large.
        size: Estimated size of the response in bytes.
    """
    body = await encode(request, lambda: orjson.dumps(build(), option=orjson.OPT_SERIALIZE_NUMPY), size)
    return ChunkedResponse(body, media_type="application/json")


def json_fragments(values: Iterable[Any]) -> list[orjson.Fragment]:
    """Encode each value on its own, so that the values of many images are not in memory together before they are encoded."""
    return [orjson.Fragment(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)) for value in values]


class ChunkedResponse(Response):
    """A response that is sent in parts. The connection buffers only one part if the client reads slowly."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response (ASGI)."""
        body = bytes(self.body)
        if len(body) <= CHUNK_BYTES:
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(body), CHUNK_BYTES):
            end = start + CHUNK_BYTES
            await send({"type": "http.response.body", "body": body[start:end], "more_body": end < len(body)})
