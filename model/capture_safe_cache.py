"""Function caches whose entries may be created before, during or after CUDA graph capture.

A captured graph reads the same memory at every replay, so a cached tensor that was used during capture must not be freed while
the graph exists, even if the cache evicts it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

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


def constant(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function outside inference mode and dispatch modes.

    Tensors that are first requested during inference can then be used in training, and those first requested while fake tensors
    are propagated, as torch.export does, have values.
    """
    outside = torch.inference_mode(False)(function)

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch._C._len_torch_dispatch_stack():
            with _disable_current_modes():
                return outside(*args, **kwargs)
        return outside(*args, **kwargs)

    return wrapper


def capture_safe_cache(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Cache a function's most recently used values by its arguments, like functools.lru_cache.

    The function runs as `constant` describes.

    Args:
        maxsize: Maximum number of entries.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        cached = lru_cache(maxsize=maxsize)(constant(function))

        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            return record_cached_value(cached(*args, **kwargs))  # type: ignore[arg-type]  # all are hashable

        return wrapper

    return decorate
