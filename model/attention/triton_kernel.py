"""Neighborhood attention with dilation and relative positional bias as one CUDA kernel, in Triton.

One program computes a tile of queries, one head, one picture, by the same plan as the tiled form (model/attention/tiled.py): a
list of the queries' places, a list of the keys' that they see between them, and a bias that holds the RPB inside each query's
window and -inf outside it. The kernel knows nothing of windows: it gathers keys and values block by block, adds the bias, and
goes on with an online softmax in float32 (arXiv 2205.14135). Queries, keys and values are read where they lie: the product that
makes all three needs no copy.

TRITON_INTERPRET=1, set before this module is imported, runs the same kernel on CPU tensors.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dinat.model.attention.bias_cache import made_from
from dinat.model.attention.tiled import Plan, complete, plan
from dinat.model.capture_safe_cache import kept
from dinat.model.errors import AttentionError

INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = range(8, 129)


@triton.jit
def attend(
    q, k, v, bias, queries, keys, kinds, out,
    q_batch, q_place, q_head,
    k_batch, k_place, k_head,
    v_batch, v_place, v_head,
    bias_kind, bias_head, out_batch,
    heads, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The output of one tile of queries. Grid: (tiles, heads, B).

    q, k, v: (B, places, heads, HEAD_DIM) by their strides, the last one 1.  out: the same, contiguous.
    queries: (tiles, QUERIES) int32 places, -1 where the tile is smaller.  keys: (tiles, KEYS) int32 places.
    kinds: (tiles,) int32.  bias: (kinds, heads or 1, QUERIES, KEYS).
    BLOCK: keys at once.  CHANNELS: HEAD_DIM up to a power of two.  WIDEN: multiply in float32, for Triton's interpreter, which
    takes bfloat16 for integers.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    tile, head = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    query, channel = tl.arange(0, QUERIES), tl.arange(0, CHANNELS)
    is_channel = channel < HEAD_DIM
    place = tl.load(queries + tile * QUERIES + query)
    asked = tl.load(
        q + batch * q_batch + head * q_head + (tl.maximum(place, 0) * q_place)[:, None] + channel[None, :],
        mask=is_channel[None, :],
        other=0.0,
    )
    if WIDEN:
        asked = asked.to(tl.float32)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    keys += tile * KEYS
    bias += tl.load(kinds + tile) * bias_kind + head * bias_head
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, CHANNELS], tl.float32)
    for start in range(0, KEYS, BLOCK):
        key = start + tl.arange(0, BLOCK)
        there = tl.load(keys + key)
        found = tl.load(k + (there * k_place)[None, :] + channel[:, None], mask=is_channel[:, None], other=0.0)
        values = tl.load(v + (there * v_place)[:, None] + channel[None, :], mask=is_channel[None, :], other=0.0)
        if WIDEN:
            found, values = found.to(tl.float32), values.to(tl.float32)
        due = tl.load(bias + query[:, None] * KEYS + key[None, :]).to(tl.float32)
        scores = tl.dot(asked, found, input_precision=PRECISION) * scale + due
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        pivot = tl.where(new_largest == float("-inf"), 0.0, new_largest) * LOG2E  # no key of this query has come yet
        weights = tl.exp2(scores * LOG2E - pivot[:, None])
        shrink = tl.exp2(largest * LOG2E - pivot)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION)
        largest = new_largest
    attended = sums / total[:, None]
    tl.store(
        out + batch * out_batch + (place * heads + head)[:, None] * HEAD_DIM + channel[None, :],
        attended.to(out.dtype.element_ty),
        mask=(place >= 0)[:, None] & is_channel[None, :],
    )


@dataclass(frozen=True)
class Cut:
    """How the work is cut: tiles of about tile_y x tile_x queries, `keys` at once, in so many warps and stages.

    precision: of products of float32 operands: "ieee", or "tf32x3" (three products of the matrix units, about as exact).
    """

    tile_y: int
    tile_x: int
    keys: int
    warps: int
    stages: int
    precision: str = "ieee"

    def __str__(self) -> str:
        """Such as 8x8/64/4/2."""
        parts = [f"{self.tile_y}x{self.tile_x}", str(self.keys), str(self.warps), str(self.stages)]
        return "/".join(parts if self.precision == "ieee" else [*parts, self.precision])


HALF_CUTS = (Cut(8, 4, 32, 1, 2), Cut(8, 8, 64, 2, 1), Cut(8, 8, 64, 4, 2), Cut(4, 4, 64, 1, 1))
FLOAT_CUTS = (
    Cut(8, 4, 16, 1, 2),
    Cut(4, 4, 32, 1, 1),
    Cut(8, 4, 16, 1, 2, "tf32x3"),
    Cut(8, 8, 32, 4, 1, "tf32x3"),
)
"""What is worth timing on a card, the one that is taken untimed first. Each is the best of the measures that
`python -m benchmarks.kernel_resources` counts for some layer: instructions for a pair, or keys read for a query."""


def cuts(dtype: torch.dtype, head_dim: int) -> tuple[Cut, ...]:
    """The cuts worth timing. Only narrow heads have a choice: wider ones get more warps, so that nothing spills."""
    several = FLOAT_CUTS if dtype == torch.float32 else HALF_CUTS
    if head_dim <= 32:
        return several
    first = several[0]
    return (Cut(first.tile_y, first.tile_x, 32 if dtype != torch.float32 else 16, 4 if head_dim <= 64 else 8, 1),)


@dataclass(frozen=True, eq=False)
class Tables:
    """The plan as the kernel reads it; see `attend`."""

    plan: Plan
    queries: Tensor
    keys: Tensor
    kinds: Tensor

    def bias(self, rpb: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(kinds, heads or 1, QUERIES, KEYS), from the plan's own: -inf for keys, zero for queries, that only fill up."""
        size = self.keys.shape[1], self.queries.shape[1]
        padded = []
        for part in (same.bias(rpb, dtype) for same in self.plan.tiles):
            columns, rows = size[0] - part.shape[3], size[1] - part.shape[2]
            padded.append(F.pad(F.pad(part, (0, columns), value=float("-inf")), (0, 0, 0, rows)))
        return torch.cat(padded)


