"""GET /: a page that shows what the network says of a picture, and what it sees in it."""

from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

PAGE, FILES = "/", "/web"

HEADERS = {
    "Content-Security-Policy": "; ".join(
        [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    ),
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",  # a new version's files all at once: their ETags say what is old
}

router = APIRouter()


class _Files(StaticFiles):
    """The page's files, each with the page's headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """See StaticFiles."""
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


files = _Files(directory=Path(__file__).parents[1] / "web")


@router.get(PAGE, response_class=HTMLResponse, summary="The page that shows all this")
async def page(request: Request) -> Response:
    """The page."""
    return await files.get_response("index.html", request.scope)
