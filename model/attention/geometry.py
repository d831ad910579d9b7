"""Neighborhood geometry: the keys of each query's window, and the relative positional bias (RPB) entry of each key.

This module is the only implementation of NATTEN's window rule. All functions work per axis; a 2-D neighborhood is the product
of its two axes. Results are cached, and computed outside inference mode so that tensors first requested during inference can be
used in training.

Along an axis of length L with dilation d, the positions i with equal i mod d form a *dilation group*. Query i is member
p = i // d of its group, which has n = ceil((L - i mod d) / d) members. The window of the query is k consecutive members of the
group, starting at s = clamp(p - k//2, 0, n - k): it is centered on the query and, near a border, shifted inwards (never
truncated, never padded). The key at member m of the group uses row m - p + k - 1 of the bias table: row k - 1 is the query
itself, and larger rows are keys further down or to the right.

Source: NATTEN 0.14 to 0.17, get_window_start and get_pb_start; DiNAT, arXiv 2209.15001, section 3.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dinat.model.capture_safe_cache import constant
from dinat.model.errors import AttentionError


def window_start(position: Tensor, length: Tensor | int, kernel_size: int) -> Tensor:
    """Return the first key of each query's window, as a member index of its dilation group.

    The window is centered on the query, then clamped to the group.

    Args:
        position: Member index of each query in its group, (N,) int64.
        length: Number of members of each query's group, (N,) int64 or int, at least kernel_size.
        kernel_size: Odd window size.

    Returns:
        Member indices (N,) int64.
    """
    start = (position - kernel_size // 2).clamp(min=0)
    return torch.minimum(start, torch.as_tensor(length, device=position.device) - kernel_size)


@lru_cache(maxsize=256)
@constant
def neighbors(length: int, kernel_size: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Return the window of every query of an axis, in order of position.

    Returns:
        (indices, rpb_index), both (length, kernel_size) int64 on the CPU: the positions of the keys on the axis, and the row
        (or column) of the bias table for each key, in [0, 2 * kernel_size - 2].
    """
    query = torch.arange(length)
    group, position = query % dilation, query // dilation
    group_length = (length - group + dilation - 1) // dilation
    member = window_start(position, group_length, kernel_size)[:, None] + torch.arange(kernel_size)
    return member * dilation + group[:, None], member - position[:, None] + kernel_size - 1


@dataclass(frozen=True)
class AxisTiles:
    """Tiles of one axis with equal queries and keys up to a shift, so that they share one bias.

    Attributes:
        queries: Positions (T, t) int64 of the t queries of each of the T tiles.
        keys: Positions (T, h) int64 of each tile's halo: the union of its queries' windows.
        rpb_index: Row of the bias table (t, h) int64, -1 where the key is outside the query's window.
    """

    queries: Tensor
    keys: Tensor
    rpb_index: Tensor


@lru_cache(maxsize=256)
@constant
def axis_tiles(length: int, kernel_size: int, dilation: int, tile: int) -> tuple[AxisTiles, ...]:
    """Divide every dilation group of an axis into tiles of about `tile` queries, and group the tiles that share a bias.

    Every position of the axis is a query of exactly one tile.
    """
    tiles_by_bias: dict[tuple[tuple[int, ...], ...], list[tuple[Tensor, Tensor]]] = {}
    for group in range(min(dilation, length)):
        group_length = -(-(length - group) // dilation)
        for position in torch.arange(group_length).tensor_split(-(-group_length // tile)):
            start = window_start(position, group_length, kernel_size)
            key = torch.arange(int(start[0]), int(start[-1]) + kernel_size)
            inside = (key >= start[:, None]) & (key < start[:, None] + kernel_size)
            rpb_index = torch.where(inside, key - position[:, None] + kernel_size - 1, -1)
            rows = tuple(map(tuple, rpb_index.tolist()))
            tiles_by_bias.setdefault(rows, []).append((position * dilation + group, key * dilation + group))
    return tuple(
        AxisTiles(
            queries=torch.stack([queries for queries, _ in tiles]),
            keys=torch.stack([keys for _, keys in tiles]),
            rpb_index=torch.tensor(rows),
        )
        for rows, tiles in tiles_by_bias.items()
    )


def check_geometry(height: int, width: int, kernel_size: int, dilation: int) -> None:
    """Raise AttentionError unless every dilation group of a height x width feature map contains a whole window."""
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise AttentionError(f"kernel_size must be odd and at least 3, got {kernel_size}")
    if dilation < 1:
        raise AttentionError(f"dilation must be at least 1, got {dilation}")
    if height < kernel_size * dilation or width < kernel_size * dilation:  # min() would compare symbolic sizes with each other
        raise AttentionError(
            f"dilation {dilation} with kernel_size {kernel_size} requires a feature map of at least "
            f"{kernel_size * dilation}x{kernel_size * dilation}, got {height}x{width}: pad it or use a smaller dilation"
        )
