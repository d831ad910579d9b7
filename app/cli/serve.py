"""`dinat serve`: answer HTTP requests until a signal says stop."""

import typer

from app.allocator import keep_freed_memory, keep_little_garbage
from app.cli import Refused
from app.cli.flags import settings_flags
from app.engine.engine import Engine
from app.logs import configure_logs
from app.machine import allow_descriptors
from app.main import create_app
from app.server import Server
from app.settings import Settings
from app.supervisor import ServiceDied, Supervisor, resolve_frontends


@settings_flags(Settings.model_fields)
def serve(*, settings: Settings) -> None:
    """Answer HTTP requests until a signal says stop. Every flag can also be set as DINAT_..., in capitals."""
    configure_logs(settings.log_format)
    keep_freed_memory()
    allow_descriptors()
    front_ends = resolve_frontends(settings)
    if front_ends > 1:
        try:
            Supervisor(settings, front_ends).run()
        except ServiceDied as reason:
            raise Refused(str(reason)) from None
        return
    keep_little_garbage()
    engine = Engine(settings)
    server = Server(create_app(settings, engine), engine)
    server.run()
    if engine.failure is not None:
        raise Refused(f"{settings.model} cannot be served: {engine.failure}")
    if not server.started:
        raise typer.Exit(1)
