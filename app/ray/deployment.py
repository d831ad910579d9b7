"""The service as a Ray Serve deployment: each replica has the same endpoints and the same engine.

    serve run dinat.ray:dinat model=shi-labs/dinat-mini-in1k-224 max_replicas=4

Arguments are settings in lower case, which override DINAT_* in the environment, and min_replicas, max_replicas and num_cpus.
Ray's proxy accepts connections and distributes requests; Ray starts and stops replicas. A replica is a process with a GPU or a
share of the CPU cores.
"""

import asyncio
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dinat.app.engine.backend import State
from dinat.app.engine.engine import Engine
from dinat.app.main import create_app
from dinat.app.ray.resources import actor_resources
from dinat.app.settings import Settings, explain
from dinat.model import DinatError

SET_BY_RAY = ("host", "port", "frontends", "max_connections", "lame_duck_seconds")
"""Settings that do not apply on Ray, which accepts connections and stops routing to a replica before it stops the replica."""

TARGET_BATCHES = 2
"""Batches of requests in flight per replica that autoscaling aims at."""


class Replicas(BaseModel):
    """Number and size of replicas. Their number is scaled by the number of requests in flight."""

    model_config = ConfigDict(extra="forbid")

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1, description="Default: min_replicas.")
    num_cpus: float | None = Field(None, gt=0, description="CPU cores of a replica. Default: an equal share of the cluster's.")

    @model_validator(mode="after")
    def _check_order(self) -> "Replicas":
        if "max_replicas" not in self.model_fields_set:
            self.max_replicas = self.min_replicas
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, above max_replicas, {self.max_replicas}")
        return self


class Replica:
    """A replica. Ray makes it an ASGI application and routes requests to it once its model is loaded and warm."""

    app: FastAPI

    async def check_health(self) -> None:
        """Wait for the model to load. Ray calls this before the first request and every few seconds.

        Raises:
            RuntimeError: The engine has failed.
        """
        engine: Engine = self.app.state.engine
        while engine.state is State.LOADING:
            await asyncio.sleep(0.05)
        if engine.failure is not None:
            raise RuntimeError(f"{engine.settings.model} cannot be served: {engine.failure}")


class _DropRequestId:
    """Drops the X-Request-ID response header. Ray's proxy adds the same one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [header for header in message["headers"] if header[0] != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, send_without_id)


def dinat(arguments: dict[str, Any]) -> serve.Application:
    """Build the application. `serve run` and Serve configuration files call this.

    Args:
        arguments: Settings, and fields of Replicas.

    Raises:
        DinatError: An argument is unknown or invalid.
    """
    settings, replicas = _parse(arguments)

    def build_app() -> FastAPI:
        app = create_app(settings)
        app.add_middleware(_DropRequestId)
        return app

    options = actor_resources(settings, replicas.max_replicas)
    if replicas.num_cpus is not None:
        options["num_cpus"] = replicas.num_cpus
    deployment = serve.deployment(
        name="dinat",
        ray_actor_options=options,
        max_ongoing_requests=settings.queue_limit,
        max_queued_requests=settings.queue_limit,
        autoscaling_config={
            "min_replicas": replicas.min_replicas,
            "max_replicas": replicas.max_replicas,
            "target_ongoing_requests": TARGET_BATCHES * (settings.max_batch or (64 if "num_gpus" in options else 8)),
        },
        health_check_period_s=5,
        graceful_shutdown_timeout_s=settings.drain_seconds + 10,
    )(serve.ingress(build_app)(Replica))
    return deployment.bind()


def _parse(arguments: dict[str, Any]) -> tuple[Settings, Replicas]:
    """Split arguments into settings and replicas. Raises DinatError."""
    set_by_ray = [name for name in SET_BY_RAY if name in arguments]
    if set_by_ray:
        raise DinatError(f"{', '.join(set_by_ray)}: set by Ray, see `serve run --help` and its configuration file")
    try:
        settings = Settings(**{name: value for name, value in arguments.items() if name in Settings.model_fields})
        replicas = Replicas(**{name: value for name, value in arguments.items() if name not in Settings.model_fields})
    except ValidationError as error:
        raise DinatError(explain(error, lambda name: f"{name}=")) from None
    return settings, replicas
