"""The one call through which every door reaches the network, and the network's life: load, warm, run, stop."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum

import numpy as np

from app.engine.batcher import Batcher
from app.engine.torch_runtime import Answer, TorchRuntime, Wanted
from app.errors import Unavailable
from app.images import decode
from app.settings import Settings
from model.image_processor import Pixels

logger = logging.getLogger("dinat")


class State(StrEnum):
    """Where the engine is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Engine:
    """Decodes pictures in threads, batches them, and answers."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.state = State.LOADING
        self.failure: Exception | None = None
        self.on_started: Callable[[], object] = lambda: None
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._runtime: TorchRuntime | None = None
        self._batcher: Batcher | None = None

    @property
    def runtime(self) -> TorchRuntime:
        """The loaded network. Raises Unavailable, saying why, until the engine is ready and once it no longer is."""
        if self.state is not State.READY or self._runtime is None:
            raise Unavailable(self.why_not_ready(), headers={"Retry-After": "1"})
        return self._runtime

    def why_not_ready(self) -> str:
        """One sentence."""
        reasons = {
            State.LOADING: f"the model {self.settings.model} is loading: try again soon",
            State.DRAINING: "the service is stopping: ask another instance",
            State.FAILED: f"the model could not be loaded: {self.failure}",
            State.READY: "the service is ready",
        }
        return reasons[self.state]

    async def start(self) -> None:
        """Load the checkpoint and run it once at both ends of its batch sizes. A failure is kept in `failure`, not raised.

        Calls on_started when it is over, either way.
        """
        started = time.perf_counter()
        try:
            self._runtime, self._batcher = await asyncio.to_thread(self._load)
        except Exception as error:
            self.state, self.failure = State.FAILED, error
        else:
            self.state = State.READY
            logger.info("%s is ready after %.1f s", self.settings.model, time.perf_counter() - started)
        self.on_started()

    async def stop(self) -> None:
        """Answer what waits, then let everything go."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING
        if self._batcher is not None:
            await self._batcher.stop()
        self._decoders.shutdown()

    async def submit(self, data: bytes, wanted: Wanted) -> Answer:
        """Classify a picture given as the bytes of its file. Raises ServiceError."""
        runtime, batcher = self.runtime, self._batcher
        assert batcher is not None

        def prepare() -> Pixels:
            return runtime.processor.resize(decode(data, self.settings.max_pixels))

        pixels = await asyncio.get_running_loop().run_in_executor(self._decoders, prepare)
        return await batcher.submit(pixels, wanted)

    def _load(self) -> tuple[TorchRuntime, Batcher]:
        settings = self.settings
        runtime = TorchRuntime(settings.model, settings.revision, settings.device, settings.precision, settings.attention)
        max_batch = settings.max_batch or (64 if runtime.device.type == "cuda" else 8)
        example = runtime.processor.resize(np.zeros((480, 640, 3), dtype=np.uint8))
        for count in {1, max_batch}:
            runtime.run([example] * count, [Wanted(top_k=1)] * count)
        return runtime, Batcher(runtime.run, max_batch)
