"""Networks for inference on a GPU: layers in four steps, each by the fastest correct candidate; convolution weights in NHWC."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinat.model.attention import neighborhood_attention
from dinat.model.cpu.fast_layers import LayerNorm
from dinat.model.dinat import Layer, has_unmodified_modules
from dinat.model.fast_path import is_observed, is_plain_on_gpu
from dinat.model.gpu.steps import Linear, Mlp

Network = TypeVar("Network", bound=nn.Module)


def fuse(network: Network) -> Network:
    """Replace a network's layers by FusedLayer, and lay out its convolution weights as cuDNN reads them, once.

    The network is modified in place and returned. The names of its modules and parameters remain.
    """
    for module in network.modules():
        if type(module) is Layer:
            module.__class__ = FusedLayer
        elif type(module) is nn.Conv2d:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub lacks memory_format
    return network


class FusedLayer(Layer):
    """A layer in four steps: norm and QKV projection, attention, output projection and sum, MLP. NHWC.

    Equals Layer up to rounding. Where the one rule for fast paths (model/fast_path.py) does not allow kernels, Layer itself
    computes: with autograd, hooks, active dropout or replaced modules, for example.
    """

    def forward(self, x: Tensor, with_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Compute the layer; see Layer.forward."""
        if with_weights or not x.numel() or not can_fuse(self, x):
            return super().forward(x, with_weights)
        attention = self.attention.self
        assert attention.qkv is not None
        x = x.contiguous()
        height, width = x.shape[1:3]
        below, right = (max(0, self.attention.window - length) for length in (height, width))
        scales = (None, None) if self.layer_scale_parameters is None else self.layer_scale_parameters
        if below or right:  # the padding is zeros after the norm
            projected = attention.project(F.pad(self.layernorm_before(x), (0, 0, 0, right, 0, below)))
        else:
            projected = Linear(attention.qkv, self.layernorm_before)(x).chunk(3, dim=-1)
        q, k, v = (y.view(*y.shape[:-1], attention.heads, y.shape[-1] // attention.heads) for y in projected)
        attended = neighborhood_attention(
            q, k, v, attention.rpb, attention.kernel_size, attention.dilation, backend=attention.backend
        )
        attended = attended[:, :height, :width].flatten(-2).contiguous()
        x = Linear(self.attention.output.dense, scale=scales[0])(attended, x)
        return Mlp(self.layernorm_after, self.intermediate.dense, self.output.dense, scales[1])(x), None


def can_fuse(layer: Layer, x: Tensor) -> bool:
    """Return whether kernels may compute a layer of x (B, H, W, channels)."""
    modules, parameters = list(layer.modules()), list(layer.parameters())
    return (
        not is_observed()
        and is_plain_on_gpu(x, *parameters)
        and has_unmodified_modules(layer)
        and not any(module.training for module in modules)
        and layer.intermediate.activation is F.gelu
        and all(module.bias is not None for module in modules if isinstance(module, LayerNorm | nn.Linear))
        and all(parameter.is_contiguous() for parameter in parameters)
    )
