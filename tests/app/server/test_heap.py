import multiprocessing
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest

from dinat.app.host import resident_memory
from dinat.app.server.heap import IdleTrim, keep_freed_memory

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is a function of glibc"),
]


def grow_and_shrink(busy: bool) -> tuple[int, int, int]:
    """Resident memory with 400 MB in use, after they are freed, and after idle time, in a process of its own."""
    keep_freed_memory()
    trim = IdleTrim()
    blocks = [b"x" * 10**6 for _ in range(400)]
    last = bytes(1000)
    used = resident_memory()
    del blocks
    freed = resident_memory()
    trim._wait_until = 0
    trim.tick(busy)
    if not busy:
        for thread in threading.enumerate()[1:]:
            if thread.name.endswith("(_trim)"):
                thread.join(30)
    assert last
    return used, freed, resident_memory()


def in_process(call: Callable[[bool], tuple[int, int, int]], busy: bool) -> tuple[int, int, int]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(call, busy).result(60)


def test_idle_process_returns_freed_memory() -> None:
    used, freed, trimmed = in_process(grow_and_shrink, False)
    assert freed > used - 50 * 2**20
    assert trimmed < used - 350 * 2**20


def test_busy_process_keeps_freed_memory() -> None:
    used, _, later = in_process(grow_and_shrink, True)
    assert later > used - 50 * 2**20
