"""What the processor can do."""

from functools import cache
from pathlib import Path


@cache
def marks() -> frozenset[str]:
    """Its marks, as Linux names them in /proc/cpuinfo: avx2, amx_tile, ...; none where that cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(named, "").split())


def has_bf16() -> bool:
    """Whether it has instructions for products of bfloat16."""
    return not marks().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
