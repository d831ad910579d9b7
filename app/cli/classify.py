"""`dinat classify`: the best labels of pictures on disk, by the service's own engine and batches."""

import argparse
import asyncio
import csv
import glob
import io
import json
import logging
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.numpy import save_file

from app.api.features import flat
from app.api.parameters import Parameters
from app.api.results import predictions
from app.cli import Refused
from app.cli.flags import add_settings, read_settings
from app.engine.engine import Engine
from app.engine.runtime import Answer, Wanted
from app.errors import ServiceError
from app.logs import configure_logs
from app.settings import Settings

SETTINGS = (
    "model",
    "revision",
    "device",
    "runtime",
    "precision",
    "attention",
    "max_batch",
    "cache_dir",
    "decode",
    "max_pixels",
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
STDIN = "-"
PATIENCE_MS = 24 * 3600 * 1000


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What to classify, how to write it, and those settings that are the engine's."""
    command.epilog = "Exit status 1 where a picture could not be classified; those are listed at the end."
    command.add_argument(
        "paths", nargs="+", metavar="PATH", help="files, folders, patterns, or - for one picture on standard input"
    )
    command.add_argument("--top-k", type=int, help="how many labels; 5, or all if fewer")
    command.add_argument("--output", choices=["table", "jsonl", "csv"], default="table")
    command.add_argument("--to", type=Path, metavar="FILE", help="write jsonl or csv there, and go on where it stops already")
    command.add_argument("--features", default="", metavar="NAMES", help="maps to keep, by comma: stem, stage1, ..., pooled")
    command.add_argument("--maps", type=Path, metavar="FOLDER", help="where the maps go, a file for each picture")
    command.add_argument("--maps-format", choices=["npz", "safetensors"], default="npz")
    add_settings(command, SETTINGS)


def run(parsed: argparse.Namespace) -> int:
    """Classify; 0 if every picture was."""
    if parsed.to is not None and parsed.output == "table":
        raise Refused("--to keeps jsonl or csv: say --output jsonl")
    if bool(parsed.features) != bool(parsed.maps):
        raise Refused("--features says which maps, --maps where they go: one wants the other")
    settings = read_settings(parsed, SETTINGS, deadline_ms=PATIENCE_MS, drain_seconds=0)
    paths = list(found(parsed.paths))
    if not paths:
        raise Refused(f"no picture in {', '.join(parsed.paths)}: read are {', '.join(SUFFIXES)}")
    configure_logs("auto", logging.WARNING)
    with writer(parsed.output, parsed.to) as out:
        return asyncio.run(_classify([path for path in paths if path not in out.done], settings, parsed, out))


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


async def _classify(paths: Sequence[str], settings: Settings, parsed: argparse.Namespace, out: "Writer") -> int:
    engine = Engine(settings)
    await engine.start()
    try:
        if engine.failure is not None:
            raise Refused(f"{settings.model} cannot be loaded: {engine.failure}")
        config = engine.loaded.config
        wanted = Parameters(top_k=parsed.top_k, features=parsed.features).wanted(config)
        failed: dict[str, str] = {}
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
            task = progress.add_task("classifying", total=len(paths))
            async for path, answer in _answers(engine, paths, wanted):
                if isinstance(answer, str):
                    failed[path] = answer
                    out.write(path, {"error": answer})
                else:
                    out.write(path, {"predictions": predictions(answer, config)})
                    if parsed.maps is not None:
                        await asyncio.to_thread(_save_maps, answer, parsed.maps, path, parsed.maps_format)
                progress.advance(task)
        out.close()
    except ServiceError as error:
        raise Refused(error.detail) from None
    finally:
        await engine.stop()
    for path, why in failed.items():
        print(f"dinat: {path}: {why}", file=sys.stderr)
    if failed:
        print(f"dinat: {len(failed)} of {len(paths)} pictures could not be classified", file=sys.stderr)
    return int(bool(failed))


async def _answers(engine: Engine, paths: Sequence[str], wanted: Wanted) -> AsyncIterator[tuple[str, Answer | str]]:
    """What becomes of each picture, in order. As many are under way as may wait in the engine, and no more are in memory."""

    async def one(path: str) -> Answer | str:
        (answer,) = await engine.submit([sys.stdin.buffer.read() if path == STDIN else Path(path)], wanted)
        return answer.detail if isinstance(answer, ServiceError) else answer

    under_way: deque[tuple[str, asyncio.Task[Answer | str]]] = deque()
    try:
        for path in paths:
            if len(under_way) == engine.settings.queue_limit:
                first, task = under_way.popleft()
                yield first, await task
            under_way.append((path, asyncio.create_task(one(path))))
        while under_way:
            first, task = under_way.popleft()
            yield first, await task
    finally:
        for _, task in under_way:
            task.cancel()


def _save_maps(answer: Answer, folder: Path, path: str, kind: str) -> None:
    """A picture's maps under its own name."""
    maps = dict(flat(answer, "float32"))
    name = "stdin" if path == STDIN else path
    place = folder.joinpath(*(part for part in Path(name).parts if part not in ("..", Path(name).anchor)))
    place = place.with_name(f"{place.name}.{kind}")
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "npz":
        np.savez(place, **maps)  # type: ignore[arg-type]
    else:
        save_file(maps, place)


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
