"""The Triton kernel without a GPU: run by Triton's interpreter against the reference, and compiled for supported GPUs."""

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinat.model import AttentionError
from dinat.model.attention import neighborhood_attention

pytest.importorskip("triton", reason="triton is not installed")

from dinat.model.attention import triton_kernel
from dinat.model.attention.triton_kernel import FLOAT_CONFIGS, HALF_CONFIGS, TileConfig, fused_attention, launch, tile_configs

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernel itself")]
MAP_NORESERVE = 0x4000
"""Of Linux; the module mmap of Python 3.11 lacks it."""
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""Relative to the norm of the float64 reference."""


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output.double() - expected).norm() / expected.norm())


PROBLEMS = given(
    kernel_size=st.sampled_from([3, 5, 7, 9, 11, 13]),
    dilation=st.integers(1, 4),
    margin=st.tuples(st.integers(0, 11), st.integers(0, 11)),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 24, 32, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    with_rpb=st.booleans(),
    config=st.sampled_from([*HALF_CONFIGS, *FLOAT_CONFIGS, TileConfig(16, 4, 32, 4, 1), TileConfig(5, 3, 16, 1, 1)]),
    seed=st.integers(0, 99),
)


@settings(max_examples=4, deadline=None)
@PROBLEMS
def test_matches_reference(**problem: Any) -> None:
    assert_matches_reference(**problem)


@pytest.mark.slow
@pytest.mark.timeout(300)
@settings(max_examples=25, deadline=None)
@PROBLEMS
def test_many_problems_match_reference(**problem: Any) -> None:
    assert_matches_reference(**problem)


def assert_matches_reference(
    kernel_size: int,
    dilation: int,
    margin: tuple[int, int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    with_rpb: bool,
    config: TileConfig,
    seed: int,
) -> None:
    dilation = min(dilation, 28 // kernel_size)  # the interpreter is slow
    random = torch.Generator().manual_seed(seed)
    height, width = (kernel_size * dilation + extra for extra in margin)
    qkv = torch.randn(1, height, width, 3, heads, head_dim, generator=random).to(dtype)
    q, k, v = qkv.unbind(3)
    side = 2 * kernel_size - 1
    rpb = torch.randn(heads, side, side, generator=random) if with_rpb else None
    output = launch(q, k, v, rpb, kernel_size, dilation, head_dim**-0.5, config)
    exact = [None if x is None else x.double() for x in (q, k, v, rpb)]
    expected = neighborhood_attention(*exact, kernel_size, dilation, backend="reference")
    assert output.dtype == dtype
    assert output.is_contiguous()
    assert relative_error(output, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("layout", ["heads first", "sliced", "channels apart"])
def test_any_strides_are_supported(layout: str) -> None:
    if layout == "heads first":
        q, k, v = torch.randn(3, 2, 2, 9, 11, 16).permute(0, 1, 3, 4, 2, 5)
    elif layout == "sliced":
        q, k, v = torch.randn(3, 4, 20, 13, 5, 16)[:, ::2, 1:19:2, 2:, 1:3]
    else:
        q, k, v = torch.randn(3, 2, 9, 11, 16, 2).transpose(-1, -2)
    output = neighborhood_attention(q, k, v, torch.ones(2, 5, 5), 3, 2, backend="triton")
    expected = neighborhood_attention(q, k, v, torch.ones(2, 5, 5), 3, 2, backend="reference")
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_any_number_of_images_fits_into_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA limits the first axis to 2**31 - 1 programs, the others to 65,535."""
    grids: list[tuple[int, ...]] = []

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(triton_kernel, "attend", Spy())
    q = torch.zeros(1, 9, 3, 2, 8, dtype=torch.float16).expand(65536, -1, -1, -1, -1)
    launch(q, q, q, None, 3, 1, 1.0)
    tiles = len(triton_kernel.tables(9, 3, 3, 1, HALF_CONFIGS[0], q.device).queries)
    assert tiles > 1
    assert grids == [(tiles * 2 * 65536, 1, 1)]


def test_offsets_may_exceed_32_bits() -> None:
    """The last key is 2**31 elements after the first one. As a negative offset it would be in this memory too."""
    memory = mmap.mmap(
        -1, 2**33 + 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    )  # only what is used is allocated
    halves = torch.frombuffer(memory, dtype=torch.float16)
    qkv = halves.as_strided((1, 3, 3, 1, 16), (0, 3 * 2**28, 2**28, 16, 1), 2**31)
    small = torch.randn(1, 3, 3, 1, 16).half()
    qkv.copy_(small)
    output = launch(qkv, qkv, qkv, None, 3, 1, 0.25)
    assert relative_error(output, neighborhood_attention(*[small.double()] * 3, None, 3, 1, 0.25, "reference")) < 1e-2


