"""`dinat convert`: convert a checkpoint to the Hugging Face Hub layout."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dinat.app.cli import CommandError
from dinat.app.cli.flags import Revision, Source
from dinat.app.plurals import plural
from dinat.app.tables import read_lines, read_text
from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor
from dinat.model.checkpoints.checkpoint import open_checkpoint


def convert(
    source: Source,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Output folder.")],
    *,
    preset: Annotated[
        str | None,
        typer.Option(help="Published network of a .pth file whose name does not identify it, such as mini or nat-mini."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="config.json for a .pth file of an unpublished network.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(metavar="FILE", help="Class names, one per line.")] = None,
    revision: Revision = None,
) -> None:
    """Convert a checkpoint of any supported kind to the Hugging Face Hub layout."""
    if preset and config:
        raise CommandError("--preset and --config exclude each other: use one of them")
    names = read_lines(labels) if labels else None
    network_config = None
    if preset:
        network_config = DinatConfig.preset(preset, **({"num_labels": len(names)} if names else {}))
    elif config:
        try:
            network_config = DinatConfig.from_dict(json.loads(read_text(config)))
        except (ValueError, TypeError) as error:
            raise CommandError(f"{config} is not a DiNAT config.json: {error}") from None
    checkpoint = open_checkpoint(source, revision=revision, config=network_config)
    network = DinatForImageClassification.from_pretrained(checkpoint)
    if names is not None:
        if len(names) != network.num_labels:
            raise CommandError(
                f"{labels} has {plural(len(names), 'label')} (one per line), the checkpoint has {network.num_labels}"
            )
        network.config.id2label = dict(enumerate(names))
        network.config.label2id = {label: index for index, label in enumerate(names)}
    network.save_pretrained(folder)
    DinatImageProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    print(f"{source} written to {folder}")
