"""The Open Inference Protocol, version 2, over REST, with the extensions for binary tensors and for classification.

As Triton, KServe, MLServer and Seldon speak it: https://github.com/kserve/open-inference-protocol.
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
from dinat.app.api.results import in_json
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
    """An output that is asked for. classification: so many of the best, as text, in its place; 0 for its numbers."""

    name: str
    binary: bool
    classification: int


@router.get("")
async def server(request: Request) -> dict[str, Any]:
    """What this server is."""
    return {"name": "dinat-serve", "version": version("dinat-serve"), "extensions": ["binary_tensor_data", "classification"]}


_UNHEALTHY: dict[int | str, dict[str, Any]] = {
    503: {"description": "Not now; error says why", "content": {"application/json": {"schema": {"type": "object"}}}}
}


@router.get("/health/live", responses=_UNHEALTHY)
async def live(request: Request) -> Response:
    """Whether the process does its work, or is on its way to."""
    return _health(request, "live", _engine(request).state is not State.FAILED)


@router.get("/health/ready", responses=_UNHEALTHY)
async def ready(request: Request) -> Response:
    """Whether pictures are taken now."""
    return _health(request, "ready", _engine(request).state is State.READY)


@router.get("/models/{name:path}/ready", responses=_UNHEALTHY)
async def model_ready(request: Request, name: str) -> Response:
    """Whether the model takes pictures now."""
    _known(request, name)
    return _health(request, "ready", _engine(request).state is State.READY, name=name)


@router.post("/repository/index")
async def index(request: Request) -> list[dict[str, str]]:
    """The one model that is here."""
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
    """Classify pictures, given as the bytes of their files (`image`), as pixels, or as normalised numbers (`pixel_values`)."""
    name = _known(request, name)
    loaded = _engine(request).loaded
    asked, tensors = _read(await request.body(), request.headers.get(HEADER))
    deadline_ms = _parameters(asked, read_deadline(request))
    pictures = _pictures(tensors, loaded)
    outputs = _outputs(asked, loaded.config)
    names = frozenset(one.name.split(".")[0] for one in outputs) - set(_RANKED)
    wanted = InferenceOptions(loaded.config.num_labels, names)
    answers = await infer_all(request, pictures, wanted, "picture", deadline_ms)
    head: dict[str, Any] = {"model_name": name, "model_version": VERSION, "outputs": []}
    if "id" in asked:
        head["id"] = str(asked["id"])
    blobs: list[bytes] = []
    for one in outputs:
        head["outputs"].append(_written(one, answers, loaded.config, blobs))
    if not blobs:
        return await in_json(request, head, large=bool(names))
    said = orjson.dumps(head)
    return Response(b"".join([said, *blobs]), media_type=BINARY, headers={HEADER: str(len(said))})


class _ModelName(PathConvertor):
    """A path that is not the way to infer: GET there is a method that is not allowed."""

    regex = "(?!.*/infer$).*"


register_url_convertor("model_name", _ModelName())


@router.get("/models/{name:model_name}")
async def metadata(request: Request, name: str) -> dict[str, Any]:
    """Names, types and shapes of what goes in and comes out; -1 for any number."""
    name = _known(request, name)
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
            *({"name": ranked, "datatype": kind, "shape": [-1, labels]} for ranked, kind in _RANKED.items()),
            *({"name": one, "datatype": "FP32", "shape": [-1, -1, -1, -1]} for one in _maps(loaded.config) if one != "pooled"),
            {"name": "pooled", "datatype": "FP32", "shape": [-1, -1]},
        ],
    }


_RANKED = {"scores": "FP32", "class_ids": "INT64", "labels": "BYTES"}
"""Outputs that are ordered, the best first."""


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


def _health(request: Request, what: str, healthy: bool, **more: str) -> Response:
    status = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
    error = {} if healthy else {"error": _engine(request).status_detail()}
    return JSONResponse({what: healthy, **more, **error}, status)


def _known(request: Request, path: str) -> str:
    """The model's name in a path, perhaps with its version. Raises NotFound for another one."""
    name, _, wanted = path.partition("/versions/")
    serves = _engine(request).settings.served_name
    if name not in (serves, serves.rstrip("/").rpartition("/")[2]) or wanted not in ("", VERSION):
        raise NotFound(f"model {path} is not here, {serves} is, in version {VERSION}")
    return name


def _maps(config: DinatConfig) -> list[str]:
    states = [f"hidden_states.{i}" for i in range(config.num_layers + 1)]
    return [*(name for name in config.feature_names if name != "hidden_states"), *states]


