"""`dinat serve`: answer HTTP requests until a signal says stop."""

import argparse
import gc

from pydantic import ValidationError

from app.allocator import keep_freed_memory
from app.cli import Refused
from app.engine.engine import Engine
from app.logs import configure_logs
from app.main import create_app
from app.server import Server
from app.settings import Settings, explain

GC_THRESHOLD = 10_000
"""Objects made before garbage is collected; requests make few that are in cycles."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """A flag for every setting."""
    command.description = "Every flag can also be set as DINAT_..., in capitals."
    for name, field in Settings.model_fields.items():
        command.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar=name.upper(), help=field.description)


def run(parsed: argparse.Namespace) -> int:
    """Serve; 0 after a signal."""
    given = {name: value for name in Settings.model_fields if (value := getattr(parsed, name)) is not None}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        raise Refused(explain(error)) from None
    configure_logs(settings.log_format)
    keep_freed_memory()
    engine = Engine(settings)
    server = Server(create_app(settings, engine), engine)
    gc.collect()
    gc.freeze()  # what is imported stays, and need not be looked through again and again
    gc.set_threshold(GC_THRESHOLD)
    server.run()
    if engine.failure is not None:
        raise Refused(f"{settings.model} cannot be served: {engine.failure}")
    return 0 if server.started else 1
