"""Rescaling and normalization of pixels as one CUDA kernel, in Triton.

TRITON_INTERPRET=1, set before this module is imported, runs it on CPU tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinat.model.cuda_device import on_device_of

BLOCK, WARPS = 1024, 4
"""Values per program, and its warps."""


@triton.jit(do_not_specialize=["count"])
def look_up(pixels, table, out, count, BLOCK: tl.constexpr):
    """Compute out[i] = table[i % 3, pixels[i]]. Grid: (blocks,).

    pixels: (count,) uint8, three channels for each position. table: (3, 256) float32. out: (count,).
    """
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = position < count
    value = tl.load(pixels + position, mask=is_inside, other=0).to(tl.int32)
    channel = (position % 3).to(tl.int32)
    tl.store(out + position, tl.load(table + channel * 256 + value).to(out.dtype.element_ty), mask=is_inside)


def launch(pixels: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Run the kernel: pixels (B, H, W, 3) uint8, contiguous, and their values (3, 256) float32, to (B, H, W, 3)."""
    out = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
    count = pixels.numel()
    with on_device_of(pixels):
        look_up[(triton.cdiv(count, BLOCK), 1, 1)](pixels, table, out, count, BLOCK=BLOCK, num_warps=WARPS)
    return out
