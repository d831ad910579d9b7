"""Compiled kernels for every target that this machine can run, and the fallbacks without a compiler."""

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
from tests.model.native.emulated import TARGETS, Emulated, library_for
from tests.model.reference import assert_matches_reference

pytestmark = pytest.mark.skipif(not native.compiler(), reason="no C compiler")


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[native.Library | Emulated]:
    """The kernels compiled for one target."""
    loaded = library_for(request.param, tmp_path_factory.mktemp("compiled"))
    with pytest.MonkeyPatch.context() as patched:
        for module in (compiled, fast_layers):
            patched.setattr(module, "library", lambda: loaded)
        yield loaded


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], int, int]:
    kernel_size, dilation = draw(st.sampled_from([3, 5, 7, 11, 13])), draw(st.integers(1, 4))
    window = kernel_size * dilation
    height, width = draw(st.integers(window, window + 12)), draw(st.integers(window, window + 12))
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    qkv = torch.randn(batch, height, width, 3, heads, 32)
    inputs = list(qkv.unbind(3) if draw(st.booleans()) else (x.contiguous() for x in qkv.unbind(3)))
    return [*inputs, torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1)], kernel_size, dilation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(deadline=None, max_examples=15)
@given(problem=problems())
def test_attention_matches_reference(
    library: native.Library | Emulated, dtype: torch.dtype, problem: tuple[list[Tensor], int, int]
) -> None:
    inputs, kernel_size, dilation = problem
    q, k, v, rpb = (x.to(dtype) for x in inputs)
    with torch.no_grad():
        output = neighborhood_attention(q, k, v, rpb, kernel_size, dilation, backend="compiled")
    assert output.dtype == dtype
    assert_matches_reference(output, q, k, v, rpb, kernel_size, dilation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("side", "heads", "dilation"), [(56, 2, 1), (56, 2, 8), (28, 4, 4), (14, 8, 2), (7, 16, 1)])
