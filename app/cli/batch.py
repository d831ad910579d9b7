"""`dinat batch`: classify any number of images and write the results as Parquet."""

import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dinat.app.cli import CommandError, interruptible, print_message, report_skipped
from dinat.app.cli.flags import ENGINE, settings_flags
from dinat.app.engine.stream import NO_DEADLINE_MS
from dinat.app.image_paths import path_text
from dinat.app.logs import configure_logs
from dinat.app.plurals import plural
from dinat.app.settings import Settings
from dinat.model.checkpoints.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from dinat.app.batch.run import BatchSpec, ShardResult
    from dinat.app.batch.sources import Shard


@settings_flags(ENGINE, deadline_ms=NO_DEADLINE_MS, drain_seconds=0)
def batch(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Images: a folder, Parquet files, WebDataset tar files, or a glob pattern of these; a local path or a URL "
            "(s3://, gs://, hf://, ...).",
        ),
    ],
    dest: Annotated[
        str, typer.Argument(metavar="DEST", help="Output folder for Parquet files; a local path or a URL, like SOURCE.")
    ],
    *,
    top_k: Annotated[
        int | None, typer.Option(help="Number of labels per image. Default: 5, or all if there are fewer.")
    ] = None,
    features: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Comma-separated feature maps to write: stem, stage1, ..., pooled, hidden_states."),
    ] = "",
    feature_dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Data type of feature maps.")] = "float32",
    column: Annotated[
        str | None, typer.Option(help="Parquet column with the images. Default: detected from names and types.")
    ] = None,
    keep: Annotated[str, typer.Option(metavar="COLUMNS", help="Comma-separated Parquet columns to copy to the results.")] = "",
    shard: Annotated[int, typer.Option(min=1, help="Images per output file. A tar file is always one shard.")] = 1000,
    replace: Annotated[bool, typer.Option(help="Recompute results whose source files have changed or are gone.")] = False,
    workers: Annotated[
        int,
        typer.Option(min=1, help="Number of engines. Several run on Ray, each with a GPU or a share of the CPU cores."),
    ] = 1,
    settings: Settings,
) -> None:
    """Classify millions of images, shard by shard. To resume an interrupted job, run the same command again.

    The exit status is 1 if a shard failed. An image that cannot be read is a row with an error.
    """
    if find_spec("pyarrow") is None:
        raise CommandError("dinat batch requires pyarrow: pip install 'dinat-serve[batch]'")
    if workers > 1 and find_spec("ray") is None:
        raise CommandError(
            f"--workers {workers} requires Ray: pip install 'dinat-serve[ray]'. One worker uses the whole machine"
        )
    from dinat.app.batch.results import Results
    from dinat.app.batch.run import BatchSpec
    from dinat.app.batch.sources import open_source

    if f"{_absolute(dest)}/".startswith(f"{_absolute(source)}/"):
        raise CommandError(f"{dest} is inside {source}, whose files are classified: use another folder for the results")
    configure_logs("auto", logging.WARNING)
    columns = tuple(name.strip() for name in keep.split(",") if name.strip())
    spec = BatchSpec(settings, source, dest, column, columns, top_k, features, feature_dtype)
    images = open_source(source, column, columns)
    report_skipped(images.skipped)
    spec.rows(open_checkpoint(settings.model, revision=settings.revision).config, images)  # validates the arguments
    shards = images.shards(shard)
    remaining = Results(dest).prepare(_parameters(spec) | {"shard": shard}, shards, replace)
    with interruptible(lambda: "run the same command again to resume"):
        results = asyncio.run(_run(spec, remaining, len(shards), workers)) if remaining else []
    failed = [result for result in results if result.error is not None]
    for result in failed:
        print_message(f"shard {result.shard} ({path_text(shards[result.shard].files[0])}): {result.error}")
    num_images, num_errors = sum(result.num_images for result in results), sum(result.num_errors for result in results)
    skipped = f", {len(shards) - len(remaining)} done before" if len(remaining) < len(shards) else ""
    done = f"{plural(num_images, 'image')} in {len(results) - len(failed):,} of {plural(len(shards), 'shard')}"
    print_message(f"{done}{skipped}; {plural(num_errors, 'row has', 'rows have')} an error")
    if failed:
        raise typer.Exit(1)


def _absolute(url: str) -> str:
    return url.rstrip("/") if "://" in url else str(Path(url).resolve())


def _parameters(spec: "BatchSpec") -> dict[str, Any]:
    """Return everything that the results depend on."""
    settings = {name: getattr(spec.settings, name) for name in ("model", "revision", "precision", "decode", "max_pixels")}
    return settings | {
        field.name: getattr(spec, field.name) for field in fields(spec) if field.name not in ("settings", "dest")
    }


async def _run(spec: "BatchSpec", remaining: "Sequence[Shard]", total: int, workers: int) -> "list[ShardResult]":
    """Run the remaining shards of a total, with a progress bar if standard error is a terminal."""
    from dinat.app.batch.run import run_shards

    results: list[ShardResult] = []
    start = time.monotonic()
    columns = (
        TextColumn("{task.completed:.0f} of {task.total:.0f} shards"),
        BarColumn(),
        TextColumn("{task.fields[images]:,} images, {task.fields[rate]:.1f} images/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("", total=total, completed=total - len(remaining), images=0, rate=0.0)
        async for result in run_shards(spec, remaining, workers):
            results.append(result)
            num_images = sum(done.num_images for done in results)
            progress.update(task, advance=1, images=num_images, rate=num_images / (time.monotonic() - start))
    return results
