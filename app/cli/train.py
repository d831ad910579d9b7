"""`dinat train`: fine-tune a checkpoint, or train its network from random weights, on labelled images."""

import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dinat.app.cli import CommandError, interruptible, print_message
from dinat.app.cli.flags import LabelledData, Revision, recipe_flags, settings_flags
from dinat.app.settings import Settings
from dinat.app.training.recipe import Recipe

REPORTS = {"none": (), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""Packages of which --report-to requires one."""

REQUIRED_PACKAGES = ("accelerate", "matplotlib", "sklearn", "transformers")


@recipe_flags()
@settings_flags(["cache_dir"])
def train(
    data: LabelledData,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder. An interrupted training in it is resumed.")],
    *,
    source: Annotated[
        str,
        typer.Option(
            "--from", metavar="SOURCE", help='Checkpoint to start from: a folder, a Hub id, an original .pth file, or "digits".'
        ),
    ],
    revision: Revision = None,
    validate_on: Annotated[
        Path | None, typer.Option(metavar="DATA", help="Validation data. Default: a fraction of DATA (see --validation).")
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu", help="auto: the first GPU, or one GPU per process of accelerate.")
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Data loading processes. Default: one per CPU core on a GPU, else 0.")
    ] = None,
    max_pixels: Annotated[int, typer.Option(min=1, help="Largest image, width times height.")] = Settings.model_fields[
        "max_pixels"
    ].default,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Train without the images that cannot be read.")] = False,
    report_to: Annotated[
        str, typer.Option(metavar="none|tensorboard|wandb", help="Where to report metrics of each epoch as well.")
    ] = "none",
    settings: Settings,
    recipe: Recipe,
) -> None:
    """Train a classifier on labelled images.

    DATA may contain the folders train (or training) and val (or valid, validation, dev, test, testing, eval, evaluation), in
    upper or lower case, each with one subfolder per label or a metadata.csv or metadata.jsonl, or may be a table with a column
    split of these names, a column is_valid (true or false), or paths in such folders. All images are checked before the
    training starts.

    OUT is a checkpoint in the Hugging Face Hub layout with a model card. It always contains the best weights so far. To resume
    an interrupted training, run the same command again: the resulting weights are the same as without the interruption. To
    continue a finished training, run it with more --epochs.

    To train on several GPUs: accelerate launch -m dinat train ...
    """
    missing = [name for name in REQUIRED_PACKAGES if find_spec(name) is None]
    if missing:
        raise CommandError(f"dinat train requires {', '.join(missing)}: pip install 'dinat-serve[train]'")
    if device not in ("auto", "cpu"):
        raise CommandError(f"--device must be auto or cpu, got {device!r}; CUDA_VISIBLE_DEVICES selects GPUs")
    if report_to not in REPORTS:
        raise CommandError(f"--report-to must be none, tensorboard or wandb, got {report_to!r}")
    if report_to != "none" and not any(find_spec(name) for name in REPORTS[report_to]):
        raise CommandError(f"--report-to {report_to} requires {report_to}: pip install {report_to}")
    from dinat.app.training.spec import TrainingSpec
    from dinat.app.training.train import train as run

    is_main = os.environ.get("RANK", "0") == "0"  # the first of accelerate's processes
    with (
        interruptible(lambda: _resume_advice(out)),
        Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress,
    ):
        result = run(
            TrainingSpec(source, revision, data, validate_on, out, recipe, max_pixels),
            device=device,
            workers=workers,
            skip_broken=skip_broken,
            cache_dir=settings.cache_dir,
            report_to=report_to,
            report=lambda line: print_message(line) if is_main else None,
            progress=progress,
        )
    saved = result.saved_epoch
    table = Table("saved epoch", "top-1", "top-5", "macro-F1", "loss", "images/s")
    table.add_row(
        f"{saved.epoch} of {len(result.history.epochs)}",
        f"{saved.top1:.2%}",
        f"{saved.top5:.2%}",
        f"{saved.macro_f1:.2%}",
        f"{saved.loss:.4f}",
        f"{result.images_per_second:.1f}",
    )
    if is_main:
        Console().print(table)
        print_message(f"the network is in {out}: dinat serve --model {shlex.quote(str(out))}")


def _resume_advice(out: Path) -> str:
    saved = f"the network so far is in {out}" if (out / "model.safetensors").exists() else "no epoch is complete yet"
    return f"{saved}; run the same command again to resume"
