"""Comparable timings: candidates are interleaved within one run, and the CPU's ceiling is measured among them."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dinat.app.doctor import cpu_name

MATRIX = 2048


def median_seconds(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Time candidates: after one warm-up call of each, every round calls each candidate once.

    Args:
        candidates: calls by name.
        rounds: number of rounds.

    Returns:
        Median seconds of each candidate.
    """
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def matrix_product(dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """Return a 2048 x 2048 matrix product, whose FLOP/s are the ceiling that networks are compared with."""
    a, b = torch.randn(2, MATRIX, MATRIX).to(dtype)
    return lambda: a @ b


def matrix_product_flops(seconds: float) -> float:
    """Return the FLOP/s of a matrix_product that took so many seconds."""
    return 2 * MATRIX**3 / seconds


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Run programs that compete for the CPU."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def machine() -> dict[str, Any]:
    """Describe this machine and its software."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def report(title: str, rows: list[dict[str, Any]], path: Path | None) -> None:
    """Print rows as a table, and write them to a JSON file if `path` is set."""
    widths = {key: max(len(key), *(len(_text(row[key])) for row in rows)) for key in rows[0]}
    print(f"{title} ({', '.join(f'{k} {v}' for k, v in machine().items())})")
    print("  ".join(key.rjust(width) for key, width in widths.items()))
    for row in rows:
        print("  ".join(_text(row[key]).rjust(width) for key, width in widths.items()), flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"title": title, "machine": machine(), "rows": rows}, indent=2) + "\n")


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
