"""Reading of images and parameters from request bodies: multipart and URL-encoded forms, JSON, and raw bytes."""

from collections.abc import Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from dinat.app.api.parameters import NamedValue, ParametersT, describe_errors, read_parameters
from dinat.app.errors import BadRequest, NoImage, ServiceError, Unprocessable
from dinat.app.images import decode_base64

BodyT = TypeVar("BodyT", bound=BaseModel)

IMAGE_FIELDS = ("image", "file")
"""Names of the form fields that hold an image."""

MULTIPART, URLENCODED, JSON = "multipart/form-data", "application/x-www-form-urlencoded", "application/json"

_BINARY = {"schema": {"type": "string", "format": "binary"}}

OPENAPI_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        MULTIPART: {
            "schema": {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}, "required": ["image"]}
        },
        "image/*": _BINARY,
        "application/octet-stream": _BINARY,
        JSON: {
            "schema": {
                "type": "object",
                "properties": {"image": {"type": "string", "description": "base64, or a data: URL that is base64"}},
                "required": ["image"],
                "example": {"image": "data:image/png;base64,iVBORw0KGgo..."},
            }
        },
    },
}
"""OpenAPI description of the body. FastAPI cannot derive it, since the media type decides how the body is read."""

OPENAPI_BATCH_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        MULTIPART: {
            "schema": {
                "type": "object",
                "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                "required": ["image"],
            }
        },
        JSON: {
            "schema": {
                "type": "object",
                "properties": {"images": {"type": "array", "items": {"type": "string"}}},
                "required": ["images"],
                "example": {"images": ["data:image/png;base64,iVBORw0KGgo...", "data:image/png;base64,iVBORw0KGgo..."]},
            }
        },
    },
}


async def read_one(request: Request, model: type[ParametersT]) -> tuple[bytes, ParametersT]:
    """Read the image and the parameters of a request with one image.

    The image is a form's field `image` (or `file`), base64 in the JSON field `image`, or the body itself, whatever its media
    type.

    Args:
        request: The request.
        model: Model of the parameters.

    Returns:
        The bytes of the image file, and the parameters.

    Raises:
        NoImage: The request has no image or several, or the body is malformed.
        Unprocessable: The base64 or a parameter is invalid.
        TooLarge, UploadTooSlow: See RequestMiddleware.
    """
    media_type = content_type(request)
    if media_type == JSON:
        fields = await _json(request)
        if "images" in fields:
            raise NoImage("the JSON has a field images: send several images to /classify/batch")
        text = fields.pop("image", None)
        if not isinstance(text, str):
            raise NoImage('the JSON has no string field image: send {"image": "<base64 or data: URL>"}')
        return decode_base64(text), read_parameters(request, model, "the JSON", fields.items())
    if media_type == MULTIPART:
        images, form_fields = await _form(request)
    else:
        body = await request.body()
        if media_type != URLENCODED or not body.startswith(tuple(f"{name}=".encode() for name in IMAGE_FIELDS)):
            return body, read_parameters(request, model)
        images, form_fields = _split_fields(parse_qsl(body.decode("latin-1"), keep_blank_values=True))
    if len(images) > 1:
        raise NoImage(f"the form has {len(images)} images: send several images to /classify/batch")
    (image,) = images
    if isinstance(image, ServiceError):
        raise image
    return image, read_parameters(request, model, "the form", form_fields)


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
    """
    media_type = content_type(request)
    if media_type == MULTIPART:
        images, form_fields = await _form(request)
        return images, read_parameters(request, model, "the form", form_fields)
    if media_type == JSON:
        fields = await _json(request)
        texts = fields.pop("images", None)
        if not isinstance(texts, list) or not texts:
            raise NoImage('the JSON has no list of images: send {"images": ["<base64 or data: URL>", ...]}')
        return [_decode_item(text) for text in texts], read_parameters(request, model, "the JSON", fields.items())
    raise NoImage(
        f"Content-Type {media_type or '(none)'} is not supported here: send several images as multipart/form-data or "
        "application/json, or one image to /classify"
    )


def content_type(request: Request) -> str:
    """Return the media type of a request's body, in lower case and without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _decode_item(text: object) -> bytes | ServiceError:
    if not isinstance(text, str):
        return NoImage("the image is not a string: send base64 or a data: URL")
    try:
        return decode_base64(text)
    except ServiceError as error:
        return error


async def _form(request: Request) -> tuple[list[bytes | ServiceError], list[NamedValue]]:
    """Read the images and the other fields of a multipart form, in order."""
    limit = request.app.state.engine.settings.max_upload_bytes
    try:
        async with request.form(max_part_size=limit) as form:
            items = [
                (name, await value.read() if isinstance(value, UploadFile) else value) for name, value in form.multi_items()
            ]
    except HTTPException as error:
        raise NoImage(f"the form is malformed: {error.detail}") from error
    return _split_fields(items)


def _split_fields(items: Sequence[tuple[str, str | bytes]]) -> tuple[list[bytes | ServiceError], list[NamedValue]]:
    """Split form fields into images, at least one, and other fields. An image field that is text must be base64."""
    images = [
        value if isinstance(value, bytes) else _decode_field(name, value) for name, value in items if name in IMAGE_FIELDS
    ]
    if not images:
        names = ", ".join(dict.fromkeys(name for name, _ in items)) or "none"
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


async def read_json(request: Request, model: type[BodyT]) -> BodyT:
    """Read and validate a JSON body. Raises BadRequest if it is not JSON, Unprocessable if it does not fit the model."""
    try:
        return model.model_validate(orjson.loads(await request.body()))
    except ValidationError as error:
        raise Unprocessable(describe_errors(error)) from None
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = orjson.loads(await request.body())
    except ValueError as error:
        raise NoImage(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise NoImage(f"the JSON must be an object, got {type(body).__name__}")
    return body
