"""Default hyperparameters by the amount of data and by what the initial checkpoint can contribute."""

import math
from collections.abc import Sequence

from dinat.app.training.recipe import Recipe
from dinat.model import DinatConfig

MIN_EPOCHS, MAX_EPOCHS = 10, 200
FINE_TUNING_STEPS, FULL_STEPS = 300, 1000
"""Optimizer steps that a training takes at least: of a network whose features fit, and of one that has to learn features."""

GENERAL_CLASSES = 100
"""Classes from which a checkpoint's features are general enough for other classes, as ImageNet's are."""

FINE_TUNING_RATE, FULL_RATE = 1e-4, 3e-3
"""Learning rates for the width REFERENCE_WIDTH."""

REFERENCE_WIDTH = 128
"""Width of the last stage for which FULL_RATE holds. AdamW's rate falls with the width (arXiv 2203.03466)."""


def learns_features(recipe: Recipe, initial: DinatConfig, classes: Sequence[str]) -> bool:
    """Return whether the network has to learn its features: random weights, or a checkpoint of few and other classes."""
    if recipe.weights == "random":
        return True
    return initial.num_labels < GENERAL_CLASSES and not set(classes) & set(initial.id2label.values())


def resolve(recipe: Recipe, initial: DinatConfig, classes: Sequence[str], num_images: int, num_devices: int) -> Recipe:
    """Return the recipe with values for all fields that are None.

    Args:
        recipe: The recipe as requested.
        initial: Configuration of the initial checkpoint.
        classes: Labels of the data.
        num_images: Number of training images.
        num_devices: Number of processes that train.
    """
    full = learns_features(recipe, initial, classes)
    steps_per_epoch = math.ceil(num_images / (recipe.batch_size * recipe.accumulate * num_devices))
    epochs = math.ceil((FULL_STEPS if full else FINE_TUNING_STEPS) / steps_per_epoch)
    rate = FULL_RATE * REFERENCE_WIDTH / max(REFERENCE_WIDTH, initial.hidden_size) if full else FINE_TUNING_RATE
    defaults = {
        "epochs": min(max(epochs, MIN_EPOCHS), MAX_EPOCHS),
        "learning_rate": rate,
    }
    return recipe.model_copy(update={name: value for name, value in defaults.items() if getattr(recipe, name) is None})
