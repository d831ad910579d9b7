"""Function caches whose entries may be created before, during or after CUDA graph capture.

A captured graph reads the same memory at every replay, so a cached tensor that was used during capture must not be freed while
the graph exists, even if the cache evicts it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_recordings: list[list[object]] = []


@contextmanager
def record_cached_values() -> Iterator[list[object]]:
    """Collect every value that the caches return inside this context.

    The caller keeps the list as long as it needs the values, for example for the lifetime of a CUDA graph.
    """
    values: list[object] = []
    _recordings.append(values)
    try:
        yield values
    finally:
        _recordings.remove(values)


def record_cached_value(value: T) -> T:
    """Add a value that a cache returns to all active recordings, and return it."""
    for values in _recordings:
        values.append(value)
    return value


def capture_safe_cache(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Cache a function's most recently used values by its arguments, like functools.lru_cache.

    The function runs outside inference mode, so that tensors first requested during inference can be used in training.

    Args:
        maxsize: Maximum number of entries.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        cached = lru_cache(maxsize=maxsize)(torch.inference_mode(False)(function))

        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            return record_cached_value(cached(*args, **kwargs))  # type: ignore[arg-type]  # all are hashable

        return wrapper

    return decorate
