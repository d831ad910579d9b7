"""Error responses as application/problem+json (RFC 9457), without stack traces."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from dinat.app.api.parameters import MAX_DESCRIBED_ERRORS
from dinat.app.api.quoting import shorten
from dinat.app.errors import ServiceError

log = structlog.get_logger("dinat")

PROBLEM = "application/problem+json"
MAX_DETAIL_CHARACTERS = 2000
"""Longest detail of a problem. Those parts that repeat what a client sent are shortened on their own."""

CLIENT_DISCONNECTED = 499
"""Status in the log and metrics of a request whose client has disconnected. It is never received."""


NATIVE = ("classify", "features", "attention", "health", "model", "metrics")
"""First path segments of the service's own endpoints.

Problems of all other endpoints have an extension member `error`, which clients of other protocols read.
"""


def _allowed(request: Request) -> str:
    """Return the methods of all routes that match the path; Starlette only returns those of the first."""
    scopes = {method: {**request.scope, "method": method} for method in ("GET", "POST", "PUT", "PATCH", "DELETE")}
    routes = request.app.routes
    return ", ".join(
        method for method, scope in scopes.items() if any(route.matches(scope)[0] is Match.FULL for route in routes)
    )


def problem_fields(request_id: str, status: int, detail: str, path: str = "") -> dict[str, str | int]:
    """Return the members of a problem (RFC 9457). The type is about:blank, since the status identifies the problem.

    Args:
        request_id: Id of the request.
        status: HTTP status.
        detail: Description of the error, for people.
        path: Path of the request. The member `error` is added if it is not one of the service's own endpoints.
    """
    detail = shorten(detail, MAX_DETAIL_CHARACTERS)
    title = HTTPStatus(status).phrase
    error = {} if not path or path.split("/")[1] in NATIVE else {"error": detail}
    return {"type": "about:blank", "title": title, "status": int(status), "detail": detail, "request_id": request_id, **error}


def problem_body(error: ServiceError, request_id: str, path: str) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Return the body and the ASGI headers of an error response."""
    body = orjson.dumps(problem_fields(request_id, error.status, error.detail, path))
    headers = {"content-type": PROBLEM, "content-length": str(len(body)), **(error.headers or {})}
    return body, [(name.lower().encode(), value.encode()) for name, value in headers.items()]


def add_error_handlers(app: FastAPI) -> None:
    """Respond to every exception that a route raises with a problem."""

    def problem(request: Request, status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
        request.state.detail = detail  # for the log
        fields = problem_fields(request.state.request_id, status, detail, request.url.path)
        return Response(orjson.dumps(fields), status, headers, media_type=PROBLEM)

    async def on_service_error(request: Request, error: Any) -> Response:
        return problem(request, error.status, error.detail, error.headers)

    async def on_invalid_request(request: Request, error: Any) -> Response:
        errors = error.errors()[:MAX_DESCRIBED_ERRORS]
        details = [f"{'.'.join(map(str, entry['loc'][1:])) or entry['loc'][0]}: {entry['msg']}" for entry in errors]
        return problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, "; ".join(details))

    async def on_http_exception(request: Request, error: Any) -> Response:
        detail = f"{request.method} {shorten(request.url.path)}: {error.detail}"
        headers = {"Allow": _allowed(request)} if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED else error.headers
        return problem(request, error.status_code, detail, headers)

    async def on_unexpected_error(request: Request, error: Exception) -> Response:
        log.error("request failed", path=shorten(request.url.path), exc_info=error)
        detail = "internal error: see the log of the service for this request_id"
        headers = {"X-Request-ID": request.state.request_id}  # Starlette sends this response outside of all middleware
        return problem(request, HTTPStatus.INTERNAL_SERVER_ERROR, detail, headers)

    async def on_client_disconnected(request: Request, error: Any) -> Response:
        return Response(status_code=CLIENT_DISCONNECTED)

    app.add_exception_handler(ClientDisconnect, on_client_disconnected)
    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(RequestValidationError, on_invalid_request)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(Exception, on_unexpected_error)
