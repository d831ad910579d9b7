"""Attention compiled for the processor: every kind that this machine can run, and what is done where nothing can be."""

import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dinat.model import DinatConfig, DinatForImageClassification, native
from dinat.model.attention import compiled, neighborhood_attention
from dinat.model.cpu import fast_layers
from dinat.model.cpu.fast_layers import LayerNorm
from dinat.model.cpu.packing import pack
from dinat.model.errors import AttentionError
from dinat.model.native import default_cache
from tests.model.checkpoints.originals import random_network
from tests.model.definition import assert_equals_the_definition
from tests.model.native.emulated import KINDS, Emulated, library_for

pytestmark = pytest.mark.skipif(not native.compiler(), reason="no C compiler")


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[native.Library | Emulated]:
    """The source as it is compiled for one of the kinds of processor that this one is, or for one that is emulated."""
    loaded = library_for(request.param, tmp_path_factory.mktemp("compiled"))
    with pytest.MonkeyPatch.context() as patched:
        for module in (compiled, fast_layers):
            patched.setattr(module, "library", lambda: loaded)
        yield loaded


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], int, int]:
    kernel_size, dilation = draw(st.sampled_from([3, 5, 7, 11, 13])), draw(st.integers(1, 4))
    least = kernel_size * dilation
    height, width = draw(st.integers(least, least + 12)), draw(st.integers(least, least + 12))
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    qkv = torch.randn(batch, height, width, 3, heads, 32)
    maps = list(qkv.unbind(3) if draw(st.booleans()) else (x.contiguous() for x in qkv.unbind(3)))
    return [*maps, torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1)], kernel_size, dilation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(deadline=None, max_examples=15)
@given(problem=problems())
def test_it_equals_the_definition(
    library: native.Library | Emulated, dtype: torch.dtype, problem: tuple[list[Tensor], int, int]
) -> None:
    inputs, kernel_size, dilation = problem
    q, k, v, rpb = (x.to(dtype) for x in inputs)
    with torch.no_grad():
        got = neighborhood_attention(q, k, v, rpb, kernel_size, dilation, backend="compiled")
    assert got.dtype == dtype
    assert_equals_the_definition(got, q, k, v, rpb, kernel_size, dilation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("side", "heads", "dilation"), [(56, 2, 1), (56, 2, 8), (28, 4, 4), (14, 8, 2), (7, 16, 1)])
