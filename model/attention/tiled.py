"""Neighborhood attention as dense attention per tile: gathers and scaled_dot_product_attention, exact, on every device.

A dilation group is a dense sub-grid of the feature map. It is divided into tiles of queries; the keys of a tile are its halo,
the union of its queries' windows, which is dense as well. Neighborhood attention equals dense attention per tile with a bias
that holds the RPB inside each query's window and -inf outside it. Tiles with equal geometry, such as all inner ones, share one
bias and run as one batch.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinat.model.attention.bias_cache import cached_for_table
from dinat.model.attention.geometry import axis_tiles
from dinat.model.capture_safe_cache import capture_safe_cache
from dinat.model.fast_path import is_fake, is_transformed

CACHE_BYTES = 2 * 2**20
"""Bytes of keys gathered at once on a CPU: about the size of its L2 cache."""


@dataclass(frozen=True, eq=False)
class TileGroup:
    """The T tiles of a feature map that share a bias, each of t = t_y * t_x queries and h = h_y * h_x keys.

    Attributes:
        queries: Positions (T * t,) int64 in the flattened feature map, tile after tile.
        keys: Positions (T * h,) int64 in the flattened feature map, tile after tile.
        rows: Row index into the bias table (t_y, h_y) int64, -1 outside the window.
        columns: Column index into the bias table (t_x, h_x) int64, -1 outside the window.
    """

    queries: Tensor
    keys: Tensor
    rows: Tensor
    columns: Tensor

    @property
    def count(self) -> int:
        """Number of tiles, T."""
        return self.queries.shape[0] // self.queries_per_tile

    @property
    def queries_per_tile(self) -> int:
        """Queries per tile, t."""
        return self.rows.shape[0] * self.columns.shape[0]

    @property
    def keys_per_tile(self) -> int:
        """Keys per tile, h."""
        return self.rows.shape[1] * self.columns.shape[1]

    def bias(self, rpb: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the bias (1, heads or 1, t, h): the RPB inside each query's window, -inf outside."""
        rows, columns = self.rows[:, None, :, None], self.columns[None, :, None, :]
        if rpb is None:
            inside = torch.zeros(1, 1, 1, 1, 1, dtype=dtype, device=rows.device)
        else:
            inside = rpb[:, rows, columns].to(dtype)
        bias = inside.masked_fill((rows < 0) | (columns < 0), float("-inf"))
        return bias.reshape(1, -1, self.queries_per_tile, self.keys_per_tile)


@dataclass(frozen=True, eq=False)
class Plan:
    """All tiles of a feature map.

    Attributes:
        groups: The tiles, grouped by bias.
        output_order: For each position of the flattened feature map, the index of its output in tile order, (H * W,) int64.
    """

    groups: tuple[TileGroup, ...]
    output_order: Tensor


@capture_safe_cache(256)
def plan(height: int, width: int, kernel_size: int, dilation: int, tile: tuple[int, int], device: torch.device) -> Plan:
    """Divide a height x width feature map into tiles of about `tile` (rows, columns) queries."""
    groups = []
    for y, x in product(axis_tiles(height, kernel_size, dilation, tile[0]), axis_tiles(width, kernel_size, dilation, tile[1])):
        groups.append(
            TileGroup(
                queries=_positions(y.queries, x.queries, width).to(device),
                keys=_positions(y.keys, x.keys, width).to(device),
                rows=y.rpb_index.to(device),
                columns=x.rpb_index.to(device),
            )
        )
    output_order = torch.cat([group.queries for group in groups]).argsort()
    return Plan(tuple(groups), output_order)


