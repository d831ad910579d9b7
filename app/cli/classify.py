"""`dinat classify`: classify images on disk with the service's own engine and batching."""

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from safetensors.numpy import save_file

from dinat.app.api.features import flatten_features
from dinat.app.api.parameters import Parameters
from dinat.app.api.results import predictions
from dinat.app.cli import CommandError, interruptible, print_message, report_skipped
from dinat.app.cli.flags import ENGINE, settings_flags
from dinat.app.cli.progress import progress_bar
from dinat.app.cli.result_writers import Writer, open_writer
from dinat.app.engine.engine import ImageSource
from dinat.app.engine.runtimes.runtime import InferenceResult
from dinat.app.engine.stream import NO_DEADLINE_MS, running_engine, stream_results
from dinat.app.errors import TooLarge
from dinat.app.image_paths import SUFFIXES, Files, list_files, path_text
from dinat.app.logs import configure_logs
from dinat.app.plurals import plural
from dinat.app.settings import Settings
from dinat.model.writing import writing

STDIN = "-"

OutputFormat = Literal["table", "jsonl", "csv"]
MapsFormat = Literal["npz", "safetensors"]


@dataclass(frozen=True)
class FeatureMapOutput:
    """Feature maps to write.

    Attributes:
        names: Comma-separated names of feature maps.
        folder: Output folder.
        file_format: "npz" or "safetensors".
    """

    names: str
    folder: Path
    file_format: str


@settings_flags(ENGINE, deadline_ms=NO_DEADLINE_MS, drain_seconds=0)
def classify(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH",
            help="Files, folders or glob patterns; - reads one image from standard input, up to MAX_UPLOAD_BYTES.",
        ),
    ],
    *,
    top_k: Annotated[
        int | None, typer.Option(help="Number of labels per image. Default: 5, or all if there are fewer.")
    ] = None,
    output: Annotated[OutputFormat, typer.Option(help="Output format.")] = "table",
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write jsonl or csv to a file. If the file exists, images that it lacks or has an error for are added.",
        ),
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Comma-separated feature maps to write: stem, stage1, ..., pooled, hidden_states, logits.",
        ),
    ] = "",
    maps: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Output folder for feature maps, one file per image.")
    ] = None,
    maps_format: Annotated[MapsFormat, typer.Option(help="File format of feature maps.")] = "npz",
    settings: Settings,
) -> None:
    """Classify images on disk.

    The exit status is 1 if an image could not be classified. Such images are listed at the end.
    """
    if to is not None and output == "table":
        raise CommandError("--to writes jsonl or csv: add --output jsonl or --output csv")
    if bool(features) != bool(maps):
        raise CommandError("--features (names of feature maps) and --maps (output folder) require each other")
    files = find_images(paths)
    report_skipped(files.skipped)
    if not files.paths:
        raise CommandError(f"no image in {', '.join(paths)}: supported are {', '.join(SUFFIXES)}")
    configure_logs("auto", logging.WARNING)
    with writing("standard output" if to is None else path_text(to)), open_writer(output, to) as writer:
        remaining = [path for path in files.paths if path_text(path) not in writer.done]
        feature_maps = FeatureMapOutput(features, maps, maps_format) if maps else None
        with interruptible(lambda: _resume_advice(to)):
            succeeded = asyncio.run(_classify(remaining, settings, top_k, feature_maps, writer))
        if not succeeded:
            raise typer.Exit(1)


def _resume_advice(to: Path | None) -> str:
    if to is None:
        return "the results are not complete; with --output jsonl --to FILE, the same command resumes"
    return f"the results so far are in {path_text(to)}; run the same command again to resume"


def find_images(paths: Sequence[str]) -> Files:
    """List each image once, in order: files, images in folders at any depth, and matches of patterns; see list_files.

    Raises:
        CommandError: A file or folder does not exist, or a pattern matches nothing.
    """
    found: dict[str, None] = {}
    skipped: Counter[str] = Counter()
    for argument in paths:
        if argument == STDIN or Path(argument).is_file():  # whatever its suffix
            found[argument] = None
            continue
        try:
            files = list_files(argument)
        except FileNotFoundError as error:
            raise CommandError(str(error)) from None
        images = files.images()
        if not images.paths and not Path(argument).is_dir():  # a pattern for images without a usual suffix
            images = files
        found.update(dict.fromkeys(images.paths))
        skipped += images.skipped
    return Files(list(found), skipped)


async def _classify(
    paths: Sequence[str], settings: Settings, top_k: int | None, feature_maps: FeatureMapOutput | None, writer: Writer
) -> bool:
    """Classify images and write the results. Returns whether all of them succeeded."""
    errors: dict[str, str] = {}
    async with running_engine(settings) as engine:
        config = engine.loaded.config
        options = Parameters(top_k=top_k, features=feature_maps.names if feature_maps else "").options(config)
        read = partial(_read, max_bytes=settings.max_upload_bytes)
        async with progress_bar(stream_results(engine, paths, options, read), len(paths), "classifying") as results:
            async for path, result in results:
                if isinstance(result, str):
                    errors[path] = result
                    writer.write(path, {"error": result})
                else:
                    writer.write(path, {"predictions": predictions(result, config)})
                    if feature_maps is not None:
                        await asyncio.to_thread(_save_feature_maps, result, feature_maps, path)
        writer.close()
    for path, error in errors.items():
        print_message(f"{path_text(path)}: {error}")
    if errors:
        print_message(f"{len(errors)} of {plural(len(paths), 'image')} could not be classified")
    return not errors


async def _read(path: str, max_bytes: int) -> ImageSource:
    """Return the path of an image, or the bytes of standard input, which may have no end. Raises TooLarge."""
    if path != STDIN:
        return Path(path)
    data = sys.stdin.buffer.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise TooLarge(
            f"standard input has more than {max_bytes:,} bytes: save the image to a file, or raise DINAT_MAX_UPLOAD_BYTES"
        )
    return data


def _save_feature_maps(result: InferenceResult, output: FeatureMapOutput, path: str) -> None:
    """Write an image's feature maps to a file with the image's path, below the output folder."""
    arrays = dict(flatten_features(result, "float32"))
    name = "stdin" if path == STDIN else path
    file = output.folder.joinpath(*(part for part in Path(name).parts if part not in ("..", Path(name).anchor)))
    file = file.with_name(f"{file.name}.{output.file_format}")
    file.parent.mkdir(parents=True, exist_ok=True)
    with writing(path_text(file)):
        if output.file_format == "npz":
            np.savez(file, **arrays)  # type: ignore[arg-type]
        else:
            save_file(arrays, file)
