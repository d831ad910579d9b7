"""Specification, data and result of a training."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from dinat.app.evaluation.labelled_images import DataError, LabelledImage, LabelledImages, read_labelled_images
from dinat.app.training.dataset import stratified_split
from dinat.app.training.labels import check_labels
from dinat.app.training.layout import find_parts
from dinat.app.training.recipe import Recipe
from dinat.app.training.trainer import Epoch, History


@dataclass(frozen=True)
class TrainingSpec:
    """What to train, and how.

    Attributes:
        source: Initial checkpoint: a folder, a Hub id, an original .pth file, or "digits".
        revision: Branch, tag or commit of a Hub id.
        data: Labelled images, or a folder with training and validation images (see layout).
        validate_on: Labelled images for validation; if None, those of `data`, or a fraction of it.
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
        unused_folders: Folders of data that are neither training nor validation data.
        skipped: Number of files that are not used, by kind.
    """

    train: list[LabelledImage]
    validation: list[LabelledImage]
    classes: list[str]
    empty_folders: list[Path]
    unused_folders: tuple[Path, ...] = ()
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def train_counts(self) -> Counter[str]:
        """Training images of each class."""
        return Counter(image.label for image in self.train)

    def without(self, paths: Collection[Path]) -> "DataSplit":
        """Return the split without these images.

        Raises:
            DataError: A class has no training image anymore, or there is no validation image.
        """
        split = replace(
            self,
            train=[image for image in self.train if image.path not in paths],
            validation=[image for image in self.validation if image.path not in paths],
        )
        missing = [label for label in self.classes if not split.train_counts[label]]
        if missing or not split.validation:
            what = f"training image of the class {missing[0]}" if missing else "validation image"
            raise DataError(f"no {what} can be read")
        return split


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training.

    Attributes:
        recipe: Hyperparameters, with values for all fields.
        split: Training and validation images.
        history: Metrics of all epochs.
        saved_epoch: The epoch whose weights are saved.
        seconds: Duration of the last run, evaluation included.
        images_per_second: Training images per second of the last run, evaluation included.
        fitted: Accuracy of the last weights on training images without augmentation, in 0..1.
    """

    recipe: Recipe
    split: DataSplit
    history: History
    saved_epoch: Epoch
    seconds: float
    images_per_second: float
    fitted: float


def read_split(spec: TrainingSpec) -> DataSplit:
    """List and split the images.

    Raises:
        DataError: The data cannot be read, has too few classes or images, or labels that are not names of classes.
    """
    parts = find_parts(spec.data, spec.validate_on)
    dataset = _read(parts.train)
    if len(dataset.labels) < 2:
        raise DataError(f"{spec.data} has images of only one class, {dataset.labels[0]}: at least two are required")
    empty_folders = [parts.train / label for label in dataset.empty_labels]
    classes = _class_order(dataset)
    if parts.validation is None:
        train, validation = stratified_split(dataset, spec.recipe.validation, spec.recipe.seed)
        return DataSplit(train, validation, classes, empty_folders, parts.unused, dataset.skipped)
    other = _read(parts.validation)
    unknown = sorted(set(other.labels) - set(dataset.labels))
    if unknown:
        raise DataError(f"{parts.validation} has labels that {parts.train} does not have: {', '.join(unknown[:10])}")
    return DataSplit(list(dataset.images), list(other.images), classes, empty_folders, parts.unused, dataset.skipped)


def _read(source: Path) -> LabelledImages:
    """List labelled images, and check that their labels are classes."""
    dataset = read_labelled_images(source)
    check_labels(dataset.labels)
    return dataset


def _class_order(dataset: LabelledImages) -> list[str]:
    """Sort labels, numbers by value: 2 before 10."""
    return sorted(dataset.labels, key=lambda label: (0, int(label), label) if label.isdecimal() else (1, 0, label))
