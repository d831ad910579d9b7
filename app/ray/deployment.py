"""The service as a deployment of Ray Serve: the same doors and the same engine in each replica.

    serve run dinat.app.ray.deployment:dinat model=shi-labs/dinat-mini-in1k-224 max_replicas=4

Arguments are settings, in small letters (over DINAT_* in the environment), and min_replicas, max_replicas, num_cpus.
Ray listens, spreads requests over replicas, starts and stops these; each is a process with a card, or its share of cores.
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
"""Settings that mean nothing here: Ray listens, and takes a replica out of its list before it stops it."""

BATCHES_AHEAD = 2
"""How many batches' worth of requests a replica is to have, by which Ray adds and takes away replicas."""


class Replicas(BaseModel):
    """How many replicas, and what of the processors each has. More than min_replicas come, and go, with the requests."""

    model_config = ConfigDict(extra="forbid")

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1, description="min_replicas, if that is more and this is not given")
    num_cpus: float | None = Field(None, gt=0, description="processors of a replica; its share of the cluster's if not given")

    @model_validator(mode="after")
    def _ordered(self) -> "Replicas":
        if "max_replicas" not in self.model_fields_set:
            self.max_replicas = self.min_replicas
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, above max_replicas, {self.max_replicas}")
        return self


class Replica:
    """One replica; Ray makes it an ASGI application. It takes requests once its network is loaded and warm."""

    app: FastAPI

    async def check_health(self) -> None:
        """Ray asks this before the first request, and every few seconds. Raises where the engine has failed."""
        engine: Engine = self.app.state.engine
        while engine.state is State.LOADING:
            await asyncio.sleep(0.05)
        if engine.failure is not None:
            raise RuntimeError(f"{engine.settings.model} cannot be served: {engine.failure}")


class _RequestIdByRay:
    """Leaves X-Request-ID to Ray's proxy, which writes the same into the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [header for header in message["headers"] if header[0] != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, without)


def dinat(arguments: dict[str, Any]) -> serve.Application:
    """The application, as `serve run` and a Serve configuration build it. Raises DinatError where an argument is wrong."""
    settings, replicas = _read(arguments)

    def service() -> FastAPI:
        app = create_app(settings)
        app.add_middleware(_RequestIdByRay)
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
            "target_ongoing_requests": BATCHES_AHEAD * (settings.max_batch or (64 if "num_gpus" in options else 8)),
        },
        health_check_period_s=5,
        graceful_shutdown_timeout_s=settings.drain_seconds + 10,
    )(serve.ingress(service)(Replica))
    return deployment.bind()


def _read(arguments: dict[str, Any]) -> tuple[Settings, Replicas]:
    """Arguments as settings and replicas. Raises DinatError."""
    own = [name for name in SET_BY_RAY if name in arguments]
    if own:
        raise DinatError(f"{', '.join(own)}: that is Ray's own here, see `serve run --help` and its configuration file")
    try:
        settings = Settings(**{name: value for name, value in arguments.items() if name in Settings.model_fields})
        replicas = Replicas(**{name: value for name, value in arguments.items() if name not in Settings.model_fields})
    except ValidationError as error:
        raise DinatError(explain(error, lambda name: f"{name}=")) from None
    return settings, replicas
