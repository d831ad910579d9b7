"""The status of all processes of one service, in memory that they share."""

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessStatus:
    """Status of a process.

    Attributes:
        state: Last state that the process reported, or that the supervisor set.
        restarts: How often it was restarted.
        reports: How often it has reported its state.
    """

    name: str
    pid: int
    state: str
    restarts: int
    reports: int


class StatusBoard:
    """Status of all processes, in shared memory. The supervisor and the process itself write the status of a process."""

    _PROCESS = struct.Struct("<ii")
    _LENGTH = struct.Struct("<I")
    _REPORTS = struct.Struct("<I")
    _AT_LENGTH = _PROCESS.size
    _AT_REPORTS = _AT_LENGTH + _LENGTH.size
    _TEXT = _AT_REPORTS + _REPORTS.size
    _SIZE = 1024

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._memory = mmap.mmap(-1, self._SIZE * len(names))

    def set_process(self, name: str, pid: int, restarts: int) -> None:
        """Record a started process; by the supervisor."""
        self._PROCESS.pack_into(self._memory, self._offset(name), pid, restarts)

    def report(self, name: str, state: str) -> None:
        """Record the state of a process, by the process itself and repeatedly: that shows that it responds."""
        self.set_state(name, state)
        at = self._offset(name) + self._AT_REPORTS
        (reports,) = self._REPORTS.unpack_from(self._memory, at)
        self._REPORTS.pack_into(self._memory, at, (reports + 1) % 2**32)

    def set_state(self, name: str, state: str) -> None:
        """Record the state of a process; by the supervisor."""
        offset, text = self._offset(name), state.encode()[: self._SIZE - self._TEXT]
        self._memory[offset + self._TEXT : offset + self._TEXT + len(text)] = text
        self._LENGTH.pack_into(self._memory, offset + self._AT_LENGTH, len(text))

    def read(self) -> list[ProcessStatus]:
        """Status of all processes."""
        return [self.get(name) for name in self._names]

    def get(self, name: str) -> ProcessStatus:
        """Status of one process."""
        offset = self._offset(name)
        pid, restarts = self._PROCESS.unpack_from(self._memory, offset)
        (length,) = self._LENGTH.unpack_from(self._memory, offset + self._AT_LENGTH)
        (reports,) = self._REPORTS.unpack_from(self._memory, offset + self._AT_REPORTS)
        text = self._memory[offset + self._TEXT : offset + self._TEXT + length].decode(errors="replace")
        return ProcessStatus(name, pid, text, restarts, reports)

    def is_in_state(self, name: str, state: str) -> bool:
        """Whether a process is in a state; cheaper than `get`, for use in every request."""
        at, text = self._offset(name) + self._TEXT, state.encode()
        return self._memory[at : at + len(text)] == text

    def pids(self) -> Mapping[str, int]:
        """Ids of the started processes, by name."""
        return {status.name: status.pid for status in self.read() if status.pid}

    def _offset(self, name: str) -> int:
        return self._names.index(name) * self._SIZE
