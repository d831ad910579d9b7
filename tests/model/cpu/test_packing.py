"""Layers by their kernel for matrix units, against the network's own layers in float64."""

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

_FOUND = native.library()
pytestmark = pytest.mark.skipif(_FOUND is None or not _FOUND.has_matrix_units, reason="no matrix units, or no C compiler")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def a_layer(channels: int = 64, kernel_size: int = 3, dilation: int = 1, seed: int = 0, **settings: object) -> Layer:
    """A layer of bfloat16 all of whose weights say something."""
    torch.manual_seed(seed)
    config = DinatConfig(kernel_size=kernel_size, **{"mlp_ratio": 2.0, **settings})
    layer = Layer(config, channels, channels // 32, dilation, drop_path=0.1, backend="auto").eval()
    for name, weight in layer.named_parameters():
        is_scale = "layernorm" in name and name.endswith("weight")
        nn.init.normal_(weight, mean=float(is_scale), std=0.1 if weight.dim() == 1 else weight.shape[-1] ** -0.5)
    return layer.bfloat16()


def exactly(layer: Layer, x: Tensor) -> Tensor:
    """What it gives by its definition in float64."""
    double = copy.deepcopy(layer).double()
    double.attention.self.backend = "reference"
    with torch.inference_mode():
        return double(x.double())[0]


def by_kernel(layer: Layer, x: Tensor) -> Tensor:
    [made] = pack(nn.ModuleList([copy.deepcopy(layer)]))
    assert isinstance(made, PackedLayer)
    with torch.inference_mode():
        return made(x)[0]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@st.composite
def problems(draw: st.DrawFn) -> tuple[Layer, Tensor, int]:
    layer = a_layer(
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
def test_it_is_as_exact_as_the_layer_that_it_takes_the_place_of(problem: tuple[Layer, Tensor, int]) -> None:
    layer, x, count = problem
    expected = exactly(layer, x)
    with torch.inference_mode(), threads(count):
        before = error(layer(x)[0], expected)
        assert error(by_kernel(layer, x), expected) <= min(1e-2, 1.2 * before + 1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (15, 17), (16, 16), (22, 23), (31, 33), (48, 64)])
def test_every_thread_count_gives_the_same(rows: int, columns: int) -> None:
    layer = a_layer(96)
    x = torch.randn(1, rows, columns, 96).bfloat16()
    with threads(1):
        expected = by_kernel(layer, x)
    for count in (2, 3, 5, 8):
        with threads(count):
            assert torch.equal(by_kernel(layer, x), expected)


def test_its_gelu_is_the_exact_one_to_bfloat16() -> None:
    """A layer that gives x + gelu(norm(x)), by products with a unit matrix."""
    layer = a_layer(32, mlp_ratio=1.0)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
        layer.layernorm_after.weight.fill_(2.0)
        for linear in (layer.intermediate.dense, layer.output.dense):
            linear.weight.copy_(torch.eye(32))
        x = torch.randn(1, 64, 64, 32).bfloat16()
        got = by_kernel(layer, x).double()
        expected = nn.functional.gelu(layer.layernorm_after(x).double())
    assert expected.min() < -0.16 and expected.max() > 5
    whole = x.double() + expected
    assert ((got - whole).abs() <= 1.25e-4 + 2**-8 * (expected.abs() + whole.abs())).all()  # each is rounded once


def test_attention_weights_are_those_of_the_layer() -> None:
    layer, x = a_layer(kernel_size=5), torch.randn(2, 9, 7, 64).bfloat16()
    [made] = pack(nn.ModuleList([copy.deepcopy(layer)]))
    with torch.inference_mode():
        expected, weights = layer(x, with_weights=True)
        got, got_weights = made(x, with_weights=True)
    torch.testing.assert_close(got_weights, weights, rtol=0.05, atol=2e-3)
    assert error(got, expected.double()) <= 1e-2


def test_nan_hurts_its_neighborhood_and_nothing_else() -> None:
    layer, x = a_layer(), torch.randn(2, 40, 20, 64).bfloat16()
    x[0, 0, 0, 3] = math.nan
    got = by_kernel(layer, x)
    assert got[0, :2, :2].isnan().all()
    assert got[1].isfinite().all() and got[0, 4:].isfinite().all()  # tiles are of four rows


def test_what_the_kernel_does_not_know_is_left_to_other_kernels() -> None:
    def hooked(layer: Layer) -> Layer:
        layer.output.dense.register_forward_hook(lambda module, inputs, output: output * 2)
        return layer

    def parted(layer: Layer) -> Layer:
        layer.attention.self.part()
        return layer.bfloat16()

    def by_tiles(layer: Layer) -> Layer:
        layer.attention.self.backend = "tiled"
        return layer

    odd = a_layer(hidden_act="relu"), a_layer(mlp_ratio=0.75), a_layer(kernel_size=15)
    for layer in (*odd, a_layer().float(), hooked(a_layer()), parted(a_layer()), by_tiles(a_layer())):
        x = torch.randn(1, 13, 14, 64).to(layer.output.dense.weight.dtype)
        expected = exactly(layer, x)
        [made] = pack(nn.ModuleList([layer]))
        assert isinstance(made, Layer) and any(isinstance(module, PackedLinear) for module in made.modules())
        with torch.inference_mode():
            assert error(made(x)[0], expected) <= 1e-2


def test_a_map_that_is_not_in_a_row_is_taken() -> None:
    layer, x = a_layer(), torch.randn(2, 64, 12, 9).bfloat16().permute(0, 2, 3, 1)
    assert not x.is_contiguous()
    assert torch.equal(by_kernel(layer, x), by_kernel(layer, x.contiguous()))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.sampled_from([32, 64, 96]), st.booleans(), st.integers(1, 4)
)
def test_a_convolution_is_as_exact_as_pytorchs(
    images: int, height: int, width: int, channels: int, has_bias: bool, count: int
) -> None:
    torch.manual_seed(height)
    convolution = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=has_bias).bfloat16()
    x = torch.randn(images, height, width, channels).bfloat16().permute(0, 3, 1, 2)
    [made] = pack(nn.ModuleList([copy.deepcopy(convolution)]))
    assert isinstance(made, PanelConvolution)
    with torch.inference_mode(), threads(count):
        expected = convolution.double()(x.double())
        got = made(x)
    assert got.shape == expected.shape and error(got, expected) <= 5e-3


