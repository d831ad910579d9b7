"""Tensors derived from a relative positional bias (RPB) table, cached until the table changes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dinat.model.capture_safe_cache import record_cached_value
from dinat.model.fast_path import is_transformed

MAX_ENTRIES = 8
"""Cached values per table, for the most recent feature map sizes and dtypes; also the limit of those without a table."""

T = TypeVar("T")


def cached_for_table(rpb: Tensor | None, key: Hashable, make: Callable[[], T]) -> T:
    """Return make(), cached by table and key.

    Nothing is cached while autograd needs the table's gradient or torch.compile traces.

    Args:
        rpb: The table (heads, 2 * kernel_size - 1, 2 * kernel_size - 1), or None.
        key: Identifies the value among those derived from this table.
        make: Computes the value. It may depend on the table and the key only.
    """
    if is_transformed() or (rpb is not None and rpb.requires_grad and torch.is_grad_enabled()):
        return make()
    values = _without_table if rpb is None else _values_of(rpb)
    value: T | None = values.get(key)
    if value is None:
        with torch.inference_mode(False), torch.no_grad():
            values[key] = value = make()
        while len(values) > MAX_ENTRIES:
            values.popitem(last=False)
    return record_cached_value(value)


def clear() -> None:
    """Remove all cached values, for example those that were computed only for autotuning."""
    _entries.clear()
    _without_table.clear()


@dataclass
class _Entry:
    """The values derived from one table, and a copy and version of the table to detect changes."""

    table: Tensor
    version: tuple[Any, ...]
    values: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict)

    def is_current(self, rpb: Tensor) -> bool:
        """Compare versions, and on the CPU also values: `.data` changes no version. On a GPU that would synchronize."""
        return self.version == _version(rpb) and (rpb.device.type != "cpu" or torch.equal(self.table, rpb))


def _values_of(rpb: Tensor) -> OrderedDict[Hashable, Any]:
    """Return the values derived from the table's current contents."""
    key = StorageWeakRef(rpb.untyped_storage()), rpb.storage_offset()  # type: ignore[no-untyped-call]
    entry = _entries.get(key)
    if entry is None or not entry.is_current(rpb):
        for other in [other for other in list(_entries) if other[0].expired()]:  # type: ignore[no-untyped-call]
            _entries.pop(other, None)
        entry = _entries[key] = _Entry(rpb.detach().clone(), _version(rpb))
    return entry.values


def _version(rpb: Tensor) -> tuple[Any, ...]:
    return rpb.data_ptr(), rpb.shape, rpb.stride(), rpb.dtype, 0 if rpb.is_inference() else rpb._version


_entries: dict[tuple[StorageWeakRef, int | torch.SymInt], _Entry] = {}
"""By the memory of the table. torch.utils.swap_tensors rejects tensors with weak references, and a reference keeps the address
of freed memory from being used again."""
_without_table: OrderedDict[Hashable, Any] = OrderedDict()
