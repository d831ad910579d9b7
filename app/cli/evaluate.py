"""`dinat evaluate`: how good a checkpoint is on labelled pictures."""

import asyncio
import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from dinat.app.cli import Refused
from dinat.app.cli.flags import ENGINE, Source, settings_flags
from dinat.app.cli.progress import with_bar
from dinat.app.engine.engine import Engine, ImageSource
from dinat.app.engine.runtimes.runtime import InferenceOptions
from dinat.app.engine.stream import NO_DEADLINE_MS, running_engine, stream_results
from dinat.app.evaluation.labelled_images import Data, class_ids, read_data
from dinat.app.evaluation.scores import MOST_SHOWN, Evaluation
from dinat.app.images import decode
from dinat.app.logs import configure_logs
from dinat.app.settings import Settings
from dinat.model import DinatImageProcessor

Preprocessing = Literal["checkpoint", "original", "both"]


@settings_flags([name for name in ENGINE if name != "model"], deadline_ms=NO_DEADLINE_MS, drain_seconds=0)
def evaluate(
    source: Source,
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A folder of folders, or a .csv or .jsonl file with path and label.")
    ],
    *,
    preprocessing: Annotated[
        Preprocessing,
        typer.Option(help="The checkpoint's own; or that of the published accuracies (short side, then centre crop)."),
    ] = "checkpoint",
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The data's labels in the order of the network's classes, one a line.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All that was measured, as JSON on standard output.")] = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page of HTML there, pictures inside.")] = None,
    settings: Settings,
) -> None:
    """Say how good a checkpoint is on labelled pictures. Exit status 1 where a picture could not be read."""
    if report is not None and find_spec("matplotlib") is None:
        raise Refused("--report draws with matplotlib, which is not installed: pip install 'dinat-serve[evaluate]'")
    configure_logs("auto", logging.WARNING)
    pictures = read_data(data)
    for label in pictures.empty:
        print(f"dinat: {data / label} has no picture: the class is left out", file=sys.stderr)
    names = classes.read_text().splitlines() if classes else None
    found = asyncio.run(_evaluate(pictures, names, preprocessing, settings.model_copy(update={"model": source})))
    if as_json:
        print(json.dumps({"source": source, "data": str(data), "results": [one.to_dict() for one in found]}, indent=2))
    else:
        _show(found)
    if report is not None:
        from dinat.app.evaluation.report import page

        report.write_text(page(found, f"{source} on {data}"), encoding="utf-8")
        print(f"dinat: the report is in {report}", file=sys.stderr)
    if found[0].unreadable:
        for path, why in found[0].unreadable.items():
            print(f"dinat: {path}: {why}", file=sys.stderr)
        raise typer.Exit(1)


async def _evaluate(
    data: Data, classes: list[str] | None, preprocessing: Preprocessing, settings: Settings
) -> list[Evaluation]:
    kinds = ["checkpoint", "original"] if preprocessing == "both" else [preprocessing]
    async with running_engine(settings) as engine:
        class_of = class_ids(data.labels, engine.loaded.config, classes)
        return [await _one(engine, data, class_of, kind, settings) for kind in kinds]


async def _one(engine: Engine, data: Data, class_of: dict[str, int], kind: str, settings: Settings) -> Evaluation:
    """An evaluation with one preprocessing."""
    loaded = engine.loaded
    config = loaded.config
    read = _read if kind == "checkpoint" else _read_as_original(loaded.processor, settings.max_pixels)
    truth, best, in_top5, scores = [], [], [], []
    unreadable: dict[str, str] = {}
    wanted = InferenceOptions(top_k=min(5, config.num_labels))
    began = time.perf_counter()
    labels = iter(picture.label for picture in data.pictures)
    answered = stream_results(engine, [str(one.path) for one in data.pictures], wanted, read)
    async with with_bar(answered, len(data.pictures), "evaluating") as done:
        async for path, answer in done:
            true = class_of[next(labels)]
            if isinstance(answer, str):
                unreadable[path] = answer
                continue
            truth.append(true)
            best.append(int(answer.class_ids[0]))
            in_top5.append(true in answer.class_ids)
            scores.append(float(answer.scores[0]))
    seconds = time.perf_counter() - began
    if not truth:
        raise Refused(f"none of {len(unreadable)} pictures can be read; the first: {next(iter(unreadable.values()))}")
    setting = {
        "preprocessing": kind,
        "runtime": loaded.runtime,
        "precision": loaded.precision,
        "device": loaded.device,
    }
    return Evaluation(
        [config.id2label[i] for i in range(config.num_labels)],
        np.array(truth),
        np.array(best),
        np.array(in_top5),
        np.array(scores, dtype=np.float64),
        seconds,
        unreadable,
        setting,
    )


async def _read(path: str) -> ImageSource:
    return Path(path)


def _read_as_original(processor: DinatImageProcessor, max_pixels: int) -> Callable[[str], Awaitable[ImageSource]]:
    """Pictures resized and cropped as the original evaluation did; normalised as the checkpoint says."""
    size = processor.output_size
    if size is None or size[0] != size[1]:
        raise Refused("--preprocessing original is for networks that take squares; this one keeps the pictures' aspect")
    original = DinatImageProcessor.original(size[0], crop_pct=1.0 if size[0] >= 384 else 0.875)

    async def read(path: str) -> ImageSource:
        return await asyncio.to_thread(lambda: original.resize(decode(Path(path).read_bytes(), max_pixels)))

    return read


def _show(found: list[Evaluation]) -> None:
    """The tables, on standard output."""
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    table = Table(*found[0].setting, "pictures", "top-1", "top-5", "calibration error", "per second")
    for one in found:
        shares = (f"{share:.2%}" for share in (one.top1, one.top5, one.calibration_error))
        table.add_row(*one.setting.values(), str(one.pictures), *shares, f"{one.pictures_per_second:.1f}")
    console.print(table)
    for one in found:
        rows = one.shown_classes
        if rows is not one.by_class:
            console.print(f"The {MOST_SHOWN} classes of lowest recall")
        table = Table(*rows[0], title=", ".join(one.setting.values()) if len(found) > 1 else None, title_justify="left")
        for row in rows:
            table.add_row(*(f"{value:.1%}" if isinstance(value, float) else str(value or "") for value in row.values()))
        console.print(table)
