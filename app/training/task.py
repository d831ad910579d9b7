"""What is trained on what, and what came of it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from dinat.app.evaluation.labelled_images import Data, DataError, Labelled, read_data
from dinat.app.training.data import split
from dinat.app.training.recipe import Recipe
from dinat.app.training.trainer import Epoch, Progressed


@dataclass(frozen=True)
class Task:
    """What to train: from which checkpoint, on what, by which recipe, into which folder.

    validate_on: other labelled pictures than those held back of the data.  max_pixels: of the largest picture.
    """

    source: str
    revision: str | None
    data: Path
    validate_on: Path | None
    out: Path
    recipe: Recipe
    max_pixels: int


@dataclass(frozen=True)
class Parts:
    """The pictures of a task. classes: the labels in the order of the network's classes."""

    train: list[Labelled]
    held_back: list[Labelled]
    classes: list[str]
    empty: list[Path]

    def digest(self) -> str:
        """Of which pictures have which labels."""
        lines = (f"{part} {one.path} {one.label}" for part, ones in (("t", self.train), ("v", self.held_back)) for one in ones)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Trained:
    """What came of it. kept: the epoch whose weights are in the folder.  seconds: of this run."""

    parts: Parts
    progress: Progressed
    kept: Epoch
    seconds: float
    pictures_per_second: float


def read_parts(task: Task) -> Parts:
    """The data, parted. Raises DataError for what no network could be trained on."""
    data = read_data(task.data)
    absent = [str(one.path) for one in data.pictures if not one.path.is_file()]
    if absent:
        raise DataError(f"{len(absent)} pictures of {task.data} are not there: {', '.join(absent[:5])}")
    if len(data.labels) < 2:
        raise DataError(f"{task.data} has pictures of one class alone, {data.labels[0]}: nothing can be told apart")
    empty = [task.data / label for label in data.empty]
    if task.validate_on is None:
        train, held_back = split(data, task.recipe.validation, task.recipe.seed)
        return Parts(train, held_back, _ordered(data), empty)
    other = read_data(task.validate_on)
    unknown = sorted(set(other.labels) - set(data.labels))
    if unknown:
        raise DataError(f"{task.validate_on} has labels that {task.data} has not: {', '.join(unknown[:10])}")
    return Parts(list(data.pictures), list(other.pictures), _ordered(data), empty)


def _ordered(data: Data) -> list[str]:
    """Labels as people count: 2 before 10."""
    return sorted(data.labels, key=lambda label: (0, int(label), label) if label.isdecimal() else (1, 0, label))
