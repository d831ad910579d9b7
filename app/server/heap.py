"""Memory settings of the C library and of Python's garbage collector."""

import ctypes
import gc
import platform
import threading
import time

from dinat.app.host import resident_memory

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""From glibc's malloc.h."""

IDLE_SECONDS = 10
"""How long a process is idle before it returns freed memory to the system."""

TRIM_BYTES = 256 * 2**20
"""Growth of the resident memory, since the last time, that makes this worthwhile: a batch on a CPU needs about 100 MB."""


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of a batch for the next one. Does nothing with other C libraries.

    By default glibc returns large blocks to the system at once, and the kernel then maps and zeroes every activation of every
    layer anew. With this setting the process holds as much memory as its largest batch needed, and IdleTrim returns the memory
    of large requests.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


class IdleTrim:
    """Returns freed memory to the system when the process is idle and has grown by TRIM_BYTES. Only with glibc.

    The pages are mapped again when they are used again: 20 ms for 100 MB.
    """

    def __init__(self) -> None:
        self._libc = _glibc()
        self._wait_until = time.monotonic() + IDLE_SECONDS
        self._resident = 0

    def tick(self, busy: bool) -> None:
        """Trim if it is time to; called at least once a second. Another thread does it, as it takes up to 100 ms.

        Args:
            busy: Whether the process works on a request.
        """
        now = time.monotonic()
        if not busy and now < self._wait_until:
            return
        self._wait_until = now + IDLE_SECONDS
        if not busy and self._libc is not None and resident_memory() > self._resident + TRIM_BYTES:
            threading.Thread(target=self._trim, args=[self._libc], daemon=True).start()

    def _trim(self, libc: ctypes.CDLL) -> None:
        gc.collect()
        libc.malloc_trim(0)
        self._resident = resident_memory()


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def reduce_gc() -> None:
    """Run Python's garbage collector rarely, and never on existing objects: imported modules are 300,000 of them.

    Requests leave almost no reference cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)
