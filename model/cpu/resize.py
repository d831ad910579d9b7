"""Image resizing by a compiled kernel, bit-exact with Pillow, in half the time or less for common sizes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinat.model.native import library

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 1_000_000
"""For a larger image, copying it out of Pillow costs more time than the kernel saves."""

PRECISION_BITS = 22
"""Fractional bits of Pillow's fixed-point weights (PRECISION_BITS in its Resample.c)."""


def _triangle(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.maximum(0.0, 1.0 - np.abs(x))


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys' cubic convolution kernel with a = -0.5 (https://doi.org/10.1109/TASSP.1981.1163711)."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


FILTERS: dict[int, tuple[Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]], float]] = {
    int(Image.Resampling.BILINEAR): (_triangle, 1.0),
    int(Image.Resampling.BICUBIC): (_cubic, 2.0),
}
"""Supported filters: weight as a function of distance, and support radius, both in pixels."""


def resize_rgb(image: Image.Image, width: int, height: int, resample: int) -> Pixels:
    """Resize an RGB image with the result of Pillow's resize, which is used where the kernel does not apply.

    Args:
        image: RGB image.
        width: New width in pixels.
        height: New height in pixels.
        resample: Pillow's filter number.

    Returns:
        Array (height, width, 3) uint8.
    """
    kernels = library()
    size = (image.width, image.height)
    if size == (width, height):
        return np.asarray(image)
    too_large = size[0] * size[1] > MAX_PIXELS
    if kernels is None or resample not in FILTERS or width == size[0] or height == size[1] or too_large:
        return np.asarray(image.resize((width, height), resample))
    taps = kernels.lanes // 4
    horizontal, vertical = _filter_weights(size[0], width, resample), _filter_weights(size[1], height, resample)
    steps = -(-horizontal.table.shape[1] // taps)
    if steps * taps > size[0] or width < taps:  # so few columns that a step would read beyond them
        return np.asarray(image.resize((width, height), resample))
    starts, weights = _horizontal_weights(size[0], width, resample, taps, steps)
    columns_first = _may_run_vertical_pass_first() and 0 < size[1] - height > 2 * (size[0] - width)
    data = image.tobytes("raw", "RGBX")
    intermediate = np.empty((size[0] * height if columns_first else width * size[1]) * 4, dtype=np.uint8)
    out = np.empty((height, width, 3), dtype=np.uint8)
    kernels.resample(
        *(columns_first, data, size[1], size[0], intermediate.ctypes.data, out.ctypes.data, height, width),
        *(starts.ctypes.data, weights.ctypes.data, steps),
        *(vertical.starts.ctypes.data, vertical.counts.ctypes.data, vertical.table.ctypes.data, vertical.table.shape[1]),
    )
    return out


@cache
def _may_run_vertical_pass_first() -> bool:
    """Return whether this Pillow runs the vertical pass first when it removes more than twice as many rows as columns.

    Pillow does so since release 13. The order is visible because intermediate values are rounded to integers.
    """
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 16, 3), dtype=np.uint8))
    bilinear = Image.Resampling.BILINEAR
    rows_first = image.resize((24, 64), bilinear).resize((24, 20), bilinear)
    return image.resize((24, 20), bilinear).tobytes() != rows_first.tobytes()


@dataclass(frozen=True)
class _FilterWeights:
    """Fixed-point filter weights of each output pixel along one axis.

    Attributes:
        starts: First input pixel (out,) int32.
        counts: Number of input pixels (out,) int32.
        table: Weights (out, largest count) int32, 0 beyond the count.
    """

    starts: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    table: npt.NDArray[np.int32]


@lru_cache(maxsize=256)
def _filter_weights(size: int, out: int, resample: int) -> _FilterWeights:
    """Return Pillow's weights for resizing an axis from `size` to `out` pixels (precompute_coeffs in its Resample.c)."""
    weight, radius = FILTERS[resample]
    scale = size / out
    filter_scale = max(scale, 1.0)
    support = radius * filter_scale
    centers = (np.arange(out) + 0.5) * scale
    starts = np.maximum(0, (centers - support + 0.5).astype(np.int64))
    counts = np.minimum(size, (centers + support + 0.5).astype(np.int64)) - starts
    offsets = np.arange(2 * math.ceil(support) + 1)
    weights = weight((offsets + starts[:, None] - centers[:, None] + 0.5) * (1.0 / filter_scale))
    weights[offsets >= counts[:, None]] = 0.0
    total = np.zeros(out)
    for n in offsets:  # in Pillow's order: floating-point sums depend on it
        total += weights[:, n]
    weights /= np.where(total == 0, 1.0, total)[:, None]
    fixed_point = np.trunc(weights * (1 << PRECISION_BITS) + np.copysign(0.5, weights)).astype(np.int32)
    return _FilterWeights(starts.astype(np.int32), counts.astype(np.int32), fixed_point)


@lru_cache(maxsize=256)
def _horizontal_weights(
    size: int, out: int, resample: int, taps: int, steps: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return starts such that no step reads beyond the row, and the weights from there, repeated for a pixel's four bytes."""
    weights = _filter_weights(size, out, resample)
    starts = np.minimum(weights.starts, size - steps * taps)
    table = np.zeros((out, steps * taps), dtype=np.int32)
    is_used = np.arange(weights.table.shape[1]) < weights.counts[:, None]
    x, tap = np.nonzero(is_used)
    table[x, tap + (weights.starts - starts)[x]] = weights.table[is_used]
    return starts.astype(np.int32), np.repeat(table, 4, axis=1)
