"""Image resizing by a compiled kernel, bit-exact with Pillow, in half the time or less for common sizes."""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinat.model.errors import ImageError
from dinat.model.native import library

Pixels = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int32]

MAX_PIXELS = 1_000_000
"""For a larger image, copying it out of Pillow costs more time than the kernel saves."""

MAX_RESIZED_PIXELS = 50_000_000
"""Largest image that is resized as a whole, to crop it, with a filter that is not in FILTERS."""

MAX_TABLE_BYTES = 2**20
"""Largest filter table of the kernel; images that require a larger one are unusual, and resized by Pillow."""

MAX_CACHED_BYTES = 16 * 2**20
"""Size of all cached filter tables."""

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
    if image.size == (width, height):
        return np.asarray(image)
    if not _kernel_applies(image, width, height, resample):
        return np.asarray(image.resize((width, height), resample))
    kernels = library()
    assert kernels is not None
    taps = kernels.lanes // 4
    horizontal, vertical = _cached_weights(image.width, width, resample), _cached_weights(image.height, height, resample)
    steps = _steps(image.width, width, resample, taps)
    starts, weights = _horizontal_weights(image.width, width, resample, taps, steps, horizontal)
    columns_first = _vertical_pass_first(image, width, height)
    data = image.tobytes("raw", "RGBX")
    intermediate = np.empty((image.width * height if columns_first else width * image.height) * 4, dtype=np.uint8)
    out = np.empty((height, width, 3), dtype=np.uint8)
    kernels.resample(
        *(columns_first, data, image.height, image.width, intermediate.ctypes.data, out.ctypes.data, height, width),
        *(starts.ctypes.data, weights.ctypes.data, steps),
        *(vertical.starts.ctypes.data, vertical.counts.ctypes.data, vertical.table.ctypes.data, vertical.table.shape[1]),
    )
    return out


