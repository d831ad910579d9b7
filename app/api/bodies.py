"""Reading of images and parameters from request bodies: multipart and URL-encoded forms, JSON, and raw bytes."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from dinat.app.api.app_state import engine_of
from dinat.app.api.base64_images import decode_base64
from dinat.app.api.forms import FormItem, parse_multipart, parse_urlencoded
from dinat.app.api.json_limits import is_json, load_json, message_limits
from dinat.app.api.parameters import NamedValue, ParametersT, describe_errors, read_parameters
from dinat.app.api.parse_thread import ParseThread
from dinat.app.api.quoting import shorten
from dinat.app.errors import BadRequest, NoImage, ServiceError, Unprocessable
from dinat.app.image_file import SIGNATURES

BodyT = TypeVar("BodyT", bound=BaseModel)
T = TypeVar("T")

IMAGE_FIELDS = tuple(f"{name}{array}" for name in ("image", "file", "images", "files") for array in ("", "[]"))
"""Names of the form fields that hold an image. axios and PHP's clients add [] to those of a list."""

OTHER_FIELDS = ("inputs", "instances")
"""Fields of other services' JSON."""

_IMAGE_ASSIGNMENT = re.compile(rb"(?:[\w.-]{1,40}=[\w.%+,-]{0,200}&){0,8}(?:image|file)s?(?:\[\]|%5[Bb]%5[Dd])?=")
MULTIPART, URLENCODED, JSON = "multipart/form-data", "application/x-www-form-urlencoded", "application/json"

_JSON_NAMES = {list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}

EXAMPLE_IMAGE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
"""A PNG of one pixel in base64, for the OpenAPI document."""

_DATA_URL = f"data:image/png;base64,{EXAMPLE_IMAGE}"

BINARY_SCHEMA = {"type": "string", "format": "binary"}
"""JSON Schema of bytes, in OpenAPI."""


def openapi_body(parameters: type[BaseModel]) -> dict[str, Any]:
    """Describe a body with one image and these parameters for OpenAPI.

    FastAPI cannot derive it, since the media type decides how the body is read.
    """
    text = {"type": "string", "description": "base64, or a data: URL that is base64"}
    return {
        "required": True,
        "content": {
            MULTIPART: openapi_form(parameters, BINARY_SCHEMA),
            "image/*": {"schema": BINARY_SCHEMA},
            "application/octet-stream": {"schema": BINARY_SCHEMA},
            JSON: _openapi_json(parameters, "image", text, _DATA_URL),
        },
    }


def openapi_batch_body(parameters: type[BaseModel]) -> dict[str, Any]:
    """Describe a body with several images and these parameters for OpenAPI."""
    texts = {"type": "array", "items": {"type": "string"}}
    return {
        "required": True,
        "content": {
            MULTIPART: openapi_form(parameters, {"type": "array", "items": BINARY_SCHEMA}),
            JSON: _openapi_json(parameters, "images", texts, [_DATA_URL, _DATA_URL]),
        },
    }


def openapi_form(parameters: type[BaseModel], image: dict[str, Any]) -> dict[str, Any]:
    """Describe a form with a field `image` and these parameters for OpenAPI."""
    return {"schema": _openapi_object(parameters, "image", image)}


def _openapi_json(parameters: type[BaseModel], name: str, image: dict[str, Any], example: object) -> dict[str, Any]:
    schema = _openapi_object(parameters, name, image)
    return {"schema": schema | {"additionalProperties": False, "example": {name: example}}}


def _openapi_object(parameters: type[BaseModel], name: str, image: dict[str, Any]) -> dict[str, Any]:
    properties = {name: image, **parameters.model_json_schema()["properties"]}
    return {"type": "object", "properties": properties, "required": [name]}


async def read_body(request: Request) -> bytes:
    """Read the whole body. It is not stored in the request, so that its memory is freed with the last reference to it."""
    body = io.BytesIO()
    async for part in request.stream():
        body.write(part)
    return body.getvalue()


async def parse_body(request: Request, body: bytes, parse: Callable[[], T]) -> T:
    """Run `parse`, in the parse thread if the body is large.

    Raises:
        DeadlinePassed: The deadline passed before the thread was free.
        ServiceError: As raised by `parse`.
    """
    engine = engine_of(request)
    thread: ParseThread = request.app.state.parse_thread

    def parse_in_time() -> T:
        late = engine.deadline_error(request.state.arrived)
        if late is not None:
            raise late
        return parse()

    return await thread.run(len(body), parse_in_time)


