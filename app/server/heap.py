"""Memory, by the C library and by Python, set for a process that serves."""

import ctypes
import gc
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""From glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Let glibc keep what a batch frees for the next one. Nothing where the C library is another.

    By default it gives large blocks back to the system at once, and every activation of every layer is paged in anew, zeroed
    by the kernel. What the process keeps is what its largest batch needed.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


def reduce_gc() -> None:
    """Let Python look for garbage seldom, and never among what is there already: imported modules are 300,000 objects.

    Requests leave next to nothing that only the collector frees.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)
