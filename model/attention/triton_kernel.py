"""Neighborhood attention with dilation and relative positional bias as one CUDA kernel, in Triton.

One program computes a tile of the queries of one dilation group, one head, one picture. The keys they see between them are a
dense rectangle of the group, the halo; it is read once, block by block, with an online softmax in float32 (arXiv 2205.14135).
The bias is looked up in its table, which stays in the first-level cache. Queries, keys and values are read where they lie,
whatever their strides: the product that makes all three needs no copy.

TRITON_INTERPRET=1, set before this module is imported, runs the same kernel on CPU tensors.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.attention.tiled import complete
from model.errors import AttentionError

LOG2E = 1.4426950408889634
INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def attend(
    q, k, v, rpb, out,
    q_batch, q_row, q_column, q_head,
    k_batch, k_row, k_column, k_head,
    v_batch, v_row, v_column, v_head,
    height, width, heads, dilation, tiles_x, scale_log2e,
    KERNEL: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_RPB: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The output of one tile of queries.

    q, k, v: (B, H, W, heads, HEAD_DIM) by their strides, the last one 1.  rpb: (heads, 2 * KERNEL - 1, 2 * KERNEL - 1) float32.
    out: (B, H, W, heads, HEAD_DIM), contiguous.  Grid: (tiles_y * tiles_x of all dilation groups, heads, B).
    KEYS: keys per block.  BLOCK_D: HEAD_DIM up to a power of two.  WIDEN: multiply in float32, for Triton's interpreter, which
    takes bfloat16 for integers.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    QUERIES: tl.constexpr = TILE_Y * TILE_X
    SIDE: tl.constexpr = 2 * KERNEL - 1
    pid_y = tl.program_id(0) // tiles_x
    pid_x = tl.program_id(0) % tiles_x
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)

    # The dilation group, its size, and the tile's first query as a member of it.
    group_y, group_x = pid_y % dilation, pid_x % dilation
    rows, columns = tl.cdiv(height - group_y, dilation), tl.cdiv(width - group_x, dilation)
    first_y, first_x = pid_y // dilation * TILE_Y, pid_x // dilation * TILE_X
    if first_y >= rows or first_x >= columns:
        return

    query = tl.arange(0, QUERIES)
    query_y, query_x = first_y + query // TILE_X, first_x + query % TILE_X
    is_query = (query_y < rows) & (query_x < columns)
    window_y = tl.minimum(tl.maximum(query_y - KERNEL // 2, 0), rows - KERNEL)
    window_x = tl.minimum(tl.maximum(query_x - KERNEL // 2, 0), columns - KERNEL)

    # The halo: from the first query's window to the last one's.
    halo_y = tl.minimum(tl.maximum(first_y - KERNEL // 2, 0), rows - KERNEL)
    halo_x = tl.minimum(tl.maximum(first_x - KERNEL // 2, 0), columns - KERNEL)
    last_y = tl.minimum(first_y + TILE_Y, rows) - 1
    last_x = tl.minimum(first_x + TILE_X, columns) - 1
    halo_rows = tl.minimum(tl.maximum(last_y - KERNEL // 2, 0), rows - KERNEL) + KERNEL - halo_y
    halo_columns = tl.minimum(tl.maximum(last_x - KERNEL // 2, 0), columns - KERNEL) + KERNEL - halo_x
    halo = halo_rows * halo_columns

    channel = tl.arange(0, BLOCK_D)
    is_channel = channel < HEAD_DIM
    place_y, place_x = query_y * dilation + group_y, query_x * dilation + group_x
    queries = tl.load(
        q + batch * q_batch + head * q_head + (place_y * q_row + place_x * q_column)[:, None] + channel[None, :],
        mask=is_query[:, None] & is_channel[None, :],
        other=0.0,
    )
    if WIDEN:
        queries = queries.to(tl.float32)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for start in range(0, halo, KEYS):
        member = start + tl.arange(0, KEYS)
        is_key = member < halo
        key_y, key_x = halo_y + member // halo_columns, halo_x + member % halo_columns
        there_y, there_x = key_y * dilation + group_y, key_x * dilation + group_x
        keys = tl.load(
            k + batch * k_batch + head * k_head + (there_y * k_row + there_x * k_column)[None, :] + channel[:, None],
            mask=is_key[None, :] & is_channel[:, None],
            other=0.0,
        )
        values = tl.load(
            v + batch * v_batch + head * v_head + (there_y * v_row + there_x * v_column)[:, None] + channel[None, :],
            mask=is_key[:, None] & is_channel[None, :],
            other=0.0,
        )
        if WIDEN:
            keys = keys.to(tl.float32)
        scores = tl.dot(queries, keys, input_precision=PRECISION) * scale_log2e
        from_y, from_x = key_y[None, :] - window_y[:, None], key_x[None, :] - window_x[:, None]
        # A query beyond the map sees nothing: its place in the bias table would lie outside.
        sees = is_query[:, None] & is_key[None, :] & (from_y >= 0) & (from_y < KERNEL) & (from_x >= 0) & (from_x < KERNEL)
        if HAS_RPB:
            place = (key_y * SIDE + key_x)[None, :] - (query_y * SIDE + query_x)[:, None] + (KERNEL - 1) * (SIDE + 1)
            scores += tl.load(rpb + head * SIDE * SIDE + place, mask=sees, other=0.0) * LOG2E
        scores = tl.where(sees, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        pivot = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # no key of this query has come yet
        weights = tl.exp2(scores - pivot[:, None])
        shrink = tl.exp2(largest - pivot)
        total = total * shrink + tl.sum(weights, 1)
        weights = weights.to(values.dtype)
        if WIDEN:
            weights, values = weights.to(tl.float32), values.to(tl.float32)
        sums = sums * shrink[:, None] + tl.dot(weights, values, input_precision=PRECISION)
        largest = new_largest
    attended = sums / tl.where(is_query, total, 1.0)[:, None]
    position = (batch * height + place_y) * width + place_x
    tl.store(
        out + (position * heads + head)[:, None] * HEAD_DIM + channel[None, :],
        attended.to(out.dtype.element_ty),
        mask=is_query[:, None] & is_channel[None, :],
    )


@dataclass(frozen=True)
class Shape:
    """How the work is cut: tiles of tile_y x tile_x queries (a power of two, at least 16), keys at once, warps and stages."""

    tile_y: int = 8
    tile_x: int = 8
    keys: int = 32
    warps: int = 4
    stages: int = 2


def shape_for(dtype: torch.dtype, head_dim: int) -> Shape:
    """A cut whose program stays in registers, on every card (`python -m benchmarks.kernel_resources`)."""
    return Shape(warps=8 if dtype == torch.float32 or head_dim > 64 else 4)


def constants(dtype: torch.dtype, kernel_size: int, head_dim: int, has_rpb: bool, shape: Shape) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    return {
        "KERNEL": kernel_size,
        "TILE_Y": shape.tile_y,
        "TILE_X": shape.tile_x,
        "KEYS": shape.keys,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "HAS_RPB": has_rpb,
        "WIDEN": INTERPRETED and dtype == torch.bfloat16,
        "PRECISION": "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee",
    }


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    kernel_size: int,
    dilation: int,
    scale: float,
    shape: Shape | None = None,
) -> Tensor:
    """Run the kernel. q, k, v: (B, H, W, heads, head_dim), any strides with the last one 1. Returns the same, contiguous."""
    batch, height, width, heads, head_dim = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    shape = shape or shape_for(q.dtype, head_dim)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tiles_y, tiles_x = (
        min(dilation, length) * triton.cdiv(triton.cdiv(length, dilation), tile)
        for length, tile in ((height, shape.tile_y), (width, shape.tile_x))
    )
    table = out if rpb is None else rpb.float().contiguous()
    attend[(tiles_y * tiles_x, heads, batch)](
        q, k, v, table, out,
        *q.stride()[:4], *k.stride()[:4], *v.stride()[:4],
        height, width, heads, dilation, tiles_x, scale * LOG2E,
        **constants(q.dtype, kernel_size, head_dim, rpb is not None, shape),
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return out


@torch.library.custom_op("dinat::neighborhood_attention", mutates_args=())
def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float
) -> Tensor:
    """The kernel as an operator of PyTorch's: torch.compile and CUDA graphs keep it, autograd knows its backward."""
    return launch(q, k, v, rpb, kernel_size, dilation, scale)


complete(fused_attention)


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float, dropout: float = 0.0
) -> Tensor:
    """Neighborhood attention, DiNAT section 3. q, k, v, output: (B, H, W, heads, head_dim), float16, bfloat16 or float32.

    head_dim: 8 to 128. In float32, tf32 is used only where torch.backends.cuda.matmul.allow_tf32 says so.
    Raises AttentionError off a CUDA device, for another dtype or head_dim, or with dropout.
    """
    if q.device.type != "cuda" and not INTERPRETED:
        raise AttentionError(f"the triton kernel runs on a CUDA device, q is on {q.device}: take attention tiled")
    if q.dtype not in DTYPES:
        raise AttentionError(f"the triton kernel computes in float16, bfloat16 or float32, got {q.dtype}")
    if not 8 <= q.shape[-1] <= 128:
        raise AttentionError(f"the triton kernel takes a head_dim of 8 to 128, got {q.shape[-1]}: take attention tiled")
    if dropout:
        raise AttentionError(f"the triton kernel has no dropout, asked for {dropout}: take attention tiled")
    attended: Tensor = fused_attention(q, k, v, rpb, kernel_size, dilation, scale)
    return attended
