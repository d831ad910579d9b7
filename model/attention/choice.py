"""Which backend "auto" takes: on a GPU the fastest of those that are there, timed once for each shape of layer."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from statistics import median

import torch
from torch import Tensor

ROUNDS = 7
"""Times a backend runs when it is timed, after two that are not counted."""


@dataclass(frozen=True)
class Layer:
    """What a backend's speed depends on besides the batch. device: of torch, as text."""

    device: str
    dtype: torch.dtype
    height: int
    width: int
    heads: int
    head_dim: int
    kernel_size: int
    dilation: int

    @classmethod
    def of(cls, q: Tensor, kernel_size: int, dilation: int) -> "Layer":
        """The layer that asks with queries (B, H, W, heads, head_dim)."""
        return cls(str(q.device), q.dtype, q.shape[1], q.shape[2], q.shape[3], q.shape[4], kernel_size, dilation)


@dataclass(frozen=True)
class Choice:
    """The backend kept for a layer. seconds: of each, infinite for one that could not run."""

    backend: str
    seconds: dict[str, float]


chosen: dict[Layer, Choice] = {}
"""What was chosen so far, in this process."""


def candidates(device: torch.device) -> list[str]:
    """The exact backends that are installed for a device, the one that is taken untimed first."""
    return [*_libraries(), "tiled"] if device.type == "cuda" else ["tiled"]


@cache
def _libraries() -> list[str]:
    return [name for name in ("triton", "natten") if find_spec(name) is not None]


@contextmanager
def timing() -> Iterator[None]:
    """Within it, a layer met for the first time is timed with every candidate."""
    global _timing
    _timing = True
    try:
        yield
    finally:
        _timing = False


_timing = False


def choose(layer: Layer, names: Sequence[str], run: Callable[[str], object]) -> str:
    """The backend for a layer: the one kept, or, while timing, the fastest, or else the first of `names`.

    run: computes the layer with a backend by name; one that raises is left out.
    """
    if layer not in chosen and _timing:
        seconds = {name: _seconds(partial(run, name), torch.device(layer.device)) for name in names}
        chosen[layer] = Choice(min(names, key=lambda name: seconds[name]), seconds)
    return chosen[layer].backend if layer in chosen else names[0]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a run, infinite where it raises."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    try:
        for _ in range(2 + ROUNDS):
            wait()
            started = time.perf_counter()
            run()
            wait()
            times.append(time.perf_counter() - started)
    except Exception:
        return float("inf")
    return median(times[2:])
