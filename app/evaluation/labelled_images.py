"""Labelled images on disk: a folder with one subfolder per label, or a CSV or JSONL file of paths and labels."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinat.app.image_paths import SUFFIXES, URL, is_image, list_files, path_text, subfolders
from dinat.app.plurals import plural
from dinat.app.tables import TABLE_SUFFIXES, Row, find_column, normalize, read_table
from dinat.model import DinatConfig, DinatError

SYNSET = re.compile(r"n\d{8}")
"""A WordNet ID of ImageNet, such as n01440764."""

PATH_COLUMNS = ("path", "file_name", "filename", "file", "filepath", "file_path", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "class_name", "category", "target")
"""Names of the columns of a table, in order of preference."""

SPLIT_COLUMNS = ("split", "subset")
"""Names of the column that says which images are for training."""

IS_VALID_COLUMN = "is_valid"
"""Name of fastai's column that says which images are for validation."""

_SPLIT_OF = {"true": "valid", "1": "valid", "false": "train", "0": "train"}
"""The split of each value of fastai's column, in lower case."""

METADATA = ("metadata.csv", "metadata.jsonl")
"""Names of the table of a folder, as in Hugging Face's ImageFolder."""


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
        skipped: Number of files that are no images of a label, by kind, see Files.
        splits: The images by the value of the column that divides a table (SPLIT_COLUMNS), in lower case, or by fastai's
            column (IS_VALID_COLUMN), as train and valid; empty without one.
    """

    images: Sequence[LabelledImage]
    empty_labels: Sequence[str] = ()
    skipped: Counter[str] = field(default_factory=Counter)
    splits: Mapping[str, Sequence[LabelledImage]] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """All labels of images, sorted."""
        return sorted({image.label for image in self.images})


def read_labelled_images(source: Path) -> LabelledImages:
    """List labelled images.

    Labels are normalized. See dinat.app.image_paths for the files of a folder, and dinat.app.tables for tables.

    Args:
        source: A folder with one subfolder per label, named for the label; or a table (.csv, .tsv, .jsonl) with a column of
            PATH_COLUMNS, relative to its folder, and one of LABEL_COLUMNS; or a folder with such a table named as in METADATA.

    Raises:
        DataError: The source does not exist, is invalid, or has no image, or no path in the table is a file.
        TableError: The table is malformed.
    """
    table = find_table(source)
    if table is not None:
        dataset = _read_table(table)
    elif source.is_dir():
        dataset = _read_folder(source)
    else:
        problem = "is neither a folder nor a table" if source.exists() else "does not exist"
        raise DataError(
            f"{source} {problem}: use a folder with one subfolder per label, or a .csv or .jsonl file of paths and labels"
        )
    if not dataset.images:
        raise DataError(f"{source} has no image: supported are {', '.join(SUFFIXES)}")
    return dataset


def find_table(source: Path) -> Path | None:
    """Return the table of labelled images: the source itself, or the metadata file of a folder; None if there is none.

    A metadata file without a column of paths or of labels is another one, unless the folder has no subfolders as labels.
    """
    if source.is_dir():
        table = next((source / name for name in METADATA if (source / name).is_file()), None)
        return None if table is not None and subfolders(str(source)) and not _has_columns(table) else table
    return source if source.suffix.lower() in TABLE_SUFFIXES and source.is_file() else None


def _read_folder(source: Path) -> LabelledImages:
    names = subfolders(str(source))
    if not names:
        raise DataError(f"{source} has no subfolder per label, such as {source}/cat/1.jpg")
    found = list_files(str(source)).images()
    paths = [(Path(path), Path(path).relative_to(source).parts) for path in found.paths]
    images = [LabelledImage(path, normalize(path_text(parts[0]))) for path, parts in paths if len(parts) > 1]
    with_images = {parts[0] for _, parts in paths}
    beside = Counter({"beside the subfolders": len(paths) - len(images)})
    return LabelledImages(images, [name for name in names if name not in with_images], found.skipped + beside)


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
    network_classes = plural(config.num_labels, "class", "classes")
    if classes is None:
        names = [normalize(config.id2label[index]) for index in range(config.num_labels)]
        if all(SYNSET.fullmatch(label) for label in labels) and not set(names) >= set(labels):
            if len(labels) != config.num_labels:
                raise DataError(
                    f"the data has {plural(len(labels), 'synset')}, the network has {network_classes}: their order is unknown; "
                    "use --classes with a file of all synsets in the order of the classes, one per line"
                )
            names = sorted(labels)
    else:
        if len(classes) != config.num_labels:
            raise DataError(f"--classes has {plural(len(classes), 'label')} (one per line), the network has {network_classes}")
        names = [normalize(name) for name in classes]
    counts = Counter(names)
    ambiguous = sorted(label for label in labels if counts[normalize(label)] > 1)
    if ambiguous:
        indices = [str(index) for index, name in enumerate(names) if name == normalize(ambiguous[0])]
        raise DataError(
            f"the classes {' and '.join(indices)} of the network are both {ambiguous[0]!r}: use --classes with a file of names "
            "that differ"
        )
    class_of = {name: index for index, name in enumerate(names)}
    unknown = sorted(label for label in labels if normalize(label) not in class_of)
    if unknown:
        what = plural(len(unknown), "label of the data is not a class", "labels of the data are not classes")
        known = ", ".join(map(repr, names[:10]))
        raise DataError(
            f"{what} of the network: {', '.join(map(repr, unknown[:10]))}"
            f"{', ...' if len(unknown) > 10 else ''}; its classes are {known}{', ...' if len(names) > 10 else ''}"
        )
    return {label: class_of[normalize(label)] for label in labels}


def _read_table(table: Path) -> LabelledImages:
    images: list[LabelledImage] = []
    splits: dict[str, list[LabelledImage]] = {}
    for row in read_table(table):
        where = f"{table}, line {row.line},"
        path, label = (_value(row, names, where) for names in (PATH_COLUMNS, LABEL_COLUMNS))
        if not isinstance(path, str):
            raise DataError(f"{where} has the path {path!r}: it must be text")
        if URL.match(path):
            raise DataError(f"{where} has the URL {path}: URLs are not read, use paths of files")
        if isinstance(label, list | dict):
            raise DataError(f"{where} has the label {label!r}: give each image one label, as text or a number")
        images.append(LabelledImage(_find(table.parent, path), normalize(path_text(str(label)))))
        split = _split(row, where)
        if split is not None:
            splits.setdefault(split, []).append(images[-1])
    if images and not any(_is_file(image.path) for image in images):
        raise DataError(
            f"{path_text(table)}: none of its paths is a file, such as {path_text(images[0].path)}: paths must be absolute, or "
            f"relative to the folder of the table, {path_text(table.parent.resolve())}"
        )
    return LabelledImages(images, splits=splits)


def _split(row: Row, where: str) -> str | None:
    """Return the split of a row, in lower case; None without a column of splits. Raises DataError for an invalid value."""
    columns = list(row.values)
    column, is_valid = find_column(columns, SPLIT_COLUMNS), find_column(columns, (IS_VALID_COLUMN,))
    if is_valid is None:
        return None if column is None else _text(row.values[column])
    if column is not None:
        raise DataError(f"{where} has the columns {column} and {is_valid}, which both name the split: remove one of them")
    split = _SPLIT_OF.get(_text(row.values[is_valid]))
    if split is None:
        raise DataError(f"{where} has the {is_valid} {row.values[is_valid]!r}: it must be true or false, or 1 or 0")
    return split


def _text(value: Any) -> str:
    """Return a value as normalized text in lower case."""
    return normalize(path_text(str(value))).lower()


def _has_columns(table: Path) -> bool:
    """Whether the first row of a table has a path and a label. Raises TableError."""
    columns = next((list(row.values) for row in read_table(table)), [])
    return all(find_column(columns, names) is not None for names in (PATH_COLUMNS, LABEL_COLUMNS))


def _value(row: Row, names: Sequence[str], where: str) -> Any:
    """Return the value of the first column with one of these names. Raises DataError if it is missing or empty."""
    columns = list(row.values)
    column = find_column(columns, names)
    value = None if column is None else row.values[column]
    if value is None or value != value or (isinstance(value, str) and not normalize(value)):  # JSON of pandas has NaN
        found = ", ".join(columns) if column is None else f"nothing as {column}"
        header = "; the first line must name the columns, such as path,label" if any(map(is_image, columns)) else ""
        raise DataError(f"{where} must have a path and a label, it has {found}{header}")
    return value


def _find(folder: Path, path: str) -> Path:
    """Return the file of a path in a table: as it is, or else with the slashes and the Unicode form that files here have."""
    plain = path.strip().replace("\\", "/")
    candidates = [folder / path, *(folder / unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))]
    return next((candidate for candidate in candidates if _is_file(candidate)), candidates[0])


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False
