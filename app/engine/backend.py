"""The interface between the engine and what runs its jobs: this process or the engine process."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

from dinat.app.engine.job import Job
from dinat.app.engine.runtimes.runtime import LoadedModel


class State(StrEnum):
    """Engine state."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Backend(Protocol):
    """Runs jobs in batches, in this process or in another one.

    `put` is safe from any thread; all other methods run on the event loop's thread.
    """

    state: State
    """LOADING, READY or FAILED. DRAINING is a state of the Engine only."""
    failure: BaseException | None
    loaded: LoadedModel | None

    @property
    def waiting(self) -> int:
        """Number of queued images, of all processes: accepted and not running yet."""

    @property
    def rate(self) -> float | None:
        """Images per second over the last batches; None before the first batch."""

    async def start(self) -> None:
        """Load the model and wait until that ends. An error is stored in `failure`, not raised."""

    def reserve(self, jobs: Sequence[Job]) -> bool:
        """Reserve places in the queue. Return False if there are not enough for all jobs."""

    def put(self, job: Job) -> None:
        """Queue a job that has a place and its pixels."""

    def release(self, job: Job) -> None:
        """Release a job's place and cancel the job unless it has ended."""

    async def stop(self) -> None:
        """Fail the jobs that still wait, and stop."""
