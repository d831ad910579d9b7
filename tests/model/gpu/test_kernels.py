"""The fused kernels without a GPU: run by Triton's interpreter against float64, and compiled for supported GPUs."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dinat.model import DinatImageProcessor
from dinat.model.cpu.fast_layers import LayerNorm

pytest.importorskip("triton", reason="triton is not installed")

from dinat.model.gpu import linear_kernel, mlp_kernel, pixels_kernel
from dinat.model.gpu.linear_kernel import LinearConfig
from dinat.model.gpu.mlp_kernel import MlpConfig
from dinat.model.gpu.steps import TWO_STEPS, Linear, Mlp, relative_error
from dinat.model.normalization import value_table
from tests.model.attention.test_triton_kernel import LIMITS, assert_fits, compiled

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels")]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2**-6}
"""Relative to the norm of the float64 result. Triton's interpreter truncates to bfloat16: the normalized input and the output
each by up to 2**-7."""
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@pytest.fixture(autouse=True)
def inference_mode() -> Any:
    with torch.inference_mode():
        yield


def random_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Fill a norm or a linear layer with random values."""
    weight = module.get_parameter("weight")
    nn.init.normal_(weight, float(isinstance(module, LayerNorm)), weight.shape[-1] ** -0.5)
    if module.bias is not None:
        nn.init.normal_(module.get_parameter("bias"), std=0.5)
    module.to(dtype)


def random_linear(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    random_parameters(layer, dtype)
    return layer


def random_norm(channels: int, dtype: torch.dtype) -> LayerNorm:
    norm = LayerNorm(channels)
    random_parameters(norm, dtype)
    return norm


@settings(max_examples=12, deadline=None)
@given(
    config=st.sampled_from([*linear_kernel.CONFIGS, LinearConfig(16, 16, 16, 1, 1)]),
    rows=st.integers(1, 150),
    inputs=st.sampled_from([16, 32, 48, 96, 192]),
    outputs=st.sampled_from([3, 32, 72, 200]),
    dtype=DTYPES,
    with_norm=st.booleans(),
    is_gelu=st.booleans(),
    has_bias=st.booleans(),
    has_scale=st.booleans(),
    with_sum=st.booleans(),
    mean=st.sampled_from([0.0, -20.0]),
    seed=st.integers(0, 99),
)
def test_linear_layer_with_all_that_is_fused_matches_float64(
    config: LinearConfig,
    rows: int,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    with_norm: bool,
    is_gelu: bool,
    has_bias: bool,
    has_scale: bool,
    with_sum: bool,
    mean: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(1, rows, 1, inputs) + (mean if with_norm else 0)).to(dtype)
    add = torch.randn(1, rows, 1, outputs).to(dtype) if with_sum else None
    step = Linear(
        random_linear(inputs, outputs, dtype, has_bias),
        random_norm(inputs, dtype) if with_norm else None,
        is_gelu,
        torch.randn(outputs).to(dtype) if has_scale else None,
    )
    output = linear_kernel.launch(x, step.norm, step.layer, is_gelu, step.scale, add, config)
    assert (output.shape, output.dtype) == ((1, rows, 1, outputs), dtype)
    assert relative_error(output, step.exact(x), add) < TOLERANCE[dtype]


@settings(max_examples=8, deadline=None)
@given(
    config=st.sampled_from([config for configs in mlp_kernel.CONFIGS.values() for config in configs]),
    rows=st.integers(1, 150),
    channels=st.sampled_from([16, 24, 64, 96, 192]),
    ratio=st.sampled_from([2, 3]),
    dtype=DTYPES,
    has_scale=st.booleans(),
    seed=st.integers(0, 99),
)
def test_mlp_matches_float64(
    config: MlpConfig, rows: int, channels: int, ratio: int, dtype: torch.dtype, has_scale: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    hidden = ratio * channels // 16 * 16
    x = torch.randn(1, rows, 1, channels).to(dtype)
    scale = torch.randn(channels).to(dtype) if has_scale else None
    norm, up, down = (
        random_norm(channels, dtype),
        random_linear(channels, hidden, dtype),
        random_linear(hidden, channels, dtype),
    )
    output = mlp_kernel.launch(x, norm, up, down, scale, config)
    step = Mlp(norm, up, down, scale)
    assert (output.shape, output.dtype) == (x.shape, dtype)
    exact = Linear(down, scale=scale).exact(Linear(up, norm, is_gelu=True).exact(x))
    assert relative_error(output, exact, x) < TOLERANCE[dtype]
    assert relative_error(step.by(TWO_STEPS, x), exact, x) < TOLERANCE[dtype]


def test_gelu_is_exact_to_bfloat16() -> None:
    """Absolute error 1.2e-4; bfloat16 rounds values above 0.03 more."""
    x = torch.linspace(-9, 9, 16 * 1001).view(1, 1001, 1, 16).half()
    identity = nn.Linear(16, 16, bias=False)
    identity.weight.copy_(torch.eye(16))
    output = linear_kernel.launch(x, None, identity.half(), True, None, None, linear_kernel.CONFIGS[0])
    error = (output.double() - nn.functional.gelu(x.double())).abs()
    assert float((error - output.double().abs() * 2**-11).max()) < 1.3e-4  # but for the rounding of the output


@pytest.mark.parametrize("step", ["linear layer", "MLP"])
def test_nan_stays_nan_in_its_row(step: str) -> None:
    x = torch.randn(1, 5, 1, 16)
    x[0, 2, 0, 3] = float("nan")
    norm, up, down = (
        random_norm(16, torch.float32),
        random_linear(16, 32, torch.float32),
        random_linear(32, 16, torch.float32),
    )
    if step == "MLP":
        output = mlp_kernel.launch(x, norm, up, down, None, MlpConfig(16, 16, 1, 1))
    else:
        output = linear_kernel.launch(x, norm, up, True, None, None, LinearConfig(16, 16, 16, 1, 1))
    assert output.isnan().all(-1).flatten().tolist() == [False, False, True, False, False]
    assert not output[:, [0, 1, 3, 4]].isnan().any()


def test_zero_weights_have_no_error() -> None:
    x = torch.randn(2, 5, 1, 16).half()
    step = Linear(nn.Linear(16, 16, bias=False).half(), random_norm(16, torch.float16), is_gelu=True)
    step.layer.weight.zero_()
    output = linear_kernel.launch(x, step.norm, step.layer, True, None, None, linear_kernel.CONFIGS[0])
    assert relative_error(output, step.exact(x)) == 0
    assert relative_error(output + 1, step.exact(x)) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 33, 35)])
