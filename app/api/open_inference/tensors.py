"""Input tensors of a request: shapes, JSON data and binary data."""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dinat.app.api.base64_images import decode_base64
from dinat.app.api.json_limits import JsonLimits, load_json, message_limits
from dinat.app.api.parameters import parse_integer
from dinat.app.api.quoting import quote, shorten
from dinat.app.errors import BadRequest, TooLarge

HEADER = "Inference-Header-Content-Length"
DTYPES: Mapping[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1"), "INT64": np.dtype("<i8")}

CONTENT_TYPES = ("base64", "np", "raw", "pillow_image")
"""MLServer's content types that say what the data is anyway."""

MEMBERS = ("id", "model_name", "inputs", "outputs", "parameters")
"""Members of a request. The protocol has no model_name, but KServe's client sends it."""

MAX_DIMENSIONS = 8
MAX_SIDE = 2**31 - 1

MAX_JSON_NUMBERS = 1_000_000
"""Maximum numbers in the JSON of a request, which take about 0.1 s to parse. 6 images of 224x224."""

MAX_JSON_LISTS = 200_000
"""Maximum lists in the JSON of a request, which take about 0.1 s to parse. 3 images of 224x224, nested by row and column."""

Tensor = npt.NDArray[Any]
Input = Tensor | list[bytes]
"""An input tensor: a list for BYTES, an array for other datatypes."""


@dataclass(frozen=True)
class Shape:
    """The shape of a tensor: at most MAX_DIMENSIONS sides, each from 0 to MAX_SIDE."""

    sides: tuple[int, ...]

    @classmethod
    def parse(cls, value: object, name: str) -> "Shape":
        """Convert a JSON value. Raises BadRequest, in which `name` is that of the tensor."""
        if not isinstance(value, list) or not all(type(side) is int and side >= 0 for side in value[: MAX_DIMENSIONS + 1]):
            raise BadRequest(f"input {name}: shape must be a list of non-negative integers, got {quote(value)}")
        if len(value) > MAX_DIMENSIONS:
            raise BadRequest(f"input {name}: shape has {len(value):,} dimensions, the maximum is {MAX_DIMENSIONS}")
        if max(value, default=0) > MAX_SIDE:
            raise BadRequest(f"input {name}: shape {quote(value)} has a side above {MAX_SIDE:,}")
        return cls(tuple(value))

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.sides)

    def __str__(self) -> str:
        return str(list(self.sides))


@dataclass(frozen=True)
class InferRequest:
    """A parsed request.

    Attributes:
        body: Its JSON.
        name: Name of the input.
        tensor: Value of the input.
    """

    body: dict[str, Any]
    name: str
    tensor: Input


def parse_request(body: bytes, header: str | None, queue_limit: int) -> InferRequest:
    """Parse a request body.

    Args:
        body: JSON, followed by the binary tensor if there is one.
        header: Value of Inference-Header-Content-Length, the length of the JSON in bytes.
        queue_limit: Maximum number of images.

    Raises:
        BadRequest: The body is invalid.
        TooLarge: It has too many values.
    """
    length: int | None = len(body)
    if header is not None:
        length = parse_integer(header, len(body))
        if length is None:
            raise BadRequest(f"{HEADER} is {quote(header)}, the body has {len(body)} bytes")
    keys = message_limits(queue_limit).keys
    advice = f"send tensors as binary data, see {HEADER}"
    try:
        request = load_json(body, JsonLimits(MAX_JSON_NUMBERS, MAX_JSON_LISTS, keys, advice), length)
    except ValueError as error:
        raise BadRequest(f"the request is not JSON: {error}; before binary tensors, {HEADER} must be its length") from None
    inputs = request.get("inputs") if isinstance(request, dict) else None
    if not isinstance(inputs, list) or not inputs or not all(isinstance(item, dict) for item in inputs[:2]):
        raise BadRequest("the request has no list of inputs")
    check_members(request, MEMBERS, "the request")
    if len(inputs) > 1:
        raise BadRequest(f"one input is required, image or pixel_values, got {len(inputs):,}")
    name, tensor = _parse_input(inputs[0], memoryview(body)[length:], queue_limit)
    return InferRequest(request, name, tensor)


def parse_object(value: object, name: str) -> dict[str, Any]:
    """Return a copy of a JSON object, empty for null. Raises BadRequest for other values, in which it is called `name`."""
    if value is not None and not isinstance(value, dict):
        raise BadRequest(f"{name} must be an object, got {type(value).__name__}")
    return dict(value or {})


def check_members(value: Mapping[str, Any], known: Sequence[str], name: str) -> None:
    """Raise BadRequest if an object of a request, called `name`, has other members than those of the protocol."""
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise BadRequest(f"{name}: unknown members {shorten(', '.join(unknown))}, supported are {', '.join(known)}")


def pop_bool(parameters: dict[str, Any], name: str, default: bool) -> bool:
    """Remove a parameter and return its value. Raises BadRequest if it is neither true nor false."""
    value = parameters.pop(name, default)
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false, got {quote(value)}")
    return value


def show_name(value: object) -> str:
    """Return a name from JSON, which should be a string, for error messages."""
    return shorten(value) if isinstance(value, str) else quote(value)


def check_content_type(parameters: dict[str, Any], name: str) -> None:
    """Remove MLServer's content_type from parameters. Raises BadRequest if it is none that this service reads."""
    value = parameters.pop("content_type", None)
    if value is None:
        return
    if not isinstance(value, str) or not (value in CONTENT_TYPES or value.startswith("image/")):
        raise BadRequest(
            f"{name}: content_type {quote(value)} is not supported: send image files in base64 ({', '.join(CONTENT_TYPES)}, "
            "image/*) or pixel_values"
        )


