"""The kernels for whole layers, against the network's layers in float64, in every dtype and instruction set of this CPU."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dinat.model import DinatConfig, native
from dinat.model.attention import compiled
from dinat.model.cpu import fast_layers, packing
from dinat.model.cpu.fast_layers import PackedLinear
from dinat.model.cpu.packing import PackedLayer, PanelConvolution, pack
from dinat.model.dinat import Layer
from dinat.model.errors import DinatError
from dinat.model.native.dtypes import DTYPES

ERRORS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Relative error of a layer or convolution in each dtype."""

ROUNDING = {torch.float32: 5e-7, torch.bfloat16: 1e-4}
"""What another order of operations may add to the relative error of a layer."""

VARIANTS = [
    pytest.param(
        (target, dtype), id=f"{target.name}-{str(dtype).removeprefix('torch.')}", marks=[pytest.mark.slow] if i else []
    )
    for i, target in enumerate(native.supported_targets())
    for dtype, flag in ((torch.float32, "avx512f"), (torch.bfloat16, "avx512_bf16"))
    if flag in target.required_flags
]
"""Targets of this CPU that have layers, the fastest first, and their dtypes."""


@pytest.fixture(scope="module", params=VARIANTS)
def dtype(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.dtype]:
    """A dtype, with the kernels compiled for one target, which support layers of this dtype."""
    target, dtype = request.param
    if not native.compiler():
        pytest.skip("no C compiler")
    library = native.library()
    if library is None or library.target != target:
        library = native.Library(native.compile_for(target, tmp_path_factory.mktemp("kernels")), target)
    assert library.has_layers[DTYPES[dtype]]
    with pytest.MonkeyPatch.context() as patch:
        for module in (compiled, fast_layers, packing):
            patch.setattr(module, "library", lambda: library)
        yield dtype


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def random_layer(
    dtype: torch.dtype, channels: int = 64, kernel_size: int = 3, dilation: int = 1, seed: int = 0, **fields: object
) -> Layer:
    """A layer with random values in all parameters."""
    torch.manual_seed(seed)
    config = DinatConfig(kernel_size=kernel_size, **{"mlp_ratio": 2.0, **fields})
    layer = Layer(config, channels, channels // 32, dilation, drop_path=0.1, backend="auto").eval()
    for name, weight in layer.named_parameters():
        is_scale = "layernorm" in name and name.endswith("weight")
        nn.init.normal_(weight, mean=float(is_scale), std=0.1 if weight.dim() == 1 else max(1, weight.shape[-1]) ** -0.5)
    return layer.to(dtype)


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
    """A layer, its input and a number of threads, in float32."""
    layer = random_layer(
        torch.float32,
        channels=draw(st.sampled_from([32, 64, 96, 160])),
        kernel_size=draw(st.sampled_from([3, 5, 7])),
        dilation=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**16)),
        mlp_ratio=draw(st.sampled_from([1.0, 2.0, 3.0])),
        qkv_bias=draw(st.booleans()),
        layer_scale_init_value=draw(st.sampled_from([0.0, 1.0])),
    )
    size = draw(st.integers(1, 3)), draw(st.integers(1, 30)), draw(st.integers(1, 30))
    return layer, torch.randn(*size, layer.output.dense.out_features), draw(st.integers(1, 4))


@settings(deadline=None, max_examples=60)
@given(problem=problems())
def test_packed_layer_is_as_accurate_as_the_layer(dtype: torch.dtype, problem: tuple[Layer, Tensor, int]) -> None:
    layer, x, count = problem[0].to(dtype), problem[1].to(dtype), problem[2]
    expected = float64_output(layer, x)
    with torch.inference_mode(), threads(count):
        unpacked = relative_error(layer(x)[0], expected)
        assert relative_error(packed_output(layer, x), expected) <= min(ERRORS[dtype], 1.2 * unpacked + ROUNDING[dtype])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (15, 17), (16, 16), (22, 23), (31, 33), (48, 64)])
def test_number_of_threads_does_not_change_the_output(dtype: torch.dtype, rows: int, columns: int) -> None:
    layer = random_layer(dtype, 96)
    x = torch.randn(1, rows, columns, 96).to(dtype)
    with threads(1):
        expected = packed_output(layer, x)
    for count in (2, 3, 5, 8):
        with threads(count):
            assert torch.equal(packed_output(layer, x), expected)


def test_gelu_is_exact_to_the_dtype(dtype: torch.dtype) -> None:
    """The layer computes x + gelu(norm(x)), with identity matrices as weights."""
    layer = random_layer(dtype, 32, mlp_ratio=1.0)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
        layer.layernorm_after.weight.fill_(2.0)
        for linear in (layer.intermediate.dense, layer.output.dense):
            linear.weight.copy_(torch.eye(32))
        x = torch.randn(1, 64, 64, 32).to(dtype)
        output = packed_output(layer, x).double()
        normed = layer.layernorm_after(x).double()
        gelu = nn.functional.gelu(normed)
    assert gelu.min() < -0.16 and gelu.max() > 5
    expected = x.double() + gelu
    error, rounding = (1.25e-4, 2**-8) if dtype == torch.bfloat16 else (2.2e-7 * normed.abs() + 1e-7, 2**-23)
    assert ((output - expected).abs() <= error + rounding * (gelu.abs() + expected.abs())).all()  # each is rounded once


