"""What the network sees from one point of a picture: in each layer which keys, and with which weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dinat.model.attention.geometry import neighbors
from dinat.model.dinat import Attention, DinatForImageClassification, NeighborhoodSelfAttention


@dataclass(frozen=True)
class Neighborhood:
    """The neighborhood of one query, in one layer.

    stage, layer: from 1.  dilation.  size: (height, width) of the layer's map.  query: (row, column) in it.
    rows, columns: kernel_size positions each; those from the size on are padding.
    weights: (heads, kernel_size, kernel_size) float32, of each row and column; they add up to 1 in each head.
    """

    stage: int
    layer: int
    dilation: int
    size: tuple[int, int]
    query: tuple[int, int]
    rows: list[int]
    columns: list[int]
    weights: Tensor


@torch.inference_mode()
def neighborhoods(network: DinatForImageClassification, pixel_values: Tensor, y: float, x: float) -> list[Neighborhood]:
    """The neighborhoods of the point (y, x) of a picture, one for each layer, first to last.

    pixel_values: (1, 3, H, W).  y, x: 0 for the upper and the left edge, up to 1 for the others.  The weights are those of the
    definition (DiNAT, arXiv 2209.15001, section 3): softmax(scale * q k^T + rpb) over the window.
    """
    seen: list[Neighborhood] = []

    def look(stage: int, number: int, module: Attention, given: tuple[Any, ...]) -> None:
        """Before a layer's attention: its input, not padded yet."""
        inputs = given[0]
        height, width = inputs.shape[1], inputs.shape[2]
        query = min(int(y * height), height - 1), min(int(x * width), width - 1)
        padded = nn.functional.pad(inputs, (0, 0, 0, max(0, module.window - width), 0, max(0, module.window - height)))
        rows, columns, weights = _weights(module.self, padded[0], query)
        dilation = module.self.dilation
        seen.append(Neighborhood(stage, number, dilation, (height, width), query, rows.tolist(), columns.tolist(), weights))

    stages: Iterable[Any] = network.dinat.encoder.levels
    hooks = [
        layer.attention.register_forward_pre_hook(partial(look, i + 1, j + 1))
        for i, stage in enumerate(stages)
        for j, layer in enumerate(stage.layers)
    ]
    try:
        network(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _weights(module: NeighborhoodSelfAttention, x: Tensor, query: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The keys that a query sees, as rows and columns, and the weight of each: (heads, kernel_size, kernel_size).

    x: (H, W, C), padded as the layer pads it.
    """
    (rows, row_bias), (columns, column_bias) = (
        [table[place] for table in neighbors(length, module.kernel_size, module.dilation)]
        for place, length in zip(query, x.shape[:2], strict=True)
    )
    q = module.project(x[query])[0].view(module.heads, -1)
    k = module.project(x[rows][:, columns])[1].view(*rows.shape, *columns.shape, module.heads, -1)
    scores = torch.einsum("nd,ijnd->nij", q * q.shape[-1] ** -0.5, k) + module.rpb[:, row_bias][:, :, column_bias]
    return rows, columns, scores.flatten(1).softmax(-1).view_as(scores).float().cpu()
