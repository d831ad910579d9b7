"""`dinat quantize`: quantize a checkpoint to 8 bits for a CPU."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dinat.app.cli import report_skipped
from dinat.app.cli.flags import Revision, Source
from dinat.app.doctor import forward_rate
from dinat.app.engine.runtimes.selection import load_runtimes
from dinat.app.errors import ServiceError
from dinat.app.image_paths import list_files, path_text
from dinat.app.images import decode, read_file
from dinat.app.settings import Settings
from dinat.model import DinatForImageClassification, DinatImageProcessor
from dinat.model.checkpoints.checkpoint import open_checkpoint
from dinat.model.export import quantize as calibrate

MIN_SPEEDUP = 1.1
"""Speedup over the unquantized network from which quantization is recommended."""


def quantize(
    source: Source,
    images: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGES", help="Folder of calibration images: a few hundred, similar to those to be classified."
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Output folder.")],
    *,
    revision: Revision = None,
) -> None:
    """Write a checkpoint with an 8-bit graph beside its weights, and print the change in accuracy and speed on this CPU."""
    examples = []
    found = list_files(str(images)).images()
    report_skipped(found.skipped)
    for path in found.paths:
        try:
            examples.append(decode(read_file(Path(path)), Settings.model_fields["max_pixels"].default))
        except ServiceError as error:
            print(f"dinat: {path_text(path)} is skipped: {error.detail}", file=sys.stderr)
    checkpoint = open_checkpoint(source, revision=revision)
    network = DinatForImageClassification.from_pretrained(checkpoint)
    processor = DinatImageProcessor.from_pretrained(checkpoint)
    cost = calibrate(network, processor, examples, folder)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    print(
        f"{source} written to {folder}. On {cost.images} calibration images, the 8-bit graph predicts the same top class for "
        f"{cost.top1_agreement:.1%}; its logits, up to {cost.max_logit:.3g}, differ by at most {cost.max_difference:.3g}.\n"
        f"Serve it with: dinat serve --model {folder} --precision int8"
    )
    int8, default = (load_runtimes(Settings(model=str(folder), device="cpu", precision=kind))[0] for kind in ("int8", "auto"))
    rates = [float(forward_rate(runtime)["images/s"] or 0) for runtime in (int8, default)]
    speedup = rates[0] / rates[1]
    verdict = "recommended" if speedup >= MIN_SPEEDUP else "not recommended on this CPU"
    print(
        f"On this CPU it processes {rates[0]:.1f} images/s, {speedup:.2f} times as many as "
        f"{default.name} in {default.precision}: {verdict}."
    )
