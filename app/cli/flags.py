"""Settings as flags of a command."""

import argparse
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from app.cli import Refused
from app.settings import Settings, explain


def add_settings(command: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """A flag for each of these settings."""
    for name in names:
        description = Settings.model_fields[name].description
        command.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar=name.upper(), help=description)


def read_settings(parsed: argparse.Namespace, names: Iterable[str], **fixed: Any) -> Settings:
    """The settings, from those flags that were given, the environment and .env. Raises Refused."""
    given = {name: value for name in names if (value := getattr(parsed, name)) is not None}
    try:
        return Settings(**given, **fixed)
    except ValidationError as error:
        raise Refused(explain(error)) from None
