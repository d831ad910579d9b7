"""Caches of what is made once per shape, and a way to keep what they gave for as long as something depends on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_holders: list[list[object]] = []


@contextmanager
def holding() -> Iterator[list[object]]:
    """Lists what the caches give out within it: a CUDA graph reads it at every replay, also when the cache has dropped it."""
    given: list[object] = []
    _holders.append(given)
    try:
        yield given
    finally:
        _holders.remove(given)


def gave(value: T) -> T:
    """A cache's value, on its way to who asked for it."""
    for given in _holders:
        given.append(value)
    return value


def kept(most: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Keep a function's last values, by its arguments; made outside inference mode, so that training can use them later."""

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        cached = lru_cache(maxsize=most)(torch.inference_mode(False)(make))

        @wraps(make)
        def give(*args: P.args, **kwargs: P.kwargs) -> T:
            return gave(cached(*args, **kwargs))  # type: ignore[arg-type]  # all are hashable

        return give

    return decorate
