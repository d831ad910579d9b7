"""Neighborhood attention as dense tiles: plain gathers and scaled_dot_product_attention, on every device, exactly.

A dilation group is a dense sub-grid of the map. Cut it into tiles of queries; the keys a tile sees are one dense halo. One
dense attention per tile, with a bias that holds the RPB inside each query's window and -inf outside it, is neighborhood
attention. Tiles that lie alike (all inner ones, say) share one bias and run as one batch.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinat.model.attention.bias_cache import made_from
from dinat.model.attention.geometry import axis_tiles
from dinat.model.capture_safe_cache import kept

CACHE_BYTES = 2 * 2**20
"""Keys gathered at once on a CPU: about its second-level cache."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of a map that share a bias.

    queries: (T * t,) and keys: (T * h,) int64 positions in the flattened map, tile after tile;  rows: (t_y, h_y) and
    columns: (t_x, h_x) index the bias table, -1 outside the window;  t = t_y * t_x queries and h = h_y * h_x keys a tile.
    """

    queries: Tensor
    keys: Tensor
    rows: Tensor
    columns: Tensor

    @property
    def count(self) -> int:
        """The T of the class's docstring."""
        return self.queries.shape[0] // self.queries_per_tile

    @property
    def queries_per_tile(self) -> int:
        """The t of the class's docstring."""
        return self.rows.shape[0] * self.columns.shape[0]

    @property
    def keys_per_tile(self) -> int:
        """The h of the class's docstring."""
        return self.rows.shape[1] * self.columns.shape[1]

    def bias(self, rpb: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(1, heads or 1, t, h): the RPB inside each query's window, -inf outside."""
        rows, columns = self.rows[:, None, :, None], self.columns[None, :, None, :]
        if rpb is None:
            inside = torch.zeros(1, 1, 1, 1, 1, dtype=dtype, device=rows.device)
        else:
            inside = rpb[:, rows, columns].to(dtype)
        bias = inside.masked_fill((rows < 0) | (columns < 0), float("-inf"))
        return bias.reshape(1, -1, self.queries_per_tile, self.keys_per_tile)


@dataclass(frozen=True, eq=False)
class Plan:
    """All tiles of a map, and the way back: slots: (H * W,) int64, where each position's output is in the tiles' order."""

    tiles: tuple[Tiles, ...]
    slots: Tensor


@kept(256)
def plan(height: int, width: int, kernel_size: int, dilation: int, tile: tuple[int, int], device: torch.device) -> Plan:
    """Cut a height x width map into tiles of about `tile` queries."""
    tiles = []
    for y, x in product(axis_tiles(height, kernel_size, dilation, tile[0]), axis_tiles(width, kernel_size, dilation, tile[1])):
        tiles.append(
            Tiles(
                queries=_positions(y.queries, x.queries, width).to(device),
                keys=_positions(y.keys, x.keys, width).to(device),
                rows=y.rpb_index.to(device),
                columns=x.rpb_index.to(device),
            )
        )
    slots = torch.cat([same.queries for same in tiles]).argsort()
    return Plan(tuple(tiles), slots)


def _positions(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """(T_y, m) rows and (T_x, n) columns -> (T_y * T_x * m * n,) positions in the flattened map, tile after tile."""
    return (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten()


def tile_size(length: int, kernel_size: int, dilation: int) -> int:
    """Queries per tile along an axis. A whole dilation group where it is little more than a window, else about a window."""
    group = -(-length // dilation)
    return group if group <= kernel_size + 2 else kernel_size


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float, dropout: float = 0.0
) -> Tensor:
    """Neighborhood attention, DiNAT section 3. q, k, v, output: (B, H, W, heads, head_dim)."""
    if torch.compiler.is_dynamo_compiling() and not dropout:
        whole: Tensor = tiled_operator(q, k, v, rpb, kernel_size, dilation, scale)
        return whole
    height, width, heads, head_dim = q.shape[1:]
    tile = (tile_size(height, kernel_size, dilation), tile_size(width, kernel_size, dilation))
    cut = plan(height, width, kernel_size, dilation, tile, q.device)
    table = biases(cut, rpb, q.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for same, bias in zip(cut.tiles, table, strict=True):
            queries = _gather(q, same.queries).view(-1, same.queries_per_tile, heads, head_dim)
            keys = _gather(k, same.keys).view(-1, same.keys_per_tile, heads, head_dim)
            values = _gather(v, same.keys).view(-1, same.keys_per_tile, heads, head_dim)
            part = F.scaled_dot_product_attention(
                queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), bias, dropout, scale=scale
            )
            part = part.transpose(1, 2)
            if torch.compiler.is_compiling():  # not left to reshape: an exporter may lay the attention's output out otherwise
                part = part.clone(memory_format=torch.contiguous_format)
            parts.append(part.reshape(-1, same.queries.shape[0], heads * head_dim))
        return _gather(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), cut.slots)

    q, k, v = (x.flatten(1, 2).flatten(2) for x in (q, k, v))
    images = _images_at_once(cut, k)
    if images is None:
        output = attend(q, k, v)
    else:
        slices = [slice(start, start + images) for start in range(0, q.shape[0], images)]
        output = torch.cat([attend(q[some], k[some], v[some]) for some in slices])
    return output.view(-1, height, width, heads, head_dim)


@torch.library.custom_op("dinat::tiled_attention", mutates_args=())
def tiled_operator(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float
) -> Tensor:
    """The same as an operator of PyTorch's. torch.compile, which cannot look into how a map is cut, takes it whole."""
    return tiled_attention(q, k, v, rpb, kernel_size, dilation, scale)


@torch.library.custom_op("dinat::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float
) -> list[Tensor]:
    """The gradients of q, k, v and, if there is one, rpb. The attention is computed again, tiled."""
    given = [x for x in (q, k, v, rpb) if x is not None]

    def attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None = None) -> Tensor:
        return tiled_attention(q, k, v, rpb, kernel_size, dilation, scale)

    pull_back = torch.func.vjp(attend, *given)[1]  # autograd itself is off inside an operator
    return list(pull_back(gradient))


@attention_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, rpb) if x is not None]


