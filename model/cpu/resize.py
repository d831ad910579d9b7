"""Resizing of pictures as Pillow does it, to the bit, by a kernel of model/native: the usual ones in half the time, or less."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinat.model.native import library

Pixels = npt.NDArray[np.uint8]

MOST_PIXELS = 1_000_000
"""Of a larger picture it costs more to copy it out of Pillow than the kernel saves."""

BITS = 22
"""Pillow's weights are whole numbers of this many bits after the point (its Resample.c, PRECISION_BITS)."""


def _triangle(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.maximum(0.0, 1.0 - np.abs(x))


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys' kernel with a = -0.5 (https://doi.org/10.1109/TASSP.1981.1163711)."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


FILTERS: dict[int, tuple[Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]], float]] = {
    int(Image.Resampling.BILINEAR): (_triangle, 1.0),
    int(Image.Resampling.BICUBIC): (_cubic, 2.0),
}
"""Those that checkpoints ask for: weights by distance, and how far they reach."""


def resized(picture: Image.Image, width: int, height: int, resample: int) -> Pixels:
    """(height, width, 3) of an RGB picture; equal to Pillow's resize, which does it where there is no kernel."""
    found = library()
    size = (picture.width, picture.height)
    if size == (width, height):
        return np.asarray(picture)
    too_large = size[0] * size[1] > MOST_PIXELS
    if found is None or resample not in FILTERS or width == size[0] or height == size[1] or too_large:
        return np.asarray(picture.resize((width, height), resample))
    taps = found.lanes // 4
    across, down = _weights(size[0], width, resample), _weights(size[1], height, resample)
    steps = -(-across.table.shape[1] // taps)
    if steps * taps > size[0] or width < taps:  # so few columns that a step would read past them
        return np.asarray(picture.resize((width, height), resample))
    starts, expanded = _expanded(size[0], width, resample, taps, steps)
    columns_first = _may_begin_with_columns() and 0 < size[1] - height > 2 * (size[0] - width)
    data = picture.tobytes("raw", "RGBX")
    between = np.empty((size[0] * height if columns_first else width * size[1]) * 4, dtype=np.uint8)
    out = np.empty((height, width, 3), dtype=np.uint8)
    found.resample(
        *(columns_first, data, size[1], size[0], between.ctypes.data, out.ctypes.data, height, width),
        *(starts.ctypes.data, expanded.ctypes.data, steps),
        *(down.starts.ctypes.data, down.counts.ctypes.data, down.table.ctypes.data, down.table.shape[1]),
    )
    return out


@cache
def _may_begin_with_columns() -> bool:
    """Whether this Pillow does what takes off more rows than twice the columns, columns first, as it does from release 13 on.

    What lies between is rounded to whole numbers, so that the order can be seen.
    """
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 16, 3), dtype=np.uint8))
    bilinear = Image.Resampling.BILINEAR
    rows_first = picture.resize((24, 64), bilinear).resize((24, 20), bilinear)
    return picture.resize((24, 20), bilinear).tobytes() != rows_first.tobytes()


@dataclass(frozen=True)
class _Weights:
    """Of each pixel that comes out: the first that goes in, how many do, and what each counts; (out,) and (out, most) int32."""

    starts: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    table: npt.NDArray[np.int32]


@lru_cache(maxsize=256)
def _weights(size: int, out: int, resample: int) -> _Weights:
    """Of one direction, from `size` pixels to `out`."""
    weigh, reach = FILTERS[resample]
    scale = size / out
    stretched = max(scale, 1.0)
    support = reach * stretched
    centers = (np.arange(out) + 0.5) * scale
    starts = np.maximum(0, (centers - support + 0.5).astype(np.int64))
    counts = np.minimum(size, (centers + support + 0.5).astype(np.int64)) - starts
    places = np.arange(2 * math.ceil(support) + 1)
    weights = weigh((places + starts[:, None] - centers[:, None] + 0.5) * (1.0 / stretched))
    weights[places >= counts[:, None]] = 0.0
    total = np.zeros(out)
    for n in places:  # in order, as floating point sums depend on it
        total += weights[:, n]
    weights /= np.where(total == 0, 1.0, total)[:, None]
    whole = np.trunc(weights * (1 << BITS) + np.copysign(0.5, weights)).astype(np.int32)
    return _Weights(starts.astype(np.int32), counts.astype(np.int32), whole)


@lru_cache(maxsize=256)
def _expanded(size: int, out: int, resample: int, taps: int, steps: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Starts from which no step reads past the row's end, and weights to them, one for each of a pixel's four bytes."""
    across = _weights(size, out, resample)
    starts = np.minimum(across.starts, size - steps * taps)
    table = np.zeros((out, steps * taps), dtype=np.int32)
    taken = np.arange(across.table.shape[1]) < across.counts[:, None]
    x, tap = np.nonzero(taken)
    table[x, tap + (across.starts - starts)[x]] = across.table[taken]
    return starts.astype(np.int32), np.repeat(table, 4, axis=1)