def test_gradients_match_reference() -> None:
    inputs = [torch.randn(1, 7, 8, 2, 16, requires_grad=True) for _ in range(3)]
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    weights = torch.randn(1, 7, 8, 2, 16)
    gradients = []
    for backend in ("triton", "reference"):
        output = neighborhood_attention(*inputs, rpb, 3, 2, backend=backend)
        gradients.append(torch.autograd.grad((output * weights).sum(), [*inputs, rpb]))
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # PyTorch 2.14, for any operator
def test_operator_passes_opcheck() -> None:
    q, k, v = (torch.randn(1, 5, 6, 1, 16, requires_grad=True) for _ in range(3))
    torch.library.opcheck(fused_attention, (q, k, v, torch.randn(1, 5, 5), 3, 1, 0.25))


@pytest.mark.parametrize(
    ("q", "dropout", "message"),
    [
        (torch.randn(1, 7, 7, 1, 16).double(), 0.0, "supports float16, bfloat16 and float32, got torch.float64"),
        (torch.randn(1, 7, 7, 1, 4), 0.0, "supports head_dim 8 to 128, got 4"),
        (torch.randn(1, 7, 7, 1, 256), 0.0, "supports head_dim 8 to 128, got 256"),
        (torch.randn(1, 7, 7, 1, 16), 0.1, "does not support dropout, got 0.1"),
    ],
)
def test_unsupported_arguments_raise_attention_error(q: torch.Tensor, dropout: float, message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        neighborhood_attention(q, q, q, None, 3, backend="triton", dropout=dropout)


def test_cpu_tensors_raise_attention_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "INTERPRETED", False)
    q = torch.randn(1, 7, 7, 1, 16)
    with pytest.raises(AttentionError, match="attention triton requires a CUDA device, q is on cpu: use attention tiled"):
        neighborhood_attention(q, q, q, None, 3, backend="triton")


LIMITS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory available to a program, by compute capability."""


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize("capability", LIMITS)
def test_every_config_uses_tensor_cores_spills_nothing_and_fits(
    capability: int, record_property: Callable[[str, object], None]
) -> None:
    rows = compiled(str(capability), "--kernels", "attention")
    expected = {(config, head_dim) for head_dim in (32, 64, 128) for config in every_config(head_dim)}
    assert {(row["cut"], row["head_dim"]) for row in rows} == expected
    for row in rows:
        name = f"sm_{capability} {row['dtype']} {row['head_dim']} {row['cut']} {row['layer']}"
        record_property(name, json.dumps(row))
        # float32 is multiplied by tensor cores only if it is split into three TF32 products.
        assert (row["tensor core"] > 0) == (row["dtype"] == "bf16" or "tf32x3" in row["cut"]), row
        assert_fits(row, capability)
        # An earlier kernel without a tile plan needed 280 (half precision) and 723 (float32) instructions per pair on sm_90.
        if row["head_dim"] == 32:
            assert row["instructions/pair"] < (110 if row["dtype"] == "bf16" else 300), row


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_no_config_uses_the_tensor_cores_of_sm_75() -> None:
    """The reason why these GPUs have no Triton candidates."""
    rows = [row for row in compiled("75", "--dtypes", "fp16", "--kernels", "attention") if row["head_dim"] == 32]
    assert {row["cut"] for row in rows} == {str(config) for config in HALF_CONFIGS}
    assert all(row["tensor core"] == 0 for row in rows), rows
    assert any(row["spilled"] > 0 for row in rows), rows


def assert_fits(row: dict[str, Any], capability: int) -> None:
    """Assert that a compiled kernel spills no registers and fits a GPU."""
    assert row["spilled"] == 0, row
    assert 0 < row["registers"] <= 255, row
    assert 0 < row["shared"] <= LIMITS[capability] * 1024, row


def every_config(head_dim: int) -> set[str]:
    return {str(config) for dtype in (torch.bfloat16, torch.float32) for config in tile_configs(dtype, head_dim)}


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """Run benchmarks.kernel_resources in a process in which Triton compiles, and return its rows."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, folder = [sys.executable, "-m", "benchmarks.kernel_resources", *arguments], Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