def test_pixels_match_the_definition(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    processor = DinatImageProcessor()
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    mean_and_std = tuple(processor.image_mean), tuple(processor.image_std)
    table = value_table(processor.rescale_factor, mean_and_std, torch.device("cpu"))
    output = pixels_kernel.launch(pixels, table, dtype).permute(0, 3, 1, 2)
    expected = processor.normalize(pixels, dtype)
    assert output.is_contiguous(memory_format=torch.channels_last)
    # The interpreter truncates to bfloat16.
    torch.testing.assert_close(output, expected, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize("capability", LIMITS)
def test_every_config_uses_tensor_cores_spills_nothing_and_fits(
    capability: int, record_property: Callable[[str, object], None]
) -> None:
    rows = compiled(str(capability), "--kernels", "fused", "--dtypes", "bf16")
    linear = {(row["kernel"], row["cut"]) for row in rows if row["kernel"].startswith("linear")}
    assert len(linear) == 4 * len(linear_kernel.CONFIGS)
    mlps = {(row["kernel"], row["cut"]) for row in rows if row["kernel"].startswith("MLP")}
    expected = {
        (f"MLP of {channels} channels", str(config))
        for channels in (64, 96, 128, 192, 256)
        for config in mlp_kernel.configs(channels, 64)
    }
    assert mlps == expected
    for row in rows:
        record_property(f"sm_{capability} {row['kernel']} {row['cut']}", json.dumps(row))
        assert row["tensor core"] > 0, row
        assert_fits(row, capability)
