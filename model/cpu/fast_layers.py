"""Linear layers, convolutions and layer norms by faster CPU kernels than PyTorch's modules, for inference.

The kernels are oneDNN's, with fused operations after the product and prepacked weights, and those of model/native.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinat.model.cpu.features import has_bf16
from dinat.model.fast_path import check_packed_input, is_observed, is_plain
from dinat.model.native import library
from dinat.model.native.dtypes import DTYPES

_ONEDNN: Any = torch.ops.mkldnn if torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise") else None
"""oneDNN's fused kernels, also used by torch.compile; not differentiable."""


def fused_linear(x: Tensor, linear: nn.Module, gelu: bool = False, add: Tensor | None = None) -> Tensor:
    """Compute linear(x), optionally followed by the exact GELU or by a sum.

    Without gradients, on a CPU, in float32 or (if the CPU supports it) bfloat16, this is one kernel that writes only the
    result. A modified layer (with an adapter, hooks or offloaded weights) is called as a module.

    Args:
        x: (..., in_features).
        linear: An nn.Linear, a PackedLinear, or a module that replaces one.
        gelu: Whether to apply GELU; exclusive with `add`.
        add: Tensor to add (..., out_features), or None.

    Returns:
        Tensor (..., out_features).
    """
    if isinstance(linear, PackedLinear):
        check_packed_input(x, linear.weight.dtype)
        return _fused_linear(x, linear.weight, linear.bias, gelu, add)
    if is_unmodified(linear, nn.Linear) and not is_observed():
        weight, bias = parameters_of(linear)
        if weight is not None and _has_kernel(x, weight, bias, add):
            return _fused_linear(x, weight, bias, gelu, add)
    y: Tensor = linear(x)
    return F.gelu(y) if gelu else y if add is None else add + y


def _fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, add: Tensor | None) -> Tensor:
    if add is not None:
        y: Tensor = _ONEDNN._linear_pointwise.binary(x, add, weight, bias, "add")
    else:
        y = _ONEDNN._linear_pointwise(x, weight, bias, *(("gelu", [], "none") if gelu else ("none", [], "")))
    return y


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with a CPU kernel optimized for a few hundred channels."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., channels) over its channels."""
        weight, bias = parameters_of(self)
        if weight is None or bias is None or x.dtype not in DTYPES or is_observed() or not self._has_kernel(x, weight, bias):
            return super().forward(x)
        kernels, channels = library(), x.shape[-1]
        if kernels is None or channels % kernels.lanes:
            return super().forward(x)
        out = torch.empty_like(x)
        kernels.layer_norm(
            DTYPES[x.dtype],
            *(x.data_ptr(), out.data_ptr(), x.numel() // channels, channels),
            *(weight.data_ptr(), bias.data_ptr()),
            *(self.eps, torch.get_num_threads()),
        )
        return out

    def _has_kernel(self, x: Tensor, weight: Tensor, bias: Tensor) -> bool:
        """Return whether the norm is over the last dimension, and all memory is contiguous."""
        return (
            (is_plain(x, weight, bias) and not x.is_neg())
            and (x.is_contiguous() and weight.is_contiguous() and bias.is_contiguous())
            and self.normalized_shape == x.shape[-1:] == weight.shape == bias.shape
        )


class PackedLinear(nn.Module):
    """A linear layer with its weight in oneDNN's memory layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        with torch.inference_mode():
            self.weight = _ONEDNN._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the linear layer: (..., in_features) -> (..., out_features)."""
        return fused_linear(x, self)


BATCH, SIDE = 8, 56
"""Input size for which convolution weights are packed. Without one, oneDNN selects a layout that is up to 25 times slower."""


class PackedConvolution(nn.Module):
    """A convolution with its weight in oneDNN's memory layout, for inputs with channels last in memory."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.geometry = [list(map(int, values)) for values in (convolution.padding, convolution.stride, convolution.dilation)]
        with torch.inference_mode():
            weight = convolution.weight.detach().contiguous(memory_format=torch.channels_last)
            size = [BATCH, convolution.in_channels, SIDE, SIDE]
            self.weight = _ONEDNN._reorder_convolution_weight(weight, *self.geometry, convolution.groups, size)
        self.bias = None if convolution.bias is None else convolution.bias.detach()
        self.groups = convolution.groups

    def forward(self, x: Tensor) -> Tensor:
        """Compute the convolution of x (B, C, H, W)."""
        check_packed_input(x, self.weight.dtype)
        y: Tensor = _ONEDNN._convolution_pointwise(x, self.weight, self.bias, *self.geometry, self.groups, "none", [], "")
        return y


PACKED_CLASSES: dict[type[nn.Module], Any] = {nn.Linear: PackedLinear, nn.Conv2d: PackedConvolution}


def pack_module(module: nn.Module) -> nn.Module | None:
    """Return a linear layer or convolution with its weight packed for oneDNN; None if it has no fast kernel here."""
    if not is_unmodified(module, *PACKED_CLASSES) or (isinstance(module, nn.Conv2d) and not _has_numeric_padding(module)):
        return None
    weight, bias = parameters_of(module)
    if weight is None or not weight.numel() or not is_plain(weight, bias) or not _is_fast(weight.device, weight.dtype):
        return None
    packed: nn.Module = PACKED_CLASSES[type(module)](module)
    return packed


def _has_numeric_padding(convolution: nn.Conv2d) -> bool:
    """Return whether the padding is zeros, given as numbers."""
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


@cache
def _is_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether oneDNN has fast kernels for this device and dtype."""
    if _ONEDNN is None or device.type != "cpu":
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bf16() and bool(_ONEDNN._is_mkldnn_bf16_supported()))


def _has_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> bool:
    """Return whether oneDNN computes a linear layer of these tensors."""
    return is_plain(x, weight, bias, add) and _is_fast(x.device, x.dtype) and x.numel() > 0 and weight.numel() > 0


def parameters_of(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return the weight and bias of a module; None for both if one of them is not a parameter (any more).

    The weight as an attribute of the module would take as long as all other conditions of a fast path.
    """
    try:
        return module._parameters["weight"], module._parameters["bias"]
    except KeyError:
        return None, None


def is_unmodified(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Return whether a module is of exactly one of these classes, without hooks, a replaced forward or replaced parameters."""
    replaced = vars(module)
    return type(module) in classes and not (
        (module._forward_hooks or module._forward_pre_hooks)
        or ("forward" in replaced or "weight" in replaced or "bias" in replaced)
    )
