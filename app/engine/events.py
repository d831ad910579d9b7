"""Events of batchers and backends, as protocols that their listeners implement."""

from collections.abc import Sequence
from typing import Protocol

from dinat.app.engine.job import Job
from dinat.app.engine.runtimes.runtime import InferenceResult, Runtime


class JobEvents(Protocol):
    """Events of jobs. Called from any thread."""

    def on_batch_start(self, batch: Sequence[Job]) -> None:
        """A batch starts; the pixels of its jobs are copied."""

    def on_results(self, jobs: Sequence[Job], results: Sequence[InferenceResult | Exception]) -> None:
        """Jobs ended with these results, one for each job. Called once for every job that was put."""


class BatcherEvents(JobEvents, Protocol):
    """Events of a Batcher."""

    def on_batch_end(self, size: int, seconds: float) -> None:
        """A batch of `size` images was computed in `seconds`."""

    def on_crash(self, error: BaseException, runtime: Runtime, in_flight: Sequence[Job]) -> None:
        """An engine thread crashed. Called in that thread as it ends, with the jobs that it was running."""


class BackendEvents(JobEvents, Protocol):
    """Events of a Backend."""

    async def on_state_change(self) -> None:
        """The backend's state changed. Called on the event loop's thread, and awaited before "ready" is logged."""
