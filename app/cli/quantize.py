"""`dinat quantize`: write a checkpoint with an 8-bit graph beside its weights."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dinat.app.cli.flags import Revision, Source
from dinat.app.doctor import forward_rate
from dinat.app.engine.runtimes.selection import load_runtimes
from dinat.app.errors import ServiceError
from dinat.app.images import decode
from dinat.app.settings import Settings
from dinat.model import DinatForImageClassification, DinatImageProcessor
from dinat.model.checkpoints.checkpoint import open_checkpoint
from dinat.model.export import quantize as calibrate

WORTH_IT = 1.1
"""How many times as fast it must be."""


def quantize(
    source: Source,
    pictures: Annotated[
        Path, typer.Argument(metavar="PICTURES", help="Folder of pictures to calibrate with, a few hundred like those to come.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write.")],
    *,
    revision: Revision = None,
) -> None:
    """Write a checkpoint with an 8-bit graph beside its weights, and say what it costs and what it gains on this processor."""
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
        f"{source} written to {folder}. On its {cost.images} pictures the 8-bit graph has the same best "
        f"class for {cost.top1_agreement:.1%}, and logits within {cost.max_difference:.3g}, where the largest is "
        f"{cost.max_logit:.3g}.\n"
        f"Serve it with: dinat serve --model {folder} --precision int8"
    )
    small, usual = (load_runtimes(Settings(model=str(folder), device="cpu", precision=kind))[0] for kind in ("int8", "auto"))
    rates = [float(forward_rate(runtime)["pictures/s"] or 0) for runtime in (small, usual)]
    gain = rates[0] / rates[1]
    print(
        f"Here it computes {rates[0]:.1f} pictures a second, {gain:.2f} times as many as without it "
        f"({usual.name}, {usual.precision}): {'worth it' if gain >= WORTH_IT else 'not worth it on this processor'}."
    )