@kept(256)
def tables(height: int, width: int, kernel_size: int, dilation: int, cut: Cut, device: torch.device) -> Tables:
    """Cut a map: queries and keys of all tiles, filled up to one size."""
    planned = plan(height, width, kernel_size, dilation, (cut.tile_y, cut.tile_x), device)
    queries = max(16, triton.next_power_of_2(max(same.queries_per_tile for same in planned.tiles)))
    keys = triton.cdiv(max(same.keys_per_tile for same in planned.tiles), cut.keys) * cut.keys

    def filled(places: Tensor, per_tile: int, size: int, value: int) -> Tensor:
        return F.pad(places.view(-1, per_tile), (0, size - per_tile), value=value)

    return Tables(
        planned,
        torch.cat([filled(same.queries, same.queries_per_tile, queries, -1) for same in planned.tiles]).int(),
        torch.cat([filled(same.keys, same.keys_per_tile, keys, 0) for same in planned.tiles]).int(),
        torch.cat([same.rows.new_full([same.count], kind) for kind, same in enumerate(planned.tiles)]).int(),
    )


def constants(dtype: torch.dtype, head_dim: int, queries: int, keys: int, cut: Cut) -> dict[str, Any]:
    """The kernel's compile-time arguments. queries, keys: per tile, filled up."""
    return {
        "QUERIES": queries,
        "KEYS": keys,
        "BLOCK": cut.keys,
        "HEAD_DIM": head_dim,
        "CHANNELS": max(16, triton.next_power_of_2(head_dim)),
        "PRECISION": cut.precision,
        "WIDEN": INTERPRETED and dtype == torch.bfloat16,
    }


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    kernel_size: int,
    dilation: int,
    scale: float,
    cut: Cut | None = None,
) -> Tensor:
    """Run the kernel. q, k, v: (B, H, W, heads, head_dim). Returns the same, contiguous."""
    batch, height, width, heads, head_dim = q.shape
    q, k, v = (x if _is_read_in_place(x) else x.contiguous() for x in (q, k, v))
    cut = cut or cuts(q.dtype, head_dim)[0]
    table = tables(height, width, kernel_size, dilation, cut, q.device)
    bias: Tensor = made_from(rpb, (table, q.dtype), lambda: table.bias(rpb, q.dtype))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    strides = [stride for x in (q, k, v) for stride in (x.stride(0), x.stride(2), x.stride(3))]
    (tiles, queries), keys = table.queries.shape, table.keys.shape[1]
    attend[(tiles, heads, batch)](
        q, k, v, bias, table.queries, table.keys, table.kinds, out,
        *strides, bias.stride(0), 0 if bias.shape[1] == 1 else bias.stride(1), out.stride(0),
        heads, scale,
        **constants(q.dtype, head_dim, queries, keys, cut),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out


def _is_read_in_place(x: Tensor) -> bool:
    """Whether one stride leads from each position of the flattened map to the next, and the channels lie side by side."""
    return x.stride(-1) == 1 and x.stride(1) == x.shape[2] * x.stride(2)


@torch.library.custom_op("dinat::neighborhood_attention", mutates_args=())
def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float, cut: str = ""
) -> Tensor:
    """The kernel as an operator of PyTorch's: torch.compile and CUDA graphs keep it, autograd knows its backward."""
    named = next((one for one in cuts(q.dtype, q.shape[-1]) if str(one) == cut), None)
    return launch(q, k, v, rpb, kernel_size, dilation, scale, named)


complete(fused_attention)


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    kernel_size: int,
    dilation: int,
    scale: float,
    dropout: float = 0.0,
    cut: str = "",
) -> Tensor:
    """Neighborhood attention, DiNAT section 3. q, k, v, output: (B, H, W, heads, head_dim), float16, bfloat16 or float32.

    head_dim: 8 to 128.  cut: one of `cuts` by its name, the first if empty.
    Raises AttentionError off a CUDA device, for another dtype or head_dim, or with dropout.
    """
    if q.device.type != "cuda" and not INTERPRETED:
        raise AttentionError(f"the triton kernel runs on a CUDA device, q is on {q.device}: take attention tiled")
    if q.dtype not in DTYPES:
        raise AttentionError(f"the triton kernel computes in float16, bfloat16 or float32, got {q.dtype}")
    if q.shape[-1] not in HEAD_DIMS:
        raise AttentionError(f"the triton kernel takes a head_dim of 8 to 128, got {q.shape[-1]}: take attention tiled")
    if dropout:
        raise AttentionError(f"the triton kernel has no dropout, asked for {dropout}: take attention tiled")
    attended: Tensor = fused_attention(q, k, v, rpb, kernel_size, dilation, scale, cut)
    return attended
