"""Neighborhood attention by native/attention.c, where there is a library (model/native)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dinat.model.attention.bias_cache import made_from
from dinat.model.attention.tiled import Plan, complete, plan
from dinat.model.capture_safe_cache import kept
from dinat.model.errors import AttentionError
from dinat.model.native import DTYPES, library, missing

HEAD_DIM, MOST_KEYS, BLOCK = 32, 256, 8
"""As in attention.c."""
LOG2_E = 1.4426950408889634
TILES = {16: (4, 4), 8: (2, 4), 4: (2, 2)}
"""Queries of a tile for a number of lanes: as square as can be, so that they see the fewest keys."""


def takes(q: Tensor, kernel_size: int) -> bool:
    """Whether it computes a layer with these queries (B, H, W, heads, head_dim), and there is a library."""
    return q.device.type == "cpu" and computes(q.dtype, q.shape[-1]) and has_kernel(kernel_size)


def has_kernel(kernel_size: int) -> bool:
    """Whether there is a library, and the keys of a tile find room in its kernel."""
    found = library()
    if found is None:
        return False
    rows, columns = TILES[found.lanes]
    return (rows + kernel_size - 1) * (columns + kernel_size - 1) <= MOST_KEYS


def computes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there is a library, and it has heads of such numbers."""
    return dtype in DTYPES and head_dim == HEAD_DIM and library() is not None


def compiled_attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float, dropout: float = 0.0
) -> Tensor:
    """Neighborhood attention, DiNAT section 3. q, k, v, output: (B, H, W, heads, 32), float32 or bfloat16.

    Raises AttentionError for what `takes` refuses, and for dropout.
    """
    if dropout:
        raise AttentionError("attention compiled has no dropout: take tiled")
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        whole: Tensor = compiled_operator(q, k, v, rpb, kernel_size, dilation, scale)
        return whole
    return _attend(q, k, v, rpb, kernel_size, dilation, scale)


@torch.library.custom_op("dinat::compiled_attention", mutates_args=())
def compiled_operator(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float
) -> Tensor:
    """The same as an operator of PyTorch's, for its compiler, and with a gradient, by tiles."""
    return _attend(q, k, v, rpb, kernel_size, dilation, scale)


complete(compiled_operator)


def _attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float) -> Tensor:
    if not takes(q, kernel_size):
        raise AttentionError(_refusal(q, kernel_size))
    batch, height, width, heads, _ = q.shape
    q, k, v = (_in_rows(x) for x in (q, k, v))
    if not q.stride() == k.stride() == v.stride():
        q, k, v = (x.contiguous() for x in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    found = library()
    assert found is not None
    cut = plan(height, width, kernel_size, dilation, TILES[found.lanes], q.device)
    layout = _layout(cut, heads)
    bias = made_from(rpb, (cut, heads, found.lanes), lambda: _bias(cut, rpb, heads, found.lanes))
    found.attend(
        DTYPES[q.dtype],
        *(x.data_ptr() for x in (q, k, v, out)),
        *(batch, height * width, heads, q.stride(2), q.stride(0)),
        *(layout.tiles.data_ptr(), len(layout.tiles)),
        *(layout.queries.data_ptr(), layout.keys.data_ptr(), bias.data_ptr()),
        *(scale * LOG2_E, torch.get_num_threads()),
    )
    return out


@dataclass(frozen=True, eq=False)
class _Layout:
    """A plan as dinat_attend takes it. tiles: (T, 5) int64;  queries, keys: int32, tile after tile."""

    tiles: Tensor
    queries: Tensor
    keys: Tensor


@kept(256)
def _layout(cut: Plan, heads: int) -> _Layout:
    rows, query, key, bias = [], 0, 0, 0
    for same in cut.tiles:
        for _ in range(same.count):
            rows.append((query, key, bias, same.queries_per_tile, same.keys_per_tile))
            query, key = query + same.queries_per_tile, key + same.keys_per_tile
        bias += heads * _padded(same.keys_per_tile)
    queries, keys = (torch.cat([getattr(same, name) for same in cut.tiles]).int() for name in ("queries", "keys"))
    rows.sort(key=lambda row: int(keys[row[1]]))  # what sees the same keys runs in a row, while they are in the cache
    return _Layout(torch.tensor(rows), queries, keys)


def _bias(cut: Plan, rpb: Tensor | None, heads: int, lanes: int) -> Tensor:
    """For each kind of tile (heads, keys, lanes) float32, flat: -inf for keys that are not there, 0 for such queries."""
    parts = []
    for same in cut.tiles:
        inside = same.bias(rpb, torch.float32)[0].transpose(1, 2).expand(heads, -1, -1)
        padded = torch.full((heads, _padded(same.keys_per_tile), lanes), float("-inf"))
        padded[:, : same.keys_per_tile] = 0
        padded[:, : same.keys_per_tile, : same.queries_per_tile] = inside * LOG2_E
        parts.append(padded.flatten())
    return torch.cat(parts)


def _padded(keys: int) -> int:
    return -(-keys // BLOCK) * BLOCK


def _in_rows(x: Tensor) -> Tensor:
    """The same, with each position's heads side by side and positions evenly apart."""
    width, heads, head_dim = x.shape[2:]
    has_heads_in_a_row = x.stride(4) == 1 and (heads == 1 or x.stride(3) == head_dim)
    return x if has_heads_in_a_row and x.stride(1) == x.stride(2) * width else x.contiguous()


def _refusal(q: Tensor, kernel_size: int) -> str:
    if q.device.type != "cpu" or q.dtype not in DTYPES or q.shape[-1] != HEAD_DIM:
        got = f"{q.device}, {q.dtype}, {q.shape[-1]}"
        return f"attention compiled is for a CPU, float32 or bfloat16, heads of {HEAD_DIM}; got {got}"
    return missing() or f"attention compiled has no kernel of {kernel_size}"
