"""POST /features: feature maps of an image, in JSON or a binary format."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request, Response
from safetensors.numpy import save

from dinat.app.api.app_state import engine_of
from dinat.app.api.bodies import BINARY_SCHEMA, openapi_body, read_one
from dinat.app.api.inference import infer_one
from dinat.app.api.negotiation import negotiate
from dinat.app.api.parameters import DEADLINE_PARAMETER, FeatureParameters, openapi_parameters
from dinat.app.api.quoting import shorten
from dinat.app.api.response_size import Encoding, estimate_size, measure_size, reserve_response
from dinat.app.api.results import ChunkedResponse, encode, features, json_response
from dinat.app.api.schemas import PROBLEMS
from dinat.app.engine.runtimes.runtime import InferenceResult
from dinat.app.errors import NotAcceptable, Unprocessable

router = APIRouter(tags=["features"], responses=PROBLEMS)

FeatureMaps = Mapping[str, npt.NDArray[Any]]
"""Feature maps by name, float32 or float16."""

JSON, NPY, NPZ, SAFETENSORS = "application/json", "application/x-npy", "application/x-npz", "application/vnd.safetensors"


def _npy(feature_maps: FeatureMaps) -> bytes:
    if len(feature_maps) != 1:
        raise Unprocessable(
            f"{NPY} holds one feature map, got {len(feature_maps)}: use {NPZ}, or request one of {', '.join(feature_maps)}"
        )
    buffer = io.BytesIO()
    np.save(buffer, next(iter(feature_maps.values())))
    return buffer.getvalue()


def _npz(feature_maps: FeatureMaps) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **feature_maps)  # type: ignore[arg-type]
    return buffer.getvalue()


WRITERS: Mapping[str, Callable[[FeatureMaps], bytes]] = {
    NPY: _npy,
    NPZ: _npz,
    SAFETENSORS: lambda feature_maps: save(dict(feature_maps)),
}
"""Encoder of each binary media type."""

_RESPONSES = {
    200: {
        "description": "The feature maps, channels first",
        "content": {
            JSON: {"schema": {"type": "object"}},
            **{media_type: {"schema": BINARY_SCHEMA} for media_type in WRITERS},
        },
    },
    406: {"description": "None of the accepted media types is supported"},
}


@router.post(
    "/features",
    responses=_RESPONSES,  # type: ignore[arg-type]
    openapi_extra={
        "parameters": [*openapi_parameters(FeatureParameters), DEADLINE_PARAMETER],
        "requestBody": openapi_body(FeatureParameters),
    },
)
async def extract(request: Request) -> Response:
    """Extract feature maps of one image, sent as to /classify.

    The `Accept` header selects the format: JSON, NumPy's .npy (one feature map) or .npz, or safetensors.
    """
    engine = engine_of(request)
    loaded = engine.loaded
    media_type = _accepted_type(request)
    image, parameters = await read_one(request, FeatureParameters)
    options, dtype = parameters.options(loaded.config), parameters.feature_dtype
    encoding: Encoding = parameters.feature_format if media_type == JSON else "binary"
    reserve_response(request, estimate_size(loaded, options.features, encoding, top_k=0))
    result = await infer_one(request, image, options)
    size = reserve_response(request, measure_size(result, encoding))
    if media_type != JSON:
        body = await encode(request, lambda: WRITERS[media_type](flatten_features(result, dtype)), size)
        return ChunkedResponse(body, media_type=media_type)

    def build() -> dict[str, Any]:
        maps = features(result, parameters.feature_format, dtype)
        return {"features": maps, "request_id": request.state.request_id}

    return await json_response(request, build, size)


def flatten_features(result: InferenceResult, dtype: str) -> FeatureMaps:
    """Return one array per name; those of a list are named by their index: hidden_states.0, hidden_states.1, ..."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, feature in result.features.items():
        named = {f"{name}.{i}": array for i, array in enumerate(feature)} if isinstance(feature, list) else {name: feature}
        arrays |= {key: np.ascontiguousarray(array, dtype) for key, array in named.items()}
    return arrays


MAX_ACCEPT = 2000
"""Characters of the Accept headers. Parsing takes more than a microsecond for each media type."""


def _accepted_type(request: Request) -> str:
    """Return the media type that the Accept headers prefer; JSON without one. Raises NotAcceptable."""
    accept = ", ".join(request.headers.getlist("accept"))
    supported = [JSON, *WRITERS]
    if len(accept) > MAX_ACCEPT:
        raise NotAcceptable(f"Accept has more than {MAX_ACCEPT:,} characters: supported are {', '.join(supported)}")
    media_type = negotiate(accept, supported)
    if media_type is None:
        raise NotAcceptable(f"Accept is {shorten(accept)}: supported are {', '.join(supported)}")
    return media_type
