"""Specification, data and result of a training."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from dinat.app.evaluation.labelled_images import DataError, LabelledImage, LabelledImages, read_labelled_images
from dinat.app.training.dataset import stratified_split
from dinat.app.training.recipe import Recipe
from dinat.app.training.trainer import Epoch, History


@dataclass(frozen=True)
class TrainingSpec:
    """What to train, and how.

    Attributes:
        source: Initial checkpoint: a folder, a Hub id, an original .pth file, or "digits".
        revision: Branch, tag or commit of a Hub id.
        data: Labelled images.
        validate_on: Labelled images for validation; a fraction of `data` if None.
        out: Output folder.
        recipe: Hyperparameters.
        max_pixels: Largest image, width times height.
    """

    source: str
    revision: str | None
    data: Path
    validate_on: Path | None
    out: Path
    recipe: Recipe
    max_pixels: int


@dataclass(frozen=True)
class DataSplit:
    """Training and validation images.

    Attributes:
        train: Training images.
        validation: Validation images.
        classes: Labels in the order of the network's classes.
        empty_folders: Folders of labels without images.
    """

    train: list[LabelledImage]
    validation: list[LabelledImage]
    classes: list[str]
    empty_folders: list[Path]

    def digest(self) -> str:
        """Return a hash of all paths and labels."""
        lines = (
            f"{part} {image.path} {image.label}"
            for part, images in (("t", self.train), ("v", self.validation))
            for image in images
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training.

    Attributes:
        split: Training and validation images.
        history: Metrics of all epochs.
        saved_epoch: The epoch whose weights are saved.
        seconds: Duration of the last run, evaluation included.
        images_per_second: Training images per second of the last run, evaluation included.
    """

    split: DataSplit
    history: History
    saved_epoch: Epoch
    seconds: float
    images_per_second: float


def read_split(spec: TrainingSpec) -> DataSplit:
    """Read and split the data.

    Raises:
        DataError: The data cannot be read, or has too few classes or images.
    """
    dataset = read_labelled_images(spec.data)
    missing = [str(image.path) for image in dataset.images if not image.path.is_file()]
    if missing:
        raise DataError(f"{len(missing)} images of {spec.data} do not exist: {', '.join(missing[:5])}")
    if len(dataset.labels) < 2:
        raise DataError(f"{spec.data} has images of only one class, {dataset.labels[0]}: at least two are required")
    empty_folders = [spec.data / label for label in dataset.empty_labels]
    if spec.validate_on is None:
        train, validation = stratified_split(dataset, spec.recipe.validation, spec.recipe.seed)
        return DataSplit(train, validation, _class_order(dataset), empty_folders)
    other = read_labelled_images(spec.validate_on)
    unknown = sorted(set(other.labels) - set(dataset.labels))
    if unknown:
        raise DataError(f"{spec.validate_on} has labels that {spec.data} does not have: {', '.join(unknown[:10])}")
    return DataSplit(list(dataset.images), list(other.images), _class_order(dataset), empty_folders)


def _class_order(dataset: LabelledImages) -> list[str]:
    """Sort labels, numbers by value: 2 before 10."""
    return sorted(dataset.labels, key=lambda label: (0, int(label), label) if label.isdecimal() else (1, 0, label))