def test_gelu_of_outliers(dtype: torch.dtype) -> None:
    """The layer computes gelu(bias) for an input of zeros."""
    layer = random_layer(dtype, 32, mlp_ratio=1.0)
    outliers = torch.tensor([sign * 10.0**power for power in range(1, 17) for sign in (-1, 1)])
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
        layer.layernorm_after.bias.copy_(outliers)
        for linear in (layer.intermediate.dense, layer.output.dense):
            linear.weight.copy_(torch.eye(32))
        output = packed_output(layer, torch.zeros(1, 3, 3, 32, dtype=dtype))[0, 0, 0]
        expected = nn.functional.gelu(layer.layernorm_after.bias.double())
    error, rounding = (1.25e-4, 2**-8) if dtype == torch.bfloat16 else (1e-6, 2**-22)
    assert ((output.double() - expected).abs() <= error + rounding * expected).all()


def test_attention_weights_match_those_of_the_layer(dtype: torch.dtype) -> None:
    layer, x = random_layer(dtype, kernel_size=5), torch.randn(2, 9, 7, 64).to(dtype)
    [packed] = pack(nn.ModuleList([copy.deepcopy(layer)]))
    with torch.inference_mode():
        expected, expected_weights = layer(x, with_weights=True)
        output, weights = packed(x, with_weights=True)
    torch.testing.assert_close(weights, expected_weights, rtol=0.05, atol=2e-3)
    assert relative_error(output, expected.double()) <= ERRORS[dtype]


def test_nan_affects_only_its_neighborhood(dtype: torch.dtype) -> None:
    layer, x = random_layer(dtype), torch.randn(2, 40, 20, 64).to(dtype)
    x[0, 0, 0, 3] = math.nan
    output = packed_output(layer, x)
    assert output[0, :2, :2].isnan().all()
    assert output[1].isfinite().all() and output[0, 4:].isfinite().all()  # tiles have four rows


