"""The application: routers, lifespan and error handlers put together."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline
from PIL import Image
from starlette.routing import Route

from dinat.app.api import attention, classify, features, health, hugging_face, open_inference, page, sagemaker, vertex
from dinat.app.api.middleware import RequestContext
from dinat.app.api.problems import add_error_handlers
from dinat.app.engine.engine import Engine
from dinat.app.settings import Settings
from dinat.app.tracing import trace_requests


def create_app(
    settings: Settings | None = None, engine: Engine | None = None, processes: Callable[[], Sequence[Any]] | None = None
) -> FastAPI:
    """The service. The model loads in the background once the application starts; until then /health/ready says 503.

    settings: read from the environment if None.  engine: one made from the same settings, for who wants to watch it.
    processes: what each process of the service is doing, where there are several.
    """
    settings = settings or Settings()
    engine = engine or Engine(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        Image.MAX_IMAGE_PIXELS = None  # settings.max_pixels is checked on every picture instead
        encoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="encode")
        asyncio.get_running_loop().set_default_executor(encoders)  # which asyncio.to_thread takes
        starting = asyncio.create_task(engine.start())
        yield
        await engine.stop()
        await starting

    app = FastAPIOffline(  # whose page of the API comes from this host, not from others
        title="dinat-serve",
        summary="Image classification and feature maps by DiNAT, the Dilated Neighborhood Attention Transformer",
        version=version("dinat-serve"),
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.engine = engine
    app.state.processes = processes
    doors = [
        *(door.router for door in (classify, features, attention, open_inference, hugging_face, sagemaker)),
        vertex.router(settings),
    ]
    app.add_middleware(
        RequestContext, engine=engine, doors=[route for door in doors for route in door.routes if isinstance(route, Route)]
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "Retry-After", "Server-Timing"],
        )
    if settings.otlp_endpoint:
        trace_requests(app, settings.otlp_endpoint)
    add_error_handlers(app)
    for door in (*doors, health.router, page.router):
        app.include_router(door)
    app.mount(page.FILES, page.files)
    return app


def __getattr__(name: str) -> FastAPI:
    """`app`, for `uvicorn app.main:app`, made when it is asked for."""
    if name == "app":
        return create_app()
    raise AttributeError(f"module {__name__} has no attribute {name}")
