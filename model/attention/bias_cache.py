"""What is made from a table of relative positional biases, kept as long as the table does not change."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dinat.model.capture_safe_cache import gave

KEPT = 8
"""Things kept per table, one for each map size and dtype it met last; and as many where there is no table."""

T = TypeVar("T")


def made_from(rpb: Tensor | None, key: Hashable, make: Callable[[], T]) -> T:
    """make(), kept per table and key. Made anew where gradients or a compiler must see how, and not kept then.

    make: must depend on nothing but the table, which may be None, and the key.
    """
    if torch.compiler.is_compiling() or (rpb is not None and rpb.requires_grad and torch.is_grad_enabled()):
        return make()
    kept = _without_table if rpb is None else _kept(rpb)
    found: T | None = kept.get(key)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            kept[key] = found = make()
        while len(kept) > KEPT:
            kept.popitem(last=False)
    return gave(found)


def forget() -> None:
    """Let go of all that is kept, such as what was made only to be timed."""
    _tables.clear()
    _without_table.clear()


@dataclass
class _Made:
    """What was made from one table, and the marks that tell whether the table still holds what it was made from."""

    table: Tensor
    marks: tuple[int, int]
    by_key: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict)

    def current(self, rpb: Tensor) -> bool:
        """On the CPU the values are compared, which also sees changes through `.data`; elsewhere that would cost a wait."""
        return self.marks == _marks(rpb) and (rpb.device.type != "cpu" or torch.equal(self.table, rpb))


def _kept(rpb: Tensor) -> OrderedDict[Hashable, Any]:
    """What was made from this table as it is now."""
    made: _Made | None = _tables.get(rpb)  # type: ignore[no-untyped-call]
    if made is None or not made.current(rpb):
        made = _tables[rpb] = _Made(rpb.detach().clone(), _marks(rpb))
    return made.by_key


def _marks(rpb: Tensor) -> tuple[int, int]:
    return rpb.data_ptr(), 0 if rpb.is_inference() else rpb._version


_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()
_without_table: OrderedDict[Hashable, Any] = OrderedDict()
