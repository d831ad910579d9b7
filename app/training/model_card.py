"""What a training leaves beside its weights for people: a model card and its curves."""

from collections import Counter
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from dinat.app.training.task import Task, Trained
from dinat.app.training.trainer import Progressed
from dinat.model import DinatConfig

CURVES = "curves.png"

MOST_SHOWN = 100
"""Classes up to which the card names them all."""


def write_card(task: Task, trained: Trained, config: DinatConfig, changes: Sequence[str]) -> None:
    """README.md and curves.png, in the task's folder."""
    curves(trained.progress).savefig(task.out / CURVES, dpi=110)
    (task.out / "README.md").write_text(_card(task, trained, config, changes), encoding="utf-8")


def curves(progress: Progressed) -> Figure:
    """Losses, and accuracy, by epoch."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    epochs = [one.epoch for one in progress.epochs]
    losses.plot(epochs, [one.train_loss for one in progress.epochs], label="training, augmented")
    losses.plot(epochs, [one.loss for one in progress.epochs], label="validation")
    losses.set(xlabel="epoch", ylabel="cross entropy")
    losses.legend(frameon=False)
    accuracy.plot(epochs, [one.top1 for one in progress.epochs], label="top-1")
    accuracy.plot(epochs, [one.top5 for one in progress.epochs], label="top-5")
    best = progress.epochs[progress.best]
    accuracy.scatter([best.epoch], [best.top1], zorder=3)
    accuracy.set(xlabel="epoch", ylabel="accuracy on the validation", ylim=(None, 1.01))
    accuracy.legend(frameon=False)
    return figure


def _card(task: Task, trained: Trained, config: DinatConfig, changes: Sequence[str]) -> str:
    progress, parts, kept, recipe = trained.progress, trained.parts, trained.kept, task.recipe
    chosen = (
        "the best of them on the validation, which makes these figures a little too good"
        if recipe.keep == "best"
        else "the last"
    )
    held = Counter(one.label for one in parts.held_back)
    counts = Counter(one.label for one in parts.train)
    rows = "\n".join(f"| {label} | {counts[label]} | {held[label]} |" for label in parts.classes[:MOST_SHOWN])
    more = f"\n\n{len(parts.classes) - MOST_SHOWN} more classes are left out here." if len(parts.classes) > MOST_SHOWN else ""
    settings = "\n".join(f"| {name} | {value} |" for name, value in recipe.model_dump().items())
    held_back = f"held back of it, {recipe.validation:.0%} of each class" if task.validate_on is None else f"{task.validate_on}"
    return f"""---
license: other
pipeline_tag: image-classification
library_name: dinat-serve
tags: [dinat, image-classification]
base_model: {task.source}
---

# {task.out.name}

A DiNAT classifier of {len(parts.classes)} classes, trained by `dinat train` from {task.source}.

| measured on | pictures | top-1 | top-5 | cross entropy |
|---|---|---|---|---|
| {held_back} | {len(parts.held_back)} | {kept.top1:.2%} | {kept.top5:.2%} | {kept.loss:.4f} |

The weights are those of epoch {kept.epoch} of {len(progress.epochs)}, {chosen}.

![curves]({CURVES})

## Network

Kernel {config.kernel_size}, dilations {config.dilations}, width {config.embed_dim}, layers {config.depths}.
{"".join(f"{chr(10)}- {change}" for change in changes)}

## Data

{task.data}: {len(parts.train)} pictures to train on.

| class | to train | held back |
|---|---|---|
{rows}{more}

## Recipe

| | |
|---|---|
{settings}

PyTorch {torch.__version__}. Its last run took {trained.seconds:.0f} s, {trained.pictures_per_second:.1f} pictures/s, evaluation
included.
"""
