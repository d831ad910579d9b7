"""Whether other programs, a CPU quota or the hypervisor took CPU time from this process."""

from dataclasses import dataclass
from pathlib import Path

from dinat.model.cpu.spinning import CONTENDED, thread_times

STOLEN = 0.05
"""Share of the CPU's time, above which it is worth mentioning that the hypervisor gave it to other virtual machines."""

MIN_COMPUTED = 0.1
"""Seconds of computing below which waiting says little."""

STAT = Path("/proc/stat")


@dataclass(frozen=True)
class CpuTimes:
    """Times since the start of this process or the machine, in seconds or clock ticks.

    Attributes:
        computed: Seconds that threads of this process computed.
        waited: Seconds that they waited for a CPU.
        total: Ticks of all CPUs.
        stolen: Ticks in which the hypervisor ran other virtual machines.
    """

    computed: float
    waited: float
    total: int
    stolen: int


def cpu_times() -> CpuTimes | None:
    """Read the times; None on other systems than Linux."""
    try:
        ticks = [int(word) for word in STAT.read_text().splitlines()[0].split()[1:9]]
        return CpuTimes(*thread_times(), total=sum(ticks), stolen=ticks[7])
    except (OSError, IndexError, ValueError):
        return None


def describe_contention(before: CpuTimes | None) -> str | None:
    """Return in one sentence what took CPU time from this process since `before`, and what to do; None if nothing is known."""
    now = cpu_times()
    if before is None or now is None:
        return None
    causes = []
    computed = now.computed - before.computed
    waited = (now.waited - before.waited) / computed if computed >= MIN_COMPUTED else 0
    stolen = (now.stolen - before.stolen) / max(now.total - before.total, 1)
    if waited > CONTENDED:
        causes.append(f"threads waited {waited / (1 + waited):.0%} of their time for other programs or a CPU quota")
    if stolen > STOLEN:
        causes.append(f"the hypervisor gave {stolen:.0%} of the CPU to other virtual machines")
    advice = "give this process CPUs of its own, or set DINAT_THREADS to the number of free ones"
    return f"the CPU is shared: {', and '.join(causes)}; {advice}" if causes else None
