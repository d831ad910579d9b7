"""Kernels on emulated CPUs; the tests of all kernels run on ARM's as well, as slow ones."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from dinat.model import native
from dinat.model.attention import compiled, neighborhood_attention
from dinat.model.cpu import fast_layers, packing
from dinat.model.cpu.features import cpu_flags
from dinat.model.cpu.packing import PanelConvolution, pack
from tests.model.cpu.test_packing import float64_output, packed_output, random_layer, relative_error, threads
from tests.model.native.emulated import EMULATED, MATRIX_UNITS, library_for

pytestmark = pytest.mark.emulator
HAS_ARM = pytest.mark.skipif(not EMULATED, reason="no cross compiler, no emulator, or an ARM CPU")


@pytest.fixture(scope="module")
def matrix_units(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use the kernels for AMX with its instructions in plain C."""
    if not MATRIX_UNITS.required_flags <= cpu_flags() or not native.compiler():
        pytest.skip("no AVX-512, or no C compiler")
    library = native.Library(native.compile_for(MATRIX_UNITS, tmp_path_factory.mktemp("kernels")), MATRIX_UNITS)
    assert library.has_matrix_units
    with pytest.MonkeyPatch.context() as patch:
        for module in (compiled, packing, fast_layers):
            patch.setattr(module, "library", lambda: library)
        yield


@pytest.mark.usefixtures("matrix_units")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("shape", "channels", "fields"),
    [
        ((1, 1, 1), 32, {}),
        ((2, 5, 7), 64, {"kernel_size": 5, "dilation": 2}),
        ((1, 17, 20), 96, {"mlp_ratio": 1.0, "layer_scale_init_value": 1.0}),
        ((3, 9, 8), 160, {"mlp_ratio": 3.0, "qkv_bias": False}),
    ],
)
def test_layer_on_matrix_units_in_c(shape: tuple[int, ...], channels: int, fields: dict[str, object], count: int) -> None:
    layer = random_layer(torch.bfloat16, channels, **fields)  # type: ignore[arg-type]
    x = torch.randn(*shape, channels).bfloat16()
    with threads(count):
        assert relative_error(packed_output(layer, x), float64_output(layer, x)) <= 1e-2


@pytest.mark.usefixtures("matrix_units")
@pytest.mark.parametrize(("shape", "channels"), [((1, 1, 1), 32), ((2, 7, 9), 64), ((1, 40, 33), 96)])
def test_convolution_on_matrix_units_in_c(shape: tuple[int, ...], channels: int) -> None:
    convolution = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1).bfloat16()
    x = torch.randn(*shape, channels).bfloat16().permute(0, 3, 1, 2)
    [packed] = pack(nn.ModuleList([copy.deepcopy(convolution)]))
    assert isinstance(packed, PanelConvolution)
    with torch.inference_mode():
        assert relative_error(packed(x), convolution.double()(x.double())) <= 5e-3


@pytest.mark.usefixtures("matrix_units")
def test_empty_batch_on_matrix_units_in_c() -> None:
    assert packed_output(random_layer(torch.bfloat16), torch.empty(0, 9, 8, 64).bfloat16()).shape == (0, 9, 8, 64)


@HAS_ARM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_an_emulated_arm_cpu(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = library_for(EMULATED[0], tmp_path)
    monkeypatch.setattr(compiled, "library", lambda: library)
    q, k, v = torch.randn(3, 1, 9, 10, 2, 32).to(dtype)
    rpb = torch.randn(2, 5, 5).to(dtype)
    with torch.no_grad():
        output = neighborhood_attention(q, k, v, rpb, 3, 2, backend="compiled")
    expected = neighborhood_attention(*(x.double() for x in (q, k, v, rpb)), 3, 2, backend="reference")
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
