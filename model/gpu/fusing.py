"""Networks for inference on a GPU: layers in four steps, each by the fastest correct candidate; convolution weights in NHWC."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinat.model.attention import neighborhood_attention
from dinat.model.cpu.fast_layers import LayerNorm, is_unmodified
from dinat.model.dinat import LAYER_MODULES, Layer
from dinat.model.fast_path import is_observed, is_plain_on_gpu
from dinat.model.gpu.steps import Linear, Mlp

Network = TypeVar("Network", bound=nn.Module)


def fuse(network: Network) -> Network:
    """Replace a network's layers by FusedLayer, and lay out its convolution weights as cuDNN reads them, once.

    The network is modified in place and returned. Afterwards it is for inference: its parameters have other names.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is Layer:
                setattr(module, name, FusedLayer(child))
            elif type(child) is nn.Conv2d:
                child.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub lacks memory_format
    return network


class FusedLayer(nn.Module):
    """A layer in four steps: norm and QKV projection, attention, output projection and sum, MLP. NHWC.

    Equals Layer up to rounding. Where the one rule for fast paths (model/fast_path.py) does not allow kernels, Layer itself
    computes: with autograd, hooks, active dropout or replaced modules, for example.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, with_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Compute the layer; see Layer.forward."""
        layer, attention = self.layer, self.layer.attention.self
        if with_weights or attention.qkv is None or not x.numel() or not can_fuse(layer, x):
            return layer(x, with_weights)  # type: ignore[no-any-return]
        x = x.contiguous()
        height, width = x.shape[1:3]
        below, right = (max(0, layer.attention.window - length) for length in (height, width))
        scales = (None, None) if layer.layer_scale_parameters is None else layer.layer_scale_parameters
        if below or right:  # the padding is zeros after the norm
            projected = attention.project(F.pad(layer.layernorm_before(x), (0, 0, 0, right, 0, below)))
        else:
            projected = Linear(attention.qkv, layer.layernorm_before)(x).chunk(3, dim=-1)
        q, k, v = (y.view(*y.shape[:-1], attention.heads, y.shape[-1] // attention.heads) for y in projected)
        attended = neighborhood_attention(
            q, k, v, attention.rpb, attention.kernel_size, attention.dilation, backend=attention.backend
        )
        attended = attended[:, :height, :width].flatten(-2).contiguous()
        x = Linear(layer.attention.output.dense, scale=scales[0])(attended, x)
        return Mlp(layer.layernorm_after, layer.intermediate.dense, layer.output.dense, scales[1])(x), None


def can_fuse(layer: Layer, x: Tensor) -> bool:
    """Return whether kernels may compute a layer of x (B, H, W, channels)."""
    modules, parameters = list(layer.modules()), list(layer.parameters())
    return (
        not is_observed()
        and is_plain_on_gpu(x, *parameters)
        and all(is_unmodified(module, *LAYER_MODULES) and not module.training for module in modules)
        and layer.intermediate.activation is F.gelu
        and all(module.bias is not None for module in modules if isinstance(module, LayerNorm | nn.Linear))
        and all(parameter.is_contiguous() for parameter in parameters)
    )
