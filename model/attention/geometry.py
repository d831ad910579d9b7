"""Which keys a query sees, and which entry of the relative positional bias each of them gets.

The one place that knows NATTEN's rule. Everything is per axis; a 2-D neighborhood is the product of its two axes.
Tables are kept, and made outside inference mode even when first wanted inside it, so that training can use them later.

Along an axis of length L with dilation d, the positions i with the same i mod d form a *dilation group*. Inside its group
the query i is at p = i // d, and the group has n = ceil((L - i mod d) / d) members. The query sees k consecutive
members of its group, starting at s = clamp(p - k//2, 0, n - k): a window centred on the query and, near a border, shifted
inwards (never cut, never padded). The key at member m of the group gets row m - p + k - 1 of the bias table, so that
row k - 1 is the query itself and a larger row a key further down or to the right.

Source: NATTEN 0.14-0.17, get_window_start and get_pb_start; DiNAT, arXiv 2209.15001, section 3.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dinat.model.errors import AttentionError


def window_start(position: Tensor, length: Tensor | int, kernel_size: int) -> Tensor:
    """First key a query sees, as a member of its dilation group: the window is centred, then clamped to the group.

    position: (N,) int64, the query's place in its group;  length: (N,) or int, the group's size, >= kernel_size.
    Returns (N,) int64.
    """
    start = (position - kernel_size // 2).clamp(min=0)
    return torch.minimum(start, torch.as_tensor(length, device=position.device) - kernel_size)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def neighbors(length: int, kernel_size: int, dilation: int) -> tuple[Tensor, Tensor]:
    """The keys every query of an axis sees, nearest to the start of the axis first.

    Returns (indices, rpb_index), both (length, kernel_size) int64 on the CPU: the positions of the keys on the axis, and the
    row (or column) of the bias table that each takes, in [0, 2 * kernel_size - 2].
    """
    query = torch.arange(length)
    group, position = query % dilation, query // dilation
    group_length = (length - group + dilation - 1) // dilation
    member = window_start(position, group_length, kernel_size)[:, None] + torch.arange(kernel_size)
    return member * dilation + group[:, None], member - position[:, None] + kernel_size - 1


@dataclass(frozen=True)
class AxisTiles:
    """Tiles of one axis that are alike: the same queries and keys up to a shift, so one bias serves them all.

    queries: (T, t) int64 positions;  keys: (T, h) int64, the halo each tile's queries see between them, in one run;
    rpb_index: (t, h) int64 row of the bias table, -1 where the key is outside the query's window.
    """

    queries: Tensor
    keys: Tensor
    rpb_index: Tensor


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def axis_tiles(length: int, kernel_size: int, dilation: int, tile: int) -> tuple[AxisTiles, ...]:
    """Cut every dilation group of an axis into tiles of about `tile` queries, and gather the tiles that are alike.

    Every position of the axis is a query of exactly one tile.
    """
    alike: dict[tuple[tuple[int, ...], ...], list[tuple[Tensor, Tensor]]] = {}
    for group in range(min(dilation, length)):
        group_length = -(-(length - group) // dilation)
        for position in torch.arange(group_length).tensor_split(-(-group_length // tile)):
            start = window_start(position, group_length, kernel_size)
            key = torch.arange(int(start[0]), int(start[-1]) + kernel_size)
            inside = (key >= start[:, None]) & (key < start[:, None] + kernel_size)
            rpb_index = torch.where(inside, key - position[:, None] + kernel_size - 1, -1)
            rows = tuple(map(tuple, rpb_index.tolist()))
            alike.setdefault(rows, []).append((position * dilation + group, key * dilation + group))
    return tuple(
        AxisTiles(
            queries=torch.stack([queries for queries, _ in tiles]),
            keys=torch.stack([keys for _, keys in tiles]),
            rpb_index=torch.tensor(rows),
        )
        for rows, tiles in alike.items()
    )


def check_geometry(height: int, width: int, kernel_size: int, dilation: int) -> None:
    """Raise AttentionError unless every dilation group of a height x width map holds a whole window."""
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise AttentionError(f"kernel_size must be odd and at least 3, got {kernel_size}")
    if dilation < 1:
        raise AttentionError(f"dilation must be at least 1, got {dilation}")
    if min(height, width) < kernel_size * dilation:
        raise AttentionError(
            f"dilation {dilation} with kernel {kernel_size} needs a map of at least {kernel_size * dilation}, "
            f"got {height}x{width}: pad the map or take a smaller dilation"
        )
