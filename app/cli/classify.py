"""`dinat classify`: the best labels of pictures on disk, by the service's own engine and batches."""

import asyncio
import csv
import glob
import io
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from dinat.app.api.features import flatten_features
from dinat.app.api.parameters import Parameters
from dinat.app.api.results import predictions
from dinat.app.cli import Refused
from dinat.app.cli.flags import ENGINE, settings_flags
from dinat.app.cli.progress import with_bar
from dinat.app.engine.engine import ImageSource
from dinat.app.engine.runtimes.runtime import InferenceResult
from dinat.app.engine.stream import NO_DEADLINE_MS, running_engine, stream_results
from dinat.app.images import SUFFIXES
from dinat.app.logs import configure_logs
from dinat.app.settings import Settings

STDIN = "-"

Output = Literal["table", "jsonl", "csv"]
MapsFormat = Literal["npz", "safetensors"]


@dataclass(frozen=True)
class Maps:
    """Which maps to keep, by comma, and where and how."""

    names: str
    folder: Path
    kind: str


@settings_flags(ENGINE, deadline_ms=NO_DEADLINE_MS, drain_seconds=0)
def classify(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH", help="Files, folders, patterns, or - for one picture on standard input.")
    ],
    *,
    top_k: Annotated[int | None, typer.Option(help="How many labels; 5, or all if fewer, if not given.")] = None,
    output: Annotated[Output, typer.Option(help="How to write the labels.")] = "table",
    to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write jsonl or csv there, and go on where it stops already.")
    ] = None,
    features: Annotated[
        str, typer.Option(metavar="NAMES", help="Maps to keep, by comma: stem, stage1, ..., pooled, hidden_states, logits.")
    ] = "",
    maps: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the maps go, a file for each picture.")] = None,
    maps_format: Annotated[MapsFormat, typer.Option(help="How to write the maps.")] = "npz",
    settings: Settings,
) -> None:
    """Say what is on pictures on disk. Exit status 1 where a picture could not be classified; those are listed at the end."""
    if to is not None and output == "table":
        raise Refused("--to keeps jsonl or csv: say --output jsonl")
    if bool(features) != bool(maps):
        raise Refused("--features says which maps, --maps where they go: one wants the other")
    files = list(found(paths))
    if not files:
        raise Refused(f"no picture in {', '.join(paths)}: read are {', '.join(SUFFIXES)}")
    configure_logs("auto", logging.WARNING)
    with writer(output, to) as out:
        left = [path for path in files if path not in out.done]
        if not asyncio.run(_classify(left, settings, top_k, Maps(features, maps, maps_format) if maps else None, out)):
            raise typer.Exit(1)


def found(paths: Sequence[str]) -> Iterator[str]:
    """Files named, those in folders, at any depth, and those that patterns match; each once, in order."""
    seen: set[str] = set()
    for given in paths:
        path = Path(given)
        if given == STDIN or path.is_file():
            several = [given]
        elif path.is_dir():
            several = sorted(str(one) for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file())
        else:
            several = sorted(one for one in glob.glob(given, recursive=True) if Path(one).is_file())
            if not several:
                raise Refused(f"{given} is not there")
        for one in several:
            if one not in seen:
                seen.add(one)
                yield one


async def _classify(paths: Sequence[str], settings: Settings, top_k: int | None, maps: Maps | None, out: "Writer") -> bool:
    """Whether every picture was."""
    failed: dict[str, str] = {}
    async with running_engine(settings) as engine:
        config = engine.loaded.config
        wanted = Parameters(top_k=top_k, features=maps.names if maps else "").options(config)
        async with with_bar(stream_results(engine, paths, wanted, _read), len(paths), "classifying") as done:
            async for path, answer in done:
                if isinstance(answer, str):
                    failed[path] = answer
                    out.write(path, {"error": answer})
                else:
                    out.write(path, {"predictions": predictions(answer, config)})
                    if maps is not None:
                        await asyncio.to_thread(_save_maps, answer, maps, path)
        out.close()
    for path, why in failed.items():
        print(f"dinat: {path}: {why}", file=sys.stderr)
    if failed:
        print(f"dinat: {len(failed)} of {len(paths)} pictures could not be classified", file=sys.stderr)
    return not failed


