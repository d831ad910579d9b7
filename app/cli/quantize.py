"""`dinat quantize`: write a checkpoint with an 8-bit graph beside its weights."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from app.cli.flags import Revision, Source
from app.errors import ServiceError
from app.images import decode
from app.settings import Settings
from model import DinatForImageClassification, DinatImageProcessor
from model.checkpoint import open_checkpoint
from model.export import quantize as calibrate


def quantize(
    source: Source,
    pictures: Annotated[
        Path, typer.Argument(metavar="PICTURES", help="Folder of pictures to calibrate with, a few hundred like those to come.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write.")],
    *,
    revision: Revision = None,
) -> None:
    """Write a checkpoint with an 8-bit graph beside its weights, and say what it costs."""
    examples = []
    for path in sorted(path for path in pictures.rglob("*") if path.is_file()):
        try:
            examples.append(decode(path.read_bytes(), Settings.model_fields["max_pixels"].default))
        except ServiceError as error:
            print(f"dinat: {path} is left out: {error.detail}", file=sys.stderr)
    checkpoint = open_checkpoint(source, revision=revision)
    network = DinatForImageClassification.from_pretrained(checkpoint)
    processor = DinatImageProcessor.from_pretrained(checkpoint)
    cost = calibrate(network, processor, examples, folder)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    print(
        f"{source} written to {folder}. On its {cost.pictures} pictures the 8-bit graph has the same best "
        f"class for {cost.same_top1:.1%}, and logits within {cost.difference:.3g}, where the largest is {cost.largest:.3g}.\n"
        f"Serve it with: dinat serve --model {folder} --precision int8"
    )
