"""What is made from a table of relative positional biases, kept as long as the table does not change."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

KEPT = 8
"""Things kept per table, one for each map size and dtype it met last."""

T = TypeVar("T")


def made_from(rpb: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """make(), kept per table and key. Made anew where gradients or a compiler must see how, and not kept then.

    make: must depend on nothing but the table and the key.
    """
    if torch.compiler.is_compiling() or (rpb.requires_grad and torch.is_grad_enabled()):
        return make()
    made: _Made | None = _tables.get(rpb)  # type: ignore[no-untyped-call]
    if made is None or not made.current(rpb):
        made = _tables[rpb] = _Made(rpb.detach().clone(), _marks(rpb))
    if key not in made.by_key:
        with torch.inference_mode(False), torch.no_grad():
            made.by_key[key] = make()
        while len(made.by_key) > KEPT:
            made.by_key.popitem(last=False)
    value: T = made.by_key[key]
    return value


@dataclass
class _Made:
    """What was made from one table, and the marks that tell whether the table still holds what it was made from."""

    table: Tensor
    marks: tuple[int, int]
    by_key: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict)

    def current(self, rpb: Tensor) -> bool:
        """On the CPU the values are compared, which also sees changes through `.data`; elsewhere that would cost a wait."""
        return self.marks == _marks(rpb) and (rpb.device.type != "cpu" or torch.equal(self.table, rpb))


def _marks(rpb: Tensor) -> tuple[int, int]:
    return rpb.data_ptr(), 0 if rpb.is_inference() else rpb._version


_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()
