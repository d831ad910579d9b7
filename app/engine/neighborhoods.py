"""Neighborhoods of a point, computed beside the batches."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch

from dinat.app.engine.events import JobEvents
from dinat.app.engine.job import Job
from dinat.app.engine.runtimes.runtime import InferenceResult, to_pixel_values
from dinat.app.settings import Settings
from dinat.model import DinatForImageClassification, DinatImageProcessor
from dinat.model.neighborhoods import neighborhoods


class NeighborhoodWorker:
    """Computes jobs with a point, one at a time in a thread of its own, by a float32 network on the CPU.

    The network loads with the first such job. Exceptions end as results.
    """

    def __init__(self, settings: Settings, events: JobEvents) -> None:
        self._settings = settings
        self._events = events
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="neighborhoods")

    def put(self, job: Job, processor: DinatImageProcessor) -> None:
        """Queue a job that has its pixels and a point; `processor` normalizes the pixels. Safe from any thread."""
        self._thread.submit(self._compute, job, processor)

    def stop(self) -> None:
        """Cancel the queued jobs, and wait for the one that runs."""
        self._thread.shutdown(cancel_futures=True)

    @cached_property
    def _network(self) -> DinatForImageClassification:
        return DinatForImageClassification.from_pretrained(self._settings.model, revision=self._settings.revision)

    def _compute(self, job: Job, processor: DinatImageProcessor) -> None:
        assert job.pixels is not None and job.options.point is not None
        pixels = np.array(job.pixels[None])
        job.started, job.pixels = time.monotonic(), None
        self._events.on_batch_start([job])
        if not job.active:
            return
        try:
            pixel_values = to_pixel_values(processor, torch.from_numpy(pixels))
            found = neighborhoods(self._network, pixel_values, *job.options.point)
            job.computed = time.monotonic()
            result = InferenceResult(np.empty(0, np.int64), np.empty(0, np.float32), {}, found)
            self._events.on_results([job], [result])
        except Exception as error:
            self._events.on_results([job], [error])
