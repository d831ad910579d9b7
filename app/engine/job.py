"""The unit of work of the engine."""

import time
from dataclasses import dataclass

from dinat.app.engine.runtimes.runtime import Array, InferenceOptions
from dinat.model.cpu.resize import Pixels


@dataclass(eq=False)
class Job:
    """One image in the engine. Times are in seconds of time.monotonic, which all processes of a host share.

    Attributes:
        options: What to compute.
        arrived: When the request arrived.
        deadline: When the caller stops waiting.
        pixels: (H, W, 3), as Runtime.run takes them; None once they are copied into a batch.
        decoded: When decoding ended.
        started: When its batch started.
        computed: When its batch ended.
        cancelled: Whether the caller no longer waits. A cancelled job is not computed.
    """

    options: InferenceOptions
    arrived: float
    deadline: float
    pixels: Pixels | Array | None = None
    decoded: float = 0.0
    started: float = 0.0
    computed: float = 0.0
    cancelled: bool = False

    @property
    def active(self) -> bool:
        """Whether the caller still waits for the result."""
        return not self.cancelled and time.monotonic() < self.deadline