def is_form(media_type: str, body: bytes) -> bool:
    """Whether a body is a form: multipart, or URL-encoded with an image. curl sends that media type for any body."""
    return media_type == MULTIPART or (media_type == URLENCODED and _IMAGE_ASSIGNMENT.match(body) is not None)


async def read_one(request: Request, model: type[ParametersT], body: bytes | None = None) -> tuple[bytes, ParametersT]:
    """Read the image and the parameters of a request with one image.

    The image is a form's field `image` (or `file`), base64 in the JSON field `image`, or the body itself, whatever its media
    type.

    Args:
        request: The request.
        model: Model of the parameters.
        body: The body, if it has been read.

    Returns:
        The bytes of the image file, and the parameters.

    Raises:
        NoImage: The request has no image or several, or the body is malformed.
        Unprocessable: The base64 or a parameter is invalid.
        TooLarge: The body has too many fields or values.
        TooLarge, UploadTooSlow, Unavailable: See LimitedBody.
    """
    media_type, data = content_type(request), await read_body(request) if body is None else body
    if is_json(media_type, data):
        return await parse_body(request, data, lambda: _one_in_json(request, data, model))
    return await read_one_without_json(request, model, data)


async def read_one_without_json(request: Request, model: type[ParametersT], body: bytes) -> tuple[bytes, ParametersT]:
    """Return the image and the parameters of a body that is a form or the image itself. Raises as read_one."""
    media_type = content_type(request)
    if media_type.startswith("multipart/") and media_type != MULTIPART:
        raise NoImage(f"Content-Type {shorten(media_type)} is not supported: send {MULTIPART}, or the image as the body")
    if is_form(media_type, body):
        return await parse_body(request, body, lambda: _one_in_form(request, media_type, body, model))
    return body, read_parameters(request, model)


async def read_several(request: Request, model: type[ParametersT]) -> tuple[list[bytes | ServiceError], ParametersT]:
    """Read the images and the parameters of a request with several images.

    The images are a form's fields `image` (or `file`), or base64 in the JSON list `images`.

    Args:
        request: The request.
        model: Model of the parameters.

    Returns:
        For each image the bytes of its file, or an error if its base64 is invalid; and the parameters.

    Raises:
        NoImage: The request has no image, or the body is malformed.
        Unprocessable: A parameter is invalid.
        TooLarge: There are more images than can be queued, or the body has too many fields or values.
        Unavailable: The queue has no space for the images.
    """
    media_type = content_type(request)
    body = b"" if media_type.startswith("image/") else await read_body(request)
    if media_type != MULTIPART and not is_json(media_type, body):
        raise NoImage(
            f"Content-Type {shorten(media_type) or '(none)'} is not supported here: send several images as "
            "multipart/form-data or application/json, or one image to /classify"
        )
    parse = _several_in_form if media_type == MULTIPART else _several_in_json
    return await parse_body(request, body, lambda: parse(request, body, model))


async def read_json(request: Request, model: type[BodyT], convert: Callable[[BodyT], T]) -> T:
    """Do what parse_json does, for the body of a request that must be JSON."""
    body = await read_body(request)
    kind = "an image" if body.startswith(SIGNATURES) else "a form" if is_form(content_type(request), body) else None
    if kind is not None:
        raise BadRequest(f"{request.url.path} requires JSON, the body is {kind}: send it to POST /classify")
    return await parse_json(request, body, model, convert)


async def parse_json(request: Request, body: bytes, model: type[BodyT], convert: Callable[[BodyT], T]) -> T:
    """Parse a JSON body, validate it, and return the result of `convert`, which runs in the parse thread if it is large.

    Raises:
        BadRequest: The body is not JSON.
        Unprocessable: It does not fit the model.
        TooLarge: It has too many values.
    """

    def parse() -> T:
        try:
            validated = model.model_validate(_load_json(request, body))
        except ValidationError as error:
            raise Unprocessable(describe_errors(error)) from None
        except ValueError as error:
            raise BadRequest(f"the body is not JSON: {_not_json(body, error)}") from None
        return convert(validated)

    return await parse_body(request, body, parse)


