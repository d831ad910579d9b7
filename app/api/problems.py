"""What the service answers when it cannot answer: application/problem+json (RFC 9457), never a stack trace."""

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

from dinat.app.errors import ServiceError

log = structlog.get_logger("dinat")

PROBLEM = "application/problem+json"
CLIENT_GONE = 499
"""What the log and the metrics say of a request whose client hung up; nobody receives it."""


OWN = ("classify", "features", "attention", "health", "model", "metrics")
"""How the paths of our own doors begin. Clients of others look for a member `error`, which RFC 9457 lets a problem have."""


def _allowed(request: Request) -> str:
    """The methods that a path takes; Starlette names those of the first of its routes alone."""
    scopes = {method: {**request.scope, "method": method} for method in ("GET", "POST", "PUT", "PATCH", "DELETE")}
    routes = request.app.routes
    return ", ".join(
        method for method, scope in scopes.items() if any(route.matches(scope)[0] is Match.FULL for route in routes)
    )


def problem_fields(request_id: str, status: int, detail: str, path: str = "") -> dict[str, str | int]:
    """What RFC 9457 has a problem say. The type is about:blank: the status says it all."""
    title = HTTPStatus(status).phrase
    error = {} if not path or path.split("/")[1] in OWN else {"error": detail}
    return {"type": "about:blank", "title": title, "status": int(status), "detail": detail, "request_id": request_id, **error}


def problem_body(error: ServiceError, request_id: str, path: str) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The body of an answer to a request that failed, and its headers as ASGI has them."""
    body = orjson.dumps(problem_fields(request_id, error.status, error.detail, path))
    headers = {"content-type": PROBLEM, "content-length": str(len(body)), **(error.headers or {})}
    return body, [(name.lower().encode(), value.encode()) for name, value in headers.items()]


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception that leaves a route with a problem."""

    def problem(request: Request, status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
        fields = problem_fields(request.state.request_id, status, detail, request.url.path)
        return Response(orjson.dumps(fields), status, headers, media_type=PROBLEM)

    async def on_service_error(request: Request, error: Any) -> Response:
        return problem(request, error.status, error.detail, error.headers)

    async def on_invalid_request(request: Request, error: Any) -> Response:
        faults = [f"{'.'.join(map(str, fault['loc'][1:])) or fault['loc'][0]}: {fault['msg']}" for fault in error.errors()]
        return problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, "; ".join(faults))

    async def on_http_exception(request: Request, error: Any) -> Response:
        detail = f"{request.method} {request.url.path}: {error.detail}"
        headers = {"Allow": _allowed(request)} if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED else error.headers
        return problem(request, error.status_code, detail, headers)

    async def on_anything_else(request: Request, error: Exception) -> Response:
        log.error("a request failed", path=request.url.path, exc_info=error)
        detail = "something went wrong on this side; the log has it under this request_id"
        headers = {"X-Request-ID": request.state.request_id}  # Starlette answers this one outside of all middleware
        return problem(request, HTTPStatus.INTERNAL_SERVER_ERROR, detail, headers)

    async def on_client_gone(request: Request, error: Any) -> Response:
        return Response(status_code=CLIENT_GONE)

    app.add_exception_handler(ClientDisconnect, on_client_gone)
    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(RequestValidationError, on_invalid_request)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(Exception, on_anything_else)
