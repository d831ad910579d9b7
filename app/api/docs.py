"""GET /docs: the interactive documentation of the endpoints (Swagger UI), without requests to other hosts."""

import re
from base64 import b64encode
from hashlib import sha256

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi_offline import FastAPIOffline

ASSETS = "/static-offline-docs"

router = APIRouter()


def offline_app(**options: object) -> FastAPI:
    """Create an application that serves the assets of Swagger UI itself, and no documentation pages beside `router`."""
    return FastAPIOffline(docs_url=None, redoc_url=None, static_url=ASSETS, **options)


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """Serve the documentation."""
    root = request.scope.get("root_path", "")
    page = get_swagger_ui_html(
        openapi_url=f"{root}{request.app.openapi_url}",
        title=f"{request.app.title} - Swagger UI",
        swagger_js_url=f"{root}{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{root}{ASSETS}/favicon.png",
    )
    page.headers["Content-Security-Policy"] = _policy(bytes(page.body))
    return page


def _policy(html: bytes) -> str:
    """Return a policy that allows the page's own inline scripts, by their hash, and files of this host."""
    scripts = re.findall(rb"<script>(.*?)</script>", html, re.DOTALL)
    hashes = " ".join(f"'sha256-{b64encode(sha256(script).digest()).decode()}'" for script in scripts)
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src 'self' {hashes}",
            "style-src 'self'",
            "img-src 'self' data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
