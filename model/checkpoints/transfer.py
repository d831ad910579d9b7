"""A checkpoint made fit for other pictures than it was trained on: other labels, another size, another kernel."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinat.model.checkpoints.checkpoint import Checkpoint
from dinat.model.checkpoints.files import StateDict
from dinat.model.config import DinatConfig
from dinat.model.errors import ConfigError

HEAD = ("classifier.weight", "classifier.bias")


@dataclass(frozen=True)
class Transferred:
    """A configuration, the weights that fit it, and in words what is not as it was."""

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
) -> Transferred:
    """The checkpoint's weights for a classifier of these labels, in this order.

    labels: a class that the checkpoint has by this name keeps its row of the head; the others start as a new head does.
    size: pixels of a side of the square pictures to come; the checkpoint's if None.  kernel_size: the same, and positional
    biases are interpolated, bicubic, corners on corners (as Swin's are for windows, arXiv 2103.14030).
    Dilations that filled the maps of the old size fill those of the new one, the others stay where they fit (as the published
    224 and 384 networks have them).  Raises ConfigError, CheckpointError.
    """
    old = checkpoint.config
    if getattr(old, "problem_type", None) not in (None, "single_label_classification"):
        raise ConfigError(f"{checkpoint.source} is trained for {old.problem_type}, here pictures have one label each")
    changes = []
    old_size = getattr(old, "image_size", 224)
    new_size, new_kernel = size or old_size, kernel_size or old.kernel_size
    dilations = old.dilations
    if (new_size, new_kernel) != (old_size, old.kernel_size):
        dilations = [
            [_dilation(d, old_size // side // old.kernel_size, new_size // side // new_kernel) for d in stage]
            for stage, side in zip(old.dilations, (4 * 2**i for i in range(len(old.depths))), strict=True)
        ]
    if new_size != old_size:
        changes.append(f"pictures of {new_size} pixels, {old_size} before")
    if dilations != old.dilations:
        changes.append(f"dilations {dilations}, {old.dilations} before")
    values = old.to_dict() | {
        "kernel_size": new_kernel,
        "dilations": dilations,
        "image_size": new_size,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    values |= {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
    config = DinatConfig.from_dict({name: value for name, value in values.items() if name != "num_labels"})
    state_dict = checkpoint.state_dict()
    if new_kernel != old.kernel_size:
        state_dict = {key: _resized(value, new_kernel) if key.endswith(".rpb") else value for key, value in state_dict.items()}
        changes.append(f"kernel {new_kernel}, {old.kernel_size} before: relative positional biases are interpolated")
    known = {label: row for row, label in old.id2label.items()}
    if all(key in state_dict for key in HEAD):
        kept = [label for label in labels if label in known]
        if list(labels) != [old.id2label[i] for i in range(len(known))]:
            others = "" if len(kept) == len(labels) else ", the others new"
            changes.append(f"a head for {len(labels)} classes: {len(kept)} of them known to the checkpoint{others}")
        state_dict |= _head(state_dict, [known.get(label) for label in labels], old.initializer_range)
    return Transferred(config, state_dict, changes)


def _dilation(old: int, old_fill: int, new_fill: int) -> int:
    """A layer's dilation; the fills are the largest at which a kernel lies within the map."""
    if old == 1:
        return 1
    return max(1, new_fill if old == old_fill else min(old, new_fill))


def _resized(rpb: Tensor, kernel_size: int) -> Tensor:
    """(heads, 2k-1, 2k-1) for another k."""
    side = 2 * kernel_size - 1
    return F.interpolate(rpb[None].float(), (side, side), mode="bicubic", align_corners=True)[0].to(rpb.dtype)


def _head(state_dict: StateDict, rows: Sequence[int | None], spread: float) -> StateDict:
    """The head's weights: these rows of the old one, new ones where None."""
    weight, bias = (state_dict[key] for key in HEAD)
    new_weight = torch.empty(len(rows), weight.shape[1], dtype=weight.dtype).normal_(std=spread)
    new_bias = torch.zeros(len(rows), dtype=bias.dtype)
    for index, row in enumerate(rows):
        if row is not None:
            new_weight[index], new_bias[index] = weight[row], bias[row]
    return {HEAD[0]: new_weight, HEAD[1]: new_bias}
