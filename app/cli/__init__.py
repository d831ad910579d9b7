"""The `dinat` command. Each subcommand is a module, imported only when it runs."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated

import typer

from dinat.app.printable_text import printable

COMMANDS = {
    "serve": "Start the HTTP server.",
    "classify": "Classify images on disk.",
    "batch": "Classify millions of images, shard by shard.",
    "evaluate": "Evaluate a checkpoint on labelled images.",
    "train": "Train a classifier on labelled images.",
    "doctor": "Check this machine's hardware, correctness and speed.",
    "convert": "Convert a checkpoint to the Hugging Face Hub layout.",
    "export": "Export a checkpoint to ONNX, OpenVINO or torch.export.",
    "quantize": "Quantize a checkpoint to 8 bits for a CPU.",
    "info": "Print a checkpoint's configuration and size as JSON.",
}


INTERRUPTED_STATUS = 128 + signal.SIGINT


class CommandError(Exception):
    """A user error, printed as one line."""


def print_message(text: str) -> None:
    """Print one line on standard error."""
    print(f"dinat: {printable(text)}", file=sys.stderr, flush=True)


def report_skipped(skipped: Counter[str]) -> None:
    """Print how many files are skipped, and why, on standard error."""
    from dinat.app.image_paths import describe_skipped

    if skipped:
        print_message(describe_skipped(skipped))


@contextmanager
def interruptible(advice: Callable[[], str]) -> Iterator[None]:
    """End the command on Ctrl-C with one line: what is saved, and how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        print_message(f"interrupted: {advice()}")
        raise typer.Exit(INTERRUPTED_STATUS) from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Arguments without the program name; those of the process if None.

    Returns:
        The exit status. A user error is printed as one line on standard error and returns 1, Ctrl-C 130.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    _ensure_home()
    try:
        _application(_command_name(arguments))(arguments, prog_name="dinat")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:  # during the imports; later, Typer exits with the same status
        return INTERRUPTED_STATUS
    except Exception as error:
        from dinat.model import DinatError  # imports PyTorch, which takes two seconds that `dinat --help` saves

        if not isinstance(error, CommandError | DinatError | OSError):
            raise
        print_message(str(error))
        return 1
    raise AssertionError("unreachable: Typer ends by SystemExit")


def _ensure_home() -> None:
    """Set HOME to a folder of this user if there is none: libraries that cache there, such as huggingface_hub, fail without."""
    try:
        Path.home()
    except RuntimeError:  # no HOME, and a user without an entry in passwd, as with docker run --user
        from dinat.model.native import private_folder

        os.environ["HOME"] = str(private_folder() or mkdtemp(prefix="dinat-serve-"))


def run() -> None:
    """Console script entry point."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a label may have characters that the terminal's encoding lacks
    sys.exit(main())


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from dinat import __version__

        print(f"dinat-serve {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of `dinat` itself. A callback also makes Typer require the subcommand's name."""


def _command_name(arguments: list[str]) -> str | None:
    """Return the subcommand's name, also when a shell completes its flags."""
    words = os.environ.get("_TYPER_COMPLETE_ARGS", "").split()[1:] or arguments
    return words[0] if words else None


def _application(selected: str | None) -> typer.Typer:
    """Register all subcommands, and import only the selected one."""
    application = typer.Typer(
        help="Serve, train, convert and inspect DiNAT image classifiers.",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    application.callback()(_options)
    for name, summary in COMMANDS.items():
        command = getattr(import_module(f"dinat.app.cli.{name}"), name) if name == selected else lambda: None
        application.command(name, short_help=summary)(command)
    return application
