"""What this process may use of its machine: within a container, less than is there."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Where a container sees its own limits, by cgroup version 2."""


def cores() -> int:
    """Processors that this process may use: those it may run on, and no more than its container's share."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return there
    return there if quota == "max" else max(1, min(there, int(quota) // int(period)))


def free_memory() -> int:
    """Bytes of memory that may still be taken, on the machine and in the container."""
    there = _numbers(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text()) - _numbers(CGROUP / "memory.stat")["inactive_file"]
    except (OSError, ValueError, KeyError):
        return there
    return there if limit == "max" else max(0, min(there, int(limit) - used))


def allow_descriptors() -> None:
    """Let this process, and its children, have as many files and connections as the system allows; mostly it starts at 1024."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _numbers(table: Path) -> dict[str, int]:
    """A table of the kernel's, a name and a number in each line."""
    return {words[0]: int(words[1]) for line in table.read_text().splitlines() if (words := line.split())[1:2]}