@pytest.mark.parametrize(
    "settings",
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
def test_another_convolution_is_left_to_other_kernels(settings: dict[str, Any]) -> None:
    convolution = nn.Conv2d(64, 64, **{"kernel_size": 3, "stride": 2, "padding": 1, **settings}).bfloat16()
    x = torch.randn(1, 64, 12, 12).bfloat16()
    [made] = pack(nn.ModuleList([copy.deepcopy(convolution)]))
    assert not isinstance(made, PanelConvolution)
    with torch.inference_mode():
        assert error(made(x), convolution.double()(x.double())) <= 1e-2


def test_no_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says so by what it returns."""

    class Full:
        def project(self, *_: object) -> int:
            return 1

    [made] = pack(nn.ModuleList([a_layer()]))
    monkeypatch.setattr(packing, "_library", Full)
    with pytest.raises(MemoryError, match="rows of a layer"):
        made(torch.zeros(1, 8, 8, 64).bfloat16())


def test_a_copy_has_weights_of_its_own() -> None:
    """Nothing in it is an address, which a copy would share."""
    [made] = pack(nn.ModuleList([a_layer()]))
    x = torch.randn(1, 8, 8, 64).bfloat16()
    with torch.inference_mode():
        expected = made(x)[0]
        copied = copy.deepcopy(made)
        made.up.weight.zero_()
        assert torch.equal(copied(x)[0], expected) and not torch.equal(made(x)[0], expected)
