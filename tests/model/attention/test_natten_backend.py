"""The NATTEN library, on the CPU by its Flex backend, against the reference."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinat.model import AttentionError
from dinat.model.attention import neighborhood_attention
from tests.model.reference import assert_matches_reference

natten = pytest.importorskip("natten", reason="natten is not installed")

from dinat.model.attention import natten_backend  # noqa: E402
from dinat.model.attention.natten_backend import NattenConfig, key_channels, query_channels, select_config  # noqa: E402

pytestmark = [  # warnings of PyTorch's FlexAttention as called by natten: slow without compilation, and a deprecated argument
    pytest.mark.filterwarnings("ignore:.*flex_attention:UserWarning"),
    pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning"),
]


@settings(max_examples=24, deadline=None)
@given(
    kernel_size=st.sampled_from([3, 5, 7]),
    dilation=st.integers(1, 3),
    margin=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([8, 24, 32]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    with_rpb=st.booleans(),
    seed=st.integers(0, 99),
)
def test_matches_reference(
    kernel_size: int,
    dilation: int,
    margin: tuple[int, int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    with_rpb: bool,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    height, width = (kernel_size * dilation + extra for extra in margin)
    q, k, v = torch.randn(3, 2, height, width, heads, head_dim, generator=random).to(dtype)
    side = 2 * kernel_size - 1
    rpb = torch.randn(heads, side, side, generator=random) if with_rpb else None
    with torch.inference_mode():
        output = neighborhood_attention(q, k, v, rpb, kernel_size, dilation, backend="natten")
    assert_matches_reference(output, q, k, v, rpb, kernel_size, dilation)


@pytest.mark.parametrize(("length", "kernel_size", "dilation"), [(7, 3, 1), (11, 3, 3), (23, 7, 3), (30, 11, 2)])
def test_product_of_the_added_channels_is_the_bias(length: int, kernel_size: int, dilation: int) -> None:
    rpb = torch.randn(1, 2 * kernel_size - 1, 2 * kernel_size - 1)
    from dinat.model.attention.geometry import neighbors
    from dinat.model.attention.reference import window_bias

    queries = query_channels(rpb, length, length, dilation, scale=0.5)[:, :, 0]
    keys = key_channels(length, length, kernel_size, dilation, torch.float32, torch.device("cpu"))[:, :, 0]
    index, _ = neighbors(length, kernel_size, dilation)
    window = keys[index[:, None, :, None], index[None, :, None, :]].flatten(2, 3)
    bias = 0.5 * torch.einsum("yxc,yxnc->yxn", queries, window)
    torch.testing.assert_close(bias, window_bias(rpb, length, length, kernel_size, dilation)[:, :, 0])


def test_bias_is_passed_to_a_natten_that_accepts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """NATTEN 0.17 cannot be built with current PyTorch: na2d is replaced by a function with its signature."""
    biases = []

    def na2d(query, key, value, kernel_size, dilation=1, is_causal=False, rpb=None, scale=None):  # type: ignore[no-untyped-def]
        biases.append(rpb)
        return neighborhood_attention(query, key, value, rpb, kernel_size, dilation, scale, backend="reference")

    monkeypatch.setattr("natten.functional.na2d", na2d)
    natten_backend._accepts_rpb.cache_clear()
    try:
        q, k, v = torch.randn(3, 1, 9, 9, 2, 8).bfloat16()
        rpb = torch.randn(2, 5, 5)
        with torch.inference_mode():
            output = neighborhood_attention(q, k, v, rpb, 3, 2, backend="natten")
            expected = neighborhood_attention(q, k, v, rpb.bfloat16(), 3, 2, backend="reference")
    finally:
        natten_backend._accepts_rpb.cache_clear()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert [bias.dtype for bias in biases] == [torch.bfloat16]


def test_changed_bias_is_detected() -> None:
    q, k, v = torch.randn(3, 1, 9, 9, 2, 8)
    rpb = torch.randn(2, 5, 5)
    for _ in range(2):
        with torch.inference_mode():
            output = neighborhood_attention(q, k, v, rpb, 3, 2, backend="natten")
            expected = neighborhood_attention(q, k, v, rpb, 3, 2, backend="reference")
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
        rpb.mul_(-2)


def test_smallest_supported_head_dim_is_selected() -> None:
    cpu = torch.device("cpu")
    assert select_config(32 + 49, 32, torch.float32, cpu, False) == NattenConfig("flex-fna", 128, 128)
    assert select_config(32, 32, torch.float32, cpu, False) == NattenConfig("flex-fna", 32, 32)


def test_unsupported_arguments_raise_attention_error() -> None:
    q = torch.randn(1, 7, 7, 1, 8, dtype=torch.float64)
    with pytest.raises(AttentionError, match=r"natten has no kernel for torch.float64 heads of 17 channels .* on cpu"):
        neighborhood_attention(q, q, q, torch.zeros(1, 5, 5).double(), 3, backend="natten")
    with pytest.raises(AttentionError, match=r"natten does not support attention dropout, got 0\.5"):
        neighborhood_attention(q, q, q, None, 3, backend="natten", dropout=0.5)


def test_missing_package_ends_in_a_one_line_error() -> None:
    hide = "import sys; sys.modules['natten'] = None; import importlib.util as u; find = u.find_spec\n"
    hide += "u.find_spec = lambda name, *rest: None if name == 'natten' else find(name, *rest)\n"
    command = "from dinat.app.cli import main; sys.exit(main(['serve', '--attention', 'natten', '--port', '0']))"
    done = subprocess.run([sys.executable, "-c", hide + command], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("dinat: ")]
    assert len(lines) == 1
    assert "attention natten requires the package natten: pip install natten, or use attention auto" in lines[0]
