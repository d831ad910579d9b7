"""The Open Inference Protocol, version 2, over REST, with the binary tensor and classification extensions.

The protocol of Triton, KServe, MLServer and Seldon: https://github.com/kserve/open-inference-protocol.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.convertors import PathConvertor, register_url_convertor

from dinat.app.api.inference import infer_all
from dinat.app.api.parameters import DEADLINE_PARAMETER, read_deadline
from dinat.app.api.results import json_response
from dinat.app.api.schemas import NOT_FOUND, PROBLEMS
from dinat.app.engine.backend import State
from dinat.app.engine.engine import Engine
from dinat.app.engine.runtimes.runtime import LOGITS, Array, InferenceOptions, InferenceResult, LoadedModel
from dinat.app.errors import BadRequest, NotFound, TooLarge, Unprocessable
from dinat.app.images import decode_base64
from dinat.model import DinatConfig
from dinat.model.cpu.resize import Pixels

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], responses=PROBLEMS | NOT_FOUND)

VERSION = "1"
HEADER = "Inference-Header-Content-Length"
BINARY = "application/octet-stream"
DTYPES: Mapping[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1"), "INT64": np.dtype("<i8")}

Tensor = npt.NDArray[Any]


@dataclass(frozen=True)
class Output:
    """A requested output.

    Attributes:
        name: Name of the output.
        binary: Whether to return it as a binary tensor instead of in JSON.
        classification: Number of best classes to return as text instead of the values; 0 to return the values.
    """

    name: str
    binary: bool
    classification: int


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
    return _health(request, "live", _engine(request).state is not State.FAILED)


@router.get("/health/ready", responses=_UNHEALTHY)
async def ready(request: Request) -> Response:
    """Readiness: 200 if the service accepts requests."""
    return _health(request, "ready", _engine(request).state is State.READY)


@router.get("/models/{name:path}/ready", responses=_UNHEALTHY)
async def model_ready(request: Request, name: str) -> Response:
    """Readiness of the model: 200 if it accepts requests."""
    _model_name(request, name)
    return _health(request, "ready", _engine(request).state is State.READY, name=name)


@router.post("/repository/index")
async def index(request: Request) -> list[dict[str, str]]:
    """List the models, of which there is one."""
    engine = _engine(request)
    state = "READY" if engine.state is State.READY else "UNAVAILABLE"
    return [{"name": engine.settings.served_name, "version": VERSION, "state": state, "reason": engine.status_detail()}]


_TENSOR = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"type": "string", "enum": ["image", "pixel_values"]},
        "datatype": {"type": "string", "enum": ["BYTES", "FP32", "UINT8"]},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "data": {"type": "array", "items": {}},
        "parameters": {"type": "object"},
    },
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
                    "inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": _TENSOR},
                    "outputs": {"type": "array", "items": {"type": "object", "required": ["name"]}},
                    "parameters": {"type": "object"},
                },
            }
        },
        BINARY: {"schema": {"type": "string", "format": "binary"}},
    },
}


@router.post("/models/{name:path}/infer", openapi_extra={"requestBody": _BODY, "parameters": [DEADLINE_PARAMETER]})
async def infer(request: Request, name: str) -> Response:
    """Classify images, sent as image files (`image`, BYTES), pixels (`pixel_values`, UINT8) or normalized values (FP32)."""
    name = _model_name(request, name)
    loaded = _engine(request).loaded
    body, tensors = _parse_request(await request.body(), request.headers.get(HEADER))
    deadline_ms = _deadline(body, read_deadline(request))
    images = _images(tensors, loaded)
    outputs = _requested_outputs(body, loaded.config)
    features = frozenset(output.name.split(".")[0] for output in outputs) - set(_RANKED)
    options = InferenceOptions(loaded.config.num_labels, features)
    results = await infer_all(request, images, options, "image", deadline_ms)
    response: dict[str, Any] = {"model_name": name, "model_version": VERSION, "outputs": []}
    if "id" in body:
        response["id"] = str(body["id"])
    blobs: list[bytes] = []
    for output in outputs:
        response["outputs"].append(_encode_output(output, results, loaded.config, blobs))
    if not blobs:
        return await json_response(request, response, large=bool(features))
    head = orjson.dumps(response)
    return Response(b"".join([head, *blobs]), media_type=BINARY, headers={HEADER: str(len(head))})


class _ModelName(PathConvertor):
    """A model path other than that of the infer endpoint, so that GET on the latter is answered with 405."""

    regex = "(?!.*/infer$).*"


register_url_convertor("model_name", _ModelName())


@router.get("/models/{name:model_name}")
async def metadata(request: Request, name: str) -> dict[str, Any]:
    """Model metadata: names, datatypes and shapes of inputs and outputs; -1 marks a variable dimension."""
    name = _model_name(request, name)
    loaded = _engine(request).loaded
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
            *({"name": ranked, "datatype": datatype, "shape": [-1, labels]} for ranked, datatype in _RANKED.items()),
            *(
                {"name": feature, "datatype": "FP32", "shape": [-1, -1, -1, -1]}
                for feature in _feature_outputs(loaded.config)
                if feature != "pooled"
            ),
            {"name": "pooled", "datatype": "FP32", "shape": [-1, -1]},
        ],
    }


_RANKED = {"scores": "FP32", "class_ids": "INT64", "labels": "BYTES"}
"""Outputs that are sorted by score, best first, with their datatypes."""


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


def _health(request: Request, key: str, healthy: bool, **fields: str) -> Response:
    status = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
    error = {} if healthy else {"error": _engine(request).status_detail()}
    return JSONResponse({key: healthy, **fields, **error}, status)


def _model_name(request: Request, path: str) -> str:
    """Return the model name in a path that may end in a version. Raises NotFound if it is not that of the active model."""
    name, _, requested_version = path.partition("/versions/")
    served_name = _engine(request).settings.served_name
    if name not in (served_name, served_name.rstrip("/").rpartition("/")[2]) or requested_version not in ("", VERSION):
        raise NotFound(f"model {path} is not found, this service has {served_name}, version {VERSION}")
    return name


def _feature_outputs(config: DinatConfig) -> list[str]:
    states = [f"hidden_states.{i}" for i in range(config.num_layers + 1)]
    return [*(name for name in config.feature_names if name != "hidden_states"), *states]


def _parse_request(body: bytes, header: str | None) -> tuple[dict[str, Any], dict[str, Tensor | list[bytes]]]:
    """Parse a request body.

    Args:
        body: JSON, followed by the binary tensors if there are any.
        header: Value of Inference-Header-Content-Length, the length of the JSON in bytes.

    Returns:
        The JSON, and the tensors by name: lists of bytes for BYTES, arrays for other datatypes.

    Raises:
        BadRequest: The body is invalid.
    """
    length = len(body)
    if header is not None:
        if not header.isdecimal() or int(header) > len(body):
            raise BadRequest(f"{HEADER} is {header!r}, the body has {len(body)} bytes")
        length = int(header)
    try:
        request = orjson.loads(body[:length])
    except ValueError as error:
        raise BadRequest(f"the request is not JSON: {error}; before binary tensors, {HEADER} must be its length") from None
    inputs = request.get("inputs") if isinstance(request, dict) else None
    if not isinstance(inputs, list) or not inputs or not all(isinstance(item, dict) for item in inputs):
        raise BadRequest("the request has no list of inputs")
    tensors: dict[str, Tensor | list[bytes]] = {}
    offset = length
    for item in inputs:
        size = _object(item.get("parameters"), f"parameters of input {item.get('name')}").get("binary_data_size")
        blob = None
        if size is not None:
            if not isinstance(size, int) or size < 0 or offset + size > len(body):
                raise BadRequest(f"input {item.get('name')}: binary_data_size is {size!r}, {len(body) - offset} bytes are left")
            blob, offset = body[offset : offset + size], offset + size
        tensors[str(item.get("name"))] = _parse_tensor(item, blob)
    if offset != len(body):
        raise BadRequest(f"{len(body) - offset} bytes are left after the last binary tensor")
    return request, tensors


def _object(value: Any, name: str) -> dict[str, Any]:
    """Return a copy of a JSON object, empty for null. Raises BadRequest for other values."""
    if value is not None and not isinstance(value, dict):
        raise BadRequest(f"{name} must be an object, got {type(value).__name__}")
    return dict(value or {})


def _parse_tensor(item: Mapping[str, Any], blob: bytes | None) -> Tensor | list[bytes]:
    name, datatype, shape = item.get("name"), str(item.get("datatype")), item.get("shape")
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
        raise BadRequest(f"input {name}: shape must be a list of non-negative integers, got {shape!r}")
    if blob is None and not isinstance(item.get("data"), list):
        raise BadRequest(f"input {name} has neither a list of data nor binary_data_size")
    count = math.prod(shape)
    if datatype == "BYTES":
        values = _parse_bytes(blob) if blob is not None else [_decode_element(one) for one in _flatten(item.get("data"))]
        if len(values) != count:
            raise BadRequest(f"input {name}: shape {shape} has {count} elements, the data has {len(values)}")
        return values
    if datatype not in DTYPES:
        raise BadRequest(f"input {name}: datatype {datatype} is not supported: image is BYTES, pixel_values FP32 or UINT8")
    dtype = DTYPES[datatype]
    if blob is not None:
        if len(blob) != count * dtype.itemsize:
            raise BadRequest(f"input {name}: shape {shape} of {datatype} is {count * dtype.itemsize} bytes, got {len(blob)}")
        array = np.frombuffer(blob, dtype)
    else:
        try:
            array = np.array(item.get("data"), dtype)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadRequest(f"input {name}: the data is not {datatype}: {error}") from None
        if array.size != count:
            raise BadRequest(f"input {name}: shape {shape} has {count} elements, the data has {array.size}")
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError) as error:  # no elements, and a dimension that is too large for an array
        raise BadRequest(f"input {name}: shape {shape}: {error}") from None


def _flatten(data: Any) -> list[Any]:
    return [leaf for item in data for leaf in _flatten(item)] if isinstance(data, list) else [data]


def _decode_element(value: object) -> bytes:
    if not isinstance(value, str):
        raise BadRequest(f"an element of BYTES must be base64 of an image file, got {type(value).__name__}")
    return decode_base64(value)


def _parse_bytes(blob: bytes) -> list[bytes]:
    """Parse a binary tensor of BYTES: each element is preceded by its length, 4 bytes in little-endian order."""
    values, offset = [], 0
    while offset < len(blob):
        if offset + 4 > len(blob):
            raise BadRequest("a binary tensor of BYTES ends within the length of an element")
        (length,) = struct.unpack_from("<I", blob, offset)
        if offset + 4 + length > len(blob):
            raise BadRequest(f"a binary tensor of BYTES ends within an element of {length} bytes")
        values.append(blob[offset + 4 : offset + 4 + length])
        offset += 4 + length
    return values


def _deadline(body: Mapping[str, Any], deadline_ms: int | None) -> int | None:
    """Return the deadline in milliseconds, the shorter of the header's and the parameter timeout.

    Raises BadRequest for an unsupported parameter.
    """
    parameters = _object(body.get("parameters"), "parameters")
    parameters.pop("binary_data_output", None)
    timeout = parameters.pop("timeout", None)
    if parameters:
        raise BadRequest(f"unknown parameters {', '.join(sorted(parameters))}, supported are binary_data_output, timeout")
    if timeout is None:
        return deadline_ms
    if not isinstance(timeout, int) or isinstance(timeout, bool) or timeout < 1:
        raise BadRequest(f"timeout must be a positive integer (microseconds), got {timeout!r}")
    return max(1, min(timeout // 1000, deadline_ms or timeout // 1000))


def _images(tensors: Mapping[str, Tensor | list[bytes]], loaded: LoadedModel) -> Sequence[bytes | Pixels | Array]:
    """Return the images to submit to the engine. Raises BadRequest, or Unprocessable for values that are not finite."""
    if set(tensors) not in ({"image"}, {"pixel_values"}):
        raise BadRequest(f"one input is required, image or pixel_values, got {', '.join(tensors)}")
    ((name, tensor),) = tensors.items()
    if (len(tensor) if isinstance(tensor, list) else tensor.size) == 0:
        raise BadRequest(f"input {name} has no image")
    if isinstance(tensor, list):
        if name != "image":
            raise BadRequest("input pixel_values must be FP32 or UINT8, got BYTES")
        return tensor
    if name == "image" or tensor.dtype not in (np.float32, np.uint8):
        raise BadRequest(f"input {name} is {tensor.dtype}: image must be BYTES, pixel_values FP32 or UINT8")
    if tensor.dtype == np.uint8:
        if tensor.ndim != 4 or tensor.shape[3] != 3 or 0 in tensor.shape:
            raise BadRequest(f"input pixel_values of UINT8 must have shape (B, H, W, 3), got {list(tensor.shape)}")
        return list(tensor)
    size = loaded.processor.output_size
    if tensor.ndim != 4 or tensor.shape[1] != 3 or 0 in tensor.shape or (size is not None and tensor.shape[2:] != size):
        sides = "H, W" if size is None else f"{size[0]}, {size[1]}"
        raise BadRequest(f"input pixel_values of FP32 must have shape (B, 3, {sides}), got {list(tensor.shape)}")
    if not np.isfinite(tensor).all():
        raise Unprocessable("input pixel_values has values that are not finite")
    return list(tensor.transpose(0, 2, 3, 1))


def _requested_outputs(body: Mapping[str, Any], config: DinatConfig) -> list[Output]:
    """Return the requested outputs; by default logits, scores, class_ids and labels. Raises BadRequest."""
    binary_by_default = bool(_object(body.get("parameters"), "parameters").get("binary_data_output", False))
    items = body.get("outputs") or [{"name": name} for name in (LOGITS, *_RANKED)]
    if not isinstance(items, list):
        raise BadRequest(f"outputs must be a list, got {type(items).__name__}")
    known = [LOGITS, *_RANKED, *_feature_outputs(config)]
    outputs = []
    for item in items:
        name = item.get("name") if isinstance(item, dict) else None
        if name not in known:
            raise BadRequest(f"unknown output {name}, supported are {', '.join(known)}")
        parameters = _object(item.get("parameters"), f"parameters of output {name}")
        binary, count = bool(parameters.pop("binary_data", binary_by_default)), parameters.pop("classification", 0)
        if parameters:
            raise BadRequest(f"output {name}: unknown parameters {', '.join(sorted(parameters))}")
        if not isinstance(count, int) or count < 0 or (count and name not in (LOGITS, "scores")):
            raise BadRequest(
                f"output {name}: classification must be a non-negative integer, for logits or scores only, got {count!r}"
            )
        outputs.append(Output(name, binary, count))
    return outputs


def _encode_output(
    output: Output, results: Sequence[InferenceResult], config: DinatConfig, blobs: list[bytes]
) -> dict[str, Any]:
    """Return an output's entry in the response JSON. If the output is binary, its bytes are appended to `blobs`."""
    datatype, values = _values(output, results, config)
    entry: dict[str, Any] = {"name": output.name, "datatype": datatype, "shape": list(values.shape)}
    if not output.binary:
        return entry | {"data": values.ravel().tolist() if datatype == "BYTES" else values.ravel()}
    if datatype == "BYTES":
        encoded = [text.encode() for text in values.ravel().tolist()]
        blob = b"".join(struct.pack("<I", len(text)) + text for text in encoded)
    else:
        blob = np.ascontiguousarray(values, DTYPES[datatype]).tobytes()
    blobs.append(blob)
    return entry | {"parameters": {"binary_data_size": len(blob)}}


def _values(output: Output, results: Sequence[InferenceResult], config: DinatConfig) -> tuple[str, Tensor]:
    if output.classification:
        by_logits = output.name == LOGITS
        return "BYTES", np.array(
            [
                [
                    f"{result.features[LOGITS][class_id] if by_logits else score:f}:{class_id}:{config.id2label[class_id]}"
                    for class_id, score in list(zip(result.class_ids.tolist(), result.scores, strict=True))[
                        : output.classification
                    ]
                ]
                for result in results
            ],
            object,
        )
    if output.name == "scores":
        return "FP32", np.stack([result.scores for result in results])
    if output.name == "class_ids":
        return "INT64", np.stack([result.class_ids for result in results])
    if output.name == "labels":
        return "BYTES", np.array([[config.id2label[i] for i in result.class_ids.tolist()] for result in results], object)
    name, _, index = output.name.partition(".")
    features = [result.features[name][int(index)] if index else result.features[name] for result in results]
    if len({np.shape(feature) for feature in features}) > 1:
        raise TooLarge(f"output {output.name} differs in shape between the images: send images of one size")
    return "FP32", np.stack(features)
