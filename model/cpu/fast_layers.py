"""Linear layers, convolutions and layer norms by faster kernels than PyTorch's own, where there are such; for inference.

oneDNN's, with what follows a product in one kernel and with weights laid out once; and those of model/native.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinat.model.cpu.features import has_bf16
from dinat.model.native import DTYPES, library

_ONEDNN: Any = torch.ops.mkldnn if torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise") else None
"""oneDNN's kernels, which torch.compile uses too. They have no gradient."""


def product(x: Tensor, linear: nn.Module, gelu: bool = False, add: Tensor | None = None) -> Tensor:
    """linear(x), then the exact GELU if asked for, or a sum with `add`.

    x: (..., in_features);  add and what is returned: (..., out_features).
    Without gradients on a CPU, in float32 or, where the processor has it, bfloat16, all of it is one kernel: the product is not
    written, read and written again. What was put around the layer (an adapter, a hook, weights that lie elsewhere) is called.
    """
    if isinstance(linear, PackedLinear):
        return _fused(x, linear.packed, linear.bias, gelu, add)
    if isinstance(linear, nn.Linear) and is_plain(linear, nn.Linear) and _is_fast(x.device, x.dtype) and not _is_watched():
        return _fused(x, linear.weight, linear.bias, gelu, add)
    y: Tensor = linear(x)
    return F.gelu(y) if gelu else y if add is None else add + y


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, add: Tensor | None) -> Tensor:
    if add is not None:
        fused: Tensor = _ONEDNN._linear_pointwise.binary(x, add, weight, bias, "add")
    else:
        fused = _ONEDNN._linear_pointwise(x, weight, bias, *(("gelu", [], "none") if gelu else ("none", [], "")))
    return fused


class LayerNorm(nn.LayerNorm):
    """PyTorch's, by a kernel that has rows of a few hundred numbers in mind."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) -> the same shape."""
        if x.dtype not in DTYPES or x.device.type != "cpu" or _is_watched() or not x.is_contiguous():
            return super().forward(x)
        found, channels = library(), x.shape[-1]
        if found is None or channels % found.lanes or not self._fits(x):
            return super().forward(x)
        out = torch.empty_like(x)
        found.layer_norm(
            DTYPES[x.dtype],
            *(x.data_ptr(), out.data_ptr(), x.numel() // channels, channels),
            *(self.weight.data_ptr(), self.bias.data_ptr()),
            *(self.eps, torch.get_num_threads()),
        )
        return out

    def _fits(self, x: Tensor) -> bool:
        """Whether the norm is over the last dimension, with weights of the same kind."""
        return self.normalized_shape == x.shape[-1:] and self.weight.dtype == x.dtype and self.weight.device == x.device


class PackedLinear(nn.Module):
    """A linear layer whose weights lie as oneDNN wants them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        with torch.inference_mode():
            self.packed = _ONEDNN._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return product(x, self)


BATCH, SIDE = 8, 56
"""Size of the maps that weights of convolutions are laid out for. For none oneDNN chooses what makes some 25 times slower."""


class PackedConvolution(nn.Module):
    """A convolution whose weights lie as oneDNN wants them, of maps with their channels last in memory."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.where = [list(map(int, numbers)) for numbers in (convolution.padding, convolution.stride, convolution.dilation)]
        with torch.inference_mode():
            weight = convolution.weight.detach().contiguous(memory_format=torch.channels_last)
            size = [BATCH, convolution.in_channels, SIDE, SIDE]
            self.packed = _ONEDNN._reorder_convolution_weight(weight, *self.where, convolution.groups, size)
        self.bias = None if convolution.bias is None else convolution.bias.detach()
        self.groups = convolution.groups

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the convolution's."""
        y: Tensor = _ONEDNN._convolution_pointwise(x, self.packed, self.bias, *self.where, self.groups, "none", [], "")
        return y


PACKED: dict[type[nn.Module], Any] = {nn.Linear: PackedLinear, nn.Conv2d: PackedConvolution}


def packed(module: nn.Module) -> nn.Module | None:
    """A linear layer or a convolution with its weights laid out for oneDNN; None for what has no fast kernel here."""
    if not is_plain(module, *PACKED) or (isinstance(module, nn.Conv2d) and not _has_numbers(module)):
        return None
    weight = module.get_parameter("weight")
    made: nn.Module | None = PACKED[type(module)](module) if _is_fast(weight.device, weight.dtype) else None
    return made


def _has_numbers(convolution: nn.Conv2d) -> bool:
    """Whether its padding is zeros, as many as numbers say."""
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


@cache
def _is_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's kernels are fast there."""
    if _ONEDNN is None or device.type != "cpu":
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bf16() and bool(_ONEDNN._is_mkldnn_bf16_supported()))


def _is_watched() -> bool:
    """Whether autograd, autocast or a compiler must see each step."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether it is of one of these kinds itself, and calling it does nothing but what they do."""
    return type(module) in kinds and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
