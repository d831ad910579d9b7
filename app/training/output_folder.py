"""The output folder of a training: its state, by which an interrupted training is resumed, and a finished one continued."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dinat.app.evaluation.labelled_images import LabelledImage
from dinat.app.plurals import plural
from dinat.app.training.recipe import Recipe
from dinat.app.training.spec import DataSplit, TrainingSpec
from dinat.app.training.trainer import last_complete_checkpoint
from dinat.model import DinatError

STATE_FILE, CHECKPOINTS, SPLIT_FILE = "training.json", "checkpoints", "split.json"


class TrainingError(DinatError):
    """A training that cannot start or resume."""


@dataclass(frozen=True)
class Previous:
    """A training that the output folder contains.

    Attributes:
        recipe: Its recipe, with values for all fields, and the requested number of epochs.
        split: Its images that still exist.
        num_missing: Its images that do not exist anymore.
        checkpoint: The checkpoint to resume from, or None if it has none yet.
    """

    recipe: Recipe
    split: DataSplit
    num_missing: int
    checkpoint: Path | None


def find_previous(spec: TrainingSpec, split: DataSplit) -> Previous | None:
    """Return the training of the same specification that the output folder contains, or None if there is none.

    The images that are there now decide nothing but whether images are gone: which of them validate does not change.

    Raises:
        TrainingError: The folder is part of the data, has other content or not all of a training, or has a training that
            differs, or a finished one of at least as many epochs.
    """
    if spec.out.resolve().is_relative_to(spec.data.resolve()):
        raise TrainingError(f"{spec.out} is inside {spec.data}, whose folders are labels: use another folder for the output")
    state_file, split_file = spec.out / STATE_FILE, spec.out / CHECKPOINTS / SPLIT_FILE
    if not state_file.exists():
        if spec.out.exists() and {path.name for path in spec.out.iterdir()} - {CHECKPOINTS, f"{STATE_FILE}.part"}:
            raise TrainingError(f"{spec.out} exists and does not contain a training: use another folder")
        return None
    stored = json.loads(state_file.read_text(encoding="utf-8"))
    requested, recipe = Recipe(**stored.get("requested", stored["recipe"])), Recipe(**stored["recipe"])
    assert recipe.epochs is not None
    epochs = spec.recipe.epochs or recipe.epochs
    kind = "a finished" if stored["finished"] else "an interrupted"
    differences = spec.recipe.model_copy(update={"epochs": requested.epochs}).differences(requested)
    if epochs < recipe.epochs:
        differences.insert(0, f"epochs is {epochs}, was {recipe.epochs}")
    current = _source(spec)
    differences += [f"{name} is {value}, was {stored[name]}" for name, value in current.items() if value != stored[name]]
    if differences:
        raise TrainingError(f"{spec.out} contains {kind} training that differs: {'; '.join(differences)}")
    if stored["finished"] and epochs == recipe.epochs:
        raise TrainingError(
            f"{spec.out} contains a finished training of {plural(epochs, 'epoch')}: use another folder, or continue it "
            "with more --epochs"
        )
    checkpoint = last_complete_checkpoint(spec.out / CHECKPOINTS)
    if not split_file.exists() or (stored["finished"] and checkpoint is None):
        raise TrainingError(f"{spec.out / CHECKPOINTS} is not complete: the training cannot be resumed, use another folder")
    missing = [name for name in ("config.json", "model.safetensors") if not (spec.out / name).exists()]
    if checkpoint is not None and missing:
        raise TrainingError(f"{spec.out} has no {missing[0]} anymore: the training cannot be resumed, use another folder")
    before = _read_split(split_file, split)
    same, num_missing = _still_there(before, split, spec)
    return Previous(recipe.model_copy(update={"epochs": epochs}), same, num_missing, checkpoint)


def create(spec: TrainingSpec, recipe: Recipe, split: DataSplit) -> None:
    """Create the output folder of a training that starts."""
    (spec.out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    parts = {name: [[str(image.path), image.label] for image in getattr(split, name)] for name in ("train", "validation")}
    _write_json(spec.out / CHECKPOINTS / SPLIT_FILE, parts | {"classes": split.classes})
    write_state(spec, recipe, finished=False)


def write_state(spec: TrainingSpec, recipe: Recipe, finished: bool) -> None:
    """Write the specification, and whether the training is finished."""
    recipes = {"requested": spec.recipe.model_dump(), "recipe": recipe.model_dump()}
    _write_json(spec.out / STATE_FILE, _source(spec) | recipes | {"finished": finished}, indent=2)


def _write_json(file: Path, values: dict[str, Any], **options: Any) -> None:
    """Write a file atomically. Its text is ASCII: names of files may be no Unicode."""
    temporary = file.with_name(f"{file.name}.part")
    temporary.write_text(json.dumps(values, **options) + "\n")
    os.replace(temporary, file)


def _source(spec: TrainingSpec) -> dict[str, Any]:
    validate_on = None if spec.validate_on is None else str(spec.validate_on)
    return {"source": spec.source, "data": str(spec.data), "validate_on": validate_on}


def _read_split(file: Path, now: DataSplit) -> DataSplit:
    """Return the split of a training that has begun. What is not stored is that of the data now."""
    values = json.loads(file.read_text())
    train, validation = ([LabelledImage(Path(path), label) for path, label in values[name]] for name in ("train", "validation"))
    return replace(now, train=train, validation=validation, classes=values["classes"])


def _still_there(before: DataSplit, now: DataSplit, spec: TrainingSpec) -> tuple[DataSplit, int]:
    """Return the split without images that are gone, and their number. Raises TrainingError for new or relabelled ones."""
    present = {*now.train, *now.validation}
    new = sorted(str(image.path) for image in present - {*before.train, *before.validation})
    if new:
        raise TrainingError(
            f"{spec.out} contains a training that differs: the data has "
            f"{plural(len(new), 'other image or label', 'other images or labels')}, such as {new[0]}"
        )

    def existing(images: Sequence[LabelledImage]) -> list[LabelledImage]:
        return [image for image in images if image in present]

    same = replace(before, train=existing(before.train), validation=existing(before.validation))
    return same, len(before.train) + len(before.validation) - len(same.train) - len(same.validation)
