"""`dinat batch`: the labels of as many pictures as there are, in Parquet."""

import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dinat.app.cli import Refused
from dinat.app.cli.flags import ENGINE, settings_flags
from dinat.app.engine.stream import NO_DEADLINE_MS
from dinat.app.logs import configure_logs
from dinat.app.settings import Settings
from dinat.model.checkpoints.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from dinat.app.batch.run import Done, Job
    from dinat.app.batch.sources import Shard


@settings_flags(ENGINE, deadline_ms=NO_DEADLINE_MS, drain_seconds=0)
def batch(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Pictures: a folder, Parquet or WebDataset tar files, a pattern of them; on disk, s3://, gs://, hf://, ...",
        ),
    ],
    dest: Annotated[str, typer.Argument(metavar="DEST", help="A folder for the results, Parquet files; as SOURCE, anywhere.")],
    *,
    top_k: Annotated[int | None, typer.Option(help="How many labels; 5, or all if fewer, if not given.")] = None,
    features: Annotated[
        str, typer.Option(metavar="NAMES", help="Maps to keep, by comma: stem, stage1, ..., pooled, hidden_states.")
    ] = "",
    feature_dtype: Annotated[Literal["float32", "float16"], typer.Option(help="The maps' numbers.")] = "float32",
    column: Annotated[
        str | None, typer.Option(help="Of Parquet, the column that has the pictures, if it is not plain.")
    ] = None,
    keep: Annotated[str, typer.Option(metavar="COLUMNS", help="Of Parquet, columns to take over, by comma.")] = "",
    shard: Annotated[int, typer.Option(min=1, help="Pictures in a file of the results; a tar file is one.")] = 1000,
    replace: Annotated[bool, typer.Option(help="Compute anew what comes of files that have changed since.")] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Engines; more than one run on Ray, each with a card or its processors.")
    ] = 1,
    settings: Settings,
) -> None:
    """Classify millions of pictures, shard by shard. Say it again to go on where it was stopped.

    Exit status 1 where a shard could not be computed; a picture that cannot be read is a row with an error.
    """
    if find_spec("pyarrow") is None:
        raise Refused("dinat batch wants pyarrow: pip install 'dinat-serve[batch]'")
    if workers > 1 and find_spec("ray") is None:
        raise Refused(f"--workers {workers} wants Ray (pip install 'dinat-serve[ray]'); one worker uses all that a machine has")
    from dinat.app.batch.results import Results
    from dinat.app.batch.run import Job
    from dinat.app.batch.sources import open_source

    configure_logs("auto", logging.WARNING)
    columns = tuple(name.strip() for name in keep.split(",") if name.strip())
    job = Job(settings, source, dest, column, columns, top_k, features, feature_dtype)
    opened = open_source(source, column, columns)
    job.rows(open_checkpoint(settings.model, revision=settings.revision).config, opened)  # which sees what is wrong
    shards = opened.shards(shard)
    left = Results(dest).begin(_asked(job) | {"shard": shard}, shards, replace)
    done = asyncio.run(_compute(job, left, len(shards), workers)) if left else []
    failed = [one for one in done if one.why is not None]
    for one in failed:
        print(f"dinat: shard {one.shard} ({shards[one.shard].files[0]}): {one.why}", file=sys.stderr)
    pictures, bad = sum(one.pictures for one in done), sum(one.failed for one in done)
    already = f"; {len(shards) - len(left)} were there already" if len(left) < len(shards) else ""
    computed = f"{pictures:,} pictures in {len(done) - len(failed)} of {len(shards)} shards"
    print(f"dinat: {computed}{already}; {bad:,} rows have an error", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def _asked(job: "Job") -> dict[str, Any]:
    """What the answers depend on."""
    settings = {name: getattr(job.settings, name) for name in ("model", "revision", "precision", "decode", "max_pixels")}
    return settings | {one.name: getattr(job, one.name) for one in fields(job) if one.name not in ("settings", "dest")}


async def _compute(job: "Job", left: "Sequence[Shard]", shards: int, workers: int) -> "list[Done]":
    """Compute what is left of so many shards, with a bar on a terminal."""
    from dinat.app.batch.run import compute

    done: list[Done] = []
    began = time.monotonic()
    columns = (
        TextColumn("{task.completed:.0f} of {task.total:.0f} shards"),
        BarColumn(),
        TextColumn("{task.fields[pictures]:,} pictures, {task.fields[rate]:.1f} a second"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("", total=shards, completed=shards - len(left), pictures=0, rate=0.0)
        async for one in compute(job, left, workers):
            done.append(one)
            pictures = sum(each.pictures for each in done)
            progress.update(task, advance=1, pictures=pictures, rate=pictures / (time.monotonic() - began))
    return done
