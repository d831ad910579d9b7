"""The network for inference on a CPU: weights laid out once, layers by a kernel of their own where there are matrix units."""

from typing import Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinat.model.attention import compiled, neighborhood_attention, neighborhood_attention_with_weights
from dinat.model.cpu.fast_layers import LayerNorm, is_plain, packed
from dinat.model.dinat import Attention, AttentionOutput, DropPath, Intermediate, Layer, NeighborhoodSelfAttention, Output
from dinat.model.native import Library, library

Network = TypeVar("Network", bound=nn.Module)

PANEL, TILE = 32, 16
"""As in layer.c: columns of a panel of weights, and rows and columns of a tile."""


def pack(network: Network) -> Network:
    """Lay a network's weights out once, as its kernels want them, which otherwise do it at every call.

    For inference on a CPU: the network, which is changed and returned, cannot be trained, moved, saved or exported any more.
    What has no kernel here is left as it is.
    """
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, Layer) and takes(child):
                made: nn.Module | None = PackedLayer(child)
            elif isinstance(child, nn.Conv2d) and takes_convolution(child):
                made = PanelConvolution(child)
            else:
                made = packed(child)
            if made is not None:
                setattr(module, name, made)
    return network


def takes(layer: Layer) -> bool:
    """Whether the kernel of whole layers, which is for bfloat16 on matrix units, is there and knows this one."""
    found, attention = library(), layer.attention.self
    if found is None or not found.has_matrix_units or attention.qkv is None or attention.backend not in ("auto", "compiled"):
        return False
    channels, hidden = layer.output.dense.out_features, layer.output.dense.in_features
    return (
        all(is_plain(module, *KNOWN) for module in layer.modules())
        and all(weight.dtype == torch.bfloat16 and weight.device.type == "cpu" for weight in layer.parameters())
        and layer.intermediate.activation is F.gelu
        and channels % PANEL == hidden % PANEL == 0
        and channels == attention.heads * compiled.HEAD_DIM
        and compiled.has_kernel(attention.kernel_size)
    )


KNOWN: tuple[type[nn.Module], ...] = (
    *(Layer, Attention, NeighborhoodSelfAttention, AttentionOutput, Intermediate, Output),
    *(LayerNorm, nn.Linear, nn.Dropout, DropPath, nn.Identity),
)
"""What a layer that the kernel knows is made of."""


