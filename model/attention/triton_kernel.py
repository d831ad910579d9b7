"""Neighborhood attention with dilation and relative positional bias (RPB) as one CUDA kernel, in Triton.

One program computes one tile of queries of one head and image, with the tile plan of the tiled backend
(model/attention/tiled.py): the positions of the tile's queries, the positions of its keys (the union of the queries' windows),
and a bias that holds the RPB inside each query's window and -inf outside it. The kernel itself does not use window geometry: it
gathers blocks of keys and values, adds the bias, and updates an online softmax in float32 (arXiv 2205.14135). Queries, keys and
values are read by strides, so the output of the QKV projection is not copied.

TRITON_INTERPRET=1, set before this module is imported, runs the same kernel on CPU tensors.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dinat.model.attention.bias_cache import cached_for_table
from dinat.model.attention.tiled import Plan, plan, register_fake_and_autograd
from dinat.model.capture_safe_cache import capture_safe_cache
from dinat.model.cuda_device import on_device_of
from dinat.model.errors import AttentionError

INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = range(8, 129)


@triton.jit(do_not_specialize=["tiles"])
def attend(
    q, k, v, bias, queries, keys, kinds, out,
    q_batch, q_position, q_head,
    k_batch, k_position, k_head,
    v_batch, v_position, v_head,
    bias_kind, bias_head, out_batch,
    tiles, heads, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Compute the output of one tile of queries. Grid: (tiles * heads * B,), tiles fastest.

    CUDA limits the other axes of a grid to 65,535 programs.

    Tensors:
      q, k, v: (B, positions, heads, HEAD_DIM), addressed by the strides that follow; the channel stride is 1.
      bias: (kinds, heads or 1, QUERIES, KEYS).
      queries: Positions (tiles, QUERIES) int32, -1 for padding.
      keys: Positions (tiles, KEYS) int32, 0 for padding, which has a bias of -inf.
      kinds: Row of `bias` for each tile, (tiles,) int32.
      out: (B, positions, heads, HEAD_DIM), contiguous.

    Constants:
      BLOCK: Keys per iteration.
      CHANNELS: HEAD_DIM rounded up to a power of two.
      PRECISION: Precision of the products of float32 operands.
      WIDEN: Multiply in float32, for Triton's interpreter, which reads bfloat16 as integers.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles % heads).to(tl.int64)  # offsets in a tensor may exceed 2**31
    batch = (program // tiles // heads).to(tl.int64)
    query, channel = tl.arange(0, QUERIES), tl.arange(0, CHANNELS)
    is_channel = channel < HEAD_DIM
    q_index = tl.load(queries + tile * QUERIES + query).to(tl.int64)
    q_tile = tl.load(
        q + batch * q_batch + head * q_head + (tl.maximum(q_index, 0) * q_position)[:, None] + channel[None, :],
        mask=is_channel[None, :],
        other=0.0,
    )
    if WIDEN:
        q_tile = q_tile.to(tl.float32)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    keys += tile * KEYS
    bias += tl.load(kinds + tile) * bias_kind + head * bias_head
    row_max = tl.full([QUERIES], float("-inf"), tl.float32)
    row_sum = tl.zeros([QUERIES], tl.float32)
    accumulator = tl.zeros([QUERIES, CHANNELS], tl.float32)
    for start in range(0, KEYS, BLOCK):
        key = start + tl.arange(0, BLOCK)
        k_index = tl.load(keys + key).to(tl.int64)
        k_block = tl.load(k + (k_index * k_position)[None, :] + channel[:, None], mask=is_channel[:, None], other=0.0)
        v_block = tl.load(v + (k_index * v_position)[:, None] + channel[None, :], mask=is_channel[None, :], other=0.0)
        if WIDEN:
            k_block, v_block = k_block.to(tl.float32), v_block.to(tl.float32)
        bias_block = tl.load(bias + query[:, None] * KEYS + key[None, :]).to(tl.float32)
        scores = tl.dot(q_tile, k_block, input_precision=PRECISION) * scale + bias_block
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) * LOG2E  # -inf until a key of the window is read: avoid NaN
        weights = tl.exp2(scores * LOG2E - shift[:, None])
        rescale = tl.exp2(row_max * LOG2E - shift)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        accumulator = tl.dot(weights.to(v_block.dtype), v_block, accumulator * rescale[:, None], input_precision=PRECISION)
        row_max = new_max
    output = accumulator * (1 / row_sum)[:, None]
    tl.store(
        out + batch * out_batch + (q_index * heads + head)[:, None] * HEAD_DIM + channel[None, :],
        output.to(out.dtype.element_ty),
        mask=(q_index >= 0)[:, None] & is_channel[None, :],
    )


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and launch parameters of the kernel.

    Attributes:
        tile_y, tile_x: Approximate rows and columns of queries per tile.
        keys: Keys per iteration.
        warps: Warps per program.
        stages: Stages of software pipelining.
        precision: Precision of the products of float32 operands: "ieee", or "tf32x3" (three tensor core products, about as
            accurate).
    """

    tile_y: int
    tile_x: int
    keys: int
    warps: int
    stages: int
    precision: str = "ieee"

    def __str__(self) -> str:
        """Name, such as 8x8/64/4/2."""
        parts = [f"{self.tile_y}x{self.tile_x}", str(self.keys), str(self.warps), str(self.stages)]
        return "/".join(parts if self.precision == "ieee" else [*parts, self.precision])


