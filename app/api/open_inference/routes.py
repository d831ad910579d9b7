"""Endpoints of the protocol: metadata, health and inference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.convertors import PathConvertor, register_url_convertor

from dinat.app.api.app_state import engine_of
from dinat.app.api.bodies import BINARY_SCHEMA, EXAMPLE_IMAGE, parse_body, read_body
from dinat.app.api.inference import infer_all
from dinat.app.api.open_inference.outputs import (
    RANKED,
    Output,
    encode_outputs,
    estimate_size,
    feature_outputs,
    measure_size,
    requested_outputs,
)
from dinat.app.api.open_inference.tensors import (
    HEADER,
    MAX_DIMENSIONS,
    MAX_SIDE,
    InferRequest,
    check_content_type,
    parse_object,
    parse_request,
    show_name,
)
from dinat.app.api.parameters import DEADLINE_PARAMETER, check_no_query, openapi_header, read_deadline
from dinat.app.api.quoting import quote, shorten
from dinat.app.api.response_size import reserve_response
from dinat.app.api.results import ChunkedResponse, encode
from dinat.app.api.schemas import NOT_FOUND, PROBLEMS
from dinat.app.engine.backend import State
from dinat.app.engine.engine import Engine
from dinat.app.engine.runtimes.runtime import LOGITS, Array, InferenceOptions, LoadedModel
from dinat.app.errors import BadRequest, NotFound, Unprocessable
from dinat.model.cpu.resize import Pixels

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], responses=PROBLEMS | NOT_FOUND)

VERSION = "1"
BINARY = "application/octet-stream"
MAX_ID_CHARACTERS = 1000
ADVICE = "request fewer outputs, send fewer images, or request binary data"


@router.get("")
async def server(request: Request) -> dict[str, Any]:
    """Server metadata."""
    return {"name": "dinat-serve", "version": version("dinat-serve"), "extensions": ["binary_tensor_data", "classification"]}


_UNHEALTHY: dict[int | str, dict[str, Any]] = {
    503: {
        "description": "Not ready or failed; error gives the reason",
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
}


@router.get("/health/live", responses=_UNHEALTHY)
async def live(request: Request) -> Response:
    """Liveness: 503 if the engine has failed."""
    return _health(request, "live", engine_of(request).state is not State.FAILED)


@router.get("/health/ready", responses=_UNHEALTHY)
async def ready(request: Request) -> Response:
    """Readiness: 200 if the service accepts requests."""
    return _health(request, "ready", engine_of(request).state is State.READY)


@router.get("/models/{name:path}/ready", responses=_UNHEALTHY)
async def model_ready(request: Request, name: str) -> Response:
    """Readiness of the model: 200 if it accepts requests."""
    _model_name(request, name)
    return _health(request, "ready", engine_of(request).state is State.READY, name=name)


_TENSOR = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"type": "string", "enum": ["image", "pixel_values"]},
        "datatype": {"type": "string", "enum": ["BYTES", "FP32", "UINT8"]},
        "shape": {
            "type": "array",
            "maxItems": MAX_DIMENSIONS,
            "items": {"type": "integer", "minimum": 0, "maximum": MAX_SIDE},
        },
        "data": {"type": "array", "items": {}},
        "parameters": {"type": "object"},
    },
    "additionalProperties": False,
}
_OUTPUT = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
    "additionalProperties": False,
}
_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "id": {"type": "string"},
                    "model_name": {"type": "string", "description": "if present, the name in the path"},
                    "inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": _TENSOR},
                    "outputs": {"type": "array", "items": _OUTPUT},
                    "parameters": {"type": "object"},
                },
                "additionalProperties": False,
                "example": {
                    "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [EXAMPLE_IMAGE]}],
                    "outputs": [{"name": "labels"}],
                },
            }
        },
        BINARY: {"schema": BINARY_SCHEMA},
    },
}


_HEADER_PARAMETER = openapi_header(HEADER, "length of the JSON in bytes, if a binary tensor follows it", minimum=0)


@router.post(
    "/models/{name:path}/infer",
    openapi_extra={"requestBody": _BODY, "parameters": [DEADLINE_PARAMETER, _HEADER_PARAMETER]},
)
async def infer(request: Request, name: str) -> Response:
    """Classify images, sent as image files (`image`, BYTES), pixels (`pixel_values`, UINT8) or normalized values (FP32)."""
    name = _model_name(request, name)
    check_no_query(request, "send them in the JSON")
    engine = engine_of(request)
    loaded = engine.loaded
    body = await read_body(request)

    def parse() -> _Inference:
        parsed = parse_request(body, request.headers.get(HEADER), engine.settings.queue_limit)
        if parsed.body.get("model_name") is not None:
            _model_name(request, show_name(parsed.body["model_name"]))
        deadline_ms = _deadline(parsed.body, read_deadline(request))
        outputs = requested_outputs(parsed.body, loaded.config)
        return _Inference(_request_id(parsed.body), _images(parsed, engine, loaded), outputs, deadline_ms)

    inference = await parse_body(request, body, parse)
    images, outputs = inference.images, inference.outputs
    reserve_response(request, estimate_size(outputs, loaded, len(images)), ADVICE)
    features = frozenset(output.feature for output in outputs if output.feature is not None)
    options = InferenceOptions(loaded.config.num_labels, features)
    results = await infer_all(request, images, options, "image", inference.deadline_ms)
    size = reserve_response(request, measure_size(outputs, results, loaded.config), ADVICE)
    response = {"model_name": name, "model_version": VERSION, **({} if inference.id is None else {"id": inference.id})}
    encoded, head_size = await encode(request, lambda: encode_outputs(response, outputs, results, loaded.config), size)
    if head_size is None:
        return ChunkedResponse(encoded, media_type="application/json")
    return ChunkedResponse(encoded, media_type=BINARY, headers={HEADER: str(head_size)})


@dataclass(frozen=True)
class _Inference:
    """What a request asks for.

    Attributes:
        id: The client's id of the request, or None.
        images: The images.
        outputs: The requested outputs.
        deadline_ms: Maximum time in milliseconds, or None.
    """

    id: str | None
    images: Sequence[bytes | Pixels | Array]
    outputs: Sequence[Output]
    deadline_ms: int | None


class _ModelName(PathConvertor):
    """A model path other than that of the infer endpoint, so that GET on the latter is answered with 405."""

    regex = "(?!.*/infer$).*"


register_url_convertor("model_name", _ModelName())


@router.get("/models/{name:model_name}")
async def metadata(request: Request, name: str) -> dict[str, Any]:
    """Model metadata: names, datatypes and shapes of inputs and outputs; -1 marks a variable dimension."""
    name = _model_name(request, name)
    loaded = engine_of(request).loaded
    height, width = loaded.processor.output_size or (-1, -1)
    labels = loaded.config.num_labels
    return {
        "name": name,
        "versions": [VERSION],
        "platform": "dinat_pytorch",
        "inputs": [
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
            {"name": "pixel_values", "datatype": "FP32", "shape": [-1, 3, height, width]},
        ],
        "outputs": [
            {"name": LOGITS, "datatype": "FP32", "shape": [-1, labels]},
            *({"name": ranked, "datatype": datatype, "shape": [-1, labels]} for ranked, datatype in RANKED.items()),
            *(
                {"name": feature, "datatype": "FP32", "shape": [-1, -1, -1, -1]}
                for feature in feature_outputs(loaded.config)
                if feature != "pooled"
            ),
            {"name": "pooled", "datatype": "FP32", "shape": [-1, -1]},
        ],
    }


def _health(request: Request, key: str, healthy: bool, **fields: str) -> Response:
    status = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
    error = {} if healthy else {"error": engine_of(request).status_detail()}
    return JSONResponse({key: healthy, **fields, **error}, status)


def _model_name(request: Request, path: str) -> str:
    """Return the model name in a path that may end in a version. Raises NotFound if it is not that of the active model."""
    name, _, requested_version = path.partition("/versions/")
    served_name = engine_of(request).settings.served_name
    if name not in (served_name, served_name.rstrip("/").rpartition("/")[2]) or requested_version not in ("", VERSION):
        raise NotFound(f"model {shorten(path)} is not found, this service has {served_name}, version {VERSION}")
    return name


def _deadline(body: Mapping[str, Any], deadline_ms: int | None) -> int | None:
    """Return the deadline in milliseconds, the shorter of the header's and the parameter timeout.

    Raises BadRequest for an unsupported parameter.
    """
    parameters = parse_object(body.get("parameters"), "parameters")
    parameters.pop("binary_data_output", None)
    check_content_type(parameters, "the request")
    timeout = parameters.pop("timeout", None)
    if parameters:
        raise BadRequest(
            f"unknown parameters {shorten(', '.join(sorted(parameters)))}, supported are binary_data_output, content_type, "
            "timeout"
        )
    if timeout is None:
        return deadline_ms
    if type(timeout) is not int or timeout < 1:
        raise BadRequest(f"timeout must be a positive integer (microseconds), got {quote(timeout)}")
    return max(1, min(timeout // 1000, deadline_ms or timeout // 1000))


def _request_id(body: Mapping[str, Any]) -> str | None:
    """Return the client's id of a request. Raises BadRequest if it is neither text nor a number, or too long."""
    value = body.get("id")
    if value is None:
        return None
    if not isinstance(value, str | int) or len(str(value)) > MAX_ID_CHARACTERS:
        raise BadRequest(f"id must be a string of at most {MAX_ID_CHARACTERS} characters, got {quote(value)}")
    return str(value)


