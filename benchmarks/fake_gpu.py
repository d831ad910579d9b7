"""Serve with a fake GPU: requests take the real path, and results come after the time that a GPU of a given speed would take.

    python -m benchmarks.fake_gpu RATE [--no-decode] [flags of `dinat serve`]

A batch of n images takes n / RATE seconds, during which nothing is computed; meanwhile the next batch uploads. Results depend
on the images' pixels. --no-decode replaces every image by the same pixels, which leaves the cost of handling requests.
"""

import sys
import threading
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

import dinat.app.engine.engine
import dinat.app.engine.local_backend
from dinat.app.cli import main
from dinat.app.engine.runtimes.runtime import Disabled, InferenceOptions, InferenceResult
from dinat.app.settings import Settings
from dinat.model import DinatConfig, DinatImageProcessor
from dinat.model.cpu.resize import Pixels


class FakeGpuRuntime:
    """A dinat.app.engine.runtimes.runtime.Runtime that takes 1 / rate seconds per image."""

    name = "fake GPU"
    device = "none"
    precision = "none"
    default_batch = 64
    lanes = 2
    disabled: Sequence[Disabled] = ()

    def __init__(self, rate: float) -> None:
        self.config = DinatConfig.preset("mini")
        self.processor = DinatImageProcessor(size=224, resample=3)
        self._rate = rate
        self._computing = threading.Lock()

    def run(self, pixels: Pixels, options: Sequence[InferenceOptions]) -> list[InferenceResult]:
        with self._computing:
            time.sleep(len(pixels) / self._rate)
        samples = pixels[:, 100, 100:103, :].reshape(len(pixels), 9)
        classes = samples.astype(np.int64) + 256 * (np.arange(9) % 3)
        scores = np.sort(samples.astype(np.float32) / 256)[:, ::-1]
        return [
            InferenceResult(classes[i, : requested.top_k], scores[i, : requested.top_k].copy(), {})
            for i, requested in enumerate(options)
        ]

    def attention(self) -> dict[str, str]:
        return {}

    def warm(self, max_batch: int) -> int:
        return max_batch

    def memory(self) -> int | None:
        return None

    def is_out_of_memory(self, error: Exception) -> bool:
        return False


def use_fake_gpu(rate: float, decode: bool = True) -> None:
    """Make this process, and processes forked from it, serve with a fake GPU of `rate` images per second."""

    def load_runtimes(settings: Settings) -> Sequence[FakeGpuRuntime]:
        return [FakeGpuRuntime(rate)]

    dinat.app.engine.local_backend.load_runtimes = load_runtimes
    if not decode:
        image = Image.fromarray(np.zeros((224, 224, 3), dtype=np.uint8))
        dinat.app.engine.engine.decode = lambda *_: image


if __name__ == "__main__":
    rate, *flags = sys.argv[1:]
    use_fake_gpu(float(rate), decode="--no-decode" not in flags)
    sys.exit(main(["serve", *(flag for flag in flags if flag != "--no-decode")]))
