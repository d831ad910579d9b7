"""The service before a stand-in for a card: it takes real pictures, and gives its answers after as long as a card would take.

    python -m benchmarks.fake_gpu RATE [--no-decode] [flags of `dinat serve`]

A batch of n pictures takes n / RATE seconds, in which nothing is computed; the next one uploads meanwhile. What a picture is
answered with depends on its pixels. --no-decode gives every picture the same pixels: what is left is a request's way alone.
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


class StandIn:
    """A Runtime, as dinat.app.engine.runtimes.runtime has it, of so many pictures a second."""

    name = "stand-in"
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
        few = pixels[:, 100, 100:103, :].reshape(len(pixels), 9)
        classes = few.astype(np.int64) + 256 * (np.arange(9) % 3)
        scores = np.sort(few.astype(np.float32) / 256)[:, ::-1]
        return [InferenceResult(classes[i, : one.top_k], scores[i, : one.top_k].copy(), {}) for i, one in enumerate(options)]

    def attention(self) -> dict[str, str]:
        return {}

    def warm(self, max_batch: int) -> int:
        return max_batch

    def memory(self) -> int | None:
        return None

    def is_out_of_memory(self, error: Exception) -> bool:
        return False


def stand_in(rate: float, decode: bool = True) -> None:
    """Have this process, and those forked from it, serve a stand-in."""

    def load(settings: Settings) -> Sequence[StandIn]:
        return [StandIn(rate)]

    dinat.app.engine.local_backend.load_runtimes = load
    if not decode:
        picture = Image.fromarray(np.zeros((224, 224, 3), dtype=np.uint8))
        dinat.app.engine.engine.decode = lambda *_: picture


if __name__ == "__main__":
    rate, *flags = sys.argv[1:]
    stand_in(float(rate), decode="--no-decode" not in flags)
    sys.exit(main(["serve", *(flag for flag in flags if flag != "--no-decode")]))
