"""Neighborhood attention on a CPU by the compiled kernel native/attention.c (see model/native)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dinat.model.attention.bias_cache import cached_for_table
from dinat.model.attention.tiled import Plan, plan, register_fake_and_autograd, tiled_attention
from dinat.model.capture_safe_cache import capture_safe_cache
from dinat.model.cpu.spinning import check_spinning
from dinat.model.errors import AttentionError
from dinat.model.fast_path import is_fake, is_plain, is_transformed
from dinat.model.native import library, unavailable_reason
from dinat.model.native.dtypes import DTYPES

HEAD_DIM, MOST_KEYS, BLOCK = 32, 256, 8
"""Constants of attention.c: DIM, MOST_KEYS and BLOCK."""
LOG2_E = 1.4426950408889634
TILES = {16: (4, 4), 8: (2, 4), 4: (2, 2)}
"""(rows, columns) of a tile's queries by the number of vector lanes: nearly square, so that a tile has the fewest keys."""


def supports(q: Tensor, kernel_size: int) -> bool:
    """Return whether the kernel is available for queries q (B, H, W, heads, head_dim)."""
    return is_plain(q) and supports_heads(q.dtype, q.shape[-1]) and supports_kernel_size(kernel_size)


def supports_kernel_size(kernel_size: int) -> bool:
    """Return whether the kernel is available and has room for the keys of a tile."""
    kernels = library()
    if kernels is None:
        return False
    rows, columns = TILES[kernels.lanes]
    return (rows + kernel_size - 1) * (columns + kernel_size - 1) <= MOST_KEYS


