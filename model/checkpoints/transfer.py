"""Adapt a checkpoint to other labels, another image size or another kernel size."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinat.model.checkpoints.checkpoint import Checkpoint
from dinat.model.checkpoints.files import StateDict
from dinat.model.config import DinatConfig, image_size
from dinat.model.errors import ConfigError

HEAD = ("classifier.weight", "classifier.bias")


@dataclass(frozen=True)
class TransferResult:
    """An adapted checkpoint.

    Attributes:
        config: The new configuration.
        state_dict: Weights for the new configuration.
        changes: Descriptions of all differences from the original checkpoint.
    """

    config: DinatConfig
    state_dict: StateDict
    changes: Sequence[str]


def transfer(
    checkpoint: Checkpoint,
    labels: Sequence[str],
    *,
    size: int | None = None,
    kernel_size: int | None = None,
    drop_path_rate: float | None = None,
) -> TransferResult:
    """Adapt a checkpoint's weights to a classifier with these labels.

    A dilation that was the largest possible for the old image size becomes the largest possible for the new one. Other
    dilations do not change if they remain possible (as in the published 224 and 384 networks).

    Args:
        checkpoint: Checkpoint to adapt.
        labels: Class names in order. A class with a name that the checkpoint has keeps its row of the head; the others are
            newly initialized.
        size: Side of the square images in pixels; the checkpoint's if None.
        kernel_size: The checkpoint's if None. For another one, positional biases are interpolated (bicubic, with aligned
            corners, as Swin's for other window sizes, arXiv 2103.14030).
        drop_path_rate: The checkpoint's if None.

    Raises:
        ConfigError: The checkpoint is not a single-label classifier, or the new configuration is invalid.
        CheckpointError: The weights cannot be read.
    """
    old = checkpoint.config
    if old.problem_type not in (None, "single_label_classification"):
        raise ConfigError(f"{checkpoint.source} is trained for {old.problem_type}, only single-label classifiers are supported")
    config = _adapted_config(old, labels, size or image_size(old), kernel_size or old.kernel_size, drop_path_rate)
    changes = []
    if image_size(config) != image_size(old):
        changes.append(f"images of {image_size(config)} pixels (before: {image_size(old)})")
    if config.dilations != old.dilations:
        changes.append(f"dilations {config.dilations} (before: {old.dilations})")
    state_dict = checkpoint.state_dict()
    if config.kernel_size != old.kernel_size:
        state_dict = {
            key: _interpolate(value, config.kernel_size) if key.endswith(".rpb") else value for key, value in state_dict.items()
        }
        changes.append(f"kernel {config.kernel_size} (before: {old.kernel_size}): relative positional biases are interpolated")
    old_rows = {label: row for row, label in old.id2label.items()}
    if all(key in state_dict for key in HEAD):
        existing = [label for label in labels if label in old_rows]
        if list(labels) != [old.id2label[i] for i in range(len(old_rows))]:
            others = "" if len(existing) == len(labels) else ", the others newly initialized"
            changes.append(f"a head for {len(labels)} classes: {len(existing)} from the checkpoint{others}")
        state_dict |= _head(state_dict, [old_rows.get(label) for label in labels], old.initializer_range)
    return TransferResult(config, state_dict, changes)


def _adapted_config(
    old: DinatConfig, labels: Sequence[str], size: int, kernel_size: int, drop_path_rate: float | None
) -> DinatConfig:
    """Return a configuration with these labels, this image size and kernel size, and the dilations for them."""
    old_size = image_size(old)
    dilations = old.dilations
    if (size, kernel_size) != (old_size, old.kernel_size):
        dilations = [
            [_dilation(d, old_size // stride // old.kernel_size, size // stride // kernel_size) for d in stage]
            for stage, stride in zip(old.dilations, (4 * 2**i for i in range(len(old.depths))), strict=True)
        ]
    values = old.to_dict() | {
        "kernel_size": kernel_size,
        "dilations": dilations,
        "image_size": size,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    values |= {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
    return DinatConfig.from_dict({name: value for name, value in values.items() if name != "num_labels"})


def _dilation(old: int, old_limit: int, new_limit: int) -> int:
    """Return a layer's new dilation. The limits are the largest dilations with a window inside the feature map."""
    if old == 1:
        return 1
    return max(1, new_limit if old == old_limit else min(old, new_limit))


def _interpolate(rpb: Tensor, kernel_size: int) -> Tensor:
    """Interpolate (heads, 2k-1, 2k-1) to another kernel_size k."""
    side = 2 * kernel_size - 1
    return F.interpolate(rpb[None].float(), (side, side), mode="bicubic", align_corners=True)[0].to(rpb.dtype)


def _head(state_dict: StateDict, rows: Sequence[int | None], std: float) -> StateDict:
    """Return the head's weights: the given rows of the old head, newly initialized ones for None."""
    weight, bias = (state_dict[key] for key in HEAD)
    new_weight = torch.empty(len(rows), weight.shape[1], dtype=weight.dtype).normal_(std=std)
    new_bias = torch.zeros(len(rows), dtype=bias.dtype)
    for index, row in enumerate(rows):
        if row is not None:
            new_weight[index], new_bias[index] = weight[row], bias[row]
    return {HEAD[0]: new_weight, HEAD[1]: new_bias}
