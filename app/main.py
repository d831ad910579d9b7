"""The FastAPI application: routers, middleware, lifespan and error handlers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from PIL import Image
from starlette.routing import Route

from dinat.app.api import attention, classify, docs, features, health, hugging_face, page, sagemaker, vertex
from dinat.app.api.middleware import RequestMiddleware
from dinat.app.api.open_inference import repository
from dinat.app.api.open_inference import routes as open_inference
from dinat.app.api.parse_thread import ParseThread
from dinat.app.api.problems import add_error_handlers
from dinat.app.engine.engine import Engine
from dinat.app.settings import Settings
from dinat.app.tracing import configure_tracing


def create_app(
    settings: Settings | None = None, engine: Engine | None = None, processes: Callable[[], Sequence[Any]] | None = None
) -> FastAPI:
    """Create the application. The model is loaded in the background at startup; until then /health/ready returns 503.

    Args:
        settings: Settings of the service. Default: read from the environment.
        engine: Engine to use. Default: a new one with these settings.
        processes: Returns the state of each process of the service, for GET /health, if the service has several.
    """
    settings = settings or Settings()
    engine = engine or Engine(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        Image.MAX_IMAGE_PIXELS = None  # settings.max_pixels is checked for every image instead
        encoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="encode")
        asyncio.get_running_loop().set_default_executor(encoders)  # used by asyncio.to_thread
        starting = asyncio.create_task(engine.start())
        yield
        starting.cancel()  # of no effect once the model is loaded
        await engine.stop()
        await asyncio.wait([starting])
        if tracing is not None:
            await tracing.stop()
        app.state.parse_thread.stop()

    app = docs.offline_app(
        title="dinat-serve",
        summary="Image classification and feature maps by DiNAT, the Dilated Neighborhood Attention Transformer",
        version=version("dinat-serve"),
        lifespan=lifespan,
    )
    app.state.engine = engine
    app.state.processes = processes
    app.state.parse_thread = ParseThread()
    routers = [
        *(module.router for module in (classify, features, attention, open_inference, hugging_face, sagemaker)),
        vertex.router(settings),
    ]
    endpoints = [route for router in routers for route in router.routes if isinstance(route, Route)]
    tracing = configure_tracing(app, settings.otlp_endpoint)
    app.add_middleware(RequestMiddleware, engine=engine, endpoints=endpoints, tracing=tracing)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "Retry-After", "Server-Timing"],
        )
    add_error_handlers(app)
    for router in (*routers, repository.router, health.router, page.router, docs.router):
        app.include_router(router)
    app.mount(page.FILES, page.files)
    return app


def __getattr__(name: str) -> FastAPI:
    """Create `app` on first access, for `uvicorn dinat.app.main:app`."""
    if name == "app":
        return create_app()
    raise AttributeError(f"module {__name__} has no attribute {name}")
