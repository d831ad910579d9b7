"""`dinat evaluate`: evaluate a checkpoint on labelled images."""

import asyncio
import json
import logging
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from dinat.app.cli import CommandError, print_message, report_skipped
from dinat.app.cli.flags import ENGINE, LabelledData, Source, settings_flags
from dinat.app.cli.plain_text import plain_text
from dinat.app.cli.progress import progress_bar
from dinat.app.engine.engine import Engine, ImageSource
from dinat.app.engine.runtimes.runtime import InferenceOptions
from dinat.app.engine.stream import NO_DEADLINE_MS, running_engine, stream_results
from dinat.app.evaluation.duplicates import describe_duplicates, digest
from dinat.app.evaluation.labelled_images import DataError, LabelledImages, class_ids, read_labelled_images
from dinat.app.evaluation.scores import Evaluation
from dinat.app.evaluation.summaries import LOWEST_RECALL, hides_classes, shown_classes, summary
from dinat.app.image_paths import path_text
from dinat.app.images import decode, read_file, resize_within
from dinat.app.logs import configure_logs
from dinat.app.plurals import plural
from dinat.app.settings import Settings
from dinat.app.tables import read_lines
from dinat.app.training.layout import find_parts
from dinat.model import DinatImageProcessor
from dinat.model.cpu.resize import Pixels
from dinat.model.writing import writing

Preprocessing = Literal["checkpoint", "original", "both"]


@settings_flags([name for name in ENGINE if name != "model"], deadline_ms=NO_DEADLINE_MS, drain_seconds=0)
def evaluate(
    source: Source,
    data: LabelledData,
    *,
    preprocessing: Annotated[
        Preprocessing,
        typer.Option(
            help="checkpoint: the checkpoint's own; original: that of the published accuracies (resize the short side, then "
            "center crop)."
        ),
    ] = "checkpoint",
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The data's labels in the order of the network's classes, one per line.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the full results as JSON on standard output.")] = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a self-contained HTML report with plots.")] = None,
    settings: Settings,
) -> None:
    """Evaluate a checkpoint on labelled images. The exit status is 1 if an image could not be read."""
    if report is not None and find_spec("matplotlib") is None:
        raise CommandError("--report requires matplotlib: pip install 'dinat-serve[evaluate]'")
    if report is not None and not report.parent.is_dir():
        raise CommandError(f"--report {path_text(report)}: the folder {path_text(report.parent)} does not exist")
    configure_logs("auto", logging.WARNING)
    dataset = read_labelled_images(data)
    for label in dataset.empty_labels:
        print_message(f"{path_text(data / label)} has no image: the class is skipped")
    report_skipped(dataset.skipped)
    if len(dataset.splits) > 1:
        splits = ", ".join(f"{len(images)} of {name!r}" for name, images in dataset.splits.items())
        print_message(f"the images of all splits are evaluated: {splits}")
    class_names = read_lines(classes) if classes else None
    settings = settings.model_copy(update={"model": source})
    digests: dict[Path, str] = {}
    try:
        evaluations = asyncio.run(_evaluate(dataset, class_names, preprocessing, settings, digests))
    except DataError as no_match:
        parts = find_parts(data, None)
        if parts.train == data:
            raise
        part = path_text(parts.validation or parts.train)
        raise DataError(f"{no_match}; {path_text(data)} has parts, such as {part}: evaluate one of them") from None
    for line in describe_duplicates(dataset.images, digests):
        print_message(line)
    if as_json:
        results = [evaluation.to_dict() for evaluation in evaluations]
        print(json.dumps({"source": source, "data": str(data), "results": results}, indent=2))
    else:
        _print_tables(evaluations)
    if report is not None:
        from dinat.app.evaluation.report import html_report

        with writing(report):
            report.write_text(html_report(evaluations, f"{source} on {path_text(data)}"), encoding="utf-8")
        print_message(f"report written to {report}")
    if evaluations[0].unreadable:
        for path, error in evaluations[0].unreadable.items():
            print_message(f"{path_text(path)}: {error}")
        raise typer.Exit(1)


async def _evaluate(
    dataset: LabelledImages,
    class_names: list[str] | None,
    preprocessing: Preprocessing,
    settings: Settings,
    digests: dict[Path, str],
) -> list[Evaluation]:
    """Evaluate with each kind of preprocessing, and add the hash of each file to `digests`."""
    kinds = ["checkpoint", "original"] if preprocessing == "both" else [preprocessing]
    async with running_engine(settings) as engine:
        class_of = class_ids(dataset.labels, engine.loaded.config, class_names)
        return [await _evaluate_one(engine, dataset, class_of, kind, settings, digests) for kind in kinds]


async def _evaluate_one(
    engine: Engine,
    dataset: LabelledImages,
    class_of: dict[str, int],
    preprocessing: str,
    settings: Settings,
    digests: dict[Path, str],
) -> Evaluation:
    """Evaluate with one kind of preprocessing, and add the hash of each file to `digests`."""
    loaded = engine.loaded
    config = loaded.config
    original = None if preprocessing == "checkpoint" else _original_preprocessing(loaded.processor)
    max_pixels = settings.max_pixels

    def load(path: Path) -> bytes | Pixels:
        data = read_file(path)
        digests[path] = digest(data)
        return data if original is None else resize_within(original, decode(data, max_pixels), max_pixels)

    async def read(path: str) -> ImageSource:
        return partial(load, Path(path))

    truth, best, in_top5, scores = [], [], [], []
    unreadable: dict[str, str] = {}
    options = InferenceOptions(top_k=min(5, config.num_labels))
    start = time.perf_counter()
    labels = iter(image.label for image in dataset.images)
    stream = stream_results(engine, [str(image.path) for image in dataset.images], options, read)
    async with progress_bar(stream, len(dataset.images), "evaluating") as results:
        async for path, result in results:
            true_class = class_of[next(labels)]
            if isinstance(result, str):
                unreadable[path_text(path)] = result
                continue
            truth.append(true_class)
            best.append(int(result.class_ids[0]))
            in_top5.append(true_class in result.class_ids)
            scores.append(float(result.scores[0]))
    seconds = time.perf_counter() - start
    if not truth:
        raise CommandError(
            f"none of {plural(len(unreadable), 'image')} can be read; the first: {next(iter(unreadable.values()))}"
        )
    setting = {
        "preprocessing": preprocessing,
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


def _original_preprocessing(processor: DinatImageProcessor) -> DinatImageProcessor:
    """Return an image processor that resizes and crops as the original evaluation did. Normalization is the checkpoint's."""
    size = processor.output_size
    if size is None or size[0] != size[1]:
        raise CommandError("--preprocessing original requires a network with square input; this one keeps the aspect ratio")
    return DinatImageProcessor.original(size[0])


def _print_tables(evaluations: list[Evaluation]) -> None:
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    console.print(_table([summary(evaluation) for evaluation in evaluations]))
    for evaluation in evaluations:
        if hides_classes(evaluation):
            console.print(LOWEST_RECALL)
        title = ", ".join(evaluation.setting.values()) if len(evaluations) > 1 else None
        console.print(_table(shown_classes(evaluation), title))


def _table(rows: list[dict[str, str]], title: str | None = None) -> Table:
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(plain_text, row.values()))
    return table
