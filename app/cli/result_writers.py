"""Writers of the results of `dinat classify`, as a table, JSON Lines or CSV, and resuming of the latter two."""

import csv
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from dinat.app.cli import CommandError
from dinat.app.cli.plain_text import plain_text
from dinat.app.image_paths import path_text

FLUSH_SECONDS = 0.1


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
