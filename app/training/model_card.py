"""The model card and training curves written beside the weights."""

from collections import Counter
from collections.abc import Sequence
from html import escape

import torch
from matplotlib.figure import Figure

from dinat.app.plurals import plural
from dinat.app.training.spec import TrainingResult, TrainingSpec
from dinat.app.training.trainer import History
from dinat.model import DinatConfig

CURVES = "curves.png"

MAX_CLASSES_SHOWN = 100
"""Classes that the model card lists at most."""


def write_model_card(spec: TrainingSpec, result: TrainingResult, config: DinatConfig, changes: Sequence[str]) -> None:
    """Write README.md and curves.png to the output folder."""
    plot_curves(result.history).savefig(spec.out / CURVES, dpi=110)
    (spec.out / "README.md").write_text(_model_card(spec, result, config, changes), encoding="utf-8")


def plot_curves(history: History) -> Figure:
    """Plot losses and accuracies by epoch."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    numbers = [epoch.epoch for epoch in history.epochs]
    losses.plot(numbers, [epoch.train_loss for epoch in history.epochs], label="training (augmented)")
    losses.plot(numbers, [epoch.loss for epoch in history.epochs], label="validation")
    losses.set(xlabel="epoch", ylabel="cross entropy")
    losses.legend(frameon=False)
    accuracy.plot(numbers, [epoch.top1 for epoch in history.epochs], label="top-1")
    accuracy.plot(numbers, [epoch.top5 for epoch in history.epochs], label="top-5")
    best = history.epochs[history.best]
    accuracy.scatter([best.epoch], [best.top1], zorder=3)
    accuracy.set(xlabel="epoch", ylabel="validation accuracy", ylim=(None, 1.01))
    accuracy.legend(frameon=False)
    return figure


def table_cell(text: str) -> str:
    """Escape text for a cell of a Markdown table: bars, line ends and HTML."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _model_card(spec: TrainingSpec, result: TrainingResult, config: DinatConfig, changes: Sequence[str]) -> str:
    history, split, saved, recipe = result.history, result.split, result.saved_epoch, result.recipe
    selection = (
        "selected by validation accuracy, so the metrics above are slightly optimistic"
        if recipe.keep == "best"
        else "the last one"
    )
    train_counts = split.train_counts
    validation_counts = Counter(image.label for image in split.validation)
    rows = "\n".join(
        f"| {table_cell(label)} | {train_counts[label]} | {validation_counts[label]} |"
        for label in split.classes[:MAX_CLASSES_SHOWN]
    )
    num_hidden = len(split.classes) - MAX_CLASSES_SHOWN
    more = f"\n\n{plural(num_hidden, 'more class is', 'more classes are')} not shown." if num_hidden > 0 else ""
    settings = "\n".join(f"| {name} | {value} |" for name, value in recipe.model_dump().items())
    validation = f"held out, {recipe.validation:.0%} of each class" if split.is_held_out else f"{spec.validate_on or spec.data}"
    return f"""---
license: other
pipeline_tag: image-classification
library_name: dinat-serve
tags: [dinat, image-classification]
base_model: {spec.source}
---

# {spec.out.name}

A DiNAT classifier of {len(split.classes)} classes, trained by `dinat train` from {spec.source}.

| validation data | images | top-1 | top-5 | macro-F1 | cross entropy |
|---|---|---|---|---|---|
| {validation} | {len(split.validation)} | {saved.top1:.2%} | {saved.top5:.2%} | {saved.macro_f1:.2%} | {saved.loss:.4f} |

The weights are those of epoch {saved.epoch} of {len(history.epochs)}, {selection}.

![curves]({CURVES})

## Network

Kernel size {config.kernel_size}, dilations {config.dilations}, width {config.embed_dim}, depths {config.depths}.
{"".join(f"{chr(10)}- {change}" for change in changes)}

## Data

{spec.data}: {len(split.train)} training images.

| class | training | validation |
|---|---|---|
{rows}{more}

## Recipe

| | |
|---|---|
{settings}

Trained with PyTorch {torch.__version__}. The last run took {result.seconds:.0f} s, {result.images_per_second:.1f} images/s,
evaluation included.
"""
