"""Ways from a JPEG to the network's pixels: time, and how far each is from Pillow's full decode, which is what is served.

    python -m benchmarks.decode [--json FILE]

All ways take turns in one run, on one core. `largest` and `mean` are differences of pixels in 0..255 after the resize to 224.
Pillow decodes for all but simplejpeg; "as served" resizes by dinat.model.cpu.resize, "Pillow" by Pillow.
Draft is Pillow's: libjpeg scales by 1/2, 1/4 or 1/8 while it decodes, to no less than twice the size wanted (DECODE=draft).
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from benchmarks.timing import report, take_turns
from dinat.app.images import decode
from dinat.model import DinatImageProcessor

SIZES = [(500, 375), (1600, 1200), (4000, 3000)]
PROCESSOR = DinatImageProcessor(size=224, resample=3)


def photo(width: int, height: int) -> bytes:
    """A JPEG with detail at every scale, as photographs have (1/f noise)."""
    random = np.random.default_rng(0)
    spectrum = np.fft.rfft2(random.standard_normal((3, height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    values = np.fft.irfft2(spectrum / frequency, s=(height, width))
    values = 128 + 50 * (values - values.mean()) / values.std()
    buffer = io.BytesIO()
    Image.fromarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy()).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def ways(data: bytes) -> dict[str, Callable[[], np.ndarray]]:
    everything = 10**9

    def simple(min_size: int) -> np.ndarray:
        pixels = simplejpeg.decode_jpeg(data, min_height=min_size, min_width=min_size, min_factor=1)
        return PROCESSOR.resize(Image.fromarray(pixels))

    return {
        "Pillow": lambda: np.asarray(decode(data, everything).resize((224, 224), Image.Resampling.BICUBIC)),
        "decoding alone": lambda: np.asarray(decode(data, everything))[:224, :224],
        "as served": lambda: PROCESSOR.resize(decode(data, everything)),
        "as served, draft": lambda: PROCESSOR.resize(decode(data, everything, draft=(448, 448))),
        "simplejpeg": lambda: simple(0),
        "simplejpeg, scaled": lambda: simple(448),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for width, height in SIZES:
        data = photo(width, height)
        candidates = ways(data)
        times = take_turns(candidates, rounds=15)
        exact = candidates["Pillow"]().astype(int)
        for name, way in candidates.items():
            difference = None if name == "decoding alone" else np.abs(way().astype(int) - exact)
            rows.append(
                {
                    "picture": f"{width}x{height}, {len(data) // 1000} kB",
                    "way": name,
                    "ms": times[name] * 1e3,
                    "times faster": times["Pillow"] / times[name],
                    "largest": None if difference is None else int(difference.max()),
                    "mean": None if difference is None else float(difference.mean()),
                }
            )
    report("JPEG to 224x224", rows, arguments.json)


if __name__ == "__main__":
    main()
