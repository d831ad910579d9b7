"""Labelled pictures as Trainer takes them, and which of them are held back."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

from dinat.app.errors import ServiceError
from dinat.app.evaluation.labelled_images import Data, DataError, Labelled
from dinat.app.images import decode


class Pictures(Dataset[dict[str, Any]]):
    """Decoded and prepared pictures with their classes; a new turn of chance for each picture in each epoch.

    prepare: (RGB picture, seed) -> (3, H, W).  Raises DataError at a picture that cannot be read.
    """

    def __init__(
        self,
        pictures: Sequence[Labelled],
        class_of: Mapping[str, int],
        prepare: Callable[[Image.Image, str], Tensor],
        max_pixels: int,
        seed: int = 0,
    ) -> None:
        self._pictures, self._class_of, self._prepare = pictures, class_of, prepare
        self._max_pixels, self._seed, self._epoch = max_pixels, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Trainer says which epoch begins."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self._pictures[index].path, self._pictures[index].label
        try:
            picture = decode(path.read_bytes(), self._max_pixels)
        except ServiceError as error:
            raise DataError(f"{path}: {error.detail}") from None
        except OSError as error:
            raise DataError(str(error)) from None
        return {
            "pixel_values": self._prepare(picture, f"{self._seed} {self._epoch} {index}"),
            "labels": self._class_of[label],
        }


def together(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch: pixel_values (B, 3, H, W), labels (B,) int64."""
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
    }


def split(data: Data, share: float, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """What to train on and what to hold back: this share of the pictures, of every class as many as its part is.

    Raises DataError where a class is too small for both.
    """
    pictures, counts = data.pictures, Counter(picture.label for picture in data.pictures)
    alone = sorted(label for label, count in counts.items() if count < 2)
    if alone:
        raise DataError(
            f"{len(alone)} classes have but one picture, which cannot be in both parts: {', '.join(alone[:10])}; "
            "add pictures, or give --validate-on other data"
        )
    held_back = max(round(share * len(pictures)), len(counts))
    if len(pictures) - held_back < len(counts):
        raise DataError(f"{len(pictures)} pictures of {len(counts)} classes are too few to hold back {share:.0%} of them")
    parts = train_test_split(pictures, test_size=held_back, random_state=seed, stratify=[picture.label for picture in pictures])
    return parts[0], parts[1]