def _parse_input(item: Mapping[str, Any], blob: memoryview, queue_limit: int) -> tuple[str, Input]:
    """Return the name and the value of an input.

    Args:
        item: Its JSON.
        blob: The bytes after the JSON.
        queue_limit: Maximum number of elements of BYTES.
    """
    name, datatype = show_name(item.get("name")), show_name(item.get("datatype"))
    check_members(item, ("name", "shape", "datatype", "parameters", "data"), f"input {name}")
    parameters = parse_object(item.get("parameters"), f"parameters of input {name}")
    check_content_type(parameters, f"input {name}")
    size = parameters.pop("binary_data_size", None)
    if parameters:
        raise BadRequest(
            f"input {name}: unknown parameters {shorten(', '.join(sorted(parameters)))}, supported are binary_data_size, "
            "content_type"
        )
    if size is not None and (type(size) is not int or not 0 <= size <= len(blob)):
        raise BadRequest(f"input {name}: binary_data_size is {quote(size)}, {len(blob)} bytes are left")
    if len(blob) != (size or 0):
        raise BadRequest(f"{len(blob) - (size or 0)} bytes are left after the last binary tensor")
    shape = Shape.parse(item.get("shape"), name)
    if size is None and not isinstance(item.get("data"), list):
        raise BadRequest(f"input {name} has neither a list of data nor binary_data_size")
    if datatype == "BYTES":
        return name, _parse_bytes(item, None if size is None else blob, shape, name, queue_limit)
    if datatype not in DTYPES:
        raise BadRequest(f"input {name}: datatype {datatype} is not supported: image is BYTES, pixel_values FP32 or UINT8")
    dtype = DTYPES[datatype]
    if size is not None:
        if len(blob) != shape.count * dtype.itemsize:
            expected = shape.count * dtype.itemsize
            raise BadRequest(f"input {name}: shape {shape} of {datatype} is {expected} bytes, got {len(blob)}")
        array = np.frombuffer(blob, dtype)
    else:
        array = _parse_numbers(item["data"], datatype, name)
        if array.size != shape.count:
            raise BadRequest(f"input {name}: shape {shape} has {shape.count} elements, the data has {array.size}")
    try:
        return name, array.reshape(shape.sides)
    except (ValueError, OverflowError) as error:  # no elements, and a product of other sides that is too large
        raise BadRequest(f"input {name}: shape {shape}: {error}") from None


def _parse_numbers(data: list[Any], datatype: str, name: str) -> Tensor:
    types = _element_types(data)
    if types - {int, float}:  # NumPy would convert text and booleans
        raise BadRequest(f"input {name}: the data is not {datatype}: it has elements that are not numbers")
    try:
        with np.errstate(over="ignore"):  # values that are not finite are rejected later
            array = np.array(data, DTYPES[datatype])
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRequest(f"input {name}: the data is not {datatype}: {shorten(str(error))}") from None
    if float in types and array.dtype.kind in "iu" and (array != np.array(data)).any():
        raise BadRequest(f"input {name}: the data is not {datatype}: it has fractions")
    return array


def _element_types(data: list[Any]) -> set[type]:
    """Return the types of the elements of nested lists."""
    types: set[type] = set()
    lists = [data]
    while lists:
        elements = lists.pop()
        types.update(map(type, elements))
        if list in types:
            lists += [item for item in elements if isinstance(item, list)]
    return types - {list}


def _parse_bytes(item: Mapping[str, Any], blob: memoryview | None, shape: Shape, name: str, queue_limit: int) -> list[bytes]:
    if shape.count > queue_limit:
        raise TooLarge(f"the request has {shape.count:,} images, at most {queue_limit} can be queued: send fewer images")
    if blob is not None:
        values = _split_elements(blob, queue_limit)
    else:
        values = [_decode_element(element) for element in _flatten(item["data"], queue_limit)]
    if len(values) != shape.count:
        raise BadRequest(f"input {name}: shape {shape} has {shape.count} elements, the data has {len(values)}")
    return values


def _flatten(data: list[Any], limit: int) -> list[Any]:
    """Return the elements of nested lists, at most `limit` in each of MAX_DIMENSIONS levels."""
    for _ in range(MAX_DIMENSIONS):
        if sum(len(item) if isinstance(item, list) else 1 for item in data[: limit + 1]) > limit or len(data) > limit:
            raise TooLarge(f"the request has more than {limit} images, at most {limit} can be queued: send fewer images")
        if not any(isinstance(item, list) for item in data):
            return data
        data = [leaf for item in data for leaf in (item if isinstance(item, list) else [item])]
    raise BadRequest(f"the data is nested deeper than {MAX_DIMENSIONS} dimensions")


def _decode_element(value: object) -> bytes:
    if not isinstance(value, str):
        raise BadRequest(f"an element of BYTES must be base64 of an image file, got {type(value).__name__}")
    return decode_base64(value)


def _split_elements(blob: memoryview, limit: int) -> list[bytes]:
    """Split a binary tensor of BYTES: each element is preceded by its length, 4 bytes in little-endian order."""
    values: list[bytes] = []
    offset = 0
    while offset < len(blob):
        if len(values) == limit:
            raise TooLarge(f"the request has more than {limit} images, at most {limit} can be queued: send fewer images")
        if offset + 4 > len(blob):
            raise BadRequest("a binary tensor of BYTES ends within the length of an element")
        (length,) = struct.unpack_from("<I", blob, offset)
        if offset + 4 + length > len(blob):
            raise BadRequest(f"a binary tensor of BYTES ends within an element of {length} bytes")
        values.append(bytes(blob[offset + 4 : offset + 4 + length]))
        offset += 4 + length
    return values
