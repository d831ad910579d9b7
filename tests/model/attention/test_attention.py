import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dinat.model.attention import bias_cache, neighborhood_attention, neighborhood_attention_with_weights, tiled
from dinat.model.errors import AttentionError
from tests.model.reference import assert_matches_reference


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], int, int]:
    """q, k, v and rpb of a feature map at least as large as its windows, a kernel_size and a dilation."""
    kernel_size, dilation = draw(st.sampled_from([3, 5, 7, 11, 13])), draw(st.integers(1, 4))
    window = kernel_size * dilation
    height, width = draw(st.integers(window, window + 20)), draw(st.integers(window, window + 20))
    batch, heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([4, 16, 32]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    qkv = [torch.randn(batch, height, width, heads, head_dim) for _ in range(3)]
    return [*qkv, torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1)], kernel_size, dilation


@settings(deadline=None, max_examples=60)
@given(problems())
def test_tiled_matches_reference(problem: tuple[list[Tensor], int, int]) -> None:
    inputs, kernel_size, dilation = problem
    with torch.no_grad():
        output = neighborhood_attention(*inputs, kernel_size, dilation, backend="tiled")
        expected = neighborhood_attention(*inputs, kernel_size, dilation, backend="reference")
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@settings(deadline=None, max_examples=20)
@given(problem=problems())
def test_tiled_in_half_precision_matches_reference(dtype: torch.dtype, problem: tuple[list[Tensor], int, int]) -> None:
    inputs, kernel_size, dilation = problem
    half = [x.to(dtype) for x in inputs]
    with torch.no_grad():
        output = neighborhood_attention(*half, kernel_size, dilation, backend="tiled")
    q, k, v, rpb = half
    assert_matches_reference(output, q, k, v, rpb, kernel_size, dilation)


