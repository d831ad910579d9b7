"""The bytes of the picture in a request, whichever of the three forms it came in."""

import json

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from app.errors import NoImage, UnsupportedImage
from app.images import decode_base64

FIELDS = ("image", "file")

OPENAPI_BODY = {
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


async def read_image(request: Request) -> bytes:
    """The picture's bytes: a multipart field `image` (or `file`), the body itself, or base64 in JSON.

    Raises NoImage, UnsupportedImage, Unprocessable; TooLarge comes from RequestContext.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        return await _from_form(request)
    if content_type == "application/json":
        return await _from_json(request)
    if content_type.startswith("image/") or content_type in ("application/octet-stream", ""):
        return await request.body()
    raise UnsupportedImage(
        f"Content-Type {content_type} is not read here: send multipart/form-data with a field image, the picture itself as "
        "image/* or application/octet-stream, or application/json"
    )


async def _from_form(request: Request) -> bytes:
    try:
        async with request.form() as form:
            for name in FIELDS:
                field = form.get(name)
                if isinstance(field, UploadFile):
                    return await field.read()
    except HTTPException as error:
        raise NoImage(f"the form is broken: {error.detail}") from error
    raise NoImage("the form has no file in a field named image: curl takes it as -F image=@picture.jpg")


async def _from_json(request: Request) -> bytes:
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise NoImage(f"the body is not JSON: {error}") from None
    image = body.get("image") if isinstance(body, dict) else None
    if not isinstance(image, str):
        raise NoImage('the JSON has no text in a field image: it reads {"image": "<base64 or data: URL>"}')
    return decode_base64(image)
