"""Checks of the labels of training data."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from dinat.app.evaluation.labelled_images import DataError

IMBALANCE = 10
"""Ratio of the most and the least frequent class from which classes are reported as imbalanced."""


def check_labels(labels: Iterable[str]) -> None:
    """Check that labels are the names of classes, one per image.

    Raises:
        DataError: Labels are lists or numbers (multi-label classification, regression).
    """
    labels = sorted(set(labels))
    parts = Counter(part for label in labels for part in set(_parts(label)))
    several = [
        label
        for label in labels
        if label.startswith("[") or (len(_parts(label)) > 1 and any(parts[part] > 1 for part in _parts(label)))
    ]
    if several:
        raise DataError(
            f"the label {several[0]!r} names several classes: dinat train trains single-label classifiers, not multi-label "
            "ones; give each image one label"
        )
    numbers = [label for label in labels if _is_number(label)]
    fractions = [label for label in numbers if not float(label).is_integer()]
    if fractions and len(numbers) == len(labels):
        raise DataError(
            f"the labels are numbers, such as {fractions[0]}: dinat train trains classifiers, not "
            "regression; use names of classes"
        )


def _parts(label: str) -> list[str]:
    """Divide a label at bars and semicolons. Commas are part of many names."""
    return re.split(r"[|;]", label)


def imbalance(counts: Mapping[str, int]) -> str | None:
    """Describe the imbalance of classes, or return None if there is little."""
    ordered = Counter(counts).most_common()
    (most, largest), (least, smallest) = ordered[0], ordered[-1]
    if largest < IMBALANCE * smallest:
        return None
    return (
        f"the classes are imbalanced: {largest} images of {most}, {smallest} of {least}. Macro-F1 counts every class equally; "
        "--class-weights balanced does so in the loss"
    )


def balanced_weights(counts: Mapping[str, int], classes: Iterable[str]) -> list[float]:
    """Return the weight of each class in the loss, images / (classes * images of the class), as in scikit-learn."""
    total = sum(counts.values())
    return [total / (len(counts) * counts[label]) if counts.get(label) else 0.0 for label in classes]


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True
