"""POST /features: the network's maps of a picture, as numbers that programs read without JSON."""

import asyncio
import io
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request, Response
from safetensors.numpy import save

from dinat.app.api.bodies import OPENAPI_BODY, read_one
from dinat.app.api.inference import infer_one
from dinat.app.api.parameters import DEADLINE_PARAMETER, FeatureParameters, openapi_parameters
from dinat.app.api.results import encoded, features, in_json
from dinat.app.api.schemas import PROBLEMS
from dinat.app.engine.engine import Engine
from dinat.app.engine.runtimes.runtime import InferenceResult
from dinat.app.errors import NotAcceptable, Unprocessable

router = APIRouter(tags=["features"], responses=PROBLEMS)

Maps = Mapping[str, npt.NDArray[Any]]
"""float32 or float16."""

JSON, NPY, NPZ, SAFETENSORS = "application/json", "application/x-npy", "application/x-npz", "application/vnd.safetensors"


def _npy(maps: Maps) -> bytes:
    if len(maps) != 1:
        raise Unprocessable(f"{NPY} has one map, {len(maps)} are asked for: take {NPZ}, or one of {', '.join(maps)}")
    buffer = io.BytesIO()
    np.save(buffer, next(iter(maps.values())))
    return buffer.getvalue()


def _npz(maps: Maps) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **maps)  # type: ignore[arg-type]
    return buffer.getvalue()


WRITERS: Mapping[str, Callable[[Maps], bytes]] = {NPY: _npy, NPZ: _npz, SAFETENSORS: lambda maps: save(dict(maps))}
"""How each binary type is written."""

_ANSWERS = {
    200: {
        "description": "The maps, channels first",
        "content": {
            JSON: {"schema": {"type": "object"}},
            **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in WRITERS},
        },
    },
    406: {"description": "None of the types asked for is written here"},
}


@router.post(
    "/features",
    responses=_ANSWERS,  # type: ignore[arg-type]
    openapi_extra={
        "parameters": [*openapi_parameters(FeatureParameters), DEADLINE_PARAMETER],
        "requestBody": OPENAPI_BODY,
    },
)
async def extract(request: Request) -> Response:
    """The maps of one picture, sent as to /classify. `Accept` says how: JSON, NumPy's .npy (one map) or .npz, safetensors."""
    engine: Engine = request.app.state.engine
    config = engine.loaded.config
    kind = _accepted(request)
    picture, parameters = await read_one(request, FeatureParameters)
    wanted = parameters.wanted(config)
    answer = await infer_one(request, picture, wanted)
    if kind == JSON:
        said = features(answer, parameters.feature_format, parameters.feature_dtype)
        return await in_json(request, {"features": said, "request_id": request.state.request_id}, large=True)

    def write() -> bytes:
        started = time.monotonic()
        written = WRITERS[kind](flat(answer, parameters.feature_dtype))
        encoded(request, started)
        return written

    return Response(await asyncio.to_thread(write), media_type=kind)


def flat(answer: InferenceResult, dtype: str) -> Maps:
    """Maps by name; those of a list by name and place: hidden_states.0, hidden_states.1."""
    named: dict[str, npt.NDArray[Any]] = {}
    for name, maps in answer.features.items():
        several = {f"{name}.{i}": one for i, one in enumerate(maps)} if isinstance(maps, list) else {name: maps}
        named |= {key: np.ascontiguousarray(one, dtype) for key, one in several.items()}
    return named


def _accepted(request: Request) -> str:
    """The type that the client would have, the first of those it names; JSON if it does not say. Raises NotAcceptable."""
    asked = [part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "*/*").split(",")]
    for kind in asked:
        if kind in WRITERS or kind == JSON:
            return kind
        if kind in ("", "*/*", "application/*"):
            return JSON
    raise NotAcceptable(f"Accept is {', '.join(asked)}: written are {', '.join([JSON, *WRITERS])}")
