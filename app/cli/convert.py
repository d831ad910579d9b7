"""`dinat convert`: write a checkpoint of any kind in the Hub's layout."""

import argparse
from pathlib import Path

from model import DinatConfig, DinatError, DinatForImageClassification, DinatImageProcessor
from model.config import PRESETS


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Source, destination, and what a .pth file does not say."""
    command.add_argument("source", help="folder, Hub id, original .pth or .pth.tar file")
    command.add_argument("destination", type=Path, help="folder to write")
    command.add_argument("--preset", choices=PRESETS, help="which published model a .pth file is, where its name does not say")
    command.add_argument("--labels", type=Path, help="file with the names of the classes, one a line")


def run(parsed: argparse.Namespace) -> int:
    """Write a checkpoint of any kind in the Hub's layout."""
    config = None
    labels = parsed.labels.read_text().splitlines() if parsed.labels else None
    if parsed.preset:
        config = DinatConfig.preset(parsed.preset, **({"num_labels": len(labels)} if labels else {}))
    network = DinatForImageClassification.from_pretrained(parsed.source, config=config)
    if labels is not None:
        if len(labels) != network.num_labels:
            raise DinatError(f"{parsed.labels} names {len(labels)} labels, one a line; the checkpoint has {network.num_labels}")
        network.config.id2label = dict(enumerate(labels))
        network.config.label2id = {label: index for index, label in enumerate(labels)}
    network.save_pretrained(parsed.destination)
    DinatImageProcessor.from_pretrained(parsed.source, config=config).save_pretrained(parsed.destination)
    print(f"{parsed.source} written to {parsed.destination}")
    return 0
