"""Weight packing for CPU inference, and whole layers by one compiled kernel on CPUs with AVX-512."""

from typing import Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinat.model.attention import compiled, neighborhood_attention_with_weights
from dinat.model.cpu.fast_layers import is_unmodified, pack_module, parameters_of
from dinat.model.dinat import Layer, has_unmodified_modules
from dinat.model.errors import DinatError
from dinat.model.fast_path import check_packed_input, is_plain
from dinat.model.native import Library, library
from dinat.model.native.dtypes import DTYPES

Network = TypeVar("Network", bound=nn.Module)

PANEL, PART = 32, 16
"""Constants of products.h: columns of a weight panel, and outputs of one of its parts."""


def pack(network: Network) -> Network:
    """Pack a network's weights in the memory layouts of the CPU kernels, which otherwise reorder them in every call.

    The network is modified in place and returned. Afterwards it can only be used for inference on a CPU: it cannot be trained,
    moved, saved or exported. Modules without a kernel are not changed.
    """
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, Layer) and supports_layer(child):
                replacement: nn.Module | None = PackedLayer(child)
            elif isinstance(child, nn.Conv2d) and supports_convolution(child):
                replacement = PanelConvolution(child)
            else:
                replacement = pack_module(child)
            if replacement is not None:
                setattr(module, name, replacement)
    return network


def supports_layer(layer: Layer) -> bool:
    """Return whether the kernel for whole layers is available and supports this layer."""
    if not (is_unmodified(layer, Layer) and has_unmodified_modules(layer) and _has_kernels(*layer.parameters())):
        return False
    attention = layer.attention.self
    if attention.backend not in ("auto", "compiled"):
        return False
    channels, hidden = layer.output.dense.out_features, layer.output.dense.in_features
    return (
        _has_plain_parameters(layer.layernorm_before)
        and _has_plain_parameters(layer.layernorm_after)
        and layer.intermediate.activation is F.gelu
        and hidden > 0  # a product of no inputs has no step that would write its output
        and channels % PANEL == hidden % PANEL == 0
        and channels == attention.heads * compiled.HEAD_DIM
        and compiled.supports_kernel_size(attention.kernel_size)
    )


def _has_kernels(*parameters: Tensor) -> bool:
    """Return whether layer.c is available for the dtype of all of these parameters, and they are plain tensors."""
    kernels, dtype = library(), parameters[0].dtype
    return kernels is not None and is_plain(*parameters) and dtype in DTYPES and kernels.has_layers[DTYPES[dtype]]


def _has_plain_parameters(norm: nn.LayerNorm) -> bool:
    """Return whether a norm has a weight and a bias, in contiguous memory."""
    return all(parameter is not None and parameter.is_contiguous() for parameter in parameters_of(norm))


