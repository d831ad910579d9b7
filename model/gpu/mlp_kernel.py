"""The second half of a layer, from its layer norm to its residual sum, as one CUDA kernel, in Triton.

The hidden features stay in registers. TRITON_INTERPRET=1, set before this module is imported, runs it on CPU tensors.
"""

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from dinat.model.cuda_device import on_device_of
from dinat.model.gpu.linear_kernel import INTERPRETED, gelu


@triton.jit(do_not_specialize=["rows"])
def mlp(
    x, norm_weight, norm_bias, up, up_bias, down, down_bias, scale, out,
    rows, hidden, eps,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Compute ROWS rows of x + scale * (gelu(norm(x) up^T + up_bias) down^T + down_bias). Grid: (row blocks,).

    Tensors, contiguous:
      x, out: (rows, CHANNELS).
      norm_weight, norm_bias, down_bias, scale: (CHANNELS,); scale may be None.
      up, up_bias: (hidden, CHANNELS) and (hidden,).
      down: (CHANNELS, hidden).

    Constants:
      WIDTH: CHANNELS rounded up to a power of two.
      HIDDEN: Hidden features per iteration, a divisor of `hidden`.
      WIDEN: Multiply in float32, for Triton's interpreter, which reads bfloat16 as integers.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel, feature = tl.arange(0, WIDTH), tl.arange(0, HIDDEN)
    is_channel = channel < CHANNELS
    position = (row * CHANNELS)[:, None] + channel[None, :]
    is_inside = (row < rows)[:, None] & is_channel[None, :]
    tile = tl.load(x + position, mask=is_inside, other=0.0).to(tl.float32)
    mean = tl.sum(tile, 1) / CHANNELS
    centered = tl.where(is_channel[None, :], tile - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centered * centered, 1) / CHANNELS + eps)
    gain = tl.load(norm_weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    normal = (centered * inverse[:, None] * gain[None, :] + shift[None, :]).to(x.dtype.element_ty)
    if WIDEN:
        normal = normal.to(tl.float32)
    up += channel[:, None] + (feature * CHANNELS)[None, :]
    down += (channel * hidden)[None, :] + feature[:, None]
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, hidden, HIDDEN):
        up_block = tl.load(up + start * CHANNELS, mask=is_channel[:, None], other=0.0)
        down_block = tl.load(down + start, mask=is_channel[None, :], other=0.0)
        if WIDEN:
            up_block, down_block = up_block.to(tl.float32), down_block.to(tl.float32)
        features = tl.dot(normal, up_block, input_precision="ieee")
        features += tl.load(up_bias + start + feature).to(tl.float32)[None, :]
        features = gelu(features, EXACT=x.dtype.element_ty == tl.float32).to(x.dtype.element_ty)
        if WIDEN:
            features = features.to(tl.float32)
        sums = tl.dot(features, down_block, sums, input_precision="ieee")
    sums += tl.load(down_bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    if scale is not None:
        sums *= tl.load(scale + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    sums += tl.load(x + position, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out + position, sums.to(out.dtype.element_ty), mask=is_inside)


@dataclass(frozen=True)
class MlpConfig:
    """Block sizes and launch parameters of the kernel.

    Attributes:
        rows: Rows per program.
        hidden: Hidden features per iteration; a divisor of it where it does not divide their number.
        warps: Warps per program.
        stages: Stages of software pipelining.
    """

    rows: int
    hidden: int
    warps: int
    stages: int

    def __str__(self) -> str:
        """Name, such as 64/32/4/2."""
        return f"{self.rows}/{self.hidden}/{self.warps}/{self.stages}"


CONFIGS = {
    128: (MlpConfig(64, 32, 4, 2), MlpConfig(32, 32, 4, 2)),
    192: (MlpConfig(64, 32, 8, 2), MlpConfig(32, 32, 4, 1)),
    256: (MlpConfig(32, 32, 4, 1),),
}
"""Candidates for autotuning in half precision, by the largest number of channels that they are for. None spills registers;
64 rows of 256 channels do. An MLP of more channels is two linear kernels."""


def configs(channels: int, hidden: int) -> tuple[MlpConfig, ...]:
    """Return the candidates for a layer; none if the kernel does not support it."""
    largest = next((largest for largest in CONFIGS if channels <= largest), None)
    return CONFIGS[largest] if largest is not None and hidden % 16 == 0 else ()


def constants(dtype: torch.dtype, channels: int, hidden: int, config: MlpConfig) -> dict[str, Any]:
    """Return the kernel's compile-time arguments."""
    return {
        "ROWS": config.rows,
        "CHANNELS": channels,
        "WIDTH": max(16, triton.next_power_of_2(channels)),
        "HIDDEN": gcd(config.hidden, hidden),
        "WIDEN": INTERPRETED and dtype == torch.bfloat16,
    }


def launch(x: Tensor, norm: nn.LayerNorm, up: nn.Linear, down: nn.Linear, scale: Tensor | None, config: MlpConfig) -> Tensor:
    """Run the kernel: x + scale * down(gelu(up(norm(x)))).

    Args:
        x: (..., channels), contiguous.
        norm: Layer norm.
        up: Linear layer with a bias, from channels to hidden features.
        down: Linear layer with a bias, from hidden features to channels.
        scale: (channels,), or None.
        config: Block sizes.

    Returns:
        Tensor (..., channels), contiguous.
    """
    hidden, channels = up.weight.shape
    rows = x.numel() // channels
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on_device_of(x):
        mlp[(triton.cdiv(rows, config.rows), 1, 1)](
            x, norm.weight, norm.bias, up.weight, up.bias, down.weight, down.bias, scale, out,
            rows, hidden, norm.eps,
            **constants(x.dtype, channels, hidden, config),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out
