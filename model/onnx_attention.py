"""Neighborhood attention in ONNX, for graphs whose height and width are inputs. Requires the extra `onnx`.

    torch.onnx.export(network, (pixels,), dynamic_shapes=..., dynamo=True, custom_translation_table=translations())

Attention is computed by tiles, as in attention/tiled.py, but all tiles have the same numbers of queries and keys, and every
index is computed in the graph from the size of the feature map. Where a dilation group has fewer members than others, its last
query or key is repeated: repeated keys are outside all windows, repeated queries are not part of the output.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from onnxscript import FLOAT, opset18

import dinat.model.attention.compiled  # noqa: F401 - registers the operators, also those of the modules that it imports

op: Any = opset18

Value = Any
"""A tensor of the graph. Sizes are int64 of shape (1,)."""


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the translations of this project's operators, the custom_translation_table of torch.onnx.export."""
    operators = torch.ops.dinat
    return {
        operators.padded_attention.default: padded_attention,
        operators.tiled_attention.default: attention,
        operators.compiled_attention.default: attention,
    }


def attention(q: FLOAT, k: FLOAT, v: FLOAT, rpb: FLOAT | None, kernel_size: int, dilation: int, scale: float) -> FLOAT:
    """Translate dinat::tiled_attention and dinat::compiled_attention."""
    attended: FLOAT = _attend(q, k, v, rpb, None, kernel_size, dilation, scale)
    return attended


def padded_attention(
    q: FLOAT,
    k: FLOAT,
    v: FLOAT,
    rpb: FLOAT | None,
    key_padding: FLOAT,
    value_padding: FLOAT,
    kernel_size: int,
    dilation: int,
    scale: float,
) -> FLOAT:
    """Translate dinat::padded_attention."""
    attended: FLOAT = _attend(q, k, v, rpb, (key_padding, value_padding), kernel_size, dilation, scale)
    return attended


def _attend(
    q: Value,
    k: Value,
    v: Value,
    rpb: Value | None,
    paddings: tuple[Value, Value] | None,
    kernel_size: int,
    dilation: int,
    scale: float,
) -> Value:
    batch, height, width, heads, head_dim = (op.Shape(q, start=i, end=i + 1) for i in range(5))
    positions, channels = op.Mul(height, width), op.Mul(heads, head_dim)
    y, x = (_axis(length, kernel_size, dilation) for length in (height, width))
    tiles = op.Mul(y.tiles, x.tiles)
    queries_per_tile, keys_per_tile = op.Mul(y.queries_per_tile, x.queries_per_tile), op.Mul(y.keys_per_tile, x.keys_per_tile)

    def gather(z: Value, index: Value, per_tile: Value) -> Value:
        """Select positions: (B, positions, channels) -> (B, tiles, heads, positions per tile, head_dim)."""
        selected = op.Gather(z, op.Reshape(index, _ints(-1)), axis=1)
        return op.Transpose(
            op.Reshape(selected, op.Concat(batch, tiles, per_tile, heads, head_dim, axis=0)), perm=[0, 1, 3, 2, 4]
        )

    flat = op.Concat(batch, _ints(-1), channels, axis=0)
    keys = op.Add(op.Mul(_pair(y.keys, 1, 3), width), _pair(x.keys, 0, 2))
    q, k, v = (op.Reshape(z, flat) for z in (q, k, v))
    if paddings is not None:  # padding is one more position, after all others
        one = op.Concat(batch, _ints(1), channels, axis=0)
        k, v = (
            op.Concat(z, op.Expand(op.Reshape(padding, op.Concat(_ints(1, 1), channels, axis=0)), one), axis=1)
            for z, padding in zip((k, v), paddings, strict=True)
        )
        outside = op.Or(op.GreaterOrEqual(_pair(y.keys, 1, 3), height), op.GreaterOrEqual(_pair(x.keys, 0, 2), width))
        keys = op.Where(outside, positions, keys)
    rows = op.Min(y.queries, op.Sub(height, _ints(1)))
    columns = op.Min(x.queries, op.Sub(width, _ints(1)))
    queries = op.Add(op.Mul(_pair(rows, 1, 3), width), _pair(columns, 0, 2))
    scaled = op.Mul(gather(q, queries, queries_per_tile), op.CastLike(op.Constant(value_float=scale), q))
    scores = op.MatMul(scaled, op.Transpose(gather(k, keys, keys_per_tile), perm=[0, 1, 2, 4, 3]))
    scores = op.Add(scores, _bias(y, x, rpb, q, op.Concat(tiles, queries_per_tile, keys_per_tile, axis=0), kernel_size))
    output = op.MatMul(op.Softmax(scores, axis=-1), gather(v, keys, keys_per_tile))
    output = op.Reshape(op.Transpose(output, perm=[0, 1, 3, 2, 4]), flat)
    tile = op.Add(op.Mul(_pair(op.Div(y.order, y.queries_per_tile), 1), x.tiles), _pair(op.Div(x.order, x.queries_per_tile), 0))
    within = op.Add(
        op.Mul(_pair(op.Mod(y.order, y.queries_per_tile), 1), x.queries_per_tile),
        _pair(op.Mod(x.order, x.queries_per_tile), 0),
    )
    order = op.Reshape(op.Add(op.Mul(tile, queries_per_tile), within), _ints(-1))
    return op.Reshape(op.Gather(output, order, axis=1), op.Concat(batch, height, width, heads, head_dim, axis=0))


