"""Launches on the fake GPU, and the bytes that they read and write: each operand and output once, as if caches were ideal."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Counts:
    """What a program launched, also while a graph was captured; replays are not counted.

    Attributes:
        launches: Kernels and copies.
        bytes: Bytes that they read and wrote.
        bytes_to_host: Bytes copied from the GPU to the host.
    """

    launches: int = 0
    bytes: int = 0
    bytes_to_host: int = 0


_active: list[Counts] = []


@contextmanager
def counted() -> Iterator[Counts]:
    """Count within this context, in all threads."""
    counts = Counts()
    _active.append(counts)
    try:
        yield counts
    finally:
        _active.remove(counts)


def count_launch(tensors: Iterable[torch.Tensor]) -> None:
    """Count a launch that reads or writes these tensors."""
    if _active:
        size = sum(_bytes(x) for x in tensors)
        for counts in _active:
            counts.launches += 1
            counts.bytes += size


def count_download(x: torch.Tensor) -> None:
    """Count a copy of a tensor from the GPU to the host."""
    for counts in _active:
        counts.bytes_to_host += _bytes(x)


def _bytes(x: torch.Tensor) -> int:
    """Return the bytes of a tensor's distinct elements: an expanded dimension, of stride 0, has one."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * x.element_size()
