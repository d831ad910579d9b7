"""`dinat serve`: answer HTTP requests until a signal says stop."""

import argparse

from pydantic import ValidationError

from app.allocator import keep_freed_memory, keep_little_garbage
from app.cli import Refused
from app.engine.engine import Engine
from app.logs import configure_logs
from app.machine import allow_descriptors
from app.main import create_app
from app.server import Server
from app.settings import Settings, explain
from app.supervisor import ServiceDied, Supervisor, resolve_frontends


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
    allow_descriptors()
    front_ends = resolve_frontends(settings)
    if front_ends > 1:
        try:
            Supervisor(settings, front_ends).run()
        except ServiceDied as reason:
            raise Refused(str(reason)) from None
        return 0
    keep_little_garbage()
    engine = Engine(settings)
    server = Server(create_app(settings, engine), engine)
    server.run()
    if engine.failure is not None:
        raise Refused(f"{settings.model} cannot be served: {engine.failure}")
    return 0 if server.started else 1