def _images(parsed: InferRequest, engine: Engine, loaded: LoadedModel) -> Sequence[bytes | Pixels | Array]:
    """Return the images to submit to the engine.

    Raises:
        BadRequest: The input does not fit the model.
        Unprocessable: It has values that are not finite.
        TooLarge, Unavailable: It has more images than can be queued.
    """
    name, tensor = parsed.name, parsed.tensor
    if name not in ("image", "pixel_values"):
        raise BadRequest(f"one input is required, image or pixel_values, got {name}")
    if (len(tensor) if isinstance(tensor, list) else tensor.size) == 0:
        raise BadRequest(f"input {name} has no image")
    if isinstance(tensor, list):
        if name != "image":
            raise BadRequest("input pixel_values must be FP32 or UINT8, got BYTES")
        return tensor
    engine.check_capacity(len(tensor) if tensor.ndim else 1)
    if name == "image" or tensor.dtype not in (np.float32, np.uint8):
        raise BadRequest(f"input {name} is {tensor.dtype}: image must be BYTES, pixel_values FP32 or UINT8")
    if tensor.dtype == np.uint8:
        if tensor.ndim != 4 or tensor.shape[3] != 3:
            raise BadRequest(f"input pixel_values of UINT8 must have shape (B, H, W, 3), got {list(tensor.shape)}")
        return list(tensor)
    size = loaded.processor.output_size
    if tensor.ndim != 4 or tensor.shape[1] != 3 or (size is not None and tensor.shape[2:] != size):
        sides = "H, W" if size is None else f"{size[0]}, {size[1]}"
        raise BadRequest(f"input pixel_values of FP32 must have shape (B, 3, {sides}), got {list(tensor.shape)}")
    if not np.isfinite(tensor).all():
        raise Unprocessable("input pixel_values has values that are not finite")
    return list(tensor.transpose(0, 2, 3, 1))
