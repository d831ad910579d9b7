"""The bytes of the picture in a request, whichever of the three forms it came in."""

from typing import Any

import orjson
from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from app.errors import NoImage, ServiceError, UnsupportedImage
from app.images import decode_base64

FIELDS = ("image", "file")
MULTIPART, JSON = "multipart/form-data", "application/json"

OPENAPI_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}, "required": ["image"]}
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"image": {"type": "string", "description": "base64, or a data: URL that is base64"}},
                "required": ["image"],
                "example": {"image": "data:image/png;base64,iVBORw0KGgo..."},
            }
        },
    },
}
"""How OpenAPI describes the body: FastAPI cannot derive it, since the type decides how it is read."""

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


async def read_image(request: Request) -> bytes:
    """The picture's bytes: a multipart field `image` (or `file`), the body itself, or base64 in JSON.

    Raises NoImage, UnsupportedImage, Unprocessable; TooLarge and UploadTooSlow come from RequestContext.
    """
    content_type = _content_type(request)
    if content_type == MULTIPART:
        return (await _files(request))[0]
    if content_type == JSON:
        image = (await _json(request)).get("image")
        if not isinstance(image, str):
            raise NoImage('the JSON has no text in a field image: it reads {"image": "<base64 or data: URL>"}')
        return decode_base64(image)
    if content_type.startswith("image/") or content_type in ("application/octet-stream", ""):
        return await request.body()
    raise UnsupportedImage(
        f"Content-Type {content_type} is not read here: send multipart/form-data with a field image, the picture itself as "
        "image/* or application/octet-stream, or application/json"
    )


async def read_images(request: Request) -> list[bytes | ServiceError]:
    """The bytes of several pictures: repeated multipart fields `image` (or `file`), or {"images": [...]} in JSON.

    An error stands in the place of a picture whose base64 is broken. Raises NoImage, UnsupportedImage.
    """
    content_type = _content_type(request)
    if content_type == MULTIPART:
        return list(await _files(request))
    if content_type == JSON:
        images = (await _json(request)).get("images")
        if not isinstance(images, list) or not images:
            raise NoImage('the JSON has no list in a field images: it reads {"images": ["<base64 or data: URL>", ...]}')
        return [_decoded(image) for image in images]
    raise UnsupportedImage(
        f"Content-Type {content_type or '(none)'} is not read here: send multipart/form-data or application/json"
    )


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _decoded(image: object) -> bytes | ServiceError:
    try:
        return (
            decode_base64(image) if isinstance(image, str) else NoImage("this one is no text: base64 or a data: URL is wanted")
        )
    except ServiceError as error:
        return error


async def _files(request: Request) -> list[bytes]:
    """The files of a form's fields named image or file, in order; at least one."""
    try:
        async with request.form() as form:
            fields = [value for name, value in form.multi_items() if name in FIELDS and isinstance(value, UploadFile)]
            if fields:
                return [await field.read() for field in fields]
    except HTTPException as error:
        raise NoImage(f"the form is broken: {error.detail}") from error
    raise NoImage("the form has no file in a field named image: curl takes it as -F image=@picture.jpg")


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = orjson.loads(await request.body())
    except ValueError as error:
        raise NoImage(f"the body is not JSON: {error}") from None
    return body if isinstance(body, dict) else {}
