"""Instruction set extensions of the CPU."""

from functools import cache
from pathlib import Path


@cache
def cpu_flags() -> frozenset[str]:
    """Return the CPU flags as Linux names them in /proc/cpuinfo (avx2, amx_tile, ...); empty if it cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    values = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(values, "").split())


def has_bf16() -> bool:
    """Return whether the CPU has instructions for bfloat16 products."""
    return not cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