class PackedLayer(nn.Module):
    """A layer of bfloat16 in three calls: query, key and value with the norm before them, attention, and all the rest.

    The same numbers as Layer in evaluation, to bfloat16's rounding; NHWC.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        attention = layer.attention.self
        assert attention.qkv is not None
        self.before, self.after = layer.layernorm_before, layer.layernorm_after
        scales = (None, None) if layer.layer_scale_parameters is None else layer.layer_scale_parameters
        self.qkv, self.up = _Panels.of(attention.qkv), _Panels.of(layer.intermediate.dense)
        self.output, self.down = _Panels.of(layer.attention.output.dense, scales[0]), _Panels.of(layer.output.dense, scales[1])
        self.heads, self.rpb = attention.heads, attention.rpb
        self.kernel_size, self.dilation, self.window = attention.kernel_size, attention.dilation, layer.attention.window

    def forward(self, x: Tensor, with_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """As Layer's."""
        height, width = x.shape[1:3]
        x = x.contiguous()
        below, right = max(0, self.window - height), max(0, self.window - width)
        if below or right:  # zeros are put beside what is normalized already
            q, k, v = self._project(F.pad(self.before(x), (0, 0, 0, right, 0, below)), is_normalized=True)
        else:
            q, k, v = self._project(x, is_normalized=False)
        weights = None
        if with_weights:
            attended, weights = neighborhood_attention_with_weights(q, k, v, self.rpb, self.kernel_size, self.dilation)
        else:
            attended = neighborhood_attention(q, k, v, self.rpb, self.kernel_size, self.dilation, backend="compiled")
        return self._complete(attended[:, :height, :width].contiguous(), x), weights

    def _project(self, x: Tensor, is_normalized: bool) -> tuple[Tensor, ...]:
        """Query, key and value, (B, H, W, heads, head_dim)."""
        channels = x.shape[-1]
        out = x.new_empty(*x.shape[:-1], 3, self.heads, channels // self.heads)
        failed = _library().project(
            *(x.data_ptr(), out.data_ptr(), x.numel() // channels, channels, self.qkv.outputs),
            *((None, None, 0.0) if is_normalized else _norm(self.before)),
            *(*self.qkv.pointers(), torch.get_num_threads()),
        )
        _check(failed)
        return out.unbind(3)

    def _complete(self, attended: Tensor, x: Tensor) -> Tensor:
        """What comes after attention, which made `attended` of x; all (B, H, W, C)."""
        out = torch.empty_like(x)
        channels = x.shape[-1]
        failed = _library().complete(
            *(attended.data_ptr(), x.data_ptr(), out.data_ptr(), x.numel() // channels, channels, self.up.outputs),
            *(*self.output.pointers(), *_norm(self.after), *self.up.pointers(), *self.down.pointers()),
            torch.get_num_threads(),
        )
        _check(failed)
        return out


def takes_convolution(convolution: nn.Conv2d) -> bool:
    """Whether the kernel of the convolutions between the stages, which is for matrix units too, is there and knows this one."""
    found, c = library(), convolution
    return (
        (found is not None and found.has_matrix_units)
        and (is_plain(c, nn.Conv2d) and c.weight.dtype == torch.bfloat16 and c.weight.device.type == "cpu")
        and (c.kernel_size, c.stride, c.padding, c.dilation, c.groups) == ((3, 3), (2, 2), (1, 1), (1, 1), 1)
        and c.padding_mode == "zeros"
        and c.in_channels % PANEL == c.out_channels % PANEL == 0
    )


class PanelConvolution(nn.Module):
    """A convolution of 3 x 3 and stride 2, in bfloat16, of maps with their channels last in memory.

    oneDNN's is as fast where its weights lie right for the size of the map, which changes, and where not up to 25 times slower.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.panels = _Panels(convolution.weight.permute(0, 2, 3, 1).flatten(1), convolution.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H/2, W/2), rounded up."""
        x = x.permute(0, 2, 3, 1).contiguous()
        images, height, width, channels = x.shape
        out = x.new_empty(images, -(-height // 2), -(-width // 2), self.panels.outputs)
        failed = _library().convolve(
            *(x.data_ptr(), out.data_ptr(), images, height, width, channels, self.panels.outputs),
            *(*self.panels.pointers(), torch.get_num_threads()),
        )
        _check(failed)
        return out.permute(0, 3, 1, 2)


class _Panels:
    """The weights of a product as layer.c reads them, tile after tile. weight: (outputs, inputs)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        outputs, inputs = weight.shape
        tiles = weight.detach().reshape(outputs // PANEL, PANEL // TILE, TILE, inputs // PANEL, TILE, 2)
        self.outputs = outputs
        self.weight = tiles.permute(0, 3, 1, 4, 2, 5).contiguous()
        self.bias = torch.zeros(outputs) if bias is None else bias.detach().float()

    @classmethod
    def of(cls, linear: nn.Linear, scale: Tensor | None = None) -> Self:
        """Those of a linear layer, times the layer scale of its outputs if there is one."""
        if scale is None:
            return cls(linear.weight, linear.bias)
        bias = None if linear.bias is None else linear.bias.float() * scale.float()
        return cls((linear.weight.float() * scale.float()[:, None]).bfloat16(), bias)

    def pointers(self) -> tuple[int, int]:
        return self.weight.data_ptr(), self.bias.data_ptr()


def _norm(norm: nn.LayerNorm) -> tuple[int, int, float]:
    return norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the rows of a layer")


def _library() -> Library:
    found = library()
    assert found is not None
    return found
