"""Data in the layout of Hugging Face's ImageFolder: DATA/train and DATA/val, each by label or with a metadata file."""

from dataclasses import dataclass
from pathlib import Path

from dinat.app.evaluation.labelled_images import find_table
from dinat.app.image_paths import subfolders

TRAIN = "train"
VALIDATION = ("val", "valid", "validation", "test")
"""Folders of training and of validation data, or values of the column that divides a table. Of VALIDATION the first that exists
is used."""


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
    folders = {name: data / name for name in _subfolders(data)}
    found = [name for name in VALIDATION if name in folders]
    is_divided = TRAIN in folders and (found or set(folders) == {TRAIN}) and _contains_labels(folders[TRAIN])
    if not is_divided:
        return Parts(data, validate_on)
    validation = validate_on or (folders[found[0]] if found else None)
    used = (folders[TRAIN], validation)
    return Parts(folders[TRAIN], validation, tuple(path for _, path in sorted(folders.items()) if path not in used))


def _contains_labels(folder: Path) -> bool:
    return bool(_subfolders(folder)) or find_table(folder) is not None


def _subfolders(folder: Path) -> list[str]:
    return subfolders(str(folder)) if folder.is_dir() else []
