"""The command `dinat`: one module for each thing it does, imported when it is asked for."""

import os
import sys
from importlib import import_module

import typer

COMMANDS = {
    "serve": "InferenceResult HTTP requests.",
    "classify": "Say what is on pictures on disk.",
    "batch": "Classify millions of pictures, shard by shard.",
    "evaluate": "Say how good a checkpoint is on labelled pictures.",
    "train": "Train a classifier on labelled pictures.",
    "doctor": "See what this machine has, whether it computes rightly, and how fast.",
    "convert": "Write a checkpoint in the Hub's layout.",
    "export": "Write a graph for ONNX Runtime, OpenVINO or torch.export.",
    "quantize": "Write a checkpoint with an 8-bit graph for a CPU.",
    "info": "Say what is in a checkpoint.",
}


class Refused(Exception):
    """What the user got wrong, in one line."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. What the user got wrong ends in one line on standard error."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        _application(_asked(given))(given, prog_name="dinat")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:
        from dinat.model import DinatError  # with which PyTorch comes: two seconds that `dinat --help` need not take

        if not isinstance(error, Refused | DinatError | OSError):
            raise
        print(f"dinat: {error}", file=sys.stderr)
        return 1
    raise AssertionError("unreachable: Typer ends by SystemExit")


def run() -> None:
    """Entry point of the console command."""
    sys.exit(main())


def _asked(given: list[str]) -> str | None:
    """The command that is asked for, also by a shell that wants its flags completed."""
    words = os.environ.get("_TYPER_COMPLETE_ARGS", "").split()[1:] or given
    return words[0] if words else None


def _application(asked: str | None) -> typer.Typer:
    """All commands, of which one is imported."""
    application = typer.Typer(
        help="Serve, convert and inspect DiNAT image classifiers.",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    application.callback()(lambda: None)  # commands have names, also were there but one
    for name, about in COMMANDS.items():
        command = getattr(import_module(f"dinat.app.cli.{name}"), name) if name == asked else lambda: None
        application.command(name, short_help=about)(command)
    return application
