"""What several commands take: checkpoints, and settings as flags."""

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dinat.app.cli import Refused
from dinat.app.settings import Settings, explain
from dinat.app.training.recipe import Recipe

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
    return _flags(Settings, "settings", names, explain, fixed, shown=False)


def recipe_flags() -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A flag for each field of a training's recipe; the command is called with `recipe`. A wrong value ends it, as Refused."""
    return _flags(Recipe, "recipe", Recipe.model_fields, _explain_flags, {}, shown=True)


def _flags(
    kind: type[BaseModel],
    to: str,
    names: Iterable[str],
    explain: Callable[[ValidationError], str],
    fixed: dict[str, Any],
    shown: bool,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Flags for fields of a model, which the command then gets whole, under the name `to`. shown: whether help has defaults."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            flags = {name: value for name in names if (value := given.pop(name)) is not None}
            try:
                values = kind(**flags, **fixed)
            except ValidationError as error:
                raise Refused(explain(error)) from None
            command(**{to: values}, **given)

        own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != to]
        parameters = [*own, *(_flag(kind.model_fields[name], name, shown) for name in names)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer reads
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _flag(field: FieldInfo, name: str, shown: bool) -> inspect.Parameter:
    choices = "|".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else name.upper()
    default = str(field.default) if shown and field.default is not None else False
    option = typer.Option(f"--{name.replace('_', '-')}", metavar=choices, help=field.description, show_default=default)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option])


def _explain_flags(error: ValidationError) -> str:
    return explain(error, lambda field: f"--{field.replace('_', '-')} ")
