"""GET /: a web page that shows the labels, feature maps and attention of an image."""

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
    "Cache-Control": "no-cache",  # browsers revalidate by ETag, so that all files come from one version
}

router = APIRouter()


class _Files(StaticFiles):
    """Static files of the page, served with the page's headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Serve a file, see StaticFiles."""
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


files = _Files(directory=Path(__file__).parents[1] / "web")


@router.get(PAGE, response_class=HTMLResponse, summary="Web page")
async def page(request: Request) -> Response:
    """Serve the web page."""
    return await files.get_response("index.html", request.scope)
