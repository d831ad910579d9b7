"""The fused kernel without a GPU: run by Triton's interpreter against the definition, and compiled for the cards it is for."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinat.model import AttentionError
from dinat.model.attention import neighborhood_attention

pytest.importorskip("triton", reason="triton is not installed")

from dinat.model.attention import triton_kernel
from dinat.model.attention.triton_kernel import FLOAT_CUTS, HALF_CUTS, Cut, fused_attention, launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernel itself")
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""Of the norm of what the definition gives in float64."""


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@settings(max_examples=25, deadline=None)
@given(
    kernel_size=st.sampled_from([3, 5, 7, 9, 11, 13]),
    dilation=st.integers(1, 4),
    spare=st.tuples(st.integers(0, 11), st.integers(0, 11)),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 24, 32, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    with_rpb=st.booleans(),
    cut=st.sampled_from([*HALF_CUTS, *FLOAT_CUTS, Cut(16, 4, 32, 4, 1), Cut(5, 3, 16, 1, 1)]),
    seed=st.integers(0, 99),
)
def test_equals_the_definition(
    kernel_size: int,
    dilation: int,
    spare: tuple[int, int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    with_rpb: bool,
    cut: Cut,
    seed: int,
) -> None:
    dilation = min(dilation, 28 // kernel_size)  # the interpreter is slow
    random = torch.Generator().manual_seed(seed)
    height, width = (kernel_size * dilation + more for more in spare)
    qkv = torch.randn(1, height, width, 3, heads, head_dim, generator=random).to(dtype)
    q, k, v = qkv.unbind(3)
    side = 2 * kernel_size - 1
    rpb = torch.randn(heads, side, side, generator=random) if with_rpb else None
    got = launch(q, k, v, rpb, kernel_size, dilation, head_dim**-0.5, cut)
    exact = [None if x is None else x.double() for x in (q, k, v, rpb)]
    expected = neighborhood_attention(*exact, kernel_size, dilation, backend="reference")
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert error(got, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("layout", ["heads first", "sliced", "channels apart"])
def test_any_strides_are_read(layout: str) -> None:
    if layout == "heads first":
        q, k, v = torch.randn(3, 2, 2, 9, 11, 16).permute(0, 1, 3, 4, 2, 5)
    elif layout == "sliced":
        q, k, v = torch.randn(3, 4, 20, 13, 5, 16)[:, ::2, 1:19:2, 2:, 1:3]
    else:
        q, k, v = torch.randn(3, 2, 9, 11, 16, 2).transpose(-1, -2)
    got = neighborhood_attention(q, k, v, torch.ones(2, 5, 5), 3, 2, backend="triton")
    expected = neighborhood_attention(q, k, v, torch.ones(2, 5, 5), 3, 2, backend="reference")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_definition() -> None:
    inputs = [torch.randn(1, 7, 8, 2, 16, requires_grad=True) for _ in range(3)]
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    weights = torch.randn(1, 7, 8, 2, 16)
    found = []
    for backend in ("triton", "reference"):
        output = neighborhood_attention(*inputs, rpb, 3, 2, backend=backend)
        found.append(torch.autograd.grad((output * weights).sum(), [*inputs, rpb]))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_the_operator_is_well_formed() -> None:
    q, k, v = (torch.randn(1, 5, 6, 1, 16, requires_grad=True) for _ in range(3))
    torch.library.opcheck(fused_attention, (q, k, v, torch.randn(1, 5, 5), 3, 1, 0.25))


@pytest.mark.parametrize(
    ("q", "dropout", "message"),
    [
        (torch.randn(1, 7, 7, 1, 16).double(), 0.0, "computes in float16, bfloat16 or float32, got torch.float64"),
        (torch.randn(1, 7, 7, 1, 4), 0.0, "takes a head_dim of 8 to 128, got 4"),
        (torch.randn(1, 7, 7, 1, 256), 0.0, "takes a head_dim of 8 to 128, got 256"),
        (torch.randn(1, 7, 7, 1, 16), 0.1, "has no dropout, asked for 0.1"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(q: torch.Tensor, dropout: float, message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        neighborhood_attention(q, q, q, None, 3, backend="triton", dropout=dropout)


def test_off_a_gpu_the_kernel_says_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "INTERPRETED", False)
    q = torch.randn(1, 7, 7, 1, 16)
    with pytest.raises(AttentionError, match="the triton kernel runs on a CUDA device, q is on cpu: take attention tiled"):
        neighborhood_attention(q, q, q, None, 3, backend="triton")


LIMITS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a program may take, by compute capability."""


ONE_BY_ONE = pytest.mark.skipif("DINAT_REHEARSAL" not in os.environ, reason="DINAT_REHEARSAL is not set (make rehearsal)")
"""A minute and a half for all; most of what the compiler does is the same for each."""


@pytest.mark.parametrize("capability", [one if one in (80, 120) else pytest.param(one, marks=ONE_BY_ONE) for one in LIMITS])
def test_no_cut_spills_or_asks_for_too_much_on_the_cards_it_is_for(
    capability: int, record_property: Callable[[str, object], None]
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernel_resources", str(capability)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=110, env=environment, cwd=Path(__file__).parents[3], check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["cut"] for row in rows} == {str(cut) for cut in (*HALF_CUTS, *FLOAT_CUTS)}
    for row in rows:
        record_property(f"sm_{capability} {row['dtype']} {row['cut']} {row['layer']}", json.dumps(row))
        assert row["spilled"] == 0, row
        assert 0 < row["registers"] <= 255, row
        assert 0 < row["shared"] <= LIMITS[capability] * 1024, row
        # Of a pair, for half precision and float32: what the kernel without a plan took, on sm_90, was 280 and 723.
        assert row["instructions/pair"] < (100 if row["dtype"] == "bf16" else 300), row
