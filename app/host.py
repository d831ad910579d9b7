"""What the operating system gives this process: CPU cores, memory and file descriptors within its limits, and signals."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Limits of the container (cgroup v2)."""

GRACE_SECONDS = 10
"""How long a process may take to stop, beyond the time that the settings give it."""


def cores() -> int:
    """Number of CPU cores that this process may use: its affinity, limited by the container's CPU quota; at least 1."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return available
    return available if quota == "max" else max(1, min(available, int(quota) // int(period)))


def free_memory() -> int:
    """Bytes of memory that can be allocated, on the host and in the container."""
    available = _read_table(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text()) - _read_table(CGROUP / "memory.stat")["inactive_file"]
    except (OSError, ValueError, KeyError):
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))


def resident_memory() -> int:
    """Bytes of memory of this process that are in RAM. Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def raise_descriptor_limit() -> int | None:
    """Raise the limit of open files, connections included, to the hard limit; the default soft limit is often 1024.

    Returns:
        The limit; None if there is none.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return None if hard == resource.RLIM_INFINITY else hard


def stop_signals() -> list[signal.Signals]:
    """Signals that stop the service: SIGTERM, SIGINT, and SIGHUP unless the process was started to ignore it (nohup)."""
    stop = [signal.SIGTERM, signal.SIGINT]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        stop.append(hangup)
    return stop


def exit_after(seconds: float, status: int, on_exit: Callable[[], object]) -> None:
    """End this process after a time, also if its other threads are blocked.

    Args:
        seconds: The time, unless the process ends by itself before.
        status: Exit status.
        on_exit: Called first.
    """

    def end() -> None:
        try:
            on_exit()
        finally:
            os._exit(status)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _read_table(table: Path) -> dict[str, int]:
    """Read a table of the kernel, one name and number a line."""
    return {words[0]: int(words[1]) for line in table.read_text().splitlines() if (words := line.split())[1:2]}
