"""Durations of calls on a device."""

import time
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

import torch

ROUNDS, REPEATS = 7, 4
"""Timing rounds, and calls per round in a CUDA graph."""


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median duration of a call in seconds."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times = []
    for _ in range(2 + ROUNDS):
        started = now()
        run()
        times.append(now() - started)
    return median(times[2:])


def seconds_on_gpu(run: Callable[[], object], device: torch.device) -> float:
    """Return the median duration in seconds of a call inside a CUDA graph, after one call outside it."""
    current = torch.cuda.current_stream(device)
    stream = _timing_stream(current.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(REPEATS):
                run()
        times = []
        for _ in range(1 + ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / REPEATS)
    current.wait_stream(stream)
    return float(median(times[1:]))


@cache
def _timing_stream(device: torch.device) -> Any:
    """Return one stream for all timings: cuBLAS holds a workspace for each stream that it has used, 32 MiB on Hopper."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
