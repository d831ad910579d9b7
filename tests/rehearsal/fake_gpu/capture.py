"""Stream captures in progress, and what CUDA does not permit meanwhile."""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tests.rehearsal.fake_gpu.clocks import Memory, Timeline
from tests.rehearsal.fake_gpu.devices import CudaError


@dataclass
class Step:
    """One operation of a graph. References to memory are weak: a graph keeps only its own allocations alive.

    Attributes:
        operation: shown in errors.
        replay: runs the operation again, on the same memory.
        reads: memory that it reads.
        writes: memory that it writes.
        external: memory that it reads or writes and that was not allocated during the capture.
    """

    operation: str
    replay: Callable[[], None]
    reads: "list[weakref.ref[Memory]]"
    writes: "list[weakref.ref[Memory]]"
    external: "list[weakref.ref[Memory]]"


@dataclass
class Capture:
    """A capture in progress.

    Attributes:
        timeline: that of the captured stream.
        mode: capture_error_mode of torch.cuda.CUDAGraph.capture_begin.
        thread: identifier of the capturing thread.
        steps: operations captured so far.
        allocated: memory allocated during the capture.
        results: tensors in that memory that captured operations have returned.
        invalidated_by: the operation that was not permitted and invalidated the capture, or "".
    """

    timeline: Timeline
    mode: str
    thread: int
    steps: list[Step] = field(default_factory=list)
    allocated: "weakref.WeakSet[Memory]" = field(default_factory=weakref.WeakSet)
    results: "weakref.WeakSet[torch.Tensor]" = field(default_factory=weakref.WeakSet)
    invalidated_by: str = ""


_captures: list[Capture] = []


def begin(timeline: Timeline, mode: str) -> Capture:
    """Start capturing a stream in the calling thread."""
    capture = Capture(timeline, mode, threading.get_ident())
    _captures.append(capture)
    return capture


def end(capture: Capture) -> None:
    """End a capture.

    Raises:
        CudaError: the capture was invalidated.
    """
    _captures.remove(capture)
    if capture.invalidated_by:
        raise CudaError(f"CUDA error: operation failed due to a previous error during capture ({capture.invalidated_by})")


def current_capture() -> Capture | None:
    """Return the calling thread's capture."""
    return next((capture for capture in _captures if capture.thread == threading.get_ident()), None)


def is_capturing() -> bool:
    return current_capture() is not None


def forbid(operation: str) -> None:
    """Raise if the operation is not permitted because a stream is being captured, and invalidate that capture."""
    for capture in _captures:
        if capture.thread == threading.get_ident() or capture.mode == "global":
            capture.invalidated_by = operation
            raise CudaError(f"CUDA error: operation not permitted when stream is capturing ({operation})")


def require_captured_stream(timeline: Timeline, operation: str) -> None:
    """Raise if the calling thread is capturing another stream than that of this timeline, and invalidate the capture."""
    capture = current_capture()
    if capture is not None and capture.timeline is not timeline:
        capture.invalidated_by = operation
        raise CudaError(f"CUDA error: dependency created on uncaptured work in another stream ({operation})")
