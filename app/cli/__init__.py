"""The command `dinat`: one module for each thing it does, imported when it is asked for."""

import argparse
import os
import sys
from importlib import import_module

from model import DinatError

COMMANDS = {
    "serve": "answer HTTP requests",
    "classify": "say what is on pictures on disk",
    "doctor": "see what this machine has, whether it computes rightly, and how fast",
    "convert": "write a checkpoint in the Hub's layout",
    "export": "write a graph for ONNX Runtime, OpenVINO or torch.export",
    "quantize": "write a checkpoint with an 8-bit graph for a CPU",
    "info": "say what is in a checkpoint",
}


class Refused(Exception):
    """What the user got wrong, in one line."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. What the user got wrong ends in one line on standard error."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="dinat", description="Serve, convert and inspect DiNAT image classifiers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about.capitalize() + ".")
        if given[:1] == [name]:
            import_module(f"app.cli.{name}").add_arguments(command)
    parsed = parser.parse_args(given)
    try:
        return int(import_module(f"app.cli.{parsed.command}").run(parsed))
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Refused, DinatError, OSError) as error:
        print(f"dinat: {error}", file=sys.stderr)
        return 1


def run() -> None:
    """Entry point of the console command."""
    sys.exit(main())
