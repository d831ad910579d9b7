"""Labelled images on disk: a folder with one subfolder per label, or a CSV or JSONL file of paths and labels."""

import csv
import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinat.app.images import SUFFIXES
from dinat.model import DinatConfig, DinatError

SYNSET = re.compile(r"n\d{8}")
"""A WordNet ID of ImageNet, such as n01440764."""


class DataError(DinatError):
    """Labelled images that cannot be used."""


@dataclass(frozen=True)
class LabelledImage:
    """An image on disk and its label."""

    path: Path
    label: str


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images.

    Attributes:
        images: All images.
        empty_labels: Labels without images.
    """

    images: Sequence[LabelledImage]
    empty_labels: Sequence[str] = ()

    @property
    def labels(self) -> list[str]:
        """All labels of images, sorted."""
        return sorted({image.label for image in self.images})


def read_labelled_images(source: Path) -> LabelledImages:
    """List labelled images.

    Args:
        source: A folder with one subfolder per label, named for the label; or a .csv or .jsonl file with `path`, relative to
            the file's folder, and `label`.

    Raises:
        DataError: The source does not exist, is invalid, or has no image.
    """
    if source.is_dir():
        folders = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise DataError(f"{source} has no subfolder per label, such as {source}/cat/1.jpg")
        by_label = {folder.name: sorted(path for path in folder.rglob("*") if _is_image(path)) for folder in folders}
        images = [LabelledImage(path, label) for label, paths in by_label.items() for path in paths]
        dataset = LabelledImages(images, [label for label, paths in by_label.items() if not paths])
    elif source.suffix in (".csv", ".jsonl") and source.is_file():
        dataset = LabelledImages(list(_read_rows(source)))
    else:
        raise DataError(
            f"{source} does not exist: use a folder with one subfolder per label, or a .csv or .jsonl file of paths and labels"
        )
    if not dataset.images:
        raise DataError(f"{source} has no image: supported are {', '.join(SUFFIXES)}")
    return dataset


def class_ids(labels: Collection[str], config: DinatConfig, classes: Sequence[str] | None = None) -> dict[str, int]:
    """Map the labels of data to the network's classes.

    Args:
        labels: Labels of the data. Without `classes`, they must be names of the network's classes, or all synsets of ImageNet
            (n01440764, ...), whose sorted order is that of the classes.
        config: Configuration of the network.
        classes: Labels in the order of the network's classes, if they differ from the network's own names.

    Returns:
        The class index of each label.

    Raises:
        DataError: A label does not match a class.
    """
    if classes is None:
        names = {name: index for index, name in config.id2label.items()}
        if all(SYNSET.fullmatch(label) for label in labels) and not names.keys() >= set(labels):
            if len(labels) != config.num_labels:
                raise DataError(
                    f"the data has {len(labels)} synsets, the network has {config.num_labels} classes: their order is unknown; "
                    "use --classes with a file of all synsets in the order of the classes, one per line"
                )
            names = {synset: index for index, synset in enumerate(sorted(labels))}
    else:
        if len(classes) != config.num_labels:
            raise DataError(f"--classes has {len(classes)} labels (one per line), the network has {config.num_labels} classes")
        names = {name: index for index, name in enumerate(classes)}
    unknown = sorted(set(labels) - names.keys())
    if unknown:
        known = ", ".join(map(repr, list(names)[:10]))
        raise DataError(
            f"{len(unknown)} labels of the data are not classes of the network: {', '.join(map(repr, unknown[:10]))}"
            f"{', ...' if len(unknown) > 10 else ''}; its classes are {known}{', ...' if len(names) > 10 else ''}"
        )
    return {label: names[label] for label in labels}


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _read_rows(source: Path) -> Iterator[LabelledImage]:
    text = source.read_text(encoding="utf-8-sig")
    try:
        if source.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{source} cannot be read: {error}") from None
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict) and "path" not in row:
            row["path"] = row.get("file_name")  # of Hugging Face's ImageFolder
        if not isinstance(row, dict) or not row.get("path") or row.get("label") in (None, ""):
            raise DataError(f"{source}, entry {number}, must have a path and a label, got {row}")
        yield LabelledImage(source.parent / row["path"], str(row["label"]))