async def _read(path: str) -> ImageSource:
    return sys.stdin.buffer.read() if path == STDIN else Path(path)


def _save_maps(answer: InferenceResult, maps: Maps, path: str) -> None:
    """A picture's maps under its own name."""
    arrays = dict(flatten_features(answer, "float32"))
    name = "stdin" if path == STDIN else path
    place = maps.folder.joinpath(*(part for part in Path(name).parts if part not in ("..", Path(name).anchor)))
    place = place.with_name(f"{place.name}.{maps.kind}")
    place.parent.mkdir(parents=True, exist_ok=True)
    if maps.kind == "npz":
        np.savez(place, **arrays)  # type: ignore[arg-type]
    else:
        save_file(arrays, place)


class Writer:
    """Writes what became of each picture. done: the pictures that are written already."""

    def __init__(self, stream: TextIO, done: frozenset[str] = frozenset()) -> None:
        self.stream, self.done = stream, done
        self._flushed = 0.0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream is not sys.stdout:
            self.stream.close()

    def write(self, path: str, said: Mapping[str, Any]) -> None:
        """A line."""
        raise NotImplementedError

    def flush(self) -> None:
        """Let go of what is written, ten times a second: what stops later keeps it."""
        if time.monotonic() > self._flushed + 0.1:
            self.stream.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """All is written."""
        self.stream.flush()


class JsonLines(Writer):
    """{"path": ..., "predictions": [...]} or {"path": ..., "error": ...}."""

    def write(self, path: str, said: Mapping[str, Any]) -> None:
        """See Writer."""
        plain = (
            {"predictions": [{**one, "score": float(one["score"])} for one in said["predictions"]]}
            if "error" not in said
            else said
        )
        self.stream.write(json.dumps({"path": path, **plain}) + "\n")
        self.flush()


class Rows(Writer):
    """path, error, then label and score of each prediction."""

    def write(self, path: str, said: Mapping[str, Any]) -> None:
        """See Writer."""
        best = [value for one in said.get("predictions", ()) for value in (one["label"], f"{one['score']:.6g}")]
        csv.writer(self.stream, lineterminator="\n").writerow([path, said.get("error", ""), *best])
        self.flush()


class InATable(Writer):
    """For people, once all is known."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._table = Table("picture", "labels")

    def write(self, path: str, said: Mapping[str, Any]) -> None:
        """See Writer."""
        best = (f"{one['label']} {one['score']:.3f}" for one in said.get("predictions", ()))
        self._table.add_row(path, said.get("error") or ", ".join(best))

    def close(self) -> None:
        """See Writer."""
        Console(file=self.stream, width=None if self.stream.isatty() else 200).print(self._table)


def writer(output: str, to: Path | None) -> Writer:
    """Where results go. A file that is there is gone on with, after its last whole line."""
    if output == "table":
        return InATable(sys.stdout)
    kind = JsonLines if output == "jsonl" else Rows
    if to is None:
        return kind(sys.stdout)
    whole = ""
    if to.exists():
        text = to.read_text()
        whole = text[: text.rfind("\n") + 1]
    try:
        if output == "jsonl":
            done = frozenset(json.loads(line)["path"] for line in whole.splitlines())
        else:
            done = frozenset(row[0] for row in csv.reader(io.StringIO(whole)) if row)
    except (ValueError, KeyError, TypeError):
        raise Refused(f"{to} is there and holds something else than this command's {output}: name another file") from None
    stream = to.open("r+" if to.exists() else "w")
    stream.seek(len(whole.encode()))
    stream.truncate()
    return kind(stream, done)