def _read(body: bytes, header: str | None) -> tuple[dict[str, Any], dict[str, Tensor | list[bytes]]]:
    """The request's JSON and its tensors by name: arrays, lists of bytes for BYTES. Raises BadRequest."""
    length = len(body)
    if header is not None:
        if not header.isdecimal() or int(header) > len(body):
            raise BadRequest(f"{HEADER} is {header!r}, the body has {len(body)} bytes")
        length = int(header)
    try:
        asked = orjson.loads(body[:length])
    except ValueError as error:
        raise BadRequest(f"the request is not JSON: {error}; with binary tensors {HEADER} says where it ends") from None
    inputs = asked.get("inputs") if isinstance(asked, dict) else None
    if not isinstance(inputs, list) or not inputs or not all(isinstance(one, dict) for one in inputs):
        raise BadRequest("the request has no list of inputs")
    tensors: dict[str, Tensor | list[bytes]] = {}
    at = length
    for one in inputs:
        size = _object(one.get("parameters"), f"parameters of input {one.get('name')}").get("binary_data_size")
        blob = None
        if size is not None:
            if not isinstance(size, int) or size < 0 or at + size > len(body):
                raise BadRequest(f"input {one.get('name')}: binary_data_size is {size!r}, {len(body) - at} bytes are left")
            blob, at = body[at : at + size], at + size
        tensors[str(one.get("name"))] = _tensor(one, blob)
    if at != len(body):
        raise BadRequest(f"{len(body) - at} bytes are left after the last binary tensor")
    return asked, tensors


def _object(value: Any, what: str) -> dict[str, Any]:
    """A JSON object, of its own; empty where there is none. Raises BadRequest."""
    if value is not None and not isinstance(value, dict):
        raise BadRequest(f"{what} is {type(value).__name__}, an object is wanted")
    return dict(value or {})


def _tensor(given: Mapping[str, Any], blob: bytes | None) -> Tensor | list[bytes]:
    name, datatype, shape = given.get("name"), str(given.get("datatype")), given.get("shape")
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
        raise BadRequest(f"input {name}: shape is {shape!r}, a list of whole numbers is wanted")
    if blob is None and not isinstance(given.get("data"), list):
        raise BadRequest(f"input {name} has no list of data, nor binary_data_size")
    count = math.prod(shape)
    if datatype == "BYTES":
        values = _strings(blob) if blob is not None else [_text(one) for one in _flat(given.get("data"))]
        if len(values) != count:
            raise BadRequest(f"input {name}: shape {shape} is {count} elements, the data are {len(values)}")
        return values
    if datatype not in DTYPES:
        raise BadRequest(f"input {name}: datatype {datatype} is not read here: image is BYTES, pixel_values FP32 or UINT8")
    dtype = DTYPES[datatype]
    if blob is not None:
        if len(blob) != count * dtype.itemsize:
            raise BadRequest(f"input {name}: shape {shape} of {datatype} is {count * dtype.itemsize} bytes, got {len(blob)}")
        array = np.frombuffer(blob, dtype)
    else:
        try:
            array = np.array(given.get("data"), dtype)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadRequest(f"input {name}: the data are no {datatype}: {error}") from None
        if array.size != count:
            raise BadRequest(f"input {name}: shape {shape} is {count} elements, the data are {array.size}")
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError) as error:  # no elements, and sides that no array has
        raise BadRequest(f"input {name}: shape {shape}: {error}") from None


def _flat(data: Any) -> list[Any]:
    return [leaf for one in data for leaf in _flat(one)] if isinstance(data, list) else [data]


def _text(value: object) -> bytes:
    if not isinstance(value, str):
        raise BadRequest(f"an element of BYTES is {type(value).__name__}: base64 of a picture's file is wanted")
    return decode_base64(value)


def _strings(blob: bytes) -> list[bytes]:
    """Elements of BYTES: each a length of 4 bytes, and so many more."""
    values, at = [], 0
    while at < len(blob):
        if at + 4 > len(blob):
            raise BadRequest("a binary tensor of BYTES ends within an element's length")
        (length,) = struct.unpack_from("<I", blob, at)
        if at + 4 + length > len(blob):
            raise BadRequest(f"a binary tensor of BYTES ends within an element of {length} bytes")
        values.append(blob[at + 4 : at + 4 + length])
        at += 4 + length
    return values


