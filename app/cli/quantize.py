"""`dinat quantize`: write a checkpoint with an 8-bit graph beside its weights."""

import argparse
import sys
from pathlib import Path

from app.errors import ServiceError
from app.images import decode
from app.settings import Settings
from model import DinatForImageClassification, DinatImageProcessor
from model.export import quantize


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Source, pictures to calibrate with, destination."""
    command.add_argument("source", help='folder, Hub id, .pth file or "digits"')
    command.add_argument("pictures", type=Path, help="folder of pictures to calibrate with, a few hundred like those to come")
    command.add_argument("destination", type=Path, help="folder to write")
    command.add_argument("--revision", help="branch, tag or commit of a Hub id")


def run(parsed: argparse.Namespace) -> int:
    """Write a checkpoint with an 8-bit graph beside its weights, and say what it costs."""
    pictures = []
    for path in sorted(path for path in parsed.pictures.rglob("*") if path.is_file()):
        try:
            pictures.append(decode(path.read_bytes(), Settings.model_fields["max_pixels"].default))
        except ServiceError as error:
            print(f"dinat: {path} is left out: {error.detail}", file=sys.stderr)
    network = DinatForImageClassification.from_pretrained(parsed.source, revision=parsed.revision)
    processor = DinatImageProcessor.from_pretrained(parsed.source, revision=parsed.revision)
    cost = quantize(network, processor, pictures, parsed.destination)
    network.save_pretrained(parsed.destination)
    processor.save_pretrained(parsed.destination)
    print(
        f"{parsed.source} written to {parsed.destination}. On its {cost.pictures} pictures the 8-bit graph has the same best "
        f"class for {cost.same_top1:.1%}, and logits within {cost.difference:.3g}, where the largest is {cost.largest:.3g}.\n"
        f"Serve it with: dinat serve --model {parsed.destination} --precision int8"
    )
    return 0
