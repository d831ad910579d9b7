"""What happens before what, among threads of the host and streams of a card: vector clocks, and who touched which memory when.

Two accesses of one memory, at least one of them a write, must be ordered twice: on the devices, by the order of a stream, by
events and waits; and on the host, by the order of a thread, by locks and queues. Else the outcome is left to chance, even if it
came out right this time.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any


class Race(AssertionError):
    """Two accesses of one memory with nothing that orders them."""


@dataclass(eq=False)
class Timeline:
    """A thread or a stream. knows: how far along each timeline all that it does from now on comes after."""

    name: str
    knows: dict["Timeline", int] = field(default_factory=dict)

    def tick(self) -> int:
        self.knows[self] = self.knows.get(self, 0) + 1
        return self.knows[self]

    def learn(self, known: dict["Timeline", int]) -> None:
        for timeline, tick in known.items():
            self.knows[timeline] = max(tick, self.knows.get(timeline, 0))


@dataclass(frozen=True)
class Access:
    what: str
    on: Timeline
    tick: int
    by: Timeline
    host_tick: int

    def comes_before(self, other: "Access") -> bool:
        if other.by is not self.by and other.by.knows.get(self.by, 0) < self.host_tick:
            return False
        return other.on is self.on or other.on.knows.get(self.on, 0) >= self.tick


@dataclass(eq=False)
class Memory:
    """One allocation, and who touched it last."""

    what: str = "memory"
    written: Access | None = None
    read: list[Access] = field(default_factory=list)

    def touch(self, access: Access, write: bool) -> None:
        before = [self.written, *(self.read if write else [])]
        for earlier in before:
            if earlier is not None and not earlier.comes_before(access):
                raise Race(
                    f"{access.what} on {access.on.name} by {access.by.name}, and {earlier.what} on {earlier.on.name} by "
                    f"{earlier.by.name}, share memory, and nothing orders them"
                )
        if write:
            self.written, self.read = access, []
        else:
            self.read = [*(one for one in self.read if one.on is not access.on), access]


_one_host: list[Timeline] = []


@contextmanager
def one_host() -> Iterator[None]:
    """Within it all threads of the host are one: for programs whose own locks are not recorded."""
    _one_host.append(Timeline("the host"))
    try:
        yield
    finally:
        _one_host.pop()


def this_thread() -> Timeline:
    """The timeline of the calling thread; a new one knows what the main thread knows."""
    if _one_host:
        return _one_host[-1]
    thread = threading.current_thread()
    timeline = getattr(thread, "timeline", None)
    if timeline is None:
        main = getattr(threading.main_thread(), "timeline", None)
        timeline = thread.timeline = Timeline(thread.name, dict(main.knows) if main else {})  # type: ignore[attr-defined]
    return timeline


class RecordedLock:
    """threading.Lock that orders who comes after with who was before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Timeline, int] = {}

    def __enter__(self) -> None:
        self._lock.acquire()
        this_thread().learn(self._known)

    def __exit__(self, *_: object) -> None:
        self._known = dict(this_thread().knows)
        self._lock.release()


class RecordedQueue:
    """queue.SimpleQueue that orders who gets with who has put."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()

    def put(self, item: object) -> None:
        self._queue.put((item, dict(this_thread().knows)))

    def get(self) -> Any:
        item, known = self._queue.get()
        this_thread().learn(known)
        return item