def _parameters(asked: Mapping[str, Any], deadline_ms: int | None) -> int | None:
    """The deadline. Raises BadRequest for a parameter that nothing here honours."""
    given = _object(asked.get("parameters"), "parameters")
    given.pop("binary_data_output", None)
    timeout = given.pop("timeout", None)
    if given:
        raise BadRequest(f"parameters has {', '.join(sorted(given))}, allowed are binary_data_output, timeout")
    if timeout is None:
        return deadline_ms
    if not isinstance(timeout, int) or isinstance(timeout, bool) or timeout < 1:
        raise BadRequest(f"timeout is {timeout!r}: microseconds, a whole number from 1 on")
    return max(1, min(timeout // 1000, deadline_ms or timeout // 1000))


def _pictures(tensors: Mapping[str, Tensor | list[bytes]], loaded: LoadedModel) -> Sequence[bytes | Pixels | Array]:
    """What the engine takes. Raises BadRequest."""
    if set(tensors) not in ({"image"}, {"pixel_values"}):
        raise BadRequest(f"inputs are {', '.join(tensors)}: one is wanted, image or pixel_values")
    ((name, tensor),) = tensors.items()
    if (len(tensor) if isinstance(tensor, list) else tensor.size) == 0:
        raise BadRequest(f"input {name} has no picture")
    if isinstance(tensor, list):
        if name != "image":
            raise BadRequest("input pixel_values is BYTES: FP32 or UINT8 is wanted")
        return tensor
    if name == "image" or tensor.dtype not in (np.float32, np.uint8):
        raise BadRequest(f"input {name} is {tensor.dtype}: image is BYTES, pixel_values FP32 or UINT8")
    if tensor.dtype == np.uint8:
        if tensor.ndim != 4 or tensor.shape[3] != 3 or 0 in tensor.shape:
            raise BadRequest(f"input pixel_values of UINT8 has shape {list(tensor.shape)}: (B, H, W, 3) is wanted")
        return list(tensor)
    size = loaded.processor.output_size
    if tensor.ndim != 4 or tensor.shape[1] != 3 or 0 in tensor.shape or (size is not None and tensor.shape[2:] != size):
        sides = "H, W" if size is None else f"{size[0]}, {size[1]}"
        raise BadRequest(f"input pixel_values of FP32 has shape {list(tensor.shape)}: (B, 3, {sides}) is wanted")
    if not np.isfinite(tensor).all():
        raise Unprocessable("input pixel_values has values that are not finite")
    return list(tensor.transpose(0, 2, 3, 1))


def _outputs(asked: Mapping[str, Any], config: DinatConfig) -> list[Output]:
    """What is asked for; logits and the ranking if nothing is named. Raises BadRequest."""
    binary = bool(_object(asked.get("parameters"), "parameters").get("binary_data_output", False))
    given = asked.get("outputs") or [{"name": name} for name in (LOGITS, *_RANKED)]
    if not isinstance(given, list):
        raise BadRequest(f"outputs is {type(given).__name__}, a list is wanted")
    known = [LOGITS, *_RANKED, *_maps(config)]
    outputs = []
    for one in given:
        name = one.get("name") if isinstance(one, dict) else None
        if name not in known:
            raise BadRequest(f"output {name} is not there: {', '.join(known)}")
        parameters = _object(one.get("parameters"), f"parameters of output {name}")
        own, count = bool(parameters.pop("binary_data", binary)), parameters.pop("classification", 0)
        if parameters:
            raise BadRequest(f"output {name}: parameters {', '.join(sorted(parameters))} are not known")
        if not isinstance(count, int) or count < 0 or (count and name not in (LOGITS, "scores")):
            raise BadRequest(f"output {name}: classification is {count!r}: a number of the best, of logits or scores")
        outputs.append(Output(name, own, count))
    return outputs


def _written(output: Output, answers: Sequence[InferenceResult], config: DinatConfig, blobs: list[bytes]) -> dict[str, Any]:
    """An output as the response's JSON has it; where it is binary, its bytes are added to blobs."""
    datatype, values = _values(output, answers, config)
    written: dict[str, Any] = {"name": output.name, "datatype": datatype, "shape": list(values.shape)}
    if not output.binary:
        return written | {"data": values.ravel().tolist() if datatype == "BYTES" else values.ravel()}
    if datatype == "BYTES":
        encoded = [text.encode() for text in values.ravel().tolist()]
        blob = b"".join(struct.pack("<I", len(text)) + text for text in encoded)
    else:
        blob = np.ascontiguousarray(values, DTYPES[datatype]).tobytes()
    blobs.append(blob)
    return written | {"parameters": {"binary_data_size": len(blob)}}


def _values(output: Output, answers: Sequence[InferenceResult], config: DinatConfig) -> tuple[str, Tensor]:
    if output.classification:
        by_logits = output.name == LOGITS
        return "BYTES", np.array(
            [
                [
                    f"{answer.features[LOGITS][class_id] if by_logits else score:f}:{class_id}:{config.id2label[class_id]}"
                    for class_id, score in list(zip(answer.class_ids.tolist(), answer.scores, strict=True))[
                        : output.classification
                    ]
                ]
                for answer in answers
            ],
            object,
        )
    if output.name == "scores":
        return "FP32", np.stack([answer.scores for answer in answers])
    if output.name == "class_ids":
        return "INT64", np.stack([answer.class_ids for answer in answers])
    if output.name == "labels":
        return "BYTES", np.array([[config.id2label[i] for i in answer.class_ids.tolist()] for answer in answers], object)
    name, _, place = output.name.partition(".")
    maps = [answer.features[name][int(place)] if place else answer.features[name] for answer in answers]
    if len({np.shape(one) for one in maps}) > 1:
        raise TooLarge(f"output {output.name} has another shape for each picture: send pictures of one size")
    return "FP32", np.stack(maps)