def _bias(y: "_Axis", x: "_Axis", rpb: Value | None, like: Value, shape: Value, kernel_size: int) -> Value:
    """Return the bias (tiles, heads or 1, queries per tile, keys per tile): the RPB inside each window, -inf outside."""
    inside = op.Unsqueeze(op.Reshape(op.And(_pair(y.inside, 1, 3, 5), _pair(x.inside, 0, 2, 4)), shape), _ints(1))
    nothing = op.CastLike(op.Constant(value_float=float("-inf")), like)
    if rpb is None:
        return op.Where(inside, op.CastLike(op.Constant(value_float=0.0), like), nothing)
    index = op.Add(op.Mul(_pair(y.rpb_index, 1, 3, 5), _ints(2 * kernel_size - 1)), _pair(x.rpb_index, 0, 2, 4))
    table = op.Reshape(rpb, op.Concat(op.Shape(rpb, start=0, end=1), _ints(-1), axis=0))
    values = op.Transpose(op.Gather(table, op.Reshape(index, shape), axis=1), perm=[1, 0, 2, 3])
    return op.Where(inside, op.CastLike(values, like), nothing)


@dataclass(frozen=True)
class _Axis:
    """The T tiles of an axis, each of t queries and h keys.

    Attributes:
        tiles, queries_per_tile, keys_per_tile: T, t and h.
        queries: Positions (T, t) int64, also beyond the end of an axis that is shorter than a window.
        keys: Positions (T, h) int64, likewise.
        inside: Whether a key is inside a query's window, (T, t, h) bool.
        rpb_index: Row (or column) of the bias table (T, t, h) int64, 0 outside the window.
        order: Index of each position in `queries`, flattened, (length,) int64.
    """

    tiles: Value
    queries_per_tile: Value
    keys_per_tile: Value
    queries: Value
    keys: Value
    inside: Value
    rpb_index: Value
    order: Value


def _axis(length: Value, kernel_size: int, dilation: int) -> _Axis:
    """Divide an axis, padded to a window if it is shorter; see attention/geometry.py for groups, members and windows."""
    one, d = _ints(1), _ints(dilation)
    padded = op.Max(length, _ints(kernel_size * dilation))
    longest = _divide_up(padded, d)
    tiles = _divide_up(longest, _ints(kernel_size + 2))  # per group: one if the group is little longer than a window
    queries = _divide_up(longest, tiles)
    keys = op.Min(op.Add(queries, _ints(kernel_size - 1)), longest)
    group = op.Unsqueeze(_range(d), _ints(1, 2))
    members = _divide_up(op.Sub(padded, group), d)
    first = op.Mul(op.Unsqueeze(_range(tiles), _ints(0, 2)), queries)
    query = op.Min(op.Add(first, _range(queries)), op.Sub(members, one))
    start = op.Min(op.Max(op.Sub(query, _ints(kernel_size // 2)), _ints(0)), op.Sub(members, _ints(kernel_size)))
    key = op.Add(op.Slice(start, _ints(0), one, _ints(2)), _range(keys))
    keys_of_queries = op.Unsqueeze(key, _ints(2))
    distance = op.Sub(keys_of_queries, op.Unsqueeze(start, _ints(3)))
    inside = op.And(op.GreaterOrEqual(distance, _ints(0)), op.Less(distance, _ints(kernel_size)))
    rpb_index = op.Add(op.Sub(keys_of_queries, op.Unsqueeze(query, _ints(3))), _ints(kernel_size - 1))
    member, rest = op.Div(_range(length), d), op.Mod(_range(length), d)
    tile = op.Add(op.Mul(rest, tiles), op.Div(member, queries))

    def merged(x: Value, *sizes: Value) -> Value:
        """Merge the axes of groups and of tiles."""
        return op.Reshape(x, op.Concat(_ints(-1), *sizes, axis=0))

    return _Axis(
        tiles=op.Mul(tiles, d),
        queries_per_tile=queries,
        keys_per_tile=keys,
        queries=merged(op.Add(op.Mul(query, d), group), queries),
        keys=merged(op.Add(op.Mul(op.Min(key, op.Sub(members, one)), d), group), keys),
        inside=merged(inside, queries, keys),
        rpb_index=merged(op.Where(inside, rpb_index, _ints(0)), queries, keys),
        order=op.Add(op.Mul(tile, queries), op.Mod(member, queries)),
    )


def _ints(*values: int) -> Value:
    return op.Constant(value_ints=list(values))


def _range(size: Value) -> Value:
    return op.Range(op.Constant(value_int=0), op.Squeeze(size), op.Constant(value_int=1))


def _divide_up(a: Value, b: Value) -> Value:
    return op.Div(op.Sub(op.Add(a, b), _ints(1)), b)


def _pair(x: Value, *axes: int) -> Value:
    """Insert axes, so that a value of the one axis of the feature map can be combined with one of the other."""
    return op.Unsqueeze(x, _ints(*axes))