class PackedLayer(nn.Module):
    """A layer in three calls: layer norm and QKV projection, attention, and everything after attention.

    Equals Layer in eval mode up to rounding. NHWC.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        attention = layer.attention.self
        assert attention.qkv is not None
        self.before, self.after = layer.layernorm_before, layer.layernorm_after
        scales = (None, None) if layer.layer_scale_parameters is None else layer.layer_scale_parameters
        self.qkv, self.up = _PackedWeight.of(attention.qkv), _PackedWeight.of(layer.intermediate.dense)
        self.output = _PackedWeight.of(layer.attention.output.dense, scales[0])
        self.down = _PackedWeight.of(layer.output.dense, scales[1])
        self.heads, self.rpb = attention.heads, attention.rpb
        self.kernel_size, self.dilation, self.window = attention.kernel_size, attention.dilation, layer.attention.window

    def forward(self, x: Tensor, with_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Compute the layer; see Layer.forward."""
        x = self.qkv.check(x, x.shape[-1])
        height, width = x.shape[1:3]
        below, right = max(0, self.window - height), max(0, self.window - width)
        if below or right:  # the padding is zeros after the norm
            qkv = self._project(F.pad(self.before(x), (0, 0, 0, right, 0, below)), is_normalized=True)
        else:
            qkv = self._project(x, is_normalized=False)
        weights = None
        if with_weights:
            q, k, v = qkv.unbind(3)
            attended, weights = neighborhood_attention_with_weights(q, k, v, self.rpb, self.kernel_size, self.dilation)
        elif x.numel():
            attended = compiled.attend_qkv(qkv, self.rpb, self.kernel_size, self.dilation)
        else:
            attended = x
        return self._complete(attended[:, :height, :width].contiguous(), x), weights

    def _project(self, x: Tensor, is_normalized: bool) -> Tensor:
        """Return query, key and value (B, H, W, 3, heads, head_dim) of x (B, H, W, C)."""
        channels = x.shape[-1]
        out = x.new_empty(*x.shape[:-1], 3, self.heads, channels // self.heads)
        if not x.numel():
            return out
        status = _library().project(
            DTYPES[x.dtype],
            *(x.data_ptr(), out.data_ptr(), x.numel() // channels, channels, self.qkv.outputs),
            *((None, None, 0.0) if is_normalized else _norm_arguments(self.before)),
            *(*self.qkv.pointers(), torch.get_num_threads()),
        )
        _check_status(status)
        return out

    def _complete(self, attended: Tensor, x: Tensor) -> Tensor:
        """Compute everything after attention from the attention output and the layer's input x, all (B, H, W, C)."""
        out = torch.empty_like(x)
        if not x.numel():
            return out
        channels = x.shape[-1]
        status = _library().complete(
            DTYPES[x.dtype],
            *(attended.data_ptr(), x.data_ptr(), out.data_ptr(), x.numel() // channels, channels, self.up.outputs),
            *(*self.output.pointers(), *_norm_arguments(self.after), *self.up.pointers(), *self.down.pointers()),
            torch.get_num_threads(),
        )
        _check_status(status)
        return out


def supports_convolution(convolution: nn.Conv2d) -> bool:
    """Return whether the kernel for downsampling convolutions is available and supports this one."""
    c = convolution
    return (
        (is_unmodified(c, nn.Conv2d) and _has_kernels(*c.parameters()))
        and (c.kernel_size, c.stride, c.padding, c.dilation, c.groups) == ((3, 3), (2, 2), (1, 1), (1, 1), 1)
        and c.padding_mode == "zeros"
        and c.in_channels % PANEL == c.out_channels % PANEL == 0
    )


class PanelConvolution(nn.Module):
    """A 3x3 convolution of stride 2, for inputs with channels last in memory.

    oneDNN is as fast if its weights are packed for the size of the feature map, but up to 25 times slower for other sizes.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight = _PackedWeight(convolution.weight.permute(0, 2, 3, 1).flatten(1), convolution.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the convolution: (B, C, H, W) -> (B, out_channels, H/2, W/2), rounded up."""
        x = self.weight.check(x.permute(0, 2, 3, 1), 9 * x.shape[1])
        images, height, width, channels = x.shape
        out = x.new_empty(images, -(-height // 2), -(-width // 2), self.weight.outputs)
        if not x.numel():
            return out.permute(0, 3, 1, 2)
        status = _library().convolve(
            DTYPES[x.dtype],
            *(x.data_ptr(), out.data_ptr(), images, height, width, channels, self.weight.outputs),
            *(*self.weight.pointers(), torch.get_num_threads()),
        )
        _check_status(status)
        return out.permute(0, 3, 1, 2)


class _PackedWeight:
    """Weight (outputs, inputs) and bias of a linear layer in the format of products.h."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        outputs, inputs = weight.shape
        word = 4 // weight.itemsize  # inputs per 32 bits
        parts = weight.detach().reshape(outputs // PANEL, PANEL // PART, PART, inputs // PANEL, PANEL // word, word)
        self.inputs, self.outputs = inputs, outputs
        self.weight = parts.permute(0, 3, 1, 4, 2, 5).contiguous()
        self.bias = torch.zeros(outputs) if bias is None else bias.detach().float()

    @classmethod
    def of(cls, linear: nn.Linear, scale: Tensor | None = None) -> Self:
        """Pack a linear layer, multiplied by the layer scale of its outputs if given."""
        if scale is None:
            return cls(linear.weight, linear.bias)
        bias = None if linear.bias is None else linear.bias.float() * scale.float()
        return cls((linear.weight.float() * scale.float()[:, None]).to(linear.weight.dtype), bias)

    def check(self, x: Tensor, inputs: int) -> Tensor:
        """Return x in contiguous memory. Raises DinatError if its dtype or number of inputs is not the weight's."""
        check_packed_input(x, self.weight.dtype)
        if inputs != self.inputs:
            raise DinatError(f"an input of shape {tuple(x.shape)} has another number of channels than the packed layer")
        return x.resolve_neg().contiguous()

    def pointers(self) -> tuple[int, int]:
        """Return the addresses of the weight and the bias."""
        return self.weight.data_ptr(), self.bias.data_ptr()


def _norm_arguments(norm: nn.LayerNorm) -> tuple[int, int, float]:
    return norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps


def _check_status(status: int) -> None:
    if status:
        raise MemoryError("not enough memory for the buffers of a layer")


def _library() -> Library:
    kernels = library()
    assert kernels is not None
    return kernels
