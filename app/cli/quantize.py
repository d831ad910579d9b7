"""`dinat quantize`: quantize a checkpoint to 8 bits for a CPU."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from dinat.app.cli import print_message, report_skipped
from dinat.app.cli.flags import Revision, Source
from dinat.app.engine.runtimes.selection import load_runtimes
from dinat.app.errors import ServiceError
from dinat.app.image_paths import list_files, path_text
from dinat.app.images import decode, read_file
from dinat.app.measurements import WarmRuntime, forward_rates
from dinat.app.settings import Settings
from dinat.app.threads import limit_threads
from dinat.model import DinatForImageClassification, DinatImageProcessor
from dinat.model.checkpoints.checkpoint import open_checkpoint
from dinat.model.quantization import quantize as calibrate

MIN_SPEEDUP = 1.1
"""Speedup over the unquantized network from which quantization is recommended."""

MAX_SPREAD = 1.5
"""Ratio of the largest to the smallest speedup up to which there is a recommendation."""


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
    limit_threads()
    examples = []
    found = list_files(str(images)).images()
    report_skipped(found.skipped)
    for path in found.paths:
        try:
            examples.append(decode(read_file(Path(path)), Settings.model_fields["max_pixels"].default))
        except ServiceError as error:
            print_message(f"{path_text(path)} is skipped: {error.detail}")
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
    compared = [
        WarmRuntime.of(load_runtimes(Settings(model=str(folder), device="cpu", precision=kind))[0]) for kind in ("int8", "auto")
    ]
    int8, default = forward_rates(compared)
    speedups = [fast / slow for fast, slow in zip(int8, default, strict=True)]
    runtime = compared[1].runtime
    print(
        f"On this CPU it processes {median(int8):.1f} images/s, {median(speedups):.2f} times as many as {runtime.name} in "
        f"{runtime.precision} ({min(speedups):.2f} to {max(speedups):.2f} in {len(speedups)} rounds, in turns): "
        f"{verdict(speedups)}."
    )


def verdict(speedups: Sequence[float]) -> str:
    """Return whether quantization is recommended, by the speedup over the unquantized network in each round."""
    if max(speedups) > MAX_SPREAD * min(speedups) or min(speedups) < MIN_SPEEDUP <= max(speedups):
        return "no recommendation, the rounds differ too much: repeat it while nothing else runs"
    return "recommended" if min(speedups) >= MIN_SPEEDUP else "not recommended on this CPU"
