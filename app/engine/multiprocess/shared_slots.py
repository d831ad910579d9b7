"""Places in the queue, for several processes: each holds the pixels of one picture, in memory that all of them share."""

import fcntl
import mmap
import os
from collections.abc import Sequence

import numpy as np

from dinat.app.host import free_memory
from dinat.model import ConfigError
from dinat.model.cpu.resize import Pixels

NOBODY = 0
PAGE = mmap.PAGESIZE


class Slots:
    """`count` slots of `size` bytes. Each is free or has an owner, a number from 1 to 255.

    Memory: one byte for each slot's owner, then the slots. Whoever looks for a free one holds a lock on the file, which the
    kernel gives back when its holder dies; who owns a slot frees it by writing one byte.
    """

    def __init__(self, descriptor: int, count: int, size: int) -> None:
        """Open memory that `create` has made. descriptor: closed when this is."""
        self.descriptor, self.count, self.size = descriptor, count, size
        self._memory = mmap.mmap(descriptor, 0)
        self._first = _pages(count)

    @classmethod
    def create(cls, count: int, size: int) -> "Slots":
        """Make the memory, all of it at once. Raises ConfigError, in one line, where there is not enough."""
        wanted = _pages(count) + count * size
        free = free_memory()
        if wanted > free:
            raise ConfigError(
                f"QUEUE_LIMIT {count} pictures of {size:,} bytes want {wanted:,} bytes of shared memory, {free:,} are free: "
                "lower QUEUE_LIMIT, or give the service more memory"
            )
        descriptor = os.memfd_create("dinat-slots", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, wanted)
        os.posix_fallocate(descriptor, 0, wanted)
        return cls(descriptor, count, size)

    @property
    def used(self) -> int:
        """Slots that are not free."""
        return self.count - self._owners().count(NOBODY)

    def take(self, owner: int, count: int) -> Sequence[int] | None:
        """So many free slots, or none if there are fewer. By one thread of a process at a time."""
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX)
        try:
            owners, slots = self._owners(), []
            at = -1
            for _ in range(count):
                at = owners.find(NOBODY, at + 1)
                if at < 0:
                    return None
                slots.append(at)
            for slot in slots:
                self._memory[slot] = owner
            return slots
        finally:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN)

    def free(self, slot: int) -> None:
        """Give a slot back. By its owner, or by whom it was handed to; once."""
        self._memory[slot] = NOBODY

    def owned(self, owner: int) -> Sequence[int]:
        """The slots of an owner."""
        return [slot for slot, one in enumerate(self._owners()) if one == owner]

    def view(self, slot: int, shape: Sequence[int]) -> Pixels:
        """The pixels in a slot, (H, W, 3) uint8, where they are."""
        length = int(np.prod(shape))
        return np.frombuffer(self._memory, np.uint8, length, self._first + slot * self.size).reshape(shape)

    def close(self) -> None:
        """Let go of it; views stay good."""
        os.close(self.descriptor)

    def _owners(self) -> bytes:
        return self._memory[: self.count]


def _pages(length: int) -> int:
    return -(-length // PAGE) * PAGE
