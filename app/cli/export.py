"""`dinat export`: write a checkpoint as a graph."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dinat.app.cli.flags import Revision, Source
from dinat.model import DinatForImageClassification, DinatImageProcessor
from dinat.model.checkpoints.checkpoint import open_checkpoint
from dinat.model.export import export as write
from dinat.model.export import format_of

Format = Literal["onnx", "openvino", "torch-export"]


def _size(text: str) -> tuple[int, int]:
    height, x, width = text.partition("x")
    try:
        sides = int(height), int(width if x else height)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no size: give HEIGHTxWIDTH, such as 224x224") from None
    if min(sides) < 1:
        raise typer.BadParameter(f"{text!r} is no size: both sides must be at least 1")
    return sides


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is no batch: give dynamic, or a number of at least 1")
    return int(text)


def export(
    source: Source,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write: *.onnx, *.xml (and *.bin beside it) or *.pt2.")],
    *,
    file_format: Annotated[Format | None, typer.Option("--format", help="Of the file; by its name if not given.")] = None,
    batch: Annotated[str, typer.Option(metavar="dynamic|N", help="Pictures per call; dynamic for any number.")] = "dynamic",
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Of the input, in pixels; the checkpoint's if not given.")
    ] = None,
    features: Annotated[
        str, typer.Option(metavar="NAMES", help="Maps to give besides logits, by comma: stem, stage1, ..., pooled.")
    ] = "",
    revision: Revision = None,
) -> None:
    """Write a checkpoint as a graph that its runtime opens without this project."""
    count, sides = _batch(batch), None if size is None else _size(size)
    checkpoint = open_checkpoint(source, revision=revision)
    network = DinatForImageClassification.from_pretrained(checkpoint)
    processor = DinatImageProcessor.from_pretrained(checkpoint)
    names = tuple(name.strip() for name in features.split(",") if name.strip())
    difference = write(network, processor, file, file_format or format_of(file), batch=count, size=sides, features=names)
    print(f"{source} written to {file}; its outputs are within {difference:.1e} of PyTorch's")