def test_attention_of_mini_matches_reference(
    library: native.Library | Emulated, dtype: torch.dtype, side: int, heads: int, dilation: int
) -> None:
    q, k, v = torch.randn(2, side, side, 3, heads, 32).to(dtype).unbind(3)
    rpb = torch.randn(heads, 13, 13).to(dtype)
    with torch.no_grad():
        output = neighborhood_attention(q, k, v, rpb, 7, dilation, backend="compiled")
        without_bias = neighborhood_attention(q, k, v, None, 7, dilation, scale=0.3, backend="compiled")
    assert_matches_reference(output, q, k, v, rpb, 7, dilation)
    assert_matches_reference(without_bias, q, k, v, None, 7, dilation, scale=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_may_be_aligned_to_one_element(library: native.Library | Emulated, dtype: torch.dtype) -> None:
    """Vectors and pairs of channels are loaded from any address; the sanitizers report a load that requires an alignment."""
    values = torch.randn(1 + 9 * 9 * 3 * 2 * 32).to(dtype)
    q, k, v = values[1:].view(1, 9, 9, 3, 2, 32).unbind(3)
    assert q.data_ptr() % 8 == values.itemsize
    with torch.no_grad():
        output = neighborhood_attention(q, k, v, kernel_size=3, backend="compiled")
        aligned = neighborhood_attention(*(x.clone() for x in (q, k, v)), kernel_size=3, backend="compiled")
    assert torch.equal(output, aligned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow_and_nan_and_inf_propagate(library: native.Library | Emulated, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 9, 9, 1, 32).to(dtype) for _ in range(3))
    with torch.no_grad():
        output = neighborhood_attention(q * 30, k * 30, v, kernel_size=3, backend="compiled")
        assert torch.isfinite(output).all()
        expected = neighborhood_attention((q * 30).double(), (k * 30).double(), v.double(), kernel_size=3, backend="reference")
        torch.testing.assert_close(output.double(), expected, rtol=0.02, atol=0.05)
        for index, value in ((0, math.nan), (1, math.nan), (2, math.nan), (2, math.inf)):
            inputs = [x.clone() for x in (q, k, v)]
            inputs[index][0, 0, 0, 0, 5] = value
            output = neighborhood_attention(*inputs, kernel_size=3, backend="compiled")
            assert not torch.isfinite(output[0, 0, 0]).all()
            assert torch.isfinite(output[0, 4:, 4:]).all()


def test_gradients_match_reference(library: native.Library | Emulated) -> None:
    gradients = {}
    torch.manual_seed(0)
    inputs = [*(torch.randn(2, 15, 14, 2, 32) for _ in range(3)), torch.randn(2, 13, 13)]
    for backend in ("compiled", "reference"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        neighborhood_attention(*leaves, kernel_size=7, dilation=2, backend=backend).square().sum().backward()
        gradients[backend] = [leaf.grad for leaf in leaves]
    for gradient, expected in zip(gradients["compiled"], gradients["reference"], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_number_of_threads_does_not_change_the_output(library: native.Library | Emulated) -> None:
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
def test_kernels_and_onednn_can_alternate(library: native.Library | Emulated, dtype: torch.dtype) -> None:
    """Both use AMX, so each must restore the tile configuration."""
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
def test_layer_norm_matches_pytorch(library: native.Library | Emulated, dtype: torch.dtype, channels: int) -> None:
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
            output = norm(x)
        assert not calls
        assert (output.double() - exact).abs().max() <= (2e-6 if dtype == torch.float32 else 4e-3) * exact.abs().max()
        x[1, 2, 3, 4] = math.nan
        broken = norm(x)
    assert torch.isnan(broken[1, 2, 3]).all()
    assert torch.isfinite(broken[0]).all()


def test_layer_norm_falls_back_to_pytorch(library: native.Library | Emulated) -> None:
    twenty_channels, double = LayerNorm(20), LayerNorm(32).double()
    with torch.no_grad():
        for norm, x in ((twenty_channels, torch.randn(3, 20)), (double, torch.randn(3, 32).double())):
            expected = torch.nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias)
            torch.testing.assert_close(norm(x), expected)
    norm = LayerNorm(32)
    norm(torch.randn(4, 32)).square().sum().backward()
    assert norm.weight.grad is not None
    assert norm.weight.grad.abs().sum() > 0


def test_auto_uses_compiled_only_for_inference() -> None:
    assert native.library() is not None
    calls = []
    q, k, v = torch.randn(1, 9, 9, 3, 1, 32).unbind(3)

    def record_call(*arguments: object) -> Tensor:
        calls.append(arguments)
        return q

    from dinat.model import attention

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(attention.BACKENDS, "compiled", record_call)
        with torch.no_grad():
            neighborhood_attention(q, k, v, kernel_size=3)
            assert len(calls) == 1
            neighborhood_attention(q.double(), k.double(), v.double(), kernel_size=3)
            neighborhood_attention(*(x[..., :16] for x in (q, k, v)), kernel_size=3)
        neighborhood_attention(q.clone().requires_grad_(), k, v, kernel_size=3)
        assert len(calls) == 1


def test_unsupported_arguments_raise_attention_error() -> None:
    q = torch.randn(1, 9, 9, 1, 16)
    with torch.no_grad():
        with pytest.raises(AttentionError, match=r"head_dim 32; got Tensor on cpu, torch\.float32, head_dim 16"):
            neighborhood_attention(q, q, q, kernel_size=3, backend="compiled")
        q = torch.randn(1, 17, 17, 1, 32)
        with pytest.raises(AttentionError, match="does not support kernel_size 17"):
            neighborhood_attention(q, q, q, kernel_size=17, backend="compiled")
        with pytest.raises(AttentionError, match="dropout"):
            neighborhood_attention(q, q, q, kernel_size=3, dropout=0.5, backend="compiled")


SCRIPT = """
import torch
from dinat.model import native
from dinat.model.attention import neighborhood_attention
from dinat.model.native import library, unavailable_reason
q = torch.ones(1, 9, 9, 1, 32)
with torch.no_grad():
    print(neighborhood_attention(q, q, q, kernel_size=3).sum().item() == q.sum().item())
print(library() is not None, unavailable_reason())
"""


def run(cache: Path, **environment: str) -> list[str]:
    folders = {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(cache)}  # both may have the library of another process
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **folders, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.slow
def test_library_is_compiled_once_and_cached(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\necho call >> {tmp_path / "calls"}\nexec {shlex.join(native.compiler())} "$@"\n')
    compiler.chmod(0o755)
    for _ in range(2):
        assert run(tmp_path, CC=f"{compiler} -g") == ["True", "True "]
    assert (tmp_path / "calls").read_text().split() == ["call"]
    (cached,) = (tmp_path / "dinat-serve" / "kernels").iterdir()
    whole = cached.read_bytes()
    for number, damaged in enumerate((b"no library", whole[: len(whole) // 2], whole[:-1], b""), 2):  # as after a crash
        cached.write_bytes(damaged)
        assert run(tmp_path, CC=str(compiler)) == ["True", "True "]
        assert (tmp_path / "calls").read_text().split() == ["call"] * number
        assert cached.read_bytes()[-32:] != damaged[-32:]


@pytest.mark.slow
def test_tiled_is_used_without_a_working_compiler(tmp_path: Path) -> None:
    assert run(tmp_path, CC="no-such-compiler") == ["True", "False no C compiler: install gcc or clang"]
    assert run(tmp_path, CC=str(shutil.which("false"))) == ["True", "False the C compiler fails"]


def test_empty_xdg_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native.cache_folder() == tmp_path / ".cache" / "dinat-serve" / "kernels"
    assert default_cache() == tmp_path / ".cache" / "dinat-serve"


@pytest.mark.slow
def test_cache_that_cannot_be_written_is_replaced_by_a_private_folder(tmp_path: Path) -> None:
    (tmp_path / "dinat-serve").write_text("a file where the folder should be")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    assert run(tmp_path, TMPDIR=str(temporary)) == ["True", "True "]
    (private,) = temporary.iterdir()
    assert private.stat().st_mode & 0o777 == 0o700
    (library,) = (private / "kernels").iterdir()
    assert run(tmp_path, TMPDIR=str(temporary), CC="no-such-compiler") == ["True", "True "]
    private.chmod(0o777)  # anyone could have written into it
    _, reason = run(tmp_path, TMPDIR=str(temporary), CC="no-such-compiler")
    assert reason.startswith("False [Errno 20] Not a directory: ")
    assert "no C compiler: install gcc or clang" in reason
    assert [path.name for path in library.parent.iterdir()] == [library.name]


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or shutil.which("mount") is None, reason="mounting requires root")
@pytest.mark.parametrize("options", ["size=16k", "noexec"])
def test_cache_that_is_full_or_must_not_contain_programs(options: str, tmp_path: Path) -> None:
    temporary, cache = tmp_path / "tmp", tmp_path / "cache"
    temporary.mkdir()
    cache.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(cache)], check=False).returncode:
        pytest.skip("this system cannot mount a tmpfs")
    try:
        assert run(cache, TMPDIR=str(temporary)) == ["True", "True "]
        assert run(cache, TMPDIR=str(temporary), CC="no-such-compiler") == ["True", "True "]  # in the private folder
        assert not [path for path in cache.rglob("tmp*") if path.is_file()]
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert default_cache() == tmp_path / f"dinat-serve-{os.getuid()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_network_matches_the_network(dtype: torch.dtype) -> None:
    config = DinatConfig(embed_dim=32, depths=[2, 2], num_heads=[1, 2], kernel_size=3, dilations=[[1, 4], [1, 2]], num_labels=7)
    pixels = torch.randn(3, 3, 64, 48).to(dtype)
    network = random_network(config).to(dtype)
    with torch.inference_mode():
        expected = network(pixels).logits
        logits = pack(network)(pixels).logits
    if dtype == torch.float32:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
    else:  # the kernel for whole layers rounds at other places
        assert (logits - expected).norm() <= 0.02 * expected.norm()


def test_packed_network_in_bf16_matches_float32() -> None:
    torch.manual_seed(0)
    network = DinatForImageClassification(DinatConfig.preset("mini")).eval()
    pixels = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        exact = network(pixels).logits
        half = pack(network.bfloat16())(pixels.bfloat16()).logits.float()
    assert (half - exact).norm() <= 0.02 * exact.norm()
