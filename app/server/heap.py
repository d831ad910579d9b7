"""Memory settings of the C library and of Python's garbage collector."""

import ctypes
import gc
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""From glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of a batch for the next one. Does nothing with other C libraries.

    By default glibc returns large blocks to the system at once, and the kernel then maps and zeroes every activation of every
    layer anew. With this setting the process holds as much memory as its largest batch needed.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


def reduce_gc() -> None:
    """Run Python's garbage collector rarely, and never on existing objects: imported modules are 300,000 of them.

    Requests leave almost no reference cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)
