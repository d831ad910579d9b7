"""pytest plugin that hides the service's dependencies, as on a GPU machine with PyTorch only: `-p tests.rehearsal.bare`."""

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
