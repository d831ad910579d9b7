"""The fake GPUs: how many there are, their properties, and the current device of each thread."""

import threading
from types import SimpleNamespace
from typing import Any

import torch

PROPERTIES = SimpleNamespace(
    name="Fake GPU", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=132, L2_cache_size=50 * 2**20
)
"""As torch.cuda.get_device_properties returns them."""


class CudaError(RuntimeError):
    """The RuntimeError that PyTorch raises for a CUDA error."""


_thread = threading.local()
_count = 1


def count() -> int:
    return _count


def set_count(value: int) -> None:
    global _count
    _count = value


def current() -> int:
    """Return the index of the calling thread's current device."""
    return getattr(_thread, "index", 0)


def set_current(device: Any) -> None:
    _thread.index = with_index(device).index


def exchange_current(index: int) -> int:
    """Set the calling thread's current device, and return the one before; -1 changes nothing, as in PyTorch."""
    before = current() if index >= 0 else -1
    if index >= 0:
        set_current(index)
    return before


def with_index(device: Any) -> torch.device:
    """Convert a device, its name or its index to a torch.device; "cuda" and None become the current device."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device("cuda" if device is None else device)
    return torch.device("cuda", current()) if device.type == "cuda" and device.index is None else device
