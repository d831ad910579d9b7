"""What only a CUDA card can show. `python -m pytest tests/gpu` on one; skipped elsewhere, but for tests/rehearsal."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinat.app.engine.runtimes.runtime import InferenceOptions, InferenceResult
from dinat.app.engine.runtimes.torch_runtime import TorchRuntime
from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor
from dinat.model.attention import autotune, by_name, neighborhood_attention
from dinat.model.attention.autotune import candidates, trying
from dinat.model.checkpoints.checkpoint import open_checkpoint
from tests.model.definition import assert_equals_the_definition

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("default"),  # what PyTorch has to say of a card is not known here
]

CUDA = torch.device("cuda")
REHEARSED = torch.cuda.is_available() and torch.cuda.get_device_name() == "stand-in card"
"""Whether the card is tests/rehearsal's, which is slow: then there are few examples, and small ones."""
EXACT = ["tiled", *(["triton"] if autotune.find_spec("triton") else []), *(["natten"] if autotune.find_spec("natten") else [])]
EVERYTHING = frozenset({"stem", "stage2", "pooled", "hidden_states"})


@pytest.fixture(autouse=True)
def nothing_chosen() -> Iterator[None]:
    autotune.chosen.clear()
    autotune._distrusted.clear()
    yield


def runtime(
    source: str | Path = "digits", precision: str = "fp32", attention: str = "auto", **settings: object
) -> TorchRuntime:
    return TorchRuntime(open_checkpoint(source), torch.device("cuda", 0), precision, attention, **settings)  # type: ignore[arg-type]


def pictures(count: int, side: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def scores(answers: list[InferenceResult]) -> np.ndarray:
    """(B, classes), in the order of the classes."""
    return np.stack([answer.scores[np.argsort(answer.class_ids)] for answer in answers])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=3 if REHEARSED else 60, deadline=None)
