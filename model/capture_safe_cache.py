"""Function caches whose entries may be created before, during or after CUDA graph capture.

A captured graph reads the same memory at every replay, so a cached tensor that was used during capture must not be freed while
the graph exists, even if the cache evicts it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from dinat.model.fast_path import is_transformed

P = ParamSpec("P")
T = TypeVar("T")

_set_tracing_state: Any = torch._C._set_tracing_state  # type: ignore[attr-defined]
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
    """Run a function outside inference mode, dispatch modes, torch.func and tracing.

    Tensors that are first requested during inference can then be used in training, those first requested while fake tensors are
    propagated, as torch.export does, have values, those first requested by torch.func are plain tensors afterwards, and those
    first requested by a tracer are constants of its graph.
    """
    outside = torch.inference_mode(False)(function)

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if not is_transformed() or torch.compiler.is_dynamo_compiling():
            return outside(*args, **kwargs)
        with _not_traced(), temporarily_clear_interpreter_stack(), _disable_current_modes():
            return outside(*args, **kwargs)

    return wrapper


@contextmanager
def _not_traced() -> Iterator[None]:
    state = torch._C._get_tracing_state()
    _set_tracing_state(None)
    try:
        yield
    finally:
        _set_tracing_state(state)


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
