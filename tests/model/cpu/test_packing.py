"""The AMX kernel for whole layers, against the network's layers in float64."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dinat.model import DinatConfig, native
from dinat.model.cpu import packing
from dinat.model.cpu.fast_layers import PackedLinear
from dinat.model.cpu.packing import PackedLayer, PanelConvolution, pack
from dinat.model.dinat import Layer

_KERNELS = native.library()
pytestmark = pytest.mark.skipif(_KERNELS is None or not _KERNELS.has_matrix_units, reason="no AMX, or no C compiler")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def random_layer(channels: int = 64, kernel_size: int = 3, dilation: int = 1, seed: int = 0, **fields: object) -> Layer:
    """A bfloat16 layer with random values in all parameters."""
    torch.manual_seed(seed)
    config = DinatConfig(kernel_size=kernel_size, **{"mlp_ratio": 2.0, **fields})
    layer = Layer(config, channels, channels // 32, dilation, drop_path=0.1, backend="auto").eval()
    for name, weight in layer.named_parameters():
        is_scale = "layernorm" in name and name.endswith("weight")
        nn.init.normal_(weight, mean=float(is_scale), std=0.1 if weight.dim() == 1 else weight.shape[-1] ** -0.5)
    return layer.bfloat16()


def float64_output(layer: Layer, x: Tensor) -> Tensor:
    """Output of the layer in float64, with the reference attention."""
    double = copy.deepcopy(layer).double()
    double.attention.self.backend = "reference"
    with torch.inference_mode():
        return double(x.double())[0]


def packed_output(layer: Layer, x: Tensor) -> Tensor:
    [packed] = pack(nn.ModuleList([copy.deepcopy(layer)]))
    assert isinstance(packed, PackedLayer)
    with torch.inference_mode():
        return packed(x)[0]


def relative_error(output: Tensor, expected: Tensor) -> float:
    return float((output.double() - expected).norm() / expected.norm())


@st.composite
def problems(draw: st.DrawFn) -> tuple[Layer, Tensor, int]:
    layer = random_layer(
        channels=draw(st.sampled_from([32, 64, 96, 160])),
        kernel_size=draw(st.sampled_from([3, 5, 7])),
        dilation=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**16)),
        mlp_ratio=draw(st.sampled_from([1.0, 2.0, 3.0])),
        qkv_bias=draw(st.booleans()),
        layer_scale_init_value=draw(st.sampled_from([0.0, 1.0])),
    )
    size = draw(st.integers(1, 3)), draw(st.integers(1, 30)), draw(st.integers(1, 30))
    return layer, torch.randn(*size, layer.output.dense.out_features).bfloat16(), draw(st.integers(1, 4))


@settings(deadline=None, max_examples=60)
@given(problem=problems())
def test_packed_layer_is_as_accurate_as_the_layer(problem: tuple[Layer, Tensor, int]) -> None:
    layer, x, count = problem
    expected = float64_output(layer, x)
    with torch.inference_mode(), threads(count):
        unpacked = relative_error(layer(x)[0], expected)
        assert relative_error(packed_output(layer, x), expected) <= min(1e-2, 1.2 * unpacked + 1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (15, 17), (16, 16), (22, 23), (31, 33), (48, 64)])
def test_number_of_threads_does_not_change_the_output(rows: int, columns: int) -> None:
    layer = random_layer(96)
    x = torch.randn(1, rows, columns, 96).bfloat16()
    with threads(1):
        expected = packed_output(layer, x)
    for count in (2, 3, 5, 8):
        with threads(count):
            assert torch.equal(packed_output(layer, x), expected)


def test_gelu_is_exact_to_bfloat16() -> None:
    """The layer computes x + gelu(norm(x)), with identity matrices as weights."""
    layer = random_layer(32, mlp_ratio=1.0)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
        layer.layernorm_after.weight.fill_(2.0)
        for linear in (layer.intermediate.dense, layer.output.dense):
            linear.weight.copy_(torch.eye(32))
        x = torch.randn(1, 64, 64, 32).bfloat16()
        output = packed_output(layer, x).double()
        gelu = nn.functional.gelu(layer.layernorm_after(x).double())
    assert gelu.min() < -0.16 and gelu.max() > 5
    expected = x.double() + gelu
    assert ((output - expected).abs() <= 1.25e-4 + 2**-8 * (gelu.abs() + expected.abs())).all()  # each is rounded once


def test_attention_weights_match_those_of_the_layer() -> None:
    layer, x = random_layer(kernel_size=5), torch.randn(2, 9, 7, 64).bfloat16()
    [packed] = pack(nn.ModuleList([copy.deepcopy(layer)]))
    with torch.inference_mode():
        expected, expected_weights = layer(x, with_weights=True)
        output, weights = packed(x, with_weights=True)
    torch.testing.assert_close(weights, expected_weights, rtol=0.05, atol=2e-3)
    assert relative_error(output, expected.double()) <= 1e-2


def test_nan_affects_only_its_neighborhood() -> None:
    layer, x = random_layer(), torch.randn(2, 40, 20, 64).bfloat16()
    x[0, 0, 0, 3] = math.nan
    output = packed_output(layer, x)
    assert output[0, :2, :2].isnan().all()
    assert output[1].isfinite().all() and output[0, 4:].isfinite().all()  # tiles have four rows


def test_unsupported_layers_are_not_packed() -> None:
    def with_hook(layer: Layer) -> Layer:
        layer.output.dense.register_forward_hook(lambda module, inputs, output: output * 2)
        return layer

    def with_split_qkv(layer: Layer) -> Layer:
        layer.attention.self.split_qkv()
        return layer.bfloat16()

    def with_tiled_attention(layer: Layer) -> Layer:
        layer.attention.self.backend = "tiled"
        return layer

    configured = random_layer(hidden_act="relu"), random_layer(mlp_ratio=0.75), random_layer(kernel_size=15)
    modified = with_hook(random_layer()), with_split_qkv(random_layer()), with_tiled_attention(random_layer())
    for layer in (*configured, random_layer().float(), *modified):
        x = torch.randn(1, 13, 14, 64).to(layer.output.dense.weight.dtype)
        expected = float64_output(layer, x)
        [packed] = pack(nn.ModuleList([layer]))
        assert isinstance(packed, Layer) and any(isinstance(module, PackedLinear) for module in packed.modules())
        with torch.inference_mode():
            assert relative_error(packed(x)[0], expected) <= 1e-2


def test_input_may_be_not_contiguous() -> None:
    layer, x = random_layer(), torch.randn(2, 64, 12, 9).bfloat16().permute(0, 2, 3, 1)
    assert not x.is_contiguous()
    assert torch.equal(packed_output(layer, x), packed_output(layer, x.contiguous()))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.sampled_from([32, 64, 96]), st.booleans(), st.integers(1, 4)
)
def test_packed_convolution_is_as_accurate_as_pytorchs(
    images: int, height: int, width: int, channels: int, has_bias: bool, count: int
) -> None:
    torch.manual_seed(height)
    convolution = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=has_bias).bfloat16()
    x = torch.randn(images, height, width, channels).bfloat16().permute(0, 3, 1, 2)
    [packed] = pack(nn.ModuleList([copy.deepcopy(convolution)]))
    assert isinstance(packed, PanelConvolution)
    with torch.inference_mode(), threads(count):
        expected = convolution.double()(x.double())
        output = packed(x)
    assert output.shape == expected.shape and relative_error(output, expected) <= 5e-3


@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": 1},
        {"padding": 0},
        {"groups": 2},
        {"dilation": 2},
        {"padding_mode": "reflect"},
        {"kernel_size": 5},
        {"stride": 1, "padding": "same"},
    ],
)
def test_unsupported_convolutions_use_other_kernels(arguments: dict[str, Any]) -> None:
    convolution = nn.Conv2d(64, 64, **{"kernel_size": 3, "stride": 2, "padding": 1, **arguments}).bfloat16()
    x = torch.randn(1, 64, 12, 12).bfloat16()
    [packed] = pack(nn.ModuleList([copy.deepcopy(convolution)]))
    assert not isinstance(packed, PanelConvolution)
    with torch.inference_mode():
        assert relative_error(packed(x), convolution.double()(x.double())) <= 1e-2


def test_failed_allocation_raises_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernels:
        def project(self, *_: object) -> int:
            return 1

    [packed] = pack(nn.ModuleList([random_layer()]))
    monkeypatch.setattr(packing, "_library", Kernels)
    with pytest.raises(MemoryError, match="buffers of a layer"):
        packed(torch.zeros(1, 8, 8, 64).bfloat16())


def test_copy_does_not_share_weights() -> None:
    [packed] = pack(nn.ModuleList([random_layer()]))
    x = torch.randn(1, 8, 8, 64).bfloat16()
    with torch.inference_mode():
        expected = packed(x)[0]
        copied = copy.deepcopy(packed)
        packed.up.weight.zero_()
        assert torch.equal(copied(x)[0], expected) and not torch.equal(packed(x)[0], expected)
