"""Accuracy and calibration of a classifier."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 15
"""Number of score bins of the calibration error (Guo et al., arXiv 1706.04599)."""

MAX_CONFUSION_CLASSES = 100
"""Classes up to which the JSON output has the confusion matrix."""


@dataclass
class Evaluation:
    """Predictions for N labelled images, and metrics of them.

    Attributes:
        names: Names of the classes.
        truth: (N,) int64, true class of each image.
        best: (N,) int64, predicted class of each image.
        in_top5: (N,) bool, whether the true class is among the five best.
        scores: (N,) float64, score of each predicted class.
        seconds: Time from the first image to the last result, decoding included.
        unreadable: Errors of images that could not be read, by path. They do not count in any metric.
        setting: What was evaluated: preprocessing, runtime, precision and device.
    """

    names: Sequence[str]
    truth: npt.NDArray[np.int64]
    best: npt.NDArray[np.int64]
    in_top5: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float64]
    seconds: float
    unreadable: dict[str, str] = field(default_factory=dict)
    setting: dict[str, str] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        """Number of classified images, N."""
        return len(self.truth)

    @cached_property
    def is_correct(self) -> npt.NDArray[np.bool_]:
        """(N,) bool, whether the predicted class is the true class."""
        return np.equal(self.truth, self.best)

    @property
    def top1(self) -> float:
        """Top-1 accuracy, in 0..1."""
        return float(self.is_correct.mean())

    @property
    def top5(self) -> float:
        """Top-5 accuracy, in 0..1."""
        return float(self.in_top5.mean())

    @cached_property
    def confusion(self) -> npt.NDArray[np.int64]:
        """Confusion matrix, (classes, classes) int64: images of each true class (row) by predicted class (column)."""
        count = len(self.names)
        return np.bincount(self.truth * count + self.best, minlength=count * count).reshape(count, count)

    @cached_property
    def reliability(self) -> list[dict[str, float]]:
        """Number of images, mean score and accuracy of each non-empty bin of scores."""
        bins = np.minimum((self.scores * BINS).astype(int), BINS - 1)
        return [
            {
                "images": int((bins == i).sum()),
                "score": float(self.scores[bins == i].mean()),
                "accuracy": float(self.is_correct[bins == i].mean()),
            }
            for i in range(BINS)
            if (bins == i).any()
        ]

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: mean distance of score and accuracy over bins, weighted by number of images."""
        gaps = (row["images"] * abs(row["score"] - row["accuracy"]) for row in self.reliability)
        return sum(gaps) / self.num_images

    @cached_property
    def by_class(self) -> list[dict[str, Any]]:
        """Metrics of each class with images: their number, recall, precision (None if never predicted), main confusion."""
        predicted = self.confusion.sum(axis=0)
        rows = []
        for i, name in enumerate(self.names):
            total = int(self.confusion[i].sum())
            if not total:
                continue
            hits = int(self.confusion[i, i])
            errors = self.confusion[i].copy()
            errors[i] = 0
            confused = int(errors.argmax())
            rows.append(
                {
                    "class": name,
                    "images": total,
                    "recall": hits / total,
                    "precision": hits / int(predicted[i]) if predicted[i] else None,
                    "confused with": f"{self.names[confused]} ({errors[confused]})" if errors[confused] else "",
                }
            )
        return rows

    @property
    def images_per_second(self) -> float:
        """Throughput, decoding included."""
        return self.num_images / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return all metrics, for JSON."""
        confusion = {"labels": list(self.names), "rows": self.confusion.tolist()}
        return {
            **self.setting,
            "images": self.num_images,
            "top1": self.top1,
            "top5": self.top5,
            "calibration_error": self.calibration_error,
            "images_per_second": self.images_per_second,
            "classes": self.by_class,
            "reliability": self.reliability,
            "confusion": confusion if len(self.names) <= MAX_CONFUSION_CLASSES else None,
            "unreadable": self.unreadable,
        }
