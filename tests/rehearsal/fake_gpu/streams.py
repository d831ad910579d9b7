"""torch.cuda's streams and events. Operations run immediately; the order that streams and events guarantee is recorded."""

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.rehearsal.fake_gpu import devices
from tests.rehearsal.fake_gpu.capture import Step, current_capture, forbid, require_captured_stream
from tests.rehearsal.fake_gpu.clocks import Access, Memory, Timeline, this_thread
from tests.rehearsal.fake_gpu.devices import CudaError


@dataclass(eq=False)
class Event:
    """torch.cuda.Event.

    Attributes:
        clock: the stream's vector clock when the event was recorded, or None.
        recorded_at: time.perf_counter() then.
        completed: whether the host has waited for it since.
    """

    enable_timing: bool = False
    blocking: bool = False
    interprocess: bool = False
    clock: dict[Timeline, int] | None = None
    recorded_at: float = 0.0
    completed: bool = False

    def record(self, stream: "Stream | None" = None) -> None:
        timeline = (stream or current_stream()).timeline
        require_captured_stream(timeline, "an event recorded on another stream")
        timeline.merge(this_thread().clock)
        timeline.tick()
        self.clock, self.recorded_at, self.completed = dict(timeline.clock), time.perf_counter(), False

    def wait(self, stream: "Stream | None" = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        forbid("Event.synchronize")
        if self.clock is not None:
            this_thread().merge(self.clock)
        self.completed = True

    def query(self) -> bool:
        return self.completed

    def elapsed_time(self, end: "Event") -> float:
        """Return the milliseconds from this event to `end`."""
        if not (self.enable_timing and end.enable_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.clock is None or not end.completed:
            raise CudaError("CUDA error: device not ready")
        return max(1e-3, 1e3 * (end.recorded_at - self.recorded_at))


_all_streams: "weakref.WeakSet[Stream]" = weakref.WeakSet()


class Stream:
    """torch.cuda.Stream."""

    _numbers = itertools.count(1)

    def __init__(self, device: Any = None, priority: int = 0, number: int | None = None) -> None:
        self.device = devices.with_index(device)
        self.number = next(self._numbers) if number is None else number
        self.timeline = Timeline(f"stream {self.number} of {self.device}")
        _all_streams.add(self)

    def wait_event(self, event: Event) -> None:
        self.timeline.merge(this_thread().clock)
        if event.clock is not None:
            self.timeline.merge(event.clock)

    def wait_stream(self, other: "Stream") -> None:
        require_captured_stream(other.timeline, "a wait for another stream")
        self.timeline.merge(this_thread().clock)
        self.timeline.merge(other.timeline.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        forbid("Stream.synchronize")
        this_thread().merge(self.timeline.clock)

    def query(self) -> bool:
        return True


_default_streams: dict[int, Stream] = {}
_thread = threading.local()


def default_stream(device: Any = None) -> Stream:
    index = devices.with_index(device).index
    if index not in _default_streams:
        _default_streams[index] = Stream(torch.device("cuda", index), number=0)
    return _default_streams[index]


def current_stream(device: Any = None) -> Stream:
    index = devices.with_index(device).index
    streams: dict[int, Stream] = getattr(_thread, "streams", {})
    return streams.get(index) or default_stream(torch.device("cuda", index))


def _set_stream(stream: Stream) -> None:
    _thread.streams = {**getattr(_thread, "streams", {}), stream.device.index: stream}


class stream_context:
    """torch.cuda.stream: make the stream and its device current."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        if self._stream is not None:
            self._previous = devices.current(), current_stream(self._stream.device)
            devices.set_current(self._stream.device)
            _set_stream(self._stream)

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            index, stream = self._previous
            devices.set_current(index)
            _set_stream(stream)


def synchronize(device: Any = None) -> None:
    """torch.cuda.synchronize, which waits for all devices here."""
    forbid("torch.cuda.synchronize")
    thread = this_thread()
    for stream in list(_all_streams):
        thread.merge(stream.timeline.clock)


def synchronize_implicitly(operation: str) -> None:
    """Wait for the current stream, as an operation does that returns GPU values to the host."""
    forbid(operation)
    this_thread().merge(current_stream().timeline.clock)


def record_launch(
    operation: str,
    device: torch.device,
    reads: Sequence[Memory],
    writes: Sequence[Memory],
    replay: Callable[[], None],
    new: Sequence[Any],
) -> None:
    """Record an operation on the device's current stream: as a step of the graph being captured, or as memory accesses.

    Args:
        operation: shown in errors.
        device: where it runs.
        reads: memory that it reads.
        writes: memory that it writes.
        replay: runs it again, on the same memory.
        new: the FakeGpuTensors that it returns in newly allocated memory.
    """
    stream = current_stream(device)
    capture = current_capture()
    if capture is None:
        record_accesses(operation, stream, reads, writes)
        return
    require_captured_stream(stream.timeline, f"{operation} on a stream that is not captured")
    capture.allocated.update(tensor.memory for tensor in new)
    capture.results.update(new)
    external = [memory for memory in (*reads, *writes) if memory not in capture.allocated]
    weak = [[weakref.ref(memory) for memory in group] for group in (reads, writes, external)]
    capture.steps.append(Step(operation, replay, *weak))


def record_accesses(operation: str, stream: Stream, reads: Sequence[Memory], writes: Sequence[Memory]) -> None:
    """Record an operation's memory accesses on a stream, launched by the calling thread."""
    thread = this_thread()
    thread_tick = thread.tick()
    stream.timeline.merge(thread.clock)
    _record(Access(operation, stream.timeline, stream.timeline.tick(), thread, thread_tick), reads, writes)


def record_host_accesses(operation: str, reads: Sequence[Memory], writes: Sequence[Memory]) -> None:
    """Record an operation's memory accesses on the calling thread itself."""
    thread = this_thread()
    tick = thread.tick()
    _record(Access(operation, thread, tick, thread, tick), reads, writes)


def _record(access: Access, reads: Sequence[Memory], writes: Sequence[Memory]) -> None:
    for memory in writes:
        memory.record(access, write=True)
    for memory in reads:
        memory.record(access, write=False)