def _positions(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Combine rows (T_y, m) and columns (T_x, n) into flattened positions (T_y * T_x * m * n,), tile after tile."""
    return (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten()


def tile_size(length: int, kernel_size: int, dilation: int) -> int:
    """Return the queries per tile along an axis: a whole dilation group if little larger than a window, else kernel_size."""
    group = -(-length // dilation)
    return group if group <= kernel_size + 2 else kernel_size


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float, dropout: float = 0.0
) -> Tensor:
    """Compute neighborhood attention (arXiv 2209.15001, section 3) of q, k and v (B, H, W, heads, head_dim) by tiles."""
    if (torch.compiler.is_dynamo_compiling() or is_fake()) and not dropout:
        attended: Tensor = tiled_operator(q, k, v, rpb, kernel_size, dilation, scale)
        return attended
    height, width, heads, head_dim = map(int, q.shape[1:])  # a tracer's sizes are tensors
    tile = (tile_size(height, kernel_size, dilation), tile_size(width, kernel_size, dilation))
    tile_plan = plan(height, width, kernel_size, dilation, tile, q.device)
    biases = _biases(tile_plan, rpb, q.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for group, bias in zip(tile_plan.groups, biases, strict=True):
            queries = _gather(q, group.queries).view(-1, group.queries_per_tile, heads, head_dim)
            keys = _gather(k, group.keys).view(-1, group.keys_per_tile, heads, head_dim)
            values = _gather(v, group.keys).view(-1, group.keys_per_tile, heads, head_dim)
            output = F.scaled_dot_product_attention(
                queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), bias, dropout, scale=scale
            )
            output = output.transpose(1, 2)
            if torch.compiler.is_compiling():  # an exporter may choose another memory layout, which reshape would depend on
                output = output.clone(memory_format=torch.contiguous_format)
            outputs.append(output.reshape(-1, group.queries.shape[0], heads * head_dim))
        return _gather(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), tile_plan.output_order)

    q, k, v = (x.flatten(1, 2).flatten(2) for x in (q, k, v))
    chunk_size = _chunk_size(tile_plan, k)
    with _sdpa_backends(q.device):
        if chunk_size is None:
            output = attend(q, k, v)
        else:
            chunks = [slice(start, start + chunk_size) for start in range(0, q.shape[0], chunk_size)]
            output = torch.cat([attend(q[chunk], k[chunk], v[chunk]) for chunk in chunks])
    return output.view(-1, height, width, heads, head_dim)


_sdpa_lock = threading.RLock()
"""sdpa_kernel sets flags of the process, and restores those that it found."""


def _sdpa_backends(device: torch.device) -> AbstractContextManager[None]:
    """Select implementations of scaled dot-product attention.

    Forward-mode AD and torch.func can transform only one. On a GPU cuDNN's is excluded: it builds a plan for each shape and
    thread, which takes tens of milliseconds and fails for some shapes (pytorch#140930). FlashAttention accepts no bias.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if is_transformed():
        return _only(SDPBackend.MATH)
    return _only(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH) if device.type == "cuda" else nullcontext()


@contextmanager
def _only(*backends: SDPBackend) -> Iterator[None]:
    with _sdpa_lock, sdpa_kernel(list(backends)):
        yield


@torch.library.custom_op("dinat::tiled_attention", mutates_args=())
def tiled_operator(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float
) -> Tensor:
    """Run tiled_attention as one PyTorch operator, because torch.compile cannot trace how a feature map is divided."""
    return tiled_attention(q, k, v, rpb, kernel_size, dilation, scale)


@torch.library.custom_op("dinat::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float
) -> list[Tensor]:
    """Return the gradients of q, k, v and, if given, rpb. The forward pass is recomputed by tiles."""
    inputs = [x for x in (q, k, v, rpb) if x is not None]

    def attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None = None) -> Tensor:
        return tiled_attention(q, k, v, rpb, kernel_size, dilation, scale)

    backward = torch.func.vjp(attend, *inputs)[1]  # autograd is disabled inside an operator
    return list(backward(gradient))


@attention_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, rpb) if x is not None]


def register_fake_and_autograd(operator: Any) -> None:
    """Register the output shape and the backward of a neighborhood attention operator.

    Args:
        operator: Takes the arguments of tiled_operator, optionally followed by others that have no gradient.
    """

    def fake(q: Tensor, *_: Any) -> Tensor:
        return q.new_empty(q.shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.input_count = len(inputs)
        ctx.kernel_size, ctx.dilation, ctx.scale = inputs[4:7]
        ctx.save_for_backward(*inputs[:4])

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = attention_backward(gradient, *ctx.saved_tensors, ctx.kernel_size, ctx.dilation, ctx.scale)
        return (*gradients, *[None] * (ctx.input_count - len(gradients)))

    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=setup_context)


register_fake_and_autograd(tiled_operator)


@torch.library.custom_op("dinat::padded_attention", mutates_args=())
def padded_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    key_padding: Tensor,
    value_padding: Tensor,
    kernel_size: int,
    dilation: int,
    scale: float,
) -> Tensor:
    """Run tiled_attention for feature maps of any size, as one operator of exported graphs whose height and width are inputs.

    Maps smaller than a window are padded at the right and bottom, keys and values with paddings (1, 1, 1, heads, head_dim).
    """
    height, width = q.shape[1:3]
    below, right = (max(0, kernel_size * dilation - size) for size in (height, width))
    q = F.pad(q, (0, 0, 0, 0, 0, right, 0, below))
    k, v = (_padded(x, padding, below, right) for x, padding in ((k, key_padding), (v, value_padding)))
    return tiled_attention(q, k, v, rpb, kernel_size, dilation, scale)[:, :height, :width].contiguous()


@padded_operator.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _padded(x: Tensor, padding: Tensor, below: int, right: int) -> Tensor:
    batch, height, width = x.shape[:3]
    x = torch.cat((x, padding.expand(batch, height, right, -1, -1)), dim=2)
    return torch.cat((x, padding.expand(batch, below, width + right, -1, -1)), dim=1)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Select positions: (B, H * W, C) -> (B, len(index), C)."""
    if torch.compiler.is_compiling():
        return x.index_select(1, index)
    batch, length, channels = x.shape
    if batch > 1:  # select matrix rows: in eager mode index_select is much slower along an inner dimension
        index = (torch.arange(batch, device=x.device)[:, None] * length + index).flatten()
    return x.reshape(batch * length, channels).index_select(0, index).view(batch, -1, channels)


def _chunk_size(tile_plan: Plan, k: Tensor) -> int | None:
    """Return how many images' gathered keys fit in the CPU cache; None to run the whole batch at once."""
    if k.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    per_image = max(group.keys.shape[0] for group in tile_plan.groups) * k.shape[-1] * k.element_size()
    images = max(1, CACHE_BYTES // per_image)
    return images if images < k.shape[0] else None


def _biases(tile_plan: Plan, rpb: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Return the bias of each group of tiles, in order."""
    return cached_for_table(rpb, (tile_plan, dtype), lambda: [group.bias(rpb, dtype) for group in tile_plan.groups])
