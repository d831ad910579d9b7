"""Resources that this process may use: CPU cores, memory and file descriptors, within the limits of its container."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Limits of the container (cgroup v2)."""


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


def raise_descriptor_limit() -> None:
    """Raise the limit of open files, connections included, to the hard limit; the default soft limit is often 1024."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _read_table(table: Path) -> dict[str, int]:
    """Read a table of the kernel, one name and number a line."""
    return {words[0]: int(words[1]) for line in table.read_text().splitlines() if (words := line.split())[1:2]}