def content_type(request: Request) -> str:
    """Return the media type of a request's body, in lower case and without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _one_in_json(request: Request, body: bytes, model: type[ParametersT]) -> tuple[bytes, ParametersT]:
    fields = _json_object(request, body)
    if "images" in fields:
        raise NoImage("the JSON has a field images: send several images to /classify/batch")
    is_given, text = "image" in fields, fields.pop("image", None)
    if not isinstance(text, str):
        other = next((name for name in OTHER_FIELDS if name in fields), None)
        if is_given:
            found = f"image is {_JSON_NAMES[type(text)]}"
        elif other is not None:
            found = f"it has {other}: see POST / and POST {engine_of(request).settings.aip_predict_route}"
        else:
            found = f"fields: {shorten(', '.join(fields)) or 'none'}"
        raise NoImage(f'the JSON has no string field image ({found}): send {{"image": "<base64 or data: URL>"}}')
    return decode_base64(text), read_parameters(request, model, "the JSON", fields.items())


def _one_in_form(request: Request, media_type: str, body: bytes, model: type[ParametersT]) -> tuple[bytes, ParametersT]:
    images, fields = _split_fields(parse_urlencoded(body) if media_type == URLENCODED else _multipart(request, body))
    if len(images) > 1:
        raise NoImage(f"the form has {len(images)} images: send several images to /classify/batch")
    (image,) = images
    if isinstance(image, ServiceError):
        raise image
    return image, read_parameters(request, model, "the form", fields)


def _several_in_form(request: Request, body: bytes, model: type[ParametersT]) -> tuple[list[bytes | ServiceError], ParametersT]:
    images, fields = _split_fields(_multipart(request, body))
    return images, read_parameters(request, model, "the form", fields)


def _several_in_json(request: Request, body: bytes, model: type[ParametersT]) -> tuple[list[bytes | ServiceError], ParametersT]:
    fields = _json_object(request, body)
    texts = fields.pop("images", None)
    if not isinstance(texts, list) or not texts:
        raise NoImage('the JSON has no list of images: send {"images": ["<base64 or data: URL>", ...]}')
    engine_of(request).check_capacity(len(texts))
    return [_decode_item(text) for text in texts], read_parameters(request, model, "the JSON", fields.items())


def _decode_item(text: object) -> bytes | ServiceError:
    if not isinstance(text, str):
        return NoImage("the image is not a string: send base64 or a data: URL")
    try:
        return decode_base64(text)
    except ServiceError as error:
        return error


def _multipart(request: Request, body: bytes) -> list[FormItem]:
    return parse_multipart(body, request.headers["content-type"], engine_of(request).settings.queue_limit)


def _split_fields(items: Sequence[FormItem]) -> tuple[list[bytes | ServiceError], list[NamedValue]]:
    """Split form fields into images, at least one, and other fields. An image field that is text must be base64."""
    images = [
        value if isinstance(value, bytes) else _decode_field(name, value) for name, value in items if name in IMAGE_FIELDS
    ]
    if not images:
        names = shorten(", ".join(dict.fromkeys(name for name, _ in items))) or "none"
        raise NoImage(f"the form has no field image (fields: {names}): with curl, use -F image=@image.jpg")
    fields = [(name, value if isinstance(value, str) else "a file") for name, value in items if name not in IMAGE_FIELDS]
    return images, fields


def _decode_field(name: str, value: str) -> bytes | ServiceError:
    try:
        return decode_base64(value)
    except NoImage as error:
        return error
    except ServiceError:
        return NoImage(
            f"the field {name} is neither a file nor base64, got {value[:20]!r}: with curl, use -F {name}=@image.jpg"
        )


def _not_json(body: bytes, error: ValueError) -> str:
    """Say why a body is not JSON."""
    if body.startswith(SIGNATURES):
        return "it is an image: send it without Content-Type, or with that of the image"
    return str(error)


def _load_json(request: Request, body: bytes) -> Any:
    return load_json(body, message_limits(engine_of(request).settings.queue_limit))


def _json_object(request: Request, body: bytes) -> dict[str, Any]:
    try:
        value = _load_json(request, body)
    except ValueError as error:
        raise NoImage(f"the body is not JSON: {_not_json(body, error)}") from None
    if not isinstance(value, dict):
        raise NoImage(f"the JSON must be an object, got {type(value).__name__}")
    return value
