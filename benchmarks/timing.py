"""Times that can be compared: all candidates take turns within one run, and the machine's own ceiling is among them."""

import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dinat.app.doctor import cpu_name

MATRIX = 2048


def take_turns(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate, after one warm-up, over rounds in which each runs once."""
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in times.items()}


def matrix_product(dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """A 2048 x 2048 matrix product: its FLOP/s are the ceiling of what the machine gives a network."""
    a, b = torch.randn(2, MATRIX, MATRIX).to(dtype)
    return lambda: a @ b


def ceiling(seconds: float) -> float:
    """FLOP/s of matrix_product."""
    return 2 * MATRIX**3 / seconds


def machine() -> dict[str, Any]:
    """What a result was measured on."""
    return {
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def report(title: str, rows: list[dict[str, Any]], path: Path | None) -> None:
    """Print rows as a table, and as JSON into a file if one is named."""
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