def complete(operator: Any) -> None:
    """Tell PyTorch what an operator gives, and its backward. It takes tiled_operator's arguments, and perhaps others after."""

    def shape(q: Tensor, *_: Any) -> Tensor:
        return q.new_empty(q.shape)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.arguments = len(inputs)
        ctx.kernel_size, ctx.dilation, ctx.scale = inputs[4:7]
        ctx.save_for_backward(*inputs[:4])

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = attention_backward(gradient, *ctx.saved_tensors, ctx.kernel_size, ctx.dilation, ctx.scale)
        return (*found, *[None] * (ctx.arguments - len(found)))

    operator.register_fake(shape)
    operator.register_autograd(backward, setup_context=keep)


complete(tiled_operator)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """(B, H * W, C) -> (B, len(index), C)."""
    if torch.compiler.is_compiling():
        return x.index_select(1, index)
    batch, length, channels = x.shape
    if batch > 1:  # rows of a matrix: in eager mode index_select is far slower along an inner dimension
        index = (torch.arange(batch, device=x.device)[:, None] * length + index).flatten()
    return x.reshape(batch * length, channels).index_select(0, index).view(batch, -1, channels)


def _images_at_once(cut: Plan, k: Tensor) -> int | None:
    """How many pictures' gathered keys stay in the processor's cache; None where the whole batch runs at once."""
    if k.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    per_image = max(same.keys.shape[0] for same in cut.tiles) * k.shape[-1] * k.element_size()
    images = max(1, CACHE_BYTES // per_image)
    return images if images < k.shape[0] else None


def biases(cut: Plan, rpb: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """The bias of each of the plan's tiles, in order."""
    return made_from(rpb, (cut, dtype), lambda: [same.bias(rpb, dtype) for same in cut.tiles])