def supports_heads(dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether the kernel is available for heads of this dtype and size."""
    return dtype in DTYPES and head_dim == HEAD_DIM and library() is not None


def compiled_attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float, dropout: float = 0.0
) -> Tensor:
    """Compute neighborhood attention (arXiv 2209.15001, section 3) of q, k and v (B, H, W, heads, 32), float32 or bfloat16.

    Raises:
        AttentionError: `supports` returns False for these inputs, or dropout is not 0.
    """
    if dropout:
        raise AttentionError("attention compiled does not support dropout: use attention tiled")
    is_operator_seen = torch.compiler.is_compiling() or is_fake()
    if is_transformed() and not is_operator_seen:
        return tiled_attention(q, k, v, rpb, kernel_size, dilation, scale)
    if is_operator_seen or torch.is_grad_enabled():
        attended: Tensor = compiled_operator(q, k, v, rpb, kernel_size, dilation, scale)
        return attended
    return _attend(q, k, v, rpb, kernel_size, dilation, scale)


@torch.library.custom_op("dinat::compiled_attention", mutates_args=())
def compiled_operator(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float
) -> Tensor:
    """Run the kernel as a PyTorch operator, for torch.compile and autograd. The backward pass runs by tiles."""
    return _attend(q, k, v, rpb, kernel_size, dilation, scale)


register_fake_and_autograd(compiled_operator)


def _attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float) -> Tensor:
    for x in (q, k, v):
        if not supports(x, kernel_size):
            raise AttentionError(_unsupported_reason(x, kernel_size))
    q, k, v = (_with_uniform_stride(x) for x in (q, k, v))
    if not q.stride() == k.stride() == v.stride():
        q, k, v = (x.contiguous() for x in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr())
    _run(addresses, out, (q.stride(2), q.stride(0)), rpb, kernel_size, dilation, scale)
    return out


def attend_qkv(qkv: Tensor, rpb: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Compute neighborhood attention of the QKV projection of a layer that `supports` has accepted, without checking it again.

    Args:
        qkv: Query, key and value (B, H, W, 3, heads, 32), contiguous, neither empty nor smaller than the window.
        rpb: Relative positional bias (heads, 2 * kernel_size - 1, 2 * kernel_size - 1).
        kernel_size: Window size.
        dilation: Distance between neighboring keys of a window.

    Returns:
        Tensor (B, H, W, heads, 32).
    """
    batch, height, width, _, heads, _ = qkv.shape
    out = qkv.new_empty(batch, height, width, heads, HEAD_DIM)
    position, address = 3 * heads * HEAD_DIM, qkv.data_ptr()
    q, k, v = (address + i * heads * HEAD_DIM * qkv.itemsize for i in range(3))
    _run((q, k, v), out, (position, height * width * position), rpb, kernel_size, dilation, HEAD_DIM**-0.5)
    return out


def _run(
    addresses: tuple[int, int, int],
    out: Tensor,
    strides: tuple[int, int],
    rpb: Tensor | None,
    kernel_size: int,
    dilation: int,
    scale: float,
) -> None:
    """Call the kernel. addresses: of q, k and v. strides: elements between two of their positions, and two images."""
    kernels = library()
    assert kernels is not None
    check_spinning()
    batch, height, width, heads, _ = out.shape
    tile_plan = plan(height, width, kernel_size, dilation, TILES[kernels.lanes], out.device)
    layout = _layout(tile_plan, heads)
    bias = cached_for_table(rpb, (tile_plan, heads, kernels.lanes), lambda: _bias(tile_plan, rpb, heads, kernels.lanes))
    kernels.attend(
        DTYPES[out.dtype],
        *(*addresses, out.data_ptr()),
        *(batch, height * width, heads, *strides),
        *(layout.tiles.data_ptr(), len(layout.tiles)),
        *(layout.queries.data_ptr(), layout.keys.data_ptr(), bias.data_ptr()),
        *(scale * LOG2_E, torch.get_num_threads()),
    )


@dataclass(frozen=True, eq=False)
class _Layout:
    """A tile plan in the format of dinat_attend.

    Attributes:
        tiles: Per tile the offsets of its queries, keys and bias, and its numbers of queries and keys, (T, 5) int64.
        queries: Positions, tile after tile, int32.
        keys: Positions, tile after tile, int32.
    """

    tiles: Tensor
    queries: Tensor
    keys: Tensor


@capture_safe_cache(256)
def _layout(tile_plan: Plan, heads: int) -> _Layout:
    rows, query, key, bias = [], 0, 0, 0
    for group in tile_plan.groups:
        for _ in range(group.count):
            rows.append((query, key, bias, group.queries_per_tile, group.keys_per_tile))
            query, key = query + group.queries_per_tile, key + group.keys_per_tile
        bias += heads * _padded(group.keys_per_tile)
    queries, keys = (torch.cat([getattr(group, name) for group in tile_plan.groups]).int() for name in ("queries", "keys"))
    rows.sort(key=lambda row: int(keys[row[1]]))  # consecutive tiles share keys, which are then still in the CPU cache
    return _Layout(torch.tensor(rows), queries, keys)


def _bias(tile_plan: Plan, rpb: Tensor | None, heads: int, lanes: int) -> Tensor:
    """Return the bias times log2(e), float32: (heads, keys, lanes) per group, flattened and concatenated.

    The entries of padding keys are -inf, those of padding queries 0.
    """
    parts = []
    for group in tile_plan.groups:
        inside = group.bias(rpb, torch.float32)[0].transpose(1, 2).expand(heads, -1, -1)
        padded = torch.full((heads, _padded(group.keys_per_tile), lanes), float("-inf"))
        padded[:, : group.keys_per_tile] = 0
        padded[:, : group.keys_per_tile, : group.queries_per_tile] = inside * LOG2_E
        parts.append(padded.flatten())
    return torch.cat(parts)


def _padded(keys: int) -> int:
    return -(-keys // BLOCK) * BLOCK


def _with_uniform_stride(x: Tensor) -> Tensor:
    """Return x, copied unless the heads of a position are contiguous and one stride separates all positions."""
    x = x.resolve_neg()
    width, heads, head_dim = x.shape[2:]
    has_contiguous_heads = x.stride(4) == 1 and (heads == 1 or x.stride(3) == head_dim)
    return x if has_contiguous_heads and x.stride(1) == x.stride(2) * width else x.contiguous()


def _unsupported_reason(q: Tensor, kernel_size: int) -> str:
    if not is_plain(q) or q.dtype not in DTYPES or q.shape[-1] != HEAD_DIM:
        got = f"{type(q).__name__} on {q.device}, {q.dtype}, head_dim {q.shape[-1]}"
        return f"attention compiled requires plain tensors on a CPU, float32 or bfloat16, and head_dim {HEAD_DIM}; got {got}"
    return unavailable_reason() or f"attention compiled does not support kernel_size {kernel_size}"