class ReplacedOutput(nn.Module):
    """The second half of an MLP, with another name for its linear layer."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor, add: Tensor) -> Tensor:
        return add + self.linear(x)


def test_unsupported_layers_are_not_packed(dtype: torch.dtype) -> None:
    def with_hook(layer: Layer) -> Layer:
        layer.output.dense.register_forward_hook(lambda module, inputs, output: output * 2)
        return layer

    def with_split_qkv(layer: Layer) -> Layer:
        layer.attention.self.split_qkv()
        return layer.to(dtype)

    def with_tiled_attention(layer: Layer) -> Layer:
        layer.attention.self.backend = "tiled"
        return layer

    def with_replaced_output(layer: Layer) -> Layer:
        layer.output = ReplacedOutput(layer.output.dense)  # type: ignore[assignment]
        return layer

    def random(**fields: Any) -> Layer:
        return random_layer(dtype, **fields)

    configured = random(hidden_act="relu"), random(mlp_ratio=0.75), random(kernel_size=15)
    changed = (change(random()) for change in (with_hook, with_split_qkv, with_tiled_attention, with_replaced_output))
    for layer in (*configured, *changed):
        x = torch.randn(1, 13, 14, 64).to(dtype)
        expected = float64_output(layer, x)
        [packed] = pack(nn.ModuleList([layer]))
        assert isinstance(packed, Layer) and any(isinstance(module, PackedLinear) for module in packed.modules())
        with torch.inference_mode():
            assert relative_error(packed(x)[0], expected) <= ERRORS[dtype]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layer_without_hidden_channels(dtype: torch.dtype) -> None:
    layer, x = random_layer(dtype, mlp_ratio=0.01), torch.randn(1, 13, 14, 64).to(dtype)
    expected = float64_output(layer, x)
    [packed] = pack(nn.ModuleList([layer]))
    with torch.inference_mode():
        assert relative_error(packed(x)[0], expected) <= ERRORS[dtype]


@pytest.mark.parametrize("unsupported", [torch.float16, torch.float64])
def test_layers_of_other_dtypes_are_not_packed(unsupported: torch.dtype) -> None:
    [packed] = pack(nn.ModuleList([random_layer(unsupported)]))
    assert isinstance(packed, Layer)


def test_layer_of_several_dtypes_is_not_packed() -> None:
    layer = random_layer(torch.bfloat16)
    layer.layernorm_before.float()
    [packed] = pack(nn.ModuleList([layer]))
    assert isinstance(packed, Layer)


def test_input_may_be_not_contiguous(dtype: torch.dtype) -> None:
    layer, x = random_layer(dtype), torch.randn(2, 64, 12, 9).to(dtype).permute(0, 2, 3, 1)
    assert not x.is_contiguous()
    assert torch.equal(packed_output(layer, x), packed_output(layer, x.contiguous()))


@settings(deadline=None, max_examples=40)
@given(
    images=st.integers(1, 3),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from([32, 64, 96]),
    has_bias=st.booleans(),
    count=st.integers(1, 4),
)
def test_packed_convolution_is_as_accurate_as_pytorchs(
    dtype: torch.dtype, images: int, height: int, width: int, channels: int, has_bias: bool, count: int
) -> None:
    torch.manual_seed(height)
    convolution = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=has_bias).to(dtype)
    x = torch.randn(images, height, width, channels).to(dtype).permute(0, 3, 1, 2)
    [packed] = pack(nn.ModuleList([copy.deepcopy(convolution)]))
    assert isinstance(packed, PanelConvolution)
    with torch.inference_mode(), threads(count):
        expected = convolution.double()(x.double())
        output = packed(x)
    assert output.shape == expected.shape and relative_error(output, expected) <= ERRORS[dtype] / 2


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
def test_unsupported_convolutions_use_other_kernels(dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    convolution = nn.Conv2d(64, 64, **{"kernel_size": 3, "stride": 2, "padding": 1, **arguments}).to(dtype)
    x = torch.randn(1, 64, 12, 12).to(dtype)
    [packed] = pack(nn.ModuleList([copy.deepcopy(convolution)]))
    assert not isinstance(packed, PanelConvolution)
    with torch.inference_mode():
        assert relative_error(packed(x), convolution.double()(x.double())) <= ERRORS[dtype]


def test_memory_does_not_grow_with_rows_times_threads(dtype: torch.dtype) -> None:
    """One copy of 36 MB (bfloat16: 18 MB) of inputs for each of 16 threads would be 578 MB (289 MB)."""

    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("the peak of the memory cannot be reset")

    def peak() -> int:
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024

    [packed] = pack(nn.ModuleList([nn.Conv2d(256, 512, 3, stride=2, padding=1).to(dtype)]))
    x = torch.randn(5, 56, 56, 256).to(dtype).permute(0, 3, 1, 2)
    with torch.inference_mode(), threads(16):
        reset.write_text("5")
        before = peak()
        packed(x)
    assert peak() - before < 200e6


def test_failed_allocation_raises_memory_error(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernels:
        def project(self, *_: object) -> int:
            return 1

    [packed] = pack(nn.ModuleList([random_layer(dtype)]))
    monkeypatch.setattr(packing, "_library", Kernels)
    with pytest.raises(MemoryError, match="buffers of a layer"):
        packed(torch.zeros(1, 8, 8, 64).to(dtype))


def test_copy_does_not_share_weights(dtype: torch.dtype) -> None:
    [packed] = pack(nn.ModuleList([random_layer(dtype)]))
    x = torch.randn(1, 8, 8, 64).to(dtype)
    with torch.inference_mode():
        expected = packed(x)[0]
        copied = copy.deepcopy(packed)
        packed.up.weight.zero_()
        assert torch.equal(copied(x)[0], expected) and not torch.equal(packed(x)[0], expected)


def test_input_of_another_dtype_or_width_is_an_error(dtype: torch.dtype) -> None:
    other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    layer, convolution, linear = pack(
        nn.ModuleList([random_layer(dtype), nn.Conv2d(64, 64, 3, 2, 1), nn.Linear(64, 64)]).to(dtype)
    )
    feature_map = torch.randn(1, 8, 8, 64)
    inputs = (layer, feature_map), (convolution, feature_map.permute(0, 3, 1, 2)), (linear, feature_map)
    with torch.inference_mode():
        for module, x in inputs:
            for unsupported in (other, torch.float16, torch.float64):
                with pytest.raises(DinatError, match=r"convert the input with \.to"):
                    module(x.to(unsupported))
        for channels in (32, 96):
            x = torch.randn(1, 8, 8, channels).to(dtype)
            for module, wrong in ((layer, x), (convolution, x.permute(0, 3, 1, 2))):
                with pytest.raises(DinatError, match="number of channels"):
                    module(wrong)


def test_negated_view_is_computed_as_its_values(dtype: torch.dtype) -> None:
    layer, x = random_layer(dtype), torch._neg_view(torch.randn(2, 12, 9, 64).to(dtype))
    assert torch.equal(packed_output(layer, x), packed_output(layer, x.resolve_neg()))
    [convolution] = pack(nn.ModuleList([nn.Conv2d(64, 64, 3, 2, 1).to(dtype)]))
    with torch.inference_mode():
        assert torch.equal(convolution(x.permute(0, 3, 1, 2)), convolution(x.resolve_neg().permute(0, 3, 1, 2)))


@pytest.mark.parametrize("name", ["layernorm_before", "layernorm_after"])
def test_norm_may_be_strided_or_have_no_bias(dtype: torch.dtype, name: str) -> None:
    x = torch.randn(1, 8, 8, 64).to(dtype)
    for has_bias in (True, False):
        layer = random_layer(dtype)
        norm = layer.get_submodule(name)
        norm.register_parameter("weight", nn.Parameter(torch.randn(128).to(dtype)[::2]))
        if not has_bias:
            norm.register_parameter("bias", None)
        expected = float64_output(layer, x)
        [packed] = pack(nn.ModuleList([layer]))
        with torch.inference_mode():
            assert relative_error(packed(x)[0], expected) <= ERRORS[dtype]
