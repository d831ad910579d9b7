"""What only a CUDA card can show. `python -m pytest tests/gpu` on one; skipped elsewhere."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import DinatConfig, DinatForImageClassification
from model.attention import choice, neighborhood_attention
from model.attention.choice import candidates
from tests.model.definition import assert_equals_the_definition

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")

CUDA = torch.device("cuda")
EXACT = candidates(CUDA)


@pytest.mark.parametrize("backend", EXACT)
@settings(max_examples=60, deadline=None)
@given(
    kernel_size=st.sampled_from([3, 5, 7, 9, 11, 13]),
    dilation=st.integers(1, 8),
    spare=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([16, 32, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    with_rpb=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_backend_equals_the_definition(
    backend: str,
    kernel_size: int,
    dilation: int,
    spare: tuple[int, int],
    batch: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    with_rpb: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    height, width = (kernel_size * dilation + more for more in spare)
    q, k, v = torch.randn(batch, height, width, 3, heads, head_dim, device=CUDA).to(dtype).unbind(3)
    side = 2 * kernel_size - 1
    rpb = torch.randn(heads, side, side, device=CUDA) if with_rpb else None
    with torch.inference_mode():
        got = neighborhood_attention(q, k, v, rpb, kernel_size, dilation, backend=backend)
    assert_equals_the_definition(got, q, k, v, rpb, kernel_size, dilation)


@pytest.mark.parametrize("backend", [*EXACT, "auto"])
def test_logits_of_a_trained_network_in_bf16_are_within_a_hundredth(backend: str) -> None:
    exact = DinatForImageClassification.from_pretrained("digits", device=CUDA)
    network = DinatForImageClassification.from_pretrained("digits", device=CUDA, dtype=torch.bfloat16, attention=backend)
    pixels = torch.randn(8, 3, 64, 64, device=CUDA)
    with torch.inference_mode():
        expected, got = exact(pixels).logits, network.classify(pixels.bfloat16())[0]
    assert (got - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("preset", ["mini", "large-11x11-384"])
@pytest.mark.parametrize("backend", [*EXACT, "auto"])
def test_logits_of_large_networks_in_bf16_are_near(preset: str, backend: str) -> None:
    """Random weights, whose logits are small beside what they are sums of: on a CPU they are 1.1 % off."""
    torch.manual_seed(0)
    config = DinatConfig.preset(preset)
    exact = DinatForImageClassification(config).eval().to(CUDA)
    network = DinatForImageClassification(config, attention=backend).eval()
    network.load_state_dict(exact.state_dict())
    network = network.to(CUDA, torch.bfloat16)
    side = getattr(config, "image_size", 224)
    pixels = torch.randn(2, 3, side, side, device=CUDA)
    with torch.inference_mode():
        expected, got = exact(pixels).logits, network(pixels.bfloat16()).logits.float()
    assert (got - expected).norm() <= 0.02 * expected.norm()


def test_gradients_are_those_of_the_definition() -> None:
    inputs = [torch.randn(2, 16, 17, 2, 32, device=CUDA, requires_grad=True) for _ in range(3)]
    rpb = torch.randn(2, 13, 13, device=CUDA, requires_grad=True)
    found = [
        torch.autograd.grad(neighborhood_attention(*inputs, rpb, 7, 2, backend=backend).square().sum(), [*inputs, rpb])
        for backend in ("triton", "reference")
    ]
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_torch_compile_keeps_the_kernel() -> None:
    q, k, v = torch.randn(3, 1, 14, 14, 2, 32, device=CUDA)
    rpb = torch.randn(2, 13, 13, device=CUDA)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return neighborhood_attention(q, k, v, rpb, 7, 2, backend="triton")

    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(attend, fullgraph=True)(q, k, v), attend(q, k, v))


def test_auto_keeps_what_was_fastest() -> None:
    q, k, v = torch.randn(3, 8, 56, 56, 2, 32, device=CUDA).bfloat16()
    choice.chosen.clear()
    with torch.inference_mode(), choice.timing():
        neighborhood_attention(q, k, v, torch.randn(2, 13, 13, device=CUDA), 7, 1)
    (kept,) = choice.chosen.values()
    assert set(kept.seconds) == set(EXACT)
    assert kept.seconds[kept.backend] == min(kept.seconds.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_service_says_on_a_card_what_it_says_on_a_cpu(precision: str) -> None:
    from app.engine.runtime import Wanted
    from app.engine.runtimes import load_runtimes
    from app.settings import Settings

    cuda, cpu = (
        load_runtimes(Settings(_env_file=None, runtime="torch", device=device, precision=named))[0]
        for device, named in (("cuda", precision), ("cpu", "fp32"))
    )
    random = np.random.default_rng(0)
    for count in (8, 1, 2, 3, 5):
        pixels = [random.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(count)]
        for features in (frozenset[str](), frozenset({"stage2", "pooled", "hidden_states"})):
            wanted = [Wanted(10, features)] * count
            for got, expected in zip(cuda.run(pixels, wanted), cpu.run(pixels, wanted), strict=True):
                order = np.argsort(got.class_ids), np.argsort(expected.class_ids)
                close = 1e-4 if precision == "fp32" else 0.05
                np.testing.assert_allclose(got.scores[order[0]], expected.scores[order[1]], rtol=0, atol=close)
                assert got.features.keys() == expected.features.keys()
