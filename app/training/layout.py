"""Data in the layout of Hugging Face's ImageFolder: DATA/train and DATA/val, each by label or with a metadata file."""

from dataclasses import dataclass
from pathlib import Path

TRAIN = "train"
VALIDATION = ("val", "valid", "validation", "test")
"""Folders of validation data. The first that exists is used."""

METADATA = ("metadata.csv", "metadata.jsonl")


@dataclass(frozen=True)
class Parts:
    """Where the data are.

    Attributes:
        train: Training data: a folder with one subfolder per label, or a file of paths and labels.
        validation: Validation data, or None to hold out a fraction of the training data.
        unused: Folders that are not used.
    """

    train: Path
    validation: Path | None
    unused: tuple[Path, ...] = ()


def find_parts(data: Path, validate_on: Path | None) -> Parts:
    """Return the parts of DATA and --validate-on.

    A folder with the subfolders `train` and one of VALIDATION is a data set in two parts, unless `train` contains the images
    themselves: then these are labels.
    """
    folders = {path.name: path for path in _subfolders(data)}
    found = [name for name in VALIDATION if name in folders]
    is_divided = TRAIN in folders and (found or set(folders) == {TRAIN}) and _contains_labels(folders[TRAIN])
    if not is_divided:
        return Parts(_source(data), None if validate_on is None else _source(validate_on))
    validation = validate_on or (folders[found[0]] if found else None)
    used = (folders[TRAIN], validation)
    unused = tuple(path for _, path in sorted(folders.items()) if path not in used)
    return Parts(_source(folders[TRAIN]), None if validation is None else _source(validation), unused)


def _source(path: Path) -> Path:
    """Return the metadata file of a folder if it has one."""
    return next((path / name for name in METADATA if (path / name).is_file()), path)


def _contains_labels(folder: Path) -> bool:
    return bool(_subfolders(folder)) or _source(folder) != folder


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))]
