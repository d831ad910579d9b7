"""`dinat train`: fine-tune a checkpoint, or train a network of its kind from the start, on labelled pictures."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dinat.app.cli import Refused
from dinat.app.cli.flags import Revision, recipe_flags
from dinat.app.settings import Settings
from dinat.app.training.recipe import Recipe

NEEDED = ("accelerate", "matplotlib", "sklearn", "transformers")


@recipe_flags()
def train(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A folder of folders, or a .csv or .jsonl file with path and label.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write; one that a stopped training left is gone on with.")
    ],
    *,
    source: Annotated[str, typer.Option("--from", metavar="SOURCE", help='Folder, Hub id, original .pth file, or "digits".')],
    revision: Revision = None,
    validate_on: Annotated[
        Path | None, typer.Option(metavar="DATA", help="Labelled pictures to validate on, rather than a share of DATA.")
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu", help="auto: the first card, or those of accelerate's processes.")
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that prepare pictures; one a core beside a card, else none.")
    ] = None,
    max_pixels: Annotated[int, typer.Option(min=1, help="Largest picture, width times height.")] = Settings.model_fields[
        "max_pixels"
    ].default,
    recipe: Recipe,
) -> None:
    """Train a classifier on labelled pictures. OUT is a checkpoint in the Hub's layout, with a model card.

    The best weights so far are always whole in OUT. Said again after it was stopped, it goes on, to the same weights.
    On several cards: accelerate launch -m dinat train ...
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise Refused(f"training wants {', '.join(missing)}, not installed: pip install 'dinat-serve[train]'")
    if device not in ("auto", "cpu"):
        raise Refused(f"--device is auto or cpu, got {device!r}; CUDA_VISIBLE_DEVICES says which cards are seen")
    from dinat.app.training.run import train as run
    from dinat.app.training.task import Task

    speaks = os.environ.get("RANK", "0") == "0"  # of accelerate's processes the first one
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        trained = run(
            Task(source, revision, data, validate_on, out, recipe, max_pixels),
            device=device,
            workers=workers,
            say=lambda line: print(f"dinat: {line}", file=sys.stderr, flush=True) if speaks else None,
            bar=bar,
        )
    kept = trained.kept
    table = Table("kept epoch", "top-1", "top-5", "loss", "pictures/s", "folder")
    table.add_row(
        f"{kept.epoch} of {len(trained.progress.epochs)}",
        f"{kept.top1:.2%}",
        f"{kept.top5:.2%}",
        f"{kept.loss:.4f}",
        f"{trained.pictures_per_second:.1f}",
        str(out),
    )
    if speaks:
        Console().print(table)
