"""What the operating system gives this process: CPU cores, memory and file descriptors within its limits, and signals."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Where control groups are mounted: version 2 itself, or the controllers of version 1 as folders."""

MEMBERSHIPS = Path("/proc/self/cgroup")
"""The control groups of this process, by controller."""

GRACE_SECONDS = 10
"""How long a process may take to stop, beyond the time that the settings give it."""


def cores() -> int:
    """Number of CPU cores that this process may use: its affinity, limited by CPU quotas, rounded down; at least 1.

    Rounded down, because a quota stops all threads for the rest of each period once they have used it up.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return available if quota is None else max(1, min(available, int(quota)))


def cpu_quota() -> float | None:
    """CPUs that the control groups of this process may use, also fractions of one; None if that is not limited."""
    quotas = []
    for folder in _control_groups("cpu"):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError):
            continue
    return min(quotas, default=None)


def free_memory() -> int:
    """Bytes of memory that can be allocated, on the host and in the control groups of this process."""
    free = [_read_table(Path("/proc/meminfo"))["MemAvailable:"] * 1024]
    for folder in _control_groups("memory"):
        try:
            if (folder / "memory.max").exists():
                limit, used = (folder / "memory.max").read_text().strip(), (folder / "memory.current").read_text()
                inactive = _read_table(folder / "memory.stat")["inactive_file"]
            else:
                limit, used = ((folder / f"memory.{name}_in_bytes").read_text() for name in ("limit", "usage"))
                inactive = _read_table(folder / "memory.stat")["total_inactive_file"]
            if limit != "max":
                free.append(max(0, int(limit) - int(used) + inactive))
        except (OSError, ValueError, KeyError):
            continue
    return min(free)


def _control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group for a controller and of the groups that contain it.

    In a container the path may be that on the host, of which only the container's own group is mounted, as the root.
    """
    try:
        memberships = [line.split(":", 2) for line in MEMBERSHIPS.read_text().splitlines()]
    except OSError:
        memberships = [["0", "", "/"]]
    for _, controllers, path in memberships:
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUP / controllers if controllers else CGROUP
        group = root / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root) and folder.is_dir())


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
