"""What several commands take: checkpoints, and settings as flags."""

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import ValidationError

from app.cli import Refused
from app.settings import Settings, explain

Source = Annotated[str, typer.Argument(metavar="SOURCE", help='Folder, Hub id, original .pth file, or "digits".')]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]


ENGINE = (
    "model",
    "revision",
    "device",
    "runtime",
    "precision",
    "attention",
    "max_batch",
    "cache_dir",
    "decode",
    "max_pixels",
)
"""The settings that are the engine's, not the service's."""


def settings_flags(names: Iterable[str], **fixed: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A flag for each of these settings; the command is called with `settings`: the flags, else the environment, else .env.

    fixed: settings that this command decides itself.  A wrong value ends the command, as Refused.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            flags = {name: value for name in names if (value := given.pop(name)) is not None}
            try:
                settings = Settings(**flags, **fixed)
            except ValidationError as error:
                raise Refused(explain(error)) from None
            command(settings=settings, **given)

        own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "settings"]
        parameters = [*own, *map(_flag, names)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer reads
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _flag(name: str) -> inspect.Parameter:
    field = Settings.model_fields[name]
    choices = "|".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else name.upper()
    option = typer.Option(f"--{name.replace('_', '-')}", metavar=choices, help=field.description, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option])