HALF_CONFIGS = (
    TileConfig(8, 4, 32, 1, 2),
    TileConfig(8, 8, 64, 2, 1),
    TileConfig(8, 8, 64, 4, 2),
    TileConfig(4, 4, 64, 1, 1),
    TileConfig(8, 4, 32, 2, 2),
)
FLOAT_CONFIGS = (
    TileConfig(8, 4, 16, 1, 2),
    TileConfig(4, 4, 32, 1, 1),
    TileConfig(8, 4, 16, 1, 2, "tf32x3"),
    TileConfig(8, 8, 32, 4, 1, "tf32x3"),
)
"""Candidates for autotuning; the first one is used without it. Each is best for some layer by a measure of
`python -m benchmarks.kernel_resources`: instructions per query-key pair, keys read per query, or resident warps."""


def tile_configs(dtype: torch.dtype, head_dim: int) -> tuple[TileConfig, ...]:
    """Return the candidates for autotuning. A head_dim above 32 has one, with more warps so that no registers spill."""
    configs = FLOAT_CONFIGS if dtype == torch.float32 else HALF_CONFIGS
    if head_dim <= 32:
        return configs
    first = configs[0]
    return (TileConfig(first.tile_y, first.tile_x, 32 if dtype != torch.float32 else 16, 4 if head_dim <= 64 else 8, 1),)


