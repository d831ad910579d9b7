"""Tests on a CUDA GPU: `python -m pytest tests/gpu`. Without a GPU they are skipped, except in tests/rehearsal."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dinat.app.engine.runtimes.runtime import InferenceOptions, InferenceResult
from dinat.app.engine.runtimes.torch_runtime import TorchRuntime
from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor
from dinat.model.attention import autotune, neighborhood_attention, run_candidate
from dinat.model.attention.autotune import autotuning, candidates
from dinat.model.checkpoints.checkpoint import open_checkpoint
from dinat.model.cpu.fast_layers import LayerNorm
from dinat.model.gpu.steps import Linear, Mlp
from dinat.model.normalization import value_table
from tests.model.reference import assert_matches_reference

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("default"),  # PyTorch's warnings depend on the GPU
]

CUDA = torch.device("cuda")
REHEARSED = torch.cuda.is_available() and torch.cuda.get_device_name() == "Fake GPU"
"""Whether the GPU is the fake one of tests/rehearsal, which is slow: then there are few and small examples."""
EXACT = ["tiled", *(["triton"] if autotune.find_spec("triton") else []), *(["natten"] if autotune.find_spec("natten") else [])]
WIDTHS = [(32, 64), (64, 192), (96, 192), (192, 384), (256, 512), (1536, 3072)]
"""Channels and hidden features of layers."""
EVERYTHING = frozenset({"stem", "stage2", "pooled", "hidden_states"})


@pytest.fixture(autouse=True)
def no_selections() -> Iterator[None]:
    autotune.selections.clear()
    autotune._failed.clear()
    yield


def gpu_runtime(source: str | Path = "digits", precision: str = "fp32", attention: str = "auto") -> TorchRuntime:
    return TorchRuntime(open_checkpoint(source), torch.device("cuda", 0), precision, attention)


def random_images(count: int, side: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def scores(results: list[InferenceResult]) -> np.ndarray:
    """(B, classes), in the order of the classes."""
    return np.stack([result.scores[np.argsort(result.class_ids)] for result in results])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=3 if REHEARSED else 20, deadline=None)
@given(
    kernel_size=st.sampled_from([3, 5, 7] if REHEARSED else [3, 5, 7, 9, 11, 13]),
    dilation=st.integers(1, 2 if REHEARSED else 8),
    margin=st.tuples(st.integers(0, 2 if REHEARSED else 30), st.integers(0, 2 if REHEARSED else 30)),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([16, 32, 64, 128]),
    with_rpb=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_candidate_matches_reference(
    dtype: torch.dtype,
    kernel_size: int,
    dilation: int,
    margin: tuple[int, int],
    batch: int,
    heads: int,
    head_dim: int,
    with_rpb: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    height, width = (kernel_size * dilation + extra for extra in margin)
    q, k, v = torch.randn(batch, height, width, 3, heads, head_dim, device=CUDA).to(dtype).unbind(3)
    side = 2 * kernel_size - 1
    rpb = torch.randn(heads, side, side, device=CUDA) if with_rpb else None
    for name in candidates(CUDA, dtype, head_dim):
        with torch.inference_mode():
            output = run_candidate(name, q, k, v, rpb, kernel_size, dilation, head_dim**-0.5)
        assert_matches_reference(output, q, k, v, rpb, kernel_size, dilation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_scale", [False, True])
@pytest.mark.parametrize(("channels", "hidden"), [(64, 192), (32, 64)] if REHEARSED else WIDTHS)
def test_every_candidate_of_a_fused_step_matches_float64(
    channels: int, hidden: int, has_scale: bool, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    torch.manual_seed(0)
    x, features = (torch.randn(2, 7, 9, width, device=CUDA).to(dtype) for width in (channels, hidden))
    scale = torch.randn(channels, device=CUDA).to(dtype) if has_scale else None
    norm = LayerNorm(channels).to(CUDA, dtype)
    up, down = nn.Linear(channels, hidden).to(CUDA, dtype), nn.Linear(hidden, channels).to(CUDA, dtype)
    steps: list[tuple[Any, list[torch.Tensor]]] = [
        (Linear(up, norm), [x]),
        (Linear(up, norm, is_gelu=True), [x]),
        (Linear(down, scale=scale), [features, x]),
        (Mlp(norm, up, down, scale), [x]),
    ]
    with torch.inference_mode():
        for step, inputs in steps:
            names = step.candidates(inputs[0])
            assert len(names) > 1 or (isinstance(step, Mlp) and channels > 256)
            assert all(step.relative_error(name, *inputs) <= autotune.MAX_ERROR[dtype] for name in names), names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalized_pixels_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    pixels_kernel = pytest.importorskip("dinat.model.gpu.pixels_kernel", exc_type=ImportError)
    processor = DinatImageProcessor()
    pixels = torch.randint(0, 256, (3, 33, 35, 3), dtype=torch.uint8)
    table = value_table(processor.rescale_factor, (tuple(processor.image_mean), tuple(processor.image_std)), CUDA)
    with torch.inference_mode():
        output = pixels_kernel.launch(pixels.to(CUDA), table, dtype).permute(0, 3, 1, 2)
        torch.testing.assert_close(processor.normalize(pixels.to(CUDA), dtype).cpu(), processor.normalize(pixels, dtype))
    # Triton's interpreter truncates to bfloat16.
    tolerance = 2**-7 if REHEARSED and dtype == torch.bfloat16 else 0
    torch.testing.assert_close(output.cpu(), processor.normalize(pixels, dtype), rtol=tolerance, atol=0)


@pytest.mark.parametrize("backend", [*EXACT, "auto"])
def test_logits_of_a_trained_network_in_bf16_match_float32(backend: str) -> None:
    exact = DinatForImageClassification.from_pretrained("digits", attention="tiled", device=CUDA)
    network = DinatForImageClassification.from_pretrained("digits", device=CUDA, dtype=torch.bfloat16, attention=backend)
    pixels = torch.randn(2 if REHEARSED else 8, 3, 64, 64, device=CUDA)
    with torch.inference_mode():
        expected, logits = exact(pixels).logits, network.classify(pixels.bfloat16())[0]
    assert (logits - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("preset", ["mini", "large-11x11-384"])
@pytest.mark.parametrize("backend", [*EXACT, "auto"])
def test_logits_of_large_networks_in_bf16_match_float32(preset: str, backend: str) -> None:
    """With random weights, logits are small compared with the terms of their sums: on a CPU their error is 1.1 %."""
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
        expected, logits = exact(pixels).logits, network(pixels.bfloat16()).logits.float()
    assert (logits - expected).norm() <= 0.02 * expected.norm()


def test_gradients_match_reference() -> None:
    inputs = [torch.randn(2, 16, 17, 2, 32, device=CUDA, requires_grad=True) for _ in range(3)]
    rpb = torch.randn(2, 13, 13, device=CUDA, requires_grad=True)
    gradients = [
        torch.autograd.grad(neighborhood_attention(*inputs, rpb, 7, 2, backend=backend).square().sum(), [*inputs, rpb])
        for backend in ("triton", "reference")
    ]
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient.cpu(), expected.cpu(), rtol=1e-3, atol=1e-3)


def test_torch_compile_supports_the_kernel() -> None:
    q, k, v = torch.randn(3, 1, 14, 14, 2, 32, device=CUDA)
    rpb = torch.randn(2, 13, 13, device=CUDA)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return neighborhood_attention(q, k, v, rpb, 7, 2, backend="triton")

    with torch.inference_mode():
        compiled = torch.compile(attend, fullgraph=True)(q, k, v)
        torch.testing.assert_close(compiled.cpu(), attend(q, k, v).cpu())


def test_auto_keeps_the_fastest_correct_backend_and_stores_it(tmp_path: Path) -> None:
    side = 14 if REHEARSED else 56
    q, k, v = torch.randn(3, 2 if REHEARSED else 8, side, side, 2, 32, device=CUDA).bfloat16()
    rpb = torch.randn(2, 13, 13, device=CUDA)
    file = tmp_path / "selections.json"
    with torch.inference_mode(), autotuning(file=file):
        neighborhood_attention(q, k, v, rpb, 7, 1)
    (selection,) = autotune.selections.values()
    assert {*selection.seconds, *selection.disabled} == set(candidates(CUDA, torch.bfloat16, 32))
    # natten lacks kernels for some GPUs.
    assert all(name.startswith("natten") for name in selection.disabled), selection.disabled
    assert selection.seconds[selection.backend] == min(selection.seconds.values())
    assert all(error <= 1e-2 for error in selection.errors.values())
    autotune.selections.clear()
    with torch.inference_mode(), autotuning(file=file):
        neighborhood_attention(q, k, v, rpb, 7, 1)
    assert list(autotune.selections.values()) == [selection]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", [*EXACT, "auto"])
def test_runtime_on_a_gpu_matches_the_cpu(precision: str, attention: str) -> None:
    gpu = gpu_runtime("digits", precision, attention)
    cpu = TorchRuntime(open_checkpoint("digits"), torch.device("cpu"), "fp32", "tiled")
    max_batch = 2 if REHEARSED else 8
    assert gpu.warm(max_batch) == max_batch
    assert [disabled for disabled in gpu.disabled if "natten" not in disabled.name] == []
    assert gpu.precision == precision
    tolerance = 1e-5 if precision == "fp32" else 0.05
    for count in [n for n in (8, 1, 2, 3, 5) if n <= max_batch]:
        for features in (frozenset[str](), EVERYTHING):
            options = [InferenceOptions(10, features)] * count
            results, expected = gpu.run(random_images(count), options), cpu.run(random_images(count), options)
            np.testing.assert_allclose(scores(results), scores(expected), rtol=0, atol=tolerance)
            for result, reference in zip(results, expected, strict=True):
                assert result.features.keys() == reference.features.keys()
                if features and precision == "fp32":
                    np.testing.assert_allclose(result.features["stage2"], reference.features["stage2"], rtol=0, atol=1e-3)


def test_cuda_graphs_can_be_used_by_two_threads() -> None:
    gpu = gpu_runtime("digits", "fp32", "tiled")
    gpu.warm(4)
    assert gpu._captured is not None
    batches = [random_images(1 + seed % 4, seed=seed) for seed in range(24)]
    expected = [scores(gpu.run(batch, [InferenceOptions(10, frozenset({"pooled"}))] * len(batch))) for batch in batches]
    with ThreadPoolExecutor(gpu.lanes) as threads:
        results = list(threads.map(lambda batch: scores(gpu.run(batch, [InferenceOptions(10)] * len(batch))), batches))
    for result, reference in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, reference, rtol=0, atol=1e-5)


def test_features_can_be_computed_by_two_threads() -> None:
    """The forward pass must not modify the network."""
    gpu = gpu_runtime("digits", "bf16", "tiled")
    gpu.warm(1)
    options = [InferenceOptions(10, EVERYTHING)]
    expected = [scores(gpu.run(random_images(1, seed=seed), options)) for seed in range(8)]
    with ThreadPoolExecutor(gpu.lanes) as threads:
        results = list(threads.map(lambda seed: scores(gpu.run(random_images(1, seed=seed), options)), range(8)))
    np.testing.assert_allclose(np.stack(results), np.stack(expected), rtol=0, atol=1e-3)


def test_images_that_keep_their_aspect_ratio_have_any_size(tmp_path: Path) -> None:
    DinatForImageClassification.from_pretrained("digits").save_pretrained(tmp_path)
    DinatImageProcessor(size={"shortest_edge": 48}).save_pretrained(tmp_path)
    gpu, cpu = gpu_runtime(tmp_path), TorchRuntime(open_checkpoint(tmp_path), torch.device("cpu"), "fp32", "tiled")
    gpu.warm(2)
    for height, width in ((48, 48), (48, 64), (96, 48)):
        image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        result, expected = (runtime.run(np.stack([image] * 2), [InferenceOptions(10)] * 2) for runtime in (gpu, cpu))
        np.testing.assert_allclose(scores(result), scores(expected), rtol=0, atol=1e-5)


def test_fp32_is_fp32_in_convolutions_too() -> None:
    gpu = gpu_runtime("digits", "fp32", "tiled")
    network = DinatForImageClassification.from_pretrained("digits")
    pixels = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        output, expected = gpu._network.dinat.embeddings(pixels.to(CUDA)).cpu(), network.dinat.embeddings(pixels)
    assert (output - expected).norm() <= 1e-6 * expected.norm()


def test_out_of_memory_is_detected() -> None:
    gpu = gpu_runtime("digits", "fp32", "tiled")
    assert gpu.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert gpu.is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert gpu.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not gpu.is_out_of_memory(RuntimeError("something else"))
    assert gpu.memory() is not None