@settings(deadline=None, max_examples=20)
@given(problems())
def test_gradients_of_tiled_match_reference(problem: tuple[list[Tensor], int, int]) -> None:
    inputs, kernel_size, dilation = problem
    gradients = {}
    for backend in ("tiled", "reference"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = neighborhood_attention(*leaves, kernel_size, dilation, backend=backend)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        gradients[backend] = [leaf.grad for leaf in leaves]
    for gradient, expected in zip(gradients["tiled"], gradients["reference"], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_splitting_the_batch_does_not_change_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(5, 20, 22, 2, 8) for _ in range(3))
    rpb = torch.randn(2, 13, 13)
    whole = neighborhood_attention(q, k, v, rpb, 7, 2, backend="tiled")
    monkeypatch.setattr(tiled, "CACHE_BYTES", 1)
    torch.testing.assert_close(neighborhood_attention(q, k, v, rpb, 7, 2, backend="tiled"), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_window_of_a_border_query_is_clamped(backend: str) -> None:
    q, k = torch.zeros(1, 9, 9, 1, 4), torch.zeros(1, 9, 9, 1, 4)
    v = torch.arange(81.0).view(1, 9, 9, 1, 1).expand(-1, -1, -1, -1, 4)
    corner = v[0, 0:3, 0:3, 0, 0].mean()
    assert neighborhood_attention(q, k, v, kernel_size=3, backend=backend)[0, 0, 0, 0, 0] == pytest.approx(corner.item())


def test_weights_sum_to_one_and_reproduce_the_output() -> None:
    q, k, v = (torch.randn(2, 8, 9, 3, 4) for _ in range(3))
    output, weights = neighborhood_attention_with_weights(q, k, v, torch.randn(3, 5, 5), kernel_size=3, dilation=2)
    assert weights.shape == (2, 3, 8, 9, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 8, 9))
    window = v[0, 0:6:2, 0:6:2, 1].reshape(9, 4)
    torch.testing.assert_close(output[0, 0, 0, 1], weights[0, 1, 0, 0] @ window)


def test_no_bias_equals_a_zero_bias() -> None:
    q, k, v = (torch.randn(1, 14, 14, 2, 8) for _ in range(3))
    torch.testing.assert_close(neighborhood_attention(q, k, v), neighborhood_attention(q, k, v, torch.zeros(2, 13, 13)))


@pytest.mark.parametrize("change", ["in place", "through data", "replaced"])
def test_changed_bias_is_detected(change: str) -> None:
    q, k, v = (torch.randn(1, 7, 7, 2, 8) for _ in range(3))
    rpb = nn.Parameter(torch.randn(2, 13, 13))
    with torch.no_grad():
        neighborhood_attention(q, k, v, rpb)
        if change == "in place":
            rpb.add_(torch.randn(2, 13, 13))
        elif change == "through data":
            rpb.data.add_(torch.randn(2, 13, 13))
        else:
            rpb.data = torch.randn(2, 13, 13)
        after = neighborhood_attention(q, k, v, rpb)
        torch.testing.assert_close(after, neighborhood_attention(q, k, v, rpb, backend="reference"), rtol=0, atol=1e-5)


def test_bias_tiles_are_cached_while_weights_do_not_change() -> None:
    q = torch.randn(1, 7, 7, 2, 8)
    rpb = nn.Parameter(torch.randn(2, 13, 13))
    with torch.no_grad():
        neighborhood_attention(q, q, q, rpb)
        values = bias_cache._values_of(rpb)
        first = list(values.values())
        neighborhood_attention(q, q, q, rpb)
    assert first
    assert bias_cache._values_of(rpb) is values
    assert [id(bias) for bias in values.values()] == [id(bias) for bias in first]


def test_bias_cache_is_bounded() -> None:
    rpb = nn.Parameter(torch.randn(1, 5, 5))
    with torch.no_grad():
        for size in range(3, 3 + 2 * bias_cache.MAX_ENTRIES):
            q = torch.randn(1, size, size, 1, 4)
            neighborhood_attention(q, q, q, rpb, kernel_size=3)
    assert len(bias_cache._values_of(rpb)) == bias_cache.MAX_ENTRIES


@torch.no_grad()
def test_bias_cache_has_no_entries_of_deleted_tables() -> None:
    q = torch.randn(1, 3, 3, 1, 4)
    bias_cache.clear()
    for _ in range(20):
        neighborhood_attention(q, q, q, torch.randn(1, 5, 5), kernel_size=3)
    assert len(bias_cache._entries) == 1


@torch.no_grad()
def test_tables_that_share_memory() -> None:
    """As the views of a flat parameter: each has its own values, and so has the same memory with other strides."""
    q, tables = torch.randn(1, 5, 5, 2, 4), torch.randn(3, 2, 5, 5)
    for rpb in (*tables, *tables.transpose(-1, -2), tables[0].expand(2, 5, 5)):
        for _ in range(2):
            expected = neighborhood_attention(q, q, q, rpb, kernel_size=3, backend="reference")
            torch.testing.assert_close(neighborhood_attention(q, q, q, rpb, kernel_size=3), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_training_works_after_inference_at_the_same_size(backend: str) -> None:
    q, rpb = torch.randn(1, 17, 19, 1, 4), nn.Parameter(torch.randn(1, 9, 9), requires_grad=False)
    with torch.inference_mode():
        neighborhood_attention(q, q, q, rpb, kernel_size=5, dilation=3, backend=backend)
    q = q.requires_grad_()
    neighborhood_attention(q, q, q, rpb, kernel_size=5, dilation=3, backend=backend).sum().backward()
    assert q.grad is not None


def test_dropout_preserves_the_mean() -> None:
    torch.manual_seed(0)
    q, v = torch.zeros(64, 7, 7, 1, 4), torch.ones(64, 7, 7, 1, 4)
    for backend in ("tiled", "reference"):
        output = neighborhood_attention(q, q, v, dropout=0.5, backend=backend)
        assert output.std() > 0.05
        assert output.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 14, 14, 2, 8, dtype=dtype) for _ in range(3))
    rpb = torch.randn(2, 13, 13, dtype=dtype)
    exact = neighborhood_attention(q.double(), k.double(), v.double(), rpb.double(), backend="reference")
    output = neighborhood_attention(q, k, v, rpb)
    assert output.dtype == dtype
    assert (output - exact).norm() / exact.norm() < (1e-2 if dtype == torch.bfloat16 else 1e-12)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((1, 6, 9, 2, 4), {}, "dilation 1 with kernel_size 7 requires a feature map of at least 7x7, got 6x9"),
        (
            (1, 9, 9, 2, 4),
            {"rpb": torch.zeros(3, 13, 13)},
            r"shape \(2, 13, 13\) for 2 heads and kernel_size 7, got \(3, 13, 13\)",
        ),
        ((1, 9, 9, 2, 4), {"backend": "cutlass"}, "'cutlass' is not known: use one of auto, reference, tiled"),
        ((9, 9, 2, 4), {}, r"one shape \(batch, height, width, heads, head_dim\), got \(9, 9, 2, 4\)"),
    ],
)
def test_invalid_arguments_raise_attention_error(shape: tuple[int, ...], arguments: dict, message: str) -> None:
    q = torch.zeros(shape)
    with pytest.raises(AttentionError, match=message):
        neighborhood_attention(q, q, q, **arguments)
    with pytest.raises(AttentionError, match="floating dtype"):
        neighborhood_attention(torch.zeros(1, 9, 9, 1, 4), *[torch.zeros(1, 9, 9, 1, 4, dtype=torch.float64)] * 2)


@pytest.mark.parametrize("with_rpb", [True, False])
def test_torch_compile_full_graph_with_gradients(with_rpb: bool) -> None:
    q, k, v = torch.randn(3, 2, 15, 17, 2, 16)
    rpb = torch.randn(2, 5, 5) if with_rpb else None

    def attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Tensor:
        return neighborhood_attention(q, k, v, rpb, 3, 2)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, attend):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, rpb) if x is not None]
        output = run(*leaves[:3], leaves[3] if with_rpb else None)
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), leaves)])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # PyTorch 2.14, for any operator
def test_tiled_operator_passes_opcheck() -> None:
    q, k, v = (torch.randn(1, 5, 6, 1, 16, requires_grad=True) for _ in range(3))
    torch.library.opcheck(tiled.tiled_operator, (q, k, v, torch.randn(1, 5, 5), 3, 1, 0.25))
