"""What executes jobs, as the engine sees it: in this process or in another one."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

from dinat.app.engine.batcher import Job
from dinat.app.engine.runtimes.runtime import LoadedModel


class State(StrEnum):
    """Where the engine is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Backend(Protocol):
    """Whoever runs jobs in batches: this process, or another. Its methods are for the event loop's thread, `put` for all."""

    state: State
    """Never DRAINING: that is for who fills it to know."""
    failure: BaseException | None
    loaded: LoadedModel | None

    @property
    def waiting(self) -> int:
        """Pictures taken, of all that fill it, and not yet running."""

    @property
    def rate(self) -> float | None:
        """Pictures per second of the last batches, None before the first."""

    async def start(self) -> None:
        """Load; over when that is done. A failure is kept in `failure`, not raised."""

    def take(self, jobs: Sequence[Job]) -> bool:
        """Count jobs as waiting, if there is room for all of them."""

    def put(self, job: Job) -> None:
        """Run a job that was taken and has its pixels."""

    def withdraw(self, job: Job) -> None:
        """Nobody waits for a job any more, answered or not."""

    async def stop(self) -> None:
        """Answer what still waits with an error, and end."""
