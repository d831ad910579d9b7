"""Pictures with labels: a folder of folders, or a CSV or JSONL file of paths and labels."""

import csv
import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinat.app.images import SUFFIXES
from dinat.model import DinatConfig, DinatError

SYNSET = re.compile(r"n\d{8}")


class DataError(DinatError):
    """Labelled pictures that cannot be used."""


@dataclass(frozen=True)
class Labelled:
    """A picture on disk and its label."""

    path: Path
    label: str


@dataclass(frozen=True)
class Data:
    """Labelled pictures. empty: labels that have no picture."""

    pictures: Sequence[Labelled]
    empty: Sequence[str] = ()

    @property
    def labels(self) -> list[str]:
        """Every label that a picture has, sorted."""
        return sorted({picture.label for picture in self.pictures})


def read_data(source: Path) -> Data:
    """Read a folder of folders, each named for a label; or *.csv or *.jsonl with `path` (from the file's folder) and `label`.

    Raises DataError.
    """
    if source.is_dir():
        folders = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise DataError(f"{source} has no folder for each label, such as {source}/cat/1.jpg")
        found = {folder.name: sorted(path for path in folder.rglob("*") if _is_picture(path)) for folder in folders}
        pictures = [Labelled(path, label) for label, paths in found.items() for path in paths]
        data = Data(pictures, [label for label, paths in found.items() if not paths])
    elif source.suffix in (".csv", ".jsonl") and source.is_file():
        data = Data(list(_rows(source)))
    else:
        raise DataError(f"{source} is not there: give a folder of folders, or a .csv or .jsonl file of paths and labels")
    if not data.pictures:
        raise DataError(f"{source} has no picture: read are {', '.join(SUFFIXES)}")
    return data


def class_ids(labels: Collection[str], config: DinatConfig, classes: Sequence[str] | None = None) -> dict[str, int]:
    """Which of the network's classes each label is.

    classes: the labels of its classes in their order, where they differ from its own names.  Without it a label is one of its
    names; or all labels are ImageNet's synsets (n01440764, ...), whose sorted order is that of the classes where all are there.
    Raises DataError that names what fits none.
    """
    if classes is None:
        names = {name: index for index, name in config.id2label.items()}
        if all(SYNSET.fullmatch(label) for label in labels) and not names.keys() >= set(labels):
            if len(labels) != config.num_labels:
                raise DataError(
                    f"the data has {len(labels)} synsets, the network {config.num_labels} classes: which is which cannot be "
                    "told; give --classes a file with all synsets in the order of the classes, one a line"
                )
            names = {synset: index for index, synset in enumerate(sorted(labels))}
    else:
        if len(classes) != config.num_labels:
            raise DataError(f"--classes names {len(classes)} labels, one a line; the network has {config.num_labels} classes")
        names = {name: index for index, name in enumerate(classes)}
    unknown = sorted(set(labels) - names.keys())
    if unknown:
        shown = ", ".join(map(repr, list(names)[:10]))
        raise DataError(
            f"{len(unknown)} labels of the data are not the network's: {', '.join(map(repr, unknown[:10]))}"
            f"{', ...' if len(unknown) > 10 else ''}; its labels are {shown}{', ...' if len(names) > 10 else ''}"
        )
    return {label: names[label] for label in labels}


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _rows(source: Path) -> Iterator[Labelled]:
    text = source.read_text(encoding="utf-8-sig")
    try:
        if source.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{source} cannot be read: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row.get("path") or row.get("label") in (None, ""):
            raise DataError(f"{source}, entry {number}, must have a path and a label, got {row}")
        yield Labelled(source.parent / row["path"], str(row["label"]))
