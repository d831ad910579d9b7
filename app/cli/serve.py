"""`dinat serve`: start the HTTP server."""

import typer

from dinat.app.cli import CommandError
from dinat.app.cli.flags import settings_flags
from dinat.app.engine.engine import Engine
from dinat.app.host import raise_descriptor_limit
from dinat.app.logs import configure_logs
from dinat.app.main import create_app
from dinat.app.server.heap import keep_freed_memory, reduce_gc
from dinat.app.server.server import Server
from dinat.app.server.supervisor import ServiceFailed, Supervisor, resolve_frontends
from dinat.app.settings import Settings


@settings_flags(Settings.model_fields)
def serve(*, settings: Settings) -> None:
    """Start the HTTP server. It stops on SIGTERM or SIGINT.

    Each flag can also be set as an environment variable DINAT_<NAME>, such as DINAT_MAX_BATCH.
    """
    configure_logs(settings.log_format)
    keep_freed_memory()
    raise_descriptor_limit()
    frontends = resolve_frontends(settings)
    if frontends > 1:
        try:
            Supervisor(settings, frontends).run()
        except ServiceFailed as failure:
            raise CommandError(str(failure)) from None
        return
    reduce_gc()
    engine = Engine(settings)
    server = Server(create_app(settings, engine), engine)
    server.run()
    if engine.failure is not None:
        raise CommandError(f"{settings.model} cannot be served: {engine.failure}")
    if not server.started:
        raise typer.Exit(1)
