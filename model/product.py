"""A linear layer and what follows it, as one kernel where PyTorch has one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch._C._has_mkldnn else None
"""oneDNN's product with an epilogue, which torch.compile uses too. It has no gradient."""


def product(x: Tensor, linear: nn.Linear, gelu: bool = False, add: Tensor | None = None) -> Tensor:
    """linear(x), then the exact GELU if asked for, or a sum with `add`.

    x: (..., in_features);  add and what is returned: (..., out_features).
    For float32 on a CPU without gradients all of it is one kernel: the product is not written, read and written again. What was
    put around the layer (an adapter, a hook, weights that lie elsewhere) is called.
    """
    if _ONEDNN is None or x.device.type != "cpu" or x.dtype != torch.float32 or _is_watched() or not _is_plain(linear):
        y = linear(x)
        return F.gelu(y) if gelu else y if add is None else add + y
    if add is not None:
        fused: Tensor = _ONEDNN.binary(x, add, linear.weight, linear.bias, "add")
    else:
        fused = _ONEDNN(x, linear.weight, linear.bias, *(("gelu", [], "none") if gelu else ("none", [], "")))
    return fused


def _is_watched() -> bool:
    """Whether autograd, autocast or a compiler must see each step."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()


def _is_plain(linear: nn.Linear) -> bool:
    """Whether calling it is nothing but its product."""
    return type(linear) is nn.Linear and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear))