@given(
    kernel_size=st.sampled_from([3, 5, 7] if REHEARSED else [3, 5, 7, 9, 11, 13]),
    dilation=st.integers(1, 2 if REHEARSED else 8),
    spare=st.tuples(st.integers(0, 2 if REHEARSED else 30), st.integers(0, 2 if REHEARSED else 30)),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([16, 32, 64, 128]),
    with_rpb=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_candidate_equals_the_definition(
    dtype: torch.dtype,
    kernel_size: int,
    dilation: int,
    spare: tuple[int, int],
    batch: int,
    heads: int,
    head_dim: int,
    with_rpb: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    height, width = (kernel_size * dilation + more for more in spare)
    q, k, v = torch.randn(batch, height, width, 3, heads, head_dim, device=CUDA).to(dtype).unbind(3)
    side = 2 * kernel_size - 1
    rpb = torch.randn(heads, side, side, device=CUDA) if with_rpb else None
    for name in candidates(CUDA, dtype, head_dim):
        with torch.inference_mode():
            got = by_name(name, q, k, v, rpb, kernel_size, dilation, head_dim**-0.5)
        assert_equals_the_definition(got, q, k, v, rpb, kernel_size, dilation)


@pytest.mark.parametrize("backend", [*EXACT, "auto"])
def test_logits_of_a_trained_network_in_bf16_are_within_a_hundredth(backend: str) -> None:
    exact = DinatForImageClassification.from_pretrained("digits", attention="tiled", device=CUDA)
    network = DinatForImageClassification.from_pretrained("digits", device=CUDA, dtype=torch.bfloat16, attention=backend)
    pixels = torch.randn(2 if REHEARSED else 8, 3, 64, 64, device=CUDA)
    with torch.inference_mode():
        expected, got = exact(pixels).logits, network.classify(pixels.bfloat16())[0]
    assert (got - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("preset", ["mini", "large-11x11-384"])
@pytest.mark.parametrize("backend", [*EXACT, "auto"])
def test_logits_of_large_networks_in_bf16_are_near(preset: str, backend: str) -> None:
    """Random weights, whose logits are small beside what they are sums of: on a CPU they are 1.1 % off."""
    torch.manual_seed(0)
    config = DinatConfig.preset(preset)
    side = getattr(config, "image_size", 224)
    if REHEARSED:
        small = {"embed_dim": 32, "depths": [2, 1], "num_heads": [1, 2], "dilations": [[1, 2], [1]], "num_labels": 50}
        config, side = DinatConfig(**({"kernel_size": config.kernel_size} | small)), 64
    exact = DinatForImageClassification(config, attention="tiled").eval()
    network = DinatForImageClassification(config, attention=backend).eval()
    network.load_state_dict(exact.state_dict())
    exact, network = exact.to(CUDA), network.to(CUDA, torch.bfloat16)
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
        torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=1e-3, atol=1e-3)


def test_torch_compile_keeps_the_kernel() -> None:
    q, k, v = torch.randn(3, 1, 14, 14, 2, 32, device=CUDA)
    rpb = torch.randn(2, 13, 13, device=CUDA)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return neighborhood_attention(q, k, v, rpb, 7, 2, backend="triton")

    with torch.inference_mode():
        compiled = torch.compile(attend, fullgraph=True)(q, k, v)
        torch.testing.assert_close(compiled.cpu(), attend(q, k, v).cpu())


def test_auto_keeps_what_is_right_and_fastest_and_remembers_it(tmp_path: Path) -> None:
    side = 14 if REHEARSED else 56
    q, k, v = torch.randn(3, 2 if REHEARSED else 8, side, side, 2, 32, device=CUDA).bfloat16()
    rpb = torch.randn(2, 13, 13, device=CUDA)
    file = tmp_path / "choices.json"
    with torch.inference_mode(), trying(file=file):
        neighborhood_attention(q, k, v, rpb, 7, 1)
    (kept,) = autotune.chosen.values()
    assert {*kept.seconds, *kept.disabled} == set(candidates(CUDA, torch.bfloat16, 32))
    assert all(name.startswith("natten") for name in kept.disabled), kept.disabled  # which has not every kernel on every card
    assert kept.seconds[kept.backend] == min(kept.seconds.values())
    assert all(error <= 1e-2 for error in kept.errors.values())
    autotune.chosen.clear()
    with torch.inference_mode(), trying(file=file):
        neighborhood_attention(q, k, v, rpb, 7, 1)
    assert list(autotune.chosen.values()) == [kept]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", [*EXACT, "auto"])
def test_the_service_says_on_a_card_what_it_says_on_a_cpu(precision: str, attention: str) -> None:
    card = runtime("digits", precision, attention)
    cpu = TorchRuntime(open_checkpoint("digits"), torch.device("cpu"), "fp32", "tiled")
    most = 2 if REHEARSED else 8
    assert card.warm(most) == most
    assert [one for one in card.disabled if "natten" not in one.name] == []
    assert card.precision == precision
    close = 1e-5 if precision == "fp32" else 0.05
    for count in [n for n in (8, 1, 2, 3, 5) if n <= most]:
        for features in (frozenset[str](), EVERYTHING):
            wanted = [InferenceOptions(10, features)] * count
            got, expected = card.run(pictures(count), wanted), cpu.run(pictures(count), wanted)
            np.testing.assert_allclose(scores(got), scores(expected), rtol=0, atol=close)
            for mine, other in zip(got, expected, strict=True):
                assert mine.features.keys() == other.features.keys()
                if features and precision == "fp32":
                    np.testing.assert_allclose(mine.features["stage2"], other.features["stage2"], rtol=0, atol=1e-3)


def test_batches_come_from_cuda_graphs_and_two_threads_do_not_mix_them() -> None:
    card = runtime("digits", "fp32", "tiled")
    card.warm(4)
    assert card._captured is not None
    batches = [pictures(1 + seed % 4, seed=seed) for seed in range(24)]
    expected = [scores(card.run(batch, [InferenceOptions(10, frozenset({"pooled"}))] * len(batch))) for batch in batches]
    with ThreadPoolExecutor(card.lanes) as threads:
        got = list(threads.map(lambda batch: scores(card.run(batch, [InferenceOptions(10)] * len(batch))), batches))
    for mine, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5)


def test_maps_of_two_threads_do_not_mix() -> None:
    """Nothing in the network may change while it computes, not even for a moment."""
    card = runtime("digits", "bf16", "tiled")
    card.warm(1)
    wanted = [InferenceOptions(10, EVERYTHING)]
    expected = [scores(card.run(pictures(1, seed=seed), wanted)) for seed in range(8)]
    with ThreadPoolExecutor(card.lanes) as threads:
        got = list(threads.map(lambda seed: scores(card.run(pictures(1, seed=seed), wanted)), range(8)))
    np.testing.assert_allclose(np.stack(got), np.stack(expected), rtol=0, atol=1e-3)


def test_pictures_that_keep_their_aspect_are_served_at_every_size(tmp_path: Path) -> None:
    DinatForImageClassification.from_pretrained("digits").save_pretrained(tmp_path)
    DinatImageProcessor(size={"shortest_edge": 48}).save_pretrained(tmp_path)
    card, cpu = runtime(tmp_path), TorchRuntime(open_checkpoint(tmp_path), torch.device("cpu"), "fp32", "tiled")
    card.warm(2)
    for height, width in ((48, 48), (48, 64), (96, 48)):
        picture = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        got, expected = (one.run(np.stack([picture] * 2), [InferenceOptions(10)] * 2) for one in (card, cpu))
        np.testing.assert_allclose(scores(got), scores(expected), rtol=0, atol=1e-5)


def test_fp32_is_fp32_in_convolutions_too() -> None:
    card = runtime("digits", "fp32", "tiled")
    network = DinatForImageClassification.from_pretrained("digits")
    pixels = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        got, expected = card._network.dinat.embeddings(pixels.to(CUDA)).cpu(), network.dinat.embeddings(pixels)
    assert (got - expected).norm() <= 1e-6 * expected.norm()


def test_a_card_out_of_memory_says_so() -> None:
    card = runtime("digits", "fp32", "tiled")
    assert card.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not card.is_out_of_memory(RuntimeError("something else"))
    assert card.memory() is not None
