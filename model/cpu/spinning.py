"""Threads that wait for each other: they spin while CPUs are free, and sleep while other programs need them.

PyTorch's operations and the compiled kernels run on OpenMP threads of GCC's libgomp, which wait at the end of each operation.
By default they spin for milliseconds, which is the fastest on a CPU of their own. On a shared CPU or in a CPU quota, threads
that spin take the time from threads that compute, and a forward pass becomes up to 30 times slower. libgomp spins for
microseconds only while a process has more OpenMP threads than CPUs (its manual, GOMP_SPINCOUNT): an idle team of threads brings
that about at any time.
"""

import ctypes
import os
import threading
import time
from functools import cache
from pathlib import Path

CHECK_SECONDS = 0.05
"""How often the time that threads waited for a CPU is read, which takes 0.1 ms."""

CONTENDED, FREE = 0.1, 0.02
"""Seconds of waiting for a CPU per second of computing, above which threads sleep, and below which they spin again.

Alone it is below 0.01; beside one busy program on two CPUs 0.5.
"""

MIN_COMPUTED, MIN_COMPUTED_ASLEEP = 0.01, 1.0
"""Seconds of computing, of all threads together, that a decision requires: to sleep, and to spin again."""

THREADS = Path("/proc/self/task")


class Spinning:
    """Decides whether idle OpenMP threads of this process spin.

    Attributes:
        is_short: Whether they only spin for microseconds.
    """

    def __init__(self, gomp: ctypes.CDLL) -> None:
        self._gomp = gomp
        self._lock = threading.Lock()
        self._next_check = 0.0
        self._computed, self._waited = thread_times()
        self._team_can_end = threading.Event()
        self.is_short = False

    def check(self) -> None:
        """Adapt to how long threads have waited for a CPU since the last decision. Cheap, and safe from any thread."""
        now = time.monotonic()
        if now < self._next_check or not self._lock.acquire(blocking=False):
            return
        try:
            self._next_check = now + CHECK_SECONDS
            self._decide(*thread_times())
        finally:
            self._lock.release()

    def _decide(self, computed: float, waited: float) -> None:
        more = computed - self._computed
        if 0 <= more < (MIN_COMPUTED_ASLEEP if self.is_short else MIN_COMPUTED):
            return
        share = (waited - self._waited) / more if more > 0 else FREE  # negative after a thread has ended
        self._computed, self._waited = computed, waited
        if self.is_short and share < FREE:
            self._team_can_end.set()
            self.is_short = False
        elif not self.is_short and share > CONTENDED:
            self.is_short = self._start_idle_team()

    def _start_idle_team(self) -> bool:
        """Create one OpenMP thread more than there are CPUs. Return whether there is room for them."""
        count = self._gomp.omp_get_num_procs() + 1
        if not _can_start_threads(count):
            return False
        self._team_can_end = threading.Event()
        started = threading.Event()
        threading.Thread(target=self._run_idle_team, args=(count, started, self._team_can_end), daemon=True).start()
        started.wait()
        return True

    def _run_idle_team(self, count: int, started: threading.Event, can_end: threading.Event) -> None:
        do_nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # given a null pointer
        self._gomp.GOMP_parallel(do_nothing, None, ctypes.c_uint(count), ctypes.c_uint(0))
        started.set()
        can_end.wait()  # libgomp ends the team when the thread that created it ends


def _can_start_threads(count: int) -> bool:
    """Return whether the limits of the container and the user allow so many more threads: libgomp exits if they do not."""
    can_end = threading.Event()
    threads = [threading.Thread(target=can_end.wait, daemon=True) for _ in range(count)]
    started = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
    except RuntimeError:
        return False
    finally:
        can_end.set()
        for thread in started:
            thread.join()
    return True


def check_spinning() -> None:
    """Let idle OpenMP threads of this process spin or sleep, as the CPU is free or not. Called in every layer."""
    spinning = _spinning(os.getpid())
    if spinning is not None:
        spinning.check()


@cache
def _spinning(_process: int) -> Spinning | None:
    """Return the state of this process; None where the user has decided, or where it cannot be measured or changed."""
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return None
    try:
        thread_times()
        mapped = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
        return Spinning(ctypes.CDLL(min(mapped, key=lambda path: "/torch" not in path)))  # scikit-learn has one of its own
    except (OSError, ValueError):
        return None


def thread_times() -> tuple[float, float]:
    """Return the seconds that this process's threads computed, and that they waited for a CPU. Raises OSError elsewhere."""
    computed = waited = 0
    for thread in os.listdir(THREADS):
        try:
            with open(THREADS / thread / "schedstat") as file:
                times = file.read().split()
        except (FileNotFoundError, ProcessLookupError):  # it ended before the file was opened, or read
            continue
        computed, waited = computed + int(times[0]), waited + int(times[1])
    return computed / 1e9, waited / 1e9
