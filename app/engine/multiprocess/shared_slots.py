"""The queue of several processes: slots of shared memory, each for the pixels of one image."""

import fcntl
import mmap
import os
from collections.abc import Sequence

import numpy as np

from dinat.app.host import free_memory
from dinat.model import ConfigError
from dinat.model.cpu.resize import Pixels

FREE = 0
PAGE = mmap.PAGESIZE


class Slots:
    """`count` slots of `size` bytes. Each is free or has an owner, a number from 1 to 255.

    Layout: one byte for the owner of each slot, then the slots. A process that looks for free slots locks the file; the kernel
    releases the lock if the process exits. The owner of a slot releases it by writing one byte, without a lock.
    """

    def __init__(self, descriptor: int, count: int, size: int) -> None:
        """Map slots that `create` made. close() closes the file descriptor."""
        self.descriptor, self.count, self.size = descriptor, count, size
        self._memory = mmap.mmap(descriptor, 0)
        self._first = _round_to_pages(count)

    @classmethod
    def create(cls, count: int, size: int) -> "Slots":
        """Allocate all slots. Raises ConfigError if there is not enough memory."""
        required = _round_to_pages(count) + count * size
        free = free_memory()
        if required > free:
            raise ConfigError(
                f"QUEUE_LIMIT {count} images of {size:,} bytes require {required:,} bytes of shared memory, {free:,} are free: "
                "lower QUEUE_LIMIT, or give the service more memory"
            )
        descriptor = os.memfd_create("dinat-slots", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, required)
        os.posix_fallocate(descriptor, 0, required)
        return cls(descriptor, count, size)

    @property
    def used(self) -> int:
        """Number of slots that have an owner."""
        return self.count - self._owners().count(FREE)

    def acquire(self, owner: int, count: int) -> Sequence[int] | None:
        """Acquire `count` free slots; None if there are fewer. One thread of a process at a time may call this."""
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX)
        try:
            owners, slots = self._owners(), []
            at = -1
            for _ in range(count):
                at = owners.find(FREE, at + 1)
                if at < 0:
                    return None
                slots.append(at)
            for slot in slots:
                self._memory[slot] = owner
            return slots
        finally:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN)

    def release(self, slot: int) -> None:
        """Release a slot, once. The caller owns it or received it from its owner."""
        self._memory[slot] = FREE

    def owned(self, owner: int) -> Sequence[int]:
        """The slots of an owner."""
        return [slot for slot, slot_owner in enumerate(self._owners()) if slot_owner == owner]

    def view(self, slot: int, shape: Sequence[int]) -> Pixels:
        """The pixels in a slot, (H, W, 3) uint8, without a copy."""
        length = int(np.prod(shape))
        return np.frombuffer(self._memory, np.uint8, length, self._first + slot * self.size).reshape(shape)

    def close(self) -> None:
        """Close the descriptor. Views stay valid."""
        os.close(self.descriptor)

    def _owners(self) -> bytes:
        return self._memory[: self.count]


def _round_to_pages(length: int) -> int:
    return -(-length // PAGE) * PAGE