@dataclass(frozen=True, eq=False)
class Tables:
    """A tile plan in the format of the kernel; see `attend`."""

    plan: Plan
    queries: Tensor
    keys: Tensor
    kinds: Tensor

    def bias(self, rpb: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the bias (kinds, heads or 1, QUERIES, KEYS), padded with -inf for keys and 0 for queries."""
        size = self.keys.shape[1], self.queries.shape[1]
        padded = []
        for bias in (group.bias(rpb, dtype) for group in self.plan.groups):
            columns, rows = size[0] - bias.shape[3], size[1] - bias.shape[2]
            padded.append(F.pad(F.pad(bias, (0, columns), value=float("-inf")), (0, 0, 0, rows)))
        return torch.cat(padded)


@capture_safe_cache(256)
def tables(height: int, width: int, kernel_size: int, dilation: int, config: TileConfig, device: torch.device) -> Tables:
    """Return the tiles of a feature map, padded to equal numbers of queries and keys."""
    tile_plan = plan(height, width, kernel_size, dilation, (config.tile_y, config.tile_x), device)
    queries = max(16, triton.next_power_of_2(max(group.queries_per_tile for group in tile_plan.groups)))
    keys = triton.cdiv(max(group.keys_per_tile for group in tile_plan.groups), config.keys) * config.keys

    def padded(positions: Tensor, per_tile: int, size: int, value: int) -> Tensor:
        return F.pad(positions.view(-1, per_tile), (0, size - per_tile), value=value)

    return Tables(
        tile_plan,
        torch.cat([padded(group.queries, group.queries_per_tile, queries, -1) for group in tile_plan.groups]).int(),
        torch.cat([padded(group.keys, group.keys_per_tile, keys, 0) for group in tile_plan.groups]).int(),
        torch.cat([group.rows.new_full([group.count], kind) for kind, group in enumerate(tile_plan.groups)]).int(),
    )


def constants(dtype: torch.dtype, head_dim: int, queries: int, keys: int, config: TileConfig) -> dict[str, Any]:
    """Return the kernel's compile-time arguments. queries, keys: numbers per tile, including padding."""
    return {
        "QUERIES": queries,
        "KEYS": keys,
        "BLOCK": config.keys,
        "HEAD_DIM": head_dim,
        "CHANNELS": max(16, triton.next_power_of_2(head_dim)),
        "PRECISION": config.precision,
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
    config: TileConfig | None = None,
) -> Tensor:
    """Run the kernel on q, k and v (B, H, W, heads, head_dim). Returns a contiguous tensor of the same shape."""
    batch, height, width, heads, head_dim = q.shape
    q, k, v = (x if _has_uniform_stride(x) else x.contiguous() for x in (q, k, v))
    config = config or tile_configs(q.dtype, head_dim)[0]
    table = tables(height, width, kernel_size, dilation, config, q.device)
    bias: Tensor = cached_for_table(rpb, (table, q.dtype), lambda: table.bias(rpb, q.dtype))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    strides = [stride for x in (q, k, v) for stride in (x.stride(0), x.stride(2), x.stride(3))]
    (tiles, queries), keys = table.queries.shape, table.keys.shape[1]
    with on_device_of(q):
        attend[(tiles * heads * batch, 1, 1)](
            q, k, v, bias, table.queries, table.keys, table.kinds, out,
            *strides, bias.stride(0), 0 if bias.shape[1] == 1 else bias.stride(1), out.stride(0),
            tiles, heads, scale,
            **constants(q.dtype, head_dim, queries, keys, config),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out


def _has_uniform_stride(x: Tensor) -> bool:
    """Return whether one stride separates all positions of the flattened feature map, and the channels are contiguous."""
    return x.stride(-1) == 1 and x.stride(1) == x.shape[2] * x.stride(2)


@torch.library.custom_op("dinat::neighborhood_attention", mutates_args=())
def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float, tile_config: str = ""
) -> Tensor:
    """Run the kernel as a PyTorch operator, for torch.compile and autograd. tile_config: a name, see triton_attention."""
    config = next((config for config in tile_configs(q.dtype, q.shape[-1]) if str(config) == tile_config), None)
    return launch(q, k, v, rpb, kernel_size, dilation, scale, config)


register_fake_and_autograd(fused_attention)


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    kernel_size: int,
    dilation: int,
    scale: float,
    dropout: float = 0.0,
    tile_config: str = "",
) -> Tensor:
    """Compute neighborhood attention (arXiv 2209.15001, section 3) of q, k and v (B, H, W, heads, head_dim) on a CUDA device.

    The dtype is float16, bfloat16 or float32, and head_dim 8 to 128. tile_config is the name of one of `tile_configs`, the
    first one if empty. The other arguments are those of neighborhood_attention; dropout must be 0.

    Raises:
        AttentionError: The device, dtype or head_dim is not supported, or dropout is not 0.
    """
    if q.device.type != "cuda" and not INTERPRETED:
        raise AttentionError(f"attention triton requires a CUDA device, q is on {q.device}: use attention tiled")
    if q.dtype not in DTYPES:
        raise AttentionError(f"attention triton supports float16, bfloat16 and float32, got {q.dtype}")
    if q.shape[-1] not in HEAD_DIMS:
        raise AttentionError(f"attention triton supports head_dim 8 to 128, got {q.shape[-1]}: use attention tiled")
    if dropout:
        raise AttentionError(f"attention triton does not support dropout, got {dropout}: use attention tiled")
    attended: Tensor = fused_attention(q, k, v, rpb, kernel_size, dilation, scale, tile_config)
    return attended
