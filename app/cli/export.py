"""`dinat export`: write a checkpoint as a graph."""

import argparse
from pathlib import Path

from model import DinatForImageClassification, DinatImageProcessor
from model.export import FORMATS, export, format_of


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Source, file, and the graph's shape and outputs."""
    command.add_argument("source", help='folder, Hub id, .pth file or "digits"')
    command.add_argument("file", type=Path, help="file to write: *.onnx, *.xml (and *.bin beside it) or *.pt2")
    command.add_argument("--format", choices=FORMATS, help="of the file; by its name if not given")
    command.add_argument("--batch", type=_batch, default=None, metavar="dynamic|N", help="pictures per call; dynamic for any")
    command.add_argument("--size", type=_size, metavar="HxW", help="of the input, in pixels; the checkpoint's if not given")
    command.add_argument(
        "--features", type=_names, default=(), help="comma list of maps to give besides logits: stem, stage1, ..., pooled"
    )
    command.add_argument("--revision", help="branch, tag or commit of a Hub id")


def run(parsed: argparse.Namespace) -> int:
    """Write a checkpoint as a graph that its runtime opens without this project."""
    file_format = parsed.format or format_of(parsed.file)
    network = DinatForImageClassification.from_pretrained(parsed.source, revision=parsed.revision)
    processor = DinatImageProcessor.from_pretrained(parsed.source, revision=parsed.revision)
    difference = export(
        network, processor, parsed.file, file_format, batch=parsed.batch, size=parsed.size, features=parsed.features
    )
    print(f"{parsed.source} written to {parsed.file}; its outputs are within {difference:.1e} of PyTorch's")
    return 0


def _size(text: str) -> tuple[int, int]:
    height, x, width = text.partition("x")
    try:
        sides = int(height), int(width if x else height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give HEIGHTxWIDTH, such as 224x224") from None
    if min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: both sides must be at least 1")
    return sides


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no batch: give dynamic, or a number of at least 1")
    return int(text)
