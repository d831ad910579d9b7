"""A linear layer with layer norm before it, and GELU, layer scale and residual sum after it, as one CUDA kernel, in Triton.

Between memory and memory, nothing but the input and the result is read and written: no normalized input, and no product before
the activation or the sum. TRITON_INTERPRET=1, set before this module is imported, runs the kernel on CPU tensors.
"""

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from dinat.model.cuda_device import on_device_of

INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """Compute x * Phi(x): by erf if EXACT, else as the CPU's kernel does (model/native/layer.c), with an error of 1.2e-4.

    Phi(x) - 0.5 is x times a polynomial of x^2 on [-4.25, 4.25]; beyond that, Phi is 0 or 1.
    """
    if EXACT:
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    inner = tl.minimum(tl.maximum(x, -4.25), 4.25)
    square = inner * inner
    y = -7.82699149e-10 * square + 7.15992156e-8
    y = y * square - 2.83341634e-6
    y = y * square + 6.41753568e-5
    y = y * square - 9.31456734e-4
    y = y * square + 9.22922627e-3
    y = y * square - 6.54216918e-2
    y = y * square + 3.98423643e-1
    return x * (inner * y + 0.5)


@triton.jit(do_not_specialize=["rows"])
def linear(
    x, norm_weight, norm_bias, weight, bias, scale, add, out,
    rows, inputs, outputs, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    GELU: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Compute ROWS x COLUMNS of add + scale * gelu(norm(x) weight^T + bias). Grid: (row blocks * column blocks,).

    Tensors, contiguous; those that are None are omitted from the formula:
      x: (rows, inputs).
      norm_weight, norm_bias: Parameters of the layer norm, (inputs,).
      weight: (outputs, inputs).
      bias, scale: (outputs,).
      add, out: (rows, outputs).

    Constants:
      INNER: Inputs per iteration, a divisor of `inputs`.
      GELU: Whether to apply GELU.
      WIDEN: Multiply in float32, for Triton's interpreter, which reads bfloat16 as integers.
    """
    column_blocks = tl.cdiv(outputs, COLUMNS)
    block = tl.program_id(0)  # programs with the same rows run together
    row = (block // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = block % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    is_row, is_column = row < rows, column < outputs
    first_channel = x + row * inputs
    x += (row * inputs)[:, None] + inner[None, :]
    weight += (column * inputs)[None, :] + inner[:, None]
    if norm_weight is not None:
        # Sums of the differences from a row's first channel: without cancellation if the mean is far from zero.
        first = tl.load(first_channel, mask=is_row, other=0.0).to(tl.float32)
        total, squares = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        for start in range(0, inputs, INNER):
            difference = tl.load(x + start, mask=is_row[:, None], other=0.0).to(tl.float32) - first[:, None]
            total += tl.sum(difference, 1)
            squares += tl.sum(difference * difference, 1)
        shifted_mean = total / inputs
        inverse = tl.rsqrt(tl.maximum(squares / inputs - shifted_mean * shifted_mean, 0.0) + eps)
        mean = first + shifted_mean
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, inputs, INNER):
        x_block = tl.load(x + start, mask=is_row[:, None], other=0.0)
        weight_block = tl.load(weight + start, mask=is_column[None, :], other=0.0)
        if norm_weight is not None:
            gain = tl.load(norm_weight + start + inner).to(tl.float32)
            shift = tl.load(norm_bias + start + inner).to(tl.float32)
            normal = (x_block.to(tl.float32) - mean[:, None]) * inverse[:, None]
            x_block = (normal * gain[None, :] + shift[None, :]).to(x_block.dtype)
        if WIDEN:
            x_block, weight_block = x_block.to(tl.float32), weight_block.to(tl.float32)
        sums = tl.dot(x_block, weight_block, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if GELU:
        sums = gelu(sums, EXACT=x.dtype.element_ty == tl.float32)
    if scale is not None:
        sums *= tl.load(scale + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    position = (row * outputs)[:, None] + column[None, :]
    is_inside = is_row[:, None] & is_column[None, :]
    if add is not None:
        sums += tl.load(add + position, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out + position, sums.to(out.dtype.element_ty), mask=is_inside)


@dataclass(frozen=True)
class LinearConfig:
    """Block sizes and launch parameters of the kernel.

    Attributes:
        rows, columns: Rows and columns of the result per program.
        inner: Inputs per iteration; a divisor of it where it does not divide the layer's inputs.
        warps: Warps per program.
        stages: Stages of software pipelining.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    def __str__(self) -> str:
        """Name, such as 64x128/32/4/3."""
        return f"{self.rows}x{self.columns}/{self.inner}/{self.warps}/{self.stages}"


CONFIGS = (
    LinearConfig(64, 64, 32, 4, 3),
    LinearConfig(64, 128, 32, 4, 3),
    LinearConfig(128, 128, 32, 8, 3),
)
"""Candidates for autotuning in half precision."""


def supports(inputs: int) -> bool:
    """Return whether the kernel supports a number of inputs: its products are of at least 16."""
    return inputs % 16 == 0


def constants(dtype: torch.dtype, inputs: int, is_gelu: bool, config: LinearConfig) -> dict[str, Any]:
    """Return the kernel's compile-time arguments."""
    return {
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "INNER": gcd(config.inner, inputs),
        "GELU": is_gelu,
        "WIDEN": INTERPRETED and dtype == torch.bfloat16,
    }


def launch(
    x: Tensor,
    norm: nn.LayerNorm | None,
    layer: nn.Linear,
    is_gelu: bool,
    scale: Tensor | None,
    add: Tensor | None,
    config: LinearConfig,
) -> Tensor:
    """Run the kernel: add + scale * gelu(layer(norm(x))), of which all but the layer may be omitted.

    Args:
        x: (..., inputs), contiguous.
        norm: Layer norm of the inputs, or None.
        layer: Linear layer.
        is_gelu: Whether to apply the exact GELU.
        scale: (outputs,), or None.
        add: (..., outputs), contiguous, or None.
        config: Block sizes.

    Returns:
        Tensor (..., outputs), contiguous.
    """
    outputs, inputs = layer.weight.shape
    rows = x.numel() // inputs
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    with on_device_of(x):
        linear[(triton.cdiv(rows, config.rows) * triton.cdiv(outputs, config.columns), 1, 1)](
            x, norm_weight, norm_bias, layer.weight, layer.bias, scale, add, out,
            rows, inputs, outputs, eps,
            **constants(x.dtype, inputs, is_gelu, config),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out