@dataclass(frozen=True)
class Window:
    """A part of an image, in pixels: rows from `top` to before `bottom`, columns from `left` to before `right`."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        """Number of pixels."""
        return (self.bottom - self.top) * (self.right - self.left)


def resize_rgb_window(image: Image.Image, width: int, height: int, resample: int, window: Window) -> Pixels:
    """Return a window of the result of `resize_rgb`. An image of extreme aspect ratio is not resized as a whole.

    Args:
        image: RGB image.
        width: Width in pixels of the whole resized image.
        height: Height in pixels of the whole resized image.
        resample: Pillow's filter number.
        window: Part of the resized image.

    Returns:
        Array (rows, columns, 3) uint8.

    Raises:
        ImageError: The resized image has more than MAX_RESIZED_PIXELS pixels, and the filter is not in FILTERS.
    """
    if image.size == (width, height):
        return np.asarray(image.crop((window.left, window.top, window.right, window.bottom)))
    if width * height <= max(MAX_PIXELS, 4 * window.area):
        return resize_rgb(image, width, height, resample)[window.top : window.bottom, window.left : window.right]
    if resample in FILTERS:
        return _resize_window(image, width, height, resample, window)
    if width * height > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"an image of {image.width}x{image.height} pixels would be resized to {width}x{height} before it is cropped, "
            f"the maximum is {MAX_RESIZED_PIXELS:,} pixels: crop it"
        )
    return resize_rgb(image, width, height, resample)[window.top : window.bottom, window.left : window.right]


def _resize_window(image: Image.Image, width: int, height: int, resample: int, window: Window) -> Pixels:
    """Compute a window as Pillow would, in its fixed-point arithmetic, from the pixels that the window depends on."""
    columns = _filter_weights(image.width, width, resample, window.left, window.right)
    rows = _filter_weights(image.height, height, resample, window.top, window.bottom)
    left, top = int(columns.starts.min()), int(rows.starts.min())
    right, bottom = int((columns.starts + columns.counts).max()), int((rows.starts + rows.counts).max())
    pixels = np.asarray(image.crop((left, top, right, bottom)))

    def horizontal(pixels: Pixels) -> Pixels:
        return _weighted_rows(pixels.transpose(1, 0, 2), columns, left).transpose(1, 0, 2)

    def vertical(pixels: Pixels) -> Pixels:
        return _weighted_rows(pixels, rows, top)

    return horizontal(vertical(pixels)) if _vertical_pass_first(image, width, height) else vertical(horizontal(pixels))


def _weighted_rows(pixels: Pixels, weights: "_FilterWeights", first: int) -> Pixels:
    """Return the weighted sums of rows of `pixels`, whose row 0 is row `first` of the image."""
    out = np.empty((len(weights.starts), *pixels.shape[1:]), dtype=np.uint8)
    for n, (start, count) in enumerate(zip((weights.starts - first).tolist(), weights.counts.tolist(), strict=True)):
        total = np.full(pixels.shape[1:], 1 << (PRECISION_BITS - 1), dtype=np.int32)
        for row, weight in zip(pixels[start : start + count], weights.table[n], strict=False):
            total += np.multiply(row, weight, dtype=np.int32)  # int32 suffices, as in Pillow
        out[n] = np.clip(total >> PRECISION_BITS, 0, 255)
    return out


def _kernel_applies(image: Image.Image, width: int, height: int, resample: int) -> bool:
    kernels = library()
    if kernels is None or resample not in FILTERS or width == image.width or height == image.height:
        return False
    if image.width * image.height > MAX_PIXELS:
        return False
    taps = kernels.lanes // 4
    columns = _steps(image.width, width, resample, taps) * taps
    if columns > image.width or width < taps:  # so few columns that a step would read beyond them
        return False
    return max(width * columns * 4, height * _largest_count(image.height, height, resample)) * 4 <= MAX_TABLE_BYTES


def _vertical_pass_first(image: Image.Image, width: int, height: int) -> bool:
    return _may_run_vertical_pass_first() and 0 < image.height - height > 2 * (image.width - width)


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

    starts: Integers
    counts: Integers
    table: Integers


def _largest_count(size: int, out: int, resample: int) -> int:
    """Largest number of input pixels of an output pixel, as Pillow allocates it."""
    return 2 * math.ceil(FILTERS[resample][1] * max(size / out, 1.0)) + 1


def _steps(size: int, out: int, resample: int, taps: int) -> int:
    return -(-_largest_count(size, out, resample) // taps)


def _filter_weights(size: int, out: int, resample: int, first: int, last: int) -> _FilterWeights:
    """Return Pillow's weights of output pixels `first` to before `last`, for resizing an axis from `size` to `out` pixels.

    This is precompute_coeffs in its Resample.c.
    """
    weight, radius = FILTERS[resample]
    scale = size / out
    filter_scale = max(scale, 1.0)
    support = radius * filter_scale
    centers = (np.arange(first, last) + 0.5) * scale
    starts = np.maximum(0, (centers - support + 0.5).astype(np.int64))
    counts = np.minimum(size, (centers + support + 0.5).astype(np.int64)) - starts
    offsets = np.arange(_largest_count(size, out, resample))
    weights = weight((offsets + starts[:, None] - centers[:, None] + 0.5) * (1.0 / filter_scale))
    weights[offsets >= counts[:, None]] = 0.0
    total = np.zeros(last - first)
    for n in offsets:  # in Pillow's order: floating-point sums depend on it
        total += weights[:, n]
    weights /= np.where(total == 0, 1.0, total)[:, None]
    fixed_point = np.trunc(weights * (1 << PRECISION_BITS) + np.copysign(0.5, weights)).astype(np.int32)
    return _FilterWeights(starts.astype(np.int32), counts.astype(np.int32), fixed_point)


class _TableCache:
    """The most recently used filter tables, up to MAX_CACHED_BYTES: clients choose the sizes of images."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tables: OrderedDict[tuple[int, ...], tuple[Integers, ...]] = OrderedDict()
        self.size = 0

    def get(self, key: tuple[int, ...], compute: Callable[[], tuple[Integers, ...]]) -> tuple[Integers, ...]:
        """Return the tables of a key, which `compute` returns if they are not cached."""
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        tables = compute()
        with self._lock:
            if key not in self._tables:
                self._tables[key] = tables
                self.size += _nbytes(tables)
            while self.size > MAX_CACHED_BYTES:
                self.size -= _nbytes(self._tables.popitem(last=False)[1])
        return tables


def _nbytes(tables: tuple[Integers, ...]) -> int:
    return sum(table.nbytes for table in tables)


_tables = _TableCache()


def _cached_weights(size: int, out: int, resample: int) -> _FilterWeights:
    def compute() -> tuple[Integers, ...]:
        weights = _filter_weights(size, out, resample, 0, out)
        return weights.starts, weights.counts, weights.table

    return _FilterWeights(*_tables.get((size, out, resample), compute))


def _horizontal_weights(
    size: int, out: int, resample: int, taps: int, steps: int, weights: _FilterWeights
) -> tuple[Integers, ...]:
    """Return starts such that no step reads beyond the row, and the weights from there, repeated for a pixel's four bytes."""

    def compute() -> tuple[Integers, ...]:
        starts = np.minimum(weights.starts, size - steps * taps)
        table = np.zeros((out, steps * taps), dtype=np.int32)
        is_used = np.arange(weights.table.shape[1]) < weights.counts[:, None]
        x, tap = np.nonzero(is_used)
        table[x, tap + (weights.starts - starts)[x]] = weights.table[is_used]
        return starts.astype(np.int32), np.repeat(table, 4, axis=1)

    return _tables.get((size, out, resample, taps, steps), compute)
