"""Data in the layout of Hugging Face's ImageFolder: DATA/train and DATA/val, each by label or with a metadata file."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinat.app.evaluation.labelled_images import find_table
from dinat.app.image_paths import subfolders

TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation")
"""Folders of training and of validation data in any case, or values of the column that divides a table, as in Hugging Face's
datasets. The first of them that exists is used."""


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

    A folder with subfolders named in TRAIN and VALIDATION is a data set in two parts, unless the one for training contains the
    images themselves: then these are labels.
    """
    folders = [data / name for name in _subfolders(data)]
    by_name = {path.name.lower(): path for path in folders}
    train, held_out = find_part(by_name, TRAIN), find_part(by_name, VALIDATION)
    if train is None or not (held_out or len(folders) == 1) or not _contains_labels(by_name[train]):
        return Parts(data, validate_on)
    validation = validate_on or (by_name[held_out] if held_out else None)
    used = (by_name[train], validation)
    return Parts(by_name[train], validation, tuple(path for path in folders if path not in used))


def find_part(names: Collection[str], part: Sequence[str]) -> str | None:
    """Return the first name of a part (TRAIN or VALIDATION) that is among these, in lower case; None without one."""
    return next((name for name in part if name in names), None)


def _contains_labels(folder: Path) -> bool:
    return bool(_subfolders(folder)) or find_table(folder) is not None


def _subfolders(folder: Path) -> list[str]:
    return subfolders(str(folder)) if folder.is_dir() else []
