"""The pictures in a request and the parameters beside them, whichever form it came in."""

from collections.abc import Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from dinat.app.api.parameters import Given, Kind, faults, read_parameters
from dinat.app.errors import BadRequest, NoImage, ServiceError, Unprocessable
from dinat.app.images import decode_base64

Body = TypeVar("Body", bound=BaseModel)

FIELDS = ("image", "file")
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


async def read_one(request: Request, kind: type[Kind]) -> tuple[bytes, Kind]:
    """The picture of a request and its parameters.

    The picture is a form's field `image` (or `file`), base64 in JSON, or the body itself, whatever its type is called.

    Raises NoImage, Unprocessable; TooLarge and UploadTooSlow come from RequestContext.
    """
    kind_of_body = content_type(request)
    if kind_of_body == JSON:
        given = await _json(request)
        if "images" in given:
            raise NoImage("the JSON has a field images: several pictures go to /classify/batch")
        image = given.pop("image", None)
        if not isinstance(image, str):
            raise NoImage('the JSON has no text in a field image: it reads {"image": "<base64 or data: URL>"}')
        return decode_base64(image), read_parameters(request, kind, "the JSON", given.items())
    if kind_of_body == MULTIPART:
        pictures, fields = await _form(request)
    else:
        body = await request.body()
        if kind_of_body != URLENCODED or not body.startswith(tuple(f"{name}=".encode() for name in FIELDS)):
            return body, read_parameters(request, kind)
        pictures, fields = _sorted_out(parse_qsl(body.decode("latin-1"), keep_blank_values=True))
    if len(pictures) > 1:
        raise NoImage(f"the form has {len(pictures)} pictures: several go to /classify/batch")
    (picture,) = pictures
    if isinstance(picture, ServiceError):
        raise picture
    return picture, read_parameters(request, kind, "the form", fields)


async def read_several(request: Request, kind: type[Kind]) -> tuple[list[bytes | ServiceError], Kind]:
    """The pictures of a request and its parameters: a form's fields `image` (or `file`), or {"images": [...]} in JSON.

    An error stands in the place of a picture whose base64 is broken. Raises NoImage, Unprocessable.
    """
    kind_of_body = content_type(request)
    if kind_of_body == MULTIPART:
        pictures, fields = await _form(request)
        return pictures, read_parameters(request, kind, "the form", fields)
    if kind_of_body == JSON:
        given = await _json(request)
        images = given.pop("images", None)
        if not isinstance(images, list) or not images:
            raise NoImage('the JSON has no list in a field images: it reads {"images": ["<base64 or data: URL>", ...]}')
        return [_decoded(image) for image in images], read_parameters(request, kind, "the JSON", given.items())
    raise NoImage(
        f"Content-Type {kind_of_body or '(none)'} has one picture, which goes to /classify: "
        "send several as multipart/form-data or application/json"
    )


def content_type(request: Request) -> str:
    """A request's, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _decoded(image: object) -> bytes | ServiceError:
    try:
        return (
            decode_base64(image) if isinstance(image, str) else NoImage("this one is no text: base64 or a data: URL is wanted")
        )
    except ServiceError as error:
        return error


async def _form(request: Request) -> tuple[list[bytes | ServiceError], list[Given]]:
    """The pictures and the other fields of a form, in order."""
    limit = request.app.state.engine.settings.max_upload_bytes
    try:
        async with request.form(max_part_size=limit) as form:
            items = [(name, await one.read() if isinstance(one, UploadFile) else one) for name, one in form.multi_items()]
    except HTTPException as error:
        raise NoImage(f"the form is broken: {error.detail}") from error
    return _sorted_out(items)


def _sorted_out(items: Sequence[tuple[str, str | bytes]]) -> tuple[list[bytes | ServiceError], list[Given]]:
    """Pictures, at least one, and other fields. Text in the place of a picture is base64."""
    pictures = [value if isinstance(value, bytes) else _text(name, value) for name, value in items if name in FIELDS]
    if not pictures:
        names = ", ".join(dict.fromkeys(name for name, _ in items)) or "none"
        raise NoImage(f"the form has no field named image, its fields are: {names}; curl takes it as -F image=@picture.jpg")
    return pictures, [(name, value if isinstance(value, str) else "a file") for name, value in items if name not in FIELDS]


def _text(name: str, value: str) -> bytes | ServiceError:
    try:
        return decode_base64(value)
    except NoImage as error:
        return error
    except ServiceError:
        return NoImage(
            f"the field {name} is text that is no base64, {value[:20]!r}: send a file, as curl's -F {name}=@picture.jpg"
        )


async def read_json(request: Request, kind: type[Body]) -> Body:
    """The body, which is JSON, as that kind. Raises BadRequest, Unprocessable."""
    try:
        return kind.model_validate(orjson.loads(await request.body()))
    except ValidationError as error:
        raise Unprocessable(faults(error)) from None
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = orjson.loads(await request.body())
    except ValueError as error:
        raise NoImage(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise NoImage(f"the JSON is {type(body).__name__}, an object is wanted")
    return body
