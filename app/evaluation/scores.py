"""How good a classifier's answers are, and how far its scores can be believed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 15
"""Of the scores, for calibration (Guo et al., arXiv 1706.04599)."""

MOST_SHOWN = 40
"""Classes up to which tables and figures have them all."""


@dataclass
class Evaluation:
    """Answers to labelled pictures.

    names: the classes.  truth, best: (N,) int, the class of each picture and the one that is said first.  in_top5: (N,) bool.
    scores: (N,) float, of the best.  seconds: from the first picture to the last answer, decoding included.  unreadable: what
    is wrong with pictures that were left out, by path.  setting: what it was measured with.
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
    def pictures(self) -> int:
        """How many were answered."""
        return len(self.truth)

    @cached_property
    def right(self) -> npt.NDArray[np.bool_]:
        """(N,) bool: whether the best is true."""
        return np.equal(self.truth, self.best)

    @property
    def top1(self) -> float:
        """The share of pictures whose best class is true."""
        return float(self.right.mean())

    @property
    def top5(self) -> float:
        """The share of pictures whose class is among the five best."""
        return float(self.in_top5.mean())

    @cached_property
    def confusion(self) -> npt.NDArray[np.int64]:
        """(classes, classes) int: how many pictures of each class (row) were said to be of each (column)."""
        count = len(self.names)
        return np.bincount(self.truth * count + self.best, minlength=count * count).reshape(count, count)

    @cached_property
    def reliability(self) -> list[dict[str, float]]:
        """For each bin of scores that has any: pictures, mean score, accuracy."""
        places = np.minimum((self.scores * BINS).astype(int), BINS - 1)
        return [
            {
                "pictures": int((places == i).sum()),
                "score": float(self.scores[places == i].mean()),
                "accuracy": float(self.right[places == i].mean()),
            }
            for i in range(BINS)
            if (places == i).any()
        ]

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: the mean distance between score and accuracy over the bins, by their pictures."""
        gaps = (row["pictures"] * abs(row["score"] - row["accuracy"]) for row in self.reliability)
        return sum(gaps) / self.pictures

    @cached_property
    def by_class(self) -> list[dict[str, Any]]:
        """For each class that has pictures: their number, recall, precision (None if it was never said), most said instead."""
        said = self.confusion.sum(axis=0)
        rows = []
        for i, name in enumerate(self.names):
            total = int(self.confusion[i].sum())
            if not total:
                continue
            hits = int(self.confusion[i, i])
            wrong = self.confusion[i].copy()
            wrong[i] = 0
            instead = int(wrong.argmax())
            rows.append(
                {
                    "class": name,
                    "pictures": total,
                    "recall": hits / total,
                    "precision": hits / int(said[i]) if said[i] else None,
                    "said instead": f"{self.names[instead]} ({wrong[instead]})" if wrong[instead] else "",
                }
            )
        return rows

    @property
    def shown_classes(self) -> list[dict[str, Any]]:
        """Those of by_class that a page has room for: all, or the MOST_SHOWN of lowest recall."""
        rows = self.by_class
        return rows if len(rows) <= MOST_SHOWN else sorted(rows, key=lambda row: row["recall"])[:MOST_SHOWN]

    @property
    def pictures_per_second(self) -> float:
        """Decoding included."""
        return self.pictures / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            **self.setting,
            "pictures": self.pictures,
            "top1": self.top1,
            "top5": self.top5,
            "calibration_error": self.calibration_error,
            "pictures_per_second": self.pictures_per_second,
            "classes": self.by_class,
            "reliability": self.reliability,
            "confusion": {"labels": list(self.names), "rows": self.confusion.tolist()} if len(self.names) <= 100 else None,
            "unreadable": self.unreadable,
        }
