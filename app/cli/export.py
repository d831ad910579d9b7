"""`dinat export`: export a checkpoint to ONNX, OpenVINO or torch.export."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dinat.app.cli.flags import Revision, Source
from dinat.app.threads import limit_threads
from dinat.model import DinatForImageClassification, DinatImageProcessor
from dinat.model.checkpoints.checkpoint import open_checkpoint
from dinat.model.export import export as write
from dinat.model.export import format_of

Format = Literal["onnx", "openvino", "torch-export"]


def _parse_size(text: str) -> tuple[int, int] | Literal["dynamic"]:
    if text == "dynamic":
        return "dynamic"
    height, x, width = text.partition("x")
    try:
        size = int(height), int(width if x else height)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a size: use HEIGHTxWIDTH, such as 224x224, or dynamic") from None
    if min(size) < 1:
        raise typer.BadParameter(f"{text!r} is not a size: both sides must be at least 1")
    return size


def _parse_batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is not a batch size: use dynamic or an integer of at least 1")
    return int(text)


def export(
    source: Source,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Output file: *.onnx, *.xml (with *.bin beside it) or *.pt2.")],
    *,
    file_format: Annotated[Format | None, typer.Option("--format", help="File format. Default: from the name of FILE.")] = None,
    batch: Annotated[str, typer.Option(metavar="dynamic|N", help="Images per call; dynamic accepts any number.")] = "dynamic",
    size: Annotated[
        str | None,
        typer.Option(metavar="HxW|dynamic", help="Input size in pixels; dynamic accepts any. Default: the checkpoint's."),
    ] = None,
    opset: Annotated[
        int | None, typer.Option(metavar="N", help="ONNX: version of the operators, 18 or later, for older runtimes.")
    ] = None,
    features: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Comma-separated feature maps to output besides logits: stem, stage1, ..., pooled."),
    ] = "",
    revision: Revision = None,
) -> None:
    """Export a checkpoint as a graph that ONNX Runtime, OpenVINO or PyTorch runs without this package."""
    batch_size, input_size = _parse_batch(batch), None if size is None else _parse_size(size)
    limit_threads()
    checkpoint = open_checkpoint(source, revision=revision)
    network = DinatForImageClassification.from_pretrained(checkpoint)
    processor = DinatImageProcessor.from_pretrained(checkpoint)
    names = tuple(name.strip() for name in features.split(",") if name.strip())
    difference = write(
        network, processor, file, file_format or format_of(file), batch=batch_size, size=input_size, features=names, opset=opset
    )
    print(f"{source} written to {file}; largest relative difference from PyTorch's outputs: {difference:.1e}")