def test_layers_of_mini_equal_the_definition(
    library: native.Library | Emulated, dtype: torch.dtype, side: int, heads: int, dilation: int
) -> None:
    q, k, v = torch.randn(2, side, side, 3, heads, 32).to(dtype).unbind(3)
    rpb = torch.randn(heads, 13, 13).to(dtype)
    with torch.no_grad():
        got = neighborhood_attention(q, k, v, rpb, 7, dilation, backend="compiled")
        without = neighborhood_attention(q, k, v, None, 7, dilation, scale=0.3, backend="compiled")
    assert_equals_the_definition(got, q, k, v, rpb, 7, dilation)
    assert_equals_the_definition(without, q, k, v, None, 7, dilation, scale=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow_and_nan_and_infinity_are_not_hidden(
    library: native.Library | Emulated, dtype: torch.dtype
) -> None:
    q, k, v = (torch.randn(1, 9, 9, 1, 32).to(dtype) for _ in range(3))
    with torch.no_grad():
        large = neighborhood_attention(q * 30, k * 30, v, kernel_size=3, backend="compiled")
        assert torch.isfinite(large).all()
        best = neighborhood_attention((q * 30).double(), (k * 30).double(), v.double(), kernel_size=3, backend="reference")
        torch.testing.assert_close(large.double(), best, rtol=0.02, atol=0.05)
        for hurt, broken in ((0, math.nan), (1, math.nan), (2, math.nan), (2, math.inf)):
            maps = [x.clone() for x in (q, k, v)]
            maps[hurt][0, 0, 0, 0, 5] = broken
            got = neighborhood_attention(*maps, kernel_size=3, backend="compiled")
            assert not torch.isfinite(got[0, 0, 0]).all()
            assert torch.isfinite(got[0, 4:, 4:]).all()


def test_gradients_are_those_of_the_definition(library: native.Library | Emulated) -> None:
    gradients = {}
    torch.manual_seed(0)
    inputs = [*(torch.randn(2, 15, 14, 2, 32) for _ in range(3)), torch.randn(2, 13, 13)]
    for backend in ("compiled", "reference"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        neighborhood_attention(*leaves, kernel_size=7, dilation=2, backend=backend).square().sum().backward()
        gradients[backend] = [leaf.grad for leaf in leaves]
    for got, expected in zip(gradients["compiled"], gradients["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_it_uses_as_many_threads_as_pytorch_and_each_gives_the_same(library: native.Library | Emulated) -> None:
    q, k, v = torch.randn(3, 28, 28, 3, 4, 32).unbind(3)
    before = torch.get_num_threads()
    results = []
    with torch.no_grad():
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(neighborhood_attention(q, k, v, kernel_size=7, dilation=4, backend="compiled"))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_oneDNNs_products_go_on_beside_it(library: native.Library | Emulated, dtype: torch.dtype) -> None:
    """Both have the matrix units: what one leaves in them must not be what the other finds."""
    torch.manual_seed(0)
    x, weight = torch.randn(640, 96).to(dtype), torch.randn(96, 96).to(dtype)
    q, k, v = torch.randn(1, 28, 28, 3, 4, 32).to(dtype).unbind(3)
    with torch.no_grad():
        product, attended = x @ weight, neighborhood_attention(q, k, v, kernel_size=7, backend="compiled")
        for _ in range(20):
            assert torch.equal(x @ weight, product)
            assert torch.equal(neighborhood_attention(q, k, v, kernel_size=7, backend="compiled"), attended)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [16, 64, 192, 512, 1536, 8192])
def test_layer_norm_is_pytorchs(library: native.Library | Emulated, dtype: torch.dtype, channels: int) -> None:
    torch.manual_seed(0)
    norm = LayerNorm(channels, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        x = (torch.randn(3, 5, 7, channels) * 4 + 2).to(dtype)
        exact = torch.nn.functional.layer_norm(x.double(), (channels,), norm.weight.double(), norm.bias.double(), 1e-5)
        calls = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch.nn.LayerNorm, "forward", lambda *_: calls.append(1))
            got = norm(x)
        assert not calls
        assert (got.double() - exact).abs().max() <= (2e-6 if dtype == torch.float32 else 4e-3) * exact.abs().max()
        x[1, 2, 3, 4] = math.nan
        broken = norm(x)
    assert torch.isnan(broken[1, 2, 3]).all()
    assert torch.isfinite(broken[0]).all()


def test_layer_norm_leaves_to_pytorch_what_it_does_not_do(library: native.Library | Emulated) -> None:
    odd, double = LayerNorm(20), LayerNorm(32).double()
    with torch.no_grad():
        for norm, x in ((odd, torch.randn(3, 20)), (double, torch.randn(3, 32).double())):
            expected = torch.nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias)
            torch.testing.assert_close(norm(x), expected)
    trained = LayerNorm(32)
    trained(torch.randn(4, 32)).square().sum().backward()
    assert trained.weight.grad is not None
    assert trained.weight.grad.abs().sum() > 0


def test_auto_takes_it_for_inference_alone() -> None:
    assert native.library() is not None
    calls = []
    q, k, v = torch.randn(1, 9, 9, 3, 1, 32).unbind(3)

    def seen(*arguments: object) -> Tensor:
        calls.append(arguments)
        return q

    from dinat.model import attention

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(attention.BACKENDS, "compiled", seen)
        with torch.no_grad():
            neighborhood_attention(q, k, v, kernel_size=3)
            assert len(calls) == 1
            neighborhood_attention(q.double(), k.double(), v.double(), kernel_size=3)
            neighborhood_attention(*(x[..., :16] for x in (q, k, v)), kernel_size=3)
        neighborhood_attention(q.clone().requires_grad_(), k, v, kernel_size=3)
        assert len(calls) == 1


def test_what_it_does_not_compute_is_refused() -> None:
    q = torch.randn(1, 9, 9, 1, 16)
    with torch.no_grad():
        with pytest.raises(AttentionError, match=r"heads of 32; got cpu, torch\.float32, 16"):
            neighborhood_attention(q, q, q, kernel_size=3, backend="compiled")
        wide = torch.randn(1, 17, 17, 1, 32)
        with pytest.raises(AttentionError, match="no kernel of 17"):
            neighborhood_attention(wide, wide, wide, kernel_size=17, backend="compiled")
        with pytest.raises(AttentionError, match="dropout"):
            neighborhood_attention(wide, wide, wide, kernel_size=3, dropout=0.5, backend="compiled")


SCRIPT = """
import torch
from dinat.model import native
from dinat.model.attention import neighborhood_attention
from dinat.model.native import library, missing
q = torch.ones(1, 9, 9, 1, 32)
with torch.no_grad():
    print(neighborhood_attention(q, q, q, kernel_size=3).sum().item() == q.sum().item())
print(library() is not None, missing())
"""


def run(cache: Path, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_it_is_compiled_once_and_kept(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\necho once >> {tmp_path / "calls"}\nexec {shlex.join(native.compiler())} "$@"\n')
    compiler.chmod(0o755)
    for _ in range(2):
        assert run(tmp_path, CC=f"{compiler} -g") == ["True", "True "]
    assert (tmp_path / "calls").read_text().split() == ["once"]
    (kept,) = (tmp_path / "dinat-serve" / "kernels").iterdir()
    kept.write_bytes(b"no library")  # as a full disk leaves it
    assert run(tmp_path, CC=str(compiler)) == ["True", "True "]
    assert (tmp_path / "calls").read_text().split() == ["once"] * 2


def test_without_a_compiler_or_with_one_that_fails_tiles_take_its_place(tmp_path: Path) -> None:
    assert run(tmp_path, CC="no-such-compiler") == ["True", "False no C compiler: install gcc or clang"]
    assert run(tmp_path, CC=str(shutil.which("false"))) == ["True", "False the C compiler fails"]


def test_an_empty_variable_names_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native.cache_folder() == tmp_path / ".cache" / "dinat-serve" / "kernels"
    assert default_cache() == tmp_path / ".cache" / "dinat-serve"


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "dinat-serve").write_text("a file where the folder should be")
    assert run(tmp_path) == ["True", "True "]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_network_says_the_same(dtype: torch.dtype) -> None:
    config = DinatConfig(embed_dim=32, depths=[2, 2], num_heads=[1, 2], kernel_size=3, dilations=[[1, 4], [1, 2]], num_labels=7)
    pixels = torch.randn(3, 3, 64, 48).to(dtype)
    network = random_network(config).to(dtype)
    with torch.inference_mode():
        expected = network(pixels).logits
        got = pack(network)(pixels).logits
    if dtype == torch.float32:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    else:  # whole layers are another kernel there, which rounds in other places
        assert (got - expected).norm() <= 0.02 * expected.norm()


def test_a_network_in_bf16_is_as_close_as_its_precision() -> None:
    torch.manual_seed(0)
    network = DinatForImageClassification(DinatConfig.preset("mini")).eval()
    pixels = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        exact = network(pixels).logits
        half = pack(network.bfloat16())(pixels.bfloat16()).logits.float()
    assert (half - exact).norm() <= 0.02 * exact.norm()
