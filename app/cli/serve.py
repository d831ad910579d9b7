"""`dinat serve`: start the HTTP server."""

import os

import structlog
import typer

from dinat.app.cli import CommandError
from dinat.app.cli.flags import settings_flags
from dinat.app.engine.backend import State
from dinat.app.engine.engine import Engine
from dinat.app.host import raise_descriptor_limit
from dinat.app.logs import configure_logs, flush_logs
from dinat.app.main import create_app
from dinat.app.server.heap import keep_freed_memory, reduce_gc
from dinat.app.server.server import Server
from dinat.app.server.supervisor import ServiceFailed, Supervisor, listen, resolve_frontends
from dinat.app.settings import Settings

log = structlog.get_logger("dinat")

RESERVED_DESCRIPTORS = 32
"""Open files of a process without connections, rounded up."""


@settings_flags(Settings.model_fields)
def serve(*, settings: Settings) -> None:
    """Start the HTTP server. It stops on SIGTERM, SIGINT or SIGHUP.

    Each flag can also be set as an environment variable DINAT_<NAME>, such as DINAT_MAX_BATCH.
    """
    configure_logs(settings.log_format)
    keep_freed_memory()
    descriptors = raise_descriptor_limit()
    frontends = resolve_frontends(settings)
    settings = fit_connections(settings, frontends, descriptors)
    if frontends > 1:
        try:
            Supervisor(settings, frontends).run()
        except ServiceFailed as failure:
            raise CommandError(str(failure)) from None
        return
    if settings.port:
        for listener in listen(settings, 1)[0]:  # raises OSError before the model is loaded if the port is in use
            listener.close()
    reduce_gc()
    engine = Engine(settings)
    server = Server(create_app(settings, engine), engine)
    try:
        server.run()
        status = 0 if server.started else 1
    except SystemExit as end:  # uvicorn could not listen, and has logged why
        status = end.code if isinstance(end.code, int) else 1
    if engine.failure is not None:
        raise CommandError(f"{settings.model} cannot be served: {engine.failure}")
    if engine.backend.state is State.LOADING:
        flush_logs()
        os._exit(status)  # the thread that loads the model cannot be stopped
    raise typer.Exit(status)


def fit_connections(settings: Settings, frontends: int, descriptors: int | None) -> Settings:
    """Lower MAX_CONNECTIONS to what the limit of open files carries.

    Above that limit the kernel gives no connection to the process, which could not even reject it with 503. A third of
    the limit is for connections that are being rejected, a third for files that are sent or received.

    Args:
        settings: Settings of the service.
        frontends: Number of processes that accept connections.
        descriptors: Limit of open files of each process; None if there is none.
    """
    if descriptors is None:
        return settings
    carried = frontends * max(1, (descriptors - RESERVED_DESCRIPTORS) // 3)
    if settings.max_connections <= carried:
        return settings
    log.warning(
        "MAX_CONNECTIONS lowered: raise the hard limit of open files (ulimit -Hn, LimitNOFILE=)",
        max_connections=carried,
        configured=settings.max_connections,
        open_files=descriptors,
    )
    return settings.model_copy(update={"max_connections": carried})
