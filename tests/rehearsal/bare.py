"""`-p tests.rehearsal.bare`: as if nothing of the service's own packages were installed, as on a machine that lends a card."""

import sys

for name in (
    "fastapi",
    "orjson",
    "pydantic",
    "pydantic_settings",
    "prometheus_client",
    "rich",
    "starlette",
    "structlog",
    "uvicorn",
):
    sys.modules[name] = None  # type: ignore[assignment]
