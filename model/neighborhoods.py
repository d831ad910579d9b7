"""The attention neighborhood of one image point in every layer: its keys and their weights."""

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
    """The neighborhood of one query in one layer.

    Attributes:
        stage: Stage number, from 1.
        layer: Layer number in the stage, from 1.
        dilation: Distance between neighboring keys.
        size: (height, width) of the layer's feature map.
        query: (row, column) in the feature map.
        rows: Rows of the kernel_size keys; a row at or beyond the height is padding.
        columns: Columns of the kernel_size keys; a column at or beyond the width is padding.
        weights: Attention weights (heads, kernel_size, kernel_size) float32, which sum to 1 in each head.
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
    """Return the neighborhood of an image point in each layer, in order.

    The weights are softmax(scale * q k^T + rpb) over the window (DiNAT, arXiv 2209.15001, section 3).

    Args:
        network: Classifier in eval mode.
        pixel_values: (1, 3, H, W).
        y: Vertical position, 0 at the top edge, 1 at the bottom edge.
        x: Horizontal position, 0 at the left edge, 1 at the right edge.
    """
    recorded: list[Neighborhood] = []

    def record(stage: int, layer: int, module: Attention, args: tuple[Any, ...]) -> None:
        """Record a neighborhood from the input of a layer's attention, which is not padded yet."""
        features = args[0]
        height, width = features.shape[1], features.shape[2]
        query = min(int(y * height), height - 1), min(int(x * width), width - 1)
        padded = nn.functional.pad(features, (0, 0, 0, max(0, module.window - width), 0, max(0, module.window - height)))
        rows, columns, weights = _weights(module.self, padded[0], query)
        dilation = module.self.dilation
        recorded.append(Neighborhood(stage, layer, dilation, (height, width), query, rows.tolist(), columns.tolist(), weights))

    stages: Iterable[Any] = network.dinat.encoder.levels
    hooks = [
        layer.attention.register_forward_pre_hook(partial(record, i + 1, j + 1))
        for i, stage in enumerate(stages)
        for j, layer in enumerate(stage.layers)
    ]
    try:
        network(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    return recorded


def _weights(module: NeighborhoodSelfAttention, x: Tensor, query: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows and columns of a query's keys, and their weights (heads, kernel_size, kernel_size).

    x: Input of the layer (H, W, C), after padding.
    """
    (rows, row_bias), (columns, column_bias) = (
        [table[position] for table in neighbors(length, module.kernel_size, module.dilation)]
        for position, length in zip(query, x.shape[:2], strict=True)
    )
    q = module.project(x[query])[0].view(module.heads, -1)
    k = module.project(x[rows][:, columns])[1].view(*rows.shape, *columns.shape, module.heads, -1)
    scores = torch.einsum("nd,ijnd->nij", q * q.shape[-1] ** -0.5, k) + module.rpb[:, row_bias][:, :, column_bias]
    return rows, columns, scores.flatten(1).softmax(-1).view_as(scores).float().cpu()
