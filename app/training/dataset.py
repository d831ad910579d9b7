"""A PyTorch dataset of labelled images, and its division into training and validation images."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

from dinat.app.errors import ServiceError
from dinat.app.evaluation.labelled_images import DataError, LabelledImage, LabelledImages
from dinat.app.image_paths import path_text
from dinat.app.images import decode, read_file
from dinat.app.plurals import plural


class LabelledImageDataset(Dataset[dict[str, Any]]):
    """Decoded and transformed images with their classes.

    Indexing raises DataError for an image that cannot be read.

    Args:
        images: Images on disk.
        classes: Labels in the order of the network's classes.
        transform: (RGB image, random seed) -> (3, H, W). The seed differs for each image and each epoch.
        max_pixels: Largest image, width times height.
        seed: Random seed of the dataset.
    """

    def __init__(
        self,
        images: Sequence[LabelledImage],
        classes: Sequence[str],
        transform: Callable[[Image.Image, str], Tensor],
        max_pixels: int,
        seed: int = 0,
    ) -> None:
        self._images, self._transform = images, transform
        self._class_of = {label: index for index, label in enumerate(classes)}
        self._max_pixels, self._seed, self._epoch = max_pixels, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. Trainer calls this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self._images[index].path, self._images[index].label
        try:
            image = decode(read_file(path), self._max_pixels)
        except ServiceError as error:
            raise DataError(f"{path_text(path)}: {error.detail}") from None
        return {
            "pixel_values": self._transform(image, f"{self._seed} {self._epoch} {index}"),
            "labels": self._class_of[label],
        }


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack items to a batch: pixel_values (B, 3, H, W), labels (B,) int64."""
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
    }


def stratified_split(dataset: LabelledImages, fraction: float, seed: int) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """Split images into training and validation images, with the same class proportions in both.

    Args:
        dataset: Labelled images.
        fraction: Fraction of the images to hold out for validation; at least one per class is held out.
        seed: Random seed.

    Returns:
        Training images, and validation images.

    Raises:
        DataError: There are too few images of a class, or in total, for both parts.
    """
    images, counts = dataset.images, Counter(image.label for image in dataset.images)
    single = sorted(label for label, count in counts.items() if count < 2)
    if single:
        raise DataError(
            f"{plural(len(single), 'class has', 'classes have')} only one image, which cannot be in both parts: "
            f"{', '.join(single[:10])}; "
            "add images, or use --validate-on with other data"
        )
    held_out = max(round(fraction * len(images)), len(counts))
    if len(images) - held_out < len(counts):
        raise DataError(
            f"{len(images)} images of {plural(len(counts), 'class', 'classes')} are too few to hold out {fraction:.0%} of them"
        )
    parts = train_test_split(images, test_size=held_out, random_state=seed, stratify=[image.label for image in images])
    return parts[0], parts[1]
