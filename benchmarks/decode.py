"""Methods to decode and resize a JPEG: time, and difference from Pillow's full decode and resize.

    python -m benchmarks.decode [--json FILE]

All methods are interleaved in one run, on one core. `max` and `mean` are differences of pixel values, 0 to 255, after the
resize to 224. Pillow decodes for all but simplejpeg. "as served" resizes with dinat.model.cpu.resize, "Pillow" with Pillow.
Draft is Pillow's draft mode (DECODE=draft): libjpeg scales by 1/2, 1/4 or 1/8 while decoding, to at least twice the target
size.
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from benchmarks.timing import median_seconds, report
from dinat.app.images import decode
from dinat.model import DinatImageProcessor

SIZES = [(500, 375), (1600, 1200), (4000, 3000)]
PROCESSOR = DinatImageProcessor(size=224, resample=3)


def jpeg(width: int, height: int) -> bytes:
    """Return a JPEG with detail at every scale (1/f noise), as photographs have."""
    random = np.random.default_rng(0)
    spectrum = np.fft.rfft2(random.standard_normal((3, height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    values = np.fft.irfft2(spectrum / frequency, s=(height, width))
    values = 128 + 50 * (values - values.mean()) / values.std()
    buffer = io.BytesIO()
    Image.fromarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy()).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def methods(data: bytes) -> dict[str, Callable[[], np.ndarray]]:
    no_limit = 10**9

    def simple(min_size: int) -> np.ndarray:
        pixels = simplejpeg.decode_jpeg(data, min_height=min_size, min_width=min_size, min_factor=1)
        return PROCESSOR.resize(Image.fromarray(pixels))

    return {
        "Pillow": lambda: np.asarray(decode(data, no_limit).resize((224, 224), Image.Resampling.BICUBIC)),
        "decoding alone": lambda: np.asarray(decode(data, no_limit))[:224, :224],
        "as served": lambda: PROCESSOR.resize(decode(data, no_limit)),
        "as served, draft": lambda: PROCESSOR.resize(decode(data, no_limit, draft=(448, 448))),
        "simplejpeg": lambda: simple(0),
        "simplejpeg, scaled": lambda: simple(448),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for width, height in SIZES:
        data = jpeg(width, height)
        candidates = methods(data)
        times = median_seconds(candidates, rounds=15)
        reference = candidates["Pillow"]().astype(int)
        for name, method in candidates.items():
            difference = None if name == "decoding alone" else np.abs(method().astype(int) - reference)
            rows.append(
                {
                    "image": f"{width}x{height}, {len(data) // 1000} kB",
                    "method": name,
                    "ms": times[name] * 1e3,
                    "speedup": times["Pillow"] / times[name],
                    "max": None if difference is None else int(difference.max()),
                    "mean": None if difference is None else float(difference.mean()),
                }
            )
    report("JPEG to 224x224", rows, arguments.json)


if __name__ == "__main__":
    main()
