"""Specification, data and result of a training."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dinat.app.evaluation.labelled_images import (
    DataError,
    LabelledImage,
    LabelledImages,
    find_table,
    read_labelled_images,
)
from dinat.app.plurals import plural
from dinat.app.training.dataset import stratified_split
from dinat.app.training.labels import check_labels
from dinat.app.training.layout import TRAIN, VALIDATION, find_part, find_parts
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
        is_held_out: Whether the validation images are a fraction of the training data.
        empty_folders: Folders of labels without images.
        unused_folders: Folders of data that are neither training nor validation data.
        notes: Sentences about rows of a table that are neither.
        skipped: Number of files that are not used, by kind.
    """

    train: list[LabelledImage]
    validation: list[LabelledImage]
    classes: list[str]
    is_held_out: bool
    empty_folders: list[Path]
    unused_folders: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
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
    train, validation, notes = _by_column(dataset, parts.train, parts.validation is not None)
    labels = {image.label for image in train}
    if len(labels) < 2:
        raise DataError(f"{spec.data} has images of only one class, {min(labels)}: at least two are required")
    is_held_out = parts.validation is None and not validation
    if parts.validation is not None:
        validation = _read(parts.validation).images
    elif is_held_out:
        train, validation = stratified_split(LabelledImages(train), spec.recipe.validation, spec.recipe.seed)
    unknown = sorted({image.label for image in validation} - labels)
    if unknown:
        raise DataError(
            f"{parts.validation or f'the validation data of {spec.data}'} has labels that {parts.train} does not have: "
            f"{', '.join(unknown[:10])}"
        )
    return DataSplit(
        list(train),
        list(validation),
        _class_order(labels),
        is_held_out,
        [parts.train / label for label in dataset.empty_labels],
        parts.unused,
        notes,
        dataset.skipped,
    )


def _by_column(
    dataset: LabelledImages, source: Path, has_validation: bool
) -> tuple[Sequence[LabelledImage], Sequence[LabelledImage], tuple[str, ...]]:
    """Divide a table by its column of splits, or by the folders of its images, if one of them is for training.

    Args:
        dataset: The images.
        source: Where they are listed.
        has_validation: Whether there are other validation data.

    Returns:
        Training images, validation images, and sentences about the images of other splits.
    """
    splits = dataset.splits or _by_folder(dataset.images, source)
    train = find_part(splits, TRAIN)
    if train is None:
        note = f"the splits {', '.join(sorted(splits)[:5])} are not used, none of them is {TRAIN[0]}"
        return dataset.images, (), (note,) if len(splits) > 1 else ()
    validation = None if has_validation else find_part(splits, VALIDATION)
    notes = tuple(
        f"{plural(len(images), 'image')} of the split {name!r} {'is' if len(images) == 1 else 'are'} not used"
        for name, images in splits.items()
        if name not in (train, validation)
    )
    return splits[train], () if validation is None else splits[validation], notes


def _by_folder(images: Sequence[LabelledImage], source: Path) -> dict[str, list[LabelledImage]]:
    """Divide the images of a table by their first folders, as in train/1.png, if these are names of parts and several."""
    table = find_table(source)
    if table is None:
        return {}
    splits: dict[str, list[LabelledImage]] = {}
    for image in images:
        parts = image.path.parts[len(table.parent.parts) :] if image.path.is_relative_to(table.parent) else ()
        splits.setdefault(parts[0].lower() if parts else "", []).append(image)
    return splits if len(splits) > 1 and splits.keys() <= {*TRAIN, *VALIDATION} else {}


def _read(source: Path) -> LabelledImages:
    """List labelled images, and check that their labels are classes."""
    dataset = read_labelled_images(source)
    check_labels(dataset.labels)
    return dataset


def _class_order(labels: Iterable[str]) -> list[str]:
    """Sort labels, numbers by value: 2 before 10."""
    return sorted(labels, key=lambda label: (0, int(label), label) if label.isdecimal() else (1, 0, label))
