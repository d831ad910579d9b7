"""`dinat classify`: classify images on disk with the service's own engine and batching."""

import asyncio
import csv
import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Any, Literal, TextIO

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from dinat.app.api.features import flatten_features
from dinat.app.api.parameters import Parameters
from dinat.app.api.results import predictions
from dinat.app.cli import CommandError, interruptible, print_message, report_skipped
from dinat.app.cli.flags import ENGINE, settings_flags
from dinat.app.cli.plain_text import plain_text
from dinat.app.cli.progress import progress_bar
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
FLUSH_SECONDS = 0.1

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
    paths: Sequence[str], settings: Settings, top_k: int | None, feature_maps: FeatureMapOutput | None, writer: "Writer"
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


class Writer:
    """Writes one result per image.

    Attributes:
        done: Paths of images whose results an earlier run wrote.
    """

    def __init__(self, stream: TextIO, done: frozenset[str] = frozenset()) -> None:
        self.stream, self.done = stream, done
        self._flushed = 0.0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream is not sys.stdout:
            self.stream.close()

    def write(self, path: str, result: Mapping[str, Any]) -> None:
        """Write the result of an image: {"predictions": [...]} or {"error": ...}."""
        raise NotImplementedError

    def flush(self) -> None:
        """Flush at most every FLUSH_SECONDS, so that an interrupted run can be resumed."""
        if time.monotonic() > self._flushed + FLUSH_SECONDS:
            self.stream.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Finish the output after the last result."""
        self.stream.flush()


class JsonLinesWriter(Writer):
    """Writes {"path": ..., "predictions": [...]} or {"path": ..., "error": ...} per line."""

    def write(self, path: str, result: Mapping[str, Any]) -> None:
        """See Writer."""
        row = (
            {"predictions": [{**prediction, "score": float(prediction["score"])} for prediction in result["predictions"]]}
            if "error" not in result
            else result
        )
        self.stream.write(json.dumps({"path": path_text(path), **row}) + "\n")
        self.flush()


class CsvWriter(Writer):
    """Writes path, error, then label and score of each prediction."""

    def write(self, path: str, result: Mapping[str, Any]) -> None:
        """See Writer."""
        columns = [
            value
            for prediction in result.get("predictions", ())
            for value in (prediction["label"], f"{prediction['score']:.6g}")
        ]
        csv.writer(self.stream, lineterminator="\n").writerow([path_text(path), result.get("error", ""), *columns])
        self.flush()


class TableWriter(Writer):
    """Prints a table after the last result."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._table = Table("image", "labels")

    def write(self, path: str, result: Mapping[str, Any]) -> None:
        """See Writer."""
        labels = (f"{prediction['label']} {prediction['score']:.3f}" for prediction in result.get("predictions", ()))
        cells = (path_text(path), result.get("error") or ", ".join(labels))
        self._table.add_row(*(plain_text(cell) for cell in cells))

    def close(self) -> None:
        """See Writer."""
        Console(file=self.stream, width=None if self.stream.isatty() else 200).print(self._table)


def open_writer(output: str, to: Path | None) -> Writer:
    """Open the output. An existing file is resumed: its last line, if it is incomplete, and rows with an error are removed.

    Args:
        output: "table", "jsonl" or "csv".
        to: File to write; standard output if None.

    Raises:
        CommandError: The file exists and has other content.
    """
    if output == "table":
        return TableWriter(sys.stdout)
    writer_type = JsonLinesWriter if output == "jsonl" else CsvWriter
    if to is None:
        return writer_type(sys.stdout)
    read = _read_json_lines if output == "jsonl" else _read_csv
    done = _remove_unfinished(to.resolve(), read, output) if to.is_file() else ()
    return writer_type(to.open("a", encoding="utf-8", newline=""), frozenset(done))


Record = tuple[str, bool, str]
"""A record of an output file: the path of its image, whether it has an error, and its text."""


def _remove_unfinished(file: Path, read: Callable[[TextIO], Iterator[Record]], output: str) -> list[str]:
    """Rewrite an output file without incomplete records and those with an error. Returns the paths of the others."""
    done = []
    with NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}.", encoding="utf-8", newline="", delete=False) as new:
        try:
            with file.open(encoding="utf-8", newline="") as old:
                for path, is_error, text in read(old):
                    if not is_error:
                        new.write(text)
                        done.append(path)
            new.close()
            shutil.copymode(file, new.name)
            os.replace(new.name, file)
        except BaseException as error:
            os.unlink(new.name)
            if isinstance(error, ValueError | KeyError | TypeError | IndexError | csv.Error):
                raise CommandError(f"{file} exists and is not {output} output of dinat classify: use another file") from None
            raise
    return done


def _read_json_lines(stream: TextIO) -> Iterator[Record]:
    for line in stream:
        if not line.endswith("\n"):
            return
        row = json.loads(line)
        yield row["path"], "error" in row, line


def _read_csv(stream: TextIO) -> Iterator[Record]:
    lines: list[str] = []

    def read_lines() -> Iterator[str]:
        for line in stream:
            lines.append(line)
            yield line

    records = csv.reader(read_lines(), strict=True)
    while True:
        lines.clear()
        try:
            row = next(records, None)
        except csv.Error:
            if next(stream, None) is None:  # the file ends within quotes
                return
            raise
        if row is None or not lines[-1].endswith("\n"):
            return
        if bool(row[1]) == bool(row[2:]):
            raise ValueError("neither labels nor an error")
        yield row[0], bool(row[1]), "".join(lines)
