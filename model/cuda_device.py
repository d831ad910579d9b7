"""The current CUDA device."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Make the GPU of x the current device, on which Triton launches. Without effect for a CPU tensor."""
    return torch.cuda.device_of(x)  # type: ignore[no-untyped-call]
