"""`dinat convert`: write a checkpoint of any kind in the Hub's layout."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dinat.app.cli import Refused
from dinat.app.cli.flags import Revision, Source
from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor
from dinat.model.checkpoints.checkpoint import open_checkpoint


def convert(
    source: Source,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write.")],
    *,
    preset: Annotated[
        str | None,
        typer.Option(help="Which published network a .pth file is, where its name does not say: mini, nat-mini."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The config.json of a .pth file whose sizes were never published.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(metavar="FILE", help="Names of the classes, one a line.")] = None,
    revision: Revision = None,
) -> None:
    """Write a checkpoint of any kind in the Hub's layout."""
    if preset and config:
        raise Refused("--preset and --config both say what the file is: give one")
    names = labels.read_text().splitlines() if labels else None
    given = None
    if preset:
        given = DinatConfig.preset(preset, **({"num_labels": len(names)} if names else {}))
    elif config:
        try:
            given = DinatConfig.from_dict(json.loads(config.read_text()))
        except (ValueError, TypeError) as error:
            raise Refused(f"{config} is no config.json of a DiNAT: {error}") from None
    checkpoint = open_checkpoint(source, revision=revision, config=given)
    network = DinatForImageClassification.from_pretrained(checkpoint)
    if names is not None:
        if len(names) != network.num_labels:
            raise Refused(f"{labels} names {len(names)} labels, one a line; the checkpoint has {network.num_labels}")
        network.config.id2label = dict(enumerate(names))
        network.config.label2id = {label: index for index, label in enumerate(names)}
    network.save_pretrained(folder)
    DinatImageProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    print(f"{source} written to {folder}")
