"""Arguments and flags that several commands share: checkpoints, settings and recipe fields."""

import inspect
import os
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dinat.app.cli import CommandError, print_message
from dinat.app.settings import Settings, explain, misspelt_variables
from dinat.app.training.recipe import Recipe

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help='Checkpoint: a folder, a Hub id, an original .pth file, or "digits".')
]
LabelledData = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="Folder with one subfolder of images per label, or a .csv, .tsv or .jsonl file with path and label.",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]

Command = Callable[..., None]

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
"""Settings of the engine, as opposed to the HTTP service."""


def settings_flags(names: Iterable[str], **fixed: Any) -> Callable[[Command], Command]:
    """Add a flag for each of these settings. A flag overrides the environment, which overrides .env.

    Args:
        names: Fields of Settings.
        fixed: Settings whose value the command fixes.

    Returns:
        A decorator. The command receives `settings`. Raises CommandError for an invalid value.
    """
    return _flags(Settings, "settings", names, explain, fixed, show_defaults=False, before=_report_misspelt_variables)


def recipe_flags() -> Callable[[Command], Command]:
    """Add a flag for each field of a training recipe.

    Returns:
        A decorator. The command receives `recipe`. Raises CommandError for an invalid value.
    """
    return _flags(Recipe, "recipe", Recipe.model_fields, _explain_flags, {}, show_defaults=True)


def _flags(
    model: type[BaseModel],
    parameter: str,
    names: Iterable[str],
    explain: Callable[[ValidationError], str],
    fixed: dict[str, Any],
    show_defaults: bool,
    before: Callable[[], None] = lambda: None,
) -> Callable[[Command], Command]:
    """Call `before`, then the command with the model instance as `parameter`; it has a flag for each named field."""

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**arguments: Any) -> None:
            before()
            flags = {name: value for name in names if (value := arguments.pop(name)) is not None}
            try:
                values = model(**flags, **fixed)
            except ValidationError as error:
                raise CommandError(explain(error)) from None
            except UnicodeDecodeError as error:
                raise CommandError(f".env is not UTF-8 ({error.reason}): save it as UTF-8") from None
            command(**{parameter: values}, **arguments)

        own = [value for name, value in inspect.signature(command).parameters.items() if name != parameter]
        parameters = [*own, *(_flag(model.model_fields[name], name, show_defaults) for name in names)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by Typer
        run.__annotations__ = {value.name: value.annotation for value in parameters}
        return run

    return decorate


def _flag(field: FieldInfo, name: str, show_default: bool) -> inspect.Parameter:
    metavar = "|".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else name.upper()
    if show_default and field.annotation is bool:
        switch = Annotated[bool | None, typer.Option(f"--{name.replace('_', '-')}", help=field.description)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=switch)
    default = str(field.default) if show_default and field.default is not None else False
    option = typer.Option(f"--{name.replace('_', '-')}", metavar=metavar, help=field.description, show_default=default)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option])


def _report_misspelt_variables() -> None:
    for name, setting in misspelt_variables(os.environ).items():
        print_message(f"{name} is not a setting: did you mean {setting}?")


def _explain_flags(error: ValidationError) -> str:
    return explain(error, lambda field: f"--{field.replace('_', '-')} ")
