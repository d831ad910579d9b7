"""Data race detection with vector clocks, across host threads and GPU streams.

Two accesses of the same memory, at least one of them a write, must be ordered twice: on the devices, by the order within a
stream or by events and waits; and on the host, by the order within a thread or by locks and queues. Otherwise the result
depends on timing, even if it was correct in this run.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any


class Race(AssertionError):
    """Two accesses of the same memory are not ordered."""


@dataclass(eq=False)
class Timeline:
    """A host thread or a GPU stream.

    Attributes:
        name: shown in errors.
        clock: vector clock: for each timeline, the last tick that happens before everything that follows on this one.
    """

    name: str
    clock: dict["Timeline", int] = field(default_factory=dict)

    def tick(self) -> int:
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]

    def merge(self, clock: dict["Timeline", int]) -> None:
        for timeline, tick in clock.items():
            self.clock[timeline] = max(tick, self.clock.get(timeline, 0))


@dataclass(frozen=True)
class Access:
    """An operation that reads or writes memory.

    Attributes:
        operation: shown in errors.
        timeline: the stream it runs on, or the host thread itself.
        tick: its tick on that timeline.
        thread: the host thread that launched it.
        thread_tick: the launch's tick on that thread.
    """

    operation: str
    timeline: Timeline
    tick: int
    thread: Timeline
    thread_tick: int

    def __str__(self) -> str:
        return f"{self.operation} on {self.timeline.name}, launched by {self.thread.name}"

    def happens_before(self, other: "Access") -> bool:
        if other.thread is not self.thread and other.thread.clock.get(self.thread, 0) < self.thread_tick:
            return False
        return other.timeline is self.timeline or other.timeline.clock.get(self.timeline, 0) >= self.tick


@dataclass(eq=False)
class Memory:
    """One allocation, with its last write and the reads since then."""

    name: str = "memory"
    last_write: Access | None = None
    reads: list[Access] = field(default_factory=list)

    def record(self, access: Access, write: bool) -> None:
        """Record an access.

        Raises:
            Race: an earlier conflicting access does not happen before it.
        """
        for earlier in [self.last_write, *(self.reads if write else [])]:
            if earlier is not None and not earlier.happens_before(access):
                raise Race(f"unordered accesses of the same memory: {access}; {earlier}")
        if write:
            self.last_write, self.reads = access, []
        else:
            self.reads = [*(read for read in self.reads if read.timeline is not access.timeline), access]


_single_threads: list[Timeline] = []


@contextmanager
def single_host_thread() -> Iterator[None]:
    """Treat all host threads as one: for programs whose locks are not tracked."""
    _single_threads.append(Timeline("the host"))
    try:
        yield
    finally:
        _single_threads.pop()


def this_thread() -> Timeline:
    """Return the calling thread's timeline. A new thread starts with the main thread's clock."""
    if _single_threads:
        return _single_threads[-1]
    thread = threading.current_thread()
    timeline = getattr(thread, "timeline", None)
    if timeline is None:
        main = getattr(threading.main_thread(), "timeline", None)
        timeline = thread.timeline = Timeline(thread.name, dict(main.clock) if main else {})  # type: ignore[attr-defined]
    return timeline


class TrackedLock:
    """threading.Lock whose release happens before the next acquisition."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clock: dict[Timeline, int] = {}

    def __enter__(self) -> None:
        self._lock.acquire()
        this_thread().merge(self._clock)

    def __exit__(self, *_: object) -> None:
        self._clock = dict(this_thread().clock)
        self._lock.release()


class TrackedQueue:
    """queue.SimpleQueue where putting an item happens before getting it."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()

    def put(self, item: object) -> None:
        self._queue.put((item, dict(this_thread().clock)))

    def get(self) -> Any:
        item, clock = self._queue.get()
        this_thread().merge(clock)
        return item
