"""Rows of text about an evaluation, for the terminal and the HTML report."""

from typing import Any

from dinat.app.evaluation.scores import Evaluation

MAX_CLASSES_SHOWN = 40
"""Classes that tables and figures show at most."""

LOWEST_RECALL = f"The {MAX_CLASSES_SHOWN} classes with the lowest recall"
"""Title of the classes if there are more."""


def summary(evaluation: Evaluation) -> dict[str, str]:
    """Return what was evaluated, and the metrics over all images."""
    return {
        **evaluation.setting,
        "images": str(evaluation.num_images),
        "top-1": f"{evaluation.top1:.2%}",
        "top-5": f"{evaluation.top5:.2%}",
        "calibration error": f"{evaluation.calibration_error:.2%}",
        "images/s": f"{evaluation.images_per_second:.1f}",
    }


def shown_classes(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return the metrics of each class with images, or of the MAX_CLASSES_SHOWN with the lowest recall."""
    rows = evaluation.by_class
    if hides_classes(evaluation):
        rows = sorted(rows, key=lambda row: row["recall"])[:MAX_CLASSES_SHOWN]
    return [{name: _text(value) for name, value in row.items()} for row in rows]


def hides_classes(evaluation: Evaluation) -> bool:
    """Return whether shown_classes omits some."""
    return len(evaluation.by_class) > MAX_CLASSES_SHOWN


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}"
    return "" if value is None else str(value)
